"""Batch Renormalization against Algorithm 1 written out in NumPy, and what the paper says of it."""

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same, normal, weigh
from normalizations import RAMP, both_apis, functional

from bnp_optax.contrib import batch_renormalize, batch_renormalize_inference, ramp
from bnp_optax.contrib import linen as contrib_linen
from bnp_optax.contrib import nnx as contrib_nnx

pytestmark = pytest.mark.usefixtures("x64")

ALL = float("inf")


def algorithm_1(x, mean, std, r_max, d_max, alpha=0.01, epsilon=1e-5):
    """The paper's algorithm, feature by feature; `x` is `[examples, features]`."""
    y, new_mean, new_std = np.empty_like(x), np.empty_like(mean), np.empty_like(std)
    for k in range(x.shape[1]):
        values = [x[i, k] for i in range(len(x))]
        m = sum(values) / len(values)
        s = np.sqrt(epsilon + sum((value - m) ** 2 for value in values) / len(values))
        r = min(max(s / std[k], 1 / r_max), r_max)
        d = min(max((m - mean[k]) / std[k], -d_max), d_max)
        y[:, k] = [(value - m) / s * r + d for value in values]
        new_mean[k] = mean[k] + alpha * (m - mean[k])
        new_std[k] = std[k] + alpha * (s - std[k])
    return y, new_mean, new_std


def statistics(seed, features):
    """Running means of order 1, deviations from 0.5 to 3."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0, 1, features)), jnp.asarray(rng.uniform(0.5, 3, features))


@hypothesis.given(
    shape=st.sampled_from([(1, 3), (6, 3), (4, 2, 3), (1, 3, 1), (2, 2, 2, 1)]),
    seed=st.integers(0, 2**16),
    r_max=st.floats(1, 4),
    d_max=st.floats(0, 6),
    alpha=st.floats(0, 1),
    fast=st.booleans(),
)
def test_a_step_is_algorithm_1(shape, seed, r_max, d_max, alpha, fast):
    """For vectors and for images, whose positions are pooled as well."""
    x, (mean, std) = normal(seed, *shape), statistics(seed, shape[-1])
    options = {"momentum": 1 - alpha, "use_fast_variance": fast}
    result = batch_renormalize(x, mean, std, r_max, d_max, **options)
    flat = np.asarray(x).reshape(-1, shape[-1])
    y, new_mean, new_std = algorithm_1(flat, np.asarray(mean), np.asarray(std), r_max, d_max, alpha)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if fast else {"rtol": 1e-10, "atol": 1e-10}  # E[x^2] - E[x]^2 cancels
    np.testing.assert_allclose(result.normalized.reshape(flat.shape), y, **tolerance)
    np.testing.assert_allclose(result.mean, new_mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.std, new_std, **tolerance)


@both_apis
def test_a_training_is_algorithm_1(api):
    """Thirty steps with limits that are schedules of the layer's own steps; then inference."""
    batches = [normal(seed, 4, 3, mean=seed / 10) for seed in range(30)]
    limits = ramp(hold=5, r_end=20, d_end=15)
    options = limits._asdict() | {"momentum": 0.9, "epsilon": 0.1, "use_fast_variance": False}
    layer = functional(api, "BatchRenorm", batches[0], **options)
    state, train = layer.state, jax.jit(layer.train)
    mean, std = np.zeros(3), np.ones(3)
    limited = 0
    for step, x in enumerate(batches):
        part_of_r, part_of_d = min(max((step - 5) / 15, 0), 1), min(max((step - 5) / 10, 0), 1)
        r_max, d_max = 1 + 2 * part_of_r, 5 * part_of_d
        limited += (np.sqrt(np.var(x, axis=0)) / std > r_max).any()
        expected, mean, std = algorithm_1(np.asarray(x), mean, std, r_max, d_max, alpha=0.1, epsilon=0.1)
        y, state = train(state, x)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)  # the schedules are in float32
    assert limited >= 5
    assert state["steps"] == 30
    assert state["steps"].dtype == jnp.int32
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(state["std"], std, rtol=1e-12)
    expected = (np.asarray(batches[0]) - mean) / std
    np.testing.assert_allclose(layer.evaluate(state, batches[0]), expected, rtol=1e-11, atol=1e-11)


@both_apis
@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 5, 4)])
@pytest.mark.usefixtures("standard_promotion")  # Flax's own layer
def test_without_a_correction_it_is_batch_norm_forward_and_backward(api, shape):
    x = normal(0, *shape)
    ours = functional(api, "BatchRenorm", x, r_max=1.0, d_max=0.0)
    theirs = functional("linen", "BatchNorm", x)  # NNX's has statistics in float32 alone

    def run(layer):
        def loss(trained, x):
            y, _ = layer.train(layer.state | trained, x)
            return weigh(y), y

        trained = {"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}
        return jax.grad(loss, (0, 1), has_aux=True)(trained, x)

    actual, expected = run(ours), run(theirs)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-13, atol=1e-13)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), actual[0], expected[0])


