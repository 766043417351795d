"""Mixture Normalization: the modes of a batch are normalized one by one, each by moments of its own.

Batch Normalization takes a batch for one cloud. Mixture Normalization fits a Gaussian mixture of diagonal covariance to
it, and normalizes every example by each component, as far as it belongs there. The layers are
:class:`bnp_optax.contrib.linen.MixtureNorm` and :class:`bnp_optax.contrib.nnx.MixtureNorm`.

The abstract of the paper was at hand, its text was not, nor code of its authors. The rule of normalization is as
followers of the paper have it; all else is this library's, and marked so in :func:`mixture_normalize`.
"""

import functools
import math
from collections.abc import Callable, Sequence
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

FLOOR = 1e-3
"""The least weight of a component, and the least of its variances, in units of the feature's: it neither dies, nor
divides by next to nothing."""


class Mixture(NamedTuple):
    """Gaussians of diagonal covariance, in units of the batch: a feature has mean 0 and variance 1 there.

    Attributes:
      weights: lambda, ``[components]``, a number each.
      mean: ``[components, *features]``, as many deviations from the mean of the feature.
      var: likewise, in units of its variance; both variances with epsilon.
    """

    weights: jax.Array
    mean: jax.Array
    var: jax.Array


class MixtureNormalized(NamedTuple):
    """What :func:`mixture_normalize` returns.

    Attributes:
      normalized: the batch, normalized, before scale and shift.
      mean: the new running mean of each feature.
      var: the new running variance of each feature.
      mixture: the new running mixture.
    """

    normalized: jax.Array
    mean: jax.Array
    var: jax.Array
    mixture: Mixture


