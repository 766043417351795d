"""Every optimizer of Optax in BNP's variables: equal to that optimizer on the network written out in them, in float64.

Such a network is one whose statistics are frozen. Optimizers that keep something of earlier parameters are equal to it
too, but see the parameters move as soon as the statistics do: they are told apart here, and do not belong inside.
"""

import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import forward, init, muon_dimensions, normal, with_statistics

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")
EPS, Q2 = (1e-2, 1e-4), 4.0


class Net(nn.Module):
    """A convolution, a dense layer without a bias, one with, and a scale that no layer covers."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(3, (2, 2), padding="VALID", param_dtype=float, name="conv")(x))
        x = nn.tanh(nn.Dense(4, use_bias=False, param_dtype=float, name="hidden")(x.reshape(x.shape[0], -1)))
        x = x * self.param("scale", nn.initializers.ones, (4,), float)
        return nn.Dense(3, param_dtype=float, name="out")(x)


def moment(path):
    return VARIANCES[path] + (MEANS[path] ** 2 if path == "hidden" else 0)


with jax.enable_x64(True):
    X, Y = (normal(seed, *shape, mean=0.5, deviation=1) for seed, shape in enumerate(((6, 3, 3, 2), (6, 3))))
    PARAMS, LAYERS = init(Net(), X), bnp.linen.find_layers(Net(), X)

# frozen statistics, as if they had been estimated
MEANS, LOG_VARIANCES = (
    {
        path: np.random.default_rng(first + k).normal(0.5, 1, layer.moments_shape[2])
        for k, (path, layer) in enumerate(LAYERS.items())
    }
    for first in (0, 10)
)
VARIANCES = {path: np.exp(logarithm) for path, logarithm in LOG_VARIANCES.items()}
DAMPING = {path: EPS[0] * moment(path).max() + EPS[1] for path in LAYERS}
SD = {path: np.sqrt(moment(path) + DAMPING[path]) for path in LAYERS}


def mse(prediction):
    return jnp.mean(jnp.sum(jnp.square(prediction - Y), axis=-1))


def loss(params):
    return mse(Net().apply({"params": params}, X))


def loss_in_z(z):
    """The network that BatchNorm with frozen statistics would compute, written out."""

    def normalized(path, h):
        return ((h - MEANS[path]) if path != "hidden" else h) / (np.sqrt(Q2) * SD[path])

    def bias(path):
        return z[path]["bias"] / np.sqrt(Q2)

    h = normalized("conv", X)
    windows = jnp.stack([h[:, i : i + 2, j : j + 2].reshape(6, -1) for i in range(2) for j in range(2)], axis=1)
    h = jnp.tanh(windows @ z["conv"]["kernel"].reshape(8, 3) + bias("conv"))
    h = jnp.tanh(normalized("hidden", h.reshape(6, -1)) @ z["hidden"]["kernel"])
    return mse(normalized("out", h * z["scale"]) @ z["out"]["kernel"] + bias("out"))


def z_of(params):
    """``P^-1 w``."""
    z = jax.tree.map(jnp.copy, params)
    for path in LAYERS:
        kernel = params[path]["kernel"]
        z[path]["kernel"] = np.sqrt(Q2) * SD[path][:, None] * kernel
        if path != "hidden":
            through = kernel.reshape(-1, *kernel.shape[-2:]).sum(0)  # all positions of the window see the mean
            z[path]["bias"] = np.sqrt(Q2) * (params[path]["bias"] + MEANS[path] @ through)
    return z


def frozen_state(tx, inner, z):
    """The state with these statistics, and the inner optimizer's as it begins at ``z``."""
    statistics = tx.init(PARAMS).statistics
    for path in LAYERS:
        fields = {"mean": MEANS[path], "variance": VARIANCES[path], "damping": DAMPING[path], "scale": Q2}
        statistics = with_statistics(statistics, path, **fields)
    return bnp.PreconditionedState(statistics, inner.init(z))


