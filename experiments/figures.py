"""Draws the figures of the experiments, and writes their tables into the pages that show them.

Everything comes from the CSV files that ``paper.py`` and ``beyond.py`` wrote.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import conditioning
import programs
import runs
import tables
from conditioning import Conditioning
from programs import UserError
from protocol import Outcome

COLORS = {"sgd": "#555555", "bn": "#E69F00", "gn": "#009E73", "bnp": "#0072B2", "bnp+gn": "#56B4E9"}
TICKS_APART = 0.08  # of the height of a panel, so that no label lies on another
MOST_COLUMNS = 3  # of panels that can still be read in the width of a page
LABEL_WIDTH = 1.5  # inches of a legend, about what a method takes
MARKERS = {"sgd": "s", "bn": "^", "gn": "v", "bnp": "o", "bnp+gn": "D"}


def draw(
    axes: Axes,
    x: Sequence[float],
    values: Iterable[np.ndarray],
    method: str,
    middle: Callable[[np.ndarray], float] = np.mean,
    **style: str,
) -> None:
    """Draws the mean, or another middle, and the range of the values at every x."""
    color = COLORS[method]
    line = {"label": tables.NAMES[method], "marker": MARKERS[method]} | style
    middles, lows, highs = zip(*((middle(value), value.min(), value.max()) for value in values), strict=True)
    axes.plot(x, middles, color=color, markersize=4, **line)  # type: ignore[arg-type]
    axes.fill_between(x, lows, highs, color=color, alpha=0.2, linewidth=0)


def panels(titles: Sequence[str], columns: int, ylabel: str, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Returns a figure of equal panels."""
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * rows + 0.4), layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(len(titles))]
    for number, (panel, title) in enumerate(zip(axes, titles, strict=True)):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if number % columns == 0:
            panel.set_ylabel(ylabel)
        if sharey:
            panel.sharey(axes[0])
    return figure, axes


def show_errors_as_accuracies(panel: Axes) -> None:
    """Makes the axis of errors (%) logarithmic, so that 97 against 96 % shows as well as 97 against 10 %."""
    panel.set(yscale="log")
    low, high = panel.get_ylim()
    panel.set_ylim(high, low)
    ticks: list[int] = []
    for error in (1, 2, 3, 4, 6, 10, 20, 30, 40, 50, 60, 70, 80, 90):
        apart = math.log(error / ticks[-1]) / math.log(high / low) if ticks else 1
        if low <= error <= high and apart > TICKS_APART:
            ticks.append(error)
    panel.set_yticks(ticks, labels=[str(100 - error) for error in ticks])
    panel.minorticks_off()
    if label := panel.get_ylabel():
        panel.set_ylabel(f"{label}\nlogarithmic in the error")


def draw_over_rates(
    panel: Axes, outcomes: Iterable[Outcome], label: str, style: Mapping[str, Any], errors: bool = True
) -> None:
    """Draws validation accuracy against learning rate, with seed 0, or its error; what diverged guesses."""
    own = sorted((outcome for outcome in outcomes if not outcome.seed), key=lambda outcome: outcome.rate)
    accuracies = np.array([tables.CHANCE if outcome.diverged else outcome.validation_accuracy for outcome in own])
    line: dict[str, Any] = {"label": label, "markersize": 4, **style}
    panel.plot([outcome.rate for outcome in own], 100 - accuracies if errors else accuracies, **line)
    panel.set(xscale="log", xlabel="learning rate")


def add_legend(figure: Figure, axes: Sequence[Axes]) -> Figure:
    """Puts one legend with all lines of all panels above them, in as many rows as it takes."""
    labels: dict[str, object] = {}
    for panel in axes:
        handles, names = panel.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    if not labels:
        return figure
    rows = math.ceil(len(labels) * LABEL_WIDTH / figure.get_figwidth())
    columns = math.ceil(len(labels) / rows)
    figure.legend(list(labels.values()), list(labels), loc="outside upper center", ncols=columns, frameon=False)  # type: ignore[call-overload]
    return figure


def by_batch_size(cells: Sequence[tables.Cell]) -> Figure:
    """Test accuracy against batch size, at equal examples seen."""
    named = list(tables.groups(cells, by_batch_size=False))
    figure, axes = panels([name for name, _ in named], len(named), "test accuracy (%)")
    for panel, (_, members) in zip(axes, named, strict=True):
        sizes = sorted({cell.batch_size for cell in members}, reverse=True)
        for method in dict.fromkeys(cell.method for cell in members):
            own = {cell.batch_size: cell.test_accuracies for cell in members if cell.method == method}
            places = [place for place, size in enumerate(sizes) if size in own]
            draw(panel, places, [100 - own[sizes[place]] for place in places], method)
        panel.set_xticks(range(len(sizes)), labels=[str(size) for size in sizes])
        panel.set_xlabel("batch size")
        show_errors_as_accuracies(panel)
    return add_legend(figure, axes)


def by_rate(cells: Sequence[tables.Cell]) -> Figure:
    """Validation accuracy against learning rate: the runs that chose the rate."""
    named = list(tables.groups(cells, by_batch_size=True))
    figure, axes = panels([name for name, _ in named], columns_of(cells), "validation accuracy (%)")
    for panel, (_, members) in zip(axes, named, strict=True):
        for cell in members:
            ordered = sorted(cell.tuning, key=lambda result: result.run.rate)
            accuracies = np.array([max(runs.final_accuracy(result), tables.CHANCE) for result in ordered])
            draw(panel, [result.run.rate for result in ordered], 100 - accuracies[:, None], cell.method)
        show_errors_as_accuracies(panel)
        panel.set(xscale="log", xlabel="learning rate")
    return add_legend(figure, axes)


