"""The comparison on a language model, in a short form."""

import numpy as np

import language_model


def test_language_model(tmp_path, capsys):
    picture, losses = tmp_path / "transformer.png", tmp_path / "losses.csv"
    arguments = ["--steps", "20", "--sgd-rates", "0.1", "--adam-rates", "0.01", "--muon-rates", "0.1"]
    arguments += ["--output", str(picture), "--csv", str(losses)]
    num_characters, _ = language_model.make_data(steps=1, seed=0)
    results = language_model.main(arguments)
    assert list(results) == ["SGD", "BNP(SGD)", "Adam", "BNP(Adam)", "Muon", "BNP(Muon)"]
    for result in results.values():
        assert 1 < result.test < np.log(num_characters)  # what a guess costs
    assert picture.exists()
    assert [row.split(",")[0] for row in losses.read_text().splitlines()] == ["method", *results]
    assert "nats per character" in capsys.readouterr().out
