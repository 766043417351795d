"""Centred kernels: the mean of every unit, the steps of a network written with centred kernels, BNP's variables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clipped_layers import LINEN, linen_layers, random_trees
from helpers import flatten

import bnp_optax as bnp
from bnp_optax import contrib

pytestmark = pytest.mark.usefixtures("x64")

SINGLE = ("dense of one input", "1x1 convolution of one channel")
LAYERS = bnp.Layers((bnp.Layer.dense(("hidden", "kernel"), (4, 5), bias=("hidden", "bias")),))


def mean_of_units(kernel, axes):
    return np.mean(kernel, tuple(axis for axis in range(kernel.ndim) if axis not in axes), keepdims=True)


@pytest.mark.parametrize("name", [name for name in LINEN if name not in SINGLE])
def test_every_unit_of_a_kernel_loses_its_mean_and_nothing_else(name):
    (layers, shapes), units = linen_layers(name), LINEN[name][2]
    params, gradients = random_trees(shapes, units)
    tx = contrib.centred(optax.identity(), layers)
    steps, _ = tx.update(gradients, tx.init(params), params)
    for given, found in ((params, contrib.centre_kernels(params, layers)), (gradients, steps)):
        given, found = flatten(given), flatten(found)
        for path, axes in units.items():
            mean = mean_of_units(np.asarray(given[path]), axes) if path.endswith("kernel") else 0.0
            np.testing.assert_allclose(found[path], given[path] - mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize(
    "function",
    [lambda layers: contrib.centred(optax.identity(), layers), lambda layers: contrib.centre_kernels({}, layers)],
)
def test_units_of_a_single_weight_are_refused(name, function):
    with pytest.raises(ValueError, match="single weight"):
        function(linen_layers(name)[0])


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="not float"):
        contrib.centred(0.1, LAYERS)


def loss_of(params, x, y, mean=None):
    """Of two dense layers; the hidden kernel may be written as ``mean + v - mean(v)``."""
    kernel = params["hidden"]["kernel"]
    kernel = kernel if mean is None else mean + kernel - kernel.mean(0)
    hidden = jnp.tanh(x @ kernel + params["hidden"]["bias"])
    return jnp.mean((hidden @ params["out"]["kernel"] - y) ** 2)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "inner", [optax.sgd(0.1, momentum=0.9, nesterov=True), optax.adam(0.03), optax.contrib.muon(0.1)]
)
def test_the_steps_are_those_of_a_network_with_centred_kernels(inner):
    rng = np.random.default_rng(0)
    plain = {
        "hidden": {"kernel": jnp.asarray(rng.normal(size=(4, 5))), "bias": jnp.asarray(rng.normal(size=5))},
        "out": {"kernel": jnp.asarray(rng.normal(size=(5, 3)))},
    }
    mean, written_out, tx = plain["hidden"]["kernel"].mean(0), plain, contrib.centred(inner, LAYERS)
    state, oracle_state, update = tx.init(plain), inner.init(written_out), jax.jit(tx.update)
    for _ in range(6):
        x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 3))
        updates, state = update(jax.grad(loss_of)(plain, x, y), state, plain)
        plain = optax.apply_updates(plain, updates)
        gradients = jax.grad(loss_of)(written_out, x, y, mean)
        updates, oracle_state = inner.update(gradients, oracle_state, written_out)
        written_out = optax.apply_updates(written_out, updates)
    v = written_out["hidden"].pop("kernel")
    np.testing.assert_allclose(plain["hidden"].pop("kernel"), mean + v - v.mean(0), rtol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), plain, written_out)


@pytest.mark.usefixtures("standard_promotion")
def test_the_mean_in_bnps_variables_is_that_of_weights_by_the_deviation_of_their_input():
    rng = np.random.default_rng(0)
    layers = bnp.Layers((bnp.Layer.dense(("w",), (4, 3), bias=("b",)),))
    x = rng.normal(size=(64, 4)) * [0.1, 1.0, 3.0, 10.0] + [5.0, 0.0, 1.0, -2.0]
    params = {"w": jnp.asarray(rng.normal(size=(4, 3))), "b": jnp.zeros(3)}
    gradients = {"w": jnp.asarray(x.T @ rng.normal(size=(64, 3))), "b": jnp.asarray(rng.normal(size=3))}
    records = {"w": bnp.input_moments(jnp.asarray(x))}
    options = {"prior_examples": None, "decay": 0.0, "eps": 0.0, "eps_relative": 0.0}
    tx = bnp.preconditioned(contrib.centred(optax.adam(0.1), layers), layers, **options)
    updates, _ = tx.update(gradients, tx.init(params), params, intermediates=records)
    step = np.asarray(updates["w"]) * x.std(0)[:, None]
    assert np.abs(step).max() > 0.01
    np.testing.assert_allclose(step.mean(0), 0, atol=1e-12)
