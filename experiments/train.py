r"""Trains image classifiers with SGD, Adam or Muon: alone, with normalization layers, or with BNP.

One run, or all combinations of several methods, batch sizes, learning rates and seeds::

    python experiments/train.py --data digits --model mlp --method bnp --batch-size 4 --lr 0.1 --examples 20000
    python experiments/train.py --data cifar-10 --data-dir ~/data --model cnn --method sgd bn bnp --batch-size 128 4 \
        --lr 0.03 0.1 0.3 --seed 0 1 2 --output sweep.csv

Every run becomes a row of the CSV file. A run that has its row already is not repeated, so that a sweep that was
interrupted continues where it stopped.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from rich import box
from rich.table import Table

import bnp_optax as bnp
import images
import models
import programs
import runs
import sweeps
from runs import Result, Run

EVALUATION_BATCH = 500
WARM_UP_STEPS = 400
GRADIENT_BOUND, STEP_BOUNDS = 0.1, {"step": 0.03, "small-step": 0.01}  # relative to the norm of what they change
MODELS = ("mlp", "small-mlp", "cnn", "tutorial", "resnet18", "resnet110")


class State(NamedTuple):
    """What a run carries from step to step."""

    params: optax.Params
    batch_stats: Any
    opt_state: optax.OptState
    loss_sum: jax.Array  # over the steps since the last evaluation


def make_model(run: Run) -> models.MLP | models.CNN | models.ResNet:
    """Returns the network of a run."""
    normalization: models.Normalization = "bn" if run.method == "bn" else "gn" if run.method.endswith("gn") else "none"
    match run.model:
        case "small-mlp":
            return models.MLP(normalization, widths=(20, 20), group_size=run.group_size)
        case "mlp":
            return models.MLP(normalization, group_size=run.group_size)
        case "cnn":
            return models.CNN(normalization, group_size=run.group_size)
        case "tutorial":
            return models.tutorial_cnn(normalization=normalization, group_size=run.group_size)
    resnet = {"resnet18": models.resnet_18, "resnet110": models.resnet_110}[run.model]
    scaled = nn.initializers.variance_scaling(2 * run.init_scale**2, "fan_in", "truncated_normal")
    return resnet(normalization=normalization, group_size=run.group_size, kernel_init=scaled)


def make_optimizer(
    run: Run, rate: jax.Array | float, layers: bnp.Layers | None
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a run at a learning rate; ``layers`` are those that BNP covers."""
    num_steps = run.examples // run.batch_size

    def schedule(step: jax.Array) -> jax.Array:
        if run.schedule == "constant":
            return jnp.asarray(rate)
        factors = {min(WARM_UP_STEPS, num_steps // 10): 10.0, num_steps // 2: 0.1, 3 * num_steps // 4: 0.1}
        return jnp.asarray(rate * optax.piecewise_constant_schedule(0.1, factors)(step))

    scaling: Any = run.scaling if run.scaling.isalpha() else float(run.scaling)
    options: Any = {"decay": run.decay, "scaling": scaling, "prior_examples": run.prior_examples}
    match run.optimizer:
        case "sgd":
            momentum = optax.trace(run.momentum) if run.momentum else optax.identity()
            steps = [optax.add_decayed_weights(run.weight_decay), momentum]
            if layers is not None and run.method.startswith("bnp"):
                steps.insert(2 if run.bnp_last else 0, bnp.scale_by_bnp(layers, **options))
            inner = optax.chain(*steps, optax.scale_by_learning_rate(schedule))
        case "adam":
            inner = optax.adamw(schedule, weight_decay=run.weight_decay)
        case _:
            inner = optax.contrib.muon(
                schedule,
                weight_decay=run.weight_decay,
                adam_learning_rate=lambda step: schedule(step) / 10,
                muon_weight_dimension_numbers=models.kernel_matrices,
            )
    if run.bound == "gradient":
        inner = optax.chain(optax.adaptive_grad_clip(GRADIENT_BOUND), inner)
    elif run.bound in STEP_BOUNDS:
        clip = functools.partial(clip_kernel, STEP_BOUNDS[run.bound])
        inner = optax.chain(inner, optax.stateless_with_tree_map(clip))
    if layers is not None and run.method == "preconditioned":
        return bnp.preconditioned(inner, layers, **options)
    return optax.with_extra_args_support(inner)


def clip_kernel(proportion: float, step: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the step of a kernel, at most in this proportion to its norm; a bias, which starts at zero, is free."""
    if step.ndim == 1:
        return step
    longest = proportion * jnp.linalg.norm(kernel)
    return step * jnp.minimum(1, longest / jnp.maximum(jnp.linalg.norm(step), jnp.finfo(step.dtype).tiny))


def covered_layers(run: Run, model: nn.Module, x: jax.Array) -> bnp.Layers:
    """Returns the layers that BNP preconditions in a run."""
    layers = bnp.linen.find_layers(model, x)
    match run.covers:
        case "all":
            return layers
        case "hidden":
            last = list(layers)[-1]
            return layers.select(lambda layer: layer.path != last)
        case _:
            return layers.select(lambda layer: layer.kind == "Conv")


class Program(NamedTuple):
    """The compiled functions of runs that differ in learning rate and seed alone."""

    init: Callable[[jax.Array, jax.Array], State]  # learning rate, key
    step: Callable[[jax.Array, State, np.ndarray, np.ndarray, bool], State]  # rate, state, images, labels, refresh
    evaluate: Callable[[State, np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]  # summed loss, number right


@functools.cache
def make_program(run: Run, image_shape: tuple[int, ...], mean: float, deviation: float) -> Program:
    """Compiles a run, whose learning rate and seed are ignored.

    Args:
      run: what is run.
      image_shape: of one image.
      mean: of all pixels of the training images.
      deviation: their standard deviation.
    """
    model = make_model(run)
    blank = jnp.zeros((1, *image_shape))
    layers = covered_layers(run, model, blank) if run.method.startswith(("bnp", "preconditioned")) else None
    optimizer = functools.partial(make_optimizer, run, layers=layers)

    def standardized(x: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) - mean) / deviation

    def init(rate: jax.Array, key: jax.Array) -> State:
        variables = model.init(key, blank)
        params = variables["params"]
        return State(params, variables.get("batch_stats", {}), optimizer(rate).init(params), jnp.zeros(()))

    def step(rate: jax.Array, state: State, x: jax.Array, y: jax.Array, refresh: bool) -> State:
        def loss_fn(params: optax.Params) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            options: Any = {"train": True, "mutable": ["batch_stats"]}
            records: Any = bnp.KEEP_STATISTICS
            if layers is not None and refresh:
                (logits, updated), records = bnp.linen.capture(model)(variables, standardized(x), **options)
            else:
                logits, updated = model.apply(variables, standardized(x), **options)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (updated, records)

        (loss, (updated, records)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer(rate).update(grads, state.opt_state, state.params, intermediates=records)
        params = optax.apply_updates(state.params, updates)
        return State(params, updated.get("batch_stats", {}), opt_state, state.loss_sum + loss)

    def evaluate(state: State, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply({"params": state.params, "batch_stats": state.batch_stats}, standardized(x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum(), (logits.argmax(-1) == y).sum()

    return Program(jax.jit(init), jax.jit(step, static_argnums=4, donate_argnums=1), jax.jit(evaluate))


load = functools.cache(images.load)


def train(run: Run, data_dir: Path, evaluations: int = 4, advance: Callable[[int], None] = lambda _: None) -> Result:
    """Runs one training.

    Args:
      run: what to run.
      data_dir: the folder of the data sets.
      evaluations: how many times, evenly spaced, the validation images are classified.
      advance: called with the number of examples that were seen since its last call.

    Returns:
      The result; it ends early where the training loss is no longer finite.
    """
    start, commit, data = time.perf_counter(), runs.commit(), load(run.data, data_dir)
    shape, mean, deviation = data.train.images.shape[1:], data.train.images.mean(), data.train.images.std()
    same = dataclasses.replace(run, rate=0.0, seed=0, reads_test=False)
    program = make_program(same, shape, float(mean), float(deviation))
    rate, num_steps = jnp.asarray(run.rate, jnp.float32), run.examples // run.batch_size
    state = program.init(rate, jax.random.key(run.seed))
    stops = {round(num_steps * (number + 1) / evaluations) for number in range(evaluations)}
    seen: list[int] = []
    curves: tuple[list[float], list[float], list[float]] = ([], [], [])
    last_stop = 0
    for step, (x, y) in enumerate(images.batches(run, data.train), start=1):
        state = program.step(rate, state, x, y, (step - 1) % run.refresh_every == 0)
        if step in stops:
            train_loss = float(state.loss_sum) / (step - last_stop)
            for curve, value in zip(curves, (train_loss, *evaluate(program, state, data.validation)), strict=True):
                curve.append(value)
            seen.append(step * run.batch_size)
            advance((step - last_stop) * run.batch_size)
            if not math.isfinite(train_loss):
                break
            state, last_stop = state._replace(loss_sum=jnp.zeros(())), step
    test = evaluate(program, state, data.test) if run.reads_test else (math.nan, math.nan)
    return Result(run, commit, round(time.perf_counter() - start, 1), seen, *curves, *test)


def seconds_a_step(run: Run, data_dir: Path, steps: int = 3) -> float:
    """Measures how long a step of a run takes, once it is compiled."""
    data = load(run.data, data_dir)
    shape, mean, deviation = data.train.images.shape[1:], data.train.images.mean(), data.train.images.std()
    same = dataclasses.replace(run, rate=0.0, seed=0, reads_test=False)
    program, rate = make_program(same, shape, float(mean), float(deviation)), jnp.asarray(run.rate, jnp.float32)
    state = program.init(rate, jax.random.key(run.seed))
    batches = images.batches(run, data.train)
    state = jax.block_until_ready(program.step(rate, state, *next(batches), True))
    start = time.perf_counter()
    for x, y in itertools.islice(batches, steps):
        state = program.step(rate, state, x, y, True)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / steps


def forecast(todo: Sequence[Run], output: Path, data_dir: Path) -> str:
    """Returns how long the runs that have no row yet will take, in words, by a few steps of each method."""
    done = {result.run for result in runs.read(output)}
    left = [run for run in todo if run not in done]
    seconds = {run.method: seconds_a_step(run, data_dir) for run in {run.method: run for run in left}.values()}
    hours = sum(seconds[run.method] * (run.examples // run.batch_size) for run in left) / 3600
    steps = ", ".join(f"{method} {own:.2g}" for method, own in seconds.items())
    return f"{len(left)} runs to go, {hours:,.1f} hours by one process; seconds a step: {steps or 'none'}"


def evaluate(program: Program, state: State, split: images.Split) -> tuple[float, float]:
    """Returns the mean loss in nats and the accuracy in percent."""
    cuts = range(EVALUATION_BATCH, len(split.labels), EVALUATION_BATCH)
    parts = zip(np.split(split.images, cuts), np.split(split.labels, cuts), strict=True)
    sums = np.sum([program.evaluate(state, x, y) for x, y in parts], axis=0, dtype=float)
    return float(sums[0]) / len(split.labels), 100 * float(sums[1]) / len(split.labels)


def sweep(todo: Sequence[Run], output: Path, data_dir: Path, workers: int = 1) -> list[Result]:
    """Runs what has no row in the CSV file yet, and adds its rows.

    Args:
      todo: the runs.
      output: the CSV file.
      data_dir: the folder of the data sets.
      workers: processes that share the cores; a CPU does small steps faster on one core each.

    Returns:
      The results of ``todo``, in its order.
    """
    return sweeps.sweep(
        todo,
        functools.partial(train, data_dir=data_dir),
        {result.run: result for result in runs.read(output)},
        functools.partial(runs.append, output),
        title=output.stem,
        size=lambda run: run.examples,
        unit="examples",
        workers=workers,
    )


def make_table(results: Sequence[Result]) -> Table:
    """Returns a table with a row a run."""
    table = Table(box=box.SIMPLE_HEAD, caption="Accuracies in percent, at the end; nan: not read, or diverged.")
    for header in ("data", "model", "method", "batch", "rate", "seed", "train loss", "validation", "test", "seconds"):
        table.add_column(header, justify="left" if header in ("data", "model", "method") else "right")
    for result in results:
        run = result.run
        validation = math.nan if result.diverged else result.validation_accuracy[-1]
        row = (run.data, run.model, run.method, run.batch_size, f"{run.rate:g}", run.seed)
        values = (result.train_loss[-1], validation, result.test_accuracy)
        table.add_row(*map(str, row), *(f"{value:.2f}" for value in values), f"{result.seconds:.0f}")
    return table


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = programs.Parser(
        description="Trains image classifiers; every run becomes a row of a CSV file, and is not repeated.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option, default = parser.add_argument, {field.name: field.default for field in runs.RUN_FIELDS}
    count, rate, part, weight = programs.count, programs.positive, programs.between(0, 1), programs.between(0, math.inf)
    option("--data", default="digits", choices=images.SOURCES, help="set of images")
    option("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="folder of the sets' files")
    option("--model", default="mlp", choices=MODELS, help="network")
    option("--method", nargs="+", default=["bnp"], choices=runs.METHODS, help="how it is trained")
    option("--batch-size", nargs="+", type=count, default=[32], metavar="N", help="examples a step")
    option("--lr", nargs="+", type=rate, default=[0.1], metavar="RATE", help="learning rates")
    seed = programs.at_least(0)
    option("--seed", nargs="+", type=seed, default=[0], metavar="SEED", help="of initial weights and batches")
    option("--examples", type=count, default=50_000, metavar="N", help="how many examples a run sees")
    option("--optimizer", default="sgd", choices=runs.OPTIMIZERS)
    option("--bound", default="none", choices=runs.BOUNDS, help="of the steps, relative to what they change")
    option("--momentum", type=part, default=0.0, help="of SGD")
    option("--weight-decay", type=weight, default=0.0)
    option("--schedule", default="constant", choices=("constant", "steps"), help="steps: warm-up, two drops")
    option("--augment", action="store_true", help="shift and mirror the training images")
    option("--group-size", type=count, default=default["group_size"], metavar="N", help="channels a group (gn)")
    option("--init-scale", type=rate, default=1.0, help="factor on the residual networks' initial kernels")
    option("--decay", type=part, default=default["decay"], help="of BNP's running statistics")
    option(
        "--prior-examples", type=weight, default=default["prior_examples"], metavar="N", help="weight of their start"
    )
    scaling = "what divides BNP's steps: examples, none, or the number of examples from which on they are whole"
    option("--scaling", type=scaling_rule, default=default["scaling"], metavar="RULE", help=scaling)
    option("--covers", default="all", choices=("all", "hidden", "convolutions"), help="BNP's layers")
    option("--bnp-last", action="store_true", help="precondition after momentum, not before")
    option("--refresh-every", type=count, default=1, metavar="N", help="steps between refreshes of BNP's statistics")
    option("--test", action="store_true", help="classify the test images at the end")
    option("--workers", type=count, default=1, metavar="N", help="processes that share the cores")
    option("--output", type=programs.file, default="runs.csv", metavar="CSV", help="file that rows are added to")
    args = parser.parse_args(argv)
    if max(args.batch_size) > args.examples:
        parser.error("--batch-size must lie between 1 and --examples")
    if args.optimizer != "sgd" and (before := [name for name in args.method if name.startswith("bnp")]):
        parser.error(f"--method {before[0]} is BNP before SGD; with --optimizer {args.optimizer} name preconditioned")
    return args


def scaling_rule(text: str) -> str:
    """Returns an argument that is a rule of BNP's scale, or a number of examples."""
    if text not in ("examples", "none"):
        try:
            programs.positive(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"must be examples, none or a positive number, not {text!r}") from error
    return text


def main(argv: list[str] | None = None) -> list[Result]:
    """Trains all combinations, prints a table and returns the results."""
    args = parse_args(argv)
    shared = {name: getattr(args, name) for name in default_names() if hasattr(args, name)}
    todo = [
        Run(args.data, args.model, method, size, rate, seed, args.examples, reads_test=args.test, **shared)
        for method, size, rate, seed in itertools.product(args.method, args.batch_size, args.lr, args.seed)
    ]
    for run in todo:
        check_groups(run)
    results = sweep(todo, args.output, args.data_dir, args.workers)
    programs.show(make_table(results))
    return results


def check_groups(run: Run) -> None:
    """Refuses groups of channels into which a network's layers cannot be cut.

    Raises:
      UserError: if the size of a group does not divide a width.
    """
    model = make_model(run)
    widths = (model.width,) if isinstance(model, models.ResNet) else model.widths
    for width in widths if run.method.endswith("gn") else ():
        if width % run.group_size:
            raise programs.UserError(f"--group-size {run.group_size} does not divide the {width} units of a layer")


def default_names() -> list[str]:
    return [field.name for field in runs.RUN_FIELDS if field.default is not dataclasses.MISSING]


if __name__ == "__main__":
    programs.start(main)
