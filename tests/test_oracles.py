"""The NumPy step that the tests compare with is the paper's: its loops, and its matrices."""

import numpy as np
import oracles
from hypothesis import given
from hypothesis import strategies as st

sizes, seeds = st.integers(1, 4), st.integers(0, 2**16)


@given(st.integers(1, 6), sizes, sizes, st.floats(0, 0.99), st.booleans(), seeds)
def test_the_step_is_algorithm_2_of_the_paper(examples, n, m, rho, mixture, seed):
    rng = np.random.default_rng(seed)
    h, g_w, g_b = rng.normal(2, 3, (examples, n)), rng.normal(size=(n, m)), rng.normal(size=m)
    mean, variance = rng.normal(size=n), rng.uniform(0.5, 2, n)
    q2, eps = max(n / examples, 1), (0.02, 1e-3)
    *expected, new_mean, new_variance = oracles.algorithm_2(h, g_w, g_b, mean, variance, rho, *eps, q2, mixture)
    absorbed = oracles.absorbed(mean, variance, h, rho, "mixture" if mixture else "batch")
    for actual, desired in zip(absorbed, (new_mean, new_variance), strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-10, atol=1e-10)
    for actual, desired in zip(oracles.bnp_step(*absorbed, g_w, g_b, q2, eps), expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=1e-10, atol=1e-10)


@given(st.integers(1, 3), sizes, sizes, st.booleans(), seeds)
def test_the_step_is_p_times_its_transpose(window, n, m, with_bias, seed):
    """Also where a window reads every input several times; without a bias its row of P belongs to nothing."""
    rng = np.random.default_rng(seed)
    g_w, g_b = rng.normal(size=(window * n, m)), rng.normal(size=m) if with_bias else None
    mean, variance, q2 = rng.normal(size=n), rng.uniform(0.5, 2, n), rng.uniform(1, 5)
    new_w, new_b = oracles.bnp_step(mean, variance, g_w, g_b, q2)
    moment = variance if with_bias else variance + mean**2
    s = np.tile(moment + oracles.EPS[0] * moment.max() + oracles.EPS[1], window)
    p = oracles.preconditioner(np.tile(mean if with_bias else 0 * mean, window), s, q2)
    expected = p @ p.T @ np.concatenate([g_b[None] if with_bias else np.zeros((1, m)), g_w])
    np.testing.assert_allclose(new_w, expected[1:], rtol=1e-10, atol=1e-10)
    if with_bias:
        np.testing.assert_allclose(new_b, expected[0], rtol=1e-10, atol=1e-10)
