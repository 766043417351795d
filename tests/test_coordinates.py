"""The change of variables of one layer against its definition, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnp_optax.coordinates import Coordinates
from bnp_optax.moments import absorb, batch_scale, input_moments
from bnp_optax.trees import Weights

pytestmark = pytest.mark.usefixtures("x64")

# stack, group, input, window, output: few, so that each is compiled once
shapes = st.sampled_from([(1, 1, 1, 1, 1), (1, 1, 4, 1, 3), (3, 1, 2, 1, 2), (1, 2, 3, 4, 1), (2, 3, 1, 2, 4)])
large_shapes = st.sampled_from([(1, 1, 64, 1, 64), (2, 1, 30, 9, 10), (1, 4, 16, 9, 8)])  # for which sums are products
seeds = st.integers(0, 2**16)
EPS = oracles.EPS


def assert_close(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=1e-10, atol=1e-10)


def coordinates(mean, moment, q2, eps=EPS):
    """From mean and moment `[stack, group, input]` and q2 `[stack]`; with a bias the moment is the variance."""
    mean, moment, q2 = (np.asarray(x) for x in (mean, moment, q2))
    s = moment + eps[0] * moment.max(-1, keepdims=True) + eps[1]
    q = np.sqrt(q2)[:, None, None]
    rate = np.divide(1, q * np.sqrt(s), out=np.zeros_like(s), where=s > 0)
    bias_rate = np.broadcast_to(1 / q, (*mean.shape[:2], 1))
    return Coordinates(*(jnp.asarray(x) for x in (mean[..., None, None], rate[..., None, None], bias_rate)))


@functools.partial(jax.jit, static_argnums=0)
def apply(method, of_layer, weights):
    return method(of_layer, weights)


def random_layer(seed, shape):
    """Weights, or gradients, in canonical shape, with the mean, variance and scale of a layer."""
    rng = np.random.default_rng(seed)
    stack, group, inputs, _, outputs = shape
    weights = Weights(jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=(stack, group, outputs))))
    mean, variance = rng.normal(0, 3, (stack, group, inputs)), rng.uniform(0.1, 9, (stack, group, inputs))
    return weights, mean, variance, rng.uniform(1, 5, stack)


def dense(kernel, bias=None):
    """A dense layer's arrays in canonical shape."""
    return Weights(jnp.asarray(kernel)[None, None, :, None], None if bias is None else jnp.asarray(bias)[None, None])


@functools.partial(jax.jit, static_argnums=4)
def absorb_batch(h, mean, variance, rho, rule):
    """The paper's mean and variance of a dense layer after a batch, and its q2."""
    record = input_moments(h)
    examples = record.examples.astype(h.dtype)
    return *absorb(mean, variance, record.mean, record.variance, rho, rule), batch_scale(h.shape[1], examples)


moments_of = jax.jit(input_moments)


@pytest.mark.parametrize(("examples", "n", "m"), [(1, 1, 1), (1, 4, 3), (6, 2, 1), (3, 4, 2)])
@given(rho=st.floats(0, 0.99), rule=st.sampled_from(["mixture", "batch"]), seed=seeds)
def test_dense_step_equals_the_papers_five_lines(examples, n, m, rho, rule, seed):
    rng = np.random.default_rng(seed)
    h, g_w, g_b = rng.normal(2, 3, (examples, n)), rng.normal(size=(n, m)), rng.normal(size=m)
    mu, var = rng.normal(size=n), rng.uniform(0.5, 2, n)
    statistics = oracles.absorbed(mu, var, h, rho, rule)
    expected = oracles.bnp_step(*statistics, g_w, g_b, max(n / examples, 1))
    mean, variance, q2 = absorb_batch(h, mu[None, None], var[None, None], rho, rule)
    kernel, bias = apply(Coordinates.precondition, coordinates(mean, variance, q2), dense(g_w, g_b))
    for actual, desired in zip((kernel, bias, mean, variance), (*expected, *statistics), strict=True):
        assert_close(actual.reshape(desired.shape), desired)


@pytest.mark.parametrize(
    ("method", "matrix"),
    [
        (Coordinates.from_z, lambda p: p),
        (Coordinates.gradient_in_z, lambda p: p.T),
        (Coordinates.to_z, np.linalg.inv),
        (Coordinates.precondition, lambda p: p @ p.T),
    ],
    ids=["P", "P'", "P^-1", "P P'"],
)
@given(shape=st.one_of(shapes, large_shapes), seed=seeds, with_bias=st.booleans())
def test_each_map_is_its_dense_matrix(method, matrix, shape, seed, with_bias):
    (kernel, bias), mean, variance, q2 = random_layer(seed, shape)
    moment = variance if with_bias else variance + mean**2
    new = apply(method, coordinates(mean, moment, q2), Weights(kernel, bias if with_bias else None))
    assert (new.bias is None) != with_bias
    window = shape[3]
    for s, g, o in list(np.ndindex(shape[0], shape[1], shape[4]))[:8]:
        sd2 = np.repeat(moment[s, g] + EPS[0] * moment[s, g].max() + EPS[1], window)
        # without a bias the first row and column belong to nothing
        p = oracles.preconditioner(np.repeat(mean[s, g], window) if with_bias else np.zeros(sd2.size), sd2, q2[s])
        expected = matrix(p) @ np.append(bias[s, g, o] if with_bias else 0, kernel[s, g, :, :, o])
        assert_close(new.kernel[s, g, :, :, o].ravel(), expected[1:])
        if with_bias:
            assert_close(new.bias[s, g, o], expected[0])


