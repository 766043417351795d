"""Fixup: the initializer's deviation, what a network is at its start, and that its first step knows no depth."""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    compiled_call,
    cross_entropy,
    flatten,
    gradients_and_records,
    normal,
    pure,
    reasons,
    weigh,
)

import bnp_optax as bnp
from bnp_optax.contrib import fixup_normal, linen
from bnp_optax.contrib import nnx as contrib_nnx

pytestmark = pytest.mark.usefixtures("x64")

BLOCKS = 3
Block = functools.partial(linen.FixupBlock, num_blocks=BLOCKS, param_dtype=float)


class Net(nn.Module):
    """Three blocks, of which the second halves the image and doubles the channels, and a classifier of zeros."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(linen.ScalarBias(float)(nn.Conv(4, (3, 3), use_bias=False, param_dtype=float, name="stem")(x)))
        for features, strides in ((4, 1), (8, 2), (8, 1)):
            x = Block(features, strides=strides)(x)
        x = linen.ScalarBias(float)(x.mean((1, 2)))
        return nn.Dense(10, kernel_init=nn.initializers.zeros, param_dtype=float, name="classifier")(x)


@functools.cache
def start():
    x = normal(0, 8, 6, 6, 3)
    return jax.jit(Net().init)(jax.random.key(0), x)["params"], x


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape)), start()[0])


# The initializer.


@pytest.mark.parametrize(
    ("num_blocks", "depth", "factor"),
    [(1, 2, 1), (16, 2, 16**-0.5), (16, 3, 16**-0.25), (54, 2, 54**-0.5), (81, 5, 81 ** (-1 / 8))],
)
@pytest.mark.parametrize("shape", [(300, 200), (3, 3, 40, 100), (5, 100, 60)])
def test_the_deviation_is_that_of_he_scaled_down_with_the_depth(num_blocks, depth, factor, shape):
    """Over the outputs and the window: ``sqrt(2 / fan_out) L^(-1 / (2 m - 2))``."""
    kernel = fixup_normal(num_blocks, depth)(jax.random.key(0), shape, float)
    expected = math.sqrt(2 / (shape[-1] * math.prod(shape[:-2]))) * factor
    np.testing.assert_allclose(kernel.std(), expected, rtol=0.02)
    np.testing.assert_allclose(kernel.mean(), 0, atol=0.03 * expected)
    assert jnp.abs(kernel).max() > 3.5 * expected  # normal, not truncated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be at least 1, but is 0"),
        ({"num_blocks": 4, "depth": 1}, "depth must be at least 2, but is 1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fixup_normal(**options)


@jax.jit
def speed(kernels, last, x, direction):
    """Returns how fast gradient descent changes a linear function of a residual network's outputs.

    It is the squared norm of the gradient with respect to the branches' kernels, `[blocks, layers, width, width]`.
    """

    def loss(kernels):
        def block(x, kernels):
            h = x
            for kernel in kernels[0]:
                h = jax.nn.relu(h @ kernel)
            return jax.nn.relu(x + h @ kernels[1]), None

        return jnp.sum(direction * jax.lax.scan(block, x, kernels)[0])

    return optax.tree.norm(jax.grad(loss)((kernels, last)), squared=True)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_first_step_does_not_grow_with_the_number_of_blocks(depth):
    """Within a factor 2. Unscaled kernels, and those with the sign of the exponent lost, are the negative controls."""
    own, unscaled, sign_lost = [], [], []
    x, direction = (normal(seed, 16, 32, mean=0, deviation=1) for seed in (1, 2))
    for blocks in (4, 16, 64):
        keys = jax.random.split(jax.random.key(0), blocks * (depth - 1))
        kernels = jax.vmap(lambda key: fixup_normal(blocks, depth)(key, (32, 32), float))(keys)  # noqa: B023
        kernels = kernels.reshape(blocks, depth - 1, 32, 32)
        factor, last = blocks ** (1 / (2 * depth - 2)), jnp.zeros((blocks, 32, 32))
        for times, speeds in ((1, own), (factor, unscaled), (factor**2, sign_lost)):
            speeds.append(float(speed(times * kernels, last, x, direction)))
    assert max(own) < 2 * min(own)
    assert unscaled[1] > 2.5 * unscaled[0]
    assert unscaled[2] > 2.5 * unscaled[1]
    assert sign_lost[1] > 10 * sign_lost[0]
    assert sign_lost[2] > 10 * sign_lost[1]


# The start.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_block_begins_as_its_activation(dtype):
    x = normal(0, 2, 5, 5, 4, mean=0).astype(dtype)
    block = linen.FixupBlock(4, BLOCKS, dtype=dtype)
    y, _ = block.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, nn.relu(x))
    module = contrib_nnx.FixupBlock(4, 4, num_blocks=BLOCKS, dtype=dtype, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module(x), nn.relu(x))


@pytest.mark.parametrize("size", [5, 6])
def test_a_block_with_strides_begins_as_every_second_pixel_and_channels_of_zeros(size):
    x = normal(0, 2, size, size, 4, mean=0)
    y, _ = Block(7, strides=2).init_with_output(jax.random.key(0), x)
    expected = np.zeros((2, 3, 3, 7))
    expected[..., :4] = np.maximum(np.asarray(x)[:, ::2, ::2], 0)
    np.testing.assert_array_equal(y, expected)


def test_logits_and_loss_begin_exactly_as_those_of_guessing():
    params, x = start()
    logits = Net().apply({"params": params}, x)
    np.testing.assert_array_equal(logits, np.zeros((8, 10)))
    labels = jnp.arange(8)
    np.testing.assert_allclose(cross_entropy(logits, labels), math.log(10), rtol=1e-15)


def test_only_the_classifier_moves_at_first_and_then_the_last_kernels():
    params, x = start()
    labels = jnp.arange(8)

    @jax.jit
    def gradients(params):
        return flatten(jax.grad(lambda params: cross_entropy(Net().apply({"params": params}, x), labels))(params))

    moving = {path for path, leaf in gradients(params).items() if np.any(leaf)}
    assert moving == {"classifier/kernel", "classifier/bias"}
    params["classifier"]["kernel"] = jnp.asarray(np.random.default_rng(0).normal(size=(8, 10)))
    moving = {path for path, leaf in gradients(params).items() if np.any(leaf)}
    for block in range(BLOCKS):
        assert f"FixupBlock_{block}/conv2/kernel" in moving
        assert f"FixupBlock_{block}/bias2b/bias" in moving
        for name in ("conv1/kernel", "bias1b/bias", "bias2a/bias", "scale/scale"):
            assert f"FixupBlock_{block}/{name}" not in moving


def test_kernels_begin_as_the_method_says():
    """In Linen and NNX; stem and classifier are the user's."""
    x = jnp.ones((1, 4, 4, 64))
    params = Block(64).init(jax.random.key(0), x)["params"]
    module = contrib_nnx.FixupBlock(64, 64, num_blocks=BLOCKS, param_dtype=float, rngs=nnx.Rngs(0))
    for own in (params, pure(nnx.to_pure_dict(nnx.state(module, nnx.Param)))):
        np.testing.assert_allclose(own["conv1"]["kernel"].std(), math.sqrt(2 / (64 * 9 * BLOCKS)), rtol=0.02)
        np.testing.assert_array_equal(own["conv2"]["kernel"], np.zeros((3, 3, 64, 64)))
        scalars = {path: float(leaf) for path, leaf in flatten(own).items() if leaf.ndim == 0}
        expected = {f"bias{name}/bias": 0.0 for name in ("1a", "1b", "2a", "2b")} | {"scale/scale": 1.0}
        assert scalars == expected
        assert len(flatten(own)) == 7


