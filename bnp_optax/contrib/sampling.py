"""Neural sampling machines: binary units whose only nonlinearity is a threshold, and whose noise normalizes them.

Noise multiplies the inputs of every unit, in training and in use. How probable it makes each of the unit's two values
depends on the direction of the unit's weights, not on their norm. The layers are :mod:`bnp_optax.contrib.linen` and
:mod:`bnp_optax.contrib.nnx`'s ``NSMConv``, and ``NSMDense`` or ``NSMLinear``.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bnp_optax.moments import statistics_dtype

Product = Callable[[jax.Array, jax.Array], jax.Array]  # of inputs and a kernel, linear in both


@dataclasses.dataclass(frozen=True)
class BernoulliNoise:
    """Inputs are passed on with probability ``p`` and are 0 otherwise.

    Args:
      p: between 0 and 1, neither of which is noise.

    Raises:
      ValueError: if it is not.

    Example:
      >>> noise = BernoulliNoise(0.2)
      >>> noise.mean, noise.deviation
      (0.2, 0.4)
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"p must be between 0 and 1, so that there is noise, but is {self.p}.")

    @property
    def mean(self) -> float:
        """The mean of a factor."""
        return self.p

    @property
    def deviation(self) -> float:
        """The standard deviation of a factor."""
        return math.sqrt(self.p * (1 - self.p))

    def draw(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Returns independent factors."""
        return jax.random.bernoulli(key, self.p, shape).astype(dtype)


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
    """Inputs are multiplied by normal numbers of mean 1.

    Args:
      sigma: their standard deviation.

    Raises:
      ValueError: if it is not positive and finite.

    Example:
      >>> noise = GaussianNoise(0.5)
      >>> noise.mean, noise.deviation
      (1.0, 0.5)
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive and finite, so that there is noise, but is {self.sigma}.")

    @property
    def mean(self) -> float:
        """The mean of a factor."""
        return 1.0

    @property
    def deviation(self) -> float:
        """The standard deviation of a factor."""
        return self.sigma

    def draw(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Returns independent factors."""
        return 1 + self.sigma * jax.random.normal(key, shape, dtype)


Noise = BernoulliNoise | GaussianNoise


def activation_probability(
    z: jax.Array,
    kernel: jax.Array,
    beta: jax.Array,
    bias: jax.Array | None = None,
    *,
    noise: Noise,
    product: Product = jnp.matmul,
) -> jax.Array:
    """Returns how probable it is that each unit of :func:`sample_units` is 1.

    For a unit with the weights w, and sums over its inputs z::

        P = 1/2 (1 + erf(beta (w . z) / |w| + b / (sqrt(2) deviation |w|)))        |w|^2 = sum w^2 z^2

    as for weights that are normalized, with the gain beta. With normal noise this is exact; with Bernoulli noise it is
    the central limit theorem's, close where many inputs of like weight come together. Inputs are meant to be 1 and -1.
    For others, such as the zeros around an image, the norm is the formula's; it is a constant to the gradient with
    respect to z. Where all weights or inputs are zero there is no noise: P is 1 or 0, and the gradient 0.

    Args:
      z: the inputs, ``[..., inputs]`` for the default product.
      kernel: the weights, ``[inputs, outputs]`` for the default product; the last axis are the outputs.
      beta: ``[outputs]``.
      bias: ``[outputs]``, or ``None``.
      noise: :class:`BernoulliNoise` or :class:`GaussianNoise`.
      product: what multiplies inputs by weights, linear in both.

    Returns:
      The probabilities, of the shape of the product, in float32 or wider.

    Example:
      >>> z, kernel = jnp.array([[1.0, -1.0]]), jnp.array([[3.0], [4.0]])
      >>> P = activation_probability(z, kernel, jnp.ones(1), noise=BernoulliNoise(0.5))
      >>> print(P.round(4), round((1 + math.erf(-1 / 5)) / 2, 4))
      [[0.3886]] 0.3886

    References:
      As for :func:`sample_units`. The norm of weights and inputs together, where the authors' code takes that of the
      weights, is this library's, and the same for inputs of 1 and -1.
    """
    z, kernel, beta, bias = _wide(z, kernel, beta, bias)
    drive, squares = product(z, kernel), product(jnp.square(jax.lax.stop_gradient(z)), jnp.square(kernel))
    return _probability(drive, squares, beta, bias, noise)


def _probability(
    drive: jax.Array, squares: jax.Array, beta: jax.Array, bias: jax.Array | None, noise: Noise
) -> jax.Array:
    """Returns the probabilities of products of inputs and weights, and of the squares of both."""
    noisy = squares > 0
    norm = jnp.sqrt(jnp.where(noisy, squares, 1))
    numerator = _along(beta, drive) * drive
    threshold = jnp.zeros_like(drive)
    if bias is not None:
        threshold = threshold + _along(bias, drive)
        numerator = numerator + threshold / (math.sqrt(2) * noise.deviation)
    probability = jax.lax.erfc(-numerator / norm) / 2  # (1 + erf) / 2, to the last digits where that is near 0
    return jnp.where(noisy, probability, (threshold >= 0).astype(drive.dtype))


def sample_units(
    key: jax.Array,
    z: jax.Array,
    kernel: jax.Array,
    beta: jax.Array,
    bias: jax.Array | None = None,
    *,
    noise: Noise,
    product: Product = jnp.matmul,
) -> jax.Array:
    """Draws binary units that see their inputs through multiplicative noise.

    Each input is multiplied by a factor xi of its own, which all units see alike, and each unit adds a constant a of
    its own to these factors::

        u = sum (xi + a) w z + b        a = sqrt(2) deviation beta - mean        y = 1 if u >= 0 else -1

    with mean and deviation those of xi. So y is 1 with the probability P of :func:`activation_probability`, and the
    gradient is that of its expectation, ``2 P - 1``. Without a bias a unit is the same for all positive multiples of
    its weights, draw for draw. The units of one example are correlated, as they share the noise; each has probability P
    alone.

    As the deviation goes to 0 at constant a, where beta is ``(a + mean) / (sqrt(2) deviation)``, units become the sign
    of ``(mean + a) w . z + b``.

    Args:
      key: for the noise; another one for every layer and step.
      z: the inputs, 1 and -1; ``[..., inputs]`` for the default product.
      kernel: the weights, ``[inputs, outputs]`` for the default product; the last axis are the outputs.
      beta: ``[outputs]``, the gains.
      bias: ``[outputs]``, or ``None``.
      noise: :class:`BernoulliNoise` or :class:`GaussianNoise`.
      product: what multiplies inputs by weights, linear in both.

    Returns:
      The units, 1 and -1 (not a number where the sum is none), of the shape of the product, in float32 or wider.

    Example:
      >>> z, kernel = jnp.ones((1, 3)), jnp.array([[1.0], [2.0], [-1.0]])
      >>> keys = jax.random.split(jax.random.key(0), 2000)
      >>> draw = lambda key: sample_units(key, z, kernel, jnp.ones(1), noise=GaussianNoise(1.0))
      >>> P = activation_probability(z, kernel, jnp.ones(1), noise=GaussianNoise(1.0))
      >>> print(P.round(2), jnp.mean(jax.vmap(draw)(keys) == 1).round(2))
      [[0.88]] 0.88

    References:
      Detorakis, Dutta, Khanna, Jerry, Datta, Neftci, Inherent Weight Normalization in Stochastic Neural Networks,
      NeurIPS 2019, https://arxiv.org/abs/1910.12316. Noise, a and beta are those of the authors' code. Its layers draw
      their outputs from a relaxation that has other probabilities than P, divide the bias by another norm in dense
      layers, and draw normal noise of another deviation than a is made for; this follows the formulas.
    """
    z, kernel, beta, bias = _wide(z, kernel, beta, bias)
    drive, squares = product(z, kernel), product(jnp.square(jax.lax.stop_gradient(z)), jnp.square(kernel))
    a = math.sqrt(2) * noise.deviation * beta - noise.mean
    u = product(noise.draw(key, z.shape, z.dtype) * z, kernel) + _along(a, drive) * drive
    u = u if bias is None else u + _along(bias, drive)
    return _sign_of(u, 2 * _probability(drive, squares, beta, bias, noise) - 1)


@jax.custom_jvp
def _sign_of(u: jax.Array, expectation: jax.Array) -> jax.Array:
    """Returns the sign of the first argument with the derivative of the second, which is not computed without one."""
    one = jnp.ones_like(u)
    return jnp.where(jnp.isnan(u), u, jnp.where(u >= 0, one, -one))


@_sign_of.defjvp
def _sign_of_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _sign_of(*primals), tangents[1]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The product of a layer that convolves, ``[..., *window axes, channels]`` by ``[*window, channels, outputs]``.

    Args:
      window_axes: how many axes the window has.
      strides: a number, or one for every axis of the window, as both dilations.
      padding: "SAME", "VALID", a number of pixels, or numbers or pairs of them, one for every axis of the window.
      input_dilation: see ``nn.Conv``.
      kernel_dilation: see ``nn.Conv``.
      feature_group_count: see ``nn.Conv``.
      precision: see ``nn.Conv``.

    Raises:
      ValueError: for other kinds of padding; by a call, for inputs that have fewer axes.

    Example:
      >>> product = Convolution(1, padding="VALID")
      >>> print(product(jnp.ones((2, 5, 3)), jnp.ones((2, 3, 1))).shape)
      (2, 4, 1)
    """

    window_axes: int
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    precision: Any = None

    def __post_init__(self) -> None:
        self._pads()

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Convolves; several leading axes, or none, are a batch."""
        if x.ndim < self.window_axes + 1:
            raise ValueError(
                f"Inputs of shape {x.shape} have too few axes for a window of {self.window_axes}: [..., *window axes, "
                "channels] is wanted."
            )
        last = self.window_axes + 1
        images, axes = x.reshape(-1, *x.shape[-last:]), tuple(range(1, last))
        y = jax.lax.conv_general_dilated(
            images,
            kernel,
            self._each(self.strides),
            self._pads(),
            self._each(self.input_dilation),
            self._each(self.kernel_dilation),
            # where batch and features, or outputs and inputs, and the axes of the window are
            jax.lax.ConvDimensionNumbers((0, last, *axes), (last, last - 1, *range(last - 1)), (0, last, *axes)),
            self.feature_group_count,
            precision=self.precision,
        )
        return y.reshape(*x.shape[:-last], *y.shape[1:])

    def _each(self, number: int | Sequence[int] | None) -> tuple[int, ...]:
        number = 1 if number is None else number
        return (number,) * self.window_axes if isinstance(number, int) else tuple(number)

    def _pads(self) -> Any:
        if isinstance(self.padding, str):
            if self.padding in ("SAME", "VALID"):
                return self.padding
            raise ValueError(
                f'padding {self.padding!r} is not supported: use "SAME", "VALID" or numbers of pixels, or pad the '
                'input with jnp.pad and use "VALID".'
            )
        pads = (self.padding,) * self.window_axes if isinstance(self.padding, int) else self.padding
        return [(pixels, pixels) if isinstance(pixels, int) else tuple(pixels) for pixels in pads]


def channels_of_group(channels: int, features: int, groups: int) -> int:
    """Returns how many channels a unit sees.

    Args:
      channels: of the input.
      features: of the output.
      groups: into which both are divided.

    Raises:
      ValueError: if the groups do not divide both.
    """
    if groups < 1 or channels % groups or features % groups:
        raise ValueError(f"{channels} channels and {features} features do not divide into {groups} groups.")
    return channels // groups


def missing_noise(layer: str, collection: str, cure: str) -> ValueError:
    """Returns the error of a layer that has no random keys for its noise."""
    return ValueError(
        f"{layer} draws noise whenever it is called, in training and in use, but has no random keys {collection!r} "
        f"for it: {cure}."
    )


def _wide(*arrays: jax.Array | None) -> Any:
    """Returns the arrays in one dtype, float32 or float64."""
    dtypes = {statistics_dtype(array.dtype) for array in arrays if array is not None}
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    return [None if array is None else array.astype(dtype) for array in arrays]


def _along(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Returns numbers of the outputs, with the leading axes of the layer's output."""
    return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))
