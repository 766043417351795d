"""A character-level transformer by SGD with momentum, Adam and Muon, each alone and in BNP's variables.

A small causal language model, its blocks stacked by ``nn.scan``, learns Python's own documentation, with LayerNorms and
without. The learning rate falls to zero along half a cosine. One run at each rate of a grid, refined around each
method's best, chooses the rate by its loss on one half of the held-out text, with seed 0; runs with other seeds at that
rate read the other half. In BNP's variables these are run once more with fewer steps, to see whether they end where the
optimizer alone does.

The text is what ``help("while")`` and its like print, English with code. It comes with Python, as the data of the
standard library's ``pydoc_data.topics``, so nothing is downloaded; it varies a little between versions of Python.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import bnp_optax as bnp
import optimizers
import programs
import protocol
import runs
import settings
import sweeps

BATCH_SIZE, LENGTH = 16, 64
NUM_BLOCKS, NUM_HEADS, WIDTH = 2, 2, 32
STEPS, SHORTER_STEPS, QUICK_STEPS = 3000, 2400, 40
EVALUATIONS = 30  # along a run, evenly spaced
SEEDS, QUICK_SEEDS = (1, 2, 3), (1,)
NETWORKS = ("LayerNorm", "no normalization")
RATES = {
    "Momentum": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "Adam": (0.001, 0.003, 0.01, 0.03),
    "Muon": (0.003, 0.01, 0.03, 0.1),
}
# Of Adam's rate, for what is no kernel, embeddings too, by Muon's: chosen for Muon alone, which 0.1 and 0.5 held back.
MUON_ADAM_FACTOR = 0.3

State = tuple[optax.Params, optax.OptState]
Splits = tuple[np.ndarray, np.ndarray, np.ndarray]  # training, validation, test


class Block(nn.Module):
    """Causal attention and a multilayer perceptron, each behind a LayerNorm and beside a residual connection.

    Attributes:
      num_heads: of the attention.
      normalized: whether there are LayerNorms.
    """

    num_heads: int
    normalized: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Returns the activations for the next block, and None: it has no other output for `nn.scan` to stack."""
        attention = nn.MultiHeadDotProductAttention(self.num_heads, name="attention")
        x = x + attention(self.normalize(x), mask=nn.make_causal_mask(x[..., 0]))
        hidden = nn.relu(nn.Dense(4 * x.shape[-1])(self.normalize(x)))
        return x + nn.Dense(x.shape[-1])(hidden), None

    def normalize(self, x: jax.Array) -> Any:
        """Applies a LayerNorm if there are any."""
        return nn.LayerNorm()(x) if self.normalized else x


