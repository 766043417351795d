"""Adaptive gradient clipping: bounds and invariances that follow from its formula, its options, and Optax's own."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clipped_layers import LINEN, Dense, linen_layers, random_trees
from helpers import flatten, weigh, with_statistics

import bnp_optax as bnp
from bnp_optax.contrib import adaptive_grad_clip

pytestmark = pytest.mark.usefixtures("x64")

# What follows from the formula.


DENSE = bnp.Layers((bnp.Layer.dense(("kernel",), (4, 5), bias=("bias",)),))


@functools.partial(jax.jit, static_argnames="layers")
def run(params, gradients, clipping=0.1, eps=1e-3, layers=DENSE):
    tx = adaptive_grad_clip(clipping, layers, eps)
    return tx.update(gradients, tx.init(params), params)[0]


def dense_trees(seed, weights=1.0, gradients=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda scale: {  # noqa: E731
        "kernel": jnp.asarray(scale * rng.normal(size=(4, 5)) * rng.lognormal(0, 3, size=5)),
        "bias": jnp.asarray(scale * rng.normal(size=5)),
    }
    return draw(weights), draw(gradients)


def norms(tree):
    return jnp.append(jnp.linalg.norm(tree["kernel"], axis=0), jnp.linalg.norm(tree["bias"]))


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.floats(1e-8, 1e3),
    gradients=st.floats(1e-8, 1e8),
    clipping=st.floats(1e-3, 10),
    eps=st.floats(0, 1),
)
def test_norms_are_bounded_and_clipping_again_changes_nothing(seed, weights, gradients, clipping, eps):
    params, gradients = dense_trees(seed, weights, gradients)
    once = run(params, gradients, clipping, eps)
    bounds = clipping * jnp.maximum(norms(params), eps)
    assert (norms(once) <= bounds * (1 + 1e-14)).all()
    twice = run(params, once, clipping, eps)
    if jnp.min(bounds) > 1e-6:  # else what rounding leaves above a bound is divided by a millionth
        chex.assert_trees_all_close(twice, once, rtol=1e-14)
    assert (norms(twice) <= bounds * (1 + 1e-14)).all()
    below = norms(gradients) <= bounds
    chex.assert_trees_all_equal(once["kernel"][:, below[:-1]], gradients["kernel"][:, below[:-1]])
    # What is clipped keeps its direction, and has the bound for its norm unless it is tiny.
    clipped = ~below & (norms(gradients) > 1e-6)
    np.testing.assert_allclose(norms(once)[clipped], bounds[clipped], rtol=1e-12)


@hypothesis.given(seed=st.integers(0, 2**32 - 1), factor=st.floats(1e-3, 1e3))
def test_permuted_units_and_scaled_layers_are_clipped_alike(seed, factor):
    """Under eps 0 and above norms of 1e-6, scaling weights and gradients scales the update."""
    params, gradients = dense_trees(seed, 1.0, 10.0)
    updates = run(params, gradients)
    order = np.random.default_rng(seed).permutation(5)
    permuted = jax.tree.map(lambda leaf: leaf[..., order], (params, gradients))
    chex.assert_trees_all_close(run(*permuted), jax.tree.map(lambda leaf: leaf[..., order], updates), rtol=1e-14)
    scaled = jax.tree.map(lambda leaf: factor * leaf, (params, gradients))
    expected = jax.tree.map(lambda leaf: factor * leaf, run(params, gradients, eps=0.0))
    chex.assert_trees_all_close(run(*scaled, eps=0.0), expected, rtol=1e-12)


def test_gradients_whose_squares_overflow_are_clipped_and_not_lost():
    layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1), bias=("b",)),))
    params = {"w": jnp.array([[3.0], [4.0]]), "b": jnp.array([1.0])}
    gradients = {"w": jnp.array([[4e30], [3e30]]), "b": jnp.array([-1e30])}
    tx = adaptive_grad_clip(0.01, layers)
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [[0.04], [0.03]], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], [-0.01], rtol=1e-5)


def test_infinite_clipping_changes_nothing_and_zero_gradients_stay_zero():
    params, gradients = dense_trees(0, 1.0, 1e6)
    chex.assert_trees_all_equal(run(params, gradients, np.inf), gradients)
    zeros = optax.tree.zeros_like(gradients)
    chex.assert_trees_all_equal(run(params, zeros), zeros)


def test_a_zero_bias_gets_a_gradient_of_norm_lambda_eps():
    params, gradients = dense_trees(0)
    updates = run({**params, "bias": jnp.zeros(5)}, gradients, 0.01, 1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(updates["bias"]), 0.01 * 1e-3, rtol=1e-14)


def test_norms_below_a_millionth_divide_as_a_millionth():
    params = {"kernel": jnp.full((4, 5), 1e-9), "bias": jnp.zeros(5)}
    gradients = {"kernel": jnp.full((4, 5), 1e-7), "bias": jnp.zeros(5)}
    expected = 1e-7 * (0.1 * 1e-6) / 1e-6
    np.testing.assert_allclose(run(params, gradients, 0.1, 1e-6)["kernel"], expected, rtol=1e-14)


@pytest.mark.usefixtures("standard_promotion")
def test_adam_undoes_steady_clipping():
    """Adam divides a constant factor out again, where its eps is 0; behind SGD the same clipping shows."""
    params, gradients = dense_trees(0, 1.0, 1e3)
    clipped = run(params, gradients)
    assert (norms(clipped) < 0.01 * norms(gradients)).any()

    def third_step(optimizer, gradients):
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, params)
        return updates

    adam = optax.adam(1e-3, eps=0.0)
    chex.assert_trees_all_close(third_step(adam, clipped), third_step(adam, gradients), rtol=1e-12)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(third_step(optax.sgd(0.1), clipped), third_step(optax.sgd(0.1), gradients))


# Options, dtypes, numbers that are not finite.


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("clipping", [0.05, lambda step: 0.05 * (step + 1)], ids=["number", "schedule"])
def test_clipping_may_be_injected_and_traced(clipping):
    params, gradients = dense_trees(0, 1.0, 100.0)
    tx = optax.inject_hyperparams(adaptive_grad_clip)(clipping, DENSE)
    state = tx.init(params)
    for step in range(2):
        updates, state = jax.jit(tx.update)(gradients, state, params)
        value = clipping(step) if callable(clipping) else clipping
        chex.assert_trees_all_close(updates, run(params, gradients, value), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_is_clipped_in_float32(dtype):
    """The square of a float16 gradient of 300 overflows; the norms here do not."""
    params = optax.tree.cast({"kernel": jnp.full((4, 5), 2.0), "bias": jnp.ones(5)}, dtype)
    gradients = optax.tree.cast({"kernel": jnp.full((4, 5), 300.0), "bias": jnp.full(5, 300.0)}, dtype)
    updates = run(params, gradients, 0.1)
    chex.assert_trees_all_equal_dtypes(updates, gradients)
    np.testing.assert_allclose(updates["kernel"].astype(float), 0.2, rtol=4e-3)  # of norm 0.1 * 4
    np.testing.assert_allclose(updates["bias"].astype(float), 0.1, rtol=4e-3)  # of norm 0.1 * sqrt(5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_unit_that_is_not_finite_remains_so_and_changes_no_other(bad):
    params, gradients = dense_trees(0)
    spoilt = {**gradients, "kernel": gradients["kernel"].at[1, 2].set(bad)}
    updates, expected = run(params, spoilt), run(params, gradients)
    assert not np.isfinite(updates["kernel"][:, 2]).all()
    others = np.array([0, 1, 3, 4])
    chex.assert_trees_all_equal(updates["kernel"][:, others], expected["kernel"][:, others])
    chex.assert_trees_all_equal(updates["bias"], expected["bias"])


def test_clipping_inside_of_bnp_is_by_the_norms_of_bnps_variables():
    """The kernel's rows times the deviations, and the bias with what the means bring, as the change of variables is."""
    params, gradients = dense_trees(0, 1.0, 10.0)
    mean, sd = np.array([3.0, -1.0, 0.5, 0.0]), np.array([4.0, 0.5, 2.0, 1.0])
    inner = optax.chain(adaptive_grad_clip(0.1, DENSE), optax.scale(-1.0))
    tx = bnp.preconditioned(inner, DENSE, eps=0.0, eps_relative=0.0, scaling="none", variance="batch")
    state = tx.init(params)
    statistics = with_statistics(state.statistics, "kernel", mean=mean, variance=sd**2)
    state = state._replace(statistics=statistics)
    updates, _ = tx.update(gradients, state, params, intermediates=bnp.KEEP_STATISTICS)
    z = {"kernel": sd[:, None] * params["kernel"], "bias": params["bias"] + mean @ params["kernel"]}
    of_bias = gradients["bias"]
    of_kernel = (gradients["kernel"] - mean[:, None] * of_bias[None]) / sd[:, None]
    step = jax.tree.map(jnp.negative, run(z, {"kernel": of_kernel, "bias": of_bias}))
    kernel = step["kernel"] / sd[:, None]
    expected = {"kernel": kernel, "bias": step["bias"] - mean @ kernel}
    chex.assert_trees_all_close(updates, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clipping": 0.0}, "clipping must be positive, but is 0.0"),
        ({"clipping": -1}, "clipping must be positive, but is -1"),
        ({"clipping": np.nan}, "clipping must be positive, but is nan"),
        ({"eps": -1e-3}, "eps must be finite and not negative, but is -0.001"),
        ({"eps": np.inf}, "eps must be finite and not negative, but is inf"),
        ({"layers": bnp.Layers(())}, "layers holds no layer to act on"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adaptive_grad_clip(**{"clipping": 0.1, "layers": DENSE} | options)


def test_other_mistakes_are_refused():
    params, gradients = dense_trees(0)
    with pytest.raises(TypeError, match=r"layers must be a bnp_optax\.Layers.*not dict"):
        adaptive_grad_clip(0.1, {})
    tx = adaptive_grad_clip(0.1, DENSE)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(gradients, tx.init(params))
    with pytest.raises(ValueError, match="layers describes kernel, which the parameters do not hold"):
        tx.init({"weights": params["kernel"]})


# Optax's transformation, which sees shapes alone.


def both(name):
    """Returns the updates of Optax's transformation and of ours, flat."""
    layers, shapes = linen_layers(name)
    params, gradients = random_trees(shapes, LINEN[name][2])
    own, theirs = adaptive_grad_clip(0.1, layers), optax.adaptive_grad_clip(0.1)
    return tuple(flatten(jax.jit(tx.update)(gradients, tx.init(params), params)[0]) for tx in (theirs, own))


AGREES = [
    "dense",
    "convolution 2d",
    "convolution 3d",
    "grouped convolution",
    "depthwise convolution",
    "transposed convolution",
]
DIFFERS = {
    "convolution 1d": "kernel",
    "dense of one input": "kernel",
    "1x1 convolution of one channel": "kernel",
    "transposed kernel": "kernel",
    "attention": "attention/out/kernel",
    "scanned": "layer/kernel",
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", AGREES)
def test_optax_agrees_where_shapes_tell_the_units(name):
    theirs, own = both(name)
    chex.assert_trees_all_close(theirs, own, rtol=1e-14)


@pytest.mark.usefixtures("standard_promotion")
def test_optax_agrees_on_queries_keys_and_values():
    theirs, own = both("attention")
    for name in ("query", "key", "value"):
        path = f"attention/{name}/kernel"
        np.testing.assert_allclose(theirs[path], own[path], rtol=1e-14)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("name", "path"), DIFFERS.items())
def test_optax_takes_something_else_for_a_unit(name, path):
    """Ours equals the loop over units, so that this is a fault of the other for what the method says."""
    theirs, own = both(name)
    assert np.max(np.abs(theirs[path] - own[path]) / np.abs(own[path])) > 0.1


@pytest.mark.usefixtures("standard_promotion")
def test_optax_refuses_stacked_convolutions_of_three_dimensions():
    kernel = {"kernel": jnp.ones((2, 3, 3, 3, 4, 5))}
    with pytest.raises(ValueError, match="Use axis parameter"):
        optax.adaptive_grad_clip(0.1).update(kernel, optax.EmptyState(), kernel)
    parameter = bnp.Parameter(("kernel",), (2, 3, 3, 3, 4, 5), split=(2, 3, 3, 3, 4, 5), roles="swwwio")
    layers = bnp.Layers((bnp.Layer("Conv", parameter, None, record="kernel"),))
    updates = run(kernel, kernel, 0.1, layers=layers)
    np.testing.assert_allclose(updates["kernel"], np.full(kernel["kernel"].shape, 0.1), rtol=1e-14)


def test_a_step_of_rate_1_changes_no_unit_by_more_than_the_fraction():
    """However large the gradient is."""
    model, x = Dense(3), jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)))
    params = model.init(jax.random.key(0), x)["params"]
    layers = bnp.linen.find_layers(model, x)
    tx = optax.chain(adaptive_grad_clip(0.1, layers), optax.sgd(1.0))
    gradients = jax.grad(lambda params: 1e6 * weigh(model.apply({"params": params}, x)))(params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_array_less(
        jnp.linalg.norm(updates["kernel"], axis=0), 0.1 * jnp.linalg.norm(params["kernel"], axis=0) * (1 + 1e-12)
    )
