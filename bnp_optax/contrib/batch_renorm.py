"""Batch Renormalization: training sees what inference will see, also where batches are small or not independent.

Batch Normalization trains with the statistics of the batch, and is used with running ones. Batch Renormalization brings
the first to the second by an affine map of each feature, whose two numbers r and d are constants to the gradient. The
layers are :class:`bnp_optax.contrib.linen.BatchRenorm` and :class:`bnp_optax.contrib.nnx.BatchRenorm`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from bnp_optax.arguments import is_known
from bnp_optax.contrib.normalization import as_kept, as_real, batch_moments, feature_axes, moving_average


def check_limits(r_max: ArrayLike, d_max: ArrayLike) -> None:
    """Checks limits whose values are known.

    Args:
      r_max: the limit of r.
      d_max: the limit of d.

    Raises:
      ValueError: if ``r_max`` is below 1, ``d_max`` is negative, or one is no number.
    """
    if is_known(r_max) and not r_max >= 1:
        raise ValueError(f"r_max is {r_max}, which must be 1 or more: r is clipped to [1 / r_max, r_max].")
    if is_known(d_max) and not d_max >= 0:
        raise ValueError(f"d_max is {d_max}, which must be 0 or more: d is clipped to [-d_max, d_max].")


class Ramp(NamedTuple):
    """Schedules of how far Batch Renormalization may correct a batch, from :func:`ramp`.

    Attributes:
      r_max: the limit of the ratio r of deviations, and ``1 / r_max`` its lower one.
      d_max: the limit of the shift d, in both directions.
    """

    r_max: optax.Schedule
    d_max: optax.Schedule


def ramp(
    hold: int = 5_000, r_end: int = 40_000, d_end: int = 25_000, *, r_max: float = 3.0, d_max: float = 5.0
) -> Ramp:
    """Returns schedules that begin as Batch Normalization and then let the correction grow.

    Until step ``hold`` they are 1 and 0, which is Batch Normalization; then they grow in proportion to the steps, until
    ``r_end`` and ``d_end``, and stay. The numbers are the paper's, which says that the last values were reached
    "gradually": a straight line is this library's reading. A short training wants fewer steps of each, say 5, 40 and
    25 % of its own.

    Args:
      hold: the steps before the correction begins.
      r_end: the step at which the ratio's limit is ``r_max``.
      d_end: the step at which the shift's limit is ``d_max``.
      r_max: the last limit of the ratio.
      d_max: the last limit of the shift.

    Returns:
      The schedules, functions of the number of training steps that a layer has done.

    Raises:
      ValueError: if the steps are not in this order, or the limits leave out Batch Normalization.

    Example:
      >>> schedules = ramp()
      >>> [(round(float(schedules.r_max(t)), 3), round(float(schedules.d_max(t)), 3)) for t in (0, 5000, 25000, 40000)]
      [(1.0, 0.0), (1.0, 0.0), (2.143, 5.0), (3.0, 5.0)]

    References:
      Ioffe, Batch Renormalization, NeurIPS 2017, https://arxiv.org/abs/1702.03275, on the choice of r_max and d_max.
    """
    if not 0 <= hold < min(r_end, d_end):
        raise ValueError(
            f"hold is {hold}, r_end {r_end} and d_end {d_end}: the limits are held until step hold, which must not be "
            "negative, and reach their last values at r_end and d_end, which must come after it."
        )
    check_limits(r_max, d_max)
    return Ramp(
        optax.linear_schedule(1.0, r_max, r_end - hold, hold), optax.linear_schedule(0.0, d_max, d_end - hold, hold)
    )


PAPER = ramp()
"""The limits of the paper: those of ``ramp()``."""


class Renormalized(NamedTuple):
    """What :func:`batch_renormalize` returns.

    Attributes:
      normalized: the batch, normalized, before scale and shift.
      mean: the new running mean.
      std: the new running standard deviation.
    """

    normalized: jax.Array
    mean: jax.Array
    std: jax.Array


def batch_renormalize(
    x: ArrayLike,
    mean: jax.Array,
    std: jax.Array,
    r_max: ArrayLike,
    d_max: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    momentum: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
) -> Renormalized:
    """Normalizes a batch in training, Algorithm 1 of the paper.

    With mean ``m`` and deviation ``s = sqrt(variance + epsilon)`` of each feature over the batch, and running ``mean``
    and ``std`` as they were before it,

        r = clip(s / std, 1 / r_max, r_max)        d = clip((m - mean) / std, -d_max, d_max)
        normalized = (x - m) / s * r + d

    Gradients take r and d as constants: with respect to x they are r times those of Batch Normalization. With
    ``r_max=1, d_max=0`` this is Batch Normalization; without limits it is ``(x - mean) / std``, what inference will do.
    The running averages are then moved by ``1 - momentum`` towards m and s: the average of deviations, not the root of
    an average of variances.

    A feature of which a mask hides every value is normalized by its running statistics, which it leaves as they are.
    (The paper has no masks.)

    Args:
      x: the batch.
      mean: the running mean, one number a feature.
      std: the running standard deviation, likewise.
      r_max: the limit of r, 1 or more.
      d_max: the limit of d, 0 or more.
      axis: the axis of the features, or several; all others are pooled.
      momentum: how much of the running averages stays; the paper's alpha is ``1 - momentum``, 0.01.
      epsilon: added to the variance. The quotations of the paper at hand do not have it; this is Flax's of BatchNorm.
      dtype: to compute in, by default the input's; float32 where that is narrower.
      mask: as :func:`~bnp_optax.contrib.normalization.batch_moments`.
      axis_name: likewise.
      axis_index_groups: likewise.
      use_fast_variance: likewise.

    Returns:
      The batch in float32 or wider, and new running averages in shapes and dtypes of the old.

    Raises:
      TypeError: for complex numbers.
      ValueError: if ``mean`` or ``std`` is not of the features of the input, the mask does not fit, or a limit leaves
        out Batch Normalization.

    Example:
      >>> x = jnp.array([[1.0], [3.0]])
      >>> result = batch_renormalize(x, jnp.zeros(1), jnp.ones(1), r_max=2.0, d_max=5.0, epsilon=0.0)
      >>> print(result.normalized.ravel(), result.mean, result.std)  # r is 1 and d is 2
      [1. 3.] [0.02] [1.]

    References:
      Ioffe, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models, NeurIPS 2017,
      https://arxiv.org/abs/1702.03275, Algorithm 1.
    """
    check_limits(r_max, d_max)
    x = as_real(x, dtype)
    axes = feature_axes(x.ndim, axis)
    running_mean, running_std = (as_kept(each, x, axes, "running statistic") for each in (mean, std))
    moments = batch_moments(
        x,
        axes,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=use_fast_variance,
    )
    wide = running_mean.dtype
    batch_mean = jnp.where(moments.observed, moments.mean.astype(wide), running_mean)
    batch_std = jnp.where(moments.observed, jnp.sqrt(moments.variance + epsilon).astype(wide), running_std)
    highest, farthest = jnp.asarray(r_max, wide), jnp.asarray(d_max, wide)
    r = jax.lax.stop_gradient(jnp.clip(batch_std / running_std, 1 / highest, highest))
    d = jax.lax.stop_gradient(jnp.clip((batch_mean - running_mean) / running_std, -farthest, farthest))
    normalized = (x.astype(wide) - batch_mean) / batch_std * r + d
    return Renormalized(
        normalized, moving_average(mean, batch_mean, momentum), moving_average(std, batch_std, momentum)
    )


def batch_renormalize_inference(
    x: ArrayLike, mean: jax.Array, std: jax.Array, *, axis: int | Sequence[int] = -1, dtype: DTypeLike | None = None
) -> jax.Array:
    """Normalizes with the running statistics: ``(x - mean) / std``, without epsilon, which is in ``std`` already.

    Args:
      x: the batch.
      mean: the running mean, one number a feature.
      std: the running standard deviation, likewise.
      axis: the axis of the features, or several.
      dtype: as :func:`batch_renormalize`.

    Returns:
      The batch in float32 or wider.

    Raises:
      TypeError: for complex numbers.
      ValueError: if ``mean`` or ``std`` is not of the features of the input.

    Example:
      >>> print(batch_renormalize_inference(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.full(1, 2.0)).ravel())
      [0. 1.]
    """
    x = as_real(x, dtype)
    axes = feature_axes(x.ndim, axis)
    mean, std = (as_kept(each, x, axes, "running statistic") for each in (mean, std))
    return (x.astype(mean.dtype) - mean) / std


def limit_at(limit: float | optax.Schedule, steps: jax.Array) -> ArrayLike:
    """Returns a limit, or what its schedule says after so many steps."""
    return limit(steps) if callable(limit) else limit
