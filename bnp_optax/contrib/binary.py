"""Networks of binary weights and activations without Batch Normalization: "BNN - BN = ?".

Activations are the signs of their inputs, kernels the signs of standardized weights times one number a unit, and the
residual blocks keep the variance of what they pass on by constants. The layers are :mod:`bnp_optax.contrib.linen` and
:mod:`bnp_optax.contrib.nnx`'s ``BinaryWSConv``, ``BinaryWSDense`` or ``BinaryWSLinear``, ``RSign``, ``RPReLU`` and
``BinaryBlock``.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bnp_optax.contrib.standardized import standardize
from bnp_optax.moments import statistics_dtype

ALPHA = 0.2
"""How much a block's branch counts, as the method's authors have it."""


def binary_sign(x: jax.Array) -> jax.Array:
    """Returns 1 where ``x >= 0`` and -1 elsewhere, with the gradient of a piecewise quadratic function.

    The gradient is ``max(2 - 2 |x|, 0)``, that of ::

        F(x) = -1    (x < -1)        x^2 + 2 x    (-1 <= x < 0)        -x^2 + 2 x    (0 <= x < 1)        1    (x >= 1)

    which goes from -1 to 1 as the sign does. Zeros of either sign become 1, so that the result has two values. What is
    not a number stays so.

    Args:
      x: floating-point numbers of any shape.

    Returns:
      The signs, of the shape and dtype of ``x``.

    Raises:
      TypeError: if ``x`` is not of floating point.

    Example:
      >>> print(binary_sign(jnp.array([-3.0, -0.25, 0.0, 0.5])))
      [-1. -1.  1.  1.]
      >>> print(jax.vmap(jax.grad(binary_sign))(jnp.array([-3.0, -0.25, 0.0, 0.5])))
      [0.  1.5 2.  1. ]

    References:
      Chen, Zhang, Ouyang, Liu, Shen, Wang, "BNN - BN = ?": Training Binary Neural Networks without Batch
      Normalization, CVPR Workshops 2021, https://arxiv.org/abs/2104.08215; the gradient is that of the authors' code.
      There the sign of 0 is 0, a third value; that it is 1 is a choice of this library.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"binary_sign takes floating-point numbers, which have a gradient, but x is {x.dtype}.")
    return _sign(x)


@jax.custom_jvp
def _sign(x: jax.Array) -> jax.Array:
    one = jnp.ones_like(x)
    return jnp.where(jnp.isnan(x), x, jnp.where(x >= 0, one, -one))


@_sign.defjvp
def _sign_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return _sign(x), jnp.maximum(2 - 2 * jnp.abs(x), 0) * tangent


def binarize_standardized(kernel: jax.Array, gain: ArrayLike = 1.0, eps: float = 1e-4) -> jax.Array:
    """Makes every output unit's weights two numbers, ``gain s`` and ``-gain s``, with a straight-through gradient.

    With ``W = standardize(kernel, 1, eps)``, the weights of a unit at mean 0 and norm 1::

        s = mean |W|        binary kernel = gain s sign(W)        (0 counts as positive)

    The gradient with respect to the kernel is that of ``gain W``: s counts as a constant, and the sign as ``W``. So it
    is orthogonal to the kernel and to the constants. The gradient with respect to the gain is the exact one.

    Scaling a kernel by a positive number, or adding a constant to it, changes nothing; the negative kernel has the
    negative signs. Without the mean's subtraction a kernel of positive weights would be constant. Inputs of 1 and -1
    that are independent have an output of variance ``gain^2 N s^2`` over the N weights of a unit: about ``2 / pi`` with
    normal weights at a gain of 1, where the standardized kernel itself has 1; a gain of ``sqrt(pi / 2)`` would restore
    it.

    Args:
      kernel: ``[..., inputs, outputs]``, as Flax has the kernels of dense layers and convolutions.
      gain: ``[outputs]`` or a number.
      eps: the bound of :func:`~bnp_optax.contrib.standardize`. A kernel of smaller weights has the same signs, but
        smaller s, so that kernels are to begin at the scale of that function's initializer.

    Returns:
      The binary kernel, of the kernel's shape and dtype; it is computed in float32 or wider.

    Raises:
      ValueError: as :func:`~bnp_optax.contrib.standardize` does.

    Example:
      >>> print(binarize_standardized(jnp.array([[1.0, 5.0], [2.0, -5.0], [6.0, 9.0]])).round(3))
      [[-0.535  0.523]
       [-0.535 -0.523]
       [ 0.535  0.523]]

    References:
      Chen et al., CVPR Workshops 2021, as for :func:`binary_sign`, as in the authors' code. There s counts as a
      constant, too; the gradient is that of W clipped at 1 and -1, which a norm of 1 never reaches; and eps is added
      to the deviation, which the authors' first weights, below 0.001, are small against. Here the bound of
      :func:`~bnp_optax.contrib.standardize` stands in its place.
    """
    dtype = statistics_dtype(kernel.dtype)
    weights = standardize(kernel.astype(dtype), 1.0, eps)
    if jnp.shape(gain) not in ((), kernel.shape[-1:]):
        raise ValueError(f"gain has shape {jnp.shape(gain)}, but the kernel has {kernel.shape[-1]} outputs.")
    axes = tuple(range(kernel.ndim - 1))
    signs = jnp.where(weights >= 0, 1, -1).astype(dtype)
    binary = jax.lax.stop_gradient(jnp.abs(weights).mean(axes, keepdims=True) * signs)
    # what is added is 0, so that units keep exactly two values
    through = binary + (weights - jax.lax.stop_gradient(weights))
    gains = jnp.broadcast_to(jnp.asarray(gain, dtype), kernel.shape[-1:])
    scaled: jax.Array = (jnp.expand_dims(gains, axes) * through).astype(kernel.dtype)
    return scaled


