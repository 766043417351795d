"""What all layers of contrib that take BatchNorm's place keep of it: arguments, masks, devices, dtypes, transforms."""

import dataclasses
import inspect
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same, normal, weigh
from normalizations import APIS, BATCH_NORMS, LAYERS, all_layers, both_apis, functional, layer_class, steps_of
from test_devices import report_of

from bnp_optax.contrib.normalization import batch_moments, feature_axes

pytestmark = pytest.mark.usefixtures("x64")

# Arguments and calls.


@all_layers
def test_linen_layers_take_all_arguments_of_batch_norm_in_its_order_with_its_defaults(name):
    def arguments(cls):
        return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in ("parent", "name")}

    theirs, ours = arguments(nn.BatchNorm), arguments(layer_class("linen", name))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {argument: ours[argument] for argument in theirs} == theirs


@all_layers
def test_nnx_layers_take_all_arguments_of_batch_norm_with_its_defaults(name):
    _, features, *arguments = inspect.signature(nnx.BatchNorm.__init__).parameters.values()
    defaults = {argument.name: argument.default for argument in arguments if argument.name != "rngs"}
    cls = layer_class("nnx", name)
    given = cls(4, rngs=nnx.Rngs(0), **LAYERS[name], **defaults)
    implied = cls(**{features.name: 4}, rngs=nnx.Rngs(0), **LAYERS[name])
    batch_norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    for argument in defaults.keys() - {"bias_init", "scale_init", "bias_metadata", "scale_metadata"}:
        assert getattr(given, argument) == getattr(implied, argument) == getattr(batch_norm, argument)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(given)), nnx.to_pure_dict(nnx.state(implied)))
    with pytest.raises(TypeError, match="no_such_argument"):
        cls(4, rngs=nnx.Rngs(0), **LAYERS[name], no_such_argument=1)


@all_layers
def test_initializers_and_metadata_of_nnx(name):
    layer = layer_class("nnx", name)(
        4,
        rngs=nnx.Rngs(0),
        scale_init=nn.initializers.constant(2.0),
        bias_init=nn.initializers.constant(3.0),
        bias_metadata={"of": "bias"},
        scale_metadata={"of": "scale"},
        **LAYERS[name],
    )
    assert (layer.scale.of, layer.bias.of) == ("scale", "bias")
    np.testing.assert_array_equal(layer.scale[...], 2.0)
    np.testing.assert_array_equal(layer.bias[...], 3.0)


@both_apis
@all_layers
def test_the_call_has_the_signature_of_batch_norm(api, name):
    theirs, ours = (inspect.signature(cls.__call__).parameters for cls in (BATCH_NORMS[api], layer_class(api, name)))
    described = [[(p.name, p.kind, p.default) for p in parameters.values()] for parameters in (theirs, ours)]
    assert described[0] == described[1]


@both_apis
@all_layers
def test_scale_and_bias_can_be_left_out(api, name):
    x = normal(0, 6, 4)
    bare = functional(api, name, x, use_scale=False, use_bias=False)
    assert not {"scale", "bias"} & {key for key, value in bare.state.items() if value is not None}
    full = functional(api, name, x, scale_init=nn.initializers.constant(2.0), bias_init=nn.initializers.constant(3.0))
    assert_same(full.train(full.state, x)[0], 2 * bare.train(bare.state, x)[0] + 3)
    assert_same(full.evaluate(full.state, x), 2 * bare.evaluate(bare.state, x) + 3)


@all_layers
def test_whether_to_use_running_statistics_must_be_said(name):
    x = normal(0, 6, 4)
    linen = layer_class("linen", name)(**LAYERS[name])
    with pytest.raises(ValueError, match="use_running_average"):
        linen.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="use_running_average"):
        linen.clone(use_running_average=True).init(jax.random.key(0), x, use_running_average=True)
    layer = layer_class("nnx", name)(4, use_running_average=None, rngs=nnx.Rngs(0), **LAYERS[name])
    with pytest.raises(ValueError, match=f"{name} was not told .* use_running_average=False in training"):
        layer(x)


