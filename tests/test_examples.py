"""The examples, in a short form."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("standard_promotion")

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["linen_train_state", "nnx_cnn"])
def test_small_networks_learn_the_digits(name, monkeypatch, capsys):
    example = load(name)
    monkeypatch.setattr(example, "EPOCHS", 2)
    assert example.main() > 80  # a guess is right in 10 %
    printed = capsys.readouterr().out
    assert "3 layers cover 9,930 of 9,930 parameters" in printed
    assert printed.count("epoch") == 2


def test_transformer(monkeypatch, capsys):
    example = load("transformer")
    monkeypatch.setattr(example, "STEPS", 40)
    characters, *_ = example.load_text()
    assert 1 < example.main() < np.log(characters) - 1  # a guess costs the logarithm
    printed = capsys.readouterr().out
    assert "7 layers cover" in printed  # the blocks' six are stacked
    assert "step 40: loss" in printed


def test_many_devices(monkeypatch, capsys):
    """On one device; ``test_devices.py`` compares several processes with it."""
    example = load("many_devices")
    monkeypatch.setattr(example, "EPOCHS", 3)
    _, accuracy = example.main()
    assert accuracy > 80
    assert "processes: 1, devices: 1" in capsys.readouterr().out


def test_online(monkeypatch, capsys):
    example = load("online")
    monkeypatch.setattr(example, "EXAMPLES", 400)
    monkeypatch.setattr(example, "RATES", (0.001,))
    ((rate, (alone, inside)),) = example.main().items()
    assert rate == 0.001
    assert inside > alone > 40
    assert f"Adam {alone:.1f} %, in BNP's variables {inside:.1f} %" in capsys.readouterr().out


def test_binary_network(monkeypatch, capsys):
    example = load("binary_network")
    monkeypatch.setattr(example, "EPOCHS", 3)
    monkeypatch.setattr(example, "STAGES", {16: 1, 32: 1})
    accuracies = example.main()
    assert min(accuracies.values()) > 60  # a guess is right in 10 %
    printed = capsys.readouterr().out
    for name, accuracy in accuracies.items():
        assert f"{name}, standardized weights: test accuracy" in printed
        assert f"{name}, binary weights: test accuracy {accuracy:.1f} %" in printed


def test_examples_are_short():
    """They are to be copied: one idea each."""
    lengths = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(lengths) == {"binary_network", "linen_train_state", "many_devices", "nnx_cnn", "online", "transformer"}
    assert max(lengths.values()) <= 100
