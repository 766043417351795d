"""NNX models under transforms: each update equals that of the same network written without them, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Wrapped, assert_moments, assert_same, make, nnx_update, normal, unstack

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")

Carry, StateAxes = nnx.Carry, nnx.StateAxes
RECORDS_IN_FRONT = {nnx.Intermediate: 0, ...: None}


def stack(size, axis=0, cls=nnx.Linear, **kwargs):
    """Returns so many layers with 3 inputs and 3 outputs as one module, and each of them."""
    each = [make(cls, 3, 3, seed=k, **kwargs) for k in range(size)]
    stacked = make(cls, 3, 3, **kwargs)
    states = [nnx.state(layer, nnx.Param) for layer in each]
    nnx.update(stacked, jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *states))
    return stacked, each


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


def skip_without_tree_mode(options):
    """Skips where Flax, in its mode without a graph, lets nothing be added to a module inside a transform."""
    if {"graph", "graph_updates"} & set(options) and not hasattr(nnx, "prefix"):
        pytest.skip("needs flax 0.12.7")


@functools.cache
def update_one_after_the_other(size, **kwargs):
    """The updates of as many layers of a stack."""
    _, each = stack(size, **kwargs)
    layers = Wrapped(nnx.List(each), lambda layers, x: [x := jnp.tanh(layer(x)) for layer in layers][-1])
    updates = nnx_update(layers, normal(0, 5, 3))["layer"]
    return [updates[k] for k in range(size)]


# of size 3, so that no size tells the stack from inputs and outputs, and others
@pytest.mark.parametrize(("scan", "size"), [*((scan, 3) for scan in SCANS), ("int", 1), ("axis 1", 4)])
def test_a_scanned_stack_equals_its_layers_one_after_the_other(scan, size):
    axis, options = SCANS[scan]
    skip_without_tree_mode(options)
    stacked, _ = stack(size, axis)
    actual = nnx_update(Wrapped(stacked, scan_in(**options)), normal(0, 5, 3))["layer"]
    assert_same(unstack(actual, size, axis), update_one_after_the_other(size))


def test_remat_and_jit_in_the_model_change_nothing():
    model, x = make(nnx.Linear, 3, 3), normal(0, 5, 3)
    expected = nnx_update(Wrapped(model, lambda layer, x: jnp.tanh(layer(layer(x)))), x)
    for transform in (nnx.remat, nnx.jit, lambda f: nnx.jit(nnx.remat(f)), lambda f: nnx.remat(f, graph_updates=False)):
        wrapped = Wrapped(model, transform(lambda layer, x: jnp.tanh(layer(layer(x)))))
        assert_same(nnx_update(wrapped, x), expected)


LISTS = {
    "remat": nnx.remat(lambda block, x: block(x)),
    "jit": nnx.jit(lambda block, x: block(x)),
    "scan": nnx.scan(lambda block, x: block(x), in_axes=(StateAxes(RECORDS_IN_FRONT), 1), out_axes=1),
    "vmap": nnx.vmap(lambda block, x: block(x), in_axes=(StateAxes(RECORDS_IN_FRONT), 1), out_axes=1),
    "cond": lambda block, x: nnx.cond(True, lambda block, x: block(x), lambda block, x: 2 * block(x), block, x),
}


@pytest.mark.parametrize("transform", LISTS)
def test_a_list_of_modules_passes_through_a_transform(transform):
    block, x = nnx.Sequential(make(nnx.Linear, 3, 4), jnp.tanh, make(nnx.Linear, 4, 2)), normal(0, 5, 4, 3)
    expected = nnx_update(Wrapped(block, lambda block, x: block(x)), x)
    assert_same(nnx_update(Wrapped(block, LISTS[transform]), x), expected)


def vmap(in_axes, x_axis, **kwargs):
    return lambda layer, x: nnx.vmap(lambda layer, x: layer(x), in_axes=(in_axes, x_axis), **kwargs)(layer, x)


@pytest.mark.parametrize("options", [{}, {"graph_updates": False}, {"graph": False}])
def test_a_vmap_over_examples_equals_the_batch(options):
    skip_without_tree_mode(options)
    model, x = make(nnx.Conv, 3, 4, (2, 2)), normal(0, 5, 6, 7, 3)
    expected = nnx_update(Wrapped(model, lambda layer, x: layer(x)), x)

    def mapped(model, x):
        graph = options.get("graph")
        axes = nnx.prefix(model, RECORDS_IN_FRONT, graph=graph) if options else StateAxes(RECORDS_IN_FRONT)
        return vmap(axes, 0, **options)(model, x)

    assert_same(nnx_update(Wrapped(model, mapped), x), expected)


def test_an_ensemble_equals_its_members():
    (stacked, each), x = stack(3, axis=1), normal(0, 5, 3)
    actual = nnx_update(Wrapped(stacked, vmap(StateAxes({nnx.Intermediate: 0, ...: 1}), None)), x)
    expected = nnx_update(Wrapped(nnx.List(each), lambda layers, x: jnp.stack([layer(x) for layer in layers])), x)
    assert_same(unstack(actual["layer"], 3, axis=1), list(expected["layer"].values()))


def test_a_loop_over_positions_equals_one_call():
    model, x = make(nnx.Linear, 3, 3), normal(0, 5, 4, 3)
    expected = nnx_update(Wrapped(model, lambda layer, x: layer(x)), x)
    loop = nnx.scan(lambda layer, x: layer(x), in_axes=(StateAxes(RECORDS_IN_FRONT), 1), out_axes=1)
    assert_same(nnx_update(Wrapped(model, loop), x), expected)
    assert bnp.nnx.find_layers(Wrapped(model, loop), x)["layer"].record_axes == "r"


@pytest.mark.parametrize("outer", ["s", "e"])
def test_nested_maps_have_the_axes_of_both_in_order(outer):
    (stacked, each), x = stack(3), normal(0, 3, 3)
    shared = StateAxes(RECORDS_IN_FRONT)
    over = {"s": (0, None), "e": (shared, 0)}
    inner = "e" if outer == "s" else "s"
    call = nnx.vmap(nnx.vmap(lambda layer, x: layer(x), in_axes=over[inner]), in_axes=over[outer])
    model = Wrapped(stacked, call)
    assert bnp.nnx.find_layers(model, x)["layer"].record_axes == outer + inner
    shape = (lambda y: y) if outer == "s" else (lambda y: y.swapaxes(0, 1))
    expected = nnx_update(
        Wrapped(nnx.List(each), lambda layers, x: shape(jnp.stack([layer(x) for layer in layers]))), x
    )
    assert_same(unstack(nnx_update(model, x)["layer"], 3), list(expected["layer"].values()))


@pytest.mark.parametrize(("outer", "inner"), [(0, 0), (1, 0), (0, 1), (2, 0)])
def test_a_scan_in_a_scan_has_a_stack_of_two_axes(outer, inner):
    model, each = stack(9, use_bias=False)
    grid = np.reshape([layer.kernel[...] for layer in each], (3, 3, 3, 3))
    model.kernel = nnx.Param(jnp.asarray(np.moveaxis(np.moveaxis(grid, 1, 1 + inner), 0, outer)))
    axes = [(StateAxes({nnx.Intermediate: 0, ...: axis}), Carry) for axis in (outer, inner)]
    twice = nnx.scan(scan_in(in_axes=axes[1]), in_axes=axes[0], out_axes=Carry)
    actual = nnx_update(Wrapped(model, twice), normal(0, 5, 3))["layer"]["kernel"]
    actual = np.moveaxis(np.moveaxis(actual, outer, 0), 1 + inner, 1).reshape(9, 3, 3)
    assert_same(list(actual), [layer["kernel"] for layer in update_one_after_the_other(9, use_bias=False)])


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("axis", [1, -1])
def test_records_with_their_axis_elsewhere_are_excluded(axis, size):
    stacked, _ = stack(size)
    for stacked_axis, layer in ((0, stacked), (None, make(nnx.Linear, 3, 3))):
        over = (StateAxes({nnx.Intermediate: axis, ...: stacked_axis}), None if stacked_axis == 0 else 0)
        call = nnx.vmap(lambda layer, x: layer(x), in_axes=over)
        layers = bnp.nnx.find_layers(Wrapped(layer, call), normal(0, size, 3))
        assert [other.path[0] for other in layers.excluded] == ["layer", "layer"]
        assert "where its record is lost" in layers.excluded[0].reason


def test_a_stack_that_shares_a_bias_or_a_loop_that_changes_its_kernel_is_excluded():
    stacked, _ = stack(3)
    stacked.bias = nnx.Param(jnp.ones(3))
    over = StateAxes({nnx.PathContains("bias"): None, ...: 0})
    (reason,) = {
        other.reason
        for other in bnp.nnx.find_layers(Wrapped(stacked, scan_in(in_axes=(over, Carry))), normal(0, 5, 3)).excluded
    }
    assert reason == "its kernel and bias are stacked along different axes"

    def halve(layer, x):
        y = layer(x)
        layer.kernel[...] /= 2
        return y

    over = StateAxes({nnx.Intermediate: 0, ...: Carry})
    call = lambda layer, x: nnx.scan(halve, in_axes=(over, Carry), out_axes=Carry, length=2)(layer, x)  # noqa: E731
    layers = bnp.nnx.find_layers(Wrapped(make(nnx.Linear, 3, 3), call), normal(0, 5, 3))
    assert "computed from others" in layers.excluded[0].reason


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
    layers = bnp.nnx.find_layers(model, normal(0, 5, 3))
    assert bnp.nnx.find_layers(model, normal(0, 5, 3)) == layers  # the search before did not fill a cache
    assert [other.path[1] for other in layers.excluded] == ["bias", "kernel"]
    assert "where its record is lost" in layers.excluded[0].reason


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: jax.vmap(lambda x: layer(x))(x),
        lambda layer, x: nnx.jit(lambda x: layer(x))(x),
        vmap(None, 0),
        scan_in(in_axes=(StateAxes({nnx.Intermediate: Carry, ...: None}), Carry), length=2),
        lambda layer, x: nnx.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: x, layer, x),
        lambda layer, x: nnx.fori_loop(0, 2, lambda _, v: (v[0], v[0](v[1])), (layer, x))[1],
    ],
    ids=["jax", "closure", "vmap", "scan", "cond", "loop"],
)
def test_a_layer_whose_record_cannot_come_out_is_excluded_and_the_others_are_recorded(call):
    inner = Wrapped(make(nnx.Linear, 3, 3), call)
    model, x = Wrapped(nnx.List([make(nnx.Linear, 3, 3), inner]), lambda both, x: both[1](both[0](x))), normal(0, 5, 3)
    layers = bnp.nnx.find_layers(model, x)
    assert list(layers) == ["layer/0"]
    assert {"/".join(other.path) for other in layers.excluded} == {"layer/1/layer/kernel", "layer/1/layer/bias"}
    assert all("called where its record is lost" in other.reason for other in layers.excluded)
    y, records = bnp.nnx.capture(model, layers=layers)(x)
    np.testing.assert_array_equal(y, model(x))
    assert_moments(records["layer/0"], np.asarray(x), examples=5)


def test_a_pass_that_closes_over_a_module_is_an_error_that_says_what_to_do():
    model, x = Wrapped(make(nnx.Linear, 3, 3), lambda layer, x: jax.vmap(lambda x: layer(x))(x)), normal(0, 5, 3)
    with pytest.raises(ValueError, match=r"The input of layer cannot .*closes over the module") as error:
        bnp.nnx.capture(model)(x)
    assert "nnx.StateAxes({nnx.Intermediate: 0, ...: None})" in str(error.value)


def test_both_branches_of_a_condition_record():
    call = lambda layer, x: nnx.cond(x.sum() > 0, lambda m, x: m(x), nnx.remat(lambda m, x: m(2 * x)), layer, x)  # noqa: E731
    model, x = Wrapped(make(nnx.Linear, 3, 3), call), normal(0, 5, 3)
    assert list(bnp.nnx.find_layers(model, x)) == ["layer"]
    for sign in (1, -1):
        x = jnp.abs(x) * sign
        _, records = bnp.nnx.capture(model)(x)
        assert_moments(records["layer"], np.asarray(x if sign > 0 else 2 * x), examples=5)


def test_a_layer_called_inside_and_outside_of_a_transform_is_excluded():
    call = lambda layer, x: layer(vmap(StateAxes(RECORDS_IN_FRONT), 0)(layer, x))  # noqa: E731
    model, x = Wrapped(make(nnx.Linear, 3, 3), call), normal(0, 5, 3)
    layers = bnp.nnx.find_layers(model, x)
    assert {other.reason for other in layers.excluded} == {
        "called both inside and outside of a transform that adds an axis"
    }
    with pytest.raises(ValueError, match="both inside and outside of a transform"):
        bnp.nnx.capture(model)(x)