def initial_mixture(num_components: int, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Mixture:
    """Returns the mixture that training begins with: equal components, but for small offsets of their means.

    They are fixed pseudo-random numbers, the same in every layer of this shape and on every device, with mean 0 over
    the components, and of about one deviation in the norm over all C features: ``1 / sqrt(C)`` each. So every example
    begins in between all components, however many features there are, and none of them is a copy of another. EM then
    parts the components along what correlates most: while offsets are small, a step multiplies them by the matrix of
    correlations. A single component has mean 0: that is Batch Normalization.

    Args:
      num_components: K.
      shape: of the features.
      dtype: of the result.

    Returns:
      The mixture.

    Raises:
      ValueError: if ``num_components`` is below 1.

    Example:
      >>> mixture = initial_mixture(2, (3,))
      >>> print(mixture.weights, mixture.mean.shape, abs(mixture.mean.sum(0)).max() < 0.01)
      [0.5 0.5] (2, 3) True
    """
    if num_components < 1:
        raise ValueError(f"num_components is {num_components}, and must be 1 or more; 1 is Batch Normalization.")
    full = (num_components, *shape)
    offsets = jax.random.normal(jax.random.key(0), full, jnp.float32) / math.sqrt(max(math.prod(shape), 1))
    offsets = (offsets - offsets.mean(0, keepdims=True)).astype(jnp.bfloat16).astype(dtype)  # the same in every dtype
    return Mixture(jnp.full(num_components, 1 / num_components, dtype), offsets, jnp.ones(full, dtype))


def responsibilities(z: jax.Array, mixture: Mixture, counted: jax.Array | None = None) -> jax.Array:
    """Returns tau, the probability that a row comes from a component, by the logarithms of the densities.

    Args:
      z: rows of features, ``[rows, features]``.
      mixture: with features along one axis.
      counted: booleans of the shape of ``z``: features of a row that are left out of its density, as missing.

    Returns:
      Probabilities, ``[rows, components]``, that sum to 1 over the components.

    Example:
      >>> mixture = Mixture(jnp.array([0.5, 0.5]), jnp.array([[-1.0], [1.0]]), jnp.ones((2, 1)))
      >>> print(responsibilities(jnp.array([[0.0], [-9.0]]), mixture).round(3))
      [[0.5 0.5]
       [1.  0. ]]
    """
    # Squares are summed as they are: multiplied out, what they have in common would cost the digits that matter.
    var = mixture.var[None]
    squares = jnp.square(z[:, None] - mixture.mean[None]) / var + jnp.log(var)
    if counted is not None:
        squares = jnp.where(counted[:, None], squares, 0)
    weights = jnp.log(jnp.maximum(mixture.weights, FLOOR))
    return jax.nn.softmax(weights[None] - squares.sum(-1) / 2, axis=-1)


def component_moments(
    z: jax.Array,
    tau: jax.Array,
    start: Mixture,
    epsilon: ArrayLike = 0.0,
    *,
    counted: jax.Array | None = None,
    add_up: Callable[[Any], Any] = lambda sums: sums,
    use_fast_variance: bool = True,
) -> Mixture:
    """Returns the mixture whose components have the moments of the rows that belong to them: the M-step of EM.

        weights = sum_i tau_ik / rows    mean = sum_i tau_ik z_i / sum_i tau_ik
        var = sum_i tau_ik (z_i - mean)^2 / sum_i tau_ik + epsilon, at least ``FLOOR``

    Args:
      z: rows of features, ``[rows, features]``.
      tau: how far each row belongs to each component, ``[rows, components]``.
      start: what a component keeps of which nothing counts.
      epsilon: added to the variances, a number or one a feature.
      counted: booleans of the shape of ``z``: what counts. A row of which nothing counts is none in the weights.
      add_up: adds sums of several devices up.
      use_fast_variance: reads the rows once, ``E[z^2] - E[z]^2``; otherwise twice.

    Returns:
      The mixture.

    Example:
      >>> z, tau = jnp.array([[-3.0], [-1.0], [2.0], [2.0]]), jnp.repeat(jnp.eye(2), 2, axis=0)
      >>> mixture = component_moments(z, tau, initial_mixture(2, (1,)))
      >>> print(mixture.weights, mixture.mean.ravel(), mixture.var.ravel())  # without a deviation: the floor
      [0.5 0.5] [-2.  2.] [1.    0.001]
    """
    weighted_sums = functools.partial(jnp.einsum, "nk,nc->kc", precision=jax.lax.Precision.HIGHEST)
    if counted is None:
        members = tau.sum(0)[:, None]
    else:
        z = jnp.where(counted, z, 0)
        tau = jnp.where(counted.any(-1, keepdims=True), tau, 0)
        members = weighted_sums(tau, counted.astype(tau.dtype))
    shares = tau.sum(0)
    squares = weighted_sums(tau, z * z) if use_fast_variance else None
    members, shares, total, squares = add_up((members, shares, weighted_sums(tau, z), squares))
    empty = members <= jnp.finfo(z.dtype).tiny  # below that, a quotient has no digits; what is no number is not empty
    divisor = jnp.where(empty, 1, members)
    mean = total / divisor
    if use_fast_variance:
        var = jnp.maximum(squares / divisor - jnp.square(mean), 0)
    else:
        share = tau[:, :, None] if counted is None else jnp.where(counted[:, None], tau[:, :, None], 0)
        var = add_up((share * jnp.square(z[:, None] - mean[None])).sum(0)) / divisor
    rows = shares.sum()
    return Mixture(
        jnp.where(rows == 0, start.weights, shares / jnp.where(rows == 0, 1, rows)),
        jnp.where(empty, start.mean, mean),
        jnp.where(empty, start.var, jnp.maximum(var + epsilon, FLOOR)),
    )


def normalize_by_components(z: jax.Array, tau: jax.Array, mixture: Mixture) -> jax.Array:
    """Returns ``sum_k tau_k / sqrt(lambda_k) (z - mean_k) / sqrt(var_k)``.

    Where every row belongs to one component, each mode has mean 0 and deviation ``1 / sqrt(lambda)``, and all together
    the second moment K. That is also what equal components return: sqrt(K) times Batch Normalization.

    Args:
      z: rows of features, ``[rows, features]``.
      tau: how far each row belongs to each component, ``[rows, components]``.
      mixture: weights, means and variances of the components.

    Returns:
      The rows, normalized.

    Example:
      >>> mixture = Mixture(jnp.array([0.5, 0.5]), jnp.array([[-2.0], [2.0]]), jnp.ones((2, 1)))
      >>> print(normalize_by_components(jnp.array([[-3.0], [2.0]]), jnp.eye(2), mixture).ravel().round(3))
      [-1.414  0.   ]
    """
    combine = functools.partial(jnp.einsum, "nk,kc->nc", precision=jax.lax.Precision.HIGHEST)
    shares = tau / jnp.sqrt(jnp.maximum(mixture.weights, FLOOR))[None]
    inverses = jax.lax.rsqrt(mixture.var)
    return z * combine(shares, inverses) - combine(shares, mixture.mean * inverses)


def mixture_normalize(
    x: ArrayLike,
    mean: jax.Array,
    var: jax.Array,
    mixture: Mixture,
    *,
    em_steps: int = 2,
    axis: int | Sequence[int] = -1,
    momentum: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
) -> MixtureNormalized:
    """Normalizes a batch in training.

    A row is what one position of one example has in all features. With the probability tau_k of each row to come from
    component k of a Gaussian mixture of weights lambda_k, and means and variances weighted by it,

        mean_k = sum_i tau_ik x_i / sum_i tau_ik    var_k = sum_i tau_ik (x_i - mean_k)^2 / sum_i tau_ik + epsilon
        normalized_i = sum_k tau_ik / sqrt(lambda_k) (x_i - mean_k) / sqrt(var_k)

    With one component this is Batch Normalization, running statistics and gradients included.

    This rule is the paper's as others tell it. The text of the paper was not at hand, so these are choices of this
    library: probabilities and weights are constants to the gradient, which flows through x, means and variances. The
    mixture is fitted by ``em_steps`` steps of EM that begin with the running one, so that a component remains itself
    from batch to batch; the last of them gives probabilities and moments of the formula. The mixture is held in units
    of mean and variance of the batch, so that it moves along where the features drift, and an affine map of a feature
    changes nothing. Weights below ``FLOOR`` count as much, and variances are at least as much of the feature's.
    Running averages are taken of mean and variance of each feature, as ``nn.BatchNorm`` has them, and of the mixture.

    A mask makes values missing: they count in no moment, nor in the density of their row. A row of which nothing counts
    is normalized by the densities of all of it, as without a mask; what nothing counts of leaves its running averages
    as they are.

    Args:
      x: the batch.
      mean: the running mean, one number a feature.
      var: the running variance, likewise.
      mixture: the running mixture, which begins as :func:`initial_mixture`.
      em_steps: how many steps of EM, 1 or more; with 1 the probabilities are those of the running mixture.
      axis: the axis of the features, or several; all others are pooled.
      momentum: how much of the running averages stays.
      epsilon: added to the variances.
      dtype: to compute in, by default the input's; float32 where that is narrower.
      mask: as :func:`~bnp_optax.contrib.normalization.batch_moments`.
      axis_name: likewise.
      axis_index_groups: likewise.
      use_fast_variance: likewise.

    Returns:
      The batch in float32 or wider, and new running averages in shapes and dtypes of the old.

    Raises:
      TypeError: for complex numbers.
      ValueError: if statistics or mixture are not of the features of the input, the mask does not fit, or ``em_steps``
        is below 1.

    Example:
      >>> x = jnp.array([[-11.0], [-9.0], [9.0], [11.0]])  # two modes, whose deviation is 1
      >>> mixture = Mixture(jnp.array([0.5, 0.5]), jnp.array([[-1.0], [1.0]]), jnp.full((2, 1), 0.1))
      >>> print(mixture_normalize(x, jnp.zeros(1), jnp.ones(1), mixture).normalized.ravel().round(3))
      [-1.414  1.414 -1.414  1.414]

    References:
      Kalayeh and Shah, Training Faster by Separating Modes of Variation in Batch-normalized Models, 2018,
      https://arxiv.org/abs/1806.02892
    """
    if em_steps < 1:
        raise ValueError(f"em_steps is {em_steps}, and must be 1 or more: the last step gives the moments.")
    x = as_real(x, dtype)
    axes = feature_axes(x.ndim, axis)
    pooling: dict[str, Any] = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
    batch_mean, batch_var = moments_or_running(
        x, axes, mean, var, mask=mask, use_fast_variance=use_fast_variance, **pooling
    )
    z, epsilon_of_z = _standardized(x, batch_mean, batch_var, epsilon, axes)
    start = _of_rows(mixture, z)
    counted = None if mask is None else _rows(broadcast_mask(mask, x.shape), axes)

    def add_up(sums: Any) -> Any:
        # One at a time: JAX 0.8 cannot differentiate a psum of several when some, as those of tau, have no gradient.
        return sums if axis_name is None else jax.tree.map(lambda part: jax.lax.psum(part, **pooling), sums)

    def fit(z: jax.Array, tau: jax.Array) -> Mixture:
        return component_moments(
            z, tau, start, epsilon_of_z, counted=counted, add_up=add_up, use_fast_variance=use_fast_variance
        )

    in_density = None if counted is None else counted | ~counted.any(-1, keepdims=True)
    fixed, fitted = jax.lax.stop_gradient(z), start
    for _ in range(em_steps - 1):
        fitted = fit(fixed, responsibilities(fixed, fitted, in_density))
    tau = responsibilities(fixed, fitted, in_density)
    fitted = fit(z, tau)
    normalized = _unflatten(normalize_by_components(z, tau, fitted), x.shape, axes)
    running = Mixture(*(moving_average(*pair, momentum) for pair in zip(mixture, fitted, strict=True)))
    return MixtureNormalized(
        normalized, moving_average(mean, batch_mean, momentum), moving_average(var, batch_var, momentum), running
    )


def mixture_normalize_inference(
    x: ArrayLike,
    mean: jax.Array,
    var: jax.Array,
    mixture: Mixture,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes by the running mixture: probabilities, weights, means and variances are its own.

    This is the library's rule; that of the paper was not at hand. The result is that of training where the running
    mixture is that of the batch, and EM has come to rest.

    Args:
      x: the batch.
      mean: the running mean, one number a feature.
      var: the running variance, likewise.
      mixture: the running mixture.
      axis: the axis of the features, or several.
      epsilon: added to the running variance of each feature; the mixture's are in units of the sum.
      dtype: as :func:`mixture_normalize`.

    Returns:
      The batch in float32 or wider.

    Raises:
      TypeError: for complex numbers.
      ValueError: if statistics or mixture are not of the features of the input.

    Example:
      >>> mixture = Mixture(jnp.array([0.5, 0.5]), jnp.array([[-1.0], [1.0]]), jnp.full((2, 1), 0.01))
      >>> x, mean, var = jnp.array([[0.1], [3.0]]), jnp.ones(1), jnp.ones(1)
      >>> print(mixture_normalize_inference(x, mean, var, mixture, epsilon=0.0).ravel().round(3))
      [ 1.414 14.142]
    """
    x = as_real(x, dtype)
    axes = feature_axes(x.ndim, axis)
    mean, var = (as_kept(each, x, axes, "running statistic") for each in (mean, var))
    z, _ = _standardized(x, mean, var, epsilon, axes)
    mixture = _of_rows(mixture, z)
    return _unflatten(normalize_by_components(z, responsibilities(z, mixture), mixture), x.shape, axes)


def _standardized(
    x: jax.Array, mean: jax.Array, var: jax.Array, epsilon: float, axes: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Returns the rows in units of mean and variance, and epsilon in units of the variance.

    Both are constants to the gradient: an affine map of a feature changes nothing of what follows.
    """
    mean, var = jax.lax.stop_gradient((mean, var))
    inverse = jax.lax.rsqrt(var + epsilon)
    return _rows((x.astype(mean.dtype) - mean) * inverse, axes), _rows(epsilon * jnp.square(inverse), axes)


def _rows(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Returns an input as rows of features."""
    last = jnp.moveaxis(x, axes, range(-len(axes), 0))
    return last.reshape(-1, math.prod(x.shape[axis] for axis in axes))


def _unflatten(rows: jax.Array, shape: Sequence[int], axes: Sequence[int]) -> jax.Array:
    """Returns the input of which :func:`_rows` made these rows."""
    pooled = [size for axis, size in enumerate(shape) if axis not in axes]
    return jnp.moveaxis(rows.reshape(*pooled, *(shape[axis] for axis in axes)), range(-len(axes), 0), axes)


def _of_rows(mixture: Mixture, z: jax.Array) -> Mixture:
    """Returns a mixture with features along one axis, in the dtype of the rows."""
    components, features = mixture.weights.size, z.shape[-1]
    for name, statistic in (("mean", mixture.mean), ("var", mixture.var)):
        if statistic.size != components * features:
            raise ValueError(
                f"The mixture's {name} has shape {statistic.shape}, but {components} components of an input of "
                f"{features} features have {components * features} numbers. Give the layer inputs of one number of "
                "features, or make it anew."
            )
    full = (components, features)
    return Mixture(
        mixture.weights.astype(z.dtype), *(each.reshape(full).astype(z.dtype) for each in (mixture.mean, mixture.var))
    )
