"""A Flax NNX network with ``nnx.Optimizer``: Adam in BNP's variables on handwritten digits.

Four places differ from NNX's usual loop: ``find_layers``; ``preconditioned`` around the optimizer; ``capture``, which
returns the records of the layers' inputs beside the model's output; and the records handed to ``optimizer.update``.

Needs scikit-learn, for the digits. Run it with ``python nnx_cnn.py``.
"""

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnp_optax as bnp

EPOCHS, BATCH_SIZE, NUM_TRAIN = 10, 32, 1024


class CNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.downsample = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.out = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.downsample(nnx.relu(self.conv(x))))
        return self.out(x.reshape(x.shape[0], -1))


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer[CNN], x: jax.Array, y: jax.Array) -> jax.Array:
    def loss_fn(model: CNN) -> tuple[jax.Array, dict[str, bnp.InputMoments]]:
        logits, records = bnp.nnx.capture(model)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), records

    loss: jax.Array
    (loss, records), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, intermediates=records)
    return loss


@nnx.jit
def accuracy(model: CNN, x: jax.Array, y: jax.Array) -> jax.Array:
    percentage: jax.Array = 100 * (model(x).argmax(axis=-1) == y).mean()
    return percentage


def main() -> float:
    """Trains, and returns the accuracy (%) on digits that were not trained on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    x, x_test, y, y_test = train_test_split(images, labels, stratify=labels, train_size=NUM_TRAIN, random_state=0)

    model = CNN(nnx.Rngs(0))
    layers = bnp.nnx.find_layers(model, x[:1])
    print(layers, end="\n\n")
    optimizer = nnx.Optimizer(model, bnp.preconditioned(optax.adamw(1e-3), layers), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        for batch in rng.permutation(NUM_TRAIN).reshape(-1, BATCH_SIZE):
            loss = train_step(model, optimizer, x[batch], y[batch])
        print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {accuracy(model, x_test, y_test):.1f} %")
    return float(accuracy(model, x_test, y_test))


if __name__ == "__main__":
    main()
