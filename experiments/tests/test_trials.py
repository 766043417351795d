"""The trainings of the other methods' experiments, on a task that is small enough to be done by hand."""

import csv
import dataclasses
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import images
import protocol
import runs
import trials
from protocol import Outcome, Trial
from trials import Experiment, Task

ANY_TRIAL = Trial("digits", "linear", "SGD", 32, 0.1, 20, 0)
RATES = (0.03, 0.1, 1e38)  # with the last it diverges


def make_task(trial):
    """A linear classifier of the digits, without a bias, trained by gradient descent."""

    def loss_fn(weights, x, y):
        logits = x.reshape(len(x), -1) @ weights
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def step(weights, rate, x, y):
        loss, gradient = jax.value_and_grad(loss_fn)(weights, x, y)
        return weights - rate * gradient, loss

    return Task(
        lambda key, x: jax.random.normal(key, (x.size, 10)) / 100,
        step,
        lambda weights, x: x.reshape(len(x), -1) @ weights,
        measure=lambda weights: jnp.linalg.norm(weights),
    )


def tuning(quick):
    steps = 5 if quick else 20
    return [dataclasses.replace(ANY_TRIAL, method=method, rate=rate, steps=steps) for method in "AB" for rate in RATES]


def report(outcomes):
    return {"table": protocol.accuracy_table(outcomes)}, {}


EXPERIMENT = Experiment(tuning, make_task, report)


def test_epochs_have_every_example_once_and_other_orders():
    split = images.Split(np.arange(10), np.arange(10) * 10)
    stream = trials.epochs(dataclasses.replace(ANY_TRIAL, batch_size=3), split)
    seen = [list(itertools.islice(stream, 3)) for _ in range(2)]
    orders = [np.concatenate([batch.images for batch in epoch]) for epoch in seen]
    for epoch, order in zip(seen, orders, strict=True):
        assert len(set(order)) == 9  # one fills no batch
        assert all((batch.labels == 10 * batch.images).all() for batch in epoch)
    assert (orders[0] != orders[1]).any()
    again = trials.epochs(dataclasses.replace(ANY_TRIAL, batch_size=3), split)
    again = np.concatenate([batch.images for batch in itertools.islice(again, 3)])
    np.testing.assert_array_equal(again, orders[0])
    other = next(trials.epochs(dataclasses.replace(ANY_TRIAL, batch_size=9, seed=1), split)).images
    assert (other != orders[0]).any()


def test_a_training_is_what_a_plain_loop_does(tmp_path):
    trial = dataclasses.replace(ANY_TRIAL, seed=1)
    data = images.load("digits", Path())
    mean, deviation = data.train.images.mean(), data.train.images.std()
    flat = lambda split: ((split.images.astype(np.float64) - mean) / deviation).reshape(len(split.labels), -1)  # noqa: E731
    weights = np.array(jax.random.normal(jax.random.key(1), (64, 10)) / 100, np.float64)
    losses = []
    for batch in itertools.islice(trials.epochs(trial, data.train), trial.steps):
        x, y = flat(batch), batch.labels
        p = np.exp(x @ weights)
        p /= p.sum(1, keepdims=True)
        losses.append(-np.log(p[np.arange(len(y)), y]).mean())
        weights -= trial.rate * x.T @ (p - np.eye(10)[y]) / len(y)
    actual = trials.train(make_task, trial, Path())
    np.testing.assert_allclose(actual.train_loss, np.mean(losses[-2:]), rtol=1e-4)  # the last tenth
    np.testing.assert_allclose(actual.measure, np.linalg.norm(weights), rtol=1e-4)
    for split, reached in ((data.validation, actual.validation_accuracy), (data.test, actual.test_accuracy)):
        # a near tie may fall either way
        assert abs(100 * np.mean((flat(split) @ weights).argmax(1) == split.labels) - reached) < 0.5
    fitted = EXPERIMENT._replace(tuning=lambda quick: [], further=lambda quick: [trial], fit=True)
    fit = trials.run(fitted, tmp_path / "x.csv", Path())[0].measure
    assert abs(100 * np.mean((flat(data.train) @ weights).argmax(1) == data.train.labels) - fit) < 0.1
    assert actual.trial == trial
    assert not actual.diverged
    assert math.isnan(trials.train(make_task, ANY_TRIAL, Path()).test_accuracy)  # seed 0 does not read the test


def test_a_training_that_diverges_ends_early():
    seen = []
    trial = dataclasses.replace(ANY_TRIAL, rate=1e38, steps=40)
    actual = trials.train(make_task, trial, Path(), advance=seen.append)
    assert actual.diverged
    assert set(seen) == {4}
    assert len(seen) < 10


