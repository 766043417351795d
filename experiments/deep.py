"""A deep network of BN or of none, trained by SGD and Adam or in BNP's variables, and what the diagnostics say of it.

Activations are measured where they enter a ReLU, behind BN where there is one, and at the logits.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax as bnp
import models
import runs
import sweeps
import trials
from bnp_optax.contrib import diagnostics
from protocol import Trial

DIAGNOSTICS = "bjorck_diagnostics.csv"
DEPTH, QUICK_DEPTH, WIDTH, CLASSES, BATCH_SIZE = 12, 4, 100, 10, 128
EXAMPLES = 256  # that the diagnostics look at


class Family(NamedTuple):
    """What one optimizer's methods have in common.

    Attributes:
      rates: the grid of learning rates, and the sizes of the steps along which the loss is taken.
      rate: of the trainings that the diagnostics look at.
      step: the size of the step after which activations are measured again.
      shown: the sizes of steps whose loss the table shows.
    """

    rates: tuple[float, ...]
    rate: float
    step: float
    shown: tuple[float, float]


class Method(NamedTuple):
    """A network and its optimizer.

    Attributes:
      optimizer: "sgd" or "adam".
      normalized: which hidden layers have BN: all, the last alone, or none.
      in_variables_of_bnp: whether the optimizer runs there.
    """

    optimizer: Literal["sgd", "adam"]
    normalized: Literal["all", "last", "none"] = "none"
    in_variables_of_bnp: bool = False

    @property
    def kind(self) -> str:
        """What is done beside the optimizer, as the figure names it."""
        of_bn = {"all": "BN", "last": "BN before the classifier", "none": "alone"}
        return "BNP" if self.in_variables_of_bnp else of_bn[self.normalized]


FAMILIES = {
    "sgd": Family((0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), 0.03, 1.0, (1.0, 10.0)),
    "adam": Family((3e-5, 1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3), 0.001, 0.03, (0.03, 0.3)),
}
METHODS = {
    "SGD": Method("sgd"),
    "SGD + BN": Method("sgd", "all"),
    "SGD + last BN": Method("sgd", "last"),
    "BNP(SGD)": Method("sgd", in_variables_of_bnp=True),
    "Adam": Method("adam"),
    "Adam + BN": Method("adam", "all"),
    "BNP(Adam)": Method("adam", in_variables_of_bnp=True),
}
QUICK_METHODS = ("SGD", "SGD + BN", "BNP(Adam)")


class Network(nn.Module):
    """Fully connected layers of one width.

    What enters a ReLU, behind BN where there is one, and the logits are the activations that the diagnostics look at.

    Attributes:
      normalized: which hidden layers have BN: "all", "last" or "none".
      depth: number of layers.
    """

    normalized: str = "none"
    depth: int = DEPTH

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits."""
        dense = functools.partial(nn.Dense, kernel_init=models.he_normal)
        x = x.reshape(x.shape[0], -1)
        for number in range(1, self.depth):
            a = dense(WIDTH)(x)
            if self.normalized == "all" or (self.normalized == "last" and number == self.depth - 1):
                a = nn.BatchNorm(use_running_average=not train)(a)
            x = nn.relu(self.watch(number, a))
        return self.watch(self.depth, dense(CLASSES)(x))

    def watch(self, number: int, a: jax.Array) -> jax.Array:
        """Shows the activations of a layer, and lets their gradient be taken."""
        self.sow("activations", f"layer_{number}", a)
        return self.perturb(f"layer_{number}", a)


class State(NamedTuple):
    """What a training carries from step to step."""

    params: optax.Params
    batch_stats: Any
    opt_state: optax.OptState


class Program(NamedTuple):
    """The functions of one method.

    Attributes:
      task: the trainings.
      look: ``(state, images, labels) -> {name: {layer or size of a step: value}}``, what the diagnostics say.
    """

    task: trials.Task
    look: Callable[[State, jax.Array, jax.Array], dict[str, Any]]


def setting(depth: int) -> str:
    """Returns how trials name the network."""
    return f"{depth} layers of {WIDTH}"


def make_task(trial: Trial) -> trials.Task:
    """Returns what a trial trains."""
    return make_program(trial.method, int(trial.setting.split()[0])).task


