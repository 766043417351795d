"""What several tests share: inputs, losses, recorded gradients, trainings, and the library's objects changed."""

import collections
import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from flax.traverse_util import flatten_dict
from oracles import step_of_batch

import bnp_optax as bnp


def normal(seed, *shape, mean=1, deviation=2):
    """Numbers that are neither centred nor of variance 1."""
    return jnp.asarray(np.random.default_rng(seed).normal(mean, deviation, shape))


def weigh(outputs):
    """A loss that no symmetry makes special, of all outputs."""
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(outputs)])
    return jnp.sum(jnp.sin(flat + jnp.arange(flat.size, dtype=flat.dtype)))


def squared_error(prediction, target):
    """Half of it, summed over features and averaged over examples."""
    return jnp.sum(jnp.square(prediction - target)) / 2 / prediction.shape[0]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def assert_same(actual, expected):
    """Of float64: up to rounding."""
    chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-9)


def assert_moments(record, inputs, examples, stack=1, groups=1):
    """Compares a record with the moments of `inputs`, `[positions, stack * groups * input]`."""
    inputs = np.asarray(inputs, np.float64)
    tolerance = 1e-12 if record.mean.dtype == np.float64 else 1e-5
    for actual, moment in ((record.mean, np.mean), (record.variance, np.var)):
        expected = moment(inputs, axis=0).reshape(stack, groups, -1)
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(record.examples, np.full(stack, examples))
    np.testing.assert_array_equal(record.positions, np.full(stack, len(inputs)))


def unstack(tree, size, axis=0):
    """The entries of trees that are stacked along an axis."""
    return [jax.tree.map(lambda leaf, k=k: jnp.take(leaf, k, axis), tree) for k in range(size)]


# Forward passes, gradients, steps.


def forward(model):
    """Returns `(params, *args) -> output, records` of a Linen model."""
    return lambda params, *args, **kwargs: bnp.linen.capture(model)({"params": params}, *args, **kwargs)


def gradients_and_records(model, loss=weigh):
    """Returns `(params, inputs, *targets) -> gradients, records` of the loss `loss(output, *targets)`.

    `model` is a Linen model, or what `forward` returns for one; several inputs are a tuple.
    """
    run = forward(model) if isinstance(model, nn.Module) else model

    def gradients(params, inputs, *targets):
        def loss_fn(params):
            output, records = run(params, *(inputs if isinstance(inputs, tuple) else (inputs,)))
            return loss(output, *targets), records

        return jax.grad(loss_fn, has_aux=True)(params)

    return gradients


def make_step(tx, gradients):
    """Returns `(params, state, *batch) -> params, state`, for `gradients` that return records beside gradients."""

    def step(params, state, *batch):
        new, records = gradients(params, *batch)
        updates, state = tx.update(new, state, params, intermediates=records)
        return optax.apply_updates(params, updates), state

    return step


def compiled(tx):
    """Returns a transformation each of whose functions is compiled."""
    return optax.GradientTransformationExtraArgs(jax.jit(tx.init), jax.jit(tx.update))


def abstract(tx):
    """Returns a transformation each of whose functions is traced alone, which is what finds mistakes."""
    return optax.GradientTransformationExtraArgs(*(functools.partial(jax.eval_shape, function) for function in tx))


def train(tx, gradients, params, batches):
    """Returns parameters and state after a step on each batch, a tuple of the arguments of `gradients`."""
    step, state = jax.jit(make_step(tx, gradients)), jax.jit(tx.init)(params)
    for batch in batches:
        params, state = step(params, state, *batch)
    return params, state


def init(model, *args, seed=0, **kwargs):
    """Returns the parameters of a Linen model."""
    return jax.jit(lambda key: model.init(key, *args, **kwargs)["params"])(jax.random.key(seed))


def second_update(layers, params, gradients, records):
    """Returns the second of two updates of the same gradients, so that the start matters, and the state after it."""
    tx = bnp.scale_by_bnp(layers, decay=0.5, prior_examples=2)
    _, state = tx.update(gradients, tx.init(params), intermediates=records)
    return tx.update(gradients, state, intermediates=records)


def update_of(layers, model, params, x):
    """Returns the second update of a Linen model, or of a function that returns its output and records."""
    gradients = gradients_and_records(model)
    return jax.jit(lambda params, x: second_update(layers, params, *gradients(params, x)))(params, x)


def model_update(model, params, x):
    """The same of a Linen model, all of whose layers are found."""
    layers = bnp.linen.find_layers(model, x)
    assert not layers.excluded
    return update_of(layers, model, params, x)


# Models whose layers the test observes itself, and compares one by one.

Dense = functools.partial(nn.Dense, param_dtype=float)


def recorded(model, **options):
    """Returns `(params, *args) -> output, records` of a Linen model."""
    return lambda params, *args: bnp.linen.capture(model, **options)({"params": params}, *args)


def inputs_of(layers, model, params, *args):
    """Returns with what a Linen model calls each of its layers, a list by path: the test's own interceptor sees it."""

    def forward(params, *args):
        inputs = collections.defaultdict(list)

        def note(next_fun, args, kwargs, context):
            if context.method_name == "__call__" and (path := "/".join(context.module.path)) in layers:
                inputs[path].append(args[0])
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(note):
            model.apply({"params": params}, *args)
        return dict(inputs)

    return jax.tree.map(np.asarray, jax.jit(forward)(params, *args))


