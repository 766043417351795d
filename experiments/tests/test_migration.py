"""What coming from BN brings: networks and optimizers are those of docs/migration.md; a penalty's decay; the tables."""

import ast
import dataclasses
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax as bnp
import digits
import images
import migration
import optimizers
import optimizers_report
import trials
from migration import AT_PAGE, CNN, EXPECTED, PENALIZED
from protocol import Outcome, Trial

ANY_TRIAL = Trial(migration.DATA, "3 epochs", "SGD, BNP", 2, 0.01, 1, 1)
X, Y = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 1)), jnp.float32), jnp.arange(6)


@functools.cache
def page():
    """Returns what the code of the page defines."""
    text = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    code = ast.parse("\n".join(block.split("```")[0] for block in text.split("```python\n")[1:]))
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    code.body = [
        node
        for node in code.body
        if isinstance(node, kinds) or (isinstance(node, ast.Assign) and ast.unparse(node.targets) == "decay")
    ]
    names = {}
    exec(compile(code, "migration.md", "exec"), names)  # noqa: S102
    return names


def assert_same(actual, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), actual, expected)


def test_the_networks_are_those_of_the_page():
    @jax.jit
    def run(x):
        key, options = jax.random.key(0), {"train": True, "mutable": ["batch_stats"]}
        before, after = page()["WithBatchNorm"](), page()["CNN"]()
        with_bn, without = CNN(True).init(key, x), CNN(False).init(key, x)
        ours = with_bn, without, CNN(True).apply(with_bn, x, **options), CNN(False).apply(without, x)
        with_bn, without = before.init(key, x, train=False), after.init(key, x)
        theirs = with_bn, without, before.apply(with_bn, x, **options), after.apply(without, x)
        return ours, theirs

    assert_same(*run(X), rtol=1e-5)


@pytest.mark.parametrize("name", migration.OPTIMIZERS)
def test_the_optimizers_are_those_of_the_page(name):
    layers = bnp.Layers((bnp.Layer.dense(("kernel",), (64, 10), bias=("bias",)),))
    params, records = (
        {"kernel": jnp.ones((64, 10)), "bias": jnp.ones(10)},
        {"kernel": bnp.input_moments(X.reshape(6, 64))},
    )

    def three(tx):
        state, steps = tx.init(params), []
        for number in range(3):
            gradients = jax.tree.map(lambda leaf, number=number: jnp.cos(number + leaf), params)
            step, state = tx.update(gradients, state, params, intermediates=records)
            steps.append(step)
        return steps

    both = migration.make_optimizer(name, 0.1, layers), page()[name.lower()](layers, 0.1)
    assert_same(*jax.jit(lambda: [three(tx) for tx in both])(), rtol=1e-4)


def test_the_digits_are_split_as_those_of_the_demonstration():
    for split, (x, y) in zip(images.load(migration.DATA, Path()), digits.load_splits(), strict=True):
        np.testing.assert_allclose(split.images.reshape(len(x), -1) / 255, x, atol=0.6 / 255)
        np.testing.assert_array_equal(split.labels, y)


def test_a_step_is_an_epoch():
    """It takes the batches that other trainings have, one after the other."""
    split, task = images.Split(np.asarray(X), np.asarray(Y)), migration.make_task(ANY_TRIAL)
    epochs = list(itertools.islice(task.batches(ANY_TRIAL, split), 2))
    batches = list(itertools.islice(trials.epochs(ANY_TRIAL, split), 6))
    np.testing.assert_array_equal(
        np.concatenate([epoch.labels for epoch in epochs]), np.stack([batch.labels for batch in batches])
    )
    layers = bnp.linen.find_layers(CNN(False), X)
    one = trials.classifier(
        CNN(False), lambda rate, params, x: migration.make_optimizer("SGD", rate, layers), records=True
    )
    state, losses, step = jax.jit(one.init)(jax.random.key(0), X[:1]), [], jax.jit(one.step)
    for batch in batches[:3]:
        state, loss = step(state, 0.1, *batch)
        losses.append(loss)
    actual, loss = jax.jit(task.step)(jax.jit(one.init)(jax.random.key(0), X[:1]), 0.1, *epochs[0])
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    assert_same(actual.params, state.params, rtol=1e-4, atol=1e-5)


