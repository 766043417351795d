"""Every transformation inside Optax's wrappers: those that hand extra arguments on, and the errors of the others."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax.training.train_state import TrainState
from helpers import compiled, make_step, muon_dimensions, statistics_in
from transformations import DENSE, GRADIENTS_AND_RECORDS, SGD, TRANSFORMATIONS, dense_params, dense_record, problem

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("standard_promotion")

NAMES = ("Conv_0", "Dense_0", "Dense_1", "LayerNorm_0")
BY_KIND = {name: "rest" if name == "LayerNorm_0" else "bnp" for name in NAMES}
ALL_BUT_CONV = {name: name != "Conv_0" for name in NAMES}


def all_but_conv_leaf_by_leaf(params):
    return {name: jax.tree.map(lambda _, name=name: name != "Conv_0", params[name]) for name in params}


def as_transformation(multi_steps):
    """Optax's own `gradient_transformation()` drops extra arguments."""
    return optax.GradientTransformationExtraArgs(multi_steps.init, multi_steps.update)


def alone(entry):
    return entry.make(problem().layers)


def every_other(wrapper, entry):
    return wrapper(entry.optimizer(), lambda step, **_: step % 2 == 0, forward_extra_args=True)


# Every wrapper hands `intermediates` to the transformation that it wraps.
WRAPPERS = {
    "named_chain": lambda entry: optax.named_chain(("bnp", alone(entry)), ("sgd", SGD)),
    "partition": lambda entry: optax.partition({"bnp": entry.optimizer(), "rest": optax.adam(1e-3)}, BY_KIND),
    "masked": lambda entry: optax.chain(optax.masked(alone(entry), ALL_BUT_CONV), entry.behind),
    "masked leaf by leaf": lambda entry: optax.chain(
        optax.masked(alone(entry), all_but_conv_leaf_by_leaf), entry.behind
    ),
    "freeze": lambda entry: optax.partition({True: entry.optimizer(), False: optax.set_to_zero()}, ALL_BUT_CONV),
    "inject_hyperparams": lambda entry: entry.injected(decay=0.9, prior_examples=16),
    "inject schedules": lambda entry: entry.injected(
        decay=optax.linear_schedule(0.5, 0.99, 10), eps=lambda count: 1e-3, prior_examples=16
    ),
    "apply_if_finite": lambda entry: optax.apply_if_finite(entry.optimizer(), max_consecutive_errors=3),
    "conditionally_transform": functools.partial(every_other, optax.conditionally_transform),
    "conditionally_mask": functools.partial(every_other, optax.conditionally_mask),
    "schedule_free": lambda entry: optax.contrib.schedule_free(
        optax.chain(alone(entry), optax.sgd(0.1)), learning_rate=0.1
    ),
    "mechanize": lambda entry: optax.contrib.mechanize(entry.optimizer()),
    "flatten behind": lambda entry: optax.chain(alone(entry), optax.flatten(SGD)),
    "MultiSteps outside": lambda entry: optax.MultiSteps(entry.optimizer(), every_k_schedule=2),
    "MultiSteps behind": lambda entry: optax.chain(alone(entry), as_transformation(optax.MultiSteps(SGD, 2))),
    "clipping": lambda entry: optax.chain(
        alone(entry), optax.clip_by_global_norm(1.0), optax.zero_nans(), optax.add_decayed_weights(1e-4), SGD
    ),
    "clipping and decay around": lambda entry: optax.chain(
        optax.clip_by_global_norm(1.0), entry.optimizer(), optax.add_decayed_weights(-1e-4)
    ),
    "before Adam": lambda entry: optax.chain(alone(entry), optax.adamw(1e-3)),
}

OPTIONS = {
    "defaults": {},
    "batch variance": {"variance": "batch"},
    "examples": {"scaling": "examples"},
    "unscaled": {"scaling": "none"},
    "constant decay": {"prior_examples": None},
    "no prior": {"prior_examples": 0},
    "numbers": {"decay": 0.5, "eps_relative": 0.0, "eps": 1e-2},
}


