"""Diagnostics of steps: the learning rates, losses and noise, against closed forms, loops and whole enumerations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from diagnosed_network import Network, assert_close, ravel, seeds
from helpers import cross_entropy, init, normal
from hypothesis import given

import bnp_optax as bnp
from bnp_optax.contrib import diagnostics

pytestmark = pytest.mark.usefixtures("x64")

largest_usable_rate = jax.jit(diagnostics.largest_usable_rate, static_argnames="margin")

# Learning rates.


@pytest.mark.parametrize(
    ("accuracies", "losses", "margin", "expected"),
    [
        ([80, 95, 94.5, 50], None, 1, 0.3),
        ([80, 95, 94, 50], None, 1, 0.3),  # just near enough
        ([80, 95, 93.9, 50], None, 1, 0.1),
        ([90, 90, 90, 90], None, 0, 1.0),  # of equal ones the largest
        ([95, 20, 20, 94.5], None, 1, 1.0),  # not only neighbours of the best
        ([80, 95, 95, 95], [1, 1, 1, np.inf], 1, 0.3),
        ([80, 95, 95, np.nan], [1, 1, np.nan, 1], 1, 0.1),
        ([70, 80, 99, 10], [1, 1, np.nan, 1], 1, 0.1),  # what diverged is not the best either
        ([np.nan] * 4, None, 1, np.nan),
        ([90] * 4, [np.inf, -np.inf, np.nan, np.nan], 1, np.nan),
        ([-2.5, -0.5, -0.4, -3.0], None, 0.2, 0.3),  # losses with their sign changed
        ([10, 90, 95, 95], None, 1000, 1.0),
    ],
)
def test_the_largest_usable_rate(accuracies, losses, margin, expected):
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        rates = jnp.array([0.03, 0.1, 0.3, 1.0])[jnp.array(order)]
        own = jnp.array(accuracies, float)[jnp.array(order)]
        of_losses = None if losses is None else jnp.array(losses, float)[jnp.array(order)]
        np.testing.assert_array_equal(largest_usable_rate(rates, own, of_losses, margin=margin), expected)


def quadratic(seed, size=5):
    rng = np.random.default_rng(seed)
    root, linear = rng.normal(size=(size, size)), rng.normal(size=size)
    hessian = root @ root.T
    return hessian, lambda p: ravel(p) @ hessian @ ravel(p) / 2 + linear @ ravel(p) + 50


@given(seeds)
def test_the_loss_along_the_gradient_of_a_quadratic(seed):
    """L - s|g|^2 + s^2 g'Hg / 2."""
    hessian, loss_fn = quadratic(seed)
    rng = np.random.default_rng(seed + 1)
    params = {"b": jnp.asarray(rng.normal(size=2)), "w": jnp.asarray(rng.normal(size=(1, 3)))}
    gradients, sizes = jax.grad(loss_fn)(params), jnp.array([0.0, 1e-3, 0.1, 3.0, -0.5])
    g, s, loss = np.asarray(ravel(gradients)), np.asarray(sizes), loss_fn(params)
    expected = (loss - s * (g @ g) + s**2 * (g @ hessian @ g) / 2) / loss
    actual = jax.jit(lambda *args: diagnostics.loss_along(loss_fn, *args))(
        params, jax.tree.map(jnp.negative, gradients), sizes
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    np.testing.assert_allclose(actual[0], 1, rtol=1e-15)


@pytest.mark.usefixtures("standard_promotion")
def test_the_loss_along_the_steps_of_optimizers():
    """With an update of learning rate 1 the sizes are learning rates, for BNP and Adam as for SGD."""
    model, x, y = Network(), normal(0, 8, 3), jnp.arange(8) % 5
    params, layers = init(model, x), bnp.linen.find_layers(model, x)

    def loss_fn(params):
        logits, records = bnp.linen.capture(model)({"params": params}, x)
        return cross_entropy(logits, y), records

    grads, records = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
    along = jax.jit(functools.partial(diagnostics.loss_along, lambda p: loss_fn(p)[0]))
    for make in (optax.sgd, optax.adam, lambda rate: bnp.preconditioned(optax.sgd(rate), layers)):

        def update(rate, make=make):
            tx = optax.with_extra_args_support(make(rate))
            return tx.update(grads, tx.init(params), params, intermediates=records)[0]

        rates = [0.1, 3.0]
        expected = [loss_fn(optax.apply_updates(params, update(rate)))[0] / loss_fn(params)[0] for rate in rates]
        np.testing.assert_allclose(along(params, update(1.0), jnp.array(rates)), expected, rtol=1e-10)


@pytest.mark.usefixtures("standard_promotion")
def test_steps_of_low_precision_parameters_are_rounded_once():
    params = {"w": jnp.array([1.0, 2.0], jnp.bfloat16)}
    direction, sizes = {"w": jnp.array([0.3, -0.7], jnp.bfloat16)}, jnp.array([1e-3, 0.01, 0.7], jnp.float32)
    seen = lambda p: (p["w"].astype(jnp.float32) * jnp.array([1.0, 100.0], jnp.float32)).sum()  # noqa: E731
    moved = [
        optax.apply_updates(params, {"w": size * direction["w"].astype(jnp.float32)}) for size in np.float32(sizes)
    ]
    expected = [seen(p) / seen(params) for p in moved]
    np.testing.assert_array_equal(diagnostics.loss_along(seen, params, direction, sizes), expected)


def test_losses_that_are_not_finite_are_shown():
    ratios = diagnostics.loss_along(
        lambda p: jnp.exp(p), jnp.array(1.0, jnp.float32), jnp.array(1.0, jnp.float32), jnp.array([0.0, 1e3, jnp.nan])
    )
    np.testing.assert_array_equal(ratios, [1, np.inf, np.nan])


# Noise.


def noise_setup(seed, examples):
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=2))}
    x, y = jnp.asarray(rng.normal(size=(examples, 3))), jnp.asarray(rng.normal(size=(examples, 2)))
    return params, (x, y)


