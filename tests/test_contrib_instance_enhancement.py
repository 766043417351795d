"""Instance Enhancement Batch Normalization against its formula written out in NumPy, and what it keeps of BN."""

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same, normal, weigh

from bnp_optax.contrib import instance_enhanced_normalize, instance_enhanced_normalize_inference
from bnp_optax.contrib import linen as contrib_linen
from bnp_optax.contrib import nnx as contrib_nnx
from bnp_optax.contrib.instance_enhancement import instance_gate

pytestmark = pytest.mark.usefixtures("x64")

SIGMOID_OF_MINUS_1 = 1 / (1 + np.e)
both_apis = pytest.mark.parametrize("api", ["linen", "nnx"])


def written_out(x, mean, var, weight, bias, epsilon):
    """Returns the examples `[n, positions, features]` normalized by these statistics and gated, number by number."""
    y = np.empty(x.shape)
    for n, example in enumerate(np.asarray(x)):
        for c in range(x.shape[-1]):
            pooled = sum(example[:, c]) / len(example)
            gate = 1 / (1 + np.exp(-(weight[c] * pooled + bias[c])))
            for p in range(len(example)):
                y[n, p, c] = gate * (example[p, c] - mean[c]) / np.sqrt(var[c] + epsilon)
    return y


def gates(seed, features):
    """Weights and biases of gates that differ from example to example."""
    return normal(seed, features, mean=0, deviation=0.5), normal(seed + 1, features, mean=-1, deviation=0.5)


def normalized(x, weight, bias, **options):
    """Returns the batch normalized in training, from the usual start of the statistics."""
    features = weight.size
    options = {"epsilon": 0.0, "use_fast_variance": False} | options
    return instance_enhanced_normalize(x, jnp.zeros(features), jnp.ones(features), weight, bias, **options).normalized


def layer_of(api, x, **options):
    """Returns `(train, evaluate)` of a layer with parameters `gate_weight` and `gate_bias`, as functions of them."""
    if api == "linen":
        module = contrib_linen.InstanceEnhancementBatchNorm(param_dtype=float, **options)
        variables = module.init(jax.random.key(0), x, use_running_average=False)

        def train(params, batch_stats, x, **mask):
            y, updated = module.apply(
                {"params": variables["params"] | params, "batch_stats": batch_stats or variables["batch_stats"]},
                x,
                use_running_average=False,
                mutable=["batch_stats"],
                **mask,
            )
            return y, updated["batch_stats"]

        def evaluate(params, batch_stats, x, **mask):
            state = {"params": variables["params"] | params, "batch_stats": batch_stats}
            return module.apply(state, x, use_running_average=True, **mask)

        return train, evaluate

    def made(params, batch_stats):
        layer = contrib_nnx.InstanceEnhancementBatchNorm(x.shape[-1], param_dtype=float, rngs=nnx.Rngs(0), **options)
        for name, value in (params | (batch_stats or {})).items():
            getattr(layer, name)[...] = value
        return layer

    def train_nnx(params, batch_stats, x, **mask):
        layer = made(params, batch_stats)
        y = layer(x, **mask)
        return y, {"mean": layer.mean[...], "var": layer.var[...]}

    return train_nnx, lambda params, batch_stats, x, **mask: made(params, batch_stats)(x, True, **mask)


# The formula.


