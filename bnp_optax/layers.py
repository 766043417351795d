"""Which parameters form a linear layer, and how to see them in one canonical shape.

Every kernel is seen as ``[stack, group, input, window, output]``, its bias as
``[stack, group, output]`` and the moments of its input as ``[stack, group, input]``, so that
the preconditioner is one formula for every kind of layer. The axes are

* *stack*: independent copies of the layer that live in one array,
* *group*: the groups of a grouped convolution (1 elsewhere),
* *input*, *output*: the features that one group reads and writes,
* *window*: the positions of a convolution's window (1 elsewhere). It comes after the inputs, as XLA
  for CPUs has it in the gradient of a convolution, which then needs no copy in another order.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from bnp_optax.table import table

Path = tuple[str, ...]

NOT_CALLED, NOT_SELECTED = "not called in this pass", "not selected"

_LIFTED = "0123456789"
_ORDER = _LIFTED + "sgiwo"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A kernel or bias: where the user's tree holds it, and how its axes become the canonical ones.

    The array of shape ``shape`` is first reshaped to ``split``, whose axes play one role each;
    axes of equal role are then gathered, in their order, and merged.

    Attributes:
      path: its path in the parameters.
      shape: its shape there.
      split: that shape with every axis that plays several roles split into its factors.
      roles: one letter for every axis of ``split``: ``s`` stack, ``g`` group, ``w`` window,
        ``i`` input, ``o`` output; digits are stack axes that the model's transforms (`scan`,
        `vmap`) added, ``0`` by the outermost.

    Raises:
      ValueError: if ``split`` is not a splitting of ``shape`` with one role an axis.

    Example:
      >>> import jax.numpy as jnp
      >>> grouped_conv = Parameter(("kernel",), (3, 3, 4, 16), split=(3, 3, 4, 2, 8), roles="wwigo")
      >>> grouped_conv.to_canonical(jnp.zeros((3, 3, 4, 16))).shape
      (1, 2, 4, 9, 8)
    """

    path: Path
    shape: tuple[int, ...]
    split: tuple[int, ...]
    roles: str

    def __post_init__(self) -> None:
        if (
            math.prod(self.shape) != math.prod(self.split)
            or len(self.split) != len(self.roles)
            or not set(self.roles) <= set(_ORDER)
        ):
            raise ValueError(
                f"{self.name}: shape {self.shape} cannot be split into {self.split} with roles {self.roles!r}. The "
                "sizes must multiply to the same number, each axis of split having one role: s, g, w, i, o, a digit."
            )

    @property
    def name(self) -> str:
        """The path joined by ``/``."""
        return "/".join(self.path)

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def axis_size(self, roles: str) -> int:
        """Returns the product of the sizes of the axes with any of these roles; 1 where there are none."""
        return math.prod(n for n, role in zip(self.split, self.roles, strict=True) if role in roles)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The stack's sizes: one an axis that the model's transforms added, outermost first, then its own."""
        return (*(self.axis_size(digit) for digit in _LIFTED if digit in self.roles), self.axis_size("s"))

    def lift(self, axis: int, size: int) -> "Parameter":
        """Returns the parameter as it is outside a transform that stacks it.

        Args:
          axis: where the transform puts the new axis in the parameter's shape; not negative.
          size: the size of the axis.
        """
        shape = (*self.shape[:axis], size, *self.shape[axis:])
        before = math.prod(self.shape[:axis])
        at = next(k for k in range(len(self.split) + 1) if math.prod(self.split[:k]) == before)
        roles = "".join(str(int(role) + 1) if role in _LIFTED else role for role in self.roles)
        split = (*self.split[:at], size, *self.split[at:])
        return dataclasses.replace(self, shape=shape, split=split, roles=f"{roles[:at]}0{roles[at:]}")

    def to_canonical(self, array: jax.Array) -> jax.Array:
        """Returns the parameter, or its gradient, in canonical shape."""
        rest = "giwo" if "i" in self.roles else "go"
        shape = [math.prod(self.stack_shape), *(self.axis_size(role) for role in rest)]
        return array.reshape(self.split).transpose(self._order).reshape(shape)

    def from_canonical(self, array: jax.Array) -> jax.Array:
        """Returns the array of shape ``shape`` whose canonical form is ``array``."""
        gathered = array.reshape([self.split[axis] for axis in self._order])
        inverse = [self._order.index(axis) for axis in range(len(self._order))]
        return gathered.transpose(inverse).reshape(self.shape)

    @property
    def _order(self) -> list[int]:
        return sorted(range(len(self.roles)), key=lambda axis: _ORDER.index(self.roles[axis]))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer of a model: its parameters, and where its input is recorded.

    Attributes:
      kind: what the layer is, for the reader ("Dense", "Conv", ...).
      kernel: its kernel.
      bias: its bias, ``None`` for a layer without one.
      record: the name among the records of its :class:`~bnp_optax.InputMoments`, mostly its own path.
      record_axes: the leading axes that the model's own transforms add to that record, outermost
        first: ``s`` an axis of the kernel's stack, ``r`` repeated calls (time steps), ``e`` examples if the input that
        is recorded has no axis of them, and repeated calls otherwise.
      calls: how often the pass that found it calls it.
      examples: N of that pass, ``None`` if unknown. Neither makes another layer of it: they are not compared.

    Example:
      >>> layer = Layer.dense(("encoder", "kernel"), (784, 100), bias=("encoder", "bias"))
      >>> layer.path, layer.fan_in, layer.moments_shape
      ('encoder', 784, (1, 1, 784))
    """

    kind: str
    kernel: Parameter
    bias: Parameter | None
    record: str
    record_axes: str = ""
    calls: int = dataclasses.field(default=1, compare=False)
    examples: int | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def dense(
        cls, kernel: Path, shape: tuple[int, int], bias: Path | None = None, record: str | None = None
    ) -> "Layer":
        """Describes ``h @ kernel + bias`` of any JAX code.

        Args:
          kernel: the kernel's path in the parameters.
          shape: the kernel's shape, ``(inputs, outputs)``.
          bias: the path of the bias, of shape ``(outputs,)``, if there is one.
          record: the name of the record of the layer's input; by default the layer's own path.

        Returns:
          The layer.
        """
        return cls(
            kind="Dense",
            kernel=Parameter(kernel, shape, split=shape, roles="io"),
            bias=None if bias is None else Parameter(bias, shape[1:], split=shape[1:], roles="o"),
            record=layer_name(kernel) if record is None else record,
        )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The kernel, and the bias if there is one."""
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias)

    @property
    def path(self) -> str:
        """The kernel's name without a final ``/kernel``."""
        return layer_name(self.kernel.path)

    @property
    def fan_in(self) -> int:
        """F, how many inputs one output unit sees: window size times input channels of its group."""
        return self.kernel.axis_size("w") * self.kernel.axis_size("i")

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """The shape ``(stack, group, input)`` of the moments of the layer's input."""
        return math.prod(self.kernel.stack_shape), self.kernel.axis_size("g"), self.kernel.axis_size("i")


