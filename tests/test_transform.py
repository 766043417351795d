"""scale_by_bnp: its state, the paper's algorithm step for step, training in a chain; and its alias bnp_sgd.

What it shares with the other transformations is in test_contract.py and test_wrappers.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import compiled, cross_entropy, gradients_and_records, init, make_step, normal
from hypothesis import given
from hypothesis import strategies as st
from oracles import absorbed, bnp_step, running_decay
from transformations import DENSE, Net, dense_params, dense_record, problem

import bnp_optax as bnp


def test_state_holds_every_layer_by_its_path():
    layers = problem().layers
    state = bnp.scale_by_bnp(layers, eps_relative=0.5, eps=0.25).init(problem().params)
    assert set(state) == set(layers) == {"Conv_0", "Dense_0", "Dense_1"}
    assert len(state) == 3
    assert state["Conv_0"].mean.shape == state["Conv_0"].variance.shape == (1, 2, 1)
    assert state["Conv_0"].damping.shape == (1, 2)
    assert state["Dense_0"].scale.shape == state["Dense_0"].seen.shape == state["Dense_0"].skipped.shape == (1,)
    for layer in (state[path] for path in state):
        values = {"mean": 0, "variance": 1, "damping": 0.75, "scale": 1, "seen": 0, "skipped": 0}
        expected = {name: jnp.full_like(x, values[name]) for name, x in layer._asdict().items()}
        chex.assert_trees_all_equal(layer._asdict(), expected)
        assert {leaf.dtype for leaf in layer} == {jnp.dtype("float32"), jnp.dtype("int32")}
    with pytest.raises(KeyError):
        state["LayerNorm_0"]


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
def test_a_large_offset_in_float32_gives_the_right_update(offset):
    """A feature of a large mean and deviation 1 beside ordinary ones, against float64."""
    rng = np.random.default_rng(0)
    h = rng.normal([offset, 0, 5], 1, (64, 3)).astype(np.float32)
    delta = rng.normal(size=(64, 2)).astype(np.float32)
    gradients = {"w": jnp.asarray(h.T @ delta), "b": jnp.asarray(delta.sum(0))}
    tx = bnp.scale_by_bnp(DENSE, prior_examples=0)
    updates, _ = tx.update(gradients, tx.init(dense_params()), intermediates=dense_record(h))
    h, delta = h.astype(np.float64), delta.astype(np.float64)
    q2 = 128 / 64
    kernel, _ = bnp_step(h.mean(0), h.var(0), h.T @ delta, delta.sum(0), q2)
    np.testing.assert_allclose(updates["w"], kernel, rtol=1e-2, atol=1e-2)
    # the step at the mean input, where the large terms of kernel and bias cancel; each of them, mu^2 / s of the bias,
    # is rounded a few times to 24 bits
    at_mean = updates["b"] + np.asarray(updates["w"], np.float64).T @ h.mean(0)
    rounding = 4 * 2**-24 * (1 + (h.mean(0) ** 2 / h.var(0)).sum())
    assert np.all(np.abs(at_mean - delta.sum(0) / q2) <= rounding * np.abs(delta).sum(0) / q2)


@pytest.mark.parametrize("prior", [None, 0, 128])
@pytest.mark.parametrize("variance", ["mixture", "batch"])
def test_three_steps_equal_the_papers_algorithm(variance, prior):
    """The start's weight included; in float32."""
    eps = (0.02, 1e-3)
    options = {"decay": 0.9, "eps_relative": eps[0], "eps": eps[1], "variance": variance, "prior_examples": prior}
    tx = compiled(bnp.scale_by_bnp(DENSE, **options))

    @given(st.integers(0, 2**16))
    def run(seed):
        rng = np.random.default_rng(seed)
        state, seen, statistics = tx.init(dense_params()), 0, (np.zeros(3), np.ones(3))
        for examples in (5, 2, 7):
            h = rng.normal(2, 3, (examples, 3))
            g_w, g_b = (rng.normal(size=size).astype(np.float32) for size in ((3, 2), 2))
            statistics = absorbed(*statistics, h, running_decay(0.9, prior, seen, examples), variance)
            seen += examples
            expected_w, expected_b = bnp_step(*statistics, g_w, g_b, max(128 / examples, 1), eps)
            gradients = {"w": jnp.asarray(g_w), "b": jnp.asarray(g_b)}
            updates, state = tx.update(gradients, state, intermediates=dense_record(h))
            np.testing.assert_allclose(updates["w"], expected_w, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(updates["b"], expected_b, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(state["w"].mean.ravel(), statistics[0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(state["w"].variance.ravel(), statistics[1], rtol=1e-4, atol=1e-5)
            assert state["w"].seen == seen

    run()


def test_the_chain_trains_under_jit_with_one_compilation():
    model, x = Net(), normal(0, 16, 6, 6, 2)
    y = jnp.asarray(np.random.default_rng(1).integers(0, 3, 16))
    params = init(model, x)
    tx = optax.chain(
        bnp.scale_by_bnp(bnp.linen.find_layers(model, x)),
        optax.clip_by_global_norm(10.0),
        optax.add_decayed_weights(1e-4),
        optax.sgd(optax.cosine_decay_schedule(0.05, 100), momentum=0.9),
    )
    step, state, traces = make_step(tx, gradients_and_records(model, cross_entropy)), tx.init(params), []

    @jax.jit
    def counted(*args):
        traces.append(1)
        return step(*args)

    with jax.numpy_dtype_promotion("standard"):  # Optax's schedules mix their integer step with floats
        for _ in range(60):
            params, state = counted(params, state, x, y)
    assert len(traces) == 1
    assert (model.apply({"params": params}, x).argmax(-1) == y).all()


def test_alias_is_the_chain():
    p = problem()
    options = {"decay": 0.9, "eps_relative": 0.1, "eps": 1e-3, "variance": "batch", "scaling": "examples"}
    options["prior_examples"] = 16
    alias = compiled(bnp.bnp_sgd(0.1, p.layers, momentum=0.9, nesterov=True, weight_decay=1e-2, **options))
    chain = optax.chain(
        bnp.scale_by_bnp(p.layers, **options),
        optax.add_decayed_weights(1e-2),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    )
    chain = compiled(chain)
    state, chain_state = alias.init(p.params), chain.init(p.params)
    for _ in range(2):
        updates, state = alias.update(p.gradients, state, p.params, intermediates=p.records)
        expected, chain_state = chain.update(p.gradients, chain_state, p.params, intermediates=p.records)
        chex.assert_trees_all_equal(updates, expected)


def test_the_alias_without_weight_decay_needs_no_parameters():
    p, tx = problem(), compiled(bnp.bnp_sgd(0.1, problem().layers))
    updates, _ = tx.update(p.gradients, tx.init(p.params), intermediates=p.records)
    expected, _ = tx.update(p.gradients, tx.init(p.params), p.params, intermediates=p.records)
    chex.assert_trees_all_equal(updates, expected)


@pytest.mark.usefixtures("standard_promotion")
def test_the_aliass_own_hyperparameters_may_be_injected_as_numbers_and_schedules():
    p = problem()
    options = {"decay": 0.9, "eps_relative": 0.05, "eps": 1e-3, "prior_examples": 16, "momentum": 0.8}
    schedule = optax.linear_schedule(0.1, 0.02, 4)
    inject = optax.inject_hyperparams(bnp.bnp_sgd)
    plain = compiled(bnp.bnp_sgd(schedule, p.layers, weight_decay=1e-2, **options))
    injected = compiled(inject(schedule, p.layers, weight_decay=1e-2, **options))
    state, injected_state = plain.init(p.params), injected.init(p.params)
    for _ in range(4):
        expected, state = plain.update(p.gradients, state, p.params, intermediates=p.records)
        updates, injected_state = injected.update(p.gradients, injected_state, p.params, intermediates=p.records)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)


def test_alias_refuses_negative_weight_decay():
    with pytest.raises(ValueError, match="weight_decay must not be negative, but is -1"):
        bnp.bnp_sgd(0.1, DENSE, weight_decay=-1)
