"""Representation alignment: the residual against least squares in NumPy, the gated head, and the two phases."""

import functools
import inspect

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnp_optax as bnp
from bnp_optax.contrib.alignment import alignment_residual, explore_then_exploit, gated_head
from bnp_optax.contrib.linen.alignment import GatedHead
from bnp_optax.contrib.nnx.alignment import Gate
from bnp_optax.contrib.nnx.alignment import GatedHead as NNXGatedHead

pytestmark = pytest.mark.usefixtures("x64")


def draw(seed, *shape, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# The residual and the rank.


def linear(theta, a):
    """Parameters in two parts, so that the order of the tree's leaves matters not."""
    return (a @ jnp.concatenate([theta["first"], theta["second"]])).reshape(-1, 2)


@functools.partial(jax.jit, static_argnames="iterations")
def of_matrix(a, y, iterations=None):
    theta = {"first": jnp.full(2, 0.3, a.dtype), "second": jnp.full(a.shape[1] - 2, -0.7, a.dtype)}
    return alignment_residual(linear, theta, a, y.reshape(-1, 2), iterations=iterations)


def matrix_of_rank(seed, rows, columns, rank):
    return draw(seed, rows, rank) @ draw(seed + 1, rank, columns)


def least_squares_residual(a, y):
    theta = np.linalg.lstsq(a, y)[0]
    return np.linalg.norm(a @ theta - y) / np.linalg.norm(y)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**30), rank=st.integers(1, 6), shape=st.sampled_from([(6, 9), (12, 7)]))
def test_residual_and_rank_are_those_of_numpy(seed, rank, shape):
    a, y = matrix_of_rank(seed, *shape, rank), draw(seed + 2, shape[0])
    found = of_matrix(a, y)
    np.testing.assert_allclose(found.residual, least_squares_residual(a, y), rtol=1e-8, atol=1e-13)
    assert int(found.rank) == np.linalg.matrix_rank(a) == rank
    assert found.residual.dtype == np.float64
    assert found.rank.dtype == np.int32


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**30), rank=st.integers(1, 6))
def test_it_is_zero_where_targets_can_be_reached_and_the_sine_elsewhere(seed, rank):
    a = matrix_of_rank(seed, 12, 7, rank)
    inside = a @ draw(seed + 2, 7)
    assert of_matrix(a, inside).residual < 1e-13
    vector = draw(seed + 3, 12)
    outside = vector - a @ np.linalg.lstsq(a, vector)[0]
    angle = 0.3
    y = np.cos(angle) * inside / np.linalg.norm(inside) + np.sin(angle) * outside / np.linalg.norm(outside)
    np.testing.assert_allclose(of_matrix(a, y).residual, np.sin(angle), rtol=1e-10)
    np.testing.assert_allclose(of_matrix(a, outside).residual, 1, rtol=1e-12)


def test_it_falls_as_columns_are_added():
    a, y = draw(0, 12, 12), draw(1, 12)
    residuals = [float(of_matrix(a[:, :columns], y).residual) for columns in range(2, 13)]
    assert (np.diff(residuals) < 0).all()
    assert residuals[0] > 0.5
    assert residuals[-1] < 1e-12
    repeated = np.concatenate([a[:, :3], a[:, :3] @ draw(2, 3, 4)], axis=1)
    np.testing.assert_allclose(of_matrix(repeated, y).residual, residuals[1], rtol=1e-12)


