"""What Muon takes for a matrix, against Muon on each matrix alone."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import init, make, normal

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")
RATE, ADAM_RATE = 0.1, 0.01


class Net(nn.Module):
    """Kernels whose axes are inputs and outputs in all ways of Flax, an embedding and a normalization."""

    @nn.compact
    def __call__(self, x, tokens):
        h = nn.Conv(4, (3,), feature_group_count=2, param_dtype=float)(x)
        h = h + nn.Embed(5, 4, param_dtype=float)(tokens)
        h = nn.MultiHeadAttention(2, qkv_features=6, param_dtype=float)(nn.LayerNorm(param_dtype=float)(h))
        layers = {"variable_axes": {"params": 0, "intermediates": 0}, "split_rngs": {"params": True}, "length": 3}
        h, _ = nn.scan(lambda dense, h, _: (nn.tanh(dense(h)), None), **layers)(
            nn.Dense(4, param_dtype=float, name="stack"), h, None
        )
        return nn.DenseGeneral(3, axis=(-2, -1), param_dtype=float)(h)


def muon(**options):
    return optax.contrib.muon(RATE, adam_learning_rate=ADAM_RATE, **options)


def two_steps(tx, params, gradients):
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(gradients, state, params)
    return updates


def test_every_layer_is_what_it_multiplies_with():
    x, tokens = normal(0, 5, 7, 4), jnp.arange(35).reshape(5, 7) % 5
    params = init(Net(), x, tokens)
    layers = bnp.linen.find_layers(Net(), x, tokens)
    gradients = jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), params)
    updates = two_steps(muon(muon_weight_dimension_numbers=bnp.muon_dimension_numbers(layers)), params, gradients)

    by_path = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree.leaves_with_path(gradients)}
    found = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in jax.tree.leaves_with_path(updates)}
    kernels = {layer.kernel.name: layer.kernel for layer in layers.included}
    assert len(kernels) == 7
    assert kernels["stack/kernel"].shape == (3, 4, 4)
    adam = two_steps(optax.adam(ADAM_RATE, nesterov=True), by_path, by_path)
    for path, gradient in by_path.items():
        if path not in kernels:
            np.testing.assert_allclose(found[path], adam[path], rtol=1e-9)
            continue
        # [stack, group, input, window, output]
        own, actual = (np.asarray(kernels[path].to_canonical(array)) for array in (gradient, found[path]))
        for of_stack, actual_of_stack in zip(own, actual, strict=True):
            matrix, expected = (
                a.transpose(1, 2, 0, 3).reshape(a.shape[1] * a.shape[2], -1) for a in (of_stack, actual_of_stack)
            )
            alone = two_steps(muon(), {"w": jnp.asarray(matrix)}, {"w": jnp.asarray(matrix)})["w"]
            np.testing.assert_allclose(expected, alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("window", [(3, 1), (1, 3), (1, 1)])
def test_an_axis_of_an_unshared_convolution_is_of_inputs_or_of_outputs(window):
    """Whose inputs and window share an axis: a window of 1 there is none of the outputs' axis behind it."""
    model, x = nn.ConvLocal(3, window), normal(0, 2, 5, 5, 4)
    params = init(model, x)
    numbers = bnp.muon_dimension_numbers(bnp.linen.find_layers(model, x))(params)
    assert numbers["kernel"] == optax.contrib.MuonDimensionNumbers((2,), (3,))


def test_it_trains_in_bnps_variables_and_in_a_state_of_nnx():
    model, x = nnx.Sequential(make(nnx.Linear, 4, 3), make(nnx.Linear, 3, 2)), normal(0, 5, 4)
    layers = bnp.nnx.find_layers(model, x)
    numbers = bnp.muon_dimension_numbers(layers)
    optimizer = nnx.Optimizer(
        model, bnp.preconditioned(muon(muon_weight_dimension_numbers=numbers), layers), wrt=nnx.Param
    )
    plain = bnp.preconditioned(muon(), layers)  # of kernels with two axes it is the same

    def loss_fn(model):
        y, records = bnp.nnx.capture(model)(x)
        return jnp.square(y).sum(), records

    gradients, records = nnx.grad(loss_fn, has_aux=True)(model)
    params = nnx.state(model, nnx.Param)
    updates, _ = plain.update(gradients, plain.init(params), params, intermediates=records)
    expected = optax.apply_updates(params, updates)
    optimizer.update(model, gradients, intermediates=records)  # the variables of `params` are those of the model
    chex.assert_trees_all_close(nnx.state(model, nnx.Param), expected, rtol=1e-9)


def test_kernels_that_are_left_out_are_adams():
    layers = bnp.Layers((bnp.Layer.dense(("a",), (4, 3)), bnp.Layer.dense(("b",), (3, 2))))
    params = {"a": normal(0, 4, 3), "b": normal(1, 3, 2)}
    numbers = bnp.muon_dimension_numbers(layers.select(lambda layer: layer.path == "a"))
    updates = two_steps(muon(muon_weight_dimension_numbers=numbers), params, params)
    np.testing.assert_allclose(updates["a"], two_steps(muon(), params, params)["a"])
    adam = two_steps(optax.adam(ADAM_RATE, nesterov=True), params, params)
    np.testing.assert_allclose(updates["b"], adam["b"])
    masked = optax.masked(muon(muon_weight_dimension_numbers=numbers), {"a": True, "b": False})
    of_masked = two_steps(masked, params, params)
    np.testing.assert_allclose(of_masked["a"], updates["a"])
    np.testing.assert_allclose(of_masked["b"], params["b"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="layers must be"):
        bnp.muon_dimension_numbers(Net())
    numbers = bnp.muon_dimension_numbers(bnp.Layers((bnp.Layer.dense(("w",), (3, 2)),)))
    with pytest.raises(ValueError, match=r"w with shape \(3, 2\), but it has shape \(4, 2\)"):
        numbers({"w": jnp.ones((4, 2))})
