"""The residual networks without normalization: what they are at their start, what is clipped, and the quick form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import methods
import methods_report
import normalizer_free
from normalizer_free import BLOCKS, CLIPPING, METHODS, Network, make_optimizer
from protocol import Trial

X = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8, 8, 1)), jnp.float32)


@functools.cache
def variables(form):
    return jax.jit(Network(form).init)(jax.random.key(0), X)


def logits(form):
    return jax.jit(functools.partial(Network(form).apply, train=True, mutable=["batch_stats"]))(variables(form), X)[0]


def test_fixup_begins_with_logits_of_zero_and_standardized_kernels_near_them():
    np.testing.assert_array_equal(logits("fixup"), np.zeros((64, 10)))
    assert np.abs(logits("standardized")).max() < 1


def test_without_normalization_the_logits_grow_with_the_blocks():
    assert np.abs(logits("plain")).std() > 5 * np.abs(logits("bn")).std()


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.clipped])
def test_all_layers_but_the_classifier_are_clipped(method):
    form = METHODS[method].form
    params = variables(form)["params"]
    tx = make_optimizer(METHODS[method], Network(form), params, X, 1.0)
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e3), params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    clipped = 0
    for name, own in params.items():
        if "Dense_" in name:
            bounds = CLIPPING * jnp.linalg.norm(own["kernel"], axis=0)
            np.testing.assert_allclose(jnp.linalg.norm(updates[name]["kernel"], axis=0), bounds, rtol=1e-5)
            clipped += 1
    assert clipped == 1 + 2 * BLOCKS
    np.testing.assert_array_equal(updates["classifier"]["kernel"], -1e3 * np.ones((100, 10)))


def test_fixups_scalars_and_biases_take_a_tenth_of_the_rate():
    params = variables("fixup")["params"]
    tx = make_optimizer(METHODS["Fixup"], Network("fixup"), params, X, 1.0)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(after, -1.0 if before.ndim > 1 else -0.1, rtol=1e-6)


def test_bnp_covers_every_layer_of_the_plain_network():
    params = variables("plain")["params"]
    tx = make_optimizer(METHODS["BNP"], Network("plain"), params, X, 1.0)
    statistics = tx.init(params).statistics
    assert len(list(statistics)) == 2 + 2 * BLOCKS


def test_the_quick_form_makes_a_table_and_a_figure(tmp_path):
    methods.main(["normalizer_free", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, drawn = methods_report.make(tmp_path)
    rows = texts["normalizer_free"].splitlines()[2:]
    assert [row.split(" | ")[3] for row in rows] == list(METHODS)
    [panel] = drawn["normalizer_free"].axes
    assert [line.get_label() for line in panel.get_lines()] == list(METHODS)


def test_a_training_that_diverged_is_drawn_as_guessing():
    trial = Trial("mnist", "some blocks", "none", 64, 1.0, 10, 0)
    outcome = {"commit": "", "seconds": 1.0, "validation_accuracy": 50.0, "test_accuracy": 50.0, "measure": 0.0}
    outcomes = [
        normalizer_free.Outcome(**(trial.__dict__ | {"rate": rate, "seed": seed}), **outcome, train_loss=loss)
        for rate, seed, loss in ((0.1, 0, 0.5), (1.0, 0, float("nan")), (0.1, 1, 0.5))
    ]
    [panel] = normalizer_free.report(outcomes)[1]["normalizer_free"].axes
    np.testing.assert_array_equal(panel.get_lines()[0].get_ydata(), [50.0, 90.0])
