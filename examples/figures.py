"""Draws the figures of the paper's experiments, and writes their tables into the pages that show them.

Everything comes from the CSV files that ``paper.py`` wrote. In a page, a table stands between the comments
``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rich
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import conditioning
import runs
from conditioning import Conditioning
from runs import Result, Run

NAMES = {"sgd": "SGD", "bn": "BN", "gn": "GN", "bnp": "BNP", "bnp+gn": "BNP+GN"}
COLORS = {"sgd": "#555555", "bn": "#E69F00", "gn": "#009E73", "bnp": "#0072B2", "bnp+gn": "#56B4E9"}
MARKERS = {"sgd": "s", "bn": "^", "gn": "v", "bnp": "o", "bnp+gn": "D"}
DATA_NAMES = {"digits": "digits", "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar-10": "CIFAR-10"}
MODEL_NAMES = {"mlp": "fully connected 3x100", "cnn": "5-layer CNN"}
CHANCE = 10.0  # percent


class Cell(NamedTuple):
    """One method on one network, data set and batch size."""

    data: str
    model: str
    batch_size: int
    method: str
    tuning: list[Result]  # one run a learning rate, which read the validation images alone
    final: list[Result]  # one run a seed at the rate that was best in validation

    @property
    def rate(self) -> float:
        """The learning rate that was best in validation."""
        return runs.best_rate(self.tuning)

    @property
    def validation(self) -> float:
        """The validation accuracy at that rate, in percent."""
        return max(map(runs.final_accuracy, self.tuning))

    @property
    def test_accuracies(self) -> np.ndarray:
        """In percent; a run that diverged guesses."""
        return np.array([CHANCE if result.diverged else result.test_accuracy for result in self.final])


def cells(results: Sequence[Result]) -> list[Cell]:
    """Groups the rows of an experiment, largest batches first, methods in the order of ``runs.METHODS``.

    A cell whose runs at the best rate are still to come is left out.

    Raises:
      ValueError: if the rows saw different numbers of examples.
    """
    if len(budgets := {result.run.examples for result in results}) > 1:
        raise ValueError(f"runs of different lengths cannot be compared: {sorted(budgets)} examples")
    keys = dict.fromkeys((r.run.data, r.run.model, r.run.batch_size, r.run.method) for r in results)
    grouped = []
    for data, model, batch_size, method in keys:
        own = runs.select(results, data=data, model=model, batch_size=batch_size, method=method)
        tuning = runs.select(own, reads_test=False)
        if final := runs.select(own, reads_test=True, rate=runs.best_rate(tuning)):
            grouped.append(Cell(data, model, batch_size, method, tuning, final))
    data_order = list(dict.fromkeys(cell.data for cell in grouped))
    return sorted(
        grouped, key=lambda cell: (data_order.index(cell.data), -cell.batch_size, runs.METHODS.index(cell.method))
    )


def network_name(what: Cell | Run) -> str:
    """Returns the data set and the network as text."""
    return f"{DATA_NAMES[what.data]}, {MODEL_NAMES[what.model]}"


def groups(cells: Sequence[Cell], by_batch_size: bool) -> Iterator[tuple[str, list[Cell]]]:
    """Yields the title and the cells of every panel."""

    def title(cell: Cell) -> str:
        network = network_name(cell)
        return f"{network}\nbatch size {cell.batch_size}" if by_batch_size else network

    for name, members in itertools.groupby(cells, title):
        yield name, list(members)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown, its columns of numbers aligned to the right."""
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_table(cells: Sequence[Cell]) -> str:
    """Returns what every cell reached, with the learning rate and the window of rates."""
    rows = []
    for cell in cells:
        test, losses = cell.test_accuracies, [result.train_loss[-1] for result in cell.final]
        low, high = runs.window(cell.tuning)
        diverged = sum(result.diverged for result in cell.tuning)
        rows.append(
            [
                DATA_NAMES[cell.data],
                str(cell.batch_size),
                NAMES[cell.method],
                f"{test.mean():.1f}",
                range_text(test),
                f"{np.mean(losses):.2f}",
                f"{cell.rate:g}",
                f"{cell.validation:.1f}",
                window_text(low, high),
                f"{diverged} of {len(cell.tuning)}",
            ]
        )
    header = ["data", "batch", "method", "test accuracy", "range", "train loss", "rate", "validation", "window"]
    return markdown([*header, "diverged"], rows)


def summary_table(cells: Sequence[Cell]) -> str:
    """Returns the mean test accuracies, a row a network, data set and batch size, a column a method."""
    rows = []
    for name, members in groups(cells, by_batch_size=True):
        by_method = {cell.method: f"{cell.test_accuracies.mean():.1f}" for cell in members}
        network, batch_size = name.split("\nbatch size ")
        rows.append([network, batch_size, *(by_method.get(method, "") for method in NAMES)])
    return markdown(["network", "batch", *NAMES.values()], rows)


