"""BNP inside every Optax wrapper that hands extra arguments on, and the errors of those that do not."""

import functools

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import muon_dimensions

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=2)(x))
        x = nn.LayerNorm()(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(nn.relu(nn.Dense(8, use_bias=False)(x)))


X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (8, 4, 4, 2)), jnp.float32)
PARAMS = Net().init(jax.random.key(0), X)["params"]
LAYERS = bnp.linen.find_layers(Net(), X)


def loss(params):
    return jnp.sum(jnp.square(jnp.sin(Net().apply({"params": params}, X))))


def gradients_and_records(params, x=X):
    def loss_fn(params):
        with bnp.linen.record_inputs():
            y, recorded = Net().apply({"params": params}, x, mutable=["intermediates"])
        return jnp.sum(jnp.square(jnp.sin(y))), recorded["intermediates"]

    return jax.grad(loss_fn, has_aux=True)(params)


GRADIENTS, RECORDS = gradients_and_records(PARAMS)
SGD = optax.sgd(0.1, momentum=0.9)


def bnp_sgd(**options):
    return optax.chain(bnp.scale_by_bnp(LAYERS, **options), SGD)


def preconditioned(inner=None, **options):
    return bnp.preconditioned(optax.adam(1e-2) if inner is None else inner, LAYERS, **options)


def as_transformation(multi_steps):
    """Optax's own `gradient_transformation()` drops extra arguments."""
    return optax.GradientTransformationExtraArgs(multi_steps.init, multi_steps.update)


STATIC = ("inner", "layers", "variance", "scaling")
BY_KIND = {name: "rest" if name == "LayerNorm_0" else "bnp" for name in PARAMS}
ALL_BUT_CONV = {name: name != "Conv_0" for name in PARAMS}
ALL_BUT_CONV_LEAF_BY_LEAF = {name: jax.tree.map(lambda _, name=name: name != "Conv_0", PARAMS[name]) for name in PARAMS}


OPTIONS = {
    "defaults": {},
    "batch variance": {"variance": "batch"},
    "examples": {"scaling": "examples"},
    "unscaled": {"scaling": "none"},
    "constant decay": {"prior_examples": None},
    "no prior": {"prior_examples": 0},
    "numbers": {"decay": 0.5, "eps_relative": 0.0, "eps": 1e-2},
}

