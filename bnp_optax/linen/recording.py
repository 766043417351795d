"""Record the inputs of the linear layers of a Linen model."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import scope

from bnp_optax.layers import Layers
from bnp_optax.layouts import Kind
from bnp_optax.linen.calls import observe
from bnp_optax.moments import InputMoments, pool_named_axis, pool_with_earlier
from bnp_optax.records import by_layer, record_key


def capture(
    model: nn.Module | Callable[..., Any],
    *,
    layers: Layers | None = None,
    axis_name: str | tuple[str, ...] | None = None,
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

    Returns:
      A function with the arguments of ``model.apply``. It returns what that returns, a pair
      ``(y, updated)`` where collections are ``mutable``, and beside it the records by layer.

    Raises:
      ValueError: when it is called, naming the layer, if a record cannot leave a transform
        inside the model, or a layer's input is empty.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> model, x = nn.Sequential([nn.Dense(3)]), jax.numpy.array([[1.0, 4.0], [3.0, 4.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> y, records = capture(model)(variables, x)
      >>> print(records["layers_0"].mean, records["layers_0"].examples)
      [[[2. 4.]]] [2.]
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)])
      >>> variables = model.init(jax.random.key(0), x)
      >>> (y, updated), records = capture(model)(variables, x, mutable=["batch_stats"])
      >>> list(updated), list(records)
      (['batch_stats'], ['layers_0'])
    """
    apply = model.apply if isinstance(model, nn.Module) else model

    def apply_and_record(
        variables: Any, *args: Any, mutable: scope.CollectionFilter = False, **kwargs: Any
    ) -> tuple[Any, dict[str, InputMoments]]:
        with record_inputs(axis_name, layers):
            collections = scope.union_filters(mutable, "intermediates")
            y, updated = apply(variables, *args, mutable=collections, **kwargs)
        records = by_layer(updated.get("intermediates", {}))
        if mutable is False:
            return y, records
        if not scope.in_filter(mutable, "intermediates"):
            updated = {name: collection for name, collection in updated.items() if name != "intermediates"}
        return (y, updated), records

    return apply_and_record


@contextlib.contextmanager
def record_inputs(axis_name: str | tuple[str, ...] | None = None, layers: Layers | None = None) -> Iterator[None]:
    """Records the moments of every layer's input in the collection ``"intermediates"``.

    Inside the context, ``model.apply(..., mutable=["intermediates"])`` returns beside its output
    the records that :func:`~bnp_optax.scale_by_bnp` takes. They are reduced at once to a few floats
    a feature, and gradients do not flow through them. ``model.init`` records nothing.

    A layer called several times in one pass pools its calls.

    Args:
      axis_name: the name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which the batch is
        split; the records are those of the whole batch.
      layers: record these only; by default all that can be. A layer that the pass does not reach
        then has an empty record, which leaves its statistics as they are: models with ``nn.cond``
        or ``nn.switch`` need it, as all branches must record the same layers.

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
    with observe(_Recorder(axis_name, layers)):
        yield


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """Sows the moments of every layer's input."""

    axis_name: str | tuple[str, ...] | None
    layers: Layers | None

    def enter(self, module: nn.Module) -> None:
        """Gives the chosen layers empty records at the start of a forward pass."""
        if self.layers is None or module.path != () or module.is_initializing():
            return
        if module.is_mutable_collection("intermediates"):
            for name, records in _empty_records(self.layers).items():
                if not module.has_variable("intermediates", name):
                    module.put_variable("intermediates", name, records)

    def see_layer(self, module: nn.Module, kernel: str, bias: str | None, kind: Kind, x: jax.Array) -> None:
        """Sows the record of the layer's input beside its kernel, pooled with those of earlier calls."""
        path = (*module.path, kernel)
        is_chosen = self.layers is None or any(layer.kernel.path == path for layer in self.layers.values())
        if module.is_initializing() or not is_chosen:
            return
        where = "/".join(module.path) or type(module).__name__
        try:
            record = kind.moments(x)
            if self.axis_name is not None:
                record = pool_named_axis(record, self.axis_name)
            is_sown = module.sow("intermediates", record_key(kernel), record, pool_with_earlier, lambda: None)
        except ValueError as error:
            raise ValueError(f"The input of {where} cannot be recorded: {error}.") from error
        if not is_sown:
            raise ValueError(
                f"The input of {where} cannot be recorded, as the collection 'intermediates' is not mutable there. "
                "Call model.apply(..., mutable=['intermediates']); if the layer is inside nn.scan, nn.vmap or nn.RNN, "
                "also add 'intermediates': 0 to its variable_axes."
            )

    def leave(self, module: nn.Module, reason: str) -> None:
        """Nothing is to be done."""


def _empty_records(layers: Layers) -> dict[str, Any]:
    """Returns a tree of records without positions, for the layers whose record has a shape known beforehand."""
    records = {}
    for layer in layers.values():
        if set(layer.record_axes) <= {"s"}:
            stack, (_, *group_and_input) = layer.kernel.stack_shape, layer.moments_shape
            moment, count = jnp.zeros((*stack, *group_and_input)), jnp.zeros(stack)
            records[(*layer.kernel.path[:-1], record_key(layer.kernel.path[-1]))] = InputMoments(
                moment, moment, count, count
            )
    tree: dict[str, Any] = flax.traverse_util.unflatten_dict(records)
    return tree
