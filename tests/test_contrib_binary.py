"""Binary networks: the sign and its gradient, binary kernels by a loop and by counting bits, layers, blocks, stages."""

import functools
import math

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import compiled_call, flatten, make, normal, pure, reasons, weigh

import bnp_optax as bnp
from bnp_optax.contrib import (
    adaptive_grad_clip,
    binarize_standardized,
    binary_sign,
    block_betas,
    linen,
    rprelu,
    standardize,
    standardized_layers,
)
from bnp_optax.contrib import nnx as contrib_nnx
from bnp_optax.contrib.binary import pool_shortcut

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = st.sampled_from([(2, 3), (7, 1), (3, 5, 2), (3, 3, 4, 5), (1, 1, 2, 3), (3, 3, 1, 4)])
binarized = jax.jit(binarize_standardized)
derivative = jax.vmap(jax.grad(binary_sign))


def weights_of(shape, seed, mean=0.3):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 1, shape))


# The sign.


def test_the_sign_has_two_values_and_zero_is_positive():
    x = jnp.array([-jnp.inf, -2.0, -1e-300, -0.0, 0.0, 1e-300, 2.0, jnp.inf])
    np.testing.assert_array_equal(binary_sign(x), [-1, -1, -1, 1, 1, 1, 1, 1])


def test_what_is_not_a_number_stays_so():
    assert jnp.isnan(binary_sign(jnp.array(jnp.nan)))
    with pytest.raises(TypeError, match="takes floating-point numbers, which have a gradient, but x is int32"):
        binary_sign(jnp.array([1], jnp.int32))


def surrogate(x):
    """The function whose derivative is the gradient."""
    return -1.0 if x < -1 else x * x + 2 * x if x < 0 else -x * x + 2 * x if x < 1 else 1.0


def test_the_gradient_is_the_closed_form_and_its_integral_that_of_the_sign():
    grid = np.linspace(-2, 2, 401)
    pieces = np.select([grid < -1, grid < 0, grid < 1], [0, 2 + 2 * grid, 2 - 2 * grid], 0)
    np.testing.assert_allclose(derivative(jnp.asarray(grid)), pieces, rtol=1e-14, atol=1e-14)
    middles = (grid[1:] + grid[:-1]) / 2  # where the function is smooth on both sides
    differences = [(surrogate(x + 1e-4) - surrogate(x - 1e-4)) / 2e-4 for x in middles]
    np.testing.assert_allclose(derivative(jnp.asarray(middles)), differences, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.trapezoid(derivative(jnp.asarray(grid)), grid), 2, rtol=1e-12)  # kinks on the grid


def test_forward_and_reverse_derivatives_agree():
    x = normal(0, 3, 4, mean=0, deviation=0.6)
    tangent = normal(1, 3, 4)
    _, forward = jax.jvp(binary_sign, (x,), (tangent,))
    [reverse] = jax.vjp(binary_sign, x)[1](tangent)
    np.testing.assert_array_equal(forward, reverse)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_sign_keeps_the_dtype(dtype):
    x = jnp.array([-0.5, 0.25], dtype)
    assert binary_sign(x).dtype == dtype
    gradient = derivative(x)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [1.0, 1.5])


# Binary kernels.


def binarize_units(kernel, gain):
    """The formula, a unit at a time."""
    kernel, result = np.asarray(kernel, np.float64), np.empty(kernel.shape)
    for output in range(kernel.shape[-1]):
        weights = kernel[..., output] - kernel[..., output].mean()
        scale = np.abs(weights / math.sqrt(np.sum(weights**2))).mean()
        result[..., output] = gain[output] * scale * np.where(weights >= 0, 1, -1)
    return result


@hypothesis.given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
def test_every_unit_has_two_weights(shape, seed):
    kernel, gain = weights_of(shape, seed), np.random.default_rng(seed).normal(1, 1, shape[-1])
    hypothesis.assume(bool(jnp.all(kernel.var(tuple(range(len(shape) - 1))) > 1e-3)))
    binary = binarized(kernel, jnp.asarray(gain))
    np.testing.assert_allclose(binary, binarize_units(kernel, gain), rtol=1e-12)
    for unit in np.asarray(binary).reshape(-1, shape[-1]).T:
        assert len(np.unique(np.abs(unit))) == 1
        assert len(np.unique(unit)) == 2


