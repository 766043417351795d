"""Random small networks and random chains: three steps equal those of a reference written without the library.

The reference computes the network from its parameters by hand (scans and recurrent networks unrolled, convolutions as
sums over their window), keeps what of each layer's raw inputs counts, and takes the paper's steps in NumPy. What has to
be excluded keeps its gradient. `--fuzz-cases` runs more.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from fuzz_layers import CHANNELS, COMPUTED, SCAN, Net, stack_axis
from helpers import compiled, gradients_and_records, init
from oracles import absorbed, batch_scale, bnp_step, running_decay, same_padding

import bnp_optax as bnp

EXAMPLES, STEPS = 4, 4  # few shapes, so that their operations are compiled once
TOLD = 6  # N that a time-major pass is told; no axis has this size

pytestmark = pytest.mark.usefixtures("x64")

# The layers that are to be excluded, with a part of the reason.
EXCLUDED = {
    **dict.fromkeys(COMPUTED, "computed from the parameter"),
    "applied": "explicit parameters",
    "vmap": "transform of JAX",
    "map": "transform of JAX",
}
# Everything that is drawn, by name.
LAYERS = {
    **{kind: {} for kind in ("dense", "twice", "general", "remat", "jit", "experts", "reads", *EXCLUDED)},
    "scan": {"axis": [0, 1, 2]},
    "conv": {"groups": [1, 2, 4], "strides": [1, 2], "window": [1, 2, 3]},
    "rnn": {"reverse": [False, True], "lengths": [False, True]},
    # A layer on tokens and on their mean; a function says that the call with an input of this rank does not count.
    "pooled": {"skipped_ndim": [None, 2, 3]},
}
PASSES = {
    "counting": ["all", "tokens", "weights", "examples", "time_major"],
    "parts": [1, 2],  # micro-batches, whose records are added
    "chosen": [False, True],  # capture(model, layers=layers)
}
OPTIONS = {
    "variance": ["mixture", "batch"],
    "scaling": [12.0, "examples", "none"],
    "prior_examples": [None, 0, 8, 128],
    "decay": [0.0, 0.5, 0.99],
    "eps_relative": [0.0, 1e-2],
    "eps": [1e-4, 1e-2],
}
RESTS = [
    optax.clip_by_global_norm(1.0),
    optax.add_decayed_weights(1e-2),
    optax.trace(0.9),
    optax.trace(0.9, nesterov=True),
    optax.scale_by_adam(),
    optax.clip(0.5),
]


def draw(rng, choices):
    return {name: values[rng.integers(len(values))] for name, values in choices.items()}


def draw_network(rng):
    kinds = []
    while EXCLUDED.keys() >= set(kinds):  # at least one layer is preconditioned
        kinds = rng.choice([*LAYERS, "rnn", "pooled"], rng.integers(1, 4)).tolist()  # these twice, as they count most
    return tuple((FrozenDict(kind=kind, **draw(rng, LAYERS[kind])), bool(rng.integers(2))) for kind in kinds)


def masks_of(counting, lengths, rng):
    """Returns the masks of a padded batch by the leading axes of the inputs that they are for."""
    if counting in ("all", "time_major"):
        return {}
    masks = {(EXAMPLES,): lengths > 0}
    if counting != "examples":
        for shape in ((EXAMPLES, steps) for steps in (1, 2, STEPS)):
            masks[shape] = (np.arange(shape[1]) < lengths[:, None]) & (rng.random(shape) < 0.8)
    if counting == "weights":
        masks = {shape: mask * np.resize([0.5, 1.0, 1.5], shape) for shape, mask in masks.items()}
    return masks


class Map(NamedTuple):
    """A linear map: an entry of the stack along an axis of a layer's parameters, and a group of the outputs."""

    layer: str
    entry: int | None = None
    axis: int = 0
    group: int = 0
    groups: int = 1

    @property
    def outputs(self):
        size = CHANNELS // self.groups
        return np.s_[self.group * size : (self.group + 1) * size]

    def weights(self, tree):
        """Returns views of its part of the kernel, `[window, n, m]`, and of the bias, `[m]` or None."""
        own = [tree[f"{self.layer}/kernel"], tree.get(f"{self.layer}/bias")]
        if self.entry is not None:
            own = [None if leaf is None else np.moveaxis(leaf, self.axis, 0)[self.entry] for leaf in own]
        kernel, bias = own
        kernel = kernel.reshape(-1, CHANNELS // self.groups, CHANNELS)[..., self.outputs]
        return kernel, None if bias is None else bias.reshape(-1)[self.outputs]


class Pass:
    """Computes the network in NumPy; `inputs` holds for each map and call the rows that count, and N."""

    def __init__(self, network, params, time_axis, lengths, masks):
        self.network, self.params, self.time_axis, self.lengths = network, params, time_axis, lengths
        self.masks, self.inputs = masks, {}

    def counts(self, h):
        """Returns the weight of each position of an input."""
        if not self.masks:
            return np.ones(h.shape[:-1])
        mask = self.masks.get(h.shape[:-1], self.masks[(EXAMPLES,)])
        return np.broadcast_to(mask.reshape(mask.shape + (1,) * (h.ndim - 1 - mask.ndim)), h.shape[:-1])

    def read(self, own, h, counts=None, examples=None):
        """Keeps an input; as weights are halves, twice as many copies of a row have its share."""
        counts = self.counts(h) if counts is None else counts
        examples = np.count_nonzero(counts.reshape(len(h), -1).any(1)) if examples is None else examples
        rows = np.repeat(h.reshape(-1, h.shape[-1]), np.int64(2 * counts).ravel(), axis=0)
        told = self.time_axis == 0 and len(rows) > 0
        self.inputs.setdefault(own, []).append((rows, TOLD if told else examples))

    def multiply(self, own, h):
        """Computes what is not recorded."""
        (w,), b = own.weights(self.params)
        return h @ w + (0 if b is None else b)

    def linear(self, own, h, *counted):
        self.read(own, h, *counted)
        return self.multiply(own, h)

    def run(self, x):
        for k, (spec, use_bias) in enumerate(self.network):
            own = Map(f"layer_{k}")
            match spec["kind"]:
                case "dense" | "remat" | "jit" | "general":
                    x = self.linear(own, x)
                case "twice":
                    x = self.linear(own, np.tanh(self.linear(own, x)))
                case "experts":
                    counts = self.counts(x)
                    maps = [own._replace(entry=t) for t in range(x.shape[1])]
                    x = np.stack([self.linear(m, x[:, t], counts[:, t]) for t, m in enumerate(maps)], axis=1)
                case "reads":
                    x = np.tanh(self.linear(own, x)) @ self.params[f"layer_{k}/kernel"].T
                case "pooled":
                    calls = x, x.mean(self.time_axis)
                    for h in calls:
                        if h.ndim != spec["skipped_ndim"]:
                            self.read(own, h)
                    tokens, mean = (self.multiply(own, h) for h in calls)
                    x = tokens + np.expand_dims(mean, self.time_axis)
                case "applied":
                    x = np.tanh(self.linear(Map(f"layer_{k}_other"), np.tanh(self.multiply(own, x))))
                    x = self.multiply(own, x)
                case "vmap" | "map":
                    x = self.multiply(own, x)
                case "conv":
                    x = self.convolve(own, spec, x)
                case "rnn":
                    x = self.recur(f"layer_{k}", spec, x)
                case "scan":
                    for entry in range(SCAN):
                        x = np.tanh(self.linear(own._replace(entry=entry, axis=stack_axis(spec, use_bias)), x))
                case how:
                    (w,), b = own.weights(self.params)
                    x = x @ COMPUTED[how](w) + (0 if b is None else b)
            x = np.tanh(x)
        return x

    def convolve(self, own, spec, x):
        groups, window, stride = spec["groups"], spec["window"], spec["strides"]
        length = -(-x.shape[1] // stride)
        padded = np.pad(x, ((0, 0), same_padding(x.shape[1], window, stride), (0, 0)))
        y = np.zeros((len(x), length, CHANNELS))
        for group in range(groups):
            own = own._replace(group=group, groups=groups)
            w, b = own.weights(self.params)
            self.read(own, x[..., own.outputs])
            y[..., own.outputs] += 0 if b is None else b
            for j in range(window):
                y[..., own.outputs] += padded[:, j : j + stride * (length - 1) + 1 : stride, own.outputs] @ w[j]
        return y

    def recur(self, name, spec, x):
        x, counts = (each.swapaxes(0, 1 - self.time_axis) for each in (x, self.counts(x)))  # examples first
        lengths = np.full(len(x), x.shape[1])
        if spec["lengths"]:
            lengths = np.minimum(self.lengths[: len(x)], lengths)
            counts = np.where(np.arange(x.shape[1]) < lengths[:, None], counts, 0)
        if spec["reverse"]:  # padding stays behind
            x, counts = (
                np.stack([np.concatenate([row[:n][::-1], row[n:][::-1]]) for row, n in zip(each, lengths, strict=True)])
                for each in (x, counts)
            )
        h, outputs = np.zeros((len(x), CHANNELS)), []
        for t in range(x.shape[1]):
            counted = counts[:, t], np.count_nonzero(counts.any(1))  # the examples of the sequence, not of the step
            h = np.tanh(self.linear(Map(f"{name}/i"), x[:, t], *counted) + self.linear(Map(f"{name}/h"), h, *counted))
            outputs.append(h)
        return np.stack(outputs, axis=self.time_axis)


class Reference:
    """The running statistics and the paper's step for one linear map after another."""

    def __init__(self, options):
        self.options, self.statistics, self.seen, self.examples = options, {}, {}, {}

    def absorb(self, parts):
        """Absorbs a batch: what a map reads again is of the same examples, what another part reads is of others."""
        for own in parts[0].inputs:
            rows = np.concatenate([rows for part in parts for rows, _ in part.inputs[own]])
            examples = sum(max(n for _, n in part.inputs[own]) for part in parts)
            start = np.zeros(rows.shape[1]), np.ones(rows.shape[1])
            before, seen = self.statistics.setdefault(own, start), self.seen.setdefault(own, 0)
            if examples:
                rho = running_decay(self.options["decay"], self.options["prior_examples"], seen, examples)
                self.statistics[own] = absorbed(*before, rows, rho, self.options["variance"])
                self.seen[own] = seen + examples
                self.examples[own] = examples

    def precondition(self, gradients):
        new = {path: np.array(g, np.float64) for path, g in flatten_dict(gradients, sep="/").items()}
        for own, statistics in self.statistics.items():
            g_w, g_b = own.weights(new)
            matrix = g_w.reshape(-1, g_w.shape[-1])
            examples = self.examples.get(own)  # of the last batch that counted
            q2 = 1.0 if examples is None else batch_scale(self.options["scaling"], examples, fan_in=len(matrix))
            eps = self.options["eps_relative"], self.options["eps"]
            new_w, new_b = bnp_step(*statistics, matrix, g_b, q2, eps)
            g_w[...] = new_w.reshape(g_w.shape)
            if g_b is not None:
                g_b[...] = new_b
        return unflatten_dict(new, sep="/")


def check_excluded(network, layers, params):
    """Checks that what is to be excluded is, with its reason, and nothing else."""
    reasons = {"/".join(other.path): other.reason for other in layers.excluded}
    expected = {f"layer_{k}": EXCLUDED.get(spec["kind"]) for k, (spec, _) in enumerate(network)}
    for path in flatten_dict(params, sep="/"):
        reason = expected.get(path.split("/")[0])
        assert (path in reasons) == (reason is not None), (path, reasons)
        assert reason is None or reason in reasons[path]


def differentiator(model, layers, passing):
    """Returns `(params, batch) -> gradients, records, outputs` with the mean of gradients and the sum of records."""
    skipped = {f"layer_{k}": spec.get("skipped_ndim") for k, (spec, _) in enumerate(model.network)}

    def with_output(params, x, lengths, masks):
        def mask(name, x):
            if x.ndim == skipped.get(name):
                return False
            return masks.get(x.shape[:-1], masks[(EXAMPLES,)]) if masks else None

        capture = bnp.linen.capture(
            model,
            layers=layers if passing["chosen"] else None,
            mask=mask if any(skipped.values()) else list(masks.values()) or None,
            examples=TOLD if model.time_axis == 0 else None,
        )
        y, records = capture({"params": params}, x, lengths)
        return y, (y, records)

    of_part = jax.jit(gradients_and_records(with_output, lambda y: jnp.sum(jnp.square(y - 0.3)) / EXAMPLES))

    def differentiate(params, batch):
        gradients, others = zip(*(of_part(params, part) for part in batch), strict=True)
        outputs, records = zip(*others, strict=True)
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(batch), *gradients)
        return mean, jax.tree.map(lambda *leaves: sum(leaves), *records), outputs

    return differentiate


def draw_batches(rng, passing, dtype):
    """Returns three batches of one or two parts: inputs, lengths, and masks."""

    def draw_part():
        x = rng.normal(1, 1, (EXAMPLES, STEPS, CHANNELS))
        lengths = rng.integers(0, rng.integers(1, STEPS + 2), EXAMPLES)  # the longest may be 0
        return jnp.asarray(x, dtype), lengths, masks_of(passing["counting"], lengths, rng)

    return [[draw_part() for _ in range(passing["parts"])] for _ in range(3)]


def train(model, layers, params, batches, passing, options, rest):
    """Returns the parameters after a step on each batch, by the library and by the reference."""
    differentiate = differentiator(model, layers, passing)
    tx, plain = (
        compiled(optax.chain(*first, *rest, optax.scale(-0.01)))
        for first in ([bnp.scale_by_bnp(layers, **options)], [])
    )
    state, plain_state = tx.init(params), plain.init(params)
    reference, expected = Reference(options), params
    for batch in batches:
        gradients, records, _ = differentiate(params, batch)
        updates, state = tx.update(gradients, state, params, intermediates=records)
        params = optax.apply_updates(params, updates)
        chex.assert_tree_all_finite((params, state))

        gradients, _, outputs = differentiate(expected, batch)
        weights = flatten_dict(jax.tree.map(np.float64, expected), sep="/")
        parts = [Pass(model.network, weights, model.time_axis, lengths, masks) for _, lengths, masks in batch]
        for (x, _, _), part, y in zip(batch, parts, outputs, strict=True):
            rtol = 1e-9 if model.dtype is np.float64 else 1e-4
            np.testing.assert_allclose(y, part.run(np.float64(x)), rtol=rtol, atol=1e-4)
        reference.absorb(parts)
        stepped = jax.tree.map(lambda leaf: jnp.asarray(leaf, model.dtype), reference.precondition(gradients))
        updates, plain_state = plain.update(stepped, plain_state, expected)
        expected = optax.apply_updates(expected, updates)
    return params, expected


def pytest_generate_tests(metafunc):
    metafunc.parametrize("seed", range(metafunc.config.getoption("--fuzz-cases")))


def test_a_random_network_equals_the_reference(seed):
    rng = np.random.default_rng(seed)
    network, passing, options = draw_network(rng), draw(rng, PASSES), draw(rng, OPTIONS)
    rest = [RESTS[k] for k in rng.integers(len(RESTS), size=rng.integers(4))]
    dtype = np.float32 if rng.random() < 1 / 3 else np.float64
    model = Net(network, dtype, time_axis=0 if passing["counting"] == "time_major" else 1)
    print(model, passing, options)  # which pytest shows if the test fails
    batches = draw_batches(rng, passing, dtype)
    x, lengths, _ = batches[0][0]
    with jax.numpy_dtype_promotion("standard"):  # Optax's clipping and Adam, and kernels that are masked
        params, layers = init(model, x, lengths, seed=seed), bnp.linen.find_layers(model, x, lengths)
        check_excluded(network, layers, params)
        params, expected = train(model, layers, params, batches, passing, options, rest)
    tolerance = 1e-7 if dtype is np.float64 else 2e-2
    chex.assert_trees_all_close(params, expected, rtol=tolerance, atol=tolerance)
