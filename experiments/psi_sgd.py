"""Whether PSI-SGD trains from any scale of the weights, and what it is worth from a usual one.

A network of two dense layers with BN behind both, on MNIST. The kernels of the first are multiplied by a number, and
those of the second by its inverse: the network computes the same, up to BN's epsilon. SGD and PSI-SGD, with and without
momentum, train it from there. The epsilon is 1e-12, but for one setting with the usual one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from matplotlib.figure import Figure

import bnp_optax as bnp
import figures
import protocol
import tables
import trials
from bnp_optax.contrib import psi_sgd
from protocol import Outcome, Trial

WIDTH, CLASSES, BATCH_SIZE = 128, 10, 128
STEPS, QUICK_STEPS = 840, 30  # two epochs of MNIST
RATES, QUICK_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), (0.1, 1.0)
SHOWN_RATES = (0.1, 1.0)


class Setting(NamedTuple):
    """How the training begins: the numbers that the kernels are multiplied by, and BN's epsilon."""

    first: float
    second: float
    epsilon: float = 1e-12


class Method(NamedTuple):
    """An optimizer, and its line in the figure."""

    momentum: float | None
    is_psi: bool
    style: dict[str, str]


SETTINGS = {
    "scales 1, 1": Setting(1, 1),
    "scales 100, 0.01": Setting(1e2, 1e-2),
    "scales 10000, 0.0001": Setting(1e4, 1e-4),
    "scales 10000, 0.0001; epsilon 1e-5": Setting(1e4, 1e-4, 1e-5),
}
METHODS = {
    "SGD": Method(None, False, {"color": "#555555", "marker": "s"}),
    "SGD + momentum": Method(0.9, False, {"color": "#555555", "marker": "x", "linestyle": "--"}),
    "PSI-SGD": Method(None, True, {"color": "#0072B2", "marker": "o"}),
    "PSI-SGDM": Method(0.9, True, {"color": "#56B4E9", "marker": "D", "linestyle": "--"}),
}


class Network(nn.Module):
    """Two dense layers, BN behind each.

    Attributes:
      epsilon: of BN. Its running statistics forget their start within an epoch, which would be all there is of them
        where the variance is small.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of images ``[n, height, width, channels]``."""

        def normalize(x: jax.Array) -> Any:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=self.epsilon)(x)

        x = nn.relu(normalize(nn.Dense(WIDTH, use_bias=False, name="first")(x.reshape(x.shape[0], -1))))
        logits: jax.Array = normalize(nn.Dense(CLASSES, use_bias=False, name="second")(x))
        return logits


def task(trial: Trial) -> trials.Task:
    """Returns the training of the network from the scales of a setting."""
    setting, method = SETTINGS[trial.setting], METHODS[trial.method]
    model = Network(setting.epsilon)

    def optimizer(rate: Any, params: Any, x: Any) -> optax.GradientTransformationExtraArgs:
        if method.is_psi:
            return psi_sgd(rate, bnp.linen.find_layers(model, x), method.momentum)
        return optax.with_extra_args_support(optax.sgd(rate, method.momentum))

    plain = trials.classifier(model, optimizer)

    def init(key: jax.Array, x: jax.Array) -> trials.State:
        state: trials.State = plain.init(key, x)
        scales = {"first": setting.first, "second": setting.second}
        scaled = {name: {"kernel": scale * state.params[name]["kernel"]} for name, scale in scales.items()}
        return state._replace(params={**state.params, **scaled})

    return plain._replace(init=init)


def tuning(quick: bool) -> list[Trial]:
    """Returns a training of every method from every start at every rate."""
    data, steps, rates = ("digits", QUICK_STEPS, QUICK_RATES) if quick else ("mnist", STEPS, RATES)
    return [
        Trial(data, setting, method, BATCH_SIZE, rate, steps, 0)
        for setting in list(SETTINGS)[: 2 if quick else None]
        for method in list(METHODS)[:: 2 if quick else 1]
        for rate in rates
    ]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what every method reaches, and its loss at the same rates from every start."""
    texts = {"psi_sgd": protocol.accuracy_table(outcomes), "psi_sgd_losses": losses_table(outcomes)}
    return texts, {"psi_sgd": by_rate(outcomes)}


def losses_table(outcomes: Sequence[Outcome]) -> str:
    """Returns the training loss at some rates, a row a method and rate, a column a start, with seed 0."""
    starts, lines = list(dict.fromkeys(outcome.setting for outcome in outcomes)), []
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        for rate in SHOWN_RATES:
            own = {o.setting: o for o in outcomes if (o.method, o.rate, o.seed) == (method, rate, 0)}
            losses = {each: "diverged" if o.diverged else f"{o.train_loss:.3f}" for each, o in own.items()}
            cells = [losses.get(each, "") for each in starts]
            lines.append([method, f"{rate:g}", *cells])
    return tables.markdown(["method", "rate", *starts], lines)


def by_rate(outcomes: Sequence[Outcome]) -> Figure:
    """Draws validation accuracy against learning rate, a panel a start, with seed 0."""
    starts = list(dict.fromkeys(outcome.setting for outcome in outcomes))
    titles = [name.replace("; ", "\n") for name in starts]
    figure, axes = figures.panels(titles, 2, "validation accuracy (%)", sharey=True)
    for panel, setting in zip(axes, starts, strict=True):
        for name in dict.fromkeys(outcome.method for outcome in outcomes):
            own = [o for o in outcomes if (o.setting, o.method) == (setting, name)]
            figures.draw_over_rates(panel, own, name, METHODS[name].style)
    figures.show_errors_as_accuracies(axes[0])  # whose axis all panels share
    return figures.add_legend(figure, axes)


EXPERIMENT = trials.Experiment(tuning, task, report)