@hypothesis.given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0.1, 100), offset=st.floats(-5, 5))
def test_scaled_and_shifted_weights_are_the_same_kernel(seed, factor, offset):
    kernel = weights_of((3, 3, 4, 5), seed)
    np.testing.assert_allclose(binarized(factor * kernel + offset, 2.0), binarized(kernel, 2.0), rtol=1e-11)
    np.testing.assert_allclose(binarized(-kernel, 2.0), -binarized(kernel, 2.0), rtol=1e-14)


def test_weights_of_one_sign_are_balanced():
    """Those that the authors begin with are all positive; half of their signs are."""
    kernel = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (1000, 4)))
    np.testing.assert_allclose((binarize_standardized(kernel) > 0).mean(0), 0.5, atol=0.06)


def test_the_gradient_is_that_of_the_standardized_kernel():
    """With respect to the kernel; of the gain it is the sum over the binary kernel itself."""
    kernel, gain, cotangent = weights_of((3, 3, 4, 5), 0), normal(1, 5), normal(2, 3, 3, 4, 5)
    pull = jax.jit(lambda kernel: jax.vjp(binarize_standardized, kernel, gain)[1](cotangent))
    own, own_gain = pull(kernel)
    expected, _ = jax.jit(lambda kernel: jax.vjp(standardize, kernel, gain)[1](cotangent))(kernel)
    np.testing.assert_allclose(own, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(own_gain, (cotangent * binarized(kernel, 1.0)).sum((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose((own * kernel).sum((0, 1, 2)), 0, atol=1e-14)
    np.testing.assert_allclose(own.sum((0, 1, 2)), 0, atol=1e-14)
    np.testing.assert_allclose(pull(10 * kernel)[0], own / 10, rtol=1e-11, atol=1e-15)


def test_the_clip_of_the_authors_never_acts():
    """A unit of norm 1 has no weight above 1, even if one weight has it all."""
    assert jnp.abs(standardize(jnp.eye(50, 3))).max() < 1


@pytest.mark.parametrize(("draw", "variance"), [("normal", 2 / math.pi), ("uniform", 0.75)])
def test_the_variance_behind_a_binary_layer_is_the_one_that_the_docstring_says(draw, variance):
    rng = np.random.default_rng(0)
    kernel, x = jnp.asarray(getattr(rng, draw)(size=(1000, 200))), rng.choice([-1.0, 1.0], (500, 1000))
    y = x @ np.asarray(binarized(kernel, 1.0))
    np.testing.assert_allclose((y**2).mean(), variance, rtol=0.02)
    restored = x @ np.asarray(binarized(kernel, math.sqrt(math.pi / 2)))
    np.testing.assert_allclose((restored**2).mean(), variance * math.pi / 2, rtol=0.02)


def test_constant_filters_become_zero_and_small_weights_lose_scale_but_no_sign():
    kernel = weights_of((50, 3), 0)
    small, large = binarized(1e-6 * kernel, 1.0), binarized(kernel, 1.0)
    np.testing.assert_array_equal(np.sign(small), np.sign(large))
    assert np.abs(small).max() < 1e-3 * np.abs(large).max()
    constant = jnp.full((50, 3), 0.5)
    np.testing.assert_array_equal(binarized(constant, 1.0), np.zeros((50, 3)))
    gradient = jax.jit(jax.grad(lambda kernel: weigh(binarize_standardized(kernel))))(constant)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_low_precision_is_computed_in_float32(dtype):
    """In float16 the squares overflow, and the standardized weights nearest to the mean are zero, which has a sign."""
    kernel = (200 * weights_of((64, 3), 0)).astype(dtype)
    binary = binarized(kernel, jnp.ones(3, dtype))
    assert binary.dtype == dtype
    expected = binarize_units(np.asarray(kernel, np.float64), np.ones(3))
    np.testing.assert_allclose(np.asarray(binary, np.float64), expected, rtol=float(jnp.finfo(dtype).eps))
    # beside two large weights the others are standardized to 5e-9, which would be 0 in float16
    small = jnp.array([[2.0**13], [-(2.0**13)], *[[2.0**-14], [-(2.0**-14)]] * 15], dtype)
    signs = np.sign(np.asarray(binarized(small, 1.0), np.float64))
    np.testing.assert_array_equal(signs, np.sign(np.asarray(small, np.float64)))


def test_what_cannot_be_binary_is_refused():
    with pytest.raises(ValueError, match="fewer than two weights"):
        binarize_standardized(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"gain has shape \(2,\), but the kernel has 3 outputs"):
        binarize_standardized(jnp.ones((4, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match="eps must be positive"):
        binarize_standardized(jnp.ones((4, 3)), eps=0.0)


# Counting bits, which is what binary layers are for.


def popcount_product(inputs, signs):
    """The product of rows of 1 and -1 and such a matrix, by exclusive or and counting: N - 2 popcount(x xor w)."""
    rows, columns = np.packbits(inputs > 0, axis=1), np.packbits(signs > 0, axis=0)
    counts = np.bitwise_count(rows[:, :, None] ^ columns[None]).sum(1)
    return inputs.shape[1] - 2 * counts.astype(np.int64)


def test_a_binary_convolution_counts_bits():
    """Exactly in integers, without padding; and at borders over the inputs that are there."""
    x = jnp.where(normal(0, 2, 5, 5, 4, mean=0) >= 0, 1.0, -1.0)
    model = linen.BinaryWSConv(6, (3, 3), param_dtype=float)
    variables = {"params": {"kernel": weights_of((3, 3, 4, 6), 0), "gain": jnp.ones(6)}}
    binary = binarized(variables["params"]["kernel"], 1.0)
    run = jax.jit(lambda variables, padding: model.clone(padding=padding).apply(variables, x), static_argnums=1)
    scales, signs = jnp.abs(binary[0, 0, 0]), np.sign(np.asarray(binary))
    patches = np.lib.stride_tricks.sliding_window_view(np.asarray(x), (3, 3), axis=(1, 2))  # [n, h, w, c, 3, 3]
    rows = np.moveaxis(patches, 3, 5).reshape(-1, 36)
    counts = popcount_product(rows, signs.reshape(36, 6)).reshape(2, 3, 3, 6)
    np.testing.assert_allclose(run(variables, "VALID"), counts * np.asarray(scales), rtol=1e-13, atol=1e-14)

    corner = popcount_product(np.asarray(x[:, :2, :2]).reshape(2, 16), signs[1:, 1:].reshape(16, 6))
    np.testing.assert_allclose(run(variables, "SAME")[:, 0, 0], corner * np.asarray(scales), rtol=1e-13, atol=1e-14)
    wrapped = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    rows = np.moveaxis(np.lib.stride_tricks.sliding_window_view(wrapped, (3, 3), axis=(1, 2)), 3, 5).reshape(-1, 36)
    counts = popcount_product(rows, signs.reshape(36, 6)).reshape(2, 5, 5, 6)
    np.testing.assert_allclose(run(variables, "CIRCULAR"), counts * np.asarray(scales), rtol=1e-13, atol=1e-14)


def test_a_binary_dense_layer_counts_bits():
    x = jnp.where(normal(0, 7, 40, mean=0) >= 0, 1.0, -1.0)
    layer = contrib_nnx.BinaryWSLinear(40, 5, param_dtype=float, rngs=nnx.Rngs(0))
    binary = np.asarray(binarized(layer.kernel[...], 1.0))
    counts = popcount_product(np.asarray(x), np.sign(binary))
    np.testing.assert_allclose(layer(x), counts * np.abs(binary[0]), rtol=1e-13, atol=1e-14)


# Betas, pooling, the activation.


def test_betas_are_those_of_the_rule():
    expected = [1, 0.9806, 0.9623, 0.9449, 0.9285, 0.9806, 0.9623, 0.9449, 0.9285]
    np.testing.assert_allclose(block_betas([4, 4, 1]), expected, atol=5e-5)
    np.testing.assert_allclose(block_betas([2], alpha=1.0), [1, math.sqrt(0.5)], rtol=1e-15)
    assert block_betas([1] * 3, alpha=0.0) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"Every stage needs a block, but stages is \[2, 0\]"):
        block_betas([2, 0])
    with pytest.raises(ValueError, match="alpha must be finite, but is inf"):
        block_betas([2], alpha=math.inf)


def test_betas_keep_the_variance_of_a_networks_block_inputs():
    """For branches and projections of variance 1, which is what the rule is derived for."""
    rng, alpha = np.random.default_rng(0), 0.5
    x = rng.normal(size=200_000)
    for block, beta in enumerate(block_betas([3, 3], alpha)):
        scaled = beta * x
        np.testing.assert_allclose(scaled.var(), 1, rtol=0.02)
        shortcut = rng.permutation(scaled) if block == 3 else x
        x = shortcut + alpha * rng.normal(size=x.size)


def test_shortcuts_are_pooled_over_the_pixels_that_there_are():
    x = np.asarray(normal(0, 2, 5, 4, 3))
    pooled = pool_shortcut(jnp.asarray(x), 2)
    expected = [[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in (0, 2)] for i in (0, 2, 4)]
    np.testing.assert_allclose(pooled, np.transpose(expected, (2, 0, 1, 3)), rtol=1e-13)
    np.testing.assert_array_equal(pool_shortcut(jnp.asarray(x), 1), x)


def test_rprelu_by_its_formula():
    x, shift, slope, offset = normal(0, 2, 3, 4, mean=0), normal(1, 4), normal(2, 4), normal(3, 4)
    y = rprelu(x, shift, slope, offset)
    for index in np.ndindex(x.shape):
        channel, value = index[-1], float(x[index] + shift[index[-1]])
        expected = (value if value >= 0 else float(slope[channel]) * value) + float(offset[channel])
        np.testing.assert_allclose(y[index], expected, rtol=1e-13)
    assert rprelu(x.astype(jnp.bfloat16), 0.0, 0.25, 0.0).dtype == jnp.bfloat16


# The layers. What Flax's own do with the binary kernel is what these are to do.


def random_params(model, x, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.5, 1, leaf.shape)).astype(leaf.dtype), shapes)


def plain(params, binary, eps=1e-4):
    """Returns the parameters of Flax's layer."""
    params, weights = dict(params), binarize_standardized if binary else standardize
    return {**params, "kernel": weights(params["kernel"], params.pop("gain"), eps)}


@pytest.mark.parametrize(
    ("features", "window", "binary", "options"),
    [
        (5, (3, 3), True, {}),
        (5, (3, 3), False, {"eps": 100.0}),
        (6, (3, 2), True, {"strides": 2, "padding": ((1, 0), (2, 1)), "feature_group_count": 2, "use_bias": True}),
        (4, (3, 3), True, {"padding": "CIRCULAR", "feature_group_count": 4, "eps": 100.0}),
    ],
    ids=["plain", "first stage", "groups", "depthwise"],
)
def test_a_convolution_is_that_of_flax_with_the_weights(features, window, binary, options):
    """In Linen and NNX."""
    x, options = normal(0, 2, 6, 6, 4), dict(options)
    model = linen.BinaryWSConv(features, window, binary=binary, param_dtype=float, **options)
    params, eps = random_params(model, x), options.pop("eps", 1e-4)
    options = {"use_bias": False} | options
    flax = nn.Conv(features, window, param_dtype=float, **options)
    expected = jax.jit(lambda params: flax.apply({"params": plain(params, binary, eps)}, x))(params)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), expected, rtol=1e-12, atol=1e-14)
    layer = contrib_nnx.BinaryWSConv(
        4, features, window, binary=binary, eps=eps, param_dtype=float, rngs=nnx.Rngs(0), **options
    )
    nnx.update(layer, params)
    np.testing.assert_allclose(compiled_call(lambda layer, x: layer(x), layer, x), expected, rtol=1e-12, atol=1e-14)
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.to_pure_dict(pure(nnx.state(layer, nnx.Param))), params)


