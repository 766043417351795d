"""Data-parallel training with BNP on handwritten digits, over all the devices of any number of processes.

Alone it uses the devices of this machine::

    python examples/distributed.py

On a cluster start it once on every machine, with an address of the one that gets id 0, which the others can reach::

    python examples/distributed.py --coordinator 10.0.0.1:4567 --num-processes 2 --process-id 0  # on that one
    python examples/distributed.py --coordinator 10.0.0.1:4567 --num-processes 2 --process-id 1  # on the other

Each process puts its share of every batch on its devices. The program does nothing for BNP that the one-device program
of the README does not: ``jax.jit`` sees the whole batch, and so do the records of the layers' inputs.
"""

import argparse
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnp_optax as bnp

NUM_TRAIN = 1024


class CNN(nn.Module):
    """Two convolutions, the second of which halves the image, and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of the ten digits."""
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def train(args: argparse.Namespace, console: Console) -> tuple[optax.Params, list[float]]:
    """Returns the trained parameters, which every device holds, and the test accuracy (%) after every epoch."""
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).reshape(-1, 8, 8, 1).astype(np.float32), y.astype(np.int32)
    x, x_test, y, y_test = train_test_split(x, y, stratify=y, train_size=NUM_TRAIN, random_state=0)

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    model = CNN()
    layers = bnp.linen.find_layers(model, x)
    tx = bnp.bnp_sgd(args.rate, layers, momentum=0.9)
    console.print(f"processes: {jax.process_count()}, devices: {jax.device_count()}\n\n{layers}\n", highlight=False)

    def init() -> tuple[optax.Params, optax.OptState]:
        params = model.init(jax.random.key(0), x[:1])["params"]
        return params, tx.init(params)

    def loss_fn(params: optax.Params, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        with bnp.linen.record_inputs():
            logits, recorded = model.apply({"params": params}, x, mutable=["intermediates"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), recorded["intermediates"]

    def train_step(
        params: optax.Params, opt_state: optax.OptState, x: jax.Array, y: jax.Array
    ) -> tuple[optax.Params, optax.OptState]:
        grads, intermediates = jax.grad(loss_fn, has_aux=True)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params, intermediates=intermediates)
        return optax.apply_updates(params, updates), opt_state

    def accuracy(params: optax.Params, x: jax.Array, y: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, x)
        correct: jax.Array = logits.argmax(axis=-1) == y
        return 100 * correct.mean()

    # The parameters and the state are on every device, from the first step on: one compilation serves all steps.
    params, opt_state = jax.jit(init, out_shardings=replicated)()
    train_step = jax.jit(train_step, out_shardings=replicated, donate_argnums=(0, 1))
    accuracy = jax.jit(accuracy, out_shardings=replicated)
    test_split = [jax.make_array_from_process_local_data(replicated, array) for array in (x_test, y_test)]

    rng, accuracies = np.random.default_rng(0), []
    with Progress(console=console) as progress:
        for _ in progress.track(range(args.epochs), description="training"):
            order = rng.permutation(NUM_TRAIN)  # the same on all processes
            for start in range(0, NUM_TRAIN - args.batch_size + 1, args.batch_size):
                share = args.batch_size // jax.process_count()
                mine = order[start + jax.process_index() * share :][:share]
                batch = [jax.make_array_from_process_local_data(split, array[mine]) for array in (x, y)]
                params, opt_state = train_step(params, opt_state, *batch)
            accuracies.append(float(accuracy(params, *test_split)))
    return params, accuracies


def main(argv: list[str] | None = None) -> list[float]:
    """Trains, prints and saves on the first process; returns the test accuracy (%) after every epoch."""
    parser = argparse.ArgumentParser(
        description="Trains a CNN on handwritten digits with BNP, data-parallel over all devices of all processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--coordinator", metavar="HOST:PORT", help="where process 0 listens; without it this process is alone")
    option("--num-processes", type=int, metavar="N", help="how many processes take part")
    option("--process-id", type=int, metavar="K", help="which of them this is, from 0")
    option("--epochs", type=int, default=5, metavar="N", help=f"passes over the {NUM_TRAIN} training examples")
    option("--batch-size", type=int, default=64, metavar="N", help="examples a step, on all devices together")
    option("--rate", type=float, default=0.01, help="learning rate")
    option("--output", type=Path, metavar="NPZ", help="where the first process saves the parameters")
    args = parser.parse_args(argv)
    cluster = (args.coordinator, args.num_processes, args.process_id)
    if any(x is not None for x in cluster) and None in cluster:
        parser.error("--coordinator, --num-processes and --process-id go together")
    if args.epochs < 1 or not args.rate > 0:
        parser.error("--epochs must be at least 1 and --rate positive")
    if args.coordinator is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # what CPUs talk with; GPUs and TPUs ignore it
        jax.distributed.initialize(*cluster)
    try:
        if not 1 <= args.batch_size <= NUM_TRAIN or args.batch_size % jax.device_count():
            parser.error(f"--batch-size must be a multiple of the {jax.device_count()} devices, at most {NUM_TRAIN}")
        console = Console(quiet=jax.process_index() != 0)
        params, accuracies = train(args, console)
        console.print("Test accuracy after every epoch (%):", " ".join(f"{x:.1f}" for x in accuracies))
        if args.output is not None and jax.process_index() == 0:
            np.savez(args.output, **flatten_dict(jax.device_get(params), sep="/"))
            console.print(f"Parameters: {args.output}")
    finally:
        if args.coordinator is not None:
            jax.distributed.shutdown()
    return accuracies


if __name__ == "__main__":
    main()
