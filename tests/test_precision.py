"""Low and high precision: no NaN at the ends of each range, statistics in float32 at least."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import compiled, forward, gradients_and_records, init, make_step

import bnp_optax as bnp


class Net(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.relu(nn.Conv(4, (3, 3), **options)(x))
        x = nn.relu(nn.Dense(8, use_bias=False, **options)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, **options)(x)


def loss(output, scale=1.0):
    return scale * jnp.mean(jnp.square(jnp.sin(output.astype(jnp.float32))))


def inputs(dtype, size=1.0):
    return jnp.asarray(size * np.random.default_rng(0).normal(size=(8, 4, 4, 2)), dtype)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_training_in_every_dtype_stays_finite_and_follows_float32(dtype):
    params = init(Net(jnp.float32), inputs(jnp.float32))
    ends = [end_of_training(optax.tree.cast(params, used), used) for used in (dtype, jnp.float32)]
    np.testing.assert_allclose(*ends, atol=0.3)


def end_of_training(params, dtype):
    """The model's output after some steps, which are compiled as users' are: rounding is part of what is tested."""
    model, x = Net(dtype), inputs(dtype)
    tx = bnp.bnp_sgd(0.05, bnp.linen.find_layers(model, x), momentum=0.9)
    step, state = jax.jit(make_step(tx, gradients_and_records(model, loss))), tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(20):
            params, state = step(params, state, x)
    chex.assert_tree_all_finite((params, state))
    assert state[0]["Conv_0"].mean.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    return np.asarray(forward(model)(params, x)[0], np.float32)


@pytest.mark.usefixtures("x64")
def test_float64_keeps_float64_statistics():
    model, x = Net(jnp.float64), inputs(jnp.float64)
    params, tx = init(model, x), compiled(bnp.scale_by_bnp(bnp.linen.find_layers(model, x)))
    gradients, records = jax.jit(gradients_and_records(model, loss))(params, x)
    updates, state = tx.update(gradients, tx.init(params), intermediates=records)
    assert state["Conv_0"].mean.dtype == updates["Conv_0"]["kernel"].dtype == jnp.float64


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(jnp.float16, 1e4), (jnp.float16, 1e-7), (jnp.bfloat16, 1e15), (jnp.bfloat16, 1e-38), (jnp.float32, 1e15)],
)
def test_inputs_at_the_ends_of_the_range_give_no_nan(dtype, size):
    """The first layer alone: further on the network itself overflows."""
    model, x = nn.Dense(3, dtype=dtype, param_dtype=dtype), inputs(dtype, size).reshape(8, -1)
    params = init(model, x)
    _, records = forward(model)(params, x)
    chex.assert_tree_all_finite(records)
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x))
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(gradients, tx.init(params), intermediates=records)
    chex.assert_tree_all_finite((updates, state))
    assert state["kernel"].seen == 8


def test_records_do_not_depend_on_the_scale_of_the_loss_and_updates_follow_it():
    """So that dynamic loss scaling may unscale before or after BNP."""
    model, x = Net(jnp.float32), inputs(jnp.float32)
    params, tx = init(model, x), compiled(bnp.scale_by_bnp(bnp.linen.find_layers(model, x)))
    differentiate = jax.jit(gradients_and_records(model, loss))
    (plain, records), (scaled, same_records) = (differentiate(params, x, scale) for scale in (1.0, 2.0**12))
    chex.assert_trees_all_equal(records, same_records)
    updates, _ = tx.update(plain, tx.init(params), intermediates=records)
    scaled_updates, _ = tx.update(scaled, tx.init(params), intermediates=same_records)
    chex.assert_trees_all_close(jax.tree.map(lambda u: u / 2.0**12, scaled_updates), updates, rtol=1e-6, atol=1e-9)