@all_layers
def test_linen_init_changes_no_statistics_and_needs_no_axis(name):
    x = normal(0, 6, 4)
    layer = functional("linen", name, x, axis_name="devices", axis_index_groups=[[0, 1], [2, 3]])
    for key in layer.state.keys() & {"mean", "std", "var", "scale", "bias", "steps"}:
        np.testing.assert_array_equal(layer.state[key], 1.0 if key in ("std", "var", "scale") else 0.0)
    # With the batch's own statistics, as nn.BatchNorm does there.
    y, _ = layer_class("linen", name)(axis_name="devices", param_dtype=float, **LAYERS[name]).init_with_output(
        jax.random.key(0), x, use_running_average=False
    )
    free = functional("linen", name, x)
    assert_same(y, free.train(free.state, x)[0])


@both_apis
@all_layers
def test_evaluation_changes_nothing_and_sees_each_example_alone(api, name):
    x = normal(0, 6, 4)
    layer = functional(api, name, x)
    _, state = layer.train(layer.state, x)
    y = layer.evaluate(state, x)  # Linen would raise if it changed a collection that is not mutable
    assert_same(jnp.concatenate([layer.evaluate(state, row[None]) for row in x]), y)
    assert np.abs(y - layer.train(state, x)[0]).max() > 0.1


@all_layers
def test_nnx_modes_and_views(name):
    x = normal(0, 6, 4)
    layer = layer_class("nnx", name)(4, param_dtype=float, rngs=nnx.Rngs(0), **LAYERS[name])
    layer(x)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(layer)))
    layer.eval()
    y = layer(x)
    np.testing.assert_array_equal(nnx.view(layer, use_running_average=True)(x), y)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(layer)), before)
    layer.train()
    assert np.abs(layer(x) - y).max() > 0.1
    assert np.abs(layer.mean[...] - before["mean"]).max() > 1e-3


@all_layers
@pytest.mark.parametrize(
    ("shape", "options"),
    [((5, 4), {}), ((5, 3, 2, 4), {"use_fast_variance": False}), ((5, 4, 3), {"axis": 1, "momentum": 0.7})],
)
def test_linen_and_nnx_agree_bit_for_bit(name, shape, options):
    batches = [normal(seed, *shape) for seed in range(3)]
    mask = jnp.arange(5).reshape(5, *[1] * (len(shape) - 1)) != 2
    results = []
    for api in APIS:
        layer = functional(api, name, batches[0], **options)
        outputs, state = steps_of(layer, batches, mask=mask)
        results.append((outputs, state, layer.evaluate(state, batches[0])))
    chex.assert_trees_all_equal(*results)


# Masks.


@both_apis
@all_layers
@pytest.mark.parametrize("fast", [True, False])
def test_a_mask_makes_the_batch_that_has_not_what_it_hides(api, name, fast):
    """In statistics, in what it shows, and in gradients; what is hidden need not be finite."""
    x, shown = normal(0, 7, 3, 4), jnp.array([True, False, True, True, False, True, True])
    layer = functional(api, name, x, use_fast_variance=fast)

    def loss(x, **mask):
        y, state = layer.train(layer.state, x, **mask)
        y = y[shown] if mask else y
        return weigh(y), (y, state)

    ours, (y, state) = jax.grad(loss, has_aux=True)(x, mask=shown[:, None, None])
    expected, (y_expected, state_expected) = jax.grad(loss, has_aux=True)(x[shown])
    assert_same((y, state, ours[shown]), (y_expected, state_expected, expected))
    np.testing.assert_array_equal(ours[~shown], 0)
    broken = jnp.where(shown[:, None, None], x, jnp.nan)
    assert_same(loss(broken, mask=shown[:, None, None].astype(int))[1], (y, state))


