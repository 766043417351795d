import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_moments
from hypothesis import given
from hypothesis import strategies as st

import bnp_optax as bnp
from bnp_optax.moments import absorb, pool, pool_named_axis, running_decay
from bnp_optax.records import pool_records

pytestmark = pytest.mark.usefixtures("x64")
seeds = st.integers(0, 2**16)


record_of = functools.partial(jax.jit, static_argnames=("groups", "num_spatial"))(bnp.input_moments)


@given(st.lists(st.integers(1, 5), max_size=3), st.integers(1, 3), st.integers(1, 3), seeds)
def test_moments_are_those_over_all_but_the_features(leading, groups, per_group, seed):
    x = np.random.default_rng(seed).normal(3, 2, (*leading, groups * per_group))
    record = record_of(x, groups=groups)
    assert record.mean.shape == record.variance.shape == (1, groups, per_group)
    assert_moments(record, x.reshape(math.prod(leading), -1), examples=[*leading, 1][0], groups=groups)


def test_spatial_axes_are_positions_of_one_example():
    record = bnp.input_moments(jnp.ones((8, 8, 3)), num_spatial=2)
    assert record.examples == 1
    assert record.positions == 64


@pytest.mark.parametrize("examples", [7, 4096, 1_000_000])
def test_large_offset_does_not_cancel_in_float32(examples):
    # The values as float32 holds them are the data: their own moments are the truth.
    x = np.random.default_rng(0).normal(1e4, 1, (examples, 2)).astype(np.float32)
    record = jax.jit(bnp.input_moments)(x)  # optimized, as that may change the order of a sum
    x = x.astype(np.float64)
    assert record.mean.dtype == jnp.float32
    np.testing.assert_allclose(record.mean.ravel(), x.mean(0), atol=1e-2)
    np.testing.assert_allclose(record.variance.ravel(), x.var(0), rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_])
def test_low_precision_input_gives_float32_moments_of_the_values_given(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(100, 3, (300, 4)), dtype)
    record = record_of(x)
    assert record.mean.dtype == record.variance.dtype == jnp.float32
    assert_moments(record, x, examples=300)


def test_numpy_input_of_a_dtype_that_jax_does_not_hold():
    x = np.random.default_rng(0).normal(size=(4, 3))
    with jax.enable_x64(False):  # any warning is an error
        record = jax.jit(lambda: bnp.input_moments(x))()
        assert record.mean.dtype == jnp.float32
    assert_moments(record, x, examples=4)


def test_float16_input_does_not_overflow():
    x = jnp.full((64, 2), 60000, jnp.float16)
    record = record_of(x)
    np.testing.assert_array_equal(record.mean.ravel(), 60000)
    np.testing.assert_array_equal(record.variance, 0)


@given(st.floats(-(2.0**60), 2.0**60, width=32), st.sampled_from([1, 2, 7, 50]))
def test_constant_input_has_variance_zero(value, examples):
    record = record_of(np.full((examples, 1), value, np.float32))
    np.testing.assert_allclose(record.variance, 0, atol=float(np.float32(value) ** 2) * 1e-13)
    assert record.variance >= 0


def test_no_gradient_flows_through_a_record():
    gradient = jax.grad(lambda x: bnp.input_moments(x).mean.sum() + (x**2).sum())(jnp.ones((2, 2)))
    np.testing.assert_array_equal(gradient, 2)


def test_empty_input_is_refused():
    with pytest.raises(ValueError, match=r"empty \(shape \(0, 3\)\)"):
        bnp.input_moments(jnp.zeros((0, 3)))


@given(st.lists(st.sampled_from([1, 2, 5]), min_size=1, max_size=4), seeds)
def test_pooled_batches_of_any_size_are_one_batch(counts, seed):
    batches = [np.random.default_rng([seed, k]).normal(k, 1 + k, (n, 3)) for k, n in enumerate(counts)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(record_of, batches))
    pooled = pool_examples(stacked, (0,))
    assert_moments(pooled, np.concatenate(batches), examples=sum(counts))


