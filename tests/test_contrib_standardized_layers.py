"""Layers with standardized kernels, against Flax's with the kernel that the function makes, beside BNP and clipping."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import compiled_call, flatten, gradients_and_records, make, normal, pure, reasons, weigh

import bnp_optax as bnp
from bnp_optax.contrib import adaptive_grad_clip, linen, standardize, standardized_layers
from bnp_optax.contrib import nnx as contrib_nnx

pytestmark = pytest.mark.usefixtures("x64")

WSDense, WSConv = (functools.partial(cls, param_dtype=float) for cls in (linen.WSDense, linen.WSConv))

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
        assert reasons(layers)[f"{name}/gain"] == "neither kernel nor bias of its layer"
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
