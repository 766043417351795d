"""Batches that are not finite: the statistics stay as they were, the counter tells, and training goes on."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cross_entropy, gradients_and_records, init, make_step, normal, statistics_in

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


X, Y = normal(0, STEPS, 8, 4, 4, 2), jnp.asarray(np.random.default_rng(1).integers(0, 3, (STEPS, 8)))
LAYERS = bnp.linen.find_layers(Net(), X[0], jnp.zeros(3))
GRADIENTS_AND_RECORDS = gradients_and_records(Net(), cross_entropy)


@pytest.fixture(scope="module")
def start():
    return init(Net(), X[0], jnp.zeros(3))


def train(step, state, steps, poison_of=lambda step: jnp.zeros(3)):
    """Returns parameters and state after some steps of those numbers; `step` is compiled, and `state` the first."""
    for k in steps:
        state = step(*state, (X[k], poison_of(k)), Y[k])
    return state


OPTIMIZERS = {
    "bnp_sgd": lambda: bnp.bnp_sgd(0.05, LAYERS, momentum=0.9),
    "adam in z": lambda: bnp.preconditioned(optax.adam(0.02), LAYERS),
}


@functools.cache
def guarded(name, gradients=GRADIENTS_AND_RECORDS):
    """An optimizer behind apply_if_finite, and its step, compiled once."""
    tx = optax.apply_if_finite(OPTIMIZERS[name](), max_consecutive_errors=5)
    return tx, jax.jit(make_step(tx, gradients))


@pytest.fixture(scope="module")
def without_the_bad_batch(start):
    @functools.cache
    def run(name):
        tx, step = guarded(name)
        return train(step, (start, tx.init(start)), [k for k in range(STEPS) if k != BAD_STEP])

    return run


def poison_at(position, bad):
    return lambda step: jnp.zeros(3).at[position].set(bad if step == BAD_STEP else 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rejected_batch_leaves_no_trace(name, position, bad, start, without_the_bad_batch):
    """Behind apply_if_finite the run ends exactly where one without the batch does."""
    tx, step = guarded(name)
    params, state = train(step, (start, tx.init(start)), range(STEPS), poison_at(position, bad))
    expected_params, expected_state = without_the_bad_batch(name)
    chex.assert_trees_all_equal(params, expected_params)
    chex.assert_trees_all_equal(state.inner_state, expected_state.inner_state)
    assert state.total_notfinite == 1


ZEROED = {
    "scale_by_bnp": lambda: optax.chain(bnp.scale_by_bnp(LAYERS), optax.zero_nans(), optax.sgd(0.05)),
    "preconditioned": lambda: bnp.preconditioned(optax.chain(optax.zero_nans(), optax.adam(0.02)), LAYERS),
}


@pytest.fixture(scope="module", params=ZEROED)
def zeroed(request, start):
    """A compiled step behind which gradients that are not finite are zeroed, its start and its end without a fault."""
    tx = ZEROED[request.param]()
    step, start = jax.jit(make_step(tx, GRADIENTS_AND_RECORDS)), (start, tx.init(start))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return step, start, train(step, start, range(STEPS))


@pytest.mark.parametrize("position", range(3))
def test_unguarded_statistics_skip_the_layers_that_the_fault_reaches(position, zeroed):
    """With gradients merely zeroed, the layers before the fault absorb the batch, the others skip it and count it."""
    step, start, (clean_params, _) = zeroed
    params, state = train(step, start, range(STEPS), poison_at(position, np.nan))
    chex.assert_tree_all_finite((params, state))
    [statistics] = statistics_in(state)
    for k, layer in enumerate(LAYERS_IN_ORDER):
        assert statistics[layer].skipped == (1 if k >= position else 0)
        assert statistics[layer].seen == 8 * (STEPS - (1 if k >= position else 0))
    distance = optax.tree.norm(optax.tree.sub(params, clean_params)) / optax.tree.norm(
        optax.tree.sub(clean_params, start[0])
    )
    assert distance < 0.25  # of the way that training went; a batch is 1 of 30


def test_statistics_outlast_an_inner_optimizer_that_does_not(start):
    """What is not finite goes into Adam's moments, as it does without BNP, but not into the statistics."""
    tx = OPTIMIZERS["adam in z"]()
    step = jax.jit(make_step(tx, GRADIENTS_AND_RECORDS))
    before = train(step, (start, tx.init(start)), range(BAD_STEP))
    _, after = train(step, before, [BAD_STEP], poison_at(1, np.nan))
    assert np.isnan(after.inner[0].mu["hidden"]["kernel"]).all()
    chex.assert_tree_all_finite(after.statistics)
    assert [int(after.statistics[layer].skipped[0]) for layer in LAYERS_IN_ORDER] == [0, 1, 1]
    for layer in ("hidden", "out"):
        for field in ("mean", "variance", "damping", "seen"):
            statistics = (state.statistics[layer] for state in (after, before[1]))
            chex.assert_trees_all_equal(*(getattr(of_layer, field) for of_layer in statistics))


