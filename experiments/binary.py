"""What binary networks lose without Batch Normalization, and what brings it back.

Residual blocks of binary weights and activations on MNIST, by SGD with momentum and by Adam: with BN, without anything
in its place, with standardized kernels and constants that keep the variance, and with these and clipping.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import figures
import models
import protocol
import tables
import trials
from bnp_optax.contrib import adaptive_grad_clip, block_betas, standardized_layers
from bnp_optax.contrib.binary import ALPHA
from bnp_optax.contrib.linen import BinaryWSDense, RPReLU, RSign, WSDense
from protocol import Outcome, Trial

BLOCKS, QUICK_BLOCKS, WIDTH, CLASSES = 6, 1, 128, 10
BATCH_SIZE, STEPS, QUICK_STEPS = 64, 600, 20
MOMENTUM, CLIPPING = 0.9, 0.02

Form = Literal["bn", "none", "standardized"]


class Optimizer(NamedTuple):
    """How to make an optimizer of a learning rate, and the rates that it is tried at."""

    make: Callable[[Any], optax.GradientTransformationExtraArgs]
    rates: tuple[float, ...]


OPTIMIZERS = {
    "SGD": Optimizer(lambda rate: optax.sgd(rate, momentum=MOMENTUM), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
    "Adam": Optimizer(optax.adam, (0.001, 0.003, 0.01, 0.03)),
}


class Method(NamedTuple):
    """A network, and what is clipped of it.

    Attributes:
      form: of its blocks.
      style: of its line.
      clipped: "kernels" are those of all layers but the classifier, by unit; "all" are also their gains, thresholds and
        activations, each a vector, as the authors clip all but the classifier.
    """

    form: Form
    style: dict[str, str]
    clipped: Literal["nothing", "kernels", "all"] = "nothing"


METHODS = {
    "BN": Method("bn", {"color": "#E69F00", "marker": "^"}),
    "none": Method("none", {"color": "#555555", "marker": "s"}),
    "standardized": Method("standardized", {"color": "#009E73", "marker": "v"}),
    "standardized + AGC of kernels": Method("standardized", {"color": "#0072B2", "marker": "x"}, "kernels"),
    "standardized + AGC": Method("standardized", {"color": "#CC79A7", "marker": "o", "linestyle": "--"}, "all"),
}


def binarize(kernel: jax.Array) -> jax.Array:
    """Returns the signs of weights times the mean size of each unit's, with a straight-through gradient."""
    binary = jnp.abs(kernel).mean(0, keepdims=True) * jnp.where(kernel >= 0, 1.0, -1.0)
    return jax.lax.stop_gradient(binary - kernel) + kernel


def binary_product(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Multiplies by a kernel that is made binary, for ``nn.Dense``."""
    return jax.lax.dot_general(x, binarize(kernel), *args, **kwargs)


class Network(nn.Module):
    """Binary residual blocks of one width between a dense layer and a classifier of full precision.

    Attributes:
      form: "bn" and "none" have the signs of the weights themselves, with and without BN behind every binary layer;
        "standardized" those of standardized weights, and the constants alpha and beta.
      blocks: how many.
    """

    form: Form
    blocks: int = BLOCKS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of images ``[n, height, width, channels]``."""
        x = x.reshape(x.shape[0], -1)
        x = WSDense(WIDTH, name="stem")(x) if self.form == "standardized" else nn.Dense(WIDTH, name="stem")(x)
        for beta in block_betas([self.blocks]):
            if self.form == "standardized":
                h = ALPHA * BinaryWSDense(WIDTH)(RSign()(beta * x))
            else:
                h = nn.Dense(WIDTH, use_bias=False, dot_general=binary_product)(RSign()(x))
                h = models.normalize(self.form, 0, train, h)
            x = RPReLU()(h + x)
        return nn.Dense(CLASSES, name="classifier")(x)


def make_optimizer(trial: Trial, rate: Any, params: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a trial."""
    parts, clipped = [OPTIMIZERS[trial.setting].make(rate)], METHODS[trial.method].clipped
    if clipped == "all":
        rest = {name: jax.tree.map(lambda leaf: leaf.ndim == 1, own) for name, own in params.items()}
        rest["classifier"] = jax.tree.map(lambda _: False, params["classifier"])
        parts.insert(0, optax.masked(optax.adaptive_grad_clip(CLIPPING), rest))
    if clipped != "nothing":
        parts.insert(0, adaptive_grad_clip(CLIPPING, standardized_layers(params)))
    return optax.with_extra_args_support(optax.chain(*parts))


def make_task(trial: Trial) -> trials.Task:
    """Returns what a trial trains."""
    model = Network(METHODS[trial.method].form, QUICK_BLOCKS if trial.data == "digits" else BLOCKS)
    return trials.classifier(model, lambda rate, params, x: make_optimizer(trial, rate, params))


def tuning(quick: bool) -> list[Trial]:
    """Returns a training of every method by both optimizers at every rate."""
    data, steps = ("digits", QUICK_STEPS) if quick else ("mnist", STEPS)
    return [
        Trial(data, name, method, BATCH_SIZE, rate, steps, 0)
        for name, optimizer in OPTIMIZERS.items()
        if not quick or name == "SGD"
        for method in METHODS
        for rate in (optimizer.rates[1:3] if quick else optimizer.rates)
    ]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what the methods reach at their best rates, and a figure of all rates."""
    settings = list(dict.fromkeys(outcome.setting for outcome in outcomes))
    figure, axes = figures.panels(settings, len(settings), "validation accuracy (%)")
    for panel, setting in zip(axes, settings, strict=True):
        for name, method in METHODS.items():
            own = [o for o in outcomes if (o.setting, o.method, o.seed) == (setting, name, 0)]
            own.sort(key=lambda outcome: outcome.rate)
            # what diverged guesses
            accuracies = np.array([tables.CHANCE if o.diverged else o.validation_accuracy for o in own])
            line: dict[str, Any] = {"label": name, "markersize": 4} | method.style
            panel.plot([o.rate for o in own], 100 - np.maximum(accuracies, tables.CHANCE), **line)
        panel.set(xscale="log", xlabel="learning rate")
        figures.show_errors_as_accuracies(panel)
    return {"binary": protocol.accuracy_table(outcomes)}, {"binary": figures.add_legend(figure, axes)}


EXPERIMENT = trials.Experiment(tuning, make_task, report)
