"""Flax Linen's layers of binary networks without Batch Normalization."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bnp_optax.contrib.binary import ALPHA, binarize_standardized, binary_sign, pool_shortcut, rprelu
from bnp_optax.contrib.standardized import kernel_init as default_kernel_init
from bnp_optax.contrib.standardized import standardize


class BinaryWSDense(nn.Dense):
    """A dense layer of binary weights, with a gain for every output.

    It has the arguments and parameters of ``nn.Dense``, without a bias by default, and the parameter ``gain``,
    ``[features]``, that begins at 1. The kernel enters the product as
    :func:`~bnp_optax.contrib.binarize_standardized` makes it of the parameter. The input is taken as it is: put
    :class:`RSign` before it.

    Attributes:
      use_bias: whether to add a bias.
      kernel_init: initializer of the kernel before it is standardized.
      eps: see :func:`~bnp_optax.contrib.standardize`.
      binary: ``False`` leaves out the sign: the kernel is the standardized one, with the same parameters, as in the
        first stage of the method's recipe.

    Raises:
      ValueError: if there is a single input.

    Example:
      >>> layer = BinaryWSDense(3)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 4)))
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'gain': (3,), 'kernel': (4, 3)}

    References:
      As for :func:`~bnp_optax.contrib.binarize_standardized`.
    """

    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = default_kernel_init
    eps: float = 1e-4
    binary: bool = True

    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **init_kwargs: Any) -> Any:
        """Declares a parameter, and a gain beside the kernel, which comes back binary."""
        return _weights(super().param, self.eps, self.binary, name, init_fn, *init_args, **init_kwargs)


class BinaryWSConv(nn.Conv):
    """A convolution of binary weights, with a gain for every output.

    It has the arguments and parameters of ``nn.Conv``, without a bias by default, and the parameter ``gain``,
    ``[features]``, that begins at 1. The kernel enters the convolution as
    :func:`~bnp_optax.contrib.binarize_standardized` makes it of the parameter. The input is taken as it is: put
    :class:`RSign` before it.

    Padding is that of ``nn.Conv``. What "SAME" and numbers of pixels add at the borders are zeros, as in the authors'
    code, which are neither 1 nor -1: there an output is a sum over the inputs within the image alone. With "VALID",
    "CIRCULAR" and "REFLECT" all inputs are binary.

    Attributes:
      use_bias: whether to add a bias.
      kernel_init: initializer of the kernel before it is standardized.
      eps: see :func:`~bnp_optax.contrib.standardize`.
      binary: ``False`` leaves out the sign: the kernel is the standardized one, with the same parameters, as in the
        first stage of the method's recipe.

    Raises:
      ValueError: if an output sees a single weight, as in a depthwise convolution of window 1; for a ``mask``, which
        would make weights of three values.

    Example:
      >>> layer = BinaryWSConv(8, (3, 3), strides=2)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 6, 6, 4)))
      >>> y.shape, jax.tree.map(jnp.shape, variables["params"])
      ((1, 3, 3, 8), {'gain': (8,), 'kernel': (3, 3, 4, 8)})

    References:
      As for :func:`~bnp_optax.contrib.binarize_standardized`.
    """

    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = default_kernel_init
    eps: float = 1e-4
    binary: bool = True

    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **init_kwargs: Any) -> Any:
        """Declares a parameter, and a gain beside the kernel, which comes back binary."""
        if self.mask is not None:
            raise ValueError("BinaryWSConv takes no mask: a masked kernel has a third value, 0.")
        return _weights(super().param, self.eps, self.binary, name, init_fn, *init_args, **init_kwargs)


def _weights(
    param: Callable[..., Any],
    eps: float,
    binary: bool,
    name: str,
    init_fn: Callable[..., Any],
    *init_args: Any,
    **init_kwargs: Any,
) -> Any:
    """Returns a parameter of a layer, its kernel standardized and binary, with a gain that is declared beside it."""
    value = param(name, init_fn, *init_args, **init_kwargs)
    if name != "kernel":
        return value
    gain: jax.Array = param("gain", nn.initializers.ones, value.shape[-1:], value.dtype)
    return (binarize_standardized if binary else standardize)(value, gain, eps)


class RSign(nn.Module):
    """The sign of the input plus a bias for every channel, the parameter ``bias``, ``[channels]``, that begins at 0.

    Attributes:
      param_dtype: of the parameter; the output has the dtype of the input.

    Example:
      >>> RSign().apply({"params": {"bias": jnp.array([0.0, 2.0])}}, jnp.array([[-1.0, -1.0]]))
      Array([[-1.,  1.]], dtype=float32)

    References:
      Liu et al., ECCV 2020, as for :func:`~bnp_optax.contrib.rprelu`; the sign and its gradient are
      :func:`~bnp_optax.contrib.binary_sign`.
    """

    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns 1 and -1, of the shape of ``x``, ``[..., channels]``."""
        bias: jax.Array = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return binary_sign(x + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1)))


