"""The trainings of the language model, in a short form."""

import jax
import numpy as np
import pytest

import language_model
import runs
from language_model import Outcome, Trial


def test_a_short_form_continues_where_it_stopped(tmp_path):
    arguments = ["--quick", "--results", str(tmp_path), "--workers", "1"]
    outcomes = language_model.main(arguments)
    assert [(outcome.method, outcome.seed) for outcome in outcomes] == [
        ("Adam", 0),
        ("BNP(Adam)", 0),
        ("Adam", 1),
        ("BNP(Adam)", 1),
    ]
    num_characters, _ = language_model.make_data(steps=1, seed=0)
    for outcome in outcomes:
        assert len(outcome.validation) == language_model.EVALUATIONS
        assert 1 < outcome.validation[-1] < outcome.validation[0] < np.log(num_characters) + 1  # what a guess costs
        assert np.isnan(outcome.test) == (outcome.seed == 0)
        assert outcome.milliseconds > 0
    before = (tmp_path / "e7.csv").read_text()
    again = language_model.main(arguments)
    assert (tmp_path / "e7.csv").read_text() == before
    assert [outcome.trial for outcome in again] == [outcome.trial for outcome in outcomes]
    assert runs.read_rows(tmp_path / "e7.csv", Outcome)[0].curve == outcomes[0].curve


def test_the_best_rate_is_that_of_the_lowest_finite_loss():
    def outcome(rate, curve):
        return Outcome("LayerNorm", "Adam", rate, 3, 0, "abc", 1.0, curve, np.nan)

    tuning = [outcome(0.3, "3.0 2.0"), outcome(0.1, "3.0 2.0"), outcome(0.03, "3.0 2.5"), outcome(1.0, "1.0 nan")]
    assert language_model.best(tuning).rate == 0.1
    assert tuning[-1].validation[-1] == np.inf
    assert [own.diverged for own in tuning] == [False, False, False, True]
    assert tuning[0].trial == Trial("LayerNorm", "Adam", 0.3, 3, 0)


def test_without_normalization_the_network_has_none():
    for normalized in (True, False):
        model = language_model.LanguageModel(30, normalized=normalized)
        params = model.init(jax.random.key(0), np.zeros((1, 8), int))["params"]
        names = {*params, *params["blocks"]}
        assert any("LayerNorm" in name for name in names) == normalized


@pytest.mark.parametrize("kind", language_model.FASTER_EMBEDDINGS)
@pytest.mark.parametrize("optimizer", language_model.OPTIMIZERS)
def test_embeddings_alone_are_faster(optimizer, kind):
    text = np.zeros((1, language_model.LENGTH + 1), int)
    updates = []
    for method in (kind.partition(",")[0].format(optimizer), kind.format(optimizer)):
        model, tx = language_model.make_program("LayerNorm", method, 30)
        params = model.init(jax.random.key(0), text[:, :-1])["params"]
        new, _ = language_model.train_step(model, tx, 1e-3, (params, tx.init(params)), text)
        updates.append(jax.tree.map(lambda a, b: a - b, new, params))
    faster = language_model.are_embeddings(updates[0])
    assert {*faster} >= {"positions", "characters", "blocks"}
    expected = jax.tree.map(lambda own, is_faster: own * (10 if is_faster else 1), updates[0], faster)
    jax.tree.map(
        lambda actual, own: np.testing.assert_allclose(actual, own, rtol=1e-3, atol=1e-6), updates[1], expected
    )
    assert sum(jax.tree.leaves(faster)) == 2
