"""Finding the layers of NNX models and recording their inputs, in float64."""

import gc
import threading

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnp_optax as bnp
from bnp_optax import nnx as bnp_nnx

pytestmark = pytest.mark.usefixtures("x64")

Carry, StateAxes = nnx.Carry, nnx.StateAxes
F64 = {"param_dtype": float}
RECORDS_IN_FRONT = {nnx.Intermediate: 0, ...: None}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, shape))


def make(cls, *args, seed=0, **kwargs):
    """Returns a module with random parameters, biases included."""
    dtype = F64 if cls.__module__.startswith("flax") else {}
    module = cls(*args, rngs=nnx.Rngs(seed), **dtype, **kwargs)
    rng = np.random.default_rng(seed)
    nnx.update(module, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.4, p.shape)), nnx.state(module, nnx.Param)))
    return module


def capture(model, *args, **kwargs):
    with bnp_nnx.record_inputs():
        return nnx.capture(model, nnx.Intermediate)(*args, **kwargs)


def records(intermediates):
    leaves = jax.tree.leaves_with_path(nnx.as_pure(intermediates), is_leaf=lambda x: isinstance(x, bnp.InputMoments))
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("kernel_input"): r for keys, r in leaves
    }


def assert_moments(record, inputs, examples, stack=1, groups=1):
    """Compares a record with the moments of `inputs`, `[positions, stack * groups * input]`."""
    mean, variance = (m(inputs, axis=0).reshape(stack, groups, -1) for m in (np.mean, np.var))
    np.testing.assert_allclose(record.mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(record.variance, variance, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(record.examples, np.full(stack, examples))
    np.testing.assert_array_equal(record.positions, np.full(stack, len(inputs)))


def weigh(y):
    """A loss that no symmetry makes special."""
    return jnp.sum(jnp.sin(y + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)))


def update(model, *args):
    """Returns the updates of all parameters after two steps, so that the start matters."""
    layers = bnp_nnx.find_layers(model, *args)
    assert not layers.excluded
    tx = bnp.scale_by_bnp(layers, decay=0.5, prior_examples=2)

    def loss(model, *args):
        y, intermediates = capture(model, *args)
        return weigh(y), intermediates

    @nnx.jit
    def step(model, state, *args):
        gradients, intermediates = nnx.as_pure(nnx.grad(loss, has_aux=True)(model, *args))
        return tx.update(gradients, state, intermediates=intermediates)

    state = tx.init(nnx.as_pure(nnx.state(model, nnx.Param)))
    for _ in range(2):
        updates, state = step(model, state, *args)
    return nnx.to_pure_dict(updates)


def linen_update(model, params, x):
    layers = bnp.linen.find_layers(model, x)
    assert not layers.excluded
    tx = bnp.scale_by_bnp(layers, decay=0.5, prior_examples=2)

    def loss(params):
        with bnp.linen.record_inputs():
            y, recorded = model.apply({"params": params}, x, mutable=["intermediates"])
        return weigh(y), recorded["intermediates"]

    @jax.jit
    def step(params, state):
        gradients, recorded = jax.grad(loss, has_aux=True)(params)
        return tx.update(gradients, state, intermediates=recorded)

    state = tx.init(params)
    for _ in range(2):
        updates, state = step(params, state)
    return updates


def assert_same(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-9)


class Wrapped(nnx.Module):
    """Calls its layer by some function of layer and input."""

    def __init__(self, layer, call):
        self.layer, self.call = layer, call

    def __call__(self, x):
        return self.call(self.layer, x)


def stack(size, axis=0, cls=nnx.Linear, **kwargs):
    """Returns four layers with 3 inputs and 3 outputs as one module, and each of them."""
    each = [make(cls, 3, 3, seed=k, **kwargs) for k in range(size)]
    stacked = make(cls, 3, 3, **kwargs)
    states = [nnx.state(layer, nnx.Param) for layer in each]
    nnx.update(stacked, jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *states))
    return stacked, each


