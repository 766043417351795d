"""Models of the shape of other people's, each with its source: reinforcement learning and recurrent networks.

Others are in test_in_the_wild.py.
"""

import functools
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    Dense,
    assert_same,
    assert_step,
    flatten,
    init,
    inputs_of,
    normal,
    reasons,
    recorded,
    step_of,
    weigh,
)

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")

GRU, LSTM = (functools.partial(cls, 4, param_dtype=float) for cls in (nn.GRUCell, nn.LSTMCell))
SHARED = {"variable_broadcast": "params", "variable_axes": {"intermediates": 0}, "split_rngs": {"params": False}}


def inputs_of_gates(cell, params, x, valid, carry=None, resets=None):
    """Returns what the gates of a cell read in the valid steps of `x`, `[examples, time, features]`, and the outputs.

    The gates of Flax's cells are called `i.` where they read the input, `h.` where they read the state before it.
    """
    carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape) if carry is None else carry

    @jax.jit
    def unroll(carry, x):
        states, outputs = [], []
        for t in range(x.shape[1]):
            if resets is not None:
                carry = jnp.where(resets[:, t, None], 0, carry)
            states.append(carry[-1] if isinstance(carry, tuple) else carry)
            carry, y = cell.apply({"params": params}, carry, x[:, t])
            outputs.append(y)
        return jnp.stack(states, 1), jnp.stack(outputs, 1)

    states, outputs = map(np.asarray, unroll(carry, x))
    rows = {"i": [np.asarray(x)[valid]], "h": [states[valid]]}
    return {gate: rows[gate[0]] for gate in params}, outputs


# Reinforcement learning.


class ActorCritic(nn.Module):
    """purejaxrl's PPO-RNN: `[time, environments, features]`, a GRU scanned over time that begins anew at resets."""

    time_axis: int = 0

    @nn.compact
    def __call__(self, observations, resets):
        x = nn.relu(Dense(4, name="embedding")(observations))

        def step(cell, carry, inputs):
            x, resets = inputs
            return cell(jnp.where(resets[:, None], 0, carry), x)

        scan = nn.scan(step, in_axes=self.time_axis, out_axes=self.time_axis, **SHARED)
        _, x = scan(GRU(name="cell"), jnp.zeros((x.shape[1 - self.time_axis], 4)), (x, resets))
        return Dense(2, name="actor")(x), Dense(1, name="critic")(x)


def test_time_major_batches_count_environments_as_examples():
    x, resets = normal(0, 3, 5, 2), jnp.asarray(np.random.default_rng(0).random((3, 5)) < 0.3)
    time_major, batch_major = ActorCritic(), ActorCritic(time_axis=1)
    params, layers = init(time_major, x, resets), bnp.linen.find_layers(time_major, x, resets)
    gradients, updates = step_of(layers, recorded(time_major, examples=5), params, x, resets)

    by_hand = nn.relu(x @ params["embedding"]["kernel"]).swapaxes(0, 1)  # biases are zero
    everywhere = np.ones((5, 3), bool)
    gates, outputs = inputs_of_gates(GRU(), params["cell"], by_hand, everywhere, resets=resets.T)
    inputs = {"embedding": [x], "actor": [outputs], "critic": [outputs]}
    inputs |= {f"cell/{gate}": rows for gate, rows in gates.items()}
    assert_step(layers, gradients, updates, {path: (rows, 5) for path, rows in inputs.items()})

    swapped = (x.swapaxes(0, 1), resets.T)
    loss = lambda outputs: weigh([y.swapaxes(0, 1) for y in outputs])  # noqa: E731
    layers = bnp.linen.find_layers(batch_major, *swapped)
    assert_same(updates, step_of(layers, recorded(batch_major), params, *swapped, loss=loss)[1])


class Agents(nn.Module):
    """A network under `nn.vmap` over agents, as in JaxMARL: `[examples, agents, features]`."""

    shared: bool

    @nn.compact
    def __call__(self, x):
        axes = {"params": None if self.shared else 0, "intermediates": 0}
        agents = nn.vmap(nn.Dense, variable_axes=axes, split_rngs={"params": not self.shared}, in_axes=-2, out_axes=-2)
        return agents(4, param_dtype=float, name="head")(x)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seen", [(), (1,), (8,)])
