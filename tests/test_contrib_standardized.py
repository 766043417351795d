"""Standardized kernels against a loop over their units, the gains against integrals, the layers against Flax's."""

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
import scipy.integrate
from flax import nnx
from helpers import compiled_call, flatten, gradients_and_records, make, normal, pure, reasons, weigh

import bnp_optax as bnp
from bnp_optax.contrib import adaptive_grad_clip, linen, nonlinearity_gain, standardize, standardized_layers
from bnp_optax.contrib import nnx as contrib_nnx

pytestmark = pytest.mark.usefixtures("x64")

WSDense, WSConv = (functools.partial(cls, param_dtype=float) for cls in (linen.WSDense, linen.WSConv))

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


# The layers. What Flax's own do with the standardized kernel is what these are to do.


def random_params(model, x, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.5, 1, leaf.shape)).astype(leaf.dtype), shapes)


def plain(params, eps=1e-4):
    """Returns the parameters of Flax's layer."""
    params = dict(params)
    return {**params, "kernel": standardize(params["kernel"], params.pop("gain"), eps)} if "gain" in params else params


CONVOLUTIONS = {
    "plain": ((5, (3, 3)), {}),
    "strides and padding": ((5, (3, 3)), {"strides": 2, "padding": "VALID"}),
    "circular": ((5, (3, 3)), {"padding": "CIRCULAR"}),
    "numbers of padding": ((5, (3, 2)), {"padding": ((1, 0), (2, 1))}),
    "groups": ((6, (3, 3)), {"feature_group_count": 2}),
    "depthwise": ((4, (3, 3)), {"feature_group_count": 4}),
    "dilated": ((5, (3, 3)), {"kernel_dilation": 2, "input_dilation": (1, 2), "padding": 1}),
    "without bias": ((5, (1, 1)), {"use_bias": False}),
    "another eps": ((5, (3, 3)), {"eps": 100.0}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_that_of_flax_with_the_standardized_kernel(name):
    """In Linen and NNX."""
    (features, window), options = CONVOLUTIONS[name]
    x = normal(0, 2, 6, 6, 4)
    model = WSConv(features, window, **options)
    params = random_params(model, x)
    options = dict(options)
    eps = options.pop("eps", 1e-4)
    flax = nn.Conv(features, window, param_dtype=float, **options)
    expected = jax.jit(lambda params: flax.apply({"params": plain(params, eps)}, x))(params)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), expected, rtol=1e-12)

    layer = contrib_nnx.WSConv(4, features, window, eps=eps, param_dtype=float, rngs=nnx.Rngs(0), **options)
    nnx.update(layer, params)
    np.testing.assert_allclose(compiled_call(lambda layer, x: layer(x), layer, x), expected, rtol=1e-12)
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.to_pure_dict(pure(nnx.state(layer, nnx.Param))), params)


@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 4)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_dense_layer_is_that_of_flax_with_the_standardized_kernel(shape, use_bias):
    x = normal(0, *shape)
    model = WSDense(5, use_bias=use_bias)
    params = random_params(model, x)
    expected = nn.Dense(5, use_bias=use_bias, param_dtype=float).apply({"params": plain(params)}, x)
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, rtol=1e-13)
    layer = contrib_nnx.WSLinear(4, 5, use_bias=use_bias, param_dtype=float, rngs=nnx.Rngs(0))
    nnx.update(layer, params)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-13)


@pytest.mark.parametrize("layer", ["dense", "convolution"])
def test_parameters_begin_as_the_method_says(layer):
    x = jnp.ones((1, 8, 8, 32))
    model = WSDense(512) if layer == "dense" else WSConv(512, (3, 3), feature_group_count=2)
    fan_in = 32 if layer == "dense" else 9 * 16
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    options = {"param_dtype": float, "rngs": nnx.Rngs(0)}
    module = (
        contrib_nnx.WSLinear(32, 512, **options)
        if layer == "dense"
        else contrib_nnx.WSConv(32, 512, (3, 3), feature_group_count=2, **options)
    )
    for own in (params, pure(nnx.state(module, nnx.Param))):
        np.testing.assert_array_equal(own["gain"], np.ones(512))
        np.testing.assert_array_equal(own["bias"], np.zeros(512))
        np.testing.assert_allclose(own["kernel"].std(), fan_in**-0.5, rtol=0.02)
        # normal, where a truncated one has no values beyond 2.3 deviations
        assert jnp.abs(own["kernel"]).max() > 3 * fan_in**-0.5