@pytest.mark.parametrize("iterations", [None, 60])
@pytest.mark.parametrize(("dtype", "factor"), [(np.float64, 1e160), (np.float32, 1e25), (np.float32, 1e30)])
def test_scales_of_targets_and_outputs_do_not_matter(iterations, dtype, factor):
    a, y = matrix_of_rank(0, 12, 7, 4).astype(dtype), draw(1, 12, dtype=dtype)
    expected, rank = of_matrix(a, y, iterations)
    assert 0.1 < expected < 0.95
    for scale in (dtype(factor), dtype(1 / factor)):
        for other in (of_matrix(a, scale * y, iterations), of_matrix(scale * a, y, iterations)):
            np.testing.assert_allclose(other.residual, expected, rtol=1e-5 if dtype == np.float32 else 1e-12)
            assert other.rank == rank


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**30), rank=st.integers(1, 6), shape=st.sampled_from([(6, 9), (12, 7)]))
def test_without_a_matrix_the_residual_is_the_same(seed, rank, shape):
    a, y = matrix_of_rank(seed, *shape, rank), draw(seed + 2, shape[0])
    found = of_matrix(a, y, 200)
    np.testing.assert_allclose(found.residual, of_matrix(a, y).residual, rtol=1e-7, atol=1e-9)
    assert found.rank is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_iterations_end_where_all_that_is_left_is_rounding(dtype, tolerance):
    """Or they would go far along the null space, where the gradient is nothing but rounding."""
    for rank in (1, 4):
        a, y = matrix_of_rank(0, 12, 7, rank).astype(dtype), draw(2, 12, dtype=dtype)
        expected = least_squares_residual(matrix_of_rank(0, 12, 7, rank), y)
        np.testing.assert_allclose(of_matrix(a, y, 5000).residual, expected, rtol=tolerance)


def test_iterations_are_bounds_that_fall_and_count_as_in_the_krylov_space():
    """After k steps of conjugate gradients from 0 the residual is the least over the Krylov space of A'A and A'y."""
    a, y = draw(0, 12, 8), draw(1, 12)
    exact = float(of_matrix(a, y).residual)
    krylov = [a.T @ y]
    for iterations in range(1, 5):
        found = float(of_matrix(a, y, iterations).residual)
        np.testing.assert_allclose(found, least_squares_residual(a @ np.stack(krylov, 1), y), rtol=1e-9)
        assert found > exact + 1e-3
        krylov.append(a.T @ (a @ krylov[-1]))


def test_a_bound_that_rounding_cannot_pass():
    """In float32 what the iterations carry along falls below the least residual; that of their point does not."""
    left, right = np.linalg.qr(draw(0, 60, 60))[0], np.linalg.qr(draw(1, 30, 30))[0]
    y = (left[:, :30].sum(1) + 0.3 * left[:, 30]).astype(np.float32)
    for exponent, iterations in ((-5, 300), (-5, 3000), (-5, 20_000), (-6, 60_000)):
        a = ((left[:, :30] * np.logspace(0, exponent, 30)) @ right).astype(np.float32)
        found = of_matrix(a, y, iterations).residual
        assert least_squares_residual(a.astype(float), y.astype(float)) <= float(found) <= 1


def test_targets_orthogonal_to_all_columns_and_targets_of_zero():
    a = np.concatenate([draw(0, 6, 4), np.zeros((6, 4))])
    y = np.concatenate([np.zeros(6), draw(1, 6)])
    for iterations in (None, 10):
        np.testing.assert_allclose(of_matrix(a, y, iterations).residual, 1, rtol=1e-14)
        assert of_matrix(a, 0 * y, iterations).residual == 0
        assert of_matrix(0 * a, y, iterations).residual == 1
    assert of_matrix(0 * a, y).rank == 0


@pytest.mark.parametrize("iterations", [None, 10])
def test_what_is_not_finite_gives_nan(iterations):
    a, y = draw(0, 6, 4), draw(1, 6)
    for bad in (np.nan, np.inf):
        assert np.isnan(of_matrix(np.where(a == a[2, 1], bad, a), y, iterations).residual)
        assert np.isnan(of_matrix(a, np.where(y == y[3], bad, y), iterations).residual)


