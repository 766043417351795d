"""Whether a network without normalization trains in 8 bits, its updates included, and which rounding that takes.

A Fixup network of four residual blocks on MNIST, by SGD with momentum. Weights, activations, errors and gradients of
the blocks have 8 bits through qwix. Updates have 8 bits or not: those of the blocks' kernels alone, as the predecessors
of the method leave the first and the last layer as they are, or those of all kernels. Biases and multipliers are in
float32 throughout.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import qwix  # type: ignore[import-untyped]
from matplotlib.figure import Figure

import figures
import normalizer_free
import protocol
import tables
import trials
from bnp_optax.contrib.quantized import Rounding, quantize_updates
from normalizer_free import Network
from protocol import Outcome, Trial

BLOCKS, QUICK_BLOCKS, BITS = 4, 1, 8
SETTINGS = {f"{blocks} Fixup blocks": blocks for blocks in (BLOCKS, QUICK_BLOCKS)}
BATCH_SIZE, STEPS, QUICK_STEPS = 64, 1000, 20
RATES, QUICK_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), (0.01, 0.03)
LAYERS_OF_BLOCKS = r"Dense_[1-9]\d*"  # Dense_0 is in front of them, the classifier behind


class Method(NamedTuple):
    """What has 8 bits.

    Attributes:
      style: of its line.
      network: whether weights, activations, errors and gradients of the blocks have.
      rounding: of the updates, if these have.
      everywhere: whether the updates of all kernels have, or those of the blocks alone.
    """

    style: dict[str, str]
    network: bool = True
    rounding: Rounding | None = None
    everywhere: bool = False


METHODS = {
    "float32": Method({"color": "#555555", "marker": "s"}, network=False),
    "8-bit network, float32 updates": Method({"color": "#009E73", "marker": "v"}),
    "8-bit updates of the blocks, stochastic": Method({"color": "#0072B2", "marker": "o"}, rounding="stochastic"),
    "8-bit updates of the blocks, nearest": Method({"color": "#D55E00", "marker": "^"}, rounding="nearest"),
    "8-bit updates of all kernels, stochastic": Method(
        {"color": "#0072B2", "marker": "D", "linestyle": "--"}, rounding="stochastic", everywhere=True
    ),
    "8-bit updates of all kernels, nearest": Method(
        {"color": "#D55E00", "marker": "x", "linestyle": "--"}, rounding="nearest", everywhere=True
    ),
}


class State(NamedTuple):
    """What the training carries from step to step.

    Attributes:
      params: the parameters.
      optimizer: its state.
      key: for the rounding of errors and gradients.
    """

    params: optax.Params
    optimizer: optax.OptState
    key: jax.Array


def quantized(model: Network, trained: bool) -> Any:
    """Returns a network whose blocks compute in 8 bits.

    Args:
      model: the network in float32.
      trained: whether errors and gradients have 8 bits, too, rounded stochastically.
    """
    backward: dict[str, Any] = {"bwd_qtype": "int8", "bwd_stochastic_rounding": "uniform"} if trained else {}
    rule = qwix.QtRule(module_path=LAYERS_OF_BLOCKS, weight_qtype="int8", act_qtype="int8", **backward)
    return qwix.quantize_model(model, qwix.QtProvider([rule]))


def is_kernel(params: optax.Params, everywhere: bool) -> Any:
    """Returns which parameters are kernels, of the blocks or of all layers."""
    layers = r"Dense_\d+|classifier" if everywhere else LAYERS_OF_BLOCKS

    def is_of_such_a_layer(path: Any, leaf: jax.Array) -> bool:
        return leaf.ndim > 1 and re.fullmatch(layers, path[0].key) is not None

    return jax.tree.map_with_path(is_of_such_a_layer, params)


def make_optimizer(
    method: Method, model: Network, params: optax.Params, x: Any, rate: Any, key: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns SGD with momentum, a tenth of the rate for biases and multipliers, with updates of few bits or not.

    Args:
      method: the method.
      model: its network.
      params: the network's parameters.
      x: images.
      rate: the learning rate.
      key: for the rounding of the updates.
    """
    sgd = normalizer_free.make_optimizer(normalizer_free.METHODS["Fixup"], model, params, x, rate)
    if method.rounding is None:
        return sgd
    mask = functools.partial(is_kernel, everywhere=method.everywhere)
    return quantize_updates(sgd, BITS, method.rounding, mask=mask, key=key)


def task(trial: Trial) -> trials.Task:
    """Returns the training of a network, which classifies in as many bits as it was trained in."""
    method = METHODS[trial.method]
    model = Network("fixup", SETTINGS[trial.setting])
    optimizer = functools.partial(make_optimizer, method, model)
    trained, used = ((quantized(model, trained) if method.network else model) for trained in (True, False))

    def init(key: jax.Array, x: Any) -> State:
        params = model.init(key, x)["params"]
        of_updates, of_gradients = jax.random.split(jax.random.fold_in(key, 1))
        return State(params, optimizer(params, x, 0.0, of_updates).init(params), of_gradients)

    def step(state: State, rate: jax.Array, x: Any, y: Any) -> tuple[State, jax.Array]:
        following, own = jax.random.split(state.key)

        def loss_fn(params: optax.Params) -> jax.Array:
            logits = trained.apply({"params": params}, x, rngs={"stochastic_rounding": own})
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        tx = optimizer(state.params, x, rate, own)
        updates, new = tx.update(gradients, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), new, following), loss

    def predict(state: State, x: Any) -> jax.Array:
        return jnp.asarray(used.apply({"params": state.params}, x))

    return trials.Task(init, step, predict)


def tuning(quick: bool) -> list[Trial]:
    """Returns a training of every method at every rate."""
    data, steps, rates = ("digits", QUICK_STEPS, QUICK_RATES) if quick else ("mnist", STEPS, RATES)
    setting = list(SETTINGS)[quick]
    return [Trial(data, setting, method, BATCH_SIZE, rate, steps, 0) for method in METHODS for rate in rates]


def report(outcomes: Sequence[Outcome]) -> trials.Report:
    """Returns what the methods reach at their best rates, and at all of them."""
    texts = {"quantized": protocol.accuracy_table(outcomes), "quantized_rates": protocol.validation_table(outcomes)}
    return texts, {"quantized": by_rate(outcomes)}


def by_rate(outcomes: Sequence[Outcome]) -> Figure:
    """Draws validation accuracy against learning rate, with seed 0."""
    first = outcomes[0]
    title = f"{tables.DATA_NAMES[first.data]}, {first.setting}, batch size {first.batch_size}"
    figure, [panel] = figures.panels([title], 1, "validation accuracy (%)")
    figure.set_size_inches(7.2, 4.0)
    for name, method in METHODS.items():
        figures.draw_over_rates(panel, [o for o in outcomes if o.method == name], name, method.style)
    figures.show_errors_as_accuracies(panel)
    panel.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


EXPERIMENT = trials.Experiment(tuning, task, report)
