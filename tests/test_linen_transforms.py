"""Linen models under transforms: each update equals that of the same network written without them, in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_same,
    forward,
    gradients_and_records,
    init,
    model_update,
    normal,
    second_update,
    unstack,
    update_of,
)

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")

SPLIT, SHARED = {"params": True}, {"params": False}


class Block(nn.Module):
    """A residual block with two layers, in the form that `nn.scan` takes."""

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(5, param_dtype=float, name="up")(x))
        return x + nn.Dense(x.shape[-1], use_bias=False, param_dtype=float, name="down")(h)


def scan_over_layers(block, length, params_axis, name=None):
    return nn.scan(
        lambda module, carry: (module(carry), None),
        variable_axes={"params": params_axis, "intermediates": 0},
        split_rngs=SPLIT,
        length=length,
    )


class Unrolled(nn.Module):
    length: int
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        for k in range(self.length):
            x = self.block(name=f"block_{k}")(x)
        return x


class Scanned(nn.Module):
    length: int
    params_axis: int = 0
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        return scan_over_layers(self.block, self.length, self.params_axis)(self.block(name="block"), x)[0]


def blocks(tree, axis=0):
    """The blocks of a stack of three by the names that they have unrolled."""
    return {f"block_{k}": entry for k, entry in enumerate(unstack(tree, 3, axis))}


@pytest.fixture(scope="module")
def unrolled():
    """Three blocks: their input, their parameters, and their update and state."""
    x = normal(0, 6, 4)
    params = init(Unrolled(3), x)
    return x, params, model_update(Unrolled(3), params, x)


@pytest.mark.parametrize("block", [Block, nn.remat(Block), nn.jit(Block)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scanned_stack_equals_the_blocks_unrolled(axis, block, unrolled):
    x, separate, (expected, expected_state) = unrolled
    scanned = Scanned(3, axis, block)
    params = {"block": jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *separate.values())}
    outputs = (jax.jit(forward(model))(p, x)[0] for model, p in ((scanned, params), (Unrolled(3), separate)))
    np.testing.assert_allclose(*outputs, rtol=1e-12)
    updates, state = model_update(scanned, params, x)
    assert_same(blocks(updates["block"], axis), expected)
    for k in range(3):
        for name in ("up", "down"):
            for field, expected_field in zip(state[f"block/{name}"], expected_state[f"block_{k}/{name}"], strict=True):
                assert_same(field[k], expected_field[0])


class Nested(nn.Module):
    """Two groups of three blocks, scanned in each other, with the axes of the parameters in the other order."""

    @nn.compact
    def __call__(self, x):
        inner = nn.scan(
            lambda module, carry: (module(carry), None),
            variable_axes={"params": 1, "intermediates": 0},
            split_rngs=SPLIT,
            length=3,
        )
        outer = nn.scan(
            lambda module, carry: (inner(module, carry)[0], None),
            variable_axes={"params": 2, "intermediates": 0},
            split_rngs=SPLIT,
            length=2,
        )
        return outer(nn.Dense(4, param_dtype=float, name="dense"), x)[0]


def test_nested_scans_equal_the_layers_unrolled():
    x = normal(0, 6, 4)
    params = init(Nested(), x)
    assert params["dense"]["kernel"].shape == (4, 3, 2, 4)

    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                for k in range(3):
                    x = nn.Dense(4, param_dtype=float, name=f"{i}_{k}")(x)
            return x

    def separate(tree):
        kernel, bias = tree["dense"]["kernel"], tree["dense"]["bias"]
        return {f"{i}_{k}": {"kernel": kernel[:, k, i], "bias": bias[:, k, i]} for i in range(2) for k in range(3)}

    updates, _ = model_update(Nested(), params, x)
    expected, _ = model_update(Flat(), separate(params), x)
    assert_same(separate(updates), expected)


def test_ensemble_under_vmap_equals_its_members():
    x = normal(0, 6, 4)
    ensemble = nn.vmap(
        Block, variable_axes={"params": 1, "intermediates": 0}, split_rngs=SPLIT, in_axes=None, out_axes=0, axis_size=3
    )()
    params = init(ensemble, x)
    updates, _ = model_update(ensemble, params, x)
    separate = unstack(params, 3, axis=1)

    def members(separate, x):
        outputs, records = zip(*(forward(Block())(params, x) for params in separate), strict=True)
        return jnp.stack(outputs), records

    layers = bnp.linen.find_layers(Block(), x)
    gradients, records = jax.jit(gradients_and_records(members))(separate, x)
    expected = [
        jax.jit(functools.partial(second_update, layers))(*member)[0]
        for member in zip(separate, gradients, records, strict=True)
    ]
    assert_same(unstack(updates, 3, axis=1), expected)


@pytest.mark.parametrize("with_batch", [False, True])
def test_vmap_over_inputs_with_shared_parameters(with_batch):
    """Inside, a layer sees one example (then the mapped axis counts examples), or a batch (then positions)."""
    mapped = nn.vmap(
        Block, variable_axes={"params": None, "intermediates": 0}, split_rngs=SHARED, in_axes=1, out_axes=1
    )()
    x = normal(0, 6, 3, 4) if with_batch else normal(0, 6, 4).T
    params = init(Block(), jnp.ones((1, 4)))
    updates, state = model_update(mapped, params, x)

    def plain(params, x):
        y, records = forward(Block())(params, x if with_batch else x.T)
        return (y if with_batch else y.T), records

    expected, expected_state = update_of(bnp.linen.find_layers(Block(), jnp.ones((1, 4))), plain, params, x)
    assert_same((updates, state), (expected, expected_state))
    assert state["up"].seen == 2 * 6


@pytest.mark.parametrize("cell", [nn.SimpleCell, nn.OptimizedLSTMCell])
def test_recurrent_network_mapped_over_examples_equals_the_batched_one(cell):
    x = normal(0, 3, 6, 4)
    model = nn.RNN(cell(5, param_dtype=float), variable_axes={"intermediates": 0})
    params = init(model, x)
    layers = bnp.linen.find_layers(model, x)

    def mapped(params, x):
        return jax.vmap(lambda one: forward(model)(params, one))(x)

    expected = model_update(model, params, x)
    assert_same(update_of(layers, mapped, params, x), expected)
    per_example = bnp.linen.find_layers(model, x[0])
    assert_same(update_of(per_example, mapped, params, x), expected)


def test_recurrent_network_whose_cell_is_a_scanned_stack():
    """Time steps are pooled, the stack is kept: the axes of a record are told apart even where their sizes agree."""

    class Cell(nn.RNNCellBase):
        block: type[nn.Module]

        @nn.compact
        def __call__(self, carry, x):
            carry = self.block(3)(carry + x)
            return carry, carry

        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return jnp.zeros(input_shape)

        @property
        def num_feature_axes(self):
            return 1

    x = normal(0, 5, 3, 4)  # three steps, three layers
    scanned = nn.RNN(Cell(Scanned), variable_axes={"intermediates": 0})
    unrolled = nn.RNN(Cell(Unrolled), variable_axes={"intermediates": 0})
    params = init(scanned, x)

    def separate(tree):
        return {"cell": {"Unrolled_0": blocks(tree["cell"]["Scanned_0"]["block"])}}

    updates, state = model_update(scanned, params, x)
    expected, _ = model_update(unrolled, separate(params), x)
    assert_same(separate(updates), expected)
    np.testing.assert_array_equal(state["cell/Scanned_0/block/up"].seen, 10)


def test_layer_shared_inside_and_outside_a_transform_pools_all_its_calls():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4, param_dtype=float, name="dense")
            steps = nn.scan(
                lambda dense, carry, _: (nn.tanh(dense(dense(carry))), None),
                variable_broadcast="params",
                variable_axes={"intermediates": 0},
                split_rngs=SHARED,
            )
            return steps(dense, x, jnp.arange(3))[0]

    class Written(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4, param_dtype=float, name="dense")
            for _ in range(3):
                x = nn.tanh(dense(dense(x)))
            return x

    x = normal(0, 6, 4)
    params = init(Written(), x)
    assert_same(model_update(Shared(), params, x), model_update(Written(), params, x))


@pytest.mark.parametrize("outside_first", [True, False])
def test_layer_called_inside_and_outside_of_a_transform_is_refused_by_name(outside_first):
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4, param_dtype=float, name="dense")
            x = dense(x) if outside_first else x
            steps = nn.scan(
                lambda dense, carry, _: (nn.tanh(dense(carry)), None),
                variable_broadcast="params",
                variable_axes={"intermediates": 0},
                split_rngs=SHARED,
            )
            x, _ = steps(dense, x, jnp.arange(3))
            return x if outside_first else dense(x)

    def find_and_record(x):
        bnp.linen.find_layers(Mixed(), x)
        return forward(Mixed())(Mixed().init(jax.random.key(0), x)["params"], x)

    with pytest.raises(ValueError, match=r"dense.* called both inside and outside of a transform that adds an axis"):
        jax.eval_shape(find_and_record, normal(0, 6, 4))


def test_errors_of_the_model_itself_come_through():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, param_dtype=float)(x) @ jnp.ones((5, 5))

    with pytest.raises(TypeError, match="dot_general"):
        bnp.linen.find_layers(Broken(), normal(0, 3, 4))


def test_accumulation_over_micro_batches_of_a_scanned_model():
    x = normal(0, 8, 4)
    model = Scanned(3)
    params = init(model, x)
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x))

    differentiate = gradients_and_records(model, lambda y: jnp.mean(jnp.sum(jnp.sin(y), axis=-1)))

    def micro_batch(params, total, x):
        gradients, records = differentiate(params, x)
        return jax.tree.map(lambda t, g: t + g / 4, total, gradients), records

    @jax.jit
    def accumulated(params, x):
        parts, start = x.reshape(4, 2, 4), optax.tree.zeros_like(params)
        gradients, records = jax.lax.scan(functools.partial(micro_batch, params), start, parts)
        return tx.update(gradients, tx.init(params), intermediates=records)

    @jax.jit
    def whole(params, x):
        gradients, records = differentiate(params, x)
        return tx.update(gradients, tx.init(params), intermediates=records)

    assert_same(accumulated(params, x), whole(params, x))


class Repeats(nn.Module):
    """A layer under a transform that has no axis for records."""

    transform: str

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, param_dtype=float, name="dense")
        if self.transform == "vmap":
            return nn.vmap(nn.Dense.__call__, {"params": None}, split_rngs=SHARED, in_axes=1, out_axes=1)(dense, x)
        scan = nn.scan(lambda dense, x: (dense(x), None), variable_broadcast="params", split_rngs=SHARED, length=3)
        return scan(dense, x)[0]


@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_missing_variable_axis_is_named_while_tracing(transform):
    x, model = jnp.ones((2, 3, 4)), Repeats(transform)
    layers = bnp.linen.find_layers(model, x)
    assert len(layers) == 0
    assert {other.reason for other in layers.excluded} == {
        "inside a transform without 'intermediates': 0 in its variable_axes"
    }
    params = init(model, x)
    with pytest.raises(ValueError, match=r"input of dense.* add 'intermediates': 0 to its variable_axes"):
        jax.eval_shape(forward(model), params, x)
    assert bnp.linen.capture(model, layers=layers)({"params": params}, x)[1] == {}


def test_a_layer_one_of_whose_calls_is_not_recorded_is_excluded():
    """Or its statistics would be those of the other calls alone."""

    class Repeated(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4, param_dtype=float, name="dense")
            x = dense(x)
            step = lambda module, carry: (carry[0] + 1, jnp.tanh(module(carry[1])))  # noqa: E731
            return nn.while_loop(lambda _, carry: carry[0] < 2, step, dense, (0, x), broadcast_variables="params")[1]

    (reason,) = {other.reason for other in bnp.linen.find_layers(Repeated(), normal(0, 6, 4)).excluded}
    assert reason == "inside a transform without 'intermediates': 0 in its variable_axes"


def test_records_on_another_axis_are_refused():
    model = nn.vmap(nn.Dense, variable_axes={"params": 0, "intermediates": 1}, split_rngs=SPLIT, in_axes=0)(4)
    layers = bnp.linen.find_layers(model, jnp.ones((3, 5, 7), jnp.float32))
    assert "without 'intermediates': 0 in its variable_axes" in str(layers)


def test_finding_again_through_nn_jit_finds_the_same():
    model, x = nn.jit(Block)(), jnp.ones((2, 4))
    assert bnp.linen.find_layers(model, x) == bnp.linen.find_layers(model, x)
    assert list(bnp.linen.find_layers(model, x)) == ["up", "down"]


def test_partitioned_parameters_are_found_and_preconditioned():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, kernel_init=kernel_init, param_dtype=float, name="dense")(x)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                lambda module, carry: (module(carry), None),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs=SPLIT,
                length=3,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scan(Layer(name="layer"), x)[0]

    x = normal(0, 6, 4)
    boxed = init(Stack(), x)
    assert isinstance(boxed["layer"]["dense"]["kernel"], nn.Partitioned)
    boxed_updates, _ = model_update(Stack(), boxed, x)
    assert isinstance(boxed_updates["layer"]["dense"]["kernel"], nn.Partitioned)
    updates, _ = model_update(Stack(), nn.unbox(boxed), x)
    assert_same(nn.unbox(boxed_updates), updates)
