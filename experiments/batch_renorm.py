"""Whether Batch Renormalization helps where batches are small, or their examples alike.

A network of two hidden layers on MNIST, whose batches are of all classes, of two, or of one; without normalization,
with BN, and with Batch Renormalization, each evaluated with its running statistics.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import figures
import images
import protocol
import trials
from bnp_optax import contrib
from bnp_optax.contrib import linen as contrib_linen
from protocol import Outcome, Trial

WIDTHS, CLASSES, EPSILON = (128, 128), 10, 1e-3
RATES, QUICK_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), (0.03, 0.1)
QUICK_STEPS = 200


class Setting(NamedTuple):
    """The batches of a training: how many classes each has (all of them: ``None``), of how many examples, how many."""

    classes: int | None
    batch_size: int
    steps: int


SETTINGS = {
    "all classes, 32": Setting(None, 32, 2_000),
    "all classes, 4": Setting(None, 4, 4_000),
    "all classes, 2": Setting(None, 2, 6_000),
    "two classes, 32": Setting(2, 32, 2_000),
    "one class, 32": Setting(1, 32, 2_000),
}
QUICK_SETTINGS = ("all classes, 4", "one class, 32")
STYLES = {
    "none": {"color": "#555555", "marker": "s"},
    "BN": {"color": "#E69F00", "marker": "^"},
    "BN, momentum 0.9": {"color": "#E69F00", "marker": "v", "linestyle": "--"},
    "Batch Renormalization": {"color": "#0072B2", "marker": "o"},
}


class Network(nn.Module):
    """Dense layers, each with a normalization before its activation.

    Attributes:
      method: the normalization, one of ``STYLES``.
      steps: of the training, 5, 40 and 25 % of which are those of the limits of Batch Renormalization.
    """

    method: str
    steps: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of images ``[n, height, width, channels]``."""
        x = x.reshape(x.shape[0], -1)
        for width in WIDTHS:
            x = nn.relu(self.normalize(nn.Dense(width)(x), train))
        return nn.Dense(CLASSES)(x)

    def normalize(self, x: jax.Array, train: bool) -> Any:
        """Applies the normalization."""
        common: dict[str, Any] = {"use_running_average": not train, "epsilon": EPSILON}
        match self.method:
            case "none":
                return x
            case "BN":
                return nn.BatchNorm(**common)(x)
            case "BN, momentum 0.9":
                return nn.BatchNorm(momentum=0.9, **common)(x)
            case "Batch Renormalization":
                limits = contrib.ramp(hold=self.steps // 20, r_end=self.steps * 2 // 5, d_end=self.steps // 4)
                return contrib_linen.BatchRenorm(r_max=limits.r_max, d_max=limits.d_max, **common)(x)
        raise ValueError(f"no method {self.method!r}; there are {', '.join(STYLES)}")


def batches(trial: Trial, split: images.Split) -> Iterator[images.Split]:
    """Yields batches without end: of any examples, or of equally many of each of a few classes, drawn each time."""
    classes = SETTINGS[trial.setting].classes
    if classes is None:
        yield from trials.epochs(trial, split)
    rng = np.random.default_rng(trial.seed)
    members = [np.flatnonzero(split.labels == label) for label in range(CLASSES)]
    while classes is not None:
        labels = rng.choice(CLASSES, classes, replace=False)
        chosen = np.concatenate(
            [rng.choice(members[label], trial.batch_size // classes, replace=False) for label in labels]
        )
        yield images.Split(split.images[chosen], split.labels[chosen])


def task(trial: Trial) -> trials.Task:
    """Returns the training of the network by gradient descent."""
    model = Network(trial.method, trial.steps)
    descent = trials.classifier(model, lambda rate, params, x: optax.with_extra_args_support(optax.sgd(rate)))
    return descent._replace(batches=batches)


def tuning(quick: bool) -> list[Trial]:
    """Returns a training by every method with the batches of every setting at every rate."""
    data, rates = ("digits", QUICK_RATES) if quick else ("mnist", RATES)
    return [
        Trial(data, name, method, setting.batch_size, rate, QUICK_STEPS if quick else setting.steps, 0)
        for name, setting in SETTINGS.items()
        if not quick or name in QUICK_SETTINGS
        for method in STYLES
        for rate in rates
    ]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what every method reaches with every kind of batches, and at which rates."""
    return {"batch_renorm": protocol.accuracy_table(outcomes)}, {"batch_renorm": by_rate(outcomes)}


def by_rate(outcomes: Sequence[Outcome]) -> Figure:
    """Draws validation accuracy against learning rate, a panel a kind of batches, with seed 0."""
    settings = list(dict.fromkeys(outcome.setting for outcome in outcomes))
    figure, axes = figures.panels([f"{setting} a batch" for setting in settings], 3, "validation accuracy (%)")
    for panel, setting in zip(axes, settings, strict=True):
        for method, style in STYLES.items():
            own = [o for o in outcomes if (o.setting, o.method) == (setting, method)]
            figures.draw_over_rates(panel, own, method, style)
        figures.show_errors_as_accuracies(panel)
    return figures.add_legend(figure, axes)


EXPERIMENT = trials.Experiment(tuning, task, report)