@given(shapes, seeds, st.floats(-3, 3), st.booleans())
def test_all_maps_are_linear(shape, seed, factor, with_bias):
    weights, *layer = random_layer(seed, shape)
    other, *_ = random_layer(seed + 1, shape)
    of_layer = coordinates(*layer)
    if not with_bias:
        weights, other = weights._replace(bias=None), other._replace(bias=None)
    for method in (Coordinates.from_z, Coordinates.gradient_in_z, Coordinates.to_z, Coordinates.precondition):
        summed = apply(method, of_layer, jax.tree.map(lambda a, b: a + factor * b, weights, other))
        parts = apply(method, of_layer, weights), apply(method, of_layer, other)
        jax.tree.map(lambda whole, a, b: assert_close(whole, a + factor * b), summed, *parts)


@given(st.integers(1, 6), shapes, seeds)
def test_up_to_c_examples_a_batch_steps_as_far_as_its_examples_one_by_one(examples, shape, seed):
    """One learning rate serves all batches: with ``scaling=C`` the step of a mean over N examples sums up theirs."""
    rng = np.random.default_rng(seed)
    _, mean, variance, _ = random_layer(seed, shape)
    stack, group, _, _, outputs = shape
    kernels, biases = rng.normal(size=(examples, *shape)), rng.normal(size=(examples, stack, group, outputs))

    def step(kernel, bias, n):
        q2 = batch_scale(6.0, jnp.full(stack, float(n)))
        weights = Weights(jnp.asarray(kernel), jnp.asarray(bias))
        return apply(Coordinates.precondition, coordinates(mean, variance, q2), weights)

    one_by_one = [step(kernel, bias, 1) for kernel, bias in zip(kernels, biases, strict=True)]
    whole = step(kernels.mean(0), biases.mean(0), examples)
    jax.tree.map(lambda *parts: assert_close(parts[0], sum(parts[1:])), whole, *one_by_one)


@pytest.mark.parametrize(("examples", "n", "m"), [(2, 1, 1), (2, 4, 3), (8, 3, 1), (8, 4, 4)])
@given(seed=seeds)
def test_shifting_the_inputs_leaves_the_kernel_gradient(examples, n, m, seed):
    """With the mean converged: G_w of shifted inputs is G_w + shift G_b, and centring undoes it."""
    rng = np.random.default_rng(seed)
    h, delta, shift = rng.normal(size=(examples, n)), rng.normal(size=(examples, m)), rng.normal(0, 10, n)

    def step(h):
        record = moments_of(h)
        of_layer = coordinates(record.mean, record.variance, np.ones(1))
        return apply(Coordinates.precondition, of_layer, dense(h.T @ delta, delta.sum(0)))

    assert_close(step(h + shift).kernel, step(h).kernel)


@pytest.mark.parametrize("eps", [EPS, (0.0, 0.0)])
@pytest.mark.parametrize(("examples", "n", "m"), [(1, 1, 1), (2, 4, 3), (8, 3, 1)])
@given(seed=seeds)
def test_constant_feature_gets_a_zero_kernel_gradient(examples, n, m, eps, seed):
    rng = np.random.default_rng(seed)
    h, delta = rng.normal(size=(examples, n)), rng.normal(size=(examples, m))
    h[:, 0] = 5
    record = moments_of(h)
    of_layer = coordinates(record.mean, record.variance, np.ones(1), eps)
    kernel, bias = apply(Coordinates.precondition, of_layer, dense(h.T @ delta, delta.sum(0)))
    np.testing.assert_allclose(kernel[:, :, 0], 0, atol=1e-9)
    assert np.isfinite(bias).all()


@pytest.mark.parametrize("eps", [EPS, (0.0, 0.0)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_dead_layer_stays_finite(eps, with_bias):
    """Every input 0: the kernel has no gradient, the bias keeps its own, and without damping z has no kernel."""
    zeros = np.zeros((1, 1, 3))
    of_layer = coordinates(zeros, zeros, np.ones(1), eps)
    kernel, bias = of_layer.precondition(dense(np.zeros((3, 2)), np.ones(2) if with_bias else None))
    np.testing.assert_array_equal(kernel, 0)
    if with_bias:
        np.testing.assert_array_equal(bias, 1)
    kernel, _ = of_layer.to_z(dense(np.ones((3, 2)), np.ones(2) if with_bias else None))
    np.testing.assert_allclose(kernel, np.sqrt(eps[1]))


@pytest.mark.parametrize("full_step", [16, np.float32(16), jnp.asarray(16), jnp.array([16.0, 16.0])])
def test_scale_of_a_batch(full_step):
    np.testing.assert_array_equal(batch_scale(full_step, jnp.array([4.0, 64.0])), [4, 1])


def test_gradients_of_the_variables_are_finite_where_p_is_zero():
    mean, moment = np.zeros((1, 1, 2)), np.array([[[0.0, 4.0]]])
    of_layer = coordinates(mean, moment, np.ones(1), eps=(0.0, 0.0))
    gradient = jax.grad(lambda kernel: of_layer.to_z(dense(kernel)).kernel.sum())(np.ones((2, 3)))
    assert_close(gradient, [[0.0] * 3, [2.0] * 3])  # sd is 2
    of_rate = jax.grad(lambda rate: of_layer._replace(rate=rate).to_z(dense(np.ones((2, 3)))).kernel.sum())
    assert np.isfinite(of_rate(of_layer.rate)).all()
