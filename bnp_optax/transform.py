"""Batch Normalization Preconditioning as an Optax gradient transformation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnp_optax.devices import with_auto_axes
from bnp_optax.layers import Layer, Layers, Parameter, Path
from bnp_optax.moments import InputMoments, VarianceRule, absorb, pool, running_decay, statistics_dtype
from bnp_optax.precondition import Scaling, batch_scale, precondition


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _KeepStatistics:
    def __repr__(self) -> str:
        return "KEEP_STATISTICS"


# What an option's range is checked for: an injected hyperparameter is a JAX array, whose value may be traced.
NUMBERS = (int, float, np.number)

KEEP_STATISTICS: Final = _KeepStatistics()
"""Passed as ``intermediates=``, preconditions with the running statistics as they are.

A step compiled so needs no recording. The scale q2 is that of the last recorded batch.
"""


class ScaleByBNPState(NamedTuple):
    """State of :func:`scale_by_bnp`.

    Each field is a tree structured like the parameters: at a kernel it holds what its layer needs,
    elsewhere a scalar zero.

    Attributes:
      mean: running mean of the layer's input, ``[stack, group, input]``, float32 (float64 for
        float64 parameters).
      variance: running variance, same shape and dtype.
      scale: q2 of the last recorded batch, ``[stack]``.
      seen: examples absorbed so far, ``[stack]``, int32.
      skipped: batches left out because their moments were not finite, ``[stack]``, int32.
    """

    mean: optax.Updates
    variance: optax.Updates
    scale: optax.Updates
    seen: optax.Updates
    skipped: optax.Updates


def scale_by_bnp(
    layers: Layers,
    decay: float | jax.Array = 0.99,
    eps_relative: float | jax.Array = 1e-2,
    eps: float | jax.Array = 1e-4,
    *,
    variance: VarianceRule = "mixture",
    scaling: Scaling | float | jax.Array = 128,
    prior_examples: float | jax.Array | None = 128,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with the running mean and variance of every layer's input.

    For a layer ``a = W h + b`` the step is taken in variables in which the input ``h`` is centred
    and scaled, as Batch Normalization would make it, and mapped back: the gradient ``g`` of
    ``[b; w]`` becomes ``P P' g`` with ``P = (1/q) [1 -mu'; 0 I] [1 0; 0 diag(1/sd)]``. The network
    itself stays as it is. Parameters outside ``layers`` pass unchanged.

    ``update(updates, state, params=None, *, intermediates)`` requires the records of the layers'
    inputs (:func:`bnp_optax.linen.record_inputs`), or :data:`KEEP_STATISTICS`. The running
    statistics absorb the batch first, so that this step already uses it. A layer whose moments are
    not finite keeps the statistics it had, and counts the batch in ``state.skipped``.

    Put it first in a chain: it wants the raw gradient.

    Args:
      layers: the layers to precondition.
      decay: rho, the decay of the running statistics, in [0, 1).
      eps_relative: eps1, damping relative to the largest variance among a unit's inputs.
      eps: eps2, absolute damping.
      variance: ``"mixture"`` is the exact variance of the weighted mixture of batches, right at
        every batch size; ``"batch"`` is the paper's average of batch variances.
      scaling: q2, the scalar that divides a layer's step. With a number C and a batch of N examples
        it is max(C/N, 1): below C examples steps are in proportion to their batch, so that one
        learning rate serves batches of any size. ``"examples"`` is the paper's max(F/N, 1) for F
        inputs a unit, which slows wide layers down; ``"positions"``, ``"bound"`` and ``"none"`` are
        max(F/(N S), 1), max(F/N, S) and 1 for S positions an example.
      prior_examples: how many examples the start (mean 0, variance 1) weighs; ``None`` is the
        paper's constant decay, under which it lingers for 1 / (1 - decay) steps.

    Returns:
      The transformation. Its updates have the gradients' tree, shapes and dtypes.

    Raises:
      ValueError: for an option out of range; by ``init`` if ``layers`` does not describe the
        parameters; by ``update`` if the records lack a layer or have the wrong shape.
      TypeError: by ``update`` if ``intermediates`` is not given or is not a tree of records.

    Example:
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1), bias=("b",)),))
      >>> params = {"w": jnp.zeros((2, 1)), "b": jnp.zeros(1)}
      >>> tx = optax.chain(bnp.scale_by_bnp(layers), optax.sgd(0.1, momentum=0.9))
      >>> state = tx.init(params)
      >>> x = jnp.array([[1.0, 200.0], [2.0, 400.0]])
      >>> loss = lambda p: jnp.mean((x @ p["w"] + p["b"] - 1) ** 2)
      >>> records = {"w_input": bnp.input_moments(x)}
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params, intermediates=records)
      >>> jax.tree.map(jnp.shape, updates)
      {'b': (1,), 'w': (2, 1)}

    References:
      Lange, Helfrich, Ye, Batch Normalization Preconditioning for Neural Network Training,
      JMLR 23(72), 2022, https://arxiv.org/abs/2108.01110
    """
    _check_options(layers, decay, eps_relative, eps, variance, scaling, prior_examples)

    def init_fn(params: optax.Params) -> ScaleByBNPState:
        leaves, treedef = _leaves_by_path(layers, params)
        layer_of = {layer.kernel.path: layer for layer in _present(layers, leaves)}

        def tree(at_kernel: Callable[[tuple[int, int, int], np.dtype], jax.Array]) -> optax.Updates:
            def leaf_of_state(path: Path, leaf: Any) -> Any:
                if path in layer_of:
                    return at_kernel(layer_of[path].moments_shape, statistics_dtype(leaf.dtype))
                return leaf if _is_masked(leaf) else jnp.zeros([], jnp.int32)

            return treedef.unflatten([leaf_of_state(path, leaf) for path, leaf in leaves.items()])

        return ScaleByBNPState(
            mean=tree(lambda shape, dtype: jnp.zeros(shape, dtype)),
            variance=tree(lambda shape, dtype: jnp.ones(shape, dtype)),
            scale=tree(lambda shape, dtype: jnp.ones(shape[:1], dtype)),
            seen=tree(lambda shape, _: jnp.zeros(shape[:1], jnp.int32)),
            skipped=tree(lambda shape, _: jnp.zeros(shape[:1], jnp.int32)),
        )

    def absorb_record(
        layer: Layer, state: ScaleByBNPState, record: InputMoments, decay: Any, scaling_rule: Any, prior_examples: Any
    ) -> ScaleByBNPState:
        batch = jax.tree.map(lambda x: x.astype(state.mean.dtype), record)
        step_decay = running_decay(state.seen, batch.examples, decay, prior_examples)
        new_mean, new_variance = absorb(state.mean, state.variance, batch, step_decay, variance)
        finite = (jnp.isfinite(new_mean) & jnp.isfinite(new_variance)).all((1, 2))
        called = batch.positions > 0  # not, for instance, in a branch that was not taken
        accept = finite & called
        scale = batch_scale(scaling_rule, layer.fan_in, batch.examples, batch.positions)
        return ScaleByBNPState(
            mean=jnp.where(accept[:, None, None], new_mean, state.mean),
            variance=jnp.where(accept[:, None, None], new_variance, state.variance),
            scale=jnp.where(called, scale, state.scale),
            seen=_saturating_add(state.seen, jnp.where(accept, batch.examples, 0)),
            skipped=_saturating_add(state.skipped, ~finite),
        )

    def precondition_layer(
        layer: Layer, state: ScaleByBNPState, gradients: Mapping[Path, Any], eps_relative: Any, eps: Any
    ) -> dict[Path, jax.Array]:
        dtype = state.mean.dtype

        def canonical(parameter: Parameter) -> jax.Array:
            return parameter.to_canonical(gradients[parameter.path]).astype(dtype)

        kernel, bias = precondition(
            canonical(layer.kernel),
            None if layer.bias is None else canonical(layer.bias),
            state.mean,
            state.variance,
            state.scale,
            jnp.asarray(eps_relative, dtype),
            jnp.asarray(eps, dtype),
        )
        new = {layer.kernel: kernel}
        if layer.bias is not None and bias is not None:
            new[layer.bias] = bias
        return {p.path: p.from_canonical(value).astype(gradients[p.path].dtype) for p, value in new.items()}

    def update_layer(
        layer: Layer,
        state: ScaleByBNPState,
        gradients: Mapping[Path, Any],
        record: InputMoments | None,
        options: tuple[Any, ...],
    ) -> tuple[ScaleByBNPState, dict[Path, jax.Array]]:
        decay, eps_relative, eps, examples_of_a_full_step, prior_examples = (
            options  # arrays, if they are injected hyperparameters
        )
        if record is not None:
            rule = scaling if isinstance(scaling, str) else examples_of_a_full_step
            state = absorb_record(layer, state, record, decay, rule, prior_examples)
        return state, precondition_layer(layer, state, gradients, eps_relative, eps)

    def update_fn(
        updates: optax.Updates,
        state: ScaleByBNPState,
        params: optax.Params | None = None,
        *,
        intermediates: Any,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByBNPState]:
        del params, extra_args
        gradients, treedef = _leaves_by_path(layers, updates)
        present = _present(layers, gradients)
        records = None if intermediates is KEEP_STATISTICS else _find_records(present, intermediates)
        fields = [dict(zip(gradients, _leaves_like(treedef, field), strict=True)) for field in state]
        for layer in present:
            layer_state = ScaleByBNPState(*(field[layer.kernel.path] for field in fields))
            _check_state(layer, layer_state)
            own = {parameter.path: gradients[parameter.path] for parameter in layer.parameters}
            layer_state, own = with_auto_axes(
                functools.partial(update_layer, layer),
                layer_state,
                own,
                None if records is None else records[layer.path],
                (decay, eps_relative, eps, None if isinstance(scaling, str) else scaling, prior_examples),
                like=(layer_state, own),
            )
            for field, value in zip(fields, layer_state, strict=True):
                field[layer.kernel.path] = value
            gradients |= own
        new_state = ScaleByBNPState(*(treedef.unflatten(field.values()) for field in fields))
        return treedef.unflatten(gradients.values()), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_options(
    layers: Any, decay: Any, eps_relative: Any, eps: Any, variance: Any, scaling: Any, prior_examples: Any
) -> None:
    if not isinstance(layers, Layers):
        raise TypeError(
            "layers must be a bnp_optax.Layers, as linen.find_layers(model, x) returns it, not "
            f"{type(layers).__name__}."
        )
    if isinstance(decay, NUMBERS) and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), but is {decay}.")
    if isinstance(scaling, NUMBERS) and not 0 < scaling < float("inf"):
        raise ValueError(f"scaling must be a positive number of examples or the name of a rule, but is {scaling}.")
    for name, value in (("eps_relative", eps_relative), ("eps", eps), ("prior_examples", prior_examples)):
        if isinstance(value, NUMBERS) and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, but is {value}.")
    if variance not in get_args(VarianceRule):
        raise ValueError(
            f"variance must be one of {', '.join(map(repr, get_args(VarianceRule)))}, but is {variance!r}."
        )
    if not isinstance(scaling, (*NUMBERS, jax.Array)) and scaling not in get_args(Scaling):
        names = ", ".join(map(repr, get_args(Scaling)))
        raise ValueError(f"scaling must be a number of examples or one of {names}, but is {scaling!r}.")