def defaults_table(results: Sequence[Result]) -> str:
    """Returns the best validation accuracy of every variant of the options, and at which rates it is reached."""
    options = ("prior_examples", "decay", "covers", "momentum", "bnp_last")
    standard = {field.name: field.default for field in runs.RUN_FIELDS}
    by_variant: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        run = result.run
        changed = [f"{name}={getattr(run, name)}" for name in options if getattr(run, name) != standard[name]]
        first = f"group_size={run.group_size}" if run.method == "gn" else f"scaling={run.scaling}"
        options_text = ", ".join([first, *changed])
        cells = (network_name(run), str(run.batch_size), f"{run.examples:,}", NAMES[run.method], options_text)
        by_variant.setdefault(cells, []).append(result)
    rows = []
    for variant, own in by_variant.items():
        tuning, rate = runs.select(own, reads_test=False), runs.best_rate(runs.select(own, reads_test=False))
        best, final = max(map(runs.final_accuracy, tuning)), runs.select(own, reads_test=True, rate=rate)
        test = f"{np.mean([result.test_accuracy for result in final]):.1f}" if final else ""
        rows.append([*variant, f"{best:.1f}", f"{rate:g}", window_text(*runs.window(tuning)), test])
    return markdown(["network", "batch", "examples", "method", "options", "validation", "rate", "window", "test"], rows)


def refresh_table(columns: dict[str, list[Cell]]) -> str:
    """Returns the test accuracies of BNP and the best ones in validation, a row a network and batch size.

    Args:
      columns: the cells by how often, and with which decay, BNP's statistics are refreshed.
    """
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for header, own in columns.items():
        for cell in own:
            key, test = (network_name(cell), str(cell.batch_size)), cell.test_accuracies
            texts = [f"{test.mean():.1f} ({range_text(test)})", f"{cell.validation:.1f}"]
            rows.setdefault(key, {})[header] = texts
    lines = [[*key, *(text for name in columns for text in row.get(name, ["", ""]))] for key, row in rows.items()]
    return markdown(["network", "batch", *(text for name in columns for text in (name, "validation"))], lines)


def range_text(values: np.ndarray) -> str:
    """Returns the lowest and the highest of the values as text."""
    return f"{values.min():.1f} to {values.max():.1f}"


def window_text(low: float, high: float) -> str:
    """Returns an interval of learning rates as text."""
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def recipe_table(results: Sequence[Result]) -> str:
    """Returns a row a run: training loss at the start and the end, test accuracy, time."""
    rows = []
    for result in results:
        run, losses = result.run, result.train_loss
        numbers = (f"{losses[0]:.2f}", f"{losses[-1]:.2f}", f"{result.test_accuracy:.1f}", f"{result.seconds:.0f}")
        rows.append([DATA_NAMES[run.data], NAMES[run.method], str(run.seed), f"{run.examples:,}", *numbers])
    header = ["data", "method", "seed", "examples", "train loss, first quarter", "last quarter", "test accuracy"]
    return markdown([*header, "seconds"], rows)


def conditioning_table(rows: Sequence[Conditioning]) -> str:
    """Returns medians over the seeds at the last step."""
    last = max(row.step for row in rows)
    kinds = dict.fromkeys((row.layer, row.method, row.matrix) for row in rows)
    lines = []
    for layer, method, matrix in sorted(kinds):
        own = [row for row in rows if (row.layer, row.method, row.matrix, row.step) == (layer, method, matrix, last)]
        numbers = [[row.condition_number, row.quartile_ratio, row.largest] for row in own]
        condition, ratio, largest = np.median(numbers, axis=0)
        sizes = f"{own[0].size}", f"{np.median([row.rank for row in own]):.0f}"
        lines.append([layer, NAMES[method], matrix, *sizes, f"{condition:.1e}", f"{ratio:.1f}", f"{largest:.3f}"])
    header = ["layer", "trained by", "matrix", "size", "rank", "condition number", "quartile ratio", "largest"]
    return markdown(header, lines)


def conditioning_gains_table(rows: Sequence[Conditioning]) -> str:
    """Returns how many times better conditioned P'HP is than H: median and range over seeds, after the start."""
    lines = []
    for layer in dict.fromkeys(row.layer for row in rows):
        own = [row for row in rows if (row.layer, row.method) == (layer, "bnp") and row.step > 0]
        h, php = ({(row.seed, row.step): row for row in own if row.matrix == matrix} for matrix in ("H", "P'HP"))
        cells = [layer]
        for number in ("condition_number", "quartile_ratio"):
            gains = [getattr(h[where], number) / getattr(php[where], number) for where in php]
            cells.append(f"{np.median(gains):.1f} ({min(gains):.1f} to {max(gains):.1f})")
        lines.append(cells)
    return markdown(["layer", "condition number, H / P'HP", "quartile ratio, H / P'HP"], lines)


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
    line = {"label": NAMES[method], "marker": MARKERS[method]} | style
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
    ticks = [error for error in (1, 2, 3, 4, 6, 10, 20, 40, 50, 60, 90) if low <= error <= high]
    panel.set_yticks(ticks, labels=[str(100 - error) for error in ticks])
    panel.minorticks_off()


