"""Flax's training state, for optimizers that take records."""

import functools
from collections.abc import Mapping
from typing import Any, Self

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's `TrainState` whose ``apply_gradients`` hands the records to the optimizer.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> import bnp_optax as bnp
      >>> model, x = nn.Dense(3), jax.numpy.ones((2, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = bnp.bnp_sgd(0.1, bnp.linen.find_layers(model, x))
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> def loss_fn(params):
      ...     y, records = bnp.linen.capture(state.apply_fn)({"params": params}, x)
      ...     return (y**2).mean(), records
      >>> grads, records = jax.grad(loss_fn, has_aux=True)(state.params)
      >>> state = state.apply_gradients(grads=grads, intermediates=records)
    """

    def apply_gradients(  # type: ignore[override]
        self, *, grads: Any, intermediates: Any, extra_args: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Self:
        """Returns the state after one update.

        Args:
          grads: the gradients, structured like ``params``.
          intermediates: the records of this batch, or ``KEEP_STATISTICS``.
          extra_args: what else the ``update`` of the optimizer takes, as ``{"value": loss}``.
          **kwargs: attributes of the state to replace, as in Flax.

        Returns:
          The state with ``step``, ``params`` and ``opt_state`` updated.
        """
        update = functools.partial(self.tx.update, intermediates=intermediates, **(extra_args or {}))
        state = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        new_state: Self = super(TrainState, state).apply_gradients(grads=grads, **kwargs)
        return new_state.replace(tx=self.tx)
