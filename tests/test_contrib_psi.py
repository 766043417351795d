"""PSI-SGD, against its definition in NumPy, and the facts that its theory rests on: in float64, of networks with BN."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal
from invariant_networks import STEPS, BatchNorm, GroupNorm, LayerNorm, Net, Problem, rescaled

import bnp_optax as bnp
from bnp_optax.contrib import PsiSgdState, psi_sgd, scale_by_psi

pytestmark = pytest.mark.usefixtures("x64")

RATE = 0.1


def falling(step):
    return 0.3 / (1 + jnp.asarray(step, float))


@pytest.fixture(scope="module")
def bn(x64):
    return Problem()


def norms(tree, name):
    kernel = np.asarray(tree[name]["kernel"])
    return np.sqrt(np.square(kernel).sum(tuple(range(kernel.ndim - 1))))


# The update.


@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 4), 1), ((1, 1), 1), ((2, 3, 6), 1), ((3, 3, 1, 8), 1), ((2, 1, 2, 6), 3)]
)
def test_every_group_of_units_is_scaled_by_its_squared_norm(shape, groups):
    """A loop over units; kernels of two axes are of dense layers, of more of convolutions, one of them grouped."""
    outputs, image = shape[-1], (4,) * (len(shape) - 2)
    layer = nn.Conv(outputs, shape[:-2], feature_group_count=groups) if image else nn.Dense(outputs)
    layers = bnp.linen.find_layers(layer, jnp.ones((2, *image, shape[-2] * groups), jnp.float32))
    kernel, gradient = np.random.default_rng(0).normal(size=(2, *shape))
    tree, gradients = ({"kernel": jnp.asarray(x), "bias": jnp.ones(outputs)} for x in (kernel, gradient))
    widths = [width for width in range(1, outputs + 1) if outputs % width == 0]

    @jax.jit
    def updates_of_all(gradients, tree):
        all_of_them = [scale_by_psi(layers, num_groups) for num_groups in (None, *(outputs // w for w in widths))]
        return [tx.update(gradients, tx.init(tree), tree)[0] for tx in all_of_them]

    for width, updates in zip((1, *widths), updates_of_all(gradients, tree), strict=True):
        expected = gradient.copy()
        for start in range(0, outputs, width):
            group = slice(start, start + width)
            expected[..., group] *= (kernel[..., group] ** 2).sum()
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-13)
        np.testing.assert_array_equal(updates["bias"], 1)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_papers_loop(bn, momentum):
    """Algorithm 1, with a learning rate that falls, as loops over units."""
    weights = jax.tree.map(np.array, bn.params)
    momenta = jax.tree.map(np.zeros_like, weights)
    for t in range(STEPS):
        gradients = jax.tree.map(np.asarray, bn.gradients(weights))
        for name, leaves in weights.items():
            for leaf, w in leaves.items():
                u, g = momenta[name][leaf], gradients[name][leaf]
                if leaf == "kernel" and name in bn.layers:
                    g = np.stack([(w[..., i] ** 2).sum() * g[..., i] for i in range(w.shape[-1])], -1)
                u[...] = (momentum or 0) * u - float(falling(t)) * g
                w += u
    of_paper = optax.chain(scale_by_psi(bn.layers), optax.scale_by_learning_rate(falling), optax.trace(momentum or 0.0))
    _, expected, _ = bn.path(of_paper)
    _, actual, state = bn.path(psi_sgd(falling, bn.layers, momentum))
    chex.assert_trees_all_close((expected, actual), (weights, weights), rtol=1e-11, atol=1e-12)
    assert state.count == STEPS
    if momentum is None:
        assert state.trace is None
    else:
        chex.assert_trees_all_close(state.trace, momenta, rtol=1e-9, atol=1e-12)


def test_the_usual_order_of_momentum_and_rate_equals_it_under_a_constant_rate_alone(bn):
    for rate, is_equal in ((0.1, True), (falling, False)):
        usual = optax.chain(scale_by_psi(bn.layers), optax.trace(0.9), optax.scale_by_learning_rate(rate))
        losses, _, _ = bn.path(usual)
        expected, _, _ = bn.path(psi_sgd(rate, bn.layers, 0.9))
        assert np.allclose(losses, expected, rtol=1e-10) == is_equal


def test_it_is_sgd_where_norms_are_one(bn):
    units = {name: dict(leaves) for name, leaves in bn.params.items()}
    for name in bn.layers:
        units[name]["kernel"] = jnp.asarray(np.asarray(units[name]["kernel"]) / norms(units, name))
    _, actual, _ = bn.path(psi_sgd(RATE, bn.layers, 0.9), units, steps=1)
    _, expected, _ = bn.path(optax.sgd(RATE, 0.9), units, steps=1)
    chex.assert_trees_all_close(actual, expected, rtol=1e-14, atol=1e-15)


def test_what_no_layer_covers_takes_the_steps_of_sgd(bn):
    """In `psi_sgd`; a partition gives it others."""
    tx = psi_sgd(RATE, bn.layers, 0.9)
    state, sgd = tx.init(bn.params), optax.sgd(RATE, 0.9)
    sgd_state = sgd.init(bn.params)
    for seed in range(3):
        gradients = jax.tree.map(lambda leaf, seed=seed: normal(seed, *leaf.shape), bn.params)
        updates, state = tx.update(gradients, state, bn.params)
        expected, sgd_state = sgd.update(gradients, sgd_state)
        for name, leaves in updates.items():
            for leaf, update in leaves.items():
                same = np.allclose(update, expected[name][leaf], rtol=1e-13)
                assert same != (leaf == "kernel" and name in bn.layers)

    covered = {layer.kernel.path for layer in bn.layers.included}
    labels = jax.tree_util.tree_map_with_path(
        lambda keys, _: "psi" if tuple(key.key for key in keys) in covered else "rest", bn.params
    )
    parts = optax.partition({"psi": psi_sgd(RATE, bn.layers, 0.9), "rest": optax.adam(0.01)}, labels)
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam
        actual, _ = parts.update(gradients, parts.init(bn.params), bn.params)
        of_adam, _ = optax.adam(0.01).update(gradients, optax.adam(0.01).init(bn.params))
    of_psi, _ = tx.update(gradients, tx.init(bn.params), bn.params)
    chex.assert_trees_all_equal(actual["conv"], {"kernel": of_psi["conv"]["kernel"], "bias": of_adam["conv"]["bias"]})
    chex.assert_trees_all_equal(actual["out"], of_adam["out"])


# Theory.


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_rescaled_weights_stay_rescaled(bn, momentum):
    """Theorem 1: the steps commute with T_a, which multiplies the weights of every unit, and their momentum."""
    tx = psi_sgd(RATE, bn.layers, momentum)
    _, params, state = bn.path(tx, steps=3)  # so that the momentum is not 0
    losses, end, _ = bn.path(tx, params, state)
    moved = state if momentum is None else state._replace(trace=rescaled(bn, state.trace))
    actual_losses, actual, _ = bn.path(tx, rescaled(bn, params), moved)
    np.testing.assert_allclose(actual_losses, losses, rtol=1e-11)
    chex.assert_trees_all_close(actual, rescaled(bn, end), rtol=1e-9, atol=1e-11)


def test_rescaled_weights_do_not_stay_so_where_they_should_not(bn):
    """Under plain SGD; with a momentum that was not rescaled; with coupled weight decay, but not with decoupled."""

    def differs(tx, state_of=lambda tx, params: tx.init(params)):
        losses, _, _ = bn.path(tx, state=state_of(tx, bn.params))
        others, _, _ = bn.path(tx, rescaled(bn, bn.params, decades=1), state_of(tx, bn.params))
        return not np.allclose(losses, others, rtol=1e-4)

    rate, decay = optax.scale_by_learning_rate(RATE), optax.add_decayed_weights(0.1)
    assert differs(optax.sgd(RATE))
    kicked = lambda tx, params: PsiSgdState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.ones_like, params))  # noqa: E731
    assert differs(psi_sgd(RATE, bn.layers, 0.9), kicked)
    assert differs(optax.chain(decay, scale_by_psi(bn.layers), rate))
    assert not differs(optax.chain(scale_by_psi(bn.layers), decay, rate))


@pytest.mark.parametrize("norm", [LayerNorm, functools.partial(GroupNorm, num_groups=2)], ids=["LN", "GN"])
def test_in_front_of_other_normalizations_the_weights_of_a_group_share_their_scale(x64, norm):
    problem, num_groups = Problem(Net((norm,) * 3, use_bias=False)), 1 if norm is LayerNorm else 2
    scaled = {name: dict(leaves) for name, leaves in problem.params.items()}
    for name in problem.layers:
        kernel = np.asarray(scaled[name]["kernel"])
        factors = np.repeat([7.0, 0.2][:num_groups], kernel.shape[-1] // num_groups)
        scaled[name]["kernel"] = jnp.asarray(kernel * factors)
    tx = psi_sgd(RATE, problem.layers, 0.9, num_groups=num_groups)
    losses, _, _ = problem.path(tx)
    np.testing.assert_allclose(problem.path(tx, scaled)[0], losses, rtol=1e-10)
    assert losses[-1] < 0.9 * losses[0]
    without = psi_sgd(RATE, problem.layers, 0.9)  # another path, as it lets units of a group grow apart
    assert not np.allclose(problem.path(without)[0], losses, rtol=1e-3)


def test_norms_grow_by_what_the_gradient_says(bn):
    """Lemma 1, the gradient is orthogonal; so ||w'||^2 = ||w||^2 (1 + rate^2 ||w||^2 ||g||^2)."""
    gradients = bn.gradients(bn.params)
    _, after, _ = bn.path(psi_sgd(RATE, bn.layers), steps=1)
    for name in bn.layers:
        w, g = (np.asarray(tree[name]["kernel"]) for tree in (bn.params, gradients))
        before, of_gradient = norms(bn.params, name), norms(gradients, name)
        inner = np.abs((w * g).sum(tuple(range(w.ndim - 1))))
        assert (inner <= 1e-14 * before * max(of_gradient)).all()
        expected = before**2 * (1 + (RATE * before * of_gradient) ** 2)
        np.testing.assert_allclose(norms(after, name) ** 2, expected, rtol=1e-13)


