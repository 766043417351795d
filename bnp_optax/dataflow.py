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

A second walk (:meth:`Dataflow.terms`) goes back from what a layer returns, through sums and changes of shape, to the
products that it is a sum of. Of ``x @ w + b`` it finds the product of ``x`` and ``w``, and the term ``b``; of
``x @ (0.1 * w) + b`` that ``0.1 * w`` is a factor, which is not ``w``.
"""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

LOOPED, MAPPED = "loop", "map"

_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
# What keeps every number, or leaves some out, and puts them elsewhere.
_MOVES = {
    "transpose", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "rev", "slice", "pad", "concatenate", "copy",
    "convert_element_type", "sharding_constraint", "reshard", "optimization_barrier", "name",
}  # fmt: skip
_SUMS = {"add", "add_any", "reduce_sum"}
_PRIMAL = "bnp_optax.primal"
_EITHER = "bnp_optax.either"
_MARK = "bnp_optax.mark:"

# A variable, with the jaxpr that it is of.
Root = tuple[core.Jaxpr, Any]
Roots = frozenset[Root]


class Terms(NamedTuple):
    """What a variable is the sum of.

    Attributes:
      terms: the roots of its terms.
      products: of each product among them the roots of its factors.
    """

    terms: set[Root]
    products: set[frozenset[Root]]


class Origin(NamedTuple):
    """That an array is another one as a whole, its axes moved and some added along which it repeats.

    Attributes:
      source: which of the inputs it is.
      axes: for each of its axes that of the source, or ``LOOPED`` or ``MAPPED`` for one along
        which a scan or a vmap repeats it.
    """

    source: int
    axes: tuple[int | str, ...]


Origins = frozenset[Origin | None]  # None for an array that is computed
_COMPUTED: Origins = frozenset({None})


class Dataflow:
    """Finds out which input of a jaxpr an array is."""

    def __init__(self) -> None:
        self._producers: dict[int, tuple[core.Jaxpr, dict[Any, Any]]] = {}

    def origin(self, jaxpr: core.Jaxpr, var: Any) -> Origin | None:
        """Returns where a variable of a jaxpr comes from, ``None`` if it is computed, or from one place or another."""
        origins = self._origins(jaxpr, var)
        return next(iter(origins)) if len(origins) == 1 else None

    def _origins(self, jaxpr: core.Jaxpr, var: Any) -> Origins:
        """Returns where a variable may come from: one a branch, which may turn out to be the same farther out."""
        if isinstance(var, core.Literal):
            return _COMPUTED
        producer = self._producers_in(jaxpr).get(var)
        if producer is None or isinstance(producer, int):
            return _COMPUTED if producer is None else frozenset({Origin(producer, tuple(range(len(_shape(var)))))})
        eqn, output = producer
        if _is_named(eqn, _PRIMAL):
            return self._origins(*self._unstopped(jaxpr, eqn.invars[0]))
        if (cases := self._cases(jaxpr, var)) != [var]:
            return frozenset().union(*(self._origins(jaxpr, case) for case in cases))
        found = set[Origin | None]()
        for step in self._steps(eqn, output):
            for operand in _COMPUTED if step is None else self._origins(jaxpr, eqn.invars[step.source]):
                found.add(step and operand and Origin(operand.source, _compose(step.axes, operand.axes)))
        return frozenset(found)

    def roots(self, jaxpr: core.Jaxpr, var: Any) -> Roots:
        """Returns the variables whose numbers this one holds, moved but not computed with: one, or one a branch."""
        if isinstance(var, core.Literal):
            return frozenset()
        producer = self._producers_in(jaxpr).get(var)
        itself = frozenset({(jaxpr, var)})
        if not isinstance(producer, tuple):  # an input, or a constant
            return itself
        eqn, output = producer
        name = eqn.primitive.name
        if _is_named(eqn, _PRIMAL):
            return self.roots(*self._unstopped(jaxpr, eqn.invars[0]))
        if (cases := self._cases(jaxpr, var)) != [var]:
            return frozenset().union(*(self.roots(jaxpr, case) for case in cases))
        if name in _MOVES and jnp.issubdtype(var.aval.dtype, jnp.inexact) and _marked(eqn) is None:
            moved = {self.roots(jaxpr, operand) for operand in _moved(eqn, output)}
            return (moved.pop() if len(moved) == 1 else None) or itself
        inside = [self._outside(self.roots(body, body.outvars[output]), jaxpr, eqn, k) for body, k in _bodies(eqn)]
        return frozenset().union(*inside) if inside else itself

    def terms(self, jaxpr: core.Jaxpr, var: Any) -> Terms:
        """Takes a variable as a sum, and returns the roots of its terms, and of the factors of those that are products.

        Of ``x @ w + b`` it is ``{b}`` and ``{{x, w}}``; of ``x @ (0.1 * w)`` the second factor is the root ``0.1 * w``.
        """
        producer = None if isinstance(var, core.Literal) else self._producers_in(jaxpr).get(var)
        if isinstance(producer, tuple):
            eqn, output = producer
            name = eqn.primitive.name
            if name in _PRODUCTS:
                return Terms(set(), pairs(*(self.roots(jaxpr, operand) for operand in eqn.invars[:2])))
            if _is_named(eqn, _PRIMAL):
                return self.terms(*self._unstopped(jaxpr, eqn.invars[0]))
            if (name in _SUMS or name in _MOVES) and _marked(eqn) is None:
                return _union(self.terms(jaxpr, operand) for operand in _moved(eqn, output))
            if bodies := _bodies(eqn):
                return _union(self._terms_outside(body, output, jaxpr, eqn, first) for body, first in bodies)
        return Terms(set(self.roots(jaxpr, var)), set())

    def marks(self, jaxpr: core.Jaxpr, var: Any) -> set[str]:
        """Returns the names of the marks, made by :func:`mark`, that a variable is the sum of."""
        names, pending = set[str](), [var]
        while pending:
            var = pending.pop()
            eqn = self._producer(jaxpr, var)
            if eqn is not None and eqn.primitive.name in _SUMS:
                pending += eqn.invars
                continue
            makers = [self._producer(body, root) for body, root in self.terms(jaxpr, var).terms]
            names |= {name for maker in makers if maker is not None and (name := _marked(maker)) is not None}
        return names

    def _terms_outside(self, body: core.Jaxpr, output: int, jaxpr: core.Jaxpr, eqn: core.JaxprEqn, first: int) -> Terms:
        """Returns the terms of an output of an equation's body, as they are outside of it."""
        terms, products = self.terms(body, body.outvars[output])
        own = [k for k, var in enumerate(body.invars) if (body, var) in terms and not _is_carried(eqn, k)]
        outside = set[frozenset[Root]]()
        for factors in products:
            outside |= pairs(*(self._outside(frozenset({root}), jaxpr, eqn, first) for root in factors))
        inside = Terms(terms - {(body, body.invars[k]) for k in own}, outside)
        return _union([inside, *(self.terms(jaxpr, eqn.invars[k + first]) for k in own)])

    def _outside(self, roots: Roots, jaxpr: core.Jaxpr, eqn: core.JaxprEqn, first: int) -> Roots:
        """Returns the roots of a variable inside an equation's body, some of which may be inputs of the equation."""
        outside = set[Root]()
        for body, var in roots:
            own = body.invars.index(var) if var in body.invars else None
            if own is None or _is_carried(eqn, own):
                outside.add((body, var))
            else:
                outside |= self.roots(jaxpr, eqn.invars[own + first])
        return frozenset(outside)

    def _unstopped(self, jaxpr: core.Jaxpr, var: Any) -> Root:
        """Returns what :func:`primal` was given: a gradient inside the program has no ``stop_gradient`` to show."""
        eqn = self._producer(jaxpr, var)
        return jaxpr, eqn.invars[0] if eqn is not None and eqn.primitive.name == "stop_gradient" else var

    def _cases(self, jaxpr: core.Jaxpr, var: Any) -> list[Any]:
        """Returns what :func:`either` was given, again and again for many calls of a layer, or the variable itself."""
        cases, pending = [], [var]
        while pending:
            var = pending.pop()
            named = self._producer(jaxpr, var)
            selection = self._producer(jaxpr, named.invars[0]) if named and _is_named(named, _EITHER) else None
            if selection is None or selection.primitive.name != "select_n":
                cases.append(var)
            else:
                pending += selection.invars[1:]
        return cases

    def _producer(self, jaxpr: core.Jaxpr, var: Any) -> core.JaxprEqn | None:
        """Returns the equation that makes a variable, if one does."""
        producer = None if isinstance(var, core.Literal) else self._producers_in(jaxpr).get(var)
        return producer[0] if isinstance(producer, tuple) else None

    def _producers_in(self, jaxpr: core.Jaxpr) -> dict[Any, Any]:
        """Maps each variable to its number among the inputs, or to its equation and number among the outputs."""
        if id(jaxpr) not in self._producers:
            table: dict[Any, Any] = {var: k for k, var in enumerate(jaxpr.invars)}
            table |= {var: (eqn, k) for eqn in jaxpr.eqns for k, var in enumerate(eqn.outvars)}
            self._producers[id(jaxpr)] = jaxpr, table  # with the jaxpr, so that its id stays its own
        return self._producers[id(jaxpr)][1]

    def _steps(self, eqn: core.JaxprEqn, output: int) -> Origins:
        """Returns where an output of an equation may come from among the equation's inputs."""
        shape = _shape(eqn.outvars[output])
        axes = range(len(shape))
        match eqn.primitive.name:
            case "transpose":
                return frozenset({Origin(0, tuple(eqn.params["permutation"]))})
            case "broadcast_in_dim":
                kept = [int(axis) for axis in eqn.params["broadcast_dimensions"]]
                if tuple(shape[axis] for axis in kept) != _shape(eqn.invars[0]):
                    return _COMPUTED
                return frozenset({Origin(0, tuple(kept.index(axis) if axis in kept else MAPPED for axis in axes))})
            case "convert_element_type" | "copy" | "sharding_constraint":
                return frozenset({Origin(0, tuple(axes))})
        inside = [(self._origins(body, body.outvars[output]), body, first) for body, first in _bodies(eqn)]
        if eqn.primitive.name == "scan":
            ((origins, body, _),) = inside
            return frozenset(self._out_of_scan(eqn, body, output, origin) for origin in origins)
        outside = {origin and Origin(origin.source + first, origin.axes) for own, _, first in inside for origin in own}
        return frozenset(outside) if inside else _COMPUTED

    def _out_of_scan(self, eqn: core.JaxprEqn, body: core.Jaxpr, output: int, inner: Origin | None) -> Origin | None:
        """Returns where an output of a scan comes from, whose body has it from one of its own inputs."""
        if inner is None:
            return None
        num_consts, num_carry = _loop_numbers(eqn)
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


