"""Diagnostics of activations, their gradients and logits, against closed forms, loops and finite differences."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnosed_network import Network, assert_close, ravel, seeds
from flax import nnx
from helpers import cross_entropy, init, normal, weigh
from hypothesis import given
from hypothesis import strategies as st

from bnp_optax import contrib
from bnp_optax.contrib import diagnostics

pytestmark = pytest.mark.usefixtures("x64")

shapes = st.tuples(st.integers(1, 5), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 4)).map(
    lambda parts: (parts[0], *parts[1], parts[2])
)
channel_moments = jax.jit(diagnostics.channel_moments)
layer_moments = jax.jit(diagnostics.layer_moments)
gradient_norm = jax.jit(diagnostics.gradient_norm)
histogram = jax.jit(diagnostics.magnitude_histogram)
logit_gradients = jax.jit(diagnostics.logit_gradients)
gradient_of_cross_entropy = jax.jit(jax.grad(cross_entropy))
modal_share = jax.jit(diagnostics.modal_share)


@jax.jit
def independence(gradients):
    own = diagnostics.input_independence(gradients)
    return own, own.ratio


def activation_gradients(model, x, loss=weigh):
    """Returns the activations' gradients by name, and the parameters."""
    variables = jax.jit(lambda key: model.init(key, x))(jax.random.key(0))
    loss_fn = jax.jit(lambda variables: loss(model.apply(variables, x, mutable=["batch_stats"])[0]))
    return jax.jit(jax.grad(loss_fn))(variables)["perturbations"], variables, loss_fn


# Activations.


@given(shapes, seeds)
def test_moments_are_those_of_a_loop_over_channels(shape, seed):
    a = np.random.default_rng(seed).normal(1, 2, shape)
    channels = [a[..., channel].ravel() for channel in range(shape[-1])]
    means = [sum(own) / len(own) for own in channels]
    variances = [
        sum((value - mean) ** 2 for value in own) / len(own) for own, mean in zip(channels, means, strict=True)
    ]
    mean, variance = channel_moments(a)
    assert_close(mean, means)
    assert_close(variance, variances)
    mean, variance = layer_moments(a)
    assert_close(mean, sum(map(abs, means)) / shape[-1])
    assert_close(variance, sum(variances) / shape[-1])


def test_moments_of_a_linear_network_are_known():
    """Mean W'm + b and variance diag(W' S W), with m and S those of the inputs, at every depth."""
    model = Network((7, 4, 3), activation=lambda a: a)
    x = normal(0, 50, 5)
    variables = {"params": init(model, x)}
    run = jax.jit(lambda v: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"])[1])
    captured = run(variables)["intermediates"]
    mean, covariance = np.mean(x, 0), np.cov(x, rowvar=False, bias=True)
    for number in range(3):
        kernel, bias = (np.asarray(variables["params"][f"Dense_{number}"][name]) for name in ("kernel", "bias"))
        mean, covariance = mean @ kernel + bias, kernel.T @ covariance @ kernel
        (activations,) = captured[f"Dense_{number}"]["__call__"]
        assert_close(channel_moments(activations).mean, mean)
        assert_close(channel_moments(activations).variance, np.diag(covariance))
        assert_close(layer_moments(activations), (np.abs(mean).mean(), np.diag(covariance).mean()))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("shape", [(20, 5), (8, 4, 4, 3)])
def test_batch_normalization_has_mean_0_and_variance_1_at_every_depth(shape):
    model, x = Network((6, 5, 4), normalized=True), normal(0, *shape)
    variables = jax.jit(lambda key: model.init(key, x))(jax.random.key(0))
    run = jax.jit(lambda v: model.apply(v, x, capture_intermediates=True, mutable=["intermediates", "batch_stats"]))
    captured = run(variables)[1]["intermediates"]
    for number in range(3):
        own = channel_moments(captured[f"BatchNorm_{number}"]["__call__"][0])
        np.testing.assert_allclose(own.mean, 0, atol=1e-12)
        assert_close(own.variance, 1)
        # and it has not before
        before = captured[f"{'Conv' if len(shape) == 4 else 'Dense'}_{number}"]["__call__"][0]
        assert layer_moments(before).mean > 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_low_precision_gives_float32(dtype):
    a = normal(0, 300, 3, mean=100).astype(dtype)
    expected = np.asarray(a, np.float64)
    mean, variance = channel_moments(a)
    assert (
        mean.dtype == variance.dtype == gradient_norm(a).dtype == (jnp.float64 if dtype is jnp.float64 else jnp.float32)
    )
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, expected.var(0), rtol=1e-5)  # a mean of squares less a square is 1e-2 off
    np.testing.assert_allclose(gradient_norm(a), np.linalg.norm(expected), rtol=1e-6)


