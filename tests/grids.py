"""What the tests of updates of few bits share: points of a grid, and trainings."""

import functools

import jax
import numpy as np
import optax

from bnp_optax.contrib.quantized import round_to_grid

DELTA = 2.0**-7
N = 10_000

rounded = functools.partial(jax.jit, static_argnames=("bits", "limit"))(round_to_grid)


def is_on_grid(x, bits=8, limit=1.0):
    """Whether all numbers are points of the grid, to the last bit."""
    unit = limit * 2.0 ** (1 - bits)
    x = np.asarray(x, np.float64)
    return bool(np.all((x == np.rint(x / unit) * unit) & (-limit <= x) & (x <= limit - unit)))


def train(tx, params, gradients, steps, **extra):
    """Returns parameters after steps of the same gradients, those after every step, and the state."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradients, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps))
    (params, state), points = run(params)
    return params, points, state


def one_update(tx, params, gradients):
    update = jax.jit(tx.update)
    return update(gradients, tx.init(params), params)
