"""Updates of few bits: the grid against exact fractions, and steps along it against their law."""

import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grids import DELTA, N, is_on_grid, one_update, rounded, train
from helpers import normal

from bnp_optax.contrib.quantized import quantize_updates, round_to_grid

pytestmark = pytest.mark.usefixtures("standard_promotion")


def fraction_on_grid(x, bits, limit):
    """The nearest point, by exact arithmetic; Python rounds halves to the even number, as the grid does."""
    unit = Fraction(limit) * Fraction(2) ** (1 - bits)
    return float(min(max(round(Fraction(x) / unit) * unit, -Fraction(limit)), Fraction(limit) - unit))


class TestRounding:
    floats = st.floats(-5, 5, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)

    @hypothesis.given(st.lists(floats, min_size=16, max_size=16), st.integers(2, 12), st.integers(-2, 2))
    def test_the_nearest_point(self, x, bits, exponent):
        limit = 2.0**exponent
        actual = round_to_grid(np.array(x, np.float32), bits, limit=limit)
        np.testing.assert_array_equal(actual, [fraction_on_grid(number, bits, limit) for number in x])

    def test_halves_go_to_the_even_point(self):
        x = (np.arange(-127, 127) + 0.5) * DELTA
        expected = [fraction_on_grid(number, 8, 1.0) for number in x]
        np.testing.assert_array_equal(rounded(jnp.asarray(x, jnp.float32)), expected)

    @pytest.mark.parametrize("bits", [2, 8, 24])
    def test_points_stay_and_others_move_by_less_than_their_distance(self, bits):
        x = normal(0, N, mean=0, deviation=0.2).clip(-0.4, 0.4).astype(jnp.float32)
        for key, bound in ((None, 1 / 2), (jax.random.key(0), 1)):
            points = rounded(x, bits, key)
            assert is_on_grid(points, bits)
            distance = np.abs(np.asarray(points, np.float64) - np.asarray(x, np.float64)).max() / 2.0 ** (1 - bits)
            assert distance <= bound
            for again in (None, jax.random.key(1)):
                np.testing.assert_array_equal(rounded(points, bits, again), points)

    def test_stochastic_rounding_is_right_in_the_mean(self):
        """Each is one of the two neighbours, the upper one with the distance to the lower as its probability."""
        x = jnp.array([0.3, -0.3, 0.001, -0.001, 0.5 - 1e-3, -0.987])[:, None] * jnp.ones(N)
        points = np.asarray(rounded(x, 4, jax.random.key(3)), np.float64) * 8
        exact = np.asarray(x[:, 0], np.float64) * 8
        for own, number in zip(points, exact, strict=True):
            low = math.floor(number)
            assert set(np.unique(own)) <= {low, low + 1}
            p = number - low
            assert abs((own == low + 1).mean() - p) < 4 * math.sqrt(p * (1 - p) / N) + 1e-9

    def test_its_random_numbers_are_of_float32(self):
        """Those of bfloat16 are multiples of 1/128, so that the least of them would be far too likely."""
        x, p = jnp.full(N, 0.002 * DELTA, jnp.bfloat16), 0.002
        steps, _ = one_update(quantize_updates(optax.identity()), jnp.zeros(N, jnp.bfloat16), x)
        for points in (rounded(x, 8, jax.random.key(0)), steps):
            ups = np.asarray(points, np.float64).sum() / DELTA
            assert abs(ups - N * p) < 4 * math.sqrt(N * p)

    def test_it_keeps_powers_of_two(self):
        x = normal(1, 1000, mean=0, deviation=0.4).astype(jnp.float32)
        for key in (None, jax.random.key(0)):
            for limit in (2.0**-20, 0.5, 4.0):
                np.testing.assert_array_equal(rounded(limit * x, 8, key, limit=limit), limit * rounded(x, 8, key))

    @pytest.mark.parametrize("key", [None, 0])
    def test_the_ends_and_what_is_not_finite(self, key):
        key = None if key is None else jax.random.key(key)
        x = jnp.array([1.0, -1.0, 7.0, -7.0, 1e38, jnp.inf, -jnp.inf, jnp.nan])
        expected = [1 - DELTA, -1, 1 - DELTA, -1, 1 - DELTA, jnp.inf, -jnp.inf, jnp.nan]
        np.testing.assert_array_equal(rounded(x, 8, key), expected)

    @pytest.mark.parametrize(("dtype", "bits"), [(jnp.bfloat16, 8), (jnp.float16, 11), (jnp.float32, 24)])
    def test_a_dtype_holds_the_grid_and_all_differences_and_one_bit_more_is_refused(self, dtype, bits):
        ends = np.concatenate([np.arange(70), 2 ** (bits - 1) + np.arange(-70, 70), 2**bits - 1 - np.arange(70)])
        points = (np.unique(ends.clip(0, 2**bits - 1)) - 2.0 ** (bits - 1)) * 2.0 ** (1 - bits)
        np.testing.assert_array_equal(np.asarray(rounded(jnp.asarray(points, dtype), bits), np.float64), points)
        differences = points[:, None] - points
        np.testing.assert_array_equal(np.asarray(jnp.asarray(differences, dtype), np.float64), differences)
        more = 2 - 2.0**-bits  # the longest difference of a grid with one bit more
        assert float(jnp.asarray(more, dtype)) != more
        with pytest.raises(
            ValueError, match=f"x is of {jnp.dtype(dtype)}, which holds grids of up to {bits} bits, but"
        ):
            round_to_grid(jnp.zeros(2, dtype), bits + 1)

    def test_float64_stays(self):
        with jax.enable_x64(True):
            x = jnp.array([1 / 3, -1 / 7])
            points = round_to_grid(x, 40)
            assert points.dtype == jnp.float64
            np.testing.assert_array_equal(points, [fraction_on_grid(float(number), 40, 1.0) for number in x])

    def test_what_is_no_grid_is_refused(self):
        for bits in (1, 0, 2.5, jnp.array(8)):
            with pytest.raises(ValueError, match="bits must be a whole number, at least 2"):
                round_to_grid(jnp.ones(2), bits)
        for limit in (0.0, -1.0, 3.0, math.inf, math.nan, None):
            with pytest.raises(ValueError, match="limit must be a power of two"):
                round_to_grid(jnp.ones(2), limit=limit)
        with pytest.raises(ValueError, match="x is of int32, but only floating-point numbers"):
            round_to_grid(jnp.ones(2, jnp.int32))
        for limit in (2.0**-130, 2.0**127):
            with pytest.raises(ValueError, match="does not hold a grid of 8 bits up to"):
                round_to_grid(jnp.ones(2), limit=limit)


