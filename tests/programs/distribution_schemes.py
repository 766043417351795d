"""Twenty steps under every scheme of distribution, each compared with one device; run by test_devices.py.

It needs a process with 8 devices. Prints one JSON object: for each scheme what it measured, or the traceback.
"""

import collections
import functools
import json
import traceback
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnp_optax as bnp

STEPS, BATCH = 20, 24
REPORT = {}


class Network(nn.Module):
    """Two convolutions and three dense layers, of which one is called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(8, (3, 3), param_dtype=float)(x))
        x = nn.tanh(nn.Conv(16, (2, 2), strides=2, use_bias=False, param_dtype=float)(x))
        x = nn.tanh(nn.Dense(8, param_dtype=float)(x.reshape(x.shape[0], -1)))
        shared = nn.Dense(8, param_dtype=float)
        return nn.Dense(3, param_dtype=float)(shared(nn.tanh(shared(x))))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(1, 2, shape)


MODEL, XS, YS = Network(), normal(0, STEPS, BATCH, 4, 4, 2), normal(1, STEPS, BATCH, 3)


def scheme(function):
    """Runs a scheme and reports what it returns."""
    try:
        REPORT[function.__name__] = function()
    except Exception:
        REPORT[function.__name__] = {"error": traceback.format_exc()}
    return function


def loss_fn(params, x, y, axis_name=None):
    prediction, records = bnp.linen.capture(MODEL, axis_name=axis_name)({"params": params}, x)
    return jnp.mean(jnp.square(prediction - y)), records


def make_step(tx, loss_fn=loss_fn):
    def step(params, state, x, y):
        (loss, records), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
        updates, state = tx.update(gradients, state, params, intermediates=records)
        return optax.apply_updates(params, updates), state, loss

    return step


def train(step, params, state, put=lambda batch: batch, examples=BATCH):
    """Returns parameters, state and loss at the end, and how often the step was traced and compiled."""
    traces = [0]

    def counted(*args):
        traces[0] += 1
        return step(*args)

    compilations, jitted = COMPILATIONS["backend_compile"], jax.jit(counted)
    for x, y in zip(XS, YS, strict=True):
        params, state, loss = jitted(params, state, put(x[:examples]), put(y[:examples]))
    counts = {"traces": traces[0], "compilations": COMPILATIONS["backend_compile"] - compilations}
    return (params, state, loss), counts


def error(actual, expected):
    """Returns the largest deviation of any number, relative where it is above 1."""

    def of_leaf(a, b):
        a, b = np.asarray(jax.device_get(a)), np.asarray(jax.device_get(b))
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        return np.max(np.abs(a - b) / np.maximum(np.abs(b), 1))

    return float(max(jax.tree.leaves(jax.tree.map(of_leaf, actual, expected))))


def adam():
    """Optax's, which mixes dtypes."""
    tx = optax.adam(0.01)
    return optax.GradientTransformation(tx.init, jax.numpy_dtype_promotion("standard")(tx.update))


COMPILATIONS = collections.Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILATIONS.update(backend_compile=event.endswith("backend_compile_duration"))
)
warnings.simplefilter("error")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
assert jax.device_count() == 8

PARAMS = MODEL.init(jax.random.key(0), XS[0])["params"]
LAYERS = bnp.linen.find_layers(MODEL, XS[0])
TX = bnp.bnp_sgd(0.05, LAYERS, momentum=0.9, weight_decay=1e-4)
START = TX.init(PARAMS)
SINGLE, _ = train(make_step(TX), PARAMS, START)
IN_Z = bnp.preconditioned(adam(), LAYERS)
SINGLE_IN_Z, _ = train(make_step(IN_Z), PARAMS, IN_Z.init(PARAMS))

AUTO, EXPLICIT = (jax.make_mesh((8,), ("data",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit))


def split(mesh):
    return functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))


def replicate(mesh, tree):
    return jax.device_put(tree, NamedSharding(mesh, P()))


def data_parallel(tx, start, single):
    step, params, state = make_step(tx), *replicate(AUTO, (PARAMS, start))
    end, counts = train(step, params, state, split(AUTO))
    text = jax.jit(step).lower(params, state, *map(split(AUTO), (XS[0], YS[0]))).compile().as_text()
    collectives = {kind: text.count(f" {kind}(") for kind in ("all-reduce", "all-gather", "collective-permute")}
    return {"error": error(end, single), **counts, **collectives}


@scheme
def jit_data_parallel():
    return data_parallel(TX, START, SINGLE)


