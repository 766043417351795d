"""Batch Group Normalization against the formula written out in NumPy, and the normalizations that it becomes."""

import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, normal, weigh
from normalizations import both_apis, functional

from bnp_optax.contrib import batch_group_normalize, batch_group_normalize_inference

pytestmark = pytest.mark.usefixtures("x64")


def written_out(x, num_groups, epsilon=1e-5):
    """Returns the batch `[examples, height, width, channels]` normalized, and each group's mean and variance.

    An example is laid out channel by channel, and cut into groups of equal length.
    """
    planes = np.asarray(x).transpose(0, 3, 1, 2)
    rows = [example.ravel() for example in planes]
    size = len(rows[0]) // num_groups
    y, means, variances = np.empty((len(rows), len(rows[0]))), [], []
    for g in range(num_groups):
        values = [row[k] for row in rows for k in range(g * size, (g + 1) * size)]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        means.append(mean)
        variances.append(variance)
        for n, row in enumerate(rows):
            y[n, g * size : (g + 1) * size] = (row[g * size : (g + 1) * size] - mean) / np.sqrt(variance + epsilon)
    return y.reshape(planes.shape).transpose(0, 2, 3, 1), np.array(means), np.array(variances)


def normalized(x, num_groups, **options):
    """Returns the batch normalized, from the usual start of the statistics."""
    if num_groups > x.shape[-1]:
        options["spatial_shape"] = x.shape[1:-1]
    return batch_group_normalize(x, jnp.zeros(num_groups), jnp.ones(num_groups), num_groups, **options).normalized


