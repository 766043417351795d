"""Measures the training step of BNP, the normalization layers and other optimizers against that of SGD, in one run.

All methods of a network are compiled first and then take turns, in a new order every round, so that a machine that
slows down slows them all. What is compared are ratios: the time of a method relative to SGD in the same round, and the
median of these over the rounds; relative to Adam too. Every case is a few rows of a CSV file; ``report.py`` draws it.
"""

import argparse
import functools
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

import bnp_optax as bnp
import kfac
import language_model
import models
import programs
import report
import runs
from report import Row

RATE = 1e-3
ROUND_SECONDS = 0.05  # of a method in a round; at least one step
MIN_ROUNDS, MAX_ROUNDS = 7, 61

Optimizer = Callable[[bnp.Layers], optax.GradientTransformationExtraArgs]


class Method(NamedTuple):
    """A way to train: a normalization in the network, and an optimizer."""

    normalization: models.Normalization
    optimizer: Optimizer
    records: bool = False  # the inputs of layers; otherwise BNP keeps the statistics that it has


def plain(optimizer: optax.GradientTransformation) -> Optimizer:
    return lambda layers: optax.with_extra_args_support(optimizer)


def bnp_sgd(layers: bnp.Layers) -> optax.GradientTransformationExtraArgs:
    return optax.chain(bnp.scale_by_bnp(layers), sgd)


def bnp_adam(layers: bnp.Layers) -> optax.GradientTransformationExtraArgs:
    return bnp.preconditioned(adam, layers)


sgd, adam = optax.sgd(RATE, momentum=0.9), optax.adam(RATE)
METHODS = {
    "SGD": Method("none", plain(sgd)),
    "BN": Method("bn", plain(sgd)),
    "GN": Method("gn", plain(sgd)),
    "LN": Method("ln", plain(sgd)),
    "BNP": Method("none", bnp_sgd, records=True),
    "BNP, kept": Method("none", bnp_sgd),
    "BNP+GN": Method("gn", bnp_sgd, records=True),
    "Adam": Method("none", plain(adam)),
    "BNP(Adam)": Method("none", bnp_adam, records=True),
    "Muon": Method("none", plain(optax.contrib.muon(RATE))),
}
KFAC = "K-FAC"  # if kfac_jax is installed, see kfac.py
REFRESH_EVERY = 10  # steps; "BNP, every 10" is one step of "BNP" and nine of "BNP, kept", of the same round


class Network(NamedTuple):
    """A network, and the shape of one example."""

    make: Callable[[models.Normalization], nn.Module]
    shape: tuple[int, ...]
    methods: Sequence[str] = tuple(METHODS)
    characters: int = 0  # of a language model's alphabet


LANGUAGE_METHODS = ("SGD", "BNP", "BNP, kept", "Adam", "BNP(Adam)", "Muon")  # beside its LayerNorms


def make_language_model(width: int, num_heads: int, num_blocks: int, length: int) -> Network:
    model = language_model.LanguageModel(128, width, num_heads, num_blocks)
    return Network(lambda normalization: model, (length,), LANGUAGE_METHODS, characters=128)


def resnet_18(normalization: models.Normalization, size: int) -> nn.Module:
    return models.resnet_18(normalization=normalization, large_images=size > 64)


NETWORKS = {
    "mlp": Network(lambda kind: models.MLP(kind, widths=(1000,) * 3), (28, 28, 1), (*METHODS, KFAC)),
    "cnn": Network(models.CNN, (32, 32, 3), (*METHODS, KFAC)),
    "resnet18-32": Network(functools.partial(resnet_18, size=32), (32, 32, 3)),
    "resnet18-224": Network(functools.partial(resnet_18, size=224), (224, 224, 3)),
    "transformer": make_language_model(width=128, num_heads=4, num_blocks=4, length=64),
    "transformer-large": make_language_model(width=768, num_heads=12, num_blocks=12, length=512),
}
CASES = {  # network and batch sizes
    "cpu": {"mlp": [1, 60, 512], "cnn": [1, 32, 128], "resnet18-32": [32], "resnet18-224": [32], "transformer": [32]},
    "gpu": {
        "mlp": [60, 512, 4096],
        "cnn": [128, 1024],
        "resnet18-32": [128, 1024],
        "resnet18-224": [256],
        "transformer-large": [32],
    },
}


class Contender(NamedTuple):
    """A compiled training step with its state (parameters, running averages, optimizer), which every call replaces."""

    step: Callable[[Any], Any]
    state: Any
    compile_seconds: float = np.nan
    memory: float = np.nan
    flops: float = np.nan


