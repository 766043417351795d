"""What of an input counts: masks and weights, N by number, and records that are added."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_moments, assert_same, forward, init, make, normal
from hypothesis import assume, given
from hypothesis import strategies as st

import bnp_optax as bnp
from bnp_optax.moments import pool

pytestmark = pytest.mark.usefixtures("x64")
seeds = st.integers(0, 2**16)

masked_record = functools.partial(jax.jit, static_argnames=("stack_axes", "num_spatial"))(bnp.input_moments)


@given(st.sampled_from([(4,), (3, 5), (2, 3, 2)]), st.integers(0, 3), seeds)
def test_a_masked_record_is_that_of_what_counts(leading, mask_ndim, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(100, 2, (*leading, 3))
    mask = rng.random(leading[:mask_ndim]) < 0.6
    assume(mask.any())
    every = np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(leading) - mask.ndim)), leading)
    padded = np.where(every[..., None], x, np.nan)
    record = masked_record(padded, mask=mask)
    assert_moments(record, x[every], examples=every.reshape(leading[0], -1).any(1).sum())


@given(seeds)
def test_an_integer_weight_is_so_many_copies_of_a_position(seed):
    rng = np.random.default_rng(seed)
    x, weights = rng.normal(size=(5, 3)), rng.integers(0, 4, 5)
    assume(weights.any())
    record = masked_record(x, mask=weights.astype(float))
    copies = bnp.input_moments(np.repeat(x, weights, axis=0))
    np.testing.assert_allclose(record.mean, copies.mean, rtol=1e-9)
    np.testing.assert_allclose(record.variance, copies.variance, rtol=1e-9, atol=1e-12)
    assert int(record.positions[0]) == int(copies.positions[0]) == weights.sum()
    assert int(record.examples[0]) == (weights > 0).sum()


def test_each_entry_of_a_stack_counts_what_it_was_sent():
    """Experts of which each has its own tokens."""
    x, mask = normal(0, 6, 2, 3), np.array([[1, 0], [1, 1], [0, 1], [1, 0], [1, 0], [0, 0]], bool)
    record = masked_record(x, stack_axes=(1,), mask=mask)
    for k in range(2):
        own = np.asarray(x)[mask[:, k], k]
        np.testing.assert_allclose(record.mean[k, 0], own.mean(0), rtol=1e-12)
        np.testing.assert_allclose(record.variance[k, 0], own.var(0), rtol=1e-12)
    np.testing.assert_array_equal(record.examples, [4, 2])
    of_all = masked_record(x, stack_axes=(1,), mask=mask.any(1))
    np.testing.assert_allclose(of_all.mean[:, 0], np.asarray(x)[:5].mean(0), rtol=1e-12)
    np.testing.assert_array_equal(of_all.examples, [5, 5])


def test_a_batch_of_padding_leaves_the_statistics_as_they_are():
    layers = bnp.Layers((bnp.Layer.dense(("w",), (3, 2)),))
    tx, params = bnp.scale_by_bnp(layers), {"w": jnp.ones((3, 2))}
    record = bnp.input_moments(jnp.full((4, 3), jnp.nan), mask=jnp.zeros(4, bool))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(record))
    state = tx.init(params)
    _, new = tx.update(params, state, intermediates={"w": record})
    assert_same(new, state)


def test_a_batch_whose_weights_are_not_finite_is_skipped_and_counted():
    layers = bnp.Layers((bnp.Layer.dense(("w",), (3, 2)),))
    tx, params = bnp.scale_by_bnp(layers), {"w": jnp.ones((3, 2))}
    record = bnp.input_moments(jnp.ones((4, 3)), mask=jnp.array([1.0, jnp.nan, 1.0, 1.0]))
    state = tx.init(params)
    _, new = tx.update(params, state, intermediates={"w": record})
    assert (new["w"].skipped, new["w"].seen) == (1, 0)
    assert_same(new["w"].mean, state["w"].mean)


@pytest.mark.parametrize("mask", [np.ones(3, bool), np.ones((4, 3), bool), np.ones((4, 2, 3), bool)])
def test_a_mask_that_fits_no_leading_axes_is_refused(mask):
    with pytest.raises(ValueError, match=r"mask has shape .*leading axes of its input \(4, 2, 3\)"):
        bnp.input_moments(jnp.ones((4, 2, 3)), mask=mask)


class Pooling(nn.Module):
    """A layer on tokens, and one on their mean."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, param_dtype=float, name="head")(nn.Dense(3, param_dtype=float, name="body")(x).mean(1))


