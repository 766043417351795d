"""Momentum, Adam and Muon: alone, with normalization layers, behind ``scale_by_bnp``, and in BNP's variables.

* ``e8_defaults``: the options of ``preconditioned``, one changed at a time, in a quarter of an epoch.
* ``e8``: one epoch at a constant rate, convolutional and fully connected networks, batches down to one example.
* ``e8_falling``: the same in batches of 128, at a rate that falls to zero along a cosine.
* ``e8_fit``: its best trainings with Muon again, and what they make of the training images.
* ``e9``: ten epochs of augmented images at a rate that falls along a cosine.
* ``e9_fit``: with Muon and something against overfitting, and what comes of it on training images.
* ``e10``: one epoch of a second set of images.
* ``e11``: one epoch in large batches.
* ``e3_resnet20``: a residual network of 20 layers, five epochs of augmented images at a falling rate.
* ``migration``: coming from BN, on a few digits, see ``migration.py``.
* ``e8_kfac``, only if named: K-FAC on the fully connected network, see ``kfac.py``.

``optimizers_report.py`` draws the figures and writes the tables of what comes out.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import optax.contrib

import bnp_optax as bnp
import images
import kfac
import migration
import models
import noise
import programs
import protocol
import settings
import tables
import trials
import weight_norm
from bnp_optax import contrib
from bnp_optax.contrib import linen as contrib_linen
from protocol import Trial

MOMENTUM = 0.9
ADAM_FACTOR = 0.1  # of Adam's learning rate, for what is no kernel, by Muon's
GROUP_SIZE, MLP_GROUP_SIZE = 8, 10  # of GN: channels, units
OUTPUT_LAYERS = {"cnn": "Dense_1", "mlp": "Dense_3"}  # whose kernels keep their scale and their mean
DROPOUT = 0.1  # of what enters every activation
LARGEST_NORM = 1.0  # of all gradients together, where they are clipped
PADDING = 4  # pixels around an augmented image
QUICK_STEPS, QUICK_RATES = 20, {("Adam", 32): (0.003,)}


def make_optimizer(name: str, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Returns an optimizer by its name.

    Muon is on kernels, each a matrix, with Adam at a tenth of the rate on all else.
    """
    match name:
        case "Momentum":
            return optax.sgd(rate, MOMENTUM)
        case "Adam":
            return optax.adam(rate)

    def rate_of_adam(step: jax.Array) -> Any:
        return ADAM_FACTOR * (rate(step) if callable(rate) else rate)

    return optax.contrib.muon(
        rate, adam_learning_rate=rate_of_adam, muon_weight_dimension_numbers=models.kernel_matrices
    )