def run_on_one(params, x, poison):
    """An example alone, in one of eight devices."""
    return bnp.linen.capture(Net(), axis_name="data")({"params": params}, x[None], poison)


def sharded(params, inputs, y):
    """Each device has one example; they are emulated by a mapped axis with collectives."""
    x, poison = inputs  # of each device its own

    def shard(x, poison, y):
        gradients, records = gradients_and_records(run_on_one, cross_entropy)(params, (x, poison), y[None])
        return jax.lax.pmean(gradients, "data"), records

    return jax.vmap(shard, axis_name="data", out_axes=None)(x, poison, y)


@pytest.mark.parametrize("device", [0, 3, 7])
def test_a_fault_in_one_of_eight_devices_is_a_fault_of_the_batch(device, start, without_the_bad_batch):
    tx, step = guarded("bnp_sgd", sharded)

    def poison_of(k):
        return jnp.zeros((8, 3)).at[device].set(poison_at(1, np.nan)(k))

    params, state = train(step, (start, tx.init(start)), range(STEPS), poison_of)
    expected_params, expected_state = without_the_bad_batch("bnp_sgd")
    chex.assert_trees_all_close(params, expected_params, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(state.inner_state, expected_state.inner_state, rtol=1e-3, atol=1e-3)
    assert state.total_notfinite == 1


def accumulated(params, inputs, y):
    """Four micro-batches, of which the third is poisoned."""
    x, poison = inputs

    def micro_batch(total, batch):
        x, y, index = batch
        gradients, records = GRADIENTS_AND_RECORDS(params, (x, jnp.where(index == 2, poison, 0)), y)
        return jax.tree.map(lambda t, g: t + g / 4, total, gradients), records

    parts = x.reshape(4, 2, *x.shape[1:]), y.reshape(4, 2), jnp.arange(4)
    return jax.lax.scan(micro_batch, optax.tree.zeros_like(params), parts)


def test_a_fault_in_one_micro_batch_is_a_fault_of_the_step(start, without_the_bad_batch):
    tx, step = guarded("bnp_sgd", accumulated)
    params, state = train(step, (start, tx.init(start)), range(STEPS), poison_at(2, np.inf))
    expected_params, _ = without_the_bad_batch("bnp_sgd")
    chex.assert_trees_all_close(params, expected_params, rtol=1e-3, atol=1e-4)
    assert state.total_notfinite == 1


@pytest.mark.parametrize("options", [{}, {"scaling": "none"}, {"prior_examples": 0}, {"prior_examples": None}])
def test_a_layer_without_examples_is_no_fault(start, options):
    gradients, records = GRADIENTS_AND_RECORDS(start, (X[0], jnp.zeros(3)), Y[0])
    records["out"] = jax.tree.map(jnp.zeros_like, records["out"])
    tx = bnp.preconditioned(optax.sgd(0.1), LAYERS, **options)
    state = tx.init(start)
    with jax.debug_nans(True):
        _, after = tx.update(gradients, state, start, intermediates=records)
    chex.assert_trees_all_equal(after.statistics["out"].mean, state.statistics["out"].mean)
    assert after.statistics["out"].seen == 0
    assert after.statistics["hidden"].seen == 8
