"""scale_by_bnp as a gradient transformation: state, options, composition, errors."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import with_statistics
from hypothesis import given
from hypothesis import strategies as st
from oracles import paper_dense_step

import bnp_optax as bnp


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.LayerNorm()(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.Dense(8, use_bias=False)(x))
        return nn.Dense(3)(x)


X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (16, 6, 6, 2)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).integers(0, 3, 16))
PARAMS = CNN().init(jax.random.key(0), X)["params"]
LAYERS = bnp.linen.find_layers(CNN(), X)


def gradients_and_records(params, x, y):
    def loss_fn(params):
        with bnp.linen.record_inputs():
            logits, recorded = CNN().apply({"params": params}, x, mutable=["intermediates"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), recorded["intermediates"]

    return jax.grad(loss_fn, has_aux=True)(params)


GRADIENTS, RECORDS = gradients_and_records(PARAMS, X, Y)

DENSE = bnp.Layers((bnp.Layer.dense(("w",), (3, 2), bias=("b",)),))
DENSE_PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}


def dense_record(x):
    return {"w_input": bnp.input_moments(jnp.asarray(x, jnp.float32))}


def test_state_holds_every_layer_by_its_path():
    state = bnp.scale_by_bnp(LAYERS, eps_relative=0.5, eps=0.25).init(PARAMS)
    assert set(state) == set(LAYERS)
    assert len(state) == 3
    assert state["Conv_0"].mean.shape == state["Conv_0"].variance.shape == (1, 1, 2)
    assert state["Dense_0"].damping.shape == (1, 1)
    assert state["Dense_0"].scale.shape == state["Dense_0"].seen.shape == state["Dense_0"].skipped.shape == (1,)
    for layer in (state[path] for path in state):
        values = {"mean": 0, "variance": 1, "damping": 0.75, "scale": 1, "seen": 0, "skipped": 0}
        expected = {name: jnp.full_like(x, values[name]) for name, x in layer._asdict().items()}
        chex.assert_trees_all_equal(layer._asdict(), expected)
        assert {leaf.dtype for leaf in layer} == {jnp.dtype("float32"), jnp.dtype("int32")}
    with pytest.raises(KeyError):
        state["LayerNorm_0"]


def test_many_states_in_one_are_read_by_layer_too():
    """As under `jax.vmap` over seeds."""
    states = jax.vmap(bnp.scale_by_bnp(LAYERS).init)(jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), PARAMS))
    assert states["Conv_0"].mean.shape == (4, 1, 1, 2)
    assert states["Conv_0"].seen.shape == (4, 1)


def test_update_keeps_tree_shape_dtype_and_weak_type():
    tx = bnp.scale_by_bnp(LAYERS)
    state = tx.init(PARAMS)
    updates, new_state = tx.update(GRADIENTS, state, intermediates=RECORDS)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, GRADIENTS)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((updates, new_state)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_gradients_come_back_in_their_dtype(dtype):
    tx = bnp.scale_by_bnp(LAYERS)
    low = optax.tree.cast(GRADIENTS, dtype)
    updates, state = tx.update(low, tx.init(optax.tree.cast(PARAMS, dtype)), intermediates=RECORDS)
    expected, _ = tx.update(GRADIENTS, tx.init(PARAMS), intermediates=RECORDS)
    chex.assert_trees_all_equal_dtypes(updates, low)
    assert state.mean.dtype == jnp.float32
    chex.assert_trees_all_close(optax.tree.cast(updates, jnp.float32), expected, rtol=0.05, atol=0.05)


def test_parameters_outside_layers_pass_unchanged():
    tx = bnp.scale_by_bnp(LAYERS.select(lambda layer: layer.kind == "Conv"))
    updates, _ = tx.update(GRADIENTS, tx.init(PARAMS), intermediates=RECORDS)
    for name in ("LayerNorm_0", "Dense_0", "Dense_1"):
        chex.assert_trees_all_equal(updates[name], GRADIENTS[name])
    assert np.abs(updates["Conv_0"]["kernel"] - GRADIENTS["Conv_0"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
def test_a_large_offset_in_float32_gives_the_right_update(offset):
    """A feature of a large mean and deviation 1 beside ordinary ones, against float64."""
    rng = np.random.default_rng(0)
    h = rng.normal([offset, 0, 5], 1, (64, 3)).astype(np.float32)
    delta = rng.normal(size=(64, 2)).astype(np.float32)
    gradients = {"w": jnp.asarray(h.T @ delta), "b": jnp.asarray(delta.sum(0))}
    tx = bnp.scale_by_bnp(DENSE, prior_examples=0)
    updates, _ = tx.update(gradients, tx.init(DENSE_PARAMS), intermediates=dense_record(h))
    h, delta = h.astype(np.float64), delta.astype(np.float64)
    q2 = 128 / 64
    expected = paper_dense_step(h, h.T @ delta, delta.sum(0), np.zeros(3), np.ones(3), 0.0, 1e-2, 1e-4, q2=q2)
    np.testing.assert_allclose(updates["w"], expected[0], rtol=1e-2, atol=1e-2)
    # the step at the mean input, where the large terms of kernel and bias cancel; each of them, mu^2 / s of the bias,
    # is rounded a few times to 24 bits
    at_mean = updates["b"] + np.asarray(updates["w"], np.float64).T @ h.mean(0)
    rounding = 4 * 2**-24 * (1 + (h.mean(0) ** 2 / h.var(0)).sum())
    assert np.all(np.abs(at_mean - delta.sum(0) / q2) <= rounding * np.abs(delta).sum(0) / q2)


@given(st.sampled_from(["mixture", "batch"]), st.sampled_from([None, 0, 128]), st.integers(0, 2**16))
def test_three_steps_equal_the_papers_algorithm(variance, prior, seed):
    """The start's weight included; in float32."""
    rng = np.random.default_rng(seed)
    tx = bnp.scale_by_bnp(DENSE, decay=0.9, eps_relative=0.02, eps=1e-3, variance=variance, prior_examples=prior)
    state, seen, mu, var = tx.init(DENSE_PARAMS), 0, np.zeros(3), np.ones(3)
    for examples in (5, 2, 7):
        h, g_w, g_b = rng.normal(2, 3, (examples, 3)), rng.normal(size=(3, 2)), rng.normal(size=2)
        rho = 0.9 if prior is None else min(0.9, (prior + seen) / (prior + seen + examples))
        seen += examples
        g_w, g_b = g_w.astype(np.float32), g_b.astype(np.float32)
        expected_w, expected_b, mu, var = paper_dense_step(
            h, g_w, g_b, mu, var, rho, 0.02, 1e-3, max(128 / examples, 1), mixture=variance == "mixture"
        )
        updates, state = tx.update({"w": jnp.asarray(g_w), "b": jnp.asarray(g_b)}, state, intermediates=dense_record(h))
        np.testing.assert_allclose(updates["w"], expected_w, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(updates["b"], expected_b, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(state["w"].mean.ravel(), mu, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state["w"].variance.ravel(), var, rtol=1e-4, atol=1e-5)
        assert state["w"].seen == seen


def test_the_chain_trains_under_jit_with_one_compilation():
    tx = optax.chain(
        bnp.scale_by_bnp(LAYERS),
        optax.clip_by_global_norm(10.0),
        optax.add_decayed_weights(1e-4),
        optax.sgd(optax.cosine_decay_schedule(0.05, 100), momentum=0.9),
    )
    state, params, traces = tx.init(PARAMS), PARAMS, []

    @jax.jit
    def train_step(params, state):
        traces.append(1)
        gradients, records = gradients_and_records(params, X, Y)
        updates, state = tx.update(gradients, state, params, intermediates=records)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # Optax's schedules mix their integer step with floats
        for _ in range(60):
            params, state = train_step(params, state)
    assert len(traces) == 1
    assert (CNN().apply({"params": params}, X).argmax(-1) == Y).all()


def test_alias_is_the_chain():
    options = {"decay": 0.9, "eps_relative": 0.1, "eps": 1e-3, "variance": "batch", "scaling": "examples"}
    options["prior_examples"] = 16
    alias = bnp.bnp_sgd(0.1, LAYERS, momentum=0.9, nesterov=True, weight_decay=1e-2, **options)
    chain = optax.chain(
        bnp.scale_by_bnp(LAYERS, **options),
        optax.add_decayed_weights(1e-2),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    )
    states = alias.init(PARAMS), chain.init(PARAMS)
    for _ in range(2):
        updates, states = zip(
            *(
                tx.update(GRADIENTS, state, PARAMS, intermediates=RECORDS)
                for tx, state in zip((alias, chain), states, strict=True)
            ),
            strict=True,
        )
        chex.assert_trees_all_equal(*updates)
    assert bnp.bnp_sgd(0.1, LAYERS).update(GRADIENTS, bnp.bnp_sgd(0.1, LAYERS).init(PARAMS), intermediates=RECORDS)


def test_injected_hyperparameters_equal_plain_ones():
    options = {"decay": 0.9, "eps_relative": 0.05, "eps": 1e-3, "prior_examples": 16, "momentum": 0.8}
    plain = bnp.bnp_sgd(0.1, LAYERS, weight_decay=1e-2, **options)
    injected = optax.inject_hyperparams(bnp.bnp_sgd)(0.1, LAYERS, weight_decay=1e-2, **options)
    states = [tx.init(PARAMS) for tx in (plain, injected)]
    for _ in range(2):
        results = [
            tx.update(GRADIENTS, state, PARAMS, intermediates=RECORDS)
            for tx, state in zip((plain, injected), states, strict=True)
        ]
        states = [state for _, state in results]
        chex.assert_trees_all_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-7)


def test_keep_statistics_preconditions_with_the_running_ones():
    """Under decay 0 the statistics are the last batch's, so that keeping them repeats the step."""
    tx = bnp.scale_by_bnp(LAYERS, decay=0.0, prior_examples=None)
    expected, state = tx.update(GRADIENTS, tx.init(PARAMS), intermediates=RECORDS)
    step = jax.jit(lambda g, s, intermediates: tx.update(g, s, intermediates=intermediates))
    kept, same_state = step(GRADIENTS, state, bnp.KEEP_STATISTICS)
    chex.assert_trees_all_close(kept, expected, rtol=1e-5)
    chex.assert_trees_all_equal(same_state, state)


def test_map_params_reaches_the_state():
    """The statistics are no parameters, the momentum's trace is."""
    tx = bnp.bnp_sgd(0.1, LAYERS, momentum=0.9)
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(
        tx,
        lambda leaf, param: leaf + param,
        state,
        PARAMS,
        transform_non_params=lambda leaf: leaf + jnp.ones_like(leaf),
    )
    np.testing.assert_array_equal(mapped[0]["Dense_0"].mean, 1)
    np.testing.assert_array_equal(mapped[0]["Dense_0"].variance, 2)
    chex.assert_trees_all_equal(mapped[2][0].trace, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(mapped, state)


def test_masked_layers_pass_and_a_masked_bias_counts_as_none():
    mask = jax.tree.map(lambda _: True, PARAMS)
    mask["Conv_0"] = {"kernel": False, "bias": True}
    mask["Dense_1"] = {"kernel": True, "bias": False}
    tx = optax.masked(bnp.scale_by_bnp(LAYERS), mask)
    updates, _ = tx.update(GRADIENTS, tx.init(PARAMS), intermediates=RECORDS)
    chex.assert_trees_all_equal(updates["Conv_0"], GRADIENTS["Conv_0"])
    full, _ = bnp.scale_by_bnp(LAYERS).update(GRADIENTS, bnp.scale_by_bnp(LAYERS).init(PARAMS), intermediates=RECORDS)
    chex.assert_trees_all_equal(updates["Dense_0"], full["Dense_0"])

    last = bnp.Layers((bnp.Layer.dense(("Dense_1", "kernel"), (8, 3)),))
    without_bias = bnp.scale_by_bnp(last)
    expected, _ = without_bias.update(GRADIENTS, without_bias.init(PARAMS), intermediates=RECORDS)
    chex.assert_trees_all_equal(updates["Dense_1"], expected["Dense_1"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 1e25])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(bad):
    """1e25 has finite moments, but its square overflows the running variance."""
    tx = bnp.scale_by_bnp(DENSE)
    _, before = tx.update(DENSE_PARAMS, tx.init(DENSE_PARAMS), intermediates=dense_record([[1.0, 2, 3], [2, 2, 0]]))
    updates, after = tx.update(DENSE_PARAMS, before, intermediates=dense_record([[1.0, bad, 3]]))
    for name in ("mean", "variance", "seen"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(before, name))
    assert after["w"].skipped == 1
    chex.assert_tree_all_finite(updates)


def test_only_the_layer_that_is_not_finite_skips():
    tx = bnp.scale_by_bnp(LAYERS)
    records = jax.tree.map(lambda leaf: leaf, RECORDS)
    bad = records["Dense_0"]["kernel_input"]
    records["Dense_0"]["kernel_input"] = bnp.InputMoments(
        bad.mean.at[0, 0, 0].set(np.nan), bad.variance, bad.examples, bad.positions
    )
    _, state = tx.update(GRADIENTS, tx.init(PARAMS), intermediates=records)
    skipped = {name: int(state[name].skipped[0]) for name in state}
    assert skipped == {"Conv_0": 0, "Dense_0": 1, "Dense_1": 0}


def test_counter_of_examples_saturates():
    tx = bnp.scale_by_bnp(DENSE)
    state = tx.init(DENSE_PARAMS)
    almost = with_statistics(state, "w", seen=2**31 - 2)
    _, state = tx.update(DENSE_PARAMS, almost, intermediates=dense_record(np.ones((5, 3))))
    assert state["w"].seen == 2**31 - 1


# What goes wrong, and what the user reads.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), but is 1.0"),
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
    ],
)
def test_options_out_of_range_are_refused(options, message):
    for make in (bnp.scale_by_bnp, lambda layers, **options: bnp.bnp_sgd(0.1, layers, **options)):
        with pytest.raises(ValueError, match=message):
            make(DENSE, **options)


