"""Neural sampling machines: frequencies against probabilities, what does not change them, borders, gradients."""

import functools
import itertools
import math

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers import normal

from bnp_optax.contrib import BernoulliNoise, GaussianNoise, activation_probability, sample_units
from bnp_optax.contrib.sampling import Convolution

pytestmark = pytest.mark.usefixtures("x64")

DRAWS = 10_000
NOISES = {
    "Bernoulli": BernoulliNoise(0.5),
    "rare Bernoulli": BernoulliNoise(0.2),
    "Gaussian": GaussianNoise(1.0),
    "little Gaussian": GaussianNoise(0.3),
}
all_noises = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)


def signs(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).choice([-1.0, 1.0], shape))


def unit_arguments(inputs=200, outputs=6, seed=0):
    """Inputs, weights of no particular norm, gains and biases, at which no probability is near 0 or 1."""
    rng = np.random.default_rng(seed)
    z, kernel = rng.choice([-1.0, 1.0], (inputs,)), rng.normal(0.01, 3, (inputs, outputs))
    beta = rng.uniform(0.2, 1, outputs)
    return tuple(map(jnp.asarray, (z, kernel, beta, rng.normal(0, 0.2 * math.sqrt(9 * inputs), outputs))))


def probability(z, kernel, beta, bias, deviation):
    """The formula for inputs of 1 and -1, in NumPy."""
    norm = np.sqrt(np.sum(np.asarray(kernel) ** 2, axis=0))
    return (1 + scipy.special.erf((beta * (z @ kernel) + bias / (math.sqrt(2) * deviation)) / norm)) / 2


@functools.partial(jax.jit, static_argnames=("noise", "draws"))
def frequencies(z, kernel, beta, bias, noise, draws=DRAWS):
    """How often units are 1."""
    keys = jax.random.split(jax.random.key(0), draws)
    return jax.vmap(lambda key: sample_units(key, z, kernel, beta, bias, noise=noise) == 1)(keys).mean(0, dtype=float)


def assert_within_four_sigma(frequency, expected, draws=DRAWS, error=0.0):
    frequency = np.asarray(frequency)
    sigma = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(frequency - expected) <= 4 * sigma + error).all(), (frequency, expected)


# Probabilities and samples.


@all_noises
@pytest.mark.parametrize("with_bias", [True, False])
def test_units_are_as_frequent_as_their_probability_says(noise, with_bias):
    """Exactly so with normal noise; the central limit theorem is off by its skewness with the other, here < 0.0015."""
    z, kernel, beta, bias = unit_arguments()
    bias = bias if with_bias else None
    expected = probability(z, kernel, beta, 0 if bias is None else bias, noise.deviation)
    assert 0.02 < expected.min() < 0.4
    assert 0.6 < expected.max() < 0.98
    found = activation_probability(z, kernel, beta, bias, noise=noise)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    error = 0.0015 if isinstance(noise, BernoulliNoise) else 0.0
    assert_within_four_sigma(frequencies(z, kernel, beta, bias, noise), expected, error=error)


def test_units_of_few_inputs_are_as_frequent_as_all_patterns_of_noise_say():
    """Which the probability of many inputs is not."""
    noise, (z, kernel, beta, bias) = BernoulliNoise(0.3), unit_arguments(4, 5)
    a = np.sqrt(2) * noise.deviation * np.asarray(beta) - noise.p
    expected = np.zeros(5)
    for pattern in itertools.product([0, 1], repeat=4):
        weight = math.prod(noise.p if passed else 1 - noise.p for passed in pattern)
        u = np.asarray(pattern * np.asarray(z)) @ np.asarray(kernel) + a * np.asarray(z @ kernel) + np.asarray(bias)
        expected += weight * (u >= 0)
    assert_within_four_sigma(frequencies(z, kernel, beta, bias, noise), expected)
    assert np.abs(expected - probability(z, kernel, beta, bias, noise.deviation)).max() > 0.05


