"""The experiment on updates of few bits: what has 8 bits and what has not, and the quick form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import methods
import methods_report
import quantized
from protocol import Trial
from quantized import METHODS, Network

# qwix 0.1 asks NNX for a name that it has taken back
pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")

X, Y = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4, 4, 1)), jnp.float32), jnp.arange(16) % 10
KERNELS = {"Dense_0", "Dense_1", "Dense_2", "classifier"}  # of a network with one block
OF_THE_BLOCK = {"Dense_1", "Dense_2"}


@functools.cache
def states(method):
    """Returns the states of a training before and after three steps."""
    task = quantized.task(Trial("digits", list(quantized.SETTINGS)[1], method, 16, 0.0, 3, 0))
    states, step = [jax.jit(task.init)(jax.random.key(0), X[:1])], jax.jit(task.step)
    for _ in range(3):
        states.append(step(states[-1], jnp.float32(0.3), X, Y)[0])
    return states


@pytest.mark.parametrize("method", METHODS)
def test_the_kernels_that_are_to_be_on_the_grid_are(method):
    before, *_, after = (state.params for state in states(method))
    on_grid = {name for name in KERNELS if not np.any(after[name]["kernel"] * 128 % 1)}
    expected = KERNELS if METHODS[method].everywhere else OF_THE_BLOCK
    assert on_grid == (expected if METHODS[method].rounding else set())
    assert all(np.any(before[name]["kernel"] != after[name]["kernel"]) for name in KERNELS)
    assert after["ScalarBias_0"]["bias"] * 128 % 1


def test_the_block_alone_computes_in_8_bits_forwards_and_backwards():
    model = Network("fixup", 1)
    few, params = quantized.quantized(model, True), states("float32")[-1].params

    def run(model, params, **options):
        return jax.vjp(lambda params: model.apply({"params": params}, X, **options), params)

    logits, pull = run(model, params)
    few_logits, few_pull = run(few, params, rngs={"stochastic_rounding": jax.random.key(0)})
    assert 0 < np.abs(few_logits - logits).max() < 0.05 * np.abs(logits).max()
    gradients, few_gradients = pull(logits)[0], few_pull(logits)[0]
    np.testing.assert_array_equal(few_gradients["classifier"]["bias"], gradients["classifier"]["bias"])
    for name in OF_THE_BLOCK:
        error = np.abs(few_gradients[name]["kernel"] - gradients[name]["kernel"]).max()
        assert 0 < error < 0.25 * np.abs(gradients[name]["kernel"]).max()
    used = quantized.quantized(model, False)
    np.testing.assert_allclose(used.apply({"params": params}, X), few_logits, rtol=1e-5, atol=1e-6)


def test_the_experiment_in_a_short_form(tmp_path, monkeypatch, capsys):
    few = {name: METHODS[name] for name in list(METHODS)[:3]}  # each compiles for seconds
    monkeypatch.setattr(quantized, "METHODS", few)
    methods.main(["quantized", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, drawn = methods_report.make(tmp_path)
    assert set(texts) == {"quantized", "quantized_rates"}
    assert [line.get_label() for line in drawn["quantized"].axes[0].get_lines()] == list(few)
    assert "| digits | 1 Fixup blocks | 64 | 8-bit network, float32 updates |" in capsys.readouterr().out