def unstack(updates, k, axis=0):
    return jax.tree.map(lambda leaf: leaf.take(k, axis), updates)


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
    layers = bnp_nnx.find_layers(model, jax.ShapeDtypeStruct((2, 7), jnp.int32), scale=2)
    assert list(layers) == ["convs/0", "convs/1", "out"]
    assert [layer.kind for layer in layers.values()] == ["Conv", "Conv", "Linear"]
    assert [layer.moments_shape for layer in layers.values()] == [(1, 1, 4), (1, 2, 3), (1, 1, 6)]
    assert [layer.fan_in for layer in layers.values()] == [12, 9, 6]
    assert [layer.bias is None for layer in layers.values()] == [False, False, True]
    reasons = {"/".join(other.path): other.reason for other in layers.excluded}
    assert reasons == {
        "embed/embedding": "embedding: its rows are looked up, not multiplied by an input",
        "gain": "Net is not one of Flax's linear layers",
        "norm/bias": "scale or shift of a normalization",
        "norm/scale": "scale or shift of a normalization",
        "unused/bias": "not called in this pass",
        "unused/kernel": "not called in this pass",
    }
    described = {p.path: p.shape for layer in layers.values() for p in layer.parameters}
    described |= {other.path: other.shape for other in layers.excluded}
    leaves = jax.tree.leaves_with_path(nnx.as_pure(nnx.state(model, nnx.Param)))
    assert described == {tuple(str(key.key) for key in keys): leaf.shape for keys, leaf in leaves}