def layer_name(kernel: Path) -> str:
    """Returns the name of the layer that has this kernel: its path without a final ``kernel``."""
    return "/".join(kernel).removesuffix("/kernel")


@dataclasses.dataclass(frozen=True)
class Excluded:
    """A parameter whose gradient passes unchanged.

    Attributes:
      path: its path in the parameters.
      shape: its shape.
      reason: why it is not preconditioned.
    """

    path: Path
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Layers(Mapping[str, Layer]):
    """The layers to precondition, by path, and the parameters that are excluded.

    Immutable and hashable, so that it can be a static argument. ``print(layers)`` shows a table.

    Attributes:
      included: the layers to precondition, in the order in which the model calls them.
      excluded: the parameters that pass unchanged, each with the reason.
      complete: whether these are all parameters that there are, as ``find_layers`` says: then ``init`` refuses a tree
        that holds others. Of layers made by hand, others pass unchanged.

    Raises:
      ValueError: if two layers claim the same parameter.

    Example:
      >>> layers = Layers((
      ...     Layer.dense(("hidden", "kernel"), (8, 4), bias=("hidden", "bias")),
      ...     Layer.dense(("out", "kernel"), (4, 2)),
      ... ))
      >>> list(layers), layers["hidden"].fan_in
      (['hidden', 'out'], 8)
      >>> print(layers.select(lambda layer: layer.path != "out"))
      layer   kind   kernel  fan-in  covers        parameters
      hidden  Dense     8x4       8  kernel, bias          36
      <BLANKLINE>
      Excluded: not selected
        out/kernel  4x2
      <BLANKLINE>
      1 layer covers 36 of 44 parameters (81.8%).
    """

    included: tuple[Layer, ...]
    excluded: tuple[Excluded, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        claims = collections.Counter(parameter.name for layer in self.included for parameter in layer.parameters)
        if twice := [name for name, count in claims.items() if count > 1]:
            raise ValueError(f"Two layers claim the same parameter: {', '.join(twice)}. Each belongs to one layer.")

    @functools.cached_property
    def _by_path(self) -> dict[str, Layer]:
        return {layer.path: layer for layer in self.included}

    @functools.cached_property
    def records(self) -> frozenset[str]:
        """The names of the layers' records."""
        return frozenset(layer.record for layer in self.included)

    def __getitem__(self, path: str) -> Layer:
        if path not in self._by_path:
            raise KeyError(f"no layer is {path}, but there are {', '.join(self)}")
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self.included)

    def select(self, predicate: Callable[[Layer], bool]) -> "Layers":
        """Keeps the layers for which the predicate holds; the others are excluded.

        Args:
          predicate: called with each :class:`Layer`.

        Returns:
          A new :class:`Layers`.
        """
        chosen = tuple(layer for layer in self.included if predicate(layer))
        kept = {layer.path for layer in chosen}
        dropped = tuple(
            Excluded(parameter.path, parameter.shape, NOT_SELECTED)
            for layer in self.included
            if layer.path not in kept
            for parameter in layer.parameters
        )
        return Layers(chosen, self.excluded + dropped, self.complete)

    def under(self, *keys: str) -> "Layers":
        """Returns the layers as they are in a tree that holds their parameters beneath these keys.

        The names of layers and records change alike, so that ``intermediates`` hold the records beneath the same keys.

        Args:
          *keys: the keys, outermost first.

        Returns:
          A new :class:`Layers`.

        Example:
          >>> layers = Layers((Layer.dense(("Dense_0", "kernel"), (8, 4)),))
          >>> list(layers.under("policy", "params") | layers.under("value", "params"))
          ['policy/params/Dense_0', 'value/params/Dense_0']
        """
        keys = tuple(map(str, keys))

        def move(parameter: Parameter) -> Parameter:
            return dataclasses.replace(parameter, path=(*keys, *parameter.path))

        included = (
            dataclasses.replace(
                layer,
                kernel=move(layer.kernel),
                bias=None if layer.bias is None else move(layer.bias),
                record=layer_name((*keys, layer.record)),
            )
            for layer in self.included
        )
        excluded = (dataclasses.replace(other, path=(*keys, *other.path)) for other in self.excluded)
        return Layers(tuple(included), tuple(excluded), self.complete)

    def __or__(self, other: Mapping[str, Layer]) -> "Layers":
        """Returns the layers of both: of two networks in one tree, or of two methods of one model.

        A layer that both include is one. What one includes and the other excludes is included if it was not called
        there, or not selected, and excluded if it could not be preconditioned.
        """
        if not isinstance(other, Layers):
            return NotImplemented
        both = dict.fromkeys(self.included + other.included)
        differing = [
            layer.path for layer in self.included if layer.path in other and other[layer.path].kernel != layer.kernel
        ]
        if differing:
            raise ValueError(
                f"Both have a layer {differing[0]}, of other shapes: these are two models. Say where each has its "
                "parameters, a.under(...) | b.under(...)."
            )
        several = [
            Excluded(parameter.path, parameter.shape, "called in several ways")
            for layer in self.included
            if layer.path in other and other[layer.path] != layer
            for parameter in layer.parameters
        ]
        reasons = {each.path: each for each in (*other.excluded, *self.excluded, *several)}
        barred = {path for path, each in reasons.items() if each.reason not in (NOT_CALLED, NOT_SELECTED)}
        included = tuple(layer for layer in both if not any(parameter.path in barred for parameter in layer.parameters))
        covered = {parameter.path for layer in included for parameter in layer.parameters}
        excluded = tuple(each for path, each in reasons.items() if path not in covered)
        return Layers(included, excluded, self.complete and other.complete)

    def __str__(self) -> str:
        rows = []
        for layer in self.included:
            names = ", ".join(parameter.path[-1] for parameter in layer.parameters)
            if layer.calls > 1:
                names += f", called {layer.calls} times"
            size = sum(parameter.size for parameter in layer.parameters)
            rows.append((layer.path, layer.kind, layer.kernel.shape, layer.fan_in, names, size))
        excluded = [("/".join(other.path), other.shape, other.reason) for other in self.excluded]
        return table(rows, excluded) + self._examples()

    def _examples(self) -> str:
        """Says what was taken for N, the examples of a batch."""
        by_number = collections.defaultdict(list)
        for layer in self.included:
            if layer.examples is not None:
                by_number[layer.examples].append(layer.path)
        if not by_number:
            return ""
        common, *others = sorted(by_number, key=lambda number: -len(by_number[number]))
        but = "".join(f", but {number:,} of {', '.join(by_number[number])}" for number in others)
        return f"\nN, the examples of a batch, is the first axis of a layer's input: {common:,} here{but}."


def check_layers(layers: Any) -> None:
    """Checks what a transformation was given as its layers.

    Raises:
      TypeError: if it is something else.
      ValueError: if it holds none.
    """
    if not isinstance(layers, Layers):
        raise TypeError(
            "layers must be a bnp_optax.Layers, as linen.find_layers(model, x) returns it, not "
            f"{type(layers).__name__}."
        )
    if not layers:
        raise ValueError(
            "layers holds no layer to act on: all updates would pass as they are. print(layers) says why each "
            "parameter is excluded."
        )
