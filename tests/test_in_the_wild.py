"""Models of the shape of other people's, each with its source: vision, language and graphs.

Every kernel is covered, and its step that of an independent computation in float64, or excluded with the true reason.
Reinforcement learning and recurrent networks are in test_in_the_wild_rl.py, NNX in test_in_the_wild_nnx.py, what is odd
about kernels and gradients in test_in_the_wild_others.py.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Dense, assert_step, flatten, init, inputs_of, normal, reasons, recorded, step_of, weigh

import bnp_optax as bnp

pytestmark = pytest.mark.usefixtures("x64")

Embed = functools.partial(nn.Embed, param_dtype=float)
# without an option they promote float64 to float32, which strict promotion refuses
LayerNorm = functools.partial(nn.LayerNorm, param_dtype=float, force_float32_reductions=False)
GroupNorm = functools.partial(nn.GroupNorm, param_dtype=float, force_float32_reductions=False)
Attention = functools.partial(nn.MultiHeadDotProductAttention, num_heads=2, param_dtype=float)


# Vision.


class StdConv(nn.Conv):
    """The convolution of BiT (big_vision, vision_transformer, scenic), whose `param` standardizes the kernel."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name == "kernel":
            value = value - value.mean((0, 1, 2), keepdims=True)
            value = value / (value.std((0, 1, 2), keepdims=True) + 1e-5)
        return value


class BiT(nn.Module):
    """big_vision's ResNet: standardized convolutions; the head is applied to the map, and to its mean."""

    @nn.compact
    def __call__(self, images):
        x = StdConv(4, (3, 3), strides=2, use_bias=False, param_dtype=float, name="conv_root")(images)
        x = nn.relu(GroupNorm(2, name="gn_root")(x))
        head = Dense(3, name="head")
        out = {"logits_2d": head(x)}
        return head(x.mean((1, 2))), out


class ViT(nn.Module):
    """big_vision's ViT: the head is applied to every patch, and to their mean."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (2, 2), strides=2, padding="VALID", param_dtype=float, name="embedding")(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x += self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]), float)
        x += Attention(name="attention")(LayerNorm(name="norm")(x))
        x += Dense(4, name="down")(nn.gelu(Dense(6, name="up")(x)))
        head = Dense(3, name="head")
        out = {"logits_2d": head(x)}
        return head(x.mean(1)), out


@pytest.mark.parametrize("all_calls", [False, True])
@pytest.mark.parametrize("model", [ViT(), BiT()])
def test_a_head_that_is_called_twice_counts_the_call_that_the_loss_uses(model, all_calls):
    x = normal(0, 5, 4, 4, 3)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    (row,) = [line for line in str(layers).splitlines() if "called 2 times" in line]
    assert "head" in row
    if isinstance(model, BiT):
        assert "computed" in reasons(layers)["conv_root/kernel"]
    pooled_only = lambda name, x: x.ndim == 2 if name == "head" else None  # noqa: E731
    run = recorded(model, mask=None if all_calls else pooled_only)
    inputs = inputs_of(layers, model, params, x)
    if not all_calls:
        inputs["head"] = inputs["head"][1:]
    expected = {path: (calls, 5) for path, calls in inputs.items()}
    assert_step(layers, *step_of(layers, run, params, x, loss=lambda output: weigh(output[0])), expected)


class FactorizedEncoder(nn.Module):
    """scenic's ViViT: what encodes a frame is under `jax.vmap` over frames, what encodes the frames is not."""

    @nn.compact
    def __call__(self, video):  # [examples, frames, patches, features]
        x = Dense(4, name="embedding")(video)

        def encode(x, name):
            x += Attention(name=f"{name}_attention")(x)
            return Dense(4, name=f"{name}_mlp")(x).mean(1)

        frames = jax.vmap(functools.partial(encode, name="spatial"), in_axes=1, out_axes=1)(x)
        return Dense(3, name="head")(encode(frames, "temporal"))


