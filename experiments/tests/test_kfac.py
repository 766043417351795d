"""K-FAC beside the other optimizers: what it is made of, and a short form where kfac-jax is installed."""

import importlib.util

import jax
import numpy as np
import pytest

import kfac
import optimizers
import runs
import settings
import trials
from programs import UserError
from protocol import Outcome, Trial


def test_trainings_are_those_of_the_other_optimizers():
    setting = settings.SETTINGS[kfac.SETTING]
    trainings = kfac.tuning(quick=False)
    others = [t for t in optimizers.tuning([kfac.SETTING], False) if t.batch_size == kfac.BATCH_SIZE]
    assert {(t.data, t.setting, t.steps) for t in trainings} == {(t.data, t.setting, t.steps) for t in others}
    assert setting.examples == kfac.EXAMPLES
    assert kfac.MOMENTUM == optimizers.MOMENTUM


def test_it_runs_only_if_it_is_named(monkeypatch):
    ran = []
    monkeypatch.setattr(trials, "run", lambda experiment, output, *_: ran.append(output.stem))
    monkeypatch.setattr(trials, "report", lambda *_: ({}, {}))
    optimizers.main([])
    assert set(ran) == set(optimizers.EXPERIMENTS) - {"e8_kfac"}
    ran.clear()
    optimizers.main(["e8_kfac"])
    assert ran == ["e8_kfac"]


def test_without_kfac_jax_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="kfac-jax from its main branch: pip install git"):
        kfac.task(kfac.tuning(quick=True)[0])


def test_a_step_at_a_large_damping_is_one_of_gradient_descent():
    pytest.importorskip("kfac_jax")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4, 4, 1)).astype(np.float32), rng.integers(0, 10, 6)
    damping = 1e8  # it enters both factors as a square root
    task = kfac.task(Trial("digits", kfac.SETTING, f"K-FAC, damping={damping:g}", 6, 0.0, 1, 0))
    state = task.init(jax.random.key(0), x[:1])
    after, loss = jax.jit(task.step)(state, 0.1 * damping, x, y)

    def cross_entropy(params):
        logits = kfac.models.MLP().apply({"params": params}, x)
        return -jax.nn.log_softmax(logits)[np.arange(6), y].mean()

    expected, gradients = jax.value_and_grad(cross_entropy)(state.params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for before, g, now in zip(*map(jax.tree.leaves, (state.params, gradients, after.params)), strict=True):
        np.testing.assert_allclose(now - before, -0.1 * g, rtol=0, atol=1e-2 * abs(0.1 * g).max())


def test_a_short_form(tmp_path, capsys):
    pytest.importorskip("kfac_jax")
    optimizers.main(["e8_kfac", "--quick", "--results", str(tmp_path), "--workers", "1"])
    outcomes = runs.read_rows(tmp_path / "e8_kfac.csv", Outcome)
    assert [(outcome.method, outcome.seed) for outcome in outcomes] == [("K-FAC, damping=1", seed) for seed in (0, 1)]
    assert "K-FAC" in capsys.readouterr().out
