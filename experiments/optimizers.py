"""Momentum, Adam and Muon: alone, with normalization layers, behind ``scale_by_bnp``, and in BNP's variables.

* ``e8_defaults``: the options of ``preconditioned``, one changed at a time, in a quarter of an epoch.
* ``e8``: one epoch at a constant rate, convolutional and fully connected networks, batches down to one example.
* ``e8_falling``: the same in batches of 128, at a rate that falls to zero along a cosine.
* ``e8_fit``: its best trainings with Muon again, and what they make of the training images.
* ``e9``: ten epochs of augmented images at a rate that falls along a cosine.
* ``e10``: one epoch of a second set of images.
* ``e11``: one epoch in large batches.
* ``e3_resnet20``: a residual network of 20 layers, five epochs of augmented images at a falling rate.
* ``migration``: coming from BN, on a few digits, see ``migration.py``.
* ``e8_kfac``, only if named: K-FAC on the fully connected network, see ``kfac.py``.

``optimizers_report.py`` draws the figures and writes the tables of what comes out.
"""

import ast
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
import programs
import protocol
import tables
import trials
import weight_norm
from bnp_optax import contrib
from bnp_optax.contrib import linen as contrib_linen
from protocol import Trial

MOMENTUM = 0.9
ADAM_FACTOR = 0.1  # of Adam's learning rate, for what is no kernel, by Muon's
GROUP_SIZE, MLP_GROUP_SIZE = 8, 10  # of GN: channels, units
EPOCH = 51_200  # examples, about those of CIFAR-10 and of MNIST
OPTIMIZERS = ("Momentum", "Adam", "Muon")
# Kinds of methods, with an optimizer's name; one with a name of its own is of that optimizer alone.
DAMPED_MUON = "BNP(Muon), eps_relative=1"
HEADLINE = ("{}", "{} + BN", "BNP({})")
STANDARDIZED = "{} + WS"  # kernels, and no normalization
CENTRED = "BNP(centred({}))"  # kernels, from the start on
RIVALS = (*HEADLINE, STANDARDIZED, CENTRED)
CENTRED_ALONE = ("centred({})", "centred({}) + BN")  # beside it: which part is BNP's, and what BN makes of the rest
KINDS = (*RIVALS, *CENTRED_ALONE, "{} + BRN", "{} + GN", "scale_by_bnp, {}")
# A kernel as a direction and a gain, for the optimizer alone: no scale, and nothing else of BN.
WEIGHT_NORMALIZED = ("WN(Adam)", "BNP(WN(Adam))", "WN(Muon)", "BNP(WN(Muon))")
# Whose networks do not change when a kernel grows either, without the noise that BN takes from its batch.
SCALE_INVARIANT = ("Muon + BRN", "Muon + GN", STANDARDIZED, "BNP(Muon) + GN")
RESIDUAL = ("{} + BN", "{} + GN", "BNP({})", "BNP({}) + GN")
OUTPUT_LAYERS = {"cnn": "Dense_1", "mlp": "Dense_3"}  # whose kernels keep their scale and their mean
LARGEST_NORM = 1.0  # of all gradients together, where they are clipped
PADDING = 4  # pixels around an augmented image
QUICK_STEPS, QUICK_RATES = 20, {("Adam", 32): (0.003,)}


class Setting(NamedTuple):
    """A network and how it is trained.

    Attributes:
      network: "mlp", "cnn" or "resnet20".
      data: the set of images.
      examples: that a training sees.
      kinds: of methods.
      rates: the grid of learning rates, equal for all kinds, by optimizer and batch size.
      falls: whether the rate falls to zero along half a cosine; else it is constant.
      augment: whether images are shifted and mirrored.
    """

    network: str
    data: str
    examples: int
    kinds: Sequence[str]
    rates: Mapping[tuple[str, int], tuple[float, ...]]
    falls: bool = False
    augment: bool = False


def steps_of_ten(low: float, high: float) -> tuple[float, ...]:
    """Returns rates about a factor of 3 apart, 1 and 3 in every decade."""
    every = [float(f"{digit}e{exponent}") for exponent in range(-5, 2) for digit in (1, 3)]
    return tuple(rate for rate in every if low <= rate <= high)


