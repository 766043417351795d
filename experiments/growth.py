"""Measures how the cost of BNP's two parts grows with a fully connected network: its preconditioner, its moments.

The preconditioner is ``scale_by_bnp``'s update that keeps its statistics, compiled alone; the moments are those of all
the layers' inputs. Both are timed while the width, the depth or the batch grows tenfold and the others stay.
"""

import argparse
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress

import bnp_optax as bnp
import programs
import report
import runs
import steps
from report import Point
from steps import Contender

WIDTH, DEPTH, BATCH_SIZE = 500, 5, 128
VARIED = {"width": [300, 1000, 3000], "depth": [2, 6, 20], "batch": [100, 300, 1000]}


def precondition(width: int, depth: int) -> Contender:
    """Compiles the preconditioner of ``depth`` square layers."""
    names = [f"layer_{number}" for number in range(depth)]
    layers = bnp.Layers(tuple(bnp.Layer.dense((name, "kernel"), (width, width), bias=(name, "bias")) for name in names))
    gradients = {name: {"kernel": jnp.ones((width, width)), "bias": jnp.ones(width)} for name in names}
    tx = bnp.scale_by_bnp(layers)

    def update(state: Any) -> Any:
        gradients, opt_state = state
        return tx.update(gradients, opt_state, intermediates=bnp.KEEP_STATISTICS)

    state = (gradients, tx.init(gradients))
    return Contender(jax.jit(update, donate_argnums=0).lower(state).compile(), state)


def moments(width: int, depth: int, batch_size: int) -> Contender:
    """Compiles the moments of ``depth`` inputs."""
    inputs = [jax.random.normal(jax.random.key(number), (batch_size, width)) for number in range(depth)]
    compiled = jax.jit(lambda inputs: [bnp.input_moments(x) for x in inputs]).lower(inputs).compile()
    return Contender(lambda _: compiled(inputs), None)


def measure(seconds: float, sizes: dict[str, list[int]]) -> list[Point]:
    """Measures all networks in turn."""
    contenders, networks = dict[str, Contender](), list[tuple[str, int, int, int]]()
    for varied, size in ((varied, size) for varied, own in sizes.items() for size in own):
        width, depth, batch_size = ({"width": WIDTH, "depth": DEPTH, "batch": BATCH_SIZE} | {varied: size}).values()
        networks.append((varied, size, depth * (width + 1) * width, depth * batch_size * width))
        contenders[f"preconditioner, {varied} {size}"] = precondition(width, depth)
        contenders[f"moments, {varied} {size}"] = moments(width, depth, batch_size)
    with rich.progress.Progress() as progress:
        task = progress.add_task("growth", total=1)
        times = steps.take_turns(contenders, seconds, lambda done: progress.advance(task, done))
    medians = 1000 * np.median(times, axis=1).reshape(-1, 2)
    return [
        Point(*network, float(precondition_ms), float(moments_ms), runs.commit())
        for network, (precondition_ms, moments_ms) in zip(networks, medians, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    """Measures, and writes growth.csv and growth.png."""
    parser = programs.Parser(
        description="Measures how the time of BNP's parts grows with width, depth and batch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=programs.between(0, math.inf), default=60, help="time for the measurements")
    parser.add_argument("--quick", action="store_true", help="networks a hundredth of the width")
    parser.add_argument(
        "--results", type=programs.folder, default=str(runs.RESULTS), metavar="DIR", help="where the files go"
    )
    args = parser.parse_args(argv)
    sizes = VARIED | {"width": [3, 10, 30]} if args.quick else VARIED
    points = measure(args.seconds, sizes)
    report.write(args.results / "growth.csv", points)
    report.make_growth_figure(points).savefig(args.results / "growth.png", dpi=110)
    print(args.results / "growth.csv", args.results / "growth.png", sep=", ")


if __name__ == "__main__":
    programs.start(main)
