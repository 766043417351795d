"""What holds over whole trainings: change of variables, invariance, accumulation, small batches, the Hessian."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import with_statistics
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


def apply_recorded(model, params, x):
    with bnp.linen.record_inputs():
        y, recorded = model.apply({"params": params}, x, mutable=["intermediates"])
    return y, recorded["intermediates"]


def gradients_and_records(model, params, x, y):
    def loss_fn(params):
        prediction, recorded = apply_recorded(model, params, x)
        return jnp.mean(jnp.sum(jnp.square(prediction - y), axis=-1)), recorded

    return jax.grad(loss_fn, has_aux=True)(params)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, shape))


@settings(max_examples=10)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 4), seeds)
def test_a_step_is_a_plain_gradient_step_in_the_normalized_variables(examples, n, m, seed):
    """`a = z_w . (h - mu) / sd + z_b` with frozen statistics, mapped back through P."""
    h, target, mu = normal(seed, examples, n), normal(seed + 1, examples, m), normal(seed + 2, 1, n)
    sd = jnp.exp(normal(seed + 3, 1, n) / 4)
    w, b = normal(seed + 4, n, m), normal(seed + 5, 1, m)

    def loss(a):
        return jnp.mean(jnp.sum(jnp.tanh(a - target), axis=-1))

    def loss_in_z(z):
        return loss(((h - mu) / sd) @ z["w"] + z["b"])

    z = {"w": w * sd.T, "b": b + mu @ w}
    z = jax.tree.map(lambda z, g: z - 0.1 * g, z, jax.grad(loss_in_z)(z))
    expected = {"w": z["w"] / sd.T, "b": z["b"] - (mu / sd) @ z["w"]}

    params = {"w": w, "b": b.ravel()}
    tx = bnp.bnp_sgd(0.1, bnp.Layers((bnp.Layer.dense(("w",), (n, m), bias=("b",)),)), **EXACT)
    state = tx.init(params)
    frozen = with_statistics(state[0], "w", mean=mu, variance=jnp.square(sd), damping=0)
    gradients = jax.grad(lambda p: loss(h @ p["w"] + p["b"][None]))(params)
    updates, _ = tx.update(gradients, (frozen, *state[1:]), params, intermediates=bnp.KEEP_STATISTICS)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["w"], expected["w"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(new["b"], expected["b"].ravel(), rtol=1e-9, atol=1e-9)


def outputs_along_training(tx, params, state, x, y, steps=8):
    @jax.jit
    def train_step(params, state):
        gradients, records = gradients_and_records(MLP(), params, x, y)
        if isinstance(state[0], bnp.Statistics):
            updates, state = tx.update(gradients, state, params, intermediates=records)
        else:
            updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    outputs = []
    for _ in range(steps):
        params, state = train_step(params, state)
        outputs.append(MLP().apply({"params": params}, x))
    return jnp.stack(outputs)


@settings(max_examples=8)
@given(st.sampled_from([0.0, 0.9]), seeds)
def test_trajectory_is_invariant_to_scaling_and_shifting_the_inputs(decay, seed):
    """Under decay 0.9 the start of the running statistics is transformed alike."""
    x, y = normal(seed, 12, 3), normal(seed + 1, 12, 2)
    scale, shift = jnp.exp(normal(seed + 2, 1, 3)), 5 * normal(seed + 3, 1, 3)
    params = MLP().init(jax.random.key(seed), x)["params"]
    first = params["Dense_0"]
    kernel = first["kernel"] / scale.T
    transformed = {**params, "Dense_0": {"kernel": kernel, "bias": first["bias"] - (shift @ kernel).ravel()}}
    transformed_x = scale * x + shift

    tx = bnp.bnp_sgd(0.05, bnp.linen.find_layers(MLP(), x), decay=decay, prior_examples=None, **EXACT)
    state, transformed_state = tx.init(params), tx.init(transformed)
    start = with_statistics(transformed_state[0], "Dense_0", mean=shift, variance=jnp.square(scale))
    transformed_state = (start, *transformed_state[1:])

    plain = outputs_along_training(tx, params, state, x, y)
    same = outputs_along_training(tx, transformed, transformed_state, transformed_x, y)
    np.testing.assert_allclose(same, plain, rtol=1e-6, atol=1e-6)
    assert np.abs(plain[-1] - plain[0]).max() > 1e-2

    sgd = optax.sgd(0.05)
    sgd_plain = outputs_along_training(sgd, params, sgd.init(params), x, y, steps=1)
    sgd_transformed = outputs_along_training(sgd, transformed, sgd.init(transformed), transformed_x, y, steps=1)
    assert not np.allclose(sgd_plain, sgd_transformed, rtol=1e-3)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_micro_batches_equal_one_batch(parts):
    x, y = normal(0, 8, 5, 5, 2), normal(1, 8, 2)
    model = ConvNet()
    params = model.init(jax.random.key(0), x)["params"]
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x), scaling=6)

    def micro_batch(total, batch):
        gradients, records = gradients_and_records(model, params, *batch)
        return jax.tree.map(lambda t, g: t + g / parts, total, gradients), records

    batches = jax.tree.map(lambda a: a.reshape(parts, 8 // parts, *a.shape[1:]), (x, y))
    gradients, records = jax.lax.scan(micro_batch, optax.tree.zeros_like(params), batches)
    accumulated = tx.update(gradients, tx.init(params), intermediates=records)

    gradients, records = gradients_and_records(model, params, x, y)
    whole = tx.update(gradients, tx.init(params), intermediates=records)
    chex.assert_trees_all_close(accumulated, whole, rtol=1e-9, atol=1e-12)
    assert whole[1]["Conv_1"].seen == 8


def test_a_model_mapped_over_examples_equals_the_batched_one():
    x, y = normal(0, 8, 5, 5, 2), normal(1, 8, 2)
    model = ConvNet()
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params):
        predictions, recorded = jax.vmap(lambda one: apply_recorded(model, params, one[None]))(x)
        return jnp.mean(jnp.sum(jnp.square(predictions[:, 0] - y), axis=-1)), recorded

    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x))
    gradients, records = jax.grad(loss_fn, has_aux=True)(params)
    mapped = tx.update(gradients, tx.init(params), intermediates=records)
    gradients, records = gradients_and_records(model, params, x, y)
    batched = tx.update(gradients, tx.init(params), intermediates=records)
    chex.assert_trees_all_close(mapped, batched, rtol=1e-9, atol=1e-12)


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
        updates, state = tx.update(gradients, state, params, intermediates={"w_input": bnp.input_moments(x)})
        return (optax.apply_updates(params, updates), state), loss

    (_, state), losses = jax.lax.scan(step, (params, tx.init(params)), (xs, ys))
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
    out_params = out.init(jax.random.key(seed), jnp.ones((1, 3)))["params"]
    record = bnp.input_moments(x)
    sd = np.sqrt(record.variance.ravel())
    # weights that keep the units out of saturation, whatever the inputs' scale
    w = jnp.asarray(rng.normal(size=(4, 3)) / sd[:, None] / 2)
    stacked = jnp.concatenate([-(record.mean.reshape(1, 4) @ w), w])

    def loss(stacked):
        h = nn.tanh(hidden.apply({"params": {"kernel": stacked[1:], "bias": stacked[0]}}, x))
        logits = out.apply({"params": out_params}, h)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    hessian = np.asarray(jax.hessian(loss)(stacked)).reshape(15, 15)
    p = np.kron(preconditioner(record.mean.ravel(), record.variance.ravel(), 1.0), np.eye(3))
    assert condition_number(p.T @ hessian @ p) < 1e-2 * condition_number(hessian)
