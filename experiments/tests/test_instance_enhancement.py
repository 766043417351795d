"""The experiment on Instance Enhancement Batch Normalization, in a short form, and its networks."""

import jax
import numpy as np
import pytest

import instance_enhancement
import methods
import methods_report
from instance_enhancement import METHODS
from protocol import Trial


def test_the_experiment_in_a_short_form(tmp_path, monkeypatch):
    monkeypatch.setattr(instance_enhancement, "METHODS", METHODS[::2])
    methods.main(["instance_enhancement", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, _ = methods_report.make(tmp_path)
    for method in METHODS[::2]:
        row = f"| digits | 3 convolutions | 64 | {method} |"
        assert row in texts["instance_enhancement"]
        assert row in texts["instance_enhancement_rates"]


def logits(method, x):
    made = instance_enhancement.task(Trial("cifar-10", "", method, 64, 0.0, 1, 0))
    state = jax.jit(made.init)(jax.random.key(0), x)
    return state, jax.jit(made.predict)(state, x)


def test_the_control_begins_as_the_function_of_iebn_and_not_of_bn():
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    results = {method: logits(method, x) for method in METHODS}
    np.testing.assert_allclose(results["BN, scale 0.269"][1], results["IEBN"][1], rtol=1e-5, atol=1e-6)
    assert np.abs(results["BN"][1] - results["IEBN"][1]).max() > 0.01
    sizes = {method: sum(leaf.size for leaf in jax.tree.leaves(state.params)) for method, (state, _) in results.items()}
    assert sizes["IEBN"] == sizes["BN"] + 2 * sum(instance_enhancement.WIDTHS)
    assert sizes["BN, scale 0.269"] == sizes["BN"]


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"no method 'IN'; there are BN, BN, scale 0\.269, IEBN"):
        logits("IN", np.ones((1, 8, 8, 3), np.float32))


def test_every_method_gets_the_same_rates():
    trials = instance_enhancement.tuning(quick=False)
    assert len({trial.rate for trial in trials}) * len(METHODS) == len(trials)
    assert {trial.seed for trial in trials} == {0}
