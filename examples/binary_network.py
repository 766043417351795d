"""A network of binary weights and activations without Batch Normalization, in two stages, beside one with it.

The first stage trains with binary activations, and standardized weights of full precision. Its parameters begin the
second, whose weights are binary too: signs, and one number a unit. The network with Batch Normalization has the same
layers, and neither the constants alpha and beta nor clipping.

Needs scikit-learn, for the digits. Run it with ``python binary_network.py``.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from bnp_optax import contrib
from bnp_optax.contrib import linen

EPOCHS, BATCH_SIZE, NUM_TRAIN = 10, 32, 1024  # the epochs are those of a stage
STAGES = {16: 2, 32: 2}  # residual blocks by their channels


class BinaryNetwork(nn.Module):
    binary: bool  # whether the blocks' weights are binary, as their activations are
    normalized: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = linen.WSConv(16, (3, 3))(x)  # the first and the last layer are not binary
        betas = iter(contrib.block_betas(list(STAGES.values())))
        for width, blocks in STAGES.items():
            for block in range(blocks):
                strides = 2 if width > 16 and block == 0 else 1
                if self.normalized:
                    x = self.normalized_block(x, width, strides, train)
                else:
                    x = linen.BinaryBlock(width, beta=next(betas), strides=strides, binary=self.binary)(x)
        return nn.Dense(10)(x.mean((1, 2)))

    def normalized_block(self, x: jax.Array, width: int, strides: int, train: bool) -> jax.Array:
        conv = functools.partial(linen.BinaryWSConv, width, binary=self.binary)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        h = norm()(conv(kernel_size=(3, 3), strides=strides)(linen.RSign()(x)))
        if strides > 1:
            x = norm()(conv(kernel_size=(1, 1))(nn.avg_pool(x, (2, 2), (2, 2))))
        return linen.RPReLU()(h + x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(
    model: BinaryNetwork, tx: optax.GradientTransformation, variables: Any, opt_state: Any, x: jax.Array, y: jax.Array
) -> tuple[Any, Any]:
    def loss_fn(params: optax.Params) -> tuple[jax.Array, Any]:
        logits, rest = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), rest

    grads, rest = jax.grad(loss_fn, has_aux=True)(variables["params"])
    updates, opt_state = tx.update(grads, opt_state, variables["params"])
    return {**rest, "params": optax.apply_updates(variables["params"], updates)}, opt_state


def main() -> dict[str, float]:
    """Trains both networks; returns their accuracies (%) on digits that were not trained on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).reshape(-1, 8, 8, 1).astype(np.float32)
    x, x_test, y, y_test = train_test_split(images, labels, stratify=labels, train_size=NUM_TRAIN, random_state=0)

    steps = EPOCHS * (NUM_TRAIN // BATCH_SIZE)
    adam = optax.adam(optax.linear_schedule(1e-2, 0.0, steps))  # begins anew with each stage
    accuracies = {}
    for name, normalized in {"without normalization": False, "with Batch Normalization": True}.items():
        variables = BinaryNetwork(False, normalized).init(jax.random.key(0), x[:1])
        clip = contrib.adaptive_grad_clip(0.02, contrib.standardized_layers(variables["params"]))
        tx = adam if normalized else optax.chain(clip, adam)
        for binary in (False, True):
            model, opt_state = BinaryNetwork(binary, normalized), tx.init(variables["params"])
            rng = np.random.default_rng(0)
            for _ in range(EPOCHS):
                for batch in rng.permutation(NUM_TRAIN).reshape(-1, BATCH_SIZE):
                    variables, opt_state = train_step(model, tx, variables, opt_state, x[batch], y[batch])
            logits: Any = model.apply(variables, x_test)
            accuracies[name] = 100 * float((logits.argmax(-1) == y_test).mean())
            weights = "binary" if binary else "standardized"
            print(f"{name}, {weights} weights: test accuracy {accuracies[name]:.1f} %")
    return accuracies


if __name__ == "__main__":
    main()