def sophia():
    """Sophia asks for the loss, which in here is a function of z."""
    tx = optax.contrib.sophia(0.1, update_interval=2)
    return optax.GradientTransformation(tx.init, functools.partial(tx.update, obj_fn=loss_in_z))


def sam():
    tx = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05))
    return optax.GradientTransformation(tx.init, tx.update)


CONTRIB = optax.contrib
PARTS = {
    "conv": optax.adam(0.1),
    "hidden": optax.sgd(0.1),
    "out": optax.adam(0.1),
    "scale": optax.sgd(0.1),
}

# What keeps nothing of earlier parameters: gradients, and whatever it likes of the present ones.
INSIDE = {
    "adabelief": lambda: optax.adabelief(0.1),
    "adadelta": lambda: optax.adadelta(1.0),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "adagrad": lambda: optax.adagrad(0.1),
    "adam": lambda: optax.adam(0.1),
    "adamax": lambda: optax.adamax(0.1),
    "adamaxw": functools.partial(optax.adamaxw, 0.1, weight_decay=0.1),
    "adamw": functools.partial(optax.adamw, 0.1, weight_decay=0.1),
    "adan": functools.partial(optax.adan, 0.1, weight_decay=0.1),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "fromage": lambda: optax.fromage(0.1),
    "lamb": functools.partial(optax.lamb, 0.1, weight_decay=0.1),
    "lars": functools.partial(optax.lars, 0.1, momentum=0.9),
    "lion": functools.partial(optax.lion, 0.01, weight_decay=0.1),
    "nadam": lambda: optax.nadam(0.1),
    "nadamw": functools.partial(optax.nadamw, 0.1, weight_decay=0.1),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=0),
    "novograd": functools.partial(optax.novograd, 0.1),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(0.1),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(0.1),
    "polyak_sgd": lambda: optax.polyak_sgd(0.1),
    "radam": lambda: optax.radam(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, centered=True, momentum=0.9),
    "rprop": lambda: optax.rprop(0.1),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "sign_sgd": lambda: optax.sign_sgd(0.01),
    "signum": lambda: optax.signum(0.01),
    "sm3": lambda: optax.sm3(0.1),
    "yogi": lambda: optax.yogi(0.1),
    "acprop": functools.partial(CONTRIB.acprop, 0.1, weight_decay=0.1),
    "ademamix": functools.partial(CONTRIB.ademamix, 0.1, weight_decay=0.1),
    "adopt": lambda: CONTRIB.adopt(0.1),
    "dadapt_adamw": functools.partial(CONTRIB.dadapt_adamw, 1.0, estim_lr0=0.01, weight_decay=0.1),
    "galore": functools.partial(CONTRIB.galore, 0.1, rank=2, update_proj_gap=2, weight_decay=0.1),
    "muon": functools.partial(CONTRIB.muon, 0.1, muon_weight_dimension_numbers=muon_dimensions, weight_decay=0.1),
    "simplified_ademamix": functools.partial(CONTRIB.simplified_ademamix, 0.1, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_block_rms(0.1), optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.01, 4)),
    "partitioned": lambda: optax.partition(PARTS, {name: name for name in PARTS}),
}

