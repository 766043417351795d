"""What every transformation of the library promises, whichever it is: types, records, statistics, masks, errors.

Those of Optax's wrappers are in test_wrappers.py.
"""

import copy
import dataclasses
import pickle

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import abstract, compiled, make_step, map_statistics, statistics_in, with_statistics
from transformations import (
    ADAM,
    DENSE,
    GRADIENTS_AND_RECORDS,
    TRANSFORMATIONS,
    Net,
    dense_params,
    dense_record,
    problem,
)

import bnp_optax as bnp


@pytest.fixture(scope="module", params=TRANSFORMATIONS)
def entry(request, strict):
    entry = TRANSFORMATIONS[request.param]
    if entry.rest is not ADAM:
        yield entry
        return
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # which Adam needs
        yield entry


@pytest.fixture(scope="module")
def tx(entry):
    """The transformation for the network, compiled once."""
    return compiled(entry.make(problem().layers))


@pytest.fixture(scope="module")
def dense(entry):
    """The transformation for a dense layer, compiled once."""
    return compiled(entry.make(DENSE))


def update(tx, state=None, **changes):
    """Returns updates and state after one batch of the problem, or of one that differs in some things."""
    given = problem()._asdict() | changes
    state = tx.init(given["params"]) if state is None else state
    return tx.update(given["gradients"], state, given["params"], intermediates=given["records"])


def dense_update(tx, state, x, gradients=None):
    params = dense_params()
    return tx.update(params if gradients is None else gradients, state, params, intermediates=dense_record(x))


