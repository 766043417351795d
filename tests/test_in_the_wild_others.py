"""Models of the shape of other people's, each with its source: kernels that are tied, read, computed, or not Flax's.

What it shares with others is in test_in_the_wild.py.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Dense,
    assert_step,
    flatten,
    init,
    inputs_of,
    masked,
    normal,
    reasons,
    recorded,
    rounded,
    step_of,
    with_kernel,
)

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")

# Encoders and decoders.


class VAE(nn.Module):
    """Flax's VAE, with its methods."""

    def setup(self):
        self.fc1, self.mean, self.log_variance = Dense(4), Dense(2), Dense(2)
        self.fc2, self.out = Dense(4), Dense(3)

    def encode(self, x):
        h = nn.relu(self.fc1(x))
        return self.mean(h), self.log_variance(h)

    def generate(self, z):
        return self.out(nn.relu(self.fc2(z)))

    def __call__(self, x, noise):
        mean, log_variance = self.encode(x)
        return self.generate(mean + jnp.exp(log_variance / 2) * noise), mean, log_variance


def test_a_vae_is_searched_through_both_its_methods():
    model, x, noise = VAE(), normal(0, 5, 3), normal(1, 5, 2)
    params = init(model, x, noise)
    decoder = bnp.linen.find_layers(model, noise, method="generate")
    with pytest.raises(ValueError, match="fc1/kernel"):
        bnp.scale_by_bnp(decoder).init(params)
    whole = bnp.linen.find_layers(model, x, method=VAE.encode) | decoder
    inputs = inputs_of(whole, model, params, x, noise)
    assert len(inputs) == 5
    for layers in (whole, dataclasses.replace(decoder, complete=False)):
        expected = {path: (calls, 5) for path, calls in inputs.items() if path in layers}
        assert_step(layers, *step_of(layers, recorded(model), params, x, noise), expected)


class TiedAutoencoder(nn.Module):
    """A decoder that is the encoder, transposed."""

    read: str

    def setup(self):
        self.encoder = Dense(2)

    def __call__(self, x):
        h = jnp.tanh(self.encoder(x))
        if self.read == "variables":
            return h @ self.encoder.variables["params"]["kernel"].T
        return h @ self.encoder.get_variable("params", "kernel").T


class Flow(nn.Module):
    """A flow like Glow: the layer's kernel enters the loss by its determinant."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3, use_bias=False, param_dtype=float, name="encoder")
        return dense(x), jnp.linalg.slogdet(dense.variables["params"]["kernel"])[1]


@pytest.mark.parametrize("model", [TiedAutoencoder("variables"), TiedAutoencoder("get_variable"), Flow()])
def test_a_model_may_read_its_own_kernel(model):
    x = normal(0, 5, 3)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    assert_step(layers, *step_of(layers, recorded(model), params, x), {"encoder": ([x], 5)})


class Hypernetwork(nn.Module):
    """HyperNetworks, HyperNeRF: a layer makes the kernel with which another is applied."""

    @nn.compact
    def __call__(self, x):
        kernel = Dense(12, name="hyper")(x.mean(0)).reshape(3, 4)
        made = nn.Dense(4, use_bias=False, param_dtype=float, parent=None)
        return Dense(2, name="out")(jnp.tanh(made.apply({"params": {"kernel": kernel}}, x)))


def test_a_layer_that_has_no_parameters_of_its_own_is_no_layer():
    model, x = Hypernetwork(), normal(0, 5, 3)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    assert not layers.excluded
    inputs = inputs_of(layers, model, params, x)
    expected = {"hyper": (inputs["hyper"], 1), "out": (inputs["out"], 5)}  # one reads a mean, a single example
    assert_step(layers, *step_of(layers, recorded(model), params, x), expected)


# Gradients inside the model.


class Forces(nn.Module):
    """SchNet, NequIP: forces are a gradient of the energy; networks of scores and of physics are alike."""

    how: str

    def setup(self):
        self.hidden, self.energy, self.charge = Dense(4), Dense(1), Dense(1)

    def potential(self, x):
        return self.energy(jnp.tanh(self.hidden(x)))

    def forces(self, x):
        match self.how:
            case "grad":
                return jax.grad(lambda x: self.potential(x).sum())(x)
            case "grad of each":
                return jax.vmap(jax.grad(lambda x: self.potential(x)[0]))(x)
            case "nn.vjp":
                energy, pull = nn.vjp(lambda module, x: module.potential(x), self, x)
                return pull(jnp.ones_like(energy))[1]

    def __call__(self, x):
        if self.is_initializing():
            self.potential(x)
        return self.forces(x), self.charge(x)


@pytest.mark.parametrize("how", ["grad", "grad of each", "nn.vjp"])
def test_gradients_inside_a_model(how):
    model, x = Forces(how), normal(0, 5, 3)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    expected = {"charge": ([x], 5)}
    if how == "grad of each":
        assert reasons(layers).keys() == {path for path in flatten(params) if not path.startswith("charge")}
        assert all("transform of JAX" in reason for reason in reasons(layers).values())
    else:
        assert not layers.excluded
        hidden = params["hidden"]
        expected |= {"hidden": ([x], 5), "energy": ([np.tanh(x @ hidden["kernel"] + hidden["bias"][None])], 5)}
    assert_step(layers, *step_of(layers, recorded(model, layers=layers), params, x), expected)
    if how == "grad":
        with pytest.raises(ValueError, match=r"no record of the input of hidden.*capture\(model, layers=layers\)"):
            step_of(layers, recorded(model), params, x)
    else:
        assert_step(layers, *step_of(layers, recorded(model), params, x), expected)


# Kernels that are computed from their parameter.


class EqualizedDense(nn.Dense):
    """StyleGAN's layer, whose kernel is scaled at each call."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value / np.sqrt(value.shape[0]) if name == "kernel" else value