def _leaves_by_path(layers: Layers, tree: Any) -> tuple[dict[Path, Any], Any]:
    """Flattens a tree to its leaves by path; a parameter in a box (`nn.Partitioned`) has the path of the box."""
    parameters = {parameter.path for layer in layers.values() for parameter in layer.parameters}
    with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_masked)
    leaves = {}
    for keys, leaf in with_keys:
        path = _as_path(keys)
        leaves[path[:-1] if path[:-1] in parameters else path] = leaf
    return leaves, treedef


def _as_path(keys: tuple[Any, ...]) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _leaves_like(treedef: Any, tree: Any) -> list[Any]:
    try:
        leaves: list[Any] = treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"The state is not structured like the gradients: {error} If it comes from a checkpoint, restore one of "
            "this model; if the model has changed, call init again."
        ) from error
    return leaves


def _check_state(layer: Layer, state: ScaleByBNPState) -> None:
    stack, *_ = layer.moments_shape
    expected = ScaleByBNPState(layer.moments_shape, layer.moments_shape, *((stack,),) * 3)
    for name, leaf, shape in zip(state._fields, state, expected, strict=True):
        if jnp.shape(leaf) != shape:
            raise ValueError(
                f"The state's {name} of {layer.kernel.name} has shape {jnp.shape(leaf)}, but the layer needs {shape}. "
                "If it comes from a checkpoint, restore one of this model; if the model has changed, call init again."
            )


