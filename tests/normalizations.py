"""The layers of contrib that take the place of BatchNorm, of both APIs, as functions of one state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import pytest
from flax import nnx

from bnp_optax import contrib
from bnp_optax.contrib import linen as contrib_linen
from bnp_optax.contrib import nnx as contrib_nnx

APIS = ("linen", "nnx")
LAYERS = {
    "BatchRenorm": {"r_max": 1.5, "d_max": 0.5},
    "BatchGroupNorm": {"num_groups": 2},
    "InstanceEnhancementBatchNorm": {"gate_weight_init": nn.initializers.constant(0.5)},  # gates that differ
    "MixtureNorm": {"num_components": 2},
}
DIRECTORIES = {"linen": contrib_linen, "nnx": contrib_nnx}
BATCH_NORMS = {"linen": nn.BatchNorm, "nnx": nnx.BatchNorm}
RAMP = contrib.ramp(hold=2, r_end=6, d_end=4)

both_apis = pytest.mark.parametrize("api", APIS)
all_layers = pytest.mark.parametrize("name", LAYERS)


class Functional(NamedTuple):
    """A layer: its state by name, parameters included; `(state, x, **mask) -> y, state`; `(state, x) -> y`."""

    state: dict[str, Any]
    train: Callable[..., Any]
    evaluate: Callable[..., Any]


def layer_class(api, name):
    return BATCH_NORMS[api] if name == "BatchNorm" else getattr(DIRECTORIES[api], name)


def functional(api, name, x, param_dtype=float, features=None, **options):
    """Returns a layer for inputs like `x`, with the options that the tests give each by default."""
    options = LAYERS.get(name, {}) | {"param_dtype": param_dtype} | options
    if api == "linen":
        module = layer_class(api, name)(**options)
        variables = module.init(jax.random.key(0), x, use_running_average=False)
        places = {leaf: collection for collection, leaves in variables.items() for leaf in leaves}

        def unflatten(state):
            tree = {"batch_stats": {}, "params": {}}
            for leaf, value in state.items():
                tree[places[leaf]][leaf] = value
            return tree

        def train(state, x, **mask):
            variables = unflatten(state)
            y, new = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **mask)
            return y, {**variables["params"], **new["batch_stats"]}

        def evaluate(state, x):
            return module.apply(unflatten(state), x, use_running_average=True)

        return Functional({**variables["batch_stats"], **variables.get("params", {})}, train, evaluate)
    features = x.shape[options.get("axis", -1)] if features is None else features
    graphdef, state = nnx.split(layer_class(api, name)(features, rngs=nnx.Rngs(0), **options))

    structure = jax.tree.structure(state)

    def merge(state):
        return nnx.merge(graphdef, jax.tree.unflatten(structure, jax.tree.leaves(state)))

    def train_nnx(state, x, **mask):
        layer = merge(state)
        y = layer(x, use_running_average=False, **mask)
        return y, nnx.to_pure_dict(nnx.state(layer))

    return Functional(nnx.to_pure_dict(state), train_nnx, lambda state, x: merge(state)(x, use_running_average=True))


def steps_of(layer, batches, **mask):
    """Returns outputs and the last state of training on each batch."""
    state, outputs = layer.state, []
    for x in batches:
        y, state = layer.train(state, x, **mask)
        outputs.append(y)
    return outputs, state
