"""Linen models under transforms: each update equals that of the same network written without them, in float64."""

import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")

SPLIT, SHARED = {"params": True}, {"params": False}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, shape))


def weigh(y):
    """A loss that no symmetry makes special."""
    return jnp.sum(jnp.sin(y + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))


def update_of(layers, apply, params, x):
    """Returns the update and state after two steps, so that the start matters, of `apply(params, x)` recorded."""
    tx = bnp.scale_by_bnp(layers, decay=0.5, prior_examples=2)

    def loss(params, x):
        with bnp.linen.record_inputs():
            y, recorded = apply(params, x)
        return weigh(y), recorded["intermediates"]

    state = tx.init(params)
    for _ in range(2):
        gradients, recorded = jax.grad(loss, has_aux=True)(params, x)
        updates, state = tx.update(gradients, state, intermediates=recorded)
    return updates, state


def model_update(model, params, x):
    layers = bnp.linen.find_layers(model, x)
    assert not layers.excluded
    return update_of(layers, lambda p, x: model.apply({"params": p}, x, mutable=["intermediates"]), params, x)


def assert_same(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-9)


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


def unstack(tree, axis):
    return {k: jax.tree.map(lambda leaf, k=k: jnp.take(leaf, k, axis), tree) for k in range(3)}


@pytest.mark.parametrize("block", [Block, nn.remat(Block), nn.jit(Block)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scanned_stack_equals_the_blocks_unrolled(axis, block):
    x = normal(0, 6, 4)
    scanned, unrolled = Scanned(3, axis, block), Unrolled(3)
    params = scanned.init(jax.random.key(0), x)["params"]
    separate = {f"block_{k}": tree for k, tree in unstack(params["block"], axis).items()}
    chex.assert_trees_all_close(
        scanned.apply({"params": params}, x), unrolled.apply({"params": separate}, x), rtol=1e-12
    )
    updates, state = model_update(scanned, params, x)
    expected, expected_state = model_update(unrolled, separate, x)
    assert_same({f"block_{k}": tree for k, tree in unstack(updates["block"], axis).items()}, expected)
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
    params = Nested().init(jax.random.key(0), x)["params"]
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
    params = ensemble.init(jax.random.key(0), x)["params"]
    updates, _ = model_update(ensemble, params, x)

    def members(params, x):
        outputs, recorded = zip(
            *(Block().apply({"params": params[k]}, x, mutable=["intermediates"]) for k in range(3)), strict=True
        )
        return jnp.stack(outputs), {
            "intermediates": {k: r["intermediates"] for k, r in zip("abc", recorded, strict=True)}
        }

    one = bnp.linen.find_layers(Block(), x)
    tx = bnp.scale_by_bnp(one, decay=0.5, prior_examples=2)
    separate = unstack(params, 1)

    def loss(separate):
        with bnp.linen.record_inputs():
            y, recorded = members(separate, x)
        return weigh(y), recorded["intermediates"]

    gradients, recorded = jax.grad(loss, has_aux=True)(separate)
    for k, name in enumerate("abc"):
        state = tx.init(separate[k])
        for _ in range(2):
            expected, state = tx.update(gradients[k], state, intermediates=recorded[name])
        assert_same(jax.tree.map(lambda leaf, k=k: leaf[:, k], updates), expected)


@pytest.mark.parametrize("with_batch", [False, True])
def test_vmap_over_inputs_with_shared_parameters(with_batch):
    """Inside, a layer sees one example (then the mapped axis counts examples), or a batch (then positions)."""
    mapped = nn.vmap(
        Block, variable_axes={"params": None, "intermediates": 0}, split_rngs=SHARED, in_axes=1, out_axes=1
    )()
    x = normal(0, 6, 3, 4) if with_batch else normal(0, 6, 4).T
    params = Block().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    updates, state = model_update(mapped, params, x)

    def plain(params, x):
        y, recorded = Block().apply({"params": params}, x if with_batch else x.T, mutable=["intermediates"])
        return (y if with_batch else y.T), recorded

    expected, expected_state = update_of(bnp.linen.find_layers(Block(), jnp.ones((1, 4))), plain, params, x)
    assert_same((updates, state), (expected, expected_state))
    assert state["up"].seen == 2 * 6


@pytest.mark.parametrize("cell", [nn.SimpleCell, nn.OptimizedLSTMCell])
def test_recurrent_network_mapped_over_examples_equals_the_batched_one(cell):
    x = normal(0, 3, 6, 4)
    model = nn.RNN(cell(5, param_dtype=float), variable_axes={"intermediates": 0})
    params = model.init(jax.random.key(0), x)["params"]
    layers = bnp.linen.find_layers(model, x)

    def mapped(params, x):
        return jax.vmap(lambda one: model.apply({"params": params}, one, mutable=["intermediates"]))(x)

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
    params = scanned.init(jax.random.key(0), x)["params"]

    def separate(tree):
        blocks = unstack(tree["cell"]["Scanned_0"]["block"], 0)
        return {"cell": {"Unrolled_0": {f"block_{k}": tree for k, tree in blocks.items()}}}

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
    params = Written().init(jax.random.key(0), x)["params"]
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
        params = Mixed().init(jax.random.key(0), x)["params"]
        with bnp.linen.record_inputs():
            return Mixed().apply({"params": params}, x, mutable=["intermediates"])

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
    params = model.init(jax.random.key(0), x)["params"]
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x))

    def gradients_and_records(params, x):
        def loss(params):
            with bnp.linen.record_inputs():
                y, recorded = model.apply({"params": params}, x, mutable=["intermediates"])
            return jnp.mean(jnp.sum(jnp.sin(y), axis=-1)), recorded["intermediates"]

        return jax.grad(loss, has_aux=True)(params)

    def micro_batch(total, x):
        gradients, records = gradients_and_records(params, x)
        return jax.tree.map(lambda t, g: t + g / 4, total, gradients), records

    gradients, records = jax.lax.scan(micro_batch, optax.tree.zeros_like(params), x.reshape(4, 2, 4))
    accumulated = tx.update(gradients, tx.init(params), intermediates=records)
    gradients, records = gradients_and_records(params, x)
    assert_same(accumulated, tx.update(gradients, tx.init(params), intermediates=records))