def in_z(inner):
    return bnp.preconditioned(inner, problem().layers)


# What is inside of `preconditioned` sees the variables of BNP.
INSIDE = {
    "adamw": lambda: in_z(optax.adamw(1e-2)),
    "muon": lambda: in_z(optax.contrib.muon(1e-2, muon_weight_dimension_numbers=muon_dimensions)),
    "clipping": lambda: in_z(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))),
    "inject_hyperparams": lambda: in_z(
        optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.01, 10), weight_decay=1e-3)
    ),
    "partition": lambda: in_z(optax.partition({"bnp": optax.adam(1e-2), "rest": optax.sgd(1e-2)}, BY_KIND)),
    "masked": lambda: in_z(optax.chain(optax.masked(optax.trace(0.9), ALL_BUT_CONV), SGD)),
    "MultiSteps": lambda: in_z(as_transformation(optax.MultiSteps(optax.adam(1e-2), 2))),
}

CASES = {
    **{
        f"{name}, {option}": functools.partial(TRANSFORMATIONS[name].optimizer, **OPTIONS[option])
        for name in ("scale_by_bnp", "preconditioned(adam)")
        for option in OPTIONS
    },
    **{
        f"{name}, {wrapper}": functools.partial(WRAPPERS[wrapper], entry)
        for name, entry in TRANSFORMATIONS.items()
        for wrapper in WRAPPERS
    },
    **{f"preconditioned, {inside} inside": INSIDE[inside] for inside in INSIDE},
    "bnp_sgd, all its own options": lambda: bnp.bnp_sgd(
        0.1, problem().layers, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
}


@pytest.fixture(scope="module", params=TRANSFORMATIONS)
def entry(request):
    return TRANSFORMATIONS[request.param]


@pytest.fixture(scope="module", params=CASES)
def tx(request):
    return CASES[request.param]()


def update_and_apply(tx):
    """Returns `(params, state, gradients, records) -> params, state`, and the list of its traces."""
    traces, step = [], make_step(tx, lambda params, gradients, records: (gradients, records))

    def counted(*args):
        traces.append(1)
        return step(*args)

    return jax.jit(counted), traces


@pytest.fixture(scope="module")
def step_and_traces(tx):
    return update_and_apply(tx)


def test_training_compiles_once_and_keeps_every_type(tx, step_and_traces):
    step, traces = step_and_traces
    start = problem().params
    params, state = start, jax.jit(tx.init)(start)
    for _ in range(3):
        new_params, new_state = step(params, state, *GRADIENTS_AND_RECORDS(params, problem().x))
        chex.assert_trees_all_equal_shapes_and_dtypes((params, state), (new_params, new_state))
        params, state = new_params, new_state
    assert len(traces) == 1
    chex.assert_tree_all_finite(params)
    [statistics] = statistics_in(state)
    assert statistics["Dense_1"].seen >= 8
    assert np.abs(statistics["Dense_1"].mean).max() > 1e-3
    assert optax.tree.norm(optax.tree.sub(params, start)) > 0


def steps_in_a_scan(tx):
    """Returns `((params, state), gradients, records) -> (params, state)` after a step, none, and another one."""
    step = make_step(tx, lambda params, gradients, records: (gradients, records))

    def scanned(carry, *batch):
        def body(carry, go):
            return jax.lax.cond(go, lambda carry: step(*carry, *batch), lambda carry: carry, carry), None

        return jax.lax.scan(body, carry, jnp.array([True, False, True]))[0]

    return scanned


def test_scan_and_cond_take_the_state(tx, step_and_traces):
    """Which they refuse, when they are traced, if a step changes its structure or a type."""
    step, batch = step_and_traces[0], (problem().gradients, problem().records)
    start = problem().params, jax.jit(tx.init)(problem().params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(steps_in_a_scan(tx), start, *batch), start)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step, *start, *batch), step(*start, *batch))


