"""preconditioned: what it is to the paper's method, what it does not see, and its errors, in float64.

That it is the inner optimizer on another network, for every optimizer of Optax, is in test_optimizers.py.
"""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import (
    abstract,
    compiled,
    forward,
    gradients_and_records,
    init,
    make_step,
    map_statistics,
    normal,
    squared_error,
    train,
    with_statistics,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")


class MLP(nn.Module):
    """A layer without a bias, one with, and a scale that no layer covers."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(5, param_dtype=float)(x)) * self.param("scale", nn.initializers.ones, (1, 5), float)
        x = nn.tanh(nn.Dense(4, use_bias=False, param_dtype=float)(x))
        return nn.Dense(2, param_dtype=float)(x)


GRADIENTS_AND_RECORDS = gradients_and_records(MLP(), squared_error)

with jax.enable_x64(True):
    X, Y = normal(0, 12, 3), normal(1, 12, 2)
    LAYERS = bnp.linen.find_layers(MLP(), X)


@pytest.fixture(scope="module")
def params():
    return init(MLP(), X)


@pytest.fixture(scope="module")
def batch(params):
    """Gradients and records."""
    return jax.jit(GRADIENTS_AND_RECORDS)(params, X, Y)


def end(tx, params, steps=3):
    return train(tx, GRADIENTS_AND_RECORDS, params, [(X + k, Y) for k in range(steps)])


OPTIONS = {
    "decay": 0.9,
    "eps_relative": 0.1,
    "eps": 1e-3,
    "variance": "batch",
    "scaling": "examples",
    "prior_examples": 9,
}


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
def test_identity_inside_is_the_papers_method(params, options):
    actual, state = end(optax.chain(bnp.preconditioned(optax.identity(), LAYERS, **options), optax.scale(-0.1)), params)
    expected, expected_state = end(optax.chain(bnp.scale_by_bnp(LAYERS, **options), optax.scale(-0.1)), params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-12)
    chex.assert_trees_all_close(state[0].statistics, expected_state[0], rtol=1e-10)


def test_the_inner_optimizer_begins_at_z(params):
    """At the start the mean is 0 and the variance 1, so that z is w times the root of what damping makes of it."""
    twice = functools.partial(optax.tree.scale, 2.0)  # as a copy itself would be refused
    keep = optax.GradientTransformation(twice, lambda updates, state, params=None: (updates, state))
    z = jax.jit(bnp.preconditioned(keep, LAYERS, eps_relative=0.5, eps=0.25).init)(params).inner
    expected = {
        name: {k: 2 * leaf * (np.sqrt(1.75) if k == "kernel" else 1) for k, leaf in own.items()}
        if name in LAYERS
        else twice(own)
        for name, own in params.items()
    }
    chex.assert_trees_all_close(z, expected, rtol=1e-12)


def test_sgd_inside_is_sgd_behind(params):
    """Without momentum: P changes from step to step, and with it what an old gradient in z stands for."""
    actual, _ = end(bnp.preconditioned(optax.sgd(0.1), LAYERS), params)
    expected, _ = end(optax.chain(bnp.scale_by_bnp(LAYERS), optax.sgd(0.1)), params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_decoupled_weight_decay_is_the_same_inside_and_outside(params):
    actual, _ = end(bnp.preconditioned(optax.adamw(0.1, weight_decay=0.3), LAYERS), params)
    outside = optax.chain(bnp.preconditioned(optax.adam(0.1), LAYERS), optax.add_decayed_weights(-0.1 * 0.3))
    expected, _ = end(outside, params)
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("inner", "power"),
    [(optax.sgd(0.1), 1.0), (optax.adam(0.1, eps=0.0), 0.5), (optax.lion(0.1, weight_decay=0.0), 0.5)],
    ids=["sgd", "adam", "lion"],
)
def test_steps_grow_with_the_batch_linearly_for_sgd_and_as_its_root_where_gradients_are_normalized(
    params, batch, inner, power
):
    """The same gradient of the mean loss, and the same statistics, from batches of 8 and 32."""
    tx, (gradients, records) = compiled(bnp.preconditioned(inner, LAYERS, prior_examples=None)), batch
    small, large = (
        tx.update(
            gradients,
            tx.init(params),
            params,
            intermediates={
                name: dataclasses.replace(record, count=jnp.full_like(record.count, examples))
                for name, record in records.items()
            },
        )[0]
        for examples in (8.0, 32.0)
    )
    for name in LAYERS:
        chex.assert_trees_all_close(large[name], jax.tree.map(lambda u: 4**power * u, small[name]), rtol=1e-9)


@jax.jit
def updates_by_muon(params, x):
    layers = bnp.Layers((bnp.Layer.dense(("w",), (5, 20), bias=("b",)),))
    tx = bnp.preconditioned(optax.contrib.muon(0.1), layers, decay=0.0, eps_relative=0.0, eps=0.0, scaling="none")
    gradients = jax.grad(lambda p: jnp.sum(jnp.sin(x @ p["w"] + p["b"])))(params)
    return tx.update(gradients, tx.init(params), params, intermediates={"w": bnp.input_moments(x)})[0]


@settings(max_examples=5)
@given(st.floats(-3, 3), st.integers(0, 2**16))
def test_with_muon_inside_the_change_over_normalized_inputs_is_bounded_whatever_the_inputs(log_scale, seed):
    """Five Newton-Schulz steps leave singular values of at most 1.3 (Jordan et al.: about 0.7 to 1.2)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 1, (40, 5)) * 10.0 ** (log_scale * rng.normal(size=5))
    params = {"w": jnp.asarray(rng.normal(size=(5, 20))), "b": jnp.zeros(20)}
    updates = updates_by_muon(params, jnp.asarray(x))
    normalized = (x - x.mean(0)) / x.std(0)
    change = normalized @ (x.std(0)[:, None] * updates["w"])
    assert np.linalg.norm(x.std(0)[:, None] * updates["w"], 2) <= 1.3 * 0.1 * np.sqrt(20 / 5)
    assert np.linalg.norm(change, 2) <= 1.3 * 0.1 * np.sqrt(20 / 5) * np.linalg.norm(normalized, 2)