def test_what_the_search_saw_does_not_decide_how_many_examples_a_batch_of_agents_has(shared, seen):
    """The first is what such programs make parameters with: an observation without an axis of examples."""
    model, x = Agents(shared), normal(0, 5, 3, 2)
    layers = bnp.linen.find_layers(model, normal(1, *seen, 3, 2))
    params = init(model, x)
    gradients, updates = step_of(layers, recorded(model), params, x)
    if shared:
        assert_step(layers, gradients, updates, {"head": ([x], 5)})
    for agent in range(0 if shared else 3):
        one = (jax.tree.map(lambda leaf, k=agent: leaf[k], tree) for tree in (gradients, updates))
        assert_step(layers, *one, {"head": ([x[:, agent]], 5)})


class MLP(nn.Module):
    """brax's network: layers `hidden_0`, `hidden_1`."""

    outputs: int

    @nn.compact
    def __call__(self, x):
        return Dense(self.outputs, name="hidden_1")(nn.swish(Dense(4, name="hidden_0")(x)))


@flax.struct.dataclass
class PPONetworkParams:
    """The parameters of brax's PPO."""

    policy: Any
    value: Any


class Networks(NamedTuple):
    """The same as others write it."""

    policy: Any
    value: Any


@pytest.mark.parametrize("container", [PPONetworkParams, Networks, dict])
def test_two_networks_in_one_tree(container):
    """brax's PPO loss, on `[time, batch, features]`; the value at the end of the batch has no gradient."""
    policy, value, x = MLP(3), MLP(1), normal(0, 4, 5, 2)
    params = container(policy={"params": init(policy, x)}, value={"params": init(value, x, seed=1)})
    by_name = (lambda tree: tree) if container is dict else vars if container is PPONetworkParams else Networks._asdict
    layers = bnp.linen.find_layers(policy, x).under("policy", "params")
    layers |= bnp.linen.find_layers(value, x).under("value", "params")

    def run(params, x):
        params = by_name(params)
        logits, of_policy = bnp.linen.capture(policy, examples=5)(params["policy"], x)
        values, of_value = bnp.linen.capture(value, examples=5)(params["value"], x)
        targets = jax.lax.stop_gradient(values[1:] + value.apply(params["value"], x[-1])[None])
        return (logits, values[1:] - targets), {"policy": {"params": of_policy}, "value": {"params": of_value}}

    gradients, updates = step_of(layers, run, params, x)
    expected = {}
    for name, model in (("policy", policy), ("value", value)):
        inputs = inputs_of(("hidden_0", "hidden_1"), model, by_name(params)[name]["params"], x)
        expected |= {f"{name}/params/{path}": (rows, 5) for path, rows in inputs.items()}
    assert_step(layers, by_name(gradients), by_name(updates), expected)
    assert type(updates) is container


def test_layers_of_two_networks_may_end_as_records_do():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dense(2, name="to")(jnp.tanh(Dense(3, name="to_input")(x)))

    model, x = Net(), normal(0, 5, 2)
    params = {"policy": init(model, x), "value": init(model, x, seed=1)}
    found = bnp.linen.find_layers(model, x)

    def run(params, x):
        results = {name: bnp.linen.capture(model)({"params": own}, x) for name, own in params.items()}
        return [output for output, _ in results.values()], {name: records for name, (_, records) in results.items()}

    layers = found.under("policy") | found.under("value")
    gradients, updates = step_of(layers, run, params, x)
    expected = {}
    for name, own in params.items():
        inputs = inputs_of(("to", "to_input"), model, own, x)
        expected |= {f"{name}/{path}": (rows, 5) for path, rows in inputs.items()}
    assert_step(layers, gradients, updates, expected)


