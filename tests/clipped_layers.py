"""Layers of Linen, the axes that tell their units apart, weights and gradients: what the tests of clipping share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from helpers import flatten

import bnp_optax as bnp

Dense, Conv, ConvTranspose = (
    functools.partial(cls, param_dtype=float) for cls in (nn.Dense, nn.Conv, nn.ConvTranspose)
)


class Scanned(nn.Module):
    """Three dense layers in one array, whose first axis they are."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(Dense(4, name="layer"), x, None)[0]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, param_dtype=float, name="attention")(x)


def stacked_last():
    return nn.vmap(
        nn.Dense,
        in_axes=None,
        variable_axes={"params": -1, "intermediates": 0},
        split_rngs={"params": True},
        axis_size=3,
    )(5, param_dtype=float)


# A model, the shape of its input, and for each parameter the axes that tell its units apart.
LINEN = {
    "dense": (Dense(5), (3, 4), {"kernel": (1,), "bias": ()}),
    "no bias": (Dense(5, use_bias=False), (3, 4), {"kernel": (1,)}),
    "dense of one input": (Dense(5), (3, 1), {"kernel": (1,), "bias": ()}),
    "convolution 1d": (Conv(5, (3,)), (2, 6, 4), {"kernel": (2,), "bias": ()}),
    "convolution 2d": (Conv(5, (3, 2)), (2, 6, 5, 4), {"kernel": (3,), "bias": ()}),
    "convolution 3d": (Conv(5, (2, 1, 2)), (2, 3, 3, 3, 4), {"kernel": (4,), "bias": ()}),
    "1x1 convolution of one channel": (Conv(5, (1, 1)), (2, 3, 3, 1), {"kernel": (3,), "bias": ()}),
    "grouped convolution": (Conv(6, (3, 3), feature_group_count=2), (2, 4, 4, 4), {"kernel": (3,), "bias": ()}),
    "depthwise convolution": (Conv(4, (3, 3), feature_group_count=4), (2, 4, 4, 4), {"kernel": (3,), "bias": ()}),
    "transposed convolution": (ConvTranspose(5, (3, 3)), (2, 4, 4, 4), {"kernel": (3,), "bias": ()}),
    "transposed kernel": (
        ConvTranspose(5, (3, 3), transpose_kernel=True),
        (2, 4, 4, 4),
        {"kernel": (2,), "bias": ()},
    ),
    "attention": (
        Attention(),
        (2, 3, 4),
        {f"attention/{name}/kernel": (1, 2) for name in ("query", "key", "value")}
        | {f"attention/{name}/bias": () for name in ("query", "key", "value", "out")}
        | {"attention/out/kernel": (2,)},
    ),
    "scanned": (Scanned(), (2, 4), {"layer/kernel": (0, 2), "layer/bias": (0,)}),
    "stacked along the last axis": (stacked_last(), (2, 4), {"kernel": (1, 2), "bias": (1,)}),
}


@functools.cache
def linen_layers(name):
    model, shape, _ = LINEN[name]
    x = jnp.ones(shape)
    return bnp.linen.find_layers(model, x), jax.eval_shape(model.init, jax.random.key(0), x)["params"]


def random_trees(shapes, units, seed=0):
    """Returns weights and gradients, whose norms differ from unit to unit: some are clipped, some have tiny weights."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        kept = np.prod([shape[axis] for axis in units[path]], dtype=int)
        scales = rng.permutation(np.geomspace(1e-6, 10, kept)) if kept > 1 else np.array([10.0])
        unit_shape = [size if axis in units[path] else 1 for axis, size in enumerate(shape)]
        return jnp.asarray(rng.normal(size=shape) * scales.reshape(unit_shape))

    def tree():
        order = flatten(jax.tree.map(lambda _: 0, shapes))
        return jax.tree.structure(shapes).unflatten([leaf(path, flatten(shapes)[path].shape) for path in order])

    return tree(), tree()
