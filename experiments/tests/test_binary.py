"""The experiment on binary networks: what its networks compute, what is clipped, and the quick form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import binary
import methods
import methods_report
from binary import BLOCKS, CLIPPING, METHODS, OPTIMIZERS, Network
from protocol import Trial

X = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8, 8, 1)), jnp.float32)


@functools.cache
def variables(form):
    return jax.jit(Network(form).init)(jax.random.key(0), X)


def test_kernels_without_standardization_are_signs_times_the_mean_size_of_each_unit():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)), jnp.float32)
    expected = np.abs(kernel).mean(0) * np.where(np.asarray(kernel) >= 0, 1, -1)
    np.testing.assert_allclose(binary.binarize(kernel), expected, rtol=1e-5)
    gradient = jax.grad(lambda kernel: jnp.sum(jnp.cos(jnp.arange(150.0)).reshape(50, 3) * binary.binarize(kernel)))
    np.testing.assert_allclose(gradient(kernel), np.cos(np.arange(150.0)).reshape(50, 3), rtol=1e-5)


@pytest.mark.parametrize("form", ["bn", "none", "standardized"])
def test_blocks_are_of_one_binary_layer_and_bn_where_told(form):
    own = variables(form)["params"]
    for kind, wanted in (("RSign", True), ("RPReLU", True), ("BatchNorm", form == "bn")):
        assert sum(name.startswith(f"{kind}_") for name in own) == BLOCKS * wanted
    kind = "BinaryWSDense" if form == "standardized" else "Dense"
    assert sum(name.startswith(f"{kind}_") for name in own) == BLOCKS
    assert own["classifier"]["kernel"].shape == (128, 10)


@pytest.mark.parametrize("method", ["standardized", "standardized + AGC of kernels", "standardized + AGC"])
def test_what_is_clipped_is_that_of_the_method(method):
    """Never the classifier; by unit the kernels, and as vectors what has one axis."""
    params = variables("standardized")["params"]
    tx = binary.make_optimizer(Trial("mnist", "SGD", method, 64, 1.0, 10, 0), 1.0, params)
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e3), params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    clipped = METHODS[method].clipped
    for name, own in params.items():
        for leaf, update in updates[name].items():
            kind = "kernels" if leaf == "kernel" or (name == "stem" and leaf == "bias") else "all"
            if name == "classifier" or clipped == "nothing" or (clipped, kind) == ("kernels", "all"):
                np.testing.assert_array_equal(update, -1e3 * np.ones(update.shape))
            else:
                bounds = CLIPPING * jnp.maximum(jnp.linalg.norm(own[leaf], axis=0), 1e-3)
                np.testing.assert_allclose(jnp.linalg.norm(update, axis=0), bounds, rtol=1e-5)


def test_the_quick_form_makes_a_table_and_a_figure(tmp_path):
    methods.main(["binary", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, drawn = methods_report.make(tmp_path)
    rows = texts["binary"].splitlines()[2:]
    assert [row.split(" | ")[3] for row in rows] == list(METHODS)
    [panel] = drawn["binary"].axes
    assert [line.get_label() for line in panel.get_lines()] == list(METHODS)


def test_every_method_gets_the_same_rates_of_an_optimizer():
    trials = binary.tuning(quick=False)
    assert len(trials) == sum(len(optimizer.rates) for optimizer in OPTIMIZERS.values()) * len(METHODS)
    for name, optimizer in OPTIMIZERS.items():
        for method in METHODS:
            assert [t.rate for t in trials if (t.setting, t.method) == (name, method)] == list(optimizer.rates)
