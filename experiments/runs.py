"""Training runs as rows of a CSV file: what was run, and what came out."""

import csv
import dataclasses
import io
import json
import math
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from programs import UserError

T = TypeVar("T")

RESULTS = Path(__file__).with_name("results")

METHODS = ("sgd", "bn", "gn", "bnp", "bnp+gn", "preconditioned")
OPTIMIZERS = ("sgd", "adam", "muon")
BOUNDS = ("none", "gradient", "step", "small-step")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that determines a run.

    Attributes:
      data: the set of images.
      model: "mlp", "cnn", "tutorial" (Flax's network for MNIST), "resnet18" or "resnet110".
      method: how it is trained: "sgd", which is the optimizer alone, or with "bn" or "gn" layers, with "bnp" before the
        optimizer, or with both ("bnp+gn"), or by the optimizer in BNP's variables ("preconditioned").
      batch_size: examples a step.
      rate: the learning rate, or the highest of the schedule.
      seed: of the initial weights and the order of the examples.
      examples: how many examples are seen.
      optimizer: "sgd", "adam", or "muon" on kernels with Adam at a tenth of the rate on all else.
      bound: what bounds the optimizer's steps: "none"; "gradient", clipped for every unit to a tenth of the norm of its
        weights (``optax.adaptive_grad_clip``); "step" and "small-step", clipped for every kernel to 3 % or
        1 % of its norm.
      momentum: of SGD's steps.
      weight_decay: of all parameters, decoupled from the preconditioner.
      schedule: "constant", or "steps": a tenth of the rate for 400 steps (at most a tenth of the run), then the rate,
        divided by 10 after half and after three quarters of the run.
      augment: whether images are shifted by up to 4 pixels and flipped.
      group_size: channels of a group of Group Normalization.
      init_scale: a factor on the initial kernels of the residual networks.
      decay: of BNP's running statistics.
      prior_examples: the weight of their start; ``None`` for constant decay.
      scaling: what divides BNP's steps, the name of a rule or a number of examples.
      covers: the layers that BNP preconditions: "all", "hidden" (all but the last) or "convolutions".
      bnp_last: precondition after momentum, not before.
      refresh_every: steps from one batch that BNP's statistics absorb to the next.
      reads_test: whether the test set is read at the end.
    """

    data: str
    model: str
    method: str
    batch_size: int
    rate: float
    seed: int
    examples: int
    optimizer: str = "sgd"
    bound: str = "none"
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    augment: bool = False
    group_size: int = 4
    init_scale: float = 1.0
    decay: float = 0.99
    prior_examples: float | None = 128.0
    scaling: str = "128"
    covers: str = "all"
    bnp_last: bool = False
    refresh_every: int = 1
    reads_test: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a run.

    Attributes:
      run: the run.
      commit: of the code.
      seconds: wall time, compilation included.
      examples_seen: when it was evaluated; the list ends early if the training loss was no longer finite.
      train_loss: mean over the batches since the last evaluation, in nats.
      validation_loss: in nats.
      validation_accuracy: in percent.
      test_loss: at the end, in nats; nan where the test set was not read.
      test_accuracy: at the end, in percent; nan where it was not read.
    """

    run: Run
    commit: str
    seconds: float
    examples_seen: list[int]
    train_loss: list[float]
    validation_loss: list[float]
    validation_accuracy: list[float]
    test_loss: float
    test_accuracy: float

    @property
    def diverged(self) -> bool:
        """Whether the loss stopped being finite."""
        return not math.isfinite(self.train_loss[-1] + self.validation_loss[-1])


RUN_FIELDS = dataclasses.fields(Run)
RESULT_FIELDS = dataclasses.fields(Result)[1:]
HEADER = [field.name for field in (*RUN_FIELDS, *RESULT_FIELDS)]


def append(path: Path, result: Result) -> None:
    """Adds a row to the file, which it begins with a header if there is none."""
    cells = [getattr(result.run, field.name) for field in RUN_FIELDS]
    cells += [getattr(result, field.name) for field in RESULT_FIELDS]
    append_cells(path, HEADER, [[cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]])


def read(path: Path) -> list[Result]:
    """Reads the rows of a file; none if it does not exist.

    A last line without its end, which a killed program may leave, is cut off the file.

    Raises:
      UserError: if the file's header or a row is not what :func:`append` writes.
    """
    types: dict[str, Any] = {f.name: str if f.type is str else json.loads for f in (*RUN_FIELDS, *RESULT_FIELDS)}
    results = []
    for values in read_cells(path, types):
        run = Run(**{field.name: values.pop(field.name) for field in RUN_FIELDS})
        results.append(Result(run, **values))
    return results


def append_rows(path: Path, rows: Sequence[Any]) -> None:
    """Adds dataclasses of one kind to a plain CSV file, which it begins with a header if there is none."""
    header = [field.name for field in dataclasses.fields(rows[0])]
    append_cells(path, header, [list(dataclasses.asdict(row).values()) for row in rows])


def read_rows(path: Path, kind: type[T]) -> list[T]:
    """Reads the rows of a plain CSV file, whose columns are the fields of a dataclass; none if it does not exist.

    A last line without its end is cut off, as :func:`read` does.

    Raises:
      UserError: if the file has other columns, or a row that does not fill them.
    """
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return [kind(**values) for values in read_cells(path, types)]


def append_cells(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Adds rows to a CSV file all at once, so that Ctrl-C leaves none or all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(rows if file.tell() else [header, *rows])
        file.write(lines.getvalue())


def read_cells(path: Path, types: Mapping[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """Reads the rows of a CSV file whose columns have these names and types; cuts off a last line without its end.

    Raises:
      UserError: if it is another file, which is then left as it is.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        header, *rows = list(csv.reader(whole.splitlines())) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file: {error}") from error
    if header != list(types) and not ",".join(types).startswith(text):
        lacking = [name for name in types if name not in header]
        what = f"it has no column {lacking[0]!r}" if lacking else f"its columns are {', '.join(header)}"
        raise UserError(f"{path} is no CSV file of this program and version: {what}. Move it away or name another.")
    if whole != text:
        path.write_text(whole)
    return [convert(row, types, f"{path}, line {number}") for number, row in enumerate(rows, start=2)]


def convert(row: Sequence[str], types: Mapping[str, Callable[[str], Any]], where: str) -> dict[str, Any]:
    """Returns the values of a row, by the names of their columns."""
    if len(row) != len(types):
        raise UserError(
            f"{where}: {len(row)} cells; expected {len(types)}. Remove the line to have its work done again."
        )
    values = {}
    for cell, (name, kind) in zip(row, types.items(), strict=True):
        try:
            values[name] = kind(cell)
        except ValueError as error:
            raise UserError(f"{where}: {cell!r} is no {name}. Remove the line to have its work done again.") from error
    return values


def part(row: Any, kind: type[T]) -> T:
    """Returns what a dataclass has of one of its bases, as one of that kind."""
    return kind(**{field.name: getattr(row, field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def best_rate(results: Iterable[Result]) -> float:
    """Returns the learning rate with the highest validation accuracy at the end; of equal ones the lowest."""
    return min(results, key=lambda result: (-final_accuracy(result), result.run.rate)).run.rate


def final_accuracy(result: Result) -> float:
    """Returns the validation accuracy at the end in percent, 0 for a run that diverged."""
    return 0.0 if result.diverged else result.validation_accuracy[-1]


def window(results: Iterable[Result], margin: float = 1.0) -> tuple[float, float]:
    """Returns the lowest and highest learning rate within ``margin`` points of the best validation accuracy.

    It is an interval of neighbours in the grid around the best rate.
    """
    ordered = sorted(results, key=lambda result: result.run.rate)
    accuracies = np.array([final_accuracy(result) for result in ordered])
    best = int(accuracies.argmax())
    good = accuracies >= accuracies[best] - margin
    low = best - int(np.argmin(np.append(good[best::-1], False))) + 1
    high = best + int(np.argmin(np.append(good[best:], False))) - 1
    return ordered[low].run.rate, ordered[high].run.rate


def select(results: Sequence[Result], **values: Any) -> list[Result]:
    """Returns the results of the runs whose attributes have these values."""
    return [result for result in results if all(getattr(result.run, key) == value for key, value in values.items())]


def commit() -> str:
    """Returns the last commit of the programs and the library, with "+" if they were changed since."""

    def git(*arguments: str) -> str:
        # The files of results lie among the programs, and change whenever these run.
        command = ["git", "-C", str(Path(__file__).parent), *arguments, "--", ":(glob)*.py", "../bnp_optax"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
