"""Which layers are scale-invariant, as PSI-SGD needs it: those in front of normalizations, and what only seems so."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import cross_entropy, normal
from invariant_networks import BatchNorm, Conv, Dense, GroupNorm, LayerNorm, Net, Problem, rescaled

import bnp_optax as bnp
from bnp_optax.contrib import is_scale_invariant

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def bn(x64):
    return Problem()


def invariances(problem, tolerance=1e-9, **options):
    return is_scale_invariant(problem.loss, problem.params, problem.all_layers, tolerance=tolerance, **options)


def test_layers_in_front_of_bn_are_found(bn):
    invariant = invariances(bn)
    assert invariant == {"conv": True, "grouped": True, "dense": True, "out": False}
    assert list(invariant) == list(bn.all_layers)
    assert bn.all_layers.select(lambda layer: invariant[layer.path]) == bn.layers
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), bn.params)
    assert invariant == is_scale_invariant(
        lambda params: bn.loss(nn.unbox(params)), boxed, bn.all_layers, tolerance=1e-9
    )
    scaled = rescaled(bn, bn.params)
    assert invariant == is_scale_invariant(bn.loss, scaled, bn.all_layers, tolerance=1e-9)


def test_they_are_found_in_float32_under_the_usual_epsilon(x64):
    class Plain(nn.Module):
        """As users write it."""

        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(8, (3, 3), name="conv")(x)))
            x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(16, name="dense")(x.reshape(x.shape[0], -1))))
            return nn.Dense(3, name="out")(x)

    problem = Problem(Plain(), jnp.float32)
    expected = {"conv": True, "dense": True, "out": False}
    assert is_scale_invariant(problem.loss, problem.params, problem.all_layers) == expected
    small = jax.tree.map(lambda leaf: 1e-3 * leaf, problem.params)
    assert is_scale_invariant(problem.loss, small, problem.all_layers) == dict.fromkeys(expected, False)


def test_layers_of_nnx_are_found(x64):
    """In its own trees, and in float32, whose statistics NNX keeps."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(5, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.hidden(x))))

    model, x, y = Model(nnx.Rngs(0)), normal(0, 16, 5).astype(jnp.float32), jnp.arange(16) % 3
    layers = bnp.nnx.find_layers(model, x)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return cross_entropy(nnx.merge(graphdef, params, rest, copy=True)(x), y)

    assert is_scale_invariant(loss, params, layers) == {"hidden": True, "out": False}


@pytest.mark.parametrize("use_bias", [True, False])
def test_in_front_of_layer_norm_the_whole_kernel_is_without_a_bias(x64, use_bias):
    """Though a bias is zero at the start, as here."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6, use_bias=use_bias, param_dtype=float, name="dense")(x.reshape(x.shape[0], -1))
            return Dense(3, name="out")(nn.relu(LayerNorm()(x)))

    problem = Problem(Model())
    assert invariances(problem, num_groups=1) == {"dense": not use_bias, "out": False}
    assert invariances(problem) == {"dense": False, "out": False}


def test_in_front_of_group_norm_the_kernels_of_a_group_are(x64):
    norm = functools.partial(GroupNorm, num_groups=2)
    problem = Problem(Net((norm, norm, norm), use_bias=False))
    alone = dict.fromkeys(problem.all_layers, False)
    of_layers = {name: name != "out" for name in problem.all_layers}
    assert invariances(problem, num_groups=1, tolerance=1e-9) == {**of_layers, "out": False}
    without_out = problem.layers
    assert is_scale_invariant(problem.loss, problem.params, without_out, num_groups=2, tolerance=1e-9) == dict.fromkeys(
        without_out, True
    )
    assert invariances(problem) == alone


def test_what_seems_invariant_and_is_not(x64):
    """A convolution added to a path that was not normalized; Batch Renormalization; running statistics; no gradient."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Conv(4, (3, 3), name="first")(x)
            x = x + Conv(4, (3, 3), name="residual")(nn.relu(BatchNorm()(x)))
            x = nn.relu(BatchNorm()(x)).reshape(x.shape[0], -1)
            x = renormalize(Dense(6, name="renormalized")(x))
            x = BatchNorm(use_running_average=True)(Dense(6, name="running")(nn.relu(x)))
            x = nn.relu(BatchNorm()(Dense(5, name="last")(x)))
            return Dense(3, name="out")(x) + 0 * Dense(3, name="dead")(x)

    def renormalize(x):
        mean, deviation = x.mean(0, keepdims=True), x.std(0, keepdims=True)
        r, d = jax.lax.stop_gradient((deviation / 2, (mean - 0.1) / 2))
        return (x - mean) / deviation * r + d

    problem = Problem(Model())
    gradients, params = problem.gradients(problem.params), problem.params
    kernel, gradient = params["renormalized"]["kernel"], gradients["renormalized"]["kernel"]
    assert np.abs((kernel * gradient).sum(0)).max() < 1e-14  # the gradient alone does not tell
    assert np.abs(gradient).max() > 1e-3
    found = invariances(problem)
    assert {name for name, is_so in found.items() if is_so} == {"last"}


def test_every_unit_is_tried_at_a_scale_of_its_own(x64):
    """The loss knows the ratios of the units' scales, though its gradient does not."""
    layers = bnp.Layers((bnp.Layer.dense(("w",), (5, 4)),))
    x, params = normal(0, 16, 5), {"w": normal(1, 5, 4)}

    def loss(params):
        z = x @ params["w"]
        deviations = z.std(0, keepdims=True)
        return jnp.sin(z / deviations * jax.lax.stop_gradient(deviations / deviations.mean())).sum()

    assert is_scale_invariant(loss, params, layers, tolerance=1e-9) == {"w": False}
    assert is_scale_invariant(loss, params, layers, num_groups=1, tolerance=1e-9) == {"w": True}


def test_a_loss_that_is_not_finite_is_refused(bn):
    with pytest.raises(ValueError, match="The loss is nan, so that nothing can be said"):
        is_scale_invariant(lambda params: jnp.nan * bn.loss(params), bn.params, bn.all_layers)
