"""The optimizers that the README shows are not below plain SGD, on the data and the network that it shows them on."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)
EPOCHS, NUM_TRAIN, NUM_TEST = 10, 1024, 640
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # see conftest.py
PLAIN = (optax.sgd(0.1), optax.sgd(0.01, momentum=0.9))


@pytest.fixture(scope="module")
def shown():
    """Returns what the README's code defines, but for its training, and the optimizers that it makes."""
    names, optimizers = {}, []
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in BLOCKS:
            if "tx = " in block:
                exec(block.split("opt_state = tx.init(params)")[0], names)  # noqa: S102
                optimizers.append(names["tx"])
    return names, optimizers


def accuracy(shown, tx, batch_size):
    """Returns the accuracy (%) on other images after some epochs."""
    names, _ = shown
    tx = optax.with_extra_args_support(tx)
    images, labels = names["images"], names["labels"]

    def step(carry, batch):
        params, state = carry
        gradients, records = jax.grad(names["loss_fn"], has_aux=True)(params, images[batch], labels[batch])
        updates, state = tx.update(gradients, state, params, intermediates=records)
        return (optax.apply_updates(params, updates), state), None

    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(NUM_TRAIN) for _ in range(EPOCHS)]).reshape(-1, batch_size)
    start = names["params"], tx.init(names["params"])
    run = jax.jit(lambda start, order: jax.lax.scan(step, start, order), compiler_options=OPTIMIZED)
    (params, _), _ = run(start, jnp.asarray(order))
    logits = names["model"].apply({"params": params}, images[-NUM_TEST:])
    return 100 * float((logits.argmax(-1) == labels[-NUM_TEST:]).mean())


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("batch_size", [8, 32, 128])
def test_not_below_plain_sgd(shown, batch_size):
    plain = max(accuracy(shown, tx, batch_size) for tx in PLAIN)
    reached = [accuracy(shown, tx, batch_size) for tx in shown[1]]
    assert len(reached) == 2
    assert plain > 80
    assert min(reached) > plain - 1.5  # which is less than two standard deviations of a difference over 640 images
