"""Measures how well conditioned the Hessians of a small network's layers are along training.

A fully connected network with two hidden layers of 20 units is trained on digits by SGD, with BatchNorm layers, and
with BNP. At some steps the Hessian of the loss over all training images with respect to each layer's parameters is
built in float64: H, for BNP also P'HP, and for BatchNorm the H of its own network, in which the moments of the batch
are functions of the parameters.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax as bnp
import images
import runs
import sweeps
import train
from bnp_optax import analysis
from runs import Run

BATCH_SIZE, RATE = 32, 0.1
STEPS = [0, 10, 30, 100, 300, 1000]
TOLERANCE = 1e-12  # relative to the largest eigenvalue: smaller ones count as zero


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """The spectrum of one matrix, in numbers.

    Attributes:
      method: "sgd", "bn" or "bnp", how the network was trained.
      matrix: "H" or "P'HP".
      layer: its path.
      seed: of initial weights and batches.
      step: after how many steps of training.
      size: number of rows of the matrix.
      rank: number of its eigenvalues of magnitude above ``TOLERANCE`` times the largest.
      largest: the largest magnitude of an eigenvalue.
      condition_number: the largest by the smallest magnitude of the nonzero eigenvalues.
      quartile_ratio: the largest magnitude by that at a quarter of the nonzero eigenvalues, in falling order; unlike
        the condition number it does not hang on where the spectrum ends.
      commit: of the code.
    """

    method: str
    matrix: str
    layer: str
    seed: int
    step: int
    size: int
    rank: int
    largest: float
    condition_number: float
    quartile_ratio: float
    commit: str


def read(path: Path) -> list[Conditioning]:
    """Reads the rows of a CSV file; none if it does not exist."""
    return runs.read_rows(path, Conditioning)


def measure_all(output: Path, seeds: Sequence[int], steps: Sequence[int]) -> list[Conditioning]:
    """Trains and measures every method with every seed, and adds the rows of those that the CSV file lacks.

    Args:
      output: the CSV file.
      seeds: of initial weights and batches.
      steps: when to measure, in rising order.

    Returns:
      The rows of the file.
    """
    done = {(row.method, row.seed, row.step) for row in read(output)}
    missing = {
        (seed, method): [step for step in steps if (method, seed, step) not in done]
        for seed, method in itertools.product(seeds, ("sgd", "bn", "bnp"))
    }

    def work(which: tuple[int, str], advance: Callable[[int], None]) -> list[Conditioning]:
        seed, method = which
        run = Run("digits", "small-mlp", method, BATCH_SIZE, RATE, seed, BATCH_SIZE * steps[-1])
        rows = []
        for own in measure(run, missing[which]):
            rows += own
            advance(1)
        return rows

    whole: dict[tuple[int, str], list[Conditioning]] = {which: [] for which, left in missing.items() if not left}
    sweeps.sweep(
        list(missing),
        work,
        whole,
        functools.partial(runs.append_rows, output),
        title=output.stem,
        size=lambda which: len(missing[which]),
        unit="spectra",
    )
    return read(output)


def measure(run: Run, steps: Sequence[int]) -> Iterator[list[Conditioning]]:
    """Trains once and yields, at each of the steps, the spectra of all layers."""
    data = images.load(run.data, Path()).train
    mean, deviation = float(data.images.mean()), float(data.images.std())
    program, rate = train.make_program(run, data.images.shape[1:], mean, deviation), jnp.float32(run.rate)
    state, stream, done = program.init(rate, jax.random.key(run.seed)), images.batches(run, data), 0
    model, commit = train.make_model(run), runs.commit()
    layers = bnp.linen.find_layers(model, data.images[:1].astype(np.float32))
    standardized = (data.images.astype(np.float64) - mean) / deviation
    matrices = {layer.path: layer_matrices(model, layer, standardized, data.labels) for layer in layers.values()}
    for step in steps:
        for _ in range(step - done):
            state = program.step(rate, state, *next(stream), True)
        done = step
        measured = []
        for path, at in matrices.items():
            with jax.enable_x64(True):
                for name, matrix in at(state).items():
                    magnitudes = jnp.sort(jnp.abs(jnp.linalg.eigvalsh(matrix)), descending=True)
                    rank = int((magnitudes > TOLERANCE * magnitudes[0]).sum())
                    condition_number = float(analysis.condition_number(matrix, TOLERANCE))
                    quartile_ratio = float(magnitudes[0] / magnitudes[rank // 4])
                    numbers = (len(matrix), rank, float(magnitudes[0]), condition_number, quartile_ratio)
                    measured.append(Conditioning(run.method, name, path, run.seed, step, *numbers, commit))
        yield measured


def layer_matrices(
    model: nn.Module, layer: bnp.Layer, x: np.ndarray, y: np.ndarray
) -> Callable[[train.State], dict[str, jax.Array]]:
    """Returns a function of a run's state: H, and P'HP where BNP trains, of the mean loss over all examples."""

    @jax.jit
    def at(state: train.State) -> dict[str, jax.Array]:
        state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)

        def loss_fn(params: optax.Params) -> jax.Array:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, _ = model.apply(variables, jnp.asarray(x), train=True, mutable=["batch_stats"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(y)))

        hessian = analysis.hessian(loss_fn, state.params, layer)
        statistics = state.opt_state[0]
        if not isinstance(statistics, bnp.Statistics):
            return {"H": hessian}
        preconditioner = analysis.preconditioner(layer, statistics)
        return {"H": hessian, "P'HP": preconditioner.T @ hessian @ preconditioner}

    return at
