"""The examples, in a short form."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
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


def return_at_random(swing):
    """Returns the mean return of 500 episodes of 200 random actions each, in the pendulum of an example."""
    rng = np.random.default_rng(0)
    state, total, swing = jnp.asarray(rng.uniform(-1, 1, (500, 2)) * [np.pi, 1]), 0, jax.jit(swing)
    for _ in range(200):
        state, reward = swing(state, rng.integers(0, 3, 500))
        total += np.asarray(reward)
    return total.mean()


def test_reinforcement_learning(monkeypatch, capsys):
    example = load("reinforcement_learning")
    rest = jnp.array([[0.0, 0.0], [3 * jnp.pi, 0.0]])  # upright, and hanging
    stays, rewards = example.swing(rest, jnp.ones(2, int))  # without a torque
    np.testing.assert_allclose(stays, rest, atol=1e-5)
    np.testing.assert_allclose(rewards, [0, -(np.pi**2)], rtol=1e-5)
    falls, _ = example.swing(jnp.array([[0.1, 0.0], [0.0, 0.0], [0.0, 0.0]]), jnp.array([1, 2, 0]))
    gravity, length, torque, dt = 10, 1, 2, 0.05  # of a rod of mass 1: what accelerates it, by its moment of inertia
    push = torque / (length**2 / 3)
    expected = np.array([gravity * length / 2 * np.sin(0.1) / (length**2 / 3), push, -push]) * dt
    np.testing.assert_allclose(falls[:, 1], expected, rtol=1e-5)

    runs = (example.BNP, True), (example.RENORM, False)
    short = {"RUNS": runs, "STEPS": 2000, "ENVIRONMENTS": 8, "BATCH": 16, "RATES": (0.003,), "SEEDS": 3}
    for name, value in short.items():
        monkeypatch.setattr(example, name, value)
    returns = example.main()
    printed = capsys.readouterr().out
    at_random = return_at_random(example.swing)
    assert round(at_random, -2) == -1200  # as docs/reinforcement_learning.md has it
    for method, has_target in runs:
        ((*seeds,),) = returns[method, has_target]
        assert at_random + 100 < np.mean(seeds) < 0
        seen = f"{np.mean(seeds):.0f} ({min(seeds):.0f} to {max(seeds):.0f})"
        assert f"| {method} | {'yes' if has_target else 'no'} | {seen} |" in printed


def test_examples_are_short():
    """They are to be copied: one idea each."""
    lengths = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    names = {"binary_network", "linen_train_state", "many_devices", "nnx_cnn", "online"}
    assert set(lengths) == names | {"reinforcement_learning", "transformer"}
    assert max(lengths.values()) <= 100
