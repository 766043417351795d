"""The experiment on PSI-SGD, in a short form, and its starts."""

import jax
import jax.numpy as jnp
import numpy as np

import methods
import methods_report
import psi_sgd
from protocol import Trial

METHODS = ("SGD", "PSI-SGD")


def test_the_experiment_in_a_short_form(tmp_path, capsys):
    methods.main(["psi_sgd", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, drawn = methods_report.make(tmp_path)
    assert set(texts) >= {"psi_sgd", "psi_sgd_losses"}
    assert "psi_sgd" in drawn
    assert "| digits | scales 1, 1 | 128 | PSI-SGD |" in capsys.readouterr().out
    header, _, *rows = (line.strip("| ").split(" | ") for line in texts["psi_sgd_losses"].splitlines())
    assert header == ["method", "rate", "scales 1, 1", "scales 100, 0.01"]
    for method, _, *losses in rows:
        balanced, unbalanced = map(float, losses)
        assert np.isclose(balanced, unbalanced, atol=2e-3) == (method == "PSI-SGD")


def test_every_start_is_the_same_network():
    """Up to epsilon, and its kernels are not of one size."""
    x = jax.random.normal(jax.random.key(0), (16, 4, 4, 1))
    logits = {}
    for name, setting in psi_sgd.SETTINGS.items():
        state = psi_sgd.task(Trial("digits", name, "PSI-SGDM", 16, 0.0, 1, 0)).init(jax.random.key(1), x[:1])
        ratio = jnp.std(state.params["first"]["kernel"]) / jnp.std(state.params["second"]["kernel"])
        assert (ratio > 1e3) == (setting.first > 1)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits[name], _ = psi_sgd.Network(setting.epsilon).apply(variables, x, train=True, mutable=["batch_stats"])
    expected = logits.pop("scales 1, 1")
    usual = logits.pop("scales 10000, 0.0001; epsilon 1e-5")
    for other in logits.values():
        np.testing.assert_allclose(other, expected, atol=5e-3)
    assert np.abs(usual - expected).max() > 0.1


def test_every_method_gets_the_same_rates_from_every_start():
    trials = psi_sgd.tuning(quick=False)
    settings = {(trial.setting, trial.rate, trial.steps) for trial in trials}
    assert len(settings) * len(psi_sgd.METHODS) == len(trials)
    assert {trial.seed for trial in trials} == {0}
    assert set(psi_sgd.SHOWN_RATES) <= {trial.rate for trial in trials}