class Centred(nn.Module):
    """A layer whose parameters `nn.map_variables` centres."""

    features: int
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        centre = functools.partial(jax.tree.map, lambda w: w - w.mean())
        layer = nn.map_variables(nn.Dense, "params", centre, init=self.is_initializing())
        return layer(self.features, param_dtype=self.param_dtype, name="dense")(x)


COMPUTED = {
    "equalized": EqualizedDense,
    "masked": functools.partial(nn.Dense, dot_general=with_kernel(masked)),
    "quantized": functools.partial(nn.Dense, dot_general=with_kernel(rounded)),
    "mapped": Centred,
    "attention": lambda features, **kwargs: nn.MultiHeadDotProductAttention(
        1, qkv_features=features, qkv_dot_general=with_kernel(rounded), out_dot_general=with_kernel(rounded), **kwargs
    ),
}


class Beside(nn.Module):
    """A plain layer before one of another kind."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        return self.layer(4, param_dtype=float, name="other")(jnp.tanh(Dense(4, name="plain")(x)))


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_kernel_that_is_computed_is_excluded(kind):
    model, x = Beside(COMPUTED[kind]), normal(0, 5, 3, 2)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    assert reasons(layers).keys() == {path for path in flatten(params) if path.startswith("other")}
    assert all("computed" in reason for reason in reasons(layers).values())
    assert_step(layers, *step_of(layers, recorded(model), params, x), {"plain": ([x], 5)})


def test_a_kernel_that_is_its_parameter_under_another_product_is_found():
    layer = functools.partial(nn.Dense, dot_general=functools.partial(jax.lax.dot_general, precision="highest"))
    model, x = Beside(layer), normal(0, 5, 3, 2)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    expected = {path: (calls, 5) for path, calls in inputs_of(layers, model, params, x).items()}
    assert expected.keys() == {"plain", "other"}
    assert_step(layers, *step_of(layers, recorded(model), params, x), expected)


# Layers that are no Flax layer.


class Conv1D(nn.Module):
    """Hugging Face's FlaxConv1D of GPT-2: the kernel is `[features, inputs]`."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (self.features, x.shape[-1]), float)
        return x @ kernel.T + self.param("bias", nn.initializers.normal(), (self.features,), float)[None, None]


class GemmaEinsum(nn.Module):
    """Gemma's Einsum: a weight `w`, and the equation comes with the call."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), self.shape, float))


class DenseGeneral(nn.Module):
    """maxtext's DenseGeneral over the last axes."""

    features: tuple[int, ...]
    num_axes: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (*x.shape[-self.num_axes :], *self.features)
        kernel = self.param("kernel", nn.initializers.normal(), shape, float)
        return jnp.tensordot(x, kernel, self.num_axes)


class Block(nn.Module):
    """A block as those libraries write it."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(Conv1D(4, name="c_fc")(x))
        heads = GemmaEinsum((2, 4, 3), name="q_einsum")("btd,ndh->btnh", x)
        x = jnp.tanh(DenseGeneral((4,), 2, name="out")(heads))
        return DenseGeneral((2, 3), name="qkv")(x)


def register_theirs(next_fun, args, kwargs, context):
    """Tells bnp_optax of what is not its to know."""
    y, module = next_fun(*args, **kwargs), context.module
    if context.method_name == "__call__":
        match module:
            case Conv1D():
                bnp.linen.register(module, args[0], kernel_roles="oi")
            case GemmaEinsum():
                bnp.linen.register(module, args[1], "w", None, kernel_roles="oio")
            case DenseGeneral():
                inputs = tuple(range(-module.num_axes, 0))
                roles = "i" * module.num_axes + "o" * len(module.features)
                bnp.linen.register(module, args[0], bias=None, kernel_roles=roles, input_axes=inputs)
    return y


def test_an_interceptor_registers_layers_of_third_parties():
    model, x = Block(), normal(0, 5, 3, 2)
    params = init(model, x)
    assert not bnp.linen.find_layers(model, x)
    with nn.intercept_methods(register_theirs):
        layers = bnp.linen.find_layers(model, x)
        gradients, updates = step_of(layers, recorded(model), params, x)
    assert not layers.excluded
    for tree in (gradients, updates):  # the kernels as matrices
        tree["c_fc"]["kernel"] = tree["c_fc"]["kernel"].T
        tree["q_einsum"]["kernel"] = tree["q_einsum"].pop("w").swapaxes(0, 1).reshape(4, 6)
        tree["out"]["kernel"] = tree["out"]["kernel"].reshape(6, 4)
        tree["qkv"]["kernel"] = tree["qkv"]["kernel"].reshape(4, 6)
    first = nn.gelu(x @ params["c_fc"]["kernel"].T + params["c_fc"]["bias"][None, None])
    heads = np.einsum("btd,ndh->btnh", first, params["q_einsum"]["w"])
    out = np.tanh(np.tensordot(heads, params["out"]["kernel"], 2))
    inputs = {"c_fc": x, "q_einsum": first, "out": heads, "qkv": out}
    found = {name.removesuffix("/w") for name in layers}
    assert_step(found, gradients, updates, {path: ([rows], 5) for path, rows in inputs.items()})
