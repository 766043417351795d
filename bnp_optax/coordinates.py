"""The change of variables of the paper for one layer, ``[b; w] = P z``, on arrays in canonical shape.

With ``hhat = [1; h]`` the input and ``what = [b; w]`` the weights of one output unit, the paper takes the steps in the
variables ``z`` of a layer whose input is centred and scaled::

    P = (1/q) [1 -mu'; 0 I] [1 0; 0 diag(1/sd)]        sd = sqrt(var + eps1 max(var) + eps2)

Nothing can be centred without a bias; then ``P = (1/q) diag(1/sd)`` and the raw second moment ``var + mu^2`` stands for
``var``. An input with ``sd = 0`` (constant, with both eps 0) has no direction of its own: P is 0 there.

References:
  Lange, Helfrich, Ye, Batch Normalization Preconditioning for Neural Network Training, JMLR 23(72), 2022, Algorithm 2
  (dense layers) and Algorithm 3 (convolutions).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bnp_optax.trees import Weights

# On CPUs a sum over a kernel of this size or more is a matrix product, at twice the speed. Below, it is not, as XLA
# compiles each product anew (13 ms), but shares the code of a sum between layers of equal shape.
_LARGE_KERNEL = 4096


class Coordinates(NamedTuple):
    """What P of one layer is made of, shaped to meet kernels ``[stack, group, input, window, output]`` and biases.

    Attributes:
      mean: mu, ``[stack, group, input, 1, 1]``.
      rate: 1 / (q sd), 0 where that is infinite; same shape.
      bias_rate: 1 / q, ``[stack, group, 1]``.

    Example:
      >>> of_layer = Coordinates(jnp.full((1, 1, 1, 1, 1), 3.0), jnp.full((1, 1, 1, 1, 1), 0.5), jnp.ones((1, 1, 1)))
      >>> gradient = Weights(jnp.full((1, 1, 1, 1, 1), 10.0), jnp.full((1, 1, 1), 2.0))
      >>> kernel, bias = of_layer.precondition(gradient)
      >>> kernel.item(), bias.item()  # (10 - 3 * 2) / 4 and 2 - 3 * 1
      (1.0, -1.0)
    """

    mean: jax.Array
    rate: jax.Array
    bias_rate: jax.Array

    @jax.jit  # as all of them, so that layers of equal shape are traced once
    def gradient_in_z(self, gradient: Weights) -> Weights:
        """Returns ``P' g``, the gradient with respect to z where that with respect to w is ``g``.

        ``Z_w[j,i] = (G_w[j,i] - mu[j] G_b[i]) / (q sd[j])`` and ``Z_b[i] = G_b[i] / q``.
        """
        kernel, bias = gradient
        if bias is None:
            return Weights(kernel * self.rate, None)
        return Weights((kernel - self.mean * _at_kernel(bias)) * self.rate, bias * self.bias_rate)

    @jax.jit
    def from_z(self, z: Weights) -> Weights:
        """Returns ``P z``, the weights, or the step of the weights, that ``z`` stands for.

        ``W[j,i] = z_w[j,i] / (q sd[j])`` and ``b[i] = z_b[i] / q - sum_j mu[j] W[j,i]``.
        """
        kernel = z.kernel * self.rate
        if z.bias is None:
            return Weights(kernel, None)
        return Weights(kernel, z.bias * self.bias_rate - _sum_over_inputs(self.mean, kernel))

    @jax.jit
    def to_z(self, weights: Weights) -> Weights:
        """Returns ``P^-1 w``, the variables that stand for the weights; 0 where P is.

        ``z_w[j,i] = q sd[j] W[j,i]`` and ``z_b[i] = q (b[i] + sum_j mu[j] W[j,i])``.
        """
        kernel, bias = weights
        positive = self.rate > 0
        new_kernel = jnp.where(positive, kernel / jnp.where(positive, self.rate, 1), 0)  # so for gradients of it, too
        if bias is None:
            return Weights(new_kernel, None)
        return Weights(new_kernel, (bias + _sum_over_inputs(self.mean, kernel)) / self.bias_rate)

    # A call of its own would have XLA for CPUs schedule it apart, and keep an activation alive for it.
    @functools.partial(jax.jit, inline=True)
    def precondition(self, gradient: Weights) -> Weights:
        """Returns ``P P' g``, the paper's step: what a gradient step in z does to the weights.

        ``D_w[j,i] = (G_w[j,i] - mu[j] G_b[i]) / (q sd[j])^2`` and ``D_b[i] = G_b[i] / q^2 - sum_j mu[j] D_w[j,i]``:
        ``from_z(gradient_in_z(gradient))`` but for rounding, and without an array of the kernel's size between.
        In float32 the bias has an error of about ``1e-7 sum_j (mu[j] / sd[j])^2`` of ``G_b``: nothing unless an input's
        mean is thousands of times its deviation; such inputs are better shifted first.
        """
        kernel, bias = gradient
        rate = jnp.square(self.rate)
        if bias is None:
            return Weights(kernel * rate, None)

        def new_kernel(mean: jax.Array, rate: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            return (kernel - mean * _at_kernel(bias)) * rate

        def sum_of_new(mean: jax.Array, rate: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            return _weighted_sum(mean, new_kernel(mean, rate, kernel, bias))

        def sum_of_old(mean: jax.Array, rate: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            # A matrix product wants its operand in memory: the old kernel is there, a new one would have to be put.
            weights = mean * rate
            length = kernel.shape[3] * (mean * weights).sum((2, 3))
            return _product(weights, kernel) - length * bias

        operands = (self.mean, rate, kernel, bias)
        if kernel.size < _LARGE_KERNEL:
            mean_step = sum_of_new(*operands)
        else:
            mean_step = jax.lax.platform_dependent(*operands, cpu=sum_of_old, default=sum_of_new)
        return Weights(new_kernel(*operands), bias * jnp.square(self.bias_rate) - mean_step)


def _at_kernel(bias: jax.Array) -> jax.Array:
    stack, group, outputs = bias.shape
    return bias.reshape(stack, group, 1, 1, outputs)


def _sum_over_inputs(weights: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the sum over inputs and window of a kernel, each input with its weight: ``[stack, group, output]``."""
    if kernel.size < _LARGE_KERNEL:
        return _weighted_sum(weights, kernel)
    result: jax.Array = jax.lax.platform_dependent(weights, kernel, cpu=_product, default=_weighted_sum)
    return result


def _weighted_sum(weights: jax.Array, kernel: jax.Array) -> jax.Array:
    return (weights * kernel).sum((2, 3))


def _product(weights: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("sgi,sgiwo->sgo", weights[..., 0, 0], kernel, precision=jax.lax.Precision.HIGHEST)
