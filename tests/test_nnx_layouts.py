"""Every kind of linear layer of NNX: the moments of its inputs by hand, and the updates of the same Linen model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    Wrapped,
    assert_moments,
    assert_same,
    compiled_call,
    make,
    model_update,
    nnx_update,
    normal,
    unstack,
    weigh,
)
from oracles import step_of_batch

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")

F64 = {"param_dtype": float}


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
    model, x = make(cls, *args, **kwargs), normal(0, *shape)
    (layer,) = bnp.nnx.find_layers(model, x).values()
    y, records = compiled_call(lambda model, x: bnp.nnx.capture(model)(x), model, x)
    np.testing.assert_allclose(y, compiled_call(lambda model, x: model(x), model, x), rtol=1e-12, atol=1e-12)
    inputs, examples, num_stack, groups = by_hand(np.asarray(x))
    assert_moments(records["kernel"], inputs, examples, num_stack, groups)
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
    model, x = make(model), normal(0, *shape)
    params = names(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    output = jax.jit(linen().apply)({"params": params}, x)
    np.testing.assert_allclose(output, compiled_call(lambda model, x: model(x), model, x), rtol=1e-9, atol=1e-9)
    expected, _ = model_update(linen(), params, x)
    assert_same(names(nnx_update(model, x)), expected)


CELLS = [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell]


@pytest.mark.parametrize("cell", CELLS)
def test_records_of_an_rnn_are_the_moments_over_all_its_steps(cell):
    dtype = {"dtype": float} if cell is nnx.SimpleCell else {}
    rnn, x = nnx.RNN(make(cell, 3, 4, **dtype)), normal(0, 5, 6, 3)
    axes = rnn.state_axes
    _, records = bnp.nnx.capture(rnn)(x)
    assert rnn.state_axes is axes

    carry = rnn.cell.initialize_carry((5, 3), nnx.Rngs(0))
    hidden = []
    for t in range(6):
        hidden.append(np.asarray(carry[1] if isinstance(carry, tuple) else carry))
        carry, _ = rnn.cell(carry, x[:, t])
    layers = bnp.nnx.find_layers(rnn, x)
    assert not layers.excluded
    assert set(records) == set(layers)
    for path, record in records.items():
        assert layers[path].record_axes == "r"
        inputs = np.asarray(x).swapaxes(0, 1) if path.split("/")[1] in ("ii", "if_", "ig", "io", "dense_i") else hidden
        for of_step, read in zip(unstack(record, 6), inputs, strict=True):
            assert_moments(of_step, read, examples=5)


def test_both_directions_and_repeated_calls_of_an_rnn_pool():
    cells = [make(nnx.GRUCell, 3, 4, seed=k) for k in range(2)]
    rnn, x = nnx.Bidirectional(nnx.RNN(cells[0]), nnx.RNN(cells[1])), normal(0, 5, 6, 3)
    model = Wrapped(rnn, lambda rnn, x: rnn(2 * x) + rnn(x))
    layers = bnp.nnx.find_layers(model, x)
    _, records = bnp.nnx.capture(model)(x)
    both = np.concatenate([x, 2 * x])
    for direction, steps in (("forward_rnn", range(6)), ("backward_rnn", reversed(range(6)))):
        path = f"layer/{direction}/cell/dense_i"
        assert layers[path].record_axes == "r"
        for of_step, t in zip(unstack(records[path], 6), steps, strict=True):
            assert_moments(of_step, both[:, t], examples=5)


@pytest.mark.parametrize("has_base", [True, False])
def test_low_rank_factors_are_two_dense_layers_one_after_the_other(has_base):
    base = make(nnx.Linear, 4, 3) if has_base else None
    model, x = make(nnx.LoRA, 4, 2, 3, base_module=base), normal(0, 5, 6, 4)
    layers = bnp.nnx.find_layers(model, x)
    assert list(layers) == (["base_module"] if has_base else []) + ["lora_a", "lora_b"]
    tx = bnp.scale_by_bnp(layers, decay=0.0, prior_examples=None)

    def loss(model):
        y, records = bnp.nnx.capture(model)(x)
        return weigh(y), records

    gradients, records = nnx.grad(loss, has_aux=True)(model)
    gradients = nnx.to_pure_dict(gradients)
    updates, _ = tx.update(gradients, tx.init(gradients), intermediates=records)
    rows = np.reshape(x, (30, 4))
    for name, inputs in (("lora_a", rows), ("lora_b", rows @ np.asarray(model.lora_a[...]))):
        expected, _ = step_of_batch(inputs, 5, gradients[name])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-8)


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
        layers = bnp.nnx.find_layers(Odd(nnx.Rngs(0)), jnp.ones((2, 5, 4), jnp.float32))
    assert list(layers) == ["lora/lora_a", "lora/lora_b", "lora_linear", *(f"lora_linear/lora/lora_{k}" for k in "ab")]
    reasons = {"/".join(other.path): other.reason for other in layers.excluded}
    # later releases of Flax call what multiplies a normalized kernel a parameter
    assert {path: reason for path, reason in reasons.items() if "/scales/" not in path} == {
        "complex/kernel": "complex parameters or input",
        "elementwise/kernel": "its einsum is not the contraction of an input with the kernel",
        "first/kernel": "shared by layers whose inputs differ",
        "masked/kernel": "masked kernel: its units see different inputs",
        "mixed/kernel": "called in several ways",
        "overriding/bias": "Overriding overrides __call__ and does not call that of Linear in this pass",
        "overriding/kernel": "Overriding overrides __call__ and does not call that of Linear in this pass",
        "weight_norm/layer_instance/kernel": "not a parameter of the model itself, but computed from others",
    }


def test_what_a_subclass_adds_is_excluded_beside_its_layer():
    class Scaled(nnx.Linear):
        def __init__(self, *sizes, rngs):
            super().__init__(*sizes, rngs=rngs)
            self.gain = nnx.Param(jnp.ones((), jnp.float32))

        def __call__(self, inputs):
            return super().__call__(inputs) * self.gain[...]

    layers = bnp.nnx.find_layers(Scaled(3, 2, rngs=nnx.Rngs(0)), jnp.ones((5, 3), jnp.float32))
    assert {parameter.name for parameter in layers["kernel"].parameters} == {"kernel", "bias"}
    assert {other.path: other.reason for other in layers.excluded} == {
        ("gain",): "neither kernel nor bias of its layer"
    }


def test_a_bias_that_is_no_parameter_is_a_constant():
    model = make(nnx.Linear, 3, 3)
    model.bias = nnx.Variable(model.bias[...])
    layers = bnp.nnx.find_layers(model, normal(0, 5, 3))
    assert layers["kernel"].bias is None
    assert not layers.excluded
