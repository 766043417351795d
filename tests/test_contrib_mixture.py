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
from sklearn.mixture import GaussianMixture

from bnp_optax.contrib import Mixture, initial_mixture, mixture_normalize, mixture_normalize_inference
from bnp_optax.contrib import linen as contrib_linen
from bnp_optax.contrib import nnx as contrib_nnx
from bnp_optax.contrib.mixture import FLOOR, component_moments, normalize_by_components, responsibilities

pytestmark = pytest.mark.usefixtures("x64")

both_apis = pytest.mark.parametrize("api", ["linen", "nnx"])


def log_density(row, mean, var, counted):
    return -0.5 * sum(
        (row[c] - mean[c]) ** 2 / var[c] + np.log(2 * np.pi * var[c]) for c in range(len(row)) if counted[c]
    )


def probabilities(x, weights, means, variances, counted=None):
    """Returns the probability of each row to come from each component, row by row."""
    counted = np.ones(x.shape, bool) if counted is None else counted
    tau = np.empty((len(x), len(weights)))
    for i, row in enumerate(x):
        logs = [
            np.log(max(w, FLOOR)) + log_density(row, m, v, counted[i])
            for w, m, v in zip(weights, means, variances, strict=True)
        ]
        tau[i] = [np.exp(each - max(logs)) for each in logs]
        tau[i] /= tau[i].sum()
    return tau


def moments_of(x, tau, epsilon, floor, counted=None):
    """Returns weights, means and variances of the components, of which none is empty."""
    counted = np.ones(x.shape, bool) if counted is None else counted
    rows = [i for i in range(len(x)) if counted[i].any()]
    weights = [sum(tau[i, k] for i in rows) / len(rows) for k in range(tau.shape[1])]
    means, variances = np.empty((2, tau.shape[1], x.shape[1]))
    for k in range(tau.shape[1]):
        for c in range(x.shape[1]):
            share = {i: tau[i, k] for i in range(len(x)) if counted[i, c]}
            total = sum(share.values())
            means[k, c] = sum(share[i] * x[i, c] for i in share) / total
            variance = sum(share[i] * (x[i, c] - means[k, c]) ** 2 for i in share) / total
            variances[k, c] = max(variance + epsilon, floor[c])
    return np.array(weights), means, variances


def normalized_by(x, tau, weights, means, variances):
    return sum(
        tau[:, [k]] / np.sqrt(max(weights[k], FLOOR)) * (x - means[k]) / np.sqrt(variances[k])
        for k in range(len(weights))
    )


def written_out(x, mixture, em_steps, epsilon, counted=None):
    """Returns the batch `[rows, features]` normalized, its moments, and its mixture in their units.

    EM runs in the units of x, unlike the library's.
    """
    x, mixture = np.asarray(x), Mixture(*map(np.asarray, mixture))
    counted = np.ones(x.shape, bool) if counted is None else np.asarray(counted)
    mean = np.array([np.mean(x[counted[:, c], c]) for c in range(x.shape[1])])
    var = np.array([np.var(x[counted[:, c], c]) for c in range(x.shape[1])])
    unit = var + epsilon
    own = mixture.weights, mean + np.sqrt(unit) * mixture.mean, unit * mixture.var
    for _ in range(em_steps):
        tau = probabilities(x, *own, counted)
        own = moments_of(x, tau, epsilon, FLOOR * unit, counted)
    weights, means, variances = own
    return normalized_by(x, tau, *own), mean, var, Mixture(weights, (means - mean) / np.sqrt(unit), variances / unit)


def some_mixture(seed, num_components, features):
    """Components that differ in everything."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2, num_components)
    return Mixture(
        jnp.asarray(weights / weights.sum()),
        jnp.asarray(rng.normal(0, 1, (num_components, features))),
        jnp.asarray(rng.uniform(0.3, 2, (num_components, features))),
    )


def traced_step(x, mixture, **options):
    """A step from running statistics that are not those of the batch."""
    start = jnp.full_like(mixture.mean[0], 3), jnp.full_like(mixture.mean[0], 2)
    options = {"use_fast_variance": False} | options
    return mixture_normalize(x, *start, mixture, **options)


step = jax.jit(traced_step, static_argnames=("em_steps", "use_fast_variance", "axis"))
inference = jax.jit(mixture_normalize_inference)
start_of = jax.jit(initial_mixture, static_argnums=(0, 1, 2))


def gradient_of_step(x, mixture, loss=weigh, **options):
    """Returns the gradient of a loss of what a step normalizes, and the step's result."""

    def loss_fn(x, mixture):
        result = traced_step(x, mixture, **options)
        return loss(result.normalized), result

    return jax.jit(jax.grad(loss_fn, has_aux=True))(x, mixture)


