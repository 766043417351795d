"""K-FAC on the fully connected network of ``optimizers.py``, trained as all is there, for several dampings.

Like BNP it preconditions every layer by second moments of its input, and by those of the gradients at its output
besides: all of them, where BNP takes the mean and the variances of the input alone.

It needs kfac-jax from its main branch: its last release, 0.0.8, does not run on JAX 0.10.

References:
  Martens, Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML 2015.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import models
import protocol
import trials
from programs import UserError
from protocol import Trial

SETTING = "fully connected 3x100"
BATCH_SIZE, EXAMPLES, MOMENTUM = 60, 51_200, 0.9
RATES = (0.001, 0.003, 0.01, 0.03)
DAMPINGS = (0.1, 1.0, 10.0)
INVERSES_EVERY = 20  # steps; by default 5, and one of the inverses is of 3,073 rows
QUICK_STEPS = 20
INSTALL = "pip install git+https://github.com/google-deepmind/kfac-jax"


class State(NamedTuple):
    """What a training by K-FAC carries from step to step."""

    params: optax.Params
    optimizer: Any
    key: jax.Array


def registered_loss(model: nn.Module) -> Callable[[optax.Params, tuple[jax.Array, jax.Array]], jax.Array]:
    """Returns the cross-entropy of a classifier on a batch, from which kfac-jax learns what its loss is."""
    import kfac_jax

    def loss_fn(params: optax.Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = batch
        logits: Any = model.apply({"params": params}, x, train=True)
        kfac_jax.register_softmax_cross_entropy_loss(logits, y)
        loss: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss

    return loss_fn


def task(trial: Trial) -> trials.Task:
    """Returns the training of a trial, whose method is named after its damping.

    Raises:
      UserError: if kfac-jax is not installed.
    """
    if not importlib.util.find_spec("kfac_jax"):
        raise UserError(f"K-FAC needs kfac-jax from its main branch: {INSTALL}")
    import kfac_jax

    model, damping = models.MLP(), float(trial.method.rpartition("=")[2])
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(registered_loss(model)),
        l2_reg=0.0,
        num_burnin_steps=0,
        inverse_update_period=INVERSES_EVERY,
    )

    def init(key: jax.Array, x: Any) -> State:
        params = model.init(key, x)["params"]
        batch = jnp.broadcast_to(x, (trial.batch_size, *x.shape[1:])), jnp.zeros(trial.batch_size, jnp.int32)
        return State(params, optimizer.init(params, key, batch), key)

    def step(state: State, rate: jax.Array, x: Any, y: Any) -> tuple[State, jax.Array]:
        key, own = jax.random.split(state.key)
        params, opt_state, statistics = optimizer.step(
            state.params,
            state.optimizer,
            own,
            batch=(x, y),
            learning_rate=rate,
            momentum=jnp.float32(MOMENTUM),
            damping=jnp.float32(damping),
            global_step_int=1,  # any but the first, which alone differs on the host: by a burn-in, which there is not
        )
        return State(params, opt_state, key), statistics["loss"]

    return trials.Task(init, step, lambda state, x: jnp.asarray(model.apply({"params": state.params}, x)))


def tuning(quick: bool) -> list[Trial]:
    """Returns a training for every damping at every rate."""
    data, steps = ("digits", QUICK_STEPS) if quick else ("cifar-10", EXAMPLES // BATCH_SIZE)
    return [
        Trial(data, SETTING, f"K-FAC, damping={damping:g}", BATCH_SIZE, rate, steps, 0)
        for damping in (DAMPINGS[1:2] if quick else DAMPINGS)
        for rate in (RATES[1:2] if quick else RATES)
    ]


def report(outcomes: Sequence[protocol.Outcome]) -> trials.Report:
    """Returns the table of what every damping reached."""
    return {"e8_kfac": protocol.accuracy_table(outcomes)}, {}


EXPERIMENT = trials.Experiment(tuning, task, report, refined=True)