@hypothesis.given(
    case=st.sampled_from(
        [
            ((3, 2, 2, 4), 1),
            ((3, 2, 2, 4), 2),
            ((2, 3, 1, 6), 3),
            ((2, 2, 3, 2), 4),
            ((2, 3, 2, 2), 12),
            ((1, 2, 2, 3), 6),
        ]
    ),
    seed=st.integers(0, 2**16),
)
def test_a_step_is_the_formula(case, seed):
    """Groups of several channels; or parts of channels, cut by rows and even within one."""
    (examples, height, width, channels), num_groups = case
    x = normal(seed, examples, height, width, channels)
    spatial = (height, width) if num_groups > channels else None
    start = jnp.full(num_groups, 2.0)
    result = batch_group_normalize(
        x, start, start, num_groups, spatial_shape=spatial, momentum=0.75, use_fast_variance=False
    )
    y, means, variances = written_out(x, num_groups)
    np.testing.assert_allclose(result.normalized, y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(result.mean, 1.5 + 0.25 * means, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.var, 1.5 + 0.25 * variances, rtol=1e-12, atol=1e-12)


@both_apis
@pytest.mark.parametrize("num_groups", [1, 2, 3, 6, 12])
def test_a_training_is_the_formula(api, num_groups):
    """Three steps, then inference, whose result is that of the running statistics of each value's group."""
    batches = [normal(seed, 4, 3, 4, 6) for seed in range(3)]
    spatial = (3, 4) if num_groups > 6 else None
    layer = functional(
        api, "BatchGroupNorm", batches[0], num_groups=num_groups, spatial_shape=spatial, momentum=0.9, epsilon=0.1
    )
    state, mean, var = layer.state, np.zeros(num_groups), np.ones(num_groups)
    for x in batches:
        expected, means, variances = written_out(x, num_groups, epsilon=0.1)
        mean, var = 0.9 * mean + 0.1 * means, 0.9 * var + 0.1 * variances
        y, state = layer.train(state, x)
        assert_same(y, expected)
    assert state["mean"].shape == state["var"].shape == (num_groups,)
    assert state["scale"].shape == state["bias"].shape == (6,)
    assert_same((state["mean"], state["var"]), (mean, var))
    by_value = [statistic.repeat(3 * 4 * 6 // num_groups) for statistic in (mean, var)]
    of_value, var_of_value = (each.reshape(6, 3, 4).transpose(1, 2, 0) for each in by_value)
    expected = (np.asarray(batches[0]) - of_value) / np.sqrt(var_of_value + 0.1)
    assert_same(layer.evaluate(state, batches[0]), expected)


# What it becomes.


@both_apis
@pytest.mark.parametrize("shape", [(5, 4), (3, 2, 5, 4)])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.usefixtures("standard_promotion")  # Flax's own layer
def test_a_group_a_channel_is_batch_norm(api, shape, fast):
    """Forward, backward, in running statistics, in evaluation."""
    x = normal(0, *shape)
    options = {"momentum": 0.9, "use_fast_variance": fast}
    ours = functional(api, "BatchGroupNorm", x, num_groups=4, **options)
    theirs = functional("linen", "BatchNorm", x, **options)  # NNX's has statistics in float32 alone

    def run(layer):
        def loss(trained, x):
            start = {key: value.astype(float) for key, value in layer.state.items()}  # Flax's is in float32
            y, state = layer.train(start | trained, x)
            return weigh(y), (y, state, layer.evaluate(state, x))

        return jax.grad(loss, (0, 1), has_aux=True)({"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}, x)

    for actual, expected in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@both_apis
@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
@pytest.mark.usefixtures("standard_promotion")
def test_a_single_example_is_group_norm(api, num_groups):
    """One group is then Layer Normalization of a whole example, a group a channel Instance Normalization."""
    x = normal(0, 1, 3, 5, 8)
    layer = functional(api, "BatchGroupNorm", x, num_groups=num_groups)
    y, _ = layer.train(layer.state, x)
    expected = [nn.GroupNorm(num_groups, epsilon=1e-5, param_dtype=float)]
    if num_groups == 1:
        expected.append(nn.LayerNorm(epsilon=1e-5, reduction_axes=(1, 2, 3), use_bias=False, use_scale=False))
    if num_groups == 8:
        expected.append(nn.InstanceNorm(epsilon=1e-5, param_dtype=float))
    for module in expected:
        np.testing.assert_allclose(y, module.init_with_output(jax.random.key(0), x)[0], rtol=1e-12, atol=1e-12)


def test_a_group_a_value_normalizes_each_over_the_examples():
    x = normal(0, 6, 2, 3, 4)
    expected = (x - x.mean(0, keepdims=True)) / np.sqrt(x.var(0, keepdims=True) + 1e-5)
    assert_same(normalized(x, 24), expected)


def test_groups_are_of_channels_and_not_of_positions():
    """Laid out position by position, as the array is in memory, a group a channel would be no Batch Normalization."""
    x = normal(0, 3, 2, 2, 4) + jnp.arange(4.0)[None, None, None] * 3
    slabs = x.reshape(3, 4, 4)
    wrong = (slabs - slabs.mean((0, 2), keepdims=True)) / jnp.sqrt(slabs.var((0, 2), keepdims=True) + 1e-5)
    assert np.abs(wrong.reshape(x.shape) - normalized(x, 4)).max() > 1


# What it keeps and does not see.


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
def test_moments_of_the_groups(num_groups):
    """Mean 0, and variance v / (v + epsilon)."""
    x = normal(0, 5, 3, 2, 4)
    _, _, variances = written_out(x, num_groups)
    _, means, after = written_out(normalized(x, num_groups, epsilon=0.5), num_groups)
    np.testing.assert_allclose(means, 0, atol=1e-12)
    np.testing.assert_allclose(after, variances / (variances + 0.5), rtol=1e-11)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 6, 18])
def test_scale_and_shift_of_a_group_change_nothing(num_groups):
    """Those of single channels do, unless each is a group of its own or several."""
    x = normal(0, 5, 3, 2, 6)
    rng = np.random.default_rng(1)
    own = functools.partial(np.repeat, repeats=max(6 // num_groups, 1))
    scale, shift = own(rng.uniform(0.1, 10, min(num_groups, 6))), own(rng.normal(0, 3, min(num_groups, 6)))
    y = normalized(x, num_groups, epsilon=0.0, use_fast_variance=False)
    changed = x * scale[None, None, None] + shift[None, None, None]
    again = normalized(changed, num_groups, epsilon=0.0, use_fast_variance=False)
    np.testing.assert_allclose(again, y, rtol=1e-11, atol=1e-11)
    each = jnp.asarray(rng.uniform(0.1, 10, 6))[None, None, None]
    difference = np.abs(normalized(x * each, num_groups, epsilon=0.0, use_fast_variance=False) - y).max()
    assert difference < 1e-11 if num_groups >= 6 else difference > 0.5


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_the_kernels_of_a_group_share_a_free_scale(num_groups):
    """The loss does not see it, so that their gradients together are orthogonal to them."""
    x, w, gy = normal(0, 6, 3), normal(1, 3, 4, mean=0), normal(2, 6, 4)

    def loss(w):
        return jnp.sum(jnp.sin(normalized(x @ w, num_groups, epsilon=0.0)) * gy)

    own = np.repeat(np.array([0.5, 2.0, 3.0, 0.1])[:num_groups], 4 // num_groups)
    np.testing.assert_allclose(loss(w * own[None]), loss(w), rtol=1e-10)
    products = jnp.sum(w * jax.grad(loss)(w), axis=0)
    np.testing.assert_allclose(products.reshape(num_groups, -1).sum(1), 0, atol=1e-11)
    if num_groups < 4:
        assert abs(loss(w * jnp.array([[1.0, 3.0, 1.0, 1.0]])) - loss(w)) > 0.01
        assert np.abs(products).max() > 0.01


@pytest.mark.parametrize("num_groups", [1, 4, 8])
def test_the_order_of_the_examples_is_their_own(num_groups):
    x, order = normal(0, 5, 3, 2, 4), np.array([3, 0, 4, 1, 2])
    assert_same(normalized(x[order], num_groups), normalized(x, num_groups)[order])


@both_apis
@pytest.mark.parametrize("num_groups", [1, 2, 4, 12])
def test_with_the_statistics_of_this_very_batch_evaluation_is_training(api, num_groups):
    x = normal(0, 5, 3, 2, 4)
    spatial = (3, 2) if num_groups > 4 else None
    layer = functional(api, "BatchGroupNorm", x, num_groups=num_groups, spatial_shape=spatial, momentum=0.0)
    y, state = layer.train(layer.state, x)
    assert_same(layer.evaluate(state, x), y)


@both_apis
def test_images_of_another_size_are_evaluated_by_groups_of_channels(api):
    x = normal(0, 5, 4, 4, 4)
    layer = functional(api, "BatchGroupNorm", x, num_groups=2)
    _, state = layer.train(layer.state, x)
    assert_same(layer.evaluate(state, x[:, :2]), layer.evaluate(state, x)[:, :2])


# Groups that do not fit.


@both_apis
@pytest.mark.parametrize(
    ("num_groups", "spatial", "message"),
    [
        (3, None, r"num_groups is 3, which does not divide the 4 channels of an input of shape \(5, 2, 3, 4\)"),
        (0, None, "num_groups is 0, which does not divide the 4 channels"),
        (8, None, r"num_groups is 8, more than the 4 channels .*say so by spatial_shape=\(2, 3\)"),
        (6, (2, 3), r"num_groups is 6, which does not cut .* must be 4 times a divisor of the 6 positions"),
        (16, (2, 3), "num_groups is 16, which does not cut"),
        (8, (3, 2), r"spatial_shape is \(3, 2\)\. .*training and evaluation must be of images of one size"),
    ],
)
def test_groups_that_do_not_fit_are_refused(api, num_groups, spatial, message):
    x = normal(0, 5, 2, 3, 4)

    def use():  # Linen's refuses when it is initialized
        layer = functional(api, "BatchGroupNorm", x, num_groups=num_groups, spatial_shape=spatial)
        layer.train(layer.state, x)

    with pytest.raises(ValueError, match=message):
        use()


@both_apis
def test_parts_of_channels_are_not_evaluated_on_images_of_another_size(api):
    x = normal(0, 5, 2, 6, 4)
    layer = functional(api, "BatchGroupNorm", x, num_groups=8, spatial_shape=(2, 6))
    for other in (x[:, :, :4], x.reshape(5, 6, 2, 4), x.reshape(5, 12, 4)):
        with pytest.raises(ValueError, match=r"spatial_shape is \(2, 6\).*images of one size"):
            layer.evaluate(layer.state, other)


def test_parts_of_channels_need_the_examples_in_front():
    x, start = normal(0, 4, 2, 3), jnp.ones(8)
    with pytest.raises(ValueError, match="first axis that of the examples"):
        batch_group_normalize(x, start, start, 8, axis=0, spatial_shape=(2, 3))


@pytest.mark.parametrize("axis", [1, -1])
def test_parts_of_channels_on_any_axis(axis):
    x, start = normal(0, 5, 2, 6, 4), jnp.ones(8)
    moved = jnp.moveaxis(x, -1, axis)
    result = batch_group_normalize(moved, start, start, 8, axis=axis, spatial_shape=(2, 6))
    assert_same(jnp.moveaxis(result.normalized, axis, -1), written_out(x, 8)[0])
    evaluated = batch_group_normalize_inference(moved, result.mean, result.var, 8, axis=axis, spatial_shape=(2, 6))
    assert evaluated.shape == moved.shape


def test_channels_are_along_one_axis():
    with pytest.raises(ValueError, match=r"axis is \(1, 2\), but groups are of channels"):
        batch_group_normalize(normal(0, 5, 2, 4), jnp.zeros(2), jnp.ones(2), 2, axis=(1, 2))


def test_statistics_of_other_groups_are_refused():
    x = normal(0, 5, 2, 4)
    with pytest.raises(ValueError, match="running statistic is of 4 features"):
        batch_group_normalize(x, jnp.zeros(4), jnp.ones(4), 2)
    with pytest.raises(ValueError, match="running statistic is of 4 features"):
        batch_group_normalize_inference(x, jnp.zeros(4), jnp.ones(4), 2)
