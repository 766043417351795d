"""The walk through a jaxpr: what it says that an output is, that output is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

from bnp_optax.dataflow import LOOPED, MAPPED, Dataflow

XS = 5  # the length of loops


def over(body, init=0.0, xs=None):
    """Returns the carry and the outputs of a loop."""
    return jax.lax.scan(body, init, xs, length=XS)


PROGRAMS = {
    "itself": (lambda w: w, (0, 1)),
    "transposed": (lambda w: w.T, (1, 0)),
    "converted, compiled": (lambda w: jax.jit(lambda w: w.astype(jnp.float32).T)(w), (1, 0)),
    "under remat and a custom rule": (lambda w: jax.checkpoint(jax.nn.relu)(w) * 0 + w, None),
    "under remat": (lambda w: jax.checkpoint(lambda w: (jnp.sin(w), w.T))(w)[1], (1, 0)),
    "repeated by a map": (lambda w: jax.vmap(lambda _: w)(jnp.arange(3)), (MAPPED, 0, 1)),
    "mapped": (lambda w: jax.vmap(lambda row: row, out_axes=1)(w), (1, 0)),
    "stretched": (lambda w: jnp.broadcast_to(w[:, :1], (5, 4)), None),
    "computed": (lambda w: 2 * w, None),
    "a slice": (lambda w: w[:2], None),
    "scanned": (lambda w: over(lambda c, row: (c, row), xs=w)[1], (0, 1)),
    "scanned along its second axis": (lambda w: jax.lax.scan(lambda c, x: (c, x), 0.0, w.T)[1], (1, 0)),
    "scanned and computed": (lambda w: over(lambda c, row: (c, row + 1), xs=w)[1], None),
    "a constant of a loop": (lambda w: over(lambda c, _: (c + 1, w))[1], (LOOPED, 0, 1)),
    "carried": (lambda w: over(lambda w, _: (w, None), w)[0], (0, 1)),
    "carried, and stacked": (lambda w: over(lambda w, _: (w, w), w)[1], (LOOPED, 0, 1)),
    "carried, and changed": (lambda w: over(lambda w, _: (w / 2, w), w)[1], None),
    "turned at each step": (lambda w: over(lambda c, _: (c.T, c), w[:4, :4])[0], None),
    "the last slice of what is scanned": (lambda w: over(lambda _, row: (row, None), w[0], w)[0], None),
    "a constant that the loop carries out": (lambda w: over(lambda c, _: (w, None), 2 * w)[0], (0, 1)),
    "in both branches": (lambda w: jax.lax.cond(w[0, 0] > 0, lambda w: w.T, lambda w: w.T, w), (1, 0)),
    "in one branch": (lambda w: jax.lax.cond(w[0, 0] > 0, lambda w: w, lambda w: 2 * w, w), None),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_output_is_what_its_origin_says(name):
    program, axes = PROGRAMS[name]
    w = normal(0, XS, 4)
    closed = jax.make_jaxpr(program)(w)
    origin = Dataflow().origin(closed.jaxpr, closed.jaxpr.outvars[0])
    assert (None if origin is None else origin.axes) == axes
    if axes is not None:
        output = np.asarray(program(w))
        first = output[tuple(0 if isinstance(axis, str) else slice(None) for axis in axes)]
        np.testing.assert_array_equal(first, np.transpose(w, [axis for axis in axes if not isinstance(axis, str)]))
        np.testing.assert_array_equal(output, np.broadcast_to(first, output.shape))  # where it repeats
