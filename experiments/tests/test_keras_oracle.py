"""Batch Renormalization against that of Keras, which was written at Google from the paper."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it when it is imported

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx

from bnp_optax.contrib import linen as contrib_linen
from bnp_optax.contrib import nnx as contrib_nnx

R_MAX, D_MAX, MOMENTUM, EPSILON = 1.3, 0.4, 0.9, 1e-3
SCALE, BIAS = np.linspace(0.5, 2, 4).astype(np.float32), np.linspace(-1, 1, 4).astype(np.float32)


def keras_layer(shape):
    """The layer of Keras, whose two sets of averages agree if their momenta do."""
    layer = keras.layers.BatchNormalization(
        renorm=True,
        renorm_clipping={"rmax": R_MAX, "rmin": 1 / R_MAX, "dmax": D_MAX},
        momentum=MOMENTUM,
        renorm_momentum=MOMENTUM,
        epsilon=EPSILON,
    )
    layer.build(shape)
    layer.gamma.assign(SCALE)
    layer.beta.assign(BIAS)
    return layer


def linen_layer(x):
    module = contrib_linen.BatchRenorm(r_max=R_MAX, d_max=D_MAX, momentum=MOMENTUM, epsilon=EPSILON)
    variables = module.init(jax.random.key(0), x, use_running_average=False)
    variables = variables | {"params": {"scale": SCALE, "bias": BIAS}}

    def train(x):
        nonlocal variables
        y, updated = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = variables | updated
        return y

    return train, lambda x: module.apply(variables, x, use_running_average=True)


def nnx_layer(x):
    module = contrib_nnx.BatchRenorm(
        x.shape[-1],
        r_max=R_MAX,
        d_max=D_MAX,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        scale_init=nn.initializers.constant(SCALE),
        bias_init=nn.initializers.constant(BIAS),
        rngs=nnx.Rngs(0),
    )
    return module, lambda x: module(x, use_running_average=True)


@pytest.mark.parametrize("make", [linen_layer, nnx_layer])
@pytest.mark.parametrize("shape", [(8, 4), (2, 3, 3, 4), (1, 4)])
def test_twenty_steps_and_inference(make, shape):
    """Most of the features are at a limit in some step, and some are not."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(step / 10, 1 + step / 10, shape).astype(np.float32) for step in range(20)]
    theirs, (train, evaluate) = keras_layer(shape), make(batches[0])
    clipped = []
    for x in batches:
        mean, std = (np.asarray(each) for each in (theirs.renorm_mean, theirs.renorm_stddev))
        flat = x.reshape(-1, 4)
        r, d = np.sqrt(flat.var(0) + EPSILON) / std, (flat.mean(0) - mean) / std
        clipped += [np.maximum(r, 1 / r) > R_MAX, np.abs(d) > D_MAX]
        np.testing.assert_allclose(train(jnp.asarray(x)), theirs(x, training=True), rtol=1e-5, atol=2e-6)
    assert 0.2 < np.mean(clipped) < 0.95
    for x in batches[:3]:
        np.testing.assert_allclose(evaluate(jnp.asarray(x)), theirs(x, training=False), rtol=1e-5, atol=2e-6)
