"""Whether Batch Group Normalization helps where batches are small, and which number of groups does.

A network of three convolutions on CIFAR-10, with batches of 2 and of 64 images; with BN, Group Normalization, and Batch
Group Normalization of 1 to 32 groups, each evaluated with its running statistics where it has any. A layer of 8
channels has 32 groups of a quarter of a channel: more statistics than BN.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from matplotlib.figure import Figure

import figures
import protocol
import trials
from bnp_optax.contrib import linen as contrib_linen
from protocol import Outcome, Trial

WIDTHS, CLASSES, GROUP_SIZE, MOMENTUM = (8, 16, 32), 10, 4, 0.9
QUICK_STEPS = 30


class Setting(NamedTuple):
    """The batches of a training, how many, and the learning rates."""

    batch_size: int
    steps: int
    rates: tuple[float, ...]


SETTINGS = {
    "batches of 2": Setting(2, 12_000, (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)),
    "batches of 64": Setting(64, 600, (0.003, 0.01, 0.03, 0.1, 0.3)),
}
STYLES = {
    "BN": {"color": "#E69F00", "marker": "^"},
    "GN": {"color": "#009E73", "marker": "v"},
    "BGN, 1 group": {"color": "#0B3C5D", "marker": "o"},
    "BGN, 2 groups": {"color": "#0072B2", "marker": "s"},
    "BGN, 8 groups": {"color": "#56B4E9", "marker": "D"},
    "BGN, 32 groups": {"color": "#999999", "marker": "x", "linestyle": "--"},
}


class Network(nn.Module):
    """3x3 convolutions of stride 2, each with a normalization before its activation, and a dense layer of the averages.

    Attributes:
      method: the normalization, one of ``STYLES``.
    """

    method: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of images ``[n, height, width, channels]``."""
        for width in WIDTHS:
            x = nn.relu(self.normalize(nn.Conv(width, (3, 3), strides=2)(x), train))
        return nn.Dense(CLASSES)(x.mean(axis=(1, 2)))

    def normalize(self, x: jax.Array, train: bool) -> Any:
        """Applies the normalization."""
        match self.method.split():
            case ["BN"]:
                return nn.BatchNorm(use_running_average=not train)(x)
            case ["GN"]:
                return nn.GroupNorm(num_groups=None, group_size=GROUP_SIZE)(x)
            case ["BGN,", groups, _]:
                more_than_channels = int(groups) > x.shape[-1]
                return contrib_linen.BatchGroupNorm(
                    num_groups=int(groups),
                    spatial_shape=x.shape[1:3] if more_than_channels else None,
                    use_running_average=not train,
                )(x)
        raise ValueError(f"no method {self.method!r}; there are {', '.join(STYLES)}")


def task(trial: Trial) -> trials.Task:
    """Returns the training of the network by gradient descent with momentum."""
    return trials.classifier(
        Network(trial.method), lambda rate, params, x: optax.with_extra_args_support(optax.sgd(rate, MOMENTUM))
    )


def tuning(quick: bool) -> list[Trial]:
    """Returns a training by every method with the batches of every setting at every rate."""
    data = "digits" if quick else "cifar-10"
    return [
        Trial(data, name, method, setting.batch_size, rate, QUICK_STEPS if quick else setting.steps, 0)
        for name, setting in SETTINGS.items()
        for method in (list(STYLES)[::3] if quick else STYLES)
        for rate in (setting.rates[1:3] if quick else setting.rates)
    ]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what every method reaches with every kind of batches, and at which rates."""
    return {"batch_group_norm": protocol.accuracy_table(outcomes)}, {"batch_group_norm": by_rate(outcomes)}


def by_rate(outcomes: Sequence[Outcome]) -> Figure:
    """Draws validation accuracy against learning rate, a panel a kind of batches, with seed 0."""
    settings = list(dict.fromkeys(outcome.setting for outcome in outcomes))
    figure, axes = figures.panels(settings, 2, "validation accuracy (%)")
    for panel, setting in zip(axes, settings, strict=True):
        for method in dict.fromkeys(outcome.method for outcome in outcomes):
            own = [o for o in outcomes if (o.setting, o.method) == (setting, method)]
            label = method.replace("BGN, ", "G = ").split(" group")[0]
            figures.draw_over_rates(panel, own, label, STYLES[method], errors=False)
    return figures.add_legend(figure, axes)


EXPERIMENT = trials.Experiment(tuning, task, report)
