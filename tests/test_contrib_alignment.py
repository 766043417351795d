"""Representation alignment: the residual, against least squares in NumPy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnp_optax.contrib.alignment import alignment_residual, gated_head

pytestmark = pytest.mark.usefixtures("x64")


def draw(seed, *shape, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def linear(theta, a):
    """Parameters in two parts, so that the order of the tree's leaves matters not."""
    return (a @ jnp.concatenate([theta["first"], theta["second"]])).reshape(-1, 2)


@functools.partial(jax.jit, static_argnames="iterations")
def of_matrix(a, y, iterations=None):
    theta = {"first": jnp.full(2, 0.3, a.dtype), "second": jnp.full(a.shape[1] - 2, -0.7, a.dtype)}
    return alignment_residual(linear, theta, a, y.reshape(-1, 2), iterations=iterations)


def matrix_of_rank(seed, rows, columns, rank):
    return draw(seed, rows, rank) @ draw(seed + 1, rank, columns)


def least_squares_residual(a, y):
    theta = np.linalg.lstsq(a, y)[0]
    return np.linalg.norm(a @ theta - y) / np.linalg.norm(y)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**30), rank=st.integers(1, 6), shape=st.sampled_from([(6, 9), (12, 7)]))
def test_residual_and_rank_are_those_of_numpy(seed, rank, shape):
    a, y = matrix_of_rank(seed, *shape, rank), draw(seed + 2, shape[0])
    found = of_matrix(a, y)
    np.testing.assert_allclose(found.residual, least_squares_residual(a, y), rtol=1e-8, atol=1e-13)
    assert int(found.rank) == np.linalg.matrix_rank(a) == rank
    assert found.residual.dtype == np.float64
    assert found.rank.dtype == np.int32


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**30), rank=st.integers(1, 6))
def test_it_is_zero_where_targets_can_be_reached_and_the_sine_elsewhere(seed, rank):
    a = matrix_of_rank(seed, 12, 7, rank)
    inside = a @ draw(seed + 2, 7)
    assert of_matrix(a, inside).residual < 1e-13
    vector = draw(seed + 3, 12)
    outside = vector - a @ np.linalg.lstsq(a, vector)[0]
    angle = 0.3
    y = np.cos(angle) * inside / np.linalg.norm(inside) + np.sin(angle) * outside / np.linalg.norm(outside)
    np.testing.assert_allclose(of_matrix(a, y).residual, np.sin(angle), rtol=1e-10)
    np.testing.assert_allclose(of_matrix(a, outside).residual, 1, rtol=1e-12)


def test_it_falls_as_columns_are_added():
    a, y = draw(0, 12, 12), draw(1, 12)
    residuals = [float(of_matrix(a[:, :columns], y).residual) for columns in range(2, 13)]
    assert (np.diff(residuals) < 0).all()
    assert residuals[0] > 0.5
    assert residuals[-1] < 1e-12
    repeated = np.concatenate([a[:, :3], a[:, :3] @ draw(2, 3, 4)], axis=1)
    np.testing.assert_allclose(of_matrix(repeated, y).residual, residuals[1], rtol=1e-12)