def test_without_limits_training_is_inference_with_the_averages_before_it():
    """So that each example is normalized by itself alone."""
    x, (mean, std) = normal(0, 6, 4), statistics(0, 4)
    y = batch_renormalize(x, mean, std, ALL, ALL).normalized
    np.testing.assert_allclose(y, batch_renormalize_inference(x, mean, std), rtol=1e-12, atol=1e-12)
    others = batch_renormalize(x.at[1:].set(normal(1, 5, 4)), mean, std, ALL, ALL).normalized
    np.testing.assert_allclose(others[0], y[0], rtol=1e-12, atol=1e-12)
    limited = batch_renormalize(x.at[1:].set(normal(1, 5, 4)), mean, std, 1.1, 0.1).normalized
    assert np.abs(limited[0] - y[0]).max() > 0.1


def loss_of(mean, std, r_max, d_max, gy):
    return lambda x: jnp.sum(batch_renormalize(x, mean, std, r_max, d_max).normalized * gy)


@pytest.mark.parametrize(("r_max", "d_max"), [(1.2, 0.3), (ALL, ALL)])
def test_the_gradient_is_r_times_that_of_batch_norm(r_max, d_max):
    """By the chain rule as the paper of Batch Normalization has it, with r in front; its sum over a batch is 0."""
    x, gy, (mean, std) = normal(0, 6, 4), normal(1, 6, 4), statistics(0, 4)
    gradient = jax.grad(loss_of(mean, std, r_max, d_max, gy))(x)
    of_batch_norm = jax.grad(loss_of(mean, std, 1.0, 0.0, gy))(x)
    x, gy, std = np.asarray(x), np.asarray(gy), np.asarray(std)
    s = np.sqrt(np.var(x, axis=0) + 1e-5)
    r = np.clip(s / std, 1 / r_max, r_max)
    np.testing.assert_allclose(gradient, r * np.asarray(of_batch_norm), rtol=1e-12, atol=1e-12)
    centred = (x - np.mean(x, axis=0)) / s
    chain_rule = r / s * (gy - (centred * np.mean(gy * centred, axis=0) + np.mean(gy, axis=0)))
    np.testing.assert_allclose(gradient, chain_rule, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-12)


@both_apis
def test_gradients_of_scale_and_bias(api):
    x, gy = normal(0, 6, 4), normal(1, 6, 4)
    layer = functional(api, "BatchRenorm", x)

    def loss(trained):
        return jnp.sum(layer.train(layer.state | trained, x)[0] * gy)

    gradients = jax.grad(loss)({"scale": jnp.ones(4), "bias": jnp.zeros(4)})
    np.testing.assert_allclose(gradients["scale"], jnp.sum(gy * layer.train(layer.state, x)[0], axis=0), rtol=1e-12)
    np.testing.assert_allclose(gradients["bias"], jnp.sum(gy, axis=0), rtol=1e-12)


def test_gradients_take_r_and_d_as_constants():
    """Finite differences agree with r and d held, and not where they follow the batch."""
    x, gy, (mean, std) = normal(0, 6, 4), normal(1, 6, 4), statistics(0, 4)
    r, d = (x.std(0, keepdims=True) ** 2 + 1e-5) ** 0.5 / std[None], (x.mean(0, keepdims=True) - mean[None]) / std[None]
    loss = loss_of(mean, std, ALL, ALL, gy)

    def held(x):
        centred = x - x.mean(0, keepdims=True)
        return jnp.sum((centred / jnp.sqrt(x.var(0, keepdims=True) + 1e-5) * r + d) * gy)

    def differences(function, h=1e-5):
        directions = jnp.eye(x.size).reshape(x.size, *x.shape)
        return np.reshape([(function(x + h * v) - function(x - h * v)) / (2 * h) for v in directions], x.shape)

    gradient = jax.grad(loss)(x)
    np.testing.assert_allclose(gradient, differences(jax.jit(held)), rtol=1e-6, atol=1e-7)
    assert np.abs(gradient - differences(jax.jit(loss))).max() > 0.1


def test_no_gradient_flows_through_the_running_statistics():
    x, (mean, std) = normal(0, 6, 4), statistics(0, 4)
    gradient = jax.grad(lambda x: weigh(batch_renormalize(x, mean, std, 2.0, 1.0)[1:]))(x)
    np.testing.assert_array_equal(gradient, 0)


