"""Whether neural sampling machines do not mind the scale of their first weights, and what more samples bring.

Two hidden layers of binary units on the pixels of MNIST as signs, by Adam: with noise, which normalizes the units, and
as signs with a straight-through gradient, from weights of three scales.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import protocol
import trials
from bnp_optax.contrib.linen import NSMDense
from protocol import Outcome, Trial

WIDTHS, CLASSES = (100, 100), 10
BATCH_SIZE, STEPS, QUICK_STEPS = 100, 600, 20
RATES, QUICK_RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03), (0.003, 0.01)
SCALES = {"weights x 0.1": 0.1, "weights x 1": 1.0, "weights x 10": 10.0}
SAMPLES = {"signs": 0, "NSM, 1 sample": 1, "NSM, 10 samples": 10, "NSM, 100 samples": 100}  # of a prediction
EVERYWHERE = ("signs", "NSM, 10 samples")  # the methods that begin at all scales


@jax.custom_jvp
def sign(u: jax.Array) -> jax.Array:
    """Returns the sign, with the gradient of the identity between -1 and 1."""
    return jnp.where(u >= 0, 1.0, -1.0)


@sign.defjvp
def _sign_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return sign(*primals), jnp.where(jnp.abs(primals[0]) <= 1, tangents[0], 0.0)


class Network(nn.Module):
    """Two hidden layers of binary units, and a classifier.

    Attributes:
      noisy: whether the units draw noise; else they are signs of sums.
      scale: of the hidden layers' first weights, beside the default one, at which sums of signs have variance 1.
    """

    noisy: bool
    scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images ``[n, height, width, channels]``; a pixel counts as above the mean or below."""
        z = jnp.where(x.reshape(x.shape[0], -1) >= 0, 1.0, -1.0)
        kernel_init = nn.initializers.variance_scaling(self.scale**2, "fan_in", "normal")
        for width in WIDTHS:
            if self.noisy:
                z = NSMDense(width, kernel_init=kernel_init)(z)
            else:
                z = sign(nn.Dense(width, kernel_init=kernel_init)(z))
        return nn.Dense(CLASSES)(z)


class State(NamedTuple):
    """What the training carries from step to step."""

    params: optax.Params
    opt_state: optax.OptState
    key: jax.Array


def make_task(trial: Trial) -> trials.Task:
    """Returns what a trial trains; predictions are means over samples of the classes' probabilities."""
    samples = SAMPLES[trial.method]
    model = Network(samples > 0, SCALES[trial.setting])

    def logits(params: optax.Params, x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, x, rngs={"noise": key}))

    def init(key: jax.Array, x: Any) -> State:
        key, own = jax.random.split(key)
        params = model.init(own, x)["params"]
        return State(params, optax.adam(0.0).init(params), key)

    def step(state: State, rate: jax.Array, x: Any, y: Any) -> tuple[State, jax.Array]:
        key, own = jax.random.split(state.key)

        def loss_fn(params: optax.Params) -> jax.Array:
            losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits(params, x, own), y)
            return losses.mean()

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = optax.adam(rate).update(gradients, state.opt_state)
        return State(optax.apply_updates(state.params, updates), opt_state, key), loss

    def predict(state: State, x: Any) -> jax.Array:
        keys = jax.random.split(state.key, max(samples, 1))
        probabilities: jax.Array = jax.lax.map(lambda key: jax.nn.softmax(logits(state.params, x, key)), keys)
        return probabilities.mean(0)

    return trials.Task(init, step, predict)


def tuning(quick: bool) -> list[Trial]:
    """Returns a training of every method at every rate, from the scales that it is tried at."""
    if quick:
        return [
            Trial("digits", "weights x 1", m, BATCH_SIZE, r, QUICK_STEPS, 0) for m in EVERYWHERE for r in QUICK_RATES
        ]
    return [
        Trial("mnist", setting, method, BATCH_SIZE, rate, STEPS, 0)
        for setting, scale in SCALES.items()
        for method in SAMPLES
        if scale == 1.0 or method in EVERYWHERE
        for rate in RATES
    ]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what every method reaches from every scale."""
    return {"sampling": protocol.accuracy_table(outcomes)}, {}


EXPERIMENT = trials.Experiment(tuning, make_task, report)
