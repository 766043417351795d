"""Whether targets can be fitted by the hidden weights of a gated head alone, and how fast two phases get there.

A few hundred digits of MNIST, squared loss, one dense layer of features and a gated head of several widths, trained by
Adam on all digits at once: all layers to the end, or all for half of the steps and then the hidden weights alone, by
Adam or by L-BFGS. Beside it ``alignment_residual`` follows what of the targets
the hidden weights cannot reach.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import images
import protocol
import runs
import sweeps
import tables
import trials
from bnp_optax.contrib import alignment_residual, explore_then_exploit, gated_head
from bnp_optax.contrib.alignment import with_ones
from bnp_optax.contrib.linen import GatedHead
from protocol import Outcome, Trial

FEATURES, CLASSES, EXAMPLES, QUICK_EXAMPLES = 32, 10, 300, 100
WIDTHS, QUICK_WIDTHS = (2, 8, 32), (4,)
STEPS, QUICK_STEPS = 400, 20
RATES, QUICK_RATES = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01), (0.003, 0.01)
RATE = 0.001  # of the trainings whose residual is followed
RESIDUALS = "alignment_residuals.csv"
# Outputs begin at a tenth of the usual scale, near the targets: else the first steps close many gates for good.
SMALL = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal", in_axis=1, out_axis=0)
ALL, TWO, SOLVER = "all layers", "two phases", "two phases, L-BFGS"
METHODS, QUICK_METHODS = (ALL, TWO, SOLVER), (ALL, SOLVER)


class Network(nn.Module):
    """One layer of features, and the gated head, which has the other two layers.

    Attributes:
      width: hidden units of the head for every class.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, frozen: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns the outputs for images ``[n, height, width, channels]``, and the features."""
        z = nn.relu(nn.Dense(FEATURES, name="features")(x.reshape(x.shape[0], -1)))
        return GatedHead(CLASSES, self.width, output_init=SMALL, name="head")(z, frozen), z


class State(NamedTuple):
    """What a training carries from step to step; the gate counts from the second phase on."""

    params: Any
    gate: jax.Array
    opt_state: Any


def setting(width: int) -> str:
    """Returns how trials name the network."""
    return f"width {width}"


def make_task(trial: Trial) -> trials.Task:
    """Returns the training of a method."""
    model = Network(int(trial.setting.split()[1]))
    begin = trial.steps + 1 if trial.method == ALL else trial.steps // 2  # of the second phase
    hidden = {"features": False, "head": {"hidden": True, "output": False}}

    def make_optimizer(rate: Any) -> optax.GradientTransformationExtraArgs:
        second = optax.lbfgs() if trial.method == SOLVER else optax.adam(rate)
        return explore_then_exploit(optax.adam(rate), second, begin, hidden)

    def init(key: jax.Array, x: Any) -> State:
        params = model.init(key, x)["params"]
        return State(params, params["head"]["hidden"], make_optimizer(0.0).init(params))

    def outputs(params: Any, gate: jax.Array, x: Any, frozen: bool) -> jax.Array:
        variables = {"params": params, "gate": {"head": {"hidden": gate}}}
        return jnp.asarray(model.apply(variables, x, frozen)[0])

    def step(state: State, rate: jax.Array, x: Any, y: Any) -> tuple[State, jax.Array]:
        params, count = state.params, state.opt_state.count
        gate = jnp.where(count == begin, params["head"]["hidden"], state.gate)
        targets = jax.nn.one_hot(y, CLASSES)

        def loss_fn(params: Any, frozen: bool) -> jax.Array:
            return jnp.square(outputs(params, gate, x, frozen) - targets).sum(-1).mean() / 2

        tied, fixed = functools.partial(loss_fn, frozen=False), functools.partial(loss_fn, frozen=True)
        loss, gradients = jax.lax.cond(count < begin, jax.value_and_grad(tied), jax.value_and_grad(fixed), params)
        extra: Any = {"value": loss, "grad": gradients, "value_fn": fixed}
        updates, opt_state = make_optimizer(rate).update(gradients, state.opt_state, params, **extra)
        return State(optax.apply_updates(params, updates), gate, opt_state), loss

    def predict(state: State, x: Any) -> jax.Array:
        tied, fixed = (outputs(state.params, state.gate, x, frozen) for frozen in (False, True))
        return jnp.where(state.opt_state.count > begin, fixed, tied)

    return trials.Task(init, step, predict, batches=same_batch)


def same_batch(trial: Trial, split: images.Split) -> Iterator[images.Split]:
    """Yields the first examples at every step."""
    return itertools.repeat(images.Split(split.images[: trial.batch_size], split.labels[: trial.batch_size]))


def tuning(quick: bool) -> list[Trial]:
    """Returns a training of every method in every width at every rate, which in L-BFGS is that of the first phase."""
    data, steps, examples = ("digits", QUICK_STEPS, QUICK_EXAMPLES) if quick else ("mnist", STEPS, EXAMPLES)
    return [
        Trial(data, setting(width), method, examples, rate, steps, 0)
        for width in (QUICK_WIDTHS if quick else WIDTHS)
        for method in (QUICK_METHODS if quick else METHODS)
        for rate in (QUICK_RATES if quick else RATES)
    ]


@dataclasses.dataclass(frozen=True)
class Residual:
    """What can be reached by the hidden weights, and what was.

    Attributes:
      setting: the network, as the trainings name it.
      method: as the trainings name it.
      seed: of the initial weights.
      steps: how many the training had taken.
      columns: hidden weights of every output.
      rank: of the examples' rows in the Jacobian of one output, the lowest of all outputs.
      residual: the norm of the targets outside of the column space, relative to that of the targets.
      error: the norm of the targets less the outputs, likewise.
      commit: of the code.
    """

    setting: str
    method: str
    seed: int
    steps: int
    columns: int
    rank: int
    residual: float
    error: float
    commit: str


@jax.jit
def reach(z: jax.Array, hidden: jax.Array, output: jax.Array, gate: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the lowest rank and the residual, output by output, and the error of the outputs."""

    def of_output(own: tuple[jax.Array, ...]) -> Any:
        w, v, r, targets = own

        def f(w: jax.Array, z: jax.Array) -> jax.Array:
            return gated_head(z, w[:, None], v[None], r[:, None])[:, 0]

        return alignment_residual(f, w, z, targets)

    found = jax.lax.map(of_output, (hidden.swapaxes(0, 1), output, gate.swapaxes(0, 1), y.T))
    norms = jnp.linalg.norm(y, axis=0)
    size = jnp.linalg.norm(norms)
    error = jnp.linalg.norm(gated_head(z, hidden, output, gate) - y) / size
    return found.rank.min(), jnp.linalg.norm(found.residual * norms) / size, error


