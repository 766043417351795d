"""A character-level transformer by SGD, Adam and Muon, each plain and in BNP's variables.

A small causal language model, its blocks stacked by ``nn.scan``, learns Python's own documentation by three optimizers,
each as it is and inside ``bnp_optax.preconditioned``. All take the same number of steps from the same parameters and on
the same batches; an optimizer has one grid of learning rates for both. One half of the held-out text chooses the
learning rate, the other gives the loss that is reported.

The text is what ``help("while")`` and its like print, English with code. It comes with Python, as the data of the
standard library's ``pydoc_data.topics``, so nothing is downloaded; it varies a little between versions of Python.

Run it with ``python experiments/language_model.py``; ``--help`` lists the options.
"""

import argparse
import csv
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from matplotlib.figure import Figure
from rich import box
from rich import print as rich_print
from rich.progress import Progress
from rich.table import Table

import bnp_optax as bnp

BATCH_SIZE, LENGTH = 16, 64
NUM_BLOCKS, NUM_HEADS, WIDTH = 2, 2, 32
NUM_EVALUATIONS = 10  # along a run
WORKING_MARGIN = 0.1  # nats per character
MUON_ADAM_FACTOR = 0.1  # of Adam's learning rate, for what is no kernel, by Muon's
COLORS = {"SGD": "#555555", "Adam": "#E69F00", "Muon": "#0072B2"}

State = tuple[optax.Params, optax.OptState]
Splits = tuple[np.ndarray, np.ndarray, np.ndarray]  # training, validation, test


class Block(nn.Module):
    """Causal attention and a multilayer perceptron, each behind a LayerNorm and beside a residual connection."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Returns the activations for the next block, and None: it has no other output for `nn.scan` to stack."""
        attention = nn.MultiHeadDotProductAttention(self.num_heads, name="attention")
        x = x + attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        hidden = nn.relu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden), None


