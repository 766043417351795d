"""What coming from BN to BNP brings on a few digits: accuracies, first kernels, and weight decay in the loss.

* The convolutional networks of docs/migration.md with BN, with BNP and with neither, for few epochs and for many.
* Deep fully connected networks from kernels of several sizes.
* How fast a penalty in the loss would decay the weights of two trained networks.

SGD with momentum and AdamW train them as that page has it; weights decay apart from the loss with BN, too. A step of
these trainings is an epoch, whose batches are one compiled loop.
"""

import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax as bnp
import images
import models
import protocol
import tables
import trials
from protocol import Outcome, Trial

DATA = "digits-1024"
DEPTH, BLOCKS, WIDTH, CLASSES = 10, 8, 64, 10
MOMENTUM, DECAY = 0.9, 1e-4
AT_PAGE = "BNP, this page's rate"
COLUMNS = ("BN", AT_PAGE, "BNP", "neither")

Init = nn.initializers.Initializer
lecun_normal, he_normal, zeros = nn.initializers.lecun_normal(), models.he_normal, nn.initializers.zeros
twice_he_normal = nn.initializers.variance_scaling(8.0, "fan_in", "truncated_normal")


class Rates(NamedTuple):
    """Learning rates of an optimizer: the grid for all methods, and the page's for BNP."""

    grid: tuple[float, ...]
    page: float


OPTIMIZERS = {
    "SGD": Rates((0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), 0.01),
    "AdamW": Rates((0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), 0.001),
}


def activate(x: jax.Array, batch_norm: bool, train: bool) -> jax.Array:
    """Applies BN, if it is to be, and a ReLU, in a compact module."""
    return nn.relu(models.normalize("bn" if batch_norm else "none", 0, train, x))


class CNN(nn.Module):
    """The Linen networks of the page: before, with BN, and after."""

    batch_norm: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of images ``[n, height, width, channels]``."""
        kernel_init = lecun_normal if self.batch_norm else he_normal
        for width in (16, 32):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=not self.batch_norm, kernel_init=kernel_init)(x)
            x = activate(x, self.batch_norm, train)
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


class Deep(nn.Module):
    """Dense layers of one width with ReLUs, and a classifier.

    Attributes:
      batch_norm: whether BN is before every ReLU.
      kernel_init: initializer of the kernels.
      end_init: that of the last kernel of every residual branch; without it there are no branches.
    """

    batch_norm: bool
    kernel_init: Init
    end_init: Init | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits of images ``[n, height, width, channels]``."""

        def dense(x: jax.Array, width: int = WIDTH, kernel_init: Init = self.kernel_init) -> jax.Array:
            return nn.Dense(width, kernel_init=kernel_init)(x)

        def act(x: jax.Array) -> jax.Array:
            return activate(x, self.batch_norm, train)

        x = x.reshape(x.shape[0], -1)
        if self.end_init is None:
            for _ in range(DEPTH):
                x = act(dense(x))
            return dense(x, CLASSES)
        x = dense(x)
        for _ in range(BLOCKS):
            x = x + dense(act(dense(act(x))), kernel_init=self.end_init)
        return dense(act(x), CLASSES)


class Setting(NamedTuple):
    """A network and its training.

    Attributes:
      network: makes the network, with BN or without.
      epochs: how many.
      batch_sizes: examples a step.
      kinds: of methods.
    """

    network: Callable[[bool], nn.Module]
    epochs: int
    batch_sizes: tuple[int, ...] = (64,)
    kinds: tuple[str, ...] = ("BN", "BNP")


def deep(kernel_init: Init, end_init: Init | None = None) -> Setting:
    """Returns the training of a deep network from such kernels."""
    return Setting(lambda batch_norm: Deep(batch_norm, kernel_init, end_init), epochs=5)


EXPECTED = {f"{epochs} epochs": Setting(CNN, epochs, (64, 4), ("BN", "BNP", "neither")) for epochs in (3, 20)}
DEEP = {
    f"{DEPTH} dense layers, LeCun": deep(lecun_normal),
    f"{DEPTH} dense layers, He": deep(he_normal),
    f"{DEPTH} dense layers, twice He": deep(twice_he_normal),
    f"{BLOCKS} residual blocks, He": deep(he_normal, he_normal),
    f"{BLOCKS} residual blocks, He, zero at the end": deep(he_normal, zeros),
}
PENALIZED = {
    "fully connected 3x100": Setting(lambda _: models.MLP(), 20, (128,)),
    "5-layer CNN": Setting(lambda _: models.CNN(), 20, (128,)),
}
SETTINGS = EXPECTED | DEEP | PENALIZED


