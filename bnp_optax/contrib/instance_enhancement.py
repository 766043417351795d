"""Instance Enhancement Batch Normalization (IEBN): each example says how much of each normalized feature it keeps.

Batch Normalization scales every example alike. Here a gate between 0 and 1 multiplies each normalized feature of each
example, and follows from the mean of this feature over the positions of this example. The layers are
:class:`bnp_optax.contrib.linen.InstanceEnhancementBatchNorm` and
:class:`bnp_optax.contrib.nnx.InstanceEnhancementBatchNorm`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from bnp_optax.contrib.normalization import (
    as_kept,
    as_real,
    broadcast_mask,
    feature_axes,
    moments_or_running,
    moving_average,
)

GATE_BIAS_INIT = jax.nn.initializers.constant(-1.0)
"""The authors' start, whose weight is 0: the gate is sigmoid(-1) = 0.269 for every example."""


class InstanceEnhanced(NamedTuple):
    """What :func:`instance_enhanced_normalize` returns.

    Attributes:
      normalized: the batch, normalized and gated, before scale and shift.
      mean: the new running mean.
      var: the new running variance.
    """

    normalized: jax.Array
    mean: jax.Array
    var: jax.Array


def instance_gate(
    x: ArrayLike,
    weight: jax.Array,
    bias: jax.Array,
    *,
    axis: int | Sequence[int] = -1,
    dtype: DTypeLike | None = None,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Returns ``sigmoid(weight * m + bias)``, where m is the mean of each feature over the positions of an example.

    Examples are along the first axis that is none of features; all other axes are positions. An input of examples and
    features alone has one position an example, so that m is the value itself.

    A mask hides positions from the mean. An example of which it hides a feature everywhere has the mean of all
    positions, as without a mask: what becomes of it is hidden. (The paper has no masks.)

    Args:
      x: the batch as it comes to the layer, not normalized.
      weight: one number a feature.
      bias: likewise.
      axis: the axis of the features, or several.
      dtype: to compute in, by default the input's; float32 where that is narrower.
      mask: what counts, an array of booleans or of zeros and ones that is broadcast to the batch.

    Returns:
      The gate, of the input's shape with positions of size 1, in float32 or wider.

    Raises:
      TypeError: for complex numbers.
      ValueError: if ``weight`` or ``bias`` is not of the features of the input, or the mask does not fit.

    Example:
      >>> x = jnp.array([[[1.0], [3.0]], [[-2.0], [2.0]]])  # two examples of two positions, whose means are 2 and 0
      >>> print(instance_gate(x, jnp.ones(1), jnp.full(1, -1.0)).ravel())  # sigmoid(1) and sigmoid(-1)
      [0.7310586  0.26894143]
    """
    x = as_real(x, dtype)
    axes = feature_axes(x.ndim, axis)
    weight, bias = (as_kept(each, x, axes, f"gate's {what}") for each, what in ((weight, "weight"), (bias, "bias")))
    positions = tuple(each for each in range(x.ndim) if each not in axes)[1:]
    if mask is None:
        pooled = x.mean(positions, keepdims=True)
    else:
        shown = broadcast_mask(mask, x.shape)
        shown |= ~shown.any(positions, keepdims=True)
        pooled = x.mean(positions, keepdims=True, where=shown)
    return jax.nn.sigmoid(weight * pooled.astype(weight.dtype) + bias.astype(weight.dtype))


def instance_enhanced_normalize(
    x: ArrayLike,
    mean: jax.Array,
    var: jax.Array,
    gate_weight: jax.Array,
    gate_bias: jax.Array,
    *,
    axis: int | Sequence[int] = -1,
    momentum: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
) -> InstanceEnhanced:
    """Normalizes a batch in training: Batch Normalization, times the gate of each example.

        normalized = sigmoid(gate_weight * m + gate_bias) * (x - mean) / sqrt(variance + epsilon)

    with mean and variance of the batch, and m the mean over the positions of each example, from :func:`instance_gate`.
    Gradients flow through all of it. The running averages are those of :class:`flax.linen.BatchNorm`. With a weight of
    0 the gate is one number a feature, a part of the scale; only with another does an example matter.

    Formula and start, weight 0 and bias -1, are those of the authors' code; epsilon is 1e-5 there as here, while the
    default of ``momentum`` is that of Flax. A feature of which a mask hides every value is normalized by its running
    statistics, which it leaves as they are.

    Args:
      x: the batch.
      mean: the running mean, one number a feature.
      var: the running variance, likewise.
      gate_weight: the weight of the gate, likewise.
      gate_bias: its bias, likewise.
      axis: the axis of the features, or several; examples are along the first of the others.
      momentum: how much of the running averages stays.
      epsilon: added to the variance.
      dtype: to compute in, by default the input's; float32 where that is narrower.
      mask: what counts, in the statistics and in the gates.
      axis_name: as :func:`~bnp_optax.contrib.normalization.batch_moments`. Gates need no other device.
      axis_index_groups: likewise.
      use_fast_variance: likewise.

    Returns:
      The batch in float32 or wider, and new running averages in shapes and dtypes of the old.

    Raises:
      TypeError: for complex numbers.
      ValueError: if statistics or gates are not of the features of the input, or the mask does not fit.

    Example:
      >>> x = jnp.array([[1.0], [3.0]])
      >>> zeros, bias = jnp.zeros(1), jnp.full(1, -1.0)
      >>> result = instance_enhanced_normalize(x, zeros, jnp.ones(1), zeros, bias, epsilon=0.0)
      >>> print(result.normalized.ravel(), result.mean, result.var)
      [-0.26894143  0.26894143] [0.02] [1.]

    References:
      Liang, Huang, Liang and Yang, Instance Enhancement Batch Normalization: An Adaptive Regulator of Batch Noise, AAAI
      2020; the authors' code is https://github.com/gbup-group/IEBN
    """
    gate = instance_gate(x, gate_weight, gate_bias, axis=axis, dtype=dtype, mask=mask)
    x = as_real(x, dtype)
    axes = feature_axes(x.ndim, axis)
    batch_mean, batch_var = moments_or_running(
        x,
        axes,
        mean,
        var,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=use_fast_variance,
    )
    return InstanceEnhanced(
        _gated(x, batch_mean, batch_var, gate, epsilon),
        moving_average(mean, batch_mean, momentum),
        moving_average(var, batch_var, momentum),
    )


def instance_enhanced_normalize_inference(
    x: ArrayLike,
    mean: jax.Array,
    var: jax.Array,
    gate_weight: jax.Array,
    gate_bias: jax.Array,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Normalizes with the running statistics, times the gate of each example, which still pools its positions.

    So this is no affine map of the features, and cannot be folded into the linear layer before it.

    Args:
      x: the batch.
      mean: the running mean, one number a feature.
      var: the running variance, likewise.
      gate_weight: the weight of the gate, likewise.
      gate_bias: its bias, likewise.
      axis: the axis of the features, or several.
      epsilon: added to the variance.
      dtype: as :func:`instance_enhanced_normalize`.
      mask: which positions count in the gates.

    Returns:
      The batch in float32 or wider.

    Raises:
      TypeError: for complex numbers.
      ValueError: if statistics or gates are not of the features of the input, or the mask does not fit.

    Example:
      >>> x, zeros = jnp.array([[0.0], [4.0]]), jnp.zeros(1)
      >>> mean, var = jnp.ones(1), jnp.full(1, 4.0)
      >>> print(instance_enhanced_normalize_inference(x, mean, var, zeros, zeros, epsilon=0.0).ravel())
      [-0.25  0.75]
    """
    gate = instance_gate(x, gate_weight, gate_bias, axis=axis, dtype=dtype, mask=mask)
    x = as_real(x, dtype)
    axes = feature_axes(x.ndim, axis)
    mean, var = (as_kept(each, x, axes, "running statistic") for each in (mean, var))
    return _gated(x, mean, var, gate, epsilon)


def _gated(x: jax.Array, mean: jax.Array, var: jax.Array, gate: jax.Array, epsilon: float) -> jax.Array:
    wide = jnp.promote_types(mean.dtype, gate.dtype)
    return (x.astype(wide) - mean.astype(wide)) * jax.lax.rsqrt(var.astype(wide) + epsilon) * gate.astype(wide)