class NNXPooling(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = (
            nnx.Linear(4, 3, rngs=rngs, param_dtype=float),
            nnx.Linear(3, 2, rngs=rngs, param_dtype=float),
        )

    def __call__(self, x):
        return self.head(self.body(x).mean(1))


X = np.random.default_rng(0).normal(1, 2, (5, 6, 4))  # float64, though no array of JAX is yet
TOKENS, EXAMPLES = np.random.default_rng(1).random((5, 6)) < 0.7, np.array([1, 1, 0, 1, 0], bool)


@pytest.fixture(scope="module", params=["linen", "nnx"])
def captured(request):
    """Returns the records of a pass, with the options of `capture`."""
    if request.param == "linen":
        params = init(Pooling(), X)
        return lambda **options: bnp.linen.capture(Pooling(), **options)({"params": params}, X)
    model = make(NNXPooling)
    return lambda **options: bnp.nnx.capture(model, **options)(X)


def test_of_several_masks_each_input_takes_the_longest_that_fits(captured):
    y, records = captured(mask=[TOKENS, EXAMPLES])
    plain, unmasked = captured()
    np.testing.assert_array_equal(y, plain)
    assert_moments(records["body"], X[TOKENS], examples=TOKENS.any(1).sum())
    assert records["head"].examples == 3
    assert unmasked["head"].examples == 5


def test_a_function_says_by_name_and_input_what_counts(captured):
    asked = []

    def mask(name, x):
        asked.append((name, x.shape))
        return TOKENS if name == "body" else None

    _, records = captured(mask=mask)
    assert asked == [("body", (5, 6, 4)), ("head", (5, 3))]
    assert_moments(records["body"], X[TOKENS], examples=TOKENS.any(1).sum())
    assert records["head"].examples == 5


def test_a_call_that_does_not_count_leaves_an_empty_record(captured):
    _, records = captured(mask=lambda name, x: name != "head")
    assert records["body"].positions == 30
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(records["head"]))
    _, told = captured(mask=lambda name, x: name != "head", examples=7)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(told["head"]))


def test_an_input_that_no_mask_fits_is_named(captured):
    with pytest.raises(ValueError, match=r"input of head .* no mask fits its shape \(5, 3\).*\(5, 6\).* function"):
        captured(mask=TOKENS)
    with pytest.raises(ValueError, match="several masks fit"):
        captured(mask=[EXAMPLES, ~EXAMPLES])


def test_a_mask_of_one_pass_is_not_that_of_the_next():
    """What is compiled inside a model closes over the mask."""
    model = nn.Sequential([nn.jit(nn.Dense)(3, param_dtype=float)])
    params, x = init(model, X[:, 0]), X[:, 0]
    for mask in (EXAMPLES, ~EXAMPLES, EXAMPLES):
        _, records = bnp.linen.capture(model, mask=jnp.asarray(mask))({"params": params}, x)
        assert_moments(records["layers_0"], x[mask], examples=mask.sum())


def test_the_number_of_examples_may_be_said(captured):
    for examples in (7, np.int64(7), jnp.asarray(7)):
        _, records = captured(examples=examples)
        assert records["body"].examples == records["head"].examples == 7
        assert records["body"].positions == 30
    with pytest.raises(TypeError, match=r"examples must be an integer.* not 7\.5"):
        captured(examples=7.5)
    with pytest.raises(ValueError, match=r"examples must be how many .* at least 1, not 0"):
        captured(examples=np.int64(0))


def test_a_layer_that_is_mapped_over_the_examples_counts_these_whatever_is_said():
    maps = {"variable_axes": {"params": None, "intermediates": 0}, "split_rngs": {"params": False}}
    model, x = nn.vmap(nn.Dense, **maps)(2, param_dtype=float), X[:, 0]
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    tx = bnp.scale_by_bnp(layers)
    _, records = bnp.linen.capture(model, examples=7)({"params": params}, x)
    _, state = tx.update(params, tx.init(params), intermediates=records)
    assert state["kernel"].seen == len(x)


def test_what_is_compiled_inside_a_model_stays_so_with_a_known_number_of_examples():
    traced = []
    model = nn.Sequential([nn.Dense(3, param_dtype=float), jax.jit(lambda x: traced.append(x) or x)])
    params, x = init(model, X[:, 0]), X[:, 0]
    traced.clear()
    for examples in (5, np.int64(5), jnp.asarray(5)):
        bnp.linen.capture(model, examples=examples)({"params": params}, x)
    assert len(traced) == 1


def test_time_first_and_examples_first_are_one_step():
    model, time_major = nn.Dense(2, param_dtype=float), np.swapaxes(X, 0, 1)
    params, layers = init(model, X), bnp.linen.find_layers(model, X)
    tx = bnp.scale_by_bnp(layers)
    steps = []
    for x, options in ((X, {}), (time_major, {"examples": 5})):
        _, records = bnp.linen.capture(model, **options)({"params": params}, x)
        steps.append(tx.update(params, tx.init(params), intermediates=records))
    assert_same(*steps)


