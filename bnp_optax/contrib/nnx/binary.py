"""Flax NNX's layers of binary networks without Batch Normalization."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from bnp_optax.contrib.binary import ALPHA, binarize_standardized, binary_sign, pool_shortcut, rprelu
from bnp_optax.contrib.standardized import kernel_init as default_kernel_init
from bnp_optax.contrib.standardized import standardize


class BinaryWSLinear(nnx.Linear):
    """A dense layer of binary weights, with a gain for every output.

    It has the arguments and parameters of ``nnx.Linear``, without a bias by default, and the parameter ``gain``,
    ``[out_features]``, that begins at 1. The kernel enters the product as
    :func:`~bnp_optax.contrib.binarize_standardized` makes it of the parameter. The input is taken as it is: put
    :class:`RSign` before it.

    Args:
      in_features: number of inputs.
      out_features: number of outputs.
      use_bias: whether to add a bias.
      eps: see :func:`~bnp_optax.contrib.standardize`.
      binary: ``False`` leaves out the sign: the kernel is the standardized one, with the same parameters, as in the
        first stage of the method's recipe. ``model.set_attributes(binary=True)`` begins the second.
      kernel_init: initializer of the kernel before it is standardized.
      rngs: random keys.
      **kwargs: further arguments of ``nnx.Linear``.

    Raises:
      ValueError: by a call, if there is a single input.

    Example:
      >>> layer = BinaryWSLinear(4, 3, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 4))).shape
      (1, 3)

    References:
      As for :func:`~bnp_optax.contrib.binarize_standardized`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        eps: float = 1e-4,
        binary: bool = True,
        kernel_init: nnx.Initializer = default_kernel_init,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, use_bias=use_bias, kernel_init=kernel_init, rngs=rngs, **kwargs)
        self.gain, self.eps, self.binary = nnx.Param(jnp.ones(out_features, self.param_dtype)), eps, binary

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to ``[..., in_features]``."""
        layer: Any = _Binary(self)
        return nnx.Linear.__call__(layer, inputs, out_sharding)


class BinaryWSConv(nnx.Conv):
    """A convolution of binary weights, with a gain for every output.

    It has the arguments and parameters of ``nnx.Conv``, without a bias by default, and the parameter ``gain``,
    ``[out_features]``, that begins at 1. The kernel enters the convolution as
    :func:`~bnp_optax.contrib.binarize_standardized` makes it of the parameter. The input is taken as it is: put
    :class:`RSign` before it.

    Padding is that of ``nnx.Conv``. What "SAME" and numbers of pixels add at the borders are zeros, as in the authors'
    code, which are neither 1 nor -1: there an output is a sum over the inputs within the image alone. With "VALID",
    "CIRCULAR" and "REFLECT" all inputs are binary.

    Args:
      in_features: number of input channels.
      out_features: number of output channels.
      kernel_size: the window.
      use_bias: whether to add a bias.
      eps: see :func:`~bnp_optax.contrib.standardize`.
      binary: ``False`` leaves out the sign: the kernel is the standardized one, with the same parameters, as in the
        first stage of the method's recipe. ``model.set_attributes(binary=True)`` begins the second.
      kernel_init: initializer of the kernel before it is standardized.
      rngs: random keys.
      **kwargs: further arguments of ``nnx.Conv``.

    Raises:
      ValueError: for a ``mask``, which would make weights of three values; by a call, if an output sees a single
        weight, as in a depthwise convolution of window 1.

    Example:
      >>> layer = BinaryWSConv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 6, 6, 4))).shape
      (1, 3, 3, 8)

    References:
      As for :func:`~bnp_optax.contrib.binarize_standardized`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | tuple[int, ...],
        *,
        use_bias: bool = False,
        eps: float = 1e-4,
        binary: bool = True,
        kernel_init: nnx.Initializer = default_kernel_init,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("mask") is not None:
            raise ValueError("BinaryWSConv takes no mask: a masked kernel has a third value, 0.")
        super().__init__(
            in_features, out_features, kernel_size, use_bias=use_bias, kernel_init=kernel_init, rngs=rngs, **kwargs
        )
        self.gain, self.eps, self.binary = nnx.Param(jnp.ones(out_features, self.param_dtype)), eps, binary

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to ``[..., *window axes, in_features]``."""
        layer: Any = _Binary(self)
        return nnx.Conv.__call__(layer, inputs, out_sharding)


class _Binary:
    """A layer seen with the kernel that enters its product; the layer itself stays as it is."""

    def __init__(self, layer: BinaryWSLinear | BinaryWSConv) -> None:
        self._layer = layer
        weights = binarize_standardized if layer.binary else standardize
        self.kernel = weights(layer.kernel[...], layer.gain[...], layer.eps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class RSign(nnx.Module):
    """The sign of the input plus a bias for every channel, the parameter ``bias``, ``[channels]``, that begins at 0.

    Args:
      features: number of channels.
      param_dtype: of the parameter; the output has the dtype of the input.

    Example:
      >>> RSign(2)(jnp.array([[-1.0, 2.0]]))
      Array([[-1.,  1.]], dtype=float32)

    References:
      Liu et al., ECCV 2020, as for :func:`~bnp_optax.contrib.rprelu`; the sign and its gradient are
      :func:`~bnp_optax.contrib.binary_sign`.
    """

    def __init__(self, features: int, param_dtype: DTypeLike = jnp.float32) -> None:
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns 1 and -1, of the shape of ``x``, ``[..., channels]``."""
        return binary_sign(x + jnp.expand_dims(self.bias[...].astype(x.dtype), range(x.ndim - 1)))


