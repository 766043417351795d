"""Layers that lie beneath other keys, beside others, or in part: joined, moved, recognised, or refused by name."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_same, forward, init, make, normal

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")

MODEL = nn.Sequential([nn.Dense(3, param_dtype=float), nn.Dense(2, param_dtype=float)])
X = np.random.default_rng(0).normal(1, 2, (5, 4))


class Networks(NamedTuple):
    """Two networks in one tree."""

    policy: dict
    value: dict


@pytest.fixture(scope="module")
def problem():
    """The layers, gradients, records, and what the transformation makes of them."""
    params, layers = init(MODEL, X), bnp.linen.find_layers(MODEL, X)
    _, records = forward(MODEL)(params, X)
    tx = bnp.scale_by_bnp(layers)
    updates, _ = tx.update(params, tx.init(params), intermediates=records)
    return layers, params, records, updates


@pytest.mark.parametrize(
    "around",
    [
        lambda tree: {"params": tree},
        lambda tree: {"a": {"b": tree}},
        lambda tree: [tree],
        lambda tree: Networks(tree, {}),
    ],
    ids=["params", "two keys", "list", "tuple"],
)
def test_one_prefix_of_all_layers_is_recognised(around, problem):
    layers, params, records, expected = problem
    for tx in (bnp.scale_by_bnp(layers), bnp.preconditioned(optax.identity(), layers)):
        tree = around(params)
        updates, state = tx.update(tree, tx.init(tree), tree, intermediates=records)
        assert_same(updates, around(expected))
        statistics = state if isinstance(state, bnp.Statistics) else state.statistics
        assert set(statistics) == {"layers_0", "layers_1"}


def test_a_prefix_is_recognised_behind_a_mask(problem):
    layers, params, records, expected = problem
    mask = {"params": {"layers_0": True, "layers_1": False}}
    tx = optax.masked(bnp.scale_by_bnp(layers), mask)
    updates, _ = tx.update({"params": params}, tx.init({"params": params}), intermediates=records)
    assert_same(updates["params"], {"layers_0": expected["layers_0"], "layers_1": params["layers_1"]})


def test_layers_that_may_lie_beneath_several_keys_are_refused(problem):
    layers, params, _, _ = problem
    with pytest.raises(ValueError, match=r"beneath each of policy, value\. Say which: layers\.under\('policy'\)"):
        bnp.scale_by_bnp(layers).init(Networks(params, params))


def test_two_networks_in_one_tree_are_two_alone(problem):
    layers, params, records, expected = problem
    both = layers.under("policy") | layers.under("value")
    assert list(both) == ["policy/layers_0", "policy/layers_1", "value/layers_0", "value/layers_1"]
    tx, tree = bnp.scale_by_bnp(both), Networks(params, params)
    updates, state = tx.update(tree, tx.init(tree), intermediates={"policy": records, "value": records})
    assert_same(updates, Networks(expected, expected))
    assert_same(state["policy/layers_1"], state["value/layers_1"])


def test_parameters_that_the_search_has_not_seen_are_refused_by_name(problem):
    layers, params, records, expected = problem
    tree = {"params": params, "log_alpha": jnp.ones(())}
    with pytest.raises(ValueError, match=r"The parameters hold \.\./log_alpha, which the pass"):
        bnp.scale_by_bnp(layers).init(tree)
    tx = bnp.scale_by_bnp(dataclasses.replace(layers, complete=False))
    updates, _ = tx.update(tree, tx.init(tree), intermediates=records)
    assert_same(updates, {"params": expected, "log_alpha": jnp.ones(())})


def test_a_union_includes_what_either_calls_and_excludes_what_either_cannot():
    a, b, c = (bnp.Layer.dense((name, "kernel"), (3, 2)) for name in "abc")

    def excluded(layer, reason):
        return bnp.Excluded(layer.kernel.path, layer.kernel.shape, reason)

    one = bnp.Layers((a, b), (excluded(c, "not called in this pass"),), complete=True)
    other = bnp.Layers((a, c), (excluded(b, "called in several ways"),), complete=True)
    both = one | other
    assert list(both) == ["a", "c"]
    assert both.excluded == (excluded(b, "called in several ways"),)
    assert both.complete
    assert not (one | bnp.Layers((a,))).complete
    assert (one | one) == one
    with pytest.raises(TypeError):
        one | {}


def test_a_union_of_two_heads_of_nnx_is_the_whole_model():
    class Heads(nnx.Module):
        def __init__(self, rngs):
            self.trunk = nnx.Linear(4, 3, param_dtype=float, rngs=rngs)
            self.a, self.b = (nnx.Linear(3, 2, param_dtype=float, rngs=rngs) for _ in range(2))

    model = make(Heads)
    heads = [
        bnp.nnx.find_layers(model, X, method=lambda m, x, head=head: getattr(m, head)(m.trunk(x))) for head in "ab"
    ]
    assert [list(layers) for layers in heads] == [["trunk", "a"], ["trunk", "b"]]
    whole = heads[0] | heads[1]
    assert list(whole) == ["trunk", "a", "b"]
    assert not whole.excluded


@pytest.mark.parametrize("wrong", ["variables", "params"])
def test_variables_in_the_place_of_a_model_are_a_type_error(wrong):
    variables = MODEL.init(jax.random.key(0), X)
    for api in (bnp.linen, bnp.nnx):
        with pytest.raises(TypeError, match=r"find_layers\(model, x\) .* not dict\. Pass the model itself"):
            api.find_layers({"variables": variables, "params": variables["params"]}[wrong], X)


def test_a_model_of_the_other_api_is_a_type_error():
    with pytest.raises(TypeError, match=r"not Sequential\. That of bnp_optax\.linen is for this model"):
        bnp.nnx.find_layers(MODEL, X)
    with pytest.raises(TypeError, match=r"not Linear\. That of bnp_optax\.nnx is for this model"):
        bnp.linen.find_layers(make(nnx.Linear, 4, 3), X)


class Init(nn.Module):
    """A module one of whose fields hides a method of Flax."""

    init: str = "zeros"

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, param_dtype=float)(x)


def test_a_field_may_be_named_as_a_method_of_flax():
    assert list(bnp.linen.find_layers(Init(), X)) == ["Dense_0"]


def test_the_table_says_how_often_a_layer_is_called_and_what_was_taken_for_n():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, tokens):
            head = nn.Dense(4, param_dtype=float, name="head")
            return head(head(x)), nn.Dense(2, param_dtype=float, name="body")(tokens)

    layers = bnp.linen.find_layers(Twice(), X, normal(0, 7, 3, 2))
    assert layers["head"].calls == 2
    assert layers == bnp.linen.find_layers(Twice(), X[:2], normal(0, 1, 3, 2))
    lines = str(layers).splitlines()
    assert "called 2 times" in lines[1]
    assert "called" not in lines[2]
    assert lines[-1] == "N, the examples of a batch, is the first axis of a layer's input: 5 here, but 7 of body."
