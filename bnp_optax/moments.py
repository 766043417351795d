"""Mean and variance of a layer's input: over one batch, pooled, and running.

Everything here is elementwise over the features. Moments have the canonical shape
``[..., stack, group, input]`` (see :mod:`bnp_optax.layers`) and counts ``[..., stack]``, where
leading axes are added by whatever the model is wrapped in (`vmap`, `scan`, ...).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

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


def input_moments(x: jax.Array, *, groups: int = 1, num_spatial: int = 0) -> InputMoments:
    """Computes the moments of a layer's input over everything but its features.

    The variance is the mean squared deviation from the mean, corrected for the rounding of the
    mean, so that neither a large offset nor a long sum in float32 spoils it.

    Args:
      x: the layer's input, ``[examples, ..., features]``, or a single example of a layer that
        takes one; any real dtype, not empty.
      groups: into how many groups the features fall.
      num_spatial: how many axes before the features belong to one example whatever the rank.

    Returns:
      The record, with ``stack`` 1 and behind ``stop_gradient``.

    Raises:
      ValueError: if ``x`` has no elements.

    Example:
      >>> record = input_moments(jnp.array([[1.0, 5.0], [3.0, 5.0]]))
      >>> print(record.mean, record.variance, record.examples, record.positions)
      [[[2. 5.]]] [[[1. 0.]]] [2.] [2.]
    """
    if x.size == 0:
        raise ValueError(f"its input is empty (shape {x.shape}), which has no mean: give it at least one example")
    x = jax.lax.stop_gradient(x).astype(statistics_dtype(x.dtype))
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    deviation = x - mean.reshape((1,) * len(axes) + mean.shape)
    offset = deviation.mean(axes)
    variance = jnp.maximum(jnp.square(deviation).mean(axes) - jnp.square(offset), 0)
    canonical = (1, groups, x.shape[-1] // groups)
    return InputMoments(
        mean=(mean + offset).reshape(canonical),
        variance=variance.reshape(canonical),
        examples=jnp.full((1,), x.shape[0] if len(axes) > num_spatial else 1, x.dtype),
        positions=jnp.full((1,), float(math.prod(x.shape[:-1])), x.dtype),
    )


def pool(moments: InputMoments, num_axes: int) -> InputMoments:
    """Pools records over their leading axes, each weighted with its exact count.

    Each leading axis adds examples: micro-batches, `vmap` over examples, devices.

    Args:
      moments: records with ``num_axes`` more leading axes than the result.
      num_axes: how many leading axes to pool.

    Returns:
      The moments of all the inputs together.
    """
    axes = tuple(range(num_axes))
    pooled = _pool(moments, lambda leaf: leaf.sum(axis=axes, keepdims=True))
    squeezed: InputMoments = jax.tree.map(lambda leaf: leaf.squeeze(axes), pooled)
    return squeezed


def pool_devices(moments: InputMoments, axis_name: str | tuple[str, ...]) -> InputMoments:
    """Pools the records of all devices (or of a `vmap`) along the named axis, as :func:`pool` does."""
    return _pool(moments, lambda leaf: jax.lax.psum(leaf, axis_name))


def pool_calls(first: InputMoments, second: InputMoments) -> InputMoments:
    """Pools two calls of one layer in the same forward pass: more positions of the same examples."""
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    return dataclasses.replace(pool(both, num_axes=1), examples=both.examples.max(axis=0))


def _pool(moments: InputMoments, total: Callable[[jax.Array], jax.Array]) -> InputMoments:
    positions = total(moments.positions)
    share = (moments.positions / positions)[..., None, None]
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
