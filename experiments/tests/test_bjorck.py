"""The experiment of Bjorck's diagnostics: its network, its grids, its rows, and its short form."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bjorck
import deep
import methods
import methods_report
import runs
import trials
from protocol import Outcome


def test_every_method_gets_the_rates_of_its_optimizer():
    tuning = bjorck.tuning(quick=False)
    for name, method in deep.METHODS.items():
        rates = deep.FAMILIES[method.optimizer].rates
        assert [trial.rate for trial in tuning if trial.method == name] == list(rates)
        ratios = np.divide(rates[1:], rates[:-1])
        assert ((ratios > 2.9) & (ratios < 3.4)).all()
        # what the diagnostics look at is one of them, and so are the steps that are shown
        family = deep.FAMILIES[method.optimizer]
        assert {family.rate, family.step, *family.shown} <= set(rates)
    assert len({len(family.rates) for family in deep.FAMILIES.values()}) == 1
    assert {trial.seed for trial in tuning} == {0}
    assert {trial.seed for trial in bjorck.further(quick=False)} == set(trials.SEEDS)


@pytest.mark.parametrize(("normalized", "layers"), [("all", [0, 1, 2]), ("last", [2]), ("none", [])])
def test_which_layers_are_normalized(normalized, layers):
    model, x = deep.Network(normalized, depth=4), jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    _, variables = jax.eval_shape(lambda key, x: model.init_with_output(key, x), jax.random.key(0), x)
    assert len([name for name in variables["params"] if name.startswith("BatchNorm")]) == len(layers)
    assert set(variables["perturbations"]) == {f"layer_{number}" for number in range(1, 5)}
    calls = []

    def note(next_fun, args, kwargs, context):
        if context.method_name == "__call__":
            calls.append(type(context.module).__name__)
        return next_fun(*args, **kwargs)

    with deep.nn.intercept_methods(note):
        jax.eval_shape(lambda key, x: model.init(key, x), jax.random.key(0), x)
    dense = [number for number, call in enumerate(calls) if call == "Dense"]
    assert [dense.index(number) for number in dense if calls[number + 1 : number + 2] == ["BatchNorm"]] == layers


def test_the_short_form_from_no_file_to_tables_and_figure(tmp_path, capsys):
    arguments = ["bjorck", "--quick", "--results", str(tmp_path), "--workers", "1"]
    methods.main(arguments)
    written = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    assert set(written) == {"bjorck.csv", "bjorck_diagnostics.csv"}
    methods.main(arguments)  # there is nothing left to do
    assert {path.name: path.read_text() for path in tmp_path.glob("*.csv")} == written
    assert "input independence" in capsys.readouterr().out
    texts, drawn = methods_report.make(tmp_path)
    assert set(texts) == {"bjorck", "bjorck_rates", "bjorck_diagnostics"}
    assert set(drawn) == {"bjorck"}
    assert len(drawn["bjorck"].axes) == 9
    rows = runs.read_rows(tmp_path / "bjorck_diagnostics.csv", deep.Diagnosis)
    values = {(row.method, row.steps, row.name, row.at): row.value for row in rows}
    assert len(values) == len(rows) == 3 * 2 * (6 * deep.QUICK_DEPTH + 9 + 1)
    hidden = range(1, deep.QUICK_DEPTH)
    for steps in (0, 3):  # in every layer BN has mean 0 and variance 1, up to its scale and shift
        assert all(values["SGD + BN", steps, "mean", layer] < 0.01 for layer in hidden)
        assert all(abs(values["SGD + BN", steps, "variance", layer] - 1) < 0.01 for layer in hidden)
    for name in ("mean", "variance", "independence", "gradient"):  # at the start BNP's network is the plain one
        at_start = [[values[method, 0, name, layer] for layer in hidden] for method in ("SGD", "BNP(Adam)")]
        np.testing.assert_allclose(*at_start, rtol=1e-3)
    smallest = [value for (_, _, name, at), value in values.items() if name == "loss" and at <= 1e-3]
    assert all(0.8 < value < 1 for value in smallest)  # a small step goes down


def test_the_loss_along_a_step_is_that_of_the_training():
    """From the same batch: what a step of SGD or BNP(Adam) does at a rate is what the diagnostics say of that size."""
    data = trials.load("digits", Path()).train
    x = (data.images[:64].astype(np.float32) - data.images.mean()) / data.images.std()
    y = data.labels[:64]
    for name in ("SGD", "BNP(Adam)"):
        program = deep.make_program(name, 3)
        state = jax.jit(program.task.init)(jax.random.key(0), x[:1])
        family = deep.FAMILIES[deep.METHODS[name].optimizer]
        sizes = family.rates
        look = jax.jit(program.look)
        said = look(state, x, y)
        ratios = said["loss"]
        step = jax.jit(program.task.step)
        for number in (2, 4):
            after, before = step(state, jnp.float32(sizes[number]), x, y)
            _, loss = step(after, jnp.float32(0.0), x, y)
            np.testing.assert_allclose(ratios[number], loss / before, rtol=1e-4)
        moved = look(step(state, jnp.float32(family.step), x, y)[0], x, y)
        for measure in ("mean", "variance"):
            np.testing.assert_allclose(said[f"{measure} after"], moved[measure], rtol=1e-4)
            assert abs(said[measure][-1] / moved[measure][-1] - 1) > 0.01


def make_outcome(rate, accuracy, seed, loss=0.1):
    return Outcome("digits", "4 layers of 100", "SGD", 128, rate, 30, seed, "abc", 1.0, loss, accuracy, 0.0, 0.0)


def test_largest_rates_are_those_of_seeds_with_the_whole_grid():
    own = [make_outcome(rate, accuracy, 0) for rate, accuracy in ((0.1, 90.0), (0.3, 89.5), (1.0, 80.0))]
    own += [make_outcome(0.1, 95.0, 1)]
    own += [make_outcome(rate, 90.0, 2, math.nan if rate == 1.0 else 0.1) for rate in (1.0, 0.3, 0.1)]
    np.testing.assert_allclose(bjorck.largest_rates(own), [0.3, 0.3], rtol=1e-6)
    # of the medians of all that ran there; what diverged guesses
    assert "| SGD | 0.3, 0.3 | 89.8 (0.3) | 45.0 (1) |  |" in bjorck.rates_table(own)
