"""Standardized kernels against a loop over their units, and the gains against integrals."""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from helpers import weigh

from bnp_optax.contrib import nonlinearity_gain, standardize

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = st.sampled_from([(2, 3), (7, 1), (3, 5, 2), (3, 3, 4, 5), (1, 1, 2, 3), (3, 3, 1, 4), (2, 2, 2, 3, 2)])


def kernel_of(shape, seed, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, scale, shape))


def standardize_units(kernel, gain, eps=1e-4):
    """The formula, a unit at a time."""
    kernel, result = np.asarray(kernel, np.float64), np.empty(kernel.shape)
    for output in range(kernel.shape[-1]):
        weights = kernel[..., output]
        variance = np.mean((weights - np.mean(weights)) ** 2)
        result[..., output] = gain[output] * (weights - np.mean(weights)) / np.sqrt(max(variance * weights.size, eps))
    return result


gradient_of = jax.jit(jax.grad(lambda kernel: weigh(standardize(kernel, 2.0))))
compiled = jax.jit(standardize, static_argnames="eps")


# The function.


@hypothesis.given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_every_unit_has_mean_zero_and_the_gain_for_norm(shape, seed, scale):
    kernel = kernel_of(shape, seed, scale)
    gain = np.random.default_rng(seed).normal(1, 1, shape[-1])
    standardized = compiled(kernel, jnp.asarray(gain), eps=1e-30)
    np.testing.assert_allclose(standardized, standardize_units(kernel, gain, 1e-30), rtol=1e-10, atol=1e-15)
    axes = tuple(range(len(shape) - 1))
    np.testing.assert_allclose(standardized.mean(axes), 0, atol=1e-14 / scale if scale < 1 else 1e-14)
    fan_in = math.prod(shape[:-1])
    np.testing.assert_allclose(fan_in * standardized.var(axes), gain**2, rtol=1e-14)
    np.testing.assert_allclose(jnp.sqrt((standardized**2).sum(axes)), np.abs(gain), rtol=1e-14)


