"""Flax NNX's layers with standardized kernels."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bnp_optax.contrib.standardized import kernel_init as default_kernel_init
from bnp_optax.contrib.standardized import standardize


class WSLinear(nnx.Linear):
    """A dense layer whose kernel is standardized, with a gain for every output.

    It has the arguments and parameters of ``nnx.Linear``, and the parameter ``gain``, ``[out_features]``, that begins
    at 1. The kernel enters the product as :func:`~bnp_optax.contrib.standardize` makes it of the parameter.

    Args:
      in_features: number of inputs.
      out_features: number of outputs.
      eps: see :func:`~bnp_optax.contrib.standardize`.
      kernel_init: initializer of the kernel before it is standardized.
      rngs: random keys.
      **kwargs: further arguments of ``nnx.Linear``.

    Raises:
      ValueError: by a call, if there is a single input.

    Example:
      >>> layer = WSLinear(4, 3, rngs=nnx.Rngs(0))
      >>> print(layer(jnp.ones((1, 4))).round(3) + 0)  # the weights have mean 0
      [[0. 0. 0.]]

    References:
      As for :func:`~bnp_optax.contrib.standardize`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float = 1e-4,
        kernel_init: nnx.Initializer = default_kernel_init,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, kernel_init=kernel_init, rngs=rngs, **kwargs)
        self.gain, self.eps = nnx.Param(jnp.ones(out_features, self.param_dtype)), eps

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to ``[..., in_features]``."""
        layer: Any = _Standardized(self)
        return nnx.Linear.__call__(layer, inputs, out_sharding)


class WSConv(nnx.Conv):
    """A convolution whose kernel is standardized, with a gain for every output.

    It has the arguments and parameters of ``nnx.Conv``, and the parameter ``gain``, ``[out_features]``, that begins
    at 1. The kernel enters the convolution as :func:`~bnp_optax.contrib.standardize` makes it of the parameter.

    Args:
      in_features: number of input channels.
      out_features: number of output channels.
      kernel_size: the window.
      eps: see :func:`~bnp_optax.contrib.standardize`.
      kernel_init: initializer of the kernel before it is standardized.
      rngs: random keys.
      **kwargs: further arguments of ``nnx.Conv``.

    Raises:
      ValueError: for a ``mask``, which would take the weights' mean and norm away again; by a call, if an output sees a
        single weight, as in a depthwise convolution of window 1.

    Example:
      >>> layer = WSConv(4, 8, (3, 3), strides=2, feature_group_count=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 6, 6, 4))).shape
      (1, 3, 3, 8)

    References:
      As for :func:`~bnp_optax.contrib.standardize`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | tuple[int, ...],
        *,
        eps: float = 1e-4,
        kernel_init: nnx.Initializer = default_kernel_init,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("mask") is not None:
            raise ValueError("WSConv takes no mask: a masked kernel has neither the mean nor the norm of its units.")
        super().__init__(in_features, out_features, kernel_size, kernel_init=kernel_init, rngs=rngs, **kwargs)
        self.gain, self.eps = nnx.Param(jnp.ones(out_features, self.param_dtype)), eps

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to ``[..., *window axes, in_features]``."""
        layer: Any = _Standardized(self)
        return nnx.Conv.__call__(layer, inputs, out_sharding)


class _Standardized:
    """A layer seen with its kernel standardized; the layer itself stays as it is."""

    def __init__(self, layer: WSLinear | WSConv) -> None:
        self._layer = layer
        self.kernel = standardize(layer.kernel[...], layer.gain[...], layer.eps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
