"""Networks with normalizations, in float64, and their trainings: what the tests of PSI-SGD share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import cross_entropy, init, normal

import bnp_optax as bnp

STEPS = 12

exact = {"epsilon": 0.0, "param_dtype": float, "force_float32_reductions": False}
BatchNorm = functools.partial(nn.BatchNorm, use_running_average=False, **exact)
LayerNorm = functools.partial(nn.LayerNorm, **exact)
GroupNorm = functools.partial(nn.GroupNorm, **exact)
Dense = functools.partial(nn.Dense, param_dtype=float, bias_init=nn.initializers.normal())
Conv = functools.partial(nn.Conv, param_dtype=float, bias_init=nn.initializers.normal())


class Net(nn.Module):
    """A convolution, a grouped one and a dense layer, in front of a normalization each, and a layer that is not."""

    norms: tuple = (BatchNorm,) * 3
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        first, second, third = self.norms
        x = nn.relu(first()(Conv(4, (3, 3), use_bias=self.use_bias, name="conv")(x)))
        x = nn.relu(second()(Conv(8, (3, 3), feature_group_count=2, use_bias=self.use_bias, name="grouped")(x)))
        x = nn.relu(third()(Dense(6, use_bias=self.use_bias, name="dense")(x.reshape(x.shape[0], -1))))
        return Dense(3, name="out")(x)


class Problem:
    """A network, its loss on one batch, and its layers."""

    def __init__(self, model=None, dtype=float):
        self.model = Net() if model is None else model
        self.x, self.y = normal(0, 16, 4, 4, 2).astype(dtype), jnp.arange(16) % 3
        self.params = init(self.model, self.x)
        self.all_layers = bnp.linen.find_layers(self.model, self.x)
        self.layers = self.all_layers.select(lambda layer: layer.path != "out")
        self.gradients = jax.jit(jax.grad(self.loss))

    def loss(self, params):
        logits, _ = self.model.apply({"params": params}, self.x, mutable=["batch_stats"])
        return cross_entropy(logits, self.y)

    def path(self, tx, params=None, state=None, steps=STEPS):
        """Returns the loss before every step, and parameters and state after the last."""
        params = self.params if params is None else params

        def step(carry, _):
            params, state = carry
            loss, gradients = jax.value_and_grad(self.loss)(params)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), loss

        @jax.jit
        def run(params, state):
            return jax.lax.scan(step, (params, state), length=steps)

        (params, state), losses = run(params, tx.init(params) if state is None else state)
        return losses, params, state


def rescaled(problem, tree, seed=0, decades=3.0):
    """Multiplies the weights of every unit in front of BN, or their momentum, by a number of its own."""
    rng, new = np.random.default_rng(seed), {name: dict(leaves) for name, leaves in tree.items()}
    for name in problem.layers:
        factors = 10 ** rng.uniform(-decades, decades, new[name]["kernel"].shape[-1])
        new[name]["kernel"] = jnp.asarray(np.asarray(new[name]["kernel"]) * factors)
    return new