def test_alias_refuses_negative_weight_decay():
    with pytest.raises(ValueError, match="weight_decay must not be negative, but is -1"):
        bnp.bnp_sgd(0.1, DENSE, weight_decay=-1)


def test_layers_of_the_wrong_type_are_refused():
    with pytest.raises(TypeError, match=r"layers must be a bnp_optax\.Layers, .* not CNN"):
        bnp.scale_by_bnp(CNN())


def test_layers_without_a_layer_are_refused():
    for make in (bnp.scale_by_bnp, lambda layers: bnp.preconditioned(optax.adam(1e-3), layers)):
        for layers in (LAYERS.select(lambda layer: False), bnp.Layers(())):
            with pytest.raises(ValueError, match=r"no layer to precondition: .*print\(layers\)"):
                make(layers)


def test_missing_intermediates_are_a_type_error():
    tx = bnp.scale_by_bnp(DENSE)
    with pytest.raises(TypeError, match="intermediates"):
        tx.update(DENSE_PARAMS, tx.init(DENSE_PARAMS))
    with pytest.raises(TypeError, match=r"KEEP_STATISTICS, not NoneType"):
        tx.update(DENSE_PARAMS, tx.init(DENSE_PARAMS), intermediates=None)


def test_missing_records_name_their_layers():
    tx = bnp.scale_by_bnp(LAYERS)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"no record of the input of Conv_0, Dense_0, Dense_1\. .*capture"):
        tx.update(GRADIENTS, state, intermediates={})
    with pytest.raises(ValueError, match=r"input of Dense_1\. .*layers\.select"):
        tx.update(GRADIENTS, state, intermediates={k: v for k, v in RECORDS.items() if k != "Dense_1"})
    with pytest.raises(ValueError, match=r"intermediates=recorded\['intermediates'\]"):
        tx.update(GRADIENTS, state, intermediates={"intermediates": RECORDS})


