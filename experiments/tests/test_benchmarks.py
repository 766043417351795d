"""The benchmarks in a short form, and their committed numbers."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import bnp_optax as bnp
import compilation
import growth
import kernels
import models
import report
import runs
import steps
from tables import fill_tables

ROOT = Path(__file__).parents[2]
WIDTH = 8
TINY = steps.Network(lambda kind: models.MLP(kind, widths=(WIDTH,)), (4, 4, 1))


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
    # from the definitions: SGD has one trace, Adam two and a counter; BNP adds a mean and a variance an input, and a
    # damping, q2, seen and skipped a layer
    layers, inputs, parameters = 2, 16 + WIDTH, 17 * WIDTH + 10 * (WIDTH + 1)
    statistics = 2 * inputs + 4 * layers
    assert by_method["SGD"].parameters == parameters
    assert by_method["Adam"].state_ratio == pytest.approx((parameters + 1) / parameters, rel=1e-4)
    assert recorded.state_ratio == pytest.approx(statistics / parameters, rel=1e-4)
    assert by_method["BNP(Adam)"].state_ratio == pytest.approx((parameters + 1 + statistics) / parameters, rel=1e-4)
    adam, inside = by_method["Adam"], by_method["BNP(Adam)"]
    assert adam.adam_ratio == adam.adam_memory_ratio == 1
    assert inside.adam_memory_ratio == pytest.approx(inside.megabytes / adam.megabytes, rel=1e-3)
    assert f"| {inside.adam_ratio:.2f} | {inside.adam_memory_ratio:.3f} |" in report.make(tmp_path)[0]["steps-cpu-adam"]
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
    mean = opt_state[0].mean
    assert isinstance(opt_state[0], bnp.Statistics)
    assert np.any(mean != before[2][0].mean) == moves
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


def test_compilation(tmp_path, capsys):
    compilation.main(["--blocks", "2", "--repetitions", "1", "--results", str(tmp_path)])
    rows = {row.method: row for row in runs.read_rows(tmp_path / "compilation.csv", report.Compilation)}
    assert list(rows) == ["SGD", "BNP, kept", "BNP", "Adam", "BNP(Adam)"]
    for row in rows.values():
        base = rows[row.base]
        assert row.layers == 4
        assert row.added == (row.operations - base.operations) / row.layers
        assert row.ratio == pytest.approx(row.cpu_seconds / base.cpu_seconds, rel=1e-3)
    assert rows["SGD"].added == rows["Adam"].added == 0 < rows["BNP, kept"].added < rows["BNP"].added
    assert f"| {rows['BNP'].operations:,} |" in report.make(tmp_path)[0]["compilation"]
    assert "4 layers" in capsys.readouterr().out


def test_operations_of_a_traced_program():
    sin = jax.jit(jax.lax.sin)
    lowered = jax.jit(lambda x, y: sin(x) * sin(y)).lower(jnp.ones(3), jnp.ones(3))
    assert compilation.count_operations(lowered.as_text()) == 4  # one function of one, two calls of it, the product


PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[4]{0}}

%fused_row (param_0: f32[8,4]) -> f32[4] {
  %param_0 = f32[8,4]{1,0} parameter(0)
  %bitcast.1 = f32[1,8,4]{2,1,0} bitcast(%param_0)
  %slice.1 = f32[1,1,4]{2,1,0} slice(%bitcast.1), slice={[0:1], [3:4], [0:4]}
  ROOT %negate.1 = f32[4]{0} negate(%slice.1)
}

%fused_two (param_0.1: f32[4], param_1.1: f32[4]) -> (f32[4], pred[4]) {
  %param_0.1 = f32[4]{0} parameter(0)
  %param_1.1 = f32[4]{0} parameter(1)
  %add.1 = f32[4]{0} add(%param_0.1, %param_1.1)
  %compare.1 = pred[4]{0} compare(%param_0.1, %param_1.1), direction=LT
  ROOT %tuple.1 = (f32[4]{0}, pred[4]{0}) tuple(%add.1, %compare.1)
}

%body (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %carry = (s32[], f32[4]{0}) parameter(0)
  %number = s32[] get-tuple-element(%carry), index=0
  %value = f32[4]{0} get-tuple-element(%carry), index=1
  %two.1 = (f32[4]{0}, pred[4]{0}) fusion(%value, %value), kind=kLoop, calls=%fused_two
  %first.1 = f32[4]{0} get-tuple-element(%two.1), index=0
  ROOT %next = (s32[], /*index=1*/f32[4]{0}) tuple(%number, %first.1)
}

%ends (carry.1: (s32[], f32[4])) -> pred[] {
  %carry.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

%command_buffer (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %copy.1 = f32[4]{0} copy(%p)
  ROOT %gemv = (bf16[4]{0}, s8[32]{0}) custom-call(%copy.1), custom_call_target="__cublas$gemm"
}

ENTRY %main (x: f32[8,4]) -> f32[4] {
  %x = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %row = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused_row
  %start = (s32[], f32[4]{0}) tuple(%zero, %row)
  %loop = (s32[], f32[4]{0}) while(%start), condition=%ends, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %last = f32[4]{0} get-tuple-element(%loop), index=1
  ROOT %call.1 = f32[4]{0} call(%last), to_apply=%command_buffer
}
"""


