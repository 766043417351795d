"""Low and high precision: no NaN at the ends of each range, statistics in float32 at least."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax as bnp


class Net(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.relu(nn.Conv(4, (3, 3), **options)(x))
        x = nn.relu(nn.Dense(8, use_bias=False, **options)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, **options)(x)


def gradients_and_records(model, params, x, scale=1.0):
    def loss_fn(params):
        with bnp.linen.record_inputs():
            y, recorded = model.apply({"params": params}, x, mutable=["intermediates"])
        return scale * jnp.mean(jnp.square(jnp.sin(y.astype(jnp.float32)))), recorded["intermediates"]

    return jax.grad(loss_fn, has_aux=True)(params)


def inputs(dtype, size=1.0):
    return jnp.asarray(size * np.random.default_rng(0).normal(size=(8, 4, 4, 2)), dtype)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_training_in_every_dtype_stays_finite_and_follows_float32(dtype):
    with jax.numpy_dtype_promotion("standard"):
        finals = []
        for used in (dtype, jnp.float32):
            model, x = Net(used), inputs(used)
            params = optax.tree.cast(Net(jnp.float32).init(jax.random.key(0), inputs(jnp.float32))["params"], used)
            tx = bnp.bnp_sgd(0.05, bnp.linen.find_layers(model, x), momentum=0.9)
            state = tx.init(params)
            for _ in range(20):
                gradients, records = gradients_and_records(model, params, x)
                updates, state = tx.update(gradients, state, params, intermediates=records)
                params = optax.apply_updates(params, updates)
            chex.assert_tree_all_finite((params, state))
            assert state[0]["Conv_0"].mean.dtype == jnp.float32
            assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(used)}
            finals.append(np.asarray(model.apply({"params": params}, x), np.float32))
    np.testing.assert_allclose(*finals, atol=0.3)


@pytest.mark.usefixtures("x64")
def test_float64_keeps_float64_statistics():
    model, x = Net(jnp.float64), inputs(jnp.float64)
    params = model.init(jax.random.key(0), x)["params"]
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x))
    gradients, records = gradients_and_records(model, params, x)
    updates, state = tx.update(gradients, tx.init(params), intermediates=records)
    assert state["Conv_0"].mean.dtype == updates["Conv_0"]["kernel"].dtype == jnp.float64


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(jnp.float16, 1e4), (jnp.float16, 1e-7), (jnp.bfloat16, 1e15), (jnp.bfloat16, 1e-38), (jnp.float32, 1e15)],
)
def test_inputs_at_the_ends_of_the_range_give_no_nan(dtype, size):
    """The first layer alone: further on the network itself overflows."""
    model, x = nn.Dense(3, dtype=dtype, param_dtype=dtype), inputs(dtype, size).reshape(8, -1)
    params = model.init(jax.random.key(0), x)["params"]
    with bnp.linen.record_inputs():
        _, recorded = model.apply({"params": params}, x, mutable=["intermediates"])
    chex.assert_tree_all_finite(recorded)
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x))
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(gradients, tx.init(params), intermediates=recorded["intermediates"])
    chex.assert_tree_all_finite((updates, state))
    assert state["kernel"].seen == 8


def test_records_do_not_depend_on_the_scale_of_the_loss_and_updates_follow_it():
    """So that dynamic loss scaling may unscale before or after BNP."""
    model, x = Net(jnp.float32), inputs(jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x))
    (plain, records), (scaled, same_records) = (gradients_and_records(model, params, x, s) for s in (1.0, 2.0**12))
    chex.assert_trees_all_equal(records, same_records)
    updates, _ = tx.update(plain, tx.init(params), intermediates=records)
    scaled_updates, _ = tx.update(scaled, tx.init(params), intermediates=same_records)
    chex.assert_trees_all_close(jax.tree.map(lambda u: u / 2.0**12, scaled_updates), updates, rtol=1e-6, atol=1e-9)