def test_float32_takes_weak_directions_for_none():
    """As the docstring says: below max(shape) eps of the largest, about 1e-6 here."""
    left, right = np.linalg.qr(draw(0, 10, 10))[0], np.linalg.qr(draw(1, 10, 10))[0]
    a = (left * np.array([1.0] * 8 + [1e-5, 1e-7])) @ right
    y = left[:, 9]
    assert (of_matrix(a, y).rank, of_matrix(a.astype(np.float32), y.astype(np.float32)).rank) == (10, 9)
    assert of_matrix(a, y).residual < 1e-8
    assert of_matrix(a.astype(np.float32), y.astype(np.float32)).residual > 0.9


@pytest.mark.parametrize("iterations", [None, 300])
def test_a_network_is_measured_at_its_parameters(iterations):
    """The Jacobian of two layers of tanh, by formula."""
    x, y = draw(0, 5, 3), draw(1, 5, 2)
    params = {"w": draw(2, 3, 4), "v": draw(3, 4, 2)}
    h = np.tanh(x @ params["w"])
    of_v = np.einsum("nk,ij->nikj", h, np.eye(2)).reshape(10, 8)
    of_w = np.einsum("nm,nk,kj->njmk", x, 1 - h**2, params["v"]).reshape(10, 12)

    def network(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    @jax.jit
    def find(params):
        whole = alignment_residual(network, params, x, y, iterations=iterations)
        last = alignment_residual(lambda v, x: network({**params, "v": v}, x), params["v"], x, y, iterations=iterations)
        return whole, last

    for found, jacobian in zip(find(params), (np.concatenate([of_v, of_w], 1), of_v), strict=True):
        expected = least_squares_residual(jacobian, y.ravel())
        np.testing.assert_allclose(found.residual, expected, rtol=1e-6, atol=1e-7)
        assert iterations or int(found.rank) == np.linalg.matrix_rank(jacobian)
    assert find(params)[1].residual > 0.05  # the last layer of 8 weights does not reach 10 numbers


def test_outputs_can_be_mapped_one_by_one():
    """Of a head, whose outputs have weights of their own: the squares add up, and so do the ranks."""
    z, hidden, output, y = draw(0, 12, 3), draw(1, 3, 2, 3), draw(2, 2, 3), draw(3, 12, 2)

    def own(hidden, output, y):
        f = lambda w, z: gated_head(z, w[:, None], output[None], hidden[:, None])[:, 0]  # noqa: E731
        return alignment_residual(f, hidden, z, y)

    each = jax.jit(jax.vmap(own, (1, 0, 1)))(hidden, output, y)
    whole = jax.jit(lambda: alignment_residual(lambda w, z: gated_head(z, w, output, hidden), hidden, z, y))()
    norms = np.linalg.norm(y, axis=0)
    np.testing.assert_allclose(np.linalg.norm(each.residual * norms) / np.linalg.norm(norms), whole.residual, rtol=1e-9)
    assert int(whole.rank) == int(each.rank.sum())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_is_computed_in_float32(dtype):
    a, y = draw(0, 12, 4), draw(1, 12)
    cast = lambda array: jnp.asarray(array).astype(dtype)  # noqa: E731
    f = lambda w, x: x.astype(w.dtype) @ w  # noqa: E731
    found = jax.jit(functools.partial(alignment_residual, f))(cast(np.ones(4)), cast(a), cast(y))
    expected = least_squares_residual(np.asarray(cast(a), float), np.asarray(cast(y), float))
    np.testing.assert_allclose(found.residual, expected, rtol=1e-5)
    assert found.residual.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y": np.ones(3)}, ValueError, r"f returns \(3, 2\), but the targets have the shape \(3,\).*one_hot"),
        ({"f": lambda p, x: (x, x)}, ValueError, "f returns .*Let f return one array"),
        ({"params": {"w": np.arange(8).reshape(4, 2)}}, TypeError, r"params\['w'\] is of dtype int64.*Close over"),
        ({"params": {}, "f": lambda p, x: x @ np.ones((4, 2))}, ValueError, "There are 0 parameters and 6 targets"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, or None.*is 0"),
        ({"x": np.ones((0, 4)), "y": np.ones((0, 2))}, ValueError, "8 parameters and 0 targets"),
    ],
)
def test_mistakes_about_the_residual_are_refused(changes, error, message):
    usual = {"f": lambda p, x: x @ p["w"], "params": {"w": np.ones((4, 2))}, "x": np.ones((3, 4)), "y": np.ones((3, 2))}
    with pytest.raises(error, match=message):
        alignment_residual(**usual | changes)


