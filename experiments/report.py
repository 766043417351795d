"""What the benchmarks measured, as rows of CSV files, as tables and as pictures.

``python experiments/report.py`` draws the committed files again and fills the tables of docs/performance.md.
"""

import csv
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from rich import box
from rich.table import Table

import figures
import programs
import runs
from tables import markdown

METHODS = ("SGD", "BNP, every 10", "BNP", "BNP+GN", "BN", "GN", "LN", "Adam", "BNP(Adam)", "K-FAC", "Muon")
KERNELS_METHODS = ("SGD", "BN", "BNP, kept", "BNP", "Adam", "BNP(Adam)")
LARGEST_RATIO = 1.8  # that the picture shows
GROWTH_STYLES: dict[str, dict[str, Any]] = {
    "width": {"color": "#0072B2", "marker": "o"},
    "depth": {"color": "#E69F00", "marker": "^"},
    "batch": {"color": "#555555", "marker": "s"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One method on one network at one batch size.

    Attributes:
      network: its name.
      batch_size: examples a step.
      method: how it is trained.
    """

    network: str
    batch_size: int
    method: str


@dataclasses.dataclass(frozen=True)
class Row(Case):
    """Time and memory of a training step.

    Attributes:
      milliseconds: a step, median of the rounds.
      ratio: to SGD of the same round, median; ``ratio_low`` and ``ratio_high`` are its quartiles.
      ratio_low: see ``ratio``.
      ratio_high: see ``ratio``.
      rounds: how many.
      compile_seconds: once.
      megabytes: arguments, outputs and temporaries of the compiled step, donated buffers once; in 1e6 bytes.
      memory_ratio: the same, relative to SGD.
      gigaflops: of a step, as XLA counts them.
      parameters: of the network as SGD trains it.
      state_ratio: bytes of the optimizer's and the normalization's state beyond SGD's, relative to the parameters'.
      device: the processor, as JAX names it.
      dtype: of activations.
      commit: of the code.
      adam_ratio: as ``ratio``, to Adam.
      adam_memory_ratio: as ``memory_ratio``, relative to Adam.
    """

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
    adam_ratio: float = math.nan
    adam_memory_ratio: float = math.nan


@dataclasses.dataclass(frozen=True)
class Kernels(Case):
    """What a training step launches on a GPU.

    Attributes:
      kernels: launches of kernels, copies and library calls.
      gigabytes: their operands and results, in 1e9 bytes.
      compile_seconds: of processors, once.
      device: the GPU that it is compiled for.
      jax: the version.
      commit: of the code.
    """

    kernels: int
    gigabytes: float
    compile_seconds: float
    device: str
    jax: str
    commit: str


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What tracing and compiling a training step of a deep network takes.

    Attributes:
      method: how it is trained.
      base: the method that it is compared with.
      layers: of the network.
      cpu_seconds: of all processors, median of the rounds.
      ratio: to ``base`` of the same round, median; ``ratio_low`` and ``ratio_high`` are its quartiles.
      ratio_low: see ``ratio``.
      ratio_high: see ``ratio``.
      rounds: how many.
      operations: of StableHLO in the traced step.
      added: operations beyond those of ``base``, a layer.
      commit: of the code.
    """

    method: str
    base: str
    layers: int
    cpu_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int
    operations: int
    added: float
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


C = TypeVar("C", bound=Case)


def write(path: Path, rows: Sequence[Any]) -> None:
    """Writes dataclasses of one kind to a file, numbers with five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = dataclasses.asdict(row)
            writer.writerow({k: f"{cell:.5g}" if isinstance(cell, float) else cell for k, cell in cells.items()})


def replace(path: Path, rows: Sequence[C]) -> list[C]:
    """Writes rows to a file in place of those it has of the same network and batch size, and returns all of them."""

    def case(row: Case) -> tuple[str, int]:
        return row.network, row.batch_size

    kind = type(rows[0])
    old, new = runs.read_rows(path, kind), set(map(case, rows))
    places = list(dict.fromkeys(map(case, [*old, *rows])))
    kept = [row for row in old if case(row) not in new]
    write(path, sorted([*kept, *rows], key=lambda row: places.index(case(row))))
    return runs.read_rows(path, kind)


HEADER = ("method", "ms", "to SGD", "quartiles", "to Adam", "MB", "to SGD", "to Adam")


def cells(row: Row) -> list[str]:
    """Returns a row of the table."""
    numbers = [
        f"{row.milliseconds:.3g}",
        f"{row.ratio:.2f}",
        f"{row.ratio_low:.2f}-{row.ratio_high:.2f}",
        f"{row.adam_ratio:.2f}",
        f"{row.megabytes:.4g}",
        f"{row.memory_ratio:.3f}",
        f"{row.adam_memory_ratio:.3f}",
    ]
    return [row.method, *("" if number.startswith("nan") else number for number in numbers)]


def make_table(name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table for the terminal, its first column a name and the others numbers."""
    table = Table(title=name, box=box.SIMPLE_HEAD, padding=0)
    for column, title in enumerate(header):
        table.add_column(title, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def by_case(rows: Sequence[C]) -> list[tuple[str, list[C]]]:
    """Groups the rows of a network and batch size."""

    def case(row: Case) -> str:
        return f"{row.network}, batch {row.batch_size}"

    return [(name, list(own)) for name, own in itertools.groupby(rows, case)]


def summary(rows: Sequence[Case], attribute: str, form: str, methods: Sequence[str] = METHODS) -> str:
    """Returns a table in Markdown of one attribute: a row a network and batch size, a column a method."""
    methods = [method for method in methods if any(row.method == method for row in rows)]
    lines = []
    for name, own in by_case(rows):
        values = {row.method: form.format(getattr(row, attribute)) for row in own}
        lines.append([name, *(values.get(method, "").replace("nan", "") for method in methods)])
    return markdown(["network", *methods], lines)


def adam_table(rows: Sequence[Row]) -> str:
    """Returns a table in Markdown of what BNP(Adam) takes, relative to Adam."""
    own = [(name, row) for name, case in by_case(rows) for row in case if row.method == "BNP(Adam)"]
    lines = [[name, f"{row.adam_ratio:.2f}", f"{row.adam_memory_ratio:.3f}"] for name, row in own]
    return markdown(["network", "time", "memory"], lines)


COMPILATION_HEADER = ("method", "CPU s", "ratio", "quartiles", "to", "operations", "added a layer")


def compilation_cells(row: Compilation) -> list[str]:
    """Returns a row of the table."""
    ratios = ["", "", "", f"{row.operations:,}", ""]
    if row.method != row.base:
        quartiles = f"{row.ratio_low:.2f}-{row.ratio_high:.2f}"
        ratios = [f"{row.ratio:.2f}", quartiles, row.base, f"{row.operations:,}", f"{row.added:.0f}"]
    return [row.method, f"{row.cpu_seconds:.2f}", *ratios]


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
        panel.set(xlabel="time of a step relative to SGD", xlim=(0.8, LARGEST_RATIO))
        panel.axvline(1, color="black", linewidth=0.8)
    return figure


def make_growth_figure(points: Sequence[Point]) -> Figure:
    """Draws times against numbers of parameters and activations, beside lines in proportion to them."""
    figure, axes = figures.panels(["preconditioner", "moments"], 2, "time (ms)")
    for panel, x, y in zip(axes, ("parameters", "activations"), ("precondition_ms", "moments_ms"), strict=True):
        for varied, style in GROWTH_STYLES.items():
            own = [point for point in points if point.varied == varied]
            panel.plot([getattr(p, x) for p in own], [getattr(p, y) for p in own], label=f"growing {varied}", **style)
        largest = max(points, key=lambda point: getattr(point, x))
        ends = [min(getattr(point, x) for point in points), getattr(largest, x)]
        panel.plot(ends, [getattr(largest, y) * end / ends[1] for end in ends], "k:", label="in proportion")
        panel.set(xscale="log", yscale="log", xlabel=x)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
    return figures.add_legend(figure, axes)


def make(results: Path) -> tuple[dict[str, str], dict[str, Figure]]:
    """Returns the tables in Markdown and the figures, by name, of the CSV files of a folder.

    Raises:
      UserError: if the folder holds none of them.
    """
    tables: dict[str, str] = {}
    drawn: dict[str, Figure] = {}
    for path in sorted(results.glob("steps-*.csv")):
        rows, name = runs.read_rows(path, Row), path.stem
        tables[f"{name}-ms"] = summary(rows, "milliseconds", "{:.3g}")
        tables[f"{name}-ratio"] = summary(rows, "ratio", "{:.2f}")
        tables[f"{name}-memory"] = summary(rows, "memory_ratio", "{:.3f}")
        tables[f"{name}-state"] = summary(rows, "state_ratio", "{:.2%}")
        if any(row.method == "BNP(Adam)" for row in rows):
            tables[f"{name}-adam"] = adam_table(rows)
        drawn[name] = make_figure(rows)
    if kernels := runs.read_rows(results / "kernels.csv", Kernels):
        tables["kernels-count"] = summary(kernels, "kernels", "{:,}", KERNELS_METHODS)
        tables["kernels-gigabytes"] = summary(kernels, "gigabytes", "{:.3g}", KERNELS_METHODS)
        tables["kernels-compile"] = summary(kernels, "compile_seconds", "{:.1f}", KERNELS_METHODS)
    if compilation := runs.read_rows(results / "compilation.csv", Compilation):
        tables["compilation"] = markdown(COMPILATION_HEADER, [*map(compilation_cells, compilation)])
    if points := runs.read_rows(results / "growth.csv", Point):
        drawn["growth"] = make_growth_figure(points)
    if not tables and not drawn:
        raise programs.UserError(f"{results} holds no CSV file of steps.py, compilation.py, growth.py or kernels.py")
    return tables, drawn


def main(argv: list[str] | None = None) -> None:
    """Draws the figures of the benchmarks and fills their tables."""
    figures.publish("Draws what the benchmarks measured, and writes their tables into pages.", make, argv)


if __name__ == "__main__":
    programs.start(main)
