"""Adaptive gradient clipping of every kind of layer, against a loop over its units."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clipped_layers import LINEN, Dense, linen_layers, random_trees
from flax import nnx
from helpers import flatten, make, pure

import bnp_optax as bnp
from bnp_optax.contrib import adaptive_grad_clip

pytestmark = pytest.mark.usefixtures("x64")


class ScannedNnx(nnx.Module):
    def __init__(self, rngs, param_dtype=float):
        make_layers = nnx.vmap(lambda rngs: nnx.Linear(4, 4, param_dtype=param_dtype, rngs=rngs))
        self.layers = make_layers(rngs.split(3))

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.Param: 0, nnx.Intermediate: 0})
        return nnx.scan(lambda layer, x: layer(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


NNX = {
    "dense": (lambda: make(nnx.Linear, 4, 5), (3, 4), {"kernel": (1,), "bias": ()}),
    "dense of one input": (lambda: make(nnx.Linear, 1, 5), (3, 1), {"kernel": (1,), "bias": ()}),
    "convolution 1d": (lambda: make(nnx.Conv, 4, 5, (3,)), (2, 6, 4), {"kernel": (2,), "bias": ()}),
    "grouped convolution": (
        lambda: make(nnx.Conv, 4, 6, (3, 3), feature_group_count=2),
        (2, 4, 4, 4),
        {"kernel": (3,), "bias": ()},
    ),
    "transposed convolution": (
        lambda: make(nnx.ConvTranspose, 4, 5, (3, 3)),
        (2, 4, 4, 4),
        {"kernel": (3,), "bias": ()},
    ),
    "attention": (
        lambda: make(nnx.MultiHeadAttention, num_heads=2, in_features=4, qkv_features=6, decode=False),
        (2, 3, 4),
        {f"{name}/kernel": (1, 2) for name in ("query", "key", "value")}
        | {f"{name}/bias": () for name in ("query", "key", "value", "out")}
        | {"out/kernel": (2,)},
    ),
    "scanned": (lambda: ScannedNnx(nnx.Rngs(0)), (2, 4), {"layers/kernel": (0, 2), "layers/bias": (0,)}),
}


def clip_units(gradient, weights, axes, clipping, eps):
    """The formula of the method, a unit at a time: those of a parameter have each an index along some axes."""
    gradient, weights = np.array(gradient, np.float64), np.asarray(weights, np.float64)
    for index in np.ndindex(*(gradient.shape[axis] for axis in axes)):
        unit = [slice(None)] * gradient.ndim
        for axis, place in zip(axes, index, strict=True):
            unit[axis] = place
        g, w = gradient[tuple(unit)], weights[tuple(unit)]
        norm = np.sqrt(np.sum(g * g))
        bound = clipping * max(np.sqrt(np.sum(w * w)), eps)
        if norm > bound:
            gradient[tuple(unit)] = g * bound / max(norm, 1e-6)
    return gradient


def assert_clipped(layers, params, gradients, units, clipping=0.1, eps=1e-3):
    tx = adaptive_grad_clip(clipping, layers, eps)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    params, gradients, updates = (flatten(tree) for tree in (params, gradients, updates))
    assert set(updates) == set(units)
    changed = 0
    for path, axes in units.items():
        expected = clip_units(gradients[path], params[path], axes, clipping, eps)
        np.testing.assert_allclose(updates[path], expected, rtol=1e-14, atol=0)
        changed += np.count_nonzero(expected != gradients[path])
    assert changed > 0


# The formula, for every kind of layer.


@pytest.mark.parametrize("name", LINEN)
def test_every_unit_of_a_linen_layer_is_clipped_by_its_own_norm(name):
    layers, shapes = linen_layers(name)
    assert not layers.excluded
    assert_clipped(layers, *random_trees(shapes, LINEN[name][2]), LINEN[name][2])


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", NNX)
def test_every_unit_of_an_nnx_layer_is_clipped_by_its_own_norm(name):
    make_model, shape, units = NNX[name]
    model = make_model()
    layers = bnp.nnx.find_layers(model, jnp.ones(shape))
    assert not layers.excluded
    shapes = nnx.to_pure_dict(jax.eval_shape(pure, nnx.state(model, nnx.Param)))
    assert_clipped(layers, *random_trees(shapes, units), units)


@pytest.mark.parametrize("name", [name for name in LINEN if name not in ("attention", "scanned")])
def test_the_units_are_the_outputs_that_a_weight_changes(name):
    """As the layer itself says: two weights are of one unit if they change the same output features."""
    model, shape, units = LINEN[name]
    _, shapes = linen_layers(name)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    params, _ = random_trees(shapes, dict.fromkeys(units, ()))

    @jax.jit
    def jacobian(kernel):
        return jax.jacfwd(lambda kernel: model.apply({"params": {**params, "kernel": kernel}}, x))(kernel)

    kernel = params["kernel"]
    changes = np.moveaxis(np.asarray(jacobian(kernel)), range(-kernel.ndim, 0), range(kernel.ndim))
    stacked = name == "stacked along the last axis"  # whose outputs are [stack, examples, features]
    outputs = changes.shape[-1] * (changes.shape[kernel.ndim] if stacked else 1)
    features = np.moveaxis(changes, kernel.ndim, -2) if stacked else changes
    is_changed = features.reshape(kernel.size, -1, outputs).any(1)
    kept = [kernel.shape[axis] for axis in units["kernel"]]
    places = [np.indices(kernel.shape)[axis].ravel() for axis in units["kernel"]]
    unit = np.ravel_multi_index(places, kept)
    same = unit[:, None] == unit
    np.testing.assert_array_equal((is_changed[:, None] == is_changed).all(-1), same)


@pytest.mark.usefixtures("standard_promotion")
def test_parameters_outside_the_layers_pass_unchanged():
    model = nn.Sequential([Dense(4), nn.LayerNorm(param_dtype=float), Dense(3)])
    x = jnp.ones((2, 5))
    layers = bnp.linen.find_layers(model, x).select(lambda layer: layer.path != "layers_2")
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), model.init(jax.random.key(0), x)["params"])
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 9.0), params)
    tx = adaptive_grad_clip(0.01, layers)
    updates, state = tx.update(gradients, tx.init(params), params)
    assert jax.tree.leaves(state) == []
    for name in ("layers_1", "layers_2"):
        chex.assert_trees_all_equal(updates[name], gradients[name])
    assert (np.abs(updates["layers_0"]["kernel"]) < 9).all()
    assert (np.abs(updates["layers_0"]["bias"]) < 9).all()


def test_a_masked_bias_leaves_the_kernel_clipped():
    layers, shapes = linen_layers("dense")
    params, gradients = random_trees(shapes, LINEN["dense"][2])
    mask = {"kernel": True, "bias": False}
    tx = optax.masked(adaptive_grad_clip(0.1, layers), mask)
    updates, _ = tx.update(gradients, tx.init(params), params)
    chex.assert_trees_all_equal(updates["bias"], gradients["bias"])
    np.testing.assert_allclose(
        updates["kernel"], clip_units(gradients["kernel"], params["kernel"], (1,), 0.1, 1e-3), rtol=1e-14
    )
