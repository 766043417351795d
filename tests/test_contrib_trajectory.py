"""Trajectory regularization, against its algorithm as a loop, in closed form, and as a wrapper: in float64."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import compiled, normal
from transformations import DENSE, dense_params

import bnp_optax as bnp
from bnp_optax.contrib.trajectory import TrajectoryRegularizedState, trajectory_regularized

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

RNG = np.random.default_rng(0)
MATRIX, TARGET, START = RNG.normal(size=(4, 4)), RNG.normal(size=4), RNG.normal(size=4)


def gradient_of(w):
    """Of a function with several minima, the same numbers for NumPy and for JAX."""
    return MATRIX.T @ np.tanh(MATRIX @ np.asarray(w, np.float64) - TARGET)


def path(tx, steps, start=START, gradient=gradient_of):
    """Returns the parameters before every step and after the last, and the states."""
    update = jax.jit(tx.update)
    w = jnp.asarray(start)
    state = tx.init(w)
    points, states = [np.asarray(w)], [state]
    for _ in range(steps):
        updates, state = update(jnp.asarray(gradient(w)), state, w)
        w = optax.apply_updates(w, updates)
        points.append(np.asarray(w))
        states.append(state)
    return np.array(points), states


def falling(rate, steps):
    """A tenth of the rate at the half, a hundredth at three quarters."""
    return optax.piecewise_constant_schedule(rate, {steps // 2: 0.1, 3 * steps // 4: 0.1})


class TestAlgorithm:
    """The authors' loop, in NumPy."""

    @staticmethod
    def loop(steps, rate, strength, period, momentum, weight_decay, divided=True):
        w, buffer, points = START.copy(), np.zeros(4), [START.copy()]
        for t in range(steps):
            i = t % period
            if i == 0:
                anchor = w.copy()
            lr = rate * (1 if t < steps // 2 else 0.1 if t < 3 * steps // 4 else 0.01)
            lam = strength * rate / lr
            g = gradient_of(w) + 2 * lam * (w - anchor)
            g = g + weight_decay * w
            buffer = momentum * buffer + g
            w = w - lr / ((i + 1) if divided else 1) * buffer
            points.append(w.copy())
        return np.array(points)

    @pytest.mark.parametrize("period", [2, 7, 10])
    @pytest.mark.parametrize("divided", [True, False])
    def test_momentum_persists_and_weight_decay_is_added(self, period, divided):
        steps, rate, strength, momentum, weight_decay = 57, 0.05, 0.1, 0.9, 0.01
        schedule = falling(rate, steps)
        inner = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum))
        tx = trajectory_regularized(
            inner, lambda count: 2 * strength * rate / schedule(count), period, decay_step_size=divided
        )
        points, _ = path(tx, steps)
        expected = self.loop(steps, rate, strength, period, momentum, weight_decay, divided)
        np.testing.assert_allclose(points, expected, rtol=0, atol=4e-15)
        assert np.abs(points[-1] - path(inner, steps)[0][-1]).max() > 1e-3

    def test_a_number_is_a_schedule_that_stays(self):
        inner = optax.adam(0.1)
        constant = path(trajectory_regularized(inner, 0.7), 25)[0]
        np.testing.assert_array_equal(constant, path(trajectory_regularized(inner, lambda count: 0.7), 25)[0])

    def test_the_schedule_counts_all_steps(self):
        seen = []
        tx = trajectory_regularized(optax.sgd(0.1), lambda count: seen.append(int(count)) or 0.1, period=3)
        state = tx.init(jnp.ones(2))
        for _ in range(7):
            _, state = tx.update(jnp.ones(2), state, jnp.ones(2))
        assert seen == list(range(7))


