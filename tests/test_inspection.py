"""What `inspect` says of a training, against matrices and moments that are built by other means."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import normal

import bnp_optax as bnp
from bnp_optax import analysis

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

X = np.asarray(normal(0, 50, 4)) * [1.0, 0.1, 3.0, 0.5] + [2.0, 0.0, -1.0, 5.0]


def trained(bias, batches=(X,), **options):
    """Returns a layer's inspection against the last batch, its layers and its state."""
    layer = bnp.Layer.dense(("w",), (4, 3), bias=("b",) if bias else None)
    params = {"w": jnp.ones((4, 3))} | ({"b": jnp.ones(3)} if bias else {})
    layers = bnp.Layers((layer,))
    tx = bnp.preconditioned(optax.adam(1e-3), layers, **options)
    state = tx.init(params)
    for x in batches:
        records = {"w": bnp.input_moments(jnp.asarray(x))}
        _, state = tx.update(params, state, params, intermediates=records)
    return bnp.inspect(layers, state, records)["w"], layer, state


@pytest.mark.parametrize("bias", [True, False])
def test_condition_numbers_are_those_of_the_matrices(bias):
    """Of the second moments M of uncorrelated inputs, and of P'MP."""
    own, layer, state = trained(bias, prior_examples=0, scaling="none")
    # one output's part of P, whose numbers are kernel first, of the layer's three
    P = np.asarray(analysis.preconditioner(layer, state.statistics))
    chosen = [*range(0, 12, 3), *([12] if bias else [])]
    P = P[np.ix_(chosen, chosen)]
    with_one = np.append(X.mean(0), [1.0] if bias else [])
    M = np.outer(with_one, with_one)
    M += np.diag(np.append(X.var(0), [0.0] if bias else []))
    if not bias:
        M = np.diag(np.square(X).mean(0))
    np.testing.assert_allclose(own.condition, [np.linalg.cond(M), np.linalg.cond(P.T @ M @ P)], rtol=1e-9)
    assert own.condition[0] > 10 * own.condition[1]


def test_steps_are_rescaled_as_scale_by_bnp_does():
    own, *_ = trained(bias=True, prior_examples=0, eps_relative=0.0, eps=0.0)
    expected = np.sort(50 / 128 / X.var(0))
    np.testing.assert_allclose(own.rescaling, [expected[0], np.median(expected), expected[-1]], rtol=1e-9)
    assert own.seen == 50


def test_how_far_a_batch_is_from_the_running_statistics():
    own, *_ = trained(bias=True, prior_examples=0)
    assert own.mean_off == pytest.approx(0, abs=1e-12)
    assert own.variance_ratio == pytest.approx(1)
    # of a state that has forgotten nothing of X, and a batch that is shifted by two deviations and twice as wide
    layer = bnp.Layers((bnp.Layer.dense(("w",), (4, 3), bias=("b",)),))
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    tx = bnp.scale_by_bnp(layer, eps_relative=0.0, eps=0.0, prior_examples=0)
    _, state = tx.update(params, tx.init(params), intermediates={"w": bnp.input_moments(jnp.asarray(X))})
    other = X.mean(0) + 2 * X.std(0) + 2 * (X - X.mean(0))
    moved = bnp.inspect(layer, state, {"w": bnp.input_moments(jnp.asarray(other))})["w"]
    assert moved.mean_off == pytest.approx(2)
    assert moved.variance_ratio == pytest.approx(4)


def test_batches_that_are_not_finite_are_counted():
    own, *_ = trained(True, batches=(X, np.full_like(X, np.nan), X[:10]))
    assert (own.seen, own.skipped) == (60, 1)


def test_stacks_and_groups_show_their_worst_and_inputs_that_never_vary_are_left_out():
    kernel = bnp.Parameter(("w",), (2, 3, 4), (2, 3, 4), "sio")
    layers = bnp.Layers((bnp.Layer("stack", kernel, None, record="w"),))
    params = {"w": jnp.ones((2, 3, 4))}
    tx = bnp.scale_by_bnp(layers, eps_relative=0.0, eps=0.0, prior_examples=0)
    x = normal(1, 40, 2, 3) * np.array([[1.0, 1.0, 0.0], [1.0, 10.0, 0.0]])
    records = {"w": bnp.input_moments(x, stack_axes=(1,))}
    _, state = tx.update(params, tx.init(params), intermediates=records)
    second = np.square(x[:, 1, :2]).mean(0)
    before, after = bnp.inspect(layers, state, records)["w"].condition
    assert before == pytest.approx(second.max() / second.min())
    assert after == pytest.approx(1)


