"""The normalization layers of contrib on many devices, compared with one; run by test_contrib_normalization.py.

It needs a process with 8 devices. Prints one JSON object: the largest error of each layer and scheme, or the traceback.
"""

import json
import pathlib
import sys
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from normalizations import APIS, LAYERS, functional

jax.config.update("jax_enable_x64", True)
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (16, 3, 4)), float)
# Devices hide from none to all of what they have.
MASK = jnp.asarray(np.arange(16) % 5 != 0)[:, None, None] & (jnp.arange(16) > 1)[:, None, None]
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]


def loss(layer, x, mask):
    y, state = layer.train(layer.state, x, mask=mask)
    return jnp.sum(jnp.sin(y + jnp.arange(12, dtype=y.dtype).reshape(3, 4)) * mask), (y, state)


def gradient(layer, x, mask):
    return jax.jit(jax.grad(lambda x, mask: loss(layer, x, mask), has_aux=True))(x, mask)


def sharded(layer, x, mask, check=True):
    """Each device takes the gradient of its own loss; those of the others flow in through the statistics."""

    def of_device(x, mask):
        gradients, (y, state) = gradient(layer, x, mask)
        return gradients, (y, jax.tree.map(lambda leaf: leaf[None], state))

    each = P("data")
    mapped = jax.shard_map(of_device, mesh=MESH, in_specs=(each, each), out_specs=(each, (each, each)), check_vma=check)
    return jax.jit(mapped)(x, mask)


def pmapped(layer, x, mask):
    parts = [array.reshape(8, 2, *array.shape[1:]) for array in (x, mask)]
    gradients, (y, state) = jax.pmap(lambda *args: gradient(layer, *args), axis_name="data")(*parts)
    return gradients.reshape(x.shape), (y.reshape(x.shape), state)


def error(actual, expected):
    actual, expected = jax.device_get((actual, expected))
    return max(np.max(np.abs(a - b)) for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))


def errors(api, name):
    """Yields the name of a scheme and a function that returns its error."""
    one = functional(api, name, X)
    many = functional(api, name, X, axis_name="data")
    of_groups = functional(api, name, X, axis_name="data", axis_index_groups=GROUPS)
    expected = gradient(one, X, MASK)
    halves = [gradient(one, X[part], MASK[part]) for part in (slice(8), slice(8, None))]

    def eight(state):
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), state)

    whole = (expected[0], (expected[1][0], eight(expected[1][1])))
    yield "shard_map", lambda: error(sharded(many, X, MASK), whole)
    yield "pmap", lambda: error(pmapped(many, X, MASK), whole)

    def jitted():
        put = [jax.device_put(array, NamedSharding(MESH, P("data"))) for array in (X, MASK)]
        return error(gradient(one, *put), expected)

    yield "jit", jitted
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), *((g, y) for g, (y, _) in halves))
    states = jax.tree.map(lambda a, b: jnp.stack([a] * 4 + [b] * 4), *(state for _, (_, state) in halves))
    yield "groups", lambda: error(sharded(of_groups, X, MASK, check=False), (both[0], (both[1], states)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    report = {}
    for api in APIS:
        for name in LAYERS:
            for scheme, measure in errors(api, name):
                try:
                    report[f"{api} {name} {scheme}"] = float(measure())
                except Exception:
                    report[f"{api} {name} {scheme}"] = traceback.format_exc()
    print(json.dumps(report))