class TestClosedForms:
    """Of gradient descent, without momentum."""

    rate, pull, period = 0.3, 0.8, 10

    def test_a_quadratic(self):
        """Within a period the distance to the minimum of loss and pull together is multiplied step by step."""
        curvature = np.array([0.1, 1.0, 3.0, 5.0])
        tx = trajectory_regularized(optax.sgd(self.rate), self.pull, self.period)
        points, _ = path(tx, 3 * self.period, gradient=lambda w: curvature * np.asarray(w))
        start = START
        for loop in range(3):
            minimum = self.pull * start / (curvature + self.pull)
            factors = [1 - self.rate * (curvature + self.pull) / (i + 1) for i in range(self.period)]
            for i in range(1, self.period + 1):
                expected = minimum + (start - minimum) * np.prod(factors[:i], axis=0)
                np.testing.assert_allclose(points[loop * self.period + i], expected, rtol=0, atol=1e-13)
            start = points[(loop + 1) * self.period]

    def test_a_constant_gradient(self):
        g = np.array([1.0, -2.0, 0.5, 3.0])
        tx = trajectory_regularized(optax.sgd(self.rate), self.pull, self.period)
        points, _ = path(tx, self.period, gradient=lambda w: g)
        lengths = [
            math.prod(1 - self.rate * self.pull / (j + 1) for j in range(i + 1, self.period)) / (i + 1)
            for i in range(self.period)
        ]
        np.testing.assert_allclose(points[-1] - START, -self.rate * g * sum(lengths), rtol=0, atol=1e-14)

    def test_steps_are_shorter_by_the_mean_of_their_divisors(self):
        tx = trajectory_regularized(optax.sgd(1.0), 0.0, self.period)
        points, _ = path(tx, 3 * self.period, gradient=lambda w: np.ones(4))
        np.testing.assert_allclose((START - points[-1]) / (3 * self.period), 0.29289682539, rtol=1e-10)


INNERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.01),
}


@pytest.mark.parametrize("name", INNERS)
class TestInner:
    """Where the wrapper is none, and what the first step of a period is."""

    def test_periods_of_one_step_are_the_inner_optimizer(self, name):
        tx = trajectory_regularized(INNERS[name], 3.0, period=1)
        np.testing.assert_allclose(path(tx, 12)[0], path(INNERS[name], 12)[0], rtol=0, atol=1e-15)

    def test_without_pull_and_division_it_is_the_inner_optimizer(self, name):
        tx = trajectory_regularized(INNERS[name], 0.0, period=5, decay_step_size=False)
        np.testing.assert_allclose(path(tx, 12)[0], path(INNERS[name], 12)[0], rtol=0, atol=1e-15)

    def test_the_first_step_of_each_period_is_the_inner_one(self, name):
        tx = trajectory_regularized(INNERS[name], 3.0, period=4)
        points, states = path(tx, 10)
        for step in range(10):
            w = jnp.asarray(points[step])
            alone, _ = jax.jit(INNERS[name].update)(jnp.asarray(gradient_of(w)), states[step].inner, w)
            is_same = np.allclose(points[step + 1], w + alone, rtol=0, atol=1e-14)
            assert is_same == (step % 4 == 0)

    def test_a_pull_that_is_infinite_pulls_nowhere_in_a_first_step(self, name):
        """As the authors' pull is in the last step of a schedule that ends at a rate of 0."""
        pulled = trajectory_regularized(INNERS[name], lambda count: jnp.inf)
        np.testing.assert_array_equal(path(pulled, 1)[0], path(INNERS[name], 1)[0])

    def test_the_path_moves_with_its_start(self, name):
        """Decoupled weight decay apart, which pulls to zero."""
        inner = INNERS[name] if name != "adamw" else optax.adamw(0.1, weight_decay=0.0)
        if name == "lion":
            inner = optax.lion(0.01, weight_decay=0.0)
        tx, offset = trajectory_regularized(inner, 2.0, period=4), np.array([3.0, -1.0, 0.5, 8.0])
        moved = path(tx, 15, START + offset, lambda w: gradient_of(np.asarray(w) - offset))[0]
        np.testing.assert_allclose(moved - offset, path(tx, 15)[0], rtol=0, atol=1e-11)


