"""Handwritten digits with SGD and with Adam: plain, with Batch Normalization, and in BNP's variables.

One multilayer perceptron is trained on scikit-learn's 8x8 digits by five methods at several batch sizes, over one
grid of learning rates, for the same number of examples:

* SGD: plain gradient descent;
* BN: the same with BatchNorm layers in the network, evaluated with their running statistics;
* BNP: the network of SGD, and gradient descent in the variables that Batch Normalization would give it;
* Adam: on that network too, at a hundredth of the learning rates;
* BNP(Adam): Adam in these variables.

It prints what each learning rate reaches and draws the training curves. Run it with ``python experiments/digits.py``;
``--help`` lists the options.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from rich import box
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnp_optax as bnp
import programs

NUM_TRAIN, NUM_TEST = 1024, 450  # the other 323 choose the learning rate
WORKING_MARGIN = 5  # points of accuracy
ADAM_FACTOR = 0.01  # Adam's learning rates relative to SGD's
# colour-blind readers can tell them apart
COLORS = {"SGD": "#555555", "BN": "#E69F00", "BNP": "#0072B2", "Adam": "#CC79A7", "BNP(Adam)": "#009E73"}
MARKERS = {"SGD": "s", "BN": "^", "BNP": "o", "Adam": "v", "BNP(Adam)": "D"}


class MLP(nn.Module):
    """Three hidden layers of 100 units, with or without Batch Normalization."""

    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of the ten digits."""
        for _ in range(3):
            x = nn.Dense(100)(x)
            if self.batch_norm:
                # With Flax's momentum of 0.99 the initial statistics would still weigh 0.3 after the 112 steps that
                # seven epochs of batch size 64 take.
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(10)(x)


class State(NamedTuple):
    """What a run carries from step to step."""

    params: optax.Params
    batch_stats: Any
    opt_state: optax.OptState


def plain_step(model: MLP, tx: optax.GradientTransformation, state: State, x: jax.Array, y: jax.Array) -> State:
    def loss_fn(params: optax.Params) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updated.get("batch_stats", {})

    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), batch_stats, opt_state)


def bnp_step(model: MLP, tx: optax.GradientTransformationExtraArgs, state: State, x: jax.Array, y: jax.Array) -> State:
    def loss_fn(params: optax.Params) -> tuple[jax.Array, Any]:
        logits, records = bnp.linen.capture(model)({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), records

    grads, records = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, intermediates=records)
    return State(optax.apply_updates(state.params, updates), state.batch_stats, opt_state)


Split = tuple[jax.Array, jax.Array]  # flattened images in [0, 1], and their labels


@functools.cache
def load_splits() -> tuple[Split, Split, Split]:
    """Returns the digits for training, validation and test, each with the same proportions of the classes."""
    x, y = load_digits(return_X_y=True)
    split = functools.partial(train_test_split, random_state=0)
    rest, test = split(np.arange(len(y)), stratify=y, test_size=NUM_TEST)
    train, validation = split(rest, stratify=y[rest], train_size=NUM_TRAIN)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y, jnp.int32)
    return (x[train], y[train]), (x[validation], y[validation]), (x[test], y[test])


class Result(NamedTuple):
    """Accuracies (%) of one method at one batch size, nan where a run diverged."""

    validation: np.ndarray  # after every epoch, [epochs, seeds, rates]
    final: np.ndarray  # the last of them, mean of the seeds, [rates]
    best: int  # index of the learning rate with the best final accuracy
    test: np.ndarray  # at the end of the runs with that learning rate, [seeds]


Results = dict[int, dict[str, Result]]  # by batch size, then method