def step_of(layers, run, params, *args, loss=weigh):
    """Returns gradients, and what BNP makes of them where the statistics are those of this batch."""
    tx = bnp.scale_by_bnp(layers, decay=0.0, prior_examples=None)

    @jax.jit
    def update(params, *args):
        def loss_fn(params):
            output, records = run(params, *args)
            return loss(output), records

        gradients, records = jax.grad(loss_fn, has_aux=True)(params)
        return gradients, tx.update(gradients, tx.init(params), intermediates=records)[0]

    return update(params, *args)


def assert_step(layers, gradients, updates, expected):
    """Compares updates with those of what each layer reads and the number of examples, `{path: (inputs, N)}`.

    The inputs are a list of arrays. The gradients of all other parameters are to pass unchanged.
    """
    assert set(layers) == set(expected)
    gradients, updates = (flatten(jax.tree.map(np.asarray, tree)) for tree in (gradients, updates))
    for path, (inputs, examples) in expected.items():
        g_w, g_b = gradients.pop(f"{path}/kernel"), gradients.pop(f"{path}/bias", None)
        matrix = g_w.reshape(-1, g_w.shape[-1] if g_b is None else g_b.size)  # attention has heads among its axes
        num_inputs = g_w.shape[2] if g_w.ndim == 4 else len(matrix)  # of a convolution, whose window comes before
        rows = np.concatenate([np.reshape(part, (-1, num_inputs)) for part in inputs])
        kernel, bias = step_of_batch(rows, examples, matrix, None if g_b is None else g_b.ravel())
        np.testing.assert_allclose(updates.pop(f"{path}/kernel").reshape(matrix.shape), kernel, rtol=1e-8, atol=1e-10)
        if bias is not None:
            np.testing.assert_allclose(updates.pop(f"{path}/bias").ravel(), bias, rtol=1e-8, atol=1e-10)
    assert set(updates) == set(gradients)
    for path, gradient in gradients.items():
        np.testing.assert_array_equal(updates[path], gradient)


def flatten(tree):
    return flatten_dict(tree, sep="/")


def reasons(layers):
    """Returns why each parameter is excluded, by its path."""
    return {"/".join(other.path): other.reason for other in layers.excluded}


def with_kernel(change):
    """Returns a `dot_general` that multiplies by a changed kernel."""
    return lambda x, kernel, *args, **kwargs: jax.lax.dot_general(x, change(kernel), *args, **kwargs)


def rounded(kernel):
    """Quantizes with a straight-through gradient, as AQT does."""
    return kernel + jax.lax.stop_gradient(jnp.round(kernel * 8) / 8 - kernel)


def masked(kernel):
    """MADE: an output sees the inputs before it."""
    return kernel * jnp.tril(jnp.ones(kernel.shape))


# Models of NNX.


def make(cls, *args, seed=0, **kwargs):
    """Returns a module of NNX with random parameters, biases included, in float64."""
    dtype = {"param_dtype": float} if cls.__module__.startswith("flax") else {}
    module = cls(*args, rngs=nnx.Rngs(seed), **dtype, **kwargs)
    rng = np.random.default_rng(seed)
    nnx.update(module, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.4, p.shape)), nnx.state(module, nnx.Param)))
    return module


def compiled_call(function, model, *args):
    """Returns `function(model, *args)`, compiled."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))(state, *args)


class Wrapped(nnx.Module):
    """Calls its layer by some function of layer and input."""

    def __init__(self, layer, call):
        self.layer, self.call = layer, call

    def __call__(self, x):
        return self.call(self.layer, x)


def pure(tree):
    """Returns a tree of NNX with arrays in the place of variables."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.get_value() if is_variable(leaf) else leaf, tree, is_leaf=is_variable)


def nnx_update(model, x):
    """Returns the second update, as `model_update` does, of a module of NNX."""
    layers = bnp.nnx.find_layers(model, x)
    assert not layers.excluded
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(model, x):
        output, records = bnp.nnx.capture(model)(x)
        return weigh(output), records

    @jax.jit
    def update(params, rest, x):
        gradients, records = nnx.grad(loss, has_aux=True)(nnx.merge(graphdef, params, rest), x)
        return second_update(layers, pure(params), pure(gradients), records)

    updates, _ = update(params, rest, x)
    return nnx.to_pure_dict(updates)


# The library's objects.


def with_statistics(statistics, path, **fields):
    """Returns statistics in which those of one layer have other values, given in the layer's own shapes."""
    _, entries, rows, inputs = statistics.packing.places[path]
    parts = {"mean": inputs, "variance": inputs, "damping": rows, "scale": entries, "seen": entries, "skipped": entries}
    changed = {
        name: getattr(statistics, name).at[parts[name]].set(jnp.ravel(jnp.asarray(value)))
        for name, value in fields.items()
    }
    return dataclasses.replace(statistics, **changed)


def statistics_in(state):
    """Returns the statistics that are somewhere in a state, one after the other."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, bnp.Statistics))
    return [leaf for leaf in leaves if isinstance(leaf, bnp.Statistics)]


def map_statistics(function, state):
    """Returns a state with `function(statistics)` in the place of its statistics."""
    is_statistics = lambda node: isinstance(node, bnp.Statistics)  # noqa: E731
    return jax.tree.map(lambda node: function(node) if is_statistics(node) else node, state, is_leaf=is_statistics)


def muon_dimensions(params):
    """Muon on all kernels, that of the convolution as `[window * inputs, outputs]`."""
    two, four = optax.contrib.MuonDimensionNumbers(), optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
    return jax.tree.map(lambda leaf: {2: two, 4: four}.get(leaf.ndim), params)
