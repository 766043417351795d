"""What a layer multiplies is its input and its parameters as they stand, in training too, or it is excluded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_moments, init, make

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

X = np.random.default_rng(0).normal(1, 2, (5, 4))


def with_parameters(change):
    """A dense layer that changes its parameters before it uses them."""

    class Changed(nn.Dense):
        def param(self, name, *args, **kwargs):
            return change(name, super().param(name, *args, **kwargs), self)

    return Changed(4, param_dtype=float)


def with_product(product):
    """A dense layer with another product of input and kernel."""
    return nn.Dense(4, param_dtype=float, dot_general=lambda x, k, *args, **kwargs: product(jnp.matmul, x, k))


COMPUTED = "its kernel is computed from the parameter before the product"
NOT_THE_PRODUCT = "its output is not the product of its input and its kernel as they stand"
NOT_ITS_BIAS = "what it adds to the product is not its bias as it stands"

EXCLUDED = {
    "a kernel that is not trained": (
        with_parameters(lambda name, p, _: jax.lax.stop_gradient(p) if name == "kernel" else p),
        COMPUTED,
    ),
    "weights that drop in training alone": (
        with_parameters(lambda name, p, m: p if name == "bias" or m.is_initializing() else p * (p > 0)),
        COMPUTED,
    ),
    "a doubled bias": (with_parameters(lambda name, p, _: 2 * p if name == "bias" else p), NOT_ITS_BIAS),
    "another input": (with_product(lambda dot, x, k: dot(2 * x + 1, k)), NOT_THE_PRODUCT),
    "two products": (with_product(lambda dot, x, k: dot(x, k) + dot(x * x, k)), NOT_THE_PRODUCT),
    "a doubled product": (with_product(lambda dot, x, k: 2 * dot(x, k)), NOT_THE_PRODUCT),
    "a sum of the kernel": (with_product(lambda dot, x, k: dot(x, k) + k.sum(0)), NOT_ITS_BIAS),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_a_layer_that_computes_otherwise_is_excluded_with_the_reason(name):
    model, reason = EXCLUDED[name]
    layers = bnp.linen.find_layers(model, X)
    assert not layers.included
    assert {other.path: other.reason for other in layers.excluded} == {("kernel",): reason, ("bias",): reason}


INCLUDED = {
    "plainly": with_product(lambda dot, x, k: dot(x, k)),
    "behind a barrier": with_product(lambda dot, x, k: dot(*jax.lax.optimization_barrier((x, k)))),
    "in half precision": nn.Dense(4, param_dtype=float, dtype=jnp.bfloat16),
    "with a name for remat": with_product(lambda dot, x, k: jax.ad_checkpoint.checkpoint_name(dot(x, k), "y")),
    "wrapped around": nn.ConvTranspose(4, (3,), padding="CIRCULAR", param_dtype=float),
    "padded before": nn.Conv(4, (3,), padding="REFLECT", param_dtype=float),
}


@pytest.mark.parametrize("name", INCLUDED)
def test_a_layer_that_only_moves_what_it_multiplies_is_included(name):
    assert list(bnp.linen.find_layers(INCLUDED[name], X)) == ["kernel"]


def test_a_layer_that_training_alone_calls_inside_a_transform_of_jax_is_excluded():
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner, outer = (nn.Dense(4, param_dtype=float, name=name) for name in ("inner", "outer"))
            return outer(inner(x) if self.is_initializing() else jax.lax.map(inner, x))

    layers = bnp.linen.find_layers(Mapped(), X)
    assert list(layers) == ["outer"]
    assert {other.reason for other in layers.excluded} == {"inside a transform of JAX, which lets no record out"}


def test_a_layer_that_training_alone_calls_in_a_loop_is_excluded():
    class Looped(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner, outer = (nn.Dense(4, param_dtype=float, name=name) for name in ("inner", "outer"))
            x = inner(x)
            if not self.is_initializing():
                again = lambda inner, x: (x[0] + 1, inner(x[1]))  # noqa: E731
                x = nn.while_loop(lambda inner, x: x[0] < 3, again, inner, (0, x))[1]
            return outer(x)

    layers = bnp.linen.find_layers(Looped(), X)
    assert list(layers) == ["outer"]
    assert all("without 'intermediates': 0" in other.reason for other in layers.excluded)
    y, records = bnp.linen.capture(Looped(), layers=layers)(variables := {"params": init(Looped(), X)}, X)
    np.testing.assert_array_equal(y, Looped().apply(variables, X))
    assert list(records) == ["outer"]


def test_each_layer_that_is_also_applied_with_explicit_parameters_is_excluded():
    class Again(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = [nn.Dense(4, param_dtype=float, name=name) for name in "abc"]
            for layer in layers:
                x = layer(x)
            for layer in layers[:2]:
                x = nn.Dense(4, parent=None).apply({"params": layer.variables["params"]}, x)
            return x

    layers = bnp.linen.find_layers(Again(), X)
    assert list(layers) == ["c"]
    assert {other.path[0] for other in layers.excluded} == {"a", "b"}


class OneStepInInit(nn.Module):
    """Goes over the steps of a sequence `[batch, time, features]`, but for the first pass, which is for the shapes."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, param_dtype=float, name="dense")
        if self.is_initializing():
            return dense(x[:, 0])
        axes = {"variable_broadcast": "params", "variable_axes": {"intermediates": 0}, "in_axes": 1}
        step = lambda dense, carry, x: (jnp.tanh(dense(carry + x)), None)  # noqa: E731
        return nn.scan(step, split_rngs={"params": False}, **axes)(dense, jnp.zeros_like(x[:, 0]), x)[0]


