"""One call for a forward pass and its records, in Linen and in NNX: what it returns, and what it takes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Wrapped, assert_moments, assert_same, gradients_and_records, init, make, normal

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")


class Sowing(nn.Module):
    """A layer, and beside it a running mean and a value that the user sows."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(3, param_dtype=float, name="dense")(x)
        mean = self.variable("batch_stats", "mean", lambda: x.mean(0))
        if train:
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        self.sow("intermediates", "hidden", x)
        return x


X = np.random.default_rng(0).normal(1, 2, (5, 4))  # float64, though no array of JAX is yet


@pytest.fixture(scope="module")
def variables():
    return Sowing().init(jax.random.key(0), X)


def test_nothing_mutable_returns_the_output_alone(variables):
    y, records = bnp.linen.capture(Sowing())(variables, X, train=False)
    np.testing.assert_array_equal(y, Sowing().apply(variables, X, train=False))
    assert list(records) == ["dense"]
    assert_moments(records["dense"], np.asarray(X), examples=5)


@pytest.mark.parametrize(
    ("mutable", "collections"),
    [
        ("batch_stats", {"batch_stats"}),
        (["batch_stats"], {"batch_stats"}),
        (["batch_stats", "intermediates"], {"batch_stats", "intermediates"}),
        (True, {"params", "batch_stats", "intermediates"}),
        (nn.DenyList("params"), {"batch_stats", "intermediates"}),
        (nn.DenyList(["params", "intermediates"]), {"batch_stats"}),
    ],
)
def test_mutable_collections_come_beside_the_output(mutable, collections, variables):
    (y, updated), records = bnp.linen.capture(Sowing())(variables, X, mutable=mutable)
    expected, plainly_updated = Sowing().apply(variables, X, mutable=mutable)
    np.testing.assert_array_equal(y, expected)
    assert set(updated) == set(plainly_updated) == collections
    assert_same(updated["batch_stats"], plainly_updated["batch_stats"])
    if "intermediates" in collections:
        np.testing.assert_array_equal(updated["intermediates"]["hidden"][0], expected)
    assert_moments(records["dense"], np.asarray(X), examples=5)


def test_records_of_another_pass_do_not_enter(variables):
    """A user who hands all updated collections on hands the records on too."""
    (_, updated), _ = bnp.linen.capture(Sowing())(variables, 100 * X, mutable=True)
    _, records = bnp.linen.capture(Sowing())(updated, X, train=False)
    assert_moments(records["dense"], np.asarray(X), examples=5)


def test_apply_stands_for_the_model(variables):
    _, of_model = bnp.linen.capture(Sowing())(variables, X, train=False)
    _, of_apply = bnp.linen.capture(Sowing().apply)(variables, X, train=False)
    assert_same(of_apply, of_model)


class Branches(nn.Module):
    """Two layers, one of which a pass takes."""

    def setup(self):
        self.branches = [nn.Dense(2, param_dtype=float), nn.Dense(2, param_dtype=float)]

    def __call__(self, x):
        left, right = (lambda module, x, k=k: module.branches[k](x) for k in range(2))
        if self.is_initializing():
            left(self, x), right(self, x)
        return nn.cond(x[0, 0] > 0, left, right, self, x)


