"""All transformations of the library, and one small network: what test_contract.py and test_wrappers.py run over."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from helpers import gradients_and_records, init, normal

import bnp_optax as bnp

IDENTITY, SGD = optax.identity(), optax.sgd(0.1, momentum=0.9)
ADAM = optax.adam(1e-2, b2=0.9, eps=1e-3)  # under the defaults what it adds and multiplies is 0 in float16


class Transformation(NamedTuple):
    """A transformation of gradients and records.

    Attributes:
      make: makes it, from the layers and the options of `bnp_optax.scale_by_bnp`.
      rest: what it is to parameters that no layer covers.
      behind: what makes an optimizer of it, in a chain.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    rest: optax.GradientTransformation
    behind: optax.GradientTransformation = IDENTITY

    def optimizer(self, **options: Any) -> optax.GradientTransformationExtraArgs:
        """Returns an optimizer of the network."""
        return optax.chain(self.make(problem().layers, **options), self.behind)

    def injected(self, **options: Any) -> optax.GradientTransformationExtraArgs:
        """Returns an optimizer of the network with injected hyperparameters."""
        make = optax.inject_hyperparams(self.make, static_args=("layers", "variance", "scaling"))
        return optax.chain(make(layers=problem().layers, **options), self.behind)


TRANSFORMATIONS = {
    "scale_by_bnp": Transformation(bnp.scale_by_bnp, IDENTITY, SGD),
    "preconditioned(identity)": Transformation(functools.partial(bnp.preconditioned, IDENTITY), IDENTITY, SGD),
    "preconditioned(adam)": Transformation(functools.partial(bnp.preconditioned, ADAM), ADAM),
    "bnp_sgd": Transformation(functools.partial(bnp.bnp_sgd, 0.1, momentum=0.9), SGD),
}


class Net(nn.Module):
    """Layers with and without a bias, one of two groups, and a normalization that no layer covers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=2)(x))
        x = nn.LayerNorm()(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.Dense(8, use_bias=False)(x))
        return nn.Dense(3)(x)


def loss(output):
    return jnp.sum(jnp.square(jnp.sin(output)))


GRADIENTS_AND_RECORDS = jax.jit(gradients_and_records(Net(), loss))


class Problem(NamedTuple):
    """The network with its parameters, and the gradients and records of one batch."""

    x: jax.Array
    params: Any
    layers: bnp.Layers
    gradients: Any
    records: dict[str, bnp.InputMoments]


@functools.cache
def problem():
    x = normal(0, 8, 4, 4, 2)
    params = init(Net(), x)
    return Problem(x, params, bnp.linen.find_layers(Net(), x), *GRADIENTS_AND_RECORDS(params, x))


# The smallest problem: one dense layer, whose records are made by hand.
DENSE = bnp.Layers((bnp.Layer.dense(("w",), (3, 2), bias=("b",)),))


def dense_params(n=3):
    return {"w": jnp.ones((n, 2)), "b": jnp.ones(2)}


def dense_record(x):
    return {"w": bnp.input_moments(jnp.asarray(x, jnp.float32))}
