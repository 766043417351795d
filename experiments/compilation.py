"""Measures what BNP adds to tracing and compiling, on CPUs, for a deep network of tiny layers.

The network has residual blocks of two dense layers, one behind another. Methods take turns, in a new order every
round, and each time JAX traces, lowers and compiles the training step as if for the first time. What counts is the time
of all processors. The ratio to the same method without BNP is that of the same round, and the median over the rounds.
"""

import argparse
import re
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import programs
import report
import runs
import steps
from report import Compilation

WIDTH, BATCH_SIZE = 16, 8
BASES = {"SGD": "SGD", "BNP, kept": "SGD", "BNP": "SGD", "Adam": "Adam", "BNP(Adam)": "Adam"}
BARS = {"BNP, kept": 2.0, "BNP": 3.5}  # the largest ratios


class Deep(nn.Module):
    """Residual blocks of two dense layers."""

    blocks: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the last block's output."""
        for _ in range(self.blocks):
            x = x + nn.Dense(WIDTH)(nn.relu(nn.Dense(WIDTH)(x)))
        return x


def measure(blocks: int, repetitions: int) -> list[Compilation]:
    """Measures all methods in turn."""
    network = steps.Network(lambda kind: Deep(blocks), (WIDTH,))
    trainings = {
        method: steps.make_training(network, steps.METHODS[method], BATCH_SIZE, jnp.dtype("float32"))
        for method in BASES
    }
    states = {method: jax.eval_shape(training.init) for method, training in trainings.items()}

    def compile_step(method: str) -> tuple[float, int]:
        """Returns seconds, and how many operations the traced step has."""
        training = trainings[method]
        jax.clear_caches()
        start = time.process_time()
        lowered = jax.jit(training.step, donate_argnums=0).lower(states[method], *training.batch)
        lowered.compile()
        return time.process_time() - start, count_operations(lowered.as_text())

    compile_step("SGD")  # what JAX and XLA set up once
    seconds, operations = np.empty((len(BASES), repetitions)), dict[str, int]()
    order, methods = np.random.default_rng(0), list(BASES)
    with programs.progress() as progress:
        task = progress.add_task("compiling", total=repetitions * len(methods), unit="programs")
        for turn in range(repetitions):
            for number in order.permutation(len(methods)):
                method = methods[number]
                seconds[number, turn], operations[method] = compile_step(method)
                progress.advance(task)
    rows = []
    for own, (method, base) in zip(seconds, BASES.items(), strict=True):
        low, middle, high = map(float, np.quantile(own / seconds[methods.index(base)], [0.25, 0.5, 0.75]))
        added = (operations[method] - operations[base]) / (2 * blocks)
        median, count = float(np.median(own)), operations[method]
        rows.append(
            Compilation(method, base, 2 * blocks, median, middle, low, high, repetitions, count, added, runs.commit())
        )
    return rows


def count_operations(program: str) -> int:
    """Counts the operations of a program of StableHLO, each function once."""
    return len(re.findall(r"^ +%\S+ = \"?(?:stablehlo\.|call )", program, re.MULTILINE))


def main(argv: list[str] | None = None) -> list[Compilation]:
    """Measures, writes compilation.csv and prints it."""
    parser = programs.Parser(
        description="Measures what BNP adds to tracing and compiling a deep network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--blocks", type=programs.count, default=64, metavar="N", help="residual blocks of two layers")
    parser.add_argument(
        "--repetitions", type=programs.count, default=7, metavar="N", help="compilations of each method"
    )
    parser.add_argument(
        "--results", type=programs.folder, default=str(runs.RESULTS), metavar="DIR", help="where the file goes"
    )
    args = parser.parse_args(argv)
    rows = measure(args.blocks, args.repetitions)
    report.write(args.results / "compilation.csv", rows)
    lines = [[*report.compilation_cells(row), f"{BARS[row.method]:g}" if row.method in BARS else ""] for row in rows]
    programs.show(report.make_table(f"{2 * args.blocks} layers", (*report.COMPILATION_HEADER, "bar"), lines))
    return rows


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    programs.start(main)
