import itertools
import math
import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
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


def numbers_shown(ranges):
    """Expands ``1-3,9`` to 1, 2, 3, 9, and ``0,2,...,8`` to 0, 2, 4, 6, 8; as many digits as the first has."""
    numbers = []
    for part in re.findall(r"\d+,\d+,\.\.\.,\d+|\d+-\d+|\d+", ranges):
        first, *rest = re.findall(r"\d+", part)
        step = int(rest[0]) - int(first) if len(rest) == 2 else 1
        last = int(rest[-1] if rest else first)
        numbers += [str(n).zfill(len(first)) for n in range(int(first), last + 1, step)]
        assert numbers[-1] == (rest[-1] if rest else first)
    return numbers


def paths_shown(row):
    """Expands the first column of a row to the paths that it stands for."""
    name, _, count = row.strip().partition(" (")
    texts, ranges = re.split(r"\[.*?\]", name), re.findall(r"\[(.*?)\]", name)
    combinations = itertools.product(*map(numbers_shown, ranges))
    paths = [texts[0] + "".join(map("".join, zip(numbers, texts[1:], strict=True))) for numbers in combinations]
    assert len(paths) == int(count.removesuffix(")") or 1)
    return paths


words = st.sampled_from(["unit", "a_module_of_a_name_longer_than_forty_characters_"])
names = st.builds("{}{}".format, words, st.sampled_from(["", *"01289", "10", "00", "01", "02", "09", "010"]))
paths = st.lists(names, min_size=1, max_size=2).map(tuple)


@settings(max_examples=200)
@given(st.dictionaries(paths, st.integers(1, 2), min_size=1))
def test_table_names_every_path_once(outputs):
    """Of each path two parameters, of which one is in a layer and one excluded."""
    layers = bnp.Layers(
        tuple(bnp.Layer.dense((*path, "kernel"), (2, size)) for path, size in outputs.items()),
        tuple(bnp.Excluded((*path, "scale"), (size,), "scale") for path, size in outputs.items()),
    )
    included, excluded, _ = str(layers).split("\n\n")
    shown = {}
    for row in included.splitlines()[1:]:
        name, _, kernel, *_, parameters = re.split(" {2,}", row)
        assert int(parameters.replace(",", "")) == len(paths_shown(name)) * math.prod(map(int, kernel.split("x")))
        shown[name] = [(path, kernel) for path in paths_shown(name)]
    assert len(shown) == len(included.splitlines()) - 1
    assert sorted(itertools.chain(*shown.values())) == sorted(
        ("/".join(path), f"2x{size}") for path, size in outputs.items()
    )

    pairs = [re.split(" {2,}", row.strip()) for row in excluded.splitlines()[1:]]
    shown = [(path, int(size)) for name, size in pairs for path in paths_shown(name)]
    assert sorted(shown) == sorted((f"{'/'.join(path)}/scale", size) for path, size in outputs.items())


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        ([f"unit{k:02}" for k in range(1, 13)], ["unit[01-12] (12)"]),
        ([f"unit{k}" for k in (1, 2, 9)], ["unit[1-2,9] (3)"]),
        (["unit1", "unit01", "unit2"], ["unit[1-2,01] (3)"]),
        (["unit9", "unit09", "unit010"], ["unit[9,09,010] (3)"]),
        ([f"layers_{k}" for k in range(0, 10, 2)], ["layers_[0,2,...,8] (5)"]),
        ([f"b{k}/w{n}" for k in range(3) for n in range(2)], ["b[0-2]/w[0-1] (6)"]),
        (["b0/w0", "b0/w1", "b1/w0", "b2/w0"], ["b[0-2]/w0 (3)", "b0/w1"]),
        (["b0/w0", "b1/w1", "b2/w2"], ["b0/w0", "b1/w1", "b2/w2"]),
        (["b0", "b1"], ["b0", "b1"]),
        (["b#", "b1", "b2"], ["b#", "b1", "b2"]),
    ],
)
def test_table_folds_full_grids_of_numbers(names, rows):
    layers = bnp.Layers((), tuple(bnp.Excluded(tuple(name.split("/")), (3,), "scale") for name in names))
    _, *lines = str(layers).split("\n\n")[0].splitlines()
    assert [re.split(" {2,}", line.strip()) for line in lines] == [[row, "3"] for row in rows]


def test_table_of_a_hundred_blocks_has_two_rows():
    layers = bnp.Layers(
        tuple(
            bnp.Layer.dense((f"block_{k}", f"dense_{n}", "kernel"), (16, 16 if k % 50 else 8))
            for k in range(100)
            for n in range(2)
        )
    )
    _, first, second, *_ = str(layers).splitlines()
    assert first.startswith("block_[0,50]/dense_[0-1] (4) ")
    assert first.endswith(f" {4 * 128}")
    assert second.startswith("block_[1-49,51-99]/dense_[0-1] (196) ")
    assert second.endswith(f" {196 * 256:,}")