def assert_same_types(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    jax.tree.map(lambda a, b: chex.assert_equal(a.weak_type, b.weak_type), actual, expected)


# Types, and ways to run.


def test_update_keeps_tree_shape_dtype_and_weak_type(tx):
    state = tx.init(problem().params)
    updates, new_state = update(tx, state)
    assert_same_types(updates, problem().gradients)
    assert_same_types(new_state, state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((updates, new_state)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_gradients_come_back_in_their_dtype(tx, dtype):
    params, low = optax.tree.cast((problem().params, problem().gradients), dtype)
    updates, state = update(tx, params=params, gradients=low)
    expected, _ = update(tx)
    chex.assert_trees_all_equal_dtypes(updates, low)
    [statistics] = statistics_in(state)
    assert statistics.mean.dtype == jnp.float32
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(optax.tree.cast(updates, jnp.float32), expected, rtol=0.05, atol=0.01 * largest)


def test_eager_compiled_and_mapped_updates_agree(entry, tx):
    """Mapped as over seeds, whose members must not see one another."""
    eager = entry.make(problem().layers)
    chex.assert_trees_all_close(update(tx), update(eager), rtol=1e-4, atol=1e-5)

    members = [(p.params, p.gradients, p.records) for p in (problem(), another_problem())]
    mapped = jax.vmap(lambda params, g, r: eager.update(g, eager.init(params), params, intermediates=r))
    updates, state = jax.jit(mapped)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
    for k, (params, gradients, records) in enumerate(members):
        expected = update(tx, params=params, gradients=gradients, records=records)
        member = jax.tree.map(lambda leaf, k=k: leaf[k], (updates, state))
        chex.assert_trees_all_close(member, expected, rtol=1e-4, atol=1e-5)
    [statistics] = statistics_in(state)
    assert statistics["Conv_0"].mean.shape == (2, 1, 2, 1)
    assert statistics["Conv_0"].seen.shape == (2, 1)


def another_problem():
    p = problem()
    params = jax.tree.map(lambda leaf: leaf + 0.1, p.params)
    gradients, records = GRADIENTS_AND_RECORDS(params, 2 * p.x)
    return p._replace(params=params, gradients=gradients, records=records)


def test_a_donated_state_is_used_up_and_changes_no_result(entry):
    tx = entry.make(problem().layers)
    step = make_step(tx, lambda params, gradients, records: (gradients, records))
    batch = problem().gradients, problem().records
    donating, plain = jax.jit(step, donate_argnums=(0, 1)), jax.jit(step)
    expected = problem().params, tx.init(problem().params)
    actual = jax.tree.map(jnp.copy, problem().params), tx.init(problem().params)
    for _ in range(2):
        before, actual = actual, donating(*actual, *batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        expected = plain(*expected, *batch)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_frozen_dict_parameters_are_like_dicts(tx):
    frozen = {name: flax.core.freeze(getattr(problem(), name)) for name in ("params", "gradients", "records")}
    updates, _ = update(tx, **frozen)
    assert isinstance(updates, flax.core.FrozenDict)
    expected, _ = update(tx)
    chex.assert_trees_all_equal(flax.core.unfreeze(updates), expected)


def test_other_extra_arguments_are_handed_on_or_ignored(tx):
    p = problem()
    extra = {"value": jnp.float32(1.0), "epoch": 3}
    updates, _ = tx.update(p.gradients, tx.init(p.params), p.params, intermediates=p.records, **extra)
    chex.assert_trees_all_close(updates, update(tx)[0], rtol=1e-6)


def test_map_params_sees_statistics_as_no_parameters_and_what_is_kept_of_parameters_as_such(entry, tx):
    params = problem().params
    state = tx.init(params)

    def mapped(tx, state):
        return optax.tree.map_params(
            tx, lambda leaf, param: leaf + param, state, params, transform_non_params=lambda leaf: leaf + 1
        )

    actual, kept = mapped(tx, state), mapped(entry.rest, entry.rest.init(params))
    chex.assert_trees_all_equal(statistics_in(actual), jax.tree.map(lambda leaf: leaf + 1, statistics_in(state)))
    chex.assert_trees_all_equal(jax.tree.leaves(map_statistics(lambda _: None, actual)), jax.tree.leaves(kept))
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, state)


# Which parameters.


def test_parameters_outside_the_layers_are_updated_as_without_the_library(entry):
    p = problem()
    updates, _ = update(compiled(entry.make(p.layers.select(lambda layer: layer.kind == "Conv"))))
    expected, _ = entry.rest.update(p.gradients, entry.rest.init(p.params), p.params)
    for name in ("LayerNorm_0", "Dense_0", "Dense_1"):
        chex.assert_trees_all_close(updates[name], expected[name], rtol=1e-6)
    assert np.abs(updates["Conv_0"]["kernel"] - expected["Conv_0"]["kernel"]).max() > 1e-3


def test_masked_layers_pass_and_a_masked_bias_counts_as_none(entry, tx):
    p = problem()
    mask = jax.tree.map(lambda _: True, p.params)
    mask["Conv_0"] = {"kernel": False, "bias": True}
    mask["Dense_1"] = {"kernel": True, "bias": False}
    updates, _ = update(compiled(optax.masked(entry.make(p.layers), mask)))
    bias, _ = entry.rest.update(p.gradients["Conv_0"], entry.rest.init(p.params["Conv_0"]), p.params["Conv_0"])
    expected = {"kernel": p.gradients["Conv_0"]["kernel"], "bias": bias["bias"]}
    chex.assert_trees_all_close(updates["Conv_0"], expected, rtol=1e-6)
    full, _ = update(tx)
    chex.assert_trees_all_close(updates["Dense_0"], full["Dense_0"], rtol=1e-6)

    last = bnp.Layers((bnp.Layer.dense(("Dense_1", "kernel"), (8, 3)),))
    without_bias, _ = update(compiled(entry.make(last)))
    expected = {"kernel": without_bias["Dense_1"]["kernel"], "bias": p.gradients["Dense_1"]["bias"]}
    chex.assert_trees_all_close(updates["Dense_1"], expected, rtol=1e-6)


def test_masked_and_partitioned_layers_are_preconditioned_as_alone(entry, tx):
    p = problem()
    expected, _ = update(tx)
    masked = optax.masked(entry.make(p.layers), {name: name != "Conv_0" for name in p.params})
    updates, _ = update(compiled(masked))
    chex.assert_trees_all_close(updates, {**expected, "Conv_0": p.gradients["Conv_0"]}, rtol=1e-6)
    by_kind = {name: "rest" if name == "LayerNorm_0" else "bnp" for name in p.params}
    parts = optax.partition({"bnp": entry.make(p.layers), "rest": optax.set_to_zero()}, by_kind)
    updates, _ = update(compiled(parts))
    zeros = optax.tree.zeros_like(p.gradients["LayerNorm_0"])
    chex.assert_trees_all_close(updates, {**expected, "LayerNorm_0": zeros}, rtol=1e-6)


# Statistics: what is absorbed, kept, skipped.


def test_a_copy_of_the_wish_to_keep_statistics_is_the_same():
    for copied in (copy.deepcopy(bnp.KEEP_STATISTICS), pickle.loads(pickle.dumps(bnp.KEEP_STATISTICS))):  # noqa: S301
        assert copied is bnp.KEEP_STATISTICS


def test_statistics_are_kept_where_the_user_says_so(entry):
    """Under decay 0 they are the last batch's, so that keeping them is absorbing that batch again."""
    tx = compiled(entry.make(problem().layers, decay=0.0, prior_examples=None))
    _, state = update(tx)
    kept, kept_state = update(tx, state, records=bnp.KEEP_STATISTICS)
    expected, _ = update(tx, state)
    chex.assert_trees_all_close(kept, expected, rtol=1e-5, atol=1e-8)
    chex.assert_trees_all_equal(statistics_in(kept_state), statistics_in(state))
    assert_same_types(kept_state, state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 1e25])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(dense, bad):
    """1e25 has finite moments, but its square overflows the running variance."""
    _, state = dense_update(dense, dense.init(dense_params()), [[1.0, 2, 3], [2, 2, 0]])
    updates, new_state = dense_update(dense, state, [[1.0, bad, 3], [1.0, 2, 3]])
    [before], [after] = statistics_in(state), statistics_in(new_state)
    for name in ("mean", "variance", "seen"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(before, name))
    assert after["w"].skipped == 1
    chex.assert_tree_all_finite(updates)


def test_only_the_layer_that_is_not_finite_skips(tx):
    records = dict(problem().records)
    bad = records["Dense_0"]
    records["Dense_0"] = dataclasses.replace(bad, total=bad.total.at[0, 0, 0].set(np.nan))
    _, state = update(tx, records=records)
    [statistics] = statistics_in(state)
    skipped = {name: int(statistics[name].skipped[0]) for name in statistics}
    assert skipped == {"Conv_0": 0, "Dense_0": 1, "Dense_1": 0}


def test_counter_of_examples_saturates(dense):
    almost = map_statistics(lambda s: with_statistics(s, "w", seen=2**31 - 2), dense.init(dense_params()))
    _, state = dense_update(dense, almost, np.ones((5, 3)))
    [statistics] = statistics_in(state)
    assert statistics["w"].seen == 2**31 - 1


@pytest.mark.parametrize("prior", [None, 0, 128])
def test_layer_without_positions_or_examples_keeps_its_statistics_and_counts_nothing(entry, prior):
    tx, params = compiled(entry.make(DENSE, prior_examples=prior)), dense_params()
    start = tx.init(params)
    _, before = dense_update(tx, start, [[1.0, 2, 3], [2, 2, 0]])
    record = dense_record(np.ones((2, 3)))
    no_positions = jax.tree.map(jnp.zeros_like, record)
    no_examples = {"w": dataclasses.replace(record["w"], count=jnp.zeros_like(record["w"].count))}
    for state in (before, start):
        kept, _ = tx.update(params, state, params, intermediates=bnp.KEEP_STATISTICS)
        for records in (no_positions, no_examples):
            updates, after = tx.update(params, state, params, intermediates=records)
            chex.assert_trees_all_equal(statistics_in(after), statistics_in(state))
            chex.assert_trees_all_equal(updates, kept)


# Hyperparameters.


@pytest.mark.usefixtures("standard_promotion")
def test_injected_hyperparameters_equal_plain_ones(entry):
    options = {"decay": 0.9, "eps_relative": 0.05, "eps": 1e-3, "prior_examples": 16}
    plain, injected = (compiled(make(**options)) for make in (entry.optimizer, entry.injected))
    state, injected_state = (tx.init(problem().params) for tx in (plain, injected))
    for _ in range(2):
        expected, state = update(plain, state)
        actual, injected_state = update(injected, injected_state)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("standard_promotion")
def test_injected_schedules_equal_plain_numbers_at_each_step(entry):
    schedules = {
        "decay": optax.linear_schedule(0.5, 0.9, 4),
        "eps": optax.linear_schedule(1e-2, 1e-4, 4),
        "eps_relative": optax.linear_schedule(0.1, 0.01, 4),
    }
    injected = compiled(entry.injected(**schedules))
    plain = jax.jit(lambda numbers, state: update(entry.optimizer(**numbers), state))
    state, plain_state = (tx.init(problem().params) for tx in (injected, entry.optimizer()))
    for step in range(4):
        expected, plain_state = plain({name: schedule(step) for name, schedule in schedules.items()}, plain_state)
        actual, state = update(injected, state)
        chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), but is 1.0"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\), but is 1.5"),
        ({"decay": -0.1}, r"decay must be in \[0, 1\), but is -0.1"),
        ({"decay": float("nan")}, "decay must be"),
        ({"eps": -1e-4}, "eps must be finite and not negative, but is -0.0001"),
        ({"eps_relative": float("inf")}, "eps_relative must be finite"),
        ({"prior_examples": -1}, "prior_examples must be finite and not negative, but is -1"),
        ({"variance": "exact"}, "variance must be one of 'mixture', 'batch', but is 'exact'"),
        ({"scaling": None}, "scaling must be a number of examples or one of 'examples', .*'none', but is None"),
        ({"scaling": "exmples"}, "but is 'exmples'"),
        ({"scaling": 0}, "scaling must be a positive number of examples or the name of a rule, but is 0"),
        ({"scaling": float("nan")}, "scaling must be a positive number"),
        ({"scaling": np.array(-16.0)}, "scaling must be a positive number of examples .* but is -16"),
        ({"scaling": np.ones(3)}, "scaling must be a number of examples or one of"),
        ({"decay": np.array(2.0)}, r"decay must be in \[0, 1\), but is 2"),
    ],
)
def test_options_out_of_range_are_refused(entry, options, message):
    with pytest.raises(ValueError, match=message):
        entry.make(DENSE, **options)


