"""What a search for layers leaves in the calls of a model, for Linen and NNX alike, and what it notes of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax.counting import Counting
from bnp_optax.dataflow import either, mark, primal
from bnp_optax.layers import Path, layer_name
from bnp_optax.layouts import BESIDE, LAYERS, Layout, Product
from bnp_optax.moments import InputMoments
from bnp_optax.records import moments_of, pool_records

# Which calls a search is to see: a function of their site.
Watch = Callable[[Path], bool]

EXPLICIT = "applied with explicit parameters, where its input is not recorded"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernel", "bias", "record", "x", "y", "token", "axes"),
    meta_fields=("site", "kind", "layout", "examples", "calls"),
)
@dataclasses.dataclass(frozen=True)
class Call:
    """A layer as it was called, stored in the place of its record.

    Attributes:
      site: the path of its module, and the kernel's name there.
      kind: the module's class.
      layout: its axis roles, or why its calls are no layer.
      examples: how many examples its input has, ``None`` if it has no axis of them.
      calls: how often it was called; 0 in a search that does not count, as branches may differ in it.
      kernel: its kernel; of several calls :func:`~bnp_optax.dataflow.either`, one array only if all have the same.
      bias: its bias, if it has one, likewise.
      record: the record of its input, ``None`` if it is not to be recorded.
      x: its input, ``None`` if the product is with something made of it; of several calls the first's, as ``y``.
      y: what has to be the sum of the product and the bias, or the kernel itself; ``None`` if that is not known.
      token: the sum of the marks of all calls, if they are marked: one whose mark is in the program but not in this sum
        has lost its record.
      axes: arrays of shape ``(2,)`` and ``(3,)``, which are the last axes outside the transforms
        only if all these add their axis in front.
    """

    site: Path
    kind: str
    layout: Layout | str
    examples: int | None
    calls: int
    kernel: Any
    bias: Any
    record: InputMoments | None
    x: Any
    y: Any
    token: Any
    axes: tuple[Any, ...]

    def pooled_with(self, earlier: "Call | None") -> "Call":
        """Returns what stands for this call and earlier ones of the same layer."""
        if earlier is None:
            return self
        if earlier.record is None or self.record is None:
            return earlier
        if self.layout != earlier.layout or _kinds(self) != _kinds(earlier):
            return dataclasses.replace(earlier, layout="called in several ways")
        if self.record.total.shape != earlier.record.total.shape:
            return dataclasses.replace(
                earlier, layout="called both inside and outside of a transform that adds an axis"
            )
        return dataclasses.replace(
            earlier,
            record=pool_records(earlier.record, self.record, layer_name(self.site)),
            calls=earlier.calls + self.calls,
            kernel=either(earlier.kernel, self.kernel),
            bias=None if self.bias is None else either(earlier.bias, self.bias),
            token=None if self.token is None else earlier.token + self.token,
        )


def _kinds(call: Call) -> list[Any]:
    return [None if array is None else array.dtype for array in (call.kernel, call.bias)]


@dataclasses.dataclass
class Log:
    """What a search has seen.

    Attributes:
      seen: the sites of calls, whether these came out or not, in their order, each with the paths in the module of the
        parameters that the call read.
      reasons: why parameters are excluded that are no layer's, by their path or that of their module.
      counts: whether calls are counted.
      explicit: how many calls with explicit parameters it has seen.
      marks: how many calls it has marked.
    """

    seen: dict[Path, list[Path]] = dataclasses.field(default_factory=dict)
    reasons: dict[Path, str] = dataclasses.field(default_factory=dict)
    counts: bool = False
    explicit: int = 0
    marks: int = 0

    def note(
        self, path: Path, module: Any, product: Product, parameters: Mapping[str, jax.Array], watch: Watch
    ) -> Call | None:
        """Notes what a module multiplies, and returns the call that is to be left, if any is.

        Args:
          path: the module's.
          module: it.
          product: an input and one of its parameters.
          parameters: its parameters by name, as they are inside the transforms around the call.
          watch: whether a call at some site is to be left at all.
        """
        site = (*path, product.kernel)
        read = [(*path, name) for name in (product.kernel, product.bias) if name is not None]
        if isinstance(module, tuple(LAYERS)):
            self.reasons[path] = BESIDE  # of what a subclass adds
        if not isinstance(product.layout, Layout):
            self.reasons |= dict.fromkeys(read if product.kernel in parameters else [path], product.layout)
            return None
        self.seen[site] = read
        if not watch(site):
            return None
        name = layer_name(site)
        x_is_traced = product.is_of_x and isinstance(product.x, jax.core.Tracer)
        return Call(
            site,
            type(module).__name__,
            product.layout,
            examples=product.layout.examples(product.x),
            calls=int(self.counts),
            kernel=primal(parameters[product.kernel]),
            bias=None if product.bias is None else primal(parameters[product.bias]),
            record=moments_of(Counting(), product.layout, product.x, name, name),
            x=primal(product.x) if x_is_traced else None,
            y=primal(product.y),
            token=None,
            axes=(jnp.zeros(2), jnp.zeros(3)),
        )

    def marked(self, call: Call) -> Call:
        """Returns a call with a mark in the program, for an API in which its record may get lost without an error."""
        self.marks += 1
        return dataclasses.replace(call, token=mark(f"{self.marks}:{'/'.join(call.site)}"))


def explicit_call(site: Path, product: Product, parameters: Mapping[str, jax.Array]) -> Call:
    """Returns what a call with explicit parameters leaves: these alone, which come out of any transform."""
    kernel = primal(parameters[product.kernel])
    bias = None if product.bias is None else primal(parameters[product.bias])
    return Call(site, "", EXPLICIT, None, 0, kernel, bias, None, None, None, token=None, axes=())


@dataclasses.dataclass(eq=False)
class Finder:
    """What leaves each call in the place of its record.

    Attributes:
      watch: which calls it leaves.
      log: where it notes them.
      counting: ``None``, as no record is made.
    """

    watch: Watch
    log: Log
    counting: None = None
