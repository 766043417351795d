"""Draws the figures of the other methods' experiments, and writes their tables into the pages that show them.

Everything comes from the CSV files that ``methods.py`` wrote.
"""

from pathlib import Path

from matplotlib.figure import Figure

import figures
import methods
import runs
import trials


def make(results: Path) -> tuple[dict[str, str], dict[str, Figure]]:
    """Returns the tables and the figures, by name, of the CSV files of a folder.

    Raises:
      ValueError: if the folder holds none of them.
    """
    texts: dict[str, str] = {}
    drawn: dict[str, Figure] = {}
    for name, experiment in methods.EXPERIMENTS.items():
        if rows := runs.read_rows(results / f"{name}.csv", trials.Outcome):
            own_texts, own_figures = trials.report(experiment, rows, results)
            texts |= own_texts
            drawn |= own_figures
    if not texts:
        raise ValueError(f"{results} holds no CSV file of methods.py; run that first")
    return texts, drawn


def main(argv: list[str] | None = None) -> None:
    """Draws the figures of the experiments and fills their tables."""
    figures.publish("Draws the figures and writes the tables of the other methods from their CSV files.", make, argv)


if __name__ == "__main__":
    main()
