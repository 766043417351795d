"""The residual block of Fixup for Flax Linen."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bnp_optax.contrib.fixup import fixup_normal, shortcut


class ScalarBias(nn.Module):
    """Adds one number, the parameter ``bias``, that begins at 0.

    Attributes:
      param_dtype: of the parameter; the output has the dtype of the input.

    Example:
      >>> ScalarBias().apply({"params": {"bias": jnp.array(2.0)}}, jnp.array([1.0, 3.0]))
      Array([3., 5.], dtype=float32)
    """

    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x + bias``."""
        bias: jax.Array = self.param("bias", nn.initializers.zeros, (), self.param_dtype)
        return x + bias.astype(x.dtype)


class ScalarScale(nn.Module):
    """Multiplies by one number, the parameter ``scale``, that begins at 1.

    Attributes:
      param_dtype: of the parameter; the output has the dtype of the input.

    Example:
      >>> ScalarScale().apply({"params": {"scale": jnp.array(2.0)}}, jnp.array([1.0, 3.0]))
      Array([2., 6.], dtype=float32)
    """

    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x * scale``."""
        scale: jax.Array = self.param("scale", nn.initializers.ones, (), self.param_dtype)
        return x * scale.astype(x.dtype)


class FixupBlock(nn.Module):
    """A residual block of two 3x3 convolutions, initialized by Fixup.

    It computes ::

        h = relu(conv1(x + bias1a) + bias1b)
        y = relu(scale * conv2(h + bias2a) + bias2b + shortcut)

    with scalar biases, a scalar multiplier, and no biases in the convolutions. The first kernel is drawn by
    :func:`~bnp_optax.contrib.fixup_normal`, the second is zero, so that the block begins as ``relu(x)``. The shortcut
    is the input; where the block has strides or more channels, it is every so many pixels of ``x + bias1a``, and
    further channels of zeros.

    Attributes:
      features: channels of the output, at least those of the input.
      num_blocks: residual blocks in the whole network.
      strides: of the first convolution, along both axes.
      dtype: of the convolutions; by default that of input and parameters.
      param_dtype: of the parameters.

    Raises:
      ValueError: if the input has more channels than the output.

    Example:
      >>> block = FixupBlock(8, num_blocks=9, strides=2)
      >>> y, variables = block.init_with_output(jax.random.key(0), jnp.ones((1, 6, 6, 4)))
      >>> y.shape, sorted(variables["params"])
      ((1, 3, 3, 8), ['bias1a', 'bias1b', 'bias2a', 'bias2b', 'conv1', 'conv2', 'scale'])

    References:
      Zhang, Dauphin, Ma, ICLR 2019, https://arxiv.org/abs/1901.09321: the basic block of the authors' code for CIFAR.
    """

    features: int
    num_blocks: int
    strides: int = 1
    dtype: Any = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to ``[examples, height, width, channels]``."""
        bias = functools.partial(ScalarBias, self.param_dtype)
        conv = functools.partial(
            nn.Conv,
            self.features,
            (3, 3),
            padding=1,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        biased = bias(name="bias1a")(x)
        h = conv(strides=self.strides, kernel_init=fixup_normal(self.num_blocks), name="conv1")(biased)
        h = nn.relu(bias(name="bias1b")(h))
        h = conv(kernel_init=nn.initializers.zeros, name="conv2")(bias(name="bias2a")(h))
        h = bias(name="bias2b")(ScalarScale(self.param_dtype, name="scale")(h))
        return nn.relu(h + shortcut(x, biased, self.features, self.strides).astype(h.dtype))