# The gated head.


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


# The layers.


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
    assert set(nnx.to_pure_dict(nnx.state(other, Gate))) == {"gate"}


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


# The two phases.

standard = pytest.mark.usefixtures("standard_promotion")  # as Optax needs it

PARAMS = {"first": {"w": draw(0, 3, 4), "b": draw(1, 4)}, "last": draw(2, 4, 2)}
MASK = {"first": {"w": False, "b": False}, "last": True}
X, Y = draw(3, 8, 3), draw(4, 8, 2)


def loss_fn(params):
    h = jnp.tanh(X @ params["first"]["w"] + params["first"]["b"])
    return jnp.square(h @ params["last"] - Y).sum()


@functools.cache
def stepper(tx):
    """A compiled step, and its program's state kept by the caller."""

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss_fn)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, steps, state=None):
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        params, state = stepper(tx)(params, state)
    return params, state


def distance_from_start(scale):
    """Moves towards where it began, by the norm that parameters had then: what its state remembers matters."""

    def init_fn(params):
        return params, optax.tree.norm(params)

    def update_fn(updates, state, params):
        anchor, norm = state
        return jax.tree.map(lambda u, a, p: -scale * (u / norm + (p - a)), updates, anchor, params), state

    return optax.GradientTransformation(init_fn, update_fn)


PAIRS = {
    "adam, momentum": (optax.adam(0.01), optax.sgd(0.003, momentum=0.9)),
    "decay, anchor": (optax.adamw(0.01, weight_decay=0.1), distance_from_start(0.1)),
    "momentum, decayed lion": (optax.sgd(0.003, momentum=0.9), optax.lion(0.01, weight_decay=0.5)),
    "adam, schedule": (optax.adam(0.01), optax.adam(optax.linear_schedule(0.1, 0.0, 5))),
}


@standard
@pytest.mark.parametrize("name", PAIRS)
def test_it_is_the_first_optimizer_and_then_the_second_begun_anew(name):
    first, second = PAIRS[name]
    tx = explore_then_exploit(first, second, 4, MASK)
    explored, state = train(tx, PARAMS, 4)
    expected, own = train(optax.with_extra_args_support(first), PARAMS, 4)
    chex.assert_trees_all_close(explored, expected, rtol=1e-12)
    chex.assert_trees_all_close(state.exploration, own, rtol=1e-12)
    exploited, state = train(tx, explored, 5, state)
    assert state.count == 9

    # the second by itself, on a tree of its own parameters alone
    def of_last(params, state):
        grads = jax.grad(lambda last: loss_fn({**explored, "last": last}))(params)
        updates, state = optax.with_extra_args_support(second).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step, last, own = jax.jit(of_last), explored["last"], second.init(explored["last"])
    for _ in range(5):
        last, own = step(last, own)
    np.testing.assert_allclose(exploited["last"], last, rtol=1e-11)
    for leaf in ("w", "b"):  # bit for bit, weight decay or not
        assert np.asarray(exploited["first"][leaf]).tobytes() == np.asarray(explored["first"][leaf]).tobytes()
    assert np.abs(exploited["last"] - explored["last"]).min() > 1e-6
    assert np.abs(explored["first"]["w"] - PARAMS["first"]["w"]).min() > 1e-6


