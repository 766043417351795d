"""Effective learning rates, and the warm-up by them, in networks of which their model is exact."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cross_entropy, init, normal

import bnp_optax as bnp
from bnp_optax.contrib import (
    critical_learning_rate,
    effective_learning_rates,
    predict_effective_learning_rates,
    psi_sgd,
    scale_by_critical_learning_rate,
    spread,
)

pytestmark = pytest.mark.usefixtures("x64")

DEPTH, RULES = 4, ("max", "top_two", "extremes")


def normalized(z):
    z = z - z.mean(0, keepdims=True)
    return z / jnp.sqrt(jnp.square(z).mean(0, keepdims=True))


# Dense layers with BN behind each, without epsilon: all are scale-invariant.
LAYERS = bnp.Layers(tuple(bnp.Layer.dense((f"w{k}",), (5, 5)) for k in range(DEPTH)))
RNG = np.random.default_rng(0)
X, Y = RNG.normal(1, 2, (16, 5)), np.arange(16) % 5
PARAMS = {f"w{k}": RNG.normal(0, 4.0**k, (5, 5)) for k in range(DEPTH)}


def loss(params):
    h = X
    for w in params.values():
        h = jnp.tanh(normalized(h @ w))
    return cross_entropy(h, Y)


@jax.jit
def gradients_at(params):
    return jax.grad(loss)(params)


def rates_at(params):
    return effective_learning_rates(gradients_at(params), params, LAYERS)


def path(tx, steps):
    """Returns the effective learning rates before every step and after the last, and the parameters."""
    _, visited = run(tx, steps)
    return [rates_at(params) for params in visited], visited[-1]


def run(tx, steps, params=PARAMS, gradients=gradients_at):
    """Returns the state after every step, and the parameters before every step and after the last."""
    state, update, states, visited = tx.init(params), jax.jit(tx.update), [], [params]
    for _ in range(steps):
        updates, state = update(gradients(params), state, params)
        params = optax.apply_updates(params, updates)
        states.append(state)
        visited.append(params)
    return states, visited


def leaves(trees):
    return np.array([list(tree.values()) for tree in trees])


# Rates.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), feature_group_count=2, param_dtype=float, name="conv")(x)
        body = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(nn.Dense(64, param_dtype=float, name="scanned"), x.reshape(x.shape[0], -1), None)[0]


def test_they_are_ratios_of_norms():
    """Of kernels, or of their units; of each of several layers in one array."""
    x = normal(0, 2, 4, 4, 2)
    params = init(Net(), x)
    layers = bnp.linen.find_layers(Net(), x)
    gradients = jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), params)
    whole, by_unit = (effective_learning_rates(gradients, params, layers, per_unit=each) for each in (False, True))
    (g, w), (gs, ws) = (
        [np.asarray(tree[name]["kernel"]) for tree in (gradients, params)] for name in ("conv", "scanned")
    )
    assert whole["conv"].shape == ()
    np.testing.assert_allclose(whole["conv"], np.linalg.norm(g) / np.linalg.norm(w), rtol=1e-14)
    units = [np.linalg.norm(g[..., i]) / np.linalg.norm(w[..., i]) for i in range(4)]
    np.testing.assert_allclose(by_unit["conv"], np.reshape(units, (1, 2, 2)), rtol=1e-14)
    entries = [np.linalg.norm(gs[k]) / np.linalg.norm(ws[k]) for k in range(3)]
    np.testing.assert_allclose(whole["scanned"], entries, rtol=1e-14)
    assert by_unit["scanned"].shape == (3, 1, 64)
    np.testing.assert_allclose(
        by_unit["scanned"][1, 0], np.linalg.norm(gs[1], axis=0) / np.linalg.norm(ws[1], axis=0), rtol=1e-14
    )


def test_weights_of_zero_have_none_and_low_precision_is_computed_in_float32():
    layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 2)), bnp.Layer.dense(("v",), (200, 200))))
    params = {"w": jnp.zeros((2, 2)), "v": jnp.full((200, 200), 300, jnp.float16)}
    gradients = {"w": jnp.ones((2, 2)), "v": jnp.full((200, 200), 150, jnp.float16)}
    rates = effective_learning_rates(gradients, params, layers)  # the sum of squares is beyond float16
    assert rates["w"] == 0
    assert (rates["v"].dtype, rates["v"]) == (jnp.float32, 0.5)
    masked = {"w": optax.MaskedNode(), "v": params["v"]}
    assert list(effective_learning_rates(masked, masked, layers)) == ["v"]


def test_they_scale_as_the_inverse_square_of_the_weights():
    rates = rates_at(PARAMS)
    scaled = rates_at(dict(zip(PARAMS, [3.0 * w for w in PARAMS.values()], strict=True)))
    np.testing.assert_allclose(leaves([scaled]) * 9, leaves([rates]), rtol=1e-11)


def test_norms_grow_by_them_in_a_step_of_sgd():
    """Exactly; not so under momentum."""
    for momentum, is_exact in ((None, True), (0.9, False)):
        rates, params = path(optax.sgd(0.3, momentum), steps=1)
        _, later = path(optax.sgd(0.3, momentum), steps=2)
        growth = [jnp.sum(later[k] ** 2) / jnp.sum(params[k] ** 2) for k in params]
        expected = 1 + (0.3 * leaves([rates[1]])[0]) ** 2
        assert np.allclose(growth, expected, rtol=1e-12) == is_exact


def test_gradients_are_orthogonal_and_base_gradients_set_the_next_rates():
    gradients = gradients_at(PARAMS)
    for name, w in PARAMS.items():
        assert abs((gradients[name] * w).sum()) <= 1e-14 * jnp.linalg.norm(gradients[name]) * jnp.linalg.norm(w)
    (before, after), params = path(optax.sgd(0.3), steps=1)
    of_model = predict_effective_learning_rates(before, 0.3, 1)
    for name, w in params.items():
        old, new = (rate * (v**2).sum() for rate, v in ((before[name], PARAMS[name]), (after[name], w)))
        np.testing.assert_allclose(after[name], of_model[name][1] * new / old, rtol=1e-12)


def test_under_psi_sgd_they_do_not_depend_on_norms():
    """They are the gradient's norm at weights of norm 1; here of whole kernels."""
    tx = psi_sgd(0.3, LAYERS, num_groups=1)
    _, params = path(tx, steps=1)
    steps = [jnp.linalg.norm(params[k] - w) / jnp.linalg.norm(w) for k, w in PARAMS.items()]
    units = {k: w / jnp.linalg.norm(w) for k, w in PARAMS.items()}
    expected = [0.3 * jnp.linalg.norm(g) for g in gradients_at(units).values()]
    np.testing.assert_allclose(steps, expected, rtol=1e-11)


