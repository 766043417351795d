"""BNP costs next to no memory: moments are reduced where the inputs are made, new gradients fuse with their uses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import cross_entropy, gradients_and_records, make_step

import bnp_optax as bnp


class MLP(nn.Module):
    width: int = 256

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features, strides in ((32, 1), (64, 2), (64, 2)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=strides)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class WideCNN(nn.Module):
    """Kernels that are larger than activations: a copy of one in another order would show."""

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Conv(128, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, 64)(tokens)
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            x = x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))
        return nn.Dense(64)(x)


def compiled_bytes(model, x, preconditioned):
    """Arguments, outputs and temporaries of a compiled training step, donated buffers once."""
    layers = bnp.linen.find_layers(model, x)
    tx = bnp.bnp_sgd(0.1, layers, momentum=0.9) if preconditioned else optax.sgd(0.1, momentum=0.9)
    tx = optax.with_extra_args_support(tx)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def loss(logits):
        return cross_entropy(logits, jnp.zeros(logits.shape[:-1], jnp.int32))

    step = make_step(tx, gradients_and_records(model, loss))  # XLA leaves out what is not used
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), x)
    memory = lowered.compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="the XLA of older JAX keeps activations for longer")
@pytest.mark.parametrize(
    ("model", "shape", "dtype"),
    [
        (MLP(), (64, 784), jnp.float32),
        (MLP(1000), (1024, 784), jnp.float32),  # an activation that is kept for longer would show
        (CNN(), (64, 32, 32, 3), jnp.float32),
        (WideCNN(), (2, 8, 8, 128), jnp.float32),
        (Transformer(), (64, 64), jnp.int32),
    ],
    ids=["mlp", "wide mlp", "cnn", "wide cnn", "transformer"],
)
def test_a_step_takes_the_memory_of_plain_sgd(model, shape, dtype):
    x = jax.ShapeDtypeStruct(shape, dtype)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # as users' models are
        assert compiled_bytes(model, x, preconditioned=True) <= 1.02 * compiled_bytes(model, x, preconditioned=False)
