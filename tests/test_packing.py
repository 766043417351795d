"""The numbers of all layers in a few vectors, against loops over the layers, in float64."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnp_optax as bnp
from bnp_optax.packing import Packing

pytestmark = pytest.mark.usefixtures("x64")

sizes = st.integers(1, 3)
shapes = st.lists(st.tuples(sizes, sizes, sizes), min_size=1, max_size=5)  # stack, group, input of each layer
seeds = st.integers(0, 2**16)
PARTS = ("entries", "rows", "inputs")


def layers_of(shapes):
    """Layers whose moments have these shapes."""

    def layer(path, shape):
        return bnp.Layer("Dense", bnp.Parameter(path, (*shape, 2), split=(*shape, 2), roles="sgio"), None, path)

    return [layer((f"layer{k}", "kernel"), shape) for k, shape in enumerate(shapes)]


def by_loop(packing):
    """The index `(layer, entry, group, input)` of every input, of every row and of every entry, in their order."""
    entries, rows, inputs = [], [], []
    for path, (stack, group, size) in packing.shapes:
        for e in range(stack):
            entries.append((path, e))
            for g in range(group):
                rows.append((path, e, g))
                inputs.extend((path, e, g, i) for i in range(size))
    return entries, rows, inputs


@given(shapes, seeds)
def test_places_are_a_partition_and_do_not_depend_on_the_order_of_the_layers(shapes, seed):
    layers = layers_of(shapes)
    packing = Packing.of(layers)
    assert Packing.of(np.random.default_rng(seed).permutation(np.array(layers, object))) == packing
    assert {layer.path: layer.moments_shape for layer in layers} == dict(packing.shapes)
    assert packing.size == tuple(map(len, by_loop(packing)))
    for places in (packing.places.values(), packing.blocks):
        for k, part in enumerate(PARTS):
            ranges = [range(packing.size[k])[getattr(place, part)] for place in places]
            assert list(itertools.chain(*ranges)) == list(range(packing.size[k]))
            assert [len(r) for r in ranges] == [math.prod(place.shape[: k + 1]) for place in places]


@given(shapes)
def test_neighbours_of_equal_shape_are_one_block(shapes):
    packing = Packing.of(layers_of(shapes))
    rest = [block.shape[1:] for block in packing.blocks]
    assert len(set(rest)) == len(rest) == len({shape[1:] for shape in shapes})
    for block in packing.blocks:
        assert block.shape[0] == sum(shape[0] for shape in shapes if shape[1:] == block.shape[1:])


@functools.partial(jax.jit, static_argnums=0)
def repeated_and_reduced(packing, of_entries, of_rows, of_inputs):
    repeated = packing.entries_to_rows(of_entries), packing.rows_to_inputs(of_rows)
    reductions = (jnp.max, jnp.sum)
    return (
        repeated,
        [packing.over_inputs(reduction, of_inputs) for reduction in reductions],
        [packing.over_groups(reduction, of_rows) for reduction in reductions],
    )


@settings(max_examples=10)
@given(shapes, seeds)
def test_repetitions_and_reductions_are_loops(shapes, seed):
    packing, rng = Packing.of(layers_of(shapes)), np.random.default_rng(seed)
    entries, rows, inputs = by_loop(packing)
    numbers = [dict(zip(index, rng.normal(size=len(index)), strict=True)) for index in (entries, rows, inputs)]
    of_entries, of_rows, of_inputs = numbers
    vectors = [np.array(list(of_index.values())) for of_index in numbers]
    (to_rows, to_inputs), over_inputs, over_groups = repeated_and_reduced(packing, *vectors)

    np.testing.assert_array_equal(to_rows, [of_entries[row[:2]] for row in rows])
    np.testing.assert_array_equal(to_inputs, [of_rows[index[:3]] for index in inputs])
    for k, reduction in enumerate((max, sum)):
        expected = [reduction(x for index, x in of_inputs.items() if index[:3] == row) for row in rows]
        np.testing.assert_allclose(over_inputs[k], expected, rtol=1e-12)
        expected = [reduction(x for index, x in of_rows.items() if index[:2] == entry) for entry in entries]
        np.testing.assert_allclose(over_groups[k], expected, rtol=1e-12)


@given(shapes)
def test_a_number_of_each_layer_is_one_of_each_of_its_entries(shapes):
    packing = Packing.of(layers_of(shapes))
    numbers = {path: float(k) for k, path in enumerate(packing.places)}
    np.testing.assert_array_equal(packing.per_entry(numbers.get), [numbers[path] for path, _ in by_loop(packing)[0]])


@settings(max_examples=10)
@given(shapes, seeds)
def test_what_is_packed_is_read_by_layer(shapes, seed):
    """A layer without a record has zeros."""
    layers, rng = layers_of(shapes), np.random.default_rng(seed)
    packing = Packing.of(layers)

    def numbers(shape):
        return rng.normal(size=shape)

    def record(stack, *features):
        moments = numbers((stack, *features)), np.square(numbers((stack, *features)))
        return bnp.InputMoments.of(*moments, rng.integers(1, 9, stack), rng.integers(1, 9, stack).astype(float))

    records = {
        layer.path: record(*moments) for layer, moments in zip(layers, shapes, strict=True) if rng.random() < 0.8
    }

    @jax.jit
    def packed_and_read(records, damping):
        packed = packing.pack(records, np.float64)
        counts = packed.examples, packed.positions, packed.examples
        statistics = bnp.Statistics(packing, packed.mean, packed.variance, damping, *counts)
        return statistics, {path: statistics[path] for path in statistics}

    damping = numbers(packing.size[1])
    statistics, by_layer = packed_and_read(records, damping)
    assert set(statistics) == set(packing.places)
    for layer, (stack, group, size) in zip(layers, shapes, strict=True):
        read, record = by_layer[layer.path], records.get(layer.path)
        for actual, field in ((read.mean, "mean"), (read.variance, "variance")):
            assert actual.shape == (stack, group, size)
            np.testing.assert_allclose(actual, getattr(record, field, np.zeros(actual.shape)), rtol=1e-12)
        for actual, field in ((read.scale, "examples"), (read.seen, "positions"), (read.skipped, "examples")):
            np.testing.assert_array_equal(actual, getattr(record, field, np.zeros(stack)))
        of_layer = [x for x, row in zip(damping, by_loop(packing)[1], strict=True) if row[0] == layer.path]
        np.testing.assert_array_equal(read.damping.ravel(), of_layer)