# The warm-up.


def loop(target, rule, steps):
    """Returns the learning rates of the warm-up, and the parameters after it, written out."""
    params, rates, is_over = PARAMS, [], False
    for t in range(steps):
        gradients = gradients_at(params)
        e = sorted(float(jnp.linalg.norm(gradients[k]) / jnp.linalg.norm(w)) for k, w in params.items())
        pair = {"max": (e[-1], e[-1]), "top_two": (e[-1], e[-2]), "extremes": (e[-1], e[0])}[rule]
        critical = 1 / np.sqrt(pair[0] * pair[1])
        is_over = is_over or critical >= target(t)
        rates.append(target(t) if is_over else critical)
        params = jax.tree.map(lambda w, g, rate=rates[-1]: w - rate * g, params, gradients)
    return rates, params


@pytest.mark.parametrize("rule", RULES)
def test_the_warm_up_is_the_smaller_rate_until_the_target_is_reached(rule):
    high = 20 * float(critical_learning_rate(rates_at(PARAMS), rule))
    for target in (high, lambda t: high / (1 + 0.1 * jnp.asarray(t, float))):
        expected, end = loop(target if callable(target) else lambda t: high, rule, 12)
        states, params = run(scale_by_critical_learning_rate(target, LAYERS, rule), 12)
        np.testing.assert_allclose([state.rate for state in states], expected, rtol=1e-7)
        chex.assert_trees_all_close(params[-1], end, rtol=1e-6, atol=1e-6)
        assert [int(state.count) for state in states] == list(range(1, 13))
        over = [bool(state.reached) for state in states]
        assert over == sorted(over)
        assert not over[0]
        assert over[-1]


def test_the_warm_up_takes_the_steps_that_doubling_norms_need():
    """In the model: log2(target / first critical rate), as every norm doubles where the rates are equal."""
    dense = bnp.Layers((bnp.Layer.dense(("w",), (8, 1)),))
    w = normal(0, 8, 1, mean=0, deviation=0.1)
    rotate = lambda w: jnp.flip(w, 0) * jnp.tile(jnp.array([[1.0], [-1.0]]), (4, 1))  # noqa: E731  # orthogonal
    gradients = lambda params: {"w": rotate(params["w"]) / jnp.sum(params["w"] ** 2)}  # noqa: E731
    first = 1 / (1 / jnp.sum(w**2))
    states, _ = run(scale_by_critical_learning_rate(40 * first, dense), 9, {"w": w}, gradients)
    np.testing.assert_allclose([state.rate / first for state in states], [1, 2, 4, 8, 16, 32, 40, 40, 40], rtol=1e-12)


def test_once_over_it_is_over():
    """Though effective learning rates become large again."""
    tx = scale_by_critical_learning_rate(0.5, LAYERS)
    small, large = (jax.tree.map(lambda w, f=f: jnp.full_like(w, f), PARAMS) for f in (1e-9, 1e9))
    state = tx.init(PARAMS)
    updates, state = tx.update(large, state, PARAMS)
    assert not state.reached
    assert state.rate < 1e-6
    _, state = tx.update(small, state, PARAMS)
    updates, state = tx.update(large, state, PARAMS)
    assert (state.reached, state.rate) == (True, 0.5)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda g: -0.5 * g, large))


