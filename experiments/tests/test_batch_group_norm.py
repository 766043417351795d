"""The experiment on Batch Group Normalization, in a short form, and its networks."""

import jax
import numpy as np
import pytest

import batch_group_norm
import methods
import methods_report
from protocol import Trial


def test_the_experiment_in_a_short_form(tmp_path, capsys):
    methods.main(["batch_group_norm", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, drawn = methods_report.make(tmp_path)
    assert "batch_group_norm" in drawn
    printed = capsys.readouterr().out
    for size in (2, 64):
        for method in ("BN", "BGN, 2 groups"):
            assert f"| digits | batches of {size} | {size} | {method} |" in printed
            assert f"| batches of {size} | {size} | {method} |" in texts["batch_group_norm"]


@pytest.mark.parametrize(
    ("method", "statistics"),
    [
        ("BN", (8, 16, 32)),
        ("GN", ()),
        ("BGN, 1 group", (1, 1, 1)),
        ("BGN, 8 groups", (8, 8, 8)),
        ("BGN, 32 groups", (32, 32, 32)),
    ],
)
def test_networks_differ_in_their_statistics_alone(method, statistics):
    """Also the first layer of 8 channels has 32 groups, and the last of 32 channels is then BN's."""
    trial, x = Trial("cifar-10", "", method, 2, 0.0, 1, 0), np.ones((1, 32, 32, 3), np.float32)
    state = batch_group_norm.task(trial).init(jax.random.key(0), x)
    sizes = [leaf.size for leaf in jax.tree.leaves(state.batch_stats)]
    assert sorted(sizes) == sorted([size for size in statistics for _ in range(2)])
    expected = batch_group_norm.task(Trial("cifar-10", "", "BN", 2, 0.0, 1, 0)).init(jax.random.key(0), x)
    np.testing.assert_array_equal(state.params["Conv_1"]["kernel"], expected.params["Conv_1"]["kernel"])
    shapes, expected_shapes = (
        sorted(leaf.shape for leaf in jax.tree.leaves(tree)) for tree in (state.params, expected.params)
    )
    assert shapes == expected_shapes


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="no method 'IN'; there are BN, GN, BGN"):
        batch_group_norm.task(Trial("", "", "IN", 2, 0.0, 1, 0)).init(jax.random.key(0), np.ones((1, 8, 8, 3)))


def test_every_method_gets_the_same_rates_with_all_batches():
    trials = batch_group_norm.tuning(quick=False)
    settings = {(trial.setting, trial.batch_size, trial.rate, trial.steps) for trial in trials}
    assert len(settings) * len(batch_group_norm.STYLES) == len(trials)
    assert {trial.seed for trial in trials} == {0}
