"""Q-learning as purejaxrl has it: environments, replay and learning are one jitted ``lax.scan``, seeds a ``vmap``.

A network learns by Adam to swing a pendulum up: alone, in BNP's variables, and with Batch Renormalization before every
layer, as in CrossQ (Bhatt et al., ICLR 2024), which normalizes observations and next observations as one batch, and has
no target network. The others learn with one and without; for BNP they differ in ``find_layers``, ``preconditioned``,
``capture`` and ``intermediates=``. Run it with ``python reinforcement_learning.py``: a minute or two on two cores.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import bnp_optax as bnp
from bnp_optax.contrib import linen, ramp

PLAIN, BNP, RENORM = "Adam", "Adam in BNP's variables", "Adam, Batch Renormalization"
RUNS = (PLAIN, True), (BNP, True), (PLAIN, False), (BNP, False), (RENORM, False)  # with a target network, and without
STEPS, ENVIRONMENTS, EPISODE, BATCH = 4000, 4, 200, 128  # a step acts once in all environments, and learns once
RATES, SEEDS, DISCOUNT, ACTIONS = (0.0003, 0.001, 0.003), 8, 0.98, 3


class QNetwork(nn.Module):
    renormalized: bool

    @nn.compact
    def __call__(self, state: jax.Array, train: bool = False) -> jax.Array:
        limits = ramp(hold=STEPS // 20, r_end=2 * STEPS // 5, d_end=STEPS // 4)
        norm = functools.partial(linen.BatchRenorm, not train, r_max=limits.r_max, d_max=limits.d_max)
        x = jnp.stack([jnp.cos(state[:, 0]), jnp.sin(state[:, 0]), state[:, 1]], 1)  # what Gym's observations are
        for _ in range(2):
            x = nn.relu(nn.Dense(64)(norm()(x) if self.renormalized else x))
        return nn.Dense(ACTIONS)(norm()(x) if self.renormalized else x)


def swing(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the next angles and speeds, and the rewards, of Gym's ``Pendulum-v1`` with torques of -2, 0 and 2."""
    angle, speed, torque = state[:, 0], state[:, 1], 2.0 * action - 2
    reward = -(((angle + jnp.pi) % (2 * jnp.pi) - jnp.pi) ** 2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = jnp.clip(speed + 0.05 * (15 * jnp.sin(angle) + 3 * torque), -8, 8)
    return jnp.stack([angle + 0.05 * speed, speed], 1), reward


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.vmap, in_axes=(None, None, 0, None))
@functools.partial(jax.vmap, in_axes=(None, None, None, 0))
def learn(method: str, has_target: bool, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the mean return of an episode in the last fifth of the training, by rate and seed."""
    model, adam, no_state = QNetwork(method == RENORM), optax.adam(rate), jnp.zeros((ENVIRONMENTS, 2))
    inside = bnp.preconditioned(adam, bnp.linen.find_layers(model, no_state))
    tx = inside if method == BNP else optax.with_extra_args_support(adam)  # which ignores the records

    def loss_fn(params: Any, rest: Any, target: Any, state: Any, action: Any, reward: Any, after: Any) -> Any:
        # BNP's records are to be of the rows that have a gradient, those of `state`. Were both in one pass, as they are
        # for Batch Renormalization, BNP would need `capture(model, mask=jnp.arange(2 * BATCH) < BATCH)`.
        x = jnp.concatenate([state, after]) if method == RENORM else state
        (q, rest), records = bnp.linen.capture(model)({"params": params, **rest}, x, train=True, mutable="batch_stats")
        next_q: Any = q[BATCH:] if method == RENORM else model.apply({"params": target}, after)
        goal = jax.lax.stop_gradient(reward + DISCOUNT * next_q.max(1))
        return jnp.square(q[jnp.arange(BATCH), action] - goal).mean(), (rest, records)

    def step(carry: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        state, replay, params, rest, target, opt_state = carry
        keys = jax.random.split(jax.random.fold_in(key, t), 4)
        start = jax.random.uniform(keys[0], state.shape, minval=-1) * jnp.array([jnp.pi, 1])
        state = jnp.where(t % EPISODE == 0, start, state)  # a limit of time is no end: goals look beyond it
        q: Any = model.apply({"params": params, **rest}, state)
        explores = jax.random.uniform(keys[1], (ENVIRONMENTS,)) < jnp.maximum(1 - 4 * t / STEPS, 0.05)
        action = jnp.where(explores, jax.random.randint(keys[2], (ENVIRONMENTS,), 0, ACTIONS), q.argmax(1))
        after, reward = swing(state, action)
        replay = jax.tree.map(lambda kept, new: kept.at[t].set(new), replay, (state, action, reward, after))
        rows = jnp.divmod(jax.random.randint(keys[3], (BATCH,), 0, (t + 1) * ENVIRONMENTS), ENVIRONMENTS)
        target = optax.incremental_update(params, target, 0.01 if has_target else 1.0)
        grads, (rest, records) = jax.grad(loss_fn, has_aux=True)(params, rest, target, *(kept[rows] for kept in replay))
        updates, opt_state = tx.update(grads, opt_state, params, intermediates=records)
        return (after, replay, optax.apply_updates(params, updates), rest, target, opt_state), reward.mean()

    rest: dict[str, Any] = dict(model.init(key, no_state))
    params, kept = rest.pop("params"), jnp.zeros((STEPS, ENVIRONMENTS, 2))
    replay = kept, kept[..., 0].astype(int), kept[..., 0], kept
    _, rewards = jax.lax.scan(step, (no_state, replay, params, rest, params, tx.init(params)), jnp.arange(STEPS))
    return EPISODE * rewards[-STEPS // 5 :].mean()


def main() -> dict[tuple[str, bool], jax.Array]:
    """Prints the table; returns what it shows, for each method with and without a target network by rate and seed."""
    print("| method | target network |", *(f"{rate} |" for rate in RATES), end=f"\n{'| --- ' * (2 + len(RATES))}|\n")
    returns, keys = {}, jax.random.split(jax.random.key(0), SEEDS)
    for method, has_target in RUNS:
        returns[method, has_target] = rows = learn(method, has_target, jnp.array(RATES), keys)
        cells = (f"{row.mean():.0f} ({row.min():.0f} to {row.max():.0f}) |" for row in rows)
        print(f"| {method} | {'yes' if has_target else 'no'} |", *cells, flush=True)
    return returns


if __name__ == "__main__":
    main()