# The block, written out.


def conv(x, kernel, strides=1):
    """A 3x3 convolution of images with one pixel of zeros around, as loops over the window."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = (-(-size // strides) for size in x.shape[1:3])
    windows = (
        padded[:, i : i + strides * height : strides, j : j + strides * width : strides] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    return sum(window[:, :height, :width] for window in windows)


def block_by_hand(p, x, strides, features):
    biased = x + p["bias1a"]["bias"]
    h = np.maximum(conv(biased, p["conv1"]["kernel"], strides) + p["bias1b"]["bias"], 0)
    h = conv(h + p["bias2a"]["bias"], p["conv2"]["kernel"]) * p["scale"]["scale"] + p["bias2b"]["bias"]
    if strides > 1 or features > x.shape[-1]:
        x = np.pad(biased[:, ::strides, ::strides], ((0, 0),) * 3 + ((0, features - x.shape[-1]),))
    return np.maximum(h + x, 0)


@pytest.mark.parametrize(("features", "strides"), [(4, 1), (8, 2), (6, 1), (4, 2)])
@pytest.mark.parametrize("size", [5, 6])
def test_a_block_is_what_its_formula_says(features, strides, size):
    """In Linen and NNX."""
    x = normal(0, 2, size, size, 4, mean=0)
    block = Block(features, strides=strides)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.2, 0.4, leaf.shape)), shapes)
    expected = block_by_hand(jax.tree.map(np.asarray, params), np.asarray(x), strides, features)
    assert 0.2 < (expected > 0).mean() < 1
    np.testing.assert_allclose(jax.jit(block.apply)({"params": params}, x), expected, rtol=1e-12, atol=1e-13)
    module = contrib_nnx.FixupBlock(
        4, features, num_blocks=BLOCKS, strides=strides, param_dtype=float, rngs=nnx.Rngs(0)
    )
    nnx.update(module, params)
    actual = compiled_call(lambda module, x: module(x), module, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


def test_fewer_channels_are_refused():
    x = jnp.ones((1, 4, 4, 4))
    with pytest.raises(ValueError, match="has 4 channels, but the block 3: a shortcut only adds channels"):
        Block(3).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="has 4 channels, but the block 3: a shortcut only adds channels"):
        contrib_nnx.FixupBlock(4, 3, num_blocks=1, param_dtype=float, rngs=nnx.Rngs(0))(x)


def test_the_dtype_of_the_computation_may_be_lower_than_that_of_the_parameters():
    x = normal(0, 2, 4, 4, 4).astype(jnp.bfloat16)
    block = linen.FixupBlock(8, BLOCKS, strides=2, dtype=jnp.bfloat16)
    y, variables = block.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    module = contrib_nnx.FixupBlock(4, 8, num_blocks=BLOCKS, strides=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert module(x).dtype == jnp.bfloat16


# Beside BNP, and with the rates of its recipe.


def test_bnp_covers_the_convolutions_of_the_blocks():
    """A bias of one number before a convolution is part of its input; the step is that of the paper."""
    params, (_, x) = random_params(), start()
    layers = bnp.linen.find_layers(Net(), x)
    blocks = [f"FixupBlock_{block}/{name}" for block in range(BLOCKS) for name in ("conv1", "conv2")]
    assert list(layers) == ["stem", *blocks, "classifier"]
    assert len(reasons(layers)) == 5 * BLOCKS + 2
    assert all(path.endswith(("bias", "scale")) for path in reasons(layers))
    gradients, records = jax.jit(gradients_and_records(Net()))(params, x)
    tx = bnp.scale_by_bnp(layers)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), intermediates=records)
    flat, given = flatten(updates), flatten(gradients)
    for path, leaf in given.items():
        assert np.array_equal(flat[path], leaf) == (path in reasons(layers))
    stem = nn.Conv(4, (3, 3), use_bias=False, param_dtype=float).apply({"params": params["stem"]}, x)
    read = nn.relu(stem + params["ScalarBias_0"]["bias"]) + params["FixupBlock_0"]["bias1a"]["bias"]
    np.testing.assert_allclose(records["FixupBlock_0/conv1"].mean, read.mean((0, 1, 2))[None, None], rtol=1e-9)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.block = contrib_nnx.FixupBlock(3, 6, num_blocks=1, strides=2, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        return self.block(x)


def test_bnp_covers_the_convolutions_of_the_blocks_of_nnx():
    layers = bnp.nnx.find_layers(NnxNet(nnx.Rngs(0)), normal(0, 2, 6, 6, 3))
    assert list(layers) == ["block/conv1", "block/conv2"]
    assert len(reasons(layers)) == 5


@pytest.mark.usefixtures("standard_promotion")
def test_biases_and_multipliers_take_a_tenth_of_the_rate_by_optax_partition():
    params, (_, x) = random_params(), start()
    gradients = jax.jit(jax.grad(lambda params: weigh(Net().apply({"params": params}, x))))(params)
    labels = jax.tree.map(lambda leaf: "kernel" if leaf.ndim > 1 else "small", params)
    tx = optax.partition({"kernel": optax.sgd(0.1, momentum=0.9), "small": optax.sgd(0.01, momentum=0.9)}, labels)
    updates, _ = tx.update(gradients, tx.init(params), params)
    rates = {path: 0.1 if path.endswith("kernel") else 0.01 for path in flatten(params)}
    assert set(rates.values()) == {0.1, 0.01}
    expected = {path: -rates[path] * leaf for path, leaf in flatten(gradients).items()}
    chex.assert_trees_all_close(flatten(updates), expected, rtol=1e-12)
