"""Find the records of a batch among the intermediates of a model, and pool each to the shape of its statistics."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax.layers import Layer
from bnp_optax.moments import InputMoments, pool
from bnp_optax.trees import as_path


def find_records(layers: Iterable[Layer], intermediates: Any) -> dict[str, InputMoments]:
    """Returns the record of each layer by its path, with moments ``[stack, group, input]`` and counts ``[stack]``.

    Args:
      layers: whose records are looked for.
      intermediates: the tree of recorded inputs, which may hold others too.

    Raises:
      TypeError: if ``intermediates`` is no tree of records.
      ValueError: if a record is missing, or has not the shape that its layer needs.
    """
    if not isinstance(intermediates, Mapping):
        raise TypeError(
            "intermediates must be the tree of recorded inputs that model.apply(..., mutable=['intermediates']) "
            f"returns under record_inputs(), or KEEP_STATISTICS, not {type(intermediates).__name__}."
        )
    with_keys = jax.tree_util.tree_leaves_with_path(intermediates, is_leaf=_is_record)
    records = {as_path(keys): leaf for keys, leaf in with_keys if _is_record(leaf)}
    records |= {path[:-1]: record for path, record in records.items()}  # a box (nnx.Intermediate) adds a key
    found = {layer: records.get(layer.record) for layer in layers}
    if missing := [layer.path for layer, record in found.items() if record is None]:
        if "intermediates" in intermediates:
            remedy = "Pass the collection itself: intermediates=recorded['intermediates']."
        else:
            remedy = (
                "Run model.apply(..., mutable=['intermediates']), or nnx.capture(model, nnx.Intermediate)(...), inside "
                "'with record_inputs():'. If this pass does not call these layers, leave them out with "
                "layers.select(...)."
            )
        raise ValueError(f"intermediates hold no record of the input of {', '.join(missing)}. {remedy}")
    return {layer.path: _pool_leading_axes(layer, record) for layer, record in found.items() if record is not None}


def _pool_leading_axes(layer: Layer, record: InputMoments) -> InputMoments:
    """Pools what the transforms inside the model repeat, and all that is mapped or scanned around it."""
    num_outer = record.mean.ndim - len(layer.lifts) - 3
    roles = "e" * num_outer + layer.lifts
    example_axes, repeat_axes = ([axis for axis, r in enumerate(roles) if r == role] for role in "er")
    *lifted, own_stack = layer.kernel.stack_shape
    _, groups, inputs = layer.moments_shape
    stack = [size for size, role in zip(record.mean.shape, roles, strict=False) if role == "s"]
    # a record with one entry serves all the entries of the layer's own stack
    if (
        num_outer < 0
        or (stack, *record.mean.shape[-2:]) != (lifted, groups, inputs)
        or record.mean.shape[-3] not in (1, own_stack)
    ):
        raise ValueError(
            f"The record of {layer.path} has moments of shape {record.mean.shape}, but the layer needs "
            f"{(*lifted, own_stack, groups, inputs)} (stack, group, input) at the end. Record the model that "
            "find_layers saw."
        )
    pooled = pool(record, example_axes, repeat_axes) if example_axes or repeat_axes else record

    def merge_stack(leaf: jax.Array, features: tuple[int, ...]) -> jax.Array:
        return jnp.broadcast_to(leaf, (*lifted, own_stack, *features)).reshape(-1, *features)

    return InputMoments(
        merge_stack(pooled.mean, (groups, inputs)),
        merge_stack(pooled.variance, (groups, inputs)),
        merge_stack(pooled.examples, ()),
        merge_stack(pooled.positions, ()),
    )


def _is_record(leaf: Any) -> bool:
    return isinstance(leaf, InputMoments)
