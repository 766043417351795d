"""Neural sampling machines: frequencies against probabilities, what does not change them, gradients, the layers."""

import functools
import itertools
import math

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from helpers import compiled_call, normal, pure, reasons, weigh

import bnp_optax as bnp
from bnp_optax.contrib import BernoulliNoise, GaussianNoise, activation_probability, linen, sample_units
from bnp_optax.contrib import nnx as contrib_nnx
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
NSMDense, NSMConv = (functools.partial(cls, param_dtype=float) for cls in (linen.NSMDense, linen.NSMConv))


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


CONVOLUTIONS = {
    "strides and no padding": ((5, (3, 2)), {"strides": (2, 1), "padding": "VALID"}),
    "numbers of padding": ((5, (3, 2)), {"padding": ((1, 0), 2)}),
    "groups": ((6, (3, 3)), {"feature_group_count": 2, "use_bias": False, "padding": 2, "strides": 2}),
    "depthwise": ((4, (3, 3)), {"feature_group_count": 4, "strides": None}),
    "dilated": ((5, (3, 3)), {"kernel_dilation": 2, "input_dilation": (1, 2), "padding": 1}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_products_are_those_of_flaxs_convolution(name):
    """Of inputs, of their squares, and of inputs with noise: so they are of every layer, in Linen and NNX."""
    (features, window), options = CONVOLUTIONS[name]
    z, options = signs(0, 2, 6, 6, 4), dict(options)
    use_bias = options.pop("use_bias", True)
    flax = nn.Conv(features, window, use_bias=False, param_dtype=float, **options)
    own = NSMConv(features, window, use_bias=use_bias, **options)
    shapes = jax.eval_shape(own.init, jax.random.key(0), z)["params"]
    params = {leaf: normal(k, *shape.shape) for k, (leaf, shape) in enumerate(sorted(shapes.items()))}
    assert set(params) == {"beta", "bias", "kernel"} - (set() if use_bias else {"bias"})
    key = jax.random.key(3)

    @jax.jit
    def both(params):
        y = own.apply({"params": params}, z, rngs={"noise": key})
        by_flax = functools.partial(
            sample_units, noise=own.noise, product=lambda x, kernel: flax.apply({"params": {"kernel": kernel}}, x)
        )
        drawn = own.apply({}, "noise", method=nn.Module.make_rng, rngs={"noise": key})
        return y, by_flax(drawn, z, params["kernel"], params["beta"], params.get("bias"))

    y, expected = both(params)
    np.testing.assert_array_equal(y, expected)
    assert set(np.unique(y)) == {-1.0, 1.0}

    layer = contrib_nnx.NSMConv(4, features, window, use_bias=use_bias, param_dtype=float, rngs=nnx.Rngs(0), **options)
    nnx.update(layer, params)
    chex.assert_trees_all_equal_shapes(nnx.to_pure_dict(pure(nnx.state(layer, nnx.Param))), params)
    of_nnx, expected = compiled_call(
        lambda layer, z: (
            layer(z, rngs=key),
            sample_units(
                key,
                z,
                params["kernel"],
                params["beta"],
                params.get("bias"),
                noise=layer.noise,
                product=lambda x, kernel: flax.apply({"params": {"kernel": kernel}}, x),
            ),
        ),
        layer,
        z,
    )
    np.testing.assert_array_equal(of_nnx, expected)


def test_batches_of_any_number_of_axes_and_windows_of_one():
    kernel, x = normal(0, 2, 3, 4), normal(1, 2, 5, 6, 3)
    product = Convolution(1)
    y = product(x, kernel)
    assert y.shape == (2, 5, 6, 4)
    np.testing.assert_allclose(product(x[1, 2], kernel), y[1, 2], rtol=1e-12)
    with pytest.raises(ValueError, match=r"Inputs of shape \(3,\) have too few axes for a window of 1"):
        product(x[0, 0, 0], kernel)


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", "CAUSAL", "same"])
def test_other_padding_is_refused(padding):
    with pytest.raises(ValueError, match=f"padding '{padding}' is not supported: use .* or pad the input with jnp.pad"):
        NSMConv(5, (3,), padding=padding).init(jax.random.key(0), jnp.ones((1, 6, 4)))
    with pytest.raises(ValueError, match=f"padding '{padding}' is not supported"):
        contrib_nnx.NSMConv(4, 5, 3, padding=padding, rngs=nnx.Rngs(0))


def test_groups_that_do_not_divide_are_refused():
    message = "4 channels and 5 features do not divide into 2 groups"
    with pytest.raises(ValueError, match=message):
        NSMConv(5, (3,), feature_group_count=2).init(jax.random.key(0), jnp.ones((1, 6, 4)))
    with pytest.raises(ValueError, match=message):
        contrib_nnx.NSMConv(4, 5, 3, feature_group_count=2, rngs=nnx.Rngs(0))


# The layers.


def test_dense_layers_draw_the_units_of_the_function():
    z, key, noise = signs(0, 3, 2, 7), jax.random.key(4), GaussianNoise(0.5)
    model = NSMDense(5, noise=noise)
    params = {"kernel": normal(0, 7, 5), "beta": normal(1, 5), "bias": normal(2, 5)}
    draw = jax.jit(lambda key: sample_units(key, z, *(params[n] for n in ("kernel", "beta", "bias")), noise=noise))
    drawn = model.apply({}, "noise", method=nn.Module.make_rng, rngs={"noise": key})
    y = jax.jit(model.apply)({"params": params}, z, rngs={"noise": key})
    np.testing.assert_array_equal(y, draw(drawn))
    layer = contrib_nnx.NSMLinear(7, 5, noise=noise, param_dtype=float, rngs=nnx.Rngs(0))
    nnx.update(layer, params)
    np.testing.assert_array_equal(call_with(layer, z, key), draw(key))


def test_parameters_begin_as_the_method_says():
    z = jnp.ones((1, 6, 6, 4))
    conv = jax.jit(NSMConv(8, (3, 3), feature_group_count=2).init)(jax.random.key(0), z)["params"]
    of_nnx = contrib_nnx.NSMConv(4, 8, (3, 3), feature_group_count=2, param_dtype=float, rngs=nnx.Rngs(0))
    for params in (conv, pure(nnx.state(of_nnx, nnx.Param))):
        np.testing.assert_array_equal(params["beta"], np.ones(8))
        np.testing.assert_array_equal(params["bias"], np.zeros(8))
        assert params["kernel"].shape == (3, 3, 2, 8)
        assert np.std(params["kernel"]) > 0.1
    shapes = jax.eval_shape(NSMDense(3, use_bias=False).init, jax.random.key(0), z)
    assert set(shapes["params"]) == {"beta", "kernel"}


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


def test_layers_return_the_dtype_that_they_are_told():
    z, rngs = signs(0, 20, 8).astype(jnp.float32), {"noise": jax.random.key(0)}
    shapes = jax.eval_shape(linen.NSMDense(8).init, jax.random.key(0), z)
    for options, expected in (({"dtype": jnp.bfloat16}, jnp.bfloat16), ({}, jnp.float32)):
        assert jax.eval_shape(linen.NSMDense(8, **options).apply, shapes, z, rngs=rngs).dtype == expected
        layer = contrib_nnx.NSMLinear(8, 8, rngs=nnx.Rngs(0), **options)
        assert nnx.eval_shape(lambda layer, z: layer(z), layer, z).dtype == expected


def test_noise_is_drawn_in_use_as_in_training():
    z, run = signs(0, 20, 8), jax.jit(NSMDense(8).apply)
    params = {"kernel": normal(0, 8, 8), "beta": jnp.ones(8), "bias": jnp.zeros(8)}
    first, second, again = (run({"params": params}, z, rngs={"noise": jax.random.key(k)}) for k in (1, 2, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(first, again)


@functools.cache
def linear(noise):
    return contrib_nnx.NSMLinear(8, 8, param_dtype=float, rngs=nnx.Rngs(0, noise=noise))


call = nnx.jit(lambda layer, z: layer(z))
call_with = nnx.jit(lambda layer, z, rngs: layer(z, rngs=rngs))


def test_noise_of_nnx_is_drawn_in_use_as_in_training():
    z, layer = signs(0, 20, 8), linear(noise=1)
    twin = nnx.clone(layer)
    layer.eval()
    first, second = call(layer, z), call(layer, z)
    assert (first != second).any()
    np.testing.assert_array_equal(call(twin, z), first)
    np.testing.assert_array_equal(call(twin, z), second)
    assert (call(linear(noise=2), z) != first).any()
    of_call = call_with(layer, z, nnx.Rngs(noise=7))
    np.testing.assert_array_equal(of_call, call_with(layer, z, nnx.Rngs(noise=7)["noise"]))
    assert (of_call != call_with(layer, z, nnx.Rngs(noise=8))).any()


def test_layers_of_one_model_have_noises_of_their_own():
    class Twins(nn.Module):
        @nn.compact
        def __call__(self, z):
            return NSMDense(8)(z), NSMDense(8)(z)

    z, params = signs(0, 20, 8), {"kernel": normal(0, 8, 8), "beta": jnp.ones(8), "bias": jnp.zeros(8)}
    variables = {"params": dict.fromkeys(("NSMDense_0", "NSMDense_1"), params)}
    first, second = jax.jit(Twins().apply)(variables, z, rngs={"noise": jax.random.key(0)})
    assert (first != second).any()
    rngs = nnx.Rngs(0, noise=1)
    first, second = (contrib_nnx.NSMLinear(8, 8, param_dtype=float, rngs=rngs) for _ in range(2))
    nnx.update(second, nnx.state(first, nnx.Param))
    assert (call(first, z) != call(second, z)).any()


def test_without_random_keys_the_error_says_which_and_how():
    z = jnp.ones((2, 4))
    variables = {"params": {"kernel": jnp.ones((4, 3)), "beta": jnp.ones(3), "bias": jnp.zeros(3)}}
    message = r"NSMDense draws noise whenever .* no random keys 'noise' for it: .* rngs=\{\"noise\": key\}\)\."
    with pytest.raises(ValueError, match=message):
        NSMDense(3).apply(variables, z)
    with pytest.raises(ValueError, match=r"no random keys 'dropout'"):
        NSMDense(3, rng_collection="dropout").apply(variables, z, rngs={"noise": jax.random.key(0)})
    with pytest.raises(ValueError, match=r"NSMLinear draws noise .* 'noise' for it: .* nnx.Rngs\(0, noise=1\)\."):
        contrib_nnx.NSMLinear(4, 3, rngs=nnx.Rngs(params=0))
    layer = contrib_nnx.NSMLinear(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no random keys 'noise'"):
        layer(z, rngs=nnx.Rngs(params=0))


class Stack(nn.Module):
    """Three layers in one array, with keys of their own."""

    @nn.compact
    def __call__(self, z):
        body = nn.scan(
            nn.remat(lambda layer, z, _: (layer(z), layer(z))),
            variable_axes={"params": 0},
            split_rngs={"params": True, "noise": True},
            length=3,
        )
        return body(NSMDense(8, name="layer"), z, None)


def test_scanned_compiled_and_mapped_layers():
    z, model = signs(0, 20, 8), Stack()
    variables = jax.jit(model.init)(jax.random.key(0), z)
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), variables)
    rngs = {"noise": jax.random.key(1)}
    last, every = jax.jit(model.apply)(same, z, rngs=rngs)
    assert set(np.unique(last)) == {-1.0, 1.0}
    assert (every[0] != every[1]).any()
    gradients = jax.jit(jax.grad(lambda v: weigh(model.apply(v, z, rngs=rngs)[0])))(variables)
    assert all(np.abs(leaf[-1]).max() > 0 for leaf in jax.tree.leaves(gradients))
    chex.assert_tree_all_finite(gradients)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return contrib_nnx.NSMLinear(8, 8, param_dtype=float, rngs=rngs)

    layers = make(nnx.Rngs(0, noise=1))
    scan = nnx.scan(lambda z, layer: layer(z), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    np.testing.assert_array_equal(np.abs(nnx.jit(scan)(z, layers)), np.ones((20, 8)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, z):
        z = NSMConv(6, (3, 3), strides=2, name="conv")(z)
        z = NSMDense(5, name="hidden")(z.reshape(z.shape[0], -1))
        return nn.Dense(3, param_dtype=float, name="out")(z)


def test_find_layers_excludes_them_with_the_reason():
    """And BNP trains the classifier."""
    z = signs(0, 8, 4, 4, 2)
    layers = bnp.linen.find_layers(Net(), z, rngs={"params": jax.random.key(0), "noise": jax.random.key(1)})
    assert list(layers) == ["out"]
    for name in ("conv", "hidden"):
        assert "NSM" in reasons(layers)[f"{name}/kernel"]
        assert f"{name}/beta" in reasons(layers)
    model = nnx.Sequential(
        contrib_nnx.NSMLinear(4, 3, param_dtype=float, rngs=nnx.Rngs(0)),
        nnx.Linear(3, 2, param_dtype=float, rngs=nnx.Rngs(1)),
    )
    layers = bnp.nnx.find_layers(model, jnp.ones((2, 4)))
    assert list(layers) == ["layers/1"]
    assert "NSMLinear is not one of Flax's linear layers" in reasons(layers)["layers/0/kernel"]


def test_a_network_learns_through_the_gradient():
    """The parity of two inputs among six, which no linear layer tells; averaged over draws."""
    z = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=6)))
    labels = (z[:, 0] * z[:, 1] > 0).astype(float)

    class Parity(nn.Module):
        @nn.compact
        def __call__(self, z):
            return nn.Dense(1, param_dtype=float)(NSMDense(30, noise=GaussianNoise(0.5))(z))[:, 0]

    params = jax.jit(Parity().init)(jax.random.key(0), z)["params"]

    def loss_fn(params, key):
        logits = Parity().apply({"params": params}, z, rngs={"noise": key})
        return jnp.mean(jnp.logaddexp(0, logits) - labels * logits)

    @jax.jit
    def train(params):
        def step(params, key):
            loss, gradients = jax.value_and_grad(loss_fn)(params, key)
            return jax.tree.map(lambda leaf, g: leaf - 0.5 * g, params, gradients), loss

        return jax.lax.scan(step, params, jax.random.split(jax.random.key(0), 600))

    _, losses = train(params)
    assert losses[:5].mean() > 0.6
    assert losses[-50:].mean() < 0.35
