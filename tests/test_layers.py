import math
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bnp_optax as bnp

sizes = st.integers(1, 4)


def two_layers():
    return bnp.Layers(
        (
            bnp.Layer.dense(("first", "kernel"), (8, 4), bias=("first", "bias")),
            bnp.Layer.dense(("second", "kernel"), (4, 2)),
        ),
        (bnp.Excluded(("embed", "embedding"), (10, 8), "embedding"),),
    )


@given(st.lists(st.tuples(st.sampled_from("sgwo"), sizes), max_size=6), st.integers(0, 6), sizes)
def test_canonical_is_an_einsum_of_the_roles(axes, where, inputs):
    axes.insert(min(where, len(axes)), ("i", inputs))
    roles, shape = "".join(role for role, _ in axes), tuple(size for _, size in axes)
    parameter = bnp.Parameter(("kernel",), shape, shape, roles)
    array = np.arange(math.prod(shape)).reshape(shape)

    names = string.ascii_lowercase[: len(roles)]
    ordered = "".join(names[k] for role in "sgiwo" for k in range(len(roles)) if roles[k] == role)
    expected = np.einsum(f"{names}->{ordered}", array).reshape([parameter.axis_size(role) for role in "sgiwo"])

    canonical = parameter.to_canonical(array)
    np.testing.assert_array_equal(canonical, expected)
    np.testing.assert_array_equal(parameter.from_canonical(canonical), array)


@given(st.integers(1, 3), sizes, sizes, sizes, st.lists(st.tuples(st.integers(0, 9), sizes), min_size=1, max_size=3))
def test_lifted_parameter_stacks_its_slices_outermost_transform_first(window, inputs, groups, outputs, lifts):
    """A grouped convolution's kernel; each lift adds an axis somewhere, and the last one is the outermost."""
    inner = bnp.Parameter(
        ("kernel",), (window, inputs, groups * outputs), (window, inputs, groups, outputs), roles="wigo"
    )
    lifted, axes = inner, []
    for position, size in lifts:
        axes.append(position % (len(lifted.shape) + 1))
        lifted = lifted.lift(axes[-1], size)
    stack = tuple(size for _, size in reversed(lifts))
    assert lifted.stack_shape == (*stack, 1)
    array = np.arange(lifted.size).reshape(lifted.shape)
    canonical = np.reshape(lifted.to_canonical(array), (*stack, groups, inputs, window, outputs))
    for entry in np.ndindex(stack):
        part = array
        for axis, k in zip(reversed(axes), entry, strict=True):
            part = np.take(part, k, axis)
        np.testing.assert_array_equal(canonical[entry], inner.to_canonical(part)[0])
    np.testing.assert_array_equal(lifted.from_canonical(lifted.to_canonical(array)), array)


def test_grouped_output_axis_is_group_major():
    parameter = bnp.Parameter(("bias",), (6,), (2, 3), "go")
    np.testing.assert_array_equal(parameter.to_canonical(np.arange(6)), [[[0, 1, 2], [3, 4, 5]]])


@pytest.mark.parametrize(
    ("shape", "split", "roles"), [((4, 3), (4, 2), "io"), ((4, 3), (4, 3), "ioo"), ((4, 3), (4, 3), "ix")]
)
def test_impossible_split_is_refused(shape, split, roles):
    with pytest.raises(ValueError, match=r"a/kernel: shape \(4, 3\) cannot be split into"):
        bnp.Parameter(("a", "kernel"), shape, split, roles)


def test_layers_is_an_immutable_hashable_mapping():
    layers = two_layers()
    assert list(layers) == ["first", "second"]
    assert layers["second"].fan_in == 4
    assert "third" not in layers
    assert layers == two_layers()
    assert hash(layers) == hash(two_layers())
    with pytest.raises(AttributeError):
        layers.included = ()


def test_path_of_a_kernel_at_the_root_or_of_another_name():
    assert bnp.Layer.dense(("kernel",), (2, 2)).path == "kernel"
    assert bnp.Layer.dense(("moe", "w_in"), (2, 2)).path == "moe/w_in"
    assert bnp.Layer.dense(("moe", "w_in"), (2, 2)).record == "moe/w_in"


def test_select_lists_what_it_dropped():
    layers = two_layers().select(lambda layer: layer.path == "second")
    assert list(layers) == ["second"]
    dropped = {other.path: other.reason for other in layers.excluded}
    assert dropped == {
        ("embed", "embedding"): "embedding",
        ("first", "kernel"): "not selected",
        ("first", "bias"): "not selected",
    }


def test_one_parameter_belongs_to_one_layer():
    layer = bnp.Layer.dense(("a", "kernel"), (2, 2), bias=("a", "bias"))
    other = bnp.Layer.dense(("b", "kernel"), (2, 2), bias=("a", "bias"))
    with pytest.raises(ValueError, match="same parameter: a/bias"):
        bnp.Layers((layer, other))


def test_table_counts_what_is_covered():
    lines = str(two_layers()).splitlines()
    assert lines[1].split() == ["first", "Dense", "8x4", "8", "kernel,", "bias", "36"]
    assert lines[4:6] == ["Excluded: embedding", "  embed/embedding  10x8"]
    assert lines[-1] == "2 layers cover 44 of 124 parameters (35.5%)."
    assert str(bnp.Layers(())).startswith("0 layers cover 0 of 0 parameters (0.0%).")


def test_table_folds_repeated_blocks_and_fits_a_terminal():
    path = ("a_module_with_quite_a_long_name", "of_another", "block_{}", "dense_{}", "kernel")
    layers = bnp.Layers(
        tuple(bnp.Layer.dense(tuple(part.format(k) for part in path), (16, 16 if k % 50 else 8)) for k in range(100)),
        tuple(bnp.Excluded((f"norm_{k}", "scale"), (16,), "scale of a normalization") for k in range(100)),
    )
    lines = str(layers).splitlines()
    assert len(lines) < 12
    assert max(map(len, lines)) <= 100
    assert any(line.endswith(f"{98 * 256:,}") and "block_[1-99]/dense_[1-99] (98)" in line for line in lines)
    assert "  norm_[0-99]/scale (100)  16" in lines
    assert sum("256" in line or "128" in line for line in lines) >= 2
