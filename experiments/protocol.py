"""How trainings are compared: at the rate that the validation images choose, by what the test images say of it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

import runs
import tables


@dataclasses.dataclass(frozen=True)
class Trial:
    """Everything that determines a training, beside the program of its experiment.

    Attributes:
      data: the set of images.
      setting: what is trained on what, in the words of the experiment's table.
      method: how it is trained, likewise.
      batch_size: examples a step.
      rate: the learning rate.
      steps: how many.
      seed: of the initial weights and the batches; 0 is for choosing the rate, and does not read the test images.
    """

    data: str
    setting: str
    method: str
    batch_size: int
    rate: float
    steps: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Outcome(Trial):
    """What came out of a training.

    Attributes:
      commit: of the code.
      seconds: wall time, compilation included.
      train_loss: mean over the last tenth of the steps, in nats; not finite if the training diverged.
      validation_accuracy: at the end, in percent.
      test_accuracy: at the end, in percent; nan where the test set was not read.
      measure: what else the experiment measures; nan where it measures nothing.
    """

    commit: str
    seconds: float
    train_loss: float
    validation_accuracy: float
    test_accuracy: float
    measure: float

    @property
    def trial(self) -> Trial:
        """The training."""
        return runs.part(self, Trial)

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being finite."""
        return not math.isfinite(self.train_loss)

    @property
    def score(self) -> float:
        """The validation accuracy, by which rates are chosen."""
        return -math.inf if self.diverged else self.validation_accuracy


class Tried(Protocol):
    """A training at a learning rate, as far as it matters to which rates come next."""

    @property
    def rate(self) -> float:
        """The learning rate."""

    @property
    def score(self) -> float:
        """What is highest at the best rate."""

    @property
    def trial(self) -> Any:
        """What was trained, a dataclass with the field ``rate``."""


T = TypeVar("T", bound=Tried)

Cell = tuple[str, str, int, str]  # data, setting, batch size, method


def by_cell(outcomes: Sequence[Outcome]) -> dict[Cell, list[Outcome]]:
    """Groups outcomes that differ in rate and seed alone."""
    cells: dict[Cell, list[Outcome]] = {}
    for outcome in outcomes:
        cells.setdefault((outcome.data, outcome.setting, outcome.batch_size, outcome.method), []).append(outcome)
    return cells


def best(tuning: Sequence[Outcome]) -> Outcome:
    """Returns the outcome with the highest validation accuracy; of equal ones that with the lowest rate."""
    return min(tuning, key=lambda outcome: (-outcome.score, outcome.rate))


def at_best_rate(cell: Sequence[Outcome]) -> list[Outcome]:
    """Returns the outcomes of a cell that read the test images, at the rate that is best in validation."""
    rate = best([outcome for outcome in cell if outcome.seed == 0]).rate
    return [outcome for outcome in cell if outcome.seed and outcome.rate == rate]


def accuracies_in_test(final: Sequence[Outcome]) -> np.ndarray:
    """Returns test accuracies in percent; what diverged guesses."""
    return np.array([tables.CHANCE if outcome.diverged else outcome.test_accuracy for outcome in final])


def refined(
    grid: Sequence[T],
    sweep: Callable[[list[Any]], list[T]],
    cells: Callable[[Sequence[T]], Mapping[Any, Sequence[T]]],
    best: Callable[[Sequence[T]], T],
) -> list[T]:
    """Runs every method of a grid at further rates, by one rule for all of them.

    Where the best rate is an end of the grid, the grid goes on by its last step until that is no longer so, or its end
    is no better than the rate beside it. Then come the rates halfway, by ratio, between the best one and its
    neighbours, where these are further than a factor of 2.

    Args:
      grid: trainings with one seed, at more than one rate.
      sweep: runs trainings.
      cells: groups those that differ in their rate alone.
      best: chooses among these.

    Returns:
      All trainings of the methods, those of the grid first.
    """
    outcomes = list(grid)
    while ends := [trial for own in cells(outcomes).values() for trial in beyond(own, best(own))]:
        outcomes += sweep(ends)
    return outcomes + sweep([trial for own in cells(outcomes).values() for trial in halfway(own, best(own))])