@functools.cache
def make_program(name: str, depth: int) -> Program:
    """Returns the functions of a method in a network of so many layers."""
    method = METHODS[name]
    model = Network(method.normalized, depth)

    def make_optimizer(rate: Any, x: jax.Array) -> optax.GradientTransformationExtraArgs:
        inner = optax.sgd(rate) if method.optimizer == "sgd" else optax.adam(rate)
        if method.in_variables_of_bnp:
            return bnp.preconditioned(inner, bnp.linen.find_layers(model, x))
        return optax.with_extra_args_support(inner)

    def init(key: jax.Array, x: jax.Array) -> State:
        variables = model.init(key, x)
        opt_state = make_optimizer(1.0, x).init(variables["params"])
        return State(variables["params"], variables.get("batch_stats", {}), opt_state)

    def gradients(state: State, x: jax.Array, y: jax.Array) -> Any:
        """Returns the loss, what the pass changes, and the gradients."""

        def loss_fn(params: optax.Params) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            (logits, updated), records = bnp.linen.capture(model)(variables, x, train=True, mutable=["batch_stats"])
            return mean_loss(logits, y), (updated.get("batch_stats", {}), records)

        return jax.value_and_grad(loss_fn, has_aux=True)(state.params)

    def step(state: State, rate: jax.Array, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
        (loss, (batch_stats, records)), grads = gradients(state, x, y)
        tx = make_optimizer(rate, x)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, intermediates=records)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss

    def predict(state: State, x: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": state.params, "batch_stats": state.batch_stats}, x))

    def look(state: State, x: jax.Array, y: jax.Array) -> dict[str, Any]:
        """Returns the diagnostics of one batch, with the statistics of that batch in BN."""

        def forward(params: optax.Params, offsets: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats, "perturbations": offsets}
            logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats", "activations"])
            activations = {name: own for name, (own,) in updated["activations"].items()}
            return mean_loss(logits, y), (logits, activations)

        shapes = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), x)["perturbations"]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        of_activations, (logits, activations) = jax.grad(forward, argnums=1, has_aux=True)(state.params, zeros)
        (_, (_, records)), grads = gradients(state, x, y)
        family = FAMILIES[method.optimizer]
        update, _ = make_optimizer(1.0, x).update(grads, state.opt_state, state.params, intermediates=records)
        moved = jax.tree.map(lambda leaf, change: leaf + family.step * change, state.params, update)
        moments, after = (
            jax.tree.map(diagnostics.layer_moments, own) for own in (activations, forward(moved, zeros)[1][1])
        )
        along = diagnostics.loss_along(
            lambda params: forward(params, zeros)[0], state.params, update, jnp.array(family.rates)
        )
        shared = jax.tree.map(lambda own: jnp.nanmean(diagnostics.input_independence(own).ratio), of_activations)
        layers = [f"layer_{number}" for number in range(1, depth + 1)]
        by_depth = {
            "mean": [moments[layer].mean for layer in layers],
            "variance": [moments[layer].variance for layer in layers],
            "mean after": [after[layer].mean for layer in layers],
            "variance after": [after[layer].variance for layer in layers],
            "independence": [shared[layer] for layer in layers],
            "gradient": [diagnostics.gradient_norm(of_activations[layer]) for layer in layers],
        }
        return by_depth | {"loss": along, "modal share": [diagnostics.modal_share(logits)]}

    return Program(trials.Task(init, step, predict), look)


def mean_loss(logits: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """One number of the diagnostics.

    Attributes:
      method: as the trainings name it.
      seed: of the initial weights and the batches.
      steps: how many steps the training had taken, at the rate of its family.
      name: "mean" and "variance" of the activations, of the magnitude of the mean and over channels; the same "after" a
        step of the size of the family; "independence", the mean over channels of ``|sum g| / sum |g|``; "gradient", the
        norm of that of the activations; "loss", relative to before, after a step; "modal share" of the logits.
      at: the layer, from 1; for "loss" the size of the step; 0 for "modal share".
      value: the number.
      commit: of the code.
    """

    method: str
    seed: int
    steps: int
    name: str
    at: float
    value: float
    commit: str


def look_at_all(results: Path, data_dir: Path, quick: bool) -> None:
    """Trains every method at the rate of its family, and adds the rows of what the CSV file lacks.

    Args:
      results: the folder of the CSV files.
      data_dir: the folder of the data sets.
      quick: a short form on scikit-learn's digits.
    """
    output = results / DIAGNOSTICS
    done = {(row.method, row.seed): [row] for row in runs.read_rows(output, Diagnosis)}
    data, stops = ("digits", (0, 3)) if quick else ("mnist", (0, 20, 300))
    depth = QUICK_DEPTH if quick else DEPTH
    todo = list(itertools.product(QUICK_METHODS if quick else METHODS, trials.QUICK_SEEDS if quick else trials.SEEDS))

    def work(which: tuple[str, int], advance: Callable[[int], None]) -> list[Diagnosis]:
        name, seed = which
        return look_at(name, depth, seed, data, data_dir, stops)

    sweeps.sweep(todo, work, done, functools.partial(runs.append_rows, output), title=output.stem)


def look_at(name: str, depth: int, seed: int, data: str, data_dir: Path, stops: Iterable[int]) -> list[Diagnosis]:
    """Trains once and returns what the diagnostics say at each of the steps, which are in rising order."""
    split = trials.load(data, data_dir).train
    mean, deviation, commit = float(split.images.mean()), float(split.images.std()), runs.commit()
    family = FAMILIES[METHODS[name].optimizer]
    trial = Trial(data, setting(depth), name, BATCH_SIZE, family.rate, 0, seed)
    task = trials.compiled(make_task, dataclasses.replace(trial, rate=0.0, seed=0), mean, deviation)
    look = compiled_look(name, depth)
    chosen = np.random.default_rng(seed).permutation(len(split.labels))[:EXAMPLES]
    x, y = (split.images[chosen].astype(np.float32) - mean) / deviation, split.labels[chosen]
    state, batches, rows, done = task.init(jax.random.key(seed), split.images[:1]), task.batches(trial, split), [], 0
    for stop in stops:
        for _ in range(stop - done):
            state, _ = task.step(state, jnp.float32(family.rate), *next(batches))
        done = stop
        for measure, values in look(state, x, y).items():
            places: Sequence[float] = {"loss": family.rates, "modal share": (0,)}.get(measure, range(1, depth + 1))
            rows += [
                Diagnosis(name, seed, stop, measure, place, float(f"{value:.5g}"), commit)
                for place, value in zip(places, np.asarray(values), strict=True)
            ]
    return rows


@functools.cache
def compiled_look(name: str, depth: int) -> Callable[[State, Any, Any], dict[str, Any]]:
    return jax.jit(make_program(name, depth).look)