@pytest.mark.parametrize("prefix", [("params",), ("agent", "params")])
def test_parameters_beneath_a_prefix_are_recognized(prefix):
    """purejaxrl, sbx and many guides train `{"params": params}` whole."""
    model, x = MLP(3), normal(0, 5, 2)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    nest = lambda tree: functools.reduce(lambda tree, key: {key: tree}, reversed(prefix), tree)  # noqa: E731
    unnest = lambda tree: functools.reduce(lambda tree, key: tree[key], prefix, tree)  # noqa: E731
    run = lambda params, x: bnp.linen.capture(model)({"params": unnest(params)}, x)  # noqa: E731
    gradients, updates = step_of(layers, run, nest(params), x)
    expected = {path: (rows, 5) for path, rows in inputs_of(layers, model, params, x).items()}
    assert_step(layers, unnest(gradients), unnest(updates), expected)


class Critic(nn.Module):
    """sbx's ContinuousCritic."""

    @nn.compact
    def __call__(self, observations, actions):
        x = jnp.concatenate([observations, actions], -1)
        return Dense(1, name="value")(nn.relu(Dense(4, name="hidden")(x)))


def vector_critic(**more):
    """sbx's VectorCritic: critics under `nn.vmap`."""
    axes, rngs = {"params": 0, **more}, {"params": True}
    return nn.vmap(Critic, variable_axes=axes, split_rngs=rngs, in_axes=None, out_axes=0, axis_size=2)()


def test_critics_under_vmap_need_an_axis_of_records():
    args = normal(0, 5, 3), normal(1, 5, 2)
    model = vector_critic()
    params, layers = init(model, *args), bnp.linen.find_layers(model, *args)
    assert not layers
    assert reasons(layers).keys() == flatten(params).keys()
    assert {"'intermediates': 0" in reason for reason in reasons(layers).values()} == {True}
    with pytest.raises(ValueError, match=r"hidden.* add 'intermediates': 0 to its variable_axes"):
        jax.eval_shape(recorded(model), params, *args)

    model = vector_critic(intermediates=0)
    layers = bnp.linen.find_layers(model, *args)
    gradients, updates = step_of(layers, recorded(model), params, *args)
    for critic in range(2):
        own, g, u = (jax.tree.map(lambda leaf, k=critic: leaf[k], tree) for tree in (params, gradients, updates))
        expected = {path: (rows, 5) for path, rows in inputs_of(layers, Critic(), own, *args).items()}
        assert_step(layers, g, u, expected)


# Recurrent networks.

LENGTHS = np.array([4, 2, 0, 3, 1])  # of five sequences; one is empty
VALID = np.arange(4) < LENGTHS[:, None]
N = 4


class Encoder(nn.Module):
    """Flax's sst2, written with `nn.RNN`: sentences of several lengths, padded."""

    cell: Any
    options: Any = ()

    @nn.compact
    def __call__(self, x, lengths):
        return nn.RNN(self.cell(), **dict(self.options), name="rnn")(x, seq_lengths=lengths)


@pytest.mark.parametrize("told_by", ["lengths", "mask"])
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (GRU, {}),
        (GRU, {"time_major": True}),
        (LSTM, {"reverse": True}),
        (LSTM, {"reverse": True, "keep_order": True, "time_major": True}),
    ],
)
def test_padded_steps_do_not_count(cell, options, told_by):
    model, x, valid = Encoder(cell, tuple(options.items())), normal(0, 5, 4, 3), VALID
    turn = (lambda a: a.swapaxes(0, 1)) if "time_major" in options else (lambda a: a)
    args = turn(x), jnp.asarray(LENGTHS) if told_by == "lengths" else None
    mask = None if told_by == "lengths" else jnp.asarray(turn(VALID))
    params, layers = init(model, *args), bnp.linen.find_layers(model, *args)
    if "reverse" in options:  # which leaves padding at the end, if the RNN knows of it
        x, valid = (reversed_within(x, LENGTHS), VALID) if mask is None else (x[:, ::-1], VALID[:, ::-1])
    ((where, own),) = params.items()
    gates, _ = inputs_of_gates(cell(), own, x, valid)
    expected = {f"{where}/{gate}": (rows, N) for gate, rows in gates.items()}
    assert_step(layers, *step_of(layers, recorded(model, mask=mask), params, *args), expected)


