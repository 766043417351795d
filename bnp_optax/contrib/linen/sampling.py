"""Flax Linen's layers of neural sampling machines."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes
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


class NSMDense(nn.Module):
    """A dense layer of binary units that see their inputs through noise, in training and in use.

    See :func:`~bnp_optax.contrib.sample_units`. Beside the parameters of ``nn.Dense`` it has the gains ``beta``,
    ``[features]``, that begin at 1. Every call draws noise from the random keys of the collection "noise":
    ``model.apply(variables, x, rngs={"noise": key})``; under ``nn.scan`` and ``nn.vmap``, ``split_rngs={"params":
    True, "noise": True}``. Where ``apply`` is given keys for "params" alone, as ``init`` is, these serve.

    Attributes:
      features: number of units.
      use_bias: whether to add a bias before the threshold. With one, units depend on the norm of their weights, by the
        ratio of both.
      noise: :class:`~bnp_optax.contrib.BernoulliNoise` or :class:`~bnp_optax.contrib.GaussianNoise`.
      rng_collection: the name of the collection of random keys.
      dtype: of the result; by default it follows from input and parameters. The sums are in float32 or wider.
      param_dtype: of the parameters.
      precision: of the products.
      kernel_init: initializer of the kernel, whose scale does not matter.
      bias_init: initializer of the bias.

    Raises:
      ValueError: if there are no random keys.

    Example:
      >>> layer, z = NSMDense(3), jnp.ones((2, 4))
      >>> variables = layer.init(jax.random.key(0), z)
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'beta': (3,), 'bias': (3,), 'kernel': (4, 3)}
      >>> jnp.abs(layer.apply(variables, z, rngs={"noise": jax.random.key(1)}))
      Array([[1., 1., 1.],
             [1., 1., 1.]], dtype=float32)

    References:
      As for :func:`~bnp_optax.contrib.sample_units`; that beta begins at 1 is the authors' code's.
    """

    features: int
    use_bias: bool = True
    noise: Noise = BernoulliNoise(0.5)
    rng_collection: str = "noise"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Draws ``[..., features]`` for inputs ``[..., inputs]``."""

        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jnp.matmul(x, kernel, precision=self.precision)

        return _units(self, z, (z.shape[-1], self.features), product)


class NSMConv(nn.Module):
    """A convolution to binary units that see their inputs through noise, in training and in use.

    See :func:`~bnp_optax.contrib.sample_units`. Beside the parameters of ``nn.Conv`` it has the gains ``beta``,
    ``[features]``, that begin at 1. Each pixel of each channel of the input has a noise of its own, which all windows
    that it is in see alike. Zeros around the image have none. Random keys are as for :class:`NSMDense`.

    Attributes:
      features: number of output channels.
      kernel_size: the window.
      strides: a number, or one for every axis of the window, as both dilations.
      padding: "SAME", "VALID", a number of pixels, or numbers or pairs of them, one for every axis of the window.
      input_dilation: see ``nn.Conv``.
      kernel_dilation: see ``nn.Conv``.
      feature_group_count: see ``nn.Conv``.
      use_bias: whether to add a bias before the threshold. With one, units depend on the norm of their weights, by the
        ratio of both.
      noise: :class:`~bnp_optax.contrib.BernoulliNoise` or :class:`~bnp_optax.contrib.GaussianNoise`.
      rng_collection: the name of the collection of random keys.
      dtype: of the result; by default it follows from input and parameters. The sums are in float32 or wider.
      param_dtype: of the parameters.
      precision: of the convolutions.
      kernel_init: initializer of the kernel, whose scale does not matter.
      bias_init: initializer of the bias.

    Raises:
      ValueError: if there are no random keys; for other kinds of padding; if the channels do not divide into the
        groups.

    Example:
      >>> layer = NSMConv(8, (3, 3), strides=2, feature_group_count=2)
      >>> z, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 6, 6, 4)))
      >>> z.shape, jax.tree.map(jnp.shape, variables["params"])
      ((1, 3, 3, 8), {'beta': (8,), 'bias': (8,), 'kernel': (3, 3, 2, 8)})

    References:
      As for :func:`~bnp_optax.contrib.sample_units`. The authors' code has a beta for every position of the image;
      here one serves a channel, so that images of any size can be used.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    noise: Noise = BernoulliNoise(0.5)
    rng_collection: str = "noise"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Draws ``[..., *window axes, features]`` for inputs ``[..., *window axes, channels]``."""
        window = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        product = Convolution(
            len(window),
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
        )
        channels = channels_of_group(z.shape[-1], self.features, self.feature_group_count)
        return _units(self, z, (*window, channels, self.features), product)


def _units(layer: NSMDense | NSMConv, z: jax.Array, kernel_shape: tuple[int, ...], product: Product) -> jax.Array:
    """Declares the parameters of a layer and draws its units."""
    if not (layer.has_rng(layer.rng_collection) or layer.has_rng("params")):
        cure = f'hand them over, as in model.apply(variables, x, rngs={{"{layer.rng_collection}": key}})'
        raise missing_noise(type(layer).__name__, layer.rng_collection, cure)
    kernel = layer.param("kernel", layer.kernel_init, kernel_shape, layer.param_dtype)
    beta = layer.param("beta", nn.initializers.ones, (layer.features,), layer.param_dtype)
    bias = layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype) if layer.use_bias else None
    key = layer.make_rng(layer.rng_collection)
    dtype = dtypes.canonicalize_dtype(z, kernel, beta, bias, dtype=layer.dtype)
    return sample_units(key, z, kernel, beta, bias, noise=layer.noise, product=product).astype(dtype)