# What cannot be inside while the statistics move. It goes around, `wrapper(preconditioned(...))`, or behind
# `scale_by_bnp` in a chain.
KEEPS_PARAMETERS = {
    # the place where it began, or that of its averages
    "cocob": CONTRIB.cocob,
    "dog": lambda: CONTRIB.dog(init_step=("distance", 0.1)),
    "dowg": lambda: CONTRIB.dowg(init_estim_sq_dist=0.1),
    "madgrad": lambda: CONTRIB.madgrad(0.1),
    "mechanize": lambda: CONTRIB.mechanize(optax.sgd(0.1), s_init=1.0, weight_decay=0.0),
    "prodigy": lambda: CONTRIB.prodigy(1.0, estim_lr0=0.01),
    "sam": sam,
    "schedule_free": lambda: CONTRIB.schedule_free(optax.sgd(0.1), learning_rate=0.1),
    "schedule_free_adamw": lambda: CONTRIB.schedule_free_adamw(0.1),
    "schedule_free_sgd": lambda: CONTRIB.schedule_free_sgd(0.1),
    # the step before, as the difference of two parameters
    "lbfgs": lambda: optax.lbfgs(0.1, memory_size=2, linesearch=None),
    # averages of inner products of gradients with the parameters at which they were taken: those of z, but nearly, so
    # that inside is still the better place; test_wrappers.py has it
    "momo": lambda: CONTRIB.momo(10.0),
    "momo_adam": lambda: CONTRIB.momo_adam(10.0),
}

# Those among them that begin with zeros in the place of their memory, and are not told from what keeps gradients.
KEEPS_THEM_LATER = ("lbfgs", "momo", "momo_adam")

# What is not an optimizer of gradients and parameters alone.
OTHERS = {
    "lookahead": "takes pairs of parameters: it goes around",
    "dpsgd": "takes a gradient for each example: its clipping goes before, in a chain",
    "sophia": "asks for the loss as a function of what it optimizes, which is z",
}

# Names that are no optimizers: parts of them, wrappers, and one that Optax has replaced.
PARTS_OF_OPTIMIZERS = {
    "differentially_private_aggregate",
    "hutchinson_estimator_diag_hessian",
    "normalize",
    "optimistic_adam",
    "reduce_on_plateau",
    "schedule_free_eval_params",
    "split_real_and_imaginary",
}
COMBINED = {"clipped", "injected", "partitioned"}

# What does not stand still where all gradients are zero.
RESTLESS = {
    "dadapt_adamw": "divides by its gradients",
    "fromage": "shrinks the parameters whatever its options",
    "noisy_sgd": "adds noise",
    "yogi": "starts with a momentum that is not zero",
}


def test_every_optimizer_of_optax_is_listed():
    named = set()
    for name, value in {**vars(optax), **vars(optax.contrib)}.items():
        function = getattr(value, "func", value)  # some are partial applications of others
        modules = ("optax._src.alias", "optax._src.lookahead", "optax.contrib")
        if inspect.isfunction(function) and function.__module__.startswith(modules):
            named |= set() if name.startswith(("_", "scale_by_")) else {name}
    assert {"adam", "dog", "lookahead", "muon", "nadam", "sam"} <= named
    lists = (set(INSIDE) - COMBINED, set(KEEPS_PARAMETERS), set(OTHERS), PARTS_OF_OPTIMIZERS)
    assert named == set.union(*lists)
    assert len(named) == sum(map(len, lists))  # each is in one


@pytest.mark.parametrize(
    ("inner", "shrinks"),
    [
        (optax.sgd(0.1), 16),
        (optax.adam(0.1), 4),
        (optax.lion(0.1, weight_decay=0.0), 4),
        (optax.contrib.muon(0.1), 4),
        # by the size of parameters, which in z are as many times larger as steps would have to be smaller
        (optax.lamb(0.1), 1),
        (optax.lars(0.1), 1),
        (optax.adafactor(0.1), 1),
    ],
)
def test_how_steps_shrink_in_batches_of_a_sixteenth(inner, shrinks):
    layers = bnp.Layers((bnp.Layer.dense(("w",), (5, 3)),))
    params, gradients = {"w": normal(0, 5, 3)}, {"w": normal(1, 5, 3)}
    sizes = []
    for scaling in ("none", 128):
        tx = bnp.preconditioned(inner, layers, scaling=scaling)
        records = {"w": bnp.input_moments(normal(2, 8, 5))}
        updates, _ = tx.update(gradients, tx.init(params), params, intermediates=records)
        sizes.append(optax.tree.norm(updates))
    np.testing.assert_allclose(sizes[0] / sizes[1], shrinks, rtol=1e-5)


