"""Layers of a user's own and pairs of factors in NNX: one update equals that of dense layers, in float64.

Those of Linen are in test_linen_layouts.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal, weigh
from oracles import step_of_batch

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")


def gradients_and_updates(model, x):
    """Returns the layers, the gradients by layer's parameter, and what BNP makes of them from this batch alone."""
    layers = bnp.nnx.find_layers(model, x)
    tx = bnp.scale_by_bnp(layers, decay=0.0, prior_examples=None)

    def loss(model, x):
        y, records = bnp.nnx.capture(model)(x)
        return weigh(y), records

    gradients, records = nnx.grad(loss, has_aux=True)(model, x)
    gradients = nnx.to_pure_dict(gradients)
    updates, _ = tx.update(gradients, tx.init(gradients), intermediates=records)
    return layers, *(jax.tree.map(np.asarray, tree) for tree in (gradients, updates))


class Experts(nnx.Module):
    def __init__(self, rngs, **roles):
        self.w, self.b = (nnx.Param(rngs.params.normal(shape, dtype=float)) for shape in ((3, 4, 2), (3, 2)))
        self.roles = {"kernel_roles": "sio", "bias_roles": "so"} | roles

    def __call__(self, x):
        bnp.nnx.register(self, x, "w", "b", stack_axes=(1,), **self.roles)
        return jnp.einsum("nei,eio->neo", x, self.w[...]) + self.b[...][None]


def test_mixture_of_experts_is_a_stack():
    x = normal(0, 6, 3, 4)
    layers, gradients, updates = gradients_and_updates(nnx.Sequential(Experts(nnx.Rngs(0))), x)
    assert list(layers) == ["layers/0/w"]
    assert not layers.excluded
    gradients, updates = (tree["layers"][0] for tree in (gradients, updates))
    for e in range(3):
        expected = step_of_batch(np.asarray(x[:, e]), 6, gradients["w"][e], gradients["b"][e])
        np.testing.assert_allclose(updates["w"][e], expected[0], rtol=1e-8)
        np.testing.assert_allclose(updates["b"][e], expected[1], rtol=1e-8)


def test_register_does_nothing_where_nobody_asks():
    model, x = Experts(nnx.Rngs(0), kernel_roles="no roles"), normal(0, 6, 3, 4)
    assert model(x).shape == (6, 3, 2)


@pytest.mark.parametrize(
    ("names", "roles", "message"),
    [
        (("v", "b"), {}, r"Own has no parameter 'v'\. Call register after self"),
        (("w", "bias"), {}, r"Own has no parameter 'bias'"),
        (("w", "b"), {"kernel_roles": "sio"}, r"Own/w has shape \(4, 2\), but 3 roles 'sio'"),
        (("w", "b"), {"bias_roles": "so"}, r"Own/b has shape \(2,\), but 2 roles 'so'"),
    ],
)
def test_mistakes_are_named(names, roles, message):
    class Own(nnx.Module):
        def __init__(self):
            self.w, self.b = nnx.Param(jnp.ones((4, 2))), nnx.Param(jnp.ones(2))

        def __call__(self, x):
            bnp.nnx.register(self, x, *names, **roles)
            return x @ self.w[...] + self.b[...][None]

    with pytest.raises(ValueError, match=message):
        bnp.nnx.find_layers(Own(), normal(0, 3, 4))


class Scanned(nnx.Module):
    """Two layers of the user's own in one module, one inside the other's loop over positions."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(4, 4, param_dtype=float, use_bias=False, rngs=rngs)
        self.w = nnx.Param(rngs.params.normal((4, 2), dtype=float))

    def __call__(self, x):
        bnp.nnx.register(self, x, "w", bias=None)
        return self.inner(x) @ self.w[...]


def test_a_registering_module_inside_a_loop_pools_its_steps():
    model, x = Scanned(nnx.Rngs(0)), normal(0, 5, 6, 4)
    steps = nnx.StateAxes({nnx.Intermediate: 0, ...: None})
    loop = nnx.scan(lambda layer, x: layer(x), in_axes=(steps, 1), out_axes=1)
    (looped, inner), (whole, _) = (
        bnp.nnx.capture(call)(model, x)[1].values() for call in (loop, lambda model, x: model(x))
    )
    assert looped.mean.shape == (6, 1, 1, 4)
    np.testing.assert_allclose(looped.mean.mean(0), whole.mean, rtol=1e-12)
    assert inner.mean.shape == (6, 1, 1, 4)