def test_it_is_sgd_on_spheres(bn):
    """Without momentum: SGD on weights of norm 1, which are normalized after every step."""
    weights = {name: dict(leaves) for name, leaves in bn.params.items()}
    expected = []
    for _ in range(STEPS):
        for name in bn.layers:
            weights[name]["kernel"] = jnp.asarray(np.asarray(weights[name]["kernel"]) / norms(weights, name))
        expected.append(bn.loss(weights))
        weights = jax.tree.map(lambda w, g: w - RATE * g, weights, bn.gradients(weights))
    losses, _, _ = bn.path(psi_sgd(RATE, bn.layers))
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    assert losses[-1] < 0.9 * losses[0]


# The bound of norms.


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_bound_changes_no_function_on_the_path(bn, momentum):
    free, bounded = (psi_sgd(0.5, bn.layers, momentum, max_norm) for max_norm in (None, 1.0))
    losses, large, _ = bn.path(free)
    actual, params, _ = bn.path(bounded)
    np.testing.assert_allclose(actual, losses, rtol=1e-9)
    for name in bn.layers:
        assert norms(large, name).max() > 1.05
        assert norms(params, name).max() <= 1 + 1e-12


def test_units_beyond_the_bound_are_normalized_with_their_momentum():
    """In one step; the others, and zeros, take it as it is."""
    layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 4)),))
    params = {"w": jnp.array([[3.0, 0.3, 0.0, 30.0], [4.0, 0.4, 0.0, 40.0]])}
    gradients = {"w": jnp.array([[-4.0, 4.0, 1.0, 0.0], [3.0, -3.0, 1.0, 0.0]]) / 100}
    tx = psi_sgd(0.5, layers, 0.9, max_norm=5)
    updates, state = tx.update(gradients, tx.init(params), params)
    u = -0.5 * np.array([25, 0.25, 0, 2500]) * np.asarray(gradients["w"])
    new = np.asarray(params["w"]) + u
    factors = 1 / np.array([np.linalg.norm(new[:, 0]), 1, 1, 50])
    np.testing.assert_allclose(params["w"] + updates["w"], new * factors, rtol=1e-14)
    np.testing.assert_allclose(state.trace["w"], u * factors, rtol=1e-14)
    assert np.linalg.norm(new[:, 0]) > 5
    np.testing.assert_array_equal(updates["w"][:, 1:3], u[:, 1:3])
    whole = psi_sgd(0.5, layers, 0.9, max_norm=5, num_groups=1)
    updates, _ = whole.update(gradients, whole.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(params["w"] + updates["w"]), 1, rtol=1e-14)