def test_steps_in_a_scan_are_steps_one_by_one(entry):
    tx, batch = entry.optimizer(), (problem().gradients, problem().records)
    step, _ = update_and_apply(tx)
    start = problem().params, jax.jit(tx.init)(problem().params)
    scanned, expected = jax.jit(steps_in_a_scan(tx))(start, *batch), step(*step(*start, *batch), *batch)
    chex.assert_trees_all_close(scanned, expected, rtol=1e-4, atol=1e-5)


def test_map_params_sees_statistics_as_what_they_are_no_parameters(request, tx):
    if "flatten" in request.node.callspec.id:
        pytest.skip("optax.flatten itself cannot be initialized with a placeholder")
    state = jax.jit(tx.init)(problem().params)
    as_params = optax.tree.map_params(tx, lambda leaf: leaf + jnp.ones_like(leaf), state)
    chex.assert_trees_all_equal(statistics_in(as_params), statistics_in(state))
    others = optax.tree.map_params(tx, lambda leaf: leaf, state, transform_non_params=lambda leaf: leaf + 1)
    chex.assert_trees_all_equal(statistics_in(others), jax.tree.map(lambda leaf: leaf + 1, statistics_in(state)))


KEEPING = {name: entry.optimizer for name, entry in TRANSFORMATIONS.items()} | {
    inside: INSIDE[inside] for inside in ("muon", "partition", "MultiSteps")
}


@pytest.mark.parametrize("name", KEEPING)
def test_steps_that_keep_the_statistics_compile_once_and_keep_every_type(name):
    tx, start = KEEPING[name](), problem().params
    step, traces = update_and_apply(tx)
    state = jax.jit(tx.init)(start)
    params, state = step(start, state, problem().gradients, problem().records)
    traces.clear()
    before = statistics_in(state)
    for _ in range(3):
        new_params, new_state = step(params, state, GRADIENTS_AND_RECORDS(params, problem().x)[0], bnp.KEEP_STATISTICS)
        chex.assert_trees_all_equal_shapes_and_dtypes((params, state), (new_params, new_state))
        params, state = new_params, new_state
    assert len(traces) == 1
    chex.assert_trees_all_equal(statistics_in(state), before)
    assert optax.tree.norm(optax.tree.sub(params, start)) > 0


def update(tx, state=None, **changes):
    given = problem()._asdict() | changes
    state = tx.init(given["params"]) if state is None else state
    return tx.update(given["gradients"], state, given["params"], intermediates=given["records"])


def test_monitor_sees_preconditioned_updates(entry):
    measured = optax.monitor({"norm": lambda updates, *_, **__: optax.tree.norm(updates)})
    updates, state = update(compiled(optax.chain(entry.optimizer(), measured)))
    np.testing.assert_allclose(state[1].measurements["norm"], optax.tree.norm(updates), rtol=1e-6)


def test_apply_if_finite_keeps_the_statistics_of_before_a_bad_batch(entry):
    p = problem()
    tx = compiled(optax.apply_if_finite(entry.optimizer(), max_consecutive_errors=3))
    _, before = update(tx)
    gradients, records = GRADIENTS_AND_RECORDS(p.params, p.x.at[0, 0, 0, 0].set(jnp.nan))
    updates, after = update(tx, before, gradients=gradients, records=records)
    chex.assert_trees_all_equal(after.inner_state, before.inner_state)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(p.params))


# MultiSteps: what is absorbed.


def halves():
    x, params = problem().x, problem().params
    return [dict(zip(("gradients", "records"), GRADIENTS_AND_RECORDS(params, x), strict=True)) for x in (x[:4], x[4:])]


def micro_batches(tx, state):
    for half in halves():
        updates, state = update(tx, state, **half)
    return updates, state