class RPReLU(nnx.Module):
    """:func:`~bnp_optax.contrib.rprelu` with parameters ``shift``, ``slope`` and ``offset``, each ``[channels]``.

    Args:
      features: number of channels.
      slope: with which that of all channels begins; the others begin at 0.
      param_dtype: of the parameters; the output has the dtype of the input.

    Example:
      >>> print(RPReLU(2)(jnp.array([[-1.0, 1.0]])))
      [[-0.25  1.  ]]

    References:
      As for :func:`~bnp_optax.contrib.rprelu`; the first slope is that of the authors' code.
    """

    def __init__(self, features: int, slope: float = 0.25, param_dtype: DTypeLike = jnp.float32) -> None:
        self.shift, self.offset = (nnx.Param(jnp.zeros(features, param_dtype)) for _ in range(2))
        self.slope = nnx.Param(jnp.full(features, slope, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the nonlinearity to ``[..., channels]``."""
        return rprelu(x, self.shift[...], self.slope[...], self.offset[...])


class BinaryBlock(nnx.Module):
    """A residual block of one binary 3x3 convolution without Batch Normalization.

    It computes ::

        h = conv3x3(sign(beta x + bias))
        y = rprelu(alpha h + shortcut)

    The shortcut is ``x``; where the block has strides or other channels, it is a binary 1x1 convolution of the means
    of ``beta x`` over 2x2 pixels, real numbers. The nonlinearity comes after the sum.

    Args:
      in_features: channels of the input.
      features: channels of the output.
      beta: one of :func:`~bnp_optax.contrib.block_betas`.
      strides: of the convolution, along both axes.
      alpha: how much the branch counts.
      binary: whether the weights are binary; ``False`` is the first stage of the method's recipe, whose activations
        are binary alone. The parameters are the same, and ``model.set_attributes(binary=True)`` begins the second.
      dtype: of the convolutions; by default that of input and parameters.
      param_dtype: of the parameters.
      rngs: random keys.

    Example:
      >>> block = BinaryBlock(4, 8, beta=0.9806, strides=2, rngs=nnx.Rngs(0))
      >>> block(jnp.ones((1, 6, 6, 4))).shape
      (1, 3, 3, 8)

    References:
      Chen et al., CVPR Workshops 2021, https://arxiv.org/abs/2104.08215: the block of the authors' ReActNet-18. The
      beta that goes with each block is that of :func:`~bnp_optax.contrib.block_betas`.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        beta: float = 1.0,
        strides: int = 1,
        alpha: float = ALPHA,
        binary: bool = True,
        dtype: Any = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        conv = functools.partial(
            BinaryWSConv, in_features, features, binary=binary, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.beta, self.strides, self.alpha = beta, strides, alpha
        self.sign = RSign(in_features, param_dtype)
        self.conv = conv(kernel_size=(3, 3), strides=strides, padding=1)
        same = strides == 1 and in_features == features
        self.projection = nnx.data(None if same else conv(kernel_size=(1, 1)))
        self.activation = RPReLU(features, param_dtype=param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block to ``[examples, height, width, channels]``."""
        scaled = self.beta * x
        h = self.conv(self.sign(scaled))
        shortcut = x if self.projection is None else self.projection(pool_shortcut(scaled, self.strides))
        return self.activation(self.alpha * h + shortcut.astype(h.dtype))
