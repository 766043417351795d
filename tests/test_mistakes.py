"""What a new user gets wrong: the error, where it is of Flax or JAX, says what to hand to which function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_moments, init, make

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

X = np.random.default_rng(0).normal(1, 2, (5, 4))


class Net(nn.Module):
    """Two layers, with dropout between them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(3, param_dtype=float, name="hidden")(x.reshape(x.shape[0], -1))
        return nn.Dense(2, param_dtype=float, name="out")(nn.Dropout(0.5, deterministic=not train)(x))


def notes(error):
    return " ".join(error.value.__notes__)


@pytest.mark.parametrize(
    ("args", "kwargs", "told"),
    [
        (({"params": {}}, X), {}, r"Net with (dict, float64[5, 4])"),  # as for model.apply
        ((jax.random.key(0), X), {}, r"Net with (key<fry>[], float64[5, 4])"),  # as for model.init
        (((5, 4),), {}, "Net with (tuple)"),
        ((), {}, "Net with ()"),
        ((X,), {"train": True, "rng": None}, "Net with (float64[5, 4], train=True, rng=None)"),
    ],
)
def test_a_search_that_fails_says_what_it_called_the_model_with(args, kwargs, told):
    with pytest.raises((AttributeError, IndexError, TypeError)) as error:
        bnp.linen.find_layers(Net(), *args, **kwargs)
    assert f"find_layers called {told}. Give it" in notes(error)


def test_a_search_in_nnx_that_fails_says_so_too():
    with pytest.raises((TypeError, ValueError)) as error:  # the second with JAX 0.8
        bnp.nnx.find_layers(make(nnx.Linear, 4, 3), nnx.Rngs(0), jax.ShapeDtypeStruct((5, 4), float))
    assert "find_layers called Linear with (Rngs, float64[5, 4]). Give it" in notes(error)


def test_keys_of_a_training_step_are_enough_for_a_search():
    found = bnp.linen.find_layers(Net(), X, train=True, rngs={"dropout": jax.random.key(1)})
    assert found == bnp.linen.find_layers(Net(), X)


FUNCTIONS = {
    "takes no mutable=": lambda params, x: Net().apply({"params": params}, x),
    "is compiled: compile the training step": jax.jit(Net().apply),
}


@pytest.mark.parametrize("reason", FUNCTIONS)
def test_what_cannot_be_asked_for_records_is_refused_by_capture(reason):
    with pytest.raises(TypeError, match=reason):
        bnp.linen.capture(FUNCTIONS[reason])


def test_functions_that_hand_mutable_on_are_captured():
    def apply(variables, x, **kwargs):
        return Net().apply(variables, x, **kwargs)

    _, records = bnp.linen.capture(apply)({"params": init(Net(), X)}, X)
    assert_moments(records["hidden"], X, examples=5)


def test_a_layer_that_is_not_there_is_missed_beside_those_that_are():
    layers = bnp.linen.find_layers(Net(), X)
    statistics = bnp.scale_by_bnp(layers).init(init(Net(), X))
    for holder in (layers, statistics):
        with pytest.raises(KeyError, match=r"no layer is Dense_0, but there are .*hidden"):
            holder["Dense_0"]
        assert "Dense_0" not in holder


def test_records_print_in_a_line_whatever_the_width():
    record = bnp.input_moments(jnp.ones((5, 1000)))
    assert repr(record).startswith("InputMoments(total=float64[1, 1, 1000], ")
    assert "count=Array([5], dtype=int32)" in repr(record)
    assert repr(jax.tree.map(jnp.shape, record)).startswith("InputMoments(total=(1, 1, 1000), ")


def test_an_optimizer_that_was_not_put_in_bnp_shows_in_an_inspection():
    """As Optax drops `intermediates=` where nothing takes it, training itself does not tell."""
    model, tx = Net(), optax.adam(1e-3)
    state = bnp.linen.TrainState.create(apply_fn=model.apply, params=init(model, X), tx=tx)
    with pytest.raises(ValueError, match=r"0 states of BNP, .* optimizer with preconditioned or scale_by_bnp in it"):
        bnp.inspect(bnp.linen.find_layers(model, X), state)


@pytest.mark.filterwarnings("ignore:shape requires ndarray:DeprecationWarning")  # of JAX, which still takes them
@pytest.mark.parametrize("numbers", [X.tolist(), tuple(X[0].tolist())], ids=["nested lists", "a tuple"])
def test_numbers_that_are_no_array_are_refused_naming_the_layer_that_would_take_them(numbers):
    """Flax's layers take them; a search that left the layer out would not be noticed."""
    linen, of_nnx = nn.Dense(3, param_dtype=float), make(nnx.Linear, 4, 3)
    params = linen.init(jax.random.key(0), X)
    calls = [
        lambda: bnp.linen.find_layers(linen, numbers),
        lambda: bnp.linen.capture(linen)(params, numbers),
        lambda: bnp.nnx.find_layers(of_nnx, numbers),
        lambda: bnp.nnx.capture(of_nnx)(numbers),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"kernel of shape \(4, 3\) .* it is a (list|tuple)\. .*jnp\.asarray"):
            call()


def test_bnp_inside_bnp_is_refused():
    layers, params = bnp.linen.find_layers(Net(), X), init(Net(), X)
    tx = bnp.preconditioned(bnp.bnp_sgd(0.1, layers), layers)
    _, records = bnp.linen.capture(Net())({"params": params}, X)
    with pytest.raises(TypeError, match=r"If this is an optimizer inside preconditioned, take BNP out of it"):
        tx.update(params, tx.init(params), params, intermediates=records)


def test_collections_beside_the_parameters_are_refused():
    layers, params = bnp.linen.find_layers(Net(), X), init(Net(), X)
    variables = {"params": params, "batch_stats": {"norm": {"mean": jnp.zeros(3)}}}
    with pytest.raises(ValueError, match=r"batch_stats/norm/mean, which .* tx\.init\(variables\['params'\]\)"):
        bnp.preconditioned(optax.sgd(0.1), layers).init(variables)
