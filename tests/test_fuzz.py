"""Random small networks and random chains: three steps equal those of a reference written without the library.

The reference computes the network from its parameters by hand (scans unrolled, convolutions as sums over their window),
keeps every layer's raw inputs, and takes the paper's steps in NumPy. `--fuzz-cases` runs more.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import compiled, gradients_and_records, init, quick_jit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import absorbed, batch_scale, bnp_step, running_decay, same_padding

import bnp_optax as bnp

EXAMPLES, CHANNELS = 4, 4  # few shapes, so that their operations are compiled once
SCAN = 2

pytestmark = pytest.mark.usefixtures("x64")

layer_kinds = st.one_of(
    st.fixed_dictionaries({"kind": st.sampled_from(["dense", "twice", "general", "remat", "jit", "experts"])}),
    st.fixed_dictionaries({"kind": st.just("scan"), "axis": st.integers(0, 2)}),
    st.fixed_dictionaries(
        {
            "kind": st.just("conv"),
            "groups": st.sampled_from([1, 2, 4]),
            "strides": st.sampled_from([1, 2]),
            "window": st.integers(1, 3),
        }
    ),
)
networks = st.lists(st.tuples(layer_kinds, st.booleans()), min_size=1, max_size=3)
options = st.fixed_dictionaries(
    {
        "variance": st.sampled_from(["mixture", "batch"]),
        "scaling": st.sampled_from([12.0, "examples", "none"]),
        "prior_examples": st.sampled_from([None, 0, 8, 128]),
        "decay": st.sampled_from([0.0, 0.5, 0.99]),
        "eps_relative": st.sampled_from([0.0, 1e-2]),
        "eps": st.sampled_from([1e-4, 1e-2]),
    }
)
rests = st.lists(
    st.sampled_from(
        [
            optax.clip_by_global_norm(1.0),
            optax.add_decayed_weights(1e-2),
            optax.trace(0.9),
            optax.trace(0.9, nesterov=True),
            optax.scale_by_adam(),
            optax.clip(0.5),
        ]
    ),
    max_size=3,
)


class Experts(nn.Module):
    """One kernel for each position of the sequence, by a layer of the user's own."""

    use_bias: bool
    dtype: type

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(0.5)
        w = self.param("kernel", init, (x.shape[1], CHANNELS, CHANNELS), self.dtype)
        b = self.param("bias", init, (x.shape[1], CHANNELS), self.dtype) if self.use_bias else None
        bias = "bias" if self.use_bias else None
        bnp.linen.register(self, x, "kernel", bias, kernel_roles="sio", bias_roles="so", stack_axes=(1,))
        y = jnp.einsum("nti,tio->nto", x, w)
        return y if b is None else y + b[None]


