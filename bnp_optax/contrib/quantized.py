"""Updates of few bits: parameters that live on a grid, and steps along it.

The grid of ``bits`` bits has ``2^bits`` points from ``-limit`` up, ``limit 2^(1 - bits)`` apart, zero among them: by
default the multiples of 2^-7 from -1 to 1 - 2^-7.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from bnp_optax.arguments import checked_inner, is_known, required_params

Rounding = Literal["stochastic", "nearest"]


def round_to_grid(x: ArrayLike, bits: int = 8, key: jax.Array | None = None, *, limit: float = 1.0) -> jax.Array:
    """Rounds numbers to a grid of ``2^bits`` points.

    With ``delta = limit 2^(1 - bits)`` the distance of the points::

        round(x) = clip(r(x / delta) delta, -limit, limit - delta)

    where r goes to the nearest whole number, of two to the even one; or, with a key, to the one above with a
    probability that is the distance to the one below, so that r changes nothing in the mean. Numbers on the grid stay
    as they are in both. What is not finite stays so, too.

    Args:
      x: floating-point numbers of any shape.
      bits: at least 2.
      key: of ``jax.random``, to round stochastically; ``None`` rounds to the nearest point.
      limit: a power of two: the grid goes from ``-limit`` to the last point below ``limit``.

    Returns:
      Points of the grid, in the shape and dtype of ``x``; r is computed in float32 or wider.

    Raises:
      ValueError: if ``bits`` or ``limit`` is out of range, or if the dtype of ``x`` cannot hold the grid and the
        differences of its points: bfloat16 holds 8 bits, float16 11, float32 24, float64 53.

    Example:
      >>> x = jnp.array([0.3, 0.5, -2.0, 2.0])
      >>> print(round_to_grid(x, bits=3))
      [ 0.25  0.5  -1.    0.75]
      >>> samples = round_to_grid(jnp.full(10_000, 0.3), bits=3, key=jax.random.key(0))
      >>> print(jnp.unique(samples), f"{samples.mean():.2f}")
      [0.25 0.5 ] 0.30

    References:
      WAGEUBN, https://github.com/yang-yk/wageubn, rounds so: weights and activations to the nearest point, gradients
      stochastically. It limits weights to 1 - delta on both sides; that they may come to -limit, as integers of so many
      bits do, is the choice of other code, and of this library.
    """
    check_grid(bits, limit)
    x = jnp.asarray(x)
    _check_dtype("x", x.dtype, bits, limit)
    dtype = np.result_type(np.float32, x.dtype)
    return _point(_round(_in_units(x, bits, limit, dtype), key), bits, limit).astype(x.dtype)


class QuantizeUpdatesState(NamedTuple):
    """State of :func:`quantize_updates`.

    Attributes:
      key: the data of the random key for the next step, an ordinary array, which every kind of checkpoint can hold.
      inner: the inner optimizer's state.
    """

    key: jax.Array
    inner: optax.OptState


def quantize_updates(
    inner: optax.GradientTransformation,
    bits: int = 8,
    rounding: Rounding = "stochastic",
    *,
    limit: float = 1.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Rounds the steps of an optimizer so that parameters stay on a grid of few bits, without a copy of more.

    With ``u`` the step of ``inner`` and ``round`` that of :func:`round_to_grid` without its clipping::

        w <- clip(w + round(u), -limit, limit - delta)

    exactly: ``params + updates`` lies on the grid, not only near it. Rounded to the nearest point, a step shorter than
    ``delta / 2`` is none, however often it is repeated; rounded stochastically, a weight moves by ``u`` in the mean.

    Parameters off the grid are put on its nearest point by their first update, which does nothing else; from beyond
    twice the limit, where a difference is rounded, it may take a second one. To begin there,
    ``jax.tree.map(round_to_grid, params)``. Weights beyond the grid end at its end. So leave scales that begin at 1 out
    by the ``mask``, and with them biases and whatever is small in number and large in effect.

    The updates are not to be changed any more: it is the last of a chain, around ``bnp.preconditioned`` and around
    :func:`~bnp_optax.contrib.trajectory_regularized`; only what passes updates on or withholds them goes around it,
    ``optax.MultiSteps`` or ``optax.apply_if_finite``. What keeps an average of parameters keeps points off the grid.

    A step that is not finite is not made finite.

    Args:
      inner: the optimizer, learning rate included.
      bits: of the grid, at least 2.
      rounding: "stochastic" or "nearest".
      limit: a power of two: the grid goes from ``-limit`` to ``limit - delta``.
      mask: which parameters are on the grid, as of ``optax.masked``: a tree of ``bool`` with the structure of the
        parameters or a prefix of it, or a function that makes one of them; ``None`` for all. The steps of others pass
        as they are.
      key: of ``jax.random``, or a seed for one. It is the same in every state that ``init`` makes: give members of an
        ensemble that is mapped by ``jax.vmap`` keys of their own, ``state._replace(key=jax.random.key_data(...))``.

    Returns:
      The optimizer, whose state is a :class:`QuantizeUpdatesState`. Its updates have the wider of the dtypes of the
      parameters and of the updates of ``inner``. ``update`` needs ``params``, and hands extra arguments on.

    Raises:
      TypeError: if ``inner`` is no transformation, or ``key`` neither a key nor a seed.
      ValueError: if ``bits``, ``limit`` or ``rounding`` is out of range; by ``init`` if the dtype of a parameter cannot
        hold the grid, as of :func:`round_to_grid`; by ``update`` without ``params``.

    Example:
      >>> params = {"w": jnp.array([0.25, -0.5]), "scale": jnp.array(1.0)}
      >>> tx = quantize_updates(optax.sgd(0.1), mask={"w": True, "scale": False}, key=jax.random.key(0))
      >>> state = tx.init(params)
      >>> gradients = {"w": jnp.array([0.5, 0.01]), "scale": jnp.array(0.5)}
      >>> updates, state = tx.update(gradients, state, params)
      >>> print(updates["w"] * 2**7, updates["scale"])  # in points of the grid, where 6.4 and 0.128 were to go
      [-6.  0.] -0.05

    References:
      Yang, Chi, Deng, Yan, Gao, Li, Towards Efficient Full 8-bit Integer DNN Online Training on Resource-limited
      Devices without Batch Normalization, https://arxiv.org/abs/2105.13890, has updates of 8 bits in networks that
      begin by Fixup. Its rule could not be had. This one is derived, and not the paper's; stochastic rounding is that
      of gradients in the code of the first author's earlier method, WAGEUBN.
    """
    inner = checked_inner(inner)
    check_grid(bits, limit)
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of {', '.join(map(repr, get_args(Rounding)))}, but is {rounding!r}.")
    if not _is_key(key) and jnp.ndim(key):
        raise TypeError("key must be a seed or a key of jax.random.key(seed), not one of jax.random.PRNGKey.")
    first_key = key if _is_key(key) else jax.random.key(key)
    quantizer = _quantizer(bits, limit, rounding)
    if mask is not None:
        quantizer = optax.masked(quantizer, mask)

    def init_fn(params: optax.Params) -> QuantizeUpdatesState:
        quantizer.init(params)
        # a copy, as the state may be donated to a step
        return QuantizeUpdatesState(jnp.copy(jax.random.key_data(first_key)), inner.init(params))

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, QuantizeUpdatesState]:
        params = required_params(params)
        steps, inner_state = inner.update(updates, state.inner, params, **extra_args)
        present = jax.random.wrap_key_data(state.key, impl=jax.random.key_impl(first_key))
        following, own = jax.random.split(present)
        quantized, _ = quantizer.update(steps, quantizer.init(params), params, key=own)
        return quantized, QuantizeUpdatesState(jax.random.key_data(following), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _quantizer(bits: int, limit: float, rounding: Rounding) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation of steps into steps along the grid; its state is empty, its key an argument."""

    def quantize(step: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
        dtype = np.result_type(np.float32, step.dtype, param.dtype)
        nearest = round_to_grid(param, bits, limit=limit)
        length = _round(_in_units(step, bits, limit, dtype), key if rounding == "stochastic" else None)
        moved = _point(_in_units(nearest, bits, limit, dtype) + length, bits, limit)
        # From a point off the grid to a distant one the difference is rounded, and its sum may miss that point.
        # To the nearest one it is exact.
        is_moved = (nearest == param) | ~jnp.isfinite(step)
        new = jnp.where(is_moved, moved, nearest.astype(dtype))
        return (new - param.astype(dtype)).astype(np.result_type(step.dtype, param.dtype))

    def init_fn(params: optax.Params) -> optax.EmptyState:
        for path, param in jax.tree_util.tree_leaves_with_path(params):
            _check_dtype(f"The parameter {jax.tree_util.keystr(path)}", param.dtype, bits, limit)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        key: Any,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        return jax.tree.map(quantize, updates, params, optax.tree.split_key_like(key, updates)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_grid(bits: Any, limit: Any) -> None:
    """Refuses a grid that there is not.

    Raises:
      ValueError: if ``bits`` is no whole number of at least 2, or ``limit`` no power of two.
    """
    if not isinstance(bits, (int, np.integer)) or bits < 2:
        raise ValueError(
            f"bits must be a whole number, at least 2, but is {bits!r}. Under optax.inject_hyperparams name it in "
            "static_args."
        )
    if not is_known(limit) or not 0 < limit < float("inf") or math.frexp(limit)[0] != 0.5:
        raise ValueError(f"limit must be a power of two, which keeps the grid exact, but is {limit!r}.")


def _check_dtype(name: str, dtype: Any, bits: int, limit: float) -> None:
    """Refuses a dtype that cannot hold the grid and all differences of its points."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} is of {dtype}, but only floating-point numbers are on the grid.")
    information = jnp.finfo(dtype)
    if bits > information.nmant + 1:
        raise ValueError(
            f"{name} is of {dtype}, which holds grids of up to {information.nmant + 1} bits, but bits is {bits}."
        )
    if not float(information.tiny) <= _unit(bits, limit) < 2 * limit <= float(information.max):
        raise ValueError(f"{name} is of {dtype}, which does not hold a grid of {bits} bits up to {limit}.")


