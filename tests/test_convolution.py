"""One update of a convolution, in float64, against the dense formula and against other convolutions."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradients_and_records, init, normal, squared_error
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import absorbed, batch_scale, bnp_step, patches, same_padding

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")


def step_of(model, params, x, target, **options):
    """Returns the preconditioned gradient of half the squared error, averaged over examples."""
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x), **options)

    @jax.jit
    def update(params, x, target):
        gradients, records = gradients_and_records(model, squared_error)(params, x, target)
        return tx.update(gradients, tx.init(params), intermediates=records)[0]

    return update(params, x, target)


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
    params = init(model, x, seed=seed)
    y = jax.jit(model.apply)({"params": params}, x)
    target = rng.normal(size=y.shape)
    updates = step_of(model, params, jnp.asarray(x), target, scaling=scaling, prior_examples=None, decay=0.9)

    examples, fan_in = 2, np.prod(window) * inputs
    delta = np.asarray((y - target) / examples).reshape(-1, groups, outputs)
    pads = [
        same_padding(n, w, s) if padding == "SAME" else (0, 0) for n, w, s in zip(spatial, window, strides, strict=True)
    ]
    for g in range(groups):
        channels = x[..., g * inputs : (g + 1) * inputs]
        statistics = absorbed(0.0, 1.0, channels.reshape(-1, inputs), 0.9)
        seen = patches(channels, window, strides, pads)
        g_b = delta[:, g].sum(0) if use_bias else None
        kernel, bias = bnp_step(*statistics, seen.T @ delta[:, g], g_b, batch_scale(scaling, examples, fan_in))
        out = np.s_[g * outputs : (g + 1) * outputs]
        expected = kernel.reshape(*window, inputs, outputs)
        np.testing.assert_allclose(updates["kernel"][..., out], expected, rtol=1e-9, atol=1e-9)
        if use_bias:
            np.testing.assert_allclose(updates["bias"][out], bias, rtol=1e-9, atol=1e-9)


def test_one_by_one_convolution_equals_a_dense_layer_over_positions():
    x, target = normal(0, 4, 5, 6, 3), normal(1, 4, 5, 6, 2)
    params = init(nn.Dense(2, param_dtype=float), x)
    as_conv = {"kernel": params["kernel"][None, None], "bias": params["bias"]}
    dense = step_of(nn.Dense(2, param_dtype=float), params, x, target)
    conv = step_of(nn.Conv(2, (1, 1), param_dtype=float), as_conv, x, target)
    chex.assert_trees_all_close(conv, {"kernel": dense["kernel"][None, None], "bias": dense["bias"]}, rtol=1e-10)


def test_grouped_convolution_equals_separate_convolutions():
    x, target = normal(0, 4, 6, 6, 6), normal(1, 4, 6, 6, 4)
    grouped = nn.Conv(4, (3, 3), feature_group_count=2, param_dtype=float)
    params = init(grouped, x)
    whole = step_of(grouped, params, x, target)
    for ins, outs in ((np.s_[:3], np.s_[:2]), (np.s_[3:], np.s_[2:])):
        part = jax.tree.map(lambda p, outs=outs: p[..., outs], params)
        separate = step_of(nn.Conv(2, (3, 3), param_dtype=float), part, x[..., ins], target[..., outs])
        chex.assert_trees_all_close(jax.tree.map(lambda u, outs=outs: u[..., outs], whole), separate, rtol=1e-10)


def test_convolution_over_the_whole_input_equals_a_dense_layer_given_the_same_statistics():
    x, target = normal(0, 4, 3, 5, 2), normal(1, 4, 1, 1, 3)
    conv = nn.Conv(3, (3, 5), padding="VALID", param_dtype=float)
    params = init(conv, x)
    updates = step_of(conv, params, x, target, scaling="none")

    dense, flat = nn.Dense(3, param_dtype=float), x.reshape(4, 30)
    dense_params = {"kernel": params["kernel"].reshape(30, 3), "bias": params["bias"]}
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(dense, flat), scaling="none")
    gradients, _ = gradients_and_records(dense, squared_error)(dense_params, flat, target[:, 0, 0])
    shared = bnp.input_moments(x)
    record = bnp.InputMoments.of(
        jnp.tile(shared.mean, 15), jnp.tile(shared.variance, 15), shared.examples, shared.positions
    )
    expected, _ = tx.update(gradients, tx.init(dense_params), intermediates={"kernel": record})
    as_conv = {"kernel": expected["kernel"].reshape(3, 5, 2, 3), "bias": expected["bias"]}
    chex.assert_trees_all_close(updates, as_conv, rtol=1e-9)
