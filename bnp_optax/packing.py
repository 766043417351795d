"""The numbers of all layers behind one another in a few vectors, so that a step computes with all layers at once.

What is computed for every input of every layer (new means, new variances, ...) then takes as many operations for a
hundred layers as for one: compilers and accelerators are paid by the operation. Of the layers "a" (3 inputs) and "b"
(8 inputs) a vector of all inputs holds 11 numbers, ``a a a b b b b b b b b``, and one of all rows two, ``a b``.

An *entry* is one of the copies of a layer that a stack holds, a *row* one group of an entry, an *input* one input of a
row: a layer with moments ``[stack, group, input]`` has stack, stack x group and stack x group x input of them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax.layers import Layer
from bnp_optax.moments import InputMoments, mean_and_variance


class Place(NamedTuple):
    """Where the numbers of one layer, or of neighbours of equal shape, lie.

    Attributes:
      shape: ``(stack, group, input)``.
      entries: their part of what has one number an entry.
      rows: their part of what has one number a row.
      inputs: their part of what has one number an input.
    """

    shape: tuple[int, int, int]
    entries: slice
    rows: slice
    inputs: slice


class Batch(NamedTuple):
    """The records of a batch.

    Attributes:
      mean: the mean of every input.
      variance: its variance.
      examples: N of every entry.
      positions: how many input vectors there were of every entry.
    """

    mean: jax.Array
    variance: jax.Array
    examples: jax.Array
    positions: jax.Array


@dataclasses.dataclass(frozen=True)
class Packing:
    """The order of the layers: those whose moments have equal shape are neighbours.

    Attributes:
      shapes: ``(stack, group, input)`` of every layer with its path, in this order.

    Example:
      >>> from bnp_optax import Layer
      >>> packing = Packing.of([Layer.dense(("b", "kernel"), (8, 2)), Layer.dense(("a", "kernel"), (3, 8))])
      >>> packing.places["b"].inputs, packing.size
      (slice(3, 11, None), (2, 2, 11))
      >>> print(packing.over_inputs(jnp.max, jnp.arange(11.0)))
      [ 2. 10.]
    """

    shapes: tuple[tuple[str, tuple[int, int, int]], ...]

    @classmethod
    def of(cls, layers: Iterable[Layer]) -> "Packing":
        """Returns the packing of these layers."""
        shapes = ((layer.path, layer.moments_shape) for layer in layers)
        return cls(tuple(sorted(shapes, key=lambda item: (item[1][1:], item[0]))))

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """The place of every layer by its path."""
        return dict(zip((path for path, _ in self.shapes), _places(shape for _, shape in self.shapes), strict=True))

    @functools.cached_property
    def blocks(self) -> list[Place]:
        """The places of the neighbours of equal shape: what one array of shape ``(stacks, group, input)`` can hold."""
        equal = itertools.groupby((shape for _, shape in self.shapes), key=lambda shape: shape[1:])
        return _places((sum(stack for stack, *_ in shapes), *rest) for rest, shapes in equal)

    @property
    def size(self) -> tuple[int, int, int]:
        """How many entries, rows and inputs there are."""
        last = self.blocks[-1]
        return last.entries.stop, last.rows.stop, last.inputs.stop

    def per_entry(self, number: Callable[[str], float]) -> np.ndarray:
        """Returns a vector of one number an entry, from the number of each layer's path."""
        return np.concatenate([np.full(stack, number(path)) for path, (stack, _, _) in self.shapes])

    def entries_to_rows(self, x: jax.Array) -> jax.Array:
        """Repeats the number of each entry for its groups."""
        return self._repeat(x, [group for _, (stack, group, _) in self.shapes for _ in range(stack)])

    def rows_to_inputs(self, x: jax.Array) -> jax.Array:
        """Repeats the number of each row for its inputs."""
        return self._repeat(x, [inputs for _, (stack, group, inputs) in self.shapes for _ in range(stack * group)])

    def over_inputs(self, reduction: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        """Reduces every row to one number, for instance by ``jnp.max``."""
        rows = [x[block.inputs].reshape(-1, block.shape[2]) for block in self.blocks]
        return jnp.concatenate([reduction(block, axis=1) for block in rows])

    def over_groups(self, reduction: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        """Reduces the rows of every entry to one number."""
        if self.size[0] == self.size[1]:
            return x
        entries = [x[block.rows].reshape(block.shape[:2]) for block in self.blocks]
        return jnp.concatenate([reduction(block, axis=1) for block in entries])

    def pack(self, records: Mapping[str, InputMoments], dtype: jax.typing.DTypeLike) -> Batch:
        """Returns the moments and counts of all layers as vectors of a dtype; a layer without a record has zeros."""

        def vector(field: str, size: Callable[[Place], int]) -> jax.Array:
            parts = [
                jnp.ravel(getattr(records[path], field)).astype(dtype)
                if path in records
                else np.zeros(size(place), dtype)
                for path, place in self.places.items()
            ]
            return jnp.concatenate(parts)

        def inputs(place: Place) -> int:
            return math.prod(place.shape)

        def entries(place: Place) -> int:
            return place.shape[0]

        total, scatter, squared = (vector(field, inputs) for field in ("total", "scatter", "squared"))
        record = InputMoments(total, scatter, squared, vector("examples", entries), vector("positions", entries))
        positions = self.rows_to_inputs(self.entries_to_rows(record.positions))
        return Batch(*mean_and_variance(record, positions), record.count, record.positions)

    def _repeat(self, x: jax.Array, counts: list[int]) -> jax.Array:
        if set(counts) == {1}:
            return x
        index = np.repeat(np.arange(len(counts)), counts)
        return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _places(shapes: Iterable[tuple[int, int, int]]) -> list[Place]:
    """Returns the places of what lies behind one another."""
    places, entry, row, first = [], 0, 0, 0
    for stack, group, inputs in shapes:
        end = entry + stack, row + stack * group, first + stack * group * inputs
        places.append(Place((stack, group, inputs), slice(entry, end[0]), slice(row, end[1]), slice(first, end[2])))
        entry, row, first = end
    return places
