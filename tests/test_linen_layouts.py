"""Every kind of linear layer of Flax Linen: one update equals that of a dense layer written out, in float64.

The running statistics are those of the batch (decay 0), so that an update depends on this batch alone.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gradients_and_records, init, normal
from oracles import patches, step_of_batch

import bnp_optax as bnp
from bnp_optax import layouts

pytestmark = pytest.mark.usefixtures("x64")


def gradients_and_updates(model, *args, params=None):
    """Returns the gradients of a loss that no symmetry makes special, what BNP makes of them, and its state."""
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, *args), decay=0.0, prior_examples=None)
    differentiate = gradients_and_records(model)

    @jax.jit
    def update(params, *args):
        gradients, records = differentiate(params, args)
        return gradients, *tx.update(gradients, tx.init(params), intermediates=records)

    return update(init(model, *args) if params is None else params, *args)


def assert_update(gradients, updates, inputs, examples, matrix=lambda kernel: kernel):
    """Compares with the dense update; `matrix` brings a kernel to `[window * inputs, outputs]`."""
    g_b = np.ravel(gradients["bias"]) if "bias" in gradients else None
    kernel, bias = step_of_batch(inputs, examples, np.asarray(matrix(gradients["kernel"])), g_b)
    np.testing.assert_allclose(matrix(updates["kernel"]), kernel, rtol=1e-8, atol=1e-8)
    if bias is not None:
        np.testing.assert_allclose(np.ravel(updates["bias"]), bias, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_over_a_sequence(use_bias):
    x = normal(0, 3, 5, 4)
    gradients, updates, _ = gradients_and_updates(nn.Dense(2, use_bias=use_bias, param_dtype=float), x)
    assert_update(gradients, updates, np.reshape(x, (15, 4)), examples=3)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("axis", [(1, -1), (-1, 1), (3, 1)])
def test_dense_general_contracts_its_axes_in_the_order_of_the_array(axis, use_bias):
    x = normal(0, 3, 2, 5, 4)
    model = nn.DenseGeneral((2, 3), axis=axis, use_bias=use_bias, param_dtype=float)
    gradients, updates, _ = gradients_and_updates(model, x)
    inputs = np.moveaxis(x, 1, 2).reshape(15, 8)
    assert_update(gradients, updates, inputs, examples=3, matrix=lambda kernel: kernel.reshape(8, 6))


def test_dense_general_with_batch_dims_is_a_stack_of_dense_layers():
    x = normal(0, 2, 3, 6, 5, 4)
    model = nn.DenseGeneral(2, batch_dims=(0, 1), param_dtype=float)
    gradients, updates, state = gradients_and_updates(model, x)
    assert state["kernel"].mean.shape == (6, 1, 4)
    for entry in np.ndindex(2, 3):
        one = [{name: leaf[entry] for name, leaf in tree.items()} for tree in (gradients, updates)]
        assert_update(*one, np.reshape(x[entry], (30, 4)), examples=6)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    ("equation", "kernel", "shape"),
    [
        ("abc,cd->abd", (8, 3), (2, 3, 8)),
        ("...ab,abc->...c", (2, 4, 3), (2, 3, 2, 4)),
        ("nxab,abc->ncx", (2, 4, 3), (2, 3, 2, 4)),
    ],
)
def test_einsum_equals_a_dense_layer(equation, kernel, shape, use_bias):
    x = normal(0, *shape)
    model = nn.Einsum(kernel, equation, use_bias=use_bias, param_dtype=float)
    gradients, updates, _ = gradients_and_updates(model, x)
    assert_update(gradients, updates, np.reshape(x, (6, 8)), examples=2, matrix=lambda kernel: kernel.reshape(8, 3))


def test_einsum_with_permuted_kernel_contracts_in_the_order_of_the_kernel():
    x = normal(0, 4, 2, 5)
    model = nn.Einsum((3, 5, 2), "nab,cba->nc", param_dtype=float)
    gradients, updates, _ = gradients_and_updates(model, x)
    inputs = np.swapaxes(x, 1, 2).reshape(4, 10)
    assert_update(gradients, updates, inputs, examples=4, matrix=lambda kernel: kernel.reshape(3, 10).T)


def test_einsum_over_heads_is_a_stack_and_its_equation_may_come_with_the_call():
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Einsum((2, 4, 3), param_dtype=float, name="heads")(x, "nthd,hdf->nthf")

    x = normal(0, 3, 5, 2, 4)
    gradients, updates, _ = gradients_and_updates(Heads(), x)
    for h in range(2):
        one = [{name: leaf[h] for name, leaf in tree["heads"].items()} for tree in (gradients, updates)]
        assert_update(*one, np.reshape(x[:, :, h], (15, 4)), examples=3)


@pytest.mark.parametrize(
    ("equation", "kernel"),
    [
        ("ab,b->ab", (3,)),
        ("aab,bc->ac", (3, 2)),
        ("abc,bd->ad", (3, 2)),
        ("ab,bcd->ac", (3, 2, 2)),
        ("a,bb->ab", (2, 2)),
    ],
)
def test_einsum_that_is_no_linear_layer_is_excluded(equation, kernel):
    assert layouts.einsum(equation, kernel) is None
    if equation == "ab,b->ab":
        model = nn.Einsum(kernel, equation, kernel_init=nn.initializers.ones, use_bias=False)
        layers = bnp.linen.find_layers(model, jnp.ones((2, 3), jnp.float32))
        assert {other.reason for other in layers.excluded} == {
            "its einsum is not the contraction of an input with the kernel"
        }


def test_einsum_that_is_a_linear_layer_in_one_of_its_calls_alone_is_excluded():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            einsum = nn.Einsum((4, 4), use_bias=False, param_dtype=float, name="einsum")
            return einsum(einsum(x, "ni,io->no"), "no,io->nio")

    layers = bnp.linen.find_layers(Both(), normal(0, 6, 4))
    (excluded,) = layers.excluded
    assert (list(layers), excluded.reason) == ([], "its einsum is not the contraction of an input with the kernel")


@pytest.mark.parametrize("transpose_kernel", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_transposed_convolution_uses_the_statistics_of_its_channels(transpose_kernel, use_bias):
    x = normal(0, 3, 4, 5, 2)
    model = nn.ConvTranspose(
        6, (3, 2), strides=(2, 1), transpose_kernel=transpose_kernel, use_bias=use_bias, param_dtype=float
    )
    gradients, updates, _ = gradients_and_updates(model, x)

    def matrix(kernel):
        return (jnp.swapaxes(kernel, -1, -2) if transpose_kernel else kernel).reshape(12, 6)

    assert_update(gradients, updates, np.reshape(x, (60, 2)), examples=3, matrix=matrix)


@pytest.mark.parametrize("use_bias", [True, False])
def test_unshared_convolution_is_a_dense_layer_at_each_position(use_bias):
    x = normal(0, 3, 5, 4, 2)
    model = nn.ConvLocal(6, (3, 2), padding="VALID", use_bias=use_bias, param_dtype=float)
    params = init(model, x)
    seen = patches(np.asarray(x), (3, 2), (1, 1), [(0, 0), (0, 0)]).reshape(3, 3, 3, 6, 2)

    def matrix(kernel):  # from [input * window, output] to the window outermost
        return kernel.reshape(2, 6, 6).swapaxes(0, 1).reshape(12, 6)

    y = jax.jit(model.apply)({"params": params}, x)
    for position in np.ndindex(3, 3):
        bias = params["bias"][position][None] if use_bias else 0
        by_hand = seen[:, *position].reshape(3, 12) @ matrix(np.asarray(params["kernel"][position])) + bias
        np.testing.assert_allclose(y[:, *position], by_hand, rtol=1e-10)

    gradients, updates, _ = gradients_and_updates(model, x)
    for position in np.ndindex(3, 3):
        one = [{name: leaf[position] for name, leaf in tree.items()} for tree in (gradients, updates)]
        assert_update(*one, np.reshape(x, (60, 2)), examples=3, matrix=matrix)


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
@pytest.mark.parametrize("attention", [nn.MultiHeadDotProductAttention, nn.SelfAttention])
def test_attention_projections_equal_dense_layers(attention):
    x = normal(0, 3, 5, 4)
    model = attention(num_heads=2, qkv_features=6, out_features=3, param_dtype=float)
    gradients, updates, _ = gradients_and_updates(model, x)
    params = init(model, x)
    _, captured = model.apply({"params": params}, x, capture_intermediates=True, mutable=["intermediates"])
    q, k, v = (captured["intermediates"][name]["__call__"][0] for name in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(3), axis=-1)
    attended = jnp.einsum("nhqk,nkhd->nqhd", weights, v)
    for name in ("query", "key", "value"):
        assert_update(gradients[name], updates[name], np.reshape(x, (15, 4)), 3, lambda kernel: kernel.reshape(4, 6))
    assert_update(gradients["out"], updates["out"], np.reshape(attended, (15, 6)), 3, lambda k: k.reshape(6, 3))


CELLS = [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.MGUCell, nn.SimpleCell]


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_layers_pool_their_inputs_over_all_steps(cell):
    """An input's kernels (`i*`) see the sequence, most of a state's (`h*`) the states before each step."""
    x = normal(0, 3, 6, 4)
    one_cell = cell(5, param_dtype=float)
    model = nn.RNN(one_cell, variable_axes={"intermediates": 0})
    params = init(model, x)
    carry, states = one_cell.initialize_carry(jax.random.key(0), (3, 4)), []
    for t in range(6):
        states.append(np.asarray(carry[1] if isinstance(carry, tuple) else carry))
        carry, _ = one_cell.apply({"params": params["cell"]}, carry, x[:, t])
    inputs = {"i": np.reshape(x, (18, 4)), "h": np.concatenate(states)}

    gradients, updates, state = gradients_and_updates(model, x, params=params)
    for name in gradients["cell"]:
        assert_update(gradients["cell"][name], updates["cell"][name], inputs[name[0]], examples=3)
        assert state[f"cell/{name}"].seen == 3


def test_convolutional_lstm_pools_over_steps_and_positions():
    x = normal(0, 2, 3, 4, 4, 2)
    cell = nn.ConvLSTMCell(3, (3, 3), param_dtype=float)
    gradients, updates, _ = gradients_and_updates(nn.RNN(cell, variable_axes={"intermediates": 0}), x)
    assert_update(
        gradients["cell"]["ih"],
        updates["cell"]["ih"],
        np.reshape(x, (96, 2)),
        examples=2,
        matrix=lambda kernel: kernel.reshape(18, 12),
    )


def test_bidirectional_network_records_both_directions():
    x = normal(0, 3, 6, 4)
    forward, backward = (
        nn.RNN(nn.SimpleCell(5, param_dtype=float), variable_axes={"intermediates": 0}) for _ in range(2)
    )
    gradients, updates, _ = gradients_and_updates(nn.Bidirectional(forward, backward), x)
    for rnn in ("forward_rnn", "backward_rnn"):
        assert_update(gradients[rnn]["cell"]["i"], updates[rnn]["cell"]["i"], np.reshape(x, (18, 4)), examples=3)


def test_wrapped_normalization_of_the_kernel_is_excluded():
    layers = bnp.linen.find_layers(
        nn.Sequential([nn.WeightNorm(nn.Dense(3)), nn.Dense(2)]), jnp.ones((2, 4), jnp.float32)
    )
    assert [layer.kernel.shape for layer in layers.values()] == [(3, 2)]
    assert "its kernel is normalized by WeightNorm" in str(layers)


class LoRA(nn.Module):
    """A frozen dense layer with a trained low-rank update, as a user writes it."""

    features: int
    rank: int = 2

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.features, name="frozen", param_dtype=float)(x)
        a = self.param("a", nn.initializers.lecun_normal(), (x.shape[-1], self.rank), float)
        b = self.param("b", nn.initializers.normal(), (self.rank, self.features), float)
        low = x @ a
        bnp.linen.register(self, x, "a", bias=None)
        bnp.linen.register(self, low, "b", bias=None)
        return y + low @ b


def test_layers_of_the_users_own_are_recorded_where_they_say_so():
    x = normal(0, 6, 5)
    layers = bnp.linen.find_layers(LoRA(3), x)
    assert list(layers) == ["frozen", "a", "b"]
    params = init(LoRA(3), x)
    gradients, updates, _ = gradients_and_updates(LoRA(3), x, params=params)
    for name, inputs in (("a", x), ("b", x @ params["a"])):
        expected, _ = step_of_batch(inputs, 6, np.asarray(gradients[name]))
        np.testing.assert_allclose(updates[name], expected, rtol=1e-8)
    assert LoRA(3).apply({"params": params}, x, mutable=["intermediates"])[1] == {}


def test_mixture_of_experts_is_a_stack():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.lecun_normal(batch_axis=0), (3, 4, 2), float)
            b = self.param("b", nn.initializers.normal(), (3, 2), float)
            bnp.linen.register(self, x, "w", "b", kernel_roles="sio", bias_roles="so", stack_axes=(1,))
            return jnp.einsum("nei,eio->neo", x, w) + b[None]

    x = normal(0, 6, 3, 4)
    gradients, updates, _ = gradients_and_updates(Experts(), x)
    for e in range(3):
        one = [{"kernel": tree["w"][e], "bias": tree["b"][e]} for tree in (gradients, updates)]
        assert_update(*one, np.asarray(x[:, e]), examples=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "v"}, r"Own_0 has no parameter 'v'\. Call register after self\.param"),
        ({"bias": "bias"}, r"Own_0 has no parameter 'bias'"),
        ({"kernel_roles": "sio"}, r"Own_0/w has shape \(4, 2\), but 3 roles 'sio'"),
    ],
)
def test_mistakes_in_register_are_named(options, message):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.lecun_normal(), (4, 2), float)
            bnp.linen.register(self, x, **({"kernel": "w", "bias": None} | options))
            return x @ w

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Own()(x)

    Model().init(jax.random.key(0), normal(0, 3, 4))
    with pytest.raises(ValueError, match=message):
        bnp.linen.find_layers(Model(), normal(0, 3, 4))