@standard
def test_scanned_and_mapped_it_is_the_loop():
    first, second = PAIRS["decay, anchor"]
    tx = explore_then_exploit(first, second, 3, MASK)
    looped, state = train(tx, PARAMS, 6)

    @functools.partial(jax.jit, static_argnums=1)
    def scanned(params, steps, tau=3):
        tx = explore_then_exploit(first, second, tau, MASK)

        def body(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), None, steps)[0]

    chex.assert_trees_all_close(scanned(PARAMS, 6), (looped, state), rtol=1e-12)
    taus = jnp.array([0, 3, 9])
    mapped, _ = jax.vmap(lambda tau: scanned(PARAMS, 6, tau))(taus)
    for k, tau in enumerate((0, 3, 9)):
        alone, _ = train(explore_then_exploit(first, second, tau, MASK), PARAMS, 6)
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, k=k: leaf[k], mapped), alone, rtol=1e-11)


@standard
def test_a_solver_in_the_second_phase_finds_the_least_squares():
    """L-BFGS searches along lines by value_fn, which has all parameters for arguments."""
    tx = explore_then_exploit(optax.adam(0.01), optax.lbfgs(), 2, MASK)
    explored, state = train(tx, PARAMS, 2)
    final, state = train(tx, explored, 25, state)
    h = np.tanh(X @ explored["first"]["w"] + explored["first"]["b"])
    np.testing.assert_allclose(final["last"], np.linalg.lstsq(h, Y)[0], rtol=1e-5, atol=1e-6)
    sizes = {leaf.shape for leaf in jax.tree.leaves(state.exploitation)}
    assert not sizes & {(3, 4), (10, 3, 4)}  # its memory is of the selected parameters
    measure = jax.jit(functools.partial(alignment_residual, lambda last, x: loss_outputs(explored, last)))
    found = measure(explored["last"], X, Y)
    np.testing.assert_allclose(np.sqrt(loss_fn(final)) / np.linalg.norm(Y), found.residual, rtol=1e-6)


def loss_outputs(params, last):
    return jnp.tanh(X @ params["first"]["w"] + params["first"]["b"]) @ last


@standard
def test_a_function_among_the_extra_arguments_keeps_its_other_arguments():
    seen = []

    def update_fn(updates, state, params, *, value_fn, **extra_args):
        assert list(inspect.signature(value_fn).parameters) == ["params", "factor", "shift"]  # Optax looks there
        seen.append((value_fn(params, 3.0, shift=0.25), extra_args))
        return updates, state

    second = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    tx = explore_then_exploit(optax.sgd(0.1), second, 0, MASK)

    def value_fn(params, factor, *, shift):
        assert set(params) == {"first", "last"}
        return factor * params["first"]["b"][0] + shift

    grads = jax.tree.map(jnp.ones_like, PARAMS)
    tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=value_fn, grad=grads, value=1.5)
    [(value, extra_args)] = seen
    assert extra_args["value"] == 1.5
    assert jax.tree.leaves(extra_args["grad"]["first"], is_leaf=lambda leaf: leaf is None) == []  # masked
    chex.assert_trees_all_equal_shapes(extra_args["grad"]["last"], PARAMS["last"])
    del value


@standard
def test_bnps_variables_are_a_first_optimizer():
    model, x, y = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)]), jnp.asarray(X), jnp.asarray(Y)
    params = model.init(jax.random.key(0), x)["params"]
    first = bnp.preconditioned(optax.adam(0.01), bnp.linen.find_layers(model, x))
    tx = explore_then_exploit(first, optax.sgd(0.1), 2, {"layers_0": False, "layers_2": True})

    def loss(params):
        out, records = bnp.linen.capture(model)({"params": params}, x)
        return jnp.square(out - y).mean(), records

    @jax.jit
    def two_steps(params):
        states, both = [tx.init(params), first.init(params)], [params, params]
        for _ in range(2):
            for k, each in enumerate((tx, first)):
                grads, records = jax.grad(loss, has_aux=True)(both[k])
                updates, states[k] = each.update(grads, states[k], both[k], intermediates=records)
                both[k] = optax.apply_updates(both[k], updates)
        return both

    own, expected = two_steps(params)
    chex.assert_trees_all_close(own, expected, rtol=1e-5)
    assert np.abs(own["layers_0"]["kernel"] - params["layers_0"]["kernel"]).max() > 1e-3