class Branches(nn.Module):
    """Two branches, and a layer after them."""

    conditional: bool

    def setup(self):
        self.branches = [nn.Dense(4, param_dtype=float), Block()]
        self.last = nn.Dense(2, param_dtype=float)

    def __call__(self, x, index):
        branches = [lambda module, x, k=k: module.branches[k](x) for k in range(2)]
        if self.is_initializing():
            for branch in branches:
                branch(self, x)
        chosen = (nn.cond, index == 0, *branches) if self.conditional else (nn.switch, index, branches)
        transform, *arguments = chosen
        return self.last(transform(*arguments, self, x))


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("taken", [0, 1])
def test_only_the_branch_that_is_taken_absorbs_the_batch(taken, conditional):
    model, x = Branches(conditional), normal(0, 6, 4)
    layers = bnp.linen.find_layers(model, x, 0)
    assert list(layers) == ["branches_0", "branches_1/up", "branches_1/down", "last"]
    params = model.init(jax.random.key(0), x, 0)["params"]
    tx = bnp.scale_by_bnp(layers, decay=0.5)

    @jax.jit
    def step(params, state, index):
        def loss(params):
            with bnp.linen.record_inputs(layers=layers):
                y, recorded = model.apply({"params": params}, x, index, mutable=["intermediates"])
            return weigh(y), recorded["intermediates"]

        gradients, recorded = jax.grad(loss, has_aux=True)(params)
        return tx.update(gradients, state, intermediates=recorded)

    start = tx.init(params)
    updates, state = step(params, start, taken)
    for k, (path, update) in enumerate(
        {"branches_0": updates["branches_0"], "branches_1/up": updates["branches_1"]["up"]}.items()
    ):
        if k == taken:
            assert state[path].seen == 6
            np.testing.assert_allclose(state[path].mean.ravel(), 0.5 * x.mean(0), rtol=1e-10)
        else:
            assert_same(state[path], start[path])
            assert not np.any(update["kernel"])
    assert state["last"].seen == 6


@pytest.mark.parametrize("lift", ["scan", "vmap", "rnn"])
def test_missing_variable_axis_is_named_while_tracing(lift):
    x = jnp.ones((2, 3, 4))
    model = {
        "scan": nn.scan(nn.Dense, variable_broadcast="params", split_rngs=SHARED, in_axes=1)(4, param_dtype=float),
        "vmap": nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs=SHARED, in_axes=1)(4, param_dtype=float),
        "rnn": nn.RNN(nn.SimpleCell(4, param_dtype=float)),
    }[lift]
    if lift == "scan":
        model = nn.RNN(nn.GRUCell(4, param_dtype=float), variable_axes={})
    layers = bnp.linen.find_layers(model, x)
    assert len(layers) == 0
    assert {other.reason for other in layers.excluded} == {
        "inside a transform without 'intermediates': 0 in its variable_axes"
    }
    params = model.init(jax.random.key(0), x)["params"]
    where = "Dense" if lift == "vmap" else "cell/i"

    def forward(x):
        with bnp.linen.record_inputs():
            return model.apply({"params": params}, x, mutable=["intermediates"])

    with pytest.raises(ValueError, match=rf"input of {where}.* add 'intermediates': 0 to its variable_axes"):
        jax.eval_shape(forward, x)
    with bnp.linen.record_inputs(layers=layers):
        assert model.apply({"params": params}, x, mutable=["intermediates"])[1] == {}


def test_records_on_another_axis_are_refused():
    model = nn.vmap(nn.Dense, variable_axes={"params": 0, "intermediates": 1}, split_rngs=SPLIT, in_axes=0)(4)
    layers = bnp.linen.find_layers(model, jnp.ones((3, 5, 7), jnp.float32))
    assert "without 'intermediates': 0 in its variable_axes" in str(layers)


def test_finding_again_through_nn_jit_finds_the_same():
    model, x = nn.jit(Block)(), jnp.ones((2, 4))
    assert bnp.linen.find_layers(model, x) == bnp.linen.find_layers(model, x)
    assert list(bnp.linen.find_layers(model, x)) == ["up", "down"]


def test_partitioned_parameters_are_found_and_preconditioned():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, kernel_init=init, param_dtype=float, name="dense")(x)

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
    boxed = Stack().init(jax.random.key(0), x)["params"]
    assert isinstance(boxed["layer"]["dense"]["kernel"], nn.Partitioned)
    boxed_updates, _ = model_update(Stack(), boxed, x)
    assert isinstance(boxed_updates["layer"]["dense"]["kernel"], nn.Partitioned)
    updates, _ = model_update(Stack(), nn.unbox(boxed), x)
    assert_same(nn.unbox(boxed_updates), updates)


def test_finding_a_hundred_layers_is_quick():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(100):
                x = nn.relu(nn.Dense(256)(x))
            return x

    start = time.perf_counter()
    layers = bnp.linen.find_layers(Deep(), jax.ShapeDtypeStruct((64, 256), jnp.float32))
    assert len(layers) == 100
    assert time.perf_counter() - start < 10