def test_the_kernel_is_standardized_before_it_is_rounded_to_the_dtype_of_the_computation():
    """An offset of 100 is gone before bfloat16 would round the deviations away."""
    x = normal(0, 8, 16).astype(jnp.float32)
    model = linen.WSDense(4, dtype=jnp.bfloat16)
    params = random_params(model, x)
    params = {**params, "kernel": params["kernel"] + 100}
    layer = contrib_nnx.WSLinear(16, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(layer, params)
    expected = x @ plain(params)["kernel"] + params["bias"][None]
    for y in (model.apply({"params": params}, x), layer(x)):
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.1)


def test_gain_bias_and_kernel_are_trained():
    x = normal(0, 8, 4)
    model = WSDense(3)
    params = random_params(model, x)
    gradients = jax.jit(jax.grad(lambda params: weigh(model.apply({"params": params}, x))))(params)
    expected = jax.jit(jax.grad(lambda params: weigh(x @ plain(params)["kernel"] + params["bias"][None])))(params)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-9, atol=1e-12)
    assert all((np.abs(leaf) > 1e-6).all() for leaf in jax.tree.leaves(gradients))

    layer = contrib_nnx.WSLinear(4, 3, param_dtype=float, rngs=nnx.Rngs(0))
    nnx.update(layer, params)
    of_nnx = nnx.jit(nnx.grad(lambda layer, x: weigh(layer(x))))(layer, x)
    chex.assert_trees_all_close(nnx.to_pure_dict(pure(of_nnx)), gradients, rtol=1e-9, atol=1e-12)


