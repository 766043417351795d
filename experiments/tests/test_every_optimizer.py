"""The experiments of Momentum, Adam and Muon: what their trainings are made of, and a short form of all."""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import bnp_optax as bnp
import images
import optimizers
import protocol
import runs
import settings
import trials
import weight_norm
from protocol import Outcome, Trial

ANY_TRIAL = Trial("digits", "5-layer CNN", "Adam", 16, 0.1, 20, 0)


def test_augmented_images_are_the_images_moved_and_mirrored():
    rng = np.random.default_rng(0)
    split = images.Split(rng.integers(1, 256, (48, 6, 6, 2), np.uint8), np.arange(48))
    stream = optimizers.augmented_epochs(ANY_TRIAL, split)
    found = set()
    for batch in itertools.islice(stream, 12):
        for image, label in zip(batch.images, batch.labels, strict=True):
            padded = np.pad(split.images[label], ((4, 4), (4, 4), (0, 0)))
            candidates = {
                (top, left, mirrored): padded[top : top + 6, left : left + 6][:, :: -1 if mirrored else 1]
                for top, left, mirrored in itertools.product(range(9), range(9), (False, True))
            }
            matches = [move for move, candidate in candidates.items() if (candidate == image).all()]
            assert len(matches) == 1
            found.add(matches[0])
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(9))
    assert {mirrored for *_, mirrored in found} == {False, True}
    again = next(optimizers.augmented_epochs(ANY_TRIAL, split))
    np.testing.assert_array_equal(again.images, next(optimizers.augmented_epochs(ANY_TRIAL, split)).images)


@pytest.mark.parametrize("setting", settings.SETTINGS)
def test_every_method_is_what_its_name_says(setting):
    split = images.load("digits", Path()).train
    names = settings.method_names(settings.SETTINGS[setting].kinds)
    for method, (optimizer, kind) in names.items():
        if optimizer != "Muon" and kind != "{}":
            continue  # Muon, which alone tells kernels from other parameters, stands for all optimizers
        task = optimizers.task(Trial("digits", setting, method, 4, 0.0, 20, 0))
        state = jax.eval_shape(task.init, jax.random.key(0), split.images[:1].astype(np.float32))
        after, _ = jax.eval_shape(task.step, state, 0.1, split.images[:4].astype(np.float32), split.labels[:4])
        assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)
        normalization = kind.split(" + ")[1].split(",")[0] if " + " in kind else ""
        assert bool(state.batch_stats) == (normalization in ("BN", "BRN", "BGN", "noise", "dropout"))
        assert any("norm" in name.lower() for name in state.params) == (
            normalization not in ("", "WS", "noise", "dropout")
        )
        standardized = {name.split("_")[0] for name in state.params if name.startswith("WS")}
        layers = {"cnn": {"WSConv", "WSDense"}, "mlp": {"WSDense"}}.get(settings.SETTINGS[setting].network)
        assert standardized == (layers if normalization == "WS" else set())
        opt_state = state.opt_state[0] if "weight_decay" in kind else state.opt_state
        assert isinstance(opt_state, bnp.PreconditionedState) == kind.startswith("BNP")
        own = opt_state.inner if kind.startswith("BNP") else opt_state
        lengths = own.lengths if isinstance(own, weight_norm.WeightNormState) else {}
        assert set(lengths) == ({"Conv_0", "Conv_1", "Conv_2", "Dense_0"} if "WN(" in kind else set())
        assert (isinstance(own, tuple) and own[0] == own[-1] == optax.EmptyState()) == ("centred(" in kind)
        if kind == "{}":  # as many moments of every parameter as the optimizer has
            shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
            of_optimizer = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape in shapes]
            kernels = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(state.params))
            biases = len(jax.tree.leaves(state.params)) - kernels
            per_kernel, per_bias = {"Momentum": (1, 1), "Adam": (2, 2), "Muon": (1, 2)}[optimizer]
            assert len(of_optimizer) == per_kernel * kernels + per_bias * biases


def test_centred_kernels_begin_as_the_others_less_their_means():
    split = images.load("digits", Path()).train
    start, centred = (
        optimizers.task(Trial("digits", settings.FALLING, method, 4, 0.0, 20, 0))
        .init(jax.random.key(0), split.images[:1].astype(np.float32))
        .params
        for method in ("BNP(Adam)", "BNP(centred(Adam))")
    )
    for name, layer in start.items():
        axes = tuple(range(layer["kernel"].ndim - 1))
        mean = 0.0 if name == "Dense_1" else layer["kernel"].mean(axes)
        np.testing.assert_allclose(centred[name]["kernel"], layer["kernel"] - mean, rtol=0, atol=1e-6)


def test_the_options_of_preconditioned_are_those_of_the_name():
    expected = {
        "BNP({})": {},
        "BNP({}), prior_examples=None": {"prior_examples": None},
        "BNP({}), eps_relative=1e-3": {"eps_relative": 1e-3},
        "BNP({}) + GN": {},
    }
    assert {kind: settings.options_of(kind) for kind in expected} == expected
    split = images.load("digits", Path()).train
    damping = []
    for method in ("BNP(Momentum)", "BNP(Momentum), eps_relative=1"):
        task = optimizers.task(Trial("digits", "a quarter of an epoch", method, 4, 0.0, 20, 0))
        state = jax.jit(task.init)(jax.random.key(0), split.images[:1] / 16)
        state, _ = jax.jit(task.step)(state, 0.0, split.images[:4] / 16, split.labels[:4])
        damping.append(state.opt_state.statistics["Conv_0"].damping.item() - 1e-4)  # less the absolute one
    np.testing.assert_allclose(damping[1], 100 * damping[0], rtol=1e-4)


