"""Online learning: one example a step from a single stream, a batch in which Batch Normalization has no variance.

Every handwritten digit comes once, is classified, and only then learnt from. Adam does so alone and in BNP's variables,
by the same lines of code. BNP takes mean and variance from its running statistics, which are those of the stream.

Needs scikit-learn, for the digits. Run it with ``python online.py``.
"""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import bnp_optax as bnp

EXAMPLES, RATES = 1797, (0.0003, 0.001, 0.003)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = nn.relu(nn.Dense(100)(x))
        return nn.Dense(10)(x)


MODEL = MLP()
State = tuple[optax.Params, optax.OptState]


@functools.partial(jax.jit, static_argnums=0)
def learn(
    tx: optax.GradientTransformationExtraArgs, state: State, x: jax.Array, y: jax.Array
) -> tuple[State, jax.Array]:
    """Returns the next state, and the class that was predicted before."""
    params, opt_state = state

    def loss_fn(params: optax.Params) -> tuple[jax.Array, tuple[jax.Array, dict[str, bnp.InputMoments]]]:
        logits, records = bnp.linen.capture(MODEL)({"params": params}, x[None])  # a batch of one
        return optax.softmax_cross_entropy_with_integer_labels(logits[0], y), (logits[0].argmax(), records)

    grads, (prediction, records) = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, intermediates=records)
    return (optax.apply_updates(params, updates), opt_state), prediction


def accuracy(tx: optax.GradientTransformationExtraArgs, images: np.ndarray, labels: np.ndarray) -> float:
    """Returns the percentage of examples that are classified rightly before they are learnt from."""
    params = MODEL.init(jax.random.key(0), images[:1])["params"]
    state, right = (params, tx.init(params)), []
    for x, y in zip(images, labels, strict=True):
        state, prediction = learn(tx, state, x, y)
        right.append(prediction == y)
    return 100 * float(np.mean(right))


def main() -> dict[float, tuple[float, float]]:
    """Returns the accuracies (%) of Adam, alone and in BNP's variables, by learning rate."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images[:EXAMPLES] / 16).astype(np.float32), labels[:EXAMPLES]
    layers = bnp.linen.find_layers(MODEL, images[:1])
    accuracies = {}
    for rate in RATES:
        adam = optax.adam(rate)
        alone = accuracy(optax.with_extra_args_support(adam), images, labels)  # ignores the records
        # The default scaling keeps one rate good for batches of all sizes; here there is one size.
        inside = accuracy(bnp.preconditioned(adam, layers, scaling="none"), images, labels)
        print(f"learning rate {rate:g}: Adam {alone:.1f} %, in BNP's variables {inside:.1f} %")
        accuracies[rate] = alone, inside
    return accuracies


if __name__ == "__main__":
    main()
