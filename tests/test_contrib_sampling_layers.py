"""The layers of neural sampling machines, against the function and Flax's products, in both APIs and in transforms."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import compiled_call, normal, pure, reasons, weigh

import bnp_optax as bnp
from bnp_optax.contrib import GaussianNoise, linen, sample_units
from bnp_optax.contrib import nnx as contrib_nnx

pytestmark = pytest.mark.usefixtures("x64")

NSMDense, NSMConv = (functools.partial(cls, param_dtype=float) for cls in (linen.NSMDense, linen.NSMConv))


def signs(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).choice([-1.0, 1.0], shape))


# Convolutions.

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
