"""From the traced calls of a model's layers to their description, for Linen and NNX alike.

While a model is searched, every call of a layer leaves a :class:`Call` in the place of its record: its kernel and bias
themselves beside the record, so that all leave the same transforms. What the model's program then returns tells the
rest. Take a layer with a kernel ``[3, 4]`` under ``nn.scan`` with a length of 5 and ``variable_axes={"params": 1}``::

    a parameter of the model            [3, 5, 4]   an input of the program
    the kernel that the layer sees      [3, 4]      a slice of it
    what comes out as the call's kernel [5, 3, 4]   that input again, transposed: its axes are (1, 0, 2)

So the kernel is that parameter, its own axes are 0 and 2, and its axis 1 is a stack: the role ``s``. Were the parameter
``[3, 4]``, shared by all steps, five copies of it would come out: a loop has repeated it, the role ``r``.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from bnp_optax.dataflow import MAPPED, Dataflow
from bnp_optax.layers import Excluded, Layer, Layers, Parameter, Path, layer_name
from bnp_optax.layouts import Layout, Product, Split
from bnp_optax.moments import InputMoments
from bnp_optax.records import RecordError, moments_of, pool_records

# Which calls a search is to see: a function of their site.
Watch = Callable[[Path], bool]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernel", "bias", "record", "marks"),
    meta_fields=("site", "kind", "layout", "has_examples"),
)
@dataclasses.dataclass(frozen=True)
class Call:
    """A layer as it was called, stored in the place of its record.

    Attributes:
      site: the path of its module, and the kernel's name there.
      kind: the module's class.
      layout: its axis roles, ``None`` if it is called in several ways.
      has_examples: whether its own input has an axis of examples.
      kernel: its kernel.
      bias: its bias, if it has one.
      record: the record of its input.
      marks: arrays of shape ``(2,)`` and ``(3,)``, which are the last axes outside the transforms
        only if all these add their axis in front.
    """

    site: Path
    kind: str
    layout: Layout | None
    has_examples: bool
    kernel: Any
    bias: Any
    record: InputMoments
    marks: tuple[Any, Any]

    def pooled_with(self, earlier: "Call | None") -> "Call":
        """Returns what stands for this call and earlier ones of the same layer."""
        if earlier is None:
            return self
        if self.layout != earlier.layout:
            return dataclasses.replace(earlier, layout=None)
        record = pool_records(earlier.record, self.record, layer_name(self.site))
        return dataclasses.replace(earlier, record=record, has_examples=self.has_examples and earlier.has_examples)


@dataclasses.dataclass
class Log:
    """What a search has seen.

    Attributes:
      seen: the sites of calls, whether these came out or not, in their order, each with the paths in the module of the
        parameters that the call read.
      reasons: why parameters are excluded that are no layer's, by their path or that of their module.
    """

    seen: dict[Path, list[Path]] = dataclasses.field(default_factory=dict)
    reasons: dict[Path, str] = dataclasses.field(default_factory=dict)

    def note(
        self, path: Path, module: Any, product: Product, parameters: Mapping[str, jax.Array], watch: Watch
    ) -> Call | None:
        """Notes what a module multiplies, and returns the call that is to be left, if any is.

        Args:
          path: the module's.
          module: it.
          product: an input and one of its parameters.
          parameters: its parameters by name, as they are inside the transforms around the call.
          watch: whether a call at some site is to be seen at all.
        """
        site = (*path, product.kernel)
        if not watch(site):
            return None
        read = [(*path, name) for name in (product.kernel, product.bias) if name is not None]
        if not isinstance(product.layout, Layout):
            self.reasons |= dict.fromkeys(read, product.layout)
            return None
        self.seen[site] = read
        return Call(
            site,
            type(module).__name__,
            product.layout,
            has_examples=product.layout.has_examples(product.x.ndim),
            kernel=parameters[product.kernel],
            bias=None if product.bias is None else parameters[product.bias],
            record=moments_of(product.layout, product.x, layer_name(site)),
            marks=(jnp.zeros(2), jnp.zeros(3)),
        )


class Traced(NamedTuple):
    """A program that returns the calls of a model's layers.

    Attributes:
      jaxpr: the program.
      calls: what it returns, with shapes for arrays.
      inputs: for each of its inputs the path of the parameter that it is, or another one, or ``None``.
    """

    jaxpr: core.ClosedJaxpr
    calls: list[Call]
    inputs: Sequence[Path | None]


def find(
    trace: Callable[[Watch], Traced],
    log: Log,
    params: Mapping[Path, tuple[int, ...]],
    remedy: str,
    not_recorded: str,
) -> Layers:
    """Finds the layers of a model.

    Args:
      trace: traces the model, watching the calls at some sites.
      log: where it notes what it sees.
      params: the shapes of the model's parameters by path.
      remedy: what to do where a transform lets no record out.
      not_recorded: the reason of layers whose record got lost.

    Returns:
      The layers, and what is excluded.

    Raises:
      RecordError: naming the layers, if it is their record that makes the model fail.
    """
    traced = _trace(trace, log, remedy)
    calls = {call.site: call for call in _resolve(traced)}
    layers: dict[Path, Layer] = {}
    why = log.reasons
    for site, parameters in log.seen.items():
        layer = _describe(calls[site], params, not_recorded) if site in calls else not_recorded
        if isinstance(layer, Layer) and site not in why:
            layers[site] = layer
        elif isinstance(layer, str):
            why |= dict.fromkeys(parameters, layer)
    claims = collections.Counter(parameter.path for layer in layers.values() for parameter in layer.parameters)
    for site, layer in list(layers.items()):
        if any(claims[parameter.path] > 1 for parameter in layer.parameters):
            del layers[site]
            why |= {parameter.path: "shared by layers whose inputs differ" for parameter in layer.parameters}

    covered = {parameter.path for layer in layers.values() for parameter in layer.parameters}
    excluded = []
    for path, shape in params.items():
        if path not in covered:
            owner = max((known for known in why if path[: len(known)] == known), key=len)
            excluded.append(Excluded(path, shape, why[owner]))
    return Layers(tuple(layers.values()), tuple(excluded), complete=True)


def _trace(trace: Callable[[Watch], Traced], log: Log, remedy: str) -> Traced:
    """Traces a model; an error that is due to the records names their layers."""
    try:
        return trace(lambda site: True)
    except RecordError:
        raise
    except Exception as error:
        if _fails(trace, lambda site: False):
            raise  # not because of the records
        culprits = [site for site in tuple(log.seen) if _fails(trace, site.__eq__)]
        if not culprits:
            raise
        reason = f", as a transform around it lets no record out. {remedy}"
        raise RecordError(", ".join(map(layer_name, culprits)), reason) from error


def _fails(function: Callable[..., Any], *args: Any) -> bool:
    try:
        function(*args)
    except Exception:
        return True
    return False


class _Value(NamedTuple):
    """An array of a :class:`Call` outside the transforms: its shape, and the input that it is, if it is one.

    Attributes:
      shape: its shape.
      source: the path of that input in the model, ``None`` if the array is computed.
      axes: for each of its axes that of the source, or the transform that repeats it.
    """

    shape: tuple[int, ...]
    source: Path | None
    axes: tuple[int | str, ...]


def _resolve(traced: Traced) -> list[Call]:
    """Returns the calls with :class:`_Value` in the place of arrays."""
    dataflow, jaxpr = Dataflow(), traced.jaxpr.jaxpr
    arrays, structure = jax.tree.flatten(traced.calls)
    values = []
    for array, var in zip(arrays, jaxpr.outvars, strict=True):
        origin = dataflow.origin(jaxpr, var)
        source, axes = (None, ()) if origin is None else (traced.inputs[origin.source], origin.axes)
        values.append(_Value(array.shape, source, axes))
    calls: list[Call] = jax.tree.unflatten(structure, values)
    return calls


def _describe(call: Call, params: Mapping[Path, tuple[int, ...]], not_recorded: str) -> Layer | str:
    """Returns the layer as it is outside the transforms around it, or the reason to exclude it."""
    if call.layout is None:
        return "called in several ways"
    added = len(call.record.mean.shape) - 3
    if [mark.shape[added:] for mark in call.marks] != [(2,), (3,)]:
        return not_recorded
    kernel = _lifted(call.kernel, call.layout.kernel, added, params)
    # A bias that is not trained is a constant, as if there were none.
    has_bias = call.bias is not None and (call.bias.source is None or call.bias.source in params)
    bias = _lifted(call.bias, call.layout.bias, added, params) if has_bias else None
    if kernel is None or (has_bias and bias is None):
        return "not a parameter of the model itself, but computed from others"
    stacked = [isinstance(axis, int) for axis in call.kernel.axes[:added]]
    if bias is not None and stacked != [isinstance(axis, int) for axis in call.bias.axes[:added]]:
        return "its kernel and bias are stacked along different axes"
    roles = ["s" if is_stacked else "r" for is_stacked in stacked]
    if not call.has_examples and MAPPED in call.kernel.axes:
        # Of several mapped axes the outermost holds the examples, as in an array.
        roles[call.kernel.axes.index(MAPPED)] = "e"
    return Layer(call.kind, kernel, bias, layer_name(call.site), "".join(roles))


def _lifted(value: _Value, split: Split, num_added: int, params: Mapping[Path, tuple[int, ...]]) -> Parameter | None:
    """Returns the parameter that a value is, as the model holds it, ``None`` if it is none.

    Of a value ``[5, 3, 4]`` with axes ``(1, 0, 2)`` the first is added: axis 1 of the parameter ``[3, 5, 4]`` is a
    stack, and its axes 0 and 2 are the layer's own.
    """
    stack = [axis for axis in value.axes[:num_added] if isinstance(axis, int)]
    own = [axis for axis in value.axes[num_added:] if isinstance(axis, int)]
    if (
        value.source is None
        or value.source not in params
        or own != sorted(own)
        or sorted(stack + own) != list(range(len(params[value.source])))
        or len(own) < len(value.axes) - num_added
    ):
        return None
    shape = params[value.source]
    parameter = Parameter(value.source, tuple(shape[axis] for axis in own), *split)
    for k, axis in reversed(list(enumerate(stack))):  # from the innermost transform out
        missing = [outer for outer in stack[:k] if outer < axis]  # axes before it that outer transforms add later
        parameter = parameter.lift(axis - len(missing), shape[axis])
    return parameter
