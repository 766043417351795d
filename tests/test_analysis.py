"""The dense matrices of the analysis, against NumPy's and against the transformation itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from helpers import compiled, with_statistics

import bnp_optax as bnp
from bnp_optax import Layer, Parameter, analysis

pytestmark = pytest.mark.usefixtures("x64")

DENSE = Layer.dense(("kernel",), (5, 3), bias=("bias",))
NO_BIAS = Layer.dense(("kernel",), (5, 3))
GROUPED_CONV = Layer(
    "Conv",
    kernel=Parameter(("kernel",), (3, 2, 2, 6), split=(3, 2, 2, 2, 3), roles="wwigo"),
    bias=Parameter(("bias",), (6,), split=(2, 3), roles="go"),
    record="kernel",
)
STACKED = Layer(
    "Dense",
    kernel=Parameter(("kernel",), (4, 2, 3), split=(4, 2, 3), roles="iso"),
    bias=Parameter(("bias",), (2, 3), split=(2, 3), roles="so"),
    record="kernel",
)
LAYERS = {"dense": DENSE, "no bias": NO_BIAS, "grouped convolution": GROUPED_CONV, "stack": STACKED}


def random_params(layer, rng):
    return {parameter.path[0]: jnp.asarray(rng.normal(size=parameter.shape)) for parameter in layer.parameters}


def random_state(layer, params, rng, eps=(1e-2, 1e-4)):
    """A state with any statistics, as if it had been trained."""
    state = bnp.scale_by_bnp(bnp.Layers((layer,))).init(params)
    mean, variance = rng.normal(size=layer.moments_shape), rng.uniform(0.1, 9, size=layer.moments_shape)
    moment = variance + mean**2 if layer.bias is None else variance
    damping, scale = eps[0] * moment.max(-1) + eps[1], rng.uniform(1, 4, size=layer.moments_shape[:1])
    return with_statistics(state, "kernel", mean=mean, variance=variance, damping=damping, scale=scale)


p_of = jax.jit(analysis.preconditioner, static_argnums=0)


def hessian(loss_fn, params, layer=DENSE, **options):
    return jax.jit(lambda params: analysis.hessian(loss_fn, params, layer, **options))(params)


def top_eigenvalue(loss_fn, params, layer, *state, products):
    run = functools.partial(analysis.top_eigenvalue, loss_fn, products=products)
    return jax.jit(lambda params, *state: run(params, layer, *state))(params, *state)


def vector(layer, tree):
    return np.concatenate([np.ravel(tree[parameter.path[0]]) for parameter in layer.parameters])


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("eps", [(0.0, 0.0), (1e-2, 1e-4), (0.3, 0.2)])
def test_the_update_is_the_gradient_times_p_and_its_transpose(layer, eps):
    rng = np.random.default_rng(0)
    gradient = random_params(layer, rng)
    tx = compiled(bnp.scale_by_bnp(bnp.Layers((layer,)), eps_relative=eps[0], eps=eps[1]))
    states = [random_state(layer, gradient, rng, eps), None]
    # absorbed by the transformation itself, whose damping the analysis is not told
    record = jnp.asarray(rng.normal(1, 2, size=layer.moments_shape)), jnp.full(layer.moments_shape, 3.0)
    examples = jnp.full(layer.moments_shape[0], 40)
    records = {"kernel": bnp.InputMoments.of(*record, examples, examples.astype(float))}
    _, states[1] = tx.update(gradient, tx.init(gradient), intermediates=records)
    for state in states:
        update, _ = tx.update(gradient, state, intermediates=bnp.KEEP_STATISTICS)
        p = p_of(layer, state)
        np.testing.assert_allclose(p @ p.T @ vector(layer, gradient), vector(layer, update), rtol=1e-12, atol=1e-12)


def test_p_is_the_papers_product_of_two_matrices_for_every_unit():
    rng = np.random.default_rng(1)
    state = random_state(DENSE, random_params(DENSE, rng), rng)
    mean, variance, _, scale, *_ = (np.asarray(x).squeeze() for x in state["kernel"])
    expected = np.zeros((18, 18))
    for unit in range(3):
        own = [15 + unit, *range(unit, 15, 3)]  # bias, then weights
        expected[np.ix_(own, own)] = oracles.preconditioner(mean, variance + 1e-2 * variance.max() + 1e-4, scale)
    np.testing.assert_allclose(p_of(DENSE, state), expected, rtol=1e-12)


def softmax_regression(rng, scales):
    """A loss, its parameters, and its Hessian with respect to [kernel; bias]: a sum over the examples, in NumPy."""
    x, labels = rng.normal(size=(40, 5)) * scales + scales, rng.integers(0, 3, size=40)
    params = random_params(DENSE, rng)

    def loss_fn(params):
        logits = jnp.asarray(x) @ params["kernel"] + params["bias"][None]
        return -jax.nn.log_softmax(logits)[np.arange(40), labels].mean()

    logits = x @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    expected = np.zeros((18, 18))
    for features, z in zip(x, logits, strict=True):
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        extended = np.append(features, 1)
        expected += np.kron(np.outer(extended, extended), np.diag(p) - np.outer(p, p)) / 40
    return x, loss_fn, params, expected


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_hessian_of_softmax_regression(batch_size):
    _, loss_fn, params, expected = softmax_regression(np.random.default_rng(2), scales=1.0)
    actual = hessian(loss_fn, params, batch_size=batch_size)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-13)


def test_hessian_is_that_of_one_layer_among_others():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(9, 4)))
    params = {
        "a": {"kernel": jnp.asarray(rng.normal(size=(4, 3)))},
        "b": {"kernel": jnp.asarray(rng.normal(size=(3, 2)))},
    }
    loss_fn = lambda p: jnp.square(jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]).sum() / 2  # noqa: E731
    hidden = np.tanh(np.asarray(x) @ np.asarray(params["a"]["kernel"]))
    expected = np.kron(hidden.T @ hidden, np.eye(2))  # least squares in the last layer
    actual = hessian(loss_fn, params, Layer.dense(("b", "kernel"), (3, 2)))
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_parameters_may_lie_beneath_a_key_or_be_nnx_state():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(9, 4)))
    graph, state = nnx.split(nnx.Sequential(nnx.Linear(4, 1, use_bias=False, param_dtype=float, rngs=nnx.Rngs(0))))
    [layer] = bnp.nnx.find_layers(nnx.merge(graph, state), x).included
    half_square = lambda y: jnp.square(y).sum() / 2  # noqa: E731
    of_state = lambda state: half_square(nnx.merge(graph, state)(x))  # noqa: E731
    of_prefixed = lambda tree: half_square(x @ tree["params"]["layers"][0]["kernel"])  # noqa: E731
    prefixed = {"params": {"layers": [{"kernel": jnp.ones((4, 1))}]}}
    for loss_fn, params in ((of_state, state), (of_prefixed, prefixed)):
        np.testing.assert_allclose(hessian(loss_fn, params, layer), x.T @ x, rtol=1e-10)
        top = top_eigenvalue(loss_fn, params, layer, products=4)
        np.testing.assert_allclose(top, np.linalg.eigvalsh(x.T @ x).max(), rtol=1e-10)


def test_preconditioning_cures_badly_scaled_inputs():
    scales = np.array([1e-2, 1e-1, 1.0, 1e1, 1e2])
    x, loss_fn, params, h = softmax_regression(np.random.default_rng(4), scales)
    params = jax.tree.map(jnp.zeros_like, params)
    h = hessian(loss_fn, params)
    tx = compiled(bnp.scale_by_bnp(bnp.Layers((DENSE,)), decay=0.0, eps_relative=0.0, eps=0.0))
    records = {"kernel": bnp.input_moments(jnp.asarray(x))}
    _, state = tx.update(params, tx.init(params), intermediates=records)
    p = p_of(DENSE, state)
    # H is the covariance of [x; 1] times that of the labels; P makes all its diagonal alike.
    assert analysis.condition_number(h) > 1e8
    assert analysis.condition_number(p.T @ h @ p) < 10


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_top_eigenvalue_is_that_of_the_dense_matrices(layer):
    rng = np.random.default_rng(5)
    params = random_params(layer, rng)
    state = random_state(layer, params, rng)
    factor = jnp.asarray(rng.normal(size=(vector(layer, params).size,) * 2))

    def loss_fn(params):
        return jnp.square(factor @ jnp.concatenate([params[p.path[0]].ravel() for p in layer.parameters])).sum() / 2

    h = np.asarray(factor.T @ factor)
    p = np.asarray(p_of(layer, state))
    for actual, matrix in (
        (top_eigenvalue(loss_fn, params, layer, products=60), h),
        (top_eigenvalue(loss_fn, params, layer, state, products=60), p.T @ h @ p),
    ):
        np.testing.assert_allclose(actual, np.linalg.eigvalsh(matrix).max(), rtol=1e-8)


def test_few_products_give_a_lower_bound():
    rng = np.random.default_rng(6)
    _, loss_fn, params, h = softmax_regression(rng, scales=1.0)
    values = [float(top_eigenvalue(loss_fn, params, DENSE, products=n)) for n in (1, 2, 4, 18)]
    assert values == sorted(values)
    np.testing.assert_allclose(values[-1], np.linalg.eigvalsh(h).max(), rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_condition_number(dtype):
    rng = np.random.default_rng(7)
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    matrix = jnp.asarray(q @ np.diag([-50.0, 20, 5, 2, 0, 0]) @ q.T, dtype)
    chex.assert_trees_all_close(analysis.condition_number(matrix), jnp.asarray(25, dtype), rtol=1e-4)
    chex.assert_trees_all_close(analysis.condition_number(3 * matrix), jnp.asarray(25, dtype), rtol=1e-4)
    for tolerance, expected in ((0.05, 10), (0.2, 2.5), (0.5, 1)):
        actual = analysis.condition_number(matrix, tolerance)
        chex.assert_trees_all_close(actual, jnp.asarray(expected, dtype), rtol=1e-4)


def test_condition_number_of_zeros_is_nan():
    assert jnp.isnan(analysis.condition_number(jnp.zeros((3, 3))))


def test_a_missing_layer_is_named():
    params = random_params(DENSE, np.random.default_rng(8))
    other = Layer.dense(("other", "kernel"), (5, 3))
    state = bnp.scale_by_bnp(bnp.Layers((DENSE,))).init(params)
    calls = [
        lambda: analysis.preconditioner(other, state),
        lambda: analysis.hessian(lambda p: p["bias"].sum(), params, other),
        lambda: analysis.top_eigenvalue(lambda p: p["bias"].sum(), params, other, state),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"(hold no|describes) other/kernel"):
            call()


def test_all_of_it_compiles():
    rng = np.random.default_rng(9)
    _, loss_fn, params, _ = softmax_regression(rng, scales=1.0)
    state = random_state(DENSE, params, rng)

    @jax.jit
    def numbers(params, state):
        h, p = analysis.hessian(loss_fn, params, DENSE), analysis.preconditioner(DENSE, state)
        top = analysis.top_eigenvalue(loss_fn, params, DENSE, state, products=18)
        return analysis.condition_number(p.T @ h @ p), top, jnp.linalg.eigvalsh(p.T @ h @ p).max()

    condition, top, expected = numbers(params, state)
    assert condition > 1
    np.testing.assert_allclose(top, expected, rtol=1e-9)
