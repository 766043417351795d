"""The experiment on the warm-up by effective learning rates, in a short form, and what it measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax as bnp
import methods
import methods_report
import warm_up
from bnp_optax.contrib import effective_learning_rates, spread
from protocol import Trial


def test_the_experiment_in_a_short_form(tmp_path, capsys):
    methods.main(["warm_up", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, drawn = methods_report.make(tmp_path)
    assert set(texts) >= {"warm_up", "warm_up_high"}
    assert "warm_up" in drawn
    assert "| digits | 5 hidden layers | 128 | warm-up, max |" in capsys.readouterr().out
    header, _, *rows = (line.strip("| ").split(" | ") for line in texts["warm_up_high"].splitlines())
    assert header[-1] == "mean spread (decades)"
    assert [row[1:3] for row in rows] == [[rate, method] for rate in ("0.1", "1") for method in warm_up.METHODS]


@pytest.mark.parametrize("method", ["SGD", "warm-up, max"])
def test_the_measure_is_the_mean_spread_of_the_hidden_layers(method):
    """Before every step; and the first step of the warm-up is at the critical rate of them."""
    x, y = jax.random.normal(jax.random.key(0), (32, 4, 4, 1)), jnp.arange(32) % 10
    task = warm_up.task(Trial("digits", warm_up.setting(3), method, 32, 0.0, 1, 0))
    model = warm_up.Network(3)
    state, step, expected = task.init(jax.random.key(1), x[:1]), jax.jit(task.step), []
    for k in range(3):

        def loss(params):
            logits, _ = model.apply({"params": params}, x, mutable=["batch_stats"])
            return -jax.nn.log_softmax(logits)[jnp.arange(32), y].mean()

        layers = bnp.linen.find_layers(model, x).select(lambda layer: layer.path != "classifier")
        assert len(layers) == 3
        rates = effective_learning_rates(jax.grad(loss)(state.params), state.params, layers)
        expected.append(float(spread(rates)))
        state, _ = step(state, jnp.float32(20.0), x, y)
        if k == 0 and method != "SGD":
            np.testing.assert_allclose(state.optimizer.rate, 1 / max(rates.values()), rtol=1e-4)
    np.testing.assert_allclose(task.measure(state), np.mean(expected), rtol=1e-4)


def test_every_method_gets_the_same_rates():
    trials = warm_up.tuning(quick=False)
    settings = {(trial.setting, trial.rate, trial.steps) for trial in trials}
    assert len(settings) * len(warm_up.METHODS) == len(trials)
    further = warm_up.further(quick=False)
    assert {trial.rate for trial in further} == {0.1, 0.3, 1.0}
    assert {trial.seed for trial in further} == {1, 2, 3}