@pytest.mark.parametrize("iterations", [None, 60])
@pytest.mark.parametrize(("dtype", "factor"), [(np.float64, 1e160), (np.float32, 1e25), (np.float32, 1e30)])
def test_scales_of_targets_and_outputs_do_not_matter(iterations, dtype, factor):
    a, y = matrix_of_rank(0, 12, 7, 4).astype(dtype), draw(1, 12, dtype=dtype)
    expected, rank = of_matrix(a, y, iterations)
    assert 0.1 < expected < 0.95
    for scale in (dtype(factor), dtype(1 / factor)):
        for other in (of_matrix(a, scale * y, iterations), of_matrix(scale * a, y, iterations)):
            np.testing.assert_allclose(other.residual, expected, rtol=1e-5 if dtype == np.float32 else 1e-12)
            assert other.rank == rank


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**30), rank=st.integers(1, 6), shape=st.sampled_from([(6, 9), (12, 7)]))
def test_without_a_matrix_the_residual_is_the_same(seed, rank, shape):
    a, y = matrix_of_rank(seed, *shape, rank), draw(seed + 2, shape[0])
    found = of_matrix(a, y, 200)
    np.testing.assert_allclose(found.residual, of_matrix(a, y).residual, rtol=1e-7, atol=1e-9)
    assert found.rank is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_iterations_end_where_all_that_is_left_is_rounding(dtype, tolerance):
    """Or they would go far along the null space, where the gradient is nothing but rounding."""
    for rank in (1, 4):
        a, y = matrix_of_rank(0, 12, 7, rank).astype(dtype), draw(2, 12, dtype=dtype)
        expected = least_squares_residual(matrix_of_rank(0, 12, 7, rank), y)
        np.testing.assert_allclose(of_matrix(a, y, 5000).residual, expected, rtol=tolerance)


def test_iterations_are_bounds_that_fall_and_count_as_in_the_krylov_space():
    """After k steps of conjugate gradients from 0 the residual is the least over the Krylov space of A'A and A'y."""
    a, y = draw(0, 12, 8), draw(1, 12)
    exact = float(of_matrix(a, y).residual)
    krylov = [a.T @ y]
    for iterations in range(1, 5):
        found = float(of_matrix(a, y, iterations).residual)
        np.testing.assert_allclose(found, least_squares_residual(a @ np.stack(krylov, 1), y), rtol=1e-9)
        assert found > exact + 1e-3
        krylov.append(a.T @ (a @ krylov[-1]))


def test_a_bound_that_rounding_cannot_pass():
    """In float32 what the iterations carry along falls below the least residual; that of their point does not."""
    left, right = np.linalg.qr(draw(0, 60, 60))[0], np.linalg.qr(draw(1, 30, 30))[0]
    y = (left[:, :30].sum(1) + 0.3 * left[:, 30]).astype(np.float32)
    for exponent, iterations in ((-5, 300), (-5, 3000), (-5, 20_000), (-6, 60_000)):
        a = ((left[:, :30] * np.logspace(0, exponent, 30)) @ right).astype(np.float32)
        found = of_matrix(a, y, iterations).residual
        assert least_squares_residual(a.astype(float), y.astype(float)) <= float(found) <= 1


def test_targets_orthogonal_to_all_columns_and_targets_of_zero():
    a = np.concatenate([draw(0, 6, 4), np.zeros((6, 4))])
    y = np.concatenate([np.zeros(6), draw(1, 6)])
    for iterations in (None, 10):
        np.testing.assert_allclose(of_matrix(a, y, iterations).residual, 1, rtol=1e-14)
        assert of_matrix(a, 0 * y, iterations).residual == 0
        assert of_matrix(0 * a, y, iterations).residual == 1
    assert of_matrix(0 * a, y).rank == 0


@pytest.mark.parametrize("iterations", [None, 10])
def test_what_is_not_finite_gives_nan(iterations):
    a, y = draw(0, 6, 4), draw(1, 6)
    for bad in (np.nan, np.inf):
        assert np.isnan(of_matrix(np.where(a == a[2, 1], bad, a), y, iterations).residual)
        assert np.isnan(of_matrix(a, np.where(y == y[3], bad, y), iterations).residual)


def test_float32_takes_weak_directions_for_none():
    """As the docstring says: below max(shape) eps of the largest, about 1e-6 here."""
    left, right = np.linalg.qr(draw(0, 10, 10))[0], np.linalg.qr(draw(1, 10, 10))[0]
    a = (left * np.array([1.0] * 8 + [1e-5, 1e-7])) @ right
    y = left[:, 9]
    assert (of_matrix(a, y).rank, of_matrix(a.astype(np.float32), y.astype(np.float32)).rank) == (10, 9)
    assert of_matrix(a, y).residual < 1e-8
    assert of_matrix(a.astype(np.float32), y.astype(np.float32)).residual > 0.9


