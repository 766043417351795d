"""Counts the kernels that a training step launches on an H100, on a machine that needs to have none.

XLA compiles for a GPU of which it has the description, ``h100.txtpb``. What it launches, what that reads and writes and
how long XLA takes can be compared between methods. How long a step takes cannot be had this way, and XLA chooses its
kernels without trying them.

It needs JAX's plugin for CUDA, which is several gigabytes, and so an environment of its own::

    python -m venv cuda && cuda/bin/pip install --editable '.[experiments]' 'jax[cuda12]'
    cuda/bin/python experiments/kernels.py
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import language_model
import models
import programs
import report
import runs
import steps
from report import Kernels

DESCRIPTION = Path(__file__).with_name("h100.txtpb")
CHARACTERS = 128
LARGEST_PROPORTION = 1.5  # of kernels of BNP(Adam) to those of Adam, for networks that have such a bar


class UnrolledTransformer(nn.Module):
    """The language model of ``language_model.py``, its blocks one behind another in place of a loop."""

    width: int = 768
    num_heads: int = 12
    num_blocks: int = 12

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Returns the logits of each next character."""
        positions = nn.Embed(text.shape[-1], self.width, name="positions")(jnp.arange(text.shape[-1]))
        x = nn.Embed(CHARACTERS, self.width, name="characters")(text) + positions
        for number in range(self.num_blocks):
            x, _ = language_model.Block(self.num_heads, name=f"block_{number}")(x)
        return nn.Dense(CHARACTERS, name="logits")(nn.LayerNorm()(x))


class Case(NamedTuple):
    """A network and a batch size, with the most kernels that a step of BNP may launch."""

    network: steps.Network
    batch_size: int
    bar: int
    adam_has_bar: bool = False

    def bar_of(self, method: str, kernels: dict[str, int]) -> float:
        """Returns the most kernels that a method may launch, given those of all; NaN if there is no bar."""
        if method == "BNP(Adam)" and self.adam_has_bar:
            return LARGEST_PROPORTION * kernels.get("Adam", np.nan)
        return self.bar if method == "BNP" else np.nan


CASES = {
    "mlp": Case(steps.NETWORKS["mlp"], 60, 63),
    "cnn": Case(steps.NETWORKS["cnn"], 128, 75),
    "resnet18-32": Case(steps.NETWORKS["resnet18-32"], 128, 290, adam_has_bar=True),
    "resnet110-32": Case(steps.Network(lambda kind: models.resnet_110(normalization=kind), (32, 32, 3)), 128, 1450),
    "transformer-unrolled": Case(
        steps.Network(lambda kind: UnrolledTransformer(), (512,), steps.LANGUAGE_METHODS, CHARACTERS),
        32,
        1350,
        adam_has_bar=True,
    ),
}


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    bytes: int  # of its result
    operation: str
    operands: list[str]
    attributes: str

    def called(self, attribute: str) -> str:
        """Returns the computation that an attribute names."""
        return str(re.findall(attribute + r"=%([\w.\-]+)", self.attributes)[0])


class Launches(NamedTuple):
    """How many kernels are launched, and the bytes that they read and write."""

    kernels: int
    bytes: int


COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(.*)")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}
CALLS = {"while": "body", "call": "to_apply", "async-start": "calls"}


def count_launches(program: str) -> Launches:
    """Counts what a compiled program launches.

    Copies and calls of libraries count one each. A loop's body counts once an iteration, and once if XLA does not know
    how often it runs. A kernel reads its operands whole, or the slices that it takes of them.

    Args:
      program: XLA's optimized HLO, as ``compiled.as_text()`` gives it.
    """
    bodies: dict[str, dict[str, Instruction]] = {}
    entry = ""
    for line in program.splitlines():
        if match := COMPUTATION.match(line):
            body = bodies.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif match := INSTRUCTION.match(line):
            name, kind, operation, operands, attributes = match.groups()
            names = re.findall(r"%([\w.\-]+)", operands)
            body[name] = Instruction(name, bytes_of(kind), operation, names, attributes)

    def count(computation: str) -> Launches:
        body, kernels, moved = bodies[computation], 0, 0
        for instruction in body.values():
            operation = instruction.operation
            if operation in CALLS:
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
                called = count(instruction.called(CALLS[operation]))
                kernels += called.kernels * (int(trips[1]) if trips else 1)
                moved += called.bytes * (int(trips[1]) if trips else 1)
            elif operation not in FREE and not operation.endswith("-done"):
                kernels += 1
                moved += instruction.bytes
                if operation == "fusion":
                    fused = bodies[instruction.called("calls")]
                    moved += sum(bytes_read(fused, name) for name in fused if fused[name].operation == "parameter")
                else:
                    moved += sum(body[name].bytes for name in instruction.operands)
        return Launches(kernels, moved)

    return count(entry)


