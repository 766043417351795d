"""Weight Normalization as a change of variables of the optimizer: the network stays as it is.

A kernel is ``w = g v / |v|`` for every output unit. The optimizer sees the directions v and the gains g and not w; what
it answers comes back as a step of w. Only the length of v is not to be had from w, and is the state.

References:
  Salimans, Kingma, Weight Normalization, NeurIPS 2016, equation 2.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class WeightNormState(NamedTuple):
    """State of :func:`weight_normalized`.

    Attributes:
      lengths: of v, ``[outputs]``, by layer.
      inner: the state of the inner optimizer.
    """

    lengths: dict[str, jax.Array]
    inner: optax.OptState


def weight_normalized(
    inner: optax.GradientTransformation, leave: Collection[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """Runs any optimizer in the variables of Weight Normalization; at the start v is the kernel.

    Args:
      inner: the optimizer. Its parameters have a ``"gain"``, ``[outputs]``, beside every ``"kernel"``, which is v.
      leave: the names of layers that stay as they are.

    Returns:
      The transformation, for parameters ``{layer: {"kernel": [..., outputs], ...}}``; ``update`` needs them.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> WeightNormState:
        lengths = {name: norm(layer["kernel"]) for name, layer in params.items() if name not in leave}
        return WeightNormState(lengths, inner.init(to_variables(params, lengths)))

    def update(gradients: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, WeightNormState]:
        variables = to_variables(params, state.lengths)
        (gradients,) = jax.vjp(to_weights, variables)[1](gradients)
        steps, inner_state = inner.update(gradients, state.inner, variables, **extra_args)
        variables = optax.apply_updates(variables, steps)
        lengths = {name: norm(variables[name]["kernel"]) for name in state.lengths}
        return optax.tree.sub(to_weights(variables), params), WeightNormState(lengths, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def to_variables(params: Any, lengths: dict[str, jax.Array]) -> Any:
    """Returns directions of the given lengths, and gains, of the layers that have a length."""

    def split(layer: Any, length: jax.Array) -> Any:
        gain = norm(layer["kernel"])
        return {**layer, "kernel": layer["kernel"] * (length / gain), "gain": gain}

    return {name: split(layer, lengths[name]) if name in lengths else layer for name, layer in params.items()}


def to_weights(variables: Any) -> Any:
    """Returns the parameters that directions and gains stand for: ``w = g v / |v|``."""

    def join(kernel: jax.Array, gain: jax.Array, **others: jax.Array) -> Any:
        return {"kernel": kernel * (gain / norm(kernel)), **others}

    return {name: join(**layer) if "gain" in layer else layer for name, layer in variables.items()}


def norm(kernel: jax.Array) -> jax.Array:
    """Returns the length of the kernel of every output unit."""
    return jnp.sqrt(jnp.square(kernel).sum(range(kernel.ndim - 1)))
