"""Finding the layers of Linen models and recording their inputs."""

import gc

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(2, 3, shape), jnp.float32)


def apply_recorded(model, params, *args, **kwargs):
    with bnp.linen.record_inputs():
        y, recorded = model.apply({"params": params}, *args, mutable=["intermediates"], **kwargs)
    return y, recorded["intermediates"]


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
    params = Net().init(jax.random.key(0), jnp.ones((2, 8, 8, 2)))["params"]
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
        "gain": "Odd is not one of Flax's linear layers; linen.register makes it known if it is linear",
        "Embed_0/embedding": "embedding: its rows are looked up, not multiplied by an input",
        "Overriding_0/kernel": "Overriding overrides __call__ without calling that of nn.Dense",
        "Conv_0/kernel": "masked kernel: its units see different inputs",
        "Conv_0/bias": "masked kernel: its units see different inputs",
        "Dense_0/kernel": "complex parameters or input",
        "Dense_0/bias": "complex parameters or input",
    }

    tokens = jnp.zeros((2, 6), int)
    params = Odd().init(jax.random.key(0), tokens)["params"]
    _, recorded = apply_recorded(Odd(), params, tokens)
    embedded = (
        np.tile(params["Embed_0"]["embedding"][:1] * params["gain"][0], (12, 1)) @ params["Overriding_0"]["kernel"]
    )
    np.testing.assert_allclose(recorded["Doubling_0"]["kernel_input"].mean.ravel(), 2 * embedded.mean(0), rtol=1e-5)


def test_records_are_the_moments_of_the_inputs_and_change_no_output():
    x = normal(4, 8, 8, 2)
    variables = Net().init(jax.random.key(0), x)
    plain, captured = Net().apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
    with bnp.linen.record_inputs():
        y, recorded = Net().apply(variables, x, mutable=["intermediates"])
    chex.assert_trees_all_equal(y, plain)
    outputs = {name: value["__call__"][0] for name, value in captured["intermediates"].items() if name != "__call__"}
    inputs = {"Conv_0": x, "grouped": outputs["BatchNorm_0"], "Dense_0": outputs["LayerNorm_0"]}
    assert set(recorded["intermediates"]) == set(inputs)
    for name, value in inputs.items():
        record, value = recorded["intermediates"][name]["kernel_input"], np.asarray(value).reshape(-1, value.shape[-1])
        np.testing.assert_allclose(record.mean.ravel(), value.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(record.variance.ravel(), value.var(0), rtol=1e-5)
        assert record.examples == 4
        assert record.positions == value.shape[0]


def test_a_layer_called_twice_pools_its_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3)
            return dense(nn.tanh(dense(x)))

    x = normal(5, 3)
    params = Twice().init(jax.random.key(0), x)["params"]
    _, recorded = apply_recorded(Twice(), params, x)
    hidden = np.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    record = recorded["Dense_0"]["kernel_input"]
    np.testing.assert_allclose(record.mean.ravel(), np.concatenate([x, hidden]).mean(0), rtol=1e-5)
    np.testing.assert_allclose(record.variance.ravel(), np.concatenate([x, hidden]).var(0), rtol=1e-5)
    assert record.examples == 5
    assert record.positions == 10


def test_init_under_recording_records_nothing():
    with bnp.linen.record_inputs():
        variables = Net().init(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
    assert set(variables) == {"params", "batch_stats"}


def test_keyword_call_is_recorded():
    class Keyword(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(inputs=x)

    x = jnp.ones((3, 4))
    _, recorded = apply_recorded(Keyword(), Keyword().init(jax.random.key(0), x)["params"], x)
    np.testing.assert_array_equal(recorded["Dense_0"]["kernel_input"].mean, 1)


def test_recording_over_a_named_axis_equals_the_whole_batch():
    x = normal(3, 4, 8, 8, 2)
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Dense(2)])
    params = model.init(jax.random.key(0), x[0])["params"]

    def shard(x):
        with bnp.linen.record_inputs(axis_name="data"):
            return model.apply({"params": params}, x, mutable=["intermediates"])[1]["intermediates"]

    sharded = jax.vmap(shard, axis_name="data", out_axes=None)(x)
    _, whole = apply_recorded(model, params, x.reshape(12, 8, 8, 2))
    chex.assert_trees_all_close(sharded, whole, rtol=1e-5)


def test_forgotten_mutable_is_named_at_the_layer():
    x = jnp.ones((2, 4))
    model = nn.Sequential([nn.Dense(3)])
    variables = model.init(jax.random.key(0), x)
    with bnp.linen.record_inputs(), pytest.raises(ValueError, match=r"layers_0 .*mutable=\['intermediates'\]"):
        model.apply(variables, x)


def test_empty_batch_is_refused_at_the_layer_while_tracing():
    model = nn.Sequential([nn.Dense(3)])
    params = model.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    with pytest.raises(ValueError, match=r"input of layers_0 .*empty \(shape \(0, 4\)\)"):
        jax.eval_shape(lambda x: apply_recorded(model, params, x), jnp.ones((0, 4)))


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
    x = normal(*batch_dims, *(5,) * rank, 4)
    model = nn.Conv(8, **options)
    params = model.init(jax.random.key(0), x)["params"]
    layers = bnp.linen.find_layers(model, x)
    _, recorded = apply_recorded(model, params, x)
    inputs = np.asarray(x).reshape(-1, *layers["kernel"].moments_shape[1:])
    record = recorded["kernel_input"]
    np.testing.assert_allclose(record.mean[0], inputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(record.variance[0], inputs.var(0), rtol=1e-5)
    assert record.examples == (batch_dims[0] if batch_dims else 1)
    assert record.positions == inputs.shape[0]


def test_train_state_forwards_the_records():
    model, x, y = nn.Dense(2), jnp.ones((4, 3)), jnp.zeros((4, 2))
    params = model.init(jax.random.key(0), x)["params"]
    tx = bnp.bnp_sgd(0.1, bnp.linen.find_layers(model, x))
    state = bnp.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def loss(params):
        logits, recorded = apply_recorded(model, params, x)
        return optax.l2_loss(logits, y).mean(), recorded

    gradients, recorded = jax.grad(loss, has_aux=True)(params)
    new = jax.jit(lambda s, g, r: s.apply_gradients(grads=g, intermediates=r))(state, gradients, recorded)
    updates, opt_state = tx.update(gradients, tx.init(params), params, intermediates=recorded)
    chex.assert_trees_all_close(new.params, optax.apply_updates(params, updates), rtol=1e-6)
    chex.assert_trees_all_close(new.opt_state, opt_state, rtol=1e-6)
    assert new.step == 1
    assert new.tx is tx
    with pytest.raises(TypeError, match="intermediates"):
        state.apply_gradients(grads=gradients)
