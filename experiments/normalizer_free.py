"""At which learning rates a deep residual network trains without Batch Normalization, and what helps it.

Ten residual blocks of two dense layers on MNIST, by SGD with momentum in small batches: with BN, as they are, with
standardized kernels, with Fixup, with and without adaptive gradient clipping, and trained in BNP's variables.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import optax

import bnp_optax as bnp
import figures
import models
import protocol
import tables
import trials
from bnp_optax.contrib import adaptive_grad_clip, fixup_normal, nonlinearity_gain, standardized_layers
from bnp_optax.contrib.linen import ScalarBias, ScalarScale, WSDense
from protocol import Outcome, Trial

BLOCKS, QUICK_BLOCKS, WIDTH, CLASSES = 10, 2, 100, 10
SETTINGS = {f"{blocks} residual blocks of {WIDTH}": blocks for blocks in (BLOCKS, QUICK_BLOCKS)}
BATCH_SIZE, STEPS, QUICK_STEPS = 64, 1200, 20
RATES, QUICK_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (0.01, 0.1)
MOMENTUM = 0.9
ALPHA = 0.2  # of the blocks with standardized kernels, as their authors have it
CLIPPING = 0.04

Form = Literal["bn", "plain", "standardized", "fixup"]


class Method(NamedTuple):
    """A network and its optimizer.

    Attributes:
      form: of the network's blocks.
      clipped: whether the gradients of all layers but the classifier are clipped.
      in_variables_of_bnp: whether SGD runs there.
      style: of its line.
    """

    form: Form
    style: dict[str, str]
    clipped: bool = False
    in_variables_of_bnp: bool = False


METHODS = {
    "BN": Method("bn", {"color": "#E69F00", "marker": "^"}),
    "none": Method("plain", {"color": "#555555", "marker": "s"}),
    "none + AGC": Method("plain", {"color": "#555555", "marker": "x", "linestyle": "--"}, clipped=True),
    "standardized": Method("standardized", {"color": "#009E73", "marker": "v"}),
    "standardized + AGC": Method("standardized", {"color": "#009E73", "marker": "+", "linestyle": "--"}, clipped=True),
    "Fixup": Method("fixup", {"color": "#CC79A7", "marker": "D"}),
    "BNP": Method("plain", {"color": "#0072B2", "marker": "o"}, in_variables_of_bnp=True),
}


class Network(nn.Module):
    """Residual blocks of two dense layers of one width, between a dense layer and a classifier.

    Attributes:
      form: "bn" and "plain" are pre-activation blocks, begun as He et al. have it, with and without BN before every
        activation; "standardized" those of Brock et al. with kernels that are standardized and a skip gain that begins
        at zero; "fixup" those of Zhang et al.
      blocks: how many.
    """

    form: Form
    blocks: int = BLOCKS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of images ``[n, height, width, channels]``."""
        x = x.reshape(x.shape[0], -1)
        match self.form:
            case "bn" | "plain":
                x = self._pre_activation(x, train)
            case "standardized":
                x = self._standardized(x)
            case "fixup":
                x = self._fixup(x)
        inits = {"standardized": nn.initializers.normal(0.01), "fixup": nn.initializers.zeros}
        return nn.Dense(CLASSES, kernel_init=inits.get(self.form, models.he_normal), name="classifier")(x)

    def _pre_activation(self, x: jax.Array, train: bool) -> jax.Array:
        dense = functools.partial(nn.Dense, WIDTH, kernel_init=models.he_normal)

        def activate(x: jax.Array) -> jax.Array:
            return nn.relu(models.normalize("bn" if self.form == "bn" else "none", 0, train, x))

        x = dense()(x)
        for _ in range(self.blocks):
            x = x + dense()(activate(dense()(activate(x))))
        return activate(x)

    def _standardized(self, x: jax.Array) -> jax.Array:
        gain, variance = nonlinearity_gain(nn.relu), 1.0
        x = WSDense(WIDTH)(x)
        for block in range(self.blocks):
            h = gain * nn.relu(x) / math.sqrt(variance)
            h = WSDense(WIDTH)(gain * nn.relu(WSDense(WIDTH)(h)))
            x = x + ALPHA * self.param(f"skip_gain_{block}", nn.initializers.zeros, ()) * h
            variance += ALPHA**2
        return gain * nn.relu(x)

    def _fixup(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(nn.Dense, WIDTH, use_bias=False)
        x = nn.relu(ScalarBias()(dense()(x)))
        for _ in range(self.blocks):
            h = nn.relu(ScalarBias()(dense(kernel_init=fixup_normal(self.blocks))(ScalarBias()(x))))
            h = ScalarBias()(ScalarScale()(dense(kernel_init=nn.initializers.zeros)(ScalarBias()(h))))
            x = nn.relu(x + h)
        return ScalarBias()(x)


def tuning(quick: bool) -> list[Trial]:
    """Returns a training of every method at every rate."""
    data, steps = ("digits", QUICK_STEPS) if quick else ("mnist", STEPS)
    setting = list(SETTINGS)[quick]
    return [
        Trial(data, setting, method, BATCH_SIZE, rate, steps, 0)
        for method in METHODS
        for rate in (QUICK_RATES if quick else RATES)
    ]


def make_optimizer(
    method: Method, model: nn.Module, params: Any, x: jax.Array, rate: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a method: in every case SGD with momentum.

    Args:
      method: the method.
      model: its network.
      params: the network's parameters.
      x: images.
      rate: the learning rate.
    """
    sgd = functools.partial(optax.sgd, momentum=MOMENTUM)
    if method.in_variables_of_bnp:
        return bnp.preconditioned(sgd(rate), bnp.linen.find_layers(model, x))
    if method.form == "fixup":  # whose authors train scalars and biases with a tenth of the rate
        labels = jax.tree.map(lambda leaf: "kernel" if leaf.ndim > 1 else "small", params)
        return optax.partition({"kernel": sgd(rate), "small": sgd(rate / 10)}, labels)
    if method.clipped:
        found = standardized_layers(params) if method.form == "standardized" else bnp.linen.find_layers(model, x)
        clip = adaptive_grad_clip(CLIPPING, found.select(lambda layer: layer.path != "classifier"))
        return optax.chain(clip, sgd(rate))
    return optax.with_extra_args_support(sgd(rate))


def make_task(trial: Trial) -> trials.Task:
    """Returns what a trial trains."""
    method = METHODS[trial.method]
    model = Network(method.form, SETTINGS[trial.setting])

    def optimizer(rate: Any, params: Any, x: Any) -> optax.GradientTransformationExtraArgs:
        return make_optimizer(method, model, params, x, rate)

    return trials.classifier(model, optimizer, records=method.in_variables_of_bnp)


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what the methods reach at their best rates, and a figure of all rates."""
    first = outcomes[0]
    title = f"{tables.DATA_NAMES[first.data]}, {first.setting}, batch size {first.batch_size}"
    figure, [panel] = figures.panels([title], 1, "validation accuracy (%)")
    figure.set_size_inches(7.2, 4.0)
    for (_, _, _, name), own in protocol.by_cell(outcomes).items():
        figures.draw_over_rates(panel, own, name, METHODS[name].style)
    figures.show_errors_as_accuracies(panel)
    panel.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return {"normalizer_free": protocol.accuracy_table(outcomes)}, {"normalizer_free": figure}


EXPERIMENT = trials.Experiment(tuning, make_task, report)
