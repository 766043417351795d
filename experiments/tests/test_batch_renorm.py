"""The experiment on Batch Renormalization, in a short form, and its batches."""

import itertools

import jax
import numpy as np
import pytest

import batch_renorm
import images
import methods
import methods_report
from protocol import Trial


def test_the_experiment_in_a_short_form(tmp_path, capsys):
    methods.main(["batch_renorm", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, drawn = methods_report.make(tmp_path)
    assert "batch_renorm" in drawn
    printed = capsys.readouterr().out
    for setting, method in itertools.product(batch_renorm.QUICK_SETTINGS, batch_renorm.STYLES):
        assert f"| digits | {setting} | {setting.split(', ')[1]} | {method} |" in printed
        assert f"| {setting} | {setting.split(', ')[1]} | {method} |" in texts["batch_renorm"]


@pytest.mark.parametrize(("setting", "classes"), [("two classes, 32", 2), ("one class, 32", 1)])
def test_batches_have_equally_many_of_each_of_their_classes(setting, classes):
    labels = np.arange(1000, dtype=np.int32) % 10
    split = images.Split(np.arange(1000).reshape(-1, 1, 1, 1), labels)
    drawn = list(itertools.islice(batch_renorm.batches(Trial("", setting, "", 32, 0.0, 0, 1), split), 50))
    for batch in drawn:
        assert sorted(np.bincount(batch.labels, minlength=10)) == [0] * (10 - classes) + [32 // classes] * classes
        assert len(set(batch.images.ravel())) == 32
        np.testing.assert_array_equal(batch.images.ravel() % 10, batch.labels)
    assert set(np.concatenate([batch.labels for batch in drawn])) == set(range(10))


def test_all_methods_see_the_same_batches_and_begin_with_the_same_kernels():
    split = images.Split(np.arange(100).reshape(-1, 1, 1, 1), np.arange(100, dtype=np.int32) % 10)
    kernels, seen = [], []
    for method in batch_renorm.STYLES:
        trial = Trial("digits", "all classes, 4", method, 4, 0.0, 100, 0)
        task = batch_renorm.task(trial)
        kernels.append(task.init(jax.random.key(0), np.ones((1, 4, 4, 1))).params["Dense_1"]["kernel"])
        seen.append(next(task.batches(trial, split)).images)
    for kernel, pixels in zip(kernels, seen, strict=True):
        np.testing.assert_array_equal(kernel, kernels[0])
        np.testing.assert_array_equal(pixels, seen[0])


def test_every_method_gets_the_same_rates_with_all_batches():
    trials = batch_renorm.tuning(quick=False)
    settings = {(trial.setting, trial.batch_size, trial.rate, trial.steps) for trial in trials}
    assert len(settings) * len(batch_renorm.STYLES) == len(trials)
    assert {trial.seed for trial in trials} == {0}