class FrameByFrame(nn.Module):
    """The same idea by another of JAX's loops over frames."""

    loop: str

    def setup(self):
        self.embedding, self.spatial, self.head = Dense(4), Dense(4), Dense(3)

    def __call__(self, video):
        x = self.embedding(video).swapaxes(0, 1)
        if self.is_initializing():
            self.spatial(x[0])
        if self.loop == "vmap":
            x = jax.vmap(self.spatial)(x)
        elif self.loop == "map":
            x = jax.lax.map(self.spatial, x)
        else:
            _, x = jax.lax.scan(lambda carry, x: (jnp.tanh(self.spatial(carry + x)),) * 2, x[0], x)
        return self.head(x.mean((0, 2)))


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        (FactorizedEncoder(), False),
        (FrameByFrame("vmap"), True),
        (FrameByFrame("map"), False),
        (FrameByFrame("scan"), True),
    ],
)
def test_layers_under_a_transform_of_jax_are_excluded_and_the_rest_trains(model, chosen):
    x = normal(0, 5, 3, 2, 4)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    assert reasons(layers).keys() == {path for path in flatten(params) if path.startswith("spatial")}
    assert all("transform of JAX" in reason for reason in reasons(layers).values())
    run = recorded(model, layers=layers) if chosen else recorded(model)
    expected = {path: (calls, 5) for path, calls in inputs_of(layers, model, params, x).items()}
    assert_step(layers, *step_of(layers, run, params, x), expected)
    _, records = jax.eval_shape(run, params, x)
    assert set(records) == set(layers)


# Language.


class Feedforward(nn.Module):
    """A block that may be compiled apart."""

    @nn.compact
    def __call__(self, x):
        return Dense(4, name="down")(nn.relu(Dense(6, name="up")(x)))


class LanguageModel(nn.Module):
    """Flax's lm1b: a decoder whose tokens 0 are padding. Others compute its blocks anew for the gradient."""

    lift: Any = None

    @nn.compact
    def __call__(self, tokens):
        x, valid = Embed(7, 4, name="embedding")(tokens), tokens > 0
        mask = nn.combine_masks(nn.make_attention_mask(valid, valid), nn.make_causal_mask(tokens))
        x += Attention(name="attention")(LayerNorm(name="norm_1")(x), mask=mask)
        block = Feedforward if self.lift is None else self.lift(Feedforward)
        x += block(name="mlp")(LayerNorm(name="norm_2")(x))
        return jnp.where(valid[..., None], Dense(7, name="logits")(x), 0.0)


