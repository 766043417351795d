"""Mean and variance of a layer's input: over one batch, pooled, and running.

Everything here is elementwise over the features. Moments have the canonical shape
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

from bnp_optax.devices import with_auto_axes

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
    deviation of the mean from it. That takes one pass, and a large offset does not cancel: the first
    vector counts itself, so that the variance is at least a 1/positions part of what is subtracted.

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

    def mean_and_variance(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Two reductions that neither wait for each other nor share an array but x. So XLA runs them beside the layer,
        # in one pass where it can; a deviation from the mean would keep x alive for longer, or be an array of its size.
        # Nothing of a batch that is split over devices is gathered but this vector; no axis of size 1 is kept, over
        # which XLA would split the moments.
        mean = x.mean(reduced)
        first = jax.lax.slice(x, [0] * x.ndim, [1 if axis in reduced else size for axis, size in enumerate(x.shape)])
        variance = jnp.square(x - first).mean(reduced) - jnp.square(mean - first.squeeze(reduced))
        return canonical(mean), canonical(jnp.maximum(variance, 0))

    def canonical(moment: jax.Array) -> jax.Array:
        return moment.transpose([sorted(kept).index(axis) for axis in kept]).reshape(stack, groups, -1)

    mean, variance = with_auto_axes(mean_and_variance, x)
    examples = x.shape[reduced[0]] if len(reduced) > num_spatial else 1
    positions = math.prod(x.shape[axis] for axis in reduced)
    return InputMoments(
        mean=mean,
        variance=variance,
        examples=jnp.full((stack,), float(examples), x.dtype),
        positions=jnp.full((stack,), float(positions), x.dtype),
    )


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


def pool_devices(moments: InputMoments, axis_name: str | tuple[str, ...]) -> InputMoments:
    """Pools the records of all devices (or of a `vmap`) along the named axis, which adds examples."""
    return _pool(moments, lambda leaf: jax.lax.psum(leaf, axis_name))


def pool_with_earlier(earlier: InputMoments | None, record: InputMoments) -> InputMoments:
    """Pools a call of a layer with earlier ones of the same forward pass: more positions of the same examples.

    Args:
      earlier: the record of the earlier calls, whose dtype the result has; ``None`` before the first.
      record: that of the new call.

    Returns:
      The record of them all.

    Raises:
      ValueError: if their shapes differ.
    """
    if earlier is None:
        return record
    if earlier.mean.shape != record.mean.shape:
        raise ValueError("it is called both inside and outside of a transform that adds an axis")
    return pool(jax.tree.map(lambda a, b: jnp.stack([a, b.astype(a.dtype)]), earlier, record), repeat_axes=[0])


def _pool(moments: InputMoments, total: Callable[[jax.Array], jax.Array]) -> InputMoments:
    positions = total(moments.positions)
    share = (moments.positions / jnp.maximum(positions, 1))[..., None, None]
    mean = total(share * moments.mean)
    variance = total(share * (moments.variance + jnp.square(moments.mean - mean)))
    return InputMoments(mean, variance, total(moments.examples), positions)


def running_decay(
    seen: jax.Array, examples: jax.Array, decay: float | jax.Array, prior_examples: float | jax.Array | None
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


def absorb(
    mean: jax.Array, variance: jax.Array, batch: InputMoments, decay: jax.Array, rule: VarianceRule
) -> tuple[jax.Array, jax.Array]:
    """Moves running statistics towards those of a batch.

    With decay rho::

        mean     <- rho mean + (1 - rho) mean_B
        variance <- rho variance + (1 - rho) variance_B + rho (1 - rho) (mean_B - mean)^2

    The last term makes it the exact variance of the exponentially weighted mixture of batches
    (rule ``"mixture"``). Rule ``"batch"`` drops it, as in the paper: the average of the batches'
    variances, which is 0 where a batch is a single value.

    Args:
      mean: running mean, ``[stack, group, input]``.
      variance: running variance, same shape.
      batch: the moments of the batch, same shape.
      decay: rho, one an entry of the stack, ``[stack]``.
      rule: ``"mixture"`` or ``"batch"``.

    Returns:
      The new mean and variance.

    References:
      Lange, Helfrich, Ye, Batch Normalization Preconditioning, JMLR 23(72), 2022, Algorithm 2.
    """
    keep = decay[:, None, None]
    new_mean = keep * mean + (1 - keep) * batch.mean
    new_variance = keep * variance + (1 - keep) * batch.variance
    if rule == "mixture":
        new_variance += keep * (1 - keep) * jnp.square(batch.mean - mean)
    return new_mean, new_variance
