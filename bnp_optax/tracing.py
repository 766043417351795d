"""From the traced calls of a model's layers to their description, for Linen and NNX alike.

While a model is searched, every call of a layer leaves a :class:`~bnp_optax.searching.Call` in the place of its record:
its kernel and bias themselves beside the record, so that all leave the same transforms. What the model's program then
returns tells the rest. Take a layer with a kernel ``[3, 4]`` under ``nn.scan`` with a length of 5 and
``variable_axes={"params": 1}``::

    a parameter of the model            [3, 5, 4]   an input of the program
    the kernel that the layer sees      [3, 4]      a slice of it
    what comes out as the call's kernel [5, 3, 4]   that input again, transposed: its axes are (1, 0, 2)

So the kernel is that parameter, its own axes are 0 and 2, and its axis 1 is a stack: the role ``s``. Were the parameter
``[3, 4]``, shared by all steps, five copies of it would come out: a loop has repeated it, the role ``r``.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from bnp_optax.dataflow import MAPPED, Dataflow, made_in, marks_in, pairs
from bnp_optax.layers import Excluded, Layer, Layers, Parameter, Path, layer_name
from bnp_optax.layouts import Layout, RecordError, Split
from bnp_optax.searching import EXPLICIT, Call, Log, Watch

_LEAKED = "inside a transform of JAX, which lets no record out"


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


# Traces a model, leaving the calls at some sites, and notes in a log what it sees.
Trace = Callable[[Watch, Log], Traced]


def make_jaxpr(forward: Callable[..., list[Call]], *args: Any) -> tuple[core.ClosedJaxpr, list[Call]]:
    """Returns the program of a forward pass, and what it returns, with shapes for arrays.

    Also where a user has disabled ``jit`` to look inside, which takes loops apart, and with them the layers in these.
    """
    with jax.disable_jit(False):
        jaxpr, calls = jax.make_jaxpr(forward, return_shape=True)(*args)
    return jaxpr, calls


def find(
    trace: Trace,
    trace_pass: Trace,
    params: Mapping[Path, tuple[int, ...]],
    not_recorded: str,
    reasons: Mapping[Path, str],
) -> Layers:
    """Finds the layers of a model.

    Args:
      trace: traces the model.
      trace_pass: traces a forward pass of it as in training.
      params: the shapes of the model's parameters by path.
      not_recorded: the reason of layers whose record got lost.
      reasons: those of parameters of no layer, by their path or that of their module.

    Returns:
      The layers, and what is excluded.

    Raises:
      RecordError: naming the layer, if its input is empty.
    """
    log = Log(reasons=dict(reasons))
    traced, lost = _trace(lambda watch: trace(watch, log), log, not_recorded)
    calls, lost_inside = _resolve(traced, not_recorded)
    lost |= lost_inside
    by_site = {call.site: call for call in calls}
    layers: dict[Path, Layer] = {}
    why = log.reasons
    for site, parameters in log.seen.items():
        call = by_site.get(site)
        layer = lost.get(site, not_recorded) if call is None else _describe(call, params, not_recorded)
        if isinstance(layer, Layer) and site not in why:
            layers[site] = layer
        elif isinstance(layer, str):
            why |= dict.fromkeys(parameters, layer)
    explicit = [call for call in calls if call.layout == EXPLICIT]
    elsewhere = dict.fromkeys(
        (value.source for call in explicit for value in (call.kernel, call.bias) if value), EXPLICIT
    )
    claims = collections.Counter(parameter.path for layer in layers.values() for parameter in layer.parameters)
    elsewhere |= {path: "shared by layers whose inputs differ" for path, count in claims.items() if count > 1}
    for site, layer in list(layers.items()):
        if others := [elsewhere[parameter.path] for parameter in layer.parameters if parameter.path in elsewhere]:
            del layers[site]
            why |= {parameter.path: others[0] for parameter in layer.parameters}

    for site, in_pass in _pass(trace_pass, set(layers), params, not_recorded).items():
        if isinstance(in_pass, str):
            why |= {parameter.path: in_pass for parameter in layers.pop(site).parameters}
        else:
            layers[site] = in_pass

    covered = {parameter.path for layer in layers.values() for parameter in layer.parameters}
    excluded = []
    for path, shape in params.items():
        if path not in covered:
            owner = max((known for known in why if path[: len(known)] == known), key=len)
            # Of a parameter that the model itself owns, and no layer in it, its use tells more.
            excluded.append(Excluded(path, shape, why[owner] if owner else elsewhere.get(path, why[owner])))
    return Layers(tuple(layers.values()), tuple(excluded), complete=True)


def _pass(
    trace_pass: Trace, sites: set[Path], params: Mapping[Path, tuple[int, ...]], lost: str
) -> dict[Path, Layer | str]:
    """Returns what some layers are in training, or why they are none there, as models may do otherwise in ``init``."""
    log = Log(counts=True)
    try:
        calls, lost_inside = _resolve(trace_pass(sites.__contains__, log), lost)
    except Exception:  # as where the branches of a condition leave different calls
        return {}
    found = {call.site: _describe(call, params, lost) for call in calls} | lost_inside
    return found | {site: log.reasons[site] for site in sites & log.reasons.keys()}


def _trace(trace: Callable[[Watch], Traced], log: Log, not_recorded: str) -> tuple[Traced, dict[Path, str]]:
    """Traces a model without the calls that make it fail, and returns the reasons of these."""
    try:
        return trace(lambda site: True), {}
    except RecordError:
        raise
    except Exception:
        trace(lambda site: False)  # fails too, unless it is because of the records, and sees all sites
    lost = _culprits(trace, tuple(log.seen))
    reasons = {
        site: _LEAKED if isinstance(error, jax.errors.UnexpectedTracerError) else not_recorded
        for site, error in lost.items()
    }
    return trace(lambda site: site not in reasons), reasons


def _culprits(trace: Callable[[Watch], Traced], sites: tuple[Path, ...]) -> dict[Path, Exception]:
    """Returns which of these calls make a model fail if they are left, each with the error.

    It halves them, so that one of a hundred is found in some ten traces.
    """
    try:
        trace(sites.__contains__)
    except Exception as error:
        if len(sites) == 1:
            return {sites[0]: error}
        half = len(sites) // 2
        found = _culprits(trace, sites[:half]) | _culprits(trace, sites[half:])
        return found or dict.fromkeys(sites, error)  # which fail together alone
    return {}


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


def _resolve(traced: Traced, not_recorded: str) -> tuple[list[Call], dict[Path, str]]:
    """Returns the calls with :class:`_Value` in the place of arrays, and why others did not come out, by their site."""
    dataflow, jaxpr = Dataflow(), traced.jaxpr.jaxpr
    outputs, made, marks = iter(jaxpr.outvars), made_in(traced.jaxpr), marks_in(jaxpr)
    calls: list[Call] = []
    lost: dict[Path, str] = {}
    for call in traced.calls:
        arrays, structure = jax.tree.flatten(call)
        variables = [next(outputs) for _ in arrays]
        if not all(isinstance(var, core.Literal) or var in made for var in variables):
            lost[call.site] = _LEAKED
            continue
        with_variables = jax.tree.unflatten(structure, variables)
        marked = {name for name in marks if name.partition(":")[2] == "/".join(call.site)}
        out = dataflow.marks(jaxpr, with_variables.token) if marked else set()
        if isinstance(call.layout, Layout) and not marked <= out:
            lost[call.site] = not_recorded  # of some of its calls
            continue
        values = []
        for array, var in zip(arrays, variables, strict=True):
            origin = dataflow.origin(jaxpr, var)
            source, axes = (None, ()) if origin is None else (traced.inputs[origin.source], origin.axes)
            values.append(_Value(array.shape, source, axes))
        resolved = jax.tree.unflatten(structure, values)
        reason = _is_no_layer(with_variables, dataflow, jaxpr)
        calls.append(resolved if reason is None else dataclasses.replace(resolved, layout=reason))
    return calls, lost


def _is_no_layer(call: Call, dataflow: Dataflow, jaxpr: core.Jaxpr) -> str | None:
    """Returns why a call, with variables for arrays, does not compute ``W h + b`` with its parameters as they stand."""
    if call.y is None:
        return None
    kernel, bias, x = (
        frozenset() if var is None else dataflow.roots(jaxpr, var) for var in (call.kernel, call.bias, call.x)
    )
    terms, products = dataflow.terms(jaxpr, call.y)
    if kernel <= terms and not products:
        return None  # what the call returns is the kernel
    with_kernel = [factors for factors in products if kernel <= factors]
    if products and not with_kernel:
        return "its kernel is computed from the parameter before the product"
    if not with_kernel or (x and products != pairs(x, kernel)):
        return "its output is not the product of its input and its kernel as they stand"
    return "what it adds to the product is not its bias as it stands" if x and bias != terms else None


def _describe(call: Call, params: Mapping[Path, tuple[int, ...]], not_recorded: str) -> Layer | str:
    """Returns the layer as it is outside the transforms around it, or the reason to exclude it."""
    if isinstance(call.layout, str):
        return call.layout
    if call.record is None:
        return not_recorded
    added = len(call.record.total.shape) - 3
    if [array.shape[added:] for array in call.axes] != [(2,), (3,)]:
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
    examples = 1 if call.examples is None else call.examples
    if MAPPED in call.kernel.axes:
        # Of several mapped axes the outermost holds the examples, as in an array, if the input has no axis of them.
        axis = call.kernel.axes.index(MAPPED)
        roles[axis] = "e"
        examples = call.record.total.shape[axis] if call.examples is None else examples
    return Layer(call.kind, kernel, bias, layer_name(call.site), "".join(roles), call.calls or 1, examples)


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
