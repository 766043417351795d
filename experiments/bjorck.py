"""Whether BNP gives a deep network the larger learning rates of Batch Normalization, by the measures of Bjorck et al.

A ReLU network of 12 layers on MNIST, as it is, with BN in every hidden layer or before the classifier alone, or trained
in BNP's variables; by SGD and by Adam. What the learning rates reach is trained out; and at some steps of trainings at
one rate ``bnp_optax.contrib.diagnostics`` looks at activations, gradients, and the loss along each method's own step.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import deep
import figures
import protocol
import runs
import tables
import trials
from bnp_optax.contrib import diagnostics
from deep import BATCH_SIZE, DEPTH, DIAGNOSTICS, FAMILIES, METHODS, QUICK_DEPTH, QUICK_METHODS, Diagnosis
from protocol import Outcome, Trial

STEPS, QUICK_STEPS = 400, 30
BEYOND = 1000.0  # a loss that has grown so many times is drawn at the edge


STYLES = {
    "alone": {"color": "#555555", "marker": "s"},
    "BN": {"color": "#E69F00", "marker": "^"},
    "BN before the classifier": {"color": "#CC79A7", "marker": "v"},
    "BNP": {"color": "#0072B2", "marker": "o"},
}


def tuning(quick: bool) -> list[Trial]:
    """Returns a training of every method at every rate of its optimizer."""
    data, steps, depth = ("digits", QUICK_STEPS, QUICK_DEPTH) if quick else ("mnist", STEPS, DEPTH)
    return [
        Trial(data, deep.setting(depth), name, BATCH_SIZE, rate, steps, 0)
        for name in (QUICK_METHODS if quick else METHODS)
        for rate in FAMILIES[METHODS[name].optimizer].rates[slice(4, None, 3) if quick else slice(None)]
    ]


def further(quick: bool) -> list[Trial]:
    """Returns the same with the other seeds: how far the largest usable rate hangs on the seed."""
    if quick:
        return []
    return [dataclasses.replace(trial, seed=seed) for trial in tuning(quick) for seed in trials.SEEDS]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what the learning rates reach."""
    return {"bjorck": protocol.accuracy_table(outcomes), "bjorck_rates": rates_table(outcomes)}, {}