@hypothesis.given(
    shape=st.sampled_from([(5, 3), (4, 3, 2), (3, 2, 2, 3), (1, 4, 1)]), seed=st.integers(0, 2**16), fast=st.booleans()
)
def test_a_step_is_the_formula(shape, seed, fast):
    """For vectors, sequences and images; the gate of a vector follows from the value itself."""
    x, features = normal(seed, *shape), shape[-1]
    weight, bias = gates(seed, features)
    start = jnp.full(features, 2.0)
    result = instance_enhanced_normalize(
        x, start, start, weight, bias, momentum=0.75, epsilon=0.1, use_fast_variance=fast
    )
    flat = np.asarray(x).reshape(shape[0], -1, features)
    mean, var = flat.mean((0, 1)), flat.var((0, 1))
    expected = written_out(flat, mean, var, weight, bias, 0.1)
    np.testing.assert_allclose(result.normalized.reshape(flat.shape), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(result.mean, 1.5 + 0.25 * mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.var, 1.5 + 0.25 * var, rtol=1e-9, atol=1e-12)
    evaluated = instance_enhanced_normalize_inference(x, result.mean, result.var, weight, bias, epsilon=0.1)
    expected = written_out(flat, result.mean, result.var, weight, bias, 0.1)
    np.testing.assert_allclose(evaluated.reshape(flat.shape), expected, rtol=1e-9, atol=1e-9)


def test_the_gate_of_a_vector_is_of_the_value_itself():
    x, (weight, bias) = normal(0, 5, 3), gates(0, 3)
    assert_same(instance_gate(x, weight, bias), jax.nn.sigmoid(weight[None] * x + bias[None]))


def test_examples_are_along_the_first_axis_that_is_none_of_features():
    x, (weight, bias) = normal(0, 5, 4, 2, 3), gates(0, 3)
    expected = instance_gate(x, weight, bias)
    assert expected.shape == (5, 1, 1, 3)
    for axis in (0, 1, 2):
        moved = instance_gate(jnp.moveaxis(x, -1, axis), weight, bias, axis=axis)
        assert_same(jnp.moveaxis(moved, axis, -1), expected)
    # Several axes of features: no position is pooled here.
    weight, bias = gates(1, 12)
    gate = instance_gate(x[:, :, 0], weight, bias, axis=(1, 2))
    assert_same(gate.reshape(5, 12), instance_gate(x[:, :, 0].reshape(5, 12), weight, bias))


@both_apis
def test_the_layer_is_the_function(api):
    x, (weight, bias) = normal(0, 5, 3, 2, 4), gates(0, 4)
    params = {"gate_weight": weight, "gate_bias": bias, "scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}
    train, evaluate = layer_of(api, x, momentum=0.75, epsilon=0.1)
    y, statistics = train(params, None, x)
    result = instance_enhanced_normalize(x, jnp.zeros(4), jnp.ones(4), weight, bias, momentum=0.75, epsilon=0.1)
    scale, shift = jnp.arange(1.0, 5)[None, None, None], jnp.arange(4.0)[None, None, None]
    assert_same(y, result.normalized * scale + shift)
    assert_same((statistics["mean"], statistics["var"]), (result.mean, result.var))
    evaluated = instance_enhanced_normalize_inference(x, result.mean, result.var, weight, bias, epsilon=0.1)
    assert_same(evaluate(params, statistics, x), evaluated * scale + shift)


# What it has of Batch Normalization.


@both_apis
@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 5, 4)])
@pytest.mark.usefixtures("standard_promotion")  # Flax's own layer
def test_statistics_are_those_of_batch_norm_and_outputs_at_the_start_a_share(api, shape):
    x = normal(0, *shape)
    theirs = nn.BatchNorm(momentum=0.9, use_running_average=False, param_dtype=float)
    variables = jax.tree.map(lambda leaf: leaf.astype(float), theirs.init(jax.random.key(0), x))  # some are float32
    expected, updated = theirs.apply(variables, x, mutable=["batch_stats"])
    train, evaluate = layer_of(api, x, momentum=0.9)
    y, statistics = train({}, None, x)
    np.testing.assert_allclose(y, SIGMOID_OF_MINUS_1 * np.asarray(expected), rtol=1e-12, atol=1e-14)
    evaluated = theirs.clone(use_running_average=True).apply(variables | updated, x)
    actual = evaluate({}, updated["batch_stats"], x)
    np.testing.assert_allclose(actual, SIGMOID_OF_MINUS_1 * np.asarray(evaluated), rtol=1e-12, atol=1e-14)
    # Whatever the gates.
    weight, bias = gates(0, 4)
    other, statistics_of_other = train({"gate_weight": weight, "gate_bias": bias}, None, x)
    assert np.abs(other - y).max() > 0.1
    for own in (statistics, statistics_of_other):
        for name in ("mean", "var"):
            np.testing.assert_allclose(own[name], updated["batch_stats"][name], rtol=1e-13, atol=1e-15)