def test_record_of_another_shape_shows_both_shapes():
    tx = bnp.scale_by_bnp(DENSE)
    with pytest.raises(ValueError, match=r"record of w has moments of shape \(1, 1, 4\), .* \(1, 1, 3\)"):
        tx.update(DENSE_PARAMS, tx.init(DENSE_PARAMS), intermediates=dense_record(np.ones((2, 4))))


def test_layers_of_another_model_are_refused_by_init():
    with pytest.raises(ValueError, match=r"w with shape \(3, 2\), but it has shape \(4, 2\)"):
        bnp.scale_by_bnp(DENSE).init({"w": jnp.ones((4, 2)), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"describes w, which the parameters do not hold\. They hold Conv_0/bias, .*"):
        bnp.scale_by_bnp(DENSE).init(PARAMS)
    with pytest.raises(ValueError, match=r"describes b, which the parameters do not hold"):
        bnp.scale_by_bnp(DENSE).init({"w": jnp.ones((3, 2))})


def test_state_of_another_model_names_the_first_layer_that_differs():
    tx, record = bnp.scale_by_bnp(DENSE), dense_record(np.ones((2, 3)))
    wider = bnp.Layers((bnp.Layer.dense(("w",), (4, 2), bias=("b",)),))
    state = bnp.scale_by_bnp(wider).init({"w": jnp.ones((4, 2)), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"of w have shape \(1, 1, 4\), but the layers need \(1, 1, 3\).* restore"):
        tx.update(DENSE_PARAMS, state, intermediates=record)
    with pytest.raises(ValueError, match=r"moments of w have shape None, but the layers need \(1, 1, 3\)"):
        tx.update(DENSE_PARAMS, bnp.scale_by_bnp(LAYERS).init(PARAMS), intermediates=record)
    cut = dataclasses.replace(tx.init(DENSE_PARAMS), damping=jnp.zeros(7))
    with pytest.raises(ValueError, match=r"The state's damping has shape \(7,\), but the layers need \(1,\)"):
        tx.update(DENSE_PARAMS, cut, intermediates=record)


def test_what_is_no_state_is_refused_with_a_word_about_old_ones():
    old = {name: {"w": jnp.zeros((1, 1, 3)), "b": 0} for name in ("mean", "variance", "scale", "seen", "skipped")}
    with pytest.raises(TypeError, match=r"what init returned, not dict\. A state of bnp_optax from before 0\.1"):
        bnp.scale_by_bnp(DENSE).update(DENSE_PARAMS, old, intermediates=dense_record(np.ones((2, 3))))
    tx = bnp.preconditioned(optax.identity(), DENSE)
    for state, name in ((old, "dict"), (tx.init(DENSE_PARAMS).statistics, "Statistics"), ((), "tuple")):
        with pytest.raises(TypeError, match=rf"what init returned, not {name}\. A state of bnp_optax from before 0\.1"):
            tx.update(DENSE_PARAMS, state, intermediates=dense_record(np.ones((2, 3))))


@pytest.mark.parametrize("prior", [None, 0, 128])
def test_layer_without_positions_keeps_its_state_and_counts_nothing(prior):
    tx = bnp.scale_by_bnp(DENSE, prior_examples=prior)
    _, before = tx.update(DENSE_PARAMS, tx.init(DENSE_PARAMS), intermediates=dense_record([[1.0, 2, 3], [2, 2, 0]]))
    empty = jax.tree.map(jnp.zeros_like, dense_record(np.ones((2, 3))))
    for state in (before, tx.init(DENSE_PARAMS)):
        _, after = tx.update(DENSE_PARAMS, state, intermediates=empty)
        chex.assert_trees_all_equal(after, state)
