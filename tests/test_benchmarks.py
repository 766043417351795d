"""The benchmarks in a short form, and their committed numbers."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import bnp_optax as bnp
import figures
import growth
import models
import report
import runs
import steps

ROOT = Path(__file__).parent.parent
WIDTH = 8
TINY = steps.Network(lambda kind: models.MLP(kind, widths=(WIDTH,)), (4, 4, 1))


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Examples are user code, which Optax and Flax do not check for promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_all_methods_take_turns(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(steps.NETWORKS, "mlp", TINY)
    arguments = ["--networks", "mlp", "--seconds", "0", "--results", str(tmp_path)]
    steps.main([*arguments, "--batch-sizes", "8", "4"])
    rows = steps.main([*arguments, "--batch-sizes", "8"])  # in the place of the old ones
    methods = [*steps.METHODS, "BNP, every 10"]
    assert [(row.batch_size, row.method) for row in rows] == [(size, m) for size in (8, 4) for m in methods]
    assert rows == runs.read_rows(tmp_path / "steps-cpu.csv", report.Row)
    by_method = {row.method: row for row in rows[: len(methods)]}
    assert by_method["SGD"].ratio == by_method["SGD"].memory_ratio == 1
    assert all(0 < row.ratio_low <= row.ratio <= row.ratio_high for row in rows)
    kept, recorded, every_10 = (by_method[name] for name in ("BNP, kept", "BNP", "BNP, every 10"))
    assert min(kept.ratio_low, recorded.ratio_low) <= every_10.ratio <= max(kept.ratio_high, recorded.ratio_high)
    # from the definitions: SGD has one trace, Adam two and a counter, BNP adds two moments an input and counters
    inputs, parameters = 16 + WIDTH, 17 * WIDTH + 10 * (WIDTH + 1)
    layers, leaves = 2, 4
    assert by_method["SGD"].parameters == parameters
    assert by_method["Adam"].state_ratio == pytest.approx((parameters + 1) / parameters, rel=1e-4)
    counters = 3 * layers + 5 * (leaves - layers)  # q2, seen and skipped at kernels; placeholders elsewhere
    assert recorded.state_ratio == pytest.approx((2 * inputs + counters) / parameters, rel=1e-4)
    assert np.std(matplotlib.image.imread(tmp_path / "steps-cpu.png")) > 0.05
    assert "mlp, batch 4" in capsys.readouterr().out


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is an accelerator")
def test_sizes_for_an_accelerator_need_one(capsys):
    with pytest.raises(SystemExit):
        steps.main(["--device", "gpu"])
    assert "no accelerator" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "moves"), [("BNP", True), ("BNP, kept", False)])
def test_steps_train_and_statistics_move_where_they_are_recorded(method, moves):
    contender = steps.prepare(TINY, steps.METHODS[method], 4, jnp.dtype("float32"))
    before = jax.tree.map(np.asarray, contender.state)
    params, _, opt_state = contender.step(contender.state)
    mean = opt_state[0].mean["Dense_0"]["kernel"]
    assert isinstance(opt_state[0], bnp.ScaleByBNPState)
    assert np.any(mean != before[2][0].mean["Dense_0"]["kernel"]) == moves
    assert np.any(params["Dense_0"]["kernel"] != before[0]["Dense_0"]["kernel"])


def test_rounds_measure_every_contender():
    calls = []

    def contender(name):
        return steps.Contender(lambda state: calls.append(name) or state, jnp.zeros(()))

    times = steps.take_turns({name: contender(name) for name in "ab"}, 0.0, lambda done: None)
    assert times.shape == (2, steps.MIN_ROUNDS)
    assert (times > 0).all()
    assert set(calls) == {"a", "b"}


def test_growth(tmp_path, capsys):
    growth.main(["--quick", "--seconds", "0", "--results", str(tmp_path)])
    points = runs.read_rows(tmp_path / "growth.csv", report.Point)
    assert [point.varied for point in points] == ["width"] * 3 + ["depth"] * 3 + ["batch"] * 3
    assert [point.parameters for point in points[:3]] == [growth.DEPTH * (w + 1) * w for w in (3, 10, 30)]
    assert [point.activations for point in points[-3:]] == [n * growth.DEPTH * growth.WIDTH for n in (100, 300, 1000)]
    assert np.std(matplotlib.image.imread(tmp_path / "growth.png")) > 0.02
    capsys.readouterr()


def test_the_page_shows_the_committed_numbers():
    text, tables = (ROOT / "docs/performance.md").read_text(), report.make(ROOT / "results")[0]
    assert figures.fill_tables(text, tables) == text, "run python benchmarks/report.py --pages docs/performance.md"
    cells = set(re.findall(r"[\d.]+", "\n".join(tables.values())))
    sentences = re.sub(
        r"<!-- table: .*?<!-- end -->|```.*?```|`.*?`", "", text.split("## What was tried")[0], flags=re.DOTALL
    )
    quoted = re.findall(r"(?<![\w./-])\d+\.\d+(?![\w/-]|\.\d)", sentences)
    assert [number for number in quoted if number not in cells] == []


def test_the_readme_tells_the_range_of_the_committed_numbers():
    rows = [row for row in runs.read_rows(ROOT / "results/steps-cpu.csv", report.Row) if row.batch_size >= 32]
    bnp = [row for row in rows if row.method == "BNP"]
    ratios, memory = [row.ratio for row in bnp], max(row.memory_ratio for row in bnp)
    sentence = (
        f"between {100 - 100 * min(ratios):.0f} % less and {100 * max(ratios) - 100:.0f} % more time than one of SGD "
        f"(medians of interleaved steps), less than with BN layers, and at most {100 * memory - 100:.0f} % more memory"
    )
    assert sentence in " ".join((ROOT / "README.md").read_text().split())
    with_bn = {(row.network, row.batch_size): row.ratio for row in rows if row.method == "BN"}
    assert all(row.ratio < with_bn.get((row.network, row.batch_size), math.inf) for row in bnp)
