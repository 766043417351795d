"""Finding the layers of Linen models and recording their inputs."""

import gc

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_moments, compiled, forward, gradients_and_records, init, normal, squared_error

import bnp_optax as bnp


class Net(nn.Module):
    """Convolutions and dense layers beside layers that are excluded."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.relu(nn.Conv(6, (2, 2), strides=2, feature_group_count=2, use_bias=False, name="grouped")(x))
        x = nn.LayerNorm()(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(x)


def test_layers_have_the_layout_of_their_modules():
    layers = bnp.linen.find_layers(Net(), jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32), train=True)
    assert list(layers) == ["Conv_0", "grouped", "Dense_0"]
    assert [layer.moments_shape for layer in layers.values()] == [(1, 1, 2), (1, 2, 2), (1, 1, 96)]
    assert [layer.fan_in for layer in layers.values()] == [18, 8, 96]
    assert [layer.bias is None for layer in layers.values()] == [False, True, False]
    assert layers["grouped"].kind == "Conv"
    reasons = {"/".join(other.path): other.reason for other in layers.excluded}
    assert set(reasons) == {"BatchNorm_0/scale", "BatchNorm_0/bias", "LayerNorm_0/scale", "LayerNorm_0/bias"}
    assert set(reasons.values()) == {"scale or shift of a normalization"}


def test_finding_allocates_nothing_and_takes_arrays_shapes_and_static_arguments():
    class Switch(nn.Module):
        @nn.compact
        def __call__(self, x, size, *, wide):
            x = nn.Dropout(0.5, deterministic=False)(x)
            return nn.Dense(size if wide else 1)(x)

    gc.collect()  # or arrays of tests before this one may be freed while it runs
    before = len(jax.live_arrays())
    layers = bnp.linen.find_layers(Switch(), jax.ShapeDtypeStruct((1, 1000), jnp.float32), 7, wide=True)
    assert len(jax.live_arrays()) == before
    assert layers["Dense_0"].kernel.shape == (1000, 7)


def test_finding_traces_another_method():
    class Coder(nn.Module):
        def setup(self):
            self.encoder, self.decoder = nn.Dense(2), nn.Dense(5)

        def encode(self, x):
            return self.encoder(x)

        def __call__(self, x):
            return self.decoder(self.encode(x))

    x = jnp.ones((1, 5))
    assert list(bnp.linen.find_layers(Coder(), x)) == ["encoder", "decoder"]
    assert list(bnp.linen.find_layers(Coder(), x, method="encode")) == ["encoder"]


def test_finding_wants_the_same_model_as_init():
    layers = bnp.linen.find_layers(Net(), jnp.ones((2, 8, 8, 2)))
    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((2, 8, 8, 2)))["params"]
    paths = {jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in jax.tree.leaves_with_path(params)}
    described = {p.name for layer in layers.values() for p in layer.parameters}
    assert paths == described | {"/".join(other.path) for other in layers.excluded}


def test_what_cannot_be_preconditioned_is_excluded_with_the_reason():
    class Overriding(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return inputs @ self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))

    class Doubling(nn.Dense):
        def __call__(self, inputs):
            return super().__call__(2 * inputs)

    class Odd(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(5, 4)
            x = embed(tokens) * self.param("gain", nn.initializers.ones, (1, 1, 4))
            x = Doubling(4)(Overriding(4)(x))
            x = nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4)))(x)
            return embed.attend(nn.Dense(4, param_dtype=jnp.complex64, dtype=jnp.complex64)(x).real)

    layers = bnp.linen.find_layers(Odd(), jnp.zeros((2, 6), int))
    assert list(layers) == ["Doubling_0"]
    reasons = {"/".join(other.path): other.reason for other in layers.excluded}
    assert reasons == {
        "gain": "Odd is not one of Flax's linear layers; register makes it known if it is linear",
        "Embed_0/embedding": "embedding: its rows are looked up, not multiplied by an input",
        "Overriding_0/kernel": "Overriding overrides __call__ and does not call that of Dense in this pass",
        "Conv_0/kernel": "masked kernel: its units see different inputs",
        "Conv_0/bias": "masked kernel: its units see different inputs",
        "Dense_0/kernel": "complex parameters or input",
        "Dense_0/bias": "complex parameters or input",
    }

    tokens = jnp.zeros((2, 6), int)
    params = init(Odd(), tokens)
    _, records = jax.jit(forward(Odd()))(params, tokens)
    assert list(records) == ["Doubling_0"]
    embedded = np.tile(params["Embed_0"]["embedding"][:1] * params["gain"][0], (12, 1))
    assert_moments(records["Doubling_0"], 2 * embedded @ params["Overriding_0"]["kernel"], examples=2)


def test_records_are_the_moments_of_the_inputs_and_change_no_output():
    model, x = Net(), normal(0, 4, 8, 8, 2)
    variables = model.init(jax.random.key(0), x)
    plain, captured = model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
    y, records = bnp.linen.capture(model)(variables, x)
    chex.assert_trees_all_equal(y, plain)
    outputs = {name: value["__call__"][0] for name, value in captured["intermediates"].items() if name != "__call__"}
    inputs = {"Conv_0": x, "grouped": outputs["BatchNorm_0"], "Dense_0": outputs["LayerNorm_0"]}
    assert set(records) == set(inputs)
    for name, value in inputs.items():
        groups = 2 if name == "grouped" else 1
        assert_moments(records[name], np.reshape(value, (-1, value.shape[-1])), examples=4, groups=groups)


def test_a_layer_called_twice_pools_its_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            return dense(nn.tanh(dense(x)))

    x = normal(0, 5, 3)
    params = init(Twice(), x)
    _, records = jax.jit(forward(Twice()))(params, x)
    hidden = np.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    assert_moments(records["Dense_0"], np.concatenate([x, hidden]), examples=5)


def test_keyword_call_is_recorded():
    class Keyword(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(inputs=x)

    x = jnp.ones((3, 4))
    _, records = jax.jit(forward(Keyword()))(init(Keyword(), x), x)
    np.testing.assert_array_equal(records["Dense_0"].mean, 1)


def test_recording_over_a_named_axis_equals_the_whole_batch():
    x = normal(0, 3, 4, 8, 8, 2)
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Dense(2)])
    params = init(model, x[0])

    def shard(x):
        return bnp.linen.capture(model, axis_name="data")({"params": params}, x)[1]

    sharded = jax.jit(jax.vmap(shard, axis_name="data", out_axes=None))(x)
    _, whole = jax.jit(forward(model))(params, x.reshape(12, 8, 8, 2))
    chex.assert_trees_all_close(sharded, whole, rtol=1e-5)


# What `capture` does, in three moves.


def test_records_are_a_collection_beside_what_the_model_sows():
    class Sowing(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(3, name="dense")(x)
            self.sow("intermediates", "hidden", y)
            return y

    x = normal(0, 5, 4)
    variables = Sowing().init(jax.random.key(0), x)
    with bnp.linen.record_inputs():
        y, recorded = Sowing().apply(variables, x, mutable=["intermediates"])
    assert_moments(recorded["intermediates"]["dense"]["kernel_input"], x, examples=5)
    chex.assert_trees_all_equal(recorded["intermediates"]["hidden"], (y,))


def test_recording_in_three_moves_beside_other_mutable_collections_and_over_a_named_axis():
    x = normal(0, 3, 4, 8, 8, 2)
    variables = jax.jit(Net().init)(jax.random.key(0), x[0])
    mutable = ["intermediates", "batch_stats"]

    def recorded(x):
        with bnp.linen.record_inputs(axis_name="data"):
            return Net().apply(variables, x, train=True, mutable=mutable)[1]["intermediates"]["Conv_0"]

    sharded = jax.jit(jax.vmap(recorded, axis_name="data", out_axes=None))(x)
    assert_moments(sharded["kernel_input"], np.reshape(x, (-1, 2)), examples=12)


def test_records_as_a_tree_of_intermediates_are_taken_too():
    model = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
    x = normal(0, 4, 3)
    params = init(model, x)
    tx = compiled(bnp.scale_by_bnp(bnp.linen.find_layers(model, x)))
    with bnp.linen.record_inputs():
        _, recorded = model.apply({"params": params}, x, mutable=["intermediates"])
    _, records = forward(model)(params, x)
    actual = tx.update(params, tx.init(params), intermediates=recorded["intermediates"])
    chex.assert_trees_all_equal(actual, tx.update(params, tx.init(params), intermediates=records))


def test_init_under_recording_records_nothing():
    with bnp.linen.record_inputs():
        variables = jax.jit(Net().init)(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
    assert set(variables) == {"params", "batch_stats"}


def test_forgotten_mutable_is_named_at_the_layer():
    x = jnp.ones((2, 4))
    model = nn.Sequential([nn.Dense(3)])
    variables = model.init(jax.random.key(0), x)
    with bnp.linen.record_inputs(), pytest.raises(ValueError, match=r"layers_0 .*mutable=\['intermediates'\]"):
        model.apply(variables, x)


def test_empty_batch_is_refused_at_the_layer_while_tracing():
    model = nn.Sequential([nn.Dense(3)])
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 4)))["params"]
    with pytest.raises(ValueError, match=r"input of layers_0 .*empty \(shape \(0, 4\)\)"):
        jax.eval_shape(forward(model), params, jnp.ones((0, 4)))


def test_recording_ends_with_the_context_also_after_an_exception():
    model, x = nn.Dense(2), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(RuntimeError), bnp.linen.record_inputs():
        raise RuntimeError
    assert model.apply(variables, x, mutable=["intermediates"])[1] == {}


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3,), "padding": "CAUSAL"},
        {"kernel_size": 3, "padding": "CIRCULAR"},
        {"kernel_size": (3,), "padding": "REFLECT", "kernel_dilation": 2},
        {"kernel_size": (2, 2), "input_dilation": 2, "padding": 1},
        {"kernel_size": (3, 3), "padding": ((0, 1), (2, 0)), "feature_group_count": 4},
        {"kernel_size": (2, 2, 2), "padding": 1},
    ],
)
@pytest.mark.parametrize("batch_dims", [(), (3,), (2, 3)])
def test_convolutions_of_every_form_are_found_and_recorded(options, batch_dims):
    rank = 1 if options["kernel_size"] == 3 else len(options["kernel_size"])
    x = normal(0, *batch_dims, *(5,) * rank, 4)
    model = nn.Conv(8, **options)
    params = init(model, x)
    layers = bnp.linen.find_layers(model, x)
    _, records = jax.jit(forward(model))(params, x)
    _, groups, _ = layers["kernel"].moments_shape
    assert_moments(records["kernel"], np.reshape(x, (-1, 4)), examples=[*batch_dims, 1][0], groups=groups)


def test_train_state_forwards_the_records():
    model, x, y = nn.Dense(2), jnp.ones((4, 3)), jnp.zeros((4, 2))
    params = init(model, x)
    tx = bnp.bnp_sgd(0.1, bnp.linen.find_layers(model, x))
    state = bnp.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    gradients, records = jax.jit(gradients_and_records(model, squared_error))(params, x, y)
    new = jax.jit(lambda s, g, r: s.apply_gradients(grads=g, intermediates=r))(state, gradients, records)
    updates, opt_state = tx.update(gradients, tx.init(params), params, intermediates=records)
    chex.assert_trees_all_close(new.params, optax.apply_updates(params, updates), rtol=1e-6)
    chex.assert_trees_all_close(new.opt_state, opt_state, rtol=1e-6)
    assert new.step == 1
    assert new.tx is tx
    with pytest.raises(TypeError, match="intermediates"):
        state.apply_gradients(grads=gradients)


def test_train_state_hands_on_what_else_the_optimizer_takes():
    model, x = nn.Dense(2), normal(0, 4, 3)
    params = init(model, x)
    tx = bnp.preconditioned(optax.polyak_sgd(), bnp.linen.find_layers(model, x))
    state = bnp.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    gradients, records = gradients_and_records(model, squared_error)(params, x, jnp.zeros((4, 2)))
    new = state.apply_gradients(grads=gradients, intermediates=records, extra_args={"value": 0.5})
    updates, _ = tx.update(gradients, tx.init(params), params, intermediates=records, value=0.5)
    chex.assert_trees_all_close(new.params, optax.apply_updates(params, updates), rtol=1e-6)


def test_train_state_is_captured_by_its_apply_fn():
    model, x = nn.Dense(2), normal(0, 4, 3)
    tx = bnp.bnp_sgd(0.1, bnp.linen.find_layers(model, x))
    state = bnp.linen.TrainState.create(apply_fn=model.apply, params=init(model, x), tx=tx)
    y, records = bnp.linen.capture(state.apply_fn)({"params": state.params}, x)
    chex.assert_trees_all_equal((y, records), forward(model)(state.params, x))
