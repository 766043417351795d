"""A step on an accelerator against the same step on the CPU."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import bnp_optax as bnp
import models

CPU = jax.devices("cpu")[0]


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs an accelerator")
@pytest.mark.parametrize("model", [models.MLP(), models.CNN()], ids=["mlp", "cnn"])
def test_training_on_an_accelerator_follows_that_on_the_cpu(model):
    trained = [train(model, device) for device in (CPU, jax.devices()[0])]
    chex.assert_trees_all_close(*trained, rtol=1e-3, atol=1e-4)


def train(model, device):
    """Returns parameters and BNP's state after a few steps."""
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        x, y = jax.random.normal(jax.random.key(0), (16, 8, 8, 3)), jnp.arange(16) % 10
        with jax.numpy_rank_promotion("allow"):
            params = model.init(jax.random.key(1), x)["params"]
            tx = optax.chain(bnp.scale_by_bnp(bnp.linen.find_layers(model, x)), optax.sgd(0.1))

            @jax.jit
            def step(params, state):
                def loss_fn(params):
                    with bnp.linen.record_inputs():
                        logits, recorded = model.apply({"params": params}, x, mutable=["intermediates"])
                    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
                    return loss, recorded["intermediates"]

                gradients, intermediates = jax.grad(loss_fn, has_aux=True)(params)
                updates, state = tx.update(gradients, state, params, intermediates=intermediates)
                return optax.apply_updates(params, updates), state

            state = tx.init(params)
            for _ in range(5):
                params, state = step(params, state)
    return jax.device_get((params, state))
