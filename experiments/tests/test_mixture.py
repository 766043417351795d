"""The experiment on Mixture Normalization, in a short form, and its networks."""

import jax
import numpy as np
import pytest

import methods
import methods_report
import mixture
from mixture import METHODS


def test_the_experiment_in_a_short_form(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "METHODS", METHODS[::3])
    methods.main(["mixture", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, _ = methods_report.make(tmp_path)
    for method in METHODS[::3]:
        row = f"| digits | 5 layers, one BN replaced | 128 | {method} |"
        assert row in texts["mixture"]
        assert row in texts["mixture_rates"]
        (timed,) = [line for line in texts["mixture_steps"].splitlines() if f"| {method} |" in line]
        assert float(timed.split("|")[2]) > 0


def state_and_logits(method, x):
    made = mixture.training(method)
    state = jax.jit(made.init)(jax.random.key(0), x)
    return state, jax.jit(made.predict)(state, x)


def test_one_layer_is_replaced_and_one_component_is_bn():
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    results = {method: state_and_logits(method, x) for method in METHODS}
    np.testing.assert_allclose(results["MN, 1 component"][1], results["BN"][1], rtol=1e-5, atol=1e-6)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(state.params)) for state, _ in results.values()]
    assert len(set(sizes)) == 1
    statistics = {method: state.batch_stats for method, (state, _) in results.items()}
    assert [own.keys() - statistics["BN"].keys() for own in statistics.values()] == [set(), set()] + [
        {"MixtureNorm_0"}
    ] * 2
    assert statistics["MN, 3 components"]["MixtureNorm_0"]["component_mean"].shape == (3, mixture.WIDTHS[-1])
    scales = [state.params[f"BatchNorm_{k}"]["scale"][0] for state, _ in [results["BN, scale 1.73"]] for k in range(4)]
    np.testing.assert_allclose(scales, [1, 1, 3**0.5, 1], rtol=1e-6)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"no method 'IN'; there are BN, BN, scale 1\.73, MN"):
        state_and_logits("IN", np.ones((1, 8, 8, 3), np.float32))


def test_every_method_gets_the_same_rates():
    trials = mixture.tuning(quick=False)
    assert len({trial.rate for trial in trials}) * len(METHODS) == len(trials)
    assert {trial.seed for trial in trials} == {0}