class LanguageModel(nn.Module):
    """Predicts every character from those before it."""

    num_characters: int
    width: int = WIDTH
    num_heads: int = NUM_HEADS
    num_blocks: int = NUM_BLOCKS

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Returns the logits of each next character."""
        positions = nn.Embed(text.shape[-1], self.width, name="positions")(jnp.arange(text.shape[-1]))
        x = nn.Embed(self.num_characters, self.width, name="characters")(text) + positions
        # Every block has parameters of its own, and inputs with statistics of their own: both are stacked.
        stack = nn.scan(
            Block, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=self.num_blocks
        )
        x, _ = stack(self.num_heads, name="blocks")(x)
        return nn.Dense(self.num_characters, name="logits")(nn.LayerNorm()(x))


def make_data(steps: int, seed: int) -> tuple[int, Splits]:
    """Returns how many characters there are, and windows of LENGTH + 1 of them, as numbers.

    Training has a batch of random windows for every step, the other splits have consecutive ones.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SystemExit("The text to learn, pydoc_data.topics, is missing from this Python.") from error
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))  # topics repeat one another, but no test may repeat the training
    alphabet, numbers = np.unique(np.array(list(text)), return_inverse=True)
    train, *held_out = np.split(numbers, [len(text) * 90 // 100, len(text) * 95 // 100])
    starts = np.random.default_rng(seed).integers(len(train) - LENGTH, size=(steps, BATCH_SIZE, 1))
    validation, test = (np.resize(part, (len(part) // (LENGTH + 1), LENGTH + 1)) for part in held_out)
    return len(alphabet), (train[starts + np.arange(LENGTH + 1)], validation, test)


@functools.partial(jax.jit, static_argnums=0)
def loss_fn(model: LanguageModel, params: optax.Params, text: jax.Array) -> tuple[jax.Array, Any]:
    # A step that does not use the records is compiled without them.
    logits, records = bnp.linen.capture(model)({"params": params}, text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean(), records


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(
    model: LanguageModel, tx: optax.GradientTransformationExtraArgs, rate: jax.Array, state: State, text: jax.Array
) -> State:
    params, opt_state = state
    grads, records = jax.grad(loss_fn, argnums=1, has_aux=True)(model, params, text)
    updates, opt_state = tx.update(grads, opt_state, params, intermediates=records)
    return optax.apply_updates(params, jax.tree.map(lambda update: rate * update, updates)), opt_state


class Result(NamedTuple):
    """Losses of one method, in nats per character."""

    rates: list[float]
    steps: np.ndarray  # after which a run was evaluated
    curves: np.ndarray  # validation losses then, [evaluations, rates]
    validation: np.ndarray  # the last of them, inf if a run diverged: ended no better than it began, [rates]
    test: np.ndarray  # at the end, [rates]
    best: int  # index of the learning rate with the lowest validation loss


def train(
    model: LanguageModel,
    initial: optax.Params,
    splits: Splits,
    tx: optax.GradientTransformationExtraArgs,
    rates: list[float],
    advance: Callable[[int], None],
) -> Result:
    """Trains by one method, at one learning rate after another."""
    training, validation, test = splits
    steps = np.unique(np.linspace(0, len(training), NUM_EVALUATIONS + 1, dtype=int))
    curves, test_losses = np.empty((len(steps) - 1, len(rates))), np.empty(len(rates))
    for run, rate in enumerate(jnp.asarray(rates)):
        state = initial, tx.init(initial)
        for evaluation, (begin, end) in enumerate(itertools.pairwise(steps)):
            for text in training[begin:end]:
                state = train_step(model, tx, rate, state, text)
            curves[evaluation, run], _ = loss_fn(model, state[0], validation)
            advance(end - begin)
        test_losses[run], _ = loss_fn(model, state[0], test)
    before, _ = loss_fn(model, initial, validation)
    final = np.where(curves[-1] < before, curves[-1], np.inf)
    return Result(rates, steps[1:], curves, final, test_losses, int(final.argmin()))


def kernel_matrices(params: optax.Params) -> Any:
    """Returns how each kernel is a matrix, or a stack of them, for Muon; None for what Adam is to train."""

    def of_parameter(keys: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        path = jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
        if path[-1] != "kernel":
            return None
        first = 1 if path[0] == "blocks" else 0
        # the projections of attention have two axes for the heads: of outputs, or, behind them, of inputs
        num_inputs = 2 if path[-2] == "out" else 1
        inputs, outputs = range(first, first + num_inputs), range(first + num_inputs, leaf.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))

    return jax.tree_util.tree_map_with_path(of_parameter, params)


# All multiply by the learning rate last. That is left to the step, so that it is compiled once for the whole grid.
OPTIMIZERS = {
    "SGD": optax.sgd(1.0, momentum=0.9),
    "Adam": optax.adam(1.0),
    "Muon": optax.contrib.muon(1.0, adam_learning_rate=MUON_ADAM_FACTOR, muon_weight_dimension_numbers=kernel_matrices),
}


def make_table(name: str, results: dict[str, Result]) -> Table:
    """Tabulates the methods that end in one optimizer, and so share a grid of learning rates."""
    title = f"Loss with {name} (nats per character)"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("method", *(f"{rate:g}" for rate in results[name].rates), "works", "best", "test"):
        table.add_column(header, justify="left" if header == "method" else "right", no_wrap=True)
    for method, (rates, _, _, losses, test, best) in results.items():
        works = np.isfinite(losses) & (losses <= losses[best] + WORKING_MARGIN)
        cells = (f"[{'bold' if good else 'dim'}]{x:.3f}[/]" for x, good in zip(losses, works, strict=True))
        table.add_row(method, *cells, f"{works.sum()} of {len(rates)}", f"{rates[best]:g}", f"{test[best]:.3f}")
    return table


def save(path: Path, results: dict[str, Result], steps: int, seed: int) -> None:
    """Writes a CSV file with a row a method and learning rate."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "steps", "seed", "rate", "validation", "test"])
        for method, result in results.items():
            for rate, *losses in zip(result.rates, result.validation, result.test, strict=True):
                writer.writerow([method, steps, seed, rate, *(f"{loss:.4f}" for loss in losses)])


def make_figure(results: dict[str, Result]) -> Figure:
    """Draws the validation loss along training, for each method at its best learning rate."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, result in results.items():
        label = f"{method}, rate {result.rates[result.best]:g}"
        name = next(name for name in COLORS if name in method)
        style = "-" if method.startswith("BNP") else ":"
        curve = result.curves[:, result.best]
        axes.plot(result.steps, curve, f"o{style}", color=COLORS[name], markersize=4, label=label)
    axes.set(xlabel="steps", ylabel="validation loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small transformer on Python's documentation with SGD, Adam and Muon, plain and with BNP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option, sgd_rates, adam_rates = parser.add_argument, [0.003, 0.01, 0.03, 0.1, 0.3], [0.001, 0.003, 0.01, 0.03, 0.1]
    option("--steps", type=int, default=500, metavar="N", help=f"steps a run, of {BATCH_SIZE} x {LENGTH} characters")
    option("--sgd-rates", nargs="+", type=float, default=sgd_rates, metavar="RATE", help="learning rates of SGD")
    option("--adam-rates", nargs="+", type=float, default=adam_rates, metavar="RATE", help="learning rates of Adam")
    option("--muon-rates", nargs="+", type=float, default=adam_rates, metavar="RATE", help="learning rates of Muon")
    option("--seed", type=int, default=0, metavar="N", help="of the initial parameters and the batches")
    option("--csv", type=Path, metavar="CSV", help="file for the losses at every learning rate")
    option("--output", type=Path, default=Path("transformer.png"), metavar="PNG", help="picture of the training curves")
    args = parser.parse_args(argv)
    if args.steps < 1 or not 0 <= args.seed < 2**32:
        parser.error("--steps must be at least 1, and --seed lie between 0 and 2**32 - 1")
    if not all(0 < rate < float("inf") for rate in (*args.sgd_rates, *args.adam_rates, *args.muon_rates)):
        parser.error("--sgd-rates, --adam-rates and --muon-rates must be positive and finite")
    if args.output.suffix != ".png" or not args.output.parent.is_dir():
        parser.error("--output must be a .png file in a directory that exists")
    return args


def main(argv: list[str] | None = None) -> dict[str, Result]:
    """Trains by every method, prints the tables and saves the picture; returns the losses of each method."""
    args = parse_args(argv)
    num_characters, splits = make_data(args.steps, args.seed)
    model, example = LanguageModel(num_characters), jnp.zeros((1, LENGTH), int)
    initial = jax.jit(model.init)(jax.random.key(args.seed), example)["params"]
    layers = bnp.linen.find_layers(model, example)
    print(layers, end="\n\n")
    rates = {"SGD": args.sgd_rates, "Adam": args.adam_rates, "Muon": args.muon_rates}
    methods = {}
    for name, optimizer in OPTIMIZERS.items():
        methods[name] = name, optax.with_extra_args_support(optimizer)  # takes the records and ignores them
        # Examples are batches of whole texts: 16 in a step would be divided by the root of 8 under the default scaling.
        methods[f"BNP({name})"] = name, bnp.preconditioned(optimizer, layers, scaling="none")
    results: dict[str, Result] = {}
    with Progress() as progress:
        task = progress.add_task("", total=2 * args.steps * sum(map(len, rates.values())))
        advance = functools.partial(progress.advance, task)
        for method, (name, tx) in methods.items():
            progress.update(task, description=method)
            results[method] = train(model, initial, splits, tx, rates[name], advance)
    for name in OPTIMIZERS:
        rich_print(make_table(name, {method: results[method] for method in (name, f"BNP({name})")}))
    rich_print(
        "Under each learning rate: validation loss at the end; inf: diverged (ended no better than it began). "
        f"works: learning rates within {WORKING_MARGIN} of the method's best. test: at that best rate."
    )
    if args.csv:
        save(args.csv, results, args.steps, args.seed)
    make_figure(results).savefig(args.output, dpi=150)
    rich_print(f"Training curves: {args.output}")
    return results


if __name__ == "__main__":
    main()
