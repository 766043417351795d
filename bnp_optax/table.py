"""The table of a model's layers, for reading in a terminal."""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

_FOLD_FROM = 3  # so many rows that differ in the numbers of their path alone become one
_PATH_WIDTH = 40  # leaves room for the other columns in 100


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
        parts.append(_align([header, *folded], "<<>><>"))
    for reason in dict.fromkeys(reason for _, _, reason in excluded):
        others = [(path, _show_shape(shape)) for path, shape, why in excluded if why == reason]
        lines = _align([("  " + path, shape) for _, (path, shape) in _fold(others)], "<>")
        parts.append(f"Excluded: {reason}\n{lines}")
    layers_cover = "1 layer covers" if len(rows) == 1 else f"{len(rows)} layers cover"
    parts.append(
        f"{layers_cover} {covered:,} of {covered + left:,} parameters ({covered / max(covered + left, 1):.1%})."
    )
    return "\n\n".join(parts)


def _fold(rows: Sequence[tuple[Any, ...]]) -> list[tuple[int, tuple[Any, ...]]]:
    """Makes one row of those that differ in the numbers of their path alone, and says how many they were."""
    keys = [(re.sub(r"\d+", "#", row[0]), *row[1:]) for row in rows]
    counts, done = collections.Counter(keys), set()
    folded: list[tuple[int, tuple[Any, ...]]] = []
    for key, (path, *rest) in zip(keys, rows, strict=True):
        count = counts[key]
        if count < _FOLD_FROM:
            folded.append((1, (_shorten(path), *rest)))
        elif key not in done:
            done.add(key)
            paths = [row[0] for row, other in zip(rows, keys, strict=True) if other == key]
            folded.append((count, (f"{_shorten(_ranges(paths))} ({count})", *rest)))
    return folded


def _ranges(paths: Sequence[str]) -> str:
    """Returns the path that all of them are but for their numbers, with the range of each number."""
    numbers = zip(*(map(int, re.findall(r"\d+", path)) for path in paths), strict=True)
    ranges = iter([str(n[0]) if min(n) == max(n) else f"[{min(n)}-{max(n)}]" for n in numbers])
    return re.sub(r"\d+", lambda _: next(ranges), paths[0])


def _show_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _align(rows: Sequence[tuple[str, ...]], sides: str) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _shorten(path: str) -> str:
    """Leaves out the beginning of a path that is too long, as its end tells the layer."""
    return path if len(path) <= _PATH_WIDTH else f"...{path[3 - _PATH_WIDTH :]}"
