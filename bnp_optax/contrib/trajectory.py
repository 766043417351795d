"""Trajectory-regularized training: short inner loops, each held near the parameters at its start."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnp_optax.arguments import checked_inner, is_known, required_params


class TrajectoryRegularizedState(NamedTuple):
    """State of :func:`trajectory_regularized`.

    Attributes:
      count: how many steps there were.
      anchor: the parameters at the start of the period, in their dtypes.
      inner: the inner optimizer's state.
    """

    count: jax.Array  # type: ignore[assignment]  # as Optax's states call it
    anchor: optax.Params
    inner: optax.OptState


def trajectory_regularized(
    inner: optax.GradientTransformation,
    pull: optax.ScalarOrSchedule,
    period: int = 10,
    *,
    decay_step_size: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer in periods of a few steps, each of which is pulled back to where its period began.

    In step ``i = 0, ..., period - 1`` of a period, with parameters ``w`` and their gradient ``g``::

        anchor <- w                                        if i = 0
        g <- g + pull (w - anchor)
        w <- w + inner(g) / (i + 1)

    The pull is the gradient of ``pull / 2 ||w - anchor||^2``. The state of ``inner`` goes on from period to period. The
    first step of a period is that of ``inner`` alone, and with a period of 1 all are. Steps are shorter by the factor
    ``(1 + 1/2 + ... + 1/period) / period`` in the mean, 0.293 for 10: a comparison with ``inner`` alone has to try
    learning rates that are so much lower.

    The authors' code has periods of 10 and writes ``2 lambda`` for the pull, with lambda a tenth of the first learning
    rate over the present one, so that it grows as the rate falls: for a ``schedule`` of the rate that stays above 0,
    ``pull=lambda count: 0.2 * schedule(0) / schedule(count)``. Its weight decay is added to the pulled gradient, in
    front of the momentum: ``inner = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(schedule, 0.9))``. There a
    period also begins with every epoch, of which an optimizer knows nothing; here all are equally long.

    The pull is a part of the gradient, which ``inner`` preconditions, clips or normalizes with it. It goes around
    ``bnp.preconditioned``, not into it: there parameters are seen in variables that change from step to step. Around an
    optimizer that accumulates gradients (``optax.MultiSteps``) it would count steps that are none, so that one belongs
    around this. A line search in ``inner`` does not know of the pull.

    ``update`` needs ``params``, and hands extra arguments on to ``inner``. The state holds a copy of the parameters.

    Args:
      inner: the optimizer, learning rate included.
      pull: strength of the pull, not negative: a number, or a schedule of the number of steps.
      period: how many steps there are to a period.
      decay_step_size: whether step ``i`` is divided by ``i + 1``, as the authors have it. To see apart what the two
        parts of the method do: without it there is the pull alone, with a pull of 0 the division alone.

    Returns:
      The optimizer, whose state is a :class:`TrajectoryRegularizedState`. Its updates have the dtypes of those of
      ``inner``; pull and division are computed in float32 or wider.

    Raises:
      TypeError: if ``inner`` is no transformation.
      ValueError: if ``pull`` or ``period`` is out of range; by ``update`` without ``params``.

    Example:
      >>> tx = trajectory_regularized(optax.sgd(1.0), pull=0.5, period=2)
      >>> w = jnp.array(4.0)
      >>> state = tx.init(w)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.array(1.0), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     print(w, state.anchor)
      3.0 4.0
      2.75 4.0
      1.75 2.75

    References:
      Zhang, Qu, Chen, Metaxas, Taming the Noisy Gradient, IJCAI 2019, as in the authors' code,
      https://github.com/huiqu18/TRAlgorithm. That any optimizer may be inside, and in which precision all is computed,
      are choices of this library.
    """
    inner = checked_inner(inner)
    if is_known(pull) and not 0 <= pull < float("inf"):
        raise ValueError(f"pull must be finite and not negative, but is {pull}.")
    if is_known(period) and not (period >= 1 and period % 1 == 0):
        raise ValueError(f"period must be a number of steps, at least 1, but is {period}.")

    def init_fn(params: optax.Params) -> TrajectoryRegularizedState:
        # a copy, so that parameters and state can both be donated
        return TrajectoryRegularizedState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), inner.init(params))

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, TrajectoryRegularizedState]:
        params = required_params(params)
        index: jax.Array = state.count % jnp.asarray(period, jnp.int32)
        strength = pull(state.count) if callable(pull) else pull
        anchor = jax.tree.map(lambda param, old: jnp.where(index == 0, param, old), params, state.anchor)

        def pulled(gradient: jax.Array, param: jax.Array, start: jax.Array) -> jax.Array:
            dtype = np.result_type(np.float32, gradient.dtype, param.dtype)
            away = param.astype(dtype) - start.astype(dtype)
            # as it is in the first step: there even a pull that is infinite, as the rate is 0, pulls nowhere
            added = jnp.where(index == 0, 0, jnp.asarray(strength, dtype) * away)
            return (gradient.astype(dtype) + added).astype(gradient.dtype)

        def shortened(step: jax.Array) -> jax.Array:
            dtype = np.result_type(np.float32, step.dtype)
            return (step.astype(dtype) / (index + 1).astype(dtype)).astype(step.dtype)

        steps, inner_state = inner.update(
            jax.tree.map(pulled, updates, params, anchor), state.inner, params, **extra_args
        )
        if decay_step_size:
            steps = jax.tree.map(shortened, steps)
        return steps, TrajectoryRegularizedState(optax.safe_increment(state.count), anchor, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
