"""Flax Linen's guide "Scale up Flax Modules on multiple devices", with BNP in it; run by test_guides.py.

The steps are those of the guide (docs/guides/parallel_training/flax_on_pjit): initializers that say how parameters are
split, by axes of the mesh or by logical ones; the sharding of an abstract `TrainState`; `init` and the training step
under `jax.jit` with it. Each case runs on a mesh of 2 x 4 devices and on one of a single device.

It needs a process with 8 devices. Prints one JSON object: for each case what it measured, or the traceback.
"""

import contextlib
import functools
import json
import traceback
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnp_optax as bnp

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "`with mesh:`")  # as the guide has it
jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 8

STEPS, BATCH, WIDTH, DEPTH = 3, 8, 16, 3
XS = np.random.default_rng(0).normal(1, 2, (STEPS, BATCH, WIDTH))
RULES = (("batch", "data"), ("hidden", "model"))


def make_model(mesh, *, is_logical=False, is_scanned=False, is_registered=False):
    """A stack of blocks, each of a dense layer and a product with a parameter of its own, which BNP has to be told."""
    split = nn.with_logical_partitioning if is_logical else nn.with_partitioning
    axes = ("embed", "hidden") if is_logical else (None, "model")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.xavier_normal()
            hidden = nn.Dense(
                WIDTH,
                kernel_init=split(init, axes),
                bias_init=split(nn.initializers.normal(), axes[1:]),
                param_dtype=float,
            )(x)
            hidden = with_sharding_constraint(jnp.tanh(hidden), NamedSharding(mesh, P("data", "model")))
            out = jnp.dot(hidden, self.param("out", split(init, axes[::-1]), (WIDTH, WIDTH), float))
            if is_registered:
                bnp.linen.register(self, hidden, "out", bias=None)
            if is_logical:
                return nn.with_logical_constraint(out, ("batch", "embed")), None
            return with_sharding_constraint(out, NamedSharding(mesh, P("data", None))), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            if is_scanned:
                blocks = nn.scan(
                    Block,
                    length=DEPTH,
                    variable_axes={"params": 0, "intermediates": 0},  # the second is for BNP
                    split_rngs={"params": True},
                    metadata_params={nn.PARTITION_NAME: "layer" if is_logical else None},
                )
                return blocks(name="blocks")(x)[0]
            for _ in range(DEPTH):
                x, _ = Block()(x)
            return x

    return Stack()


def train(make_tx, mesh, **options):
    """Returns the layers, how the state was to be split, the state at the start and after the steps, and the traces."""
    model = make_model(mesh, **options)
    x_sharding, replicated = NamedSharding(mesh, P("data", None)), NamedSharding(mesh, P())
    x, *_ = xs = [jax.device_put(x, x_sharding) for x in XS]
    layers = bnp.linen.find_layers(model, x)

    def init_fn(key, x, model, tx):
        variables = model.init(key, x)
        return bnp.linen.TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    key, tx = jax.random.key(0), make_tx(layers)
    abstract = jax.eval_shape(functools.partial(init_fn, model=model, tx=tx), key, x)
    if options.get("is_logical"):
        state_sharding = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
    else:
        state_sharding = nn.get_sharding(abstract, mesh)
    start = jax.jit(
        init_fn, static_argnums=(2, 3), in_shardings=(replicated, x_sharding), out_shardings=state_sharding
    )(key, x, model, tx)
    traces = []

    @functools.partial(jax.jit, in_shardings=(state_sharding, x_sharding), out_shardings=state_sharding)
    def train_step(state, x):
        traces.append(x)

        def loss_fn(params):
            y, records = bnp.linen.capture(model)({"params": params}, x)
            return jnp.mean(jnp.square(y)), records

        grads, records = jax.grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, intermediates=records)

    state = start
    for x in xs:
        state = train_step(state, x)
    return layers, state_sharding, start, state, len(traces)


def differences(a, b):
    """Returns the largest difference of the numbers of each array."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [float(np.abs(np.asarray(one) - np.asarray(other)).max()) for one, other in pairs]


def measure(make_tx, statistics_of, momentum_of, enter, **options):
    """`enter` makes the context of a mesh in which all of it runs."""
    meshes = [
        Mesh(mesh_utils.create_device_mesh(shape, jax.devices()[: np.prod(shape)]), ("data", "model"))
        for shape in ((2, 4), (1, 1))
    ]
    results = []
    for mesh in meshes:
        with enter(mesh):
            results.append(train(make_tx, mesh, **options))
    (layers, told, start, end, traces), (*_, expected, _) = results
    leaves = zip(jax.tree.leaves(end), jax.tree.leaves(told), strict=True)
    statistics, (momentum, *_) = statistics_of(end.opt_state), jax.tree.leaves(momentum_of(end.opt_state))
    return {
        "error": max(differences(end, expected)),
        "movement": min(differences(end.params, start.params)),
        "layers": list(layers),
        "excluded": ["/".join(other.path) for other in layers.excluded],
        "state is split as told": all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf, sharding in leaves),
        "shard of momentum": momentum.addressable_shards[0].data.shape,
        "statistics are replicated": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(statistics)),
        "seen": np.unique(statistics.seen).tolist(),
        "traces": traces,
    }


@contextlib.contextmanager
def with_rules(mesh):
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


ADAM = (
    lambda layers: bnp.preconditioned(optax.adam(0.01), layers),
    lambda state: state.statistics,
    lambda state: state.inner[0].mu,
)
SGD = (
    lambda layers: optax.chain(bnp.scale_by_bnp(layers), optax.sgd(0.05, momentum=0.9)),
    lambda state: state[0],
    lambda state: state[1][0].trace,
)
CASES = {
    "axes of the mesh": lambda: measure(*ADAM, lambda mesh: mesh),
    "logical axes": lambda: measure(*SGD, lambda mesh: mesh, is_logical=True),
    "logical axes, their rules and the mesh set": lambda: measure(*ADAM, with_rules, is_logical=True),
    "scanned, the mesh set": lambda: measure(*SGD, jax.set_mesh, is_scanned=True, is_registered=True),
    "scanned, logical axes": lambda: measure(*ADAM, lambda mesh: mesh, is_scanned=True, is_logical=True),
}

REPORT = {}
for name, case in CASES.items():
    try:
        REPORT[name] = case()
    except Exception:
        REPORT[name] = {"error": traceback.format_exc()}
print(json.dumps(REPORT))
