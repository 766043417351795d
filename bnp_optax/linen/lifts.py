"""Which axes the transforms inside a Linen model (`nn.scan`, `nn.vmap`) add to a variable.

Flax tells a variable that is boxed as axis metadata about every axis that a transform adds to it. While a
model's ``init`` is traced, boxes around a layer's parameters and around a mark in the place of its
record therefore log these axes, with nothing guessed from shapes.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from bnp_optax.layers import Path


class Lift(NamedTuple):
    """One axis that a transform added.

    Attributes:
      transform: identifies the transform, among those around one layer.
      axis: where it put the axis.
      size: the axis's size.
    """

    transform: int
    axis: int
    size: int


class AxisLog:
    """What became known, while one model was traced, about the transforms around its layers."""

    def __init__(self) -> None:
        self._traces: list[Any] = []
        self.stacked: set[tuple[Path, int]] = set()
        self.mapped: dict[Path, set[int]] = {}

    def current_transform(self) -> int:
        """Identifies the transform that is just adding axes by the trace around it, which nested ones do not share."""
        trace = get_opaque_trace_state(convention="bnp_optax")
        if trace not in self._traces:
            self._traces.append(trace)
        return self._traces.index(trace)

    def watch_vmap(self, kernel: Path, x: jax.Array) -> jax.Array:
        """Returns a number that depends on ``x``; the sizes over which `vmap` maps ``x`` are noted for the kernel."""

        @jax.custom_batching.custom_vmap
        def probe(number: jax.Array) -> jax.Array:
            return number

        @probe.def_vmap
        def note(axis_size: int, in_batched: list[bool], number: jax.Array) -> tuple[jax.Array, bool]:
            self.mapped.setdefault(kernel, set()).add(axis_size)
            return probe(number), in_batched[0]

        number: jax.Array = probe(jnp.sum(x))
        return number

    def roles(self, kernel: Path, record: "Logged", has_examples: bool) -> str:
        """Returns the roles of the axes that the transforms add to a layer's record, outermost first.

        Args:
          kernel: the kernel's path.
          record: the mark in the place of the record.
          has_examples: whether the layer's own input has an axis of examples. If not, an axis over
            which `vmap` maps it is that.

        Returns:
          For each axis ``s`` where the kernel is stacked too, ``e`` examples, ``r`` repeated calls.
        """
        roles = ["s" if (kernel, lift.transform) in self.stacked else "r" for lift in record.outermost_first]
        for k, lift in enumerate(record.outermost_first):
            if not has_examples and roles[k] == "r" and lift.size in self.mapped.get(kernel, ()):
                roles[k] = "e"
                break
        return "".join(roles)


@jax.tree_util.register_pytree_node_class
class Logged(nn.meta.AxisMetadata[Any]):
    """A variable whose added axes are logged.

    Attributes:
      value: the variable, boxed or not.
      log: where to log.
      kernel: the kernel's path if the variable is a parameter, ``None`` if it marks a record.
      added: the axes added so far, innermost first.
    """

    def __init__(self, value: Any, log: AxisLog, kernel: Path | None, added: tuple[Lift, ...] = ()) -> None:
        self.value, self.log, self.kernel, self.added = value, log, kernel, added

    @property
    def outermost_first(self) -> tuple[Lift, ...]:
        """The axes added, outermost first."""
        return self.added[::-1]

    def unbox(self) -> Any:
        """Returns the variable."""
        return self.value

    def replace_boxed(self, val: Any) -> "Logged":
        """Returns the box around another value."""
        return Logged(val, self.log, self.kernel, self.added)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Logged":
        """Logs an axis that a transform has just added."""
        transform = self.log.current_transform()
        if self.kernel is not None:
            self.log.stacked.add((self.kernel, transform))
        shape = jnp.shape(nn.unbox(self.value))
        axis = index % len(shape)
        value = nn.meta.add_axis(self.value, index, params)
        return Logged(value, self.log, self.kernel, (*self.added, Lift(transform, axis, shape[axis])))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Logged":
        """Forgets the axis that was added last."""
        return Logged(nn.meta.remove_axis(self.value, index, params), self.log, self.kernel, self.added[:-1])

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """Returns the variable as the only child."""
        return (self.value,), (self.log, self.kernel, self.added)

    @classmethod
    def tree_unflatten(cls, static: Any, children: tuple[Any]) -> "Logged":
        """Returns the box around a child."""
        return cls(*children, *static)
