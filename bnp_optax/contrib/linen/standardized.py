"""Flax Linen's layers with standardized kernels."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp  # noqa: F401  # for the examples

from bnp_optax.contrib.standardized import kernel_init as default_kernel_init
from bnp_optax.contrib.standardized import standardize


class WSDense(nn.Dense):
    """A dense layer whose kernel is standardized, with a gain for every output.

    It has the arguments and parameters of ``nn.Dense``, and the parameter ``gain``, ``[features]``, that begins at 1.
    The kernel enters the product as :func:`~bnp_optax.contrib.standardize` makes it of the parameter.

    Attributes:
      kernel_init: initializer of the kernel before it is standardized.
      eps: see :func:`~bnp_optax.contrib.standardize`.

    Raises:
      ValueError: if there is a single input.

    Example:
      >>> layer = WSDense(3)
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'bias': (3,), 'gain': (3,), 'kernel': (4, 3)}
      >>> print(layer.apply({"params": params}, jnp.ones((1, 4))).round(3) + 0)  # the weights have mean 0
      [[0. 0. 0.]]

    References:
      As for :func:`~bnp_optax.contrib.standardize`.
    """

    kernel_init: nn.initializers.Initializer = default_kernel_init
    eps: float = 1e-4

    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **init_kwargs: Any) -> Any:
        """Declares a parameter, and a gain beside the kernel, which comes back standardized."""
        return _standardized(super().param, self.eps, name, init_fn, *init_args, **init_kwargs)


class WSConv(nn.Conv):
    """A convolution whose kernel is standardized, with a gain for every output.

    It has the arguments and parameters of ``nn.Conv``, and the parameter ``gain``, ``[features]``, that begins at 1.
    The kernel enters the convolution as :func:`~bnp_optax.contrib.standardize` makes it of the parameter.

    Attributes:
      kernel_init: initializer of the kernel before it is standardized.
      eps: see :func:`~bnp_optax.contrib.standardize`.

    Raises:
      ValueError: if an output sees a single weight, as in a depthwise convolution of window 1; for a ``mask``, which
        would take the weights' mean and norm away again.

    Example:
      >>> layer = WSConv(8, (3, 3), strides=2, feature_group_count=2)
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 6, 6, 4)))["params"]
      >>> jax.tree.map(jnp.shape, params)
      {'bias': (8,), 'gain': (8,), 'kernel': (3, 3, 2, 8)}

    References:
      As for :func:`~bnp_optax.contrib.standardize`.
    """

    kernel_init: nn.initializers.Initializer = default_kernel_init
    eps: float = 1e-4

    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **init_kwargs: Any) -> Any:
        """Declares a parameter, and a gain beside the kernel, which comes back standardized."""
        if self.mask is not None:
            raise ValueError("WSConv takes no mask: a masked kernel has neither the mean nor the norm of its units.")
        return _standardized(super().param, self.eps, name, init_fn, *init_args, **init_kwargs)


def _standardized(
    param: Callable[..., Any], eps: float, name: str, init_fn: Callable[..., Any], *init_args: Any, **init_kwargs: Any
) -> Any:
    """Returns a parameter of a layer, its kernel standardized with a gain that is declared beside it."""
    value = param(name, init_fn, *init_args, **init_kwargs)
    if name != "kernel":
        return value
    gain: jax.Array = param("gain", nn.initializers.ones, value.shape[-1:], value.dtype)
    return standardize(value, gain, eps)
