"""Find the linear layers of an NNX model."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from bnp_optax import layouts as kinds
from bnp_optax.layers import Excluded, Layer, Layers, Parameter, Path, layer_name
from bnp_optax.layouts import Kind
from bnp_optax.moments import InputMoments
from bnp_optax.nnx.calls import KINDS, observe, reason_to_exclude
from bnp_optax.nnx.dataflow import MAPPED, Dataflow
from bnp_optax.nnx.storing import RECORD, REMEDY, RecordError, captured_by, moments_of, pool_records, store

_NO_AXIS = "called where its record is lost: in a transform of jax, or of nnx without axis 0 for nnx.Intermediate"


def find_layers(model: nnx.Module, *args: Any, method: Callable[..., Any] | str | None = None, **kwargs: Any) -> Layers:
    """Finds the layers of a model whose gradients can be preconditioned.

    A copy of the model is traced abstractly: nothing is computed or allocated, and the model stays
    as it is, random counters and running statistics included.

    Found are ``nnx.Linear``, ``LinearGeneral`` (so attention too), ``Einsum``, ``Conv``,
    ``ConvTranspose``, the layers inside recurrent cells, and subclasses that call these; also under
    ``nnx.jit``, ``nnx.remat``, ``nnx.scan``, ``nnx.vmap`` and ``nnx.RNN``. See :func:`record_inputs`
    for what a scanned or mapped model must provide.

    Args:
      model: a Flax NNX module.
      *args: what it is called with; arrays may be `jax.ShapeDtypeStruct`. The batch size does not
        matter.
      method: what is traced instead of ``model(...)``: a method's name, or a function of the model
        and the arguments.
      **kwargs: keyword arguments of the call.

    Returns:
      The layers; ``print`` them for a table, which also says what is excluded and why. Their
      paths are those of ``nnx.state(model, nnx.Param)``.

    Raises:
      ValueError: naming the layers, if recording their inputs would make the forward pass fail.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs), nnx.relu)
      >>> print(find_layers(model, jnp.zeros((1, 4))))
      layer     kind    kernel  fan-in  covers        parameters
      layers/0  Linear     4x3       4  kernel, bias          15
      <BLANKLINE>
      Excluded: scale or shift of a normalization
        layers/1/bias   3
        layers/1/scale  3
      <BLANKLINE>
      1 layer covers 15 of 21 parameters (71.4%).
    """

    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        if callable(method):
            return method(model, *args, **kwargs)
        return (model if method is None else getattr(model, method))(*args, **kwargs)

    params = {
        _as_path(keys): leaf.shape
        for keys, leaf in jax.tree_util.tree_leaves_with_path(nnx.as_pure(nnx.state(model, nnx.Param)))
    }
    layers: dict[Path, Layer] = {}
    reasons: dict[Path, str] = {}
    for path, call in _search(model, run, args, kwargs).items():
        layer = _NO_AXIS if call is None else _describe(call, params)
        if isinstance(layer, Layer):
            layers[path] = layer
        else:
            reasons[path] = layer
    claims = collections.Counter(parameter.path for layer in layers.values() for parameter in layer.parameters)
    for path, layer in list(layers.items()):
        if any(claims[parameter.path] > 1 for parameter in layer.parameters):
            del layers[path]
            reasons |= {parameter.path: "shared by layers whose inputs differ" for parameter in layer.parameters}

    covered = {parameter.path for layer in layers.values() for parameter in layer.parameters}
    modules = {_as_path(path): module for path, module in nnx.iter_modules(model)}
    reasons = {path: reason_to_exclude(module) for path, module in modules.items()} | reasons
    excluded = []
    for path, shape in params.items():
        if path not in covered:
            owner = max((known for known in reasons if path[: len(known)] == known), key=len)
            excluded.append(Excluded(path, shape, reasons[owner]))
    return Layers(tuple(layers.values()), tuple(excluded))


class _Found(nnx.Intermediate[Any]):
    """What is stored in the search for layers."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Site:
    """Tells a module its path, also inside transforms, where another object stands for it.

    No two are equal, so that `nnx.jit` does not answer out of its cache.
    """

    path: Path


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernel", "bias", "record", "marks"),
    meta_fields=("site", "name", "kind", "has_examples"),
)
@dataclasses.dataclass(frozen=True)
class _Call:
    """A layer as it was called, stored in the place of its record, so that its arrays leave the same transforms.

    Attributes:
      site: the module.
      name: its class.
      kind: its kind, or the reason why it has none.
      has_examples: whether its own input has an axis of examples.
      kernel: its kernel.
      bias: its bias, if it has one.
      record: the record of its input, if it has a kind.
      marks: arrays of shape ``(2,)`` and ``(3,)``, which are the last axes outside the transforms
        only if all these add their axis in front.
    """

    site: _Site
    name: str
    kind: Kind | str
    has_examples: bool
    kernel: Any
    bias: Any
    record: InputMoments | None
    marks: tuple[Any, Any]

    def pooled_with(self, earlier: "_Call", where: str) -> "_Call":
        """Returns what stands for this call and earlier ones of the same layer."""
        if self.kind != earlier.kind or self.record is None or earlier.record is None:
            return dataclasses.replace(earlier, kind="called in several ways", record=None)
        record = pool_records(earlier.record, self.record, where)
        return dataclasses.replace(earlier, record=record, has_examples=self.has_examples and earlier.has_examples)