def test_finding_changes_nothing_and_allocates_nothing():
    model, tokens, rngs = Net(nnx.Rngs(0)), jnp.zeros((2, 7), jnp.int32), nnx.Rngs(1)
    graphdef, state = nnx.split((model, rngs))
    state = jax.tree.map(jnp.copy, state)
    gc.collect()  # or arrays of tests before this one may be freed while it runs
    before = len(jax.live_arrays())
    bnp_nnx.find_layers(
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
    assert list(bnp_nnx.find_layers(model, batch)) == ["encoder", "decoder"]
    assert list(bnp_nnx.find_layers(model, batch, True, method="encode")) == ["encoder"]
    assert list(bnp_nnx.find_layers(model, batch, deep=False, method=lambda m, *a, **k: m.encode(*a, **k))) == []


def test_a_model_of_shapes_is_found_like_one_of_arrays():
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    assert bnp_nnx.find_layers(abstract, tokens) == bnp_nnx.find_layers(Net(nnx.Rngs(0)), tokens)


def test_what_cannot_be_preconditioned_is_excluded_with_the_reason():
    class Overriding(nnx.Linear):
        def __call__(self, inputs):
            return inputs @ self.kernel[...]

    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.overriding = Overriding(4, 4, rngs=rngs)
            self.masked = nnx.Conv(4, 4, (3,), mask=np.ones((3, 4, 4), np.float32), use_bias=False, rngs=rngs)
            self.complex = nnx.Linear(4, 4, use_bias=False, param_dtype=jnp.complex64, rngs=rngs)
            self.lora = nnx.LoRA(4, 1, 4, rngs=rngs)
            self.elementwise = nnx.Einsum("nti,ti->nti", (5, 4), rngs=rngs)
            self.tied, self.first = (nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(2))
            self.tied.kernel = self.first.kernel
            self.frozen = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            self.frozen.kernel = nnx.Variable(self.frozen.kernel[...])
            self.weight_norm = nnx.WeightNorm(nnx.Linear(4, 4, use_bias=False, rngs=rngs), rngs=rngs)
            self.lora_linear = nnx.LoRALinear(4, 4, lora_rank=1, rngs=rngs)
            self.mixed = nnx.Einsum("nti,io->nto", (4, 4), rngs=rngs)

        def __call__(self, x):
            for layer in (self.overriding, self.masked, self.lora, self.elementwise, self.tied, self.first):
                x = jnp.tanh(layer(x))
            x = self.mixed(self.mixed(x), "nti,oi->nto")
            return self.lora_linear(self.weight_norm(self.frozen(self.complex(x.astype(jnp.complex64)).real)))

    with jax.numpy_dtype_promotion("standard"):  # WeightNorm needs it
        layers = bnp_nnx.find_layers(Odd(nnx.Rngs(0)), jnp.ones((2, 5, 4), jnp.float32))
    assert list(layers) == ["lora_linear"]
    assert {"/".join(other.path): other.reason for other in layers.excluded} == {
        "complex/kernel": "complex parameters or input",
        "elementwise/kernel": "its einsum is not the contraction of an input with the kernel",
        "first/kernel": "shared by layers whose inputs differ",
        "lora/lora_a": "factor of a low-rank update",
        "lora/lora_b": "factor of a low-rank update",
        "lora_linear/lora/lora_a": "factor of a low-rank update",
        "lora_linear/lora/lora_b": "factor of a low-rank update",
        "masked/kernel": "masked kernel: its units see different inputs",
        "mixed/kernel": "called in several ways",
        "overriding/bias": "Overriding overrides __call__ and does not call that of nnx.Linear in this pass",
        "overriding/kernel": "Overriding overrides __call__ and does not call that of nnx.Linear in this pass",
        "weight_norm/layer_instance/kernel": "not an nnx.Param of the model itself, but computed from others",
    }


def swap(x, *axes):
    return np.moveaxis(np.asarray(x), axes, range(len(axes)))


KINDS = {
    "Linear": (nnx.Linear, (3, 2), {}, (4, 5, 3), lambda x: (x.reshape(20, 3), 4, 1, 1)),
    "Linear of one": (nnx.Linear, (3, 2), {"use_bias": False}, (3,), lambda x: (x.reshape(1, 3), 1, 1, 1)),
    "LinearGeneral": (
        nnx.LinearGeneral,
        ((2, 3), (2, 5)),
        {"axis": (2, -1), "batch_axis": {0: 4}},
        (4, 6, 2, 3),
        lambda x: (swap(x, 1, 0, 2, 3).reshape(6, 24), 6, 4, 1),
    ),
    "LinearGeneral in the middle": (
        nnx.LinearGeneral,
        ((3, 2), 5),
        {"axis": (-1, 1)},
        (4, 3, 6, 2),
        lambda x: (swap(x, 0, 2, 1, 3).reshape(24, 6), 4, 1, 1),
    ),
    "Einsum": (
        nnx.Einsum,
        ("...tsa,sab->...tsb", (2, 3, 5), (2, 5)),
        {},
        (4, 6, 2, 3),
        lambda x: (x.reshape(24, 6), 4, 2, 1),
    ),
    "Conv": (nnx.Conv, (4, 6, (3, 2)), {"strides": 2}, (5, 7, 8, 4), lambda x: (x.reshape(280, 4), 5, 1, 1)),
    "Conv of one": (nnx.Conv, (4, 6, 3), {}, (7, 4), lambda x: (x.reshape(7, 4), 1, 1, 1)),
    "Conv, grouped": (
        nnx.Conv,
        (4, 6, (3,)),
        {"feature_group_count": 2, "padding": "CAUSAL"},
        (2, 5, 7, 4),
        lambda x: (x.reshape(70, 4), 2, 1, 2),
    ),
    "ConvTranspose": (
        nnx.ConvTranspose,
        (4, 6, (3,)),
        {"strides": 2},
        (5, 7, 4),
        lambda x: (x.reshape(35, 4), 5, 1, 1),
    ),
    "ConvTranspose, transposed": (
        nnx.ConvTranspose,
        (4, 6, (3,)),
        {"transpose_kernel": True},
        (5, 7, 4),
        lambda x: (x.reshape(35, 4), 5, 1, 1),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_the_moments_of_the_inputs_and_change_no_output(kind):
    cls, args, kwargs, shape, by_hand = KINDS[kind]
    model, x = make(cls, *args, **kwargs), normal(*shape)
    (layer,) = bnp_nnx.find_layers(model, x).values()
    y, intermediates = capture(model, x)
    chex.assert_trees_all_equal(y, model(x))
    inputs, examples, num_stack, groups = by_hand(np.asarray(x))
    assert_moments(records(intermediates)[""], inputs, examples, num_stack, groups)
    assert layer.moments_shape == (num_stack, groups, inputs.shape[1] // num_stack // groups)


def attention(query, key, value, **_):
    return nn.dot_product_attention(query, key, value)  # that of NNX computes in float32


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, attention_fn=attention, rngs=rngs)
        self.up, self.down = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 6, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.down(jnp.tanh(self.up(x)))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention", **F64)(x)
        return x + nn.Dense(6, name="down", **F64)(jnp.tanh(nn.Dense(5, name="up", **F64)(x)))


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.grouped = nnx.Conv(4, 6, (2, 2), strides=2, feature_group_count=2, use_bias=False, rngs=rngs)
        self.up = nnx.ConvTranspose(6, 3, (3, 2), transpose_kernel=True, rngs=rngs)
        self.general = nnx.LinearGeneral((4, 3), (2, 5), axis=(2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("nhfc,fcd->nhdf", (2, 5, 3), (3, 2), rngs=rngs)

    def __call__(self, x):
        x = self.up(nnx.relu(self.grouped(nnx.relu(self.conv(x)))))
        return self.einsum(self.general(x))


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv", **F64)(x))
        groups = {"strides": 2, "feature_group_count": 2, "use_bias": False, "name": "grouped"}
        x = nn.relu(nn.Conv(6, (2, 2), **groups, **F64)(x))
        x = nn.ConvTranspose(3, (3, 2), transpose_kernel=True, name="up", **F64)(x)
        x = nn.DenseGeneral((2, 5), axis=(2, -1), name="general", **F64)(x)
        return nn.Einsum((2, 5, 3), "nhfc,fcd->nhdf", name="einsum", **F64)(x)


class LSTM(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs, **F64))
        self.simple = nnx.RNN(nnx.SimpleCell(4, 2, rngs=rngs, dtype=float, **F64), time_major=True)

    def __call__(self, x):
        return self.simple(self.rnn(x).swapaxes(0, 1))


class LinenLSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"intermediates": 0}}
        x = nn.RNN(nn.LSTMCell(4, name="rnn", **F64), **axes)(x).swapaxes(0, 1)
        return nn.RNN(nn.SimpleCell(2, name="simple", dtype=float, **F64), time_major=True, **axes)(x)


def lstm_names(tree):
    cell, simple = tree["rnn"]["cell"], tree["simple"]["cell"]
    return {
        "rnn": {name.rstrip("_"): value for name, value in cell.items()},
        "simple": {"i": simple["dense_i"], "h": simple["dense_h"]},
    }


@pytest.mark.parametrize(
    ("model", "linen", "names", "shape"),
    [
        (Attention, LinenAttention, lambda tree: tree, (4, 5, 6)),
        (CNN, LinenCNN, lambda tree: tree, (3, 8, 8, 2)),
        (LSTM, LinenLSTM, lstm_names, (4, 5, 3)),
    ],
)
def test_updates_are_those_of_the_same_linen_model(model, linen, names, shape):
    model, x = make(model), normal(*shape)
    params = names(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(linen().apply({"params": params}, x), model(x), rtol=1e-9, atol=1e-9)
    assert_same(names(update(model, x)), linen_update(linen(), params, x))


CELLS = [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell]


@pytest.mark.parametrize("cell", CELLS)
def test_records_of_an_rnn_are_the_moments_over_all_its_steps(cell):
    dtype = {"dtype": float} if cell is nnx.SimpleCell else {}
    rnn, x = nnx.RNN(make(cell, 3, 4, **dtype)), normal(5, 6, 3)
    axes = rnn.state_axes
    _, intermediates = capture(rnn, x)
    assert rnn.state_axes is axes

    carry = rnn.cell.initialize_carry((5, 3), nnx.Rngs(0))
    hidden = []
    for t in range(6):
        hidden.append(np.asarray(carry[1] if isinstance(carry, tuple) else carry))
        carry, _ = rnn.cell(carry, x[:, t])
    layers = bnp_nnx.find_layers(rnn, x)
    assert not layers.excluded
    for path, record in records(intermediates).items():
        assert layers[path.removesuffix("/")].record_axes == "r"
        inputs = np.asarray(x).swapaxes(0, 1) if path.split("/")[1] in ("ii", "if_", "ig", "io", "dense_i") else hidden
        pooled = bnp.moments.pool(record, repeat_axes=[0])
        assert_moments(pooled, np.concatenate(inputs), examples=5)


def test_both_directions_and_repeated_calls_of_an_rnn_pool():
    cells = [make(nnx.GRUCell, 3, 4, seed=k) for k in range(2)]
    rnn, x = nnx.Bidirectional(nnx.RNN(cells[0]), nnx.RNN(cells[1])), normal(5, 6, 3)
    model = Wrapped(rnn, lambda rnn, x: rnn(2 * x) + rnn(x))
    layers = bnp_nnx.find_layers(model, x)
    _, intermediates = capture(model, x)
    both = np.concatenate([x, 2 * x]).reshape(-1, 3)
    for direction in ("forward_rnn", "backward_rnn"):
        record = records(intermediates)[f"layer/{direction}/cell/dense_i/"]
        assert layers[f"layer/{direction}/cell/dense_i"].record_axes == "r"
        assert_moments(bnp.moments.pool(record, repeat_axes=[0]), both, examples=5)


def scan_in(*args, remat=False, **kwargs):
    def step(layer, x):
        return jnp.tanh(layer(x))

    return nnx.scan(nnx.remat(step) if remat else step, *args, out_axes=Carry, **kwargs)


SCANS = {
    "int": (0, {"in_axes": (0, Carry)}),
    "no graph updates": (0, {"in_axes": (0, Carry), "graph_updates": False}),
    "no graph": (0, {"in_axes": (0, Carry), "graph": False}),
    "remat": (0, {"in_axes": (0, Carry), "remat": True}),
    "named axes": (0, {"in_axes": (StateAxes({nnx.Intermediate: 0, nnx.Param: 0, ...: None}), Carry)}),
    "axis 1": (1, {"in_axes": (StateAxes({nnx.Intermediate: 0, nnx.Param: 1}), Carry)}),
}


# of size 3, so that no size tells the stack from inputs and outputs, and others
@pytest.mark.parametrize(("scan", "size"), [*((scan, 3) for scan in SCANS), ("int", 1), ("axis 1", 4)])
def test_a_scanned_stack_equals_its_layers_one_after_the_other(scan, size):
    axis, options = SCANS[scan]
    (stacked, each), x = stack(size, axis), normal(5, 3)
    actual = update(Wrapped(stacked, scan_in(**options)), x)["layer"]
    layers = Wrapped(nnx.List(each), lambda layers, x: [x := jnp.tanh(layer(x)) for layer in layers][-1])
    expected = update(layers, x)["layer"]
    for k in range(size):
        assert_same(unstack(actual, k, axis), expected[k])


def test_remat_and_jit_in_the_model_change_nothing():
    model, x = make(nnx.Linear, 3, 3), normal(5, 3)
    expected = update(Wrapped(model, lambda layer, x: jnp.tanh(layer(layer(x)))), x)
    for transform in (nnx.remat, nnx.jit, lambda f: nnx.jit(nnx.remat(f)), lambda f: nnx.remat(f, graph_updates=False)):
        wrapped = Wrapped(model, transform(lambda layer, x: jnp.tanh(layer(layer(x)))))
        assert_same(update(wrapped, x), expected)


def vmap(in_axes, x_axis, **kwargs):
    return lambda layer, x: nnx.vmap(lambda layer, x: layer(x), in_axes=(in_axes, x_axis), **kwargs)(layer, x)


def test_a_vmap_over_examples_equals_the_batch():
    model, x = make(nnx.Conv, 3, 4, (2, 2)), normal(5, 6, 7, 3)
    expected = update(Wrapped(model, lambda layer, x: layer(x)), x)
    assert_same(update(Wrapped(model, vmap(StateAxes(RECORDS_IN_FRONT), 0)), x), expected)
    for options in ({"graph_updates": False}, {"graph": False}):
        graph = options.get("graph")
        call = lambda m, x: vmap(nnx.prefix(m, RECORDS_IN_FRONT, graph=graph), 0, **options)(m, x)  # noqa: B023, E731
        assert_same(update(Wrapped(model, call), x), expected)


def test_an_ensemble_equals_its_members():
    (stacked, each), x = stack(3, axis=1), normal(5, 3)
    actual = update(Wrapped(stacked, vmap(StateAxes({nnx.Intermediate: 0, ...: 1}), None)), x)
    expected = update(Wrapped(nnx.List(each), lambda layers, x: jnp.stack([layer(x) for layer in layers])), x)
    for k in range(3):
        assert_same(unstack(actual["layer"], k, 1), expected["layer"][k])


def test_a_loop_over_positions_equals_one_call():
    model, x = make(nnx.Linear, 3, 3), normal(5, 4, 3)
    expected = update(Wrapped(model, lambda layer, x: layer(x)), x)
    loop = nnx.scan(lambda layer, x: layer(x), in_axes=(StateAxes(RECORDS_IN_FRONT), 1), out_axes=1)
    assert_same(update(Wrapped(model, loop), x), expected)
    assert bnp_nnx.find_layers(Wrapped(model, loop), x)["layer"].record_axes == "r"


@pytest.mark.parametrize("outer", ["s", "e"])
def test_nested_maps_have_the_axes_of_both_in_order(outer):
    (stacked, each), x = stack(3), normal(3, 3)
    shared = StateAxes(RECORDS_IN_FRONT)
    over = {"s": (0, None), "e": (shared, 0)}
    inner = "e" if outer == "s" else "s"
    call = nnx.vmap(nnx.vmap(lambda layer, x: layer(x), in_axes=over[inner]), in_axes=over[outer])
    model = Wrapped(stacked, call)
    assert bnp_nnx.find_layers(model, x)["layer"].record_axes == outer + inner
    shape = (lambda y: y) if outer == "s" else (lambda y: y.swapaxes(0, 1))
    expected = update(Wrapped(nnx.List(each), lambda layers, x: shape(jnp.stack([layer(x) for layer in layers]))), x)
    for k in range(3):
        assert_same(unstack(update(model, x)["layer"], k), expected["layer"][k])


@pytest.mark.parametrize(("outer", "inner"), [(0, 0), (1, 0), (0, 1), (2, 0)])
def test_a_scan_in_a_scan_has_a_stack_of_two_axes(outer, inner):
    each, x = [make(nnx.Linear, 3, 3, seed=k, use_bias=False) for k in range(9)], normal(5, 3)
    grid = np.reshape([layer.kernel[...] for layer in each], (3, 3, 3, 3))
    weights = np.moveaxis(np.moveaxis(grid, 1, 1 + inner), 0, outer)
    model = make(nnx.Linear, 3, 3, use_bias=False)
    model.kernel = nnx.Param(jnp.asarray(weights))
    axes = [(StateAxes({nnx.Intermediate: 0, ...: axis}), Carry) for axis in (outer, inner)]
    twice = nnx.scan(scan_in(in_axes=axes[1]), in_axes=axes[0], out_axes=Carry)
    actual = update(Wrapped(model, twice), x)["layer"]["kernel"]
    layers = Wrapped(nnx.List(each), lambda layers, x: [x := jnp.tanh(layer(x)) for layer in layers][-1])
    expected = [layer["kernel"] for _, layer in sorted(update(layers, x)["layer"].items())]
    assert_same(np.moveaxis(np.moveaxis(actual, outer, 0), 1 + inner, 1).reshape(9, 3, 3), np.stack(expected))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("axis", [1, -1])
def test_records_with_their_axis_elsewhere_are_excluded(axis, size):
    stacked, _ = stack(size)
    for stacked_axis, layer in ((0, stacked), (None, make(nnx.Linear, 3, 3))):
        over = (StateAxes({nnx.Intermediate: axis, ...: stacked_axis}), None if stacked_axis == 0 else 0)
        call = nnx.vmap(lambda layer, x: layer(x), in_axes=over)
        layers = bnp_nnx.find_layers(Wrapped(layer, call), normal(size, 3))
        assert [other.path[0] for other in layers.excluded] == ["layer", "layer"]
        assert "where its record is lost" in layers.excluded[0].reason


def test_a_stack_that_shares_a_bias_or_a_loop_that_changes_its_kernel_is_excluded():
    stacked, _ = stack(3)
    stacked.bias = nnx.Param(jnp.ones(3))
    over = StateAxes({nnx.PathContains("bias"): None, ...: 0})
    (reason,) = {
        other.reason
        for other in bnp_nnx.find_layers(Wrapped(stacked, scan_in(in_axes=(over, Carry))), normal(5, 3)).excluded
    }
    assert reason == "its kernel and bias are stacked along different axes"

    def halve(layer, x):
        y = layer(x)
        layer.kernel[...] /= 2
        return y

    over = StateAxes({nnx.Intermediate: 0, ...: Carry})
    call = lambda layer, x: nnx.scan(halve, in_axes=(over, Carry), out_axes=Carry, length=2)(layer, x)  # noqa: E731
    layers = bnp_nnx.find_layers(Wrapped(make(nnx.Linear, 3, 3), call), normal(5, 3))
    assert "computed from others" in layers.excluded[0].reason


def test_a_bias_that_is_no_parameter_is_a_constant():
    model = make(nnx.Linear, 3, 3)
    model.bias = nnx.Variable(model.bias[...])
    layers = bnp_nnx.find_layers(model, normal(5, 3))
    assert layers["kernel"].bias is None
    assert not layers.excluded


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: nnx.scan(lambda layer, x: layer(x), in_axes=(None, 0), out_axes=0)(layer, x),
        lambda layer, x: jax.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, x),
        lambda layer, x: jax.checkpoint(lambda layer, x: layer(x))(layer, x),
        lambda layer, x: nnx.clone(layer)(x),
        nnx.jit(lambda layer, x: jax.checkpoint(lambda layer, x: layer(x))(layer, x)),
    ],
)
def test_a_layer_whose_record_is_dropped_is_excluded(call):
    model = Wrapped(make(nnx.Linear, 3, 3), call)
    layers = bnp_nnx.find_layers(model, normal(5, 3))
    assert bnp_nnx.find_layers(model, normal(5, 3)) == layers  # the search before did not fill a cache
    assert [other.path[1] for other in layers.excluded] == ["bias", "kernel"]
    assert "where its record is lost" in layers.excluded[0].reason


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda layer, x: jax.vmap(lambda x: layer(x))(x), "closes over the module"),
        (lambda layer, x: nnx.jit(lambda x: layer(x))(x), "closes over the module"),
        (vmap(None, 0), "lets no record out"),
        (scan_in(in_axes=(StateAxes({nnx.Intermediate: Carry, ...: None}), Carry), length=2), "lets no record out"),
        (
            lambda layer, x: nnx.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, layer, x),
            "nnx.cond, call it in all",
        ),
        (lambda layer, x: nnx.fori_loop(0, 2, lambda _, v: (v[0], v[0](v[1])), (layer, x))[1], "lets no record out"),
    ],
)
def test_records_that_cannot_come_out_are_an_error_that_names_layer_and_remedy(call, reason):
    inner = Wrapped(make(nnx.Linear, 3, 3), call)
    model, x = Wrapped(nnx.List([make(nnx.Linear, 3, 3), inner]), lambda both, x: both[1](both[0](x))), normal(5, 3)
    assert model(x).shape == (5, 3)
    with pytest.raises(ValueError, match=rf"The input of layer/1/layer cannot be recorded, .*{reason}") as error:
        bnp_nnx.find_layers(model, x)
    assert "nnx.StateAxes({nnx.Intermediate: 0, ...: None})" in str(error.value)