def modes(seed, sizes, centres, deviation=1.0):
    """Rows around the centres, `[modes, features]`, and which mode each row is of."""
    rng, centres = np.random.default_rng(seed), np.asarray(centres, float)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return jnp.asarray(centres[labels] + rng.normal(0, deviation, (len(labels), centres.shape[1]))), labels


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


# What it keeps and does not see.


def test_affine_maps_of_features_change_nothing():
    """As the mixture is in the units of the batch; with a factor that is negative the means turn round."""
    x, mixture = normal(0, 30, 4), some_mixture(0, 3, 4)
    factor, shift = jnp.array([[0.1, 30.0, 2.0, 0.5]]), jnp.array([[5.0, 0, -300, 2]])
    result = step(x, mixture, epsilon=0.0, momentum=0.5)
    mapped = step(x * factor + shift, mixture, epsilon=0.0, momentum=0.5)
    assert_same((mapped.normalized, mapped.mixture), (result.normalized, result.mixture))
    sign = jnp.array([[1.0, -1, 1, -1]])
    turned = step(x * factor * sign, mixture._replace(mean=mixture.mean * sign), epsilon=0.0, momentum=0.5)
    assert_same(turned.normalized, result.normalized * sign)
    assert_same(turned.mixture.mean, result.mixture.mean * sign)
    other = step(x * factor * sign, mixture, epsilon=0.0)
    assert np.abs(other.normalized - result.normalized * sign).max() > 0.1


def test_the_order_of_components_and_of_rows_is_their_own():
    x, mixture = normal(0, 30, 4), some_mixture(0, 3, 4)
    order, rows = np.array([2, 0, 1]), np.random.default_rng(0).permutation(30)
    result = step(x, mixture)
    permuted = step(x, Mixture(*(leaf[order] for leaf in mixture)))
    assert_same(permuted.normalized, result.normalized)
    assert_same(permuted.mixture, Mixture(*(leaf[order] for leaf in result.mixture)))
    assert_same(step(x[rows], mixture).normalized, result.normalized[rows])


def test_features_may_be_along_any_axes():
    x, mixture = normal(1, 5, 3, 2, 4), some_mixture(0, 3, 12)
    shaped = Mixture(mixture.weights, mixture.mean.reshape(3, 3, 4), mixture.var.reshape(3, 3, 4))
    expected = step(jnp.moveaxis(x, 2, 1).reshape(10, 12), mixture)
    result = step(x, shaped, axis=(1, -1))
    assert_same(jnp.moveaxis(result.normalized, 2, 1).reshape(10, 12), expected.normalized)
    assert result.mixture.mean.shape == (3, 3, 4)
    assert_same(result.mixture.mean.reshape(3, 12), expected.mixture.mean)


def test_gradients_take_probabilities_and_weights_as_constants():
    """And flow through x, means and variances of the last step alone."""
    x, mixture = normal(0, 20, 3), some_mixture(0, 2, 3)
    _, mean, var, _ = written_out(x, mixture, 1, 1e-5)
    unit = var + 1e-5
    fitted = written_out(x, mixture, 1, 1e-5)[3]
    tau = jnp.asarray(
        probabilities(np.asarray(x), fitted.weights, mean + np.sqrt(unit) * fitted.mean, unit * fitted.var)
    )  # those of the second step

    def formula(x):
        shares = (tau / tau.sum(0, keepdims=True)).T
        y = 0
        for k in range(2):
            own = (shares[k][:, None] * x).sum(0, keepdims=True)
            own_var = (shares[k][:, None] * (x - own) ** 2).sum(0, keepdims=True) + 1e-5
            y += tau[:, k : k + 1] / jnp.sqrt(tau[:, k].mean()) * (x - own) / jnp.sqrt(own_var)
        return y

    assert_same(step(x, mixture, em_steps=2).normalized, formula(x))
    gradient, _ = gradient_of_step(x, mixture)
    assert_same(gradient, jax.jit(jax.grad(lambda x: weigh(formula(x))))(x))
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-12)
    of_fast, _ = gradient_of_step(x, mixture, use_fast_variance=True)
    np.testing.assert_allclose(of_fast, gradient, rtol=1e-9, atol=1e-9)


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


