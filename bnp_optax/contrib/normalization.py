"""What layers share that normalize with statistics of the batch: moments, running averages, scale and shift.

They follow ``flax.linen.BatchNorm`` and ``flax.nnx.BatchNorm`` in names and meaning, so that a model changes from these
to the layers of this package by another class name. Two things are done more carefully here: a mask is pooled over
devices by its counts, and what a mask hides entirely leaves the running statistics as they are.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

NO_CHOICE = (
    "{} was not told whether to use its running statistics. Pass use_running_average=False in training and "
    "use_running_average=True in evaluation, to the layer or to its call."
)


class BatchMoments(NamedTuple):
    """Mean and variance of a batch, of the shape of the batch with the axes that are pooled of size 1.

    Attributes:
      mean: 0 where nothing was observed.
      variance: biased, the average of squared deviations; 0 where nothing was observed.
      observed: whether any value counted: false where a mask hides all of them.
    """

    mean: jax.Array
    variance: jax.Array
    observed: jax.Array


def feature_axes(rank: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the axes that are not pooled, sorted and counted from the front.

    Args:
      rank: how many axes the input has.
      axis: the feature axis, or several, as a normalization layer of Flax takes them.

    Returns:
      The axes.

    Raises:
      ValueError: if the input has no such axis.

    Example:
      >>> feature_axes(4, -1), feature_axes(4, (3, 1))
      ((3,), (1, 3))
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not all(-rank <= each < rank for each in axes):
        raise ValueError(f"axis is {axis}, but the input has {rank} axes.")
    return tuple(sorted({each % rank for each in axes}))


def kept_shape(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """Returns a shape whose axes are of size 1 but for these, to which statistics are broadcast."""
    return tuple(size if axis in axes else 1 for axis, size in enumerate(shape))


def as_kept(statistic: jax.Array, x: jax.Array, axes: Sequence[int], what: str) -> jax.Array:
    """Returns a statistic or parameter of the features in the shape and dtype to be combined with the input.

    Args:
      statistic: as many numbers as the input has features, in the order of its axes.
      x: the input.
      axes: its feature axes.
      what: what the statistic is, for the error.

    Returns:
      The statistic, of the input's rank, and of its dtype or a wider one.

    Raises:
      ValueError: if there are more or fewer numbers than features.
    """
    shape = kept_shape(x.shape, axes)
    if statistic.size != math.prod(shape):
        raise ValueError(
            f"The {what} is of {statistic.size} features, but an input of shape {x.shape} has {math.prod(shape)} "
            f"along axis {', '.join(map(str, axes))}. Give the layer inputs of one number of features, or make it anew."
        )
    return statistic.reshape(shape).astype(float32_or_wider(x.dtype, statistic.dtype))


def as_real(x: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns an input in the dtype in which it is normalized: that asked for, or its own, but float32 at least.

    Args:
      x: the input.
      dtype: the dtype of the result of a layer, if that is not to follow from the input.

    Returns:
      The input.

    Raises:
      TypeError: for complex numbers, which ``nn.BatchNorm`` takes and the methods here do not define.

    Example:
      >>> as_real(jnp.ones(2, jnp.bfloat16)).dtype, as_real(jnp.ones(2, int)).dtype
      (dtype('float32'), dtype('float32'))
    """
    x = jnp.asarray(x)
    if any(jnp.issubdtype(each, jnp.complexfloating) for each in (x.dtype, dtype) if each is not None):
        raise TypeError("This normalization is of real numbers. Give it real and imaginary part as features.")
    return x.astype(float32_or_wider(x.dtype if dtype is None else dtype))


def float32_or_wider(*dtypes: DTypeLike) -> np.dtype[Any]:
    """Returns float64 if that is one of these, else float32: the dtype of statistics of all of them."""
    return np.dtype("float64" if any(np.dtype(dtype) == np.float64 for dtype in dtypes) else "float32")