def of_example(params, example):
    x, y = example
    return jnp.square(jnp.tanh(x @ params["w"] + params["b"]) - y).sum()


def of_batch(params, batch):
    return jax.vmap(of_example, (None, 0))(params, batch).mean()


gradient_of_batch = jax.jit(jax.grad(of_batch))
noise = jax.jit(functools.partial(diagnostics.sgd_noise, of_example), static_argnums=3)


def step_of(params, batch, chosen, rate):
    chosen = np.array(chosen)
    return -rate * np.asarray(ravel(gradient_of_batch(params, jax.tree.map(lambda part: part[chosen], batch))))


@pytest.mark.parametrize("examples", [1, 7])
def test_the_noise_is_that_of_a_loop_over_examples(examples):
    params, batch = noise_setup(0, examples)
    gradients = [step_of(params, batch, [number], -1.0) for number in range(examples)]
    expected = 0.3**2 * np.mean([np.sum((g - np.mean(gradients, 0)) ** 2) for g in gradients]) / 4
    assert_close(noise(params, batch, 0.3, 4), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_noise_is_the_variance_of_all_batches(size):
    """Of all that may be drawn, with replacement exactly, without it the smaller by (N - size) / (N - 1)."""
    examples, rate = 5, 0.3
    params, batch = noise_setup(1, examples)
    whole = step_of(params, batch, range(examples), rate)
    expected = noise(params, batch, rate, size)
    for draw, factor in (
        (itertools.product(range(examples), repeat=size), 1),
        (itertools.combinations(range(examples), size), (examples - size) / (examples - 1)),
    ):
        distances = [np.sum((step_of(params, batch, chosen, rate) - whole) ** 2) for chosen in draw]
        assert_close(np.mean(distances), factor * expected)


def test_the_noise_of_whole_batches():
    """As it is taken with Batch Normalization: an example here is a batch."""
    params, batch = noise_setup(2, 12)
    batches = jax.tree.map(lambda part: part.reshape(4, 3, -1), batch)
    steps = np.array([step_of(params, batch, range(3 * i, 3 * i + 3), 0.5) for i in range(4)])
    actual = diagnostics.sgd_noise(of_batch, params, batches, 0.5, 1)
    assert_close(actual, np.square(steps - steps.mean(0)).sum(1).mean())


def test_the_noise_of_low_precision_parameters_is_float32():
    params, batch = noise_setup(3, 6)
    low, data = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, batch))
    actual = noise(low, data, 0.3, 2)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, noise(params, batch, 0.3, 2), rtol=0.05)


def test_equal_examples_make_no_noise():
    params, batch = noise_setup(4, 1)
    copies = jax.tree.map(lambda part: jnp.tile(part, (5, 1)), batch)
    np.testing.assert_allclose(noise(params, copies, 1.0, 1), 0, atol=1e-24)
