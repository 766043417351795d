"""Whether Mixture Normalization trains faster than BN, in the place of one BN of a network, and what a step costs.

Three convolutions and two dense layers on CIFAR-10 with BN before every activation. In the third convolution, Mixture
Normalization (MN) of 1 and of 3 components takes its place, or BN whose scale begins at the root of 3: by this factor
the results of 3 components are larger than those of BN.
"""

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import models
import protocol
import tables
import trials
from bnp_optax.contrib import linen as contrib_linen
from protocol import Outcome, Trial

WIDTHS, HIDDEN, CLASSES, MOMENTUM = (16, 32, 32), 64, 10, 0.9
BATCH_SIZE, STEPS, QUICK_STEPS = 128, 300, 20
RATES, QUICK_RATES = (0.01, 0.03, 0.1, 0.3), (0.03, 0.1)
SETTING = "5 layers, one BN replaced"
METHODS = ("BN", "BN, scale 1.73", "MN, 1 component", "MN, 3 components")
TIMED = 50  # steps, of which the fastest counts: others share the cores


class Network(nn.Module):
    """3x3 convolutions of stride 2 and two dense layers, with a normalization before every activation.

    Attributes:
      method: what takes the place of the BN of the last convolution, one of ``METHODS``.
    """

    method: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of images ``[n, height, width, channels]``."""
        common: dict[str, Any] = {"use_running_average": not train, "momentum": models.RUNNING_MOMENTUM}
        for width in WIDTHS[:-1]:
            x = nn.relu(nn.BatchNorm(**common)(nn.Conv(width, (3, 3), strides=2)(x)))
        x = nn.relu(self.normalize(nn.Conv(WIDTHS[-1], (3, 3), strides=2)(x), common))
        x = nn.relu(nn.BatchNorm(**common)(nn.Dense(HIDDEN)(x.reshape(x.shape[0], -1))))
        return nn.Dense(CLASSES)(x)

    def normalize(self, x: jax.Array, common: dict[str, Any]) -> Any:
        """Applies what takes the place of BN."""
        match self.method.split():
            case ["BN"]:
                return nn.BatchNorm(**common)(x)
            case ["BN,", "scale", _]:
                return nn.BatchNorm(scale_init=nn.initializers.constant(math.sqrt(3)), **common)(x)
            case ["MN,", components, _]:
                return contrib_linen.MixtureNorm(num_components=int(components), **common)(x)
        raise ValueError(f"no method {self.method!r}; there are {', '.join(METHODS)}")


def task(trial: Trial) -> trials.Task:
    """Returns the training of the network by gradient descent with momentum; it measures what a step takes."""
    made = training(trial.method)
    shape = (trial.batch_size, 8, 8, 1) if trial.data == "digits" else (trial.batch_size, 32, 32, 3)
    return made._replace(measure=lambda state: milliseconds(shape)[trial.method])


def training(method: str) -> trials.Task:
    """Returns the training by a method."""
    sgd = functools.partial(optax.sgd, momentum=MOMENTUM)
    return trials.classifier(Network(method), lambda rate, params, x: optax.with_extra_args_support(sgd(rate)))


@functools.cache
def milliseconds(shape: tuple[int, ...]) -> dict[str, float]:
    """Returns the time of a step of every method on images of that shape, compiled: of steps in turn, the fastest."""
    x, y, rate = jnp.ones(shape), jnp.zeros(shape[0], jnp.int32), jnp.float32(0.01)
    tasks = {method: training(method) for method in METHODS}
    states = {method: jax.jit(made.init)(jax.random.key(0), x) for method, made in tasks.items()}
    steps = {method: jax.jit(made.step) for method, made in tasks.items()}
    fastest = dict.fromkeys(METHODS, math.inf)
    for _ in range(TIMED):
        for method, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(states[method], rate, x, y))
            fastest[method] = min(fastest[method], 1000 * (time.perf_counter() - start))
    return fastest


def tuning(quick: bool) -> list[Trial]:
    """Returns a training by every method at every rate."""
    data, steps, rates = ("digits", QUICK_STEPS, QUICK_RATES) if quick else ("cifar-10", STEPS, RATES)
    return [Trial(data, SETTING, method, BATCH_SIZE, rate, steps, 0) for method in METHODS for rate in rates]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what every method reaches, with seed 0 at all rates too, and what a step takes."""
    rows = [
        [method, f"{min(outcome.measure for outcome in own):.1f}"]
        for (_, _, _, method), own in protocol.by_cell(outcomes).items()
    ]
    texts = {
        "mixture": protocol.accuracy_table(outcomes),
        "mixture_rates": protocol.validation_table(outcomes),
        "mixture_steps": tables.markdown(["method", "milliseconds a step"], rows),
    }
    return texts, {}


EXPERIMENT = trials.Experiment(tuning, task, report)
