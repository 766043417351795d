"""Transforms of trainings with the layers of contrib that take BatchNorm's place, checkpoints, and BNP beside them."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import assert_same, normal, reasons
from normalizations import LAYERS, RAMP, all_layers, both_apis, functional, layer_class, steps_of

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")


# Transforms of the training.


@both_apis
@all_layers
def test_scan_and_donating_jit_equal_the_loop(api, name):
    options = {"r_max": RAMP.r_max, "d_max": RAMP.d_max} if name == "BatchRenorm" else {}
    batches = jnp.stack([normal(seed, 5, 4) for seed in range(8)])
    layer = functional(api, name, batches[0], **options)
    outputs, expected = steps_of(layer, batches)
    state, scanned = jax.lax.scan(lambda state, x: layer.train(state, x)[::-1], layer.state, batches)
    assert_same((list(scanned), state), (outputs, expected))
    step = jax.jit(layer.train, donate_argnums=0)
    state = jax.tree.map(jnp.copy, layer.state)
    for x, output in zip(batches, outputs, strict=True):
        old = state
        y, state = step(state, x)
        assert_same(y, output)
        assert old["mean"].is_deleted()
    assert_same(state, expected)


class Stacked(nn.Module):
    """Layers stacked by `nn.scan`."""

    layer: type
    options: dict
    length: int = 3

    @nn.compact
    def __call__(self, x, train):
        scan = nn.scan(
            lambda layer, x: (jnp.tanh(2 * layer(x, use_running_average=not train)), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.length,
        )
        return scan(self.layer(param_dtype=float, **self.options), x)[0]


@all_layers
def test_layers_stacked_by_nn_scan_equal_layers_one_by_one(name):
    x = normal(0, 6, 4)
    model, alone = Stacked(layer_class("linen", name), LAYERS[name]), functional("linen", name, x)
    variables = model.init(jax.random.key(0), x, train=True)
    y, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    expected = x
    for k in range(3):
        out, state = alone.train(alone.state, expected)
        expected = jnp.tanh(2 * out)
        (stacked,) = updated["batch_stats"].values()
        for key, value in stacked.items():
            assert_same(value[k], state[key])
    assert_same(y, expected)
    assert np.isfinite(model.apply(variables | updated, x, train=False)).all()


@all_layers
def test_layers_stacked_by_nnx_scan_equal_layers_one_by_one(name):
    x, cls = normal(0, 6, 4), layer_class("nnx", name)
    keys = jax.random.split(jax.random.key(0), 3)
    stack = nnx.vmap(lambda key: cls(4, param_dtype=float, rngs=nnx.Rngs(key), **LAYERS[name]))(keys)
    y = nnx.scan(lambda layer, x: jnp.tanh(2 * layer(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(stack, x)
    alone, expected = functional("nnx", name, x), x
    for k in range(3):
        out, state = alone.train(alone.state, expected)
        expected = jnp.tanh(2 * out)
        assert_same(stack.mean[...][k], state["mean"])
    assert_same(y, expected)


@both_apis
@all_layers
def test_orbax_round_trip(api, name, tmp_path):
    """A training that is restored goes on bit by bit as one that was not disturbed."""
    batches = [normal(seed, 5, 4) for seed in range(4)]
    layer = functional(api, name, batches[0])
    _, state = steps_of(layer, batches[:2])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", layer.state)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_dtypes(restored, state)
    continued = [layer.train(each, batches[2]) for each in (restored, state)]
    chex.assert_trees_all_equal(*continued)


# Beside BNP.


class Network(nn.Module):
    """A dense layer on each side of a normalization."""

    layer: type
    options: dict

    @nn.compact
    def __call__(self, x, train=True):
        x = self.layer(use_running_average=not train, name="norm", **self.options)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.relu(x))


class NNXNetwork(nnx.Module):
    """The same."""

    def __init__(self, layer, options):
        rngs = nnx.Rngs(0)
        self.first, self.norm = nnx.Linear(3, 4, rngs=rngs), layer(4, rngs=rngs, **options)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


@all_layers
@pytest.mark.usefixtures("standard_promotion")
def test_bnp_finds_and_records_the_linear_layers_beside(name):
    x = normal(0, 6, 3).astype(jnp.float32)
    model = Network(layer_class("linen", name), LAYERS[name])
    layers = bnp.linen.find_layers(model, x)
    assert list(layers) == ["Dense_0", "Dense_1"]
    assert reasons(layers).keys() >= {"norm/scale", "norm/bias"}
    assert all(f"{name} is not one of Flax's linear layers" in reason for reason in reasons(layers).values())
    variables = model.init(jax.random.key(0), x)
    (_, updated), records = jax.jit(functools.partial(bnp.linen.capture(model), mutable=["batch_stats"]))(variables, x)
    assert list(records) == ["Dense_0", "Dense_1"]
    assert np.abs(updated["batch_stats"]["norm"]["mean"]).min() > 1e-4
    module = NNXNetwork(layer_class("nnx", name), LAYERS[name])
    layers = bnp.nnx.find_layers(module, x)
    assert reasons(layers).keys() >= {"norm/scale", "norm/bias"}
    before = jnp.copy(module.norm.mean[...])
    _, records = bnp.nnx.capture(module)(x)
    assert set(records) == set(layers) == {"first", "last"}
    assert np.abs(module.norm.mean[...] - before).min() > 1e-4