def test_an_error_of_the_model_itself_is_raised_as_it_is():
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        bnp_nnx.find_layers(make(nnx.Linear, 3, 3), normal(5, 4))


def test_both_branches_of_a_condition_record():
    call = lambda layer, x: nnx.cond(x.sum() > 0, lambda m, x: m(x), nnx.remat(lambda m, x: m(2 * x)), layer, x)  # noqa: E731
    model, x = Wrapped(make(nnx.Linear, 3, 3), call), normal(5, 3)
    assert list(bnp_nnx.find_layers(model, x)) == ["layer"]
    for sign in (1, -1):
        x = jnp.abs(x) * sign
        record = records(capture(model, x)[1])["layer/"]
        assert_moments(record, np.asarray(x if sign > 0 else 2 * x), examples=5)


def test_a_shared_layer_pools_its_calls_under_the_first_of_its_paths():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.second = nnx.Linear(3, 3, rngs=rngs)
            self.first = self.second

        def __call__(self, x):
            return self.second(inputs=jnp.tanh(self.first(x)))

    model, x = make(Shared), normal(5, 3)
    assert list(bnp_nnx.find_layers(model, x)) == ["first"]
    _, intermediates = capture(model, x)
    hidden = np.tanh(x @ model.first.kernel[...] + model.first.bias[...][None])
    assert_moments(records(intermediates)["first/"], np.concatenate([x, hidden]), examples=5)