def _present(layers: Layers, leaves: Mapping[Path, Any]) -> list[Layer]:
    """Checks the layers against a tree of parameters or gradients, and returns those to precondition.

    A masked kernel takes its layer out. A masked bias is a constant to this transformation, so
    that its layer is one without bias.
    """
    if not leaves:  # optax.tree.map_params calls init with a placeholder that has no leaves
        return []
    present = []
    for layer in layers.values():
        held = [parameter for parameter in layer.parameters if _is_held(parameter, leaves)]
        if layer.kernel in held:
            present.append(layer if layer.bias in held else dataclasses.replace(layer, bias=None))
    return present


def _is_held(parameter: Parameter, leaves: Mapping[Path, Any]) -> bool:
    """Returns whether a tree holds a parameter, rather than a mask of it or of a tree around it."""
    if any(_is_masked(leaves.get(parameter.path[:depth])) for depth in range(1, len(parameter.path) + 1)):
        return False
    if parameter.path not in leaves:
        raise ValueError(
            f"layers describes {parameter.name}, which the parameters do not hold. They hold "
            f"{', '.join('/'.join(path) for path in list(leaves)[:6])}{', ...' if len(leaves) > 6 else ''}. "
            "Call find_layers on the model that made these parameters."
        )
    if (shape := jnp.shape(leaves[parameter.path])) != parameter.shape:
        raise ValueError(
            f"layers describes {parameter.name} with shape {parameter.shape}, but it has shape {shape}. Call "
            "find_layers again, on this model and with inputs of this shape."
        )
    return True