@all_noises
def test_units_of_zero_gain_and_bias_are_a_coin(noise):
    z, kernel, _, _ = unit_arguments()
    zeros = jnp.zeros(6)
    np.testing.assert_array_equal(activation_probability(z, kernel, zeros, zeros, noise=noise), np.full(6, 0.5))
    assert_within_four_sigma(frequencies(z, kernel, zeros, zeros, noise), np.full(6, 0.5), error=0.0015)


@all_noises
def test_without_a_bias_the_scale_of_the_weights_changes_no_draw(noise):
    """With one it does; with one that is scaled alike it does not."""
    z, kernel, beta, bias = unit_arguments()
    keys = jax.random.split(jax.random.key(1), 500)

    @jax.jit
    def draw(kernel, bias):
        return jax.vmap(lambda key: sample_units(key, z, kernel, beta, bias, noise=noise))(keys)

    free, fixed = draw(kernel, None), draw(kernel, bias)
    for factor in (2.0**-20, 1024.0, 0.1, 7.3):
        np.testing.assert_array_equal(draw(factor * kernel, None), free)
        np.testing.assert_array_equal(draw(factor * kernel, factor * bias), fixed)
    assert (draw(0.1 * kernel, bias) != fixed).any()
    # each unit has a norm of its own
    np.testing.assert_array_equal(draw(kernel * jnp.array([[2.0, 1, 1, 0.5, 1, 1]]), None), free)


@pytest.mark.parametrize("family", ["Bernoulli", "Gaussian"])
def test_without_noise_units_are_the_sign_of_the_mean(family):
    """At constant a, here 0.7, and down to the threshold."""
    z, kernel, _, bias = unit_arguments()
    noise = BernoulliNoise(1 - 1e-12) if family == "Bernoulli" else GaussianNoise(1e-6)
    beta = jnp.full(6, (0.7 + noise.mean) / (math.sqrt(2) * noise.deviation))
    expected = np.sign((0.7 + 1) * np.asarray(z @ kernel) + np.asarray(bias))
    draw = jax.jit(functools.partial(sample_units, noise=noise))
    np.testing.assert_array_equal(draw(jax.random.key(0), z, kernel, beta, bias), expected)
    np.testing.assert_allclose(2 * activation_probability(z, kernel, beta, bias, noise=noise) - 1, expected, atol=1e-6)


def test_the_expected_output_is_the_error_function():
    z, kernel, beta, _ = unit_arguments()
    noise, draws = GaussianNoise(0.7), DRAWS
    mean = 2 * frequencies(z, kernel, beta, None, noise, draws) - 1
    expected = [
        math.erf(float(b) * float(z @ w) / float(np.linalg.norm(w))) for b, w in zip(beta, kernel.T, strict=True)
    ]
    np.testing.assert_allclose(mean, expected, atol=4 / math.sqrt(draws))


def test_probabilities_near_zero_have_their_digits():
    kernel = jnp.ones((100, 1))
    found = activation_probability(-jnp.ones(100), kernel, jnp.ones(1), noise=GaussianNoise(1.0))
    np.testing.assert_allclose(found, scipy.special.erfc(10) / 2, rtol=1e-10)


def test_units_of_one_example_share_their_noise():
    """Two units of equal weights are always equal, units of opposite weights always opposite; examples differ."""
    z, kernel, _, _ = unit_arguments()
    kernel = jnp.stack([kernel[:, 0], kernel[:, 0], -kernel[:, 0]], 1)
    z = jnp.broadcast_to(z, (300, 200))
    draw = jax.jit(functools.partial(sample_units, noise=GaussianNoise(1.0)))
    y = np.asarray(draw(jax.random.key(0), z, kernel, jnp.full(3, 0.3)))
    np.testing.assert_array_equal(y[:, 0], y[:, 1])
    np.testing.assert_array_equal(y[:, 0], -y[:, 2])
    assert set(y[:, 0]) == {-1.0, 1.0}