# Every wrapper hands `intermediates` to the transformation that it wraps.
WRAPPERS = {
    **{f"options: {name}": functools.partial(bnp_sgd, **options) for name, options in OPTIONS.items()},
    "alias": lambda: bnp.bnp_sgd(0.1, LAYERS, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "named_chain": lambda: optax.named_chain(("bnp", bnp.scale_by_bnp(LAYERS)), ("sgd", SGD)),
    "partition": lambda: optax.partition({"bnp": bnp_sgd(), "rest": optax.adam(1e-3)}, BY_KIND),
    "masked": lambda: optax.chain(optax.masked(bnp.scale_by_bnp(LAYERS), ALL_BUT_CONV), SGD),
    "masked leaf by leaf": lambda: optax.chain(optax.masked(bnp.scale_by_bnp(LAYERS), ALL_BUT_CONV_LEAF_BY_LEAF), SGD),
    "freeze": lambda: optax.partition({True: bnp_sgd(), False: optax.set_to_zero()}, ALL_BUT_CONV),
    "inject_hyperparams": lambda: optax.inject_hyperparams(bnp.bnp_sgd)(0.1, LAYERS, decay=0.9, prior_examples=16),
    "inject schedules": lambda: optax.inject_hyperparams(bnp.bnp_sgd)(
        optax.linear_schedule(0.1, 0.01, 10), LAYERS, decay=optax.linear_schedule(0.5, 0.99, 10), eps=lambda count: 1e-3
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(bnp_sgd(), max_consecutive_errors=3),
    "conditionally_transform": lambda: optax.conditionally_transform(
        bnp_sgd(), lambda step, **_: step % 2 == 0, forward_extra_args=True
    ),
    "conditionally_mask": lambda: optax.conditionally_mask(
        bnp_sgd(), lambda step, **_: step % 2 == 0, forward_extra_args=True
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(
        optax.chain(bnp.scale_by_bnp(LAYERS), optax.sgd(0.1)), learning_rate=0.1
    ),
    "mechanize": lambda: optax.contrib.mechanize(bnp_sgd()),
    "flatten": lambda: optax.chain(bnp.scale_by_bnp(LAYERS), optax.flatten(SGD)),
    "MultiSteps outside": lambda: optax.MultiSteps(bnp_sgd(), every_k_schedule=2),
    "MultiSteps behind": lambda: optax.chain(bnp.scale_by_bnp(LAYERS), as_transformation(optax.MultiSteps(SGD, 2))),
    "clipping": lambda: optax.chain(bnp.scale_by_bnp(LAYERS), optax.clip_by_global_norm(1.0), optax.zero_nans(), SGD),
    "before Adam": lambda: optax.chain(bnp.scale_by_bnp(LAYERS), optax.adamw(1e-3)),
    "in z, adam": preconditioned,
    "in z, adamw": lambda: preconditioned(optax.adamw(1e-2)),
    "in z, muon": lambda: preconditioned(optax.contrib.muon(1e-2, muon_weight_dimension_numbers=muon_dimensions)),
    "in z, clipping inside": lambda: preconditioned(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))),
    "in z, clipping and decay around": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), preconditioned(), optax.add_decayed_weights(-1e-4)
    ),
    "in z, inject_hyperparams": lambda: optax.inject_hyperparams(bnp.preconditioned, static_args=STATIC)(
        optax.adam(1e-2), LAYERS, decay=optax.linear_schedule(0.5, 0.99, 10), eps=1e-3, prior_examples=16
    ),
    "in z, inject inside": lambda: preconditioned(
        optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.01, 10), weight_decay=1e-3)
    ),
    "in z, partition": lambda: optax.partition({"bnp": preconditioned(), "rest": optax.adam(1e-3)}, BY_KIND),
    "in z, partition inside": lambda: preconditioned(
        optax.partition({"bnp": optax.adam(1e-2), "rest": optax.sgd(1e-2)}, BY_KIND)
    ),
    "in z, masked": lambda: optax.masked(preconditioned(), ALL_BUT_CONV),
    "in z, masked leaf by leaf": lambda: optax.masked(preconditioned(), ALL_BUT_CONV_LEAF_BY_LEAF),
    "in z, masked inside": lambda: preconditioned(optax.chain(optax.masked(optax.trace(0.9), ALL_BUT_CONV), SGD)),
    "in z, apply_if_finite": lambda: optax.apply_if_finite(preconditioned(), max_consecutive_errors=3),
    "in z, schedule_free": lambda: optax.contrib.schedule_free(preconditioned(optax.sgd(0.1)), learning_rate=0.1),
    "in z, MultiSteps outside": lambda: optax.MultiSteps(preconditioned(), every_k_schedule=2),
    "in z, MultiSteps inside": lambda: preconditioned(as_transformation(optax.MultiSteps(optax.adam(1e-2), 2))),
}


@pytest.fixture(scope="module", params=WRAPPERS)
def tx(request):
    return WRAPPERS[request.param]()


def step_with(tx):
    """Returns a training step, and the list of its traces."""
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        gradients, records = gradients_and_records(params)
        updates, state = tx.update(gradients, state, params, intermediates=records)
        return optax.apply_updates(params, updates), state

    return step, traces


@pytest.fixture(scope="module")
def step_and_traces(tx):
    return step_with(tx)


