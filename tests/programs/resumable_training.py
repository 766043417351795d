"""Trains a small network with checkpoints; started again, it goes on from the last one.

Usage: resumable_training.py DIRECTORY STEPS [KILL_AT]. Prints the number of devices, over all of which parameters and
state are replicated, the step it began at, and a digest of the final parameters and state.
"""

import hashlib
import os
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import bnp_optax as bnp

directory, num_steps = sys.argv[1], int(sys.argv[2])
kill_at = int(sys.argv[3]) if len(sys.argv) > 3 else None

model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.reshape(x.shape[0], -1), nn.Dense(3)])
x = jax.random.normal(jax.random.key(0), (64, 4, 4, 2))
y = jax.random.randint(jax.random.key(1), (64,), 0, 3)
params = model.init(jax.random.key(2), x)["params"]
tx = bnp.bnp_sgd(0.05, bnp.linen.find_layers(model, x), momentum=0.9, weight_decay=1e-3)


@jax.jit
def train_step(params, opt_state, step):
    batch = jax.random.choice(jax.random.fold_in(jax.random.key(3), step), 64, (8,))

    def loss_fn(params):
        logits, records = bnp.linen.capture(model)({"params": params}, x[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean(), records

    grads, records = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params, intermediates=records)
    return optax.apply_updates(params, updates), opt_state


mesh = jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
state = jax.device_put({"params": params, "opt_state": tx.init(params)}, replicated)
template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), state)
with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
    start = 0
    if (latest := manager.latest_step()) is not None:
        state = manager.restore(latest, args=ocp.args.StandardRestore(template))
        start = latest
    for step in range(start, num_steps):
        state["params"], state["opt_state"] = train_step(state["params"], state["opt_state"], step)
        if (step + 1) % 10 == 0:
            manager.save(step + 1, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
        if step + 1 == kill_at:
            os._exit(9)

leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(state)]
print(
    jax.device_count(),
    start,
    hashlib.sha256(b"".join(leaf.tobytes() for leaf in map(jax.device_get, leaves))).hexdigest(),
)