def test_the_averages_of_this_very_batch_need_no_correction():
    """After a step with momentum 0, r is 1 and d is 0 on the same batch."""
    x, (mean, std) = normal(0, 6, 4), statistics(0, 4)
    after = batch_renormalize(x, mean, std, 2.0, 1.0, momentum=0.0)
    y = batch_renormalize(x, after.mean, after.std, ALL, ALL).normalized
    np.testing.assert_allclose(y, batch_renormalize(x, mean, std, 1.0, 0.0).normalized, rtol=1e-12, atol=1e-12)


def folded(x, mean, std, r_max, d_max, epsilon):
    """What some implementations compute: r and d folded into a mean and variance to which epsilon is added again."""
    m, variance = np.mean(x, axis=0), np.var(x, axis=0)
    r = np.clip(np.sqrt(variance + epsilon) / std, 1 / r_max, r_max)
    d = np.clip((m - mean) / std, -d_max, d_max)
    return (r * (x - m) + d * np.sqrt(variance)) / np.sqrt(variance + r**2 * epsilon)


def test_a_batch_of_one_is_normalized_by_the_running_statistics_alone():
    """Up to the limit of d, and without a gradient; with epsilon added twice it would be exactly 0."""
    x, (mean, std) = normal(0, 1, 4, deviation=6), statistics(0, 4)
    exact = np.asarray((x[0] - mean) / std)
    assert np.abs(exact).max() > 1 > np.abs(exact).min()
    y = batch_renormalize(x, mean, std, 3.0, 1.0, epsilon=1e-3).normalized
    np.testing.assert_allclose(y[0], np.clip(exact, -1, 1), rtol=1e-14)
    gradient = jax.grad(loss_of(mean, std, 3.0, 1.0, normal(1, 1, 4)))(x)
    np.testing.assert_array_equal(gradient, 0)
    x, mean, std = (np.asarray(each) for each in (x, mean, std))
    np.testing.assert_array_equal(folded(x, mean, std, 3.0, 1.0, 1e-3), 0)


def test_epsilon_enters_once():
    """Where the batch is narrow, what adds it twice differs."""
    x, mean, std = (np.asarray(each) for each in (normal(0, 8, 4, deviation=0.04), *statistics(0, 4)))
    ours = batch_renormalize(x, jnp.asarray(mean), jnp.asarray(std), 3.0, 5.0, epsilon=1e-3).normalized
    right, _, _ = algorithm_1(x, mean, std, 3.0, 5.0, epsilon=1e-3)
    np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-9)
    assert np.abs(folded(x, mean, std, 3.0, 5.0, 1e-3) - right).max() > 0.01


def test_limits_are_reached_exactly():
    x = jnp.array([[-1.0, 9.0, -7.0], [1.0, 11.0, -9.0]])
    mean, std = jnp.zeros(3), jnp.array([0.1, 10.0, 1.0])
    y = batch_renormalize(x, mean, std, 2.0, 0.5, epsilon=0.0).normalized  # r = 2, 1/2, 1; d = 0, 1/2, -1/2
    np.testing.assert_array_equal(y, [[-2.0, 0.0, 0.5], [2.0, 1.0, -1.5]])


def test_a_constant_feature_is_finite():
    x = jnp.full((5, 2), 3.0)
    result = batch_renormalize(x, jnp.zeros(2), jnp.ones(2), 2.0, 5.0)
    np.testing.assert_allclose(result.normalized, 3.0)
    assert np.isfinite(jax.grad(loss_of(jnp.zeros(2), jnp.ones(2), 2.0, 5.0, x))(x)).all()


def test_averages_are_of_deviations_and_hold_epsilon_already():
    mean, std = jnp.zeros(1), jnp.ones(1)
    for deviation in (2.0, 5.0):
        x = jnp.array([[-deviation], [deviation]])
        _, mean, std = batch_renormalize(x, mean, std, 1.0, 0.0, momentum=0.5, epsilon=11.0)
    expected = ((1 + np.sqrt(4 + 11)) / 2 + np.sqrt(25 + 11)) / 2
    np.testing.assert_allclose(std, expected, rtol=1e-14)
    np.testing.assert_allclose(batch_renormalize_inference(jnp.ones((1, 1)), mean, std), [[1 / expected]], rtol=1e-14)