def test_without_inputs_or_weights_the_bias_decides():
    """And no gradient is not a number."""
    z, bias, beta = jnp.ones((1, 4)), jnp.array([-1.0, 0.0, 1.0]), jnp.ones(3)
    noise = BernoulliNoise(0.5)

    @jax.jit
    def run(z, kernel):
        def total(z, kernel):
            y = sample_units(jax.random.key(0), z, kernel, beta, bias, noise=noise)
            return y.sum(), y

        gradients, y = jax.grad(total, (0, 1), has_aux=True)(z, kernel)
        return y, activation_probability(z, kernel, beta, bias, noise=noise), gradients

    for inputs, kernel in ((z, jnp.zeros((4, 3))), (jnp.zeros((1, 4)), jnp.ones((4, 3)))):
        y, found, gradients = run(inputs, kernel)
        np.testing.assert_array_equal(y, [[-1, 1, 1]])
        np.testing.assert_array_equal(found, [[0, 1, 1]])
        chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_what_is_not_a_number_stays_so():
    z = jnp.array([[1.0, jnp.nan], [1.0, 1.0]])
    draw = jax.jit(functools.partial(sample_units, noise=GaussianNoise(1.0)))
    y = draw(jax.random.key(0), z, jnp.ones((2, 3)), jnp.ones(3))
    assert np.isnan(y[0]).all()
    assert (np.abs(y[1]) == 1).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_computed_in_float32(dtype):
    """Squares of the weights would be 0 in float16; the samples are those of float32, whichever arrays are narrow."""
    z, kernel = signs(0, 4, 50).astype(dtype), (1e-4 * normal(0, 50, 3)).astype(dtype)
    beta, key, noise = jnp.ones(3, dtype), jax.random.key(0), BernoulliNoise(0.5)

    @jax.jit
    def run(*arrays):
        return sample_units(key, *arrays, noise=noise), activation_probability(*arrays, noise=noise)

    wide = [array.astype(jnp.float32) for array in (z, kernel, beta)]
    expected = run(*wide)
    assert {leaf.dtype for leaf in expected} == {np.dtype("float32")}
    for arrays in ((z, kernel, beta), (z, *wide[1:])):
        chex.assert_trees_all_equal(run(*arrays), expected)


@hypothesis.given(p=st.floats(0.01, 0.99), sigma=st.floats(0.01, 10))
def test_noise_has_the_moments_that_it_says(p, sigma):
    for noise in (BernoulliNoise(p), GaussianNoise(sigma)):
        drawn = np.asarray(noise.draw(jax.random.key(0), (4000,), jnp.float64))
        np.testing.assert_allclose(drawn.mean(), noise.mean, atol=5 * noise.deviation / math.sqrt(4000))
        spread = np.abs(drawn - noise.mean) ** 2
        np.testing.assert_allclose(spread.mean(), noise.deviation**2, atol=5 * spread.std() / math.sqrt(4000) + 1e-3)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_probabilities_of_no_noise_are_refused(p):
    with pytest.raises(ValueError, match=f"p must be between 0 and 1, so that there is noise, but is {p}"):
        BernoulliNoise(p)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_deviations_of_no_noise_are_refused(sigma):
    with pytest.raises(ValueError, match=f"sigma must be positive and finite, so that there is noise, but is {sigma}"):
        GaussianNoise(sigma)


# Gradients.


