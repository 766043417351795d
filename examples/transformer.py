"""A character-level transformer with SGD and with Adam, each with and without BNP before it.

A small causal language model, its blocks stacked by ``nn.scan``, learns Python's own documentation by four methods:
SGD with momentum, Adam, and either of them on gradients that BNP has preconditioned. All take the same number of steps
from the same parameters and on the same batches; those with and without BNP share a grid of learning rates. One half of
the held-out text chooses the learning rate, the other gives the loss that is reported.

The text is what ``help("while")`` and its like print, English with code. It comes with Python, as the data of the
standard library's ``pydoc_data.topics``, so nothing is downloaded; it varies a little between versions of Python.

Run it with ``python examples/transformer.py``; ``--help`` lists the options.
"""

import argparse
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
# Both multiply by the learning rate last. That is left to the step, so that it is compiled once for the whole grid.
OPTIMIZERS = {"SGD": optax.sgd(1.0, momentum=0.9), "Adam": optax.adam(1.0)}
COLORS = {"SGD": "#555555", "BNP + SGD": "#0072B2", "Adam": "#E69F00", "BNP + Adam": "#009E73"}

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
    with bnp.linen.record_inputs():  # a step that does not use the records is compiled without them
        logits, recorded = model.apply({"params": params}, text[:, :-1], mutable=["intermediates"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()
    return loss, recorded["intermediates"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(
    model: LanguageModel, tx: optax.GradientTransformationExtraArgs, rate: jax.Array, state: State, text: jax.Array
) -> State:
    params, opt_state = state
    grads, intermediates = jax.grad(loss_fn, argnums=1, has_aux=True)(model, params, text)
    updates, opt_state = tx.update(grads, opt_state, params, intermediates=intermediates)
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


def make_figure(results: dict[str, Result]) -> Figure:
    """Draws the validation loss along training, for each method at its best learning rate."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, result in results.items():
        label = f"{method}, rate {result.rates[result.best]:g}"
        axes.plot(result.steps, result.curves[:, result.best], "o-", color=COLORS[method], markersize=4, label=label)
    axes.set(xlabel="steps", ylabel="validation loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small transformer on Python's documentation with SGD and Adam, with and without BNP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option, sgd_rates, adam_rates = parser.add_argument, [0.03, 0.1, 0.3, 1.0], [0.001, 0.003, 0.01, 0.03]
    option("--steps", type=int, default=500, metavar="N", help=f"steps a run, of {BATCH_SIZE} x {LENGTH} characters")
    option("--sgd-rates", nargs="+", type=float, default=sgd_rates, metavar="RATE", help="learning rates of SGD")
    option("--adam-rates", nargs="+", type=float, default=adam_rates, metavar="RATE", help="learning rates of Adam")
    option("--scaling", default="examples", choices=["examples", "positions", "bound", "none"], help="scaling of BNP")
    option("--seed", type=int, default=0, metavar="N", help="of the initial parameters and the batches")
    option("--output", type=Path, default=Path("transformer.png"), metavar="PNG", help="picture of the training curves")
    args = parser.parse_args(argv)
    if args.steps < 1 or not 0 <= args.seed < 2**32:
        parser.error("--steps must be at least 1, and --seed lie between 0 and 2**32 - 1")
    if not all(0 < rate < float("inf") for rate in (*args.sgd_rates, *args.adam_rates)):
        parser.error("--sgd-rates and --adam-rates must be positive and finite")
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
    # Why "examples" by default: mean validation loss of seeds 0 to 2, each at its best of four learning rates. Before
    # SGD "examples" 2.38, "bound" (from 1 to 30) 2.39, "positions" 2.40; without BNP 2.44. Before Adam, which undoes
    # constant factors, "examples" 2.16, "positions" 2.17; without BNP 2.20. Seeds differ by 0.03 with SGD and BNP.
    before = {
        "": optax.with_extra_args_support(optax.identity()),  # takes the records and ignores them
        "BNP + ": bnp.scale_by_bnp(layers, scaling=args.scaling),
    }
    rates, results = {"SGD": args.sgd_rates, "Adam": args.adam_rates}, dict[str, Result]()
    with Progress() as progress:
        task = progress.add_task("", total=len(before) * args.steps * sum(map(len, rates.values())))
        advance = functools.partial(progress.advance, task)
        for (name, optimizer), (prefix, first) in itertools.product(OPTIMIZERS.items(), before.items()):
            progress.update(task, description=prefix + name)
            tx = optax.chain(first, optimizer)
            results[prefix + name] = train(model, initial, splits, tx, rates[name], advance)
    for name in OPTIMIZERS:
        rich_print(make_table(name, {method: results[method] for method in (name, f"BNP + {name}")}))
    rich_print(
        "Under each learning rate: validation loss at the end; inf: diverged (ended no better than it began). "
        f"works: learning rates within {WORKING_MARGIN} of the method's best. test: at that best rate."
    )
    make_figure(results).savefig(args.output, dpi=150)
    rich_print(f"Training curves: {args.output}")
    return results


if __name__ == "__main__":
    main()