def made_in(closed: core.ClosedJaxpr) -> set[Any]:
    """Returns the variables that a program makes, not of what a transform inside it has left behind."""
    consts = zip(closed.jaxpr.constvars, closed.consts, strict=True)
    made = {*closed.jaxpr.invars, *(var for var, const in consts if not isinstance(const, jax.core.Tracer))}
    for eqn in closed.jaxpr.eqns:
        if all(isinstance(operand, core.Literal) or operand in made for operand in eqn.invars):
            made |= set(eqn.outvars)
    return made


def primal(tree: Any) -> Any:
    """Returns arrays that can leave a gradient inside a program, and that the walks take for the arrays themselves."""
    return jax.tree.map(lambda leaf: checkpoint_name(jax.lax.stop_gradient(leaf), _PRIMAL), tree)


def either(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns one of two arrays of equal shapes and dtypes, which the walks take for one if the two are the same."""
    chosen: jax.Array = checkpoint_name(jax.lax.select_n(jnp.array(False), a, b), _EITHER)
    return chosen


def mark(name: str) -> jax.Array:
    """Returns a number that marks where in a program it was made, to be found there and in what comes out of it."""
    made: jax.Array = checkpoint_name(jnp.zeros(()), f"{_MARK}{name}")
    return made


def marks_in(jaxpr: core.Jaxpr) -> set[str]:
    """Returns the names of all marks in a program, whether they come out of it or not."""
    names = {name for eqn in jaxpr.eqns if (name := _marked(eqn)) is not None}
    params = [param for eqn in jaxpr.eqns for param in eqn.params.values()]
    each = [one for param in params for one in (param if isinstance(param, list | tuple) else [param])]
    inside = [getattr(one, "jaxpr", one) for one in each]
    return names.union(*(marks_in(body) for body in inside if isinstance(body, core.Jaxpr)))


def _marked(eqn: core.JaxprEqn) -> str | None:
    """Returns the name of the mark that an equation makes, ``None`` if it makes none."""
    is_mark = eqn.primitive.name == "name" and eqn.params["name"].startswith(_MARK)
    return eqn.params["name"].removeprefix(_MARK) if is_mark else None


def _is_named(eqn: core.JaxprEqn, name: str) -> bool:
    return eqn.primitive.name == "name" and eqn.params["name"] == name


def pairs(*factors: Roots) -> set[frozenset[Root]]:
    """Returns the products of one root of each factor."""
    return set(map(frozenset, itertools.product(*factors)))


def _union(all_terms: Iterable[Terms]) -> Terms:
    union = Terms(set(), set())
    for terms in all_terms:
        union = Terms(union.terms | terms.terms, union.products | terms.products)
    return union


def _moved(eqn: core.JaxprEqn, output: int) -> list[Any]:
    """Returns which operands a sum or a move puts into an output."""
    match eqn.primitive.name:
        case "pad":
            return eqn.invars[:1]  # not the value that fills it
        case "optimization_barrier":
            return [eqn.invars[output]]
    return eqn.invars


def _bodies(eqn: core.JaxprEqn) -> list[tuple[core.Jaxpr, int]]:
    """Returns the jaxprs that an equation evaluates, each with the number of the equation's input that is its first."""
    match eqn.primitive.name:
        case "scan":
            return [(eqn.params["jaxpr"].jaxpr, 0)]
        case "cond":
            return [(branch.jaxpr, 1) for branch in eqn.params["branches"]]
    body = _called(eqn)
    return [] if body is None else [(body, 0)]


def _is_carried(eqn: core.JaxprEqn, k: int) -> bool:
    """Returns whether an input of an equation's body is what a loop carries, another at each step."""
    if eqn.primitive.name != "scan":
        return False
    num_consts, num_carry = _loop_numbers(eqn)
    return 0 <= k - num_consts < num_carry


def _loop_numbers(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Returns how many inputs of a scan are constants, and how many are carried; what is scanned follows.

    Read off the shapes, as releases of JAX name these numbers differently: what is scanned, or stacked, has one axis
    more outside of the loop.
    """
    body = eqn.params["jaxpr"].jaxpr
    num_same = sum(map(_same_shape, eqn.invars, body.invars))
    num_carry = sum(map(_same_shape, eqn.outvars, body.outvars))
    return num_same - num_carry, num_carry


def _called(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """Returns the jaxpr of an equation that evaluates one on its inputs, ``None`` for all others."""
    inner = [getattr(param, "jaxpr", param) for param in eqn.params.values()]
    inner = [jaxpr for jaxpr in inner if isinstance(jaxpr, core.Jaxpr)]
    return inner[0] if len(inner) == 1 and _shapes(inner[0]) == _shapes(eqn) else None


def _compose(axes: tuple[int | str, ...], operand: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return tuple(operand[axis] if isinstance(axis, int) else axis for axis in axes)


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


def _same_shape(a: Any, b: Any) -> bool:
    return _shape(a) == _shape(b)


def _shapes(jaxpr: core.Jaxpr | core.JaxprEqn) -> list[tuple[int, ...]]:
    return [_shape(var) for var in (*jaxpr.invars, *jaxpr.outvars)]