def kernels_alone(params: optax.Params) -> Any:
    """Returns which parameters decay."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_optimizer(name: str, rate: Any, layers: bnp.Layers | None) -> optax.GradientTransformationExtraArgs:
    """Returns the page's SGD or AdamW, with BNP for the layers, if there are any.

    ``preconditioned`` around the identity is ``scale_by_bnp``.
    """
    first, last = {
        "SGD": (optax.identity(), optax.sgd(rate, MOMENTUM)),
        "AdamW": (optax.scale_by_adam(), optax.scale_by_learning_rate(rate)),
    }[name]
    decay = optax.add_decayed_weights(DECAY, kernels_alone)
    first = bnp.preconditioned(first, layers) if layers else first
    return optax.with_extra_args_support(optax.chain(first, decay, last))


def penalty_factor(params: optax.Params, statistics: bnp.Statistics, layers: bnp.Layers) -> jax.Array:
    """Returns how many times as fast as meant a penalty in the loss would decay the weights of the fastest layer.

    Weights of a layer decay at different rates, of which this is the median.
    """
    gradients = jax.tree.map(lambda leaf: leaf * (leaf.ndim > 1), params)
    steps, _ = bnp.scale_by_bnp(layers).update(gradients, statistics, intermediates=bnp.KEEP_STATISTICS)
    pairs = zip(jax.tree.leaves(steps), jax.tree.leaves(params), strict=True)
    return jnp.stack([jnp.median(step / leaf) for step, leaf in pairs if leaf.ndim > 1]).max()


def whole_epochs(trial: Trial, split: images.Split) -> Iterator[images.Split]:
    """Yields the batches of an epoch together, as often as is asked for."""
    batches, count = trials.epochs(trial, split), len(split.labels) // trial.batch_size
    while True:
        yield images.Split(*map(np.stack, zip(*itertools.islice(batches, count), strict=True)))


def make_task(trial: Trial) -> trials.Task:
    """Returns what a trial trains, an epoch a step."""
    optimizer_name, kind = trial.method.split(", ")
    model = SETTINGS[trial.setting].network(kind == "BN")

    def optimizer(rate: Any, params: Any, x: Any) -> optax.GradientTransformationExtraArgs:
        return make_optimizer(optimizer_name, rate, bnp.linen.find_layers(model, x) if kind == "BNP" else None)

    task = trials.classifier(model, optimizer, records=kind == "BNP")

    def epoch(state: trials.State, rate: jax.Array, x: Any, y: Any) -> tuple[trials.State, jax.Array]:
        state, losses = jax.lax.scan(lambda state, batch: task.step(state, rate, *batch), state, (x, y))
        return state, losses.mean()

    def measure(state: trials.State) -> jax.Array:
        layers = bnp.linen.find_layers(model, jnp.zeros((1, 8, 8, 1)))
        return penalty_factor(state.params, state.opt_state[0].statistics, layers)

    of_epochs = task._replace(step=epoch, batches=whole_epochs)
    return of_epochs._replace(measure=measure) if trial.setting in PENALIZED else of_epochs


def tuning(quick: bool) -> list[Trial]:
    """Returns a training of every method at every rate of its optimizer."""
    return [
        Trial(DATA, name, f"{optimizer}, {kind}", batch_size, rate, 1 if quick else setting.epochs, 0)
        for name, setting in list((EXPECTED | DEEP).items())[: 1 if quick else None]
        for optimizer, rates in list(OPTIMIZERS.items())[: 1 if quick else None]
        for batch_size in setting.batch_sizes[: 1 if quick else None]
        for kind in setting.kinds[: 2 if quick else None]
        for rate in (rates.grid[3:5] if quick else rates.grid)
    ]


def further(quick: bool) -> list[Trial]:
    """Returns the trainings by BNP at the rates of the page, and those in which a penalty is looked at."""
    if quick:
        return []
    return [
        Trial(DATA, name, f"{optimizer}, BNP", batch_size, rates.page, setting.epochs, seed)
        for name, setting in SETTINGS.items()
        for optimizer, rates in OPTIMIZERS.items()
        if optimizer == "SGD" or name not in PENALIZED
        for batch_size in setting.batch_sizes
        for seed in trials.SEEDS
    ]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what the methods reach from usual and from other kernels, and what a penalty would do."""
    texts = {
        "migration": accuracy_table(outcomes, EXPECTED),
        "migration_kernels": accuracy_table(outcomes, DEEP),
        "migration_penalty": penalty_table(outcomes),
    }
    return texts, {}


def accuracy_table(outcomes: Sequence[Outcome], settings: Container[str]) -> str:
    """Returns mean test accuracies at the rates that are best in validation, and with BNP at the page's too."""
    cells = protocol.by_cell([outcome for outcome in outcomes if outcome.setting in settings])
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for (_, setting, batch_size, method), own in cells.items():
        optimizer, kind = method.split(", ")
        row = rows.setdefault((setting, optimizer, str(batch_size)), {})
        row[kind] = mean_text(protocol.at_best_rate(own))
        if kind == "BNP":
            rate = OPTIMIZERS[optimizer].page
            row[AT_PAGE] = mean_text([outcome for outcome in own if outcome.seed and outcome.rate == rate])
    kinds = [kind for kind in COLUMNS if any(kind in row for row in rows.values())]
    lines = [[*key, *(row.get(kind, "") for kind in kinds)] for key, row in rows.items()]
    return tables.markdown(["training", "optimizer", "batch", *kinds], lines)


def mean_text(final: Sequence[Outcome]) -> str:
    """Returns the mean test accuracy as text; none where the trainings are still to come."""
    return f"{protocol.accuracies_in_test(final).mean():.1f}" if final else ""


def penalty_table(outcomes: Sequence[Outcome]) -> str:
    """Returns how many times as fast as meant a penalty would decay the weights, a row a network."""
    rows = []
    for setting in dict.fromkeys(outcome.setting for outcome in outcomes if outcome.setting in PENALIZED):
        factors = np.array([outcome.measure for outcome in outcomes if outcome.setting == setting])
        rows.append([setting, tables.range_text(factors)])
    return tables.markdown(["network", "as fast as meant, times"], rows)


EXPERIMENT = trials.Experiment(tuning, make_task, report, further)
