"""A Flax NNX convolutional network on handwritten digits by Adam, plain and in BNP's variables, four examples a step.

One network is trained on scikit-learn's 8x8 digits by both methods over one grid of learning rates. What BNP needs is
all in ``main`` and ``train_step``: ``find_layers`` once, ``record_inputs`` and ``nnx.capture`` around the forward pass,
and ``intermediates=`` in the optimizer's update. Run it with ``python examples/nnx_cnn.py``; ``--help`` lists the
options.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich import box
from rich import print as rich_print
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnp_optax as bnp
from bnp_optax import nnx as bnp_nnx

NUM_TRAIN = 1024


class CNN(nnx.Module):
    """Two convolutions, the second of which halves the image, and a dense layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.downsample = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.out = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of the ten digits."""
        x = nnx.relu(self.downsample(nnx.relu(self.conv(x))))
        return self.out(x.reshape(x.shape[0], -1))


def loss_fn(model: CNN, x: jax.Array, y: jax.Array) -> tuple[jax.Array, nnx.State[Any, Any]]:
    with bnp_nnx.record_inputs():
        logits, intermediates = nnx.capture(model, nnx.Intermediate)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), intermediates


@nnx.jit
def train_epoch(model: CNN, optimizer: nnx.Optimizer[CNN], x: jax.Array, y: jax.Array, batches: jax.Array) -> None:
    """Takes one step for each row of ``batches``, the numbers of the examples in it."""

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def train_step(carry: tuple[CNN, nnx.Optimizer[CNN]], batch: jax.Array) -> tuple[CNN, nnx.Optimizer[CNN]]:
        model, optimizer = carry
        grads, intermediates = nnx.grad(loss_fn, has_aux=True)(model, x[batch], y[batch])
        optimizer.update(model, grads, intermediates=intermediates)  # plain Adam ignores the records
        return carry

    train_step((model, optimizer), batches)


@nnx.jit
def accuracy(model: CNN, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the percentage of right answers, nan where the network has diverged."""
    logits = model(x)
    return jnp.where(jnp.isfinite(logits).all(), 100 * (logits.argmax(axis=-1) == y).mean(), jnp.nan)


@functools.cache
def load_splits() -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns images in [0, 1] and labels for training and for testing, with the same proportions of the classes."""
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).reshape(-1, 8, 8, 1).astype(np.float32), y.astype(np.int32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, stratify=y, train_size=NUM_TRAIN, random_state=0)
    return (jnp.asarray(x_train), jnp.asarray(y_train)), (jnp.asarray(x_test), jnp.asarray(y_test))


def make_table(results: dict[str, dict[float, list[float]]], batch_size: int) -> Table:
    rates = list(next(iter(results.values())))
    table = Table(
        title=f"Test accuracy on handwritten digits at batch size {batch_size} (%)",
        caption="Under each learning rate: after the first epoch → after the last; nan: the run diverged.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("method", no_wrap=True)
    for rate in rates:
        table.add_column(f"{rate:g}", justify="right", no_wrap=True)
    for method, by_rate in results.items():
        table.add_row(method, *(f"{by_rate[rate][0]:.1f} → [bold]{by_rate[rate][-1]:.1f}[/]" for rate in rates))
    return table


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains an NNX network on handwritten digits with Adam, plain and in BNP's variables.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option, rates = parser.add_argument, [0.001, 0.003, 0.01, 0.03]
    option("--epochs", type=int, default=5, metavar="N", help=f"passes over the {NUM_TRAIN} training examples")
    option("--batch-size", type=int, default=4, metavar="N", help="examples a step")
    option("--rates", nargs="+", type=float, default=rates, metavar="RATE", help="learning rates")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if not 1 <= args.batch_size <= NUM_TRAIN:
        parser.error(f"--batch-size must lie between 1 and {NUM_TRAIN}, the number of training examples")
    if not all(0 < rate < float("inf") for rate in args.rates):
        parser.error("--rates must be positive and finite")
    return args


def main(argv: list[str] | None = None) -> dict[str, dict[float, list[float]]]:
    """Trains everything and prints the table; returns the accuracies by method and rate, one for each epoch."""
    args = parse_args(argv)
    (x, y), test_split = load_splits()
    layers = bnp_nnx.find_layers(CNN(nnx.Rngs(0)), x)
    rich_print(str(layers), "\n")
    methods: dict[str, Any] = {
        "Adam": optax.adam,
        "BNP(Adam)": lambda rate: bnp.preconditioned(optax.adam(rate), layers),
    }
    results: dict[str, dict[float, list[float]]] = {method: {} for method in methods}
    steps = NUM_TRAIN // args.batch_size
    with Progress() as progress:
        task = progress.add_task("", total=len(methods) * len(args.rates) * args.epochs)
        for method, make_optimizer in methods.items():
            for rate in args.rates:
                progress.update(task, description=f"{method}, learning rate {rate:g}")
                model, rng = CNN(nnx.Rngs(0)), np.random.default_rng(0)
                accuracies = results[method].setdefault(rate, [])
                optimizer = nnx.Optimizer(model, make_optimizer(rate), wrt=nnx.Param)
                for _ in range(args.epochs):
                    batches = rng.permutation(NUM_TRAIN)[: steps * args.batch_size].reshape(steps, args.batch_size)
                    train_epoch(model, optimizer, x, y, jnp.asarray(batches))
                    accuracies.append(float(accuracy(model, *test_split)))
                    progress.advance(task)
    rich_print(make_table(results, args.batch_size))
    return results


if __name__ == "__main__":
    main()