@functools.cache
def optimizer(name, **options):
    """Returns an optimizer whose step is compiled, once for all variables it is used in."""
    make = (INSIDE | KEEPS_PARAMETERS | {"sophia": sophia})[name]
    inner = optax.with_extra_args_support(make(**options))
    return optax.GradientTransformationExtraArgs(inner.init, jax.jit(inner.update))


def without_keys(state):
    """Returns a state with random keys as numbers."""

    def numbers(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return jax.tree.map(numbers, state)


VALUE_AND_GRADIENTS, VALUE_AND_GRADIENTS_IN_Z = (jax.jit(jax.value_and_grad(f)) for f in (loss, loss_in_z))


@pytest.mark.parametrize("name", [*INSIDE, *KEEPS_THEM_LATER, "sophia"])
def test_an_optimizer_inside_is_that_optimizer_on_the_network_written_out(name):
    inner = optimizer(name)
    tx = bnp.preconditioned(inner, LAYERS)
    params, z = PARAMS, z_of(PARAMS)
    state, z_state = frozen_state(tx, inner, z), inner.init(z)
    np.testing.assert_allclose(loss_in_z(z), loss(params), rtol=1e-12)
    for _ in range(3):
        value, gradients = VALUE_AND_GRADIENTS(params)
        updates, state = tx.update(gradients, state, params, intermediates=bnp.KEEP_STATISTICS, value=value)
        params = optax.apply_updates(params, updates)
        value, gradients = VALUE_AND_GRADIENTS_IN_Z(z)
        updates, z_state = inner.update(gradients, z_state, z, value=value)
        z = optax.apply_updates(z, updates)
    assert optax.tree.norm(optax.tree.sub(params, PARAMS)) > 1e-3
    chex.assert_trees_all_close(z_of(params), z, rtol=1e-7, atol=1e-9)
    chex.assert_trees_all_close(without_keys(state.inner), without_keys(z_state), rtol=1e-7, atol=1e-9)


def memory_of_parameters(inner):
    """How much later steps depend on the parameters at the first, but for their norms: these were the negative."""
    z = z_of(PARAMS)
    value, gradients = VALUE_AND_GRADIENTS_IN_Z(z)
    later = []
    for first in (z, optax.tree.scale(-1.0, z)):
        _, state = inner.update(gradients, inner.init(first), first, value=value)
        steps = []
        for factor in (0.5, -2.0, 1.0):
            updates, state = inner.update(optax.tree.scale(factor, gradients), state, z, value=value)
            steps.append(updates)
        later.append(steps)
    return float(optax.tree.norm(optax.tree.sub(*later)))


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_inside_keeps_nothing_of_earlier_parameters(name):
    assert memory_of_parameters(optimizer(name)) < 1e-12


@pytest.mark.parametrize("name", KEEPS_PARAMETERS)
def test_what_belongs_outside_keeps_something_of_earlier_parameters(name):
    assert memory_of_parameters(optimizer(name)) > 1e-7


@functools.cache
def two_records():
    """Of two batches whose moments differ."""
    record = jax.jit(lambda x: forward(Net())(PARAMS, x)[1])
    return [record(X + shift) for shift in (0, 10)]


def movement_of_zero_gradients(tx):
    """How far the parameters go where the gradient is zero, and the statistics move."""
    params, state = PARAMS, tx.init(PARAMS)
    for records in two_records():
        zeros = optax.tree.zeros_like(PARAMS)
        updates, state = tx.update(zeros, state, params, intermediates=records, value=jnp.zeros(()))
        params = optax.apply_updates(params, updates)
    return float(optax.tree.norm(optax.tree.sub(params, PARAMS)))


@pytest.mark.parametrize("name", [name for name in INSIDE if name not in RESTLESS])
def test_moving_statistics_alone_move_nothing(name):
    decays = "weight_decay" in inspect.signature(INSIDE[name]).parameters
    inner = optimizer(name, weight_decay=0.0) if decays else optimizer(name)
    assert movement_of_zero_gradients(bnp.preconditioned(inner, LAYERS)) < 1e-12


@pytest.mark.parametrize("compile_init", [False, True])
@pytest.mark.parametrize("name", sorted(KEEPS_PARAMETERS.keys() - KEEPS_THEM_LATER))
def test_what_begins_with_a_copy_of_the_parameters_is_refused(name, compile_init):
    init = bnp.preconditioned(optax.chain(optimizer(name)), LAYERS).init
    with pytest.raises(ValueError, match=r"keeps the parameters that it begins with \(state.*Put it around"):
        (jax.jit(init) if compile_init else init)(PARAMS)


def test_a_copy_of_parameters_outside_of_all_layers_is_none_of_bnps_variables():
    labels = {"conv": "layer", "hidden": "layer", "out": "layer", "scale": "other"}
    keeping = CONTRIB.schedule_free(optax.sgd(0.1), learning_rate=0.1)
    allowed = bnp.preconditioned(optax.partition({"layer": optax.sgd(0.1), "other": keeping}, labels), LAYERS)
    assert jax.jit(allowed.init)(PARAMS).inner.inner_states.keys() == allowed.init(PARAMS).inner.inner_states.keys()
    refused = bnp.preconditioned(optax.partition({"layer": keeping, "other": optax.sgd(0.1)}, labels), LAYERS)
    for start in (refused.init, jax.jit(refused.init)):
        with pytest.raises(ValueError, match="keeps the parameters"):
            start(PARAMS)


def test_what_cannot_be_traced_is_not_checked():
    untraceable = optax.GradientTransformation(lambda params: jax.tree.map(np.array, params), optax.sgd(0.1).update)
    assert bnp.preconditioned(untraceable, LAYERS).init(PARAMS)


@pytest.mark.parametrize(
    "inner",
    [
        optax.lbfgs(),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)),
        optax.inject_hyperparams(optax.lbfgs)(learning_rate=0.1),
    ],
)
def test_a_search_along_the_step_is_refused(inner):
    with pytest.raises(ValueError, match=r"searches along its step \(state.*behind preconditioned in a chain"):
        bnp.preconditioned(inner, LAYERS).init(PARAMS)