def find_bnp(state):
    """Returns the statistics, wherever they are in a state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, bnp.Statistics))
    return [leaf for leaf in leaves if isinstance(leaf, bnp.Statistics)]


def test_training_compiles_once_and_keeps_every_type(tx, step_and_traces):
    step, traces = step_and_traces
    params, state = PARAMS, jax.jit(tx.init)(PARAMS)
    for _ in range(3):
        new_params, new_state = step(params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes((params, state), (new_params, new_state))
        params, state = new_params, new_state
    assert len(traces) == 1
    chex.assert_tree_all_finite(params)
    [statistics] = find_bnp(state)
    assert statistics["Dense_1"].seen >= 8
    assert np.abs(statistics["Dense_1"].mean).max() > 1e-3
    assert optax.tree.norm(optax.tree.sub(params, PARAMS)) > 0


def test_scan_cond_and_eval_shape_keep_the_state(tx, step_and_traces):
    step, state = step_and_traces[0], jax.jit(tx.init)(PARAMS)
    once = step(PARAMS, state)
    twice = step(*once)

    def body(carry, go):
        return jax.lax.cond(go, lambda c: step(*c), lambda c: c, carry), None

    scanned, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.array([True, False, True])))((PARAMS, state))
    chex.assert_trees_all_close(scanned, twice, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step, PARAMS, state), once)


def test_map_params_sees_statistics_as_what_they_are_no_parameters(request, tx):
    if "flatten" in request.node.callspec.id:
        pytest.skip("optax.flatten itself cannot be initialized with a placeholder")
    state = tx.init(PARAMS)
    as_params = optax.tree.map_params(tx, lambda leaf: leaf + jnp.ones_like(leaf), state)
    chex.assert_trees_all_equal(find_bnp(as_params), find_bnp(state))
    others = optax.tree.map_params(tx, lambda leaf: leaf, state, transform_non_params=lambda leaf: leaf + 1)
    chex.assert_trees_all_equal(find_bnp(others), jax.tree.map(lambda leaf: leaf + 1, find_bnp(state)))


def test_map_params_sees_what_the_inner_optimizer_keeps_of_parameters():
    tx = preconditioned(optax.adam(1e-2))
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda leaf, param: leaf + param, state, PARAMS)
    assert mapped.inner[0].count == 0
    chex.assert_trees_all_equal(mapped.statistics, state.statistics)
    for moments in (mapped.inner[0].mu, mapped.inner[0].nu):
        chex.assert_trees_all_equal(moments, PARAMS)


KEEPING = (
    "options: defaults",
    "in z, adam",
    "in z, muon",
    "in z, partition inside",
    "in z, MultiSteps inside",
)


@pytest.mark.parametrize("name", KEEPING)
def test_steps_that_keep_the_statistics_compile_once_and_keep_every_type(name):
    tx, traces = WRAPPERS[name](), []

    @jax.jit
    def step(params, state):
        traces.append(1)
        gradients = jax.grad(loss)(params)
        updates, state = tx.update(gradients, state, params, intermediates=bnp.KEEP_STATISTICS)
        return optax.apply_updates(params, updates), state

    params, state = step_with(tx)[0](PARAMS, tx.init(PARAMS))
    [statistics] = find_bnp(state)
    for _ in range(3):
        new_params, state_after = step(params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes((params, state), (new_params, state_after))
        params, state = new_params, state_after
    assert len(traces) == 1
    chex.assert_trees_all_equal(find_bnp(state), [statistics])
    assert optax.tree.norm(optax.tree.sub(params, PARAMS)) > 0


def test_monitor_sees_preconditioned_updates():
    tx = optax.chain(
        bnp.scale_by_bnp(LAYERS), optax.monitor({"norm": lambda updates, *_, **__: optax.tree.norm(updates)})
    )
    updates, state = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS, intermediates=RECORDS)
    np.testing.assert_allclose(state[1].measurements["norm"], optax.tree.norm(updates), rtol=1e-6)


def test_frozen_dict_parameters_are_like_dicts():
    tx = bnp_sgd()
    frozen, records = flax.core.freeze(PARAMS), flax.core.freeze(RECORDS)
    updates, _ = tx.update(flax.core.freeze(GRADIENTS), tx.init(frozen), frozen, intermediates=records)
    expected, _ = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS, intermediates=RECORDS)
    assert isinstance(updates, flax.core.FrozenDict)
    chex.assert_trees_all_equal(flax.core.unfreeze(updates), expected)


def test_injected_schedules_equal_plain_numbers_at_each_step():
    schedules = {
        "learning_rate": optax.linear_schedule(0.1, 0.02, 4),
        "decay": optax.linear_schedule(0.5, 0.9, 4),
        "eps": optax.linear_schedule(1e-2, 1e-4, 4),
        "eps_relative": optax.linear_schedule(0.1, 0.01, 4),
    }
    injected = optax.inject_hyperparams(bnp.bnp_sgd)(layers=LAYERS, momentum=0.9, **schedules)
    state, plain_state = injected.init(PARAMS), bnp.bnp_sgd(0.1, LAYERS, momentum=0.9).init(PARAMS)
    for step in range(4):
        numbers = {name: float(schedule(step)) for name, schedule in schedules.items()}
        plain = bnp.bnp_sgd(layers=LAYERS, momentum=0.9, **numbers)
        updates, state = injected.update(GRADIENTS, state, PARAMS, intermediates=RECORDS)
        expected, plain_state = plain.update(GRADIENTS, plain_state, PARAMS, intermediates=RECORDS)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alone", [bnp.scale_by_bnp(LAYERS), preconditioned()], ids=["scale_by_bnp", "preconditioned"])
def test_masked_and_partitioned_layers_are_preconditioned_as_alone(alone):
    expected, _ = alone.update(GRADIENTS, alone.init(PARAMS), intermediates=RECORDS)
    masked = optax.masked(alone, ALL_BUT_CONV)
    updates, _ = masked.update(GRADIENTS, masked.init(PARAMS), intermediates=RECORDS)
    chex.assert_trees_all_equal(updates, {**expected, "Conv_0": GRADIENTS["Conv_0"]})
    parts = optax.partition({"bnp": alone, "rest": optax.set_to_zero()}, BY_KIND)
    updates, _ = parts.update(GRADIENTS, parts.init(PARAMS), PARAMS, intermediates=RECORDS)
    chex.assert_trees_all_equal(updates, {**expected, "LayerNorm_0": optax.tree.zeros_like(GRADIENTS["LayerNorm_0"])})


def test_apply_if_finite_keeps_the_statistics_of_before_a_bad_batch():
    tx = optax.apply_if_finite(bnp_sgd(), max_consecutive_errors=3)
    _, before = tx.update(GRADIENTS, tx.init(PARAMS), PARAMS, intermediates=RECORDS)
    gradients, records = gradients_and_records(PARAMS, X.at[0, 0, 0, 0].set(jnp.nan))
    updates, after = tx.update(gradients, before, PARAMS, intermediates=records)
    chex.assert_trees_all_equal(after.inner_state, before.inner_state)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(PARAMS))


# MultiSteps: what is absorbed.


def micro_batches(tx, state):
    for half in (X[:4], X[4:]):
        gradients, records = gradients_and_records(PARAMS, half)
        updates, state = tx.update(gradients, state, PARAMS, intermediates=records)
    return updates, state


@pytest.mark.parametrize("make", [bnp.scale_by_bnp, functools.partial(bnp.preconditioned, optax.adam(1e-2))])
def test_multi_steps_outside_absorbs_the_last_micro_batch_alone(make):
    tx = optax.MultiSteps(make(LAYERS, decay=0.5), every_k_schedule=2)
    _, state = micro_batches(tx, tx.init(PARAMS))
    [statistics] = find_bnp(state)
    _, last = gradients_and_records(PARAMS, X[4:])
    assert statistics["Conv_0"].seen == 4
    expected = np.ravel(last["Conv_0"]["kernel_input"].mean)
    np.testing.assert_allclose(statistics["Conv_0"].mean.ravel(), 0.5 * expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["MultiSteps behind", "in z, MultiSteps inside"])
def test_multi_steps_inside_absorbs_every_micro_batch(name):
    tx = WRAPPERS[name]()
    _, state = micro_batches(tx, tx.init(PARAMS))
    [statistics] = find_bnp(state)
    assert statistics["Conv_0"].seen == 8


def test_multi_steps_inside_averages_what_each_micro_batch_asks_of_z():
    """Under statistics that stay, the mean of the gradients of both halves is one step's."""
    tx = preconditioned(as_transformation(optax.MultiSteps(optax.sgd(0.1), 2)))
    _, state = micro_batches(tx, tx.init(PARAMS))
    start = state.statistics
    halves = [gradients_and_records(PARAMS, half)[0] for half in (X[:4], X[4:])]
    for gradients in halves:
        updates, state = tx.update(gradients, state, PARAMS, intermediates=bnp.KEEP_STATISTICS)
    whole = preconditioned(optax.sgd(0.1))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    at_start = bnp.PreconditionedState(start, whole.init(PARAMS).inner)
    expected, _ = whole.update(mean, at_start, PARAMS, intermediates=bnp.KEEP_STATISTICS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)


