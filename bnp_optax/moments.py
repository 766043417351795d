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
    data_fields=("mean", "variance", "examples", "positions"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class InputMoments:
    """The record of one layer's input over one batch.

    Attributes:
      mean: mean of every input feature; ``[..., stack, group, input]``, float32 (float64 where the
        input was).
      variance: biased variance, never negative; shape and dtype of ``mean``.
      examples: N, how many examples the batch had; ``[..., stack]``, dtype of ``mean``.
      positions: how many input vectors the moments average: N times the positions of an example
        (1 for a dense layer on ``[N, n]``, the pixels of an image, the steps of a sequence);
        shape and dtype of ``examples``.
    """

    mean: jax.Array
    variance: jax.Array
    examples: jax.Array
    positions: jax.Array


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

    Returns:
      The record, with the features merged, the stack merged (1 without one), and behind
      ``stop_gradient``.

    Raises:
      ValueError: if ``x`` has no elements.

    Example:
      >>> record = input_moments(jnp.array([[1.0, 5.0], [3.0, 5.0]]))
      >>> print(record.mean, record.variance, record.examples, record.positions)
      [[[2. 5.]]] [[[1. 0.]]] [2.] [2.]
    """
    if x.size == 0:
        raise ValueError(f"its input is empty (shape {x.shape}), which has no mean: give it at least one example")
    x = jax.lax.stop_gradient(jnp.asarray(x))
    x = x.astype(statistics_dtype(x.dtype))
    kept = [axis % x.ndim for axis in (*stack_axes, *input_axes)]
    reduced = tuple(axis for axis in range(x.ndim) if axis not in kept)
    stack = math.prod(x.shape[axis] for axis in stack_axes)
    examples = x.shape[reduced[0]] if len(reduced) > num_spatial else 1
    positions = math.prod(x.shape[axis] for axis in reduced)
    order = [sorted(kept).index(axis) for axis in kept]

    def in_canonical_shape(x: jax.Array) -> list[jax.Array]:
        return [m.transpose(order).reshape(stack, groups, -1) for m in _mean_and_variance(x, reduced)]

    mean, variance = with_auto_axes(in_canonical_shape, x)
    return InputMoments(
        mean=mean,
        variance=variance,
        examples=jnp.full((stack,), float(examples), x.dtype),
        positions=jnp.full((stack,), float(positions), x.dtype),
    )


@functools.partial(jax.jit, static_argnums=1)  # so that it is traced once for all inputs of a shape
def _mean_and_variance(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the variance over these axes."""
    one_pass, two_passes = (functools.partial(function, axes=axes) for function in (_in_one_pass, _in_two_passes))
    mean, variance = jax.lax.platform_dependent(x, cpu=two_passes, default=one_pass)
    return mean, jnp.maximum(variance, 0)


def _in_one_pass(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """For accelerators: one reduction of two operands, which reads the input once."""
    share, zero = _share(x, axes), np.zeros((), x.dtype)
    first, deviation = _deviations_from_first(x, axes)
    sums = jax.lax.reduce(
        (deviation, jnp.square(deviation)), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes
    )
    shift, mean_square = (share * total for total in sums)
    return first + shift, mean_square - jnp.square(shift)


def _in_two_passes(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """For CPUs, on which XLA computes two reductions up to three times as fast as one of two operands.

    They neither wait for each other nor share an array but x, so that they run beside the layer. A deviation from the
    mean would keep x alive for longer, or be an array of its size.
    """
    share, zero = _share(x, axes), np.zeros((), x.dtype)
    first, deviation = _deviations_from_first(x, axes)
    mean = share * jax.lax.reduce(x, zero, jax.lax.add, axes)
    mean_square = share * jax.lax.reduce(jnp.square(deviation), zero, jax.lax.add, axes)
    return mean, mean_square - jnp.square(mean - first)


def _deviations_from_first(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the first vector, and the deviations from it.

    Nothing of a batch that is split over devices is gathered but this vector. In it no axis of size 1 is kept, over
    which XLA would split the moments.
    """
    first = jax.lax.slice(x, [0] * x.ndim, [1 if axis in axes else size for axis, size in enumerate(x.shape)])
    return first.squeeze(axes), x - first


def _share(x: jax.Array, axes: tuple[int, ...]) -> float:
    return 1 / math.prod(x.shape[axis] for axis in axes)


def pool(moments: InputMoments, example_axes: Sequence[int] = (), repeat_axes: Sequence[int] = ()) -> InputMoments:
    """Pools records over leading axes, each weighted with its exact count.

    Args:
      moments: records with leading axes.
      example_axes: those along which the records are of other examples: micro-batches, devices, a
        `vmap` over examples.
      repeat_axes: those along which they are of the same examples again: the steps of a recurrent
        network, calls of a shared layer. They add positions only.

    Returns:
      The moments of all the inputs together, without these axes; all zero if they had no positions.
    """
    axes = (*example_axes, *repeat_axes)
    pooled = _pool(moments, lambda leaf: leaf.sum(axis=axes, keepdims=True))
    examples = moments.examples.max(axis=tuple(repeat_axes), keepdims=True).sum(tuple(example_axes), keepdims=True)
    squeezed: InputMoments = jax.tree.map(
        lambda leaf: leaf.squeeze(axes), dataclasses.replace(pooled, examples=examples)
    )
    return squeezed


def pool_named_axis(moments: InputMoments, axis_name: str | tuple[str, ...]) -> InputMoments:
    """Pools the records of all devices (or of a `vmap`) along the named axis, which adds examples."""
    return _pool(moments, lambda leaf: jax.lax.psum(leaf, axis_name))


def _pool(moments: InputMoments, total: Callable[[jax.Array], jax.Array]) -> InputMoments:
    positions = total(moments.positions)
    share = (moments.positions / jnp.maximum(positions, 1))[..., None, None]
    mean = total(share * moments.mean)
    variance = total(share * (moments.variance + jnp.square(moments.mean - mean)))
    return InputMoments(mean, variance, total(moments.examples), positions)


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
    return jnp.minimum(largest, weight_so_far / (weight_so_far + examples))


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
    return jnp.maximum(jnp.asarray(full_step, examples.dtype) / examples, 1)


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