@both_apis
@all_layers
def test_what_a_mask_hides_entirely_leaves_statistics_as_they_are(api, name):
    """`nn.BatchNorm` averages over nothing there, and is not a number ever after."""
    x = normal(0, 6, 4)
    layer = functional(api, name, x)
    _, state = layer.train(layer.state, x)
    y, after = layer.train(state, x, mask=jnp.zeros((6, 1), bool))
    after.pop("steps", None)
    chex.assert_trees_all_equal(after, {key: value for key, value in state.items() if key != "steps"})
    assert_same(y, layer.evaluate(state, x))
    # Some features alone, of whole groups: the others move as without a mask.
    y, after = layer.train(state, x, mask=jnp.array([[True, True, False, False]]))
    _, moved = layer.train(state, x)
    deviation = "std" if "std" in state else "var"
    for key in ("mean", deviation):
        hidden = slice(len(state[key]) // 2, None)
        expected = moved[key].at[hidden].set(state[key][hidden])
        assert_same(after[key], expected)
        assert np.abs(moved[key] - after[key])[hidden].min() > 1e-4
    x = x.astype(jnp.float32)
    theirs = functional(api, "BatchNorm", x, param_dtype=jnp.float32)
    assert np.isnan(theirs.train(theirs.state, x, mask=jnp.zeros((6, 1), bool))[1]["mean"]).all()


@both_apis
@all_layers
@pytest.mark.parametrize("shape", [(6,), (6, 2), (1, 6, 4)])
def test_a_mask_that_does_not_fit_is_refused(api, name, shape):
    x = normal(0, 6, 4)
    layer = functional(api, name, x)
    with pytest.raises(ValueError, match=r"mask has shape .* cannot be broadcast to .* \(6, 4\)\. .*mask\[:, None"):
        layer.train(layer.state, x, mask=jnp.ones(shape, bool))


# Devices.


@both_apis
@all_layers
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("hidden", [None, (0, 1, 2, 5), tuple(range(12))])
def test_a_named_axis_pools_the_whole_batch(api, name, fast, hidden):
    """Also where devices hide different numbers of examples, or one of them all of its own."""
    x = normal(0, 12, 4)
    shown = None if hidden is None else jnp.array([k not in hidden for k in range(12)])[:, None]
    whole = functional(api, name, x, use_fast_variance=fast)
    split = functional(api, name, x, use_fast_variance=fast, axis_name="devices")
    masks = {} if shown is None else {"mask": shown}

    def per_device(x, **masks):
        return split.train(split.state, x, **masks)

    parts = {key: mask.reshape(4, 3, 1) for key, mask in masks.items()}
    y, states = jax.vmap(per_device, axis_name="devices")(x.reshape(4, 3, 4), **parts)
    y_expected, expected = whole.train(whole.state, x, **masks)
    assert_same(y.reshape(12, 4), y_expected)
    for device in range(4):
        assert_same(jax.tree.map(lambda leaf, k=device: leaf[k], states), expected)


@pytest.fixture(scope="module")
def report():
    return report_of("normalization_on_devices.py")


@both_apis
@all_layers
@pytest.mark.parametrize("scheme", ["shard_map", "pmap", "jit", "groups"])
def test_devices_equal_the_whole_batch(report, api, name, scheme):
    """Outputs, gradients and statistics; with groups of devices, those of each group's batch."""
    result = report[f"{api} {name} {scheme}"]
    assert not isinstance(result, str), result
    assert result < 1e-12


# Dtypes.


@both_apis
@all_layers
@pytest.mark.usefixtures("standard_promotion")
def test_statistics_of_bfloat16_are_float32(api, name):
    x = normal(0, 64, 4, mean=3).astype(jnp.bfloat16)
    layer = functional(api, name, x, param_dtype=jnp.bfloat16)
    y, state = layer.train(layer.state, x)
    wide = functional(api, name, x.astype(jnp.float32), param_dtype=jnp.float32)
    expected, wide_state = wide.train(wide.state, x.astype(jnp.float32))
    assert state["mean"].dtype == jnp.float32
    del state["scale"], state["bias"], wide_state["scale"], wide_state["bias"]
    chex.assert_trees_all_equal(state, wide_state)
    np.testing.assert_array_equal(y, expected.astype(y.dtype))


@both_apis
@all_layers
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32, jnp.float64])
def test_results_have_the_dtype_of_batch_norm_and_states_keep_theirs(api, name, dtype):
    for x_dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.int32):
        for param_dtype in (jnp.bfloat16, jnp.float32):
            x = normal(0, 6, 4).astype(x_dtype)
            options = {"param_dtype": param_dtype, "dtype": dtype}
            ours, theirs = (functional(api, cls, x, **options) for cls in (name, "BatchNorm"))
            y, state = jax.eval_shape(ours.train, ours.state, x)
            with warnings.catch_warnings(action="ignore"):  # Flax's class of NNX writes float64 into its float32
                expected, _ = jax.eval_shape(theirs.train, theirs.state, x)
            assert y.dtype == jax.eval_shape(ours.evaluate, ours.state, x).dtype == expected.dtype
            chex.assert_trees_all_equal_dtypes(state, ours.state)


