"""The comparison of what there is in BN's place."""

import jax
import numpy as np
import pytest

import comparison
import methods
import runs
from comparison import METHODS, Cost, Method

X, Y = np.random.default_rng(0).random((1, 8, 8, 3), np.float32), np.array([3])


@pytest.mark.parametrize(
    ("kind", "learns"),
    [
        ("none", True),
        ("BN", False),
        ("GN", True),
        ("BGN", True),
        ("BRN", False),
        ("IEBN", False),
        ("MN", False),
        ("standardized", True),
    ],
)
def test_what_learns_from_one_example(kind, learns):
    """BN makes nothing of a batch of one in a dense layer, and what takes its statistics neither."""
    assert (comparison.signal(Method("", kind), X, Y) > comparison.SIGNAL) == learns


def test_every_kind_of_network_is_named_in_the_test_above():
    kinds = {method.normalization for method in METHODS.values()}
    assert kinds == {"none", "BN", "GN", "BGN", "BRN", "IEBN", "MN", "standardized"}


def test_the_short_form_and_its_tables(tmp_path, capsys):
    methods.main(["comparison", "--quick", "--results", str(tmp_path), "--workers", "1"])
    rows = runs.read_rows(tmp_path / comparison.COSTS, Cost)
    assert [row.method for row in rows] == list(comparison.QUICK_METHODS)
    assert rows[0].ratio == rows[0].memory_ratio == 1
    # BN: mean and variance of 32 + 32 + 64 + 64 channels, and the momentum of as many scales and biases
    assert [row.state for row in rows] == [0, 4 * 192]
    [table] = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("| method | it changes")]
    assert [line.split(" | ")[0] for line in table.strip().splitlines()[-2:]] == ["| none", "| BN"]
    before = (tmp_path / comparison.COSTS).read_text()
    methods.main(["comparison", "--quick", "--results", str(tmp_path), "--workers", "1"])
    assert (tmp_path / comparison.COSTS).read_text() == before


def test_the_state_of_bnp_is_that_of_its_inputs():
    cost, plain = (
        jax.eval_shape(comparison.make_task(trial(name)).init, jax.random.key(0), X) for name in ("BNP", "none")
    )
    extra = comparison.size_beside_parameters(cost) - comparison.size_beside_parameters(plain)
    inputs = 3 + 32 + 32 + 64 + 64  # of the convolutions, and of the dense layers: the image has one position left
    assert extra == pytest.approx(2 * inputs, abs=20)  # means and variances, beside a few counts


def trial(name):
    return comparison.Trial("digits", comparison.SETTING, name, 1, 0.0, 10, 0)
