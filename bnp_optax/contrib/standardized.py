"""Scaled weight standardization: kernels whose output units have mean 0 and a norm of their own, and exact gains.

A network of such kernels, whose nonlinearities are multiplied by :func:`nonlinearity_gain`, keeps the variance of what
it passes on without any normalization of activations. The layers are :mod:`bnp_optax.contrib.linen` and
:mod:`bnp_optax.contrib.nnx`'s ``WSConv`` and ``WSDense`` or ``WSLinear``.
"""

import collections
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from bnp_optax.layers import Layer, Layers, Parameter, Path, layer_name
from bnp_optax.moments import statistics_dtype
from bnp_optax.trees import as_path

kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
"""The initializer of a kernel before it is standardized."""

_END, _PANELS, _NODES = 16, 2**14, 8  # of the quadrature: panels of width 2^-9, so that 0, 1/2, 3 lie between two


def standardize(kernel: jax.Array, gain: ArrayLike = 1.0, eps: float = 1e-4) -> jax.Array:
    """Gives every output unit's weights the mean 0 and the norm ``gain``.

    Over the N weights ``w`` that lead to one output, with their mean and biased variance::

        W = gain (w - mean) / sqrt(max(N var, eps))

    So ``W`` does not change where ``w`` is scaled by a positive number or a constant is added, and the gradient with
    respect to ``w`` is orthogonal to ``w`` and to the constants. Below ``N var = eps``, which is a hundredth of the
    norm that the initializer gives, the norm is not standardized any more: ``w - mean`` is divided by ``sqrt(eps)``.
    Constant weights become 0, up to rounding.

    Args:
      kernel: ``[..., inputs, outputs]``, as Flax has the kernels of dense layers and convolutions: the last axis are
        the outputs, of all groups if there are several, and N is the product of all others.
      gain: ``[outputs]`` or a number.
      eps: the bound.

    Returns:
      The standardized kernel, of the kernel's shape and dtype; it is computed in float32 or wider.

    Raises:
      ValueError: if a unit has fewer than two weights, as one weight is its own mean; if ``eps`` is not positive; if
        the gain has another shape.

    Example:
      >>> print(standardize(jnp.array([[1.0, 5.0], [3.0, 5.0]])).round(3))
      [[-0.707  0.   ]
       [ 0.707  0.   ]]

    References:
      Brock, De, Smith, Characterizing signal propagation to close the performance gap in unnormalized ResNets,
      ICLR 2021, https://arxiv.org/abs/2101.08692, with the bound of the authors' code; that units of one weight are
      refused is a choice of this library.
    """
    if kernel.ndim < 2 or math.prod(kernel.shape[:-1]) < 2:
        raise ValueError(
            f"A kernel of shape {kernel.shape} has fewer than two weights an output: standardized, they would all be "
            "0. Use a layer without standardization there."
        )
    if not eps > 0:
        raise ValueError(f"eps must be positive, but is {eps}.")
    if jnp.shape(gain) not in ((), kernel.shape[-1:]):
        raise ValueError(f"gain has shape {jnp.shape(gain)}, but the kernel has {kernel.shape[-1]} outputs.")
    dtype = statistics_dtype(kernel.dtype)
    axes = tuple(range(kernel.ndim - 1))
    weights = kernel.astype(dtype)
    centred = weights - weights.mean(axes, keepdims=True)
    scale = jnp.asarray(gain, dtype) * jax.lax.rsqrt(jnp.maximum(jnp.square(centred).sum(axes), eps))
    standardized: jax.Array = (centred * jnp.expand_dims(scale, axes)).astype(kernel.dtype)
    return standardized