def follow_all(results: Path, data_dir: Path, quick: bool) -> None:
    """Trains with and without a second phase, and adds the rows of what the CSV file lacks."""
    output = results / RESIDUALS
    done = {(row.setting, row.method, row.seed): [row] for row in runs.read_rows(output, Residual)}
    seeds = trials.QUICK_SEEDS if quick else trials.SEEDS
    cells = [dataclasses.replace(trial, rate=RATE) for trial in tuning(quick)]
    todo = [dataclasses.replace(trial, seed=seed) for trial in dict.fromkeys(cells) for seed in seeds]
    by_key = {(trial.setting, trial.method, trial.seed): trial for trial in todo}

    def work(key: tuple[str, str, int], advance: Callable[[int], None]) -> list[Residual]:
        return follow(by_key[key], data_dir)

    sweeps.sweep(list(by_key), work, done, functools.partial(runs.append_rows, output), title=output.stem)


def follow(trial: Trial, data_dir: Path) -> list[Residual]:
    """Trains once, and returns what can be reached and was at the start, at half of the steps, and at the end."""
    split, commit = trials.load(trial.data, data_dir).train, runs.commit()
    mean, deviation = float(split.images.mean()), float(split.images.std())
    task = trials.compiled(make_task, dataclasses.replace(trial, rate=0.0, seed=0), mean, deviation)
    batches = task.batches(trial, split)
    x, labels = next(batches)
    model, rows, done = Network(int(trial.setting.split()[1])), [], 0
    state = task.init(jax.random.key(trial.seed), split.images[:1])
    for stop in (0, trial.steps // 2, trial.steps):
        for _ in range(stop - done):
            state, _ = task.step(state, jnp.float32(trial.rate), *next(batches))
        done = stop
        head: Any = state.params["head"]
        _, z = model.apply({"params": state.params}, (x.astype(np.float32) - mean) / deviation)
        is_frozen = trial.method != ALL and stop == trial.steps
        arrays = (
            with_ones(jnp.asarray(z)),
            head["hidden"],
            head["output"],
            state.gate if is_frozen else head["hidden"],
        )
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]
            rank, residual, error = reach(*wide, jnp.asarray(np.eye(CLASSES)[labels]))
        numbers = (head["hidden"][:, 0].size, int(rank), float(f"{residual:.4g}"), float(f"{error:.4g}"))
        rows.append(Residual(trial.setting, trial.method, trial.seed, stop, *numbers, commit))
    return rows


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what every method reaches."""
    return {"alignment": protocol.accuracy_table(outcomes)}, {}


def report_residuals(outcomes: Sequence[Outcome], results: Path) -> trials.Report:
    """Returns what can be reached and was: medians of the seeds."""
    rows, lines = runs.read_rows(results / RESIDUALS, Residual), []
    for name, method, steps in dict.fromkeys((row.setting, row.method, row.steps) for row in rows):
        own = [row for row in rows if (row.setting, row.method, row.steps) == (name, method, steps)]
        rank, residual, error = (
            np.median([getattr(row, field) for row in own]) for field in ("rank", "residual", "error")
        )
        lines.append([name, method, str(steps), str(own[0].columns), f"{rank:.0f}", number(residual), number(error)])
    header = ["setting", "method", "steps", "weights an output", "rank", "out of reach", "missed"]
    return {"alignment_residuals": tables.markdown(header, lines)}, {}


def number(value: float) -> str:
    """Returns a share as text, rounding errors as a power of ten."""
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"


EXPERIMENT = trials.Experiment(tuning, make_task, report, also=follow_all, also_report=report_residuals)
