"""The examples, in a short form."""

import importlib.util
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("standard_promotion")

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(tmp_path, capsys):
    picture = tmp_path / "digits.png"
    arguments = ["--epochs", "2", "--seeds", "1", "--batch-sizes", "64", "16", "--rates", "0.1", "0.3"]
    results = load("digits").main([*arguments, "--output", str(picture)])
    assert list(results) == [64, 16]
    for by_method in results.values():
        assert list(by_method) == ["SGD", "BN", "BNP", "Adam", "BNP(Adam)"]
    assert results[16]["BNP"].test.mean() > 85  # a guess is right in 10 %
    assert results[16]["BNP(Adam)"].test.mean() > 85
    assert np.std(matplotlib.image.imread(picture)) > 0.05
    assert "works" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs and --seeds must be at least 1"),
        (["--rates", "-1"], "--rates must be positive"),
        (["--batch-sizes", "2000"], "--batch-sizes must lie between 1 and 1024"),
        (["--methods", "Muon"], "invalid choice: 'Muon'"),
        (["--output", "missing/digits.png"], "--output must be a .png file in a directory that exists"),
    ],
)
def test_digits_refuses_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        load("digits").main(arguments)
    assert message in capsys.readouterr().err


def test_transformer(tmp_path, capsys):
    picture, losses = tmp_path / "transformer.png", tmp_path / "losses.csv"
    arguments = ["--steps", "20", "--sgd-rates", "0.1", "--adam-rates", "0.01", "--muon-rates", "0.1"]
    arguments += ["--output", str(picture), "--csv", str(losses)]
    transformer = load("transformer")
    num_characters, _ = transformer.make_data(steps=1, seed=0)
    results = transformer.main(arguments)
    assert list(results) == ["SGD", "BNP(SGD)", "Adam", "BNP(Adam)", "Muon", "BNP(Muon)"]
    for result in results.values():
        assert 1 < result.test < np.log(num_characters)  # what a guess costs
    assert picture.exists()
    assert [row.split(",")[0] for row in losses.read_text().splitlines()] == ["method", *results]
    assert "nats per character" in capsys.readouterr().out


def test_nnx_cnn(capsys):
    results = load("nnx_cnn").main(["--epochs", "1", "--batch-size", "16", "--rates", "0.01"])
    assert set(results) == {"Adam", "BNP(Adam)"}
    assert results["BNP(Adam)"][0.01][-1] > 80  # a guess is right in 10 %
    assert "Test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch-size", "0"], "--batch-size must lie between 1 and 1024"),
        (["--rates", "0"], "--rates must be positive"),
    ],
)
def test_nnx_cnn_refuses_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        load("nnx_cnn").main(arguments)
    assert message in capsys.readouterr().err
