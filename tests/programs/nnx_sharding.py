"""Steps of an NNX model whose parameters say how they are split, compared with one device; run by test_devices.py.

It needs a process with 8 devices. Prints one JSON object: for each optimizer what it measured.
"""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnp_optax as bnp

warnings.simplefilter("error")
jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 8

XS, YS = (np.random.default_rng(0).normal(1, 2, (3, 24, size)) for size in (32, 3))
ONE, EIGHT = (jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,)) for n in (1, 8))


class Model(nnx.Module):
    def __init__(self, rngs):
        split, kernel, bias = nnx.with_partitioning, nnx.initializers.lecun_normal(), nnx.initializers.normal()
        by_outputs = {"kernel_init": split(kernel, (None, "data")), "bias_init": split(bias, ("data",))}
        by_inputs = {"kernel_init": split(kernel, ("data", None))}
        self.hidden = nnx.Linear(32, 16, param_dtype=float, rngs=rngs, **by_outputs)
        self.out = nnx.Linear(16, 3, param_dtype=float, rngs=rngs, **by_inputs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def train(make_tx, mesh):
    """Returns the last kernel at the start, and the parameters and the optimizer's state after three steps."""
    with jax.set_mesh(mesh):
        model = Model(nnx.Rngs(0))
        start = np.asarray(model.out.kernel)
        optimizer = nnx.Optimizer(model, make_tx(bnp.nnx.find_layers(model, XS[0])), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x, y):
            def loss_fn(model):
                prediction, records = bnp.nnx.capture(model)(x)
                return jnp.mean(jnp.square(prediction - y)), records

            gradients, records = nnx.grad(loss_fn, has_aux=True)(model)
            optimizer.update(model, gradients, intermediates=records)

        for x, y in zip(XS, YS, strict=True):
            step(model, optimizer, *jax.device_put((x, y), NamedSharding(mesh, P("data"))))
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    arrays = [
        jax.tree.map(
            lambda leaf: leaf.get_value() if is_variable(leaf) else leaf, nnx.state(*node), is_leaf=is_variable
        )
        for node in ((model, nnx.Param), (optimizer,))
    ]
    return start, arrays[0], arrays[1]["opt_state"]


def measure(make_tx, parts):
    """`parts` takes the statistics, and what is kept of the parameters, from a state."""
    start, params, state = train(make_tx, EIGHT)
    statistics, kept = parts(state)
    shardings = [jax.tree.map(lambda leaf: leaf.sharding.spec, tree) for tree in (params, *kept)]
    one = jax.tree.leaves(train(make_tx, ONE))
    errors = [
        np.abs(np.asarray(a) - b).max() for a, b in zip(jax.tree.leaves((start, params, state)), one, strict=True)
    ]
    return {
        "error": float(max(errors)),
        "statistics are replicated": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(statistics)),
        "kept like parameters": all(other == shardings[0] for other in shardings[1:]),
        "shard of kernel": params["hidden"]["kernel"].addressable_shards[0].data.shape,
        "movement": float(np.abs(np.asarray(params["out"]["kernel"]) - start).max()),
    }


REPORT = {
    "bnp_sgd": measure(
        lambda layers: bnp.bnp_sgd(0.05, layers, momentum=0.9), lambda state: (state[0], [state[2][0]["trace"]])
    ),
    "preconditioned adam": measure(
        lambda layers: bnp.preconditioned(optax.adam(0.01), layers),
        lambda state: (state["statistics"], [state["inner"][0]["mu"], state["inner"][0]["nu"]]),
    ),
}
print(json.dumps(REPORT))