def test_the_protocol(tmp_path):
    """Seed 0 at every rate, then the others at the best, and what is asked for beside that, each once."""
    further = [dataclasses.replace(ANY_TRIAL, method="A", rate=rate, seed=3) for rate in RATES[:2]]
    experiment = EXPERIMENT._replace(further=lambda quick: further)
    outcomes = trials.run(experiment, tmp_path / "new" / "x.csv", Path())
    assert [outcome.trial for outcome in outcomes[:6]] == tuning(quick=False)
    chosen = {method: protocol.best([o for o in outcomes[:6] if o.method == method]).rate for method in "AB"}
    rest = [outcome.trial for outcome in outcomes[6:]]
    assert len(rest) == len(set(rest))
    expected = {dataclasses.replace(ANY_TRIAL, method=m, rate=chosen[m], seed=seed) for m in "AB" for seed in (1, 2, 3)}
    assert set(rest) == expected | set(further)
    assert chosen["A"] < 1e38
    # the rows of the file are all there is, and none of seed 0 has read the test images
    rows = runs.read_rows(tmp_path / "new" / "x.csv", Outcome)
    assert [row.trial for row in rows] == [outcome.trial for outcome in outcomes]
    assert all(math.isnan(row.test_accuracy) == (row.seed == 0) for row in rows)
    quick = trials.run(EXPERIMENT, tmp_path / "quick.csv", Path(), quick=True)
    assert {(outcome.steps, outcome.seed) for outcome in quick} == {(5, 0), (5, 1)}


def test_a_refined_grid(tmp_path):
    """The other seeds run at the best rate of all, and what is run again runs nothing."""
    experiment = EXPERIMENT._replace(tuning=lambda quick: tuning(quick)[:3], refined=True)
    outcomes = trials.run(experiment, tmp_path / "x.csv", Path())
    alone = [outcome for outcome in outcomes if outcome.seed == 0]
    assert [outcome.rate for outcome in alone[:3]] == list(RATES)
    assert len({outcome.rate for outcome in alone}) == len(alone) > 4
    assert {(o.rate, o.seed) for o in outcomes if o.seed} == {(protocol.best(alone).rate, seed) for seed in (1, 2, 3)}
    rows = (tmp_path / "x.csv").read_text()
    assert [o.trial for o in trials.run(experiment, tmp_path / "x.csv", Path())] == [o.trial for o in outcomes]
    assert (tmp_path / "x.csv").read_text() == rows
    quick = trials.run(experiment, tmp_path / "quick.csv", Path(), quick=True)
    assert {outcome.rate for outcome in quick} == set(RATES)


def test_a_sweep_continues_where_it_stopped(tmp_path, monkeypatch):
    path, trained, original = tmp_path / "x.csv", [], trials.train

    def counted(make, trial, *args, **kwargs):
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append(trial)
        return original(make, trial, *args, **kwargs)

    monkeypatch.setattr(trials, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        trials.run(EXPERIMENT, path, Path())
    before = path.read_text()
    assert len(runs.read_rows(path, Outcome)) == 4
    monkeypatch.setattr(
        trials, "train", lambda make, trial, *a, **k: trained.append(trial) or original(make, trial, *a, **k)
    )
    outcomes = trials.run(EXPERIMENT, path, Path())
    assert len(trained) == len(set(trained)) == len(outcomes) == 12
    assert path.read_text().startswith(before)
    with path.open(newline="") as file:
        assert list(csv.DictReader(file).fieldnames) == [field.name for field in dataclasses.fields(Outcome)]


def test_workers_do_what_one_process_does(tmp_path):
    experiment = EXPERIMENT._replace(tuning=lambda quick: tuning(quick)[:3])
    alone = trials.run(experiment, tmp_path / "alone.csv", Path(), quick=True)
    together = trials.run(experiment, tmp_path / "together.csv", Path(), quick=True, workers=2)
    for one, other in zip(alone, together, strict=True):
        assert one.trial == other.trial
        np.testing.assert_allclose(one.train_loss, other.train_loss, rtol=1e-4)
        np.testing.assert_allclose(one.validation_accuracy, other.validation_accuracy, atol=1)
    assert len(runs.read_rows(tmp_path / "together.csv", Outcome)) == len(alone)


def test_what_is_measured_beside_the_trainings(tmp_path):
    """After them, and reported with them."""
    order = []

    def also(results, data_dir, quick):
        order.append((len(runs.read_rows(results / "x.csv", Outcome)), data_dir, quick))
        (results / "x_more.txt").write_text("more")

    def also_report(outcomes, results):
        return {"more": f"{len(outcomes)} {(results / 'x_more.txt').read_text()}"}, {"drawn": Figure()}

    experiment = EXPERIMENT._replace(also=also, also_report=also_report)
    outcomes = trials.run(experiment, tmp_path / "x.csv", Path("data"), quick=True)
    assert order == [(len(outcomes), Path("data"), True)]
    texts, drawn = trials.report(experiment, outcomes, tmp_path)
    assert (texts["more"], set(texts), set(drawn)) == (f"{len(outcomes)} more", {"table", "more"}, {"drawn"})
    assert trials.report(EXPERIMENT, outcomes, tmp_path)[0] == report(outcomes)[0]


def test_an_experiment_may_leave_the_test_images_unread(tmp_path):
    outcomes = trials.run(EXPERIMENT._replace(seeds=()), tmp_path / "a.csv", Path(), quick=True)
    assert {outcome.seed for outcome in outcomes} == {0}
    assert len(outcomes) == len(tuning(True))
