"""Whether the gates of Instance Enhancement Batch Normalization help, or the smaller scale that it begins with.

A network of three convolutions on CIFAR-10 with BN, with IEBN, and with BN whose scale begins as IEBN's gates do, at
sigmoid(-1): what IEBN gains over the last is due to its examples' own gates.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import optax

import models
import protocol
import trials
from bnp_optax.contrib import linen as contrib_linen
from protocol import Outcome, Trial

WIDTHS, CLASSES, MOMENTUM = (8, 16, 32), 10, 0.9
BATCH_SIZE, STEPS, QUICK_STEPS = 64, 500, 30
RATES, QUICK_RATES = (0.03, 0.1, 0.3, 1.0), (0.03, 0.1)
SETTING = "3 convolutions"
START = 1 / (1 + math.e)  # sigmoid(-1)
METHODS = ("BN", "BN, scale 0.269", "IEBN")


class Network(nn.Module):
    """3x3 convolutions of stride 2, each with a normalization before its activation, and a dense layer of the averages.

    Attributes:
      method: the normalization, one of ``METHODS``.
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
        common: dict[str, Any] = {"use_running_average": not train, "momentum": models.RUNNING_MOMENTUM}
        match self.method:
            case "BN":
                return nn.BatchNorm(**common)(x)
            case "BN, scale 0.269":
                return nn.BatchNorm(scale_init=nn.initializers.constant(START), **common)(x)
            case "IEBN":
                return contrib_linen.InstanceEnhancementBatchNorm(**common)(x)
        raise ValueError(f"no method {self.method!r}; there are {', '.join(METHODS)}")


def task(trial: Trial) -> trials.Task:
    """Returns the training of the network by gradient descent with momentum."""
    sgd = functools.partial(optax.sgd, momentum=MOMENTUM)
    return trials.classifier(Network(trial.method), lambda rate, params, x: optax.with_extra_args_support(sgd(rate)))


def tuning(quick: bool) -> list[Trial]:
    """Returns a training by every method at every rate."""
    data, steps, rates = ("digits", QUICK_STEPS, QUICK_RATES) if quick else ("cifar-10", STEPS, RATES)
    return [Trial(data, SETTING, method, BATCH_SIZE, rate, steps, 0) for method in METHODS for rate in rates]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what every method reaches, at which rates, and with seed 0 at all of them."""
    texts = {
        "instance_enhancement": protocol.accuracy_table(outcomes),
        "instance_enhancement_rates": protocol.validation_table(outcomes),
    }
    return texts, {}


EXPERIMENT = trials.Experiment(tuning, task, report)