@all_noises
def test_the_gradient_is_that_of_the_expected_output(noise):
    """By JAX's derivatives of the formula for inputs of 1 and -1, whatever was drawn."""
    z, kernel, beta, bias = unit_arguments()
    weights = normal(5, 6)

    def expected(z, kernel, beta, bias):
        norm = jnp.sqrt(jnp.square(kernel).sum(0))
        return jax.lax.erf((beta * (z @ kernel) + bias / (math.sqrt(2) * noise.deviation)) / norm) @ weights

    def drawn(z, kernel, beta, bias, key):
        return sample_units(key, z, kernel, beta, bias, noise=noise) @ weights

    everything = (0, 1, 2, 3)
    own = jax.jit(jax.grad(drawn, everything))
    by_formula = jax.jit(jax.grad(expected, everything))(z, kernel, beta, bias)
    for seed in range(3):
        chex.assert_trees_all_close(own(z, kernel, beta, bias, jax.random.key(seed)), by_formula, rtol=1e-9, atol=1e-13)
    # the gain may be normalized away, too: without a bias the gradient is orthogonal to the weights
    free = jax.jit(jax.grad(lambda k: sample_units(jax.random.key(0), z, k, beta, noise=noise) @ weights))(kernel)
    np.testing.assert_allclose((free * kernel).sum(0), 0, atol=1e-13)


def test_forward_derivatives_are_there_too():
    z, kernel, beta, bias = unit_arguments()
    arguments, noise = (z, kernel, beta, bias), BernoulliNoise(0.5)
    tangents = tuple(normal(k, *leaf.shape) for k, leaf in enumerate(arguments))

    @jax.jit
    def both(arguments, tangents):
        own = jax.jvp(lambda *a: sample_units(jax.random.key(0), *a, noise=noise), arguments, tangents)
        return own[1], jax.jvp(lambda *a: 2 * activation_probability(*a, noise=noise) - 1, arguments, tangents)[1]

    own, expected = both(arguments, tangents)
    np.testing.assert_allclose(own, expected, rtol=1e-12)


# Convolutions.


def test_at_the_borders_the_variance_is_that_of_the_inputs_that_are_there():
    """Frequencies at a corner, at an edge and inside, where the norm of the whole kernel has other probabilities."""
    rng, noise, beta = np.random.default_rng(0), GaussianNoise(1.0), jnp.array([0.7, 0.4])
    z, kernel, bias = signs(0, 1, 5, 5, 8), jnp.asarray(rng.normal(size=(3, 3, 8, 2))), jnp.array([2.0, -3.0])
    product = Convolution(2)
    expected = np.asarray(activation_probability(z, kernel, beta, bias, noise=noise, product=product))[0]
    for row, column in itertools.product(range(5), repeat=2):
        rows, columns = (slice(max(0, 1 - k), min(3, 6 - k)) for k in (row, column))
        patch = np.asarray(z)[0, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].ravel()
        own = np.asarray(kernel)[rows, columns].reshape(-1, 2)
        np.testing.assert_allclose(expected[row, column], probability(patch, own, beta, bias, 1.0), rtol=1e-12)

    @jax.jit
    def frequency(keys):
        draw = functools.partial(sample_units, noise=noise, product=product)
        return jax.vmap(lambda key: draw(key, z, kernel, beta, bias) == 1)(keys).mean((0, 1), dtype=float)

    found = frequency(jax.random.split(jax.random.key(0), 4000))
    assert_within_four_sigma(found, expected, draws=4000)
    whole = np.sqrt(np.sum(np.asarray(kernel) ** 2, axis=(0, 1, 2)))
    drive = np.asarray(product(z, kernel))[0]
    naive = (1 + scipy.special.erf((np.asarray(beta) * drive + np.asarray(bias) / math.sqrt(2)) / whole)) / 2
    assert np.abs(naive - expected)[0, 0].max() > 0.02
    np.testing.assert_allclose(naive[1:4, 1:4], expected[1:4, 1:4], rtol=1e-12)


def test_batches_of_any_number_of_axes_and_windows_of_one():
    kernel, x = normal(0, 2, 3, 4), normal(1, 2, 5, 6, 3)
    product = Convolution(1)
    y = product(x, kernel)
    assert y.shape == (2, 5, 6, 4)
    np.testing.assert_allclose(product(x[1, 2], kernel), y[1, 2], rtol=1e-12)
    with pytest.raises(ValueError, match=r"Inputs of shape \(3,\) have too few axes for a window of 1"):
        product(x[0, 0, 0], kernel)