def test_the_anchor_is_where_the_period_began():
    points, states = path(trajectory_regularized(optax.sgd(0.1, 0.9), 0.5, period=4), 11)
    np.testing.assert_array_equal(states[0].anchor, START)
    for step in range(1, 12):  # the state after so many steps
        np.testing.assert_array_equal(states[step].anchor, points[(step - 1) // 4 * 4])
        assert states[step].count == step


# Around BNP, and in the company of other transformations.


def loop_by_hand(inner, pull, period, params, gradients, steps, **extra):
    """The method around an optimizer, step by step, each computed as a whole in its own way."""
    state, w = inner.init(params), params
    for t in range(steps):
        if t % period == 0:
            anchor = w
        away = optax.tree.sub(w, anchor)
        updates, state = inner.update(optax.tree.add_scale(gradients, pull, away), state, w, **extra)
        w = optax.tree.add_scale(w, 1 / (t % period + 1), updates)
    return w


def steps_of(tx, params, gradients, steps, **extra):
    """Returns parameters after steps of the same gradients, and the state."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradients, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)[0])
    return run(params)


@pytest.mark.parametrize("inner", [optax.sgd(0.01, momentum=0.9), optax.adam(0.01)], ids=["sgd", "adam"])
def test_around_bnp(inner):
    """Compiled in a scan: records reach BNP, and the pull is preconditioned with the gradient."""
    params = {"w": normal(0, 3, 2), "b": normal(1, 2), "scale": normal(2)}
    gradients, records = jax.tree.map(jnp.cos, params), {"w": bnp.input_moments(normal(3, 5, 3))}
    bnp_inner = bnp.preconditioned(inner, DENSE)
    tx = trajectory_regularized(bnp_inner, 0.5, period=3)
    actual, state = steps_of(tx, params, gradients, 7, intermediates=records)
    expected = loop_by_hand(compiled(bnp_inner), 0.5, 3, params, gradients, 7, intermediates=records)
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=4e-15)
    alone, _ = steps_of(bnp_inner, params, gradients, 7, intermediates=records)
    assert np.abs(actual["w"] - alone["w"]).max() > 1e-4
    assert state.inner.statistics["w"].seen == 7 * 5


def test_the_records_are_missed_by_bnp_not_by_the_wrapper():
    params = dense_params()
    tx = trajectory_regularized(bnp.preconditioned(optax.sgd(0.1), DENSE), 0.5)
    with pytest.raises(TypeError, match="update wants intermediates="):
        tx.update(params, tx.init(params), params)


def test_an_inner_optimizer_without_extra_arguments_is_given_none():
    tx = trajectory_regularized(optax.GradientTransformation(*optax.sgd(0.1)), 0.5)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), value=1.0)
    np.testing.assert_array_equal(updates, [-0.1, -0.1])


def test_accumulation_belongs_around_it():
    tx = trajectory_regularized(optax.sgd(0.1, 0.9), 0.5, period=3)
    around = optax.MultiSteps(tx, every_k_schedule=2)
    points = path(around, 20)[0]
    gradients = [gradient_of(points[k]) for k in range(20)]
    means = iter([(gradients[k] + gradients[k + 1]) / 2 for k in range(0, 20, 2)])
    expected = path(tx, 10, gradient=lambda w: next(means))[0]
    np.testing.assert_allclose(points[::2], expected, rtol=0, atol=1e-7)  # MultiSteps averages in float32


def test_hyperparameters_are_injected():
    def make(learning_rate, pull, period):
        return trajectory_regularized(optax.sgd(learning_rate, 0.9), pull, period)

    injected = optax.inject_hyperparams(make)(learning_rate=falling(0.1, 20), pull=0.5, period=3)
    np.testing.assert_allclose(path(injected, 20)[0], path(make(falling(0.1, 20), 0.5, 3), 20)[0], rtol=0, atol=1e-14)
    itself = optax.inject_hyperparams(trajectory_regularized)(optax.sgd(0.1), pull=lambda count: 0.1 * count)
    expected = trajectory_regularized(optax.sgd(0.1), lambda count: 0.1 * count)
    np.testing.assert_allclose(path(itself, 20)[0], path(expected, 20)[0], rtol=0, atol=1e-14)


def test_in_a_chain_and_kept_from_what_is_not_finite():
    tx = trajectory_regularized(optax.sgd(0.1, 0.9), 0.5, period=3)
    around = optax.apply_if_finite(optax.chain(optax.identity(), tx), max_consecutive_errors=3)
    gradients = iter([*(np.ones(4) * k for k in range(4)), np.full(4, np.nan), *(np.ones(4) * k for k in range(4))])
    points = path(around, 9, gradient=lambda w: next(gradients))[0]
    gradients = iter([np.ones(4) * k for k in (0, 1, 2, 3, 0, 1, 2, 3)])
    np.testing.assert_array_equal(np.delete(points, 5, 0), path(tx, 8, gradient=lambda w: next(gradients))[0])


def test_masked_parameters_have_no_anchor_and_pass():
    params = {"a": jnp.ones(3), "b": {"c": jnp.arange(2.0), "d": jnp.full((2, 2), 3.0)}}
    gradients = jax.tree.map(jnp.cos, params)
    tx = trajectory_regularized(optax.sgd(0.1, 0.9), 0.5, period=3)
    mask = {"a": True, "b": {"c": False, "d": True}}
    actual, state = steps_of(optax.masked(tx, mask), params, gradients, 5)
    expected, _ = steps_of(tx, params, gradients, 5)
    chex.assert_trees_all_close((actual["a"], actual["b"]["d"]), (expected["a"], expected["b"]["d"]), rtol=1e-14)
    np.testing.assert_allclose(actual["b"]["c"], params["b"]["c"] + 5 * gradients["b"]["c"], rtol=1e-14)
    assert state.inner_state.anchor["b"]["c"] == optax.MaskedNode()

    labels = {"a": "pulled", "b": {"c": "not", "d": "not"}}
    parts, _ = steps_of(optax.partition({"pulled": tx, "not": optax.sgd(0.1)}, labels), params, gradients, 5)
    chex.assert_trees_all_close(parts["a"], expected["a"], rtol=1e-14)
    chex.assert_trees_all_close(parts["b"]["c"], params["b"]["c"] - 0.5 * gradients["b"]["c"], rtol=1e-14)


def test_members_of_an_ensemble_are_trained_alone():
    tx = trajectory_regularized(optax.sgd(0.1, 0.9), 0.5, period=3)
    starts = jnp.stack([jnp.arange(3.0), jnp.ones(3)])
    together = jax.vmap(lambda w: steps_of(tx, w, w, 5)[0])(starts)
    for member, start in zip(together, starts, strict=True):
        np.testing.assert_allclose(member, steps_of(tx, start, start, 5)[0], rtol=1e-14)


def test_a_model_of_nnx_is_trained():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, trajectory_regularized(optax.sgd(0.1), 0.5, period=3), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model))
    x = jnp.ones((4, 3))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: model(x).sum())(model))

    for _ in range(2):
        step(model, optimizer)
    # a constant gradient g: 0.1 g, then (0.1 g - 0.5 * 0.1 * 0.1 g) / 2
    after = nnx.to_pure_dict(nnx.state(model))
    np.testing.assert_allclose(before["kernel"] - after["kernel"], 4 * (0.1 + (0.1 - 0.005) / 2), rtol=1e-5)


def test_the_state_is_a_named_tuple_of_which_the_anchor_is_like_parameters():
    tx = trajectory_regularized(optax.sgd(0.1, 0.9), 0.5)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    assert isinstance(state, TrajectoryRegularizedState)
    assert state.count.dtype == jnp.int32
    tripled = optax.tree.map_params(tx, lambda leaf: 3 * leaf, state, transform_non_params=lambda leaf: leaf)
    np.testing.assert_array_equal(tripled.anchor["w"], np.full(3, 3.0))
    assert tripled.count == 0
    updates, after = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (params, state))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((updates, after)))


def test_parameters_and_state_are_both_donated():
    tx = trajectory_regularized(optax.sgd(0.1), 0.5)
    params = jnp.ones(3)
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(jnp.ones(3), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, state)
    np.testing.assert_allclose(step(params, state)[0], 1 - 0.1 - 0.095 / 2, rtol=1e-14)


class TestPrecision:
    """Low precision, in float32."""

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_dtypes_stay(self, dtype):
        tx = trajectory_regularized(optax.sgd(0.1, 0.9), 0.5, period=3)
        params, gradients = jnp.asarray(START, dtype), jnp.asarray(gradient_of(START), dtype)
        actual, state = steps_of(tx, params, gradients, 5)
        assert actual.dtype == state.anchor.dtype == dtype
        expected, _ = steps_of(tx, jnp.asarray(START), jnp.asarray(gradient_of(START)), 5)
        np.testing.assert_allclose(actual.astype(float), expected, rtol=0, atol=10 * float(jnp.finfo(dtype).eps))

    def test_the_distance_to_the_anchor_is_exact(self):
        """In bfloat16 a product with the pull and a sum with the gradient would each be rounded."""
        seen = []
        spy = optax.stateless(lambda updates, _: seen.append(updates) or updates)
        tx = trajectory_regularized(spy, 100.5, period=3)
        w = jnp.asarray(1.0, jnp.bfloat16)
        _, state = tx.update(jnp.zeros((), jnp.float32), tx.init(w), w)
        _, state = tx.update(jnp.asarray(0.001, jnp.float32), state, w + jnp.asarray(2.0**-7, jnp.bfloat16))
        assert seen[1].dtype == jnp.float32
        np.testing.assert_allclose(seen[1], 0.001 + 100.5 * 2.0**-7, rtol=1e-7)

    def test_the_pull_is_not_rounded_before_it_is_added(self):
        """Of 0.3 and of a gradient near -0.3, rounded to the same number of bfloat16, nothing would be left."""
        seen, low = [], functools.partial(jnp.asarray, dtype=jnp.bfloat16)
        tx = trajectory_regularized(optax.stateless(lambda updates, _: seen.append(updates) or updates), 0.3)
        _, state = tx.update(low(0.0), tx.init(low(0.0)), low(0.0))
        tx.update(low(-0.3), state, low(1.0))
        np.testing.assert_allclose(float(seen[1]), 0.3 - 0.30078125, rtol=0.01)

    def test_the_division_is_rounded_once(self):
        tx = trajectory_regularized(optax.identity(), 0.0, period=8)
        w = jnp.asarray(0.0, jnp.bfloat16)
        state = tx.init(w)
        for i in range(7):
            update, state = tx.update(jnp.asarray(1.0, jnp.bfloat16), state, w)
            assert update == jnp.asarray(1 / (i + 1), jnp.bfloat16)


class TestErrors:
    def test_parameters_are_needed(self):
        tx = trajectory_regularized(optax.sgd(0.1), 0.5)
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(jnp.ones(2), tx.init(jnp.ones(2)))

    @pytest.mark.parametrize("pull", [-0.1, math.nan, math.inf])
    def test_the_pull(self, pull):
        with pytest.raises(ValueError, match="pull must be finite and not negative"):
            trajectory_regularized(optax.sgd(0.1), pull)

    @pytest.mark.parametrize("period", [0, -1, 2.5, math.inf, math.nan])
    def test_the_period(self, period):
        with pytest.raises(ValueError, match="period must be a number of steps, at least 1"):
            trajectory_regularized(optax.sgd(0.1), 0.1, period)

    def test_an_inner_optimizer_that_is_none(self):
        with pytest.raises(TypeError, match=r"inner must be an optax.GradientTransformation, .* not float"):
            trajectory_regularized(0.1, 0.1)