class Decoder(nn.RNNCellBase):
    """The cell of Flax's seq2seq, with a layer for the next token."""

    @nn.compact
    def __call__(self, carry, x):
        carry, y = LSTM(name="lstm")(carry, x)
        return carry, Dense(3, name="logits")(y)

    @property
    def num_feature_axes(self):
        return 1


class Seq2Seq(nn.Module):
    """Flax's seq2seq: the decoder starts where the encoder ends."""

    @nn.compact
    def __call__(self, source, target, lengths):
        state, _ = nn.RNN(LSTM(name="encoder"), return_carry=True)(source, seq_lengths=lengths)
        return nn.RNN(Decoder(name="decoder"), split_rngs={"params": False})(target, initial_carry=state)


def test_encoder_and_decoder_each_count_their_valid_steps():
    model, source, target = Seq2Seq(), normal(0, 5, 4, 3), normal(1, 5, 6, 2)
    target_valid = np.arange(6) < np.array([6, 2, 3, 1, 4])[:, None]
    args = source, target, jnp.asarray(LENGTHS)
    params, layers = init(model, *args), bnp.linen.find_layers(model, *args)
    gates, _ = inputs_of_gates(LSTM(), params["encoder"], source, VALID)
    expected = {f"encoder/{gate}": (rows, N) for gate, rows in gates.items()}
    encoder = nn.RNN(LSTM(parent=None), return_carry=True)
    carry, _ = jax.jit(encoder.apply)({"params": {"cell": params["encoder"]}}, source, seq_lengths=args[2])
    gates, outputs = inputs_of_gates(LSTM(), params["decoder"]["lstm"], target, target_valid, carry)
    expected |= {f"decoder/lstm/{gate}": (rows, 5) for gate, rows in gates.items()}
    expected |= {"decoder/logits": ([outputs[target_valid]], 5)}
    run = recorded(model, mask=[jnp.asarray(VALID), jnp.asarray(target_valid)])
    loss = lambda logits: weigh(jnp.where(target_valid[..., None], logits, 0.0))  # noqa: E731
    assert_step(layers, *step_of(layers, run, params, *args, loss=loss), expected)


class Bidirectional(nn.Module):
    """Flax's sst2: one LSTM reads a sentence forwards, another backwards."""

    @nn.compact
    def __call__(self, x, lengths):
        rnns = nn.RNN(LSTM(name="forward")), nn.RNN(LSTM(name="backward"))
        return Dense(2, name="head")(nn.Bidirectional(*rnns)(x, seq_lengths=lengths))


def reversed_within(x, lengths):
    """The padding stays at the end."""
    pairs = zip(np.asarray(x), lengths, strict=True)
    return jnp.asarray(np.stack([np.concatenate([row[:n][::-1], row[n:]]) for row, n in pairs]))


def test_both_directions_count_their_valid_steps():
    model, x = Bidirectional(), normal(0, 5, 4, 3)
    args = x, jnp.asarray(LENGTHS)
    params, layers = init(model, *args), bnp.linen.find_layers(model, *args)
    forward, ahead = inputs_of_gates(LSTM(), params["forward"], x, VALID)
    backward, back = inputs_of_gates(LSTM(), params["backward"], reversed_within(x, LENGTHS), VALID)
    expected = {f"forward/{gate}": (rows, N) for gate, rows in forward.items()}
    expected |= {f"backward/{gate}": (rows, N) for gate, rows in backward.items()}
    both = np.concatenate([ahead, reversed_within(back, LENGTHS)], -1)
    expected["head"] = [both[VALID]], N
    # The lengths are the RNN's own; the layer after it is told.
    run = recorded(model, mask=jnp.asarray(VALID))
    loss = lambda logits: weigh(jnp.where(VALID[..., None], logits, 0.0))  # noqa: E731
    assert_step(layers, *step_of(layers, run, params, *args, loss=loss), expected)