def test_invariants_hold_to_the_last_digits():
    """At weights of order 1 without an offset, which loses digits."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 5)))
    standardized = standardize(kernel)
    np.testing.assert_allclose(standardized.mean((0, 1, 2)), 0, atol=1e-16)
    np.testing.assert_allclose(36 * standardized.var((0, 1, 2)), 1, rtol=1e-15)
    np.testing.assert_allclose(standardize(4 * kernel), standardized, rtol=1e-15)
    np.testing.assert_allclose(standardize(kernel + 0.5), standardized, rtol=1e-13, atol=1e-16)


@hypothesis.given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0.1, 100), offset=st.floats(-5, 5))
def test_scaled_and_shifted_weights_are_the_same_kernel(seed, factor, offset):
    kernel = kernel_of((3, 3, 4, 5), seed)
    expected = compiled(kernel, 2.0)
    np.testing.assert_allclose(compiled(factor * kernel + offset, 2.0), expected, rtol=1e-9, atol=1e-12)
    gradient, scaled = gradient_of(kernel), gradient_of(factor * kernel)
    np.testing.assert_allclose(scaled, gradient / factor, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose((gradient * kernel).sum((0, 1, 2)), 0, atol=1e-13)
    np.testing.assert_allclose(gradient.sum((0, 1, 2)), 0, atol=1e-13)


def test_another_unit_does_not_matter():
    kernel = kernel_of((3, 3, 4, 5), 0)
    changed = standardize(kernel.at[..., 2].multiply(-7))
    np.testing.assert_array_equal(changed[..., [0, 1, 3, 4]], standardize(kernel)[..., [0, 1, 3, 4]])
    np.testing.assert_allclose(changed[..., 2], -standardize(kernel)[..., 2], rtol=1e-13)


def test_small_weights_are_no_longer_standardized():
    """Below the bound what remains is the deviation divided by its square root, in proportion to the weights."""
    kernel = kernel_of((50, 3), 0)
    for scale, squared_norm in ((1e-2, 1.0), (1e-4, None), (1e-6, None)):
        centred = kernel - kernel.mean(0, keepdims=True)
        unit = scale * centred / jnp.linalg.norm(centred, axis=0, keepdims=True)
        expected = scale**2 / 1e-4 if squared_norm is None else squared_norm
        np.testing.assert_allclose(50 * standardize(unit).var(0), expected, rtol=1e-10)
    np.testing.assert_allclose(50 * standardize(unit, eps=1e-14).var(0), 1, rtol=1e-10)


def test_constant_filters_become_zero_and_their_gradient_is_finite():
    kernel = jnp.full((3, 3, 2, 4), 0.7)
    np.testing.assert_allclose(standardize(kernel), 0, atol=1e-13)
    gradient = jax.grad(lambda kernel: weigh(standardize(kernel)))(kernel)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_low_precision_is_computed_in_float32(dtype):
    """In float16 the square of 300 overflows."""
    kernel = (200 * kernel_of((64, 3), 0)).astype(dtype)
    standardized = standardize(kernel, jnp.ones(3, dtype))
    assert standardized.dtype == dtype
    exact = standardize_units(np.asarray(kernel, np.float64), np.ones(3))
    resolution = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(standardized, np.float64), exact, rtol=resolution, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 3), {}, r"shape \(1, 3\) has fewer than two weights"),
        ((1, 1, 1, 3), {}, "fewer than two weights"),
        ((0, 3), {}, "fewer than two weights"),
        ((3,), {}, "fewer than two weights"),
        ((2, 3), {"eps": 0.0}, "eps must be positive, but is 0.0"),
        ((2, 3), {"gain": jnp.ones(2)}, r"gain has shape \(2,\), but the kernel has 3 outputs"),
    ],
)
def test_what_cannot_be_standardized_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        standardize(jnp.ones(shape), **options)


# The gains.


def integrated(activation):
    """The gain by SciPy's adaptive quadrature, between the places where the function has kinks or jumps."""

    def moment(function):
        def integrand(x):
            return function(float(activation(np.float64(x)))) * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

        kinks = (-12, -3, -1, -0.3, 0, 0.3, 1, 3, 6, 12)
        return sum(
            scipy.integrate.quad(integrand, low, high, epsabs=1e-13, epsrel=1e-12)[0]
            for low, high in itertools.pairwise(kinks)
        )

    return 1 / math.sqrt(moment(lambda y: y * y) - moment(lambda y: y) ** 2)