def test_what_keeps_a_copy_of_the_parameters_goes_around():
    around = CONTRIB.schedule_free(bnp.preconditioned(optax.sgd(0.1), LAYERS), learning_rate=0.1)
    assert movement_of_zero_gradients(around) < 1e-12


@pytest.mark.filterwarnings("ignore:.*seed.* is deprecated:DeprecationWarning")  # which dpsgd itself gives
def test_what_takes_other_arguments_is_refused():
    zeros = optax.tree.zeros_like(PARAMS)
    of_examples = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), zeros)
    lookahead = bnp.preconditioned(optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5), LAYERS)
    with pytest.raises(ValueError, match=r"hold conv and all other layers beneath each of fast, slow"):
        lookahead.init(optax.LookaheadParams.init_synced(PARAMS))
    private = bnp.preconditioned(CONTRIB.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=0.0, seed=0), LAYERS)
    with pytest.raises(ValueError, match=r"conv/kernel with shape \(2, 2, 2, 3\), but it has shape \(6, 2, 2, 2, 3\)"):
        private.update(of_examples, private.init(PARAMS), PARAMS, intermediates=two_records()[0])
    second_order = bnp.preconditioned(CONTRIB.sophia(0.1), LAYERS)
    with pytest.raises(ValueError, match="obj_fn must be provided"):
        second_order.update(zeros, second_order.init(PARAMS), PARAMS, intermediates=two_records()[0])
