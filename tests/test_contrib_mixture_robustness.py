"""What Mixture Normalization keeps, and what hard numbers, masks, and batches that are split do to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same, normal, weigh
from mixtures import inference, modes, probabilities, some_mixture, step, traced_step, written_out

from bnp_optax.contrib import Mixture, initial_mixture, mixture_normalize, mixture_normalize_inference
from bnp_optax.contrib import linen as contrib_linen
from bnp_optax.contrib import nnx as contrib_nnx
from bnp_optax.contrib.mixture import FLOOR, component_moments, normalize_by_components, responsibilities

pytestmark = pytest.mark.usefixtures("x64")


def gradient_of_step(x, mixture, loss=weigh, **options):
    """Returns the gradient of a loss of what a step normalizes, and the step's result."""

    def loss_fn(x, mixture):
        result = traced_step(x, mixture, **options)
        return loss(result.normalized), result

    return jax.jit(jax.grad(loss_fn, has_aux=True))(x, mixture)


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