@pytest.mark.parametrize(("binary", "use_bias"), [(True, False), (False, True)])
def test_a_dense_layer_is_that_of_flax_with_the_weights(binary, use_bias):
    x = normal(0, 2, 5, 4)
    model = linen.BinaryWSDense(5, use_bias=use_bias, binary=binary, param_dtype=float)
    params = random_params(model, x)
    flax = nn.Dense(5, use_bias=use_bias, param_dtype=float)
    expected = jax.jit(lambda params: flax.apply({"params": plain(params, binary)}, x))(params)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), expected, rtol=1e-13)
    layer = contrib_nnx.BinaryWSLinear(4, 5, use_bias=use_bias, binary=binary, param_dtype=float, rngs=nnx.Rngs(0))
    nnx.update(layer, params)
    np.testing.assert_allclose(compiled_call(lambda layer, x: layer(x), layer, x), expected, rtol=1e-13)


def test_parameters_begin_as_the_method_says():
    x, options = jnp.ones((1, 8, 8, 32)), {"feature_group_count": 2, "param_dtype": float}
    params = jax.jit(linen.BinaryWSConv(64, (3, 3), **options).init)(jax.random.key(0), x)["params"]
    layer = contrib_nnx.BinaryWSConv(32, 64, (3, 3), rngs=nnx.Rngs(0), **options)
    for own in (params, pure(nnx.state(layer, nnx.Param))):
        assert set(own) == {"gain", "kernel"}
        np.testing.assert_array_equal(own["gain"], np.ones(64))
        np.testing.assert_allclose(own["kernel"].std(), (9 * 16) ** -0.5, rtol=0.03)


