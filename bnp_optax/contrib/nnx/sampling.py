"""Flax NNX's layers of neural sampling machines."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import DTypeLike

from bnp_optax.contrib.sampling import (
    BernoulliNoise,
    Convolution,
    Noise,
    Product,
    channels_of_group,
    missing_noise,
    sample_units,
)


class _SamplingLayer(nnx.Module):
    """What both layers share; it has no call of its own."""

    def __init__(
        self,
        kernel_shape: tuple[int, ...],
        *,
        use_bias: bool = True,
        noise: Noise = BernoulliNoise(0.5),  # noqa: B008  # frozen
        rng_collection: str = "noise",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),  # noqa: B008  # a pure function
        bias_init: nnx.Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        rngs: nnx.Rngs,
    ) -> None:
        units = kernel_shape[-1:]
        self.kernel = nnx.Param(kernel_init(rngs.params(), kernel_shape, param_dtype))
        self.beta = nnx.Param(jnp.ones(units, param_dtype))
        self.bias = nnx.data(nnx.Param(bias_init(rngs.params(), units, param_dtype)) if use_bias else None)
        self.noise, self.rng_collection, self.dtype, self.precision = noise, rng_collection, dtype, precision
        self.rngs = _stream(self, rngs).fork()

    def units(self, z: jax.Array, product: Product, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None) -> jax.Array:
        """Draws the units."""
        if isinstance(rngs, nnx.Rngs):
            rngs = _stream(self, rngs)
        rngs = self.rngs if rngs is None else rngs
        key = rngs if isinstance(rngs, jax.Array) else rngs()
        kernel, beta = self.kernel[...], self.beta[...]
        bias = None if self.bias is None else self.bias[...]
        dtype = dtypes.canonicalize_dtype(z, kernel, beta, bias, dtype=self.dtype)
        return sample_units(key, z, kernel, beta, bias, noise=self.noise, product=product).astype(dtype)


def _stream(layer: _SamplingLayer, rngs: nnx.Rngs) -> nnx.RngStream:
    """Returns the random keys of a layer's noise."""
    name = layer.rng_collection
    if name not in rngs and "default" not in rngs:
        raise missing_noise(type(layer).__name__, name, f"have them in rngs, as in nnx.Rngs(0, {name}=1)")
    stream: nnx.RngStream = rngs[name]
    return stream


class NSMLinear(_SamplingLayer):
    """A dense layer of binary units that see their inputs through noise, in training and in use.

    See :func:`~bnp_optax.contrib.sample_units`. Beside the parameters of ``nnx.Linear`` it has the gains ``beta``,
    ``[out_features]``, that begin at 1. Every call draws noise from the layer's own random keys, those of the stream
    "noise" of ``rngs``, or of the default stream where there is none; ``eval()`` does not end it. As with
    ``nnx.Dropout``, a call may be given other keys.

    Args:
      in_features: number of inputs.
      out_features: number of units.
      **arguments: ``use_bias``, ``noise`` (:class:`~bnp_optax.contrib.BernoulliNoise` of probability a half by
        default, or :class:`~bnp_optax.contrib.GaussianNoise`), ``rng_collection``, the name of the stream, ``dtype`` of
        the result, ``param_dtype``, ``precision``, ``kernel_init``, ``bias_init`` and ``rngs``. Sums are in float32 or
        wider.

    Raises:
      ValueError: if there are no random keys.

    Example:
      >>> layer = NSMLinear(4, 3, rngs=nnx.Rngs(0, noise=1))
      >>> jnp.abs(layer(jnp.ones((2, 4))))
      Array([[1., 1., 1.],
             [1., 1., 1.]], dtype=float32)

    References:
      As for :func:`~bnp_optax.contrib.sample_units`; that beta begins at 1 is the authors' code's.
    """

    def __init__(self, in_features: int, out_features: int, **arguments: Any) -> None:
        super().__init__((in_features, out_features), **arguments)

    def __call__(self, z: jax.Array, *, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None) -> jax.Array:
        """Draws ``[..., out_features]`` for inputs ``[..., in_features]``."""

        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jnp.matmul(x, kernel, precision=self.precision)

        return self.units(z, product, rngs)


class NSMConv(_SamplingLayer):
    """A convolution to binary units that see their inputs through noise, in training and in use.

    See :func:`~bnp_optax.contrib.sample_units`. Beside the parameters of ``nnx.Conv`` it has the gains ``beta``,
    ``[out_features]``, that begin at 1. Each pixel of each channel of the input has a noise of its own, which all
    windows that it is in see alike. Zeros around the image have none. Random keys are as for :class:`NSMLinear`.

    Args:
      in_features: number of input channels.
      out_features: number of output channels.
      kernel_size: the window.
      strides: a number, or one for every axis of the window, as both dilations.
      padding: "SAME", "VALID", a number of pixels, or numbers or pairs of them, one for every axis of the window.
      input_dilation: see ``nnx.Conv``.
      kernel_dilation: see ``nnx.Conv``.
      feature_group_count: see ``nnx.Conv``.
      **arguments: those of :class:`NSMLinear`.

    Raises:
      ValueError: if there are no random keys; for other kinds of padding; if the channels do not divide into the
        groups.

    Example:
      >>> layer = NSMConv(4, 8, (3, 3), strides=2, feature_group_count=2, rngs=nnx.Rngs(0, noise=1))
      >>> layer(jnp.ones((1, 6, 6, 4))).shape
      (1, 3, 3, 8)

    References:
      As for :func:`~bnp_optax.contrib.sample_units`. The authors' code has a beta for every position of the image;
      here one serves a channel, so that images of any size can be used.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Any = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        **arguments: Any,
    ) -> None:
        window = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        channels = channels_of_group(in_features, out_features, feature_group_count)
        super().__init__((*window, channels, out_features), **arguments)
        self.product = Convolution(
            len(window),
            strides=strides,
            padding=padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            precision=self.precision,
        )

    def __call__(self, z: jax.Array, *, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None) -> jax.Array:
        """Draws ``[..., *window axes, out_features]`` for inputs ``[..., *window axes, in_features]``."""
        return self.units(z, self.product, rngs)
