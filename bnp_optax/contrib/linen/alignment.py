"""The last two layers of a network, gated, for Flax Linen."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bnp_optax.contrib.alignment import SLOPE, gated_head, with_ones
from bnp_optax.contrib.alignment import hidden_init as default_hidden_init
from bnp_optax.contrib.alignment import output_init as default_output_init


class GatedHead(nn.Module):
    """The last two layers of a network, linear in the first of them once its gate is frozen.

    See :func:`bnp_optax.contrib.gated_head` for the mathematics. The parameters are ``hidden``, ``[inputs, features,
    width]``, and ``output``, ``[features, width]``. While all parameters are trained, the gate is ``hidden`` itself,
    and there is nothing but parameters. To freeze it, let the collection ``"gate"`` be mutable in one call, which
    returns a copy of ``hidden``; hand that in again, with ``frozen=True``.

    Attributes:
      features: outputs.
      width: hidden units of every output.
      slope: of the gate's smooth step.
      use_bias: whether the inputs get a constant 1, whose weights are the last row of ``hidden``. The outputs have no
        bias of their own.
      dtype: of the result; by default the common one of input and parameters.
      param_dtype: of the parameters.
      hidden_init: initializer of ``hidden``.
      output_init: initializer of ``output``.

    Raises:
      ValueError: for ``frozen=True`` without a gate.

    Example:
      >>> head = GatedHead(features=2, width=4)
      >>> z = jnp.ones((3, 5))
      >>> variables = head.init(jax.random.key(0), z)
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'hidden': (6, 2, 4), 'output': (2, 4)}}
      >>> y, gate = head.apply(variables, z, mutable=["gate"])
      >>> bool(jnp.array_equal(head.apply(variables | gate, z, frozen=True), y))
      True

    References:
      As for :func:`bnp_optax.contrib.gated_head`; that each output has hidden units of its own is recalled, the
      initializers are this library's.
    """

    features: int
    width: int
    slope: float = SLOPE
    use_bias: bool = True
    dtype: Any = None
    param_dtype: DTypeLike = jnp.float32
    hidden_init: nn.initializers.Initializer = default_hidden_init
    output_init: nn.initializers.Initializer = default_output_init

    @nn.compact
    def __call__(self, z: jax.Array, frozen: bool = False) -> jax.Array:
        """Applies the layers to ``[..., inputs]``.

        Args:
          z: the features.
          frozen: whether the gate is that of the collection ``"gate"``; else it is ``hidden``.

        Returns:
          The outputs, ``[..., features]``.
        """
        shape = (z.shape[-1] + self.use_bias, self.features, self.width)
        hidden = self.param("hidden", self.hidden_init, shape, self.param_dtype)
        output = self.param("output", self.output_init, shape[1:], self.param_dtype)
        gate = None
        if not self.is_initializing():
            if frozen:
                gate = self._frozen_gate()
            elif self.is_mutable_collection("gate"):
                # a copy, as the parameters' own buffer may be donated to the next step
                self.put_variable("gate", "hidden", jnp.copy(hidden))
        features = with_ones(z) if self.use_bias else z
        return gated_head(features, hidden, output, gate, slope=self.slope, dtype=self.dtype)

    def _frozen_gate(self) -> Any:
        if not self.has_variable("gate", "hidden"):
            raise ValueError(
                f"The gate of {'/'.join(self.path) or 'this GatedHead'} is not frozen yet: there is no variable "
                '"hidden" of it in the collection "gate". Call once with mutable=["gate"] and without frozen=True, and '
                'hand what it returns on: model.apply({"params": params} | gate, ...). Under nn.vmap and nn.scan name '
                "the collection among the axes of variables."
            )
        return self.get_variable("gate", "hidden")