def test_the_channel_layers_of_both_apis_agree():
    x, rng = normal(0, 2, 3, 3, 4, mean=0, deviation=0.5), np.random.default_rng(1)
    for of_linen, of_nnx in ((linen.RSign, contrib_nnx.RSign), (linen.RPReLU, contrib_nnx.RPReLU)):
        params = of_linen().init(jax.random.key(0), x)["params"]
        layer = of_nnx(4)
        chex.assert_trees_all_equal(nnx.to_pure_dict(pure(nnx.state(layer, nnx.Param))), params)
        params = {name: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for name, leaf in params.items()}
        nnx.update(layer, params)
        y = of_linen().apply({"params": params}, x)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(layer(x), y)
        wide = {name: leaf.astype(float)[None, None, None] for name, leaf in params.items()}
        expected = jnp.where(x + wide["bias"] >= 0, 1, -1) if "bias" in wide else None
        if expected is None:
            expected = nn.leaky_relu(x + wide["shift"], wide["slope"]) + wide["offset"]
        np.testing.assert_allclose(y, expected, rtol=1e-12)


# The block.

Block = functools.partial(linen.BinaryBlock, param_dtype=float)
BLOCKS = {
    "same": (4, {"beta": 0.9}),
    "strides": (4, {"beta": 0.9, "strides": 2}),
    "wider": (6, {"beta": 0.9, "alpha": 0.5}),
}