def test_the_penalty_is_divided_by_the_variance_of_the_slowest_inputs():
    """A weight decays by the inverse of its input's damped variance, whatever the biases; a layer has the median."""
    rng = np.random.default_rng(0)
    layers = bnp.Layers(tuple(bnp.Layer.dense((name, "w"), (3, 2), bias=(name, "b")) for name in "ab"))
    params = {name: {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)} for name in "ab"}
    params = jax.tree.map(jnp.float32, params)
    deviations = {"a": [0.1, 0.2, 2.0], "b": [1.0, 3.0, 0.3]}
    records = {
        name: {"w": bnp.input_moments(jnp.float32(1 + rng.normal(size=(500, 3)) * of))}
        for name, of in deviations.items()
    }
    tx = bnp.scale_by_bnp(layers)
    statistics = tx.update(params, tx.init(params), intermediates=records)[1]
    medians = [
        np.median(1 / (statistics[path].variance.ravel() + statistics[path].damping.item())) for path in statistics
    ]
    assert medians[0] > 1.5 * medians[1]
    np.testing.assert_allclose(migration.penalty_factor(params, statistics, layers), medians[0], rtol=1e-4)


def test_every_training_that_a_penalty_is_looked_at_in_is_measured():
    tasks = {name: migration.make_task(dataclasses.replace(ANY_TRIAL, setting=name)) for name in migration.SETTINGS}
    of_mlp = tasks["fully connected 3x100"]
    start = jax.jit(lambda: of_mlp.measure(of_mlp.init(jax.random.key(0), X[:1])))()
    assert start == pytest.approx(1 / 1.0101)  # all variances are 1 there
    assert {name for name, task in tasks.items() if task.measure is not trials.Task._field_defaults["measure"]} == {
        *PENALIZED
    }
    assert {trial.setting for trial in migration.further(False)} >= set(PENALIZED)


def test_all_methods_have_the_same_rates_and_that_of_the_page_is_among_them():
    by_cell = {}
    for trial in migration.tuning(False):
        assert trial.seed == 0
        optimizer = trial.method.split(", ")[0]
        by_cell.setdefault((trial.setting, optimizer, trial.batch_size), {}).setdefault(trial.method, []).append(
            trial.rate
        )
    for (_, optimizer, _), methods in by_cell.items():
        rates = migration.OPTIMIZERS[optimizer]
        assert all(tuple(own) == rates.grid for own in methods.values())
        assert rates.page in rates.grid
        assert len(methods) >= 2


def outcome(kind, rate, seed, validation, test=math.nan, **changes):
    trial = dataclasses.replace(ANY_TRIAL, method=f"SGD, {kind}", rate=rate, seed=seed)
    own = Outcome(**dataclasses.asdict(trial), commit="abc", seconds=1.0, train_loss=0.5,
                  validation_accuracy=validation, test_accuracy=test, measure=math.nan)  # fmt: skip
    return dataclasses.replace(own, **changes)


def test_the_tables_have_means_at_the_best_rate_and_at_that_of_the_page():
    outcomes = [
        *(outcome("BN", rate, 0, validation) for rate, validation in ((0.01, 90.0), (0.1, 80.0))),
        *(outcome("BN", 0.01, seed, 0.0, test) for seed, test in ((1, 95.0), (2, 96.0))),
        *(outcome("BNP", rate, 0, validation) for rate, validation in ((0.01, 80.0), (0.1, 90.0))),
        *(outcome("BNP", 0.1, seed, 0.0, test) for seed, test in ((1, 97.0), (2, 97.5))),
        outcome("BNP", 0.01, 1, 99.0, 60.0),
        *(outcome("BNP", 0.01, seed, 0.0, 1.0, setting="5-layer CNN", measure=10.0 * seed) for seed in (1, 2)),
    ]
    texts, drawn = migration.report(outcomes)
    assert drawn == {}
    assert texts["migration"].splitlines() == [
        f"| training | optimizer | batch | BN | {AT_PAGE} | BNP |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 3 epochs | SGD | 2 | 95.5 | 60.0 | 97.2 |",
    ]
    assert texts["migration_penalty"].splitlines()[2:] == ["| 5-layer CNN | 10.0 to 20.0 |"]


def test_a_short_form(tmp_path, monkeypatch, capsys):
    name, setting = next(iter(EXPECTED.items()))
    monkeypatch.setitem(EXPECTED, name, setting._replace(kinds=("BNP",)))  # each compiles for seconds
    optimizers.main(["migration", "--quick", "--results", str(tmp_path), "--workers", "1"])
    table = optimizers_report.make(tmp_path)[0]["migration"]
    assert table in capsys.readouterr().out
    [row] = table.splitlines()[2:]
    assert row.startswith(f"| {name} | SGD | 64 |  | ")  # none at the rate of the page
    assert 10 < float(row.split(" | ")[-1].rstrip(" |")) <= 100
