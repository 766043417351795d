"""Draws the figures of the other methods' experiments, and writes their tables into the pages that show them.

Everything comes from the CSV files that ``methods.py`` wrote.
"""

import functools

import figures
import methods
import programs
import trials

make = functools.partial(trials.report_all, methods.EXPERIMENTS)


def main(argv: list[str] | None = None) -> None:
    """Draws the figures of the experiments and fills their tables."""
    figures.publish("Draws the figures and writes the tables of the other methods from their CSV files.", make, argv)


if __name__ == "__main__":
    programs.start(main)
