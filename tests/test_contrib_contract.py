"""What every transformation of ``contrib`` promises: types, masks, wrappers, errors."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import compiled
from transformations import ADAM, DENSE, dense_params, problem

import bnp_optax as bnp
from bnp_optax import contrib

pytestmark = pytest.mark.usefixtures("standard_promotion")


class Transformation(NamedTuple):
    """How to make one of some layers.

    Attributes:
      make: makes it.
      rest: what it is to parameters that no layer covers.
      of_layers: whether it asks for layers.
      of_params: whether its update asks for parameters.
    """

    make: Callable[[bnp.Layers], optax.GradientTransformationExtraArgs]
    rest: optax.GradientTransformation | None = optax.identity()
    of_layers: bool = True
    of_params: bool = True


TRANSFORMATIONS = {
    "scale_by_psi": Transformation(contrib.scale_by_psi),
    "psi_sgd": Transformation(
        lambda layers: contrib.psi_sgd(0.1, layers, momentum=0.9), optax.chain(optax.scale(-0.1), optax.trace(0.9))
    ),
    # at the problem's gradients a hundredth clips them all
    "adaptive_grad_clip": Transformation(lambda layers: contrib.adaptive_grad_clip(0.01, layers)),
    # Adam, whose step brings back the mean that a gradient behind a LayerNorm has not
    "centred": Transformation(lambda layers: contrib.centred(ADAM, layers), ADAM, of_params=False),
    "scale_by_critical_learning_rate": Transformation(
        lambda layers: contrib.scale_by_critical_learning_rate(1e9, layers), None
    ),
    "trajectory_regularized": Transformation(
        lambda layers: contrib.trajectory_regularized(optax.sgd(0.1, momentum=0.9), 1.0), None, of_layers=False
    ),
    # its second update is the first of the second phase, which moves all parameters here
    "explore_then_exploit": Transformation(
        lambda layers: contrib.explore_then_exploit(optax.sgd(0.1, momentum=0.9), optax.sgd(0.2), 1, True),
        None,
        of_layers=False,
    ),
}
OF_LAYERS = [name for name, entry in TRANSFORMATIONS.items() if entry.rest is not None]
ASKS_FOR_LAYERS = [name for name, entry in TRANSFORMATIONS.items() if entry.of_layers]


@pytest.fixture(scope="module", params=TRANSFORMATIONS)
def entry(request):
    return TRANSFORMATIONS[request.param]


@pytest.fixture(scope="module")
def tx(entry):
    return compiled(entry.make(problem().layers))


def two_updates(tx, params=None, gradients=None):
    """Returns the second of two updates, so that what the state keeps matters, and the state after it."""
    params = problem().params if params is None else params
    gradients = problem().gradients if gradients is None else gradients
    _, state = tx.update(gradients, tx.init(params), params)
    return tx.update(gradients, state, params)


def test_updates_and_state_keep_tree_shape_dtype_and_weak_type(tx):
    start = tx.init(problem().params)
    updates, state = two_updates(tx)
    for actual, expected in ((updates, problem().gradients), (state, start)):
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(actual))


def test_it_changes_the_updates_of_layers(tx, entry):
    updates, _ = two_updates(tx)
    rest = entry.rest or optax.identity()
    expected, _ = two_updates(rest)
    for name in problem().layers:
        assert np.abs(updates[name]["kernel"] - expected[name]["kernel"]).max() > 1e-4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_comes_back_in_its_dtype(tx, dtype):
    params, gradients = optax.tree.cast((problem().params, problem().gradients), dtype)
    updates, _ = two_updates(tx, params, gradients)
    expected, _ = two_updates(tx)
    chex.assert_trees_all_equal_dtypes(updates, gradients)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(optax.tree.cast(updates, jnp.float32), expected, rtol=0.1, atol=0.02 * largest)


def test_eager_compiled_donated_and_mapped_updates_agree(tx, entry):
    eager, p = entry.make(problem().layers), problem()
    expected, state = two_updates(tx)
    chex.assert_trees_all_close(two_updates(eager), (expected, state), rtol=1e-5, atol=1e-6)
    donating = optax.GradientTransformationExtraArgs(eager.init, jax.jit(eager.update, donate_argnums=1))
    for _ in range(2):  # another start finds all that it needs
        chex.assert_trees_all_close(two_updates(donating), (expected, state), rtol=1e-5, atol=1e-6)

    members = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf + 0.1]), (p.params, p.gradients))
    mapped = jax.vmap(lambda params, gradients: two_updates(eager, params, gradients))(*members)
    for k in range(2):
        alone = two_updates(tx, *jax.tree.map(lambda leaf, k=k: leaf[k], members))
        member = jax.tree.map(lambda leaf, k=k: leaf[k], mapped)
        chex.assert_trees_all_close(member, alone, rtol=1e-5, atol=1e-6)


def test_trees_of_other_kinds_are_like_dicts(tx):
    expected, _ = two_updates(tx)
    params, gradients = problem().params, problem().gradients
    frozen, _ = two_updates(tx, *map(flax.core.freeze, (params, gradients)))
    assert isinstance(frozen, flax.core.FrozenDict)
    chex.assert_trees_all_close(flax.core.unfreeze(frozen), expected, rtol=1e-6)
    beneath, _ = two_updates(tx, {"params": params}, {"params": gradients})
    chex.assert_trees_all_close(beneath["params"], expected, rtol=1e-6)

    def boxed(tree):
        return jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), tree)

    updates, _ = two_updates(tx, boxed(params), boxed(gradients))
    chex.assert_trees_all_close(nn.unbox(updates), expected, rtol=1e-6)


def test_a_model_of_nnx_is_trained(entry):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    x = jnp.arange(15.0).reshape(5, 3) / 10  # inputs that differ, whose gradients have more than a mean
    optimizer = nnx.Optimizer(model, entry.make(bnp.nnx.find_layers(model, x)), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.square(model(x)).sum())(model)
        optimizer.update(model, gradients)

    for _ in range(2):
        step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_tree_all_finite(after)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert min(moved["layers"][k]["kernel"] for k in (0, 2)) > 0


@pytest.mark.parametrize("name", OF_LAYERS)
def test_parameters_outside_the_layers_are_updated_as_without(name):
    entry, p = TRANSFORMATIONS[name], problem()
    updates, _ = two_updates(entry.make(p.layers.select(lambda layer: layer.kind == "Conv")))
    expected, _ = two_updates(entry.rest)
    for other in ("LayerNorm_0", "Dense_0", "Dense_1"):
        chex.assert_trees_all_close(updates[other], expected[other], rtol=1e-6)


@pytest.mark.parametrize("name", OF_LAYERS)
def test_masked_parameters_pass(name):
    entry, p = TRANSFORMATIONS[name], problem()
    mask = jax.tree.map(lambda _: True, p.params)
    mask["Conv_0"] = {"kernel": False, "bias": True}
    mask["Dense_1"] = {"kernel": True, "bias": False}
    updates, _ = two_updates(compiled(optax.masked(entry.make(p.layers), mask)))
    full, _ = two_updates(entry.make(p.layers))
    chex.assert_trees_all_equal(updates["Conv_0"]["kernel"], p.gradients["Conv_0"]["kernel"])
    chex.assert_trees_all_equal(updates["Dense_1"]["bias"], p.gradients["Dense_1"]["bias"])
    chex.assert_trees_all_close(updates["Dense_0"], full["Dense_0"], rtol=1e-6)
    chex.assert_trees_all_close(updates["Dense_1"]["kernel"], full["Dense_1"]["kernel"], rtol=1e-6)


WRAPPERS = {
    "chain": lambda tx: optax.chain(tx, optax.scale(1.0)),
    "named_chain": lambda tx: optax.named_chain(("tx", tx)),
    "partition": lambda tx: optax.partition({"all": tx}, lambda params: jax.tree.map(lambda _: "all", params)),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, every_k_schedule=1),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda one: optax.chain(tx, optax.scale(one)))(one=1.0),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside_a_wrapper_it_does_what_it_does_alone(tx, entry, wrapper):
    wrapped = WRAPPERS[wrapper](entry.make(problem().layers))
    chex.assert_trees_all_close(two_updates(wrapped)[0], two_updates(tx)[0], rtol=1e-5, atol=1e-7)


def test_it_takes_the_extra_arguments_of_others(tx):
    p = problem()
    updates, _ = tx.update(p.gradients, tx.init(p.params), p.params, intermediates=p.records, value=1.0)
    alone, _ = tx.update(p.gradients, tx.init(p.params), p.params)
    chex.assert_trees_all_equal(updates, alone)


def test_gradients_of_zero_are_no_step(tx):
    zeros = optax.tree.zeros_like(problem().gradients)
    updates, state = two_updates(tx, gradients=zeros)
    chex.assert_trees_all_equal(updates, zeros)
    chex.assert_tree_all_finite(state)


def test_parameters_are_needed(entry):
    tx = entry.make(DENSE)
    refused = pytest.raises(ValueError, match="needs the parameters") if entry.of_params else contextlib.nullcontext()
    with refused:
        tx.update(dense_params(), tx.init(dense_params()))


@pytest.mark.parametrize("name", ASKS_FOR_LAYERS)
def test_layers_of_another_model_are_refused(name):
    tx, params = TRANSFORMATIONS[name].make(DENSE), dense_params(4)
    with pytest.raises(ValueError, match=r"w with shape \(3, 2\), but it has shape \(4, 2\)"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("layers", [None, bnp.Layers(()), nn.Dense(3)], ids=["none", "empty", "a model"])
@pytest.mark.parametrize("name", ASKS_FOR_LAYERS)
def test_what_is_no_layers_is_refused(name, layers):
    with pytest.raises((TypeError, ValueError), match=r"[Ll]ayer"):
        TRANSFORMATIONS[name].make(layers)