@scheme
def jit_data_parallel_with_adam_in_z():
    return data_parallel(IN_Z, IN_Z.init(PARAMS), SINGLE_IN_Z)


@scheme
def jit_uneven_batch():
    """Batches of 21 that the program itself splits, so that the last device has fewer."""

    def step(params, state, x, y):
        x, y = (jax.lax.with_sharding_constraint(a, NamedSharding(AUTO, P("data"))) for a in (x, y))
        return make_step(TX)(params, state, x, y)

    end, counts = train(step, *replicate(AUTO, (PARAMS, START)), examples=21)
    return {"error": error(end, train(make_step(TX), PARAMS, START, examples=21)[0]), **counts}


def mean_loss(params, x, y):
    loss, records = loss_fn(params, x, y, "data")
    return jax.lax.pmean(loss, "data"), records


@scheme
def shard_map_whole_step():
    step = jax.shard_map(make_step(TX, mean_loss), mesh=AUTO, in_specs=(P(), P(), P("data"), P("data")), out_specs=P())
    end, counts = train(step, *replicate(AUTO, (PARAMS, START)), split(AUTO))
    return {"error": error(end, SINGLE), **counts}


@scheme
def shard_map_stacked_records():
    """Each device's record comes out as it is, and the update pools them."""

    @functools.partial(
        jax.shard_map, mesh=AUTO, in_specs=(P(), P("data"), P("data")), out_specs=((P(), P("data")), P())
    )
    def gradients_and_records(params, x, y):
        def mean_loss(params):
            loss, records = loss_fn(params, x, y)
            return jax.lax.pmean(loss, "data"), jax.tree.map(lambda leaf: leaf[None], records)

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    def step(params, state, x, y):
        (loss, records), gradients = gradients_and_records(params, x, y)
        updates, state = TX.update(gradients, state, params, intermediates=records)
        return optax.apply_updates(params, updates), state, loss

    end, counts = train(step, *replicate(AUTO, (PARAMS, START)), split(AUTO))
    return {"error": error(end, SINGLE), **counts}


@scheme
def pmap_with_summed_records():
    @functools.partial(jax.pmap, axis_name="data")
    def step(params, state, x, y):
        (loss, records), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y)
        gradients, loss = jax.lax.pmean((gradients, loss), "data")
        updates, state = TX.update(gradients, state, params, intermediates=jax.lax.psum(records, "data"))
        return optax.apply_updates(params, updates), state, loss

    end = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), (PARAMS, START))
    for x, y in zip(XS, YS, strict=True):
        end = step(*end[:2], x.reshape(8, -1, *x.shape[1:]), y.reshape(8, -1, *y.shape[1:]))
    return {"error": max(error(jax.tree.map(lambda leaf: leaf[k], end), SINGLE) for k in range(8))}  # noqa: B023


@scheme
def shard_map_over_one_of_two_explicit_axes():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    step = jax.shard_map(
        make_step(TX, mean_loss),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
        axis_names={"data"},
    )
    with jax.set_mesh(mesh):
        end, counts = train(step, *replicate(mesh, (PARAMS, START)), split(mesh))
    return {"error": error(end, SINGLE), **counts}


def sharded(mesh, params, which):
    """Returns parameters split along their first (0) or last (-1) axis that 8 divides, whole where there is none."""

    def put(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size % 8 == 0]
        spec = P(*("data" if axes and axis == axes[which] else None for axis in range(leaf.ndim)))
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, params)


def fully_sharded(which, tx=TX, single=SINGLE):
    """What an optimizer keeps of a parameter is split like it; statistics are of no parameter, and replicated."""
    params = sharded(AUTO, PARAMS, which)
    shardings = optax.tree.map_params(
        tx,
        lambda _, param: param.sharding,
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda _: NamedSharding(AUTO, P()),
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, params), shardings, NamedSharding(AUTO, P())
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    end, counts = train(jax.jit(make_step(tx), out_shardings=places), params, state, split(AUTO))
    kept = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), end[:2], places[:2])
    statistics, inner = (end[1].statistics, end[1].inner) if tx is IN_Z else (end[1][0], end[1][2])
    moments = inner[0].mu if tx is IN_Z else inner[0].trace
    return {
        "error": error(end, single),
        **counts,
        "stable": all(jax.tree.leaves(kept)),
        "replicated": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(statistics)),
        "shard of momentum": moments["Dense_0"]["kernel"].addressable_shards[0].data.shape,
    }


@scheme
def fully_sharded_outputs():
    return fully_sharded(-1)