def kernel_decay(weight_decay: float, rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Returns decoupled decay, which adds to the steps ``- rate weight_decay w`` for kernels.

    It belongs behind BNP, in whose variables the decay of a kernel alone would move its bias.
    """

    def of_step(step: jax.Array) -> Any:
        return -weight_decay * rate(step)

    def kernels(params: optax.Params) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    decay = optax.inject_hyperparams(optax.add_decayed_weights, static_args=("mask",))
    return optax.with_extra_args_support(decay(weight_decay=of_step, mask=kernels))


def make_model(network: str, kind: str, steps: int) -> nn.Module:
    """Returns a network, with the normalization layers of a kind of methods, for so many steps."""
    name = kind.split(" + ")[-1].partition(", ")[0]
    momentum = settings.options_of(kind).get("momentum", models.RUNNING_MOMENTUM)
    normalization = make_normalization(name, steps, momentum)
    conv, dense = (contrib_linen.WSConv, contrib_linen.WSDense) if name == "WS" else (nn.Conv, nn.Dense)
    match network:
        case "mlp":
            return models.MLP(normalization, group_size=MLP_GROUP_SIZE, dense=dense)
        case "cnn":
            return models.CNN(normalization, group_size=GROUP_SIZE, conv=conv, dense=dense)
    return models.resnet_20(normalization=normalization)


def make_normalization(name: str, steps: int, momentum: float = models.RUNNING_MOMENTUM) -> models.Normalization:
    """Returns what normalizes a layer, or disturbs it.

    Batch Renormalization widens its limits in the first two fifths of the steps. Batch Group Normalization has four
    groups a channel, each of a quarter of its positions.
    """
    limits = contrib.ramp(hold=steps // 20, r_end=steps * 2 // 5, d_end=steps // 4)

    def normalize(train: bool) -> Callable[[jax.Array], Any]:
        common: dict[str, Any] = {"use_running_average": not train, "momentum": momentum}
        match name:
            case "BN":
                return nn.BatchNorm(**common)
            case "BRN":
                return contrib_linen.BatchRenorm(r_max=limits.r_max, d_max=limits.d_max, **common)
            case "noise":
                return noise.BatchNoise(train, momentum)
            case "dropout":
                return noise.Dropout(train, DROPOUT)
        return functools.partial(normalize_by_groups, common)

    return normalize if name in ("BN", "BRN", "BGN", "noise", "dropout") else "gn" if name == "GN" else "none"


def normalize_by_groups(options: dict[str, Any], x: jax.Array) -> Any:
    """Applies Batch Group Normalization, of four groups a channel where it has positions, else of one."""
    groups, positions = (4 * x.shape[-1], x.shape[1:-1]) if x.ndim == 4 else (x.shape[-1], None)
    return contrib_linen.BatchGroupNorm(num_groups=groups, spatial_shape=positions, **options)(x)


def task(trial: Trial) -> trials.Task:
    """Returns the training of a method."""
    setting = settings.SETTINGS[trial.setting]
    name, kind = settings.method_names(setting.kinds)[trial.method]
    model = make_model(setting.network, kind, trial.steps)
    in_variables, behind = "BNP(" in kind, kind.startswith("scale_by_bnp")
    clip = optax.clip_by_global_norm(LARGEST_NORM)
    options = settings.options_of(kind)
    smoothing, weight_decay = options.pop("smoothing", 0.0), options.pop("weight_decay", 0.0)

    def to_centre(x: jax.Array) -> bnp.Layers:
        output = OUTPUT_LAYERS[setting.network]
        return bnp.linen.find_layers(model, x).select(lambda layer: layer.path != output)

    def start(params: optax.Params, x: jax.Array) -> optax.Params:
        return contrib.centre_kernels(params, to_centre(x)) if "centred(" in kind else params

    def optimizer(rate: Any, params: optax.Params, x: jax.Array) -> optax.GradientTransformationExtraArgs:
        schedule = optax.cosine_decay_schedule(rate, trial.steps) if setting.falls else rate
        inner = make_optimizer(name, schedule)
        if "WN(" in kind:
            inner = weight_norm.weight_normalized(inner, leave=[OUTPUT_LAYERS[setting.network]])
        if "centred(" in kind:
            inner = contrib.centred(inner, to_centre(x))
        if not (in_variables or behind):
            return optax.with_extra_args_support(inner)
        layers = bnp.linen.find_layers(model, x)
        if behind:
            return optax.chain(bnp.scale_by_bnp(layers), inner)
        if "(clip, " in kind:
            inner = optax.chain(clip, inner)
        tx = bnp.preconditioned(inner, layers, **options)
        if weight_decay:
            return optax.chain(tx, kernel_decay(weight_decay, schedule))
        return optax.chain(clip, tx) if kind.startswith("clip, ") else tx

    training = trials.classifier(model, optimizer, in_variables or behind, start, smoothing)
    return training._replace(batches=augmented_epochs) if setting.augment else training


def augmented_epochs(trial: Trial, split: images.Split) -> Iterator[images.Split]:
    """Yields batches without end: every image moved by up to 4 pixels either way, black coming in, half mirrored."""
    rng = np.random.default_rng([trial.seed, 1])
    around = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    for batch in trials.epochs(trial, split):
        n, height, width, _ = batch.images.shape
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(batch.images, around), (height, width), (1, 2))
        top, left = rng.integers(0, 2 * PADDING + 1, (2, n))
        moved = windows[np.arange(n), top, left].transpose(0, 2, 3, 1)
        mirrored = rng.random((n, 1, 1, 1)) < 0.5
        yield images.Split(np.where(mirrored, moved[:, :, ::-1], moved), batch.labels)


def tuning(names: Sequence[str], quick: bool) -> list[Trial]:
    """Returns a training by every method of the settings, with batches of every size, at every rate."""
    return [
        Trial(
            "digits" if quick else setting.data,
            name,
            kind.format(optimizer),
            batch_size,
            rate,
            QUICK_STEPS if quick else setting.examples // batch_size,
            0,
        )
        for name, setting in ((name, settings.SETTINGS[name]) for name in names)
        for (optimizer, batch_size), rates in (QUICK_RATES if quick else setting.rates).items()
        for kind in settings.kinds_of(optimizer, setting.kinds[:2] if quick else setting.kinds)
        for rate in rates
    ]


def fit_trials(name: str, quick: bool) -> list[Trial]:
    """Returns the trainings of a setting of ``settings.FIT``, with the seeds of the tests."""
    setting, rates = settings.SETTINGS[name], settings.FIT[name]
    if quick:
        return [Trial("digits", name, method, 32, rate, QUICK_STEPS, 1) for method, rate in list(rates.items())[:1]]
    return [
        Trial(setting.data, name, method, 128, rate, setting.examples // 128, seed)
        for method, rate in rates.items()
        for seed in trials.SEEDS
    ]


def fit_table(outcomes: Sequence[protocol.Outcome]) -> str:
    """Returns a row a method: mean accuracy on training and on test images, the network as it is used."""
    rows = []
    for (*_, method), own in protocol.by_cell(ordered(outcomes)).items():
        fit, test = (np.array([getattr(o, field) for o in own]) for field in ("measure", "test_accuracy"))
        loss = np.mean([outcome.train_loss for outcome in own])
        cells = [f"{fit.mean():.1f}", tables.range_text(fit), f"{test.mean():.1f}", f"{(fit - test).mean():.1f}"]
        rows.append([method, *cells, "" if "smoothing" in method else f"{loss:.3f}"])  # of other labels
    return tables.markdown(["method", "training images", "range", "test images", "gap", "train loss"], rows)


def ordered(outcomes: Sequence[protocol.Outcome]) -> list[protocol.Outcome]:
    """Returns outcomes by setting, larger batches first, and method."""

    def place(outcome: protocol.Outcome) -> tuple[int, int, int]:
        methods = list(settings.method_names(settings.SETTINGS[outcome.setting].kinds))
        return list(settings.SETTINGS).index(outcome.setting), -outcome.batch_size, methods.index(outcome.method)

    return sorted(outcomes, key=place)


def experiment(name: str, names: Sequence[str]) -> trials.Experiment:
    """Returns an experiment, whose table says what every method reached on the test images."""

    def report(outcomes: Sequence[protocol.Outcome]) -> trials.Report:
        return {name: protocol.accuracy_table(ordered(outcomes))}, {}

    return trials.Experiment(functools.partial(tuning, names), task, report, refined=True)


def validated(name: str, names: Sequence[str]) -> trials.Experiment:
    """Returns an experiment of one seed, whose table has the accuracy on the validation images at every rate."""

    def report(outcomes: Sequence[protocol.Outcome]) -> trials.Report:
        return {name: protocol.validation_table(ordered(outcomes))}, {}

    return trials.Experiment(functools.partial(tuning, names), task, report, seeds=())


def fitted(name: str, setting: str) -> trials.Experiment:
    """Returns an experiment of given rates, whose table compares training images with test images."""

    def report(outcomes: Sequence[protocol.Outcome]) -> trials.Report:
        return {name: fit_table(outcomes)}, {}

    further = functools.partial(fit_trials, setting)
    return trials.Experiment(lambda quick: [], task, report, further=further, fit=True)


EXPERIMENTS: dict[str, trials.Experiment] = {
    "e8_defaults": validated("e8_defaults", ["a quarter of an epoch"]),
    "e8": experiment("e8", ["5-layer CNN", "fully connected 3x100"]),
    "e8_falling": experiment("e8_falling", [settings.FALLING]),
    "e8_fit": fitted("e8_fit", settings.FALLING),
    "e9": experiment("e9", [settings.TEN_EPOCHS]),
    "e9_fit": fitted("e9_fit", settings.REGULARIZED),
    "e10": experiment("e10", ["5-layer CNN, gray images"]),
    "e11": experiment("e11", ["5-layer CNN, large batches"]),
    "e3_resnet20": validated("e3_resnet20", ["ResNet-20, five epochs"]),
    "migration": migration.EXPERIMENT,
    "e8_kfac": kfac.EXPERIMENT,
}
ON_DEMAND = ("e8_kfac",)  # needs what we do not install


def main(argv: list[str] | None = None) -> None:
    """Runs the experiments and prints their tables."""
    trials.main(
        "Runs the experiments of other optimizers than SGD; continues earlier calls.", EXPERIMENTS, argv, ON_DEMAND
    )


if __name__ == "__main__":
    programs.start(main)