def bytes_read(fused: dict[str, Instruction], name: str) -> int:
    """Returns how much of a value the instructions of a fusion read."""
    whole, read = fused[name].bytes, 0
    for user in fused.values():
        if name in user.operands:
            match user.operation:
                case "bitcast":
                    read += bytes_read(fused, user.name)
                case "slice" | "dynamic-slice" | "gather":
                    read += user.bytes
                case _:
                    return whole
    return min(whole, read)


def bytes_of(kind: str) -> int:
    """Returns the bytes of a type of HLO, an array or a tuple of them."""
    total = 0
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", kind):
        bits = re.search(r"\d+", dtype)  # none in pred
        total += int(np.prod([int(size) for size in shape.split(",") if size])) * (int(bits[0]) if bits else 8) // 8
    return total


def find_h100() -> jax.Device:
    """Returns an H100 to compile for.

    Raises:
      SystemExit: if JAX's plugin for CUDA is not installed.
    """
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=DESCRIPTION.read_text()
        )
    except NotImplementedError as error:
        raise SystemExit(
            "Compiling for an H100 needs JAX's plugin for CUDA (but no GPU): pip install 'jax[cuda12]'"
        ) from error
    return topology.devices[0]


def cpu_seconds() -> float:
    """Returns what processors have spent on this process, and on the assemblers that XLA has called."""
    return sum(os.times()[:4])


def measure(name: str, method: str, device: jax.Device) -> Kernels:
    """Compiles a training step for a device."""
    network, batch_size, *_ = CASES[name]
    init, step, batch = steps.make_training(network, steps.METHODS[method], batch_size, jnp.dtype("float32"))
    sharding = SingleDeviceSharding(device)

    def on_device(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    arguments = jax.tree.map(on_device, (jax.eval_shape(init), *batch))
    lowered = jax.jit(step, donate_argnums=0).lower(*arguments)
    start = cpu_seconds()
    compiled = lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"})
    seconds = cpu_seconds() - start
    kernels, moved = count_launches(compiled.as_text() or "")
    return Kernels(
        name, batch_size, method, kernels, moved / 1e9, seconds, device.device_kind, jax.__version__, runs.commit()
    )


def cells(row: Kernels, rows: Sequence[Kernels]) -> list[str]:
    """Returns a row of the table, of those of one network."""
    counts = {other.method: other.kernels for other in rows}
    bar = CASES[row.network].bar_of(row.method, counts)
    shown = "" if np.isnan(bar) else f"{'' if row.kernels <= bar else 'over '}{bar:,.0f}"
    return [row.method, f"{row.kernels:,}", shown, f"{row.gigabytes:.3g}", f"{row.compile_seconds:.1f}"]


def main(argv: list[str] | None = None) -> list[Kernels]:
    """Compiles the chosen steps, replaces their rows in the CSV file and prints them."""
    parser = programs.Parser(
        description="Counts the kernels that training steps launch on an H100, without one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--networks", nargs="+", choices=list(CASES), default=list(CASES), help="which")
    option("--methods", nargs="+", choices=report.KERNELS_METHODS, default=report.KERNELS_METHODS, help="which")
    option("--results", type=programs.folder, default=str(runs.RESULTS), metavar="DIR", help="where kernels.csv goes")
    args = parser.parse_args(argv)
    device = find_h100()
    with programs.progress() as progress:
        task = progress.add_task("compiling", unit="networks")
        for name in progress.track(args.networks, task_id=task):
            methods = [method for method in args.methods if method in CASES[name].network.methods]
            rows = report.replace(args.results / "kernels.csv", [measure(name, method, device) for method in methods])
    for case, own in report.by_case(rows):
        lines = [cells(row, own) for row in own]
        programs.show(report.make_table(case, ("method", "kernels", "bar", "GB", "CPU s to compile"), lines))
    return rows


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # for all that is not compiled for the H100
    jax.config.update("jax_enable_compilation_cache", False)
    programs.start(main)
