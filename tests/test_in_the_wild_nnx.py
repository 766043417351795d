"""Models of NNX of the shape of other people's, each with its source.

Those of Linen are in test_in_the_wild.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    assert_moments,
    assert_step,
    compiled_call,
    make,
    masked,
    normal,
    pure,
    reasons,
    rounded,
    weigh,
    with_kernel,
)

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")

Linear = functools.partial(make, nnx.Linear)


class Net(nnx.Module):
    """A layer before one of another kind, which is applied by some function of layer and input."""

    def __init__(self, other, call=lambda layer, x: layer(x)):
        self.plain, self.other, self.call = Linear(2, 3), other, call

    def __call__(self, x):
        return self.call(self.other, self.hidden(x))

    def hidden(self, x):
        return jnp.tanh(self.plain(x))


def nnx_step(model, x, **options):
    """Returns the layers, the gradients, and what BNP makes of them, as `step_of` does, of a module of NNX."""
    layers = bnp.nnx.find_layers(model, x)
    tx = bnp.scale_by_bnp(layers, decay=0.0, prior_examples=None)

    def loss(model, x):
        y, records = bnp.nnx.capture(model, **options)(x)
        return weigh(y), records

    def update(model, x):
        gradients, records = nnx.grad(loss, has_aux=True)(model, x)
        gradients = nnx.to_pure_dict(pure(gradients))
        return gradients, tx.update(gradients, tx.init(gradients), intermediates=records)[0]

    return layers, *compiled_call(update, model, x)


COMPUTED = {
    "masked": lambda: Linear(3, 3, dot_general=with_kernel(masked)),
    "quantized": lambda: make(nnx.LinearGeneral, 3, 3, dot_general=with_kernel(rounded)),
    "equalized": lambda: Linear(3, 3, promote_dtype=lambda arrays, dtype=None: (arrays[0], arrays[1] / 3, arrays[2])),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_kernel_that_is_computed_is_excluded(kind):
    model, x = Net(COMPUTED[kind]()), normal(0, 5, 2)
    layers, gradients, updates = nnx_step(model, x)
    assert reasons(layers).keys() == {"other/kernel", "other/bias"}
    assert all("computed" in reason for reason in reasons(layers).values())
    assert_step(layers, gradients, updates, {"plain": ([x], 5)})


JAX = {
    "vmap": lambda layer, x: jax.vmap(layer)(x),
    "map": lambda layer, x: jax.lax.map(layer, x),
    "grad": lambda layer, x: jax.grad(lambda x: layer(x).sum())(x),
}


@pytest.mark.parametrize("transform", JAX)
def test_layers_under_a_transform_of_jax_are_excluded(transform):
    """What is stored in a module there cannot come out, so that a pass is to record the others alone."""
    model, x = Net(Linear(3, 3), JAX[transform]), normal(0, 5, 2)
    layers = bnp.nnx.find_layers(model, x)
    assert reasons(layers).keys() == {"other/kernel", "other/bias"}
    assert all("transform" in reason for reason in reasons(layers).values())
    assert_step(*nnx_step(model, x, layers=layers), {"plain": ([x], 5)})
    with pytest.raises(ValueError, match=r"The input of other cannot be recorded"):
        bnp.nnx.capture(model)(x)


@pytest.mark.parametrize("transform", [nnx.remat, nnx.jit])
def test_records_are_not_lost_to_what_ran_without_recording(transform):
    """Flax's own `nnx.capture`, as one looks at activations, fills JAX's cache with a program without records."""

    class Compiled(nnx.Module):
        def __init__(self):
            self.first, self.last = Linear(2, 3), Linear(3, 2)

        @transform
        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    model, x = Compiled(), normal(0, 5, 2)
    nnx.capture(model, nnx.Intermediate)(x)
    model(x)
    assert set(bnp.nnx.capture(model)(x)[1]) == {"first", "last"}
    hidden = np.tanh(x @ model.first.kernel[...] + model.first.bias[...][None])
    for valid in np.array([[True, True, False, True, True], [False, True, True, False, True]]):
        _, records = bnp.nnx.capture(model, mask=jnp.asarray(valid))(x)
        assert_moments(records["last"], hidden[valid], valid.sum())
    nnx.capture(model, nnx.Intermediate)(x)
    assert_step(*nnx_step(model, x), {"first": ([x], 5), "last": ([hidden], 5)})


SHARDED = {
    "Linear": (nnx.Linear, 3, 3),
    "LinearGeneral": (nnx.LinearGeneral, 3, 3),
    "Einsum": (nnx.Einsum, "nti,io->nto", (3, 3), (3,)),
    "Conv": (nnx.Conv, 3, 3, (1,)),
}


@pytest.mark.parametrize("kind", SHARDED)
def test_arguments_that_do_not_concern_the_record_pass_through(kind):
    """Flax's Gemma says how each layer's output is sharded."""
    layer = make(*SHARDED[kind])
    sharding = jax.sharding.PartitionSpec()
    model, x = Net(layer, lambda layer, x: layer(x, out_sharding=sharding)), normal(0, 5, 4, 2)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))):
        layers, gradients, updates = nnx_step(model, x)
    for tree in (gradients, updates):  # a window of one position
        tree["other"]["kernel"] = tree["other"]["kernel"].reshape(3, 3)
    assert_step(layers, gradients, updates, {"plain": ([x], 5), "other": ([model.hidden(x)], 5)})


LENGTHS = np.array([4, 2, 0, 3, 1])
VALID = np.arange(4) < LENGTHS[:, None]


@pytest.mark.parametrize("reverse", [False, True])
def test_steps_beyond_the_length_of_a_sequence_do_not_count(reverse):
    class Encoder(nnx.Module):
        def __init__(self):
            self.rnn = nnx.RNN(make(nnx.GRUCell, 3, 4), reverse=reverse, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.rnn(x, seq_lengths=jnp.asarray(LENGTHS))

    model, x = Encoder(), normal(0, 5, 4, 3)
    order = np.array(x)
    for row, length in zip(order, LENGTHS if reverse else [0] * 5, strict=True):
        row[:length] = row[:length][::-1].copy()  # the padding stays at the end
    states = [jnp.zeros((5, 4))]
    for t in range(3):
        states.append(
            compiled_call(lambda cell, h, x: cell(h, x)[0], model.rnn.cell, states[-1], jnp.asarray(order[:, t]))
        )
    expected = {"dense_i": order[VALID], "dense_h": np.stack(states, 1)[VALID]}
    expected = {f"rnn/cell/{name}": ([rows], 4) for name, rows in expected.items()}
    assert_step(*nnx_step(model, x), expected)


def test_an_optimizer_of_a_part_of_the_model():
    """Flax's guides train a head with `wrt=`."""
    model, x = Net(Linear(3, 2)), normal(0, 5, 2)
    layers = bnp.nnx.find_layers(model, x).select(lambda layer: layer.path == "other")
    head = nnx.All(nnx.Param, nnx.PathContains("other"))
    tx = optax.chain(bnp.scale_by_bnp(layers, decay=0.0, prior_examples=None), optax.scale(-1.0))

    def loss(model, x):
        y, records = bnp.nnx.capture(model, layers=layers)(x)
        return weigh(y), records

    def step(model, x):
        optimizer = nnx.Optimizer(model, tx, wrt=head)
        gradients, records = nnx.grad(loss, argnums=nnx.DiffState(0, head), has_aux=True)(model, x)
        optimizer.update(model, gradients, intermediates=records)
        return gradients, nnx.state(model, nnx.Param)

    gradients, after = (nnx.to_pure_dict(pure(tree)) for tree in compiled_call(step, model, x))
    before = nnx.to_pure_dict(pure(nnx.state(model, nnx.Param)))
    updates = jax.tree.map(lambda before, after: before - after, before, after)
    gradients["plain"] = jax.tree.map(jnp.zeros_like, before["plain"])
    assert_step(layers, gradients, updates, {"other": ([model.hidden(x)], 5)})


class GemmaEinsum(nnx.Module):
    """The Einsum of Flax's Gemma, a layer of its own."""

    def __init__(self):
        self.w = nnx.Param(normal(0, 3, 2))

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


def test_a_patched_call_registers_layers_of_third_parties(monkeypatch):
    original = GemmaEinsum.__call__

    def call(self, equation, x):
        bnp.nnx.register(self, x, "w", None)
        return original(self, equation, x)

    model, x = Net(GemmaEinsum(), lambda layer, x: layer("ni,io->no", x)), normal(0, 5, 2)
    assert reasons(bnp.nnx.find_layers(model, x)).keys() == {"other/w"}
    monkeypatch.setattr(GemmaEinsum, "__call__", call)
    layers, gradients, updates = nnx_step(model, x)
    assert not layers.excluded
    for tree in (gradients, updates):
        tree["other"]["kernel"] = tree["other"].pop("w")
    found = {name.removesuffix("/w") for name in layers}
    assert_step(found, gradients, updates, {"plain": ([x], 5), "other": ([model.hidden(x)], 5)})