def test_what_is_named_after_an_option_trains_with_it():
    split = images.load("digits", Path()).train
    images_, labels = split.images[:4].astype(np.float32) / 16, split.labels[:4]

    def after(method):
        """Returns kernels after one step, and their loss."""
        task = optimizers.task(Trial("digits", settings.REGULARIZED, method, 4, 0.0, 20, 0))
        state, loss = task.step(task.init(jax.random.key(0), images_[:1]), 0.1, images_, labels)
        return jax.tree.map(np.asarray, state.params), float(loss), task

    start = optimizers.task(Trial("digits", settings.REGULARIZED, settings.CENTRED.format("Muon"), 4, 0.0, 20, 0)).init(
        jax.random.key(0), images_[:1]
    )
    plain, loss, task = after("BNP(centred(Muon))")
    decayed, _, _ = after("BNP(centred(Muon)), weight_decay=0.1")
    for layer, own in plain.items():
        kernel = own["kernel"] - 0.1 * 0.1 * np.asarray(start.params[layer]["kernel"])
        np.testing.assert_allclose(decayed[layer]["kernel"], kernel, rtol=0, atol=1e-6)
        np.testing.assert_allclose(decayed[layer]["bias"], own["bias"], rtol=0, atol=1e-6)
    _, smooth, _ = after("BNP(centred(Muon)), smoothing=0.1")
    log_p = jax.nn.log_softmax(task.predict(start, images_))
    expected = -(0.9 * log_p[np.arange(4), labels] + 0.1 * log_p.mean(1)).mean()
    np.testing.assert_allclose([loss, smooth], [-log_p[np.arange(4), labels].mean(), expected], rtol=1e-5)


def test_a_kind_of_one_optimizer_is_not_tried_with_the_others():
    kinds = ("{}", settings.DAMPED_MUON, "{} + BN")
    assert settings.kinds_of("Muon", kinds) == list(kinds)
    assert settings.kinds_of("Adam", kinds) == ["{}", "{} + BN"]
    assert {
        trial.method for trial in optimizers.tuning(["5-layer CNN, falling rate"], False) if "=" in trial.method
    } == {settings.DAMPED_MUON}


def test_grids_are_about_a_factor_of_three_apart_and_equal_for_all_methods():
    assert settings.steps_of_ten(0.003, 0.3) == (0.003, 0.01, 0.03, 0.1, 0.3)
    for name in ("e8", "e8_falling", "e9", "e10", "e11"):
        todo = optimizers.EXPERIMENTS[name].tuning(False)
        by_cell = {}
        for trial in todo:
            optimizer = next(own for own in settings.OPTIMIZERS if own in trial.method)
            cell = by_cell.setdefault((trial.setting, trial.batch_size, optimizer), {})
            cell.setdefault(trial.method, []).append(trial.rate)
        for methods in by_cell.values():
            assert len({tuple(rates) for rates in methods.values()}) == 1
            assert len(next(iter(methods.values()))) >= 4
        examples = {trial.steps * trial.batch_size for trial in todo}
        assert max(examples) - min(examples) < 2048  # what fills no batch


@pytest.mark.parametrize(
    ("name", "of", "setting"),
    [("e8_falling", settings.FALLING, settings.FALLING), ("e9", settings.TEN_EPOCHS, settings.REGULARIZED)],
)
def test_what_is_fitted_again_has_the_best_rate(name, of, setting):
    cells = protocol.by_cell(runs.read_rows(runs.RESULTS / f"{name}.csv", Outcome))
    again = protocol.by_cell(optimizers.fit_trials(setting, False))
    for (data, _, size, method), trainings in again.items():
        without = method.partition(", ")[0].removesuffix(" + noise").removesuffix(" + dropout")
        tuning = [o for o in cells[data, of, size, without] if o.seed == 0]
        assert {protocol.best(tuning).trial} == {
            dataclasses.replace(trial, setting=of, method=without, seed=0) for trial in trainings
        }
    assert len(again) == len(settings.FIT[setting])


def test_the_gap_is_between_training_and_test_images():
    def outcome(method, seed, fit, test):
        return Outcome("cifar-10", settings.FALLING, method, 128, 0.1, 400, seed, "abc", 1.0, 0.5, 60.0, test, fit)

    rows = [outcome("BNP(Muon)", 1, 80.0, 70.0), outcome("BNP(Muon)", 2, 82.0, 71.0), outcome("Muon", 1, 75.0, 74.0)]
    assert optimizers.fit_table(rows).splitlines()[2:] == [
        "| Muon | 75.0 | 75.0 | 74.0 | 1.0 | 0.500 |",
        "| BNP(Muon) | 81.0 | 80.0 to 82.0 | 70.5 | 10.5 | 0.500 |",
    ]


def test_a_short_form(tmp_path, capsys):
    optimizers.main(["e9", "--quick", "--results", str(tmp_path), "--workers", "1"])
    outcomes = runs.read_rows(tmp_path / "e9.csv", Outcome)
    assert [(outcome.method, outcome.seed) for outcome in outcomes] == [
        ("Adam", 0),
        ("Adam + BN", 0),
        ("Adam", 1),
        ("Adam + BN", 1),
    ]
    assert "Adam + BN" in capsys.readouterr().out
    assert trials.report(optimizers.EXPERIMENTS["e9"], outcomes, tmp_path)[0]["e9"].count("Adam") == 2
