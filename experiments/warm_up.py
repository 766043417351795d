"""Whether the warm-up by effective learning rates helps deep networks with BN, and what it does to their spread.

ReLU networks of 20 and 40 dense layers without skip connections on MNIST, BN without scale and bias in each, by plain
SGD: what the method's theory assumes. Of the deeper networks, which barely train, some guess with running statistics
where they do better with those of the batch. So all are evaluated with the statistics of the images that are
classified, 500 at a time, whichever method trained them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import bnp_optax as bnp
import figures
import models
import protocol
import tables
import trials
from bnp_optax.contrib import effective, effective_learning_rates, scale_by_critical_learning_rate, spread
from protocol import Outcome, Trial

DEPTHS, WIDTH, CLASSES, BATCH_SIZE = (20, 40), 128, 10, 128
STEPS, QUICK_STEPS, QUICK_DEPTH = 800, 20, 5
RATES, QUICK_RATES = (0.01, 0.03, 0.1, 0.3, 1.0), (0.1, 1.0)
NUM_HIGHEST = 3  # rates that the other seeds train at, best or not


class Method(NamedTuple):
    """A rule of the warm-up, or none, and its line in the figure."""

    rule: effective.CriticalRule | None
    style: dict[str, str]


METHODS = {
    "SGD": Method(None, {"color": "#555555", "marker": "s"}),
    "warm-up, max": Method("max", {"color": "#0072B2", "marker": "o"}),
    "warm-up, extremes": Method("extremes", {"color": "#E69F00", "marker": "^", "linestyle": "--"}),
}


class Network(nn.Module):
    """Dense layers of one width with BN, and a classifier.

    Attributes:
      depth: number of the hidden layers.
    """

    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images ``[n, height, width, channels]``, normalized by their own statistics."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(self.depth):
            x = nn.Dense(WIDTH, use_bias=False, kernel_init=models.he_normal)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)(x))
        return nn.Dense(CLASSES, name="classifier")(x)


class State(NamedTuple):
    """Everything that a step changes.

    Attributes:
      params: the parameters.
      optimizer: the optimizer's state.
      spreads: the sum of the spreads of effective learning rates before every step.
      steps: how many there were.
    """

    params: Any
    optimizer: optax.OptState
    spreads: jax.Array
    steps: jax.Array


def setting(depth: int) -> str:
    """Returns the name of the network."""
    return f"{depth} hidden layers"


def task(trial: Trial) -> trials.Task:
    """Returns the training of a network, which measures the mean spread, and diverges only where its loss does."""
    model, rule = Network(int(trial.setting.split()[0])), METHODS[trial.method].rule

    def hidden_layers(x: jax.Array) -> bnp.Layers:
        return bnp.linen.find_layers(model, x).select(lambda layer: layer.path != "classifier")

    def optimizer(rate: Any, x: jax.Array) -> optax.GradientTransformationExtraArgs:
        if rule is None:
            return optax.with_extra_args_support(optax.sgd(rate))
        return scale_by_critical_learning_rate(rate, hidden_layers(x), rule)

    def logits(params: Any, x: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, x, mutable=["batch_stats"])[0])

    def init(key: jax.Array, x: jax.Array) -> State:
        params = model.init(key, x)["params"]
        return State(params, optimizer(0.0, x).init(params), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def step(state: State, rate: jax.Array, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
        def loss_fn(params: Any) -> jax.Array:
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y))

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        own = spread(effective_learning_rates(gradients, state.params, hidden_layers(x)))
        updates, new = optimizer(rate, x).update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, new, state.spreads + own, state.steps + 1), loss

    return trials.Task(init, step, lambda state, x: logits(state.params, x), lambda state: state.spreads / state.steps)


def tuning(quick: bool) -> list[Trial]:
    """Returns a training of every method at every depth and rate."""
    data, steps, rates = ("digits", QUICK_STEPS, QUICK_RATES) if quick else ("mnist", STEPS, RATES)
    return [
        Trial(data, setting(depth), method, BATCH_SIZE, rate, steps, 0)
        for depth in ((QUICK_DEPTH,) if quick else DEPTHS)
        for method in METHODS
        for rate in rates
    ]


def further(quick: bool) -> list[Trial]:
    """Returns the trainings at the rates for which a warm-up is meant, the highest, with the other seeds."""
    seeds = trials.QUICK_SEEDS if quick else trials.SEEDS
    highest = sorted(QUICK_RATES if quick else RATES)[-NUM_HIGHEST:]
    return [dataclasses.replace(trial, seed=seed) for trial in tuning(quick) if trial.rate in highest for seed in seeds]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what the methods reach at their best rates, and at the highest ones."""
    texts = {"warm_up": protocol.accuracy_table(outcomes), "warm_up_high": high_rates_table(outcomes)}
    return texts, {"warm_up": by_rate(outcomes)}


def high_rates_table(outcomes: Sequence[Outcome]) -> str:
    """Returns accuracy, loss and mean spread at the highest rates, over the seeds that read the test images."""
    lines = []
    for rate in sorted({outcome.rate for outcome in outcomes})[-NUM_HIGHEST:]:
        for (_, name, _, method), cell in protocol.by_cell(outcomes).items():
            own = [outcome for outcome in cell if outcome.rate == rate and outcome.seed]
            if not own:  # they are still to come
                continue
            tests = np.array([tables.CHANCE if outcome.diverged else outcome.test_accuracy for outcome in own])
            losses, spreads = (np.array([getattr(o, field) for o in own]) for field in ("train_loss", "measure"))
            cells = [f"{tests.mean():.1f}", tables.range_text(tests), f"{losses.mean():.3f}"]
            cells += [f"{losses.min():.3f} to {losses.max():.3f}", f"{spreads.mean():.2f}"]
            lines.append([name, f"{rate:g}", method, *cells])
    header = ["network", "rate", "method", "test accuracy", "range", "train loss", "range", "mean spread (decades)"]
    return tables.markdown(header, sorted(lines, key=lambda line: (line[0], float(line[1]))))


def by_rate(outcomes: Sequence[Outcome]) -> Figure:
    """Draws validation accuracy and mean spread against learning rate, with seed 0."""
    names = list(dict.fromkeys(outcome.setting for outcome in outcomes))
    figure, axes = figures.panels([*names, *names], len(names), "")
    for number, name in enumerate(names):
        above, below = axes[number], axes[len(names) + number]
        for method in METHODS:
            own = [o for o in outcomes if (o.setting, o.method, o.seed) == (name, method, 0)]
            own.sort(key=lambda outcome: outcome.rate)
            rates = [o.rate for o in own]
            style: dict[str, Any] = {"label": method, "markersize": 4} | METHODS[method].style
            above.plot(rates, [tables.CHANCE if o.diverged else o.validation_accuracy for o in own], **style)
            below.plot(rates, [o.measure for o in own], **style)
        above.set(xscale="log", ylabel="validation accuracy (%)")
        below.set(xscale="log", ylabel="mean spread (decades)", xlabel="learning rate")
    return figures.add_legend(figure, axes)


EXPERIMENT = trials.Experiment(tuning, task, report, further)