# What goes wrong, and what the user reads.


def test_layers_of_the_wrong_type_are_refused(entry):
    with pytest.raises(TypeError, match=r"layers must be a bnp_optax\.Layers, .* not Net"):
        entry.make(Net())


def test_layers_without_a_layer_are_refused(entry):
    for layers in (problem().layers.select(lambda layer: False), bnp.Layers(())):
        with pytest.raises(ValueError, match=r"no layer to act on: .*print\(layers\)"):
            entry.make(layers)


def test_layers_of_another_model_are_refused_by_init(entry):
    tx = abstract(entry.make(DENSE))
    with pytest.raises(ValueError, match=r"w with shape \(3, 2\), but it has shape \(4, 2\)"):
        tx.init(dense_params(4))
    with pytest.raises(ValueError, match=r"describes w, which the parameters do not hold\. They hold Conv_0/bias, .*"):
        tx.init(problem().params)
    with pytest.raises(ValueError, match=r"describes b, which the parameters do not hold"):
        tx.init({"w": jnp.ones((3, 2))})


def test_missing_intermediates_are_a_type_error(entry):
    tx, params = abstract(entry.make(DENSE)), dense_params()
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"update wants intermediates=.* KEEP_STATISTICS"):
        tx.update(params, state, params)
    with pytest.raises(TypeError, match=r"update wants intermediates="):
        tx.update(params, state, params, intermediates=None)