def block_by_hand(params, x, binary, beta, strides=1, alpha=0.2):
    """The formulas of the block, with the convolution of JAX."""
    dimensions = ("NHWC", "HWIO", "NHWC")

    def conv(x, own, stride, pads):
        weights = binarize_standardized if binary else standardize
        kernel = weights(own["kernel"], own["gain"])
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=dimensions)

    along = {name: leaf[None, None, None] for name, leaf in params["activation"].items()}
    signs = binary_sign(beta * x + params["sign"]["bias"][None, None, None])
    total = alpha * conv(signs, params["conv"], strides, [(1, 1), (1, 1)])
    if "projection" in params:
        n, height, width, channels = x.shape
        pooled = (beta * x).reshape(n, height // strides, strides, width // strides, strides, channels).mean((2, 4))
        total = total + conv(pooled, params["projection"], 1, "VALID")
    else:
        total = total + x
    shifted = total + along["shift"]
    return jnp.maximum(shifted, 0) + along["slope"] * jnp.minimum(shifted, 0) + along["offset"]


@pytest.mark.parametrize(("name", "binary"), [("same", False), ("strides", True), ("wider", True)])
def test_a_block_is_its_formulas_and_both_apis_and_stages_have_the_same_parameters(name, binary):
    (features, options), x = BLOCKS[name], normal(0, 2, 6, 6, 4, mean=0, deviation=0.7)
    block = Block(features, binary=binary, **options)
    params = random_params(block, x)
    run = jax.jit(jax.value_and_grad(lambda params, x: weigh(block.apply({"params": params}, x)), argnums=(0, 1)))
    by_hand = jax.jit(
        jax.value_and_grad(lambda params, x: weigh(block_by_hand(params, x, binary, **options)), argnums=(0, 1))
    )
    (value, gradients), (expected, gradients_by_hand) = run(params, x), by_hand(params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-11)
    chex.assert_trees_all_close(gradients, gradients_by_hand, rtol=1e-9, atol=1e-11)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradients))

    other = jax.eval_shape(Block(features, binary=not binary, **options).init, jax.random.key(0), x)["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(other, params)
    module = contrib_nnx.BinaryBlock(4, features, binary=not binary, param_dtype=float, rngs=nnx.Rngs(0), **options)
    nnx.update(module, params)
    module.set_attributes(binary=binary)
    y = compiled_call(lambda module, x: module(x), module, x)
    np.testing.assert_allclose(weigh(y), expected, rtol=1e-11)


def test_a_block_computes_in_low_precision_where_told():
    x = normal(0, 2, 4, 4, 3).astype(jnp.bfloat16)
    block = linen.BinaryBlock(3, strides=2, dtype=jnp.bfloat16)
    y, variables = jax.jit(block.init_with_output)(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    module = contrib_nnx.BinaryBlock(3, 3, strides=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(module, variables["params"])
    again = compiled_call(lambda module, x: module(x), module, x)
    np.testing.assert_allclose(again.astype(jnp.float32), y.astype(jnp.float32), atol=0.05)


class Stack(nn.Module):
    """Three blocks in one array."""

    binary: bool = True

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            lambda block, x, _: (block(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return blocks(Block(4, binary=self.binary, name="block"), x, None)[0]


def test_scanned_mapped_and_compiled_blocks_are_the_blocks_one_by_one():
    x = normal(0, 2, 4, 4, 4, mean=0)
    params, one = random_params(Stack(), x), jax.jit(Block(4).apply)
    expected = x
    for k in range(3):
        own = jax.tree.map(lambda leaf, k=k: leaf[k], params["block"])
        expected = one({"params": own}, expected)
    run = jax.jit(Stack().apply)
    np.testing.assert_allclose(run({"params": params}, x), expected, rtol=1e-10)
    mapped = jax.jit(jax.vmap(lambda x: Stack().apply({"params": params}, x[None])[0]))(x)
    np.testing.assert_allclose(mapped, expected, rtol=1e-10)
    assert standardized_layers(params)["block/conv"].moments_shape == (3, 1, 4)


def test_masks_and_single_weights_are_refused():
    mask = jnp.ones((3, 3, 4, 5))
    with pytest.raises(ValueError, match="BinaryWSConv takes no mask: a masked kernel has a third value"):
        linen.BinaryWSConv(5, (3, 3), mask=mask).init(jax.random.key(0), jnp.ones((1, 6, 6, 4)))
    with pytest.raises(ValueError, match="BinaryWSConv takes no mask"):
        contrib_nnx.BinaryWSConv(4, 5, (3, 3), mask=mask, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="fewer than two weights"):
        linen.BinaryWSDense(5).init(jax.random.key(0), jnp.ones((2, 1)))


# Beside BNP and clipping, and through both stages.


class Net(nn.Module):
    binary: bool = True

    @nn.compact
    def __call__(self, x):
        x = linen.WSConv(4, (3, 3), name="stem", param_dtype=float)(x)
        x = Block(4, binary=self.binary, name="first")(x)
        x = Block(6, binary=self.binary, strides=2, name="second")(x).mean((1, 2))
        x = linen.BinaryWSDense(5, name="hidden", param_dtype=float)(linen.RSign(float)(x))
        return nn.Dense(3, param_dtype=float, name="classifier")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.block = contrib_nnx.BinaryBlock(4, 6, strides=2, param_dtype=float, rngs=rngs)
        self.hidden = contrib_nnx.BinaryWSLinear(6, 5, param_dtype=float, rngs=rngs)
        self.out = nnx.Linear(5, 3, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        return self.out(self.hidden(self.block(x).mean((1, 2))))


CONVOLUTIONS = ["first/conv", "second/conv", "second/projection"]


def test_find_layers_excludes_binary_kernels_with_the_reason():
    """And BNP trains the classifier."""
    x = normal(0, 4, 4, 4, 2)
    layers = bnp.linen.find_layers(Net(), x)
    assert list(layers) == ["classifier"]
    for name in [*CONVOLUTIONS, "hidden"]:
        assert reasons(layers)[f"{name}/kernel"] == "its kernel is computed from the parameter before the product"
    model = make(NnxNet)
    layers = bnp.nnx.find_layers(model, normal(0, 4, 4, 4, 4))
    assert list(layers) == ["out"]
    for path, cls in (("block/conv", "Conv"), ("block/projection", "Conv"), ("hidden", "Linear")):
        assert f"overrides __call__ and does not call that of {cls}" in reasons(layers)[f"{path}/kernel"]


def test_standardized_layers_are_clipped_by_unit():
    """All that have a gain, binary or not; gains, thresholds and activations pass."""
    x = normal(0, 4, 4, 4, 2)
    params = random_params(Net(), x)
    layers = standardized_layers(params)
    assert sorted(layers) == sorted([*CONVOLUTIONS, "hidden", "stem"])
    gradients = jax.tree.map(lambda leaf: 100 * jnp.cos(leaf), params)
    tx = adaptive_grad_clip(0.1, layers)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    flat, weights = flatten(updates), flatten(params)
    clipped = [f"{name}/kernel" for name in layers]
    for path, leaf in flatten(gradients).items():
        axes = tuple(range(leaf.ndim - 1))
        if path in clipped:
            bounds = 0.1 * np.sqrt((weights[path] ** 2).sum(axes))
            np.testing.assert_allclose(np.sqrt((flat[path] ** 2).sum(axes)), bounds, rtol=1e-12)
        elif path != "stem/bias":
            np.testing.assert_array_equal(flat[path], leaf)
    state = nnx.state(make(NnxNet), nnx.Param)
    assert sorted(standardized_layers(state)) == ["block/conv", "block/projection", "hidden"]


@pytest.mark.usefixtures("standard_promotion")
def test_parameters_of_the_first_stage_begin_the_second():
    """Activations are binary in both; a few steps of each lower the loss."""
    x = normal(0, 32, 4, 4, 2, mean=0)
    labels = jnp.arange(32) % 3
    x = x.at[:, :, :, 0].add(labels.astype(float)[:, None, None] - 1.0)
    params = jax.jit(Net().init)(jax.random.key(0), x)["params"]
    tx = optax.chain(adaptive_grad_clip(0.1, standardized_layers(params)), optax.adam(0.01))
    for binary in (False, True):

        def loss_fn(params, model):
            logits = model.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        step = jax.jit(jax.value_and_grad(functools.partial(loss_fn, model=Net(binary=binary))))
        update, state, losses = jax.jit(tx.update), tx.init(params), []
        for _ in range(15):
            loss, gradients = step(params)
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
        assert losses[-1] < 0.8 * losses[0]
