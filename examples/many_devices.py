"""Data-parallel training over all devices: every batch is split, parameters and state are on each device.

BNP asks for nothing here. ``jax.jit`` computes with the whole batch, wherever its parts lie, and the records of the
layers' inputs are those of the whole batch too: the steps are those of one device.

For several processes, on one machine or many, call ``jax.distributed.initialize()`` before ``main()`` in each of them.
Each then puts its own share of a batch on its own devices; nothing else changes.

Needs scikit-learn, for the digits. Run it with ``python many_devices.py``; to have four devices on any machine, with
``JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4`` before it.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnp_optax as bnp

EPOCHS, BATCH_SIZE, NUM_TRAIN = 10, 64, 1024  # a batch is that of all devices, and divides among them


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def main() -> tuple[optax.Params, float]:
    """Trains; returns the parameters, and the accuracy (%) on digits that were not trained on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    x, x_test, y, y_test = train_test_split(images, labels, stratify=labels, train_size=NUM_TRAIN, random_state=0)

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split, replicated = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    model = CNN()
    tx = bnp.preconditioned(optax.adamw(1e-3), bnp.linen.find_layers(model, x[:1]))

    @functools.partial(jax.jit, out_shardings=replicated)
    def init() -> tuple[optax.Params, optax.OptState]:
        params = model.init(jax.random.key(0), x[:1])["params"]
        return params, tx.init(params)

    def loss_fn(params: optax.Params, x: jax.Array, y: jax.Array) -> tuple[jax.Array, dict[str, bnp.InputMoments]]:
        logits, records = bnp.linen.capture(model)({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), records

    @functools.partial(jax.jit, out_shardings=replicated, donate_argnums=(0, 1))
    def train_step(
        params: optax.Params, opt_state: optax.OptState, x: jax.Array, y: jax.Array
    ) -> tuple[optax.Params, optax.OptState, jax.Array]:
        (loss, records), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params, intermediates=records)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state = init()
    rng, share = np.random.default_rng(0), BATCH_SIZE // jax.process_count()
    for epoch in range(EPOCHS):
        for batch in rng.permutation(NUM_TRAIN).reshape(-1, BATCH_SIZE):  # the same in all processes
            mine = batch[jax.process_index() * share :][:share]
            arrays = [jax.make_array_from_process_local_data(split, array[mine]) for array in (x, y)]
            params, opt_state, loss = train_step(params, opt_state, *arrays)
        print(f"epoch {epoch + 1}: loss {loss:.3f}")

    params = jax.device_get(params)  # every process has them whole
    logits: Any = model.apply({"params": params}, x_test)
    accuracy = 100 * float((logits.argmax(axis=-1) == y_test).mean())
    print(f"processes: {jax.process_count()}, devices: {jax.device_count()}, test accuracy: {accuracy:.1f} %")
    return params, accuracy


if __name__ == "__main__":
    main()