@pytest.mark.parametrize("wrap", ["chain", "multi_steps", "apply_if_finite", "nnx"])
def test_any_state_that_holds_one_of_bnp(wrap):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    x = jnp.asarray(X, jnp.float32)
    layers = bnp.nnx.find_layers(model, x)
    own = bnp.scale_by_bnp(layers)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    match wrap:
        case "nnx":
            state = nnx.Optimizer(model, bnp.preconditioned(optax.adam(1e-3), layers), wrt=nnx.Param).opt_state
        case "chain":
            state = optax.chain(optax.clip(1.0), own, optax.adam(1.0)).init(params)
        case "multi_steps":
            state = optax.MultiSteps(optax.with_extra_args_support(own), 4).init(params)
        case "apply_if_finite":
            state = optax.apply_if_finite(own, 3).init(params)
    inspection = bnp.inspect(layers, state)
    assert list(inspection) == ["kernel"] == list(layers)
    assert inspection["kernel"].rescaling == pytest.approx((1 / 1.0101,) * 3)
    assert np.isnan(inspection["kernel"].mean_off)


@pytest.mark.parametrize("inputs", [1024, 1025])
def test_eigenvalues_of_wide_layers_are_not_computed(inputs):
    layers = bnp.Layers((bnp.Layer.dense(("w",), (inputs, 1), bias=("b",)),))
    state = bnp.scale_by_bnp(layers).init({"w": jnp.ones((inputs, 1)), "b": jnp.ones(1)})
    inspection = bnp.inspect(layers, state)
    before, after = inspection["w"].condition
    assert np.isnan(before) == (inputs > 1024)
    assert after == pytest.approx(1.0101)  # the damping of the start: 1 + 0.01 + 0.0001
    assert ("? -> 1.01" in str(inspection)) == (inputs > 1024)


def test_what_it_prints_and_draws():
    own, layer, state = trained(True)
    left = bnp.Excluded(("scale",), (3,), "it is no kernel")
    inspection = bnp.inspect(bnp.Layers((layer,), (left,)), state, {"w": bnp.input_moments(jnp.asarray(X))})
    lines = str(inspection).splitlines()
    assert lines[0].split()[:3] == ["layer", "examples", "skipped"]
    assert lines[1].split()[:4] == ["w", "50", "0", f"{own.mean_off:.2f}"]
    assert lines[-1] == "Excluded parameters: 1; print(layers) says why."
    offsets, steps, conditions = inspection.figure().axes
    assert [label.get_text() for label in offsets.get_yticklabels()] == ["w"]
    assert offsets.lines[0].get_xdata() == pytest.approx([own.mean_off])
    assert steps.lines[0].get_xdata() == pytest.approx([own.rescaling[1]])
    assert [line.get_xdata()[0] for line in conditions.lines] == pytest.approx(own.condition)


def test_rich_shows_the_same_table():
    rich_console = pytest.importorskip("rich.console")
    layers = bnp.Layers(
        (bnp.Layer.dense(("[red]", "w"), (4, 3)),), (bnp.Excluded(("scale",), (3,), "it is no kernel"),)
    )
    state = bnp.scale_by_bnp(layers).init({"[red]": {"w": jnp.ones((4, 3))}, "scale": jnp.ones(3)})
    inspection = bnp.inspect(layers, state)
    console = rich_console.Console(width=200, record=True, file=io.StringIO())
    console.print(inspection)
    _, *shown = [line.replace("┃", " ").replace("│", " ").split() for line in console.export_text().splitlines()]
    header, row, *_, caption = [line.split() for line in str(inspection).splitlines()]
    assert (shown[0], shown[2], shown[-1]) == (header, row, caption)
    assert "[red]" in row[0]  # no markup


def test_without_matplotlib_the_figure_says_what_to_install(monkeypatch):
    inspection = bnp.Inspection({}, 0)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        inspection.figure()


def test_what_does_not_fit_is_refused():
    _, layer, state = trained(True)
    with pytest.raises(ValueError, match="holds 0 states of BNP"):
        bnp.inspect(bnp.Layers((layer,)), optax.adam(1.0).init({"w": jnp.ones(3)}))
    with pytest.raises(ValueError, match="holds 2 states of BNP"):
        bnp.inspect(bnp.Layers((layer,)), (state, state))
    other = bnp.Layers((bnp.Layer.dense(("v",), (4, 3)),))
    with pytest.raises(ValueError, match="no statistics of v"):
        bnp.inspect(other, state)
    with pytest.raises(ValueError, match="no record of the input of w"):
        bnp.inspect(bnp.Layers((layer,)), state, {})
    with pytest.raises(TypeError, match="must be the records"):
        bnp.inspect(bnp.Layers((layer,)), state, jax.numpy.ones(3))


def test_states_of_several_trainings_are_refused_and_taken_one_by_one():
    layers = bnp.Layers((bnp.Layer.dense(("w",), (3, 2)),))
    params = {"w": jnp.ones((4, 3, 2))}
    states = jax.vmap(bnp.scale_by_bnp(layers).init)(params)
    with pytest.raises(ValueError, match=r"holds 4 states .* jax\.tree\.map\(lambda leaf: leaf\[0\], state\)"):
        bnp.inspect(layers, states)
    assert bnp.inspect(layers, jax.tree.map(lambda leaf: leaf[0], states))["w"].seen == 0
