"""A Flax Linen network with a ``TrainState``: Adam in BNP's variables on handwritten digits.

Four places differ from Flax's usual loop: ``find_layers``; ``preconditioned`` around the optimizer; ``capture``, which
returns the records of the layers' inputs beside the model's output; and the records handed to ``apply_gradients``, for
which ``bnp.linen.TrainState`` stands in the place of Flax's own.

Needs scikit-learn, for the digits. Run it with ``python linen_train_state.py``.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnp_optax as bnp

EPOCHS, BATCH_SIZE, NUM_TRAIN = 10, 32, 1024


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


@jax.jit
def train_step(state: bnp.linen.TrainState, x: jax.Array, y: jax.Array) -> tuple[bnp.linen.TrainState, jax.Array]:
    def loss_fn(params: optax.Params) -> tuple[jax.Array, dict[str, bnp.InputMoments]]:
        logits, records = bnp.linen.capture(state.apply_fn)({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), records

    (loss, records), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, intermediates=records), loss


@jax.jit
def accuracy(state: bnp.linen.TrainState, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = state.apply_fn({"params": state.params}, x)
    percentage: jax.Array = 100 * (logits.argmax(axis=-1) == y).mean()
    return percentage


def main() -> float:
    """Trains, and returns the accuracy (%) on digits that were not trained on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    x, x_test, y, y_test = train_test_split(images, labels, stratify=labels, train_size=NUM_TRAIN, random_state=0)

    model = CNN()
    layers = bnp.linen.find_layers(model, x[:1])
    print(layers, end="\n\n")
    state = bnp.linen.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), x[:1])["params"],
        tx=bnp.preconditioned(optax.adamw(1e-3), layers),
    )
    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        for batch in rng.permutation(NUM_TRAIN).reshape(-1, BATCH_SIZE):
            state, loss = train_step(state, x[batch], y[batch])
        print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {accuracy(state, x_test, y_test):.1f} %")
    return float(accuracy(state, x_test, y_test))


if __name__ == "__main__":
    main()