@standard
@pytest.mark.parametrize(
    "hidden",
    [
        {"first": False, "last": True},
        {"first": False, "last": np.bool_(True)},
        lambda tree: jax.tree.map_with_path(lambda path, _: path[0].key == "last", tree),
    ],
    ids=["prefix", "numpy", "function"],
)
def test_ways_to_select(hidden):
    expected, _ = train(explore_then_exploit(*PAIRS["adam, momentum"], 2, MASK), PARAMS, 4)
    actual, _ = train(explore_then_exploit(*PAIRS["adam, momentum"], 2, hidden), PARAMS, 4)
    chex.assert_trees_all_equal(actual, expected)


@standard
def test_both_phases_of_an_nnx_model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.features = nnx.Linear(3, 4, param_dtype=jnp.float64, rngs=rngs)
            self.head = NNXGatedHead(4, 2, 5, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.features(x)))

    model = Net(nnx.Rngs(0))

    def hidden(params):
        return jax.tree.map_with_path(lambda path, _: "hidden" in jax.tree_util.keystr(path), params)

    optimizer = nnx.Optimizer(model, explore_then_exploit(optax.sgd(0.01), optax.sgd(0.1), 2, hidden), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.square(model(X) - Y).mean())(model))

    def params():
        return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    for _ in range(2):
        step(model, optimizer)
    model.head.freeze_gate()
    before, gate = params(), np.array(model.head.gate[...])
    np.testing.assert_array_equal(gate, before["head"]["hidden"])
    for _ in range(3):
        step(model, optimizer)
    after = params()
    np.testing.assert_array_equal(model.head.gate[...], gate)
    chex.assert_trees_all_equal(after["features"], before["features"])
    chex.assert_trees_all_equal(after["head"]["output"], before["head"]["output"])
    assert np.abs(after["head"]["hidden"] - before["head"]["hidden"]).max() > 1e-4


@standard
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_keeps_dtypes_in_both_phases(dtype):
    params = optax.tree.cast(PARAMS, dtype)
    tx = explore_then_exploit(optax.adam(0.1, eps=1e-3), optax.sgd(0.1, momentum=0.9), 1, MASK)
    state, update = tx.init(params), jax.jit(tx.update)
    start = state
    for step in range(3):
        updates, state = update(params, state, params)
        chex.assert_trees_all_equal_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
        moved = [bool(np.abs(leaf.astype(float)).max() > 0.01) for leaf in jax.tree.leaves(updates)]
        assert moved == ([True, True, True] if step == 0 else [False, False, True])
    # where one optimizer would return the gradients' dtype and the other that of the parameters, the wider
    tx, wide = explore_then_exploit(optax.adam(0.1), optax.sgd(0.1), 1, MASK), optax.tree.cast(params, jnp.float32)
    updates, _ = jax.jit(tx.update)(params, tx.init(wide), wide)
    chex.assert_trees_all_equal_dtypes(updates, wide)


