"""Runs the example of reinforcement learning, and keeps what it printed: the returns of every method, rate and seed.

``optimizers_report.py`` writes the table of docs/reinforcement_learning.md.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import numpy as np

import programs
import report
import runs
import tables

EXAMPLE = Path(__file__).parents[1] / "examples" / "reinforcement_learning.py"


@dataclasses.dataclass(frozen=True)
class Episodes:
    """The end of a training.

    Attributes:
      method: how the network learns.
      target: whether it has a target network: "yes" or "no".
      rate: the learning rate.
      seed: which of the example's.
      mean_return: of an episode in the last fifth of the training.
      commit: of the code.
    """

    method: str
    target: str
    rate: float
    seed: int
    mean_return: float
    commit: str


def load_example() -> ModuleType:
    """Returns the example as a module."""
    loader = SourceFileLoader("example", str(EXAMPLE))
    module = ModuleType(loader.name)
    loader.exec_module(module)
    return module


def measure(example: ModuleType) -> list[Episodes]:
    """Runs the example, which prints a row of its table as soon as it is there."""
    commit = runs.commit()
    return [
        Episodes(method, "yes" if has_target else "no", rate, seed, float(mean_return), commit)
        for (method, has_target), of_rates in example.main().items()
        for rate, of_seeds in zip(example.RATES, of_rates, strict=True)
        for seed, mean_return in enumerate(of_seeds)
    ]


def table(rows: Sequence[Episodes]) -> str:
    """Returns a row a method and a column a rate: mean and range of the seeds."""
    rates = sorted({row.rate for row in rows})
    lines = []
    for method, target in dict.fromkeys((row.method, row.target) for row in rows):
        own = {
            rate: np.array([r.mean_return for r in rows if (r.method, r.target, r.rate) == (method, target, rate)])
            for rate in rates
        }
        cells = [f"{seeds.mean():.0f} ({seeds.min():.0f} to {seeds.max():.0f})" for seeds in own.values()]
        lines.append([method, target, *cells])
    return tables.markdown(["method", "target network", *(f"{rate:g}" for rate in rates)], lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the example and writes pendulum.csv."""
    parser = programs.Parser(
        description="Runs examples/reinforcement_learning.py and keeps the returns: two minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--results", type=programs.folder, default=str(runs.RESULTS), metavar="DIR", help="where the file goes"
    )
    args = parser.parse_args(argv)
    path = args.results / "pendulum.csv"
    report.write(path, measure(load_example()))
    print(path)


if __name__ == "__main__":
    programs.start(main)
