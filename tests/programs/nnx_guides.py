"""Flax NNX's guides to many devices, with BNP in them; run by test_guides.py.

The steps are those of "Scale up on multiple devices" (docs_nnx/guides/flax_gspmd), as it is and as it was before Flax
0.12, and of "Train a miniGPT language model with JAX" (docs_nnx/examples/minigpt), likewise. Each case runs on a mesh
of 2 x 4 devices and on one of a single device.

It needs a process with 8 devices. Prints one JSON object: for each case what it measured, or the traceback.
"""

import contextlib
import functools
import json
import re
import traceback
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
warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # the guide donates the batch
warnings.filterwarnings("ignore", "scatter inputs have incompatible types")  # its metrics are of float32
jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 8

RULES = (("batch", "data"), ("hidden", "model"), ("embed", None))


def measure(make_tx, train, kind):
    """`train` takes a mesh and a function that makes the transformation, and returns model, optimizer and layers."""
    meshes = [
        jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[: np.prod(shape)])
        for shape in ((2, 4), (1, 1))
    ]
    (model, optimizer, layers), one_device = (train(mesh, make_tx) for mesh in meshes)
    params, state = arrays(nnx.state(model, nnx.Param)), arrays(nnx.state(optimizer))
    expected = arrays(nnx.state(one_device[0], nnx.Param)) | arrays(nnx.state(one_device[1]))
    errors = {
        name: np.abs(np.asarray(leaf) - np.asarray(expected[name])).max() for name, leaf in (params | state).items()
    }
    statistics = {name: leaf for name, leaf in state.items() if re.fullmatch(STATISTICS, name)}
    kept = [[leaf for key, leaf in state.items() if key.endswith(f"/{name}")] for name in params]
    return {
        "error": float(max(errors.values())),
        "layers": list(layers),
        "excluded": {"/".join(other.path): other.reason for other in layers.excluded},
        "statistics": len(statistics),
        "statistics are replicated": all(leaf.sharding.is_fully_replicated for leaf in statistics.values()),
        "split": sum(not leaf.sharding.is_fully_replicated for leaf in params.values()),
        "kept like parameters": all(
            others and all(other.sharding.is_equivalent_to(leaf.sharding, leaf.ndim) for other in others)
            for leaf, others in zip(params.values(), kept, strict=True)
        ),
        "seen": [np.unique(leaf).tolist() for name, leaf in statistics.items() if name.endswith("/seen")],
    }


STATISTICS = "opt_state/(statistics|0)/(mean|variance|damping|scale|seen|skipped)"


def arrays(state):
    """Returns the arrays of a state by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value"): leaf for keys, leaf in leaves
    }


def adam(layers):
    return bnp.preconditioned(optax.adam(0.001), layers)


def sgd(layers):
    return optax.chain(bnp.scale_by_bnp(layers), optax.sgd(0.01, momentum=0.9))


class GPT(nnx.Module):
    """The guide's, in small: `options` are the arguments that say how parameters are split, by kind of module."""

    def __init__(self, vocabulary, length, width, rngs, options, out_sharding):
        new = {"param_dtype": float, "rngs": rngs}
        self.token_emb = nnx.Embed(vocabulary, width, **new)
        self.pos_emb = nnx.Embed(length, width, **new)
        self.blocks = nnx.Sequential(GPTBlock(width, rngs, options))
        self.output_layer = nnx.Linear(width, vocabulary, **new, **options["linear"])
        self.out_sharding = out_sharding

    def __call__(self, tokens):
        positions = self.pos_emb(jnp.arange(tokens.shape[1])[None, :])
        if not self.out_sharding:
            return self.output_layer(self.blocks(self.token_emb(tokens) + positions))
        sharding = jax.typeof(tokens).sharding
        x = self.blocks(self.token_emb(tokens, out_sharding=sharding) + positions)
        return jax.sharding.reshard(self.output_layer(x), sharding)