pool_examples = functools.partial(jax.jit, static_argnums=1)(pool)


@jax.jit
def pooled_in_two_ways(x):
    """The records of batches under two mapped axes, pooled as leading axes, and the outer one by its name."""
    records = jax.vmap(jax.vmap(bnp.input_moments))(x)
    inner_pooled = jax.vmap(
        lambda r: pool_named_axis(pool(r, example_axes=[0]), "devices"), axis_name="devices", out_axes=None
    )
    return pool(records, example_axes=[0, 1]), inner_pooled(records)


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 3), (4, 1), (2, 4)])
@given(seed=seeds)
def test_pooling_over_a_named_axis_or_two_leading_axes_is_one_batch(outer, inner, seed):
    x = np.random.default_rng(seed).normal(2, 3, (outer, inner, 5, 3))
    for record in pooled_in_two_ways(x):
        assert_moments(record, x.reshape(-1, 3), examples=outer * inner * 5)


def test_calls_of_one_layer_add_positions_not_examples():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4, 3)), rng.normal(5, 2, size=(4, 6, 3))
    record = jax.jit(functools.partial(pool_records, where="a layer"))(record_of(first), record_of(second))
    assert_moments(record, np.concatenate([first, second.reshape(-1, 3)]), examples=4)
    assert record.positions == 4 + 24


@functools.partial(jax.jit, static_argnums=4)
def absorb_batch(mean, variance, batch, decay, rule):
    record = bnp.input_moments(batch)
    return absorb(mean, variance, record.mean, record.variance, decay, rule)


def absorb_all(batches, decay, rule):
    moments = np.zeros((1, 1, 3)), np.ones((1, 1, 3))
    for batch in batches:
        moments = absorb_batch(*moments, batch, decay, rule)
    return map(np.ravel, moments)


@given(st.floats(0, 0.99), st.integers(1, 3), st.integers(1, 6), seeds)
def test_mixture_is_the_variance_of_the_weighted_examples(decay, examples, steps, seed):
    batches = [np.random.default_rng([seed, k]).normal(k, 2, (examples, 3)) for k in range(steps)]
    mean, variance = absorb_all(batches, decay, "mixture")
    weights = np.repeat([(1 - decay) * decay ** (steps - 1 - k) / examples for k in range(steps)], examples)
    values = np.concatenate(batches)
    # the start weighs decay**steps, with mean 0 and variance 1
    expected_mean = weights @ values
    expected_second_moment = weights @ values**2 + decay**steps
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance, expected_second_moment - expected_mean**2, rtol=1e-10, atol=1e-10)


@given(st.floats(0, 0.99), st.integers(1, 6), seeds)
def test_batch_rule_is_the_average_of_batch_variances(decay, steps, seed):
    batches = [np.random.default_rng([seed, k]).normal(k, 2, (4, 3)) for k in range(steps)]
    _, variance = absorb_all(batches, decay, "batch")
    expected = decay**steps + sum((1 - decay) * decay ** (steps - 1 - k) * b.var(0) for k, b in enumerate(batches))
    np.testing.assert_allclose(variance, expected, rtol=1e-12)


@given(st.integers(0, 500), st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_start_weighs_as_many_examples_as_asked(prior, counts):
    """While below its largest value the decay makes the running mean an average over examples."""
    seen, start_weight = 0, 1.0
    for n in counts:
        step = running_decay(jnp.array([seen]), jnp.array([float(n)]), 1 - 1e-9, prior)
        start_weight *= float(step[0])
        seen += n
    np.testing.assert_allclose(start_weight, prior / (prior + seen), rtol=1e-12, atol=1e-15)


def test_decay_never_exceeds_its_largest_value_and_none_is_constant():
    examples = jnp.array([8.0])
    assert running_decay(jnp.array([10**6]), examples, 0.99, 128) == 0.99
    assert running_decay(jnp.array([0]), examples, 0.99, None) == 0.99
    assert running_decay(jnp.array([0]), examples, 0.99, 0) == 0