def test_kernels_of_a_program_written_by_hand():
    row, iteration, copy, library = 16 + 16, 16 + 16 + (16 + 4), 16 + 16, 16 + (8 + 32)
    assert kernels.count_launches(PROGRAM) == (1 + 5 * 1 + 2, row + 5 * iteration + copy + library)


def test_bytes_are_those_of_the_analysis_of_xla():
    def function(x, w):
        return jnp.sort(jax.nn.relu(x @ w), axis=0).sum(0) + x[3, :16] + w[::4].sum(0)

    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jax.jit(function).lower(jnp.ones((64, 32)), jnp.ones((32, 16))).compile()
    expected = compiled.cost_analysis()["bytes accessed"]
    assert kernels.count_launches(compiled.as_text()).bytes == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="it may be installed")
def test_kernels_need_the_plugin_for_cuda(tmp_path):
    with pytest.raises(SystemExit, match=r"pip install 'jax\[cuda12\]'"):
        kernels.main(["--results", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_page_shows_the_committed_numbers():
    text, tables = (ROOT / "docs/performance.md").read_text(), report.make(runs.RESULTS)[0]
    assert fill_tables(text, tables) == text, "run make figures"
    cells = set(re.findall(r"[\d.]+", "\n".join(tables.values())))
    sentences = re.sub(
        r"<!-- table: .*?<!-- end -->|```.*?```|`.*?`", "", text.split("## What was tried")[0], flags=re.DOTALL
    )
    quoted = re.findall(r"(?<![\w./-])\d+\.\d+(?![\w/-]|\.\d)", sentences)
    assert [number for number in quoted if number not in cells] == []


def test_percentages_of_the_pages_are_those_of_the_committed_numbers():
    rows = runs.read_rows(runs.RESULTS / "steps-cpu.csv", report.Row)

    def percent(method, of, *cases):
        ratios = [getattr(row, of) for row in rows if row.method == method and (row.network, row.batch_size) in cases]
        return [round(100 * ratio) - 100 for ratio in ratios]

    page, readme = (" ".join((ROOT / name).read_text().split()) for name in ("docs/performance.md", "README.md"))
    usual = {(row.network, row.batch_size) for row in rows if row.batch_size >= 32}
    times = percent("BNP", "ratio", *usual)
    for text in (page, readme):
        assert f"between {-min(times)} % less and {max(times)} % more time than one of SGD" in text
    assert f"at most {max(percent('BNP', 'memory_ratio', *usual))} % more memory" in readme
    worst = ("mlp", 60)
    times = percent("BNP(Adam)", "adam_ratio", *usual - {worst}), percent("BNP(Adam)", "adam_ratio", worst)
    assert f"at most {max(times[0])} % more time than Adam, but {times[1][0]} % on the multilayer perceptron" in readme
    memory = percent("BNP(Adam)", "adam_memory_ratio", *(("mlp", size) for size in (1, 60, 512)))
    assert "{} % more memory than Adam's in batches of 1, {} % at 60 and {} % at 512".format(*memory) in page