E8_CNN = {
    ("Momentum", 128): steps_of_ten(0.01, 0.3),
    ("Momentum", 32): steps_of_ten(0.003, 0.1),
    ("Momentum", 4): steps_of_ten(0.0003, 0.1),
    ("Momentum", 1): steps_of_ten(0.0001, 0.1),
    ("Adam", 128): steps_of_ten(0.0003, 0.01),
    ("Adam", 32): steps_of_ten(0.0003, 0.01),
    ("Adam", 4): steps_of_ten(0.0001, 0.01),
    ("Adam", 1): steps_of_ten(0.0001, 0.01),
    ("Muon", 128): steps_of_ten(0.003, 0.1),
    ("Muon", 32): steps_of_ten(0.003, 0.1),
    ("Muon", 4): steps_of_ten(0.001, 0.03),
    ("Muon", 1): steps_of_ten(0.0003, 0.03),
}
E8_MLP = {
    ("Momentum", 60): steps_of_ten(0.003, 0.1),
    ("Momentum", 6): steps_of_ten(0.0003, 0.1),
    ("Momentum", 1): steps_of_ten(0.00003, 0.1),
    ("Adam", 60): steps_of_ten(0.0001, 0.01),
    ("Adam", 6): steps_of_ten(0.00003, 0.01),
    ("Adam", 1): steps_of_ten(0.00001, 0.003),
    ("Muon", 60): steps_of_ten(0.001, 0.03),
    ("Muon", 6): steps_of_ten(0.0003, 0.03),
    ("Muon", 1): steps_of_ten(0.0001, 0.03),
}
OPTIONS = (
    "prior_examples=None",
    "prior_examples=16",
    "prior_examples=1024",
    "decay=0.9",
    "decay=0.999",
    "eps_relative=1e-3",
    "eps_relative=0.1",
    "eps_relative=1",
)
CHANGED = tuple(f"BNP({{}}), {option}" for option in OPTIONS)
CLIPPED = ("BNP(clip, {})", "clip, BNP({})")  # in z, and in the variables of the network
BN = ("{} + BN", "{} + BN, momentum=0.99")
DEFAULTS = {
    ("Momentum", 128): (0.01, 0.03),
    ("Momentum", 4): (0.01, 0.03),
    ("Adam", 128): (0.001, 0.003),
    ("Adam", 4): (0.001, 0.003),
    ("Muon", 128): (0.01, 0.03),
    ("Muon", 4): (0.01, 0.03),
}
E11 = {
    ("Momentum", 512): steps_of_ten(0.01, 1.0),
    ("Momentum", 2048): steps_of_ten(0.01, 1.0),
    ("Adam", 512): steps_of_ten(0.001, 0.03),
    ("Adam", 2048): steps_of_ten(0.001, 0.03),
    ("Muon", 512): steps_of_ten(0.003, 0.1),
    ("Muon", 2048): steps_of_ten(0.003, 0.1),
}
E3 = {
    ("Momentum", 128): steps_of_ten(0.01, 0.3),
    ("Momentum", 8): steps_of_ten(0.003, 0.03),
    ("Muon", 128): steps_of_ten(0.003, 0.03),
    ("Muon", 8): steps_of_ten(0.001, 0.01),
}
E9 = {
    ("Momentum", 128): (0.017, 0.03, 0.055, 0.1),  # around the best of one epoch at a falling rate
    ("Momentum", 4): steps_of_ten(0.001, 0.03),
    ("Adam", 128): (0.001, 0.0017, 0.003, 0.0055),
    ("Adam", 4): steps_of_ten(0.0003, 0.01),
    ("Muon", 128): (0.01, 0.017, 0.03, 0.055),
    ("Muon", 4): steps_of_ten(0.001, 0.03),
}
E10 = {(optimizer, size): E8_CNN[optimizer, size] for optimizer in OPTIMIZERS for size in (128, 4)}
LARGEST = {(optimizer, 128): E8_CNN[optimizer, 128] for optimizer in OPTIMIZERS}
FALLING = "5-layer CNN, falling rate"
FIT = {"Muon": 0.03, "Muon + BN": 0.055, "Muon + BRN": 0.055, "Muon + WS": 0.1, "BNP(Muon)": 0.017}  # best of FALLING
SETTINGS = {
    "a quarter of an epoch": Setting("cnn", "cifar-10", EPOCH // 4, ("BNP({})", *CHANGED, *CLIPPED, *BN), DEFAULTS),
    "5-layer CNN": Setting("cnn", "cifar-10", EPOCH, KINDS, E8_CNN),
    "fully connected 3x100": Setting("mlp", "cifar-10", EPOCH, KINDS, E8_MLP),
    FALLING: Setting(
        "cnn",
        "cifar-10",
        EPOCH,
        (*HEADLINE, CENTRED, *CENTRED_ALONE, DAMPED_MUON, *SCALE_INVARIANT, *WEIGHT_NORMALIZED),
        LARGEST,
        falls=True,
    ),
    "5-layer CNN, ten epochs": Setting("cnn", "cifar-10", 450_000, RIVALS, E9, falls=True, augment=True),
    "5-layer CNN, gray images": Setting("cnn", "fashion-mnist", EPOCH, HEADLINE, E10),
    "5-layer CNN, large batches": Setting("cnn", "cifar-10", EPOCH, (*HEADLINE, "{} + BGN"), E11),
    "ResNet-20, five epochs": Setting("resnet20", "cifar-10", 225_000, RESIDUAL, E3, falls=True, augment=True),
}


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


def make_model(network: str, kind: str, steps: int) -> nn.Module:
    """Returns a network, with the normalization layers of a kind of methods, for so many steps."""
    name = kind.split(" + ")[-1]
    normalization = make_normalization(name, steps)
    conv, dense = (contrib_linen.WSConv, contrib_linen.WSDense) if name == "WS" else (nn.Conv, nn.Dense)
    match network:
        case "mlp":
            return models.MLP(normalization, group_size=MLP_GROUP_SIZE, dense=dense)
        case "cnn":
            return models.CNN(normalization, group_size=GROUP_SIZE, conv=conv, dense=dense)
    return models.resnet_20(normalization=normalization)


def make_normalization(name: str, steps: int) -> models.Normalization:
    """Returns what normalizes a layer.

    Batch Renormalization widens its limits in the first two fifths of the steps. Batch Group Normalization has four
    groups a channel, each of a quarter of its positions.
    """
    name, _, other_momentum = name.partition(", momentum=")
    momentum = float(other_momentum or models.RUNNING_MOMENTUM)
    limits = contrib.ramp(hold=steps // 20, r_end=steps * 2 // 5, d_end=steps // 4)

    def normalize(train: bool) -> Callable[[jax.Array], Any]:
        common: dict[str, Any] = {"use_running_average": not train, "momentum": momentum}
        match name:
            case "BN":
                return nn.BatchNorm(**common)
            case "BRN":
                return contrib_linen.BatchRenorm(r_max=limits.r_max, d_max=limits.d_max, **common)
        return functools.partial(normalize_by_groups, common)

    return normalize if name in ("BN", "BRN", "BGN") else "gn" if name == "GN" else "none"


def normalize_by_groups(options: dict[str, Any], x: jax.Array) -> Any:
    """Applies Batch Group Normalization, of four groups a channel where it has positions, else of one."""
    groups, positions = (4 * x.shape[-1], x.shape[1:-1]) if x.ndim == 4 else (x.shape[-1], None)
    return contrib_linen.BatchGroupNorm(num_groups=groups, spatial_shape=positions, **options)(x)


def method_names(kinds: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns the optimizer and the kind of every method, by its name."""
    return {kind.format(name): (name, kind) for name in OPTIMIZERS for kind in kinds_of(name, kinds)}


def kinds_of(optimizer: str, kinds: Iterable[str]) -> list[str]:
    """Returns the kinds of methods that an optimizer is tried in."""
    return [kind for kind in kinds if optimizer in kind.format(optimizer)]


def options_of(kind: str) -> dict[str, Any]:
    """Returns the option that a kind of methods is named after, behind the last comma, if it is."""
    name, _, value = kind.rpartition(", ")[2].partition("=")
    return {name: ast.literal_eval(value)} if value else {}


def task(trial: Trial) -> trials.Task:
    """Returns the training of a method."""
    setting = SETTINGS[trial.setting]
    name, kind = method_names(setting.kinds)[trial.method]
    model = make_model(setting.network, kind, trial.steps)
    in_variables, behind = "BNP(" in kind, kind.startswith("scale_by_bnp")
    clip = optax.clip_by_global_norm(LARGEST_NORM)

    def to_centre(x: jax.Array) -> bnp.Layers:
        output = OUTPUT_LAYERS[setting.network]
        return bnp.linen.find_layers(model, x).select(lambda layer: layer.path != output)

    def start(params: optax.Params, x: jax.Array) -> optax.Params:
        return contrib.centre_kernels(params, to_centre(x)) if "centred(" in kind else params

    def optimizer(rate: Any, params: optax.Params, x: jax.Array) -> optax.GradientTransformationExtraArgs:
        inner = make_optimizer(name, optax.cosine_decay_schedule(rate, trial.steps) if setting.falls else rate)
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
        tx = bnp.preconditioned(inner, layers, **options_of(kind))
        return optax.chain(clip, tx) if kind.startswith("clip, ") else tx

    training = trials.classifier(model, optimizer, records=in_variables or behind, start=start)
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
        for name, setting in ((name, SETTINGS[name]) for name in names)
        for (optimizer, batch_size), rates in (QUICK_RATES if quick else setting.rates).items()
        for kind in kinds_of(optimizer, setting.kinds[:2] if quick else setting.kinds)
        for rate in rates
    ]


def fit_trials(quick: bool) -> list[Trial]:
    """Returns the trainings with Muon at a falling rate that are best in validation, with the seeds of the tests."""
    if quick:
        return [Trial("digits", FALLING, "Muon", 32, FIT["Muon"], QUICK_STEPS, 1)]
    data, steps = SETTINGS[FALLING].data, SETTINGS[FALLING].examples // 128
    return [
        Trial(data, FALLING, method, 128, rate, steps, seed) for method, rate in FIT.items() for seed in trials.SEEDS
    ]


def fit_table(outcomes: Sequence[protocol.Outcome]) -> str:
    """Returns a row a method: mean accuracy on training and on test images, the network as it is used."""
    rows = []
    for (*_, method), own in protocol.by_cell(ordered(outcomes)).items():
        fit, test = (np.array([getattr(o, field) for o in own]) for field in ("measure", "test_accuracy"))
        loss = np.mean([outcome.train_loss for outcome in own])
        cells = [f"{fit.mean():.1f}", tables.range_text(fit), f"{test.mean():.1f}", f"{(fit - test).mean():.1f}"]
        rows.append([method, *cells, f"{loss:.3f}"])
    return tables.markdown(["method", "training images", "range", "test images", "gap", "train loss"], rows)


def ordered(outcomes: Sequence[protocol.Outcome]) -> list[protocol.Outcome]:
    """Returns outcomes by setting, larger batches first, and method."""

    def place(outcome: protocol.Outcome) -> tuple[int, int, int]:
        methods = list(method_names(SETTINGS[outcome.setting].kinds))
        return list(SETTINGS).index(outcome.setting), -outcome.batch_size, methods.index(outcome.method)

    return sorted(outcomes, key=place)


def experiment(name: str, settings: Sequence[str]) -> trials.Experiment:
    """Returns an experiment, whose table says what every method reached on the test images."""

    def report(outcomes: Sequence[protocol.Outcome]) -> trials.Report:
        return {name: protocol.accuracy_table(ordered(outcomes))}, {}

    return trials.Experiment(functools.partial(tuning, settings), task, report, refined=True)


def validated(name: str, settings: Sequence[str]) -> trials.Experiment:
    """Returns an experiment of one seed, whose table has the accuracy on the validation images at every rate."""

    def report(outcomes: Sequence[protocol.Outcome]) -> trials.Report:
        return {name: protocol.validation_table(ordered(outcomes))}, {}

    return trials.Experiment(functools.partial(tuning, settings), task, report, seeds=())


EXPERIMENTS: dict[str, trials.Experiment] = {
    "e8_defaults": validated("e8_defaults", ["a quarter of an epoch"]),
    "e8": experiment("e8", ["5-layer CNN", "fully connected 3x100"]),
    "e8_falling": experiment("e8_falling", [FALLING]),
    "e8_fit": trials.Experiment(
        lambda quick: [], task, lambda outcomes: ({"e8_fit": fit_table(outcomes)}, {}), further=fit_trials, fit=True
    ),
    "e9": experiment("e9", ["5-layer CNN, ten epochs"]),
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
