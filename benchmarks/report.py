"""What the benchmarks measured, as rows of CSV files, as tables and as pictures.

``python benchmarks/report.py`` draws the committed files again and fills the tables of docs/performance.md.
"""

import csv
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich import box
from rich.table import Table

import figures
import runs

METHODS = ("SGD", "BNP, every 10", "BNP", "BNP+GN", "BN", "GN", "LN", "Adam", "K-FAC", "Muon")
LARGEST_RATIO = 1.8  # that the picture shows


@dataclasses.dataclass(frozen=True)
class Row:
    """One method on one network at one batch size.

    Attributes:
      network: its name.
      batch_size: examples a step.
      method: how it is trained.
      milliseconds: a step, median of the rounds.
      ratio: to SGD of the same round, median; ``ratio_low`` and ``ratio_high`` are its quartiles.
      ratio_low: see ``ratio``.
      ratio_high: see ``ratio``.
      rounds: how many.
      compile_seconds: once.
      megabytes: arguments, outputs and temporaries of the compiled step, donated buffers once; in 1e6 bytes.
      memory_ratio: the same by that of SGD.
      gigaflops: of a step, as XLA counts them.
      parameters: of the network as SGD trains it.
      state_ratio: bytes of the optimizer's and the normalization's state beyond SGD's, by those of the parameters.
      device: the processor, as JAX names it.
      dtype: of activations.
      commit: of the code.
    """

    network: str
    batch_size: int
    method: str
    milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    compile_seconds: float
    megabytes: float
    memory_ratio: float
    gigaflops: float
    parameters: int
    state_ratio: float
    device: str
    dtype: str
    commit: str


@dataclasses.dataclass(frozen=True)
class Point:
    """The cost of BNP's parts on one network of equal layers.

    Attributes:
      varied: what grows along the line that it belongs to: "width", "depth" or "batch".
      size: of that.
      parameters: of all layers.
      activations: numbers in the inputs of all layers.
      precondition_ms: time of the preconditioner, median.
      moments_ms: time of the moments, median.
      commit: of the code.
    """

    varied: str
    size: int
    parameters: int
    activations: int
    precondition_ms: float
    moments_ms: float
    commit: str


def write(path: Path, rows: Sequence[Row] | Sequence[Point]) -> None:
    """Writes a file, numbers with five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = dataclasses.asdict(row)
            writer.writerow({k: f"{cell:.5g}" if isinstance(cell, float) else cell for k, cell in cells.items()})


def replace(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Writes rows to a file in place of those it has of the same network and batch size, and returns all of them."""

    def case(row: Row) -> tuple[str, int]:
        return row.network, row.batch_size

    old, new = runs.read_rows(path, Row), set(map(case, rows))
    places = list(dict.fromkeys(map(case, [*old, *rows])))
    kept = [row for row in old if case(row) not in new]
    write(path, sorted([*kept, *rows], key=lambda row: places.index(case(row))))
    return runs.read_rows(path, Row)


HEADER = ("method", "ms", "by SGD", "quartiles", "compile", "MB", "by SGD")


def cells(row: Row) -> list[str]:
    """Returns a row of the table."""
    numbers = [
        f"{row.milliseconds:.3g}",
        f"{row.ratio:.2f}",
        f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
        f"{row.compile_seconds:.1f} s",
        f"{row.megabytes:.4g}",
        f"{row.memory_ratio:.3f}",
    ]
    return [row.method, *("" if number.startswith("nan") else number for number in numbers)]


def make_table(name: str, rows: Sequence[Row]) -> Table:
    """Returns the table of one network and batch size for the terminal."""
    table = Table(title=name, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in HEADER:
        table.add_column(header, justify="left" if header == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def by_case(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Groups the rows of a network and batch size."""

    def case(row: Row) -> str:
        return f"{row.network}, batch {row.batch_size}"

    return [(name, list(own)) for name, own in itertools.groupby(rows, case)]


def summary(rows: Sequence[Row], attribute: str, form: str) -> str:
    """Returns a table in Markdown of one attribute: a row a network and batch size, a column a method."""
    methods = [method for method in METHODS if any(row.method == method for row in rows)]
    lines = []
    for name, own in by_case(rows):
        values = {row.method: form.format(getattr(row, attribute)) for row in own}
        lines.append([name, *(values.get(method, "").replace("nan", "") for method in methods)])
    return figures.markdown(["network", *methods], lines)


def make_figure(rows: Sequence[Row]) -> Figure:
    """Draws the ratios to SGD: median and quartiles, a panel a network and batch size."""
    cases = by_case(rows)
    figure, axes = figures.panels([name for name, _ in cases], min(3, len(cases)), "")
    for panel, (_, own) in zip(axes, cases, strict=True):
        shown = sorted((row for row in own if row.method in METHODS), key=lambda row: -METHODS.index(row.method))
        for place, row in enumerate(shown):
            color = "#0072B2" if row.method.startswith("BNP") else "#555555"
            panel.barh(place, row.ratio - 1, left=1, color=color, alpha=0.5)
            panel.plot([row.ratio_low, row.ratio_high], [place, place], color=color)
            if row.ratio > LARGEST_RATIO:
                panel.text(LARGEST_RATIO, place, f"{row.ratio:.3g} ", ha="right", va="center", fontsize=8)
        panel.set_yticks(range(len(shown)), labels=[row.method for row in shown])
        panel.set(xlabel="time of a step by that of SGD", xlim=(0.8, LARGEST_RATIO))
        panel.axvline(1, color="black", linewidth=0.8)
    return figure


def make_growth_figure(points: Sequence[Point]) -> Figure:
    """Draws times against numbers of parameters and activations, beside lines in proportion to them."""
    figure, axes = figures.panels(["preconditioner", "moments"], 2, "time (ms)")
    for panel, x, y in zip(axes, ("parameters", "activations"), ("precondition_ms", "moments_ms"), strict=True):
        for varied in dict.fromkeys(point.varied for point in points):
            own = [point for point in points if point.varied == varied]
            panel.plot([getattr(p, x) for p in own], [getattr(p, y) for p in own], "o-", label=f"growing {varied}")
        largest = max(points, key=lambda point: getattr(point, x))
        ends = [min(getattr(point, x) for point in points), getattr(largest, x)]
        panel.plot(ends, [getattr(largest, y) * end / ends[1] for end in ends], "k:", label="in proportion")
        panel.set(xscale="log", yscale="log", xlabel=x)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter("{x:g}")
    return figures.add_legend(figure, axes)


def make(results: Path) -> tuple[dict[str, str], dict[str, Figure]]:
    """Returns the tables in Markdown and the figures, by name, of the CSV files of a folder."""
    tables: dict[str, str] = {}
    drawn: dict[str, Figure] = {}
    for path in sorted(results.glob("steps-*.csv")):
        rows, name = runs.read_rows(path, Row), path.stem
        tables[f"{name}-ms"] = summary(rows, "milliseconds", "{:.3g}")
        tables[f"{name}-ratio"] = summary(rows, "ratio", "{:.2f}")
        tables[f"{name}-memory"] = summary(rows, "memory_ratio", "{:.3f}")
        tables[f"{name}-state"] = summary(rows, "state_ratio", "{:.2%}")
        drawn[name] = make_figure(rows)
    if points := runs.read_rows(results / "growth.csv", Point):
        drawn["growth"] = make_growth_figure(points)
    return tables, drawn


if __name__ == "__main__":
    figures.publish("Draws what the benchmarks measured, and writes their tables into pages.", make)
