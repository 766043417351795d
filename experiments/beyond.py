"""Experiments beyond the paper: how large the steps of SGD may be, and what bounds them.

* ``rule``: SGD at a learning rate in proportion to 1 - momentum, for three networks, batch sizes from 8 to 512.
* ``bound``: SGD in BNP's variables, its gradients or its steps clipped relative to what they change.

A call continues where an earlier one stopped. ``figures.py`` writes the tables of what comes out.
"""

import dataclasses
import itertools
from collections.abc import Callable

import programs
import sweeps
import train
from runs import BOUNDS, Run

BATCH_SIZES, MOMENTA, SEEDS = (512, 128, 32, 8), (0.0, 0.9, 0.99), (0, 1, 2)
NETWORKS = (("digits", "mlp", 10_240), ("mnist", "tutorial", 12_800), ("cifar-10", "cnn", 12_800))
RATE_FACTOR, LARGER_FACTOR = 0.1, 0.3
RATES = {0.9: (0.03, 0.1, 0.3, 1.0), 0.0: (0.1, 0.3, 1.0, 3.0)}  # by momentum
EPOCHS = {"none": (0.01, 0.03), "gradient": (0.03,), "step": (0.03,), "small-step": (0.03, 0.1, 0.3, 1.0)}  # rates


def rule(quick: bool) -> list[Run]:
    """Returns BNP by the rule with three seeds; with one, SGD by the rule, and BNP at three times the rates."""
    todo = []
    for seed, (data, model, examples), size, momentum in itertools.product(SEEDS, NETWORKS, BATCH_SIZES, MOMENTA):
        run = Run(data, model, "bnp", size, round(RATE_FACTOR * (1 - momentum), 6), seed, examples, momentum=momentum)
        larger = dataclasses.replace(run, rate=round(LARGER_FACTOR * (1 - momentum), 6))
        inside = (
            [dataclasses.replace(run, method="preconditioned")] if momentum == 0.9 else []
        )  # equal without momentum
        if seed == 0:
            todo += [run, dataclasses.replace(run, method="sgd"), larger, *inside]
        elif momentum < 0.99:
            todo += [run, *inside]
    return shorten(todo[:7]) if quick else todo


def bound(quick: bool) -> list[Run]:
    """Returns SGD in BNP's variables with every bound, at rates up to those that BN bears, and some for an epoch."""
    cnn = Run("cifar-10", "cnn", "preconditioned", 128, 0.0, 0, 12_800)
    tutorial = dataclasses.replace(cnn, data="mnist", model="tutorial", momentum=0.9)
    in_small_batches = dataclasses.replace(cnn, batch_size=4, examples=6_400)
    cells = [dataclasses.replace(run, momentum=momentum) for run in (cnn, in_small_batches) for momentum in RATES]
    cells += [dataclasses.replace(tutorial, batch_size=size) for size in (128, 32)]
    todo = [
        dataclasses.replace(cell, rate=rate, bound=kind)
        for cell in cells
        for kind in (BOUNDS if cell.model == "cnn" else BOUNDS[:3])
        for rate in RATES[cell.momentum]
    ]
    epoch = dataclasses.replace(cells[0], examples=51_200)
    todo += [dataclasses.replace(epoch, rate=rate, bound=kind) for kind, rates in EPOCHS.items() for rate in rates]
    return shorten(todo[:16:4]) if quick else todo


def shorten(todo: list[Run]) -> list[Run]:
    """Returns the runs in a short form, on scikit-learn's digits, which need no download."""
    return [dataclasses.replace(run, data="digits", examples=1024) for run in todo]


EXPERIMENTS: dict[str, Callable[[bool], list[Run]]] = {"rule": rule, "bound": bound}


def main(argv: list[str] | None = None) -> None:
    """Runs the experiments and prints what came out."""
    parser = programs.Parser(description="Runs experiments beyond the paper's and continues earlier calls.")
    args = sweeps.parse(parser, argv, EXPERIMENTS)
    for name in args.experiments:
        todo = EXPERIMENTS[name](args.quick)
        programs.show(train.make_table(train.sweep(todo, args.results / f"{name}.csv", args.data_dir, args.workers)))


if __name__ == "__main__":
    programs.start(main)