def test_multi_steps_outside_absorbs_the_last_micro_batch_alone(entry):
    tx = compiled(optax.MultiSteps(entry.optimizer(decay=0.5), every_k_schedule=2))
    _, state = micro_batches(tx, tx.init(problem().params))
    [statistics] = statistics_in(state)
    assert statistics["Conv_0"].seen == 4
    expected = np.ravel(halves()[1]["records"]["Conv_0"].mean)
    np.testing.assert_allclose(statistics["Conv_0"].mean.ravel(), 0.5 * expected, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [*(functools.partial(WRAPPERS["MultiSteps behind"], e) for e in TRANSFORMATIONS.values()), INSIDE["MultiSteps"]],
)
def test_multi_steps_behind_and_inside_absorb_every_micro_batch(make):
    tx = compiled(make())
    _, state = micro_batches(tx, tx.init(problem().params))
    [statistics] = statistics_in(state)
    assert statistics["Conv_0"].seen == 8


def test_multi_steps_inside_averages_what_each_micro_batch_asks_of_z():
    """Under statistics that stay, the mean of the gradients of both halves is one step's."""
    tx = compiled(in_z(as_transformation(optax.MultiSteps(optax.sgd(0.1), 2))))
    _, state = micro_batches(tx, tx.init(problem().params))
    start = state.statistics
    gradients = [half["gradients"] for half in halves()]
    for half in gradients:
        updates, state = update(tx, state, gradients=half, records=bnp.KEEP_STATISTICS)
    whole = compiled(in_z(optax.sgd(0.1)))
    at_start = bnp.PreconditionedState(start, whole.init(problem().params).inner)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
    expected, _ = update(whole, at_start, gradients=mean, records=bnp.KEEP_STATISTICS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


# Wrappers that do not hand the records on: the user gets an error, never a silent plain gradient.


def lookahead(tx):
    params = optax.LookaheadParams.init_synced(problem().params)
    return update(optax.lookahead(tx, sync_period=2, slow_step_size=0.5), params=params)


def sam(tx):
    return update(optax.contrib.sam(tx, optax.sgd(0.05), sync_period=2))


def split_real_and_imaginary(tx):
    return update(optax.contrib.split_real_and_imaginary(tx))


def multi_steps_in_a_chain(tx):
    return update(optax.chain(optax.MultiSteps(tx, 2).gradient_transformation(), optax.identity()))


def train_state_of_flax(tx):
    state = TrainState.create(apply_fn=None, params=problem().params, tx=tx)
    return state.apply_gradients(grads=problem().gradients)


def flatten_around(tx):
    return update(optax.flatten(tx))


@pytest.mark.parametrize(
    "refusing",
    [lookahead, sam, split_real_and_imaginary, multi_steps_in_a_chain, train_state_of_flax, flatten_around],
)
def test_wrappers_that_drop_the_records_end_in_an_error(entry, refusing):
    with pytest.raises((TypeError, ValueError), match=r"intermediates|Call find_layers on the model"):
        jax.eval_shape(lambda: refusing(entry.optimizer()))


@pytest.mark.parametrize("make", [optax.polyak_sgd, optax.contrib.momo, optax.contrib.momo_adam])
def test_a_step_that_compares_the_loss_with_the_gradient_belongs_inside(make):
    """A regression that can be fitted, with 8 examples a step, at a rate that is no bound: behind the loss grows."""
    x = jax.random.normal(jax.random.key(0), (8, 3))
    y = x.sum(1, keepdims=True) + 1

    def loss(params):
        return jnp.mean(jnp.square(x @ params["w"] + params["b"] - y))

    def end(tx):
        params = jax.tree.map(jnp.zeros_like, dense_params())
        state = tx.init(params)
        for _ in range(30):
            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = tx.update(gradients, state, params, intermediates=dense_record(x), value=value)
            params = optax.apply_updates(params, updates)
        return loss(params)

    start = loss(jax.tree.map(jnp.zeros_like, dense_params()))
    assert end(bnp.preconditioned(make(1e3), DENSE)) < 0.3 * start
    assert not end(optax.chain(bnp.scale_by_bnp(DENSE), make(1e3))) < 10 * start
