"""Batch Group Normalization: statistics of groups of channels over the batch, for batches too small or too large.

Batch Normalization has a mean and a variance for each channel, Group Normalization for each group of channels of each
example. Batch Group Normalization has them for each group of channels over the whole batch: few groups make up for a
small batch by more values a group. The layers are :class:`bnp_optax.contrib.linen.BatchGroupNorm` and
:class:`bnp_optax.contrib.nnx.BatchGroupNorm`.
"""

import dataclasses
import math
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


class GroupNormalized(NamedTuple):
    """What :func:`batch_group_normalize` returns.

    Attributes:
      normalized: the batch, normalized, before scale and shift.
      mean: the new running mean.
      var: the new running variance.
    """

    normalized: jax.Array
    mean: jax.Array
    var: jax.Array


@dataclasses.dataclass(frozen=True)
class Grouping:
    """How an input is seen as groups: from :func:`grouping`.

    Attributes:
      shape: of the input.
      channels: the axis of the channels.
      parts: into how many parts each channel is cut; 0 if groups are of whole channels.
      num_groups: how many groups there are.
    """

    shape: tuple[int, ...]
    channels: int
    parts: int
    num_groups: int

    def split(self, x: jax.Array) -> jax.Array:
        """Returns an array of the input's shape with the groups in the axes :attr:`axes`."""
        if self.parts:
            return jnp.moveaxis(x, self.channels, 1).reshape(self.shape[0], self.num_groups, -1)
        before, after = self.shape[: self.channels], self.shape[self.channels + 1 :]
        return x.reshape(*before, self.num_groups, self.shape[self.channels] // self.num_groups, *after)

    def merge(self, groups: jax.Array) -> jax.Array:
        """Returns the array of which :meth:`split` made these groups."""
        if self.parts:
            rest = (size for axis, size in enumerate(self.shape[1:], 1) if axis != self.channels)
            moved = groups.reshape(self.shape[0], self.shape[self.channels], *rest)
            return jnp.moveaxis(moved, 1, self.channels)
        return groups.reshape(self.shape)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axis of the groups in what :meth:`split` returns."""
        return (1,) if self.parts else (self.channels,)


def grouping(
    shape: Sequence[int], num_groups: int, *, axis: int | Sequence[int] = -1, spatial_shape: Sequence[int] | None = None
) -> Grouping:
    """Checks that the groups fit an input, and says how it is seen as groups.

    Args:
      shape: of the input.
      num_groups: G, which divides the number of channels C; or, where ``spatial_shape`` is given, a multiple of C.
      axis: the axis of the channels.
      spatial_shape: the sizes of all axes but the first, of the examples, and the channels'.

    Returns:
      The grouping.

    Raises:
      ValueError: if the groups do not fit, with what would.
    """
    axes = feature_axes(len(shape), axis)
    if len(axes) != 1:
        raise ValueError(f"axis is {axis}, but groups are of channels, which are along one axis.")
    (channels_axis,) = axes
    channels = shape[channels_axis]
    spatial = tuple(size for number, size in enumerate(shape) if number not in (0, channels_axis))
    if spatial_shape is not None and tuple(spatial_shape) != spatial:
        raise ValueError(
            f"The input has shape {tuple(shape)}, of which {spatial} are positions, but spatial_shape is "
            f"{tuple(spatial_shape)}. Statistics of parts of a channel belong to positions, so that training and "
            "evaluation must be of images of one size."
        )
    if num_groups < 1 or (num_groups <= channels and channels % num_groups):
        raise ValueError(
            f"num_groups is {num_groups}, which does not divide the {channels} channels of an input of shape "
            f"{tuple(shape)} with axis={axis}. Each group is of equally many channels."
        )
    parts = num_groups // channels if num_groups > channels else 0
    if parts and spatial_shape is None:
        raise ValueError(
            f"num_groups is {num_groups}, more than the {channels} channels of an input of shape {tuple(shape)} with "
            f"axis={axis}. At most {channels} groups are of whole channels. To cut each channel into parts by its "
            f"rows, with statistics of their own, say so by spatial_shape={spatial}."
        )
    if parts and (num_groups % channels or math.prod(spatial) % parts or channels_axis == 0):
        raise ValueError(
            f"num_groups is {num_groups}, which does not cut the channels of an input of shape {tuple(shape)} with "
            f"axis={axis} into equal parts. It must be {channels} times a divisor of the {math.prod(spatial)} "
            "positions, and the first axis that of the examples."
        )
    return Grouping(tuple(shape), channels_axis, parts, num_groups)


def batch_group_normalize(
    x: ArrayLike,
    mean: jax.Array,
    var: jax.Array,
    num_groups: int,
    *,
    axis: int | Sequence[int] = -1,
    spatial_shape: Sequence[int] | None = None,
    momentum: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
) -> GroupNormalized:
    """Normalizes a batch in training: each group of channels by its mean and variance over examples and positions.

    An example of C channels and S positions, the numbers of each channel together, is cut into G parts of equal size;
    the values of part g of all examples have mean 0 and variance 1 in the result. G = C is Batch Normalization, and on
    a single example, G groups are Group Normalization.

    With G up to C a group is of C/G neighbouring channels. G = C j, for j that divides S, cuts each channel into j
    parts of consecutive positions (for images, blocks of rows): more statistics than channels, and bound to the size
    of the images. That has to be asked for by ``spatial_shape``.

    Running averages are those of :class:`flax.linen.BatchNorm`, of biased variances. The paper's text was not at hand:
    the formula is from its abstract and public implementations, momentum and epsilon are Flax's, there is no default
    for G. By the abstract, small batches want few groups, and very large ones many.

    Args:
      x: the batch, its first axis that of the examples.
      mean: the running mean, one number a group.
      var: the running variance, likewise.
      num_groups: G.
      axis: the axis of the channels.
      spatial_shape: allows more groups than channels: the sizes of all axes but the examples' and the channels'.
      momentum: how much of the running averages stays.
      epsilon: added to the variance.
      dtype: to compute in, by default the input's; float32 where that is narrower.
      mask: as :func:`~bnp_optax.contrib.normalization.batch_moments`; a group of which nothing counts is normalized by
        its running statistics, and leaves them as they are.
      axis_name: likewise.
      axis_index_groups: likewise.
      use_fast_variance: likewise.

    Returns:
      The batch in float32 or wider, and new running averages in shapes and dtypes of the old.

    Raises:
      TypeError: for complex numbers.
      ValueError: if the groups do not fit the input, ``mean`` or ``var`` is not of so many groups, or the mask does
        not fit.

    Example:
      >>> x = jnp.array([[1.0, 3.0, 5.0, 5.0], [1.0, 3.0, 9.0, 9.0]])
      >>> result = batch_group_normalize(x, jnp.zeros(2), jnp.ones(2), num_groups=2, momentum=0.0, epsilon=0.0)
      >>> print(result.normalized, result.mean, result.var)
      [[-1.  1. -1. -1.]
       [-1.  1.  1.  1.]] [2. 7.] [1. 4.]

    References:
      Zhou et al., Batch Group Normalization, 2020, https://arxiv.org/abs/2012.02782
    """
    x = as_real(x, dtype)
    view = grouping(x.shape, num_groups, axis=axis, spatial_shape=spatial_shape)
    groups = view.split(x)
    batch_mean, batch_var = moments_or_running(
        groups,
        view.axes,
        mean,
        var,
        mask=None if mask is None else view.split(broadcast_mask(mask, x.shape)),
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=use_fast_variance,
    )
    normalized = (groups.astype(batch_mean.dtype) - batch_mean) * jax.lax.rsqrt(batch_var + epsilon)
    return GroupNormalized(
        view.merge(normalized), moving_average(mean, batch_mean, momentum), moving_average(var, batch_var, momentum)
    )


def batch_group_normalize_inference(
    x: ArrayLike,
    mean: jax.Array,
    var: jax.Array,
    num_groups: int,
    *,
    axis: int | Sequence[int] = -1,
    spatial_shape: Sequence[int] | None = None,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes with the running statistics: ``(x - mean) / sqrt(var + epsilon)`` of each value's group.

    Args:
      x: the batch.
      mean: the running mean, one number a group.
      var: the running variance, likewise.
      num_groups: G.
      axis: the axis of the channels.
      spatial_shape: as :func:`batch_group_normalize`.
      epsilon: added to the variance.
      dtype: as :func:`batch_group_normalize`.

    Returns:
      The batch in float32 or wider.

    Raises:
      TypeError: for complex numbers.
      ValueError: if the groups do not fit the input, or ``mean`` or ``var`` is not of so many groups.

    Example:
      >>> x = jnp.array([[1.0, 3.0, 5.0, 5.0]])
      >>> print(batch_group_normalize_inference(x, jnp.zeros(2), jnp.array([1.0, 25.0]), num_groups=2, epsilon=0.0))
      [[1. 3. 1. 1.]]
    """
    x = as_real(x, dtype)
    view = grouping(x.shape, num_groups, axis=axis, spatial_shape=spatial_shape)
    groups = view.split(x)
    mean, var = (as_kept(each, groups, view.axes, "running statistic") for each in (mean, var))
    return view.merge((groups.astype(mean.dtype) - mean) * jax.lax.rsqrt(var + epsilon))
