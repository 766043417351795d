"""How trainings are compared, on rows of which only the rates and accuracies matter."""

import dataclasses
import itertools
import math

import pytest

import protocol
from protocol import Outcome, Trial

ANY_TRIAL = Trial("digits", "linear", "SGD", 32, 0.1, 20, 0)


def make_outcome(rate, accuracy, loss=0.1, test=None, **changes):
    trial = dataclasses.replace(ANY_TRIAL, rate=rate, **changes)
    test = math.nan if test is None else test
    return Outcome(**dataclasses.asdict(trial), commit="abc", seconds=1.0, train_loss=loss,
                   validation_accuracy=accuracy, test_accuracy=test, measure=math.nan)  # fmt: skip


def test_the_best_has_the_highest_accuracy_then_the_lowest_rate_and_did_not_diverge():
    tuning = [
        make_outcome(0.3, 90.0),
        make_outcome(0.1, 90.0),
        make_outcome(1.0, 95.0, math.nan),
        make_outcome(0.03, 80.0),
    ]
    for order in itertools.permutations(tuning):
        assert protocol.best(order).rate == 0.1


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([80, 90, 89.5, 70], (0.1, 0.3)),
        ([90, 90, 88, 89.9], (0.03, 0.1)),  # the last one is no neighbour
        ([89.9, 80, 90, 85], (0.3, 0.3)),  # nor the first
        ([10, 20, 30, 40], (1.0, 1.0)),
        ([50, 50, 50, 50], (0.03, 1.0)),
        ([89, 90, 89, 88], (0.03, 0.3)),
    ],
)
def test_windows_are_neighbours_of_the_best(accuracies, expected):
    rates = (0.03, 0.1, 0.3, 1.0)
    tuning = [make_outcome(rate, accuracy) for rate, accuracy in zip(rates, accuracies, strict=True)]
    assert protocol.window(tuning[::-1]) == expected
    diverged = [dataclasses.replace(outcome, train_loss=math.inf) for outcome in tuning[2:]]
    high = protocol.window([*tuning[:2], *diverged])[1]
    assert high <= 0.1


def test_cells_differ_in_more_than_rate_and_seed():
    outcomes = [make_outcome(0.1, 90.0), make_outcome(0.3, 80.0, seed=2), make_outcome(0.1, 70.0, method="BN")]
    outcomes += [make_outcome(0.1, 60.0, batch_size=8), make_outcome(0.1, 50.0, setting="deep")]
    cells = protocol.by_cell(outcomes)
    assert [len(own) for own in cells.values()] == [2, 1, 1, 1]
    assert next(iter(cells)) == ("digits", "linear", 32, "SGD")


def test_the_table_reads_the_test_at_the_best_rate_alone():
    outcomes = [make_outcome(0.03, 85.0), make_outcome(0.1, 90.0), make_outcome(0.3, 20.0, math.nan)]
    outcomes += [make_outcome(0.1, 0.0, 0.2, test, seed=seed) for seed, test in ((1, 91.0), (2, 93.0))]
    outcomes += [make_outcome(0.1, 0.0, 0.5, 92.0, seed=3), make_outcome(0.03, 99.0, 0.1, 99.0, seed=1)]
    row = protocol.accuracy_table(outcomes).splitlines()[-1]
    assert row == "| digits | linear | 32 | SGD | 92.0 | 91.0 to 93.0 | 0.300 | 0.1 | 0.1 | 1 of 3 |"
    outcomes[-2] = make_outcome(0.1, 0.0, math.inf, 99.0, seed=3)  # what diverged guesses
    assert "| 64.7 | 10.0 to 93.0 |" in protocol.accuracy_table(outcomes)
    assert protocol.accuracy_table([*outcomes, make_outcome(0.1, 90.0, method="B")]) == protocol.accuracy_table(
        outcomes
    )
    assert "| 0.1 (edge of the grid) |" in protocol.accuracy_table([*outcomes[1:2], *outcomes[3:]])


