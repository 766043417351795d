"""Draws the figures of the experiments with other optimizers than SGD, and writes their tables into the pages.

Everything comes from the CSV files that ``optimizers.py``, ``language_model.py`` and ``pendulum.py`` wrote.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import figures
import language_model
import optimizers
import pendulum
import programs
import protocol
import runs
import settings
import tables
import trials
from protocol import Outcome

COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {  # of the summary, and lines of its figure, by kind of method
    "{}": ("alone", {"color": "#555555", "marker": "s"}),
    "{} + BN": ("with BN", {"color": "#E69F00", "marker": "^"}),
    "{} + BRN": ("with Batch Renorm.", {"color": "#D55E00", "marker": "<"}),
    "{} + GN": ("with GN", {"color": "#009E73", "marker": "v"}),
    settings.STANDARDIZED: ("kernels standardized", {"color": "#CC79A7", "marker": "D"}),
    "scale_by_bnp, {}": ("behind scale_by_bnp", {"color": "#56B4E9", "marker": "x", "linestyle": "--"}),
    "BNP({})": ("in BNP's variables", {"color": "#0072B2", "marker": "o"}),
    "centred({})": ("alone, centred", {"color": "#555555", "marker": "*", "linestyle": ":"}),
    "centred({}) + BN": ("with BN, centred", {"color": "#E69F00", "marker": "*", "linestyle": ":"}),
    settings.CENTRED: ("in BNP's variables, centred", {"color": "#0072B2", "marker": "*", "linestyle": ":"}),
}
LOWEST = 50.0  # percent, where the axes of accuracies begin


def final_accuracies(outcomes: Sequence[Outcome]) -> dict[protocol.Cell, np.ndarray]:
    """Returns the test accuracies of the seeds at the best rate, by cell; cells without any are left out."""
    cells = {cell: protocol.at_best_rate(own) for cell, own in protocol.by_cell(outcomes).items()}
    return {cell: protocol.accuracies_in_test(final) for cell, final in cells.items() if final}


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """Returns mean test accuracies, a row a network, optimizer and batch size, a column a kind of method.

    The highest of a row is bold.
    """
    found = final_accuracies(outcomes)
    kinds = [
        kind for kind in COLUMNS if any(kind.format(name) in cell for cell in found for name in settings.OPTIMIZERS)
    ]
    rows = []
    for data, setting, name, batch_size in dict.fromkeys(
        (data, setting, name, batch_size)
        for data, setting, batch_size, method in found
        for name in settings.OPTIMIZERS
        if name in method
    ):
        means = {
            kind: found[cell].mean()
            for kind in settings.kinds_of(name, kinds)
            if (cell := (data, setting, batch_size, kind.format(name))) in found
        }
        highest = f"{max(means.values()):.1f}" if len(means) > 1 else None
        texts = [f"{means[kind]:.1f}" if kind in means else "" for kind in kinds]
        network = f"{tables.DATA_NAMES[data]}, {setting}"
        rows.append([network, name, str(batch_size), *(f"**{text}**" if text == highest else text for text in texts)])
    return tables.markdown(["network", "optimizer", "batch", *(COLUMNS[kind][0] for kind in kinds)], rows)


def centred_table(outcomes: Sequence[Outcome], setting: str) -> str:
    """Returns mean test accuracies with centred kernels, and in brackets with kernels as they are."""
    found = {cell: f"{tests.mean():.1f}" for cell, tests in final_accuracies(outcomes).items() if cell[1] == setting}
    kinds = {"centred({})": "{}", "centred({}) + BN": "{} + BN", settings.CENTRED: "BNP({})"}  # and without
    rows = []
    for name, (data, size) in itertools.product(
        settings.OPTIMIZERS, dict.fromkeys((data, size) for data, _, size, _ in found)
    ):
        pairs = [[found.get((data, setting, size, kind.format(name))) for kind in pair] for pair in kinds.items()]
        texts = [
            "not run" if pair == [None, None] else "{} ({})".format(*(own or "not run" for own in pair))
            for pair in pairs
        ]
        rows.append([name, str(size), *texts])
    return tables.markdown(["optimizer", "batch", *(COLUMNS[kind][0] for kind in kinds.values())], rows)


def by_batch_size(outcomes: Sequence[Outcome], setting: str) -> Figure:
    """Draws test accuracy against batch size, a panel an optimizer: mean and range of the seeds."""
    found = {cell: tests for cell, tests in final_accuracies(outcomes).items() if cell[1] == setting}
    sizes = sorted({size for _, _, size, _ in found}, reverse=True)
    figure, axes = figures.panels(settings.OPTIMIZERS, len(settings.OPTIMIZERS), "test accuracy (%)", sharey=True)
    for panel, name in zip(axes, settings.OPTIMIZERS, strict=True):
        for kind in settings.kinds_of(name, COLUMNS):
            header, style = COLUMNS[kind]
            own = {size: tests for (_, _, size, method), tests in found.items() if method == kind.format(name)}
            if own:
                draw_over_sizes(panel, [own.get(size, np.array([np.nan])) for size in sizes], header, style)
        panel.set_xticks(range(len(sizes)), labels=[str(size) for size in sizes])
        panel.set_xlabel("batch size")
    axes[0].set_ylim(bottom=LOWEST)  # of all panels, and only once all are drawn
    return figures.add_legend(figure, axes)


def draw_over_sizes(panel: Axes, tests: Sequence[np.ndarray], label: str, style: dict[str, Any]) -> None:
    """Draws a line through the means and a band of the ranges, with gaps where there are none.

    What falls below the axis is said in words.
    """
    means, lowest, highest = (np.array([of(own) for own in tests]) for of in (np.mean, np.min, np.max))
    panel.plot(means, label=label, markersize=4, **style)
    panel.fill_between(range(len(means)), lowest, highest, color=style["color"], alpha=0.2, linewidth=0)
    for place, mean in enumerate(means):
        if mean < LOWEST:
            panel.annotate(
                f"{mean:.0f}", (place, LOWEST), (0, 3), textcoords="offset points", color=style["color"], ha="right"
            )


def make(results: Path) -> trials.Report:
    """Returns the tables and the figures, by name, of the CSV files of a folder.

    Raises:
      ValueError: if the folder holds none of them.
    """
    texts, drawn = trials.report_all(optimizers.EXPERIMENTS, results)
    if rows := optimizers.ordered(runs.read_rows(results / "e8.csv", Outcome)):
        texts["every_optimizer"] = summary_table(rows)
        texts["centred"] = centred_table(rows, "5-layer CNN")
        drawn["every_optimizer"] = by_batch_size(rows, "5-layer CNN")
    if losses := runs.read_rows(results / "e7.csv", language_model.Outcome):
        texts["e7"], drawn["e7"] = language_model_table(losses), along_training(losses)
    if returns := runs.read_rows(results / "pendulum.csv", pendulum.Episodes):
        texts["pendulum"] = pendulum.table(returns)
    return texts, drawn


def language_model_table(outcomes: Sequence[language_model.Outcome]) -> str:
    """Returns what every method reached, and after which part of steps and time where the optimizer alone ended.

    The parts are those of a whole training, mean and range of the seeds; "never" is said where one did not get there.
    """
    cells, methods = language_model.cells(outcomes), list(language_model.METHODS)
    rows = []
    for network, method in sorted(
        cells, key=lambda cell: (language_model.NETWORKS.index(cell[0]), methods.index(cell[1]))
    ):
        own = cells[network, method]
        tuning = [outcome for outcome in own if not outcome.seed]
        rate, steps = language_model.best(tuning).rate, tuning[0].steps
        chosen = language_model.at_best_rate(own)
        final = {outcome.seed: outcome for outcome in chosen if outcome.steps == steps}
        if not final:
            continue
        tests, ends = (
            np.array(values) for values in zip(*((o.test, o.validation[-1]) for o in final.values()), strict=True)
        )
        milliseconds = np.median([outcome.milliseconds for outcome in final.values()])
        grid = sorted(outcome.rate for outcome in tuning)
        edge = " (edge of the grid)" if rate in (grid[0], grid[-1]) else ""
        row = [network, method, f"{rate:g}{edge}", f"{ends.mean():.3f}", f"{tests.mean():.3f}"]
        row += [f"{tests.min():.3f} to {tests.max():.3f}", f"{milliseconds:.1f}"]
        alone, _ = language_model.METHODS[method]
        if alone == method:
            rows.append([*row, "", "", ""])
            continue
        targets = {outcome.seed: outcome for outcome in language_model.at_best_rate(cells[network, alone])}
        parts = np.array([part_of_steps(final[seed].validation, targets[seed].validation[-1]) for seed in final])
        time_ratio = milliseconds / np.median([target.milliseconds for target in targets.values()])
        shorter = [outcome for outcome in chosen if outcome.steps < steps]
        end = np.mean([o.validation[-1] for o in shorter]) if shorter else np.nan
        rows.append([*row, part_text(parts), part_text(parts * time_ratio), f"{end:.3f}" if shorter else ""])
    header = ["network", "method", "rate", "validation loss", "test loss", "range", "ms a step", "steps", "time"]
    return tables.markdown([*header, f"validation loss, {language_model.SHORTER_STEPS:,} steps"], rows)


def part_of_steps(curve: np.ndarray, target: float) -> float:
    """Returns after which part of a training its loss is at the target, between two evaluations by interpolation."""
    reached = np.flatnonzero(curve <= target)
    if not len(reached):
        return np.inf
    after = int(reached[0])
    if after == 0:
        return 1 / len(curve)
    share = (curve[after - 1] - target) / (curve[after - 1] - curve[after])
    return float((after + share) / len(curve))


def part_text(parts: np.ndarray) -> str:
    """Returns mean and range of parts as text."""
    if not np.isfinite(parts).all():
        return "never" if not np.isfinite(parts).any() else f"never in {np.isinf(parts).sum()} of {len(parts)}"
    return f"{parts.mean():.2f} ({parts.min():.2f} to {parts.max():.2f})"


def along_training(outcomes: Sequence[language_model.Outcome]) -> Figure:
    """Draws validation loss against steps and against seconds, a row a network: mean and range of the seeds.

    Optimizers alone and in BNP's variables with its defaults; the table has the others.
    """
    cells, styles = language_model.cells(outcomes), {"{}": ":", "BNP({})": "-"}
    networks = list(dict.fromkeys(outcome.network for outcome in outcomes if outcome.seed))
    colors = dict(zip(language_model.OPTIMIZERS, ("#555555", "#E69F00", "#0072B2"), strict=True))
    markers = dict(zip(language_model.OPTIMIZERS, "s^o", strict=True))
    figure, axes = figures.panels(
        [name for name in networks for _ in range(2)], 2, "validation loss (nats a character)"
    )
    for number, network in enumerate(networks):
        shown = {method: of for method, of in language_model.METHODS.items() if of[1] in styles}
        for method, (name, kind) in shown.items():
            own = cells.get((network, method), [])
            final = [o for o in language_model.at_best_rate(own) if o.steps == own[0].steps] if own else []
            if not final:
                continue
            curves = np.array([outcome.validation for outcome in final])
            steps = (np.arange(curves.shape[1]) + 1) * final[0].steps / curves.shape[1]
            seconds = steps * np.median([outcome.milliseconds for outcome in final]) / 1000
            for panel, x, unit in zip(
                axes[2 * number :], (steps, seconds), ("steps", "seconds of training"), strict=False
            ):
                line: dict[str, Any] = {"color": colors[name], "marker": markers[name], "markevery": 4, "markersize": 4}
                panel.plot(x, curves.mean(0), styles[kind], label=method, **line)
                panel.fill_between(x, curves.min(0), curves.max(0), color=colors[name], alpha=0.2, linewidth=0)
                panel.set(xlabel=unit)
    for panel in axes:
        panel.set_ylim(top=2.6)  # only once all are drawn, so that the other end fits them
    return figures.add_legend(figure, axes)


def main(argv: list[str] | None = None) -> None:
    """Draws the figures of the experiments and fills their tables."""
    figures.publish("Draws the figures and writes the tables of other optimizers from their CSV files.", make, argv)


if __name__ == "__main__":
    programs.start(main)
