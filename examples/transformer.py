"""A language model of scanned blocks, trained by AdamW in BNP's variables.

``nn.scan`` stacks the blocks' parameters along a first axis. ``"intermediates": 0`` in its ``variable_axes`` stacks the
records of their inputs likewise, and is all that BNP asks of a model: every block has statistics of its own.

The text is Python's documentation, as ``help("while")`` and its like print it. It comes with Python, in
``pydoc_data.topics``, and is predicted character by character. Run it with ``python transformer.py``.
"""

from pydoc_data.topics import topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnp_optax as bnp

STEPS, BATCH_SIZE, LENGTH = 500, 32, 64
BLOCKS, HEADS, WIDTH = 2, 2, 32


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        attention = nn.MultiHeadDotProductAttention(HEADS, name="attention")
        x = x + attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        hidden = nn.relu(nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden), None  # `nn.scan` would stack a second output


class LanguageModel(nn.Module):
    characters: int

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        x = nn.Embed(self.characters, WIDTH)(text) + nn.Embed(LENGTH, WIDTH)(jnp.arange(text.shape[-1]))
        stack = nn.scan(
            Block, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=BLOCKS
        )
        x, _ = stack(name="blocks")(x)
        return nn.Dense(self.characters, name="logits")(nn.LayerNorm()(x))


def load_text() -> tuple[int, np.ndarray, np.ndarray]:
    """Returns how many characters there are, and the text for training and for testing, as numbers."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))  # topics repeat one another
    alphabet, numbers = np.unique(np.array(list(text)), return_inverse=True)
    train, test = np.split(numbers, [len(numbers) * 9 // 10])
    return len(alphabet), train, test[: len(test) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)


def main() -> float:
    """Trains, and returns the loss on other text, in nats per character."""
    characters, text, test = load_text()
    model = LanguageModel(characters)
    params = model.init(jax.random.key(0), test[:1, :-1])["params"]
    layers = bnp.linen.find_layers(model, test[:1, :-1])
    print(layers, end="\n\n")
    # The default scaling holds back batches of fewer than 128 examples; here each is a text of many characters.
    tx = bnp.preconditioned(optax.adamw(3e-3), layers, scaling="none")

    def loss_fn(params: optax.Params, text: jax.Array) -> tuple[jax.Array, dict[str, bnp.InputMoments]]:
        logits, records = bnp.linen.capture(model)({"params": params}, text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean(), records

    @jax.jit
    def train_step(
        params: optax.Params, opt_state: optax.OptState, text: jax.Array
    ) -> tuple[optax.Params, optax.OptState, jax.Array]:
        (loss, records), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, text)
        updates, opt_state = tx.update(grads, opt_state, params, intermediates=records)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, rng = tx.init(params), np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        starts = rng.integers(len(text) - LENGTH, size=(BATCH_SIZE, 1))
        params, opt_state, loss = train_step(params, opt_state, text[starts + np.arange(LENGTH + 1)])
        if step % (STEPS // 5) == 0:
            print(f"step {step}: loss {loss:.3f} nats per character")
    loss, _ = jax.jit(loss_fn)(params, test)
    print(f"on other text: {loss:.3f} nats per character")
    return float(loss)


if __name__ == "__main__":
    main()