def test_heat_maps_are_sorted_by_layer_or_keep_their_columns():
    rows = [normal(seed, 9, 2, 4) for seed in range(3)]
    means = np.array([row.mean((0, 1)) for row in rows])
    variances = np.array([row.var((0, 1)) for row in rows])
    by_layer = jax.jit(diagnostics.channel_heat_map)(rows)
    by_step = jax.jit(diagnostics.channel_heat_map, static_argnames="order")(rows, order=1)
    for row in range(3):
        assert_close(by_layer.mean[row], np.sort(means[row]))
        assert_close(by_layer.variance[row], variances[row][np.argsort(means[row])])
        assert_close(by_step.mean[row], means[row][np.argsort(means[1])])
        assert_close(by_step.variance[row], variances[row][np.argsort(means[1])])
    assert (np.diff(by_step.mean[0]) < 0).any()


# Gradients of activations.


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("normalized", [False, True])
def test_perturbations_get_the_gradient_that_finite_differences_have(normalized):
    model, x = Network((4, 3), normalized), normal(0, 6, 3)
    gradients, variables, loss_fn = activation_gradients(model, x)
    h, flat = 1e-5, variables["perturbations"]
    for name, own in gradients.items():
        differences = np.zeros(own.shape)
        for index in np.ndindex(own.shape):
            up, down = (
                loss_fn(variables | {"perturbations": flat | {name: flat[name].at[index].set(sign * h)}})
                for sign in (1, -1)
            )
            differences[index] = (up - down) / (2 * h)
        np.testing.assert_allclose(own, differences, rtol=1e-6, atol=1e-8)


def test_linen_and_nnx_give_the_same_activations_and_gradients():
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(0), param_dtype=float)])

        def __call__(self, x):
            for number, layer in enumerate(self.layers):
                a = self.perturb(f"layer_{number}", layer(x))
                self.sow(nnx.Intermediate, f"activation_{number}", a)
                x = nnx.tanh(a)
            return x

    model, x = Net(), normal(0, 6, 3)
    _, perturbations = nnx.capture(model, nnx.Perturbation)(x)

    def loss_fn(model, perturbations):
        y, sown = nnx.capture(model, nnx.Intermediate, init=perturbations)(x)
        return weigh(y), sown

    gradients, sown = nnx.grad(loss_fn, argnums=1, has_aux=True)(model, perturbations)
    gradients, sown = nnx.to_pure_dict(gradients), nnx.to_pure_dict(sown)
    linen = Network((4,))
    params = {"Dense_0": {"kernel": model.layers[0].kernel[...], "bias": model.layers[0].bias[...]}}
    zeros = jax.eval_shape(linen.init, jax.random.key(0), x)["perturbations"]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), zeros)
    expected = jax.grad(lambda p: weigh(linen.apply({"params": params, "perturbations": p}, x)))(zeros)
    assert_close(gradients["layer_0"], expected["layer_0"])
    assert_close(sown["activation_0"][0], x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])


@pytest.mark.usefixtures("standard_promotion")
def test_the_sum_is_the_gradient_of_a_bias():
    for shape in ((6, 3), (4, 3, 3, 2)):
        model, x = Network(), normal(0, *shape)
        gradients, variables, loss_fn = activation_gradients(model, x)
        of_params = jax.jit(jax.grad(lambda params, v=variables, f=loss_fn: f(v | {"params": params})))
        of_biases = of_params(variables["params"])
        kind = "Conv" if len(shape) == 4 else "Dense"
        for number in range(2):
            own, ratio = independence(gradients[f"layer_{number}"])
            assert_close(own.net, np.abs(of_biases[f"{kind}_{number}"]["bias"]))
            total = np.abs(gradients[f"layer_{number}"]).reshape(-1, own.total.size).sum(0)
            assert_close(own.total, total)
            assert_close(ratio, own.net / total)


