"""What holds over whole trainings: change of variables, invariance, accumulation, small batches, the Hessian."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_same,
    forward,
    gradients_and_records,
    init,
    make_step,
    map_statistics,
    normal,
    squared_error,
    with_statistics,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import preconditioner

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")
seeds = st.integers(0, 2**16)
EXACT = {"eps_relative": 0.0, "eps": 0.0, "scaling": "none"}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(5, param_dtype=float)(x))
        x = nn.tanh(nn.Dense(4, param_dtype=float)(x))
        return nn.Dense(2, param_dtype=float)(x)


class ConvNet(nn.Module):
    """A convolution, one that is called twice, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(3, (3, 3), param_dtype=float)(x))
        shared = nn.Conv(3, (2, 2), feature_group_count=3, use_bias=False, param_dtype=float)
        x = shared(nn.tanh(shared(x)))
        return nn.Dense(2, param_dtype=float)(x.reshape(x.shape[0], -1))


@jax.jit
def steps_in_both_variables(h, target, mu, sd, z):
    """Kernel and bias after a gradient step in z, mapped back, and after one of `bnp_sgd` with these statistics."""

    def loss(a):
        return jnp.mean(jnp.sum(jnp.tanh(a - target), axis=-1))

    def in_w(z):
        return {"w": z["w"] / sd.T, "b": (z["b"] - (mu / sd) @ z["w"]).ravel()}

    gradient = jax.grad(lambda z: loss(((h - mu) / sd) @ z["w"] + z["b"]))(z)
    expected = in_w(jax.tree.map(lambda z, g: z - 0.1 * g, z, gradient))

    params = in_w(z)
    tx = bnp.bnp_sgd(0.1, bnp.Layers((bnp.Layer.dense(("w",), params["w"].shape, bias=("b",)),)), **EXACT)
    frozen = {"mean": mu, "variance": jnp.square(sd), "damping": 0}
    state = map_statistics(lambda statistics: with_statistics(statistics, "w", **frozen), tx.init(params))
    gradients = jax.grad(lambda p: loss(h @ p["w"] + p["b"][None]))(params)
    updates, _ = tx.update(gradients, state, params, intermediates=bnp.KEEP_STATISTICS)
    return expected, optax.apply_updates(params, updates)


@pytest.mark.parametrize(("examples", "n", "m"), [(2, 1, 1), (2, 5, 4), (7, 3, 1), (12, 1, 4), (12, 5, 4)])
def test_a_step_is_a_plain_gradient_step_in_the_normalized_variables(examples, n, m):
    """`a = z_w . (h - mu) / sd + z_b` with frozen statistics, mapped back through P."""

    @settings(max_examples=5)
    @given(seeds)
    def run(seed):
        h, target, mu = normal(seed, examples, n), normal(seed + 1, examples, m), normal(seed + 2, 1, n)
        z = {"w": normal(seed + 4, n, m), "b": normal(seed + 5, 1, m)}
        expected, actual = steps_in_both_variables(h, target, mu, np.exp(normal(seed + 3, 1, n) / 4), z)
        assert_same(actual, expected)

    run()


def outputs_along_training(tx, starts, steps=8):
    """The model's outputs after each step, for each start: parameters, state, input, target."""
    step = make_step(tx, gradients_and_records(MLP(), squared_error))

    @jax.jit
    def step_and_output(params, state, x, y):
        params, state = step(params, state, x, y)
        return params, state, forward(MLP())(params, x)[0]

    trajectories = []
    for params, state, x, y in starts:
        outputs = []
        for _ in range(steps):
            params, state, output = step_and_output(params, state, x, y)
            outputs.append(output)
        trajectories.append(np.stack(outputs))
    return trajectories


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_trajectory_is_invariant_to_scaling_and_shifting_the_inputs(decay, seed):
    """Under decay 0.9 the start of the running statistics is transformed alike."""
    x, y = normal(seed, 12, 3), normal(seed + 1, 12, 2)
    scale, shift = np.exp(normal(seed + 2, 1, 3)), 5 * normal(seed + 3, 1, 3)
    params = init(MLP(), x, seed=seed)
    first = params["Dense_0"]
    kernel = first["kernel"] / scale.T
    transformed = {**params, "Dense_0": {"kernel": kernel, "bias": first["bias"] - (shift @ kernel).ravel()}}
    transformed_x = scale * x + shift

    tx = bnp.bnp_sgd(0.05, bnp.linen.find_layers(MLP(), x), decay=decay, prior_examples=None, **EXACT)
    state = jax.jit(tx.init)(params)
    transformed_state = map_statistics(
        lambda statistics: with_statistics(statistics, "Dense_0", mean=shift, variance=np.square(scale)), state
    )
    plain, same = outputs_along_training(
        tx, [(params, state, x, y), (transformed, transformed_state, transformed_x, y)]
    )
    np.testing.assert_allclose(same, plain, rtol=1e-6, atol=1e-6)
    assert np.abs(plain[-1] - plain[0]).max() > 1e-2

    sgd = optax.with_extra_args_support(optax.sgd(0.05))
    starts = [(params, sgd.init(params), x, y), (transformed, sgd.init(transformed), transformed_x, y)]
    assert not np.allclose(*outputs_along_training(sgd, starts, steps=1), rtol=1e-3)


