"""The walk through a jaxpr: what it says that an output is, that output is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax.extend.core import Literal

from bnp_optax.dataflow import LOOPED, MAPPED, Dataflow, either, made_in, mark, marks_in, primal

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
    "either of two that are one": (lambda w: either(jax.checkpoint(lambda w: w.T)(w), w.T), (1, 0)),
    "either of two that are one farther out": (lambda w: jax.jit(either)(w.T, w.T), (1, 0)),
    "either of two views": (lambda w: either(w[:4, :4], w[:4, :4].T), None),
    "either of two views of all": (lambda w: either(w, w[::-1]), None),
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


def test_marks_tell_what_comes_out_of_a_program():
    """Of a sum over calls, loops and branches; what a transform inside drops is in the program still."""

    def program(x):
        dropped, kept = jax.checkpoint(lambda x: (mark("dropped") + x, mark("kept")))(x)
        looped = over(lambda c, _: (c, mark("loop")))[1].sum()
        branch = jax.lax.cond(x > 0, lambda: mark("then"), lambda: mark("else"))
        return kept + jax.jit(lambda: mark("compiled"))() + looped + branch, dropped * 2

    jaxpr = jax.make_jaxpr(program)(1.0).jaxpr
    out = {"kept", "compiled", "loop", "then", "else"}
    assert Dataflow().marks(jaxpr, jaxpr.outvars[0]) == out
    assert marks_in(jaxpr) == out | {"dropped"}


def test_what_many_calls_leave_is_walked_through_however_deep_pythons_stack_is():
    calls = 1500

    def program(w):
        kernel, token = w, mark("0")
        for call in range(1, calls):
            kernel, token = either(kernel, w), token + mark(str(call))
        return kernel, token

    jaxpr = jax.make_jaxpr(program)(normal(0, XS, 4)).jaxpr
    assert Dataflow().origin(jaxpr, jaxpr.outvars[0]).axes == (0, 1)
    assert len(Dataflow().roots(jaxpr, jaxpr.outvars[0])) == 1
    assert Dataflow().marks(jaxpr, jaxpr.outvars[1]) == set(map(str, range(calls)))


PRODUCTS = {
    "a layer": (lambda x, w, b: x @ w + b[None], {"b"}, {"xw"}),
    "compiled, under remat": (lambda x, w, b: jax.jit(jax.checkpoint(jnp.matmul))(x, w), set(), {"xw"}),
    "in other shapes": (lambda x, w, b: jnp.einsum("ni,oi->on", x, w.T.reshape(3, 4)).T[::-1], set(), {"xw"}),
    "in other dtypes": (lambda x, w, b: x.astype(jnp.float16) @ w.astype(jnp.float16), set(), {"xw"}),
    "in integers": (lambda x, w, b: x @ w.astype(int).astype(x.dtype), set(), {"x?"}),
    "scaled": (lambda x, w, b: x @ (0.1 * w), set(), {"x?"}),
    "frozen": (lambda x, w, b: x @ jax.lax.stop_gradient(w), set(), {"x?"}),
    "masked": (lambda x, w, b: x @ jnp.where(w > 0, w, 0), set(), {"x?"}),
    "of another input": (lambda x, w, b: (x - x.mean()) @ w, set(), {"w?"}),
    "two products": (lambda x, w, b: x @ w + (x * x) @ w, set(), {"xw", "w?"}),
    "a padded input": (lambda x, w, b: jnp.pad(x, ((1, 1), (0, 0)), mode="wrap") @ w, set(), {"xw"}),
    "a scaled product": (lambda x, w, b: 0.1 * (x @ w), {"?"}, set()),
    "a scaled bias": (lambda x, w, b: x @ w + 2 * b[None], {"?"}, {"xw"}),
    "the kernel itself": (lambda x, w, b: w.T, {"w"}, set()),
    "at each step of a loop": (lambda x, w, b: over(lambda c, _: (c, x @ w), xs=None)[1], set(), {"xw"}),
    "of what a loop scans": (lambda x, w, b: jax.lax.scan(lambda c, row: (c, row @ w), 0.0, x)[1], set(), {"xw"}),
    "in one branch": (
        lambda x, w, b: jax.lax.cond(b[0] > 0, lambda w: x @ w, lambda w: x @ (2 * w), w),
        set(),
        {"xw", "x?"},
    ),
    "accumulated": (lambda x, w, b: over(lambda c, _: (c + x @ w, None), jnp.zeros((XS, 3)))[0], {"?"}, {"xw"}),
    "of what a loop carries": (lambda x, w, b: over(lambda c, _: (jnp.sin(c), c @ w), x)[1], set(), {"w?"}),
    "of other inputs in each branch": (
        lambda x, w, b: jax.lax.cond(b[0] > 0, lambda w: x @ w, lambda w: (2 * x) @ w, w),
        set(),
        {"xw", "w?"},
    ),
    "carried past a computation": (
        lambda x, w, b: jax.jit(lambda y, b: (y, jnp.sin(b)))(x @ w, b)[0],
        set(),
        {"xw"},
    ),
    "left by a gradient": (lambda x, w, b: left_by_gradient(lambda x: x @ w, x), set(), {"xw"}),
}


def left_by_gradient(function, x):
    """What `primal` lets out of a gradient inside a program."""
    left = []

    def inner(x):
        left.append(primal(function(x)))
        return jnp.sum(function(x) ** 2)

    jax.grad(inner)(x)
    return left[0]


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_sum_is_taken_apart_into_products_of_inputs_that_enter_as_they_stand(name):
    program, terms, products = PRODUCTS[name]
    closed = jax.make_jaxpr(program)(normal(0, XS, 4), normal(1, 4, 3), normal(2, 3))
    names = dict(zip(closed.jaxpr.invars, "xwb", strict=True))

    def show(root):
        return names.get(root[1], "?")

    found_terms, found_products = Dataflow().terms(closed.jaxpr, closed.jaxpr.outvars[0])
    assert {show(root) for root in found_terms} == terms
    shown = {"".join(sorted(map(show, factors), key="xw?".index)) for factors in found_products}
    assert shown == products


def test_what_a_transform_leaves_behind_is_not_made_in_the_program():
    left = []

    def program(x):
        jax.lax.map(lambda x: left.append(x + 1), x)
        return x, x + 1, 2.0, left[0], left[0] + 1, (left[0] + 1) * x

    closed = jax.make_jaxpr(program)(normal(0, 3))
    made = made_in(closed)
    assert [isinstance(var, Literal) or var in made for var in closed.jaxpr.outvars] == [True] * 3 + [False] * 3
