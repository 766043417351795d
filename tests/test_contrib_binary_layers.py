"""Binary networks: layers and blocks against Flax's and by their formulas, beside BNP and clipping, in both stages."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import compiled_call, flatten, make, normal, pure, reasons, weigh

import bnp_optax as bnp
from bnp_optax.contrib import (
    adaptive_grad_clip,
    binarize_standardized,
    binary_sign,
    linen,
    standardize,
    standardized_layers,
)
from bnp_optax.contrib import nnx as contrib_nnx

pytestmark = pytest.mark.usefixtures("x64")

# The layers. What Flax's own do with the binary kernel is what these are to do.


def random_params(model, x, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.5, 1, leaf.shape)).astype(leaf.dtype), shapes)


def plain(params, binary, eps=1e-4):
    """Returns the parameters of Flax's layer."""
    params, weights = dict(params), binarize_standardized if binary else standardize
    return {**params, "kernel": weights(params["kernel"], params.pop("gain"), eps)}


@pytest.mark.parametrize(
    ("features", "window", "binary", "options"),
    [
        (5, (3, 3), True, {}),
        (5, (3, 3), False, {"eps": 100.0}),
        (6, (3, 2), True, {"strides": 2, "padding": ((1, 0), (2, 1)), "feature_group_count": 2, "use_bias": True}),
        (4, (3, 3), True, {"padding": "CIRCULAR", "feature_group_count": 4, "eps": 100.0}),
    ],
    ids=["plain", "first stage", "groups", "depthwise"],
)
def test_a_convolution_is_that_of_flax_with_the_weights(features, window, binary, options):
    """In Linen and NNX."""
    x, options = normal(0, 2, 6, 6, 4), dict(options)
    model = linen.BinaryWSConv(features, window, binary=binary, param_dtype=float, **options)
    params, eps = random_params(model, x), options.pop("eps", 1e-4)
    options = {"use_bias": False} | options
    flax = nn.Conv(features, window, param_dtype=float, **options)
    expected = jax.jit(lambda params: flax.apply({"params": plain(params, binary, eps)}, x))(params)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), expected, rtol=1e-12, atol=1e-14)
    layer = contrib_nnx.BinaryWSConv(
        4, features, window, binary=binary, eps=eps, param_dtype=float, rngs=nnx.Rngs(0), **options
    )
    nnx.update(layer, params)
    np.testing.assert_allclose(compiled_call(lambda layer, x: layer(x), layer, x), expected, rtol=1e-12, atol=1e-14)
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.to_pure_dict(pure(nnx.state(layer, nnx.Param))), params)


@pytest.mark.parametrize(("binary", "use_bias"), [(True, False), (False, True)])
def test_a_dense_layer_is_that_of_flax_with_the_weights(binary, use_bias):
    x = normal(0, 2, 5, 4)
    model = linen.BinaryWSDense(5, use_bias=use_bias, binary=binary, param_dtype=float)
    params = random_params(model, x)
    flax = nn.Dense(5, use_bias=use_bias, param_dtype=float)
    expected = jax.jit(lambda params: flax.apply({"params": plain(params, binary)}, x))(params)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), expected, rtol=1e-13)
    layer = contrib_nnx.BinaryWSLinear(4, 5, use_bias=use_bias, binary=binary, param_dtype=float, rngs=nnx.Rngs(0))
    nnx.update(layer, params)
    np.testing.assert_allclose(compiled_call(lambda layer, x: layer(x), layer, x), expected, rtol=1e-13)


def test_parameters_begin_as_the_method_says():
    x, options = jnp.ones((1, 8, 8, 32)), {"feature_group_count": 2, "param_dtype": float}
    params = jax.jit(linen.BinaryWSConv(64, (3, 3), **options).init)(jax.random.key(0), x)["params"]
    layer = contrib_nnx.BinaryWSConv(32, 64, (3, 3), rngs=nnx.Rngs(0), **options)
    for own in (params, pure(nnx.state(layer, nnx.Param))):
        assert set(own) == {"gain", "kernel"}
        np.testing.assert_array_equal(own["gain"], np.ones(64))
        np.testing.assert_allclose(own["kernel"].std(), (9 * 16) ** -0.5, rtol=0.03)


def test_the_channel_layers_of_both_apis_agree():
    x, rng = normal(0, 2, 3, 3, 4, mean=0, deviation=0.5), np.random.default_rng(1)
    for of_linen, of_nnx in ((linen.RSign, contrib_nnx.RSign), (linen.RPReLU, contrib_nnx.RPReLU)):
        params = of_linen().init(jax.random.key(0), x)["params"]
        layer = of_nnx(4)
        chex.assert_trees_all_equal(nnx.to_pure_dict(pure(nnx.state(layer, nnx.Param))), params)
        params = {name: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for name, leaf in params.items()}
        nnx.update(layer, params)
        y = of_linen().apply({"params": params}, x)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(layer(x), y)
        wide = {name: leaf.astype(float)[None, None, None] for name, leaf in params.items()}
        expected = jnp.where(x + wide["bias"] >= 0, 1, -1) if "bias" in wide else None
        if expected is None:
            expected = nn.leaky_relu(x + wide["shift"], wide["slope"]) + wide["offset"]
        np.testing.assert_allclose(y, expected, rtol=1e-12)


