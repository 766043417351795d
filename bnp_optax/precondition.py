"""The step of the paper for one layer, on arrays in canonical shape.

Shapes are those of :mod:`bnp_optax.layers`: kernels ``[stack, group, input, window, output]``,
biases ``[stack, group, output]``, moments ``[stack, group, input]``, one scale an entry of the
stack.

References:
  Lange, Helfrich, Ye, Batch Normalization Preconditioning for Neural Network Training, JMLR 23(72),
  2022, Algorithm 2 (dense layers) and Algorithm 3 (convolutions).
"""

from typing import Literal

import jax
import jax.numpy as jnp

Scaling = Literal["examples", "positions", "bound", "none"]


def precondition(
    kernel: jax.Array,
    bias: jax.Array | None,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array,
    eps_relative: float | jax.Array,
    eps: float | jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the preconditioned gradients ``P P' g`` of a layer's kernel and bias.

    With ``s = var + eps1 max(var) + eps2`` (the maximum over the inputs of one output unit) and
    ``q2`` the scale::

        G_w[j,i] <- (G_w[j,i] - mu[j] G_b[i]) / (q2 s[j])
        G_b[i]   <- G_b[i] / q2 - sum_j mu[j] G_w[j,i]        with the new G_w

    Without a bias nothing can be centred, and the raw second moment ``var + mu^2`` stands for
    ``var``: ``G_w <- G_w / (q2 s)``. An input with ``s = 0`` (constant, with both eps 0) has no
    direction of its own: its kernel gradient becomes 0.

    The sum over ``j`` is computed from the old ``G_w``, whose terms of ``mu[j]^2 / s[j]`` cancel: in
    float32 the bias has an error of about ``1e-7 sum_j mu[j]^2 / s[j]`` of ``G_b``. That is nothing
    unless an input's mean is thousands of times its deviation; such inputs are better shifted first.

    Args:
      kernel: gradient of the kernel, ``[stack, group, input, window, output]``.
      bias: gradient of the bias, ``[stack, group, output]``, or ``None``.
      mean: mu, mean of the layer's input, ``[stack, group, input]``.
      variance: var, its variance, same shape.
      scale: q2, ``[stack]`` (see :func:`batch_scale`).
      eps_relative: eps1, the damping relative to the layer's largest variance.
      eps: eps2, the absolute damping.

    Returns:
      The new kernel and bias gradients, shapes as given; all arguments share one dtype.

    Example:
      >>> kernel, bias = jnp.array([[6.0]])[None, None, None], jnp.array([2.0])[None, None]
      >>> mean, variance = jnp.full((1, 1, 1), 1.0), jnp.full((1, 1, 1), 4.0)
      >>> kernel, bias = precondition(kernel, bias, mean, variance, jnp.ones(1), 0.0, 0.0)
      >>> kernel.item(), bias.item()  # (6 - 1 * 2) / 4 and 2 - 1 * 1
      (1.0, 1.0)
    """
    second_moment = variance + jnp.square(mean) if bias is None else variance
    s = second_moment + eps_relative * second_moment.max(axis=-1, keepdims=True) + eps
    # a reciprocal of a few numbers, as a division of the kernel's many would keep XLA from fusing it with its uses
    one_over_q2_s = jnp.where(s > 0, 1 / (scale[:, None, None] * jnp.where(s > 0, s, 1)), 0)

    def at_kernel(x: jax.Array) -> jax.Array:
        return x[..., None, None]

    if bias is None:
        return kernel * at_kernel(one_over_q2_s), None
    new_kernel = (kernel - at_kernel(mean) * bias[:, :, None, None, :]) * at_kernel(one_over_q2_s)
    # sum_j mu[j] G_w[j,i] with the new G_w written out in the old one: so XLA can fuse the new one with what follows,
    # and it takes no memory.
    window = kernel.shape[3]
    weights = mean * one_over_q2_s
    products = jnp.einsum("sgi,sgiwo->sgo", weights, kernel, precision=jax.lax.Precision.HIGHEST)
    mean_step = products - window * (weights * mean).sum(-1, keepdims=True) * bias
    return new_kernel, bias / scale[:, None, None] - mean_step


def batch_scale(
    scaling: Scaling | float | jax.Array, fan_in: int, examples: jax.Array, positions: jax.Array
) -> jax.Array:
    """Returns q2, the scalar that divides the whole step of a layer.

    With F the ``fan_in``, N the examples of the batch and S the positions of an example:

    ============= ================== ============================================
    ``scaling``   q2                 reading
    ============= ================== ============================================
    a number C    max(C / N, 1)      steps grow with the batch up to C examples
    "examples"    max(F / N, 1)      one example is one sample: the paper's rule
    "positions"   max(F / (N S), 1)  every position is a sample
    "bound"       max(F / N, S)      bound where the loss sums over positions
    "none"        1                  the learning rate carries it
    ============= ================== ============================================

    Args:
      scaling: one of the rules.
      fan_in: F, how many inputs one output unit sees.
      examples: N, ``[stack]``.
      positions: N S, ``[stack]``.

    Returns:
      q2, ``[stack]``.

    Example:
      >>> batch_scale(128, 784, examples=jnp.array([8.0]), positions=jnp.array([8.0]))
      Array([16.], dtype=float32)
      >>> batch_scale("examples", 784, examples=jnp.array([8.0]), positions=jnp.array([8.0]))
      Array([98.], dtype=float32)
    """
    match scaling:
        case "examples":
            return jnp.maximum(fan_in / examples, 1)
        case "positions":
            return jnp.maximum(fan_in / positions, 1)
        case "bound":
            return jnp.maximum(fan_in / examples, positions / examples)
        case "none":
            return jnp.ones_like(examples)
        case _:
            return jnp.maximum(jnp.asarray(scaling, examples.dtype) / examples, 1)