NUMPY = {
    "elu": (jax.nn.elu, lambda x: x if x > 0 else math.expm1(x)),
    "gelu": (jax.nn.gelu, lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "silu": (jax.nn.silu, lambda x: x / (1 + math.exp(-x))),
    "sigmoid": (jax.nn.sigmoid, lambda x: 1 / (1 + math.exp(-x))),
    "tanh": (jnp.tanh, math.tanh),
    "softplus": (jax.nn.softplus, lambda x: math.log1p(math.exp(x))),
    "hard_tanh": (jax.nn.hard_tanh, lambda x: max(-1, min(1, x))),
    "relu6": (jax.nn.relu6, lambda x: max(0, min(6, x))),
}


@pytest.mark.parametrize("name", NUMPY)
def test_gains_are_those_of_adaptive_quadrature(name):
    own, scalar = NUMPY[name]
    np.testing.assert_allclose(nonlinearity_gain(own), integrated(scalar), rtol=1e-11)


@pytest.mark.parametrize(
    ("activation", "variance"),
    [
        (lambda x: x, 1),
        (jnp.sign, 1),
        (jax.nn.relu, (1 - 1 / math.pi) / 2),
        (functools.partial(jax.nn.leaky_relu, negative_slope=0.1), (1 + 0.01) / 2 - 0.9**2 / (2 * math.pi)),
        (jnp.abs, 1 - 2 / math.pi),
        (jnp.square, 2),
        (jnp.sin, (1 - math.exp(-2)) / 2),
        (jnp.exp, math.exp(2) - math.exp(1)),
        (lambda x: 3 + 2 * x, 4),
        (np.tanh, 1 / 1.5925374197**2),
    ],
)
def test_gains_are_the_closed_forms(activation, variance):
    np.testing.assert_allclose(nonlinearity_gain(activation), 1 / math.sqrt(variance), rtol=1e-10)


def test_gains_are_the_numbers_that_were_derived():
    exact = {
        jax.nn.relu: 1.7128585504,
        jax.nn.gelu: 1.7009165617,
        jax.nn.silu: 1.7871872221,
        jnp.tanh: 1.5925374197,
        jax.nn.elu: 1.2708434,
        jax.nn.sigmoid: 4.8013134,
    }
    for activation, gain in exact.items():
        np.testing.assert_allclose(nonlinearity_gain(activation), gain, rtol=2e-8)


@pytest.mark.parametrize(
    ("activation", "precision"),
    [(lambda x: jnp.maximum(x, 0.3), 1e-7), (lambda x: (x > 0.3).astype(x.dtype), 1e-3), (jnp.round, 1e-10)],
    ids=["kink", "jump", "jumps at halves"],
)
def test_kinks_and_jumps_elsewhere_cost_the_digits_that_the_docstring_says(activation, precision):
    scalar = lambda x: float(activation(jnp.float64(x)))  # noqa: E731
    if activation is jnp.round:
        probabilities = [math.erf((k + 0.5) / math.sqrt(2)) - math.erf((k - 0.5) / math.sqrt(2)) for k in range(1, 9)]
        expected = 1 / math.sqrt(sum(k * k * p for k, p in enumerate(probabilities, 1)))
    else:
        expected = integrated(scalar)
    np.testing.assert_allclose(nonlinearity_gain(activation), expected, rtol=precision)


def test_gains_are_numbers_of_float64_whatever_surrounds_them():
    """Inside a compiled function, and without float64."""
    expected = nonlinearity_gain(jax.nn.silu)
    found = []

    @jax.jit
    def run(x):
        found.append(nonlinearity_gain(jax.nn.silu))
        return found[-1] * jax.nn.silu(x)

    with jax.enable_x64(False):
        assert run(jnp.ones(3)).dtype == jnp.float32
    assert found == [expected]


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (jnp.sum, r"makes shape \(\) of \(131072,\)"),
        (jnp.log, "not finite at -16"),
        (jnp.zeros_like, "constant"),
        (lambda x: 0 * x + 1e3, "constant"),
        (lambda x: jnp.exp(x * x / 4), "grows so fast"),
    ],
)
def test_functions_without_a_gain_are_refused(activation, message):
    with pytest.raises(ValueError, match=message):
        nonlinearity_gain(activation)


def test_a_deep_network_keeps_the_variance_of_what_it_passes_on():
    """With the gains it is 1 at every depth up to sampling; without them ReLU's falls by a factor 2.93 a layer."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 512)))
    gain = nonlinearity_gain(jax.nn.relu)

    @jax.jit
    def variances(x, gain):
        found = []
        for layer in range(6):
            kernel = jax.random.normal(jax.random.key(layer), (512, 512), float) / math.sqrt(512)
            x = gain * jax.nn.relu(x @ standardize(kernel))
            found.append(x.var())
        return jnp.stack(found)

    np.testing.assert_allclose(variances(x, gain), 1, atol=0.1)
    falling = variances(x, 1.0)
    np.testing.assert_allclose(falling[1:] / falling[:-1], gain**-2, rtol=0.1)


def test_the_variance_along_a_normalizer_free_residual_network_is_as_expected():
    """Blocks ``x + alpha branch(x / expected deviation)`` add alpha^2 to the variance each."""
    alpha, gain, expected = 0.5, nonlinearity_gain(jax.nn.relu), 1.0
    x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 256)))
    for block in range(6):
        h = gain * jax.nn.relu(x) / math.sqrt(expected)
        for layer in range(2):
            kernel = jax.random.normal(jax.random.key(2 * block + layer), (256, 256), float)
            h = h @ standardize(kernel)
            h = gain * jax.nn.relu(h) if layer == 0 else h
        x, expected = x + alpha * h, expected + alpha**2
        np.testing.assert_allclose(x.var(0).mean() / expected, 1, atol=0.1)
