"""Mean and variance of a layer's input: over one batch, pooled, and running.

Everything here is elementwise over the features. The moments of a batch have the canonical shape
``[..., stack, group, input]`` (see :mod:`bnp_optax.layers`) and counts ``[..., stack]``, where
leading axes are added by whatever the model is wrapped in (`vmap`, `scan`, ...).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from bnp_optax.sharding import with_auto_axes

VarianceRule = Literal["mixture", "batch"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("total", "scatter", "squared", "count", "positions"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class InputMoments:
    """The record of one layer's input over one batch, as sums.

    Records of different batches (micro-batches, devices) may be stacked, or added, leaf by leaf, as ``psum`` and sums
    over an axis do: either is the record of both. Stacked ones are pooled without loss; a sum loses digits where
    batches are tiny and means hundreds of deviations. They must not be averaged: ``count`` is an integer, so that an
    average shows, and ``update`` refuses it.

    Attributes:
      total: sum of every input feature over the positions, ``p mean``; ``[..., stack, group, input]``, float32 (float64
        where the input was).
      scatter: sum of squared deviations from the mean of the batch; never negative; shape and dtype of ``total``.
      squared: ``p mean^2``, which tells how far apart the means of added records are; shape and dtype of ``total``.
      count: N, how many examples the batch had; ``[..., stack]``, int32. Negative if the input had no axis of them, as
        under a `vmap`: then the mapped axis around has them.
      positions: p, how many input vectors there were, or their summed weights: N times the positions of an example
        (1 for a dense layer on ``[N, n]``, the pixels of an image, the steps of a sequence); ``[..., stack]``, dtype of
        ``total``.

    Example:
      >>> first, second = input_moments(jnp.array([[1.0]])), input_moments(jnp.array([[3.0], [5.0]]))
      >>> both = jax.tree.map(jnp.add, first, second)
      >>> print(both.mean, both.variance, both.examples)
      [[[3.]]] [[[2.6666667]]] [3]
    """

    total: jax.Array
    scatter: jax.Array
    squared: jax.Array
    count: jax.Array
    positions: jax.Array

    def __repr__(self) -> str:
        """Shows longer arrays by type alone, as a model's records are printed, and stand in errors of JAX."""
        types = {k: f"{x.dtype}{list(x.shape)}" for k, x in vars(self).items() if getattr(x, "size", 0) > 4}
        return f"InputMoments({', '.join(f'{k}={types.get(k, repr(x))}' for k, x in vars(self).items())})"

    @classmethod
    def of(cls, mean: jax.Array, variance: jax.Array, examples: jax.Array, positions: jax.Array) -> "InputMoments":
        """Returns the record of inputs with this mean and biased variance.

        Args:
          mean: ``[..., stack, group, input]``.
          variance: not negative, shape and dtype of ``mean``.
          examples: ``[..., stack]``, an integer.
          positions: ``[..., stack]``, dtype of ``mean``.
        """
        p = positions[..., None, None]
        return cls(p * mean, p * variance, p * jnp.square(mean), examples, positions)

    @property
    def examples(self) -> jax.Array:
        """N, how many examples the batch had; ``[..., stack]``, int32."""
        return jnp.abs(self.count)

    @property
    def mean(self) -> jax.Array:
        """The mean of every input feature, 0 without positions; shape and dtype of ``total``."""
        return mean_and_variance(self, self.positions[..., None, None])[0]

    @property
    def variance(self) -> jax.Array:
        """The biased variance, never negative; shape and dtype of ``total``."""
        return mean_and_variance(self, self.positions[..., None, None])[1]


