"""What is compared in the experiments of ``optimizers.py``: settings, kinds of methods, grids of learning rates."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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
# What takes the place of the noise of BN's batches, or of its hold on the size of kernels.
REGULARIZED_MUON = {
    "Muon + BN": 0.017,
    "Muon + BN, smoothing=0.1": 0.017,
    "BNP(centred(Muon))": 0.01,
    "BNP(centred(Muon)) + noise": 0.01,
    "BNP(centred(Muon)), decay=0.0": 0.01,
    "BNP(centred(Muon)), weight_decay=0.1": 0.01,
    "BNP(centred(Muon)), smoothing=0.1": 0.01,
    "BNP(centred(Muon)) + dropout": 0.01,
}
RESIDUAL = ("{} + BN", "{} + GN", "BNP({})", "BNP({}) + GN")


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
TEN_EPOCHS = "5-layer CNN, ten epochs"
REGULARIZED = f"{TEN_EPOCHS}, regularized"
# Those rates of a setting that are best in validation; regularized, those that are without it.
FIT = {
    FALLING: {"Muon": 0.03, "Muon + BN": 0.055, "Muon + BRN": 0.055, "Muon + WS": 0.1, "BNP(Muon)": 0.017},
    REGULARIZED: REGULARIZED_MUON,
}
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
    TEN_EPOCHS: Setting("cnn", "cifar-10", 450_000, (*RIVALS, *CENTRED_ALONE), E9, falls=True, augment=True),
    REGULARIZED: Setting("cnn", "cifar-10", 450_000, list(REGULARIZED_MUON), {}, falls=True, augment=True),
    "5-layer CNN, gray images": Setting("cnn", "fashion-mnist", EPOCH, HEADLINE, E10),
    "5-layer CNN, large batches": Setting("cnn", "cifar-10", EPOCH, (*HEADLINE, "{} + BGN"), E11),
    "ResNet-20, five epochs": Setting("resnet20", "cifar-10", 225_000, RESIDUAL, E3, falls=True, augment=True),
}


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