def add_legend(figure: Figure, axes: Sequence[Axes]) -> Figure:
    """Puts one legend with all lines of all panels above them."""
    labels: dict[str, object] = {}
    for panel in axes:
        handles, names = panel.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    figure.legend(list(labels.values()), list(labels), loc="outside upper center", ncols=len(labels), frameon=False)  # type: ignore[call-overload]
    return figure


def by_batch_size(cells: Sequence[Cell]) -> Figure:
    """Test accuracy against batch size, at equal examples seen."""
    named = list(groups(cells, by_batch_size=False))
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


def by_rate(cells: Sequence[Cell]) -> Figure:
    """Validation accuracy against learning rate: the runs that chose the rate."""
    named = list(groups(cells, by_batch_size=True))
    figure, axes = panels([name for name, _ in named], columns_of(cells), "validation accuracy (%)")
    for panel, (_, members) in zip(axes, named, strict=True):
        for cell in members:
            ordered = sorted(cell.tuning, key=lambda result: result.run.rate)
            accuracies = np.array([max(runs.final_accuracy(result), CHANCE) for result in ordered])
            draw(panel, [result.run.rate for result in ordered], 100 - accuracies[:, None], cell.method)
        show_errors_as_accuracies(panel)
        panel.set(xscale="log", xlabel="learning rate")
    return add_legend(figure, axes)


def by_examples(cells: Sequence[Cell]) -> Figure:
    """Training loss against examples seen, at the best rate."""
    named = list(groups(cells, by_batch_size=True))
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


def columns_of(cells: Sequence[Cell]) -> int:
    """Returns how many batch sizes there are: the columns of a grid with a row a data set."""
    return len({cell.batch_size for cell in cells})


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
            draw(panel, steps, values, method, np.median, label=f"{matrix}, {NAMES[method]}", **style)
        panel.set_xscale("symlog", linthresh=10)
        panel.set(yscale="log", xlabel="steps of training")
    return add_legend(figure, axes)


def fill_tables(page: str, tables: dict[str, str]) -> str:
    """Returns a page with the tables between its comments replaced.

    Raises:
      ValueError: if a page asks for a table that there is not.
    """

    def replacement(match: re.Match[str]) -> str:
        if (name := match[1]) not in tables:
            raise ValueError(f"no table {name!r}; there are {', '.join(tables)}")
        return f"<!-- table: {name} -->\n\n{tables[name]}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", replacement, page, flags=re.DOTALL)


def make(results: Path) -> tuple[dict[str, str], dict[str, Figure]]:
    """Returns the tables and the figures, by name, of the CSV files of a folder.

    Raises:
      ValueError: if the folder holds none of them.
    """
    tables: dict[str, str] = {}
    figures: dict[str, Figure] = {}
    by_experiment = {name: cells(rows) for name in ("e1", "e2") if (rows := runs.read(results / f"{name}.csv"))}
    for name, own in by_experiment.items():
        tables[name] = accuracy_table(own)
        figures |= {f"{name}_rates": by_rate(own), f"{name}_curves": by_examples(own)}
    if by_experiment:
        everything = list(itertools.chain(*by_experiment.values()))
        tables["summary"], figures["batch_size"] = summary_table(everything), by_batch_size(everything)
        if refreshed := runs.read(results / "refresh.csv"):
            columns = {"every step": [cell for cell in everything if cell.method == "bnp"]}
            for every, decay in dict.fromkeys((result.run.refresh_every, result.run.decay) for result in refreshed):
                same = runs.select(refreshed, refresh_every=every, decay=decay)
                columns[f"every {every}, decay {decay:g}"] = cells(same)
            tables["refresh"] = refresh_table(columns)
    if rows := runs.read(results / "defaults.csv"):
        tables["defaults"] = defaults_table(rows)
    if rows := runs.read(results / "e3.csv"):
        tables["e3"] = recipe_table(rows)
    if spectra := conditioning.read(results / "e4.csv"):
        tables["e4"], tables["e4_gains"] = conditioning_table(spectra), conditioning_gains_table(spectra)
        figures["e4"] = along_training(spectra)
    if not tables:
        raise ValueError(f"{results} holds no CSV file of paper.py; run that first")
    return tables, figures


def publish(
    description: str, make: Callable[[Path], tuple[dict[str, str], dict[str, Figure]]], argv: list[str] | None = None
) -> None:
    """Draws all figures into the folder of the CSV files and fills the tables of the pages, as the arguments say.

    Args:
      description: of the program, for its help.
      make: returns the tables and the figures of a folder.
      argv: the program's arguments.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="folder of the CSV files")
    parser.add_argument("--pages", nargs="*", type=Path, default=[], metavar="MD", help="pages whose tables to fill")
    args = parser.parse_args(argv)
    tables, figures = make(args.results)
    for name, figure in figures.items():
        figure.savefig(path := args.results / f"{name}.png", dpi=110)
        rich.print(f"{path}")
    for page in args.pages:
        page.write_text(fill_tables(page.read_text(), tables))
        rich.print(f"{page}")


def main(argv: list[str] | None = None) -> None:
    """Draws the figures of the paper's experiments and fills their tables."""
    publish("Draws the figures and writes the tables of the paper's experiments from their CSV files.", make, argv)


if __name__ == "__main__":
    main()