def mean_and_variance(record: InputMoments, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the variance of a record whose positions are broadcast to its sums.

    The variance is that within the batches that were added, and that of their means. The latter is a difference of two
    squares, all rounding for a single batch, so that what is not larger than rounding counts as nothing: no offset
    of the inputs, however large, cancels in the record of one batch.
    """
    p = jnp.where(positions > 0, positions, 1)
    mean = record.total / p
    square = jnp.square(mean)
    of_means = record.squared / p - square
    of_means = jnp.where(of_means > 16 * jnp.finfo(mean.dtype).eps * square, of_means, 0)
    return mean, record.scatter / p + of_means


def statistics_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """Returns the dtype of statistics of values of ``dtype``: float32, or float64 for float64."""
    return np.dtype("float64" if dtype == np.dtype("float64") else "float32")


def input_moments(
    x: jax.Array,
    *,
    input_axes: Sequence[int] = (-1,),
    stack_axes: Sequence[int] = (),
    groups: int = 1,
    num_spatial: int = 0,
    mask: ArrayLike | None = None,
    examples: ArrayLike | None = None,
) -> InputMoments:
    """Computes the moments of a layer's input over everything but its features.

    The variance is the mean squared deviation from the first vector of the input, less the squared
    deviation of the mean from it. So it takes no second pass that waits for the mean, and a large offset
    does not cancel: the first vector counts itself, so that the variance is at least a 1/positions part
    of what is subtracted.

    Args:
      x: the layer's input, ``[examples, ..., features]``, or a single example of a layer that
        takes one; any real dtype, not empty.
      input_axes: the axes that hold the features, in the order of the kernel's.
      stack_axes: the axes along which the layer has kernels of their own.
      groups: into how many groups the features fall.
      num_spatial: how many of the other axes belong to one example whatever the rank. The first
        that does not is the axis of examples; without one, there is a single example.
      mask: which positions count, of the shape of the leading axes of ``x``: booleans, or weights that are not
        negative. What does not count may be anything, nan too. An example that has no position that counts is none.
      examples: N, instead of the size of the axis of examples; an integer.

    Returns:
      The record, with the features merged, the stack merged (1 without one), and behind
      ``stop_gradient``.

    Raises:
      ValueError: if ``x`` has no elements, or the mask does not fit it.

    Example:
      >>> record = input_moments(jnp.array([[1.0, 5.0], [3.0, 5.0]]))
      >>> print(record.mean, record.variance, record.examples, record.positions)
      [[[2. 5.]]] [[[1. 0.]]] [2] [2.]
      >>> record = input_moments(jnp.array([[1.0, 5.0], [3.0, 5.0]]), mask=jnp.array([True, False]))
      >>> print(record.mean, record.examples)
      [[[1. 5.]]] [1]
    """
    if x.size == 0:
        raise ValueError(f"its input is empty (shape {x.shape}), which has no mean: give it at least one example")
    if mask is not None and not fits(mask, x, input_axes):
        raise ValueError(
            f"the mask has shape {jnp.shape(mask)}, which is not that of the leading axes of its input {x.shape} "
            f"without its features"
        )
    x = jax.lax.stop_gradient(jnp.asarray(x))
    x = x.astype(statistics_dtype(x.dtype))
    features = tuple(axis % x.ndim for axis in input_axes)
    kept = [*(axis % x.ndim for axis in stack_axes), *features]
    reduced = tuple(axis for axis in range(x.ndim) if axis not in kept)
    example_axis = reduced[:1] if len(reduced) > num_spatial else ()
    stack = math.prod(x.shape[axis] for axis in stack_axes)
    order = [sorted(kept).index(axis) for axis in kept]

    def sums(x: jax.Array) -> list[jax.Array]:
        return [total.transpose(order).reshape(stack, groups, -1) for total in _sums(x, reduced)]

    def weighted_sums(x: jax.Array, weights: jax.Array) -> list[jax.Array]:
        *totals, count, positions = _weighted_sums(x, weights, reduced, example_axis, features)
        canonical = [total.transpose(order).reshape(stack, groups, -1) for total in totals]
        return [*canonical, *(each.transpose(order).reshape(stack) for each in (count, positions))]

    if mask is None:
        total, scatter, squared = with_auto_axes(sums, x)
        count = jnp.full((stack,), math.prod(x.shape[axis] for axis in example_axis), jnp.int32)
        positions = jnp.full((stack,), float(math.prod(x.shape[axis] for axis in reduced)), x.dtype)
    else:
        weights = jnp.asarray(mask).astype(x.dtype)
        total, scatter, squared, count, positions = with_auto_axes(weighted_sums, x, weights)
    if examples is not None and example_axis:
        count = jnp.where(positions > 0, jnp.asarray(examples, jnp.int32), 0)
    return InputMoments(total, scatter, squared, count, positions)


def fits(mask: ArrayLike, x: jax.Array, input_axes: Sequence[int]) -> bool:
    """Returns whether a mask has the shape of leading axes of an input, none of which holds features."""
    first_of_features = min(axis % x.ndim for axis in input_axes)
    ndim = jnp.ndim(mask)
    return ndim <= first_of_features and jnp.shape(mask) == x.shape[:ndim]


@functools.partial(jax.jit, static_argnums=1)  # so that it is traced once for all inputs of a shape
def _sums(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns total, scatter and squared over these axes."""
    one_pass, two_passes = (functools.partial(function, axes=axes) for function in (_in_one_pass, _in_two_passes))
    total, shift, squares = jax.lax.platform_dependent(x, cpu=two_passes, default=one_pass)
    share = 1 / _count(x, axes)
    return total, jnp.maximum(squares - share * jnp.square(shift), 0), total * (share * total)


def _in_one_pass(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For accelerators: one reduction of two operands, which reads the input once."""
    zero = np.zeros((), x.dtype)
    first, deviation = _deviations_from_first(x, axes)
    shift, squares = jax.lax.reduce(
        (deviation, jnp.square(deviation)), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes
    )
    return _count(x, axes) * first + shift, shift, squares


def _in_two_passes(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For CPUs, on which XLA computes two reductions up to three times as fast as one of two operands.

    They neither wait for each other nor share an array but x, so that they run beside the layer. A deviation from the
    mean would keep x alive for longer, or be an array of its size.
    """
    zero = np.zeros((), x.dtype)
    first, deviation = _deviations_from_first(x, axes)
    total = jax.lax.reduce(x, zero, jax.lax.add, axes)
    squares = jax.lax.reduce(jnp.square(deviation), zero, jax.lax.add, axes)
    return total, total - _count(x, axes) * first, squares


def _deviations_from_first(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the first vector, and the deviations from it.

    Nothing of a batch that is split over devices is gathered but this vector. In it no axis of size 1 is kept, over
    which XLA would split the moments.
    """
    first = jax.lax.slice(x, [0] * x.ndim, [1 if axis in axes else size for axis, size in enumerate(x.shape)])
    return first.squeeze(axes), x - first


def _count(x: jax.Array, axes: tuple[int, ...]) -> float:
    return float(math.prod(x.shape[axis] for axis in axes))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _weighted_sums(
    x: jax.Array, weights: jax.Array, axes: tuple[int, ...], example_axis: tuple[int, ...], features: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    """Returns total, scatter, squared and, with size 1 along the features, the examples and positions that count."""
    weights = weights.reshape(*weights.shape, *[1] * (x.ndim - weights.ndim))
    every = jnp.broadcast_to(weights, [1 if axis in features else size for axis, size in enumerate(x.shape)])
    x = jnp.where(every > 0, x, 0)
    positions = every.sum(axes, keepdims=True)
    total = (every * x).sum(axes, keepdims=True)
    mean = total / jnp.where(positions > 0, positions, 1)
    scatter = (every * jnp.square(x - mean)).sum(axes, keepdims=True)
    within = tuple(axis for axis in axes if axis not in example_axis)
    examples = (every > 0).any(within, keepdims=True).sum(example_axis, keepdims=True, dtype=jnp.int32)
    return tuple(each.squeeze(axes) for each in (total, scatter, total * mean, examples, positions))


def pool(
    moments: InputMoments,
    example_axes: Sequence[int] = (),
    repeat_axes: Sequence[int] = (),
    mapped_axes: Sequence[int] = (),
) -> InputMoments:
    """Pools records over leading axes, each weighted with its exact count.

    Args:
      moments: records with leading axes.
      example_axes: those along which the records are of other examples: micro-batches, devices, a
        `vmap` over examples.
      repeat_axes: those along which they are of the same examples again: the steps of a recurrent
        network, calls of a shared layer. They add positions only.
      mapped_axes: those along which they are of other examples if the inputs had no axis of examples, and of the
        same ones otherwise.

    Returns:
      The moments of all the inputs together, without these axes; all zero if they had no positions.
    """
    axes = (*example_axes, *repeat_axes, *mapped_axes)
    pooled = _pool(moments, lambda leaf: leaf.sum(axis=axes, keepdims=True, dtype=leaf.dtype))
    examples = _of_repeats(moments.count, repeat_axes)
    mapped = examples.sum(tuple(mapped_axes), keepdims=True, dtype=examples.dtype)
    examples = jnp.where(mapped < 0, mapped, _of_repeats(examples, mapped_axes))
    examples = examples.sum(tuple(example_axes), keepdims=True, dtype=examples.dtype)
    squeezed: InputMoments = jax.tree.map(lambda leaf: leaf.squeeze(axes), dataclasses.replace(pooled, count=examples))
    return squeezed


def _of_repeats(examples: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Returns the largest count along these axes, whatever the sign."""
    largest = examples.max(axis=tuple(axes), keepdims=True)
    return jnp.where(largest > 0, largest, examples.min(axis=tuple(axes), keepdims=True))


def pool_named_axis(moments: InputMoments, axis_name: str | tuple[str, ...]) -> InputMoments:
    """Pools the records of all devices (or of a `vmap`) along the named axis, which adds examples."""
    return _pool(moments, lambda leaf: jax.lax.psum(leaf, axis_name))


def _pool(moments: InputMoments, total: Callable[[jax.Array], jax.Array]) -> InputMoments:
    """Pools as ``total`` of every sum would, but without the rounding of the means' squares."""
    positions = total(moments.positions)
    share = (moments.positions / jnp.where(positions > 0, positions, 1))[..., None, None]
    own_mean, variance = moments.mean, moments.variance
    mean = total(share * own_mean)
    variance = total(share * (variance + jnp.square(own_mean - mean)))
    return InputMoments.of(mean, variance, total(moments.count), positions)


def running_decay(
    seen: jax.Array, examples: jax.Array, decay: ArrayLike, prior_examples: ArrayLike | None
) -> jax.Array:
    """Returns how much of the running statistics this batch keeps.

    With P ``prior_examples`` the start (mean 0, variance 1) has the weight of P examples, so that
    it fades as fast as data arrive: ``min(decay, (P + seen) / (P + seen + N))``. ``None`` is the
    paper's constant decay.

    Args:
      seen: examples absorbed so far, int32.
      examples: N, the examples of this batch, same shape, floating; the result has its dtype.
      decay: rho, the largest decay, in [0, 1).
      prior_examples: P, not negative, or ``None``.

    Returns:
      The decay of this step, shape of ``seen``.
    """
    dtype = examples.dtype
    largest = jnp.full_like(examples, jnp.asarray(decay, dtype))
    if prior_examples is None:
        return largest
    weight_so_far = jnp.asarray(prior_examples, dtype) + seen.astype(dtype)
    total = weight_so_far + examples  # of a layer without any 0, whose quotient, unused, would stop jax.debug_nans
    return jnp.minimum(largest, weight_so_far / jnp.where(total == 0, 1, total))


def batch_scale(full_step: ArrayLike, examples: jax.Array) -> jax.Array:
    """Returns q2, the scalar that divides the whole step of a layer: ``max(C / N, 1)``.

    So steps are in proportion to their batch up to C examples, and one learning rate serves batches of any size below.

    Args:
      full_step: C, a number or an array like ``examples``; the paper's rule has the layer's fan-in.
      examples: N, the examples of the batch.

    Returns:
      q2, shape and dtype of ``examples``.

    Example:
      >>> batch_scale(128, jnp.array([8.0, 512.0]))
      Array([16.,  1.], dtype=float32)
    """
    return jnp.maximum(jnp.asarray(full_step, examples.dtype) / jnp.where(examples == 0, 1, examples), 1)


def absorb(
    mean: jax.Array,
    variance: jax.Array,
    batch_mean: jax.Array,
    batch_variance: jax.Array,
    decay: jax.Array,
    rule: VarianceRule,
) -> tuple[jax.Array, jax.Array]:
    """Moves running statistics towards those of a batch, elementwise.

    With decay rho::

        mean     <- rho mean + (1 - rho) mean_B
        variance <- rho variance + (1 - rho) variance_B + rho (1 - rho) (mean_B - mean)^2

    The last term makes it the exact variance of the exponentially weighted mixture of batches
    (rule ``"mixture"``). Rule ``"batch"`` drops it, as in the paper: the average of the batches'
    variances, which is 0 where a batch is a single value.

    Args:
      mean: running mean.
      variance: running variance, same shape, as all that follow.
      batch_mean: mean_B, the mean of the batch.
      batch_variance: variance_B.
      decay: rho.
      rule: ``"mixture"`` or ``"batch"``.

    Returns:
      The new mean and variance.

    References:
      Lange, Helfrich, Ye, Batch Normalization Preconditioning, JMLR 23(72), 2022, Algorithm 2.
    """
    new_mean = decay * mean + (1 - decay) * batch_mean
    new_variance = decay * variance + (1 - decay) * batch_variance
    if rule == "mixture":
        new_variance += decay * (1 - decay) * jnp.square(batch_mean - mean)
    return new_mean, new_variance