def test_a_layer_called_inside_and_outside_of_a_transform_is_an_error():
    call = lambda layer, x: layer(vmap(StateAxes(RECORDS_IN_FRONT), 0)(layer, x))  # noqa: E731
    model = Wrapped(make(nnx.Linear, 3, 3), call)
    with pytest.raises(ValueError, match=r"layer .*both inside and outside of a transform"):
        bnp_nnx.find_layers(model, normal(5, 3))


def test_a_subclass_is_recorded_where_it_calls_the_layer():
    class Doubling(nnx.Linear):
        def __call__(self, x):
            return super().__call__(2 * x)

    class Quadrupling(Doubling):
        def __call__(self, x):
            return super().__call__(2 * x)

    x = normal(5, 3)
    model = make(Quadrupling, 3, 2)
    assert bnp_nnx.find_layers(model, x)["kernel"].kind == "Quadrupling"
    assert_moments(records(capture(model, x)[1])[""], np.asarray(4 * x), examples=5)


def test_recording_over_a_named_axis_equals_the_whole_batch():
    model, x = make(nnx.Linear, 3, 2), normal(4, 5, 3)

    def shard(model, x):
        with bnp_nnx.record_inputs(axis_name="data"):
            return nnx.as_pure(nnx.capture(model, nnx.Intermediate)(x)[1])

    sharded = jax.vmap(shard, in_axes=(None, 0), axis_name="data", out_axes=None)(model, x)
    assert_moments(records(sharded)[""], np.asarray(x.reshape(20, 3)), examples=20)


