"""The experiment on trajectory regularization: its optimizers, its noise, and the quick form."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import images
import methods
import methods_report
import trajectory
from protocol import Trial
from trajectory import METHODS, QUICK_SETTINGS, make_optimizer


@pytest.mark.parametrize(("method", "factor"), [("SGD", 1.0), ("SGD, 0.293 of the rate", 0.2928968)])
def test_the_baselines_are_sgd_whose_rate_falls_twice(method, factor):
    tx, w = make_optimizer(METHODS[method], 0.5, 8), jnp.ones(2)
    state, trace = tx.init(w), 0.0
    for rate in (0.5, 0.5, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005):
        updates, state = tx.update(w, state, w)
        trace = 0.9 * trace + 1
        np.testing.assert_allclose(updates, -factor * rate * trace, rtol=1e-6)


def test_the_parts_of_the_method():
    """After a step from 1 to 0.5, whose gradient is 1: the pull is 0.2 times -0.5, the division by 2."""
    expected = {"trajectory-regularized": 1.9 - 0.1, "pull alone": 1.9 - 0.1, "shorter steps alone": 1.9}
    for name, trace in expected.items():
        tx = make_optimizer(METHODS[name], 0.5, 100)
        w = jnp.ones(())
        state = tx.init(w)
        for _ in range(2):
            updates, state = tx.update(jnp.ones(()), state, w)
            w = w + updates
        np.testing.assert_allclose(updates, -0.5 * trace / (1 if name == "pull alone" else 2), rtol=1e-6)


def test_the_pull_grows_as_the_rate_falls():
    tx = make_optimizer(METHODS["pull alone"]._replace(period=100), 1.0, 8)
    state = tx.init(jnp.ones(()))._replace(anchor=jnp.zeros(()))
    state = state._replace(inner=optax.tree.zeros_like(state.inner))
    for count, pull in ((1, 0.2), (5, 2.0), (7, 20.0)):
        own = state._replace(count=jnp.asarray(count))
        _, after = tx.update(jnp.zeros(()), own, jnp.ones(()))
        np.testing.assert_allclose(after.inner[0].trace, pull, rtol=1e-5)


def test_three_tenths_of_the_labels_are_drawn_anew_the_same_for_every_seed():
    split = images.Split(np.zeros((4000, 2, 2, 1), np.uint8), np.zeros(4000, np.int32))
    counts = []
    for seed in (0, 1):
        trial = Trial("mnist", "30 % random labels, 8", "SGD", 8, 0.1, 1, seed)
        drawn = trajectory.batches(trial, split)
        counts.append(np.bincount(np.concatenate([next(drawn).labels for _ in range(500)]), minlength=10))
    np.testing.assert_array_equal(*counts)
    np.testing.assert_allclose(counts[0][1:] / 4000, 0.03, atol=0.01)
    clean = trajectory.batches(Trial("mnist", "clean labels, 8", "SGD", 8, 0.1, 1, 0), split)
    assert not next(clean).labels.any()


def test_the_experiment_in_a_short_form(tmp_path, capsys):
    methods.main(["trajectory", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, drawn = methods_report.make(tmp_path)
    assert set(texts) == {"trajectory", "trajectory_rates"}
    assert len(texts["trajectory"].splitlines()) == 2 + len(QUICK_SETTINGS) * len(METHODS)
    assert [line.get_label() for line in drawn["trajectory"].axes[0].get_lines()] == list(METHODS)
    assert "| digits | clean labels, 2 | 2 | trajectory-regularized |" in capsys.readouterr().out