def test_missing_records_name_their_layers(entry):
    tx, records = abstract(entry.make(problem().layers)), problem().records
    state = tx.init(problem().params)
    with pytest.raises(ValueError, match=r"no record of the input of Conv_0, Dense_0, Dense_1\. .*capture"):
        update(tx, state, records={})
    with pytest.raises(ValueError, match=r"input of Dense_1\. .*layers\.select"):
        update(tx, state, records={k: v for k, v in records.items() if k != "Dense_1"})
    with pytest.raises(ValueError, match=r"intermediates=recorded\['intermediates'\]"):
        update(tx, state, records={"intermediates": records})


def test_record_of_another_shape_shows_both_shapes(entry):
    tx = abstract(entry.make(DENSE))
    with pytest.raises(ValueError, match=r"record of w has moments of shape \(1, 1, 4\), .* \(1, 1, 3\)"):
        dense_update(tx, tx.init(dense_params()), np.ones((2, 4)))


def test_state_of_another_model_names_the_first_layer_that_differs(entry):
    tx, x = abstract(entry.make(DENSE)), np.ones((2, 3))
    wider = bnp.Layers((bnp.Layer.dense(("w",), (4, 2), bias=("b",)),))
    with pytest.raises(ValueError, match=r"of w have shape \(1, 1, 4\), but the layers need \(1, 1, 3\).* restore"):
        dense_update(tx, abstract(entry.make(wider)).init(dense_params(4)), x)
    with pytest.raises(ValueError, match=r"moments of w have shape None, but the layers need \(1, 1, 3\)"):
        dense_update(tx, abstract(entry.make(problem().layers)).init(problem().params), x)
    cut = map_statistics(lambda s: dataclasses.replace(s, damping=jnp.zeros(7)), tx.init(dense_params()))
    with pytest.raises(ValueError, match=r"The state's damping has shape \(7,\), but the layers need \(1,\)"):
        dense_update(tx, cut, x)


def test_a_state_of_fewer_layers_is_refused(entry):
    p = problem()
    fewer = abstract(entry.make(p.layers.select(lambda layer: layer.path != "Dense_1"))).init(p.params)
    with pytest.raises(ValueError, match=r"The state's moments of Dense_1 have shape None, .* restore"):
        update(abstract(entry.make(p.layers)), fewer, records=bnp.KEEP_STATISTICS)


def test_what_is_no_state_is_refused(entry):
    tx = abstract(entry.make(DENSE))
    other = map_statistics(lambda statistics: {"mean": statistics.mean}, tx.init(dense_params()))
    with pytest.raises(TypeError, match=r"what init returned, not dict\. If it comes from a checkpoint"):
        dense_update(tx, other, np.ones((2, 3)))
