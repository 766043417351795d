"""What there is in Batch Normalization's place, side by side: accuracy, cost, and what of a network it changes.

The convolutional network of the paper's experiments on CIFAR-10, half an epoch in batches of 128 and of 4, by SGD with
momentum, and by Adam where BNP is around it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax as bnp
import models
import optimizers
import protocol
import runs
import settings
import steps
import tables
import trials
from bnp_optax import contrib
from bnp_optax.contrib import linen as contrib_linen
from protocol import Outcome, Trial

SETTING, GROUP_SIZE, GROUPS = "5-layer CNN", 8, 8
EXAMPLES, QUICK_STEPS, QUICK_METHODS = 25_600, 10, ("none", "BN")
RATES = {
    ("Momentum", 128): settings.steps_of_ten(0.01, 0.3),
    ("Momentum", 4): settings.steps_of_ten(0.001, 0.03),
    ("Adam", 128): settings.steps_of_ten(0.0003, 0.01),
    ("Adam", 4): settings.steps_of_ten(0.0003, 0.01),
}
CLIPPING = 0.04
COSTS = "comparison_costs.csv"
SECONDS = 45  # of measured steps, for every batch size
SIGNAL = 1e-6  # in nats: the least gradient that is more than rounding


class Method(NamedTuple):
    """A network and its optimizer.

    Attributes:
      changes: what is another than without it.
      normalization: of the network: a layer's name, "standardized" for its kernels, or "none".
      optimizer: "Momentum" or "Adam".
      around: what is around the optimizer.
    """

    changes: str
    normalization: str = "none"
    optimizer: Literal["Momentum", "Adam"] = "Momentum"
    around: Literal["", "BNP", "AGC"] = ""


LAYER = "a layer"
mixture_norm = functools.partial(contrib_linen.MixtureNorm, num_components=3)
METHODS = {
    "none": Method("nothing"),
    "BN": Method(LAYER, "BN"),
    "GN": Method(LAYER, "GN"),
    "Batch Group Normalization": Method(LAYER, "BGN"),
    "Batch Renormalization": Method(LAYER, "BRN"),
    "IEBN": Method(LAYER, "IEBN"),
    "Mixture Normalization": Method(LAYER, "MN"),
    "standardized kernels + AGC": Method("kernels, activations, gradients", "standardized", around="AGC"),
    "BNP": Method("the optimizer", around="BNP"),
    "Adam": Method("nothing", optimizer="Adam"),
    "Adam + BN": Method(LAYER, "BN", optimizer="Adam"),
    "BNP(Adam)": Method("the optimizer", optimizer="Adam", around="BNP"),
}


def make_model(method: Method, steps: int) -> nn.Module:
    """Returns the network of a method, to be trained for so many steps.

    Mixtures are normalized behind the convolutions, which have many positions, and BN is behind the dense layer.
    """

    def normalize(train: bool) -> Callable[[jax.Array], Any]:
        options: dict[str, Any] = {"use_running_average": not train, "momentum": models.RUNNING_MOMENTUM}
        match method.normalization:
            case "BGN":
                return contrib_linen.BatchGroupNorm(num_groups=GROUPS, **options)
            case "IEBN":
                return contrib_linen.InstanceEnhancementBatchNorm(**options)
        return lambda x: (mixture_norm if x.ndim == 4 else nn.BatchNorm)(**options)(x)

    match method.normalization:
        case "standardized":
            gain = contrib.nonlinearity_gain(nn.relu)
            return models.CNN(
                conv=contrib_linen.WSConv, dense=contrib_linen.WSDense, activation=lambda x: gain * nn.relu(x)
            )
        case "BGN" | "IEBN" | "MN":
            return models.CNN(normalize)
    return models.CNN(optimizers.make_normalization(method.normalization, steps), group_size=GROUP_SIZE)


def make_task(trial: Trial) -> trials.Task:
    """Returns what a trial trains."""
    method = METHODS[trial.method]
    model = make_model(method, trial.steps)

    def optimizer(rate: Any, params: optax.Params, x: jax.Array) -> optax.GradientTransformationExtraArgs:
        inner = optimizers.make_optimizer(method.optimizer, rate)
        match method.around:
            case "BNP":
                return bnp.preconditioned(inner, bnp.linen.find_layers(model, x))
            case "AGC":
                return optax.chain(contrib.adaptive_grad_clip(CLIPPING, contrib.standardized_layers(params)), inner)
        return optax.with_extra_args_support(inner)

    return trials.classifier(model, optimizer, records=method.around == "BNP")


def tuning(quick: bool) -> list[Trial]:
    """Returns a training by every method in every batch size at every rate."""
    if quick:
        return [Trial("digits", SETTING, name, 4, 0.01, QUICK_STEPS, 0) for name in QUICK_METHODS]
    return [
        Trial("cifar-10", SETTING, name, batch_size, rate, EXAMPLES // batch_size, 0)
        for (optimizer, batch_size), rates in RATES.items()
        for name, method in METHODS.items()
        if method.optimizer == optimizer
        for rate in rates
    ]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step of a method costs.

    Attributes:
      data: whose images have the shape of the step's.
      method: one of ``METHODS``.
      batch_size: examples a step.
      milliseconds: of a step, the median.
      ratio: to the network as it is with the same optimizer, the median over rounds.
      memory_ratio: likewise, the bytes of a compiled step.
      state: numbers that are carried beside parameters and the optimizer's own state.
      signal: the norm of the gradient of the first kernel in training on one example, 0 where nothing comes through.
      commit: of the code.
    """

    data: str
    method: str
    batch_size: int
    milliseconds: float
    ratio: float
    memory_ratio: float
    state: int
    signal: float
    commit: str


