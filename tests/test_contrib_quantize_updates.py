"""Updates of few bits as a wrapper: random keys, masks, checkpoints, and the company of other transformations."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from grids import DELTA, is_on_grid, one_update, rounded, train
from helpers import normal
from transformations import DENSE, dense_params, dense_record

import bnp_optax as bnp
from bnp_optax.contrib.quantized import QuantizeUpdatesState, quantize_updates, round_to_grid
from bnp_optax.contrib.trajectory import trajectory_regularized

pytestmark = pytest.mark.usefixtures("standard_promotion")


ZEROS = {"a": jnp.zeros(500), "b": jnp.zeros(500)}
HALVES = {"a": jnp.full(500, 0.5 * DELTA), "b": jnp.full(500, 0.5 * DELTA)}


class TestKeys:
    """Random numbers; each step is half the distance of two points."""

    def points(self, key, steps=2):
        tx = quantize_updates(optax.sgd(1.0), key=key)
        return jax.tree.map(np.asarray, train(tx, ZEROS, HALVES, steps)[1])

    def test_a_seed_and_its_key_are_the_same_and_others_differ(self):
        chex.assert_trees_all_equal(self.points(3), self.points(jax.random.key(3)))
        assert np.any(self.points(3)["a"] != self.points(4)["a"])

    def test_parameters_and_steps_are_rounded_independently(self):
        points = self.points(0)
        steps = [points["a"][0], points["b"][0], points["a"][1] - points["a"][0], points["b"][1] - points["b"][0]]
        ups = np.array(steps) == 0
        for k in range(4):
            assert 0.4 < ups[k].mean() < 0.6
            for other in range(k):
                assert 0.4 < (ups[k] == ups[other]).mean() < 0.6

    def test_nothing_is_random_about_the_nearest_point(self):
        gradients = normal(0, 500, mean=0, deviation=0.1).astype(jnp.float32)
        first, second = (
            train(quantize_updates(optax.sgd(0.3), rounding="nearest", key=key), jnp.zeros(500), gradients, 3)[0]
            for key in (0, 1)
        )
        np.testing.assert_array_equal(first, second)

    def test_keys_of_other_generators(self):
        key = jax.random.key(0, impl="rbg")
        tx = quantize_updates(optax.sgd(1.0), key=key)
        assert tx.init(ZEROS).key.shape == jax.random.key_data(key).shape
        assert is_on_grid(train(tx, ZEROS, HALVES, 2)[0]["a"])

    def test_a_run_goes_on_from_a_checkpoint_bit_by_bit(self):
        """The key is an ordinary array there: a new-style key is none that msgpack could hold."""
        tx = quantize_updates(optax.sgd(1.0, 0.9), key=jax.random.key(5))
        update = jax.jit(tx.update)

        def run(params, state, steps):
            for _ in range(steps):
                updates, state = update(HALVES, state, params)
                params = optax.apply_updates(params, updates)
            return params, state

        half = run(ZEROS, tx.init(ZEROS), 3)
        data = serialization.to_bytes(half)
        restored = serialization.from_bytes((ZEROS, tx.init(ZEROS)), data)
        chex.assert_trees_all_equal(run(*restored, 3), run(ZEROS, tx.init(ZEROS), 6))

    def test_members_of_an_ensemble_may_have_keys_of_their_own(self):
        tx = quantize_updates(optax.sgd(1.0))
        keys = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(0), 2))

        def first(key):
            updates, _ = tx.update(HALVES, tx.init(ZEROS)._replace(key=key), ZEROS)
            return updates["a"]

        one, other = jax.jit(jax.vmap(first))(keys)
        np.testing.assert_array_equal(one, jax.jit(first)(keys[0]))
        assert 0.4 < (one == other).mean() < 0.6


PARAMS = {"dense": {"kernel": jnp.full((2, 3), 0.25), "bias": jnp.full(3, 0.3)}, "scale": jnp.ones(())}
GRADIENTS = jax.tree.map(lambda leaf: 0.1 * leaf, PARAMS)
MASKS = {
    "tree": {"dense": {"kernel": True, "bias": False}, "scale": False},
    "function": lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
}


class TestMask:
    """Which parameters are on the grid."""

    @pytest.mark.parametrize("mask", MASKS)
    def test_other_parameters_are_updated_as_without(self, mask):
        inner = optax.adamw(0.1)
        params, _, state = train(quantize_updates(inner, mask=MASKS[mask]), PARAMS, GRADIENTS, 4)
        alone, _, alone_state = train(inner, PARAMS, GRADIENTS, 4)
        assert is_on_grid(params["dense"]["kernel"])
        chex.assert_trees_all_close(
            (params["dense"]["bias"], params["scale"]), (alone["dense"]["bias"], alone["scale"]), rtol=1e-6
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(state.inner, alone_state)
        assert np.all(np.abs(params["dense"]["kernel"] - alone["dense"]["kernel"]) < 5 * DELTA)

    def test_a_prefix(self):
        tx = quantize_updates(optax.sgd(0.1), mask={"dense": True, "scale": False})
        params = train(tx, PARAMS, GRADIENTS, 2)[0]
        assert is_on_grid(params["dense"]["bias"])
        np.testing.assert_allclose(params["scale"], 0.98, rtol=1e-6)

    def test_none_is_all(self):
        params = train(quantize_updates(optax.sgd(0.1)), PARAMS, GRADIENTS, 1)[0]
        assert all(map(is_on_grid, jax.tree.leaves(params)))

    def test_within_masked_and_partition(self):
        tx, mask = quantize_updates(optax.sgd(0.1)), MASKS["tree"]
        params = train(optax.masked(tx, mask), PARAMS, GRADIENTS, 2)[0]
        assert is_on_grid(params["dense"]["kernel"])
        np.testing.assert_allclose(params["scale"], 1.2, rtol=1e-6)
        labels = {"dense": "few", "scale": "many"}
        params = train(optax.partition({"few": tx, "many": optax.sgd(0.1)}, labels), PARAMS, GRADIENTS, 2)[0]
        assert is_on_grid(params["dense"]["kernel"])
        np.testing.assert_allclose(params["scale"], 0.98, rtol=1e-6)

    def test_the_dtypes_of_others_do_not_matter(self):
        params = PARAMS | {"scale": jnp.ones((), jnp.bfloat16)}
        quantize_updates(optax.sgd(0.1), 16, mask=MASKS["tree"]).init(params)
        with pytest.raises(
            ValueError, match=r"The parameter \['scale'\] is of bfloat16, which holds grids of up to 8 bits"
        ):
            quantize_updates(optax.sgd(0.1), 16).init(params)
        with pytest.raises(ValueError, match=r"The parameter \['n'\] is of int32"):
            quantize_updates(optax.sgd(0.1)).init({"n": jnp.ones(2, jnp.int32)})


class TestWrapping:
    """In the company of other transformations."""

    def test_around_bnp_and_trajectory_regularization(self):
        """Records reach BNP; with 24 bits the path is that without rounding, but for that."""
        params = jax.tree.map(lambda leaf: round_to_grid(0.3 * leaf, 24), dense_params())
        gradients, records = jax.tree.map(jnp.sin, params), dense_record(normal(0, 6, 3))
        inner = trajectory_regularized(bnp.preconditioned(optax.sgd(0.1, 0.9), DENSE), 0.5, period=3)
        actual, _, state = train(quantize_updates(inner, 24), params, gradients, 5, intermediates=records)
        expected = train(inner, params, gradients, 5, intermediates=records)[0]
        chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-5)
        assert is_on_grid(actual["w"], 24)
        assert state.inner.inner.statistics["w"].seen == 5 * 6

    @pytest.mark.parametrize(
        "around",
        [
            lambda tx: optax.MultiSteps(tx, every_k_schedule=2),
            lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=3),
            lambda tx: optax.chain(optax.clip(1.0), tx),
            lambda tx: optax.named_chain(("few", tx)),
        ],
        ids=["MultiSteps", "apply_if_finite", "chain", "named_chain"],
    )
    def test_inside_of_what_passes_updates_on(self, around):
        params = rounded(normal(0, 100, mean=0, deviation=0.3).astype(jnp.float32))
        gradients = jnp.cos(params)
        tx = around(quantize_updates(optax.sgd(0.01, 0.9)))
        assert is_on_grid(train(tx, params, gradients, 5)[1])

    def test_hyperparameters_are_injected_within(self):
        schedule = optax.linear_schedule(0.5, 0.0, 2)
        tx = quantize_updates(optax.inject_hyperparams(optax.sgd)(schedule), 24)
        points = train(tx, jnp.zeros(5), jnp.full(5, 0.5), 3)[1]
        np.testing.assert_allclose(points[:, 0], [-0.25, -0.375, -0.375], rtol=1e-6)
        around = optax.inject_hyperparams(quantize_updates, static_args=("bits", "limit"))(optax.sgd(0.5), 24)
        np.testing.assert_allclose(train(around, jnp.zeros(5), jnp.full(5, 0.5), 1)[0], np.full(5, -0.25), rtol=1e-6)
        with pytest.raises(ValueError, match=r"bits must be a whole number.*static_args"):
            optax.inject_hyperparams(quantize_updates)(optax.sgd(0.5)).init(jnp.zeros(5))

    def test_a_model_of_nnx_and_boxed_parameters(self):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, quantize_updates(optax.sgd(0.1)), wrt=nnx.Param)
        x = jnp.ones((4, 3))

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda model: jnp.square(model(x)).mean())(model))

        before = float(jnp.square(model(x)).mean())
        for _ in range(3):
            step(model, optimizer)
        assert is_on_grid(model.kernel[...])
        assert float(jnp.square(model(x)).mean()) < before / 2
        boxed = {"w": nn.Partitioned(jnp.full((2, 2), 0.3), (None, None))}
        params = train(quantize_updates(optax.sgd(0.1)), boxed, boxed, 2)[0]
        assert isinstance(params["w"], nn.Partitioned)
        assert is_on_grid(params["w"].value)

    def test_the_state_and_its_dtypes(self):
        tx, params = quantize_updates(optax.sgd(0.1, 0.9)), {"w": jnp.full(3, 0.5, jnp.float32)}
        state = tx.init(params)
        assert isinstance(state, QuantizeUpdatesState)
        updates, after = one_update(tx, params, params)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (params, state))
        assert not any(leaf.weak_type for leaf in jax.tree.leaves((updates, after)))
        assert np.any(after.key != state.key)
        tripled = optax.tree.map_params(tx, lambda leaf: leaf + 3, state)
        np.testing.assert_array_equal(tripled.inner[0].trace["w"], np.full(3, 3.0))
        np.testing.assert_array_equal(tripled.key, state.key)

    def test_parameters_and_state_are_both_donated(self):
        key = jax.random.key(0)
        tx, params = quantize_updates(optax.sgd(0.1), key=key), jnp.full(3, 0.5)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state):
            updates, state = tx.update(jnp.ones(3), state, params)
            return optax.apply_updates(params, updates), state

        params, state = step(*step(params, tx.init(params)))
        assert is_on_grid(params)
        np.testing.assert_allclose(step(params, state)[0], np.full(3, 0.2), atol=3 * DELTA)
        again, _ = step(jnp.full(3, 0.5), tx.init(jnp.full(3, 0.5)))  # the key was not donated with the first state
        assert is_on_grid(again)
        assert not key.is_deleted()


class TestErrors:
    def test_parameters_are_needed(self):
        tx = quantize_updates(optax.sgd(0.1))
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(jnp.ones(2), tx.init(jnp.ones(2)))

    def test_what_is_no_rounding_grid_or_optimizer(self):
        with pytest.raises(ValueError, match=r"rounding must be one of 'stochastic', 'nearest', but is 'floor'"):
            quantize_updates(optax.sgd(0.1), rounding="floor")
        with pytest.raises(ValueError, match="bits must be a whole number, at least 2, but is 1"):
            quantize_updates(optax.sgd(0.1), 1)
        with pytest.raises(ValueError, match="limit must be a power of two"):
            quantize_updates(optax.sgd(0.1), limit=1.5)
        with pytest.raises(TypeError, match=r"inner must be an optax.GradientTransformation, .* not float"):
            quantize_updates(0.1)
        with pytest.raises(TypeError, match=r"key must be a seed or a key of jax.random.key\(seed\)"):
            quantize_updates(optax.sgd(0.1), key=jax.random.PRNGKey(0))
