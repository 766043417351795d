"""Centred kernels: an optimizer that leaves the mean of every output unit's weights as it is."""

import optax

from bnp_optax.arguments import checked_inner
from bnp_optax.contrib.units import map_layers, sum_over_units, transform_layers
from bnp_optax.layers import Layer, Layers, check_layers
from bnp_optax.trees import Weights


def centred(inner: optax.GradientTransformation, layers: Layers) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on what is left of every kernel without the mean of each output unit's weights.

    Over the N weights ``w`` that lead to one output, with their gradient ``g`` and the step ``s`` of ``inner``::

        g <- g - mean(g)
        s <- s - mean(s)

    so that ``mean(w)`` stays what it is: 0 where training begins with :func:`centre_kernels`, which it should. Along
    the mean a unit sees what its inputs have in common, as the brightness of a window, which may vary many times as
    much as they do along the average direction. :func:`~bnp_optax.preconditioned` standardizes each input alone and
    leaves what they have in common. Inside it, ``preconditioned(centred(inner, layers), layers)``, gradients and steps
    are those in BNP's variables: no step changes the mean there, but the variables themselves move with the statistics,
    so that the mean of neither these nor the kernel is kept to the digit.

    Biases, and parameters outside ``layers``, are those of ``inner``. Leave the output layer out, and what follows a
    LayerNorm, whose outputs have nothing in common: ``layers.select(...)``.

    Args:
      inner: the optimizer, learning rate included.
      layers: the layers whose kernels are centred.

    Returns:
      The optimizer. Its updates have the dtypes of those of ``inner``; means are of float32 or wider.

    Raises:
      ValueError: for ``layers`` without a layer, or with one whose units have a single weight; by ``init`` and
        ``update`` if ``layers`` does not describe the parameters.
      TypeError: if ``layers`` is no ``Layers``, or ``inner`` no transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> layers = Layers((Layer.dense(("w",), (2, 1)),))
      >>> params = {"w": jnp.array([[1.0], [-1.0]])}
      >>> tx = centred(optax.sgd(1.0), layers)
      >>> tx.update({"w": jnp.array([[5.0], [3.0]])}, tx.init(params))[0]["w"].ravel()
      Array([-1.,  1.], dtype=float32)

    References:
      Yong, Huang, Hua, Zhang, Gradient Centralization, ECCV 2020, https://arxiv.org/abs/2004.01461, equation 1, has the
      first of the two lines. That steps are centred too, so that Adam does not bring a mean back, that kernels begin
      centred, and the use inside BNP's variables, are choices of this library.
    """
    inner = checked_inner(inner)
    _check(layers)
    centre = transform_layers(_without_mean, layers, needs_params=False)
    return optax.chain(centre, inner, centre)


def centre_kernels(params: optax.Params, layers: Layers) -> optax.Params:
    """Takes the mean of every output unit's weights from a network's kernels, where its training begins.

    Initializers that draw every weight alone leave a unit a mean, ``1 / sqrt(N)`` of the size of a weight; as inputs
    have much in common, it is a large part of what the unit answers.

    Args:
      params: the parameters.
      layers: the layers whose kernels are centred, as for :func:`centred`.

    Returns:
      The parameters, in the same tree, shapes and dtypes.

    Raises:
      ValueError: as :func:`centred`.
      TypeError: if ``layers`` is no ``Layers``.

    Example:
      >>> import jax.numpy as jnp
      >>> layers = Layers((Layer.dense(("w",), (2, 1)),))
      >>> centre_kernels({"w": jnp.array([[5.0], [3.0]])}, layers)["w"].ravel()
      Array([ 1., -1.], dtype=float32)
    """
    _check(layers)
    return map_layers(_without_mean, params, None, layers)


def _check(layers: Layers) -> None:
    check_layers(layers)
    if single := [layer.path for layer in layers.values() if layer.fan_in < 2]:
        raise ValueError(
            f"Each unit of {', '.join(single)} has a single weight, which is its own mean, so that it would never be "
            "trained. Leave such layers out with layers.select(...)."
        )


def _without_mean(layer: Layer, weights: Weights, _: None) -> Weights:
    return Weights(weights.kernel - sum_over_units(weights.kernel) / layer.fan_in, weights.bias)
