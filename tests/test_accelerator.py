"""A step on an accelerator against the same step on the CPU."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import cross_entropy, gradients_and_records, make_step

import bnp_optax as bnp

CPU = jax.devices("cpu")[0]


class MLP(nn.Module):
    widths: tuple[int, ...] = (100, 100, 100)

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (32, 32, 64):
            x = nn.avg_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), strides=(2, 2))
        return MLP((64,))(x)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs an accelerator")
@pytest.mark.parametrize("model", [MLP(), CNN()], ids=["mlp", "cnn"])
def test_training_on_an_accelerator_follows_that_on_the_cpu(model):
    trained = [end(model, device) for device in (CPU, jax.devices()[0])]
    chex.assert_trees_all_close(*trained, rtol=1e-3, atol=1e-4)


def end(model, device):
    """Returns parameters and BNP's state after a few steps, compiled as users' are."""
    with jax.default_device(device), jax.default_matmul_precision("highest"), jax.numpy_rank_promotion("allow"):
        x, y = jax.random.normal(jax.random.key(0), (16, 8, 8, 3)), jnp.arange(16) % 10
        params = model.init(jax.random.key(1), x)["params"]
        tx = bnp.bnp_sgd(0.1, bnp.linen.find_layers(model, x))
        step, state = jax.jit(make_step(tx, gradients_and_records(model, cross_entropy))), tx.init(params)
        for _ in range(5):
            params, state = step(params, state, x, y)
    return jax.device_get((params, state))