def test_the_validation_table_has_a_column_a_rate():
    outcomes = [make_outcome(0.1, 90.0), make_outcome(0.3, 91.0), make_outcome(0.3, 95.0, seed=1)]
    outcomes += [make_outcome(0.1, 80.0, method="BN"), make_outcome(1.0, 90.0, math.nan, method="BN")]
    lines = protocol.validation_table(outcomes).splitlines()
    assert lines[0] == "| data | setting | batch | method | 0.1 | 0.3 | 1 |"
    assert lines[2:] == [
        "| digits | linear | 32 | SGD | 90.0 | **91.0** |  |",
        "| digits | linear | 32 | BN | **80.0** |  | 10.0 |",
    ]


GRID = (0.01, 0.03, 0.1, 0.3)


def refine(accuracy, **changes):
    """Returns the rates at which a method is tried beside a grid, in their order, where ``accuracy`` is a function."""
    order = []

    def outcome(rate):
        value = accuracy(rate)
        return make_outcome(rate, value, 0.1 if math.isfinite(value) else math.inf, **changes)

    def sweep(todo):
        order.extend(trial.rate for trial in todo)
        assert all(trial == dataclasses.replace(ANY_TRIAL, rate=trial.rate, **changes) for trial in todo)
        return [outcome(trial.rate) for trial in todo]

    outcomes = protocol.refined([outcome(rate) for rate in GRID], sweep, protocol.by_cell, protocol.best)
    assert [o.rate for o in outcomes] == [*GRID, *order]
    return order


@pytest.mark.parametrize(
    ("peak", "expected"),
    [
        (0.03, [0.017, 0.055]),
        (0.1, [0.055, 0.17]),
        (0.3, [0.9, 0.17, 0.52]),  # 0.9 = 0.3 * 0.3 / 0.1
        (0.01, [0.0033, 0.0057, 0.017]),
        (0.001, [0.0033, 0.0011, 0.00037, 0.00064, 0.0019]),
    ],
)
def test_a_refined_grid_has_the_best_rate_between_others_and_the_rates_halfway(peak, expected):
    assert refine(lambda rate: -abs(math.log(rate / peak)), seed=0, method="BN") == pytest.approx(expected)


def test_a_refined_grid_does_not_go_on_for_ever():
    assert len(refine(lambda rate: math.nan)) <= 2  # nothing but divergence: no end to be found
    assert refine(lambda rate: 10.0) == pytest.approx([0.017])  # nothing is learned at any rate
    # the best rate is the last one that does not diverge
    assert refine(lambda rate: rate if rate < 0.5 else math.nan) == pytest.approx([0.9, 0.17, 0.52])


@pytest.mark.parametrize(
    ("best", "expected"),
    [(0.03, []), (0.055, [0.1])],  # 0.1 = 0.055 * 0.055 / 0.03; and none between
)
def test_a_fine_grid_is_closed_and_not_refined_further(best, expected):
    grid = [make_outcome(rate, -abs(math.log(rate / best))) for rate in (0.017, 0.03, 0.055)]

    def sweep(todo):
        return [make_outcome(trial.rate, -abs(math.log(trial.rate / best))) for trial in todo]

    rates = [outcome.rate for outcome in protocol.refined(grid, sweep, protocol.by_cell, protocol.best)]
    assert rates == [0.017, 0.03, 0.055, *expected]


def test_every_method_of_a_grid_is_refined_by_itself():
    def accuracy(trial):
        return -abs(math.log(trial.rate / peaks[trial.method]))

    def sweep(todo):
        return [make_outcome(trial.rate, accuracy(trial), method=trial.method) for trial in todo]

    peaks = {"SGD": 0.03, "BN": 0.3}
    grid = sweep([dataclasses.replace(ANY_TRIAL, method=method, rate=rate) for method in peaks for rate in GRID])
    cells = protocol.by_cell(protocol.refined(grid, sweep, protocol.by_cell, protocol.best))
    rates = {method: sorted(outcome.rate for outcome in own) for (*_, method), own in cells.items()}
    assert rates == {"SGD": [0.01, 0.017, 0.03, 0.055, 0.1, 0.3], "BN": [0.01, 0.03, 0.1, 0.17, 0.3, 0.52, 0.9]}