def outputs_along_training(tx, starts, steps=4):
    """The model's outputs after each step, for each start: parameters, state, input. The step is compiled once."""
    step = make_step(tx, GRADIENTS_AND_RECORDS)

    @jax.jit
    def step_and_output(params, state, x):
        params, state = step(params, state, x, Y)
        return params, state, forward(MLP())(params, x)[0]

    trajectories = []
    for params, state, x in starts:
        outputs = []
        for _ in range(steps):
            params, state, output = step_and_output(params, state, x)
            outputs.append(output)
        trajectories.append(np.stack(outputs))
    return trajectories


BY_NAME = {
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lamb": lambda: optax.lamb(0.1),
    "lion": lambda: optax.lion(0.01),
    "muon": lambda: optax.contrib.muon(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, centered=True, momentum=0.9),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize(("name", "decay"), [*((name, 0.9) for name in BY_NAME), ("adam", 0.0), ("sgd", 0.0)])
def test_trajectories_do_not_see_scale_and_shift_of_the_inputs(params, name, decay):
    """With the start of the running statistics transformed alike; an optimizer alone sees both."""
    scale, shift = np.exp(2 * normal(2, 3, mean=0.5, deviation=1)), 5 * normal(3, 3)
    first = params["Dense_0"]
    kernel = first["kernel"] / scale[:, None]
    equivalent = {**params, "Dense_0": {"kernel": kernel, "bias": first["bias"] - shift @ kernel}}
    other_x = scale * X + shift

    options = {"eps_relative": 0.0, "eps": 0.0, "scaling": "none", "prior_examples": None}
    tx = bnp.preconditioned(BY_NAME[name](), LAYERS, decay=decay, **options)
    state, other = (jax.jit(tx.init)(start) for start in (params, equivalent))
    other = map_statistics(lambda s: with_statistics(s, "Dense_0", mean=shift, variance=np.square(scale)), other)
    plain, same = outputs_along_training(tx, [(params, state, X), (equivalent, other, other_x)])
    np.testing.assert_allclose(same, plain, rtol=1e-6, atol=1e-6)
    assert np.abs(plain[-1] - plain[0]).max() > 1e-3

    alone = optax.with_extra_args_support(BY_NAME[name]())
    starts = [(params, alone.init(params), X), (equivalent, alone.init(equivalent), other_x)]
    assert not np.allclose(*outputs_along_training(alone, starts, steps=1), rtol=1e-3)


def test_an_inner_optimizer_that_asks_for_no_parameters_needs_none(params, batch):
    gradients, records = batch
    tx = compiled(bnp.preconditioned(optax.adam(0.1), LAYERS))
    updates, _ = tx.update(gradients, tx.init(params), intermediates=records)
    expected, _ = tx.update(gradients, tx.init(params), params, intermediates=records)
    chex.assert_trees_all_close(updates, expected, rtol=1e-12)
    decayed = abstract(bnp.preconditioned(optax.adamw(0.1), LAYERS))
    with pytest.raises(ValueError, match="params"):  # Optax's own error
        decayed.update(gradients, decayed.init(params), intermediates=records)


# What goes wrong, and what the user reads.


@pytest.mark.parametrize(
    ("inner", "kind"),
    [(optax.adam, "function"), (None, "NoneType"), (optax.MultiSteps(optax.adam(0.1), 2), "MultiSteps")],
    ids=["a factory", "nothing", "MultiSteps"],
)
def test_what_is_no_transformation_is_refused(inner, kind):
    with pytest.raises(TypeError, match=rf"inner must be .*, as optax\.adam\(1e-3\) returns it, not {kind}\."):
        bnp.preconditioned(inner, LAYERS)


def test_layers_in_the_place_of_the_optimizer_are_refused():
    with pytest.raises(TypeError, match=r"inner must be an optax\.GradientTransformation, .* not Layers"):
        bnp.preconditioned(LAYERS, optax.adam(0.1))


def test_an_argument_that_the_inner_optimizer_lacks_is_its_own_error(params, batch):
    gradients, records = batch
    tx = compiled(bnp.preconditioned(optax.polyak_sgd(0.1), LAYERS))
    with pytest.raises(TypeError, match="'value'"):
        tx.update(gradients, tx.init(params), params, intermediates=records)
    updates, _ = tx.update(gradients, tx.init(params), params, intermediates=records, value=jnp.asarray(1.0))
    assert optax.tree.norm(updates) > 0


def test_missing_records_are_an_error_before_the_inner_optimizer_runs(params):
    tx = abstract(bnp.preconditioned(optax.polyak_sgd(0.1), LAYERS))
    with pytest.raises(TypeError, match="intermediates"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="no record of the input of Dense_0, Dense_1, Dense_2"):
        tx.update(params, tx.init(params), params, intermediates={})


def test_what_is_no_state_is_refused(params):
    tx = abstract(bnp.preconditioned(optax.identity(), LAYERS))
    for state, name in (({}, "dict"), (tx.init(params).statistics, "Statistics"), ((), "tuple")):
        with pytest.raises(TypeError, match=rf"what init returned, not {name}\. If it comes from a checkpoint"):
            tx.update(params, state, params, intermediates=bnp.KEEP_STATISTICS)