def test_forgotten_capture_is_named_at_the_layer():
    with bnp_nnx.record_inputs(), pytest.raises(ValueError, match=r"Linear .*\(3, 2\) .*Call nnx.capture\(model"):
        make(nnx.Linear, 3, 2)(normal(5, 3))


def test_empty_batch_is_refused_at_the_layer_while_tracing():
    model = nnx.Sequential(make(nnx.Linear, 3, 2))
    with pytest.raises(ValueError, match=r"input of Linear .*empty \(shape \(0, 3\)\)"):
        nnx.eval_shape(lambda model, x: capture(model, x)[0], model, jnp.ones((0, 3)))
    with pytest.raises(ValueError, match=r"input of layers/0 .*empty \(shape \(0, 3\)\)"):
        bnp_nnx.find_layers(model, jnp.ones((0, 3)))


CLASSES = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, nnx.RNN)


def test_classes_are_as_they_were_after_the_context_and_after_an_exception():
    before = [vars(cls)["__call__"] for cls in CLASSES]
    with bnp_nnx.record_inputs():
        with pytest.raises(RuntimeError), bnp_nnx.record_inputs():
            raise RuntimeError
        assert vars(nnx.Linear)["__call__"] is not before[0]
    with pytest.raises(TypeError):
        bnp_nnx.find_layers(make(nnx.Linear, 3, 3), normal(5, 4))
    assert all(vars(cls)["__call__"] is call for cls, call in zip(CLASSES, before, strict=True))
    model, x = make(nnx.Linear, 3, 2), normal(5, 3)
    assert nnx.to_pure_dict(nnx.capture(model, nnx.Intermediate)(x)[1]) == {}


