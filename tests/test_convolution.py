"""One update of a convolution, in float64, against the dense formula and against other convolutions."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import patches, same_padding

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")


def step_of(model, params, x, target, **options):
    """Returns the preconditioned gradient of half the squared error, averaged over examples."""
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x), **options)

    def loss(params):
        with bnp.linen.record_inputs():
            y, recorded = model.apply({"params": params}, x, mutable=["intermediates"])
        return jnp.sum(jnp.square(y - target)) / 2 / x.shape[0], recorded["intermediates"]

    gradients, recorded = jax.grad(loss, has_aux=True)(params)
    updates, _ = tx.update(gradients, tx.init(params), intermediates=recorded)
    return updates


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 3))
    window = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    strides = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    spatial = tuple(w + draw(st.integers(0, 2)) for w in window)
    groups, inputs, outputs = (draw(st.integers(1, 2)) for _ in range(3))
    return window, strides, spatial, groups, inputs, outputs


@settings(max_examples=15)
@given(
    convolutions(),
    st.sampled_from(["VALID", "SAME"]),
    st.booleans(),
    st.sampled_from([12.0, "examples", "none"]),
    st.integers(0, 2**16),
)
def test_convolution_equals_the_dense_formula_on_its_patches(conv, padding, use_bias, scaling, seed):
    window, strides, spatial, groups, inputs, outputs = conv
    rng = np.random.default_rng(seed)
    x = rng.normal(2, 3, (2, *spatial, groups * inputs))
    model = nn.Conv(
        groups * outputs, window, strides, padding, feature_group_count=groups, use_bias=use_bias, param_dtype=float
    )
    params = model.init(jax.random.key(seed), x)["params"]
    y = model.apply({"params": params}, x)
    target = rng.normal(size=y.shape)
    updates = step_of(model, params, jnp.asarray(x), target, scaling=scaling, prior_examples=None, decay=0.9)

    delta = np.asarray((y - target) / 2).reshape(-1, groups, outputs)
    pads = [
        same_padding(n, w, s) if padding == "SAME" else (0, 0) for n, w, s in zip(spatial, window, strides, strict=True)
    ]
    fan_in, examples = np.prod(window) * inputs, 2
    q2 = {
        12.0: max(12 / examples, 1),
        "examples": max(fan_in / examples, 1),
        "none": 1,
    }[scaling]
    for g in range(groups):
        channels = x[..., g * inputs : (g + 1) * inputs]
        batch = channels.reshape(-1, inputs)
        mean = 0.1 * batch.mean(0)
        variance = 0.9 + 0.1 * batch.var(0) + 0.09 * batch.mean(0) ** 2
        moment = variance if use_bias else variance + mean**2
        s = np.tile(moment + 1e-2 * moment.max() + 1e-4, np.prod(window))[:, None]
        mu = np.tile(mean, np.prod(window))[:, None]
        seen = patches(channels, window, strides, pads)
        g_w = seen.T @ delta[:, g]
        out = np.s_[g * outputs : (g + 1) * outputs]
        if use_bias:
            g_b = delta[:, g].sum(0)
            g_w = (g_w - mu * g_b) / (q2 * s)
            np.testing.assert_allclose(updates["bias"][out], g_b / q2 - (mu * g_w).sum(0), rtol=1e-9, atol=1e-9)
        else:
            g_w = g_w / (q2 * s)
        np.testing.assert_allclose(
            updates["kernel"][..., out], g_w.reshape(*window, inputs, outputs), rtol=1e-9, atol=1e-9
        )


def test_one_by_one_convolution_equals_a_dense_layer_over_positions():
    rng = np.random.default_rng(0)
    x, target = jnp.asarray(rng.normal(2, 3, (4, 5, 6, 3))), rng.normal(size=(4, 5, 6, 2))
    params = nn.Dense(2, param_dtype=float).init(jax.random.key(0), x)["params"]
    as_conv = {"kernel": params["kernel"][None, None], "bias": params["bias"]}
    dense = step_of(nn.Dense(2, param_dtype=float), params, x, target)
    conv = step_of(nn.Conv(2, (1, 1), param_dtype=float), as_conv, x, target)
    chex.assert_trees_all_close(conv, {"kernel": dense["kernel"][None, None], "bias": dense["bias"]}, rtol=1e-10)


def test_grouped_convolution_equals_separate_convolutions():
    rng = np.random.default_rng(0)
    x, target = jnp.asarray(rng.normal(2, 3, (4, 6, 6, 6))), rng.normal(size=(4, 6, 6, 4))
    grouped = nn.Conv(4, (3, 3), feature_group_count=2, param_dtype=float)
    params = grouped.init(jax.random.key(0), x)["params"]
    whole = step_of(grouped, params, x, target)
    for ins, outs in ((np.s_[:3], np.s_[:2]), (np.s_[3:], np.s_[2:])):
        part = jax.tree.map(lambda p, outs=outs: p[..., outs], params)
        separate = step_of(nn.Conv(2, (3, 3), param_dtype=float), part, x[..., ins], target[..., outs])
        chex.assert_trees_all_close(jax.tree.map(lambda u, outs=outs: u[..., outs], whole), separate, rtol=1e-10)


def test_convolution_over_the_whole_input_equals_a_dense_layer_given_the_same_statistics():
    rng = np.random.default_rng(0)
    x, target = jnp.asarray(rng.normal(2, 3, (4, 3, 5, 2))), rng.normal(size=(4, 1, 1, 3))
    conv = nn.Conv(3, (3, 5), padding="VALID", param_dtype=float)
    params = conv.init(jax.random.key(0), x)["params"]
    updates = step_of(conv, params, x, target, scaling="none")

    dense, flat = nn.Dense(3, param_dtype=float), x.reshape(4, 30)
    dense_params = {"kernel": params["kernel"].reshape(30, 3), "bias": params["bias"]}
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(dense, flat), scaling="none")
    gradients = jax.grad(lambda p: jnp.sum(jnp.square(dense.apply({"params": p}, flat) - target[:, 0, 0])) / 8)(
        dense_params
    )
    shared = bnp.input_moments(x)
    record = bnp.InputMoments(
        jnp.tile(shared.mean, 15), jnp.tile(shared.variance, 15), shared.examples, positions=shared.examples
    )
    expected, _ = tx.update(gradients, tx.init(dense_params), intermediates={"kernel_input": record})
    assert_flat = {"kernel": expected["kernel"].reshape(3, 5, 2, 3), "bias": expected["bias"]}
    chex.assert_trees_all_close(updates, assert_flat, rtol=1e-9)
