"""Whether trajectory regularization helps in tiny batches, and which of its two parts does.

A network of two hidden layers without normalization on MNIST, in batches of 2 and 8, with and without noise in the
training labels, by SGD with momentum whose rate falls twice. SGD at 0.293 of the rate, the mean of what a period of 10
divides by, is on the grid of SGD itself but for 3 %: it is there to be compared rate by rate.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import figures
import images
import models
import protocol
import trials
from bnp_optax.contrib.trajectory import trajectory_regularized
from protocol import Outcome, Trial

WIDTHS, CLASSES, MOMENTUM, PERIOD = (100, 100), 10, 0.9, 10
STEPS, QUICK_STEPS = 3000, 40
RATES, QUICK_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), (0.003, 0.01)
SHORTER = sum(1 / (i + 1) for i in range(PERIOD)) / PERIOD
FIRST_PULL = 0.2  # twice a tenth, as the authors have it


class Setting(NamedTuple):
    """The examples of a batch, and the fraction of the training labels that are drawn at random."""

    batch_size: int
    noise: float


SETTINGS = {
    "clean labels, 2": Setting(2, 0.0),
    "clean labels, 8": Setting(8, 0.0),
    "30 % random labels, 2": Setting(2, 0.3),
    "30 % random labels, 8": Setting(8, 0.3),
}
QUICK_SETTINGS = ("clean labels, 2",)


class Method(NamedTuple):
    """How SGD is changed.

    Attributes:
      style: of its line.
      factor: of the rate.
      period: of the regularization; 1 is none.
      pull: at first.
      decays: whether the steps of a period become shorter.
    """

    style: dict[str, str]
    factor: float = 1.0
    period: int = 1
    pull: float = 0.0
    decays: bool = True


METHODS = {
    "SGD": Method({"color": "#555555", "marker": "s"}),
    "SGD, 0.293 of the rate": Method({"color": "#555555", "marker": "x", "linestyle": "--"}, SHORTER),
    "trajectory-regularized": Method({"color": "#0072B2", "marker": "o"}, period=PERIOD, pull=FIRST_PULL),
    "shorter steps alone": Method({"color": "#E69F00", "marker": "v", "linestyle": "--"}, period=PERIOD),
    "pull alone": Method({"color": "#009E73", "marker": "^"}, period=PERIOD, pull=FIRST_PULL, decays=False),
}


def falling(steps: int) -> optax.Schedule:
    """Returns by what the rate is multiplied: a tenth from the half on, a hundredth from three quarters on."""
    return optax.piecewise_constant_schedule(1.0, {steps // 2: 0.1, steps * 3 // 4: 0.1})


def make_optimizer(method: Method, rate: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a method: SGD with momentum, in or without the wrapper.

    Args:
      method: the method.
      rate: the first learning rate.
      steps: of the training.
    """
    schedule = falling(steps)
    sgd = optax.sgd(lambda count: method.factor * rate * schedule(count), MOMENTUM)
    return trajectory_regularized(
        sgd, lambda count: method.pull / schedule(count), method.period, decay_step_size=method.decays
    )


def batches(trial: Trial, split: images.Split) -> Iterator[images.Split]:
    """Yields batches without end, in which the same labels are random whatever the seed."""
    rng, labels = np.random.default_rng(0), split.labels.copy()
    noisy = rng.random(len(labels)) < SETTINGS[trial.setting].noise
    labels[noisy] = rng.integers(0, CLASSES, int(noisy.sum()))
    yield from trials.epochs(trial, images.Split(split.images, labels))


def task(trial: Trial) -> trials.Task:
    """Returns the training of the network."""

    def optimizer(rate: Any, params: Any, x: jax.Array) -> optax.GradientTransformationExtraArgs:
        return make_optimizer(METHODS[trial.method], rate, trial.steps)

    return trials.classifier(models.MLP(widths=WIDTHS), optimizer)._replace(batches=batches)


def tuning(quick: bool) -> list[Trial]:
    """Returns a training by every method in every setting at every rate."""
    data, steps, rates = ("digits", QUICK_STEPS, QUICK_RATES) if quick else ("mnist", STEPS, RATES)
    return [
        Trial(data, name, method, setting.batch_size, rate, steps, 0)
        for name, setting in SETTINGS.items()
        if not quick or name in QUICK_SETTINGS
        for method in METHODS
        for rate in rates
    ]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what every method reaches in every setting, and at which rates."""
    texts = {"trajectory": protocol.accuracy_table(outcomes), "trajectory_rates": protocol.validation_table(outcomes)}
    return texts, {"trajectory": by_rate(outcomes)}


def by_rate(outcomes: Sequence[Outcome]) -> Figure:
    """Draws validation accuracy against learning rate, a panel a setting, with seed 0."""
    settings = list(dict.fromkeys(outcome.setting for outcome in outcomes))
    figure, axes = figures.panels([f"{setting} a batch" for setting in settings], 2, "validation accuracy (%)")
    for panel, setting in zip(axes, settings, strict=True):
        for name, method in METHODS.items():
            own = [o for o in outcomes if (o.setting, o.method) == (setting, name)]
            figures.draw_over_rates(panel, own, name, method.style)
        figures.show_errors_as_accuracies(panel)
    return figures.add_legend(figure, axes)


EXPERIMENT = trials.Experiment(tuning, task, report)