class Stack(nn.Module):
    """Three standardized layers in one array."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            nn.remat(lambda layer, x, _: (layer(x), None)),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(WSDense(4, name="layer"), x, None)[0]


def test_transforms_and_boxes_leave_the_layers_as_they_are():
    x = normal(0, 2, 4)
    params = random_params(Stack(), x)
    expected = x
    for k in range(3):
        own = plain(jax.tree.map(lambda leaf, k=k: leaf[k], params["layer"]))
        expected = expected @ own["kernel"] + own["bias"][None]
    np.testing.assert_allclose(Stack().apply({"params": params}, x), expected, rtol=1e-12)

    boxed = WSDense(5, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    variables = boxed.init(jax.random.key(0), x)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    expected = nn.Dense(5, param_dtype=float).apply({"params": plain(nn.unbox(variables["params"]))}, x)
    np.testing.assert_allclose(boxed.apply(variables, x), expected, rtol=1e-13)

    layer = make(contrib_nnx.WSLinear, 4, 5)
    clone = nnx.merge(*nnx.split(layer))
    np.testing.assert_array_equal(clone(x), layer(x))


def test_masks_and_single_weights_are_refused():
    mask = jnp.ones((3, 3, 4, 5))
    with pytest.raises(ValueError, match="takes no mask"):
        WSConv(5, (3, 3), mask=mask).init(jax.random.key(0), jnp.ones((1, 6, 6, 4)))
    with pytest.raises(ValueError, match="takes no mask"):
        contrib_nnx.WSConv(4, 5, (3, 3), mask=mask, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="fewer than two weights"):
        WSDense(5).init(jax.random.key(0), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="fewer than two weights"):
        contrib_nnx.WSConv(4, 4, (1, 1), feature_group_count=4, rngs=nnx.Rngs(0))(jnp.ones((1, 2, 2, 4)))


# Beside BNP and clipping.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(WSConv(6, (3, 3), feature_group_count=2)(x)).mean((1, 2))
        return nn.Dense(3, param_dtype=float)(nn.relu(WSDense(5)(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs, param_dtype=float):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.conv = contrib_nnx.WSConv(4, 6, (3, 3), feature_group_count=2, **options)
        self.hidden = contrib_nnx.WSLinear(6, 5, **options)
        self.out = nnx.Linear(5, 3, **options)

    def __call__(self, x):
        x = nnx.relu(self.conv(x)).mean((1, 2))
        return self.out(nnx.relu(self.hidden(x)))


def test_find_layers_excludes_standardized_kernels_of_linen_with_the_reason():
    """And BNP trains the others."""
    x = normal(0, 8, 4, 4, 4)
    layers = bnp.linen.find_layers(Net(), x)
    assert list(layers) == ["Dense_0"]
    for name in ("WSConv_0", "WSDense_0"):
        assert reasons(layers)[f"{name}/kernel"] == "its kernel is computed from the parameter before the product"
        assert f"{name}/gain" in reasons(layers)
    params = random_params(Net(), x)
    gradients, records = jax.jit(gradients_and_records(Net()))(params, x)
    tx = bnp.scale_by_bnp(layers)
    updates, _ = tx.update(gradients, tx.init(params), intermediates=records)
    for name in ("WSConv_0", "WSDense_0"):
        chex.assert_trees_all_equal(updates[name], gradients[name])
    assert np.abs(updates["Dense_0"]["kernel"] - gradients["Dense_0"]["kernel"]).max() > 1e-3


def test_find_layers_excludes_standardized_kernels_of_nnx_with_the_reason():
    x = normal(0, 8, 4, 4, 4)
    model = make(NnxNet)
    layers = bnp.nnx.find_layers(model, x)
    assert list(layers) == ["out"]
    assert "overrides __call__ and does not call that of Conv" in reasons(layers)["conv/kernel"]
    assert "overrides __call__ and does not call that of Linear" in reasons(layers)["hidden/kernel"]
    y, records = bnp.nnx.capture(model)(x)
    np.testing.assert_array_equal(y, model(x))
    assert set(records) == {"out"}


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_standardized_layers_are_clipped_by_unit(api):
    x = normal(0, 8, 4, 4, 4)
    if api == "linen":
        params, names = random_params(Net(), x), ["WSConv_0", "WSDense_0"]
        layers = standardized_layers(params)
    else:
        state, names = nnx.state(make(NnxNet), nnx.Param), ["conv", "hidden"]
        layers = standardized_layers(state)
        params = nnx.to_pure_dict(pure(state))
        assert layers == standardized_layers(params)
    assert list(layers) == names
    assert layers[names[0]].fan_in == 9 * 2
    gradients = jax.tree.map(lambda leaf: 100 * jnp.cos(leaf), params)
    tx = adaptive_grad_clip(0.1, layers)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    flat, weights = flatten(updates), flatten(params)
    for path, leaf in flatten(gradients).items():
        if not path.startswith(tuple(names)) or path.endswith("gain"):
            np.testing.assert_array_equal(flat[path], leaf)
        elif path.endswith("kernel"):
            axes = tuple(range(leaf.ndim - 1))
            np.testing.assert_allclose(
                np.sqrt((flat[path] ** 2).sum(axes)), 0.1 * np.sqrt((weights[path] ** 2).sum(axes)), rtol=1e-13
            )
        else:
            np.testing.assert_allclose(jnp.linalg.norm(flat[path]), 0.1 * jnp.linalg.norm(weights[path]), rtol=1e-13)


def test_stacked_standardized_layers_have_units_of_their_own():
    params = random_params(Stack(), jnp.ones((2, 4)))
    layers = standardized_layers(params)
    assert layers["layer"].moments_shape == (3, 1, 4)
    boxed = {"layer": {**params["layer"], "kernel": nn.Partitioned(params["layer"]["kernel"], ("l", None, None))}}
    assert standardized_layers(boxed) == layers


def test_trees_without_standardized_layers_and_other_stacks_are_refused():
    with pytest.raises(ValueError, match="hold no standardized kernel"):
        standardized_layers({"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}})
    params = {"w": {"kernel": jnp.ones((4, 3, 2)), "gain": jnp.ones((3, 2)), "bias": jnp.ones((3, 2))}}
    with pytest.raises(ValueError, match=r"w has shapes .* not stacked along the axes that its gain has in front"):
        standardized_layers(params)
