"""What a batch does to the statistics of a layer, and P that follows, where numbers are at an end of their range."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import statistics_in
from transformations import DENSE, dense_params, dense_record, problem

import bnp_optax as bnp
from bnp_optax.moments import pool


def test_pooling_in_float32_keeps_a_variance_far_below_the_mean():
    x = np.random.default_rng(0).normal(3e3, 1, (512, 1, 2)).astype(np.float32)
    record = pool(jax.vmap(bnp.input_moments)(x), (0,))
    x = x.astype(np.float64).reshape(512, 2)
    np.testing.assert_allclose(record.mean[0, 0], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(record.variance[0, 0], x.var(0), rtol=1e-2)
    assert record.examples == 512


def test_a_fault_in_one_group_of_a_layer_skips_it_whole():
    records = dict(problem().records)
    bad = records["Conv_0"]
    records["Conv_0"] = dataclasses.replace(bad, total=bad.total.at[0, 1, 0].set(np.nan))
    tx = bnp.scale_by_bnp(problem().layers)
    start = tx.init(problem().params)
    _, state = tx.update(problem().gradients, start, problem().params, intermediates=records)
    assert {name: int(state[name].skipped[0]) for name in state} == {"Conv_0": 1, "Dense_0": 0, "Dense_1": 0}
    for field in ("mean", "variance", "damping", "seen"):
        np.testing.assert_array_equal(getattr(state["Conv_0"], field), getattr(start["Conv_0"], field))


def test_a_batch_that_is_skipped_still_scales_its_step():
    tx = bnp.scale_by_bnp(DENSE)
    _, state = tx.update(dense_params(), tx.init(dense_params()), intermediates=dense_record(np.ones((64, 3))))
    assert state["w"].scale == 128 / 64
    _, after = tx.update(dense_params(), state, intermediates=dense_record(np.full((8, 3), np.nan)))
    assert (after["w"].skipped, after["w"].scale) == (1, 128 / 8)
    np.testing.assert_array_equal(after["w"].damping, state["w"].damping)


@pytest.mark.parametrize("inner", [None, "in z"])
def test_without_damping_an_input_that_never_varies_moves_no_kernel(inner):
    options = {"eps": 0.0, "eps_relative": 0.0, "prior_examples": 0, "scaling": "none"}
    tx = bnp.preconditioned(optax.identity(), DENSE, **options) if inner else bnp.scale_by_bnp(DENSE, **options)
    gradients = jax.tree.map(jnp.ones_like, dense_params())
    updates, state = tx.update(
        gradients, tx.init(dense_params()), dense_params(), intermediates=dense_record(np.zeros((8, 3)))
    )
    np.testing.assert_array_equal(updates["w"], 0)
    np.testing.assert_array_equal(updates["b"], 1)
    assert statistics_in(state)[0]["w"].skipped == 0


def test_a_sum_beyond_float32_skips_the_batch():
    tx = bnp.scale_by_bnp(DENSE, variance="batch")
    start = tx.init(dense_params())
    record, infinite = dense_record(np.ones((8, 3)))["w"], jnp.full((1, 1, 3), jnp.inf)
    record = dataclasses.replace(record, total=infinite, squared=infinite)  # of 3e38 in every place, which do not vary
    _, state = tx.update(dense_params(), start, intermediates={"w": record})
    assert state["w"].skipped == 1
    np.testing.assert_array_equal(state["w"].mean, start["w"].mean)
