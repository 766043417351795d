"""Runs the paper's experiments on MNIST and CIFAR-10, and continues where an earlier call stopped.

Every experiment goes in two stages, for every method and batch size alike. First one run at each learning rate of one
grid, by which the validation images choose a rate. Then runs with other seeds at that rate, which alone read the test
images. ``figures.py`` draws what comes out.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import conditioning
import programs
import runs
import sweeps
import train
from runs import Result, Run

RATES = {
    "e1": [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
    "e2": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
    "defaults": [0.01, 0.03, 0.1, 0.3, 1.0],
    "refresh": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
}
QUICK_RATES = [0.03, 0.1, 0.3]
TUNING_SEED = 0
SEEDS, QUICK_SEEDS = [1, 2, 3], [1]
EXAMPLES, QUICK_EXAMPLES = 51_200, 4_096  # the first is about an epoch of MNIST or CIFAR-10
METHODS = ["sgd", "bn", "gn", "bnp", "bnp+gn"]
GROUP_SIZE = 8  # the best of 4, 8 and 16 in validation, see the experiment "defaults"
RECIPE_EXAMPLES = 64_000 * 128
FEWEST_EXAMPLES = 4 * 128  # a batch in each of the four parts of a run
REFRESHES = [(10, 0.99), (10, 0.9)]  # steps, decay: the default one, and one that forgets about as much in ten steps
EXPERIMENTS, ON_DEMAND = ("e1", "e2", "e4"), ("defaults", "refresh", "e3")


def grid(experiment: str, quick: bool) -> list[Run]:
    """Returns what an experiment compares, with the learning rate and the seed left at zero.

    Args:
      experiment: "e1", fully connected networks, "e2", convolutional ones, or "refresh", BNP on both with statistics
        that are refreshed now and then.
      quick: on the digits that need no download.
    """
    if experiment == "refresh":
        of_bnp = [cell for name in ("e1", "e2") for cell in grid(name, quick) if cell.method == "bnp"]
        return [
            dataclasses.replace(cell, refresh_every=every, decay=decay) for every, decay in REFRESHES for cell in of_bnp
        ]
    if experiment == "e1":
        data = ["digits"] if quick else ["mnist", "cifar-10"]
        model, methods, batch_sizes = "mlp", ["sgd", "bn", "bnp"], [60, 6, 1]
    else:
        data = ["digits"] if quick else ["cifar-10"]
        model, methods, batch_sizes = "cnn", METHODS, [32, 4, 1] if quick else [128, 32, 4, 1]
    combinations = itertools.product(data, batch_sizes, methods)
    return [
        Run(name, model, method, batch_size, 0.0, 0, 0, group_size=GROUP_SIZE)
        for name, batch_size, method in combinations
    ]


def recipe(seeds: Sequence[int], examples: int, quick: bool) -> list[Run]:
    """Returns the runs of the deep residual network, whose rates and options the paper gives."""
    options: dict[str, Any] = {"momentum": 0.9, "schedule": "steps", "augment": True, "reads_test": True}
    by_method: dict[str, dict[str, Any]] = {
        "bn": {"weight_decay": 1e-4},
        "gn": {"weight_decay": 1e-4},
        "bnp+gn": {"weight_decay": 1.5e-4, "init_scale": 0.1},
    }
    return [
        Run("digits" if quick else "cifar-10", "resnet110", method, 128, 0.1, seed, examples, **options | own)
        for method, own in by_method.items()
        for seed in seeds
    ]


def variants(quick: bool) -> tuple[list[Run], list[Run]]:
    """Returns what chose the defaults: convolutional and fully connected networks, the rates left at zero.

    The options of BNP are changed one at a time; and the group size of Group Normalization is tried.
    """
    changes: list[dict[str, Any]] = [
        {},
        *({"prior_examples": prior} for prior in (None, 16.0, 1024.0)),
        *({"decay": decay} for decay in (0.9, 0.999)),
        *({"scaling": scaling} for scaling in ("128", "none")),
        *({"covers": covers} for covers in ("hidden", "convolutions")),
        *({"momentum": 0.9, "bnp_last": last} for last in (False, True)),
    ]
    data = "digits" if quick else "cifar-10"
    bnp = [
        Run(data, "cnn", "bnp", size, 0.0, 0, 0, **{"scaling": "examples"} | change)
        for size in (128, 4)
        for change in changes
    ]
    gn = [Run(data, "cnn", "gn", size, 0.0, 0, 0, group_size=group) for size in (128, 4) for group in (4, 8, 16)]
    mlp = [
        dataclasses.replace(cell, scaling=scaling)
        for cell in grid("e1", quick)
        if cell.method == "bnp"
        for scaling in ("examples", "128")
    ]
    return bnp + gn, mlp


def with_rates(cells: Sequence[Run], rates: Sequence[float], examples: int) -> list[Run]:
    """Returns the tuning runs: every cell at every learning rate."""
    return [
        dataclasses.replace(cell, rate=rate, seed=TUNING_SEED, examples=examples) for cell in cells for rate in rates
    ]


def with_best_rate(tuning: Sequence[Result], seeds: Sequence[int]) -> list[Run]:
    """Returns the runs that read the test images: every cell at the rate that is best in validation."""
    by_cell: dict[Run, list[Result]] = {}
    for result in tuning:
        by_cell.setdefault(dataclasses.replace(result.run, rate=0.0), []).append(result)
    return [
        dataclasses.replace(cell, rate=runs.best_rate(results), seed=seed, reads_test=True)
        for cell, results in by_cell.items()
        for seed in seeds
    ]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = programs.Parser(
        description="Runs the paper's experiments; a run that has its row in the CSV file is not repeated.",
    )
    option = parser.add_argument
    rate, seed, count = programs.positive, programs.at_least(TUNING_SEED + 1), programs.at_least(FEWEST_EXAMPLES)
    option("--rates", nargs="+", type=rate, metavar="RATE", help="grid of learning rates, if another one than usual")
    option("--seeds", nargs="+", type=seed, metavar="SEED", help=f"of the runs that read the test images ({SEEDS})")
    option(
        "--examples", type=count, metavar="N", help=f"how many examples a run sees ({EXAMPLES}; e3: {RECIPE_EXAMPLES})"
    )
    args = sweeps.parse(parser, argv, EXPERIMENTS, ON_DEMAND)
    args.seeds = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the experiments and prints what came out."""
    args = parse_args(argv)

    def rates(experiment: str) -> list[float]:
        return args.rates or (QUICK_RATES if args.quick else RATES[experiment])

    for experiment in args.experiments:
        output = args.results / f"{experiment}.csv"
        examples = args.examples or (
            QUICK_EXAMPLES if args.quick else RECIPE_EXAMPLES if experiment == "e3" else EXAMPLES
        )

        def sweep(todo: list[Run], output: Path = output) -> list[Result]:
            return train.sweep(todo, output, args.data_dir, args.workers)

        match experiment:
            case "e4":
                conditioning.measure_all(output, args.seeds, conditioning.STEPS[: 3 if args.quick else None])
            case "e3":
                todo = recipe(args.seeds, examples, args.quick)
                print(train.forecast(todo, output, args.data_dir))
                programs.show(train.make_table(sweep(todo)))
            case "defaults":
                # The start and the options matter most in the first part of a training.
                convolutional, fully_connected = variants(args.quick)
                todo = with_rates(convolutional, rates("defaults"), examples // 4)
                todo += with_rates(fully_connected, rates("defaults"), examples)
                programs.show(train.make_table(sweep(todo)))
            case _:
                tuning = sweep(with_rates(grid(experiment, args.quick), rates(experiment), examples))
                programs.show(train.make_table(sweep(with_best_rate(tuning, args.seeds))))
    if args.quick:
        print(
            "This short form shows that the programs run, and nothing about the methods: too few examples, too few "
            f"rates, digits that all can read. What was measured is in {runs.RESULTS / 'README.md'}."
        )


if __name__ == "__main__":
    programs.start(main)