# Numbers that are hard.


@pytest.mark.parametrize("apart", [0.0, 0.3, 30.0])
def test_hundreds_of_features_in_float32(apart):
    """Probabilities are of differences of sums of 512 squares; far modes have densities that no float holds."""
    rng = np.random.default_rng(0)
    direction = rng.normal(0, 1, 512)
    x, _ = modes(0, (100, 60), [-apart * direction, apart * direction])
    mixture = Mixture(
        jnp.array([0.4, 0.6]),
        jnp.asarray(np.stack([-direction, direction]) * 0.1),
        jnp.asarray(rng.uniform(0.8, 1.2, (2, 512))),
    )

    gradient, expected = gradient_of_step(x, mixture, momentum=0.0)
    narrow = Mixture(*(leaf.astype(jnp.float32) for leaf in mixture))
    for fast in (False, True):
        gradient_32, result = gradient_of_step(x.astype(jnp.float32), narrow, use_fast_variance=fast, momentum=0.0)
        assert result.normalized.dtype == jnp.float32
        np.testing.assert_allclose(result.normalized, expected.normalized, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(result.mixture.weights, expected.mixture.weights, atol=1e-3)
        assert np.isfinite(gradient_32).all()
        difference = np.asarray(gradient_32) - np.asarray(gradient)
        assert np.abs(difference).max() < 0.01 * np.abs(gradient).max()


def test_a_component_without_rows_changes_nothing_and_stays_where_it_is():
    x, mixture = normal(0, 30, 4), some_mixture(0, 2, 4)
    far = Mixture(
        jnp.append(mixture.weights, 0.3),
        jnp.concatenate([mixture.mean, jnp.full((1, 4), 1e4)]),
        jnp.concatenate([mixture.var, jnp.full((1, 4), 0.7)]),
    )
    result, expected = step(x, far, momentum=0.5), step(x, mixture, momentum=0.5)
    assert_same(result.normalized, expected.normalized)
    assert_same(result.mixture.weights, jnp.append(expected.mixture.weights, 0.15))
    assert_same((result.mixture.mean[2], result.mixture.var[2]), (jnp.full(4, 1e4), jnp.full(4, 0.7)))
    assert_same(gradient_of_step(x, far)[0], gradient_of_step(x, mixture)[0])


def test_weights_and_variances_have_a_floor():
    """A component of one row has no variance; one that is next to empty divides by no more than the root of it."""
    x = jnp.array([[-1.0], [0.0], [1.0], [9.0]])
    tau = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    fitted = jax.jit(component_moments)(x, tau, some_mixture(0, 2, 1), 0.0)
    assert_same((fitted.mean.ravel(), fitted.var.ravel()), (jnp.array([0.0, 9.0]), jnp.array([2 / 3, FLOOR])))
    near_empty = Mixture(jnp.array([1.0, 0.0]), jnp.zeros((2, 1)), jnp.ones((2, 1)))
    y = jax.jit(normalize_by_components)(jnp.ones((1, 1)), jnp.array([[0.0, 1.0]]), near_empty)
    np.testing.assert_allclose(y, FLOOR**-0.5)
    away = near_empty._replace(mean=jnp.array([[0.0], [5.0]]))
    assert jax.jit(responsibilities)(jnp.array([[5.0]]), away)[0, 1] > 0.99


def test_what_is_no_number_is_not_taken_for_an_empty_component():
    tau = jnp.array([[0.5, 0.5], [jnp.nan, 0.0]])
    fitted = jax.jit(component_moments)(normal(0, 2, 4), tau, some_mixture(0, 2, 4))
    assert np.isnan(fitted.mean[0]).all()
    assert np.isnan(fitted.var[0]).all()
    assert np.isnan(fitted.weights).all()
    assert np.isfinite(fitted.mean[1]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_normalized_in_float32(dtype):
    x, mixture = normal(0, 64, 4).astype(dtype), Mixture(*(m.astype(jnp.float32) for m in some_mixture(0, 2, 4)))
    result, expected = (step(each, mixture) for each in (x, x.astype(jnp.float32)))
    assert result.normalized.dtype == jnp.float32
    np.testing.assert_array_equal(result.normalized, expected.normalized)


# Masks.


def test_hidden_values_are_missing():
    """They count in no moment and in no density: whatever they are, nothing that is shown knows of them."""
    x, mixture = normal(0, 12, 4), some_mixture(0, 3, 4)
    shown = jnp.asarray(np.random.default_rng(0).uniform(size=(12, 4)) > 0.3).at[3].set(False)
    y, mean, var, fitted = written_out(x, mixture, 2, 0.1, shown)
    for fast in (False, True):
        result = step(x, mixture, mask=shown, epsilon=0.1, momentum=0.0, use_fast_variance=fast)
        np.testing.assert_allclose(result.normalized[shown], y[np.asarray(shown)], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose((result.mean, result.var), (mean, var), rtol=1e-9)
        for actual, expected in zip(result.mixture, fitted, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
        broken = step(
            jnp.where(shown, x, jnp.nan), mixture, mask=shown, epsilon=0.1, momentum=0.0, use_fast_variance=fast
        )
        np.testing.assert_array_equal(broken.normalized[shown], result.normalized[shown])
        assert_same(broken[1:], result[1:])


def test_what_a_mask_hides_entirely_is_normalized_as_in_inference():
    x, mixture = normal(0, 12, 4), some_mixture(0, 3, 4)
    result = step(x, mixture, mask=jnp.zeros((12, 1), bool))
    assert_same(result[1:], (jnp.full(4, 3.0), jnp.full(4, 2.0), mixture))
    assert_same(result.normalized, inference(x, jnp.full(4, 3.0), jnp.full(4, 2.0), mixture))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_that_is_split_is_normalized_as_one(fast, masked):
    """Also where each part is of one mode alone, or hides other rows."""
    x, _ = modes(0, (8, 8, 8), [[-5.0, 0], [0, 5], [5, 5]])
    mixture, shown = some_mixture(0, 3, 2), (jnp.arange(24) % 5 != 0)[:, None]
    masks = {"mask": shown} if masked else {}

    def loss(y):
        return jnp.sum(jnp.sin(y))

    def of_part(x, **mask):
        result = traced_step(x, mixture, axis_name="devices", use_fast_variance=fast, **mask)
        return loss(result.normalized), result

    split = jax.jit(jax.vmap(jax.grad(of_part, has_aux=True), axis_name="devices"))
    gradient, result = split(x.reshape(3, 8, 2), **{name: mask.reshape(3, 8, 1) for name, mask in masks.items()})
    expected, whole = gradient_of_step(x, mixture, loss, use_fast_variance=fast, **masks)
    assert_same(result.normalized.reshape(24, 2), whole.normalized)
    assert_same(result.mixture, jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), whole.mixture))
    assert_same(gradient.reshape(24, 2), expected)


# Errors.


def test_what_does_not_fit_is_refused():
    x, start = normal(0, 6, 4), (jnp.zeros(4), jnp.ones(4))
    with pytest.raises(ValueError, match="num_components is 0, and must be 1 or more"):
        initial_mixture(0, (4,))
    with pytest.raises(ValueError, match="num_components is 0"):
        contrib_nnx.MixtureNorm(4, num_components=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="em_steps is 0, and must be 1 or more"):
        mixture_normalize(x, *start, some_mixture(0, 2, 4), em_steps=0)
    for call in (mixture_normalize, mixture_normalize_inference):
        with pytest.raises(ValueError, match=r"mixture's mean has shape \(2, 3\), but 2 components .* 8 numbers"):
            call(x, *start, some_mixture(0, 2, 3))
        with pytest.raises(ValueError, match=r"mixture's var has shape \(2, 3\)"):
            call(x, *start, some_mixture(0, 2, 4)._replace(var=jnp.ones((2, 3))))
        with pytest.raises(ValueError, match="running statistic is of 3 features"):
            call(x, jnp.zeros(3), jnp.ones(3), some_mixture(0, 2, 4))
        with pytest.raises(TypeError, match="of real numbers"):
            call(x.astype(complex), *start, some_mixture(0, 2, 4))
    with pytest.raises(ValueError, match=r"mask has shape \(6,\)"):
        mixture_normalize(x, *start, some_mixture(0, 2, 4), mask=jnp.ones(6, bool))
    with pytest.raises(TypeError, match="num_components"):
        contrib_linen.MixtureNorm()
