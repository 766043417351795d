"""What finding and recording layers costs a trace grows linearly with their number: counted, not timed."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bnp_optax as bnp

LENGTHS = (25, 50, 100)
X = jax.ShapeDtypeStruct((4, 8), jnp.float32)


class LinenModel(nn.Module):
    length: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.length):
            x = nn.relu(nn.Dense(8)(x))
        return x


class NNXModel(nnx.Module):
    def __init__(self, length):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(length)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


def linen_work(length):
    """What is done with a model: a function of no argument for each kind of work, and the layers found."""
    model = LinenModel(length)
    layers, variables = bnp.linen.find_layers(model, X), jax.eval_shape(model.init, jax.random.key(0), X)
    return layers, {
        "find": lambda: bnp.linen.find_layers(model, X),
        "capture": lambda: jax.eval_shape(bnp.linen.capture(model), variables, X),
        "capture these layers": lambda: jax.eval_shape(bnp.linen.capture(model, layers=layers), variables, X),
    }


def nnx_work(length):
    """The same of a model of NNX."""
    model = nnx.eval_shape(lambda: NNXModel(length))
    layers = bnp.nnx.find_layers(model, X)

    def captured(**options):
        return lambda: nnx.eval_shape(lambda model, x: bnp.nnx.capture(model, **options)(x), model, X)

    return layers, {
        "find": lambda: bnp.nnx.find_layers(model, X),
        "capture": captured(),
        "capture these layers": captured(layers=layers),
    }


def transformation(length):
    """And of a transformation, from its layers to an update."""
    layers = bnp.Layers(tuple(bnp.Layer.dense((f"layer_{k}",), (8, 8)) for k in range(length)))
    params = {f"layer_{k}": jax.ShapeDtypeStruct((8, 8), jnp.float32) for k in range(length)}
    records = {path: jax.eval_shape(bnp.input_moments, X) for path in layers}
    tx = bnp.scale_by_bnp(layers)
    state = jax.eval_shape(tx.init, params)
    return layers, {
        "look up": lambda: (dict(layers.items()), list(layers.values()), [layers[path] for path in layers]),
        "init": lambda: jax.eval_shape(tx.init, params),
        "update": lambda: jax.eval_shape(tx.update, params, state, intermediates=records),
    }


def calls_of(function):
    """The number of calls of Python functions that a call makes."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (linen_work, ("find", "capture", "capture these layers")),
        (nnx_work, ("find", "capture", "capture these layers")),
        (transformation, ("look up", "init", "update")),
    ],
)
def test_another_layer_takes_as_many_calls_as_those_before(make, kinds):
    """From 50 to 100 layers there are twice as many more as from 25 to 50; were it quadratic, four times as many."""
    counts = {kind: [] for kind in kinds}
    for length in (LENGTHS[0], *LENGTHS):  # the first time for what JAX keeps of operations that it has seen
        layers, works = make(length)
        assert len(layers) == length
        for kind in kinds:
            counts[kind].append(calls_of(works[kind]))
    for _, few, more, most in counts.values():
        assert most - more <= 2.1 * (more - few), counts