def batch_moments(
    x: jax.Array,
    axes: Sequence[int],
    *,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
) -> BatchMoments:
    """Returns mean and biased variance of a batch over all axes but some.

    Over several devices they are those of the whole batch: sums and counts are added up, not averages averaged, so that
    devices may hide different numbers of examples.

    Args:
      x: the batch, in float32 or wider.
      axes: the axes that are not pooled, from :func:`feature_axes`.
      mask: what counts, an array of booleans or of zeros and ones that is broadcast to the batch; by default all.
      axis_name: the name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which the batch is split.
      axis_index_groups: groups of indices within that axis, each of which is a batch of its own.
      use_fast_variance: reads the batch once, ``E[x^2] - E[x]^2``, which loses digits where the mean is much larger
        than the deviation; otherwise twice, ``E[(x - E[x])^2]``.

    Returns:
      The moments.

    Raises:
      ValueError: if the mask cannot be broadcast to the batch.

    Example:
      >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0], [99.0, 99.0]])
      >>> moments = batch_moments(x, (1,), mask=jnp.array([[1], [1], [0]]))
      >>> print(moments.mean, moments.variance, moments.observed)
      [[2. 5.]] [[1. 0.]] [[ True  True]]
    """
    pooled = tuple(axis for axis in range(x.ndim) if axis not in axes)

    def add_up(*values: jax.Array) -> list[jax.Array]:
        sums = [each.sum(pooled, keepdims=True) for each in values]
        return sums if axis_name is None else jax.lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)

    if mask is None:
        members = 1 if axis_name is None else jax.lax.psum(1, axis_name, axis_index_groups=axis_index_groups)
        count = jnp.full(kept_shape(x.shape, axes), math.prod(x.shape[axis] for axis in pooled) * members)
    else:
        counted = broadcast_mask(mask, x.shape)
        (count,) = add_up(counted.astype(jnp.int32))
        x = jnp.where(counted, x, 0)
    divisor = jnp.maximum(count, 1).astype(x.dtype)
    if use_fast_variance:
        total, squares = add_up(x, jnp.square(x))
        mean = total / divisor
        variance = jnp.maximum(squares / divisor - jnp.square(mean), 0)
    else:
        (total,) = add_up(x)
        mean = total / divisor
        deviation = x - mean if mask is None else jnp.where(counted, x - mean, 0)
        (squares,) = add_up(jnp.square(deviation))
        variance = squares / divisor
    return BatchMoments(mean, variance, count > 0)


def moments_or_running(
    x: jax.Array, axes: Sequence[int], mean: jax.Array, variance: jax.Array, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of a batch, and the running ones where nothing was observed.

    Args:
      x: the batch, in float32 or wider.
      axes: the axes that are not pooled.
      mean: the running mean, one number a feature.
      variance: the running variance, likewise.
      **options: those of :func:`batch_moments`.

    Returns:
      Both in the rank of the batch, and in its dtype or that of the running ones, whichever is wider.

    Raises:
      ValueError: if a running one is not of the features of the batch, or the mask does not fit.

    Example:
      >>> hidden = jnp.array([[True, False]])
      >>> moments_or_running(jnp.array([[3.0, 9.0]]), (1,), jnp.ones(2), jnp.full(2, 4.0), mask=hidden)
      (Array([[3., 1.]], dtype=float32), Array([[0., 4.]], dtype=float32))
    """
    running_mean, running_variance = (as_kept(each, x, axes, "running statistic") for each in (mean, variance))
    moments = batch_moments(x, axes, **options)
    wide = running_mean.dtype
    return (
        jnp.where(moments.observed, moments.mean.astype(wide), running_mean),
        jnp.where(moments.observed, moments.variance.astype(wide), running_variance),
    )


def broadcast_mask(mask: ArrayLike, shape: Sequence[int]) -> jax.Array:
    """Returns a mask as booleans of the input's shape.

    Args:
      mask: booleans, or zeros and ones.
      shape: of the input.

    Returns:
      The mask.

    Raises:
      ValueError: if it cannot be broadcast to the shape.
    """
    mask = jnp.asarray(mask)
    ranked = mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
    if ranked.ndim != len(shape) or any(own not in (1, size) for own, size in zip(ranked.shape, shape, strict=True)):
        raise ValueError(
            f"The mask has shape {mask.shape}, which cannot be broadcast to the input's {tuple(shape)}. One that hides "
            "examples has their axis, and size 1 along the others: mask[:, None] for an input of two axes."
        )
    return jnp.broadcast_to(ranked.astype(bool), shape)


def moving_average(average: jax.Array, value: jax.Array, momentum: ArrayLike) -> jax.Array:
    """Returns ``average + (1 - momentum) (value - average)``, in shape and dtype of the average.

    No gradient flows through it: it is a state, not part of the function that is trained.

    Args:
      average: the running average.
      value: that of the batch, as many numbers.
      momentum: how much of the average stays.

    Returns:
      The new average.

    Example:
      >>> print(moving_average(jnp.zeros(2), jnp.array([[1.0, 2.0]]), 0.9))
      [0.1 0.2]
    """
    value = jax.lax.stop_gradient(value.reshape(average.shape))
    old = average.astype(value.dtype)
    return (old + jnp.asarray(1 - momentum, value.dtype) * (value - old)).astype(average.dtype)


def scale_and_shift(
    normalized: jax.Array, scale: jax.Array | None, bias: jax.Array | None, axes: Sequence[int]
) -> jax.Array:
    """Returns ``scale * normalized + bias``, with one number a feature, in the widest of their dtypes.

    Args:
      normalized: the input, normalized.
      scale: gamma, or ``None``.
      bias: beta, or ``None``.
      axes: the feature axes.

    Returns:
      The result, of the input's shape.

    Raises:
      ValueError: if there are more or fewer numbers than features.
    """
    if scale is not None:
        kept = as_kept(scale, normalized, axes, "scale")
        normalized = normalized.astype(kept.dtype) * kept
    if bias is not None:
        kept = as_kept(bias, normalized, axes, "bias")
        normalized = normalized.astype(kept.dtype) + kept
    return normalized