def test_a_layer_is_what_it_is_in_training_where_init_calls_it_in_another_way():
    x = np.random.default_rng(0).normal(size=(5, 6, 4))
    layers = bnp.linen.find_layers(OneStepInInit(), x)
    assert layers["dense"].record_axes == "r"
    tx, params = bnp.scale_by_bnp(layers), init(OneStepInInit(), x)
    _, records = jax.jit(bnp.linen.capture(OneStepInInit()))({"params": params}, x)
    _, state = tx.update(params, tx.init(params), intermediates=records)
    assert state["dense"].seen == 5  # examples, and not 30

    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x):
            equation = "bti,io->bto" if self.is_initializing() else "bto,io->bti"
            return nn.Einsum((4, 4), equation, use_bias=False, param_dtype=float, name="turned")(x)

    assert bnp.linen.find_layers(Turned(), np.ones((5, 6, 4)))["turned"].kernel.roles == "oi"


def transposed(params):
    return jax.tree.map(jnp.transpose, params)


@pytest.mark.parametrize("features", [4, 3])
def test_a_kernel_that_init_makes_in_another_shape_is_excluded(features):
    """Of `nn.map_variables`, whose maps cancel in `init`."""

    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.map_variables(
                nn.Dense, "params", transposed, transposed, init=self.is_initializing(), mutable=True
            )
            return dense(features, use_bias=False, param_dtype=float, name="dense")(x)

    layers = bnp.linen.find_layers(Mapped(), X)
    assert {other.path: other.shape for other in layers.excluded} == {("dense", "kernel"): (features, 4)}


@pytest.mark.parametrize("latents", [4, 3])
def test_a_layer_that_is_called_with_its_kernel_transposed_as_well_is_excluded(latents):
    """The tied autoencoder of Flax's documentation: the decoder's inputs are what the encoder's kernel gives."""

    class Tied(nn.Module):
        @nn.compact
        def apply_tied(self, x, decode):
            dense = lambda _: nn.Dense(4 if decode else latents, use_bias=False, param_dtype=float)(x)  # noqa: E731
            change = transposed if decode else lambda params: params
            return nn.map_variables(dense, "params", change, change, mutable=True)(self)

        def __call__(self, x):
            return self.apply_tied(self.apply_tied(x, False), True)

    layers = bnp.linen.find_layers(Tied(), X)
    assert [other.path for other in layers.excluded] == [("Dense_0", "kernel")]
    if latents == 3:
        with pytest.raises(ValueError, match=r"Dense_0 .* called with inputs of 4 and of 3 features. Record"):
            bnp.linen.capture(Tied())({"params": init(Tied(), X)}, X)


