"""The formula for one layer against its definition, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import paper_dense_step, preconditioner

from bnp_optax.moments import absorb, input_moments
from bnp_optax.precondition import batch_scale, precondition

pytestmark = pytest.mark.usefixtures("x64")

sizes = st.integers(1, 4)
shapes = st.tuples(sizes, sizes, sizes, sizes, sizes)  # stack, group, input, window, output
seeds = st.integers(0, 2**16)
EPS = {"eps_relative": 1e-2, "eps": 1e-4}
NO_EPS = {"eps_relative": 0.0, "eps": 0.0}


def random_layer(seed, shape):
    """Gradients of a kernel and bias, mean, variance and scale, in canonical shape."""
    rng = np.random.default_rng(seed)
    stack, group, inputs, _, outputs = shape
    return (
        jnp.asarray(rng.normal(size=shape)),
        jnp.asarray(rng.normal(size=(stack, group, outputs))),
        jnp.asarray(rng.normal(0, 3, (stack, group, inputs))),
        jnp.asarray(rng.uniform(0.1, 9, (stack, group, inputs))),
        jnp.asarray(rng.uniform(1, 5, stack)),
    )


def assert_close(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=1e-10, atol=1e-10)


@given(st.integers(1, 6), sizes, sizes, st.floats(0, 0.99), st.booleans(), seeds)
def test_dense_step_equals_the_papers_five_lines(examples, n, m, rho, mixture, seed):
    rng = np.random.default_rng(seed)
    h, g_w, g_b = rng.normal(2, 3, (examples, n)), rng.normal(size=(n, m)), rng.normal(size=m)
    mu, var = rng.normal(size=n), rng.uniform(0.5, 2, n)
    q2 = max(n / examples, 1)
    expected = paper_dense_step(h, g_w, g_b, mu, var, rho, 1e-2, 1e-4, q2, mixture)

    record = input_moments(jnp.asarray(h))
    mean, variance = absorb(
        mu[None, None], var[None, None], record, jnp.full(1, rho), "mixture" if mixture else "batch"
    )
    scale = batch_scale("examples", n, record.examples, record.positions)
    kernel, bias = precondition(
        jnp.asarray(g_w)[None, None, :, None], jnp.asarray(g_b)[None, None], mean, variance, scale, **EPS
    )
    for actual, desired in zip((kernel, bias, mean, variance), expected, strict=True):
        assert_close(actual.reshape(desired.shape), desired)


@given(shapes, seeds)
def test_step_is_the_dense_matrix_p_p_transposed(shape, seed):
    kernel, bias, mean, variance, scale = random_layer(seed, shape)
    new_kernel, new_bias = precondition(kernel, bias, mean, variance, scale, **EPS)
    window = shape[3]
    for s, g, o in np.ndindex(shape[0], shape[1], shape[4]):
        damped = variance[s, g] + 1e-2 * variance[s, g].max() + 1e-4
        p = preconditioner(np.repeat(mean[s, g], window), np.repeat(damped, window), scale[s])
        gradient = np.concatenate([bias[s, g, o, None], kernel[s, g, :, :, o].ravel()])
        expected = p @ p.T @ gradient
        assert_close(new_bias[s, g, o], expected[0])
        assert_close(new_kernel[s, g, :, :, o].ravel(), expected[1:])


@given(st.integers(1, 6), shapes, seeds)
def test_up_to_c_examples_a_batch_steps_as_far_as_its_examples_one_by_one(examples, shape, seed):
    """One learning rate serves all batches: with ``scaling=C`` the step of a mean over N examples sums up theirs."""
    rng = np.random.default_rng(seed)
    _, _, mean, variance, _ = random_layer(seed, shape)
    stack, group, _, _, outputs = shape
    kernels, biases = rng.normal(size=(examples, *shape)), rng.normal(size=(examples, stack, group, outputs))

    def step(kernel, bias, n):
        scale = batch_scale(6.0, 1, jnp.full(stack, float(n)), jnp.full(stack, float(n)))
        return precondition(jnp.asarray(kernel), jnp.asarray(bias), mean, variance, scale, **EPS)

    one_by_one = [step(kernel, bias, 1) for kernel, bias in zip(kernels, biases, strict=True)]
    for whole, parts in zip(
        step(kernels.mean(0), biases.mean(0), examples), zip(*one_by_one, strict=True), strict=True
    ):
        assert_close(whole, sum(parts))


@given(shapes, seeds)
def test_without_bias_the_raw_second_moment_scales(shape, seed):
    kernel, _, mean, variance, scale = random_layer(seed, shape)
    new_kernel, new_bias = precondition(kernel, None, mean, variance, scale, **EPS)
    second = np.asarray(variance + mean**2)
    damped = second + 1e-2 * second.max(-1, keepdims=True) + 1e-4
    assert new_bias is None
    assert_close(new_kernel * np.asarray(scale)[:, None, None, None, None] * damped[..., None, None], kernel)


@given(shapes, seeds, st.floats(-3, 3), st.booleans())
def test_step_is_linear_in_the_gradient(shape, seed, factor, with_bias):
    kernel, bias, *layer = random_layer(seed, shape)
    other_kernel, other_bias, *_ = random_layer(seed + 1, shape)
    if not with_bias:
        bias = other_bias = None

    def step(kernel, bias):
        return precondition(kernel, bias, *layer, **EPS)

    summed = step(kernel + factor * other_kernel, bias + factor * other_bias if with_bias else None)
    separate = jax.tree.map(lambda a, b: a + factor * b, step(kernel, bias), step(other_kernel, other_bias))
    jax.tree.map(assert_close, summed, separate)


@given(shapes, seeds)
def test_entries_of_a_stack_and_groups_are_separate_layers(shape, seed):
    kernel, bias, mean, variance, scale = random_layer(seed, shape)
    whole_kernel, whole_bias = precondition(kernel, bias, mean, variance, scale, **EPS)
    for s, g in np.ndindex(shape[:2]):
        one = np.s_[s : s + 1, g : g + 1]
        layer = precondition(kernel[one], bias[one], mean[one], variance[one], scale[s : s + 1], **EPS)
        assert_close(whole_kernel[one], layer[0])
        assert_close(whole_bias[one], layer[1])


@given(st.integers(2, 8), sizes, sizes, seeds)
def test_shifting_the_inputs_leaves_the_kernel_gradient(examples, n, m, seed):
    """With the mean converged: G_w of shifted inputs is G_w + shift G_b, and centring undoes it."""
    rng = np.random.default_rng(seed)
    h, delta, shift = rng.normal(size=(examples, n)), rng.normal(size=(examples, m)), rng.normal(0, 10, n)

    def step(h):
        record = input_moments(jnp.asarray(h))
        g_w, g_b = jnp.asarray(h.T @ delta)[None, None, :, None], jnp.asarray(delta.sum(0))[None, None]
        return precondition(g_w, g_b, record.mean, record.variance, jnp.ones(1), **EPS)[0]

    assert_close(step(h + shift), step(h))


@given(st.integers(1, 8), sizes, sizes, seeds, st.sampled_from([EPS, NO_EPS]))
def test_constant_feature_gets_a_zero_kernel_gradient(examples, n, m, seed, damping):
    rng = np.random.default_rng(seed)
    h, delta = rng.normal(size=(examples, n)), rng.normal(size=(examples, m))
    h[:, 0] = 5
    record = input_moments(jnp.asarray(h))
    g_w, g_b = jnp.asarray(h.T @ delta)[None, None, :, None], jnp.asarray(delta.sum(0))[None, None]
    kernel, bias = precondition(g_w, g_b, record.mean, record.variance, jnp.ones(1), **damping)
    np.testing.assert_allclose(kernel[:, :, 0], 0, atol=1e-9)
    assert np.isfinite(bias).all()


@pytest.mark.parametrize("damping", [EPS, NO_EPS])
@pytest.mark.parametrize("with_bias", [True, False])
def test_dead_layer_stays_finite(damping, with_bias):
    """Every input 0: the kernel has no gradient, and the bias keeps its own."""
    zeros = jnp.zeros((1, 1, 3))
    bias = jnp.ones((1, 1, 2)) if with_bias else None
    kernel, bias = precondition(jnp.zeros((1, 1, 3, 1, 2)), bias, zeros, zeros, jnp.ones(1), **damping)
    np.testing.assert_array_equal(kernel, 0)
    if with_bias:
        np.testing.assert_array_equal(bias, 1)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (16, [4.0, 1.0]),
        (np.float32(16), [4.0, 1.0]),
        ("examples", [9.0, 1.0]),
        ("positions", [1.0, 1.0]),
        ("bound", [49.0, 49.0]),
        ("none", [1.0, 1.0]),
    ],
)
def test_scale_rules(scaling, expected):
    """F = 36, N = 4 and 64, S = 49."""
    examples = jnp.array([4.0, 64.0])
    np.testing.assert_array_equal(batch_scale(scaling, 36, examples, examples * 49), expected)


@pytest.mark.parametrize("scaling", ["examples", "positions", "bound"])
def test_scale_rules_agree_for_a_dense_layer(scaling):
    examples = jnp.array([4.0, 64.0])
    np.testing.assert_array_equal(batch_scale(scaling, 36, examples, examples), [9, 1])
