"""Weight Normalization as a change of variables: the same steps as a network that is written in its variables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from weight_norm import weight_normalized

INNER = {
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.03, weight_decay=0.1),
    "muon": optax.contrib.muon(0.1),
}


def loss_of(layers, x, y):
    """Of two layers; one that has a gain is written in the variables of Weight Normalization."""
    for name in ("hidden", "out"):
        layer = layers[name]
        x = x @ layer["kernel"]
        if "gain" in layer:
            x = x / jnp.linalg.norm(layer["kernel"], axis=0) * layer["gain"]
        x = jnp.tanh(x + layer["bias"])
    return jnp.mean((x - y) ** 2)


@pytest.mark.parametrize("name", INNER)
def test_the_steps_are_those_of_a_network_in_directions_and_gains(name):
    rng = np.random.default_rng(0)
    sizes = {"hidden": (4, 5), "out": (5, 3)}
    with jax.enable_x64(True):
        plain = {
            key: {"kernel": jnp.asarray(rng.normal(size=size)), "bias": jnp.asarray(rng.normal(size=size[1]))}
            for key, size in sizes.items()
        }
        hidden = plain["hidden"]
        written_out = {
            "hidden": {**hidden, "gain": jnp.asarray(np.linalg.norm(hidden["kernel"], axis=0))},
            "out": plain["out"],
        }
        tx, oracle = weight_normalized(INNER[name], leave=["out"]), INNER[name]
        state, oracle_state = tx.init(plain), oracle.init(written_out)
        for _ in range(6):
            x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 3))
            updates, state = jax.jit(tx.update)(jax.grad(loss_of)(plain, x, y), state, plain)
            plain = optax.apply_updates(plain, updates)
            updates, oracle_state = oracle.update(jax.grad(loss_of)(written_out, x, y), oracle_state, written_out)
            written_out = optax.apply_updates(written_out, updates)
        v, gain = (np.asarray(written_out["hidden"][key]) for key in ("kernel", "gain"))
        np.testing.assert_allclose(plain["hidden"]["kernel"], v * gain / np.linalg.norm(v, axis=0), rtol=1e-10)
        np.testing.assert_allclose(plain["hidden"]["bias"], written_out["hidden"]["bias"], rtol=1e-10)
        np.testing.assert_allclose(plain["out"]["kernel"], written_out["out"]["kernel"], rtol=1e-10)
        np.testing.assert_allclose(state.lengths["hidden"], np.linalg.norm(v, axis=0), rtol=1e-10)
        assert set(state.lengths) == {"hidden"}
        assert not np.allclose(state.lengths["hidden"], gain, rtol=1e-3)  # they part: the length of v is no gain
