"""Flax's own guides to many devices, with BNP in them: their steps run as they are written, and compute what one does.

Each program takes three steps of 8 examples on eight virtual devices, which a process must ask for before JAX starts:
so these run beside.
"""

import pytest
from test_devices import measured, report_of


@pytest.fixture(scope="module")
def linen():
    return report_of("linen_guide.py")


@pytest.fixture(scope="module")
def nnx():
    return report_of("nnx_guides.py")


BLOCKS = [f"Block_{k}/Dense_0" for k in range(3)], [f"Block_{k}/out" for k in range(3)]


@pytest.mark.parametrize(
    ("case", "layers", "excluded", "shard"),
    [
        ("axes of the mesh", *BLOCKS, [4]),
        ("logical axes", *BLOCKS, [4]),
        ("logical axes, their rules and the mesh set", *BLOCKS, [4]),
        ("scanned, the mesh set", ["blocks/Dense_0", "blocks/out"], [], [3, 4]),
        ("scanned, logical axes", ["blocks/Dense_0"], ["blocks/out"], [3, 4]),
    ],
)
def test_linen_state_is_split_as_the_abstract_one(linen, case, layers, excluded, shard):
    """A `TrainState` whose sharding Flax reads from its boxes; the first momentum is that of a bias of 16 numbers."""
    result = measured(linen, case)
    assert result["movement"] > 1e-4
    assert (result["layers"], result["excluded"]) == (layers, excluded)
    assert result["state is split as told"]
    assert result["statistics are replicated"]
    assert result["shard of momentum"] == shard
    assert result["seen"] == [24]
    assert result["traces"] == 1


@pytest.mark.parametrize("case", ["miniGPT", "miniGPT, automatic axes", "miniGPT, mesh in its initializers"])
def test_mini_gpt(nnx, case):
    """Attention, dropout, an optimizer and a batch that are donated."""
    result = measured(nnx, case)
    block = "blocks/layers/0"
    attention = [f"{block}/mha/{name}" for name in ("query", "key", "value", "out")]
    assert result["layers"] == [*attention, f"{block}/mlp/layers/0", f"{block}/mlp/layers/2", "output_layer"]
    assert result["split"] >= 2 * (
        7 + 2
    )  # kernels and biases, scales and biases; the compiler may split embeddings too
    assert result["kept like parameters"]
    assert result["seen"] == [[24]]


def test_statistics_stay_replicated_where_axes_are_explicit(nnx):
    assert measured(nnx, "miniGPT")["statistics are replicated"]


@pytest.mark.parametrize(
    ("case", "layer", "split"),
    [
        ("block", "hidden", 3),
        ("stack, logical axes", "layers/hidden", 3),
        ("stack, explicit axes", "layers/hidden", 2),
        ("stack that JAX scans", "last/hidden", 6),
        ("state split by a constraint", "hidden", 3),
        ("state split as the abstract one", "hidden", 3),
    ],
)
def test_nnx_state_is_split_like_its_parameters(nnx, case, layer, split):
    """However the state came to be split."""
    result = measured(nnx, case)
    assert result["layers"] == [layer]
    assert result["split"] == split
    assert result["statistics"] == 6
    assert result["statistics are replicated"]
    assert result["kept like parameters"]
    assert result["seen"] == [[24]]


def test_a_stack_that_jax_scans_is_excluded_with_the_reason(nnx):
    """The guide scans its stack by `jax.lax.scan`, out of which no record comes."""
    excluded = measured(nnx, "stack that JAX scans")["excluded"]
    assert {name for name, reason in excluded.items() if "its record is lost" in reason} == {
        "layers/hidden/kernel",
        "layers/hidden/bias",
    }
