"""Runs the experiments of the other methods, ``bnp_optax.contrib``, and continues where an earlier call stopped.

One experiment a method shows what its paper claims, or that it does not show here. ``methods_report.py`` draws the
figures and writes the tables of what comes out.
"""

import argparse
import os
from pathlib import Path

import jax
import rich

import batch_group_norm
import batch_renorm
import bjorck
import normalizer_free
import psi_sgd
import runs
import trials
import warm_up

EXPERIMENTS: dict[str, trials.Experiment] = {
    "batch_group_norm": batch_group_norm.EXPERIMENT,
    "batch_renorm": batch_renorm.EXPERIMENT,
    "bjorck": bjorck.EXPERIMENT,
    "normalizer_free": normalizer_free.EXPERIMENT,
    "psi_sgd": psi_sgd.EXPERIMENT,
    "warm_up": warm_up.EXPERIMENT,
}


def main(argv: list[str] | None = None) -> None:
    """Runs the experiments and prints their tables."""
    parser = argparse.ArgumentParser(description="Runs the experiments of the other methods; continues earlier calls.")
    option = parser.add_argument
    option("experiments", nargs="*", default=list(EXPERIMENTS), metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    option("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="folder of the data sets' files (data)")
    option("--results", type=Path, default=runs.RESULTS, metavar="DIR", help="folder of the CSV files")
    option("--quick", action="store_true", help="a short form on scikit-learn's digits, which needs no download")
    cpu = jax.default_backend() == "cpu"
    option("--workers", type=int, default=os.cpu_count() if cpu else 1, metavar="N", help="processes (one a core)")
    args = parser.parse_args(argv)
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    for name in args.experiments:
        experiment, output = EXPERIMENTS[name], args.results / f"{name}.csv"
        outcomes = trials.run(experiment, output, args.data_dir, args.quick, args.workers)
        for title, table in trials.report(experiment, outcomes, args.results)[0].items():
            rich.print(f"\n{title}\n\n{table}")


if __name__ == "__main__":
    main()