def test_the_ramp_of_the_paper():
    limits = ramp()
    for step, r_max, d_max in [
        (0, 1, 0),
        (5000, 1, 0),
        (22500, 2, 4.375),
        (25000, 2.142857, 5),
        (40000, 3, 5),
        (10**6, 3, 5),
    ]:
        np.testing.assert_allclose([limits.r_max(step), limits.d_max(step)], [r_max, d_max], rtol=1e-6)
    for layer in (contrib_linen.BatchRenorm(), contrib_nnx.BatchRenorm(1, rngs=nnx.Rngs(0))):
        assert (layer.r_max(40000), layer.d_max(22500)) == (3, 4.375)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hold": -1}, "hold is -1"),
        ({"hold": 100, "r_end": 100}, "r_end 100"),
        ({"hold": 100, "d_end": 50}, "d_end 50"),
        ({"r_max": 0.5}, r"r_max is 0\.5, which must be 1 or more"),
        ({"d_max": -1.0}, r"d_max is -1\.0, which must be 0 or more"),
    ],
)
def test_ramps_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        ramp(**arguments)


@both_apis
@pytest.mark.parametrize(("limit", "value"), [("r_max", 0.9), ("r_max", float("nan")), ("d_max", -0.1)])
def test_limits_that_are_none(api, limit, value):
    x = normal(0, 6, 4)

    def use():  # Linen's refuses when it is initialized
        layer = functional(api, "BatchRenorm", x, **{limit: value})
        layer.train(layer.state, x)

    with pytest.raises(ValueError, match=f"{limit} is {value}"):
        use()


@both_apis
def test_limits_follow_the_steps_of_the_layer(api):
    """Also when a training is continued from the middle; evaluation does not count."""
    x = normal(0, 6, 4)
    layer = functional(api, "BatchRenorm", x, r_max=RAMP.r_max, d_max=RAMP.d_max)
    for step in range(8):
        state = layer.state | {"steps": jnp.int32(step)}
        fixed = functional(api, "BatchRenorm", x, r_max=float(RAMP.r_max(step)), d_max=float(RAMP.d_max(step)))
        y, after = layer.train(state, x)
        assert_same(y, fixed.train(fixed.state, x)[0])
        assert after["steps"] == step + 1


def test_the_weights_before_it_lose_their_free_scale_but_stay_orthogonal_to_their_gradient():
    """Batch Normalization does not see the scale of a kernel; Batch Renormalization does, as inference does."""
    x, w, (mean, std) = normal(0, 8, 3), normal(1, 3, 4, mean=0), statistics(0, 4)

    def loss(w, r_max, d_max):
        return weigh(batch_renormalize(x @ w, mean, std, r_max, d_max, epsilon=0.0).normalized)

    for r_max, d_max, free in [(1.0, 0.0, True), (ALL, ALL, False)]:
        gradient = jax.grad(loss)(w, r_max, d_max)
        np.testing.assert_allclose(jnp.sum(w * gradient, axis=0), 0, atol=1e-12)
        change = abs(loss(1.5 * w, r_max, d_max) - loss(w, r_max, d_max))
        assert change < 1e-12 if free else change > 0.01


def test_statistics_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"running statistic is of 3 features, but an input of shape \(6, 4\) has 4"):
        batch_renormalize(normal(0, 6, 4), jnp.zeros(3), jnp.ones(4), 1.0, 0.0)


def test_a_network_trains_and_is_evaluated_alike_on_batches_of_one_class():
    """Batch Normalization's running statistics never fit what its batches of one class showed it; these do."""

    class Network(nn.Module):
        norm: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(self.norm(nn.Dense(8)(x))))

    rng = np.random.default_rng(0)
    centres = rng.normal(0, 3, (3, 5))
    labels = np.arange(3).repeat(8)
    x = jnp.asarray(centres[labels] + rng.normal(0, 1, (24, 5)), jnp.float32)

    def accuracy(norm, steps=600):
        train_model, test_model = (
            Network(norm.clone(use_running_average=average, momentum=0.9)) for average in (False, True)
        )
        variables = train_model.init(jax.random.key(0), x)

        def step(variables, k):
            batch = jax.lax.dynamic_slice_in_dim(x, 8 * (k % 3), 8)

            def loss(params):
                logits, new = train_model.apply(variables | {"params": params}, batch, mutable=["batch_stats"])
                return -jnp.mean(jax.nn.log_softmax(logits)[:, k % 3]), new

            gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
            params = jax.tree.map(lambda p, g: p - jnp.float32(0.05) * g, variables["params"], gradients)
            return {"params": params, **new}, None

        variables, _ = jax.jit(lambda variables: jax.lax.scan(step, variables, jnp.arange(steps)))(variables)
        return np.mean(np.asarray(test_model.apply(variables, x)).argmax(-1) == labels)

    limits = ramp(hold=30, r_end=240, d_end=150)
    assert accuracy(contrib_linen.BatchRenorm(r_max=limits.r_max, d_max=limits.d_max)) > 0.95
    assert accuracy(nn.BatchNorm()) < 0.8
