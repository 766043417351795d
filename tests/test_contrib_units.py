"""The output units of a layer: an oracle in NumPy that knows Flax's shapes, and nothing of axis roles."""

import subprocess
import sys

import chex
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import init, normal
from hypothesis import given
from hypothesis import strategies as st

import bnp_optax as bnp
from bnp_optax.contrib.units import map_layers, norms, sum_over_units, transform_layers, unit_norms
from bnp_optax.trees import Weights, to_canonical

# Each layer with the axes of its kernel, in Flax's own shape, that hold one output unit's weights.
LAYERS = {
    "dense": (nn.Dense(5), (7, 3), (0,)),
    "one input": (nn.Dense(5), (7, 1), (0,)),
    "conv1d": (nn.Conv(4, (3,)), (2, 6, 3), (0, 1)),
    "conv2d": (nn.Conv(4, (3, 2)), (2, 6, 6, 3), (0, 1, 2)),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=3), (2, 6, 6, 6), (0, 1, 2)),
    "depthwise": (nn.Conv(6, (3, 3), feature_group_count=6), (2, 6, 6, 6), (0, 1, 2)),
    "transposed": (nn.ConvTranspose(4, (3, 3)), (2, 6, 6, 3), (0, 1, 2)),
    "transposed kernel": (nn.ConvTranspose(4, (3, 3), transpose_kernel=True), (2, 6, 6, 3), (0, 1, 3)),
    "several axes": (nn.DenseGeneral((2, 5), axis=(-2, -1)), (7, 3, 4), (0, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_norms_are_those_of_the_axes_that_lead_to_an_output(name):
    model, shape, axes = LAYERS[name]
    x = normal(0, *shape)
    kernel = init(model, x)["kernel"]
    (layer,) = bnp.linen.find_layers(model, x).included
    expected = np.sqrt(np.square(np.asarray(kernel, np.float64)).sum(axes))
    norms = unit_norms(to_canonical(layer, Weights(kernel, init(model, x)["bias"]), jnp.float32).kernel)
    np.testing.assert_allclose(norms.ravel(), expected.ravel(), rtol=1e-6)


@given(st.integers(-30, 30), st.sampled_from([1, 2, 3, 6]), st.integers(0, 9))
def test_norms_are_euclidean_at_every_scale(exponent, num_groups, seed):
    """Beside units of other scales, whose squares float32 does not hold."""
    array = np.random.default_rng(seed).normal(size=(1, 2, 4, 2, 3)) * 10.0 ** (exponent * np.array([1, 0, -1]))
    array = array.astype(np.float32)
    exact = np.sqrt(np.square(array.astype(np.float64)).sum((2, 3), keepdims=True))
    np.testing.assert_allclose(unit_norms(array), exact, rtol=1e-5)
    shared = np.sqrt(np.square(exact).reshape(num_groups, -1).sum(1)).repeat(6 // num_groups).reshape(exact.shape)
    np.testing.assert_allclose(unit_norms(array, num_groups), shared, rtol=1e-5)


def test_norms_of_what_is_not_finite_are_not_and_change_no_other():
    array = jnp.array([[1.0, jnp.inf], [jnp.nan, 2.0], [3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_array_equal(norms(array, (1,)).ravel(), [jnp.inf, jnp.nan, 5.0, 0.0])
    assert norms(jnp.zeros((2, 0)), (1,)).ravel().tolist() == [0, 0]


def test_attention_sums_over_heads_only_where_they_are_inputs():
    model, x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6), normal(0, 2, 5, 4)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    for name, axes in (("query", 0), ("out", (0, 1))):
        weights = Weights(params[name]["kernel"], params[name]["bias"])
        expected = np.square(np.asarray(weights.kernel, np.float64)).sum(axes)
        sums = sum_over_units(jnp.square(to_canonical(layers[name], weights, jnp.float32).kernel))
        np.testing.assert_allclose(sums.ravel(), expected.ravel(), rtol=1e-6)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_groups_of_units_are_neighbouring_outputs(stack, group, per_group, num_groups, seed):
    """With as many outputs as fill the groups; outputs of a grouped layer are counted group by group."""
    outputs = per_group * num_groups
    array = np.random.default_rng(seed).normal(size=(stack, group, 2, 3, outputs))
    sums = np.asarray(sum_over_units(jnp.asarray(array, jnp.float32), group * num_groups))
    for s in range(stack):
        for g in range(group):
            for first in range(0, outputs, per_group):
                expected = array[s, g, :, :, first : first + per_group].sum()
                np.testing.assert_allclose(sums[s, g, 0, 0, first : first + per_group], expected, rtol=1e-4, atol=1e-4)


def test_groups_may_join_those_of_a_grouped_layer():
    array = jnp.arange(12.0).reshape(1, 4, 1, 1, 3)
    np.testing.assert_array_equal(sum_over_units(array, 2).ravel(), np.repeat([15.0, 51.0], 6))
    np.testing.assert_array_equal(sum_over_units(array, 1).ravel(), np.full(12, 66.0))


@pytest.mark.parametrize("num_groups", [0, -1, 5, 7])
def test_groups_that_do_not_divide_the_outputs_are_refused(num_groups):
    with pytest.raises(ValueError, match=rf"num_groups is {num_groups}, which must divide the 6 outputs"):
        sum_over_units(jnp.ones((1, 2, 1, 1, 3)), num_groups)


LAYER = bnp.Layers((bnp.Layer.dense(("w",), (3, 2), bias=("b",)),))


def test_layers_are_changed_in_wide_numbers_and_come_back_as_they_were():
    tree = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16), "other": jnp.ones(4, jnp.int8)}
    seen = []

    def double(layer, update, weights):
        seen.append((layer.path, update.kernel.dtype, weights.bias.dtype, update.kernel.shape))
        return Weights(2 * update.kernel, 3 * update.bias)

    new = map_layers(double, tree, tree, LAYER)
    assert seen == [("w", jnp.float32, jnp.float32, (1, 1, 3, 1, 2))]
    expected = {"w": 2 * tree["w"], "b": 3 * tree["b"], "other": tree["other"]}
    chex.assert_trees_all_equal(new, expected)
    chex.assert_trees_all_equal_dtypes(new, tree)


def test_parameters_may_be_needed():
    tree = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    of_parameters = transform_layers(lambda layer, update, weights: weights, LAYER)
    with pytest.raises(ValueError, match=r"needs the parameters: call update\(updates, state, params\)"):
        of_parameters.update(tree, of_parameters.init(tree))
    of_updates = transform_layers(lambda layer, update, weights: weights or update, LAYER, needs_params=False)
    for params in (None, optax.tree.zeros_like(tree)):
        chex.assert_trees_all_equal(of_updates.update(tree, of_updates.init(tree), params)[0], tree)


def test_the_package_is_imported_on_demand():
    program = "import sys, bnp_optax; sys.exit(any(name.startswith('bnp_optax.contrib') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0  # noqa: S603
