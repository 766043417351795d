"""Adaptive gradient clipping: every output unit's gradient is bounded by the norm of the unit's own weights."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from bnp_optax.arguments import is_known
from bnp_optax.contrib.units import norms, transform_layers, unit_norms
from bnp_optax.layers import Layer, Layers
from bnp_optax.trees import Weights

_SMALLEST_NORM = 1e-6  # of a gradient: what it is divided by at least


def adaptive_grad_clip(
    clipping: ArrayLike, layers: Layers, eps: ArrayLike = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient of every output unit to a fraction of the norm of the unit's weights.

    With ``W_i`` the weights that lead to output ``i`` of a layer and ``G_i`` their gradient::

        G_i <- G_i lambda max(|W_i|, eps) / max(|G_i|, 1e-6)      if |G_i| > lambda max(|W_i|, eps)

    and unchanged otherwise, in Euclidean norms. The bias of a layer is one vector, which is clipped as a whole. Of
    layers that are stacked in one array, as by ``nn.scan``, each is clipped alone.

    ``optax.adaptive_grad_clip`` knows shapes alone. It takes other parts of an array for a unit in one-dimensional
    convolutions (a pair of input and output), the output kernel of an attention (a head's feature), convolutions with
    ``transpose_kernel`` (an input), kernels with a single input (the whole kernel) and most stacked layers; this one
    reads the axes from ``layers``. On dense kernels, on other convolutions of two and three dimensions, and on biases
    that are vectors, the two agree.

    Parameters outside ``layers`` pass unchanged: the authors leave the classifier out, ``layers.select(lambda layer:
    layer.path != "Dense_0")``. Put it first in a chain: it wants the raw gradient, before weight decay and momentum,
    and ``update`` needs ``params``. Adam divides a constant factor of the gradients out again, so that in front of it
    steady clipping does nearly nothing. Parameters that are zero, as biases are at first, get a gradient of norm
    lambda eps at most.

    A unit whose gradient is not finite remains so, and changes no other unit.

    Args:
      clipping: lambda; infinity clips nothing. It may be an array, as ``optax.inject_hyperparams`` makes of it.
      layers: the layers whose gradients are clipped.
      eps: the norm that smaller weights are taken to have.

    Returns:
      The transformation, which has no state. Its updates have the gradients' tree, shapes and dtypes; norms are of
      float32 or wider.

    Raises:
      ValueError: for an option out of range, or ``layers`` without a layer; by ``init`` and ``update`` if ``layers``
        does not describe the parameters; by ``update`` without ``params``.
      TypeError: if ``layers`` is no ``Layers``.

    Example:
      >>> layers = Layers((Layer.dense(("w",), (2, 2)),))
      >>> tx = adaptive_grad_clip(0.01, layers)
      >>> params = {"w": jnp.array([[3.0, 3.0], [4.0, 4.0]])}  # two units of norm 5
      >>> gradients = {"w": jnp.array([[0.03, 0.3], [0.04, 0.4]])}  # of norms 0.05 and 0.5
      >>> tx.update(gradients, tx.init(params), params)[0]["w"].round(3)
      Array([[0.03, 0.03],
             [0.04, 0.04]], dtype=float32)

    References:
      Brock, De, Smith, Simonyan, High-Performance Large-Scale Image Recognition Without Normalization, ICML 2021,
      https://arxiv.org/abs/2102.06171; the formula with both of its bounds is that of the authors' code. What a unit
      of a grouped, transposed or stacked kernel is, and that a bias of several axes is one vector, are choices of this
      library.
    """
    if is_known(clipping) and not clipping > 0:
        raise ValueError(f"clipping must be positive, but is {clipping}.")
    if is_known(eps) and not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and not negative, but is {eps}.")

    def clip(layer: Layer, gradients: Weights, weights: Weights) -> Weights:
        kernel = _clip(gradients.kernel, unit_norms(gradients.kernel), unit_norms(weights.kernel))
        if layer.bias is None:
            return Weights(kernel, None)
        of_bias, of_weights = norms(gradients.bias, (1, 2)), norms(weights.bias, (1, 2))  # of [stack, group, output]
        return Weights(kernel, _clip(gradients.bias, of_bias, of_weights))

    def _clip(gradient: jax.Array, gradient_norms: jax.Array, weight_norms: jax.Array) -> jax.Array:
        fraction, smallest = (jnp.asarray(option, gradient_norms.dtype) for option in (clipping, eps))
        bounds = fraction * jnp.maximum(weight_norms, smallest)
        factors = jnp.where(gradient_norms > bounds, bounds / jnp.maximum(gradient_norms, _SMALLEST_NORM), 1)
        return gradient * factors

    return transform_layers(clip, layers)
