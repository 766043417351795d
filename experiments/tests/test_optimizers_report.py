"""The tables and figures of every optimizer, on rows as no program made them."""

import dataclasses
import math

import numpy as np
import pytest

import language_model
import optimizers_report
import runs
from protocol import Outcome, Trial

ANY_TRIAL = Trial("cifar-10", "5-layer CNN", "Adam", 4, 0.001, 100, 0)


def make_outcomes(method, batch_size, by_rate, tests):
    def outcome(rate, seed, validation, test):
        trial = dataclasses.replace(ANY_TRIAL, method=method, batch_size=batch_size, rate=rate, seed=seed)
        return Outcome(**dataclasses.asdict(trial), commit="abc", seconds=1.0, train_loss=0.5,
                       validation_accuracy=validation, test_accuracy=test, measure=math.nan)  # fmt: skip

    best = max(by_rate, key=by_rate.get)
    return [
        *(outcome(rate, 0, validation, math.nan) for rate, validation in by_rate.items()),
        *(outcome(best, seed, 0.0, test) for seed, test in enumerate(tests, start=1)),
    ]


OUTCOMES = [
    *make_outcomes("Adam", 128, {0.001: 50.0, 0.003: 60.0}, [58.0, 60.0, 65.0]),
    *make_outcomes("Adam + BN", 128, {0.001: 50.0, 0.003: 40.0}, [61.0, 61.0]),
    *make_outcomes("BNP(Adam)", 128, {0.001: 55.0, 0.003: 40.0}, [60.96, 61.0]),
    *make_outcomes("Adam", 4, {0.001: 50.0}, [50.0]),
    *make_outcomes("Adam + BN", 4, {0.001: 30.0}, [9.6]),
    *make_outcomes("BNP(Muon)", 4, {0.001: 30.0}, []),  # whose last runs are still to come
]


def test_the_summary_has_means_of_the_seeds_at_the_best_rate():
    lines = optimizers_report.summary_table(OUTCOMES).splitlines()
    assert lines[0] == "| network | optimizer | batch | alone | with BN | in BNP's variables |"
    assert lines[2:] == [
        "| CIFAR-10, 5-layer CNN | Adam | 128 | **61.0** | **61.0** | **61.0** |",
        "| CIFAR-10, 5-layer CNN | Adam | 4 | **50.0** | 9.6 |  |",
    ]


def test_the_figure_says_what_falls_below_its_axis():
    figure = optimizers_report.by_batch_size(OUTCOMES, ANY_TRIAL.setting)
    panel = figure.axes[1]
    assert panel.get_title() == "Adam"
    assert [text.get_text() for text in panel.texts] == ["10"]
    assert panel.lines[0].get_ydata().tolist() == [61.0, 50.0]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["128", "4"]
    low, high = figure.axes[2].get_ylim()
    assert low == optimizers_report.LOWEST
    assert high > 65  # the highest of all panels


def test_a_line_breaks_where_a_size_has_not_run():
    between = make_outcomes("Adam", 32, {0.001: 50.0}, [55.0])
    alone, with_bn, in_variables = optimizers_report.by_batch_size(OUTCOMES + between, ANY_TRIAL.setting).axes[1].lines
    assert alone.get_ydata().tolist() == [61.0, 55.0, 50.0]
    np.testing.assert_array_equal(with_bn.get_ydata(), [61.0, np.nan, 9.6])
    np.testing.assert_allclose(in_variables.get_ydata(), [60.98, np.nan, np.nan])


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    runs.append_rows(tmp_path / "e8.csv", OUTCOMES[::-1])  # as where batches of 4 were trained before those of 128
    texts, figures = optimizers_report.make(tmp_path)
    assert texts["every_optimizer"] == optimizers_report.summary_table(OUTCOMES)
    panel = figures["every_optimizer"].axes[1]
    assert [line.get_xdata().tolist() for line in panel.lines[:2]] == [[0, 1], [0, 1]]


def test_the_part_of_the_steps_until_a_loss():
    curve = np.array([4.0, 3.0, 2.0, 1.5])
    assert optimizers_report.part_of_steps(curve, 2.0) == 0.75
    assert optimizers_report.part_of_steps(curve, 2.5) == 0.625
    assert optimizers_report.part_of_steps(curve, 5.0) == 0.25  # no later than that
    assert optimizers_report.part_of_steps(curve, 1.4) == np.inf
    assert optimizers_report.part_text(np.array([0.5, 0.7])) == "0.60 (0.50 to 0.70)"
    assert optimizers_report.part_text(np.array([0.5, np.inf])) == "never in 1 of 2"
    assert optimizers_report.part_text(np.array([np.inf])) == "never"


def make_losses(method, rate, seed, curve, milliseconds=2.0, steps=4, network="LayerNorm"):
    test = 1.0 if seed else math.nan
    return language_model.Outcome(network, method, rate, steps, seed, "abc", milliseconds, curve, test)


def test_the_language_model_is_judged_by_steps_and_by_time(tmp_path):
    outcomes = [
        *(make_losses("Adam", rate, 0, f"4 3 2 {end}") for rate, end in ((0.1, 1.5), (0.3, 1.0), (1.0, 2.0))),
        *(make_losses("Adam", 0.3, seed, "4 3 2 1") for seed in (1, 2)),
        *(make_losses("BNP(Adam)", rate, 0, f"4 3 2 {end}") for rate, end in ((0.1, 0.5), (0.3, 1.0))),
        make_losses("BNP(Adam)", 0.1, 1, "4 2 1 0.5", 3.0),
        make_losses("BNP(Adam)", 0.1, 2, "2 1 0.7 0.5", 3.0),
        make_losses("BNP(Adam)", 0.1, 1, "2 1", 3.0, steps=2),
        # from before the grid was refined, when another rate was the best
        make_losses("BNP(Adam)", 0.3, 1, "4 3 2 1.5", 3.0),
        make_losses("BNP(Adam)", 0.3, 1, "4 3", 3.0, steps=2),
    ]
    runs.append_rows(tmp_path / "e7.csv", outcomes)
    rows = runs.read_rows(tmp_path / "e7.csv", language_model.Outcome)
    assert rows[3] == outcomes[3]
    lines = optimizers_report.language_model_table(rows).splitlines()[2:]
    assert lines == [
        "| LayerNorm | Adam | 0.3 | 1.000 | 1.000 | 1.000 to 1.000 | 2.0 |  |  |  |",
        "| LayerNorm | BNP(Adam) | 0.1 (edge of the grid) | 0.500 | 1.000 | 1.000 to 1.000 | 3.0 "
        "| 0.62 (0.50 to 0.75) | 0.94 (0.75 to 1.12) | 1.000 |",
    ]
    panels = optimizers_report.along_training(rows).axes
    assert [panel.get_xlabel() for panel in panels] == ["steps", "seconds of training"]
    np.testing.assert_allclose(panels[1].lines[1].get_xdata(), [0.003, 0.006, 0.009, 0.012])


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no finished experiment: none of e8_defaults\.csv, e8\.csv"):
        optimizers_report.make(tmp_path)