def attend(query, key, value, mask, **_):
    """JAX's own computes its softmax in float32."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, logits, -jnp.inf)), value)


class GPTBlock(nnx.Module):
    def __init__(self, width, rngs, options):
        new = {"param_dtype": float, "rngs": rngs}
        linear, norm = (new | options[kind] for kind in ("linear", "norm"))
        self.mha = nnx.MultiHeadAttention(num_heads=4, in_features=width, attention_fn=attend, **linear)
        self.dropout = nnx.Dropout(rate=0.1, rngs=rngs)
        self.norm1, self.norm2 = nnx.LayerNorm(width, **norm), nnx.LayerNorm(width, **norm)
        self.mlp = nnx.Sequential(nnx.Linear(width, 32, **linear), nnx.relu, nnx.Linear(32, width, **linear))

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1])))
        x = self.norm1(x + self.dropout(self.mha(inputs_q=x, mask=mask, decode=False)))
        return self.norm2(x + self.mlp(x))


def by_metadata(mesh):
    kernel, vector = {"out_sharding": P(None, "model")}, {"out_sharding": P("model")}
    return {
        "linear": {"kernel_metadata": kernel, "bias_metadata": vector},
        "norm": {"scale_metadata": vector, "bias_metadata": vector},
    }


def by_axes(mesh):
    return by_initializers(tuple)


def by_named_shardings(mesh):
    """As the guide did before Flax 0.12."""
    return by_initializers(functools.partial(NamedSharding, mesh))


def by_initializers(make_sharding):
    kernel, vector = make_sharding(P(None, "model")), make_sharding(P("model"))
    zeros = nnx.with_partitioning(nnx.initializers.zeros_init(), vector)
    return {
        "linear": {
            "kernel_init": nnx.with_partitioning(nnx.initializers.xavier_uniform(), kernel),
            "bias_init": zeros,
        },
        "norm": {"scale_init": nnx.with_partitioning(nnx.initializers.ones_init(), vector), "bias_init": zeros},
    }


def gpt_loss(model, batch):
    logits, records = bnp.nnx.capture(model)(batch[0])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits=logits, labels=batch[1]).mean()
    return loss, (logits, records)


@nnx.jit(donate_argnums=(0, 1, 3))
def gpt_step(model, optimizer, metrics, batch):
    (loss, (logits, records)), grads = nnx.value_and_grad(gpt_loss, has_aux=True)(model, batch)
    metrics.update(loss=loss, logits=logits, labels=batch[1])
    optimizer.update(model, grads, intermediates=records)


def train_gpt(mesh, make_tx, options, *, out_sharding=False, sets_mesh=True):
    """Three steps of the guide; before Flax 0.12 it gave initializers the mesh and never set it."""
    tokens = np.random.default_rng(0).integers(0, 24, (8, 6))
    targets = np.concatenate([tokens[:, 1:], np.zeros((8, 1), int)], axis=1)
    with jax.set_mesh(mesh) if sets_mesh else contextlib.nullcontext():
        model = GPT(24, 6, 16, nnx.Rngs(0), options(mesh), out_sharding)
        batch = P("data", None) if sets_mesh else NamedSharding(mesh, P("data", None))
        layers = bnp.nnx.find_layers(model, jax.device_put(tokens, batch))
        optimizer = nnx.Optimizer(model, make_tx(layers), wrt=nnx.Param)
        metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
        for _ in range(3):
            gpt_step(model, optimizer, metrics, jax.device_put((tokens, targets), batch))
        assert np.isfinite(metrics.compute()["loss"])
    return model, optimizer, layers


class Block(nnx.Module):
    """A layer and a product with a parameter of its own."""

    def __init__(self, rngs, axes=(None, "model")):
        split, init = nnx.with_partitioning, nnx.initializers.lecun_normal()
        self.hidden = nnx.Linear(
            16,
            16,
            kernel_init=split(init, axes),
            bias_init=split(nnx.initializers.normal(), axes[1:]),
            param_dtype=float,
            rngs=rngs,
        )
        self.out = nnx.Param(init(rngs.params(), (16, 16), float), out_sharding=axes[::-1])

    def __call__(self, x):
        hidden = jax.lax.with_sharding_constraint(jnp.tanh(self.hidden(x)), P("data", "model"))
        return jnp.dot(hidden, self.out[...])


class ExplicitBlock(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        kernel_init = functools.partial(init, out_sharding=P(None, "model"))
        self.hidden = nnx.Linear(16, 16, kernel_init=kernel_init, use_bias=False, param_dtype=float, rngs=rngs)
        self.out = nnx.Param(init(rngs.params(), (16, 16), float, out_sharding=P("model", None)))
        self.bias = nnx.Param(jnp.zeros(16, float, out_sharding=P(None)))

    def __call__(self, x):
        return jnp.dot(jnp.tanh(self.hidden(x)), self.out[...], out_sharding=P("data", None)) + self.bias


class Stack(nnx.Module):
    def __init__(self, layers, scan):
        self.layers, self.scan = layers, scan

    def __call__(self, x):
        return self.scan(self.layers, x)


def stack(rngs):
    """The guide's own stack, whose layers NNX scans, as JAX's scan would lose the records."""
    split = {"transform_metadata": {nnx.PARTITION_NAME: None}}
    layers = nnx.vmap(lambda rngs: Block(rngs, ("embed", "hidden")), **split)(rngs.split(2))
    scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **split)
    return Stack(layers, lambda layers, x: scan(x, layers))


def explicit_stack(rngs):
    layers = jax.vmap(ExplicitBlock, spmd_axis_name=None)(rngs.split(2))
    scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return Stack(layers, lambda layers, x: scan(x, layers))


class Beside(nnx.Module):
    """A layer beside a stack that JAX scans, as the guide has it."""

    def __init__(self, rngs):
        split = {"transform_metadata": {nnx.PARTITION_NAME: None}}
        self.layers = nnx.vmap(Block, **split)(rngs.split(2))
        self.last = Block(rngs)

    def __call__(self, x):
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.layers)
        return self.last(x)


def loss_fn(model, x, y):
    prediction, records = bnp.nnx.capture(model)(x)
    return jnp.mean(jnp.square(prediction - y)), records


@jax.jit
def jax_step(model, optimizer, x, y):
    """As the guide has it, but returning the optimizer too: under `jax.jit` what it remembers is lost otherwise."""
    grads, records = jax.grad(loss_fn, has_aux=True)(model, x, y)
    optimizer.update(model, grads, intermediates=records)
    return model, optimizer


@nnx.jit
def nnx_step(model, optimizer, x, y):
    grads, records = nnx.grad(loss_fn, has_aux=True)(model, x, y)
    optimizer.update(model, grads, intermediates=records)
    return model, optimizer


def batches():
    xs, ys = np.random.default_rng(0).normal(1, 2, (2, 3, 8, 16))
    return [jax.device_put(batch, P("data", None)) for batch in zip(xs, ys, strict=True)]


def train_created(mesh, make_tx, make_model, step=jax_step):
    """The model is split as it is created, beneath the mesh."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        model = make_model(nnx.Rngs(0))
        layers = bnp.nnx.find_layers(model, batches()[0][0])
        optimizer = nnx.Optimizer(model, make_tx(layers), wrt=nnx.Param)
        for batch in batches():
            model, optimizer = step(model, optimizer, *batch)
    return model, optimizer, layers


