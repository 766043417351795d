"""The table of a model's layers, for reading in a terminal."""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

_FOLD_FROM = 3  # so many rows that differ in the numbers of their path alone become one
_NUMBER = re.compile("[0-9]+")


Shape = tuple[int, ...]


def table(layers: Sequence[tuple[str, str, Shape, int, str, int]], excluded: Sequence[tuple[str, Shape, str]]) -> str:
    """Returns what ``print(layers)`` shows: the layers, what is excluded and why, and the share that is covered.

    Args:
      layers: of each layer the path, the kind, the kernel's shape, the fan-in, the parameters' names and their size.
      excluded: of each other parameter the path, the shape and the reason.
    """
    rows = [(path, kind, _show_shape(kernel), f"{fan_in:,}", *rest) for path, kind, kernel, fan_in, *rest in layers]
    covered, left = sum(row[-1] for row in layers), sum(math.prod(shape) for _, shape, _ in excluded)
    parts = []
    if rows:
        header = ("layer", "kind", "kernel", "fan-in", "covers", "parameters")
        folded = [(path, *rest, f"{count * size:,}") for count, (path, *rest, size) in _fold(rows)]
        parts.append(align([header, *folded], "<<>><>"))
    for reason in dict.fromkeys(reason for _, _, reason in excluded):
        others = [(path, _show_shape(shape)) for path, shape, why in excluded if why == reason]
        lines = align([("  " + path, shape) for _, (path, shape) in _fold(others)], "<>")
        parts.append(f"Excluded: {reason}\n{lines}")
    layers_cover = "1 layer covers" if len(rows) == 1 else f"{len(rows)} layers cover"
    parts.append(
        f"{layers_cover} {covered:,} of {covered + left:,} parameters ({covered / max(covered + left, 1):.1%})."
    )
    return "\n\n".join(parts)


def _fold(rows: Sequence[tuple[Any, ...]]) -> list[tuple[int, tuple[Any, ...]]]:
    """Makes one row of those that differ in the numbers of their path alone, and says how many they were.

    A row stands for all combinations of the numbers that it shows, so that rows name each path once. Of ``b1/w1``,
    ``b2/w1``, ``b3/w1``, ``b1/w2``, ``b2/w2`` the first three become ``b[1-3]/w1 (3)``; the two others stay.
    """
    alike = collections.defaultdict(list)
    for path, *rest in rows:
        alike[tuple(_NUMBER.split(path)), *rest].append(path)
    names: dict[str, tuple[str, int]] = {}
    for (texts, *_), paths in alike.items():
        for grid in _grids(_NUMBER.findall(path) for path in paths):
            members = [_join(texts, numbers) for numbers in itertools.product(*grid)]
            if (count := len(members)) >= _FOLD_FROM:
                names |= dict.fromkeys(members, (f"{_join(texts, map(_show_set, grid))} ({count})", count))
    folded = {}
    for path, *rest in rows:
        name, count = names.get(path, (path, 1))
        folded[name] = count, (name, *rest)
    return list(folded.values())


def _grids(points: Iterable[Sequence[str]]) -> list[tuple[frozenset[str], ...]]:
    """Splits points into grids, of each of which all points are there: for each axis the numbers on it.

    Along one axis after the other it unites the grids that agree in all other axes.
    """
    grids = [tuple(frozenset([number]) for number in point) for point in points]
    for axis in range(len(grids[0])):
        united: dict[Any, frozenset[str]] = {}
        for grid in grids:
            others = grid[:axis], grid[axis + 1 :]
            united[others] = united.get(others, frozenset()) | grid[axis]
        grids = [(*before, numbers, *after) for (before, after), numbers in united.items()]
    return grids


def _join(texts: Sequence[str], numbers: Iterable[str]) -> str:
    """Returns a path from what is between its numbers, and these."""
    return "".join(itertools.chain(*itertools.zip_longest(texts, numbers, fillvalue="")))


def _show_set(numbers: Iterable[str]) -> str:
    """Returns numbers as ranges: ``7``, ``[1-3]``, ``[01-12]``, ``[1-2,9]``, ``[0,2,...,8]``."""
    runs: list[list[str]] = []
    for number in sorted(numbers, key=lambda number: (len(number), number)):
        if runs and _continues(runs[-1], number):
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = ",".join(map(_show_run, runs))
    return shown if len(runs) == len(runs[0]) == 1 else f"[{shown}]"


def _continues(run: Sequence[str], number: str) -> bool:
    """Returns whether a number is as far from the last of a run as that from the one before, and has its zeros."""
    *earlier, last = map(int, run)
    step = int(number) - last
    has_zeros_alike = number == str(int(number)).zfill(len(run[0]))
    return step > 0 and has_zeros_alike and (not earlier or step == last - earlier[-1])


def _show_run(run: Sequence[str]) -> str:
    first, *rest = run
    if rest and int(rest[0]) - int(first) == 1:
        return f"{first}-{rest[-1]}"
    return ",".join(run) if len(run) < 4 else f"{first},{rest[0]},...,{rest[-1]}"


def _show_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def align(rows: Sequence[tuple[str, ...]], sides: str) -> str:
    """Returns rows as columns of text, each to the side that a sign says: ``<`` left, ``>`` right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