def test_layers_in_loops_are_found_where_jit_is_disabled_too():
    x, of_nnx = np.ones((2, 5, 4), np.float32), nnx.RNN(nnx.SimpleCell(4, 3, rngs=nnx.Rngs(0)))
    found = bnp.linen.find_layers(nn.RNN(nn.SimpleCell(3)), x), bnp.nnx.find_layers(of_nnx, x)
    assert list(map(len, found)) == [2, 2]
    with jax.disable_jit():
        assert (bnp.linen.find_layers(nn.RNN(nn.SimpleCell(3)), x), bnp.nnx.find_layers(of_nnx, x)) == found


JAX_TRANSFORMS = {
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "vmap": lambda call: jax.vmap(call, in_axes=(None, 0)),
    "grad": lambda call: jax.grad(lambda layer, x: jnp.sum(call(layer, x)), argnums=1),
}


@pytest.mark.parametrize("inside_first", [True, False])
@pytest.mark.parametrize("transform", JAX_TRANSFORMS)
def test_a_layer_of_nnx_one_of_whose_calls_is_lost_is_excluded(transform, inside_first):
    """Or its statistics would be those of the other calls alone: a transform of JAX calls a copy of it."""
    inside = JAX_TRANSFORMS[transform](lambda layer, x: layer(x))

    def call(layers, x):
        order = (inside, nnx.Linear.__call__, inside) if inside_first else (nnx.Linear.__call__, inside)
        for each in order:
            x = each(layers[0], x)
        return layers[1](x)

    class Both(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([make(nnx.Linear, 4, 4, seed=seed) for seed in range(2)])

        def __call__(self, x):
            return call(self.layers, x)

    layers = bnp.nnx.find_layers(Both(), X)
    assert list(layers) == ["layers/1"]
    (reason,) = {other.reason for other in layers.excluded}
    assert "record is lost: in a transform of jax" in reason


@pytest.mark.parametrize("inside_first", [True, False])
@pytest.mark.parametrize("transform", [nnx.remat, nnx.jit])
def test_a_layer_of_nnx_all_of_whose_calls_come_out_has_them_all(transform, inside_first):
    inside, outside = transform(lambda layer, x: layer(x)), lambda layer, x: layer(x)

    class Both(nnx.Module):
        def __init__(self):
            self.layer = make(nnx.Linear, 4, 4)

        def __call__(self, x):
            for each in (inside, outside, inside) if inside_first else (outside, inside, outside):
                x = each(self.layer, x)
            return x

    model = Both()
    assert bnp.nnx.find_layers(model, X)["layer"].calls == 3
    _, records = bnp.nnx.capture(model)(X)
    assert records["layer"].positions == 15


@pytest.mark.parametrize("inside_first", [True, False])
def test_a_layer_one_of_whose_calls_is_lost_is_not_recorded_at_all(inside_first):
    """Or a part of its inputs would pass for all of them; chosen, as the search says, it has both calls."""

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer, other = (nn.Dense(4, param_dtype=float, name=name) for name in ("layer", "other"))
            calls = [jax.grad(lambda x: jnp.sum(layer(x) ** 2)), layer]
            for call in calls if inside_first else reversed(calls):
                x = call(x)
            return other(x)

    layers, params = bnp.linen.find_layers(Both(), X), init(Both(), X)
    assert list(layers) == ["layer", "other"]
    for options, positions in (({}, {"other": 5}), ({"layers": layers}, {"layer": 10, "other": 5})):
        records = jax.jit(lambda params, x, o=options: bnp.linen.capture(Both(), **o)({"params": params}, x)[1])(
            params, X
        )
        assert {name: int(record.positions[0]) for name, record in records.items()} == positions


class Shared(nn.Module):
    """Its layer's parameters are its own."""

    def setup(self):
        self.dense = nn.Dense(4, param_dtype=float)
        nn.share_scope(self, self.dense)

    def __call__(self, x):
        return self.dense(x)


def test_a_layer_that_shares_the_scope_of_the_model_is_one_of_it():
    layers = bnp.linen.find_layers(Shared(), X)
    assert list(layers) == ["kernel"]
    _, records = bnp.linen.capture(Shared())({"params": init(Shared(), X)}, X)
    assert_moments(records["kernel"], X, examples=5)


def test_both_branches_of_a_condition_may_read_other_inputs():
    class Branches(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(4, 3, rngs=rngs, param_dtype=float)

        def __call__(self, x):
            return nnx.cond(x[0, 0] > 0, lambda m, x: m.layer(x), lambda m, x: m.layer(2 * x), self, x)

    assert list(bnp.nnx.find_layers(make(Branches), X)) == ["layer"]


def test_a_layer_that_a_pass_makes_is_none_of_the_model():
    class Makes(nnx.Module):
        def __init__(self, rngs):
            self.w, self.own = nnx.Param(jnp.ones((4, 4))), nnx.Linear(4, 3, rngs=rngs, param_dtype=float)

        def __call__(self, x):
            made = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
            made.kernel = self.w
            return self.own(made(x))

    model = make(Makes)
    layers = bnp.nnx.find_layers(model, X)
    assert list(layers) == ["own"]
    for options in ({}, {"layers": layers}):
        _, records = bnp.nnx.capture(model, **options)(X)
        assert list(records) == ["own"]


def test_a_kernel_that_is_a_property_is_excluded():
    class Property(nnx.Linear):
        def __init__(self, rngs):
            super().__init__(4, 3, rngs=rngs, param_dtype=float)

        @property
        def kernel(self):
            return self.w * 0.1

        @kernel.setter
        def kernel(self, value):
            self.w = value

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = Property(rngs)

        def __call__(self, x):
            return self.layer(x)

    model = make(Model)
    layers = bnp.nnx.find_layers(model, X)
    assert {other.reason for other in layers.excluded} == {"its kernel is not a parameter of its own"}
    bnp.nnx.capture(model)(X)


def test_layers_of_another_tree_are_refused_by_capture():
    model = nn.Dense(3, param_dtype=float, name="policy")
    layers, params = bnp.linen.find_layers(model, X), init(model, X)
    with pytest.raises(ValueError, match=r"layers describes policy/params, which the model does not have"):
        bnp.linen.capture(model, layers=layers.under("policy", "params"))({"params": params}, X)


@pytest.mark.parametrize(("options", "error"), [({"examples": 0}, ValueError), ({"examples": "3"}, TypeError)])
def test_examples_that_are_no_number_of_examples_are_refused(options, error):
    with pytest.raises(error, match="examples must be"):
        bnp.linen.capture(nn.Dense(3), **options)


def test_what_is_no_model_is_a_type_error():
    for api, wrong in (
        (bnp.linen, {"params": {}}),
        (bnp.linen, make(nnx.Linear, 4, 3)),
        (bnp.nnx, nn.Dense(3)),
        (bnp.nnx, {}),
    ):
        with pytest.raises(TypeError, match=r"capture\(model\) of .* wants a flax"):
            api.capture(wrong)


def test_no_array_of_a_pass_stays_in_the_caches_of_jax():
    model = nn.Dense(3, param_dtype=float)
    params = init(model, X)
    with jax.checking_leaks():
        jax.jit(lambda mask: bnp.linen.capture(model, mask=mask)({"params": params}, X)[1])(jnp.ones(5, bool))


def test_methods_that_call_a_layer_in_several_ways_exclude_it():
    class Cell(nn.Module):
        def setup(self):
            self.cell = nn.SimpleCell(4, param_dtype=float)
            self.rnn, self.out = nn.RNN(self.cell), nn.Dense(2, param_dtype=float)

        def __call__(self, x):
            return self.out(self.rnn(x))

        def step(self, carry, x):
            return self.out(self.cell(carry, x)[1])

    x = np.ones((2, 3, 4))
    both = bnp.linen.find_layers(Cell(), x) | bnp.linen.find_layers(Cell(), x[:, 0], x[:, 0], method="step")
    assert list(both) == ["out"]
    assert {other.reason for other in both.excluded} == {"called in several ways"}
    with pytest.raises(ValueError, match=r"Both have a layer kernel, of other shapes: these are two models"):
        bnp.linen.find_layers(nn.Dense(2), X) | bnp.linen.find_layers(nn.Dense(3), X)