def test_norms_that_overflow_are_not_hidden():
    layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1)),))
    params = {"w": jnp.full((2, 1), 1e3, jnp.float32)}
    tx = psi_sgd(1.0, layers)
    updates, _ = tx.update({"w": jnp.full((2, 1), 1e33, jnp.float32)}, tx.init(params), params)
    assert not np.isfinite(updates["w"]).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_bound_keeps_directions_in_low_precision(dtype):
    """Of parameters that a single step to norm 1 would round away."""
    layers = bnp.Layers((bnp.Layer.dense(("w",), (64, 3)),))
    params = {"w": (100 * normal(0, 64, 3, mean=0, deviation=1)).astype(dtype)}
    start = np.asarray(params["w"], np.float64)
    tx = psi_sgd(0.1, layers, 0.9, max_norm=100.0)
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(30):
        updates, state = tx.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal_dtypes((params, state.trace), (zeros, zeros))
    end = np.asarray(params["w"], np.float64)
    assert (np.linalg.norm(end, axis=0) <= 100).all()
    cosines = (start * end).sum(0) / np.linalg.norm(start, axis=0) / np.linalg.norm(end, axis=0)
    assert (cosines > 0.999).all()


def test_steps_are_as_precise_as_the_parameters():
    """Gradients of bfloat16: a step to norm 1 is not rounded to them."""
    layers = bnp.Layers((bnp.Layer.dense(("w",), (64, 3)),))
    params = {"w": 5e3 * normal(0, 64, 3, mean=0, deviation=1).astype(jnp.float32)}
    for momentum in (None, 0.9):
        tx = psi_sgd(0.1, layers, momentum)
        updates, _ = tx.update({"w": jnp.zeros((64, 3), jnp.bfloat16)}, tx.init(params), params)
        np.testing.assert_allclose(np.linalg.norm(params["w"] + updates["w"], axis=0), 1, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_gradients_of_float16_do_not_overflow_before_the_rate(dtype):
    """Times squared norms they are beyond 65504, their steps are not."""
    layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1)),))
    params, gradients = {"w": jnp.array([[300.0], [400.0]], dtype)}, {"w": jnp.array([[0.4], [-0.3]], jnp.float16)}
    for momentum in (None, 0.9):
        tx = psi_sgd(1e-4, layers, momentum)
        updates, _ = tx.update(gradients, tx.init(params), params)
        assert updates["w"].dtype == dtype
        np.testing.assert_allclose(updates["w"], [[-10], [7.5]], rtol=2e-3)


