"""The last two layers of a network, gated, for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from bnp_optax.contrib.alignment import SLOPE, gated_head, with_ones
from bnp_optax.contrib.alignment import hidden_init as default_hidden_init
from bnp_optax.contrib.alignment import output_init as default_output_init


class Gate(nnx.Variable[jax.Array]):
    """The weights of a gate, and whether they are frozen: what no optimizer of ``nnx.Param`` sees."""


class GatedHead(nnx.Module):
    """The last two layers of a network, linear in the first of them once its gate is frozen.

    See :func:`bnp_optax.contrib.gated_head` for the mathematics. The parameters are ``hidden``, ``[in_features,
    features, width]``, and ``output``, ``[features, width]``. While all parameters are trained, the gate is ``hidden``
    itself; :meth:`freeze_gate` copies it to ``gate``, a :class:`Gate`, and uses that from there on. Whether it is
    frozen is one too, ``is_frozen``, so that a checkpoint of the model's state keeps it.

    Args:
      in_features: inputs.
      features: outputs.
      width: hidden units of every output.
      slope: of the gate's smooth step.
      use_bias: whether the inputs get a constant 1, whose weights are the last row of ``hidden``. The outputs have no
        bias of their own.
      dtype: of the result; by default the common one of input and parameters.
      param_dtype: of the parameters.
      hidden_init: initializer of ``hidden``.
      output_init: initializer of ``output``.
      rngs: random keys.

    Example:
      >>> head = GatedHead(5, 2, 4, rngs=nnx.Rngs(0))
      >>> z = jnp.ones((3, 5))
      >>> y = head(z)
      >>> head.freeze_gate()
      >>> bool(jnp.array_equal(head(z), y))
      True

    References:
      As for :func:`bnp_optax.contrib.gated_head`; that each output has hidden units of its own is recalled, the
      initializers are this library's.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        width: int,
        *,
        slope: float = SLOPE,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: DTypeLike = jnp.float32,
        hidden_init: nnx.Initializer = default_hidden_init,
        output_init: nnx.Initializer = default_output_init,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_features + use_bias, features, width)
        self.hidden = nnx.Param(hidden_init(rngs.params(), shape, param_dtype))
        self.output = nnx.Param(output_init(rngs.params(), shape[1:], param_dtype))
        self.gate = Gate(jnp.copy(self.hidden[...]))
        self.is_frozen = Gate(jnp.array(False))
        self.slope, self.use_bias, self.dtype = slope, use_bias, dtype

    def freeze_gate(self) -> None:
        """Makes the gate a constant: what ``hidden`` is now."""
        # a copy, as the parameters' own buffer may be donated to the next step
        self.gate[...] = jnp.copy(self.hidden[...])
        self.is_frozen[...] = jnp.array(True)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Applies the layers to ``[..., in_features]``."""
        features = with_ones(z) if self.use_bias else z
        hidden = self.hidden[...]
        gate = jnp.where(self.is_frozen[...], self.gate[...].astype(hidden.dtype), hidden)
        return gated_head(features, hidden, self.output[...], gate, slope=self.slope, dtype=self.dtype)