@all_layers
@pytest.mark.usefixtures("standard_promotion")
def test_linen_statistics_may_be_narrow(name):
    x = normal(0, 6, 4).astype(jnp.bfloat16)
    layer = functional("linen", name, x, param_dtype=jnp.bfloat16, force_float32_reductions=False)
    y, state = layer.train(layer.state, x)
    assert {value.dtype for key, value in state.items() if key != "steps"} == {jnp.dtype(jnp.bfloat16)}
    wide = functional("linen", name, x, param_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(y, wide.train(wide.state, x)[0])


@all_layers
@pytest.mark.usefixtures("standard_promotion")
def test_nnx_promote_dtype_says_the_dtype_of_the_result(name):
    def promote(arrays, /, *, dtype=None, inexact=True):
        return tuple(None if array is None else array.astype(jnp.float16) for array in arrays)

    x = normal(0, 6, 4).astype(jnp.float32)
    narrow = functional("nnx", name, x, param_dtype=jnp.float32, promote_dtype=promote)
    wide = functional("nnx", name, x, param_dtype=jnp.float32)
    (y, state), (expected, wide_state) = narrow.train(narrow.state, x), wide.train(wide.state, x)
    np.testing.assert_array_equal(y, expected.astype(jnp.float16))
    chex.assert_trees_all_equal(state, wide_state)


@both_apis
@all_layers
def test_the_slow_variance_keeps_digits_that_the_fast_one_loses(api, name):
    x = (normal(0, 64, 4) + 1000).astype(jnp.float32)
    exact = functional(api, name, x.astype(float))
    expected, _ = exact.train(exact.state, x.astype(float))
    errors = []
    for fast in (True, False):
        layer = functional(api, name, x, param_dtype=jnp.float32, use_fast_variance=fast)
        errors.append(np.abs(np.asarray(layer.train(layer.state, x)[0]) - np.asarray(expected)).max())
    assert errors[1] < 1e-3 < errors[0]


# Inputs that do not fit.


@both_apis
@all_layers
def test_inputs_that_do_not_fit_are_refused(api, name):
    x = normal(0, 6, 4)
    layer = functional(api, name, x)
    with pytest.raises(TypeError, match="of real numbers"):
        layer.train(layer.state, x.astype(complex))
    with pytest.raises(TypeError, match="of real numbers"):
        layer.evaluate(layer.state, x.astype(complex))
    with pytest.raises(ValueError, match=r"axis is 2, but the input has 2 axes"):
        functional(api, name, x, axis=2, features=4).train(layer.state, x)
    if api == "nnx":  # Flax compares Linen's shapes
        other = functional(api, name, normal(0, 6, 8))
        with pytest.raises(ValueError, match=r"is of (8|2) features, but an input of shape \(6, 4\) has 4"):
            other.train(other.state, x)
        with pytest.raises(ValueError, match=r"is of 8 features, but an input of shape \(6, 4\) has 4"):
            other.evaluate(other.state, x)


@both_apis
def test_renorm_of_several_feature_axes(api):
    """The statistics of each feature of an image are those of the image made flat."""
    x = normal(0, 6, 3, 4)
    layer = functional(api, "BatchRenorm", x, axis=(1, 2), features=12)
    flat = functional(api, "BatchRenorm", x.reshape(6, 12))
    (y, state), (expected, flat_state) = layer.train(layer.state, x), flat.train(flat.state, x.reshape(6, 12))
    assert_same(y.reshape(6, 12), expected)
    assert_same(state["std"].ravel(), flat_state["std"])
    assert_same(layer.evaluate(state, x).reshape(6, 12), flat.evaluate(flat_state, x.reshape(6, 12)))


@both_apis
@all_layers
def test_the_axis_of_the_features_may_be_any(api, name):
    x = normal(0, 6, 3, 5, 4)
    last, first = functional(api, name, x), functional(api, name, jnp.moveaxis(x, -1, 1), axis=1)
    (y, state), (moved, moved_state) = last.train(last.state, x), first.train(first.state, jnp.moveaxis(x, -1, 1))
    assert_same(jnp.moveaxis(moved, 1, -1), y)
    assert_same(moved_state, state)


def test_moments():
    x = normal(0, 5, 3, 4)
    moments = batch_moments(x, feature_axes(3, (0, -1)))
    assert_same(moments.mean, np.mean(x, 1, keepdims=True))
    assert_same(moments.variance, np.var(x, 1, keepdims=True))
    nothing = batch_moments(x[:0], (2,))
    assert not nothing.observed.any()
    assert not nothing.variance.any()