def test_contexts_nest_and_do_not_reach_other_threads():
    model, x = make(nnx.Linear, 3, 2), normal(5, 3)
    outputs = []

    def forward():
        with jax.enable_x64(True):
            outputs.append(nnx.capture(model, nnx.Intermediate)(x)[1])

    with bnp_nnx.record_inputs():
        _, intermediates = capture(model, x)
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
    assert records(intermediates)[""].positions == 5  # recorded once
    assert nnx.to_pure_dict(outputs[0]) == {}


def test_gradients_do_not_flow_through_records():
    model, x = make(nnx.Linear, 3, 2), normal(5, 3)
    total = lambda model, x: sum(leaf.sum() for leaf in jax.tree.leaves(capture(model, x)[1]))  # noqa: E731
    np.testing.assert_array_equal(nnx.grad(total, argnums=1)(model, x), 0)


@pytest.mark.parametrize("batch_axes", [(), (4,)])
def test_training_decreases_the_loss_and_compiles_once(batch_axes):
    model, x = make(Attention), normal(*batch_axes, 8, 5, 6)
    target = jnp.sin(x)
    layers = bnp_nnx.find_layers(model, x)
    optimizer = nnx.Optimizer(model, bnp.bnp_sgd(0.05, layers, momentum=0.9), wrt=nnx.Param)
    traces = 0

    def loss_fn(model, x, y):
        with bnp_nnx.record_inputs():
            prediction, intermediates = nnx.capture(model, nnx.Intermediate)(x)
        return jnp.mean((prediction - y) ** 2), intermediates

    @nnx.jit
    def train_step(model, optimizer, x, y):
        nonlocal traces
        traces += 1
        (loss, intermediates), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model, x, y)
        optimizer.update(model, gradients, intermediates=intermediates)
        return loss

    losses = [float(train_step(model, optimizer, x, target)) for _ in range(30)]
    assert traces == 1
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(TypeError, match="intermediates"):
        optimizer.update(model, nnx.state(model, nnx.Param))


def test_records_are_found_by_the_transformation_as_captured_and_as_pure_arrays():
    model, x = Wrapped(nnx.List([make(nnx.Linear, 3, 3)]), lambda layers, x: layers[0](x)), normal(5, 3)
    tx = bnp.scale_by_bnp(bnp_nnx.find_layers(model, x))
    params, (_, intermediates) = nnx.state(model, nnx.Param), capture(model, x)
    boxed, _ = tx.update(params, tx.init(params), intermediates=intermediates)
    pure, _ = tx.update(nnx.as_pure(params), tx.init(nnx.as_pure(params)), intermediates=nnx.as_pure(intermediates))
    chex.assert_trees_all_equal(nnx.as_pure(boxed), pure)
    assert not np.allclose(pure["layer"][0]["kernel"], params["layer"][0]["kernel"][...])
    kept, _ = tx.update(params, tx.init(params), intermediates=bnp.KEEP_STATISTICS)
    assert optax.tree.norm(nnx.as_pure(kept)) > 0