def measure_costs(results: Path, data_dir: Path, quick: bool) -> None:
    """Measures the steps of all methods in turn, for every batch size that the CSV file lacks."""
    data, seconds = ("digits", 0.1) if quick else ("cifar-10", SECONDS)
    split = trials.load(data, data_dir).train
    done = {cost.batch_size for cost in runs.read_rows(results / COSTS, Cost)}
    for batch_size in [4] if quick else dict.fromkeys(size for _, size in RATES):
        if batch_size not in done:
            x, y = split.images[:batch_size].astype(np.float32) / 255, split.labels[:batch_size]
            rows = costs(data, QUICK_METHODS if quick else list(METHODS), x, y, seconds)
            runs.append_rows(results / COSTS, rows)


def costs(data: str, methods: Sequence[str], x: np.ndarray, y: np.ndarray, seconds: float) -> list[Cost]:
    """Measures the steps of methods on one batch, in turn, for about so many seconds."""
    contenders = {}
    for name in methods:
        task = make_task(Trial(data, SETTING, name, len(y), 0.0, 1000, 0))
        state = jax.jit(task.init)(jax.random.key(0), x[:1])
        step = jax.jit(lambda state, task=task: task.step(state, jnp.float32(1e-3), x, y)[0], donate_argnums=0)
        compiled = step.lower(state).compile()
        contenders[name] = steps.Contender(compiled, state, memory=steps.bytes_of_step(compiled))
    sizes = {name: size_beside_parameters(contender.state) for name, contender in contenders.items()}
    times = dict(zip(contenders, steps.take_turns(contenders, seconds, lambda done: None), strict=True))
    rows = []
    for name in methods:
        method = METHODS[name]
        plain = "none" if method.optimizer == "Momentum" else "Adam"
        rows.append(
            Cost(
                data=data,
                method=name,
                batch_size=len(y),
                milliseconds=1000 * float(np.median(times[name])),
                ratio=float(np.median(times[name] / times[plain])),
                memory_ratio=contenders[name].memory / contenders[plain].memory,
                state=sizes[name] - sizes[plain],
                signal=signal(method, x[:1], y[:1]),
                commit=runs.commit(),
            )
        )
    return rows


def size_beside_parameters(state: trials.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves((state.batch_stats, state.opt_state)))


def signal(method: Method, x: np.ndarray, y: np.ndarray) -> float:
    """Returns the norm of the gradient of the first kernel, in training on one example.

    What normalizes a number by itself alone makes nothing of it, and the layers before learn nothing.
    """
    model = make_model(method, steps=1000)
    variables = model.init(jax.random.key(0), x)

    def loss_fn(params: optax.Params) -> jax.Array:
        logits: Any = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])[0]
        loss: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss

    gradients = jax.jit(jax.grad(loss_fn))(variables["params"])
    first = "WSConv_0" if method.normalization == "standardized" else "Conv_0"
    return float(jnp.linalg.norm(gradients[first]["kernel"]))


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what every method reaches, and at which rates."""
    return {"comparison_accuracies": protocol.accuracy_table(outcomes)}, {}


def report_costs(outcomes: Sequence[Outcome], results: Path) -> trials.Report:
    """Returns accuracies and costs side by side, of the methods that have both."""
    costs = {(cost.method, cost.batch_size): cost for cost in runs.read_rows(results / COSTS, Cost)}
    tests: dict[tuple[str, int], np.ndarray] = {}
    for (_, _, batch_size, name), cell in protocol.by_cell(outcomes).items():
        if final := protocol.at_best_rate(cell):
            tests[name, batch_size] = protocol.accuracies_in_test(final)
    sizes = sorted({size for _, size in tests}, reverse=True)
    rows = []
    for name, method in METHODS.items():
        if not sizes or not all((name, size) in tests and (name, size) in costs for size in sizes):
            continue
        own = [costs[name, size] for size in sizes]
        rows.append(
            [
                name,
                method.changes,
                *(f"{tests[name, size].mean():.1f}" for size in sizes),
                *(f"{cost.ratio:.2f}" for cost in own),
                f"{own[0].memory_ratio:.2f}",
                f"{own[0].state:,}",
                "yes" if own[0].signal > SIGNAL else "no",
            ]
        )
    header = ["method", "it changes", *(f"test accuracy, {size}" for size in sizes)]
    header += [*(f"time a step, {size}" for size in sizes), "memory", "state", "learns from one example"]
    return {"comparison": tables.markdown(header, rows)}, {}


EXPERIMENT = trials.Experiment(tuning, make_task, report, also=measure_costs, also_report=report_costs, refined=True)