@given(shapes, seeds)
def test_copies_push_alike_and_pairs_of_signs_not_at_all(shape, seed):
    rng = np.random.default_rng(seed)
    g = rng.normal(size=shape)
    copies = np.broadcast_to(g[(slice(1),) * (g.ndim - 1)], (7, *shape[1:]))
    assert_close(independence(copies)[1], 1)
    np.testing.assert_allclose(independence(rng.permutation(np.concatenate([g, -g])))[1], 0, atol=1e-12)
    ratio = independence(g)[1]
    assert (ratio >= 0).all()
    assert (ratio <= 1 + 1e-12).all()


def test_a_channel_without_gradient_has_no_ratio():
    ratio = independence(jnp.array([[0.0, 1.0], [0.0, 3.0]]))[1]
    np.testing.assert_array_equal(ratio, [np.nan, 1.0])


@pytest.mark.usefixtures("standard_promotion")
def test_before_batch_normalization_all_cancels():
    """Which says nothing of the network: so one looks behind it."""
    for shape in ((12, 3), (4, 3, 3, 2)):
        gradients, _, _ = activation_gradients(Network(normalized=True), normal(0, *shape))
        np.testing.assert_allclose(independence(gradients["before_0"])[1], 0, atol=1e-12)
        assert (independence(gradients["layer_0"])[1] > 1e-3).any()


@given(shapes, seeds, st.integers(-30, 30))
def test_norms_are_euclidean_at_every_scale(shape, seed, exponent):
    g = np.random.default_rng(seed).normal(size=shape)
    expected = np.sqrt(sum(value * value for value in g.ravel()))
    assert_close(gradient_norm(g), expected)
    scaled = (g * 10.0**exponent).astype(np.float32)
    np.testing.assert_allclose(gradient_norm(scaled), expected * 10.0**exponent, rtol=1e-5)


def test_norms_of_what_has_none():
    assert gradient_norm(jnp.zeros(3)) == 0
    assert gradient_norm(jnp.zeros((0, 3))) == 0
    assert gradient_norm(jnp.array([1.0, jnp.inf, -jnp.inf])) == jnp.inf
    assert jnp.isnan(gradient_norm(jnp.array([1.0, jnp.nan])))


@given(st.lists(st.floats(-1e4, 1e4, width=32), max_size=30), st.integers(1, 6))
def test_histograms_are_numpys_and_lose_nothing(values, bins):
    edges = 10.0 ** np.arange(-bins, 1)
    # a bin of NumPy's holds its lower edge, but the last one both
    counts = np.histogram(np.abs(values), np.append(edges, np.inf))[0]
    actual = histogram(jnp.array(values, float), edges)
    np.testing.assert_array_equal(actual, [len(values) - counts.sum(), *counts])


def test_histograms_of_exact_edges_and_of_what_is_not_finite():
    edges = jnp.array([0.25, 0.5, 1.0])
    values = jnp.array([0.0, -0.25, 0.49, 0.5, -1.0, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(histogram(values, edges), [1, 2, 1, 4])
    np.testing.assert_array_equal(histogram(values.astype(jnp.bfloat16), edges), [1, 2, 1, 4])


# Logits.


@given(st.sampled_from([1, 4]), st.sampled_from([1, 3]), seeds)
def test_gradients_of_logits_are_those_of_the_cross_entropy(examples, classes, seed):
    rng = np.random.default_rng(seed)
    logits, labels = jnp.asarray(rng.normal(size=(examples, classes))), rng.integers(0, classes, examples)
    actual = logit_gradients(logits, labels)
    assert_close(actual, gradient_of_cross_entropy(logits, labels).T)
    np.testing.assert_allclose(actual.sum(0), 0, atol=1e-12)


def test_a_label_that_is_no_class_has_no_gradient():
    gradients = diagnostics.logit_gradients(jnp.zeros((3, 2)), jnp.array([0, 2, -1]))
    np.testing.assert_array_equal(np.isnan(gradients), [[False, True, True]] * 2)


@given(shapes, seeds)
def test_the_modal_share_is_that_of_a_count(shape, seed):
    logits = np.random.default_rng(seed).normal(size=shape)
    answers = [int(np.argmax(row)) for row in logits.reshape(-1, shape[-1])]
    (_, most), *_ = collections.Counter(answers).most_common()
    assert_close(modal_share(logits), most / len(answers))


def test_the_modal_share_of_no_answers():
    assert modal_share(jnp.array([[1.0, 2.0], [-jnp.inf, 0.0]])) == 1
    assert jnp.isnan(modal_share(jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])))