def _unit(bits: int, limit: float) -> float:
    """Returns the distance of the points."""
    return float(limit) * 2.0 ** (1 - bits)


def _in_units(x: jax.Array, bits: int, limit: float, dtype: Any) -> jax.Array:
    """Returns numbers in multiples of the distance of the points, exactly; no longer ones than the whole grid."""
    return _clip(x.astype(dtype), -2 * limit, 2 * limit) / _unit(bits, limit)


def _round(units: jax.Array, key: jax.Array | None) -> jax.Array:
    """Rounds to whole numbers."""
    if key is None:
        return jnp.round(units)
    below = jnp.floor(units)
    goes_up = jax.random.uniform(key, units.shape, units.dtype) < units - below
    return below + goes_up.astype(units.dtype)


def _point(number: jax.Array, bits: int, limit: float) -> jax.Array:
    """Returns the points of a grid that have these whole numbers, or its ends."""
    end = 2.0 ** (bits - 1)
    return _clip(number, -end, end - 1) * _unit(bits, limit)


def _clip(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clips what is finite; an infinite number stays, to be seen."""
    return jnp.where(jnp.isinf(x), x, jnp.clip(x, low, high))


def _is_key(key: Any) -> bool:
    """Whether it is a key of the new kind, and no seed."""
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
