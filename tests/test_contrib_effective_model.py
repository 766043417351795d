"""The model of effective learning rates, in closed form and in a NumPy simulation; spread and critical rates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from hypothesis import given
from hypothesis import strategies as st

from bnp_optax.contrib import critical_learning_rate, predict_effective_learning_rates, random_walk, spread

pytestmark = pytest.mark.usefixtures("x64")

RULES = ("max", "top_two", "extremes")

positive = st.floats(1e-3, 1e3)
several = st.lists(positive, min_size=2, max_size=6)

# The model.


@given(rates=several, rate=positive)
def test_a_rate_and_its_inverse_have_one_successor_and_ratios_contract(rates, rate):
    rates = np.array(rates)
    after, inverse = (
        predict_effective_learning_rates(jnp.asarray(e), rate, 1)[1] for e in (rates, 1 / (rate**2 * rates))
    )
    np.testing.assert_allclose(after, rates / (1 + (rate * rates) ** 2), rtol=1e-14)
    np.testing.assert_allclose(inverse, after, rtol=1e-12)
    assert (after <= (1 + 1e-12) / (2 * rate)).all()
    for kind in ("log10_range", "log10_std"):
        assert spread(after, kind) <= spread(rates, kind) + 1e-12


@given(first=positive, second=positive, factor=st.floats(1, 100))
def test_the_critical_rate_of_two_layers_makes_them_equal_and_the_model_symmetric_about_it(first, second, factor):
    rates = jnp.array([first, second])
    critical = critical_learning_rate(rates, "extremes")
    np.testing.assert_allclose(critical, 1 / np.sqrt(first * second), rtol=1e-13)
    equal = predict_effective_learning_rates(rates, critical, 1)[1]
    np.testing.assert_allclose(equal[0], equal[1], rtol=1e-12)
    below, beyond = (predict_effective_learning_rates(rates, critical * f, 1)[1] for f in (1 / factor, factor))
    np.testing.assert_allclose(below[0] / below[1] * (beyond[0] / beyond[1]), 1, rtol=1e-11)


@given(rates=st.lists(positive, min_size=3, max_size=6, unique=True))
def test_up_to_the_critical_rate_of_the_top_two_layers_keep_their_order(rates):
    rates = jnp.asarray(sorted(rates))
    critical = critical_learning_rate(rates, "top_two")
    after = predict_effective_learning_rates(rates, critical * (1 - 1e-9), 1)[1]
    assert (np.diff(after) >= -1e-9 * np.asarray(after[1:])).all()
    beyond = predict_effective_learning_rates(rates, critical * 1.1, 1)[1]
    assert beyond[-1] < beyond[-2]
    assert critical_learning_rate(rates) <= critical <= critical_learning_rate(rates, "extremes")


def test_many_small_steps_are_a_flow_in_which_all_rates_become_equal():
    """d||W||^2/dt = c^2/||W||^2 has ||W||^4 = ||W_0||^4 + 2 c^2 t, with t the sum of squared learning rates."""
    rates = jnp.array([5.0, 1.0, 0.01])
    path = predict_effective_learning_rates(rates, 1e-3, 20_000)
    t = 20_000 * 1e-6
    np.testing.assert_allclose(path[-1], np.asarray(rates) / np.sqrt(1 + 2 * np.asarray(rates) ** 2 * t), rtol=1e-4)
    spreads = [float(spread(e)) for e in predict_effective_learning_rates(rates, 0.5, 100_000)[::20_000]]
    assert (np.diff(spreads) < 0).all()
    assert spreads[-1] < 0.05 * spreads[0]


def test_random_gradients_follow_the_recursion():
    """Exactly, whatever their directions; a walk of our own, in NumPy, too."""
    shapes, constants = {"a": (3, 4), "b": (7,), "c": (2,)}, {"a": 2.0, "b": 0.1, "c": 30.0}
    weights = {name: normal(0, *shape) for name, shape in shapes.items()}
    walk = random_walk(jax.random.key(0), weights, constants, 0.4, 25)
    chex.assert_trees_all_equal_shapes(walk, dict.fromkeys(shapes, jnp.zeros(26)))
    start = {name: constants[name] / jnp.sum(w**2) for name, w in weights.items()}
    chex.assert_trees_all_close(walk, predict_effective_learning_rates(start, 0.4, 25), rtol=1e-12)

    rng, w = np.random.default_rng(0), np.asarray(weights["b"])
    for t in range(25):
        np.testing.assert_allclose(walk["b"][t], 0.1 / (w @ w), rtol=1e-12)
        z = rng.normal(size=7)
        z -= (z @ w) / (w @ w) * w
        w = w - 0.4 * 0.1 / np.linalg.norm(w) * z / np.linalg.norm(z)


# Spread, and the critical rate of any rates.


@pytest.mark.parametrize("as_tree", [True, False])
def test_layers_without_a_gradient_are_left_out(as_tree):
    rates = jnp.array([0.0, 4.0, 0.04, 0.4, 0.0])
    tree = {"scalar": rates[0], "stack": rates[1:3], "units": rates[3:].reshape(1, 1, 2)} if as_tree else rates
    np.testing.assert_allclose(spread(tree), 2, rtol=1e-12)
    np.testing.assert_allclose(spread(tree, "log10_std"), np.std([2, 1, 0]), rtol=1e-12)
    np.testing.assert_allclose(spread(jax.tree.map(lambda e: 7 * e, tree)), 2, rtol=1e-12)
    actual = [critical_learning_rate(tree, rule) for rule in RULES]
    np.testing.assert_allclose(actual, [1 / 4, 1 / np.sqrt(1.6), 1 / np.sqrt(0.16)], rtol=1e-12)


def test_few_rates_or_none():
    for kind in ("log10_range", "log10_std"):
        assert spread(jnp.array([0.0, 3.0]), kind) == 0
        for none in (jnp.zeros(2), {}):
            assert np.isnan(spread(none, kind))
    for rule in RULES:
        np.testing.assert_allclose(critical_learning_rate(jnp.array([0.0, 4.0]), rule), 0.25, rtol=1e-15)
        for none in (jnp.zeros(2), {}):
            assert critical_learning_rate(none, rule) == np.inf
        for bad in (np.nan, np.inf):
            for rates in ([1.0, bad], [bad, bad], [0.0, bad], [bad, 2.0, bad]):
                assert np.isnan(critical_learning_rate(jnp.array(rates), rule))
    assert np.isnan(spread(jnp.array([1.0, np.nan])))
