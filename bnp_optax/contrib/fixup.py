"""Fixup: how to initialize residual networks so that they train without normalization, however deep they are."""

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, variance_scaling


def fixup_normal(num_blocks: int, depth: int = 2) -> Initializer:
    """Returns the initializer of all kernels in a residual branch but the last, which Fixup begins at zero.

    It is He's normal initializer over the outputs, scaled down with the number L of residual blocks::

        std = sqrt(2 / fan_out) L^(-1 / (2 m - 2))

    for branches of m layers. Then the first step of gradient descent changes the network by as much, whatever its
    depth: with kernels scaled by s, the gradient of a branch's last kernel is in proportion to s^(m-1), its effect to
    s^(2m-2), and L branches add up.

    Args:
      num_blocks: L, the number of residual blocks in the whole network.
      depth: m, the number of layers with a kernel in one branch.

    Returns:
      The initializer.

    Raises:
      ValueError: if ``num_blocks`` is less than 1, or ``depth`` less than 2: the only kernel of a branch of one layer
        is its last, which is zero.

    Example:
      >>> kernel = fixup_normal(num_blocks=16)(jax.random.key(0), (3, 3, 64, 128))
      >>> print(kernel.std().round(4))  # sqrt(2 / (9 * 128)) / 4
      0.0104

    References:
      Zhang, Dauphin, Ma, Fixup Initialization: Residual Learning Without Normalization, ICLR 2019,
      https://arxiv.org/abs/1901.09321, as in the authors' code. Descriptions of the method are about in which the
      exponent has lost its minus sign.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks must be at least 1, but is {num_blocks}.")
    if depth < 2:
        raise ValueError(
            f"depth must be at least 2, but is {depth}: the only layer of a branch is its last, whose kernel begins at "
            "zero."
        )
    return variance_scaling(2.0 * num_blocks ** (-1 / (depth - 1)), "fan_out", "normal")


def shortcut(x: jax.Array, biased: jax.Array, features: int, strides: int) -> jax.Array:
    """Returns what passes by the branch of a residual block for CIFAR.

    Args:
      x: the input, ``[examples, height, width, channels]``.
      biased: the input to which the first scalar bias has been added.
      features: channels of the block's output.
      strides: along both axes.

    Returns:
      The input; if the block has strides or more channels, every ``strides``-th pixel of ``biased``, and zeros for the
      further channels.

    Raises:
      ValueError: if the input has more channels than the output.

    Example:
      >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
      >>> print(shortcut(x, x, features=2, strides=2)[0, ..., 0], shortcut(x, x, 2, 2)[..., 1].any())
      [[ 0.  2.]
       [ 8. 10.]] False
    """
    if (channels := x.shape[-1]) > features:
        raise ValueError(f"The input has {channels} channels, but the block {features}: a shortcut only adds channels.")
    if strides == 1 and channels == features:
        return x
    return jnp.pad(biased[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (0, features - channels)))
