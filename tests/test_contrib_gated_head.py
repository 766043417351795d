"""The gated head of representation alignment: the function against loops, and the layers of Linen and NNX."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_contrib_alignment import draw

import bnp_optax as bnp
from bnp_optax.contrib.alignment import alignment_residual, gated_head
from bnp_optax.contrib.linen.alignment import GatedHead
from bnp_optax.contrib.nnx.alignment import Gate
from bnp_optax.contrib.nnx.alignment import GatedHead as NNXGatedHead

pytestmark = pytest.mark.usefixtures("x64")


def head_by_loops(z, hidden, output, gate, slope):
    y = np.zeros((len(z), len(output)))
    for n in range(len(z)):
        for j in range(len(output)):
            for k in range(output.shape[1]):
                opened = 1 / (1 + np.exp(-slope * (z[n] @ gate[:, j, k])))
                y[n, j] += output[j, k] * opened * (z[n] @ hidden[:, j, k])
    return y


Z, HIDDEN, OUTPUT, GATE = draw(0, 6, 4), draw(1, 4, 3, 5), draw(2, 3, 5), draw(3, 4, 3, 5)


@pytest.mark.parametrize("slope", [0.0, 0.7, 20.0])
def test_the_head_is_the_loop_over_outputs_and_units(slope):
    for gate in (GATE, None):
        expected = head_by_loops(Z, HIDDEN, OUTPUT, HIDDEN if gate is None else gate, slope)
        np.testing.assert_allclose(gated_head(Z, HIDDEN, OUTPUT, gate, slope=slope), expected, rtol=1e-12, atol=1e-14)
    one = gated_head(Z[2], HIDDEN, OUTPUT, GATE)
    np.testing.assert_allclose(one, gated_head(Z, HIDDEN, OUTPUT, GATE)[2], rtol=1e-13)
    stacked = gated_head(Z.reshape(2, 3, 4), HIDDEN, OUTPUT, GATE)
    np.testing.assert_allclose(stacked.reshape(6, 3), gated_head(Z, HIDDEN, OUTPUT, GATE), rtol=1e-13)


def test_a_tied_gate_tends_to_relu_with_its_slope():
    relu = np.einsum("njk,jk->nj", np.maximum(np.einsum("ni,ijk->njk", Z, HIDDEN), 0), OUTPUT)
    errors = [np.abs(gated_head(Z, HIDDEN, OUTPUT, slope=slope) - relu).max() for slope in (1.0, 100.0, 1e5)]
    assert errors[0] > 30 * errors[1] > 900 * errors[2]
    assert errors[2] < 1e-5


def test_a_tied_gate_has_the_gradient_through_both():
    loss = lambda w, r: jnp.square(gated_head(Z, w, OUTPUT, r, slope=2.0)).sum()  # noqa: E731
    tied = jax.jit(jax.grad(lambda w: loss(w, None)))(HIDDEN)
    apart = jax.jit(jax.grad(loss, argnums=(0, 1)))(HIDDEN, HIDDEN)
    np.testing.assert_allclose(tied, sum(apart), rtol=1e-11)
    assert np.abs(apart[1]).max() > 0.1


def test_outputs_are_the_jacobian_times_the_hidden_weights_if_and_only_if_the_gate_is_frozen():
    f = lambda w, gate: gated_head(Z, w, OUTPUT, gate)  # noqa: E731
    along = jax.jit(lambda gate: jax.jvp(lambda w: f(w, gate), (HIDDEN,), (HIDDEN,)))
    value, slope = along(GATE)
    np.testing.assert_allclose(slope, value, rtol=1e-14, atol=1e-14)
    jacobian = jax.jit(jax.jacrev(lambda w: f(w, GATE)))
    jacobians = [jacobian(w) for w in (HIDDEN, GATE)]
    np.testing.assert_array_equal(*jacobians)
    value, slope = along(None)
    assert np.abs(slope - value).max() > 1e-3


def test_the_loss_is_convex_if_and_only_if_the_gate_is_frozen():
    y = draw(7, 6, 3)

    def smallest_eigenvalue(gate):
        loss = lambda w: jnp.square(gated_head(Z, w.reshape(HIDDEN.shape), OUTPUT, gate, slope=2.0) - y).sum()  # noqa: E731
        return np.linalg.eigvalsh(jax.jit(jax.hessian(loss))(HIDDEN.ravel())).min()

    assert smallest_eigenvalue(GATE) > -1e-11
    assert smallest_eigenvalue(None) < -0.1


def test_a_wide_head_reaches_all_targets_and_a_narrow_one_does_not():
    """The independence of the rows vec((v * sigmoid(slope R z)) z') decides, and least squares finds the weights."""
    z, y = np.append(draw(0, 20, 4), np.ones((20, 1)), 1), draw(1, 20, 2)
    of_head = jax.jit(lambda z, w, v, y: alignment_residual(lambda own, z: gated_head(z, own, v, w), w, z, y))
    for width, reaches in ((2, False), (8, True)):
        hidden, output = draw(2, 5, 2, width), draw(3, 2, width)
        found = of_head(z, hidden, output, y)
        rows = [
            np.einsum("nk,ni->nki", output[j] / (1 + np.exp(-20 * z @ hidden[:, j])), z).reshape(20, -1)
            for j in range(2)
        ]
        assert int(found.rank) == sum(map(np.linalg.matrix_rank, rows)) == min(20, 5 * width) * 2
        assert (found.residual < 1e-12) == reaches
        assert reaches or found.residual > 0.4
        solution = np.stack(
            [np.linalg.lstsq(own, y[:, j])[0].reshape(width, 5).T for j, own in enumerate(rows)], axis=1
        )
        rest = gated_head(z, solution, output, hidden) - y
        np.testing.assert_allclose(np.linalg.norm(rest) / np.linalg.norm(y), found.residual, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_head_in_low_precision(dtype):
    arrays = [jnp.asarray(array).astype(dtype) for array in (Z, HIDDEN, OUTPUT, GATE)]
    y = gated_head(*arrays, slope=1.0)
    assert y.dtype == dtype
    expected = head_by_loops(*(np.asarray(array, float) for array in arrays), 1.0)
    np.testing.assert_allclose(np.asarray(y, float), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "arrays",
    [(Z[:, :3], HIDDEN, OUTPUT), (Z, HIDDEN[0], OUTPUT), (Z, HIDDEN, OUTPUT.T), (Z, HIDDEN, OUTPUT, GATE[:3])],
)
def test_shapes_that_do_not_fit_are_refused(arrays):
    with pytest.raises(ValueError, match=r"Expected z \[..., inputs\], hidden and gate .*, but the shapes are z \("):
        gated_head(*arrays)


@functools.cache
def applied(head, frozen=False, mutable=False):
    """The compiled application of a head of Linen to the features above."""
    return jax.jit(lambda variables: head.apply(variables, Z, frozen, mutable=mutable))


@functools.cache
def linen_head(**options):
    head = GatedHead(3, 5, param_dtype=jnp.float64, **options)
    return head, jax.jit(head.init)(jax.random.key(0), jnp.asarray(Z))


def test_the_layer_of_linen_is_the_function():
    head, variables = linen_head(slope=3.0)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"hidden": (5, 3, 5), "output": (3, 5)}}
    params = variables["params"]
    ones = np.append(Z, np.ones((6, 1)), 1)
    tied, gate = applied(head, mutable="gate")(variables)
    np.testing.assert_allclose(tied, gated_head(ones, **params, slope=3.0), rtol=1e-13)
    np.testing.assert_array_equal(applied(head)(variables), tied)
    assert applied(head, True)(variables | gate).tobytes() == np.asarray(tied).tobytes()
    chex.assert_trees_all_equal(gate, {"gate": {"hidden": params["hidden"]}})
    moved = {"params": {**params, "hidden": 2 * params["hidden"]}}
    frozen = applied(head, True)(moved | gate)
    np.testing.assert_allclose(frozen, 2 * tied, rtol=1e-13)
    expected = gated_head(ones, 2 * params["hidden"], params["output"], params["hidden"], slope=3.0)
    np.testing.assert_allclose(frozen, expected, rtol=1e-13)
    np.testing.assert_array_equal(applied(head)(moved | gate), applied(head)(moved))  # not frozen: tied all the same
    assert np.abs(applied(head)(moved) - 2 * tied).max() > 1e-3