def rates_table(outcomes: Sequence[Outcome]) -> str:
    """Returns the largest usable rate of every method, and what it and those above it reach: medians of the seeds."""
    lines = []
    for (_, _, _, name), own in protocol.by_cell(outcomes).items():
        largest, rates = largest_rates(own), sorted({outcome.rate for outcome in own})
        middle = sorted(largest)[(len(largest) - 1) // 2]
        shown = [rate for rate in rates if rate > 0.99 * middle][:3]
        accuracies = [np.median([shown_accuracy(outcome) for outcome in own if outcome.rate == rate]) for rate in shown]
        reached = [f"{accuracy:.1f} ({rate:g})" for rate, accuracy in zip(shown, accuracies, strict=True)]
        lines.append([name, ", ".join(f"{rate:g}" for rate in largest), *reached, *[""] * (3 - len(reached))])
    header = ["method", "largest usable rate of each seed", "accuracy there", "at the next rate", "at the next but one"]
    return tables.markdown(header, lines)


def largest_rates(own: Sequence[Outcome]) -> list[float]:
    """Returns the largest usable rate in validation of every seed that ran the whole grid of rates."""
    by_seed = [[outcome for outcome in own if outcome.seed == seed] for seed in sorted({o.seed for o in own})]
    largest = []
    for same in by_seed:
        if len(same) == max(map(len, by_seed)):
            accuracies = [np.nan if outcome.diverged else outcome.validation_accuracy for outcome in same]
            rates = np.array([outcome.rate for outcome in same])
            largest.append(float(diagnostics.largest_usable_rate(rates, np.array(accuracies), margin=1.0)))
    return largest


def report_diagnostics(outcomes: Sequence[Outcome], results: Path) -> trials.Report:
    """Returns what the diagnostics say, and all of it in one figure."""
    rows = runs.read_rows(results / DIAGNOSTICS, Diagnosis)
    if not rows:
        return {}, {}
    return {"bjorck_diagnostics": diagnostics_table(rows)}, {"bjorck": draw(outcomes, rows)}


def values_of(rows: Sequence[Diagnosis], method: str, steps: int, name: str) -> tuple[list[float], np.ndarray]:
    """Returns the places of a measure, and its values ``[seeds, places]``."""
    own = [row for row in rows if (row.method, row.steps, row.name) == (method, steps, name)]
    places = list(dict.fromkeys(row.at for row in own))
    return places, np.reshape([row.value for row in own], (-1, len(places)))


def diagnostics_table(rows: Sequence[Diagnosis]) -> str:
    """Returns medians over the seeds, a row a method and number of steps."""
    depth = max(int(row.at) for row in rows if row.name == "mean")
    first, middle, last = 0, depth // 2 - 1, depth - 2  # of the hidden layers
    lines, names = [], {row.name for row in rows}
    for method, steps in dict.fromkeys((row.method, row.steps) for row in rows):
        by_name = {name: values_of(rows, method, steps, name) for name in names}
        median = {name: np.median(values, 0) for name, (_, values) in by_name.items()}
        sizes, losses = by_name["loss"][0], median["loss"]
        lowered = [size for size, loss in zip(sizes, losses, strict=True) if loss < 1]
        shown = [losses[sizes.index(size)] for size in FAMILIES[METHODS[method].optimizer].shown]
        cells = [
            " ".join(short(median[name][layer]) for layer in (first, middle, last)) for name in ("mean", "mean after")
        ]
        cells += [short(median[name][last]) for name in ("variance", "variance after")]
        cells += [f"{np.nanmean(median['independence'][:-1]):.2f}", f"{median['modal share'][0]:.2f}"]
        cells += [f"{median['gradient'][first] / median['gradient'][last]:.2f}"]
        cells += [f"{max(lowered, default=np.nan):g}", " ".join(map(short, shown))]
        lines.append([method, str(steps), *cells])
    shown_layers = ", ".join(str(layer + 1) for layer in (first, middle, last))
    header = ["method", "steps", f"channel mean, layers {shown_layers}", "after a step", f"variance, layer {last + 1}"]
    header += ["after a step", "input independence", "modal share", "gradient, first / last", "lowers the loss up to"]
    return tables.markdown([*header, "loss after large steps"], lines)


def short(value: float) -> str:
    """Returns a number of two digits, or a whole one."""
    return f"{value:.0f}" if 10 <= value < 1e5 else f"{value:.2g}"


def draw(outcomes: Sequence[Outcome], rows: Sequence[Diagnosis]) -> Figure:
    """Draws accuracies by rate, and the diagnostics early in training."""
    steps = sorted({row.steps for row in rows})[1]
    shown = [name for name in METHODS if any(row.method == name for row in rows)]
    of_sgd, of_adam = ([name for name in shown if METHODS[name].optimizer == kind] for kind in FAMILIES)
    by_depth = {
        "mean": f"channel means\nafter {steps} steps",
        "mean after": "channel means\nafter a further step of size 1",
        "variance after": "channel variances\nafter a further step of size 1",
        "gradient": f"norm of the activations' gradient\nafter {steps} steps",
        "independence": f"|sum g| / sum |g|\nafter {steps} steps",
    }
    titles = ["validation accuracy (%)\nof SGD", "validation accuracy (%)\nof Adam", *by_depth.values()]
    titles += [f"loss after one more step / before\n{kind}, after {steps} steps" for kind in ("SGD", "Adam")]
    figure, axes = figures.panels(titles, 3, "")
    for panel, methods in zip(axes, (of_sgd, of_adam), strict=False):
        for name in methods:
            own = [outcome for outcome in outcomes if outcome.method == name]
            rates = sorted({outcome.rate for outcome in own})
            accuracies = [[shown_accuracy(outcome) for outcome in own if outcome.rate == rate] for rate in rates]
            plot(panel, name, rates, [100 - np.array(same) for same in accuracies])
        figures.show_errors_as_accuracies(panel)
        panel.set(xscale="log", xlabel="learning rate")
    for panel, name in zip(axes[2:], by_depth, strict=False):
        for method in of_sgd:
            layers, values = values_of(rows, method, steps, name)
            plot(panel, method, layers[:-1], list(values.T[:-1]))
        panel.set(xlabel="layer", xticks=layers[:-1:2], yscale="linear" if name == "independence" else "log")
    for panel, methods in zip(axes[-2:], (of_sgd, of_adam), strict=True):
        for method in methods:
            sizes, values = values_of(rows, method, steps, "loss")
            plot(panel, method, sizes, list(np.minimum(np.nan_to_num(values, nan=BEYOND), BEYOND).T))
        panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", yscale="log", xlabel="size of the step")
    return figures.add_legend(figure, axes)


def shown_accuracy(outcome: Outcome) -> float:
    return tables.CHANCE if outcome.diverged else max(outcome.validation_accuracy, tables.CHANCE)


def plot(panel: Axes, name: str, x: Sequence[float], values: Sequence[np.ndarray]) -> None:
    """Draws the median and the range of the values at every x."""
    kind = METHODS[name].kind
    middles, lows, highs = zip(*((np.median(own), own.min(), own.max()) for own in values), strict=True)
    panel.plot(x, middles, label=kind, markersize=4, **STYLES[kind])  # type: ignore[arg-type]
    panel.fill_between(x, lows, highs, color=STYLES[kind]["color"], alpha=0.2, linewidth=0)


EXPERIMENT = trials.Experiment(tuning, deep.make_task, report, further, deep.look_at_all, report_diagnostics)
