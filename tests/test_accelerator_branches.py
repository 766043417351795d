"""What the library computes otherwise on accelerators than on CPUs is the same, in float64 on the CPU."""

import chex
import flax.linen as nn
import jax
import optax
import pytest
from helpers import gradients_and_records, init, normal, squared_error, train

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")


class Net(nn.Module):
    """Its first dense kernel is large enough for a matrix product to sum over its inputs on a CPU."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(8, (3, 3), padding="VALID", param_dtype=float)(x))
        x = nn.tanh(nn.Dense(64, param_dtype=float)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, use_bias=False, param_dtype=float)(x)


def end(make):
    """Returns parameters and state after three steps."""
    x, y = normal(0, 6, 5, 5, 2), normal(1, 6, 3)
    tx = make(bnp.linen.find_layers(Net(), x))
    return train(tx, gradients_and_records(Net(), squared_error), init(Net(), x), [(x, y)] * 3)


@pytest.fixture
def taken(monkeypatch):
    """Takes the branches of accelerators, and returns the set of those taken. JAX must not know the others any more."""
    branches = set()

    def default_branch(*operands, default, **per_platform):
        assert set(per_platform) == {"cpu"}
        branches.add(getattr(default, "func", default).__name__)
        return default(*operands)

    jax.clear_caches()
    monkeypatch.setattr(jax.lax, "platform_dependent", default_branch)
    yield branches
    monkeypatch.undo()
    jax.clear_caches()


MAKE = {
    "bnp_sgd": lambda layers: bnp.bnp_sgd(0.1, layers, momentum=0.9),
    "sgd in z": lambda layers: bnp.preconditioned(optax.sgd(0.1, momentum=0.9), layers),
}
OF_METHOD = {"bnp_sgd": {"sum_of_new"}, "sgd in z": {"_weighted_sum"}}


@pytest.fixture(params=MAKE)
def name_and_expected(request):
    return request.param, end(MAKE[request.param])


def test_training_is_the_same_in_the_branches_of_accelerators(name_and_expected, taken):
    name, expected = name_and_expected
    actual = end(MAKE[name])
    assert taken == {"_in_one_pass", "_by_slices", *OF_METHOD[name]}
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)