# Wrappers that do not hand the records on: the user gets an error, never a silent plain gradient.


def refusals(make, kind):
    def lookahead():
        tx = optax.lookahead(make(), sync_period=2, slow_step_size=0.5)
        params = optax.LookaheadParams.init_synced(PARAMS)
        return tx.update(GRADIENTS, tx.init(params), params, intermediates=RECORDS)

    def sam():
        tx = optax.contrib.sam(make(), optax.sgd(0.05), sync_period=2)
        return tx.update(GRADIENTS, tx.init(PARAMS), PARAMS, intermediates=RECORDS)

    def split_real_and_imaginary():
        tx = optax.contrib.split_real_and_imaginary(make())
        return tx.update(GRADIENTS, tx.init(PARAMS), PARAMS, intermediates=RECORDS)

    def multi_steps_in_a_chain():
        tx = optax.chain(optax.MultiSteps(make(), 2).gradient_transformation(), optax.identity())
        return tx.update(GRADIENTS, tx.init(PARAMS), PARAMS, intermediates=RECORDS)

    def flax_train_state():
        from flax.training.train_state import TrainState

        return TrainState.create(apply_fn=None, params=PARAMS, tx=make()).apply_gradients(grads=GRADIENTS)

    def flatten_around():
        tx = optax.flatten(make())
        return tx.update(GRADIENTS, tx.init(PARAMS), PARAMS, intermediates=RECORDS)

    cases = [lookahead, sam, split_real_and_imaginary, multi_steps_in_a_chain, flax_train_state, flatten_around]
    return [pytest.param(case, id=f"{kind}: {case.__name__}") for case in cases]


@pytest.mark.parametrize("refusal", [*refusals(bnp_sgd, "scale_by_bnp"), *refusals(preconditioned, "preconditioned")])
def test_wrappers_that_drop_the_records_end_in_an_error(refusal):
    with pytest.raises((TypeError, ValueError), match=r"intermediates|Call find_layers on the model"):
        refusal()
