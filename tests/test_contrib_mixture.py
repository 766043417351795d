"""Mixture Normalization against EM and formula written out in NumPy, scikit-learn's mixture, and Flax's BatchNorm."""

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same, normal, weigh
from mixtures import inference, modes, normalized_by, probabilities, some_mixture, step, written_out
from sklearn.mixture import GaussianMixture

from bnp_optax.contrib import Mixture, initial_mixture, mixture_normalize
from bnp_optax.contrib import linen as contrib_linen
from bnp_optax.contrib import nnx as contrib_nnx

pytestmark = pytest.mark.usefixtures("x64")

both_apis = pytest.mark.parametrize("api", ["linen", "nnx"])
start_of = jax.jit(initial_mixture, static_argnums=(0, 1, 2))


def in_units(x, weights, means, variances):
    """A mixture in units of the batch's moments."""
    mean, var = np.mean(np.asarray(x), 0), np.var(np.asarray(x), 0)
    return Mixture(jnp.asarray(weights), jnp.asarray((means - mean) / np.sqrt(var)), jnp.asarray(variances / var))


# The formula.


@hypothesis.given(
    case=st.sampled_from([((9, 3), 2, 1), ((3, 4, 2), 3, 2), ((2, 2, 3, 4), 2, 3), ((8, 1), 4, 2)]),
    seed=st.integers(0, 2**16),
    fast=st.booleans(),
)
def test_a_step_is_em_and_the_formula(case, seed, fast):
    """For vectors and for images, whose positions are rows; with one to three steps of EM."""
    shape, num_components, em_steps = case
    x, mixture = normal(seed, *shape), some_mixture(seed, num_components, shape[-1])
    result = step(x, mixture, em_steps=em_steps, momentum=0.75, epsilon=0.1, use_fast_variance=fast)
    y, mean, var, fitted = written_out(x.reshape(-1, shape[-1]), mixture, em_steps, 0.1)
    tolerance = {"rtol": 1e-7, "atol": 1e-7} if fast else {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(result.normalized.reshape(y.shape), y, **tolerance)
    np.testing.assert_allclose(result.mean, 0.75 * 3 + 0.25 * mean, rtol=1e-12)
    np.testing.assert_allclose(result.var, 0.75 * 2 + 0.25 * var, rtol=1e-9)
    for before, after, new in zip(mixture, fitted, result.mixture, strict=True):
        np.testing.assert_allclose(new, 0.75 * np.asarray(before) + 0.25 * after, **tolerance)


def test_inference_is_the_formula_with_the_running_mixture():
    x, mixture = normal(0, 3, 5, 4), some_mixture(0, 3, 4)
    mean, var = normal(1, 4), jnp.arange(1.0, 5)
    y = inference(x, mean, var, mixture, epsilon=0.1)
    unit = np.arange(1.0, 5) + 0.1
    own = (
        np.asarray(mixture.weights),
        np.asarray(mean) + np.sqrt(unit) * np.asarray(mixture.mean),
        unit * np.asarray(mixture.var),
    )
    rows = np.asarray(x).reshape(-1, 4)
    assert_same(y.reshape(-1, 4), normalized_by(rows, probabilities(rows, *own), *own))


@both_apis
def test_a_training_with_the_layer_is_the_formula(api):
    """Three steps from the layer's own start, then inference."""
    batches = [normal(seed, 4, 3, 5) for seed in range(3)]
    options = {"num_components": 3, "em_steps": 1, "momentum": 0.75, "epsilon": 0.1, "param_dtype": float}
    if api == "linen":
        module = contrib_linen.MixtureNorm(**options)
        variables = jax.jit(lambda key, x: module.init(key, x, use_running_average=True))(jax.random.key(0), batches[0])
        train = jax.jit(lambda v, x: module.apply(v, x, use_running_average=False, mutable=["batch_stats"]))
        outputs = []
        for x in batches:
            y, updated = train(variables, x)
            variables, outputs = variables | updated, [*outputs, y]
        state = variables["batch_stats"]
        evaluated = jax.jit(lambda v, x: module.apply(v, x, use_running_average=True))(variables, batches[0])
    else:
        layer = contrib_nnx.MixtureNorm(5, rngs=nnx.Rngs(0), **options)
        outputs = [nnx.jit(lambda layer, x: layer(x))(layer, x) for x in batches]
        state = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
        evaluated = layer(batches[0], use_running_average=True)
    mean, var, mixture = np.zeros(5), np.ones(5), Mixture(*map(np.asarray, start_of(3, (5,), float)))
    for x, output in zip(batches, outputs, strict=True):
        y, own_mean, own_var, fitted = written_out(x.reshape(-1, 5), mixture, 1, 0.1)
        np.testing.assert_allclose(output.reshape(-1, 5), y, rtol=1e-8, atol=1e-8)
        mean, var = 0.75 * mean + 0.25 * own_mean, 0.75 * var + 0.25 * own_var
        mixture = Mixture(*(0.75 * a + 0.25 * b for a, b in zip(mixture, fitted, strict=True)))
    names = ("mean", "var", "component_weights", "component_mean", "component_var")
    assert set(state) == set(names)
    for name, expected in zip(names, (mean, var, *mixture), strict=True):
        np.testing.assert_allclose(state[name], expected, rtol=1e-8, atol=1e-8)
    expected = inference(
        batches[0], jnp.asarray(mean), jnp.asarray(var), Mixture(*map(jnp.asarray, mixture)), epsilon=0.1
    )
    np.testing.assert_allclose(evaluated, expected, rtol=1e-7, atol=1e-7)


# What it becomes.


@both_apis
@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 5, 4)])
@pytest.mark.usefixtures("standard_promotion")  # Flax's own layer
def test_one_component_is_batch_norm(api, shape):
    """Forward, backward, in running statistics, and in evaluation."""
    x = normal(0, *shape)
    trained = {"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}
    theirs = nn.BatchNorm(momentum=0.9, param_dtype=float)
    start = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    of_one = {f"component_{name}": leaf for name, leaf in start_of(1, (4,), float)._asdict().items()}

    def run_linen(module, batch_stats):
        def loss(trained, x):
            variables = {"params": trained, "batch_stats": batch_stats}
            y, updated = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
            return weigh(y), (y, updated["batch_stats"], module.apply(variables | updated, x, use_running_average=True))

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(trained, x)

    def run_nnx():
        def loss(trained, x):
            layer = contrib_nnx.MixtureNorm(4, num_components=1, momentum=0.9, param_dtype=float, rngs=nnx.Rngs(0))
            layer.scale[...], layer.bias[...] = trained["scale"], trained["bias"]
            y = layer(x)
            state = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
            return weigh(y), (y, state, layer(x, use_running_average=True))

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(trained, x)

    ours = contrib_linen.MixtureNorm(num_components=1, momentum=0.9, param_dtype=float)
    gradients, (y, state, evaluated) = run_linen(ours, start | of_one) if api == "linen" else run_nnx()
    gradients_expected, (y_expected, state_expected, evaluated_expected) = run_linen(theirs, start)
    for name, value in of_one.items():
        np.testing.assert_allclose(state.pop(name), value, rtol=0, atol=1e-15)
    actual = jax.tree.leaves((gradients, y, state, evaluated))
    expected = jax.tree.leaves((gradients_expected, y_expected, state_expected, evaluated_expected))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("num_components", [2, 5])
@pytest.mark.parametrize("em_steps", [1, 3])
def test_components_that_are_equal_are_batch_norm_times_a_root(num_components, em_steps):
    """And stay so: this is why they do not begin so."""
    x = normal(0, 12, 4)
    equal = Mixture(
        jnp.full(num_components, 1 / num_components), jnp.zeros((num_components, 4)), jnp.ones((num_components, 4))
    )
    result = step(x, equal, em_steps=em_steps, momentum=0.0)
    expected = (x - x.mean(0, keepdims=True)) / np.sqrt(x.var(0, keepdims=True) + 1e-5)
    assert_same(result.normalized, np.sqrt(num_components) * expected)
    assert_same(result.mixture, equal)


SIZES, CENTRES = (10, 20, 30), [[-12.0, 0, 0], [0, 12, 0], [12, 0, 12]]


def test_modes_that_are_apart_are_normalized_one_by_one():
    """Each has mean 0 and deviation 1 / sqrt(lambda), and all together second moment K, not 1."""
    x, labels = modes(0, SIZES, CENTRES)
    start = in_units(x, np.full(3, 1 / 3), np.asarray(CENTRES), np.full((3, 3), 4.0))
    result = step(x, start, epsilon=0.0, momentum=0.0)
    y = np.asarray(result.normalized)
    assert_same(result.mixture.weights, np.array(SIZES) / 60)
    for k, size in enumerate(SIZES):
        own = y[labels == k]
        np.testing.assert_allclose(own.mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(own.std(0), np.sqrt(60 / size), rtol=1e-12)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose((y**2).mean(0), 3, rtol=1e-12)


@pytest.fixture(scope="module")
def converged():
    """Rows of modes that overlap, and the mixture at which scikit-learn's EM comes to rest."""
    x, _ = modes(0, (40, 60, 80), [[-2.0, 0, 1], [2, 1, 0], [0, -2, -2]])
    x = x * jnp.array([[1.0, 10, 0.1]]) + jnp.array([[5.0, 0, -3]])
    initial = {"means_init": np.asarray(x)[[0, 50, 120]], "random_state": 0}
    fit = GaussianMixture(3, covariance_type="diag", tol=1e-15, reg_covar=0.0, max_iter=5000, **initial).fit(x)
    return x, fit


@pytest.mark.parametrize("em_steps", [1, 4])
def test_where_em_rests_moments_are_those_of_the_mixture(converged, em_steps):
    """Scikit-learn's, which also says the probabilities; and then evaluation is training."""
    x, fit = converged
    start = in_units(x, fit.weights_, fit.means_, fit.covariances_)
    result = step(x, start, em_steps=em_steps, epsilon=0.0, momentum=0.0)
    for actual, expected in zip(result.mixture, start, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)
    tau = fit.predict_proba(x)
    expected = normalized_by(np.asarray(x), tau, fit.weights_, fit.means_, fit.covariances_)
    np.testing.assert_allclose(result.normalized, expected, rtol=1e-5, atol=1e-5)
    evaluated = inference(x, result.mean, result.var, result.mixture, epsilon=0.0)
    np.testing.assert_allclose(evaluated, result.normalized, rtol=1e-5, atol=1e-5)


def test_em_from_the_start_of_training_finds_what_scikit_learn_finds(converged):
    """Batch by batch; the running averages then are its mixture, in some order."""
    x, fit = converged
    mixture = start_of(3, (3,), float)
    for _ in range(400):
        mixture = step(x, mixture, epsilon=0.0, momentum=0.5).mixture
    expected = in_units(x, fit.weights_, fit.means_, fit.covariances_)
    order, expected_order = np.argsort(mixture.weights), np.argsort(expected.weights)
    for actual, own in zip(mixture, expected, strict=True):
        np.testing.assert_allclose(actual[order], own[expected_order], rtol=1e-3, atol=1e-3)


# How it begins.


@pytest.mark.parametrize("features", [1, 512])
def test_it_begins_alike_whatever_the_dtype_and_with_no_copies(features):
    mixture, narrow = (start_of(4, (features,), dtype) for dtype in (jnp.float64, jnp.float32))
    np.testing.assert_array_equal(mixture.mean, narrow.mean)
    assert narrow.mean.dtype == jnp.float32
    mean = np.asarray(mixture.mean)
    np.testing.assert_allclose(mean.sum(0), 0, atol=0.05)
    distances = np.linalg.norm(mean[:, None] - mean[None], axis=-1)[~np.eye(4, dtype=bool)]
    assert 0.05 < distances.min() < distances.max() < 4
    np.testing.assert_array_equal((mixture.weights, mixture.var[:, 0]), ([0.25] * 4, [1.0] * 4))
    np.testing.assert_array_equal(start_of(1, (features,), jnp.float32).mean, 0)


@pytest.mark.parametrize("features", [1, 16, 512])
def test_it_parts_two_modes_that_it_is_not_told_of(features):
    """However many features there are: from the start, in thirty batches, in float32."""
    direction = np.random.default_rng(1).choice([-1.0, 1.0], features)
    mixture = start_of(2, (features,), jnp.float32)
    run = jax.jit(lambda x, m: mixture_normalize(x, jnp.zeros(features), jnp.ones(features), m, momentum=0.5))
    for seed in range(30):
        x, labels = modes(seed, (80, 48), [-4 * direction, 4 * direction])
        result = run(x.astype(jnp.float32), mixture)
        mixture = result.mixture
    np.testing.assert_allclose(np.sort(mixture.weights), [48 / 128, 80 / 128], atol=0.01)
    for k in range(2):
        own = np.asarray(result.normalized)[labels == k]
        np.testing.assert_allclose(own.mean(0), 0, atol=0.05)
        np.testing.assert_allclose(own.std(0), np.sqrt(128 / (80, 48)[k]), rtol=0.05)
