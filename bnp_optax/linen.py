"""Flax Linen: find the linear layers of a model, and record their inputs.

The layers of a model are found once, by tracing it abstractly (:func:`find_layers`); their inputs
are recorded in each forward pass under :func:`record_inputs`, already reduced to moments, in the
collection ``"intermediates"``.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen.module import InterceptorContext
from flax.training import train_state

from bnp_optax.layers import Layer, Layers, LeftAlone, Parameter, Path, record_path
from bnp_optax.moments import InputMoments, input_moments, pool_calls, pool_devices

Split = tuple[tuple[int, ...], str]  # the shape whose axes have one role each, and those roles


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A class of Flax layers: how its kernel and bias split into roles, and the moments of its input."""

    module: type[nn.Module]
    splits: Callable[[Any, tuple[int, ...]], tuple[Split, Split]]
    moments: Callable[[Any, jax.Array], InputMoments]


def _dense_splits(module: nn.Dense, kernel: tuple[int, ...]) -> tuple[Split, Split]:
    return (kernel, "io"), (kernel[1:], "o")


def _dense_moments(module: nn.Dense, x: jax.Array) -> InputMoments:
    return input_moments(x)


def _conv_splits(module: nn.Conv, kernel: tuple[int, ...]) -> tuple[Split, Split]:
    outputs = (module.feature_group_count, kernel[-1] // module.feature_group_count)
    return ((*kernel[:-1], *outputs), "w" * (len(kernel) - 2) + "igo"), (outputs, "go")


def _conv_moments(module: nn.Conv, x: jax.Array) -> InputMoments:
    num_spatial = 1 if isinstance(module.kernel_size, int) else len(module.kernel_size)
    return input_moments(x, groups=module.feature_group_count, num_spatial=num_spatial)


_KINDS = (
    _Kind(nn.Dense, _dense_splits, _dense_moments),
    _Kind(nn.Conv, _conv_splits, _conv_moments),
)

_NORMALIZATIONS = (
    nn.BatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.SpectralNorm,
    nn.WeightNorm,
)


def find_layers(
    model: nn.Module,
    *args: Any,
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> Layers:
    """Finds the layers of a model whose gradients can be preconditioned.

    The model is traced abstractly, as its ``init`` would run: nothing is computed or allocated.

    Args:
      model: a Flax Linen module.
      *args: what its method is called with; arrays may be `jax.ShapeDtypeStruct`. The batch size
        does not matter.
      rngs: random keys as for ``model.init``; by default one made for the purpose.
      method: which method is traced, ``__call__`` by default.
      **kwargs: keyword arguments of the method.

    Returns:
      The layers; ``print`` them for a table, which also says what is left alone and why.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> model = nn.Sequential([nn.Dense(3), nn.LayerNorm(), nn.relu, nn.Dense(2, use_bias=False)])
      >>> print(find_layers(model, jnp.zeros((1, 4))))
      layer     kind   kernel  fan-in  parameters
      layers_0  Dense     4x3       4          15
      layers_3  Dense     3x2       3           6
      <BLANKLINE>
      left alone      shape  reason
      layers_1/bias       3  scale or shift of a normalization
      layers_1/scale      3  scale or shift of a normalization
      <BLANKLINE>
      2 layers cover 21 of 27 parameters (77.8%).
    """
    layers: dict[Path, Layer] = {}
    reasons: dict[Path, str] = {}

    def find(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        result = next_fun(*args, **kwargs)
        module, kind = context.module, _kind_called(context)
        if kind is not None and (layer := _describe(module, kind)):
            layers[layer.kernel.path] = layer
        reasons[module.path] = _reason_to_leave_alone(module)
        return result

    leaves, treedef = jax.tree.flatten((args, kwargs, rngs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for leaf in leaves]

    def init(arrays: list[jax.Array]) -> Any:
        remaining = iter(arrays)
        merged = [next(remaining) if dynamic else leaf for leaf, dynamic in zip(leaves, is_array, strict=True)]
        args, kwargs, rngs = jax.tree.unflatten(treedef, merged)
        return model.init(jax.random.key(0) if rngs is None else rngs, *args, method=method, **kwargs)

    with nn.intercept_methods(find):
        arrays = [leaf for leaf, dynamic in zip(leaves, is_array, strict=True) if dynamic]
        variables = nn.unbox(jax.eval_shape(init, arrays))

    covered = {parameter.path for layer in layers.values() for parameter in layer.parameters}
    left_alone = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(variables.get("params", {})):
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        if path not in covered:
            owner = max((p for p in reasons if path[: len(p)] == p), key=len)
            left_alone.append(LeftAlone(path, leaf.shape, reasons[owner]))
    return Layers(tuple(layers.values()), tuple(left_alone))


@contextlib.contextmanager
def record_inputs(axis_name: str | tuple[str, ...] | None = None) -> Iterator[None]:
    """Records the moments of every layer's input in the collection ``"intermediates"``.

    Inside the context, ``model.apply(..., mutable=["intermediates"])`` returns beside its output
    the records that :func:`~bnp_optax.scale_by_bnp` takes. They are reduced at once to a few floats
    a feature, and gradients do not flow through them. ``model.init`` records nothing.

    A layer called several times in one pass pools its calls.

    Args:
      axis_name: the name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which the batch is
        split; the records are those of the whole batch.

    Yields:
      Nothing.

    Raises:
      ValueError: in the forward pass, naming the layer, if ``"intermediates"`` is not mutable
        there or the layer's input is empty.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> model, x = nn.Dense(3), jax.numpy.array([[1.0, 4.0], [3.0, 4.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> with record_inputs():
      ...     y, recorded = model.apply(variables, x, mutable=["intermediates"])
      >>> print(recorded["intermediates"]["kernel_input"].mean)
      [[[2. 4.]]]
    """

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        module, kind = context.module, _kind_called(context)
        if kind is not None and not module.is_initializing():
            x = args[0] if args else kwargs["inputs"]
            _record(module, lambda: kind.moments(module, x), axis_name)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        yield


class TrainState(train_state.TrainState):
    """Flax's `TrainState` whose ``apply_gradients`` hands the records to the optimizer.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> import bnp_optax as bnp
      >>> model, x = nn.Dense(3), jax.numpy.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = bnp.bnp_sgd(0.1, find_layers(model, x))
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> def loss_fn(params):
      ...     with record_inputs():
      ...         y, recorded = state.apply_fn({"params": params}, x, mutable=["intermediates"])
      ...     return (y**2).mean(), recorded["intermediates"]
      >>> grads, intermediates = jax.grad(loss_fn, has_aux=True)(state.params)
      >>> state = state.apply_gradients(grads=grads, intermediates=intermediates)
    """

    def apply_gradients(self, *, grads: Any, intermediates: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Returns the state after one update.

        Args:
          grads: the gradients, structured like ``params``.
          intermediates: the records of this batch, or ``KEEP_STATISTICS``.
          **kwargs: attributes of the state to replace, as in Flax.

        Returns:
          The state with ``step``, ``params`` and ``opt_state`` updated.
        """
        update = functools.partial(self.tx.update, intermediates=intermediates)
        state = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        new_state: Self = super(TrainState, state).apply_gradients(grads=grads, **kwargs)
        return new_state.replace(tx=self.tx)


def _kind_called(context: InterceptorContext) -> _Kind | None:
    """Returns the kind of layer whose own `__call__` is running: of a class, not of one that overrides it."""
    method = getattr(context.orig_method, "func", None)
    for kind in _KINDS:
        if isinstance(context.module, kind.module) and method is inspect.unwrap(kind.module.__call__):
            return kind
    return None


def _describe(module: nn.Module, kind: _Kind) -> Layer | None:
    if _refusal(module):
        return None
    shapes = {name: nn.unbox(value).shape for name, value in module.variables["params"].items()}
    kernel, bias = kind.splits(module, shapes["kernel"])
    return Layer(
        kind=type(module).__name__,
        kernel=Parameter((*module.path, "kernel"), shapes["kernel"], *kernel),
        bias=Parameter((*module.path, "bias"), shapes["bias"], *bias) if "bias" in shapes else None,
        record=record_path((*module.path, "kernel")),
    )


def _refusal(module: nn.Module) -> str | None:
    """Says why a layer of a known kind cannot be preconditioned all the same, if so."""
    if getattr(module, "mask", None) is not None:
        return "masked kernel: its units see different inputs"
    if jnp.issubdtype(module.param_dtype, jnp.complexfloating):
        return "complex parameters"
    return None


def _reason_to_leave_alone(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Embed):
        return "embedding: its rows are looked up, not multiplied by an input"
    if isinstance(module, _NORMALIZATIONS):
        return "scale or shift of a normalization"
    for kind in _KINDS:
        if isinstance(module, kind.module):
            return _refusal(module) or f"{name} overrides __call__ without calling that of nn.{kind.module.__name__}"
    return f"{name} is not one of Flax's linear layers"


def _record(module: nn.Module, moments: Callable[[], InputMoments], axis_name: str | tuple[str, ...] | None) -> None:
    """Computes the moments of a layer's input and sows them beside its kernel, pooled with earlier calls."""
    where = "/".join(module.path) or type(module).__name__
    try:
        record = moments()
    except ValueError as error:
        raise ValueError(f"The input of {where} cannot be recorded: {error}.") from error
    if axis_name is not None:
        record = pool_devices(record, axis_name)
    *_, name = record_path(("kernel",))
    if not module.sow("intermediates", name, record, init_fn=lambda: None, reduce_fn=_pool_with_earlier):
        raise ValueError(
            f"The input of {where} cannot be recorded, as the collection 'intermediates' is not mutable there. Call "
            "model.apply(..., mutable=['intermediates']); if the layer is inside nn.scan, nn.vmap or nn.RNN, also add "
            "'intermediates': 0 to its variable_axes."
        )


def _pool_with_earlier(earlier: InputMoments | None, record: InputMoments) -> InputMoments:
    return record if earlier is None else pool_calls(earlier, record)