BATCHES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(BATCHES, st.sampled_from([0.0, 1.0, 30.0]), seeds)
def test_the_sum_of_records_is_the_record_of_all(sizes, offset, seed):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(offset, 1 + k, (n, 3)) for k, n in enumerate(sizes)]
    record = functools.reduce(functools.partial(jax.tree.map, np.add), map(bnp.input_moments, batches))
    whole = np.concatenate(batches)
    np.testing.assert_allclose(record.mean[0, 0], whole.mean(0), rtol=1e-10)
    np.testing.assert_allclose(record.variance[0, 0], whole.var(0), rtol=1e-8, atol=1e-11)
    assert int(record.examples[0]) == int(record.positions[0]) == len(whole)


def named(collective):
    """A collective over the leading axis."""
    return lambda leaf: jax.vmap(lambda x: collective(x, "devices"), axis_name="devices", out_axes=None)(leaf)


def step_of_parts(reduce, x):
    """Returns an update where a loop reduces the records of devices, or of micro-batches, as `reduce` does."""
    model = nn.Dense(2, param_dtype=float)
    params = init(model, x[0])
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x[0]))

    def loss(params, x):
        y, records = forward(model)(params, x)
        return jnp.mean(y**2), records

    gradients, records = jax.vmap(jax.grad(loss, has_aux=True), (None, 0))(params, x)
    gradients = jax.tree.map(lambda leaf: leaf.mean(0), gradients)
    return tx.update(gradients, tx.init(params), intermediates=jax.tree.map(reduce, records))


@pytest.mark.parametrize(
    "reduce", [lambda leaf: leaf, lambda leaf: leaf.sum(0), named(jax.lax.psum)], ids=["stack", "sum", "psum"]
)
def test_records_that_are_stacked_or_summed_are_those_of_the_whole_batch(reduce):
    x = normal(0, 4, 3, 5)
    updates, state = step_of_parts(reduce, x)
    assert_same((updates, state), step_of_parts(lambda leaf: leaf, x.reshape(1, 12, 5)))
    assert state["kernel"].seen == 12


@pytest.mark.parametrize(
    "reduce",
    [lambda leaf: leaf.mean(0), lambda leaf: leaf.sum(0) / 4, named(jax.lax.pmean)],
    ids=["mean", "division", "pmean"],
)
def test_records_that_are_averaged_are_refused(reduce):
    with pytest.raises(ValueError, match=r"record of kernel .* averaged, as gradients are\. Sum records"):
        step_of_parts(reduce, normal(0, 4, 3, 5))


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("reverse", [False, True])
def test_an_rnn_masks_its_cell_step_by_step(api, reverse):
    """The first layer of the cell reads the inputs as they are, so that its record is known."""
    x, mask = (
        np.random.default_rng(0).normal(1, 2, (4, 3, 2)),
        np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]], bool),
    )
    if api == "linen":
        model = nn.RNN(nn.SimpleCell(5, param_dtype=float), reverse=reverse)
        params = init(model, x)
        plain, (y, records) = (
            model.apply({"params": params}, x),
            bnp.linen.capture(model, mask=mask)({"params": params}, x),
        )
        record = records["cell/i"]
    else:
        model = nnx.RNN(make(nnx.SimpleCell, 2, 5, dtype=float), reverse=reverse, rngs=nnx.Rngs(0))
        plain, (y, records) = model(x), bnp.nnx.capture(model, mask=mask)(x)
        record = records["cell/dense_i"]
    np.testing.assert_array_equal(y, plain)
    pooled = pool(record, repeat_axes=[0])
    assert_moments(pooled, x[mask], examples=3)


def test_an_rnn_of_two_axes_of_examples_counts_the_first_with_a_mask_too():
    model, x = nn.RNN(nn.SimpleCell(5, param_dtype=float)), normal(0, 4, 2, 3, 2)
    params = init(model, x)
    _, masked = bnp.linen.capture(model, mask=np.ones((4, 2, 3), bool))({"params": params}, x)
    _, plain = forward(model)(params, x)
    assert_same(pool(masked["cell/i"], repeat_axes=[0]), pool(plain["cell/i"], repeat_axes=[0]))
    assert pool(masked["cell/i"], repeat_axes=[0]).examples == 4


def test_a_mask_that_does_not_fit_the_input_of_an_rnn_names_it():
    model, x = nn.RNN(nn.SimpleCell(5, param_dtype=float), name="reader"), np.ones((4, 3, 2))
    params = init(model, x)
    with pytest.raises(ValueError, match=r"input of an RNN cannot be recorded: no mask fits its shape \(4, 3, 2\)"):
        bnp.linen.capture(model, mask=np.ones(5, bool))({"params": params}, x)
