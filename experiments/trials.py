"""Trainings of the methods of ``bnp_optax.contrib``, each a row of a CSV file.

Every experiment compares methods in several settings. One run at each learning rate of one grid, with seed 0, lets the
validation images choose a rate; runs with the other seeds at that rate alone read the test images. Some experiments
refine the grid around each method's best rate before, all by one rule.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import bnp_optax as bnp
import images
import programs
import protocol
import runs
import sweeps
from programs import UserError
from protocol import Outcome, Trial

SEEDS, QUICK_SEEDS = (1, 2, 3), (1,)
EVALUATION_BATCH = 500

load = functools.cache(images.load)


def epochs(trial: Trial, split: images.Split) -> Iterator[images.Split]:
    """Yields batches without end: every epoch in a new order, examples that fill no batch left out."""
    rng = np.random.default_rng(trial.seed)
    while True:
        order = rng.permutation(len(split.labels))
        for start in range(0, len(order) - trial.batch_size + 1, trial.batch_size):
            chosen = order[start : start + trial.batch_size]
            yield images.Split(split.images[chosen], split.labels[chosen])


class Task(NamedTuple):
    """What an experiment trains, as functions to be compiled; images are standardized by the training pixels.

    Attributes:
      init: ``(key, one image) -> state``.
      step: ``(state, learning rate, images, labels) -> state, loss``.
      predict: ``(state, images) -> logits``, as the network is used after training.
      measure: ``(state) -> number``, at the end.
      batches: ``(trial, training images) -> batches`` without end.
    """

    init: Callable[[jax.Array, Any], Any]
    step: Callable[[Any, jax.Array, Any, Any], tuple[Any, jax.Array]]
    predict: Callable[[Any, Any], jax.Array]
    measure: Callable[[Any], jax.Array | float] = lambda state: math.nan
    batches: Callable[[Trial, images.Split], Iterator[images.Split]] = epochs


Report = tuple[dict[str, str], dict[str, Figure]]  # tables and figures by name


class State(NamedTuple):
    """What the training of a classifier carries from step to step."""

    params: optax.Params
    batch_stats: Any
    opt_state: optax.OptState


def classifier(
    model: nn.Module,
    optimizer: Callable[[Any, Any, Any], optax.GradientTransformationExtraArgs],
    records: bool = False,
    start: Callable[[optax.Params, Any], optax.Params] = lambda params, images: params,
    smoothing: float = 0.0,
) -> Task:
    """Returns the training of a network by the cross-entropy of its logits.

    Args:
      model: the network, called with ``train=True`` in training, and used with its running statistics.
      optimizer: ``(learning rate, parameters, images) -> optimizer``.
      records: whether it wants the records of BNP.
      start: ``(initialized parameters, images) -> parameters`` that training begins with.
      smoothing: the part of a label that is spread over all classes.
    """

    def init(key: jax.Array, x: Any) -> State:
        variables = model.init(key, x)
        params = start(variables["params"], x)
        return State(params, variables.get("batch_stats", {}), optimizer(0.0, params, x).init(params))

    def step(state: State, rate: jax.Array, x: Any, y: Any) -> tuple[State, jax.Array]:
        def loss_fn(params: optax.Params) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            options: Any = {"train": True, "mutable": ["batch_stats"]}
            inputs: dict[str, Any] = {}
            if records:
                (logits, updated), inputs = bnp.linen.capture(model)(variables, x, **options)
            else:
                logits, updated = model.apply(variables, x, **options)
            if smoothing:
                labels = optax.smooth_labels(jax.nn.one_hot(y, logits.shape[-1]), smoothing)
                losses = optax.softmax_cross_entropy(logits, labels)
            else:
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), (updated.get("batch_stats", {}), inputs)

        (loss, (batch_stats, inputs)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        tx = optimizer(rate, state.params, x)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params, intermediates=inputs)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss

    def predict(state: State, x: Any) -> jax.Array:
        return jnp.asarray(model.apply({"params": state.params, "batch_stats": state.batch_stats}, x))

    return Task(init, step, predict)


class Experiment(NamedTuple):
    """One method, beside what it is compared with.

    Attributes:
      tuning: ``(quick) -> trials`` with seed 0 at every learning rate.
      task: makes the task of a trial, whose rate and seed are 0: they are arguments of what is compiled.
      report: makes tables and figures, by name, of all outcomes.
      further: ``(quick) -> trials`` beside those at the best rates.
      also: ``(folder of the results, folder of the data, quick)``: measures what is no training, after all of these,
        and adds it to a CSV file of its own in the folder.
      also_report: ``(all outcomes, folder of the results)``: makes tables and figures of that file.
      seeds: that read the test images at the best rates.
      refined: whether each method's grid is closed and refined around its best rate, as ``refined`` does.
      fit: whether what is measured of a training is its accuracy on the training images, as the network is used.
    """

    tuning: Callable[[bool], list[Trial]]
    task: Callable[[Trial], Task]
    report: Callable[[Sequence[Outcome]], Report]
    further: Callable[[bool], list[Trial]] = lambda quick: []
    also: Callable[[Path, Path, bool], None] = lambda results, data_dir, quick: None
    also_report: Callable[[Sequence[Outcome], Path], Report] = lambda outcomes, results: ({}, {})
    seeds: Sequence[int] = SEEDS
    refined: bool = False
    fit: bool = False


@functools.lru_cache(maxsize=4)  # of many methods in turn, each with programs of its own
def compiled(make: Callable[[Trial], Task], trial: Trial, mean: float, deviation: float) -> Task:
    """Returns the task of a trial compiled, its images unsigned bytes."""
    task = make(trial)

    def standardized(x: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) - mean) / deviation

    return task._replace(
        init=jax.jit(lambda key, x: task.init(key, standardized(x))),
        step=jax.jit(lambda state, rate, x, y: task.step(state, rate, standardized(x), y), donate_argnums=0),
        predict=jax.jit(lambda state, x: task.predict(state, standardized(x))),
    )


def train(
    make: Callable[[Trial], Task],
    trial: Trial,
    data_dir: Path,
    advance: Callable[[int], None] = lambda _: None,
    fit: bool = False,
) -> Outcome:
    """Runs one training.

    Args:
      make: makes its task.
      trial: what to run.
      data_dir: the folder of the data sets.
      advance: called with the number of steps since its last call.
      fit: whether to measure the accuracy on the training images, and not what the task measures.

    Returns:
      The outcome; a training stops within a tenth of its steps after its loss ceased to be finite.
    """
    start, commit, data = time.perf_counter(), runs.commit(), load(trial.data, data_dir)
    mean, deviation = float(data.train.images.mean()), float(data.train.images.std())
    task = compiled(make, dataclasses.replace(trial, rate=0.0, seed=0), mean, deviation)
    rate, state = jnp.float32(trial.rate), task.init(jax.random.key(trial.seed), data.train.images[:1])
    batches, loss = task.batches(trial, data.train), math.nan
    for part in np.array_split(np.arange(trial.steps), 10):
        losses = []
        for _ in part:
            state, loss_of_step = task.step(state, rate, *next(batches))
            losses.append(loss_of_step)
        loss = float(np.mean(jax.device_get(losses))) if losses else loss
        advance(len(part))
        if losses and not math.isfinite(loss):
            break
    validation = accuracy(task, state, data.validation)
    test = accuracy(task, state, data.test) if trial.seed else math.nan
    seconds = round(time.perf_counter() - start, 1)
    measured = accuracy(task, state, data.train) if fit else float(task.measure(state))
    return Outcome(
        **dataclasses.asdict(trial),
        commit=commit,
        seconds=seconds,
        train_loss=loss,
        validation_accuracy=validation,
        test_accuracy=test,
        measure=measured,
    )


def accuracy(task: Task, state: Any, split: images.Split) -> float:
    """Returns the accuracy in percent."""
    cuts = range(EVALUATION_BATCH, len(split.labels), EVALUATION_BATCH)
    parts = zip(np.split(split.images, cuts), np.split(split.labels, cuts), strict=True)
    right = sum(int((np.asarray(task.predict(state, x)).argmax(-1) == y).sum()) for x, y in parts)
    return 100 * right / len(split.labels)


def run(experiment: Experiment, output: Path, data_dir: Path, quick: bool = False, workers: int = 1) -> list[Outcome]:
    """Runs what has no row in the CSV file yet: every rate, then the other seeds at the best.

    Args:
      experiment: what to run.
      output: the CSV file.
      data_dir: the folder of the data sets.
      quick: a short form on scikit-learn's digits, which needs no download.
      workers: processes that share the cores.

    Returns:
      All outcomes of the experiment.
    """

    def sweep(todo: list[Trial]) -> list[Outcome]:
        return sweeps.sweep(
            todo,
            functools.partial(train, experiment.task, data_dir=data_dir, fit=experiment.fit),
            {outcome.trial: outcome for outcome in runs.read_rows(output, Outcome)},
            lambda outcome: runs.append_rows(output, [outcome]),
            title=output.stem,
            size=lambda trial: trial.steps,
            unit="steps",
            workers=workers,
        )

    seeds = experiment.seeds[:1] if quick else experiment.seeds
    tuning = sweep(experiment.tuning(quick))
    if experiment.refined and not quick:
        tuning = protocol.refined(tuning, sweep, protocol.by_cell, protocol.best)
    final = [
        dataclasses.replace(protocol.best(own).trial, seed=seed)
        for own in protocol.by_cell(tuning).values()
        for seed in seeds
    ]
    outcomes = tuning + sweep(list(dict.fromkeys([*final, *experiment.further(quick)])))
    experiment.also(output.parent, data_dir, quick)
    return outcomes


def report(experiment: Experiment, outcomes: Sequence[Outcome], results: Path) -> Report:
    """Returns the tables and the figures of an experiment, by name, of all that its CSV files in the folder hold."""
    texts, drawn = experiment.report(outcomes)
    more_texts, more_drawn = experiment.also_report(outcomes, results)
    return texts | more_texts, drawn | more_drawn


def report_all(experiments: Mapping[str, Experiment], results: Path) -> Report:
    """Returns the tables and the figures of all experiments that have a CSV file in the folder.

    Raises:
      UserError: if none has.
    """
    texts: dict[str, str] = {}
    drawn: dict[str, Figure] = {}
    for name, experiment in experiments.items():
        if rows := runs.read_rows(results / f"{name}.csv", Outcome):
            own_texts, own_figures = report(experiment, rows, results)
            texts |= own_texts
            drawn |= own_figures
    if not texts:
        names = ", ".join(f"{name}.csv" for name in experiments)
        raise UserError(f"{results} holds no finished experiment: none of {names}")
    return texts, drawn


def main(
    description: str, experiments: Mapping[str, Experiment], argv: list[str] | None, on_demand: Collection[str] = ()
) -> None:
    """Runs the experiments that the arguments name, and prints their tables.

    Args:
      description: of the program, for its help.
      experiments: by name, which is also that of their CSV files.
      argv: the program's arguments.
      on_demand: names of those that run only if they are named.
    """
    usual = [name for name in experiments if name not in on_demand]
    args = sweeps.parse(programs.Parser(description=description), argv, usual, on_demand)
    for name in args.experiments:
        outcomes = run(experiments[name], args.results / f"{name}.csv", args.data_dir, args.quick, args.workers)
        for title, table in report(experiments[name], outcomes, args.results)[0].items():
            print(f"\n{title}\n\n{table}")