def make_batch(network: Network, batch_size: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns random inputs, and targets."""
    key = jax.random.key(0)
    if network.characters:
        x = jax.random.randint(key, (batch_size, *network.shape), 0, network.characters)
        return x, x
    return jax.random.normal(key, (batch_size, *network.shape), dtype), jnp.arange(batch_size) % 10


class Training(NamedTuple):
    """A training step of a method, as functions that a caller compiles or only traces."""

    init: Callable[[], Any]  # returns the state: parameters, running averages, optimizer
    step: Callable[[Any, jax.Array, jax.Array], Any]  # returns the next state
    batch: tuple[jax.Array, jax.Array]


def make_training(network: Network, method: Method, batch_size: int, dtype: jnp.dtype) -> Training:
    """Puts a network, a method and a batch together.

    Args:
      network: what is trained, on random numbers.
      method: how.
      batch_size: examples a step.
      dtype: of activations; parameters are float32.
    """
    model = network.make(method.normalization)
    x, y = make_batch(network, batch_size, dtype)
    options: dict[str, Any] = {"mutable": ["batch_stats"]} | ({} if network.characters else {"train": True})
    tx = method.optimizer(bnp.linen.find_layers(model, x))

    def init() -> Any:
        variables = jax.jit(model.init)(jax.random.key(0), x)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        return params, batch_stats, tx.init(params)

    def loss_fn(params: optax.Params, batch_stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        variables = {"params": cast, "batch_stats": batch_stats}
        records: Any = bnp.KEEP_STATISTICS
        if method.records:
            (logits, updated), records = bnp.linen.capture(model)(variables, x, **options)
        else:
            logits, updated = model.apply(variables, x, **options)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean()
        return loss, (updated, records)

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, batch_stats, opt_state = state
        gradients, (updated, records) = jax.grad(loss_fn, has_aux=True)(params, batch_stats, x, y)
        updates, opt_state = tx.update(gradients, opt_state, params, intermediates=records)
        return optax.apply_updates(params, updates), updated.get("batch_stats", {}), opt_state

    return Training(init, step, (x, y))


def prepare(network: Network, method: Method, batch_size: int, dtype: jnp.dtype) -> Contender:
    """Compiles the training step of a method, see :func:`make_training`."""
    init, step, batch = make_training(network, method, batch_size, dtype)
    state = init()
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, *batch).compile()
    seconds = time.perf_counter() - start
    flops = float((compiled.cost_analysis() or {}).get("flops", np.nan))
    return Contender(lambda state: compiled(state, *batch), state, seconds, bytes_of_step(compiled), flops)


def bytes_of_step(compiled: jax.stages.Compiled) -> float:
    """Returns the bytes of arguments, outputs and temporaries, donated buffers once."""
    memory: Any = compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return float(whole - memory.alias_size_in_bytes)


def prepare_kfac(network: Network, batch_size: int, dtype: jnp.dtype) -> Contender:
    """Builds the step of K-FAC, with a fixed rate and damping and inverses every 5 steps, as is its default.

    It compiles itself when it is first called, so its time to compile and its memory are not known.
    """
    import kfac_jax

    model, key = network.make("none"), jax.random.key(0)
    batch = make_batch(network, batch_size, dtype)
    params = jax.jit(model.init)(key, batch[0])["params"]

    optimizer = kfac_jax.Optimizer(jax.value_and_grad(kfac.registered_loss(model)), l2_reg=0.0, num_burnin_steps=0)
    numbers = {"learning_rate": RATE, "momentum": 0.9, "damping": 1.0}
    fixed = {name: jnp.asarray(value) for name, value in numbers.items()}

    def step(state: Any) -> Any:
        params, _, opt_state = state
        params, opt_state, _ = optimizer.step(params, opt_state, key, batch=batch, **fixed)
        return params, {}, opt_state

    return Contender(step, (params, {}, optimizer.init(params, key, batch)))


def take_turns(contenders: dict[str, Contender], seconds: float, advance: Callable[[float], None]) -> np.ndarray:
    """Measures steps, interleaved.

    Args:
      contenders: what takes turns.
      seconds: about how long all of it may take.
      advance: called with the fraction done since its last call.

    Returns:
      Seconds a step, ``[contenders, rounds]``.
    """
    steps, states = [c.step for c in contenders.values()], [c.state for c in contenders.values()]

    def run(number: int, repeats: int) -> float:
        state = states[number]
        start = time.perf_counter()
        for _ in range(repeats):
            state = steps[number](state)
        jax.block_until_ready(state)
        states[number] = state
        return (time.perf_counter() - start) / repeats

    first = [min(run(number, 1) for _ in range(3)) for number in range(len(steps))]
    repeats = [max(1, round(ROUND_SECONDS / estimate)) for estimate in first]
    rounds = round(seconds / float(np.dot(repeats, first)))
    times = np.empty((len(steps), max(MIN_ROUNDS, min(rounds, MAX_ROUNDS))))
    order = np.random.default_rng(0)
    for turn in range(times.shape[1]):
        for number in order.permutation(len(steps)):
            times[number, turn] = run(number, repeats[number])
        advance(1 / times.shape[1])
    return times


def measure(name: str, batch_size: int, methods: Sequence[str], seconds: float, dtype: jnp.dtype) -> list[Row]:
    """Measures one network at one batch size by several methods."""
    network = NETWORKS[name]
    chosen = [method for method in methods if method in network.methods]
    with rich.progress.Progress() as progress:
        label = f"{name}, batch {batch_size}"
        task = progress.add_task(f"{label}: compiling", total=len(chosen) + 1)
        contenders = {}
        for method in chosen:
            if method == KFAC:
                contenders[method] = prepare_kfac(network, batch_size, dtype)
            else:
                contenders[method] = prepare(network, METHODS[method], batch_size, dtype)
            progress.advance(task)
        progress.update(task, description=f"{label}: measuring")
        times = dict(
            zip(chosen, take_turns(contenders, seconds, functools.partial(progress.advance, task)), strict=True)
        )
    if {"BNP", "BNP, kept"} <= set(chosen):
        share = 1 / REFRESH_EVERY
        contenders["BNP, every 10"] = contenders["BNP"]
        times["BNP, every 10"] = share * times["BNP"] + (1 - share) * times["BNP, kept"]
    size = sum(leaf.size for leaf in jax.tree.leaves(contenders["SGD"].state[0]))
    base, adam_base = contenders["SGD"], contenders.get("Adam")
    rows = []
    for method, own in times.items():
        contender = contenders[method]
        low, middle, high = np.quantile(own / times["SGD"], [0.25, 0.5, 0.75])
        rows.append(
            Row(
                network=name,
                batch_size=batch_size,
                method=method,
                milliseconds=1000 * float(np.median(own)),
                ratio=float(middle),
                ratio_low=float(low),
                ratio_high=float(high),
                rounds=len(own),
                compile_seconds=contender.compile_seconds,
                megabytes=contender.memory / 1e6,
                memory_ratio=contender.memory / base.memory,
                gigaflops=contender.flops / 1e9,
                parameters=size,
                state_ratio=(bytes_beside_parameters(contender) - bytes_beside_parameters(base)) / (4 * size),
                device=jax.devices()[0].device_kind,
                dtype=str(np.dtype(dtype)),
                commit=runs.commit(),
                adam_ratio=float(np.median(own / times["Adam"])) if adam_base else np.nan,
                adam_memory_ratio=contender.memory / adam_base.memory if adam_base else np.nan,
            )
        )
    return rows


def bytes_beside_parameters(contender: Contender) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(contender.state[1:]))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = programs.Parser(
        description="Measures training steps of several methods in turn, and writes a CSV file, a table and a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option, count = parser.add_argument, programs.count
    option("--device", default="cpu", choices=list(CASES), help="sizes and dtype (gpu: bfloat16 activations)")
    option("--networks", nargs="+", choices=list(NETWORKS), help="default: those of the device")
    methods = [*METHODS, KFAC] if importlib.util.find_spec("kfac_jax") else list(METHODS)
    option("--methods", nargs="+", choices=methods, default=methods, help="SGD is always among them")
    option("--batch-sizes", nargs="+", type=count, metavar="N", help="default: those of the device and network")
    option(
        "--seconds",
        type=programs.between(0, math.inf),
        default=60,
        help="time for the measured steps of a network at a batch size",
    )
    folder = programs.folder
    option(
        "--results", type=folder, default=str(runs.RESULTS), metavar="DIR", help="where steps-DEVICE.csv and .png go"
    )
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(["SGD", *args.methods]))
    if args.device == "gpu" and jax.default_backend() == "cpu":
        parser.error("--device gpu: JAX has found no accelerator")
    return args


def main(argv: list[str] | None = None) -> list[Row]:
    """Measures the chosen cases, replaces their rows in the CSV file, prints the table and draws the picture."""
    args = parse_args(argv)
    cases, output = CASES[args.device], args.results / f"steps-{args.device}.csv"
    dtype = jnp.dtype("bfloat16" if args.device == "gpu" else "float32")
    for name in args.networks or cases:
        for batch_size in args.batch_sizes or cases.get(name, [32]):
            rows = report.replace(output, measure(name, batch_size, args.methods, args.seconds, dtype))
    for case, own in report.by_case(rows):
        programs.show(report.make_table(case, report.HEADER, [*map(report.cells, own)]))
    report.make_figure(rows).savefig(output.with_suffix(".png"), dpi=110)
    return rows


if __name__ == "__main__":
    programs.start(main)
