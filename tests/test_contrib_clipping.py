"""Adaptive gradient clipping, against a loop over the units of every layer, its invariances, and Optax's own."""

import functools

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import flatten, make, pure, weigh

import bnp_optax as bnp
from bnp_optax.contrib import adaptive_grad_clip

pytestmark = pytest.mark.usefixtures("x64")

Dense, Conv, ConvTranspose = (
    functools.partial(cls, param_dtype=float) for cls in (nn.Dense, nn.Conv, nn.ConvTranspose)
)


class Scanned(nn.Module):
    """Three dense layers in one array, whose first axis they are."""

    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(Dense(4, name="layer"), x, None)[0]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, param_dtype=float, name="attention")(x)


def stacked_last():
    return nn.vmap(
        nn.Dense,
        in_axes=None,
        variable_axes={"params": -1, "intermediates": 0},
        split_rngs={"params": True},
        axis_size=3,
    )(5, param_dtype=float)


# A model, the shape of its input, and for each parameter the axes that tell its units apart.
LINEN = {
    "dense": (Dense(5), (3, 4), {"kernel": (1,), "bias": ()}),
    "no bias": (Dense(5, use_bias=False), (3, 4), {"kernel": (1,)}),
    "dense of one input": (Dense(5), (3, 1), {"kernel": (1,), "bias": ()}),
    "convolution 1d": (Conv(5, (3,)), (2, 6, 4), {"kernel": (2,), "bias": ()}),
    "convolution 2d": (Conv(5, (3, 2)), (2, 6, 5, 4), {"kernel": (3,), "bias": ()}),
    "convolution 3d": (Conv(5, (2, 1, 2)), (2, 3, 3, 3, 4), {"kernel": (4,), "bias": ()}),
    "1x1 convolution of one channel": (Conv(5, (1, 1)), (2, 3, 3, 1), {"kernel": (3,), "bias": ()}),
    "grouped convolution": (Conv(6, (3, 3), feature_group_count=2), (2, 4, 4, 4), {"kernel": (3,), "bias": ()}),
    "depthwise convolution": (Conv(4, (3, 3), feature_group_count=4), (2, 4, 4, 4), {"kernel": (3,), "bias": ()}),
    "transposed convolution": (ConvTranspose(5, (3, 3)), (2, 4, 4, 4), {"kernel": (3,), "bias": ()}),
    "transposed kernel": (
        ConvTranspose(5, (3, 3), transpose_kernel=True),
        (2, 4, 4, 4),
        {"kernel": (2,), "bias": ()},
    ),
    "attention": (
        Attention(),
        (2, 3, 4),
        {f"attention/{name}/kernel": (1, 2) for name in ("query", "key", "value")}
        | {f"attention/{name}/bias": () for name in ("query", "key", "value", "out")}
        | {"attention/out/kernel": (2,)},
    ),
    "scanned": (Scanned(), (2, 4), {"layer/kernel": (0, 2), "layer/bias": (0,)}),
    "stacked along the last axis": (stacked_last(), (2, 4), {"kernel": (1, 2), "bias": (1,)}),
}


