"""Finding the layers of NNX models and recording their inputs, in float64."""

import gc
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import Wrapped, assert_moments, compiled, make, normal, pure

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")


class Net(nnx.Module):
    """Layers beside what is excluded and what a careless search would change."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.convs = nnx.List([nnx.Conv(4, 6, (3,), rngs=rngs), nnx.Conv(6, 6, 3, feature_group_count=2, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(6, jnp.float32))
        self.out = nnx.Linear(6, 3, use_bias=False, rngs=rngs)
        self.unused = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, tokens, scale=1):
        x = self.embed(tokens)
        for conv in self.convs:
            x = conv(x)
        self.sow(nnx.Intermediate, "hidden", x)
        return scale * self.out(self.dropout(self.norm(x)) * self.gain[None, None])


def test_paths_are_those_of_the_parameters_and_layouts_those_of_the_modules():
    model = Net(nnx.Rngs(0))
    layers = bnp.nnx.find_layers(model, jax.ShapeDtypeStruct((2, 7), jnp.int32), scale=2)
    assert list(layers) == ["convs/0", "convs/1", "out"]
    assert [layer.kind for layer in layers.values()] == ["Conv", "Conv", "Linear"]
    assert [layer.moments_shape for layer in layers.values()] == [(1, 1, 4), (1, 2, 3), (1, 1, 6)]
    assert [layer.fan_in for layer in layers.values()] == [12, 9, 6]
    assert [layer.bias is None for layer in layers.values()] == [False, False, True]
    reasons = {"/".join(other.path): other.reason for other in layers.excluded}
    assert reasons == {
        "embed/embedding": "embedding: its rows are looked up, not multiplied by an input",
        "gain": "Net is not one of Flax's linear layers; register makes it known if it is linear",
        "norm/bias": "scale or shift of a normalization",
        "norm/scale": "scale or shift of a normalization",
        "unused/bias": "not called in this pass",
        "unused/kernel": "not called in this pass",
    }
    described = {p.path: p.shape for layer in layers.values() for p in layer.parameters}
    described |= {other.path: other.shape for other in layers.excluded}
    leaves = jax.tree.leaves_with_path(pure(nnx.state(model, nnx.Param)))
    assert described == {tuple(str(key.key) for key in keys): leaf.shape for keys, leaf in leaves}


def test_finding_changes_nothing_and_allocates_nothing():
    model, tokens, rngs = Net(nnx.Rngs(0)), jnp.zeros((2, 7), jnp.int32), nnx.Rngs(1)
    graphdef, state = nnx.split((model, rngs))
    state = jax.tree.map(jnp.copy, state)
    gc.collect()  # or arrays of tests before this one may be freed while it runs
    before = len(jax.live_arrays())
    bnp.nnx.find_layers(
        model, tokens, method=lambda model, x, *, rngs: model(x) + rngs.normal(dtype=jnp.float32), rngs=rngs
    )
    assert len(jax.live_arrays()) == before
    assert nnx.split((model, rngs))[0] == graphdef
    chex.assert_trees_all_equal(nnx.split((model, rngs))[1], state)
    assert not hasattr(model, "__captures__")


def test_finding_traces_another_method_with_arrays_in_arguments_and_static_ones():
    class Coder(nnx.Module):
        def __init__(self, rngs):
            self.encoder, self.decoder = nnx.Linear(5, 2, rngs=rngs), nnx.Linear(2, 5, rngs=rngs)

        def encode(self, batch, deep):
            return self.encoder(batch["x"]) if deep else batch["x"]

        def __call__(self, batch, deep=True):
            return self.decoder(self.encode(batch, deep))

    model, batch = make(Coder), {"x": np.ones((1, 5)), "name": "batch"}
    assert list(bnp.nnx.find_layers(model, batch)) == ["encoder", "decoder"]
    assert list(bnp.nnx.find_layers(model, batch, True, method="encode")) == ["encoder"]
    assert list(bnp.nnx.find_layers(model, batch, deep=False, method=lambda m, *a, **k: m.encode(*a, **k))) == []


def test_a_model_of_shapes_is_found_like_one_of_arrays():
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    assert bnp.nnx.find_layers(abstract, tokens) == bnp.nnx.find_layers(Net(nnx.Rngs(0)), tokens)


def test_an_error_of_the_model_itself_is_raised_as_it_is():
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        bnp.nnx.find_layers(make(nnx.Linear, 3, 3), normal(0, 5, 4))


def test_a_shared_layer_pools_its_calls_under_the_first_of_its_paths():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.second = nnx.Linear(3, 3, rngs=rngs)
            self.first = self.second

        def __call__(self, x):
            return self.second(inputs=jnp.tanh(self.first(x)))

    model, x = make(Shared), normal(0, 5, 3)
    assert list(bnp.nnx.find_layers(model, x)) == ["first"]
    _, records = bnp.nnx.capture(model)(x)
    hidden = np.tanh(x @ model.first.kernel[...] + model.first.bias[...][None])
    assert_moments(records["first"], np.concatenate([x, hidden]), examples=5)


def test_a_subclass_is_recorded_where_it_calls_the_layer():
    class Doubling(nnx.Linear):
        def __call__(self, x):
            return super().__call__(2 * x)

    class Quadrupling(Doubling):
        def __call__(self, x):
            return super().__call__(2 * x)

    x = normal(0, 5, 3)
    model = make(Quadrupling, 3, 2)
    assert bnp.nnx.find_layers(model, x)["kernel"].kind == "Quadrupling"
    _, records = bnp.nnx.capture(model)(x)
    assert_moments(records["kernel"], np.asarray(4 * x), examples=5)


def test_recording_over_a_named_axis_equals_the_whole_batch():
    model, x = make(nnx.Linear, 3, 2), normal(0, 4, 5, 3)

    def shard(model, x):
        return bnp.nnx.capture(model, axis_name="data")(x)[1]

    sharded = jax.vmap(shard, in_axes=(None, 0), axis_name="data", out_axes=None)(model, x)
    assert_moments(sharded["kernel"], np.asarray(x.reshape(20, 3)), examples=20)


# What `capture` does, in three moves.


def test_records_are_intermediates_beside_what_the_model_sows():
    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([make(nnx.Linear, 3, 3)])

        def __call__(self, x):
            y = self.layers[0](x)
            self.sow(nnx.Intermediate, "hidden", y)
            return y

    model, x = Sowing(nnx.Rngs(0)), normal(0, 5, 3)
    with bnp.nnx.record_inputs():
        y, intermediates = nnx.capture(model, nnx.Intermediate)(x)
    assert_moments(intermediates["layers"][0]["kernel_input"].get_value(), np.asarray(x), examples=5)
    chex.assert_trees_all_equal(pure(intermediates)["hidden"], (y,))


def test_recording_in_three_moves_over_a_named_axis_equals_the_whole_batch():
    model, x = make(nnx.Linear, 3, 2), normal(0, 4, 5, 3)

    def shard(model, x):
        with bnp.nnx.record_inputs(axis_name="data"):
            return pure(nnx.capture(model, nnx.Intermediate)(x)[1])

    sharded = jax.vmap(shard, in_axes=(None, 0), axis_name="data", out_axes=None)(model, x)
    assert_moments(sharded["kernel_input"], np.asarray(x.reshape(20, 3)), examples=20)


def test_forgotten_capture_is_named_at_the_layer():
    with bnp.nnx.record_inputs(), pytest.raises(ValueError, match=r"Linear .*\(3, 2\) .*Call nnx.capture\(model"):
        make(nnx.Linear, 3, 2)(normal(0, 5, 3))


def test_empty_batch_is_refused_at_the_layer_while_tracing():
    model = nnx.Sequential(make(nnx.Linear, 3, 2))
    with pytest.raises(ValueError, match=r"input of layers/0 .*empty \(shape \(0, 3\)\)"):
        nnx.eval_shape(lambda model, x: bnp.nnx.capture(model)(x)[0], model, jnp.ones((0, 3)))
    with pytest.raises(ValueError, match=r"input of layers/0 .*empty \(shape \(0, 3\)\)"):
        bnp.nnx.find_layers(model, jnp.ones((0, 3)))


CLASSES = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, nnx.RNN)


def test_classes_are_as_they_were_after_the_context_and_after_an_exception():
    before = [vars(cls)["__call__"] for cls in CLASSES]
    with bnp.nnx.record_inputs():
        with pytest.raises(RuntimeError), bnp.nnx.record_inputs():
            raise RuntimeError
        assert vars(nnx.Linear)["__call__"] is not before[0]
    with pytest.raises(TypeError):
        bnp.nnx.find_layers(make(nnx.Linear, 3, 3), normal(0, 5, 4))
    assert all(vars(cls)["__call__"] is call for cls, call in zip(CLASSES, before, strict=True))
    model, x = make(nnx.Linear, 3, 2), normal(0, 5, 3)
    assert nnx.to_pure_dict(nnx.capture(model, nnx.Intermediate)(x)[1]) == {}


def test_contexts_nest_and_do_not_reach_other_threads():
    model, x = make(nnx.Linear, 3, 2), normal(0, 5, 3)
    outputs = []

    def forward():
        with jax.enable_x64(True):
            outputs.append(nnx.capture(model, nnx.Intermediate)(x)[1])

    with bnp.nnx.record_inputs():
        _, records = bnp.nnx.capture(model)(x)
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
    assert records["kernel"].positions == 5  # recorded once
    assert nnx.to_pure_dict(outputs[0]) == {}


def test_gradients_do_not_flow_through_records():
    model, x = make(nnx.Linear, 3, 2), normal(0, 5, 3)

    def total(model, x):
        (record,) = bnp.nnx.capture(model)(x)[1].values()
        return record.mean.sum() + record.variance.sum() + record.positions.sum()

    np.testing.assert_array_equal(nnx.grad(total, argnums=1)(model, x), 0)


@pytest.mark.parametrize("value", [0.5, None, {"a": np.ones(3), "b": np.ones((2, 2))}])
def test_parameters_that_hold_no_array_or_several_are_excluded_and_trained(value):
    class Other(nnx.Module):
        def __init__(self):
            self.dense, self.other = make(nnx.Linear, 4, 3), nnx.Param(value)

        def __call__(self, x):
            return self.dense(x) * sum(map(jnp.sum, jax.tree.leaves(self.other.get_value())), 1)

    model, x = Other(), normal(0, 5, 4)
    layers = bnp.nnx.find_layers(model, x)
    assert [other.shape for other in layers.excluded] == [np.shape(leaf) for leaf in jax.tree.leaves(value)]
    optimizer = nnx.Optimizer(model, bnp.preconditioned(optax.sgd(1e-5), layers), wrt=nnx.Param)

    def loss_fn(model):
        y, records = bnp.nnx.capture(model)(x)
        return jnp.square(y).sum(), records

    before = loss_fn(model)[0]
    gradients, records = nnx.grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients, intermediates=records)
    assert loss_fn(model)[0] < before
    for new, old in zip(jax.tree.leaves(model.other.get_value()), jax.tree.leaves(value), strict=True):
        assert np.all(new != old)


LOSING = {
    "vmap": lambda layer, x: nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, x),
    "fori_loop": lambda layer, x: nnx.fori_loop(0, 2, lambda _, carry: (carry[0], carry[0](carry[1])), (layer, x))[1],
    "cond": lambda layer, x: nnx.cond(x[0, 0] > 0, lambda layer, x: layer(x), lambda layer, x: x, layer, x),
}


@pytest.mark.parametrize("name", LOSING)
def test_an_error_of_flax_where_a_record_cannot_leave_has_a_note(name):
    model, x = nnx.List([Wrapped(make(nnx.Linear, 4, 4), LOSING[name]), make(nnx.Linear, 4, 2)]), normal(0, 5, 4)
    run = lambda model, x: model[1](model[0](x))  # noqa: E731
    with pytest.raises((TypeError, ValueError)) as failure:
        bnp.nnx.capture(run)(model, x)
    assert any("a record cannot leave a transform" in note for note in failure.value.__notes__)


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    model = nnx.Sequential(make(nnx.Linear, 3, 4), nnx.relu)
    with pytest.raises(TypeError):
        bnp.nnx.capture(model)(jnp.ones((2, 5)))
    assert list(bnp.nnx.find_layers(model, jnp.ones((2, 3)))) == ["layers/0"]


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


@pytest.mark.parametrize("batch_axes", [(), (4,)])
def test_training_decreases_the_loss_and_compiles_once(batch_axes):
    model, x = make(MLP), normal(0, *batch_axes, 8, 5, 4)
    target = jnp.sin(x[..., :3])
    layers = bnp.nnx.find_layers(model, x)
    optimizer = nnx.Optimizer(model, bnp.bnp_sgd(0.05, layers, momentum=0.9), wrt=nnx.Param)
    traces = 0

    def loss_fn(model, x, y):
        prediction, records = bnp.nnx.capture(model)(x)
        return jnp.mean((prediction - y) ** 2), records

    @nnx.jit
    def train_step(model, optimizer, x, y):
        nonlocal traces
        traces += 1
        (loss, records), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y)
        optimizer.update(model, gradients, intermediates=records)
        return loss

    losses = [float(train_step(model, optimizer, x, target)) for _ in range(30)]
    assert traces == 1
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(TypeError, match="intermediates"):
        optimizer.update(model, nnx.state(model, nnx.Param))


def test_records_are_found_by_the_transformation_as_captured_by_layer_and_as_pure_arrays():
    model, x = Wrapped(nnx.List([make(nnx.Linear, 3, 3)]), lambda layers, x: layers[0](x)), normal(0, 5, 3)
    tx = compiled(bnp.scale_by_bnp(bnp.nnx.find_layers(model, x)))
    params, (_, records) = nnx.state(model, nnx.Param), bnp.nnx.capture(model)(x)
    with bnp.nnx.record_inputs():
        _, intermediates = nnx.capture(model, nnx.Intermediate)(x)
    arrays = pure(params)
    expected, _ = tx.update(arrays, tx.init(arrays), intermediates=records)
    for given in (intermediates, pure(intermediates), records):
        boxed, _ = tx.update(params, tx.init(params), intermediates=given)
        chex.assert_trees_all_equal(pure(boxed), expected)
        updates, _ = tx.update(arrays, tx.init(arrays), intermediates=given)
        chex.assert_trees_all_equal(updates, expected)
    assert not np.allclose(expected["layer"][0]["kernel"], params["layer"][0]["kernel"][...])
    kept, _ = tx.update(params, tx.init(params), intermediates=bnp.KEEP_STATISTICS)
    assert optax.tree.norm(pure(kept)) > 0