class LanguageModel(nn.Module):
    """Predicts every character from those before it."""

    num_characters: int
    width: int = WIDTH
    num_heads: int = NUM_HEADS
    num_blocks: int = NUM_BLOCKS
    normalized: bool = True

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Returns the logits of each next character."""
        positions = nn.Embed(text.shape[-1], self.width, name="positions")(jnp.arange(text.shape[-1]))
        x = nn.Embed(self.num_characters, self.width, name="characters")(text) + positions
        # Every block has parameters of its own, and inputs with statistics of their own: both are stacked.
        stack = nn.scan(
            Block, variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=self.num_blocks
        )
        x, _ = stack(self.num_heads, self.normalized, name="blocks")(x)
        return nn.Dense(self.num_characters, name="logits")(nn.LayerNorm()(x) if self.normalized else x)


def make_data(steps: int, seed: int) -> tuple[int, Splits]:
    """Returns how many characters there are, and windows of LENGTH + 1 of them, as numbers.

    Training has a batch of random windows for every step, the other splits have consecutive ones.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SystemExit("The text to learn, pydoc_data.topics, is missing from this Python.") from error
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs))  # topics repeat one another, but no test may repeat the training
    alphabet, numbers = np.unique(np.array(list(text)), return_inverse=True)
    train, *held_out = np.split(numbers, [len(text) * 90 // 100, len(text) * 95 // 100])
    starts = np.random.default_rng(seed).integers(len(train) - LENGTH, size=(steps, BATCH_SIZE, 1))
    validation, test = (np.resize(part, (len(part) // (LENGTH + 1), LENGTH + 1)) for part in held_out)
    return len(alphabet), (train[starts + np.arange(LENGTH + 1)], validation, test)


@functools.partial(jax.jit, static_argnums=0)
def loss_fn(model: LanguageModel, params: optax.Params, text: jax.Array) -> tuple[jax.Array, Any]:
    # A step that does not use the records is compiled without them.
    logits, records = bnp.linen.capture(model)({"params": params}, text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean(), records


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_step(
    model: LanguageModel, tx: optax.GradientTransformationExtraArgs, rate: jax.Array, state: State, text: jax.Array
) -> State:
    params, opt_state = state
    grads, records = jax.grad(loss_fn, argnums=1, has_aux=True)(model, params, text)
    updates, opt_state = tx.update(grads, opt_state, params, intermediates=records)
    return optax.apply_updates(params, jax.tree.map(lambda update: rate * update, updates)), opt_state


def are_embeddings(params: optax.Params) -> Any:
    """Returns which parameters are embeddings, which BNP does not cover."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: keys[-1].key == "embedding", params)


# All multiply by the learning rate last. That is left to the step, so that it is compiled once for the whole grid.
OPTIMIZERS: dict[str, Callable[[bnp.Layers], optax.GradientTransformation]] = {
    "Momentum": lambda layers: optax.sgd(1.0, momentum=optimizers.MOMENTUM),
    "Adam": lambda layers: optax.adam(1.0),
    "Muon": lambda layers: optax.contrib.muon(
        1.0,
        adam_learning_rate=MUON_ADAM_FACTOR,
        muon_weight_dimension_numbers=bnp.muon_dimension_numbers(layers),
    ),
}
FASTER_EMBEDDINGS = ("{}, embeddings=10", "BNP({}), embeddings=10")  # in learning rates of all else
KINDS = ("{}", "BNP({})", "BNP({}), eps_relative=1", *FASTER_EMBEDDINGS)
METHODS = settings.method_names(KINDS)  # optimizer and kind


@dataclasses.dataclass(frozen=True)
class Trial:
    """Everything that determines a training.

    Attributes:
      network: one of ``NETWORKS``.
      method: one of ``METHODS``.
      rate: the learning rate at the start.
      steps: how many, of 16 texts of 64 characters.
      seed: of the initial parameters and the batches; 0 is for choosing the rate, and does not read the test text.
    """

    network: str
    method: str
    rate: float
    steps: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Outcome(Trial):
    """What came out of a training.

    Attributes:
      commit: of the code.
      milliseconds: of a step, the median of those between two evaluations, without them.
      curve: validation losses in nats per character, evenly spaced over the steps, between blanks.
      test: the loss at the end; nan where the test text was not read.
    """

    commit: str
    milliseconds: float
    curve: str
    test: float

    @property
    def trial(self) -> Trial:
        """The training."""
        return runs.part(self, Trial)

    @property
    def diverged(self) -> bool:
        """Whether the loss at the end is not finite."""
        return not math.isfinite(self.validation[-1])

    @property
    def score(self) -> float:
        """What decides between rates: the less loss on the validation text, the better."""
        return -math.inf if self.diverged else -self.validation[-1]

    @property
    def validation(self) -> np.ndarray:
        """The validation losses; infinite where they were not finite."""
        losses = np.array(self.curve.split(), float)
        return np.where(np.isfinite(losses), losses, np.inf)


@functools.cache
def make_program(network: str, method: str, num_characters: int) -> tuple[LanguageModel, Any]:
    """Returns a network, and the optimizer of a method for it."""
    name, kind = METHODS[method]
    model, options = LanguageModel(num_characters, normalized=network == "LayerNorm"), settings.options_of(kind)
    faster = optax.masked(optax.scale(options.pop("embeddings", 1.0)), are_embeddings)
    layers = bnp.linen.find_layers(model, jnp.zeros((1, LENGTH), int))
    optimizer = optax.chain(OPTIMIZERS[name](layers), faster)
    if not kind.startswith("BNP"):
        return model, optax.with_extra_args_support(optimizer)  # takes the records and ignores them
    # Examples are batches of whole texts: 16 in a step would be divided by the root of 8 under the default scaling.
    return model, bnp.preconditioned(optimizer, layers, scaling="none", **options)


def train(trial: Trial, advance: Callable[[int], None] = lambda _: None) -> Outcome:
    """Runs one training; ``advance`` is called with the number of steps since its last call."""
    num_characters, (training, validation, test) = make_data(trial.steps, trial.seed)
    model, tx = make_program(trial.network, trial.method, num_characters)
    params = jax.jit(model.init)(jax.random.key(trial.seed), training[0, :1, :-1])["params"]
    state = params, jax.jit(tx.init)(params)
    rates = trial.rate * (1 + np.cos(np.pi * np.arange(trial.steps) / trial.steps)) / 2
    jax.block_until_ready(train_step(model, tx, jnp.float32(0), state, training[0]))  # compiles it
    curve, seconds = [], []
    for part in np.array_split(np.arange(trial.steps), EVALUATIONS):
        start = time.perf_counter()
        for step in part:
            state = train_step(model, tx, jnp.float32(rates[step]), state, training[step])
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - start) / max(len(part), 1))
        curve.append(float(loss_fn(model, state[0], validation)[0]))
        advance(len(part))
    return Outcome(
        **dataclasses.asdict(trial),
        commit=runs.commit(),
        milliseconds=round(1000 * float(np.median(seconds)), 3),
        curve=" ".join(f"{loss:.4f}" for loss in curve),
        test=float(loss_fn(model, state[0], test)[0]) if trial.seed else math.nan,
    )


def best(tuning: Sequence[Outcome]) -> Outcome:
    """Returns the outcome with the lowest validation loss at the end; of equal ones that with the lowest rate."""
    return min(tuning, key=lambda outcome: (-outcome.score, outcome.rate))


def at_best_rate(cell: Sequence[Outcome]) -> list[Outcome]:
    """Returns the outcomes of a method that read the test text, shorter trainings too, at the rate that is best."""
    rate = best([outcome for outcome in cell if outcome.seed == 0]).rate
    return [outcome for outcome in cell if outcome.seed and outcome.rate == rate]


def cells(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """Groups outcomes by network and method."""
    grouped: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.network, outcome.method), []).append(outcome)
    return grouped


def run(output: Path, quick: bool = False, workers: int = 1) -> list[Outcome]:
    """Runs what has no row in the CSV file yet: every rate, then the other seeds at the best, then with fewer steps.

    Args:
      output: the CSV file.
      quick: a short form.
      workers: processes that share the cores.

    Returns:
      All outcomes.
    """

    def sweep(todo: list[Trial]) -> list[Outcome]:
        return sweeps.sweep(
            todo,
            train,
            {outcome.trial: outcome for outcome in runs.read_rows(output, Outcome)},
            lambda outcome: runs.append_rows(output, [outcome]),
            title=output.stem,
            size=lambda trial: trial.steps,
            unit="steps",
            workers=workers,
        )

    steps, seeds = (QUICK_STEPS, QUICK_SEEDS) if quick else (STEPS, SEEDS)
    tuning = sweep(
        [
            Trial(network, method, rate, steps, 0)
            for network in (NETWORKS[:1] if quick else NETWORKS)
            for method, (name, kind) in METHODS.items()
            if not quick or (name == "Adam" and kind in KINDS[:2])
            for rate in (RATES[name][1:2] if quick else RATES[name])
        ]
    )
    if not quick:
        tuning = protocol.refined(tuning, sweep, cells, best)
    final = [dataclasses.replace(best(own).trial, seed=seed) for own in cells(tuning).values() for seed in seeds]
    shorter = [dataclasses.replace(trial, steps=SHORTER_STEPS) for trial in final if trial.method not in OPTIMIZERS]
    return tuning + sweep(final + ([] if quick else shorter))


def main(argv: list[str] | None = None) -> list[Outcome]:
    """Runs all trainings; returns their outcomes."""
    parser = programs.Parser(description="Trains a small transformer on Python's documentation.")
    sweeps.add_options(parser)
    args = parser.parse_args(argv)
    return run(args.results / "e7.csv", args.quick, args.workers)


if __name__ == "__main__":
    programs.start(main)