@pytest.mark.parametrize("iterations", [None, 300])
def test_a_network_is_measured_at_its_parameters(iterations):
    """The Jacobian of two layers of tanh, by formula."""
    x, y = draw(0, 5, 3), draw(1, 5, 2)
    params = {"w": draw(2, 3, 4), "v": draw(3, 4, 2)}
    h = np.tanh(x @ params["w"])
    of_v = np.einsum("nk,ij->nikj", h, np.eye(2)).reshape(10, 8)
    of_w = np.einsum("nm,nk,kj->njmk", x, 1 - h**2, params["v"]).reshape(10, 12)

    def network(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    @jax.jit
    def find(params):
        whole = alignment_residual(network, params, x, y, iterations=iterations)
        last = alignment_residual(lambda v, x: network({**params, "v": v}, x), params["v"], x, y, iterations=iterations)
        return whole, last

    for found, jacobian in zip(find(params), (np.concatenate([of_v, of_w], 1), of_v), strict=True):
        expected = least_squares_residual(jacobian, y.ravel())
        np.testing.assert_allclose(found.residual, expected, rtol=1e-6, atol=1e-7)
        assert iterations or int(found.rank) == np.linalg.matrix_rank(jacobian)
    assert find(params)[1].residual > 0.05  # the last layer of 8 weights does not reach 10 numbers


def test_outputs_can_be_mapped_one_by_one():
    """Of a head, whose outputs have weights of their own: the squares add up, and so do the ranks."""
    z, hidden, output, y = draw(0, 12, 3), draw(1, 3, 2, 3), draw(2, 2, 3), draw(3, 12, 2)

    def own(hidden, output, y):
        f = lambda w, z: gated_head(z, w[:, None], output[None], hidden[:, None])[:, 0]  # noqa: E731
        return alignment_residual(f, hidden, z, y)

    each = jax.jit(jax.vmap(own, (1, 0, 1)))(hidden, output, y)
    whole = jax.jit(lambda: alignment_residual(lambda w, z: gated_head(z, w, output, hidden), hidden, z, y))()
    norms = np.linalg.norm(y, axis=0)
    np.testing.assert_allclose(np.linalg.norm(each.residual * norms) / np.linalg.norm(norms), whole.residual, rtol=1e-9)
    assert int(whole.rank) == int(each.rank.sum())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_is_computed_in_float32(dtype):
    a, y = draw(0, 12, 4), draw(1, 12)
    cast = lambda array: jnp.asarray(array).astype(dtype)  # noqa: E731
    f = lambda w, x: x.astype(w.dtype) @ w  # noqa: E731
    found = jax.jit(functools.partial(alignment_residual, f))(cast(np.ones(4)), cast(a), cast(y))
    expected = least_squares_residual(np.asarray(cast(a), float), np.asarray(cast(y), float))
    np.testing.assert_allclose(found.residual, expected, rtol=1e-5)
    assert found.residual.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y": np.ones(3)}, ValueError, r"f returns \(3, 2\), but the targets have the shape \(3,\).*one_hot"),
        ({"f": lambda p, x: (x, x)}, ValueError, "f returns .*Let f return one array"),
        ({"params": {"w": np.arange(8).reshape(4, 2)}}, TypeError, r"params\['w'\] is of dtype int64.*Close over"),
        ({"params": {}, "f": lambda p, x: x @ np.ones((4, 2))}, ValueError, "There are 0 parameters and 6 targets"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, or None.*is 0"),
        ({"x": np.ones((0, 4)), "y": np.ones((0, 2))}, ValueError, "8 parameters and 0 targets"),
    ],
)
def test_mistakes_about_the_residual_are_refused(changes, error, message):
    usual = {"f": lambda p, x: x @ p["w"], "params": {"w": np.ones((4, 2))}, "x": np.ones((3, 4)), "y": np.ones((3, 2))}
    with pytest.raises(error, match=message):
        alignment_residual(**usual | changes)