def nonlinearity_gain(activation: Callable[[jax.Array], jax.Array]) -> float:
    """Returns what a nonlinearity is multiplied by to have variance 1 where its input is standard normal.

    It is ``1 / std(activation(x))`` over ``x ~ N(0, 1)``, by quadrature in float64: Gauss-Legendre in 16,384 panels of
    equal width between -16 and 16. That is exact up to rounding for what is smooth in every panel, as with kinks and
    jumps at multiples of 1/512, right to seven digits with kinks elsewhere, and to three with jumps elsewhere.

    Args:
      activation: any function that acts on each element alone, of JAX or NumPy.

    Returns:
      The gain.

    Raises:
      ValueError: if the function changes the shape, has values that are not finite, is constant, or grows so fast that
        its variance has no value.

    Example:
      >>> round(nonlinearity_gain(jax.nn.relu), 6)  # sqrt(2 / (1 - 1 / pi))
      1.712859
      >>> gain = nonlinearity_gain(jax.nn.silu)
      >>> scaled_silu = lambda x: gain * jax.nn.silu(x)

    References:
      Brock, De, Smith, ICLR 2021, as for :func:`standardize`. The gains in the authors' code are estimates from
      samples, which these agree with to 0.1 %.
    """
    edges = np.linspace(-_END, _END, _PANELS + 1)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    half = _END / _PANELS
    x = ((edges[:-1] + half)[:, None] + half * nodes).ravel()
    density = np.exp(-np.square(x) / 2) * np.tile(half * weights, _PANELS) / math.sqrt(2 * math.pi)
    # float64 whatever the caller's setting is, and numbers where the caller is being traced
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        values = np.asarray(activation(jnp.asarray(x)), np.float64)
    if values.shape != x.shape:
        raise ValueError(f"The activation makes shape {values.shape} of {x.shape}; it must act on each element alone.")
    if not np.isfinite(values).all():
        raise ValueError(f"The activation is not finite at {x[~np.isfinite(values)][0]:.3g}, so that it has no gain.")
    deviations = values - values @ density
    parts = np.square(deviations) * density
    if not parts.sum() > 1e-20 * (np.square(values) @ density):
        raise ValueError("The activation is constant where inputs are standard normal, so that it has no gain.")
    if parts[np.abs(x) > 0.9 * _END].sum() > 1e-9 * parts.sum():
        raise ValueError("The activation grows so fast that its variance over normal inputs is not finite.")
    return 1 / math.sqrt(parts.sum())


def standardized_layers(params: Any) -> Layers:
    """Returns the layers with a standardized kernel in a tree of parameters, for methods that treat units as a whole.

    ``find_layers`` excludes them, as the kernel that enters the product is not the parameter itself: BNP's step is
    not theirs. :func:`~bnp_optax.contrib.adaptive_grad_clip` is. Found is what holds a ``kernel`` beside a ``gain``; if
    the gain has further axes in front, so has the kernel, which then is a stack of kernels, as ``nn.scan`` makes them.
    The gains themselves belong to no layer.

    Args:
      params: the parameters of a model of Linen, or ``nnx.state(model, nnx.Param)``.

    Returns:
      The layers.

    Raises:
      ValueError: if there is none, or if a kernel is stacked along another axis than its first.

    Example:
      >>> params = {"WSDense_0": {"kernel": jnp.ones((4, 3)), "gain": jnp.ones(3), "bias": jnp.zeros(3)},
      ...           "Dense_0": {"kernel": jnp.ones((3, 2))}}
      >>> print(standardized_layers(params))
      layer      kind          kernel  fan-in  covers        parameters
      WSDense_0  standardized     4x3       4  kernel, bias          15
      <BLANKLINE>
      1 layer covers 15 of 15 parameters (100.0%).
    """
    owners: dict[Path, dict[str, tuple[int, ...]]] = collections.defaultdict(dict)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_box):
        *owner, name = as_path(keys)
        owners[tuple(owner)][name] = jnp.shape(jax.tree.leaves(leaf)[0])
    layers = tuple(_layer(path, shapes) for path, shapes in owners.items() if {"kernel", "gain"} <= shapes.keys())
    if not layers:
        raise ValueError("No kernel has a gain beside it: the parameters hold no standardized kernel.")
    return Layers(layers)


def _is_box(node: Any) -> bool:
    return isinstance(node, nnx.Variable | nn.meta.AxisMetadata)


def _layer(path: Path, shapes: dict[str, tuple[int, ...]]) -> Layer:
    kernel, gain, bias = shapes["kernel"], shapes["gain"], shapes.get("bias")
    stack = "s" * (len(gain) - 1)
    if kernel[: len(stack)] != gain[:-1] or bias not in (None, gain):
        raise ValueError(
            f"{'/'.join(path)} has shapes {shapes}: its kernel is not stacked along the axes that its gain has in "
            "front. Describe it by hand, with bnp_optax.Layer and bnp_optax.Parameter."
        )
    window = len(kernel) - len(stack) - 2
    return Layer(
        "standardized",
        Parameter((*path, "kernel"), kernel, kernel, f"{stack}{'w' * window}io"),
        None if bias is None else Parameter((*path, "bias"), bias, bias, f"{stack}o"),
        record=layer_name((*path, "kernel")),
    )