class Net(nn.Module):
    network: tuple
    dtype: type

    @nn.compact
    def __call__(self, x):
        for k, (spec, use_bias) in enumerate(self.network):
            given = {"use_bias": use_bias, "param_dtype": self.dtype, "name": f"layer_{k}"}
            spec = dict(spec)
            match spec["kind"]:
                case "dense":
                    x = nn.Dense(CHANNELS, **given)(x)
                case "remat":
                    x = nn.remat(nn.Dense)(CHANNELS, **given)(x)
                case "jit":
                    x = nn.jit(nn.Dense)(CHANNELS, **given)(x)
                case "twice":
                    dense = nn.Dense(CHANNELS, **given)
                    x = dense(jnp.tanh(dense(x)))
                case "general":
                    x = nn.DenseGeneral((2, CHANNELS // 2), **given)(x).reshape(*x.shape[:-1], CHANNELS)
                case "experts":
                    x = Experts(use_bias, self.dtype, name=f"layer_{k}")(x)
                case "conv":
                    x = nn.Conv(
                        CHANNELS, (spec["window"],), spec["strides"], feature_group_count=spec["groups"], **given
                    )(x)
                case "scan":
                    axis = stack_axis(spec, use_bias)
                    scan = nn.scan(
                        lambda module, carry: (jnp.tanh(module(carry)), None),
                        variable_axes={"params": axis, "intermediates": 0},
                        split_rngs={"params": True},
                        length=SCAN,
                    )
                    x, _ = scan(nn.Dense(CHANNELS, **given), x)
            x = jnp.tanh(x)
        return x


def stack_axis(spec, use_bias):
    """The parameters' axis of a scan; the bias has no axis 2 to put it before."""
    return min(spec["axis"], 1) if use_bias else spec["axis"]


def reference_forward(network, params, x):
    """Computes the network in NumPy.

    Returns its output and what each linear map read, as `(layer, entry, group)` to a list of `[N, T, n]`.
    """
    inputs = {}

    def dense(key, h, w, b):
        inputs.setdefault(key, []).append(h)
        return h @ w.reshape(CHANNELS, CHANNELS) + b.reshape(-1)

    for k, (spec, use_bias) in enumerate(network):
        spec, w = dict(spec), params[f"layer_{k}"]["kernel"]
        b = params[f"layer_{k}"]["bias"] if use_bias else np.zeros(1)
        match spec["kind"]:
            case "dense" | "remat" | "jit" | "general":
                x = dense((k, 0, 0), x, w, b)
            case "twice":
                x = dense((k, 0, 0), np.tanh(dense((k, 0, 0), x, w, b)), w, b)
            case "experts":
                entries = range(x.shape[1])
                x = np.stack([dense((k, t, 0), x[:, t], w[t], b[t] if use_bias else b) for t in entries], axis=1)
            case "conv":
                groups, window, stride = spec["groups"], spec["window"], spec["strides"]
                length, n = -(-x.shape[1] // stride), CHANNELS // groups
                padded = np.pad(x, ((0, 0), same_padding(x.shape[1], window, stride), (0, 0)))
                y = np.zeros((EXAMPLES, length, CHANNELS)) + b
                for g in range(groups):
                    own = np.s_[g * n : (g + 1) * n]
                    inputs[(k, 0, g)] = [x[..., own]]
                    for j in range(window):
                        y[..., own] += padded[:, j : j + stride * (length - 1) + 1 : stride, own] @ w[j, :, own]
                x = y
            case "scan":
                axis = stack_axis(spec, use_bias)
                for entry in range(SCAN):
                    bias = np.take(b, entry, axis) if use_bias else b
                    x = np.tanh(dense((k, entry, 0), x, np.take(w, entry, axis), bias))
        x = np.tanh(x)
    return x, inputs


class Reference:
    """The running statistics and the paper's step for one linear map after another."""

    def __init__(self, network, chosen):
        self.network, self.options, self.statistics, self.seen = network, chosen, {}, {}

    def absorb(self, inputs):
        for key, calls in inputs.items():
            rows = np.concatenate([call.reshape(-1, call.shape[-1]) for call in calls])
            seen = self.seen.get(key, 0)
            rho = running_decay(self.options["decay"], self.options["prior_examples"], seen, EXAMPLES)
            start = np.zeros(rows.shape[1]), np.ones(rows.shape[1])
            self.statistics[key] = absorbed(*self.statistics.get(key, start), rows, rho, self.options["variance"])
            self.seen[key] = seen + EXAMPLES

    def step(self, key, g_w, g_b):
        """`g_w` is `[window, n, m]`, `g_b` is `[m]` or None."""
        matrix = g_w.reshape(-1, g_w.shape[-1])
        q2 = batch_scale(self.options["scaling"], EXAMPLES, fan_in=len(matrix))
        eps = self.options["eps_relative"], self.options["eps"]
        new_w, new_b = bnp_step(*self.statistics[key], matrix, g_b, q2, eps)
        return new_w.reshape(g_w.shape), new_b

    def precondition(self, gradients):
        new = jax.tree.map(lambda g: np.array(g, np.float64), gradients)
        for k, (spec, use_bias) in enumerate(self.network):
            layer, spec = new[f"layer_{k}"], dict(spec)
            for key in [key for key in self.statistics if key[0] == k]:
                _, entry, group = key
                w, b = layer["kernel"], layer.get("bias")
                if spec["kind"] == "experts":
                    w, b = w[entry], None if b is None else b[entry]
                elif spec["kind"] == "scan":
                    axis = stack_axis(spec, use_bias)
                    w, b = np.moveaxis(w, axis, 0)[entry], None if b is None else np.moveaxis(b, axis, 0)[entry]
                out = np.s_[:]
                if spec["kind"] == "conv":
                    n = CHANNELS // spec["groups"]
                    out = np.s_[group * n : (group + 1) * n]
                flat = w.reshape(-1, w.shape[-2] if spec["kind"] == "conv" else CHANNELS, CHANNELS)
                g_w, g_b = self.step(key, flat[..., out], None if b is None else b.reshape(-1)[out])
                flat[..., out] = g_w
                w[...] = flat.reshape(w.shape)
                if b is not None:
                    b.reshape(-1)[out] = g_b
        return new


def frozen(network):
    return tuple((tuple(sorted(spec.items())), use_bias) for spec, use_bias in network)


def run_case(network, chosen, rest, dtype, seed):
    """Returns the parameters after three steps, by the library and by the reference."""
    network, rng = frozen(network), np.random.default_rng(seed)
    model = Net(network, dtype)
    batches = [jnp.asarray(rng.normal(1, 1, (EXAMPLES, 4, CHANNELS)), dtype) for _ in range(3)]
    params = init(model, batches[0], seed=seed)
    layers = bnp.linen.find_layers(model, batches[0])
    assert not layers.excluded
    tx, plain = (optax.chain(*first, *rest, optax.scale(-0.01)) for first in ([bnp.scale_by_bnp(layers, **chosen)], []))

    def with_output(params, x):
        y, records = bnp.linen.capture(model)({"params": params}, x)
        return y, (y, records)

    differentiate = quick_jit(gradients_and_records(with_output, lambda y: jnp.sum(jnp.square(y - 0.3)) / EXAMPLES))
    tx, plain = compiled(tx), compiled(plain)
    state, plain_state = tx.init(params), plain.init(params)
    reference, expected = Reference(network, chosen), params
    for x in batches:
        gradients, (_, records) = differentiate(params, x)
        updates, state = tx.update(gradients, state, params, intermediates=records)
        params = optax.apply_updates(params, updates)
        chex.assert_tree_all_finite((params, state))

        gradients, (y, _) = differentiate(expected, x)
        output, inputs = reference_forward(network, jax.tree.map(np.float64, expected), np.float64(x))
        np.testing.assert_allclose(y, output, rtol=1e-9 if dtype is np.float64 else 1e-4, atol=1e-4)
        reference.absorb(inputs)
        stepped = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), reference.precondition(gradients))
        updates, plain_state = plain.update(stepped, plain_state, expected)
        expected = optax.apply_updates(expected, updates)
    return params, expected


def test_random_networks_equal_the_reference(request):
    @settings(max_examples=request.config.getoption("--fuzz-cases"), suppress_health_check=list(HealthCheck))
    @given(networks, options, rests, st.sampled_from([np.float64, np.float64, np.float32]), st.integers(0, 2**16))
    def run(network, chosen, rest, dtype, seed):
        with jax.numpy_dtype_promotion("standard"):  # Optax's clipping and Adam
            params, expected = run_case(network, chosen, rest, dtype, seed)
        tolerance = 1e-7 if dtype is np.float64 else 2e-2
        chex.assert_trees_all_close(params, expected, rtol=tolerance, atol=tolerance)

    run()
