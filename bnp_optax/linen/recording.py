"""Record the inputs of the linear layers of a Linen model."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
from flax.core import scope

from bnp_optax.layers import Layers, layer_name
from bnp_optax.layouts import Layout, Product
from bnp_optax.linen.calls import observe
from bnp_optax.moments import InputMoments
from bnp_optax.records import RecordError, by_layer, empty_record, moments_of, pool_records, record_key


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
        variables: Mapping[str, Any], *args: Any, mutable: scope.CollectionFilter = False, **kwargs: Any
    ) -> tuple[Any, dict[str, InputMoments]]:
        variables = {**variables, "intermediates": {} if layers is None else _empty_records(layers)}
        with observe(_Recorder(axis_name, None if layers is None else layers.records)):
            collections = scope.union_filters(mutable, "intermediates")
            y, updated = apply(variables, *args, mutable=collections, **kwargs)
        records = by_layer(updated.get("intermediates", {}))
        if not scope.in_filter(mutable, "intermediates"):
            updated = {name: collection for name, collection in updated.items() if name != "intermediates"}
        return (y if mutable is False else (y, updated)), records

    return apply_and_record


@contextlib.contextmanager
def record_inputs(axis_name: str | tuple[str, ...] | None = None) -> Iterator[None]:
    """Records the moments of every layer's input in the collection ``"intermediates"``.

    What :func:`capture` does beneath: inside the context, ``model.apply(..., mutable=["intermediates"])``
    returns the records beside the output and what else the model sows. ``model.init`` records nothing.

    Args:
      axis_name: as in :func:`capture`.

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
    with observe(_Recorder(axis_name)):
        yield


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """Sows the moments of every layer's input.

    JAX hashes it at each operation that it traces: what it holds is to be hashed in no time.
    """

    axis_name: str | tuple[str, ...] | None
    chosen: frozenset[str] | None = None

    def see(self, module: nn.Module, product: Product) -> None:
        """Sows the record of the layer's input beside its kernel, pooled with those of earlier calls."""
        name = layer_name((*module.path, product.kernel))
        is_chosen = self.chosen is None or name in self.chosen
        if module.is_initializing() or not is_chosen or not isinstance(product.layout, Layout):
            return
        where = name if module.path else type(module).__name__
        record = moments_of(product.layout, product.x, where, self.axis_name)
        pool = functools.partial(pool_records, where=where)
        if not module.sow("intermediates", record_key(product.kernel), record, pool, lambda: None):
            raise RecordError(
                where,
                ", as the collection 'intermediates' is not mutable there. Call linen.capture(model)(...), or "
                "model.apply(..., mutable=['intermediates']); if the layer is inside nn.scan, nn.vmap or nn.RNN, also "
                "add 'intermediates': 0 to its variable_axes",
            )

    def leave(self, module: nn.Module, reason: str) -> None:
        """Nothing is to be done."""


def _empty_records(layers: Layers) -> dict[str, Any]:
    """Returns a tree of records without positions, for the layers whose record has a shape known beforehand."""
    records = {}
    for layer in layers.included:
        if (record := empty_record(layer)) is not None:
            *module, kernel = layer.kernel.path
            records[(*module, record_key(kernel))] = record
    tree: dict[str, Any] = flax.traverse_util.unflatten_dict(records)
    return tree
