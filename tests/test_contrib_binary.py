"""Binary networks: the sign and its gradient, binary kernels by a loop and by counting bits, betas, the activation."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal, weigh

from bnp_optax.contrib import binarize_standardized, binary_sign, block_betas, linen, rprelu, standardize
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