def rprelu(x: jax.Array, shift: ArrayLike, slope: ArrayLike, offset: ArrayLike) -> jax.Array:
    """Returns ``prelu(x + shift) + offset``, where ``prelu`` multiplies what is negative by the slope.

    Args:
      x: ``[..., channels]``.
      shift: ``[channels]``, or a number, as the other two.
      slope: of what is negative after the shift.
      offset: added at the end.

    Returns:
      The activations, of the shape and dtype of ``x``.

    Example:
      >>> print(rprelu(jnp.array([-3.0, 0.0, 3.0]), shift=1.0, slope=0.25, offset=10.0))
      [ 9.5 11.  14. ]

    References:
      Liu, Shen, Savvides, Cheng, ReActNet: Towards Precise Binary Neural Network with Generalized Activation
      Functions, ECCV 2020, https://arxiv.org/abs/2003.03488, as the authors' code writes it: two biases are added.
    """
    along = [jnp.asarray(number, x.dtype) for number in (shift, slope, offset)]
    shift, slope, offset = (n if n.ndim == 0 else jnp.expand_dims(n, range(x.ndim - 1)) for n in along)
    shifted = x + shift
    return jnp.where(shifted >= 0, shifted, slope * shifted) + offset


def block_betas(stages: Sequence[int], alpha: float = ALPHA) -> tuple[float, ...]:
    """Returns what the input of each residual block is multiplied by, so that its expected variance is 1.

    The rule is that of normalizer-free networks: a block adds ``alpha^2`` to the variance of what passes by it, so that
    along a stage ::

        beta = 1, 1 / sqrt(1 + alpha^2), 1 / sqrt(1 + 2 alpha^2), ...

    The first block of a further stage goes on with this. Its shortcut has a convolution of an input of variance 1,
    behind which the count begins again. What the nonlinearity does to the variance is not in the count.

    Args:
      stages: how many blocks each stage has.
      alpha: how much the branch of a block counts.

    Returns:
      The betas of all blocks.

    Raises:
      ValueError: if a stage has no block, or alpha is not finite.

    Example:
      >>> [round(beta, 4) for beta in block_betas([4, 2])]
      [1.0, 0.9806, 0.9623, 0.9449, 0.9285, 0.9806]

    References:
      Brock, De, Smith, Characterizing signal propagation to close the performance gap in unnormalized ResNets,
      ICLR 2021, https://arxiv.org/abs/2101.08692. The code of Chen et al. is a block late within every stage: 1, 1,
      0.9806, 0.9623, 0.9449, 1. Behind a sign the scale is gone, so that beta only moves the threshold, the window of
      the gradient, and shortcuts that have a convolution.
    """
    if not all(count >= 1 for count in stages):
        raise ValueError(f"Every stage needs a block, but stages is {list(stages)}.")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, but is {alpha}.")
    betas, variance = [], 1.0
    for count in stages:
        for block in range(count):
            betas.append(1 / math.sqrt(variance))
            variance = (1.0 if block == 0 else variance) + alpha**2
    return tuple(betas)


def pool_shortcut(x: jax.Array, strides: int) -> jax.Array:
    """Returns the input of a shortcut's convolution: means over windows of 2x2 pixels, every ``strides``-th one.

    Args:
      x: ``[examples, height, width, channels]``.
      strides: along both axes; with 1 the input comes back as it is.

    Returns:
      ``[examples, ceil(height / strides), ceil(width / strides), channels]``. At odd sizes the last windows are of the
      pixels that there are, where the authors' code has no block.

    Example:
      >>> print(pool_shortcut(jnp.arange(9.0).reshape(1, 3, 3, 1), 2)[0, ..., 0])
      [[2.  3.5]
       [6.5 8. ]]
    """
    if strides == 1:
        return x
    # a last window that reaches over the edge sees the edge twice, whose mean is that of the pixels that there are
    rows, columns = sizes = [-(-size // strides) for size in x.shape[1:3]]
    pads = [(0, max((n - 1) * strides + 2 - size, 0)) for n, size in zip(sizes, x.shape[1:3], strict=True)]
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="edge")
    corners = [padded[:, i::strides, j::strides][:, :rows, :columns] for i in (0, 1) for j in (0, 1)]
    return (corners[0] + corners[1] + corners[2] + corners[3]) / 4
