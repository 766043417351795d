"""Trace an array that a program returns back to the input that it is.

The walk goes from an output of a jaxpr to the equation that made it, and on to that equation's input, as long as
nothing is computed; on the way it keeps which axis is which. Take a kernel that ``nn.scan`` scans along its axis 1::

    { lambda ; w:f32[3,5,4] ... . let
        t:f32[5,3,4] = transpose[permutation=(1, 0, 2)] w
        ... k:f32[5,3,4] = scan[ { lambda ; c  w_step:f32[3,4] . let ... in (..., w_step) } ] ... t
      in (k) }

``k`` is made by the scan. In its body the output is the input ``w_step``, a slice of what is scanned, so that ``k`` is
the scan's input ``t`` with all axes in their order, ``(0, 1, 2)``. ``t`` is ``w`` with the axes ``(1, 0, 2)``. Put
together: the axes of ``k`` are the axes ``(1, 0, 2)`` of ``w``. Were ``w[3,4]`` a constant of the loop, the scan would
stack copies of it: axes ``("loop", 0, 1)``.
"""

from typing import Any, NamedTuple

from jax.extend import core

LOOPED, MAPPED = "loop", "map"


class Origin(NamedTuple):
    """That an array is another one as a whole, its axes moved and some added along which it repeats.

    Attributes:
      source: which of the inputs it is.
      axes: for each of its axes that of the source, or ``LOOPED`` or ``MAPPED`` for one along
        which a scan or a vmap repeats it.
    """

    source: int
    axes: tuple[int | str, ...]


class Dataflow:
    """Finds out which input of a jaxpr an array is."""

    def __init__(self) -> None:
        self._producers: dict[int, tuple[core.Jaxpr, dict[Any, Any]]] = {}

    def origin(self, jaxpr: core.Jaxpr, var: Any) -> Origin | None:
        """Returns where a variable of a jaxpr comes from, ``None`` if it is computed."""
        if isinstance(var, core.Literal):
            return None
        producer = self._producers_in(jaxpr).get(var)
        if producer is None or isinstance(producer, int):
            return None if producer is None else Origin(producer, tuple(range(len(_shape(var)))))
        eqn, output = producer
        if (step := self._step(eqn, output)) is None:
            return None
        if (operand := self.origin(jaxpr, eqn.invars[step.source])) is None:
            return None
        return Origin(operand.source, _compose(step.axes, operand.axes))

    def _producers_in(self, jaxpr: core.Jaxpr) -> dict[Any, Any]:
        """Maps each variable to its number among the inputs, or to its equation and number among the outputs."""
        if id(jaxpr) not in self._producers:
            table: dict[Any, Any] = {var: k for k, var in enumerate(jaxpr.invars)}
            table |= {var: (eqn, k) for eqn in jaxpr.eqns for k, var in enumerate(eqn.outvars)}
            self._producers[id(jaxpr)] = jaxpr, table  # with the jaxpr, so that its id stays its own
        return self._producers[id(jaxpr)][1]

    def _step(self, eqn: core.JaxprEqn, output: int) -> Origin | None:
        """Returns where an output of an equation comes from among the equation's inputs."""
        shape = _shape(eqn.outvars[output])
        axes = range(len(shape))
        match eqn.primitive.name:
            case "transpose":
                return Origin(0, tuple(eqn.params["permutation"]))
            case "broadcast_in_dim":
                kept = [int(axis) for axis in eqn.params["broadcast_dimensions"]]
                if tuple(shape[axis] for axis in kept) != _shape(eqn.invars[0]):
                    return None
                return Origin(0, tuple(kept.index(axis) if axis in kept else MAPPED for axis in axes))
            case "convert_element_type" | "copy" | "sharding_constraint":
                return Origin(0, tuple(axes))
            case "scan":
                return self._through_scan(eqn, output)
            case "cond":
                first, *others = (
                    self.origin(branch.jaxpr, branch.jaxpr.outvars[output]) for branch in eqn.params["branches"]
                )
                same = all(other == first for other in others)
                return Origin(first.source + 1, first.axes) if first is not None and same else None
        return self._through_call(eqn, output)

    def _through_call(self, eqn: core.JaxprEqn, output: int) -> Origin | None:
        """For an equation that evaluates one jaxpr on its inputs: `jit`, `remat`, a function with a custom rule."""
        inner = [getattr(param, "jaxpr", param) for param in eqn.params.values()]
        inner = [jaxpr for jaxpr in inner if isinstance(jaxpr, core.Jaxpr)]
        if len(inner) != 1 or _shapes(inner[0]) != _shapes(eqn):
            return None
        return self.origin(inner[0], inner[0].outvars[output])

    def _through_scan(self, eqn: core.JaxprEqn, output: int) -> Origin | None:
        body, num_consts, num_carry = eqn.params["jaxpr"].jaxpr, eqn.params["num_consts"], eqn.params["num_carry"]
        if (inner := self.origin(body, body.outvars[output])) is None:
            return None
        scanned = inner.source >= num_consts + num_carry
        carried = inner.source - num_consts if not scanned and inner.source >= num_consts else None
        if carried is not None and self.origin(body, body.outvars[carried]) != Origin(
            inner.source, tuple(range(len(_shape(body.invars[inner.source]))))
        ):
            return None  # the loop changes it
        if output < num_carry:
            return None if scanned else inner
        if scanned:
            return Origin(inner.source, (0, *(axis + 1 if isinstance(axis, int) else axis for axis in inner.axes)))
        return Origin(inner.source, (LOOPED, *inner.axes))


def _compose(axes: tuple[int | str, ...], operand: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return tuple(operand[axis] if isinstance(axis, int) else axis for axis in axes)


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


def _shapes(jaxpr: core.Jaxpr | core.JaxprEqn) -> list[tuple[int, ...]]:
    return [_shape(var) for var in (*jaxpr.invars, *jaxpr.outvars)]
