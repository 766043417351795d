"""Find the records of a batch among the intermediates of a model, and pool each to the shape of its statistics."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax.layers import Layer, layer_name
from bnp_optax.moments import InputMoments, pool
from bnp_optax.trees import as_path

_SUFFIX = "_input"


def record_key(kernel: str) -> str:
    """Returns under which key a record lies in a tree of intermediates, beside the kernel of this name."""
    return f"{kernel}{_SUFFIX}"


def by_layer(intermediates: Any) -> dict[str, InputMoments]:
    """Returns the records in a tree of intermediates by the names of their layers.

    Example:
      >>> import jax.numpy as jnp
      >>> from bnp_optax import input_moments
      >>> record = input_moments(jnp.ones((2, 3)))
      >>> list(by_layer({"encoder": {"Dense_0": {"kernel_input": record}}, "experts": {"w_input": record}}))
      ['encoder/Dense_0', 'experts/w']
    """
    with_keys = jax.tree_util.tree_leaves_with_path(intermediates, is_leaf=_is_record)
    records = {}
    for keys, leaf in with_keys:
        if _is_record(leaf):
            path = as_path(keys)
            while not path[-1].endswith(_SUFFIX) and len(path) > 1:  # a box (nnx.Intermediate) adds a key
                path = path[:-1]
            records[layer_name((*path[:-1], path[-1].removesuffix(_SUFFIX)))] = leaf
    return records


def find_records(layers: Iterable[Layer], intermediates: Any) -> dict[str, InputMoments]:
    """Returns the record of each layer by its path, with moments ``[stack, group, input]`` and counts ``[stack]``.

    Args:
      layers: whose records are looked for.
      intermediates: the records by layer, as ``capture`` returns them, or a tree of intermediates that holds them among
        others, as Flax collects it under ``record_inputs``.

    Raises:
      TypeError: if ``intermediates`` is no tree of records.
      ValueError: if a record is missing, or has not the shape that its layer needs.
    """
    if not isinstance(intermediates, Mapping):
        raise TypeError(
            "intermediates must be the records that capture(model)(...) returns beside the output, or KEEP_STATISTICS, "
            f"not {type(intermediates).__name__}."
        )
    layers = tuple(layers)
    is_by_layer = all(_is_record(intermediates.get(layer.record)) for layer in layers)
    records = intermediates if is_by_layer else by_layer(intermediates)
    found = {layer: records.get(layer.record) for layer in layers}
    if missing := [layer.path for layer, record in found.items() if record is None]:
        if "intermediates" in intermediates:
            remedy = "Pass the collection itself: intermediates=recorded['intermediates']."
        else:
            remedy = (
                "Pass what bnp_optax.linen.capture(model)(...), or bnp_optax.nnx.capture(model)(...), returned beside "
                "the output of this pass. If it does not call these layers, leave them out with layers.select(...)."
            )
        raise ValueError(f"intermediates hold no record of the input of {', '.join(missing)}. {remedy}")
    return {layer.path: _pool_leading_axes(layer, record) for layer, record in found.items() if record is not None}


def _pool_leading_axes(layer: Layer, record: InputMoments) -> InputMoments:
    """Pools what the transforms inside the model repeat, and all that is mapped or scanned around it."""
    num_outer = record.mean.ndim - len(layer.record_axes) - 3
    roles = "e" * num_outer + layer.record_axes
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