def beyond(cell: Sequence[Tried], best: Tried) -> list[Any]:
    """Returns the training a step further than the end of a grid, where that is the best."""
    ordered = sorted(cell, key=lambda outcome: outcome.rate)
    neighbours = {ordered[0].rate: ordered[1], ordered[-1].rate: ordered[-2]}
    if best.rate not in neighbours or (neighbour := neighbours[best.rate]).score == best.score:
        return []
    return [dataclasses.replace(best.trial, rate=rounded(best.rate**2 / neighbour.rate))]


def halfway(cell: Sequence[Tried], best: Tried) -> list[Any]:
    """Returns the trainings between the best of a grid and its neighbours that are further than a factor of 2."""
    rates = sorted(outcome.rate for outcome in cell)
    place = rates.index(best.rate)
    neighbours = rates[max(place - 1, 0) : place] + rates[place + 1 : place + 2]
    far = [rate for rate in neighbours if not best.rate / 2 <= rate <= best.rate * 2]
    return [dataclasses.replace(best.trial, rate=rounded(math.sqrt(best.rate * rate))) for rate in far]


def rounded(rate: float) -> float:
    """Returns a rate with two digits."""
    return float(f"{rate:.2g}")


def window(tuning: Sequence[Outcome], margin: float = 1.0) -> tuple[float, float]:
    """Returns the lowest and highest rate around the best whose validation accuracy is within ``margin`` of its own."""
    ordered = sorted(tuning, key=lambda outcome: outcome.rate)
    accuracies = [0.0 if outcome.diverged else outcome.validation_accuracy for outcome in ordered]
    top = accuracies.index(max(accuracies))
    good = [accuracy >= accuracies[top] - margin for accuracy in accuracies]
    above = len(list(itertools.takewhile(bool, good[top + 1 :])))
    below = len(list(itertools.takewhile(bool, good[:top][::-1])))
    return ordered[top - below].rate, ordered[top + above].rate


def accuracy_table(outcomes: Sequence[Outcome]) -> str:
    """Returns a row a cell: test accuracy at the rate that is best in validation, and the window of good rates.

    A cell whose runs at the best rate are still to come is left out.
    """
    rows = []
    for (data, setting, batch_size, method), own in by_cell(outcomes).items():
        tuning = [outcome for outcome in own if outcome.seed == 0]
        rate, final = best(tuning).rate, at_best_rate(own)
        if not final:
            continue
        tests = accuracies_in_test(final)
        losses = [outcome.train_loss for outcome in final]
        good = window(tuning)
        diverged = f"{sum(outcome.diverged for outcome in tuning)} of {len(tuning)}"
        edge = " (edge of the grid)" if rate in (min(o.rate for o in tuning), max(o.rate for o in tuning)) else ""
        rows.append(
            [
                tables.DATA_NAMES[data],
                setting,
                str(batch_size),
                method,
                f"{tests.mean():.1f}",
                tables.range_text(tests),
                f"{np.mean(losses):.3f}",
                f"{rate:g}{edge}",
                tables.window_text(*good),
                diverged,
            ]
        )
    header = ["data", "setting", "batch", "method", "test accuracy", "range", "train loss", "rate", "window"]
    return tables.markdown([*header, "diverged"], rows)


def validation_table(outcomes: Sequence[Outcome]) -> str:
    """Returns a row a cell: validation accuracy at every rate, with seed 0; the highest of a row is bold."""
    tuning = [outcome for outcome in outcomes if outcome.seed == 0]
    rates = sorted({outcome.rate for outcome in tuning})
    rows = []
    for (data, setting, batch_size, method), own in by_cell(tuning).items():
        texts = {o.rate: f"{tables.CHANCE if o.diverged else o.validation_accuracy:.1f}" for o in own}
        texts[best(own).rate] = f"**{texts[best(own).rate]}**"
        row = [tables.DATA_NAMES[data], setting, str(batch_size), method]
        rows.append([*row, *(texts.get(rate, "") for rate in rates)])
    return tables.markdown(["data", "setting", "batch", "method", *(f"{rate:g}" for rate in rates)], rows)