@pytest.fixture(scope="module")
def conv_net():
    """Parameters, a batch, a function that updates from gradients and records, and what it makes of the whole batch."""
    model, x, y = ConvNet(), normal(0, 8, 5, 5, 2), normal(1, 8, 2)
    params, tx = init(model, x), bnp.scale_by_bnp(bnp.linen.find_layers(model, x), scaling=6)

    def update(params, gradients_and_records):
        gradients, records = gradients_and_records
        return tx.update(gradients, tx.init(params), intermediates=records)

    differentiate = gradients_and_records(model, squared_error)
    whole = jax.jit(lambda params, x, y: update(params, differentiate(params, x, y)))(params, x, y)
    assert whole[1]["Conv_1"].seen == 8
    return params, (x, y), update, whole


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_micro_batches_equal_one_batch(parts, conv_net):
    params, batch, update, whole = conv_net
    differentiate = gradients_and_records(ConvNet(), squared_error)

    @jax.jit
    def accumulated(params, batch):
        def micro_batch(total, batch):
            gradients, records = differentiate(params, *batch)
            return jax.tree.map(lambda t, g: t + g / parts, total, gradients), records

        batches = jax.tree.map(lambda a: a.reshape(parts, 8 // parts, *a.shape[1:]), batch)
        return update(params, jax.lax.scan(micro_batch, optax.tree.zeros_like(params), batches))

    chex.assert_trees_all_close(accumulated(params, batch), whole, rtol=1e-9, atol=1e-12)


def test_a_model_mapped_over_examples_equals_the_batched_one(conv_net):
    params, batch, update, whole = conv_net

    def run(params, x):
        predictions, records = jax.vmap(lambda one: forward(ConvNet())(params, one[None]))(x)
        return predictions[:, 0], records

    mapped = gradients_and_records(run, squared_error)
    actual = jax.jit(lambda params, x, y: update(params, mapped(params, x, y)))(params, *batch)
    chex.assert_trees_all_close(actual, whole, rtol=1e-9, atol=1e-12)


def train_online(variance, prior_examples):
    """2,000 steps of one example each: linear regression on 64 inputs of mean 3 and variance 4."""
    rng = np.random.default_rng(0)
    xs = jnp.asarray(rng.normal(3, 2, (2000, 1, 64)), jnp.float32)
    ys = xs @ jnp.asarray(rng.normal(size=(64, 1)), jnp.float32)
    params = {"w": jnp.zeros((64, 1), jnp.float32), "b": jnp.zeros(1, jnp.float32)}
    layers = bnp.Layers((bnp.Layer.dense(("w",), (64, 1), bias=("b",)),))
    tx = bnp.bnp_sgd(0.5, layers, variance=variance, prior_examples=prior_examples)

    def step(carry, batch):
        params, state = carry
        x, y = batch
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean(jnp.square(x @ p["w"] + p["b"][None] - y)))(params)
        updates, state = tx.update(gradients, state, params, intermediates={"w": bnp.input_moments(x)})
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(functools.partial(jax.lax.scan, step))
    (_, state), losses = run((params, tx.init(params)), (xs, ys))
    return state[0]["w"].variance.ravel(), losses


@pytest.mark.parametrize("prior_examples", [128, None])
def test_online_mixture_variance_is_the_true_one_and_training_converges(prior_examples):
    """Single features scatter by 10 % (about 200 examples weigh in), their average by 1.3 %."""
    variance, losses = train_online("mixture", prior_examples)
    np.testing.assert_allclose(np.mean(variance), 4, rtol=0.04)
    assert np.isfinite(losses).all()
    assert losses[-200:].mean() < 1e-3 * losses[:10].mean()


def test_online_batch_variance_decays_to_zero():
    """A single example has no variance: only the start is left, times 0.99 a step."""
    variance, losses = train_online("batch", None)
    np.testing.assert_allclose(variance, 0.99**2000, rtol=1e-3)
    assert not losses[-200:].mean() < losses[:10].mean()


def condition_number(matrix):
    """Ratio of the extreme eigenvalues of a symmetric matrix above 1e-10 of the largest."""
    eigenvalues = np.abs(np.linalg.eigvalsh(matrix))
    nonzero = eigenvalues[eigenvalues > 1e-10 * eigenvalues.max()]
    return nonzero.max() / nonzero.min()


@pytest.mark.parametrize("seed", range(3))
def test_hessian_of_a_layer_is_better_conditioned_after_the_change_of_variables(seed):
    """Inputs of deviations 0.1 to 10 and offsets of 10; the explicit Hessian in `[b; w]` of the first layer."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(200, 4)) * [0.1, 1, 3, 10] + rng.normal(0, 10, 4))
    labels = jnp.asarray(rng.integers(0, 2, 200))
    hidden, out = nn.Dense(3, param_dtype=float), nn.Dense(2, param_dtype=float)
    out_params = init(out, jnp.ones((1, 3)), seed=seed)
    record = bnp.input_moments(x)
    sd = np.sqrt(record.variance.ravel())
    # weights that keep the units out of saturation, whatever the inputs' scale
    w = jnp.asarray(rng.normal(size=(4, 3)) / sd[:, None] / 2)
    stacked = jnp.concatenate([-(record.mean.reshape(1, 4) @ w), w])

    def loss(stacked):
        h = nn.tanh(hidden.apply({"params": {"kernel": stacked[1:], "bias": stacked[0]}}, x))
        logits = out.apply({"params": out_params}, h)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    hessian = np.asarray(jax.jit(jax.hessian(loss))(stacked)).reshape(15, 15)
    p = np.kron(preconditioner(record.mean.ravel(), record.variance.ravel(), 1.0), np.eye(3))
    assert condition_number(p.T @ hessian @ p) < 1e-2 * condition_number(hessian)