def train(
    method: str, batch_size: int, rates: list[float], epochs: int, seeds: int, after_epoch: Callable[[], None]
) -> Result:
    """Trains by one method at one batch size, all seeds and learning rates at once."""
    (x, y), validation_split, test_split = load_splits()
    model, num_steps = MLP(batch_norm=method == "BN"), NUM_TRAIN // batch_size
    in_bnp_variables = method.startswith("BNP")
    layers, step = bnp.linen.find_layers(model, x), bnp_step if in_bnp_variables else plain_step

    def optimizer(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
        plain = optax.adam(ADAM_FACTOR * rate) if "Adam" in method else optax.sgd(rate)
        return bnp.preconditioned(plain, layers) if in_bnp_variables else optax.with_extra_args_support(plain)

    def init(rate: jax.Array, key: jax.Array) -> State:
        variables = model.init(key, x)
        return State(variables["params"], variables.get("batch_stats", {}), optimizer(rate).init(variables["params"]))

    def accuracy(state: State, split: Split) -> jax.Array:
        images, labels = split
        logits: Any = model.apply({"params": state.params, "batch_stats": state.batch_stats}, images)
        percentage = 100 * (logits.argmax(axis=-1) == labels).mean()
        return jnp.where(jnp.isfinite(logits).all(), percentage, jnp.nan)

    def run_epoch(rate: jax.Array, state: State, key: jax.Array) -> tuple[State, jax.Array]:
        def scan_step(state: State, batch: jax.Array) -> tuple[State, None]:
            return step(model, optimizer(rate), state, x[batch], y[batch]), None

        order = jax.random.permutation(key, NUM_TRAIN)[: num_steps * batch_size]
        state, _ = jax.lax.scan(scan_step, state, order.reshape(num_steps, batch_size))
        return state, accuracy(state, validation_split)

    # The outer axis is the seed, the inner one the learning rate: the rates of a seed share its start and its batches.
    init_all = jax.jit(jax.vmap(jax.vmap(init, (0, None)), (None, 0)))
    run_epoch_all = jax.jit(jax.vmap(jax.vmap(run_epoch, (0, 0, None)), (None, 0, 0)))

    grid, keys = jnp.asarray(rates), jax.random.split(jax.random.key(0), seeds)
    state, validation = init_all(grid, keys), []
    for epoch in range(epochs):
        state, accuracies = run_epoch_all(grid, state, jax.vmap(jax.random.fold_in, (0, None))(keys, epoch))
        validation.append(np.asarray(accuracies))
        after_epoch()
    final = validation[-1].mean(axis=0)
    best = int(np.nan_to_num(final).argmax())
    test = jax.vmap(accuracy, (0, None))(jax.tree.map(lambda leaf: leaf[:, best], state), test_split)
    return Result(np.stack(validation), final, best, np.asarray(test))


def make_table(results: Results, rates: list[float]) -> Table:
    table = Table(
        title="Accuracy on handwritten digits (%)",
        caption="Under each learning rate: validation accuracy after the last epoch, mean of the seeds; nan: a run "
        f"diverged. works: learning rates within {WORKING_MARGIN} points of the best accuracy that any method has at "
        "this batch size. test: at the rate that is best in validation, ± standard deviation over the seeds. Adam's "
        f"learning rates are those of the header times {ADAM_FACTOR:g}.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for header in ("batch", "method", *(f"{rate:g}" for rate in rates), "works", "best", "test"):
        table.add_column(header, justify="left" if header == "method" else "right", no_wrap=True)
    for batch_size, by_method in results.items():
        threshold = max(np.nan_to_num(result.final).max() for result in by_method.values()) - WORKING_MARGIN
        for method, result in by_method.items():
            works = result.final >= threshold
            cells = (f"[{'bold' if good else 'dim'}]{x:.1f}[/]" for x, good in zip(result.final, works, strict=True))
            best = f"{rates[result.best] * (ADAM_FACTOR if 'Adam' in method else 1):g}"
            test = f"{result.test.mean():.1f}±{result.test.std():.1f}"
            table.add_row(str(batch_size), method, *cells, f"{works.sum()}/{len(rates)}", best, test)
        table.add_section()
    return table


def make_figure(results: Results) -> Figure:
    """Draws accuracy against examples seen, one panel a batch size, and the test accuracy against batch size.

    The axis is logarithmic in the error, so that both 97 % against 95 % and 97 % against 10 % can be seen.
    """
    figure = Figure(figsize=(2.7 * len(results) + 2.9, 3.6), layout="constrained")
    *curves, summary = figure.subplots(1, len(results) + 1, sharey=True)

    def draw(axes: Axes, method: str, x: ArrayLike, errors: np.ndarray) -> None:
        axes.plot(x, errors.mean(axis=1), label=method, color=COLORS[method], marker=MARKERS[method], markersize=4)
        axes.fill_between(x, errors.min(axis=1), errors.max(axis=1), color=COLORS[method], alpha=0.2, linewidth=0)

    for axes, (batch_size, by_method) in zip(curves, results.items(), strict=True):
        for method, result in by_method.items():
            seen = NUM_TRAIN // batch_size * batch_size * np.arange(1, len(result.validation) + 1)
            draw(axes, method, seen, 100 - result.validation[:, :, result.best])
        axes.set(title=f"Batch size {batch_size}", xlabel="examples seen", xlim=(0, None))
        axes.locator_params(axis="x", nbins=4)
    for method in by_method:
        draw(summary, method, list(map(str, results)), np.stack([100 - results[n][method].test for n in results]))
    errors = (1, 2, 5, 10, 20, 50, 100)
    curves[0].set(ylabel="validation accuracy (%)", yscale="log", ylim=(110, 1))
    curves[0].set_yticks(errors, labels=[str(100 - error) for error in errors])
    summary.set(title="End of training", xlabel="batch size", ylabel="test accuracy (%)")
    summary.tick_params(labelleft=True)
    for axes in (*curves, summary):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*summary.get_legend_handles_labels(), loc="outside upper center", ncols=len(by_method), frameon=False)
    return figure


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = programs.Parser(
        description="Trains one network on digits by SGD and Adam: plain, with BatchNorm layers, in BNP's variables.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option, count, rates = parser.add_argument, programs.count, [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
    option("--batch-sizes", nargs="+", type=count, default=[64, 4, 1], metavar="N", help="examples a step")
    option("--rates", nargs="+", type=programs.positive, default=rates, metavar="RATE", help="learning rates of SGD")
    option("--epochs", type=count, default=7, metavar="N", help=f"passes over the {NUM_TRAIN} training examples")
    option("--seeds", type=count, default=3, metavar="N", help="runs that differ in initial weights and batches")
    option("--methods", nargs="+", default=list(COLORS), choices=list(COLORS), help="what to compare")
    option("--output", type=programs.file, default="digits.png", metavar="PNG", help="picture of the training curves")
    args = parser.parse_args(argv)
    if max(args.batch_sizes) > NUM_TRAIN:
        parser.error(f"--batch-sizes must lie between 1 and {NUM_TRAIN}, the number of training examples")
    if args.output.suffix != ".png" or not args.output.parent.is_dir():
        parser.error("--output must be a .png file in a folder that exists")
    return args


def main(argv: list[str] | None = None) -> Results:
    """Trains everything, prints the table and saves the picture; returns the accuracies."""
    args = parse_args(argv)
    results: Results = {batch_size: {} for batch_size in sorted(args.batch_sizes, reverse=True)}
    with programs.progress() as progress:
        total = len(args.methods) * args.epochs * sum(NUM_TRAIN // batch_size for batch_size in results)
        task = progress.add_task("", total=total, unit="steps")
        for batch_size, by_method in results.items():
            advance = functools.partial(progress.advance, task, NUM_TRAIN // batch_size)
            for method in args.methods:
                progress.update(task, description=f"{method}, batch size {batch_size}")
                by_method[method] = train(method, batch_size, args.rates, args.epochs, args.seeds, advance)
    programs.show(make_table(results, args.rates))
    make_figure(results).savefig(args.output, dpi=150)
    print(f"Training curves: {args.output}")
    return results


if __name__ == "__main__":
    programs.start(main)
