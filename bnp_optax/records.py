"""The records of a batch: made in the calls of layers, found by layer, and pooled to the shape of the statistics."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax.counting import Counting
from bnp_optax.layers import Layer, Path, layer_name
from bnp_optax.layouts import Layout, RecordError
from bnp_optax.moments import InputMoments, pool
from bnp_optax.trees import as_path

_SUFFIX = "_input"


def moments_of(counting: Counting, layout: Layout, x: jax.Array, name: str, where: str) -> InputMoments:
    """Returns the record of an input.

    Args:
      counting: what of it counts.
      layout: the axis roles of its layer.
      x: it.
      name: the layer's name.
      where: the layer, for errors.

    Raises:
      RecordError: saying of which layer, and why.
    """
    try:
        return counting.moments(layout, x, name)
    except ValueError as error:
        raise RecordError(where, f": {error}") from error


def pool_records(earlier: InputMoments | None, record: InputMoments, where: str) -> InputMoments:
    """Pools a call of a layer with earlier ones of the same forward pass: more positions of the same examples.

    Args:
      earlier: the record of the earlier calls, whose dtype the result has; ``None`` before the first.
      record: that of the new call.
      where: the layer, for errors.

    Raises:
      RecordError: if their shapes differ.
    """
    if earlier is None:
        return record
    if earlier.total.shape != record.total.shape:
        sizes = [moments.total.shape[-1] for moments in (earlier, record)]
        inputs = f"with inputs of {sizes[0]} and of {sizes[1]} features"
        reason = "both inside and outside of a transform that adds an axis" if sizes[0] == sizes[1] else inputs
        raise RecordError(where, f": it is called {reason}. Record the others alone: capture(model, layers=layers)")
    return pool(jax.tree.map(lambda a, b: jnp.stack([a, b.astype(a.dtype)]), earlier, record), repeat_axes=[0])


def empty_record(layer: Layer) -> InputMoments | None:
    """Returns the record of a layer that was not called, ``None`` where its shape depends on the batch."""
    if not set(layer.record_axes) <= {"s"}:
        return None
    sums = jnp.zeros((*layer.kernel.stack_shape, *layer.moments_shape[1:]))
    examples = jnp.zeros(layer.kernel.stack_shape, jnp.int32)
    return InputMoments(sums, sums, sums, examples, examples.astype(sums.dtype))


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
      >>> list(by_layer({"policy": {"Dense_0": record}, "value": {"Dense_0": record}}))  # of two captures
      ['policy/Dense_0', 'value/Dense_0']
    """
    records = {}
    for path, record in _with_paths(intermediates):
        own = [depth for depth, key in enumerate(path, 1) if key.endswith(_SUFFIX)]
        if own:
            path = path[: own[-1]]  # a box (nnx.Intermediate) adds a key
            path = (*path[:-1], path[-1].removesuffix(_SUFFIX))
        records[layer_name(path)] = record
    return records


def _with_paths(intermediates: Any) -> list[tuple[Path, InputMoments]]:
    with_keys = jax.tree_util.tree_leaves_with_path(intermediates, is_leaf=_is_record)
    return [(as_path(keys), leaf) for keys, leaf in with_keys if _is_record(leaf)]


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
    if is_by_layer:
        records = intermediates
    else:  # in a tree by network and layer, names of layers may end as keys of intermediates do
        records = by_layer(intermediates) | {"/".join(path): record for path, record in _with_paths(intermediates)}
    found = {layer: records.get(layer.record) for layer in layers}
    if missing := [layer.path for layer, record in found.items() if record is None]:
        if "intermediates" in intermediates:
            remedy = "Pass the collection itself: intermediates=recorded['intermediates']."
        else:
            remedy = (
                "Pass what bnp_optax.linen.capture(model)(...), or bnp_optax.nnx.capture(model)(...), which is not "
                "Flax's, returned beside the output of this pass. If it calls these layers inside a transform of JAX, "
                "as jax.grad of a part of the model is, choose them: capture(model, layers=layers). If not at all, "
                "layers.select(...) others."
            )
        raise ValueError(f"intermediates hold no record of the input of {', '.join(missing)}. {remedy}")
    return {layer.path: _pool_leading_axes(layer, record) for layer, record in found.items() if record is not None}


def _pool_leading_axes(layer: Layer, record: InputMoments) -> InputMoments:
    """Pools what the transforms inside the model repeat, and all that is mapped or scanned around it.

    Take a cell that is a scanned stack of 3 layers with 4 inputs, unrolled over 5 steps, in 2 micro-batches that the
    training loop scans. Its record has a mean ``[2, 5, 3, 1, 1, 4]``, its layer the ``record_axes`` "rs" (the steps are
    repeated calls, the 3 a stack), and a stack of its own of 1. What is before these axes, the 2, was added around the
    model: examples. Pooled over 2 and 5 it is ``[3, 1, 1, 4]``, and with the stacks merged ``[3, 1, 4]``.
    """
    if not jnp.issubdtype(record.count.dtype, jnp.integer):
        raise ValueError(
            f"The record of {layer.path} counts its examples in {record.count.dtype}, not in integers: it has been "
            "averaged, as gradients are. Sum records (jax.lax.psum, jnp.add), stack them, or give capture an "
            "axis_name: then they are pooled with exact counts."
        )
    shape = record.total.shape
    num_outer = len(shape) - len(layer.record_axes) - 3
    roles = "b" * num_outer + layer.record_axes
    axes = {role: [axis for axis, r in enumerate(roles) if r == role] for role in "bre"}
    needed = (*layer.kernel.stack_shape, *layer.moments_shape[1:])
    kept = [size for size, role in zip(shape, roles, strict=False) if role == "s"]
    if num_outer < 0 or (*kept, *shape[-3:]) != needed:
        raise ValueError(
            f"The record of {layer.path} has moments of shape {shape}, but the layer needs "
            f"{needed} (stack, group, input) at the end. Record the model that find_layers saw."
        )
    pooled = pool(record, axes["b"], axes["r"], axes["e"]) if any(axes.values()) else record
    stack, groups, inputs = layer.moments_shape
    return InputMoments(
        pooled.total.reshape(stack, groups, inputs),
        pooled.scatter.reshape(stack, groups, inputs),
        pooled.squared.reshape(stack, groups, inputs),
        pooled.examples.reshape(stack),
        pooled.positions.reshape(stack),
    )


def _is_record(leaf: Any) -> bool:
    return isinstance(leaf, InputMoments)