@scheme
def fully_sharded_inputs():
    return fully_sharded(0)


@scheme
def fully_sharded_inputs_with_adam_in_z():
    return fully_sharded(0, IN_Z, SINGLE_IN_Z)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def whole_params(params, x, y):
    """A fully sharded model gathers its parameters where it uses them."""
    return loss_fn(jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params), x, y)


def explicit(params, tx=TX, single=SINGLE):
    step = make_step(tx, whole_params)
    with jax.set_mesh(EXPLICIT):
        state = jax.jit(tx.init)(params)
        end, counts = train(step, params, state, split(EXPLICIT))
        batches = jax.device_put((XS, YS), NamedSharding(EXPLICIT, P(None, "data")))

        @jax.jit
        def run(params, state):
            def body(carry, batch):
                *carry, loss = step(*carry, *batch)
                return tuple(carry), loss

            return jax.lax.scan(body, (params, state), batches)

        (*scanned, losses) = run(params, state)
        return {
            "error": max(error(end, single), error((*scanned[0], losses[-1]), single)),
            **counts,
            "stable": types(end[:2]) == types((params, state)),
        }


@scheme
def explicit_data_parallel():
    return explicit(replicate(EXPLICIT, PARAMS))


@scheme
def explicit_fully_sharded_outputs():
    return explicit(sharded(EXPLICIT, PARAMS, -1))


@scheme
def explicit_fully_sharded_inputs_with_injected_hyperparameters():
    static = ("layers", "nesterov", "variance", "scaling")
    make = optax.inject_hyperparams(bnp.bnp_sgd, static_args=static)
    tx = make(lambda count: 0.05 / (1 + count.astype(float)), LAYERS, 0.9, weight_decay=1e-4)
    single, _ = train(make_step(tx), PARAMS, tx.init(PARAMS))
    return explicit(sharded(EXPLICIT, PARAMS, 0), tx, single)


@scheme
def explicit_fully_sharded_outputs_with_adam_in_z():
    return explicit(sharded(EXPLICIT, PARAMS, -1), IN_Z, SINGLE_IN_Z)


@scheme
def explicit_without_a_mesh_in_context():
    end, _ = train(make_step(TX), *replicate(EXPLICIT, (PARAMS, START)), split(EXPLICIT))
    eager = bnp.input_moments(split(EXPLICIT)(XS[0])), bnp.input_moments(jnp.asarray(XS[0]))
    return {"error": max(error(end, SINGLE), error(*eager))}


@scheme
def explicit_vmap_over_examples():
    def mapped(params, x, y):
        losses, records = jax.vmap(lambda x, y: loss_fn(params, x[None], y[None]))(x, y)
        return losses.mean(), records

    with jax.set_mesh(EXPLICIT):
        end, counts = train(make_step(TX, mapped), *replicate(EXPLICIT, (PARAMS, START)), split(EXPLICIT))
    return {"error": error(end, SINGLE), **counts}


class Kinds(nn.Module):
    """Kernels whose canonical shape splits, merges and moves axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (8, 1), feature_group_count=2, param_dtype=float)(x)
        x = nn.ConvTranspose(8, (2, 8), transpose_kernel=True, param_dtype=float)(x)
        x = nn.DenseGeneral((8, 2), axis=(-2, -1), param_dtype=float)(x)
        stack = nn.scan(
            lambda layer, x: (layer(x), None),
            variable_axes={"params": 1, "intermediates": 0},
            split_rngs={"params": True},
            length=8,
        )
        return stack(nn.Dense(2, param_dtype=float, name="stack"), x)[0]


@scheme
def explicit_kinds_of_kernels():
    """Updates alone, the gradients split along any axis that 8 divides."""
    model, x = Kinds(), normal(0, 8, 2, 8, 8)
    params = model.init(jax.random.key(0), x)["params"]
    tx = bnp.scale_by_bnp(bnp.linen.find_layers(model, x))
    _, records = bnp.linen.capture(model)({"params": params}, x)
    expected, errors, stable = tx.update(params, tx.init(params), intermediates=records), [], []
    with jax.set_mesh(EXPLICIT):
        for gradients in (sharded(EXPLICIT, params, 0), sharded(EXPLICIT, params, -1)):
            state = tx.init(gradients)
            actual = jax.jit(tx.update)(gradients, state, intermediates=replicate(EXPLICIT, records))
            errors.append(error(actual, expected))
            stable.append(types(actual) == types((gradients, state)))
    return {"error": max(errors), "stable": all(stable), "layers": len(records)}


print(json.dumps(REPORT))