class RPReLU(nn.Module):
    """:func:`~bnp_optax.contrib.rprelu` with parameters ``shift``, ``slope`` and ``offset``, each ``[channels]``.

    Attributes:
      slope: with which that of all channels begins; the others begin at 0.
      param_dtype: of the parameters; the output has the dtype of the input.

    Example:
      >>> y, variables = RPReLU().init_with_output(jax.random.key(0), jnp.array([[-1.0, 1.0]]))
      >>> print(y, sorted(variables["params"]))
      [[-0.25  1.  ]] ['offset', 'shift', 'slope']

    References:
      As for :func:`~bnp_optax.contrib.rprelu`; the first slope is that of the authors' code.
    """

    slope: float = 0.25
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the nonlinearity to ``[..., channels]``."""
        shape, zeros = x.shape[-1:], nn.initializers.zeros
        shift = self.param("shift", zeros, shape, self.param_dtype)
        slope = self.param("slope", nn.initializers.constant(self.slope), shape, self.param_dtype)
        return rprelu(x, shift, slope, self.param("offset", zeros, shape, self.param_dtype))


class BinaryBlock(nn.Module):
    """A residual block of one binary 3x3 convolution without Batch Normalization.

    It computes ::

        h = conv3x3(sign(beta x + bias))
        y = rprelu(alpha h + shortcut)

    The shortcut is ``x``; where the block has strides or other channels, it is a binary 1x1 convolution of the means
    of ``beta x`` over 2x2 pixels, real numbers. The nonlinearity comes after the sum.

    Attributes:
      features: channels of the output.
      beta: one of :func:`~bnp_optax.contrib.block_betas`.
      strides: of the convolution, along both axes.
      alpha: how much the branch counts.
      binary: whether the weights are binary; ``False`` is the first stage of the method's recipe, whose activations
        are binary alone. The parameters are the same.
      dtype: of the convolutions; by default that of input and parameters.
      param_dtype: of the parameters.

    Example:
      >>> block = BinaryBlock(8, beta=0.9806, strides=2)
      >>> y, variables = block.init_with_output(jax.random.key(0), jnp.ones((1, 6, 6, 4)))
      >>> y.shape, sorted(variables["params"])
      ((1, 3, 3, 8), ['activation', 'conv', 'projection', 'sign'])

    References:
      Chen et al., CVPR Workshops 2021, https://arxiv.org/abs/2104.08215: the block of the authors' ReActNet-18. The
      beta that goes with each block is that of :func:`~bnp_optax.contrib.block_betas`.
    """

    features: int
    beta: float = 1.0
    strides: int = 1
    alpha: float = ALPHA
    binary: bool = True
    dtype: Any = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to ``[examples, height, width, channels]``."""
        conv = functools.partial(
            BinaryWSConv, self.features, binary=self.binary, dtype=self.dtype, param_dtype=self.param_dtype
        )
        scaled = self.beta * x
        signs = RSign(self.param_dtype, name="sign")(scaled)
        h: jax.Array = conv(kernel_size=(3, 3), strides=self.strides, padding=1, name="conv")(signs)
        shortcut = x
        if self.strides != 1 or x.shape[-1] != self.features:
            shortcut = conv(kernel_size=(1, 1), name="projection")(pool_shortcut(scaled, self.strides))
        total = self.alpha * h + shortcut.astype(h.dtype)
        return RPReLU(param_dtype=self.param_dtype, name="activation")(total)