def test_the_layer_of_nnx_is_that_of_linen():
    head, variables = linen_head(slope=3.0)
    other = NNXGatedHead(4, 3, 5, slope=3.0, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(other, nnx.Param))
    for name in ("hidden", "output"):
        own = getattr(other, name)
        assert own[...].shape == variables["params"][name].shape
        own[...] = variables["params"][name]
    np.testing.assert_allclose(other(Z), applied(head)(variables), rtol=1e-14)
    _, gate = applied(head, mutable="gate")(variables)
    other.freeze_gate()
    moved = {**variables["params"], "hidden": variables["params"]["hidden"] + 0.1}
    other.hidden[...] = moved["hidden"]
    expected = applied(head, True)({"params": moved} | gate)
    np.testing.assert_allclose(other(Z), expected, rtol=1e-13)
    assert np.abs(expected - applied(head)({"params": moved})).max() > 1e-3
    assert set(nnx.to_pure_dict(nnx.state(other, nnx.Param))) == {"hidden", "output"}
    assert set(nnx.to_pure_dict(nnx.state(other, Gate))) == {"gate", "is_frozen"}


def test_the_gate_of_nnx_takes_no_part_before_it_is_frozen_and_none_of_the_gradient_after():
    head = NNXGatedHead(4, 3, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    @nnx.jit
    def outputs(head):
        return head(Z)

    before = outputs(head)
    head.gate[...] = 0 * head.gate[...]
    np.testing.assert_array_equal(outputs(head), before)
    nnx.jit(lambda head: head.freeze_gate())(head)  # compiled, too
    np.testing.assert_array_equal(outputs(head), before)
    graph, params, gate = nnx.split(head, nnx.Param, Gate)
    value, slope = jax.jvp(
        lambda hidden: nnx.merge(graph, {**params, "hidden": hidden}, gate)(Z), (params["hidden"],), (params["hidden"],)
    )
    np.testing.assert_allclose(slope, value, rtol=1e-13, atol=1e-14)


def test_a_model_that_is_restored_is_as_frozen_as_it_was():
    head, new = (NNXGatedHead(4, 3, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    head.freeze_gate()
    head.hidden[...] = head.hidden[...] + 0.1
    nnx.update(new, jax.tree.map(jnp.copy, nnx.state(head)))
    np.testing.assert_array_equal(new(Z), head(Z))
    new.hidden[...] = 2 * new.hidden[...]
    np.testing.assert_allclose(new(Z), 2 * head(Z), rtol=1e-13)


def test_parameters_that_are_cast_without_the_gate_decide_on_the_dtype():
    head = NNXGatedHead(4, 3, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    nnx.update(head, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(head, nnx.Param)))
    assert head(Z.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_without_bias_and_in_low_precision():
    head, variables = linen_head(use_bias=False, dtype=jnp.bfloat16)
    assert variables["params"]["hidden"].shape == (4, 3, 5)
    assert applied(head)(variables).dtype == jnp.bfloat16
    other = NNXGatedHead(4, 3, 5, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert other.hidden[...].shape == (4, 3, 5)
    assert other(Z).dtype == jnp.bfloat16
    exact, _ = linen_head(use_bias=False)
    np.testing.assert_allclose(applied(head)(variables).astype(float), applied(exact)(variables), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_initial_weights_keep_the_scale(api):
    """Of variance 2 / inputs and 1 / width, by the fan-in of each unit, not of the whole array."""
    if api == "linen":
        params = jax.jit(GatedHead(40, 50).init)(jax.random.key(0), jnp.ones((1, 99), jnp.float32))["params"]
    else:
        params = nnx.to_pure_dict(nnx.state(NNXGatedHead(99, 40, 50, rngs=nnx.Rngs(0)), nnx.Param))
    np.testing.assert_allclose(params["hidden"].std(), np.sqrt(2 / 100), rtol=0.02)
    np.testing.assert_allclose(params["output"].std(), np.sqrt(1 / 50), rtol=0.1)


def test_a_frozen_gate_that_is_not_there_is_refused():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, frozen=False):
            return GatedHead(2, 3, name="head")(nn.relu(nn.Dense(4)(x)), frozen)

    model, x = Net(), jnp.ones((2, 3), jnp.float32)
    variables = jax.jit(functools.partial(model.init, frozen=True))(jax.random.key(0), x)
    assert set(variables) == {"params"}
    with pytest.raises(ValueError, match=r'The gate of head is not frozen yet.*mutable=\["gate"\]'):
        model.apply(variables, x, frozen=True)
    with pytest.raises(ValueError, match="The gate of head is not frozen yet"):
        model.apply(variables | {"gate": {"elsewhere": {"hidden": jnp.ones(1)}}}, x, frozen=True)
    _, gate = model.apply(variables, x, mutable=["gate"])
    assert jax.tree.map(jnp.shape, gate) == {"gate": {"head": {"hidden": (5, 2, 3)}}}
    model.apply(variables | gate, x, frozen=True)
    layers = bnp.linen.find_layers(model, x)  # the head is none of BNP's
    assert [layer.path for layer in layers.included] == ["Dense_0"]


def test_a_frozen_gate_survives_donated_parameters():
    head = GatedHead(3, 5, param_dtype=jnp.float64)
    variables = jax.jit(head.init)(jax.random.key(0), Z)
    _, gate = head.apply(variables, Z, mutable=["gate"])  # not compiled, which would copy whatever it returns
    expected = np.array(variables["params"]["hidden"])
    donated = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)
    donated(variables["params"])
    assert variables["params"]["hidden"].is_deleted()
    np.testing.assert_array_equal(gate["gate"]["hidden"], expected)
    other = NNXGatedHead(4, 3, 5, rngs=nnx.Rngs(0))
    expected = np.array(other.hidden[...])
    other.freeze_gate()
    state = nnx.state(other, nnx.Param)
    donated(state)
    np.testing.assert_array_equal(other.gate[...], expected)


def test_stacked_heads():
    """Under vmap each has its own gate; an axis that is forgotten is an error, not a tied gate."""
    axes = {"params": 0, "gate": 0}
    make = functools.partial(nn.vmap, GatedHead, split_rngs={"params": True}, axis_size=2, in_axes=(None, None))
    heads = make(variable_axes=axes)(3, 5, param_dtype=jnp.float64)
    variables = jax.jit(lambda key: heads.init(key, Z, False))(jax.random.key(0))
    y, gate = applied(heads, mutable="gate")(variables)
    np.testing.assert_array_equal(applied(heads, True)(variables | gate), y)
    for k in range(2):
        own = jax.tree.map(lambda leaf, k=k: leaf[k], variables | gate)
        alone = applied(GatedHead(3, 5, param_dtype=jnp.float64), True)(own)
        np.testing.assert_allclose(y[k], alone, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="is not frozen yet"):
        make(variable_axes={"params": 0})(3, 5, param_dtype=jnp.float64).apply(variables | gate, Z, True)