def test_layers_alone_decide_and_all_parameters_take_the_rate():
    params = {**PARAMS, "scale": jnp.ones(3)}
    gradients = {**gradients_at(PARAMS), "scale": jnp.full(3, 1e6)}
    tx = scale_by_critical_learning_rate(1e9, LAYERS)
    updates, state = tx.update(gradients, tx.init(params), params)
    expected = critical_learning_rate(rates_at(PARAMS))
    np.testing.assert_allclose(state.rate, expected, rtol=1e-12)
    np.testing.assert_allclose(updates["scale"], -1e6 * np.full(3, expected), rtol=1e-12)
    one = scale_by_critical_learning_rate(1e9, LAYERS.select(lambda layer: layer.path == "w3"))
    _, state = one.update(gradients, one.init(params), params)
    np.testing.assert_allclose(state.rate, 1 / rates_at(PARAMS)["w3"], rtol=1e-12)
    mask = {name: name in ("w3", "scale") for name in params}
    masked = optax.masked(tx, mask)
    _, state = masked.update(gradients, masked.init(params), params)
    np.testing.assert_allclose(state.inner_state.rate, 1 / rates_at(PARAMS)["w3"], rtol=1e-12)


def test_gradients_of_zero_end_no_warm_up():
    """As of all hidden layers in the first step, where the last one starts at zero."""
    tx = scale_by_critical_learning_rate(1e3, LAYERS)
    gradients = gradients_at(PARAMS)
    zeros = optax.tree.zeros_like(gradients)
    updates, state = tx.update(zeros, tx.init(PARAMS), PARAMS)
    assert (state.reached, state.rate) == (False, 1e3)
    chex.assert_trees_all_equal(updates, zeros)
    _, state = tx.update({**gradients, "w0": zeros["w0"]}, state, PARAMS)
    rates = rates_at(PARAMS)
    np.testing.assert_allclose(state.rate, 1 / max(rates[k] for k in ("w1", "w2", "w3")), rtol=1e-12)
    assert not state.reached


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_repeat_the_rate_and_leave_no_trace(bad):
    tx = scale_by_critical_learning_rate(1e3, LAYERS)
    gradients = gradients_at(PARAMS)
    spoiled = {**gradients, "w2": gradients["w2"].at[0, 0].set(bad)}
    _, state = tx.update(spoiled, tx.init(PARAMS), PARAMS)
    assert (state.reached, state.rate) == (False, 0)
    _, first = tx.update(gradients, state, PARAMS)
    assert first.rate > 0
    updates, state = tx.update(spoiled, first, PARAMS)
    assert (state.reached, state.rate) == (False, first.rate)
    chex.assert_trees_all_equal(updates["w1"], -first.rate * gradients["w1"])
    _, last = tx.update(gradients, state, PARAMS)
    assert (last.reached, last.rate) == (False, first.rate)
    over = first._replace(reached=jnp.array(True))
    _, state = tx.update(spoiled, over, PARAMS)
    assert (state.reached, state.rate) == (True, 1e3)


def test_low_precision_takes_the_rate_in_float32():
    """The rate of 1e-9 is 0 in float16, its product with the gradient is not."""
    layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1)),))
    params = {"w": jnp.ones((2, 1), jnp.float16)}
    tx = scale_by_critical_learning_rate(1e-8, layers)
    updates, state = tx.update({"w": jnp.full((2, 1), 6e4, jnp.float16)}, tx.init(params), params)
    assert (updates["w"].dtype, state.rate.dtype) == (jnp.float16, jnp.float32)
    np.testing.assert_allclose(updates["w"], -6e-4, rtol=1e-3)
    assert scale_by_critical_learning_rate(0.1, LAYERS).init(PARAMS).rate.dtype == jnp.float64


def test_the_warm_up_equalizes_what_a_high_rate_overshoots():
    """In the simulation, where base gradients stay: rates begin two orders of magnitude apart."""
    rates, target = np.array([10.0, 1.0, 0.1]), 3.0
    warm = rates
    for _ in range(8):
        rate = min(target, float(critical_learning_rate(jnp.asarray(warm))))
        warm = np.asarray(predict_effective_learning_rates(jnp.asarray(warm), rate, 1)[1])
    cold = predict_effective_learning_rates(jnp.asarray(rates), target, 8)[-1]
    assert spread(jnp.asarray(warm)) < 0.5 * spread(cold)


def test_a_warm_up_with_momentum_behind_it_is_the_momentum_of_its_steps():
    tx = optax.chain(scale_by_critical_learning_rate(300.0, LAYERS), optax.trace(0.9))
    states, params = run(tx, 4)
    expected, trace = PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)
    for state in states:
        trace = jax.tree.map(lambda u, g, rate=state[0].rate: 0.9 * u - rate * g, trace, gradients_at(expected))
        expected = optax.apply_updates(expected, trace)
    chex.assert_trees_all_close(params[-1], expected, rtol=1e-8)


def test_names_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="kind must be one of 'log10_range', 'log10_std', but is 'range'"):
        spread(jnp.ones(2), "range")
    for call in (critical_learning_rate, lambda _, rule: scale_by_critical_learning_rate(0.1, LAYERS, rule)):
        with pytest.raises(ValueError, match="rule must be one of 'max', 'top_two', 'extremes', but is 'min'"):
            call(jnp.ones(2), "min")