def _find_records(layers: list[Layer], intermediates: Any) -> dict[str, InputMoments]:
    """Returns each layer's record, pooled to the shape of its statistics."""
    if not isinstance(intermediates, Mapping):
        raise TypeError(
            "intermediates must be the tree of recorded inputs that model.apply(..., mutable=['intermediates']) "
            f"returns under record_inputs(), or KEEP_STATISTICS, not {type(intermediates).__name__}."
        )
    with_keys = jax.tree_util.tree_leaves_with_path(intermediates, is_leaf=_is_record)
    records = {_as_path(keys): leaf for keys, leaf in with_keys if _is_record(leaf)}
    records |= {path[:-1]: record for path, record in records.items()}  # a box (nnx.Intermediate) adds a key
    found = {layer.path: records.get(layer.record) for layer in layers}
    if missing := [path for path, record in found.items() if record is None]:
        if "intermediates" in intermediates:
            remedy = "Pass the collection itself: intermediates=recorded['intermediates']."
        else:
            remedy = (
                "Run model.apply(..., mutable=['intermediates']), or nnx.capture(model, nnx.Intermediate)(...), inside "
                "'with record_inputs():'. If this pass does not call these layers, leave them out with "
                "layers.select(...)."
            )
        raise ValueError(f"intermediates hold no record of the input of {', '.join(missing)}. {remedy}")
    return {layer.path: _pool_leading_axes(layer, records[layer.record]) for layer in layers}


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
    pooled = pool(record, example_axes, repeat_axes)

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


def _saturating_add(count: jax.Array, more: jax.Array) -> jax.Array:
    room = np.iinfo(count.dtype).max - count
    return count + jnp.minimum(room, more.astype(count.dtype))
