"""The residual block of Fixup for Flax NNX."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from bnp_optax.contrib.fixup import fixup_normal, shortcut


class ScalarBias(nnx.Module):
    """Adds one number, the parameter ``bias``, that begins at 0.

    Args:
      param_dtype: of the parameter; the output has the dtype of the input.

    Example:
      >>> ScalarBias()(jnp.array([1.0, 3.0]))
      Array([1., 3.], dtype=float32)
    """

    def __init__(self, param_dtype: DTypeLike = jnp.float32) -> None:
        self.bias = nnx.Param(jnp.zeros((), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x + bias``."""
        return x + self.bias[...].astype(x.dtype)


class ScalarScale(nnx.Module):
    """Multiplies by one number, the parameter ``scale``, that begins at 1.

    Args:
      param_dtype: of the parameter; the output has the dtype of the input.

    Example:
      >>> ScalarScale()(jnp.array([1.0, 3.0]))
      Array([1., 3.], dtype=float32)
    """

    def __init__(self, param_dtype: DTypeLike = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones((), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x * scale``."""
        return x * self.scale[...].astype(x.dtype)


class FixupBlock(nnx.Module):
    """A residual block of two 3x3 convolutions, initialized by Fixup.

    It computes ::

        h = relu(conv1(x + bias1a) + bias1b)
        y = relu(scale * conv2(h + bias2a) + bias2b + shortcut)

    with scalar biases, a scalar multiplier, and no biases in the convolutions. The first kernel is drawn by
    :func:`~bnp_optax.contrib.fixup_normal`, the second is zero, so that the block begins as ``relu(x)``. The shortcut
    is the input; where the block has strides or more channels, it is every so many pixels of ``x + bias1a``, and
    further channels of zeros.

    Args:
      in_features: channels of the input.
      features: channels of the output, at least those of the input.
      num_blocks: residual blocks in the whole network.
      strides: of the first convolution, along both axes.
      dtype: of the convolutions; by default that of input and parameters.
      param_dtype: of the parameters.
      rngs: random keys.

    Raises:
      ValueError: by a call, if the input has more channels than the output.

    Example:
      >>> block = FixupBlock(4, 8, num_blocks=9, strides=2, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((1, 6, 6, 4))).shape
      (1, 3, 3, 8)

    References:
      Zhang, Dauphin, Ma, ICLR 2019, https://arxiv.org/abs/1901.09321: the basic block of the authors' code for CIFAR.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        num_blocks: int,
        strides: int = 1,
        dtype: Any = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        conv = functools.partial(
            nnx.Conv, kernel_size=(3, 3), padding=1, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.features, self.strides = features, strides
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (ScalarBias(param_dtype) for _ in range(4))
        self.conv1 = conv(in_features, features, strides=strides, kernel_init=fixup_normal(num_blocks))
        self.conv2 = conv(features, features, kernel_init=nnx.initializers.zeros)
        self.scale = ScalarScale(param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to ``[examples, height, width, channels]``."""
        biased = self.bias1a(x)
        h = nnx.relu(self.bias1b(self.conv1(biased)))
        h = self.bias2b(self.scale(self.conv2(self.bias2a(h))))
        return nnx.relu(h + shortcut(x, biased, self.features, self.strides).astype(h.dtype))