# The last example is padding as a whole, as in the last batch of an epoch.
TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [2, 6, 5, 0, 0], [3, 5, 0, 0, 0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(("lift", "dtype"), [(None, bool), (nn.remat, float), (nn.jit, bool)])
def test_padded_tokens_do_not_count(lift, dtype):
    model = LanguageModel(lift)
    params, layers = init(model, TOKENS), bnp.linen.find_layers(model, TOKENS)
    jax.eval_shape(recorded(model, mask=jnp.ones((4, 5), dtype)), params, TOKENS)  # the step has a mask of its own

    def run(params, tokens):
        return recorded(model, mask=(tokens > 0).astype(dtype))(params, tokens)

    assert "embedding" in reasons(layers)["embedding/embedding"]
    assert "normalization" in reasons(layers)["norm_1/scale"]
    inputs = inputs_of(layers, LanguageModel(), params, TOKENS)
    expected = {path: ([call[np.asarray(TOKENS > 0)]], 3) for path, (call,) in inputs.items()}
    assert len(expected) == 7
    assert_step(layers, *step_of(layers, run, params, TOKENS), expected)


def test_a_mask_that_fits_no_input_names_the_layer():
    model, mask = LanguageModel(), jnp.ones((4, 3), bool)
    with pytest.raises(ValueError, match="attention/query"):
        jax.eval_shape(recorded(model, mask=mask), init(model, TOKENS), TOKENS)


class TiedHead(nn.Module):
    """Hugging Face's FlaxBertForMaskedLM and FlaxGPT2LMHead: the head's kernel is the embedding."""

    def setup(self):
        self.embedding, self.layer, self.lm_head = Embed(7, 4), Dense(4), Dense(7, use_bias=False)
        self.bias = self.param("bias", nn.initializers.zeros, (7,), float)

    def __call__(self, tokens):
        h = nn.gelu(self.layer(self.embedding(tokens)))
        shared = self.embedding.variables["params"]["embedding"]
        return self.lm_head.apply({"params": {"kernel": shared.T}}, h) + self.bias[None, None]


def test_a_head_that_is_applied_to_the_embedding_leaves_the_other_layers():
    model = TiedHead()
    params, layers = init(model, TOKENS), bnp.linen.find_layers(model, TOKENS)
    assert reasons(layers).keys() == {"embedding/embedding", "bias"}
    assert "embedding" in reasons(layers)["embedding/embedding"]
    expected = {path: (calls, 4) for path, calls in inputs_of(layers, model, params, TOKENS).items()}
    assert list(expected) == ["layer"]
    assert_step(layers, *step_of(layers, recorded(model), params, TOKENS), expected)


def test_a_layer_whose_parameters_another_is_applied_with_is_excluded():
    """Its input there is not recorded: its statistics would be those of a part of what it multiplies."""

    class Shared(nn.Module):
        def setup(self):
            self.first, self.middle, self.last = Dense(4), Dense(4), Dense(4)

        def __call__(self, x):
            x = jnp.tanh(self.middle(jnp.tanh(self.first(x))))
            return self.last.apply({"params": self.first.variables["params"]}, x)

    model, x = Shared(), normal(0, 5, 4)
    params, layers = init(model, x), bnp.linen.find_layers(model, x)
    assert reasons(layers).keys() == {"first/kernel", "first/bias"}
    assert all("explicit" in reason for reason in reasons(layers).values())
    expected = {path: (calls, 5) for path, calls in inputs_of(layers, model, params, x).items()}
    assert_step(layers, *step_of(layers, recorded(model), params, x), expected)


# Graphs.


class Graphs(NamedTuple):
    """What jraph calls a GraphsTuple: several graphs in one, padded to fixed sizes under `jax.jit`."""

    nodes: jax.Array
    edges: jax.Array
    globals: jax.Array
    senders: jax.Array
    receivers: jax.Array
    graph_of_node: jax.Array
    graph_of_edge: jax.Array


class GraphNetwork(nn.Module):
    """Flax's ogbg_molpcba with jraph's GraphNetwork: a layer each for edges, nodes and graphs."""

    @nn.compact
    def __call__(self, graphs):
        g = graphs
        nodes, edges = Dense(4, name="embed_nodes")(g.nodes), Dense(3, name="embed_edges")(g.edges)
        sum_by = functools.partial(jax.ops.segment_sum, num_segments=len(g.globals))
        for step in range(2):
            messages = [edges, nodes[g.senders], nodes[g.receivers], g.globals[g.graph_of_edge]]
            edges = nn.relu(Dense(3, name=f"edges_{step}")(jnp.concatenate(messages, 1)))
            received = jax.ops.segment_sum(edges, g.receivers, len(nodes))
            nodes = nn.relu(Dense(4, name=f"nodes_{step}")(jnp.concatenate([nodes, received], 1)))
            pooled = [g.globals, sum_by(nodes, g.graph_of_node), sum_by(edges, g.graph_of_edge)]
            g = g._replace(globals=nn.relu(Dense(2, name=f"globals_{step}")(jnp.concatenate(pooled, 1))))
        return Dense(2, name="readout")(g.globals)


def two_graphs():
    """One of 3 nodes and 4 edges, one of 2 and 2."""
    senders, receivers = jnp.asarray([0, 1, 2, 0, 3, 4]), jnp.asarray([1, 2, 0, 2, 4, 3])
    of_node, of_edge = jnp.asarray([0, 0, 0, 1, 1]), jnp.asarray([0, 0, 0, 0, 1, 1])
    return Graphs(normal(0, 5, 3), normal(1, 6, 2), normal(2, 2, 2), senders, receivers, of_node, of_edge)


def padded(graphs, num_nodes, num_edges, num_graphs):
    """Adds a graph that has all padding nodes and edges, and empty ones, as jraph's `pad_with_graphs` does."""
    sizes = Graphs(num_nodes, num_edges, num_graphs, num_edges, num_edges, num_nodes, num_edges)
    # the first padding node, the first padding graph
    fill = Graphs(0, 0, 0, len(graphs.nodes), len(graphs.nodes), len(graphs.globals), len(graphs.globals))
    pad = lambda a, size, fill: jnp.concatenate([a, jnp.full((size - len(a), *a.shape[1:]), fill, a.dtype)])  # noqa: E731
    return jax.tree.map(pad, graphs, sizes, fill)


@pytest.mark.parametrize("sizes", [(9, 12, 3), (9, 9, 4)])
def test_padding_of_graphs_does_not_count(sizes):
    """The padded graphs' step is that of the graphs themselves, from the inputs of a pass over these alone."""
    model, graphs = GraphNetwork(), two_graphs()
    batch = padded(graphs, *sizes)
    params, layers = init(model, batch), bnp.linen.find_layers(model, batch)
    node, edge, graph = (jnp.arange(size) < real for size, real in zip(sizes, (5, 6, 2), strict=True))
    masks = [node, edge, graph]
    if len(set(sizes)) < 3:  # by size nobody could tell nodes from edges
        masks = lambda name, x: {"nodes": node, "edges": edge}.get(name.removeprefix("embed_")[:5], graph)  # noqa: E731
    inputs = inputs_of(layers, model, params, graphs)
    expected = {path: (calls, len(calls[0])) for path, calls in inputs.items()}
    assert {examples for _, examples in expected.values()} == {5, 6, 2}
    loss = lambda output: weigh(output[:2])  # noqa: E731
    assert_step(layers, *step_of(layers, recorded(model, mask=masks), params, batch, loss=loss), expected)