def train_constrained(mesh, make_tx):
    """Before Flax 0.12: the state is created whole, and split at the end of `nnx.jit` by what its variables say."""
    with jax.set_mesh(mesh):
        layers = bnp.nnx.find_layers(Block(nnx.Rngs(0)), batches()[0][0])

        @nnx.jit
        def create():
            with nnx.use_eager_sharding(False):
                model = Block(nnx.Rngs(0))
                optimizer = nnx.Optimizer(model, make_tx(layers), wrt=nnx.Param)
            for node in (model, optimizer):
                state = nnx.state(node)
                nnx.update(node, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
            return model, optimizer

        model, optimizer = create()
        for batch in batches():
            nnx_step(model, optimizer, *batch)
    return model, optimizer, layers


def train_abstract(mesh, make_tx):
    """The sharding of the whole state is read from an abstract one, and given to `jax.jit`."""
    with jax.set_mesh(mesh):
        layers = bnp.nnx.find_layers(Block(nnx.Rngs(0)), batches()[0][0])

        def create():
            model = Block(nnx.Rngs(0))
            return model, nnx.Optimizer(model, make_tx(layers), wrt=nnx.Param)

        graphdef, abstract = nnx.get_abstract_model(create, mesh)
        sharding = nnx.get_named_sharding(abstract, mesh)
        state = jax.jit(lambda: nnx.state(create()), out_shardings=sharding)()

        @functools.partial(jax.jit, in_shardings=(sharding, None, None), out_shardings=sharding)
        def train_step(state, x, y):
            model, optimizer = nnx.merge(graphdef, state)
            grads, records = nnx.grad(loss_fn, has_aux=True)(model, x, y)
            optimizer.update(model, grads, intermediates=records)
            return nnx.state((model, optimizer))

        for batch in batches():
            state = train_step(state, *batch)
    return *nnx.merge(graphdef, state), layers


CASES = {
    "miniGPT": (adam, functools.partial(train_gpt, options=by_metadata, out_sharding=True), AxisType.Explicit),
    "miniGPT, automatic axes": (sgd, functools.partial(train_gpt, options=by_axes), AxisType.Auto),
    "miniGPT, mesh in its initializers": (
        adam,
        functools.partial(train_gpt, options=by_named_shardings, sets_mesh=False),
        AxisType.Auto,
    ),
    "block": (adam, functools.partial(train_created, make_model=Block), AxisType.Auto),
    "stack, logical axes": (sgd, functools.partial(train_created, make_model=stack), AxisType.Auto),
    "stack, explicit axes": (
        adam,
        functools.partial(train_created, make_model=explicit_stack, step=nnx_step),
        AxisType.Explicit,
    ),
    "stack that JAX scans": (adam, functools.partial(train_created, make_model=Beside), AxisType.Auto),
    "state split by a constraint": (sgd, train_constrained, AxisType.Auto),
    "state split as the abstract one": (adam, train_abstract, AxisType.Auto),
}

REPORT = {}
for name, case in CASES.items():
    try:
        REPORT[name] = measure(*case)
    except Exception:
        REPORT[name] = {"error": traceback.format_exc()}
print(json.dumps(REPORT))