# The block.

Block = functools.partial(linen.BinaryBlock, param_dtype=float)
BLOCKS = {
    "same": (4, {"beta": 0.9}),
    "strides": (4, {"beta": 0.9, "strides": 2}),
    "wider": (6, {"beta": 0.9, "alpha": 0.5}),
}


def block_by_hand(params, x, binary, beta, strides=1, alpha=0.2):
    """The formulas of the block, with the convolution of JAX."""
    dimensions = ("NHWC", "HWIO", "NHWC")

    def conv(x, own, stride, pads):
        weights = binarize_standardized if binary else standardize
        kernel = weights(own["kernel"], own["gain"])
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pads, dimension_numbers=dimensions)

    along = {name: leaf[None, None, None] for name, leaf in params["activation"].items()}
    signs = binary_sign(beta * x + params["sign"]["bias"][None, None, None])
    total = alpha * conv(signs, params["conv"], strides, [(1, 1), (1, 1)])
    if "projection" in params:
        n, height, width, channels = x.shape
        pooled = (beta * x).reshape(n, height // strides, strides, width // strides, strides, channels).mean((2, 4))
        total = total + conv(pooled, params["projection"], 1, "VALID")
    else:
        total = total + x
    shifted = total + along["shift"]
    return jnp.maximum(shifted, 0) + along["slope"] * jnp.minimum(shifted, 0) + along["offset"]


@pytest.mark.parametrize(("name", "binary"), [("same", False), ("strides", True), ("wider", True)])
def test_a_block_is_its_formulas_and_both_apis_and_stages_have_the_same_parameters(name, binary):
    (features, options), x = BLOCKS[name], normal(0, 2, 6, 6, 4, mean=0, deviation=0.7)
    block = Block(features, binary=binary, **options)
    params = random_params(block, x)
    run = jax.jit(jax.value_and_grad(lambda params, x: weigh(block.apply({"params": params}, x)), argnums=(0, 1)))
    by_hand = jax.jit(
        jax.value_and_grad(lambda params, x: weigh(block_by_hand(params, x, binary, **options)), argnums=(0, 1))
    )
    (value, gradients), (expected, gradients_by_hand) = run(params, x), by_hand(params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-11)
    chex.assert_trees_all_close(gradients, gradients_by_hand, rtol=1e-9, atol=1e-11)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradients))

    other = jax.eval_shape(Block(features, binary=not binary, **options).init, jax.random.key(0), x)["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(other, params)
    module = contrib_nnx.BinaryBlock(4, features, binary=not binary, param_dtype=float, rngs=nnx.Rngs(0), **options)
    nnx.update(module, params)
    module.set_attributes(binary=binary)
    y = compiled_call(lambda module, x: module(x), module, x)
    np.testing.assert_allclose(weigh(y), expected, rtol=1e-11)


def test_a_block_computes_in_low_precision_where_told():
    x = normal(0, 2, 4, 4, 3).astype(jnp.bfloat16)
    block = linen.BinaryBlock(3, strides=2, dtype=jnp.bfloat16)
    y, variables = jax.jit(block.init_with_output)(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    module = contrib_nnx.BinaryBlock(3, 3, strides=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    nnx.update(module, variables["params"])
    again = compiled_call(lambda module, x: module(x), module, x)
    np.testing.assert_allclose(again.astype(jnp.float32), y.astype(jnp.float32), atol=0.05)


class Stack(nn.Module):
    """Three blocks in one array."""

    binary: bool = True

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            lambda block, x, _: (block(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return blocks(Block(4, binary=self.binary, name="block"), x, None)[0]


def test_scanned_mapped_and_compiled_blocks_are_the_blocks_one_by_one():
    x = normal(0, 2, 4, 4, 4, mean=0)
    params, one = random_params(Stack(), x), jax.jit(Block(4).apply)
    expected = x
    for k in range(3):
        own = jax.tree.map(lambda leaf, k=k: leaf[k], params["block"])
        expected = one({"params": own}, expected)
    run = jax.jit(Stack().apply)
    np.testing.assert_allclose(run({"params": params}, x), expected, rtol=1e-10)
    mapped = jax.jit(jax.vmap(lambda x: Stack().apply({"params": params}, x[None])[0]))(x)
    np.testing.assert_allclose(mapped, expected, rtol=1e-10)
    assert standardized_layers(params)["block/conv"].moments_shape == (3, 1, 4)


def test_masks_and_single_weights_are_refused():
    mask = jnp.ones((3, 3, 4, 5))
    with pytest.raises(ValueError, match="BinaryWSConv takes no mask: a masked kernel has a third value"):
        linen.BinaryWSConv(5, (3, 3), mask=mask).init(jax.random.key(0), jnp.ones((1, 6, 6, 4)))
    with pytest.raises(ValueError, match="BinaryWSConv takes no mask"):
        contrib_nnx.BinaryWSConv(4, 5, (3, 3), mask=mask, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="fewer than two weights"):
        linen.BinaryWSDense(5).init(jax.random.key(0), jnp.ones((2, 1)))


# Beside BNP and clipping, and through both stages.


class Net(nn.Module):
    binary: bool = True

    @nn.compact
    def __call__(self, x):
        x = linen.WSConv(4, (3, 3), name="stem", param_dtype=float)(x)
        x = Block(4, binary=self.binary, name="first")(x)
        x = Block(6, binary=self.binary, strides=2, name="second")(x).mean((1, 2))
        x = linen.BinaryWSDense(5, name="hidden", param_dtype=float)(linen.RSign(float)(x))
        return nn.Dense(3, param_dtype=float, name="classifier")(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.block = contrib_nnx.BinaryBlock(4, 6, strides=2, param_dtype=float, rngs=rngs)
        self.hidden = contrib_nnx.BinaryWSLinear(6, 5, param_dtype=float, rngs=rngs)
        self.out = nnx.Linear(5, 3, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        return self.out(self.hidden(self.block(x).mean((1, 2))))


CONVOLUTIONS = ["first/conv", "second/conv", "second/projection"]


def test_find_layers_excludes_binary_kernels_with_the_reason():
    """And BNP trains the classifier."""
    x = normal(0, 4, 4, 4, 2)
    layers = bnp.linen.find_layers(Net(), x)
    assert list(layers) == ["classifier"]
    for name in [*CONVOLUTIONS, "hidden"]:
        assert reasons(layers)[f"{name}/kernel"] == "its kernel is computed from the parameter before the product"
    model = make(NnxNet)
    layers = bnp.nnx.find_layers(model, normal(0, 4, 4, 4, 4))
    assert list(layers) == ["out"]
    for path, cls in (("block/conv", "Conv"), ("block/projection", "Conv"), ("hidden", "Linear")):
        assert f"overrides __call__ and does not call that of {cls}" in reasons(layers)[f"{path}/kernel"]


def test_standardized_layers_are_clipped_by_unit():
    """All that have a gain, binary or not; gains, thresholds and activations pass."""
    x = normal(0, 4, 4, 4, 2)
    params = random_params(Net(), x)
    layers = standardized_layers(params)
    assert sorted(layers) == sorted([*CONVOLUTIONS, "hidden", "stem"])
    gradients = jax.tree.map(lambda leaf: 100 * jnp.cos(leaf), params)
    tx = adaptive_grad_clip(0.1, layers)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    flat, weights = flatten(updates), flatten(params)
    clipped = [f"{name}/kernel" for name in layers]
    for path, leaf in flatten(gradients).items():
        axes = tuple(range(leaf.ndim - 1))
        if path in clipped:
            bounds = 0.1 * np.sqrt((weights[path] ** 2).sum(axes))
            np.testing.assert_allclose(np.sqrt((flat[path] ** 2).sum(axes)), bounds, rtol=1e-12)
        elif path != "stem/bias":
            np.testing.assert_array_equal(flat[path], leaf)
    state = nnx.state(make(NnxNet), nnx.Param)
    assert sorted(standardized_layers(state)) == ["block/conv", "block/projection", "hidden"]


@pytest.mark.usefixtures("standard_promotion")
def test_parameters_of_the_first_stage_begin_the_second():
    """Activations are binary in both; a few steps of each lower the loss."""
    x = normal(0, 32, 4, 4, 2, mean=0)
    labels = jnp.arange(32) % 3
    x = x.at[:, :, :, 0].add(labels.astype(float)[:, None, None] - 1.0)
    params = jax.jit(Net().init)(jax.random.key(0), x)["params"]
    tx = optax.chain(adaptive_grad_clip(0.1, standardized_layers(params)), optax.adam(0.01))
    for binary in (False, True):

        def loss_fn(params, model):
            logits = model.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        step = jax.jit(jax.value_and_grad(functools.partial(loss_fn, model=Net(binary=binary))))
        update, state, losses = jax.jit(tx.update), tx.init(params), []
        for _ in range(15):
            loss, gradients = step(params)
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
        assert losses[-1] < 0.8 * losses[0]
