"""Batches that are not finite: the statistics stay as they were, the counter tells, and training goes on."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("standard_promotion")

LAYERS_IN_ORDER = ("conv", "hidden", "out")
STEPS, BAD_STEP = 30, 12


class Net(nn.Module):
    """Adds `poison[k]` to the input of its layer k."""

    @nn.compact
    def __call__(self, x, poison):
        x = nn.tanh(nn.Conv(4, (3, 3), name="conv")(x + poison[0]))
        x = nn.tanh(nn.Dense(8, name="hidden")(x.reshape(x.shape[0], -1) + poison[1]))
        return nn.Dense(3, name="out")(x + poison[2])


def batches():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1, 2, (STEPS, 8, 4, 4, 2)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, 3, (STEPS, 8)))


X, Y = batches()
PARAMS = Net().init(jax.random.key(0), X[0], jnp.zeros(3))["params"]
LAYERS = bnp.linen.find_layers(Net(), X[0], jnp.zeros(3))


def gradients_and_records(params, x, y, poison):
    def loss_fn(params):
        with bnp.linen.record_inputs():
            logits, recorded = Net().apply({"params": params}, x, poison, mutable=["intermediates"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), recorded["intermediates"]

    return jax.grad(loss_fn, has_aux=True)(params)


def train(tx, steps, poison_of=lambda step: jnp.zeros(3), step_fn=gradients_and_records):
    @jax.jit
    def train_step(params, state, x, y, poison):
        gradients, records = step_fn(params, x, y, poison)
        updates, state = tx.update(gradients, state, params, intermediates=records)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for step in steps:
        params, state = train_step(params, state, X[step], Y[step], poison_of(step))
    return params, state


OPTIMIZERS = {
    "bnp_sgd": lambda: bnp.bnp_sgd(0.05, LAYERS, momentum=0.9),
    "adam in z": lambda: bnp.preconditioned(optax.adam(0.02), LAYERS),
}


def optimizer(name="bnp_sgd"):
    return optax.apply_if_finite(OPTIMIZERS[name](), max_consecutive_errors=5)


@functools.cache
def without_the_bad_batch(name="bnp_sgd"):
    return train(optimizer(name), [step for step in range(STEPS) if step != BAD_STEP])


def poison_at(position, bad):
    return lambda step: jnp.zeros(3).at[position].set(bad if step == BAD_STEP else 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rejected_batch_leaves_no_trace(name, position, bad):
    """Behind apply_if_finite the run ends exactly where one without the batch does."""
    params, state = train(optimizer(name), range(STEPS), poison_at(position, bad))
    expected_params, expected_state = without_the_bad_batch(name)
    chex.assert_trees_all_equal(params, expected_params)
    chex.assert_trees_all_equal(state.inner_state, expected_state.inner_state)
    assert state.total_notfinite == 1


ZEROED = {
    "scale_by_bnp": (
        lambda: optax.chain(bnp.scale_by_bnp(LAYERS), optax.zero_nans(), optax.sgd(0.05)),
        lambda state: state[0],
    ),
    "preconditioned": (
        lambda: bnp.preconditioned(optax.chain(optax.zero_nans(), optax.adam(0.02)), LAYERS),
        lambda state: state.statistics,
    ),
}


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("name", ZEROED)
def test_unguarded_statistics_skip_the_layers_that_the_fault_reaches(name, position):
    """With gradients merely zeroed, the layers before the fault absorb the batch, the others skip it and count it."""
    make, statistics_of = ZEROED[name]
    params, state = train(make(), range(STEPS), poison_at(position, np.nan))
    chex.assert_tree_all_finite((params, state))
    statistics = statistics_of(state)
    for k, layer in enumerate(LAYERS_IN_ORDER):
        assert statistics[layer].skipped == (1 if k >= position else 0)
        assert statistics[layer].seen == 8 * (STEPS - (1 if k >= position else 0))
    clean_params, _ = train(make(), range(STEPS))
    distance = optax.tree.norm(optax.tree.sub(params, clean_params)) / optax.tree.norm(
        optax.tree.sub(clean_params, PARAMS)
    )
    assert distance < 0.25  # of the way that training went; a batch is 1 of 30


def test_statistics_outlast_an_inner_optimizer_that_does_not():
    """What is not finite goes into Adam's moments, as it does without BNP, but not into the statistics."""
    tx = OPTIMIZERS["adam in z"]()
    _, before = train(tx, range(BAD_STEP))
    _, after = train(tx, range(BAD_STEP + 1), poison_at(1, np.nan))
    assert np.isnan(after.inner[0].mu["hidden"]["kernel"]).all()
    chex.assert_tree_all_finite(after.statistics)
    assert [int(after.statistics[layer].skipped[0]) for layer in LAYERS_IN_ORDER] == [0, 1, 1]
    for layer in ("hidden", "out"):
        for field in ("mean", "variance", "damping", "seen"):
            chex.assert_trees_all_equal(
                getattr(after.statistics[layer], field), getattr(before.statistics[layer], field)
            )


@pytest.mark.parametrize("device", [0, 3, 7])
def test_a_fault_in_one_of_eight_devices_is_a_fault_of_the_batch(device):
    """Each device has one example; they are emulated by a mapped axis with collectives."""

    def sharded(params, x, y, poison):
        def loss_fn(params, x, y, index):
            with bnp.linen.record_inputs(axis_name="data"):
                logits, recorded = Net().apply(
                    {"params": params}, x[None], jnp.where(index == device, poison, 0), mutable=["intermediates"]
                )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[None]).mean(), recorded["intermediates"]

        def shard(x, y, index):
            gradients, records = jax.grad(loss_fn, has_aux=True)(params, x, y, index)
            return jax.lax.pmean(gradients, "data"), records

        return jax.vmap(shard, axis_name="data", out_axes=None)(x, y, jnp.arange(8))

    params, state = train(optimizer(), range(STEPS), poison_at(1, np.nan), sharded)
    expected_params, expected_state = without_the_bad_batch()
    chex.assert_trees_all_close(params, expected_params, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(state.inner_state, expected_state.inner_state, rtol=1e-3, atol=1e-3)
    assert state.total_notfinite == 1


def test_a_fault_in_one_micro_batch_is_a_fault_of_the_step():
    def accumulated(params, x, y, poison):
        def micro_batch(total, batch):
            x, y, index = batch
            gradients, records = gradients_and_records(params, x, y, jnp.where(index == 2, poison, 0))
            return jax.tree.map(lambda t, g: t + g / 4, total, gradients), records

        parts = x.reshape(4, 2, *x.shape[1:]), y.reshape(4, 2), jnp.arange(4)
        return jax.lax.scan(micro_batch, optax.tree.zeros_like(params), parts)

    params, state = train(optimizer(), range(STEPS), poison_at(2, np.inf), accumulated)
    expected_params, _ = without_the_bad_batch()
    chex.assert_trees_all_close(params, expected_params, rtol=1e-3, atol=1e-4)
    assert state.total_notfinite == 1
