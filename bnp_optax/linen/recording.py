"""Record the inputs of the linear layers of a Linen model."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
from flax import nnx
from flax.core import scope
from jax.typing import ArrayLike

from bnp_optax.counting import Counting, Mask
from bnp_optax.layers import Layers, layer_name
from bnp_optax.layouts import Layout, Product, RecordError
from bnp_optax.linen.calls import observe
from bnp_optax.moments import InputMoments
from bnp_optax.observing import no_model
from bnp_optax.records import by_layer, empty_record, moments_of, pool_records, record_key


def capture(
    model: nn.Module | Callable[..., Any],
    *,
    layers: Layers | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    mask: Mask | None = None,
    examples: ArrayLike | None = None,
) -> Callable[..., tuple[Any, dict[str, InputMoments]]]:
    """Makes ``model.apply`` return the moments of every layer's input beside the output.

    ``y, records = capture(model)(variables, x, ...)`` calls ``model.apply(variables, x, ...)``; the records are what
    the ``update`` of :func:`~bnp_optax.preconditioned` and :func:`~bnp_optax.scale_by_bnp` takes as ``intermediates=``.
    They are reduced at once to a few floats a feature, and gradients do not flow through them. A layer called several
    times in one pass pools its calls.

    Args:
      model: a Flax Linen module, or its ``apply`` (or ``TrainState.apply_fn``).
      layers: record these only; by default all that can be. A layer that the pass does not reach
        then has an empty record, which leaves its statistics as they are: models with ``nn.cond``
        or ``nn.switch`` need it, as all branches must record the same layers.
      axis_name: the name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which the batch is
        split; the records are those of the whole batch.
      mask: which positions of the layers' inputs count, as ``nn.BatchNorm`` has it: an array of the shape of the
        inputs' leading axes, ``[examples]`` or ``[examples, time]``, of booleans or of weights that are not negative;
        several for inputs of several shapes, of which each takes the longest that fits; or a function of a layer's
        name and its input that returns such an array, ``None`` if all of it counts, or ``False`` if the call does not
        count. What does not count enters neither mean nor variance nor N. ``nn.RNN`` masks its cell by its
        ``seq_lengths``, and by a mask that fits its input. Outside of ``jax.jit`` every pass with a mask compiles anew
        what is compiled inside it, JAX's own functions too.
      examples: N, how many examples the pass has, instead of the size of the first axis of a layer's input; a layer
        that a transform maps over single examples has no such axis, and counts what it is mapped over.

    Returns:
      A function with the arguments of ``model.apply``. It returns what that returns, a pair
      ``(y, updated)`` where collections are ``mutable``, and beside it the records by layer.

    Raises:
      TypeError: if ``model`` is no Linen module, or ``examples`` no integer.
      ValueError: when it is called, naming the layer, if a record cannot leave a transform
        inside the model, a layer's input is empty, no mask fits it, or the model has not the ``layers``.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> model, x = nn.Sequential([nn.Dense(3)]), jax.numpy.array([[1.0, 4.0], [3.0, 4.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> y, records = capture(model)(variables, x)
      >>> print(records["layers_0"].mean, records["layers_0"].examples)
      [[[2. 4.]]] [2]
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
      >>> variables = model.init(jax.random.key(0), x)
      >>> (y, updated), records = capture(model)(variables, x, mutable=["batch_stats"])
      >>> list(updated), list(records)
      (['batch_stats'], ['layers_0'])
    """
    apply = model.apply if isinstance(model, nn.Module) else model
    if not callable(apply) or isinstance(model, nnx.Module):
        raise no_model("capture(model) of Linen wants a flax.linen.Module, or its apply", model)
    _check_takes_mutable(apply)
    counting = Counting.of(axis_name, mask, examples)

    def apply_and_record(
        variables: Mapping[str, Any], *args: Any, mutable: scope.CollectionFilter = False, **kwargs: Any
    ) -> tuple[Any, dict[str, InputMoments]]:
        if layers is not None and "params" in variables:
            _check_held(layers, variables["params"])
        variables = {**variables, "intermediates": {} if layers is None else _empty_records(layers)}
        with observe(_Recorder(counting, None if layers is None else layers.records)):
            collections = scope.union_filters(mutable, "intermediates")
            y, updated = apply(variables, *args, mutable=collections, **kwargs)
        records = by_layer(updated.get("intermediates", {}))
        if not scope.in_filter(mutable, "intermediates"):
            updated = {name: collection for name, collection in updated.items() if name != "intermediates"}
        return (y if mutable is False else (y, updated)), records

    return apply_and_record


@contextlib.contextmanager
def record_inputs(
    axis_name: str | tuple[str, ...] | None = None, mask: Mask | None = None, examples: ArrayLike | None = None
) -> Iterator[None]:
    """Records the moments of every layer's input in the collection ``"intermediates"``.

    What :func:`capture` does beneath: inside the context, ``model.apply(..., mutable=["intermediates"])``
    returns the records beside the output and what else the model sows. ``model.init`` records nothing.

    Args:
      axis_name: as in :func:`capture`.
      mask: likewise.
      examples: likewise.

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
    with observe(_Recorder(Counting.of(axis_name, mask, examples))):
        yield


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """Sows the moments of every layer's input.

    JAX hashes it at each operation that it traces: what it holds is to be hashed in no time.
    """

    counting: Counting
    chosen: frozenset[str] | None = None

    def see(self, module: nn.Module, product: Product) -> None:
        """Sows the record of the layer's input beside its kernel, pooled with those of earlier calls."""
        name = layer_name((*module.path, product.kernel))
        is_chosen = self.chosen is None or name in self.chosen
        if module.is_initializing() or not is_chosen or not isinstance(product.layout, Layout):
            return
        where = name if module.path else type(module).__name__
        if self.chosen is None and _stays_inside(module, product.x):
            left: InputMoments | _Lost = _Lost()
        else:
            left = moments_of(self.counting, product.layout, product.x, name, where)
        pool = functools.partial(_pool, where=where)
        if not module.sow("intermediates", record_key(product.kernel), left, pool, lambda: None):
            raise RecordError(
                where,
                ", as the collection 'intermediates' is not mutable there. Call linen.capture(model)(...), or "
                "model.apply(..., mutable=['intermediates']); if the layer is inside nn.scan or nn.vmap, also add "
                "'intermediates': 0 to its variable_axes, or record the others alone: capture(model, layers=layers)",
            )

    def see_explicit(self, module: nn.Module, product: Product, owner: nn.Module) -> None:
        """Nothing is recorded, as find_layers excludes these parameters."""

    def leave(self, module: nn.Module, reason: str) -> None:
        """Nothing is to be done."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Lost:
    """Stands for the record of a layer one of whose calls cannot be recorded, so that none is."""


def _pool(earlier: InputMoments | _Lost | None, record: InputMoments | _Lost, where: str) -> InputMoments | _Lost:
    """Pools a call of a layer with earlier ones."""
    if isinstance(earlier, _Lost) or isinstance(record, _Lost):
        return _Lost()
    return pool_records(earlier, record, where)


def _stays_inside(module: nn.Module, x: jax.Array) -> bool:
    """Returns whether a transform of JAX (not Flax's) inside the model may keep the record of an input from coming out.

    What is stored in a module from within its trace is lost. Only a gradient lets values out, as those of records are
    primal; in doubt the layer is to be chosen, as ``find_layers`` knows.
    """
    own = module.scope  # whose root is that of the model, or of the innermost of Flax's transforms
    is_inside = own is not None and scope.Scope({}).trace_level != own.root.trace_level
    return is_inside and isinstance(jax.lax.stop_gradient(x), jax.core.Tracer)


def _check_takes_mutable(apply: Callable[..., Any]) -> None:
    """Raises an error if a function that stands for ``model.apply`` cannot be asked for the records."""
    takes = inspect.signature(apply).parameters.values()
    is_compiled = isinstance(apply, jax.stages.Wrapped)
    if is_compiled or not any(own.name == "mutable" or own.kind is own.VAR_KEYWORD for own in takes):
        reason = "is compiled: compile the training step around it" if is_compiled else "takes no mutable="
        raise TypeError(
            f"capture wants a model, or a function that takes what model.apply takes, mutable= too, but "
            f"{getattr(apply, '__name__', type(apply).__name__)} {reason}. Write "
            "y, records = capture(model)({'params': params}, x)."
        )


def _check_held(layers: Layers, params: Any) -> None:
    """Raises an error if the parameters lack the kernel of a layer, which then could not be recorded either."""
    for layer in layers.included:
        held = params
        for key in layer.kernel.path:
            held = held.get(key) if isinstance(held, Mapping) else None
        if held is None:
            raise ValueError(
                f"layers describes {layer.path}, which the model does not have. Give capture the layers that "
                "find_layers found in this model, as they were before under(...) or |."
            )


def _empty_records(layers: Layers) -> dict[str, Any]:
    """Returns a tree of records without positions, for the layers whose record has a shape known beforehand."""
    records = {}
    for layer in layers.included:
        if (record := empty_record(layer)) is not None:
            *module, kernel = layer.kernel.path
            records[(*module, record_key(kernel))] = record
    tree: dict[str, Any] = flax.traverse_util.unflatten_dict(records)
    return tree