class NNXBranches(nnx.Module):
    def __init__(self, rngs):
        self.left, self.right = (nnx.Linear(4, 2, param_dtype=float, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return nnx.cond(x[0, 0] > 0, lambda module, x: module.left(x), lambda module, x: module.right(x), self, x)

    def both(self, x):
        return self.left(x), self.right(x)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("sign", [1, -1])
def test_chosen_layers_that_a_pass_does_not_reach_have_empty_records(api, sign):
    x = sign * np.abs(X)
    if api == "linen":
        layers, params = bnp.linen.find_layers(Branches(), x), init(Branches(), x)
        _, records = bnp.linen.capture(Branches(), layers=layers)({"params": params}, x)
    else:
        model = NNXBranches(nnx.Rngs(0))
        layers = bnp.nnx.find_layers(model, x, method="both")
        _, records = bnp.nnx.capture(model, layers=layers)(x)
    assert list(records) == list(layers)
    reached, other = list(records.values())[::sign]
    assert_moments(reached, np.asarray(x), examples=5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(other))


class BranchesOfAStep(nn.Module):
    """Two branches, and a layer after them."""

    conditional: bool

    def setup(self):
        two = [nn.Dense(5, param_dtype=float), nn.tanh, nn.Dense(4, use_bias=False, param_dtype=float)]
        self.branches = [nn.Dense(4, param_dtype=float), nn.Sequential(two)]
        self.last = nn.Dense(2, param_dtype=float)

    def __call__(self, x, index):
        branches = [lambda module, x, k=k: module.branches[k](x) for k in range(2)]
        if self.is_initializing():
            for branch in branches:
                branch(self, x)
        chosen = (nn.cond, index == 0, *branches) if self.conditional else (nn.switch, index, branches)
        transform, *arguments = chosen
        return self.last(transform(*arguments, self, x))


@pytest.fixture(scope="module", params=[True, False], ids=["cond", "switch"])
def branches(request):
    """Input, statistics at the start, and a compiled step, which the index of the branch is given."""
    model, x = BranchesOfAStep(request.param), normal(0, 6, 4)
    layers = bnp.linen.find_layers(model, x, 0)
    assert list(layers) == ["branches_0", "branches_1/layers_0", "branches_1/layers_2", "last"]
    params = init(model, x, 0)
    tx = bnp.scale_by_bnp(layers, decay=0.5)

    def run(params, x, index):
        return bnp.linen.capture(model, layers=layers)({"params": params}, x, index)

    @jax.jit
    def step(state, index):
        gradients, records = gradients_and_records(run)(params, (x, index))
        return tx.update(gradients, state, intermediates=records)

    return x, tx.init(params), step


@pytest.mark.parametrize("taken", [0, 1])
def test_only_the_branch_that_is_taken_absorbs_the_batch(taken, branches):
    x, start, step = branches
    updates, state = step(start, taken)
    for k, (path, update) in enumerate(
        {"branches_0": updates["branches_0"], "branches_1/layers_0": updates["branches_1"]["layers_0"]}.items()
    ):
        if k == taken:
            assert state[path].seen == 6
            np.testing.assert_allclose(state[path].mean.ravel(), 0.5 * x.mean(0), rtol=1e-10)
        else:
            assert_same(state[path], start[path])
            assert not np.any(update["kernel"])
    assert state["last"].seen == 6


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_that_are_not_chosen_are_not_recorded(api):
    if api == "linen":
        model = nn.Sequential([nn.Dense(3, param_dtype=float), nn.Dense(2, param_dtype=float)])
        params, found = init(model, X), bnp.linen.find_layers(model, X)
        capture = lambda layers: bnp.linen.capture(model, layers=layers)({"params": params}, X)[1]  # noqa: E731
    else:
        model = nnx.Sequential(make(nnx.Linear, 4, 3), make(nnx.Linear, 3, 2))
        found = bnp.nnx.find_layers(model, X)
        capture = lambda layers: bnp.nnx.capture(model, layers=layers)(X)[1]  # noqa: E731
    _, second = found
    chosen = capture(found.select(lambda layer: layer.path == second))
    assert list(chosen) == [second]
    assert_same(chosen[second], capture(found)[second])


def test_a_chosen_layer_in_a_loop_that_is_not_run_is_missed_by_name():
    """How many steps there were is not known, so that there is no empty record."""
    steps = nnx.StateAxes({nnx.Intermediate: 0, ...: None})
    loop = nnx.scan(lambda layer, x: layer(x), in_axes=(steps, 1), out_axes=1)
    model, x = Wrapped(make(nnx.Linear, 4, 3), loop), normal(0, 5, 6, 4)
    layers = bnp.nnx.find_layers(model, x)
    assert list(bnp.nnx.capture(model, layers=layers)(x)[1]) == ["layer"]
    _, records = bnp.nnx.capture(lambda model, x: x, layers=layers)(model, x)
    assert records == {}
    tx, params = bnp.scale_by_bnp(layers), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match="no record of the input of layer"):
        tx.update(params, tx.init(params), intermediates=records)


def test_layers_of_another_model_are_refused():
    layers = bnp.nnx.find_layers(nnx.Sequential(make(nnx.Linear, 4, 3)), X)
    with pytest.raises(ValueError, match="layers describes layers/0, which the model does not have"):
        bnp.nnx.capture(make(nnx.Linear, 4, 3), layers=layers)(X)


def test_unshared_convolutions_can_be_chosen():
    """Their record holds one entry for each position, as the empty one does."""
    model, x = nn.ConvLocal(3, (2,), param_dtype=float), normal(0, 5, 6, 4)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    _, plain = bnp.linen.capture(model)({"params": params}, x)
    _, chosen = bnp.linen.capture(model, layers=layers)({"params": params}, x)
    assert_same(chosen, plain)


class DenseAndMore(nn.Dense):
    """A layer of Flax beside a parameter that is no array."""

    @nn.compact
    def __call__(self, x):
        self.param("pair", lambda key: (jnp.ones(2), jnp.ones(3)))
        return super().__call__(x)


class LinearAndMore(nnx.Linear):
    """The same in NNX."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cache = nnx.Cache({"a": jnp.ones(2)})


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_what_a_layer_has_beside_its_arrays_is_no_matter(api):
    if api == "linen":
        model = DenseAndMore(3, param_dtype=float)
        layers = bnp.linen.find_layers(model, X)
        _, records = bnp.linen.capture(model)({"params": init(model, X)}, X)
    else:
        model = make(LinearAndMore, 4, 3)
        layers = bnp.nnx.find_layers(model, X)
        _, records = bnp.nnx.capture(model)(X)
    assert list(layers) == list(records) == ["kernel"]
    assert_moments(records["kernel"], np.asarray(X), examples=5)


class Trainer:
    """Not a module, whose method takes one."""

    def forward(self, model, x):
        return model(x)


def test_a_method_of_what_is_no_module_takes_its_model_as_an_argument():
    model = make(nnx.Linear, 4, 3)
    layers = bnp.nnx.find_layers(model, X)
    _, records = bnp.nnx.capture(Trainer().forward, layers=layers)(model, X)
    assert_moments(records["kernel"], np.asarray(X), examples=5)


def test_a_model_in_a_container_is_captured_with_its_layers_and_names():
    models, asked = {"a": make(nnx.Linear, 4, 3)}, []
    layers = bnp.nnx.find_layers(models["a"], X).under("a")
    run = lambda models, x: models["a"](x)  # noqa: E731
    for options in ({}, {"layers": layers}, {"mask": lambda name, x: asked.append(name)}):
        _, records = bnp.nnx.capture(run, **options)(models, X)
        assert list(records) == ["a"]
        assert_moments(records["a"], np.asarray(X), examples=5)
    assert asked == ["a"]


def test_a_function_whose_first_argument_holds_no_model_is_a_type_error():
    model = make(nnx.Linear, 4, 3)
    for run, args, kwargs in ((lambda x, m: m(x), (X, model), {}), (lambda m: m(X), (), {"m": model})):
        with pytest.raises(TypeError, match="wants the model as the function's first argument"):
            bnp.nnx.capture(run)(*args, **kwargs)


def test_functions_and_methods_of_nnx_are_captured():
    class Coder(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Linear(4, 2, param_dtype=float, rngs=rngs)

        def encode(self, x, factor=1):
            return self.encoder(factor * x)

    model = Coder(nnx.Rngs(0))
    for captured in (
        bnp.nnx.capture(model.encode)(X, factor=2),
        bnp.nnx.capture(lambda model, x: model.encode(2 * x))(model, X),
    ):
        np.testing.assert_array_equal(captured[0], model.encode(2 * X))
        assert_moments(captured[1]["encoder"], np.asarray(2 * X), examples=5)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_what_is_compiled_inside_a_model_is_traced_once_with_and_once_without_records(api):
    traces = []

    if api == "linen":

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                traces.append(None)
                return nn.Dense(2, param_dtype=float)(x)

        model = nn.jit(Layer)()
        params = Layer().init(jax.random.key(0), X)
        plain, captured = (lambda: model.apply(params, X)), (lambda: bnp.linen.capture(model)(params, X))
    else:

        @nnx.jit
        def layer(layer, x):
            traces.append(None)
            return layer(x)

        model = Wrapped(make(nnx.Linear, 4, 2), layer)
        plain, captured = (lambda: model(X)), (lambda: bnp.nnx.capture(model)(X))
    plain()
    traces.clear()
    records = [captured()[1] for _ in range(3)]
    assert len(traces) == 1
    assert all(len(each) == 1 for each in records)
    plain()
    assert len(traces) == 1
