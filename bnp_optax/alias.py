"""Ready-made optimizers with Batch Normalization Preconditioning."""

import jax
import optax

from bnp_optax.layers import Layers
from bnp_optax.moments import VarianceRule
from bnp_optax.precondition import Scaling
from bnp_optax.transform import NUMBERS, scale_by_bnp


def bnp_sgd(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    momentum: float | jax.Array | None = None,
    nesterov: bool = False,
    weight_decay: float | jax.Array = 0.0,
    *,
    decay: float | jax.Array = 0.99,
    eps_relative: float | jax.Array = 1e-2,
    eps: float | jax.Array = 1e-4,
    variance: VarianceRule = "mixture",
    scaling: Scaling | float | jax.Array = 128,
    prior_examples: float | jax.Array | None = 128,
) -> optax.GradientTransformationExtraArgs:
    """SGD on preconditioned gradients, with decoupled weight decay and momentum.

    Per step, with ``g`` the preconditioned gradient::

        g <- g + weight_decay * params
        trace <- g + momentum * trace
        updates = -learning_rate * trace

    Args:
      learning_rate: a number or a schedule.
      layers: the layers to precondition.
      momentum: decay of the momentum's trace; ``None`` for none.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: strength of the decay, not preconditioned; ``update`` needs ``params`` unless 0.
      decay: see :func:`scale_by_bnp`, as for all that follow.
      eps_relative: relative damping.
      eps: absolute damping.
      variance: rule of the running variance.
      scaling: rule of q2, or a number of examples.
      prior_examples: weight of the start of the running statistics.

    Returns:
      The optimizer; its ``update`` requires ``intermediates=``.

    Raises:
      ValueError: for an option out of range, and as :func:`scale_by_bnp`.

    Example:
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1)),))
      >>> tx = bnp.bnp_sgd(optax.cosine_decay_schedule(0.1, 1000), layers, momentum=0.9)

    References:
      Lange, Helfrich, Ye, Batch Normalization Preconditioning for Neural Network Training,
      JMLR 23(72), 2022, https://arxiv.org/abs/2108.01110
    """
    known_weight_decay = isinstance(weight_decay, NUMBERS)
    if known_weight_decay and not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, but is {weight_decay}.")
    return optax.chain(
        scale_by_bnp(
            layers,
            decay,
            eps_relative,
            eps,
            variance=variance,
            scaling=scaling,
            prior_examples=prior_examples,
        ),
        optax.identity() if known_weight_decay and weight_decay == 0 else optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum, nesterov),
    )