class _Value(NamedTuple):
    """An array of a :class:`_Call` outside the transforms: its shape, and the input that it is, if it is one.

    Attributes:
      shape: its shape.
      source: the path of that input in the model, ``None`` if the array is computed.
      axes: for each of its axes that of the source, or the transform that repeats it.
    """

    shape: tuple[int, ...]
    source: Path | None
    axes: tuple[int | str, ...]


def _search(model: nnx.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> dict[Path, _Call | None]:
    """Traces a copy of the model.

    Returns:
      Its calls of layers by the path of their module, in their order; ``None`` where nothing came out of a
      transform. The arrays are :class:`_Value`.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Pytree | nnx.Variable))
    graphdef, state = nnx.split((model, leaves))  # together, as the arguments may refer to parts of the model
    state = nnx.as_pure(state)
    shapes = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
    paths = [path for path, module in nnx.iter_modules(model) if isinstance(module, tuple(KINDS))]
    calls: dict[Path, _Call | None] = {}

    def see_layer(module: Any, kind: Kind | str, x: jax.Array) -> None:
        captured = captured_by(module, _Found)
        if captured is None or (earlier := captured.get_value().get(RECORD)) is None:
            return
        site = earlier.site if isinstance(earlier, _Call) else earlier
        where = "/".join(site.path) or type(module).__name__
        calls[site.path] = None
        call = _Call(
            site=site,
            name=type(module).__name__,
            kind=kind,
            has_examples=isinstance(kind, Kind) and kind.has_examples(x.ndim),
            kernel=module.kernel[...],
            bias=None if module.bias is None else module.bias[...],
            record=moments_of(kind, x, where) if isinstance(kind, Kind) else None,
            marks=(jnp.zeros(2), jnp.zeros(3)),
        )
        store(captured, call.pooled_with(earlier, where) if isinstance(earlier, _Call) else call, where)

    def trace(paths: Iterable[tuple[Any, ...]]) -> tuple[core.ClosedJaxpr, list[_Call]]:
        sites = nnx.from_flat_state([((*path, RECORD), _Found(_Site(_as_path(path)))) for path in paths])

        def forward(state: Any, shapes: list[jax.Array]) -> list[_Call]:
            model, leaves = nnx.merge(graphdef, state)
            remaining = iter(shapes)
            leaves = [next(remaining) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            _, found = nnx.capture(run, _Found, init=sites)(model, *args, **kwargs)
            values = [variable.get_value() for _, variable in nnx.to_flat_state(found)]
            return [value for value in values if isinstance(value, _Call)]

        with observe(see_layer):
            traced: tuple[core.ClosedJaxpr, list[_Call]] = jax.make_jaxpr(forward, return_shape=True)(state, shapes)
        return traced

    try:
        closed, found = trace(paths)
    except RecordError:
        raise
    except Exception as error:
        if _fails(trace, []):
            raise  # not because of the recording
        culprits = ["/".join(_as_path(path)) for path in paths if _fails(trace, [path])]
        if not culprits:
            raise
        reason = f", as a transform around it lets no record out. {REMEDY}; in nnx.cond, call it in all branches"
        raise RecordError(", ".join(culprits), reason) from error

    inputs = [
        _as_path(keys[1:]) if keys[0].key == 0 else None for keys, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    inputs += [None] * len(shapes)
    dataflow, values = Dataflow(), []
    arrays, structure = jax.tree.flatten(found)
    for array, var in zip(arrays, closed.jaxpr.outvars, strict=True):
        origin = dataflow.origin(closed.jaxpr, var)
        values.append(_Value(array.shape, *((inputs[origin.source], origin.axes) if origin else (None, ()))))
    for call in jax.tree.unflatten(structure, values):
        calls[call.site.path] = call
    return calls


def _fails(function: Callable[..., Any], *args: Any) -> bool:
    try:
        function(*args)
    except Exception:
        return True
    return False


def _describe(call: _Call, params: Mapping[Path, tuple[int, ...]]) -> Layer | str:
    """Returns the layer as it is outside the transforms around it, or the reason to leave it alone."""
    if not isinstance(call.kind, Kind) or call.record is None:
        return str(call.kind)
    added = len(call.record.mean.shape) - 3
    if [mark.shape[added:] for mark in call.marks] != [(2,), (3,)]:
        return _NO_AXIS
    kernel = _lifted(call.kernel, call.kind.kernel, added, params)
    # A bias that is not trained is a constant, as if there were none.
    has_bias = call.bias is not None and (call.bias.source is None or call.bias.source in params)
    bias = _lifted(call.bias, call.kind.bias, added, params) if has_bias else None
    if kernel is None or (has_bias and bias is None):
        return "not an nnx.Param of the model itself, but computed from others"
    stacked = [isinstance(axis, int) for axis in call.kernel.axes[:added]]
    if bias is not None and stacked != [isinstance(axis, int) for axis in call.bias.axes[:added]]:
        return "its kernel and bias are stacked along different axes"
    lifts = "".join("s" if is_stacked else "r" for is_stacked in stacked)
    if not call.has_examples and MAPPED in call.kernel.axes:
        # Of several mapped axes the outermost holds the examples, as in an array.
        k = call.kernel.axes.index(MAPPED)
        lifts = f"{lifts[:k]}e{lifts[k + 1 :]}"
    return Layer(call.name, kernel, bias, layer_name((*call.site.path, "kernel")), lifts)


def _lifted(
    value: _Value, split: kinds.Split, num_added: int, params: Mapping[Path, tuple[int, ...]]
) -> Parameter | None:
    """Returns the parameter that a value is, as the model holds it, ``None`` if it is none."""
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
    for k, axis in reversed(list(enumerate(stack))):
        missing = [outer for outer in stack[:k] if outer < axis]
        parameter = parameter.lift(axis - len(missing), shape[axis])
    return parameter


_KEYS = (jax.tree_util.DictKey, jax.tree_util.SequenceKey, jax.tree_util.GetAttrKey, jax.tree_util.FlattenedIndexKey)


def _as_path(keys: tuple[Any, ...]) -> Path:
    """Returns keys of NNX or of JAX as the path under which :func:`~bnp_optax.scale_by_bnp` sees them."""
    return tuple(jax.tree_util.keystr((key,), simple=True) if isinstance(key, _KEYS) else str(key) for key in keys)