def by_examples(cells: Sequence[tables.Cell]) -> Figure:
    """Training loss against examples seen, at the best rate."""
    named = list(tables.groups(cells, by_batch_size=True))
    figure, axes = panels([name for name, _ in named], columns_of(cells), "training loss (nats)")
    for panel, (_, members) in zip(axes, named, strict=True):
        for cell in members:
            finished = [result for result in cell.final if not result.diverged]
            if finished:
                losses = np.transpose([result.train_loss for result in finished])
                draw(panel, finished[0].examples_seen, losses, cell.method)
        panel.set(xlabel="examples seen", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
    return add_legend(figure, axes)


def columns_of(cells: Sequence[tables.Cell]) -> int:
    """Returns how many batch sizes there are, the columns of a grid with a row a data set; of four half as many."""
    number = len({cell.batch_size for cell in cells})
    return number if number <= MOST_COLUMNS else math.ceil(number / 2)


def along_training(rows: Sequence[Conditioning]) -> Figure:
    """Condition numbers and quartile ratios of every layer along training: median and range of the seeds."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    kinds: dict[str, Callable[[Conditioning], float]] = {
        "condition number": lambda row: row.condition_number,
        "largest / quartile eigenvalue": lambda row: row.quartile_ratio,
    }
    figure, axes = panels([f"{layer}\n{name}" for name in kinds for layer in layers], len(layers), "")
    for panel, (value, layer) in zip(axes, itertools.product(kinds.values(), layers), strict=True):
        for method, matrix in dict.fromkeys((row.method, row.matrix) for row in rows):
            own = [row for row in rows if (row.layer, row.method, row.matrix) == (layer, method, matrix)]
            steps = sorted({row.step for row in own})
            values = np.array([[value(row) for row in own if row.step == step] for step in steps])
            style = {"linestyle": "--"} if method == "bnp" and matrix == "H" else {}
            draw(panel, steps, values, method, np.median, label=f"{matrix}, {tables.NAMES[method]}", **style)
        panel.set_xscale("symlog", linthresh=10)
        panel.set(yscale="log", xlabel="steps of training")
    return add_legend(figure, axes)


def make(results: Path) -> tuple[dict[str, str], dict[str, Figure]]:
    """Returns the tables and the figures, by name, of the CSV files of a folder.

    Raises:
      UserError: if the folder holds none of them.
    """
    texts: dict[str, str] = {}
    figures: dict[str, Figure] = {}
    all_cells = {name: tables.cells(runs.read(results / f"{name}.csv")) for name in ("e1", "e2")}
    by_experiment = {name: own for name, own in all_cells.items() if own}  # some of it is done
    for name, own in by_experiment.items():
        texts[name] = tables.accuracy_table(own)
        figures |= {f"{name}_rates": by_rate(own), f"{name}_curves": by_examples(own)}
    if by_experiment:
        everything = list(itertools.chain(*by_experiment.values()))
        texts["summary"], figures["batch_size"] = tables.summary_table(everything), by_batch_size(everything)
        if refreshed := runs.read(results / "refresh.csv"):
            columns = {"every step": [cell for cell in everything if cell.method == "bnp"]}
            for every, decay in dict.fromkeys((result.run.refresh_every, result.run.decay) for result in refreshed):
                same = runs.select(refreshed, refresh_every=every, decay=decay)
                columns[f"every {every}, decay {decay:g}"] = tables.cells(same)
            texts["refresh"] = tables.refresh_table(columns)
    by_name = {
        "defaults": tables.defaults_table,
        "rule": tables.rule_table,
        "bound": tables.bound_table,
        "e3": tables.recipe_table,
    }
    for name, make_table in by_name.items():
        if rows := runs.read(results / f"{name}.csv"):
            texts[name] = make_table(rows)
    if spectra := conditioning.read(results / "e4.csv"):
        texts["e4"], texts["e4_gains"] = tables.conditioning_table(spectra), tables.conditioning_gains_table(spectra)
        figures["e4"] = along_training(spectra)
    if not texts:
        raise UserError(f"{results} holds no finished CSV file of paper.py or beyond.py; run these first")
    return texts, figures


def publish(
    description: str, make: Callable[[Path], tuple[dict[str, str], dict[str, Figure]]], argv: list[str] | None = None
) -> None:
    """Draws all figures into the folder of the CSV files and fills the tables of the pages, as the arguments say.

    Args:
      description: of the program, for its help.
      make: returns the tables and the figures of a folder.
      argv: the program's arguments.
    """
    parser = programs.Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--results", type=programs.folder, default=str(runs.RESULTS), metavar="DIR", help="folder of the CSV files"
    )
    parser.add_argument("--pages", nargs="*", type=Path, default=[], metavar="MD", help="pages whose tables to fill")
    args = parser.parse_args(argv)
    texts, figures = make(args.results)
    pages = {page: filled_page(page, texts) for page in args.pages}  # all of them, before anything is written
    for name, figure in figures.items():
        figure.savefig(path := args.results / f"{name}.png", dpi=110)
        print(path)
    for page, text in pages.items():
        page.write_text(text)
        print(page)


def filled_page(page: Path, texts: dict[str, str]) -> str:
    """Returns the text of a page with its tables filled.

    Raises:
      UserError: if they cannot be; names the page.
    """
    try:
        return tables.fill_tables(page.read_text(), texts)
    except UnicodeDecodeError:
        raise UserError(f"{page}: no page in Markdown, but a file of other bytes") from None
    except UserError as error:
        raise UserError(f"{page}: {error}") from None


def main(argv: list[str] | None = None) -> None:
    """Draws the figures of the experiments and fills their tables."""
    publish("Draws the figures and writes the tables of the experiments from their CSV files.", make, argv)


if __name__ == "__main__":
    programs.start(main)