class ScannedNnx(nnx.Module):
    def __init__(self, rngs, param_dtype=float):
        make_layers = nnx.vmap(lambda rngs: nnx.Linear(4, 4, param_dtype=param_dtype, rngs=rngs))
        self.layers = make_layers(rngs.split(3))

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.Param: 0, nnx.Intermediate: 0})
        return nnx.scan(lambda layer, x: layer(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


NNX = {
    "dense": (lambda: make(nnx.Linear, 4, 5), (3, 4), {"kernel": (1,), "bias": ()}),
    "dense of one input": (lambda: make(nnx.Linear, 1, 5), (3, 1), {"kernel": (1,), "bias": ()}),
    "convolution 1d": (lambda: make(nnx.Conv, 4, 5, (3,)), (2, 6, 4), {"kernel": (2,), "bias": ()}),
    "grouped convolution": (
        lambda: make(nnx.Conv, 4, 6, (3, 3), feature_group_count=2),
        (2, 4, 4, 4),
        {"kernel": (3,), "bias": ()},
    ),
    "transposed convolution": (
        lambda: make(nnx.ConvTranspose, 4, 5, (3, 3)),
        (2, 4, 4, 4),
        {"kernel": (3,), "bias": ()},
    ),
    "attention": (
        lambda: make(nnx.MultiHeadAttention, num_heads=2, in_features=4, qkv_features=6, decode=False),
        (2, 3, 4),
        {f"{name}/kernel": (1, 2) for name in ("query", "key", "value")}
        | {f"{name}/bias": () for name in ("query", "key", "value", "out")}
        | {"out/kernel": (2,)},
    ),
    "scanned": (lambda: ScannedNnx(nnx.Rngs(0)), (2, 4), {"layers/kernel": (0, 2), "layers/bias": (0,)}),
}


@functools.cache
def linen_layers(name):
    model, shape, _ = LINEN[name]
    x = jnp.ones(shape)
    return bnp.linen.find_layers(model, x), jax.eval_shape(model.init, jax.random.key(0), x)["params"]


def random_trees(shapes, units, seed=0):
    """Returns weights and gradients, whose norms differ from unit to unit: some are clipped, some have tiny weights."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        kept = np.prod([shape[axis] for axis in units[path]], dtype=int)
        scales = rng.permutation(np.geomspace(1e-6, 10, kept)) if kept > 1 else np.array([10.0])
        unit_shape = [size if axis in units[path] else 1 for axis, size in enumerate(shape)]
        return jnp.asarray(rng.normal(size=shape) * scales.reshape(unit_shape))

    def tree():
        order = flatten(jax.tree.map(lambda _: 0, shapes))
        return jax.tree.structure(shapes).unflatten([leaf(path, flatten(shapes)[path].shape) for path in order])

    return tree(), tree()


def clip_units(gradient, weights, axes, clipping, eps):
    """The formula of the method, a unit at a time: those of a parameter have each an index along some axes."""
    gradient, weights = np.array(gradient, np.float64), np.asarray(weights, np.float64)
    for index in np.ndindex(*(gradient.shape[axis] for axis in axes)):
        unit = [slice(None)] * gradient.ndim
        for axis, place in zip(axes, index, strict=True):
            unit[axis] = place
        g, w = gradient[tuple(unit)], weights[tuple(unit)]
        norm = np.sqrt(np.sum(g * g))
        bound = clipping * max(np.sqrt(np.sum(w * w)), eps)
        if norm > bound:
            gradient[tuple(unit)] = g * bound / max(norm, 1e-6)
    return gradient


def assert_clipped(layers, params, gradients, units, clipping=0.1, eps=1e-3):
    tx = adaptive_grad_clip(clipping, layers, eps)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    params, gradients, updates = (flatten(tree) for tree in (params, gradients, updates))
    assert set(updates) == set(units)
    changed = 0
    for path, axes in units.items():
        expected = clip_units(gradients[path], params[path], axes, clipping, eps)
        np.testing.assert_allclose(updates[path], expected, rtol=1e-14, atol=0)
        changed += np.count_nonzero(expected != gradients[path])
    assert changed > 0


# The formula, for every kind of layer.


@pytest.mark.parametrize("name", LINEN)
def test_every_unit_of_a_linen_layer_is_clipped_by_its_own_norm(name):
    layers, shapes = linen_layers(name)
    assert not layers.excluded
    assert_clipped(layers, *random_trees(shapes, LINEN[name][2]), LINEN[name][2])


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", NNX)
def test_every_unit_of_an_nnx_layer_is_clipped_by_its_own_norm(name):
    make_model, shape, units = NNX[name]
    model = make_model()
    layers = bnp.nnx.find_layers(model, jnp.ones(shape))
    assert not layers.excluded
    shapes = nnx.to_pure_dict(jax.eval_shape(pure, nnx.state(model, nnx.Param)))
    assert_clipped(layers, *random_trees(shapes, units), units)


@pytest.mark.parametrize("name", [name for name in LINEN if name not in ("attention", "scanned")])
def test_the_units_are_the_outputs_that_a_weight_changes(name):
    """As the layer itself says: two weights are of one unit if they change the same output features."""
    model, shape, units = LINEN[name]
    _, shapes = linen_layers(name)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    params, _ = random_trees(shapes, dict.fromkeys(units, ()))

    @jax.jit
    def jacobian(kernel):
        return jax.jacfwd(lambda kernel: model.apply({"params": {**params, "kernel": kernel}}, x))(kernel)

    kernel = params["kernel"]
    changes = np.moveaxis(np.asarray(jacobian(kernel)), range(-kernel.ndim, 0), range(kernel.ndim))
    stacked = name == "stacked along the last axis"  # whose outputs are [stack, examples, features]
    outputs = changes.shape[-1] * (changes.shape[kernel.ndim] if stacked else 1)
    features = np.moveaxis(changes, kernel.ndim, -2) if stacked else changes
    is_changed = features.reshape(kernel.size, -1, outputs).any(1)
    kept = [kernel.shape[axis] for axis in units["kernel"]]
    places = [np.indices(kernel.shape)[axis].ravel() for axis in units["kernel"]]
    unit = np.ravel_multi_index(places, kept)
    same = unit[:, None] == unit
    np.testing.assert_array_equal((is_changed[:, None] == is_changed).all(-1), same)


@pytest.mark.usefixtures("standard_promotion")
def test_parameters_outside_the_layers_pass_unchanged():
    model = nn.Sequential([Dense(4), nn.LayerNorm(param_dtype=float), Dense(3)])
    x = jnp.ones((2, 5))
    layers = bnp.linen.find_layers(model, x).select(lambda layer: layer.path != "layers_2")
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), model.init(jax.random.key(0), x)["params"])
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 9.0), params)
    tx = adaptive_grad_clip(0.01, layers)
    updates, state = tx.update(gradients, tx.init(params), params)
    assert jax.tree.leaves(state) == []
    for name in ("layers_1", "layers_2"):
        chex.assert_trees_all_equal(updates[name], gradients[name])
    assert (np.abs(updates["layers_0"]["kernel"]) < 9).all()
    assert (np.abs(updates["layers_0"]["bias"]) < 9).all()


def test_a_masked_bias_leaves_the_kernel_clipped():
    layers, shapes = linen_layers("dense")
    params, gradients = random_trees(shapes, LINEN["dense"][2])
    mask = {"kernel": True, "bias": False}
    tx = optax.masked(adaptive_grad_clip(0.1, layers), mask)
    updates, _ = tx.update(gradients, tx.init(params), params)
    chex.assert_trees_all_equal(updates["bias"], gradients["bias"])
    np.testing.assert_allclose(
        updates["kernel"], clip_units(gradients["kernel"], params["kernel"], (1,), 0.1, 1e-3), rtol=1e-14
    )


# What follows from the formula.


DENSE = bnp.Layers((bnp.Layer.dense(("kernel",), (4, 5), bias=("bias",)),))


@functools.partial(jax.jit, static_argnames="layers")
def run(params, gradients, clipping=0.1, eps=1e-3, layers=DENSE):
    tx = adaptive_grad_clip(clipping, layers, eps)
    return tx.update(gradients, tx.init(params), params)[0]


def dense_trees(seed, weights=1.0, gradients=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda scale: {  # noqa: E731
        "kernel": jnp.asarray(scale * rng.normal(size=(4, 5)) * rng.lognormal(0, 3, size=5)),
        "bias": jnp.asarray(scale * rng.normal(size=5)),
    }
    return draw(weights), draw(gradients)


def norms(tree):
    return jnp.append(jnp.linalg.norm(tree["kernel"], axis=0), jnp.linalg.norm(tree["bias"]))


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.floats(1e-8, 1e3),
    gradients=st.floats(1e-8, 1e8),
    clipping=st.floats(1e-3, 10),
    eps=st.floats(0, 1),
)
def test_norms_are_bounded_and_clipping_again_changes_nothing(seed, weights, gradients, clipping, eps):
    params, gradients = dense_trees(seed, weights, gradients)
    once = run(params, gradients, clipping, eps)
    bounds = clipping * jnp.maximum(norms(params), eps)
    assert (norms(once) <= bounds * (1 + 1e-14)).all()
    twice = run(params, once, clipping, eps)
    if jnp.min(bounds) > 1e-6:  # else what rounding leaves above a bound is divided by a millionth
        chex.assert_trees_all_close(twice, once, rtol=1e-14)
    assert (norms(twice) <= bounds * (1 + 1e-14)).all()
    below = norms(gradients) <= bounds
    chex.assert_trees_all_equal(once["kernel"][:, below[:-1]], gradients["kernel"][:, below[:-1]])
    # What is clipped keeps its direction, and has the bound for its norm unless it is tiny.
    clipped = ~below & (norms(gradients) > 1e-6)
    np.testing.assert_allclose(norms(once)[clipped], bounds[clipped], rtol=1e-12)


@hypothesis.given(seed=st.integers(0, 2**32 - 1), factor=st.floats(1e-3, 1e3))
def test_permuted_units_and_scaled_layers_are_clipped_alike(seed, factor):
    """Under eps 0 and above norms of 1e-6, scaling weights and gradients scales the update."""
    params, gradients = dense_trees(seed, 1.0, 10.0)
    updates = run(params, gradients)
    order = np.random.default_rng(seed).permutation(5)
    permuted = jax.tree.map(lambda leaf: leaf[..., order], (params, gradients))
    chex.assert_trees_all_close(run(*permuted), jax.tree.map(lambda leaf: leaf[..., order], updates), rtol=1e-14)
    scaled = jax.tree.map(lambda leaf: factor * leaf, (params, gradients))
    expected = jax.tree.map(lambda leaf: factor * leaf, run(params, gradients, eps=0.0))
    chex.assert_trees_all_close(run(*scaled, eps=0.0), expected, rtol=1e-12)


def test_infinite_clipping_changes_nothing_and_zero_gradients_stay_zero():
    params, gradients = dense_trees(0, 1.0, 1e6)
    chex.assert_trees_all_equal(run(params, gradients, np.inf), gradients)
    zeros = optax.tree.zeros_like(gradients)
    chex.assert_trees_all_equal(run(params, zeros), zeros)


def test_a_zero_bias_gets_a_gradient_of_norm_lambda_eps():
    params, gradients = dense_trees(0)
    updates = run({**params, "bias": jnp.zeros(5)}, gradients, 0.01, 1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(updates["bias"]), 0.01 * 1e-3, rtol=1e-14)


def test_norms_below_a_millionth_divide_as_a_millionth():
    params = {"kernel": jnp.full((4, 5), 1e-9), "bias": jnp.zeros(5)}
    gradients = {"kernel": jnp.full((4, 5), 1e-7), "bias": jnp.zeros(5)}
    expected = 1e-7 * (0.1 * 1e-6) / 1e-6
    np.testing.assert_allclose(run(params, gradients, 0.1, 1e-6)["kernel"], expected, rtol=1e-14)


@pytest.mark.usefixtures("standard_promotion")
def test_adam_undoes_steady_clipping():
    """Adam divides a constant factor out again, where its eps is 0; behind SGD the same clipping shows."""
    params, gradients = dense_trees(0, 1.0, 1e3)
    clipped = run(params, gradients)
    assert (norms(clipped) < 0.01 * norms(gradients)).any()

    def third_step(optimizer, gradients):
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, params)
        return updates

    adam = optax.adam(1e-3, eps=0.0)
    chex.assert_trees_all_close(third_step(adam, clipped), third_step(adam, gradients), rtol=1e-12)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(third_step(optax.sgd(0.1), clipped), third_step(optax.sgd(0.1), gradients))


# Options, dtypes, numbers that are not finite.


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("clipping", [0.05, lambda step: 0.05 * (step + 1)], ids=["number", "schedule"])
def test_clipping_may_be_injected_and_traced(clipping):
    params, gradients = dense_trees(0, 1.0, 100.0)
    tx = optax.inject_hyperparams(adaptive_grad_clip)(clipping, DENSE)
    state = tx.init(params)
    for step in range(2):
        updates, state = jax.jit(tx.update)(gradients, state, params)
        value = clipping(step) if callable(clipping) else clipping
        chex.assert_trees_all_close(updates, run(params, gradients, value), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_is_clipped_in_float32(dtype):
    """The square of a float16 gradient of 300 overflows; the norms here do not."""
    params = optax.tree.cast({"kernel": jnp.full((4, 5), 2.0), "bias": jnp.ones(5)}, dtype)
    gradients = optax.tree.cast({"kernel": jnp.full((4, 5), 300.0), "bias": jnp.full(5, 300.0)}, dtype)
    updates = run(params, gradients, 0.1)
    chex.assert_trees_all_equal_dtypes(updates, gradients)
    np.testing.assert_allclose(updates["kernel"].astype(float), 0.2, rtol=4e-3)  # of norm 0.1 * 4
    np.testing.assert_allclose(updates["bias"].astype(float), 0.1, rtol=4e-3)  # of norm 0.1 * sqrt(5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_unit_that_is_not_finite_remains_so_and_changes_no_other(bad):
    params, gradients = dense_trees(0)
    spoilt = {**gradients, "kernel": gradients["kernel"].at[1, 2].set(bad)}
    updates, expected = run(params, spoilt), run(params, gradients)
    assert not np.isfinite(updates["kernel"][:, 2]).all()
    others = np.array([0, 1, 3, 4])
    chex.assert_trees_all_equal(updates["kernel"][:, others], expected["kernel"][:, others])
    chex.assert_trees_all_equal(updates["bias"], expected["bias"])


def test_clipping_inside_of_bnp_is_by_the_norms_of_bnps_variables():
    """Under means 0 and variances 1 these are the weights themselves, divided by sqrt(1 + damping)."""
    params, gradients = dense_trees(0, 1.0, 10.0)
    inner = optax.chain(adaptive_grad_clip(0.1, DENSE), optax.scale(-1.0))
    tx = bnp.preconditioned(inner, DENSE, eps=0.0, eps_relative=0.0, scaling="none")
    state = tx.init(params)
    updates, _ = tx.update(gradients, state, params, intermediates=bnp.KEEP_STATISTICS)
    expected = jax.tree.map(jnp.negative, run(params, gradients))
    chex.assert_trees_all_close(updates, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clipping": 0.0}, "clipping must be positive, but is 0.0"),
        ({"clipping": -1}, "clipping must be positive, but is -1"),
        ({"clipping": np.nan}, "clipping must be positive, but is nan"),
        ({"eps": -1e-3}, "eps must be finite and not negative, but is -0.001"),
        ({"eps": np.inf}, "eps must be finite and not negative, but is inf"),
        ({"layers": bnp.Layers(())}, "layers holds no layer to act on"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adaptive_grad_clip(**{"clipping": 0.1, "layers": DENSE} | options)


def test_other_mistakes_are_refused():
    params, gradients = dense_trees(0)
    with pytest.raises(TypeError, match=r"layers must be a bnp_optax\.Layers.*not dict"):
        adaptive_grad_clip(0.1, {})
    tx = adaptive_grad_clip(0.1, DENSE)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(gradients, tx.init(params))
    with pytest.raises(ValueError, match="layers describes kernel, which the parameters do not hold"):
        tx.init({"weights": params["kernel"]})


# Optax's transformation, which sees shapes alone.


def both(name):
    """Returns the updates of Optax's transformation and of ours, flat."""
    layers, shapes = linen_layers(name)
    params, gradients = random_trees(shapes, LINEN[name][2])
    own, theirs = adaptive_grad_clip(0.1, layers), optax.adaptive_grad_clip(0.1)
    return tuple(flatten(jax.jit(tx.update)(gradients, tx.init(params), params)[0]) for tx in (theirs, own))


AGREES = [
    "dense",
    "convolution 2d",
    "convolution 3d",
    "grouped convolution",
    "depthwise convolution",
    "transposed convolution",
]
DIFFERS = {
    "convolution 1d": "kernel",
    "dense of one input": "kernel",
    "1x1 convolution of one channel": "kernel",
    "transposed kernel": "kernel",
    "attention": "attention/out/kernel",
    "scanned": "layer/kernel",
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", AGREES)
def test_optax_agrees_where_shapes_tell_the_units(name):
    theirs, own = both(name)
    chex.assert_trees_all_close(theirs, own, rtol=1e-14)


@pytest.mark.usefixtures("standard_promotion")
def test_optax_agrees_on_queries_keys_and_values():
    theirs, own = both("attention")
    for name in ("query", "key", "value"):
        path = f"attention/{name}/kernel"
        np.testing.assert_allclose(theirs[path], own[path], rtol=1e-14)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("name", "path"), DIFFERS.items())
def test_optax_takes_something_else_for_a_unit(name, path):
    """Ours equals the loop over units (above), so that this is a fault of the other for what the method says."""
    theirs, own = both(name)
    assert np.max(np.abs(theirs[path] - own[path]) / np.abs(own[path])) > 0.1


@pytest.mark.usefixtures("standard_promotion")
def test_optax_refuses_stacked_convolutions_of_three_dimensions():
    kernel = {"kernel": jnp.ones((2, 3, 3, 3, 4, 5))}
    with pytest.raises(ValueError, match="Use axis parameter"):
        optax.adaptive_grad_clip(0.1).update(kernel, optax.EmptyState(), kernel)
    parameter = bnp.Parameter(("kernel",), (2, 3, 3, 3, 4, 5), split=(2, 3, 3, 3, 4, 5), roles="swwwio")
    layers = bnp.Layers((bnp.Layer("Conv", parameter, None, record="kernel"),))
    updates = run(kernel, kernel, 0.1, layers=layers)
    np.testing.assert_allclose(updates["kernel"], np.full(kernel["kernel"].shape, 0.1), rtol=1e-14)


def test_a_step_of_rate_1_changes_no_unit_by_more_than_the_fraction():
    """However large the gradient is."""
    model, x = Dense(3), jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)))
    params = model.init(jax.random.key(0), x)["params"]
    layers = bnp.linen.find_layers(model, x)
    tx = optax.chain(adaptive_grad_clip(0.1, layers), optax.sgd(1.0))
    gradients = jax.grad(lambda params: 1e6 * weigh(model.apply({"params": params}, x)))(params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_array_less(
        jnp.linalg.norm(updates["kernel"], axis=0), 0.1 * jnp.linalg.norm(params["kernel"], axis=0) * (1 + 1e-12)
    )