@standard
def test_hyperparameters_can_be_injected_and_states_mapped():
    make = optax.inject_hyperparams(
        lambda rate, steps: explore_then_exploit(optax.sgd(rate), optax.sgd(1.0), steps, MASK)
    )
    tx = make(rate=0.5, steps=1)
    state = tx.init(PARAMS)
    updates, state = tx.update(PARAMS, state, PARAMS)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda leaf: -0.5 * leaf, PARAMS), rtol=1e-6)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    np.testing.assert_array_equal(updates["first"]["w"], 0 * PARAMS["first"]["w"])
    tx = explore_then_exploit(optax.adam(0.1), optax.adam(0.1), 1, MASK)
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 2, tx.init(PARAMS))
    np.testing.assert_array_equal(doubled.exploration[0].mu["first"]["b"], 2 + 0 * PARAMS["first"]["b"])
    assert doubled.count == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"exploration": 0.1}, TypeError, r"exploration must be an optimizer of Optax.*float"),
        ({"exploitation": optax.adam}, TypeError, r"exploitation must be an optimizer of Optax.*function"),
        ({"steps": -1}, ValueError, "steps must be .* at least 0, but is -1"),
        ({"steps": float("nan")}, ValueError, "steps must be .*nan"),
        ({"hidden": {"first": False, "last": 1.0}}, TypeError, "hidden must be a tree of True and False.*leaf 1.0"),
        ({"hidden": {"first": False}}, ValueError, "hidden is no tree like the parameters"),
        ({"hidden": False}, ValueError, "hidden selects no parameter"),
        ({"hidden": lambda tree: {"first": True, "lost": True}}, ValueError, "hidden is no tree like the parameters"),
    ],
)
def test_mistakes_about_the_phases_are_refused(changes, error, message):
    usual = {"exploration": optax.sgd(0.1), "exploitation": optax.sgd(0.1), "steps": 3, "hidden": MASK}
    with pytest.raises(error, match=message):
        explore_then_exploit(**usual | changes).init(PARAMS)


def test_parameters_are_needed():
    tx = explore_then_exploit(optax.sgd(0.1), optax.sgd(0.1), 3, MASK)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))


# All of it.


@standard
def test_a_network_reaches_zero_loss_where_the_residual_says_so():
    """Linen, end to end: explore, freeze, measure, exploit by a solver; a narrow head does not reach it."""

    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, frozen=False):
            z = nn.relu(nn.Dense(6, param_dtype=jnp.float64)(x))
            return GatedHead(2, self.width, slope=4.0, param_dtype=jnp.float64, name="head")(z, frozen)

    x, y = draw(0, 16, 3), draw(1, 16, 2)
    mask = {"Dense_0": False, "head": {"hidden": True, "output": False}}
    for width, reaches in ((1, False), (12, True)):
        model = Net(width)
        params = jax.jit(model.init)(jax.random.key(0), x)["params"]
        tx = explore_then_exploit(optax.sgd(0.001), optax.sgd(0.03, momentum=0.9), 3, mask)

        def loss(params, gate, frozen, model=model):
            return jnp.square(model.apply({"params": params, **gate}, x, frozen) - y).sum()

        @functools.partial(jax.jit, static_argnames=("frozen", "steps"))
        def train(params, state, gate, frozen, steps, loss=loss, tx=tx):
            def step(carry, _):
                params, state = carry
                updates, state = tx.update(jax.grad(loss)(params, gate, frozen), state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), None, steps)[0]

        params, state = train(params, tx.init(params), {}, frozen=False, steps=3)
        gate = {"gate": {"head": {"hidden": params["head"]["hidden"]}}}

        @jax.jit
        def measure(hidden, params=params, gate=gate, model=model):
            def outputs(hidden, x):
                own = {**params, "head": {**params["head"], "hidden": hidden}}
                return model.apply({"params": own, **gate}, x, frozen=True)

            both = jax.jvp(lambda hidden: outputs(hidden, x), (hidden,), (hidden,))
            return *both, alignment_residual(outputs, hidden, x, y)

        value, slope, found = measure(params["head"]["hidden"])
        np.testing.assert_allclose(slope, value, rtol=1e-13, atol=1e-14)
        assert (found.residual < 1e-10) == reaches
        params, _ = train(params, state, gate, frozen=True, steps=1500)
        rest = np.sum(np.square(measure(params["head"]["hidden"])[0] - y))
        relative = np.sqrt(rest) / np.linalg.norm(y)
        assert relative > found.residual - 1e-12  # no optimizer goes below
        assert relative < 0.6 if reaches else found.residual > 0.65  # one goes below what the other can reach