class TestSteps:
    """What a step does to parameters."""

    @pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
    @pytest.mark.parametrize(
        ("dtype", "bits"), [(jnp.float32, 8), (jnp.float32, 24), (jnp.bfloat16, 8), (jnp.float16, 11)]
    )
    def test_parameters_and_update_lie_on_the_grid_exactly(self, rounding, dtype, bits):
        """From any start, in every step, over many magnitudes of both."""
        rng = np.random.default_rng(0)
        params = jnp.asarray(rng.normal(size=N) * 2.0 ** rng.integers(-14, 1, N), dtype)
        tx = quantize_updates(optax.identity(), bits, rounding)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(4):
            step = jnp.asarray(rng.normal(size=N) * 2.0 ** rng.integers(-14, 1, N), dtype)
            updates, state = update(step, state, params)
            assert updates.dtype == dtype
            params = params + updates
            assert is_on_grid(params, bits)

    def test_a_plain_difference_would_miss_the_grid(self):
        """Why parameters off the grid go to their nearest point first."""
        w, point = -np.random.default_rng(0).random(100, np.float32) / 1000, np.float32(1 / 128)
        assert not is_on_grid(w + (point - w))

    def test_parameters_off_the_grid_go_to_their_nearest_point_first(self):
        params = normal(0, N, mean=0, deviation=0.5).astype(jnp.float32).at[:100].set(0.5)
        updates, _ = one_update(quantize_updates(optax.sgd(1.0)), params, jnp.full(N, -0.125))
        expected = rounded(params).at[:100].set(0.625)
        np.testing.assert_array_equal(params + updates, expected)

    @pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
    def test_steps_of_zero_leave_parameters_as_they_are(self, rounding):
        params = rounded(normal(0, N, mean=0, deviation=0.5).astype(jnp.float32))
        updates, _ = one_update(quantize_updates(optax.sgd(1.0), rounding=rounding), params, jnp.zeros(N))
        np.testing.assert_array_equal(updates, np.zeros(N))

    @pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
    def test_a_step_goes_to_a_neighbour_of_where_it_was_to_go(self, rounding):
        params = rounded(normal(0, N, mean=0, deviation=0.1).astype(jnp.float32))
        step = normal(1, N, mean=0, deviation=0.05).astype(jnp.float32)
        updates, _ = one_update(quantize_updates(optax.identity(), rounding=rounding), params, step)
        units = np.asarray(step, np.float64) / DELTA
        moved = np.asarray(updates, np.float64) / DELTA
        if rounding == "nearest":
            np.testing.assert_array_equal(moved, np.rint(units))
        else:
            assert np.all((moved == np.floor(units)) | (moved == np.ceil(units)))
            assert 0.3 < (moved == np.ceil(units)).mean() < 0.7
            # the error of each has a variance of p (1 - p) <= 1/4
            assert abs((moved - units).mean()) < 4 / 2 / math.sqrt(N)

    def test_steps_beyond_the_grid_end_at_its_end(self):
        params = jnp.array([0.5, -0.5, 1 - DELTA, -1.0])
        updates, _ = one_update(quantize_updates(optax.identity()), params, jnp.array([0.7, -0.7, DELTA, -DELTA]))
        np.testing.assert_array_equal(params + updates, [1 - DELTA, -1, 1 - DELTA, -1])
        across, _ = one_update(quantize_updates(optax.identity()), jnp.array([-1.0, 0.75]), jnp.array([1.5, -1.5]))
        np.testing.assert_array_equal(across, [1.5, -1.5])
        wide, _ = one_update(quantize_updates(optax.identity(), limit=2.0), params, jnp.array([0.5, -0.5, 0.0, -0.5]))
        np.testing.assert_array_equal(params[jnp.array([0, 1, 3])] + wide[jnp.array([0, 1, 3])], [1.0, -1.0, -1.5])

    def test_short_steps_stall_if_rounded_to_the_nearest_point_and_do_not_else(self):
        """A hundred steps of a thousandth, an eighth of the points' distance, from a quarter."""
        params, step = jnp.full(N, 0.25), jnp.full(N, 0.001)
        nearest = train(quantize_updates(optax.sgd(1.0), rounding="nearest"), params, step, 100)[0]
        np.testing.assert_array_equal(nearest, params)
        stochastic = train(quantize_updates(optax.sgd(1.0)), params, step, 100)[0]
        p = 0.001 / DELTA
        deviation = DELTA * math.sqrt(100 * p * (1 - p))
        assert abs(stochastic.mean() - 0.15) < 4 * deviation / math.sqrt(N)
        np.testing.assert_allclose(stochastic.std(), deviation, rtol=0.05)

    def test_with_many_bits_it_is_the_inner_optimizer(self):
        with jax.enable_x64(True):
            inner, params = optax.adam(0.01), round_to_grid(normal(0, 50, mean=0, deviation=0.2), 32)
            gradients = jnp.cos(params)
            for rounding, bound in (("nearest", 0.5), ("stochastic", 1.0)):
                actual = train(quantize_updates(inner, 32, rounding), params, gradients, 10)[0]
                expected = train(inner, params, gradients, 10)[0]
                assert np.abs(actual - expected).max() <= 10 * bound * 2.0**-31
                assert np.abs(actual - expected).max() > 0

    @pytest.mark.parametrize("start", [0.5, 0.3])
    def test_a_step_that_is_not_finite_is_seen(self, start):
        params = jnp.full(3, start)
        for step in (jnp.inf, -jnp.inf, jnp.nan):
            updates, _ = one_update(quantize_updates(optax.identity()), params, jnp.array([0.1, step, 0.1]))
            assert list(np.isfinite(params + updates)) == [True, False, True]

    def test_dtypes_of_parameters_and_steps_may_differ(self):
        params, step = jnp.full(8, 0.5, jnp.float32), jnp.full(8, 2.0**-12, jnp.bfloat16)
        updates, _ = one_update(quantize_updates(optax.identity(), 16), params, step)
        assert updates.dtype == jnp.float32
        np.testing.assert_array_equal(updates, np.full(8, 2.0**-12))
        low = params.astype(jnp.bfloat16)
        updates, _ = one_update(quantize_updates(optax.identity()), low, jnp.full(8, 0.25, jnp.float32))
        np.testing.assert_array_equal(optax.apply_updates(low, updates), jnp.full(8, 0.75, jnp.bfloat16))