@both_apis
@pytest.mark.usefixtures("standard_promotion")
def test_open_gates_make_it_batch_norm_forward_and_backward(api):
    x = normal(0, 6, 2, 4)
    theirs = nn.BatchNorm(use_running_average=False, param_dtype=float)
    train, _ = layer_of(api, x)
    opened = {"gate_bias": jnp.full(4, 50.0)}  # where the sigmoid is 1 to the last digit
    trained = {"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}
    start = {"batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}

    def apply_theirs(trained, x):
        return weigh(theirs.apply(start | {"params": trained}, x, mutable=["batch_stats"])[0])

    actual = jax.grad(lambda trained, x: weigh(train(trained | opened, None, x)[0]), (0, 1))(trained, x)
    expected = jax.grad(apply_theirs, (0, 1))(trained, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), actual, expected)


def test_gradients_of_the_gate():
    """That of its bias, of its weight, and through the mean of the positions to the input: by the chain rule."""
    x, gy, (weight, bias) = normal(0, 5, 3, 4), normal(1, 5, 3, 4), gates(0, 4)

    def gate_times(x, weight, bias):
        return jnp.sum(instance_gate(x, weight, bias) * gy)

    of_x, of_weight, of_bias = jax.grad(gate_times, (0, 1, 2))(x, weight, bias)
    pooled = np.asarray(x).mean(1)
    gate = 1 / (1 + np.exp(-(np.asarray(weight) * pooled + np.asarray(bias))))
    slope = gate * (1 - gate) * np.asarray(gy).sum(1)
    assert_same(of_bias, slope.sum(0))
    assert_same(of_weight, (slope * pooled).sum(0))
    assert_same(of_x, np.broadcast_to((slope * np.asarray(weight) / 3)[:, None], x.shape))


def test_a_gate_sees_its_own_example_alone():
    x, (weight, bias) = normal(0, 6, 3, 4), gates(0, 4)
    other = x.at[1:].set(normal(1, 5, 3, 4))
    np.testing.assert_array_equal(instance_gate(other, weight, bias)[0], instance_gate(x, weight, bias)[0])
    assert np.abs(normalized(other, weight, bias)[0] - normalized(x, weight, bias)[0]).max() > 0.01
    # So the batch is evaluated example by example.
    mean, var = normal(2, 4), jnp.full(4, 2.0)
    together = instance_enhanced_normalize_inference(x, mean, var, weight, bias)
    alone = [instance_enhanced_normalize_inference(each[None], mean, var, weight, bias) for each in x]
    assert_same(jnp.concatenate(alone), together)


@both_apis
def test_with_the_statistics_of_this_very_batch_evaluation_is_training(api):
    x, (weight, bias) = normal(0, 5, 3, 4), gates(0, 4)
    train, evaluate = layer_of(api, x, momentum=0.0)
    y, statistics = train({"gate_weight": weight, "gate_bias": bias}, None, x)
    assert_same(evaluate({"gate_weight": weight, "gate_bias": bias}, statistics, x), y)


def test_a_single_value_is_normalized_to_nothing():
    weight, bias = gates(0, 4)
    np.testing.assert_array_equal(normalized(normal(0, 1, 1, 1, 4), weight, bias, epsilon=1e-5), 0)


# What it has not.


@pytest.mark.parametrize("moving", [False, True])
def test_scale_invariance_is_lost_once_a_gate_has_a_weight(moving):
    """In front of BN the kernel's scale is free, and its gradient is orthogonal to it."""
    x, kernel, (weight, bias) = normal(0, 6, 3), normal(1, 3, 4, mean=0), gates(0, 4)
    weight = weight if moving else jnp.zeros(4)

    def loss(kernel):
        return weigh(normalized(x @ kernel, weight, bias))

    rescaled = loss(kernel * jnp.array([[0.5, 2.0, 3.0, 0.1]]))
    product = jnp.sum(kernel * jax.grad(loss)(kernel), axis=0)
    if moving:
        assert abs(rescaled - loss(kernel)) > 0.01
        assert np.abs(product).min() > 1e-3
    else:
        np.testing.assert_allclose(rescaled, loss(kernel), rtol=1e-12)
        np.testing.assert_allclose(product, 0, atol=1e-12)


def test_it_is_no_affine_map_of_the_features_in_evaluation():
    """So it cannot be folded into the layer before it."""
    x, (weight, bias) = normal(0, 3, 4), gates(0, 4)

    def evaluate(x, weight):
        return instance_enhanced_normalize_inference(x, jnp.ones(4), jnp.full(4, 2.0), weight, bias)

    middle = evaluate((x[0] + x[1])[None] / 2, weight) - (evaluate(x, weight)[:1] + evaluate(x, weight)[1:2]) / 2
    assert np.abs(middle).max() > 0.01
    affine = evaluate((x[0] + x[1])[None] / 2, weight * 0)
    assert_same(affine, (evaluate(x, weight * 0)[:1] + evaluate(x, weight * 0)[1:2]) / 2)


# Masks.


@both_apis
@pytest.mark.parametrize("padding", [3.0, np.nan])
def test_hidden_positions_are_as_if_they_were_not_there(api, padding):
    """Sequences that are padded, in training and in evaluation."""
    x, (weight, bias) = normal(0, 5, 4, 3), gates(0, 3)
    params = {"gate_weight": weight, "gate_bias": bias}
    padded = jnp.concatenate([x, jnp.full((5, 2, 3), padding)], axis=1)
    shown = jnp.arange(6)[None, :, None] < 4
    train, evaluate = layer_of(api, x)
    y, statistics = train(params, None, padded, mask=shown)
    expected, expected_statistics = train(params, None, x)
    assert_same((y[:, :4], statistics), (expected, expected_statistics))
    assert_same(evaluate(params, statistics, padded, mask=shown)[:, :4], evaluate(params, statistics, x))
    if np.isfinite(padding):  # a mask that is forgotten shows
        assert np.abs(evaluate(params, statistics, padded)[:, :4] - evaluate(params, statistics, x)).max() > 0.01


def test_sequences_of_different_lengths_are_gated_by_their_own_positions():
    x, (weight, bias) = normal(0, 3, 4, 2), gates(0, 2)
    lengths = (1, 4, 2)
    shown = jnp.arange(4)[None, :, None] < jnp.array(lengths)[:, None, None]
    gate = instance_gate(x, weight, bias, mask=shown)
    for k, length in enumerate(lengths):
        assert_same(gate[k], instance_gate(x[k : k + 1, :length], weight, bias)[0])


def test_an_example_that_is_hidden_everywhere_is_gated_as_without_a_mask():
    x, (weight, bias) = normal(0, 3, 4, 2), gates(0, 2)
    shown = jnp.array([True, False, True])[:, None, None]
    assert_same(instance_gate(x, weight, bias, mask=shown), instance_gate(x, weight, bias))
    of_a_feature = instance_gate(x, weight, bias, mask=jnp.array([[[True, False]]]))
    assert_same(of_a_feature, instance_gate(x, weight, bias))


# Dtypes and errors.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_pooled_in_float32(dtype):
    """A sum of 4,096 values of about 1, which float16 and bfloat16 hold to one digit or not at all."""
    x = (1 + normal(0, 2, 4096, 3, mean=0, deviation=0.5)).astype(dtype)
    weight, bias = (each.astype(jnp.float32) for each in gates(0, 3))
    gate = instance_gate(x, weight, bias)
    assert gate.dtype == jnp.float32
    expected = instance_gate(x.astype(float), weight.astype(float), bias.astype(float))
    np.testing.assert_allclose(gate, expected, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    x, three, four = normal(0, 5, 3), jnp.zeros(3), jnp.zeros(4)
    with pytest.raises(ValueError, match=r"gate's weight is of 4 features, but an input of shape \(5, 3\) has 3"):
        instance_gate(x, four, three)
    with pytest.raises(ValueError, match="gate's bias is of 4 features"):
        instance_gate(x, three, four)
    with pytest.raises(ValueError, match="running statistic is of 4 features"):
        instance_enhanced_normalize(x, four, three, three, three)
    with pytest.raises(ValueError, match=r"mask has shape \(5,\)"):
        instance_gate(x, three, three, mask=jnp.ones(5, bool))
    with pytest.raises(TypeError, match="of real numbers"):
        instance_gate(x.astype(complex), three, three)