# What is refused.

TREE = {"w": jnp.ones((2, 3), jnp.float32)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnostics.channel_moments(jnp.ones(3)), ValueError, r"the shape is \(3,\)"),
        (
            lambda: diagnostics.layer_moments(jnp.ones((0, 3))),
            ValueError,
            r"that is not empty, but the shape is \(0, 3\)",
        ),
        (lambda: diagnostics.input_independence(jnp.ones(3)), ValueError, r"the shape is \(3,\)"),
        (lambda: diagnostics.modal_share(jnp.ones(3)), ValueError, r"the shape is \(3,\)"),
        (lambda: diagnostics.channel_heat_map([]), ValueError, r"but have \[\] channels"),
        (lambda: diagnostics.channel_heat_map([jnp.ones((2, 3)), jnp.ones((2, 4))]), ValueError, r"but have \[3, 4\]"),
        (lambda: diagnostics.magnitude_histogram(jnp.ones(3), jnp.ones(())), ValueError, r"edges must be a vector"),
        (lambda: diagnostics.magnitude_histogram(jnp.ones(3), jnp.ones(0)), ValueError, r"edges must be a vector"),
        (lambda: diagnostics.logit_gradients(jnp.ones((2, 3)), jnp.arange(3)), ValueError, r"\(2, 3\), \(3,\)"),
        (lambda: diagnostics.logit_gradients(jnp.ones((2, 3)), jnp.ones(2)), TypeError, "labels must be integers"),
        (lambda: diagnostics.largest_usable_rate([0.1], [1.0, 2.0], margin=1), ValueError, r"\(1,\), \(2,\), \(2,\)"),
        (lambda: diagnostics.largest_usable_rate(0.1, 1.0, margin=1), ValueError, "vectors of one length"),
        (lambda: diagnostics.largest_usable_rate([0.1], [1.0], [1.0, 2.0], margin=1), ValueError, r"\(1,\), \(2,\)"),
        (lambda: diagnostics.largest_usable_rate([0.1], [1.0], margin=-1), ValueError, "but is -1"),
        (lambda: diagnostics.loss_along(ravel, TREE, {"v": TREE["w"]}, [1.0]), ValueError, r"\['v'\], \['w'\]"),
        (lambda: diagnostics.loss_along(ravel, TREE, {"w": jnp.ones(3)}, [1.0]), ValueError, r"differ at \['w'\]"),
        (lambda: diagnostics.loss_along(ravel, TREE, TREE, 1.0), ValueError, "sizes must be a vector"),
        (lambda: diagnostics.sgd_noise(ravel, TREE, jnp.ones(2), 0.1, 0), ValueError, "at least 1, but is 0"),
        (lambda: diagnostics.sgd_noise(ravel, TREE, jnp.ones(()), 0.1, 1), ValueError, "common first axis"),
        (lambda: diagnostics.sgd_noise(ravel, TREE, (jnp.ones(2), jnp.ones(3)), 0.1, 1), ValueError, "first axis"),
        (lambda: diagnostics.sgd_noise(ravel, TREE, (), 0.1, 1), ValueError, "common first axis"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_module_is_one_of_the_package():
    assert contrib.diagnostics is diagnostics
