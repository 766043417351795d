"""The tables of the experiments, from the rows of their CSV files, and the pages that show them.

In a page, a table stands between the comments ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

import programs
import runs
from conditioning import Conditioning
from programs import UserError
from runs import Result, Run

NAMES = {"sgd": "SGD", "bn": "BN", "gn": "GN", "bnp": "BNP", "bnp+gn": "BNP+GN"}
DATA_NAMES = {
    "digits": "digits",
    "digits-1024": "1,024 digits",
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "cifar-10": "CIFAR-10",
}
MODEL_NAMES = {"mlp": "fully connected 3x100", "cnn": "5-layer CNN", "tutorial": "Flax's tutorial CNN"}
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
      UserError: if the rows saw different numbers of examples.
    """
    if len(budgets := {result.run.examples for result in results}) > 1:
        raise UserError(f"runs of different lengths cannot be compared: {sorted(budgets)} examples")
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


def rule_table(results: Sequence[Result]) -> str:
    """Returns validation accuracies at rates in proportion to 1 - momentum: with several seeds their range."""
    columns = {
        "SGD, 0.1 (1 - m)": ("sgd", 0.1),
        "BNP, 0.1 (1 - m)": ("bnp", 0.1),
        "BNP(SGD), 0.1 (1 - m)": ("preconditioned", 0.1),
        "BNP, 0.3 (1 - m)": ("bnp", 0.3),
    }
    keys = dict.fromkeys((r.run.data, r.run.model, r.run.momentum, r.run.batch_size) for r in results)
    rows = []
    for data, model, momentum, batch_size in sorted(keys, key=lambda key: (*key[:3], -key[3])):
        same = runs.select(results, data=data, model=model, momentum=momentum, batch_size=batch_size)
        texts = []
        for method, factor in columns.values():
            own = [r for r in same if r.run.method == method and math.isclose(r.run.rate, factor * (1 - momentum))]
            texts.append(range_text(np.array([runs.final_accuracy(result) for result in own])) if own else "")
        rows.append([network_name(same[0].run), f"{momentum:g}", str(batch_size), f"{same[0].run.examples:,}", *texts])
    return markdown(["network", "momentum m", "batch", "examples", *columns], rows)


def bound_table(results: Sequence[Result]) -> str:
    """Returns what SGD in BNP's variables reaches in validation with every bound, a column a learning rate."""
    bounds = {"none": "none", "gradient": "gradient, a tenth", "step": "step, 3 %", "small-step": "step, 1 %"}
    rates = sorted({result.run.rate for result in results})
    by_row: dict[tuple[str, ...], dict[float, str]] = {}
    for result in results:
        run = result.run
        row = (network_name(run), str(run.batch_size), f"{run.examples:,}", f"{run.momentum:g}", bounds[run.bound])
        by_row.setdefault(row, {})[run.rate] = f"{runs.final_accuracy(result):.1f}"
    rows = [[*row, *(accuracies.get(rate, "") for rate in rates)] for row, accuracies in by_row.items()]
    return markdown(["network", "batch", "examples", "momentum", "bound", *(f"{rate:g}" for rate in rates)], rows)


def range_text(values: np.ndarray) -> str:
    """Returns the lowest and the highest of the values as text."""
    return f"{values.min():.1f} to {values.max():.1f}" if len(values) > 1 else f"{values[0]:.1f}"


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
    kinds = dict.fromkeys((row.layer, row.method, row.matrix) for row in rows if row.step == last)
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
        if not php:  # they are still to come
            continue
        cells = [layer]
        for number in ("condition_number", "quartile_ratio"):
            gains = [getattr(h[where], number) / getattr(php[where], number) for where in php]
            cells.append(f"{np.median(gains):.1f} ({min(gains):.1f} to {max(gains):.1f})")
        lines.append(cells)
    return markdown(["layer", "condition number, H / P'HP", "quartile ratio, H / P'HP"], lines)


def fill_tables(page: str, tables: dict[str, str]) -> str:
    """Returns a page with the tables between its comments replaced.

    Raises:
      UserError: if a page has no such comments, or not in pairs, or asks for a table that there is not.
    """
    begins = page.count("<!-- table: ")
    if not begins:
        raise UserError("no line <!-- table: NAME --> and <!-- end --> says where a table goes")

    def replacement(match: re.Match[str]) -> str:
        if (name := match[1]) not in tables:
            raise UserError(programs.unknown("table", name, list(tables)))
        return f"<!-- table: {name} -->\n\n{tables[name]}\n\n<!-- end -->"

    table = r"<!-- table: (\S+) -->\n(?:(?!<!-- table: ).)*?<!-- end -->"
    filled, number = re.subn(table, replacement, page, flags=re.DOTALL)
    if number != begins:
        raise UserError("a line <!-- table: NAME --> has no line <!-- end --> before the next table")
    return filled