# What it is given.


def test_traced_rates_schedules_and_injected_hyperparameters_are_those_of_numbers(bn):
    _, params, state = bn.path(psi_sgd(RATE, bn.layers, 0.9, 1.0), steps=2)
    gradients = bn.gradients(params)

    def update(tx):
        return tx.update(gradients, state, params)

    expected = update(psi_sgd(RATE, bn.layers, 0.9, 1.0))
    traced = jax.jit(lambda rate, momentum, max_norm: update(psi_sgd(rate, bn.layers, momentum, max_norm)))
    chex.assert_trees_all_close(traced(RATE, 0.9, 1.0), expected, rtol=1e-12, atol=1e-15)
    expected, _, _ = bn.path(psi_sgd(RATE, bn.layers, 0.9, 1.0))
    injected = optax.inject_hyperparams(psi_sgd, static_args=("layers", "num_groups"))
    with jax.numpy_dtype_promotion("standard"):
        for rate in (RATE, optax.constant_schedule(RATE)):
            losses, _, state = bn.path(injected(rate, layers=bn.layers, momentum=0.9, max_norm=1.0))
            np.testing.assert_allclose(losses, expected, rtol=1e-6)  # as it holds them in float32
            assert np.isclose(state.hyperparams["learning_rate"], RATE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), or None, but is 1.0"),
        ({"momentum": -0.1}, "but is -0.1"),
        ({"max_norm": 0.5}, "max_norm must be finite and at least 1, .* but is 0.5"),
        ({"max_norm": float("inf")}, "max_norm must be finite"),
        ({"max_norm": float("nan")}, "max_norm must be finite"),
    ],
)
def test_options_out_of_range_are_refused(bn, options, message):
    with pytest.raises(ValueError, match=message):
        psi_sgd(RATE, bn.layers, **options)


def test_groups_that_do_not_divide_the_outputs_are_refused(bn):
    tx = psi_sgd(RATE, bn.layers, num_groups=3)
    with pytest.raises(ValueError, match="num_groups is 3, which must divide the 4 outputs"):
        tx.update(bn.params, tx.init(bn.params), bn.params)


# Where it ends.


def test_epsilon_breaks_the_invariance_of_small_weights(x64):
    """As the variance that BatchNorm adds it to shrinks."""
    problem = Problem(Net((functools.partial(BatchNorm, epsilon=1e-5),) * 3))

    def path(scale):
        params = {name: dict(leaves) for name, leaves in problem.params.items()}
        for name in problem.layers:
            params[name]["kernel"] = scale * params[name]["kernel"]
        return problem.path(psi_sgd(RATE, problem.layers), params)[0]

    expected = path(1.0)
    np.testing.assert_allclose(path(100.0), expected, rtol=1e-3)
    assert np.abs(path(1e-4) - expected).max() > 0.1
