"""Batch Normalization Preconditioning: gradient descent, or any optimizer, in the variables of BatchNorm."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from bnp_optax.arguments import checked_inner, is_known, start_in_z
from bnp_optax.coordinates import Coordinates
from bnp_optax.layers import Layer, Layers, check_layers
from bnp_optax.moments import InputMoments, VarianceRule, statistics_dtype
from bnp_optax.packing import Packing
from bnp_optax.records import find_records
from bnp_optax.sharding import with_auto_axes
from bnp_optax.statistics import RESTORE, Options, Statistics, Table, absorb, check, coordinates, initial, tabulate
from bnp_optax.trees import LayerTree, Weights, from_canonical, to_canonical

Scaling = Literal["examples", "none"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _KeepStatistics:
    def __repr__(self) -> str:
        return "KEEP_STATISTICS"

    def __reduce__(self) -> str:  # by its name, so that a copy, or what comes out of a pickle, is the same object
        return "KEEP_STATISTICS"


KEEP_STATISTICS: Final = _KeepStatistics()
"""Passed as ``intermediates=``, preconditions with the running statistics as they are.

A step compiled so needs no recording. The scale of the step and the damping are those of the last recorded batch.
"""


class PreconditionedState(NamedTuple):
    """State of :func:`preconditioned`.

    Attributes:
      statistics: the running statistics of the layers' inputs.
      inner: the state of the inner optimizer; what it keeps of gradients is in the variables z.
    """

    statistics: Statistics
    inner: optax.OptState


def scale_by_bnp(
    layers: Layers,
    decay: ArrayLike = 0.99,
    eps_relative: ArrayLike = 1e-2,
    eps: ArrayLike = 1e-4,
    *,
    variance: VarianceRule = "mixture",
    scaling: Scaling | ArrayLike = 128,
    prior_examples: ArrayLike | None = 128,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions gradients with the running mean and variance of every layer's input: the paper's method.

    For a layer ``a = W h + b`` the step is taken in variables in which the input ``h`` is centred
    and scaled, as Batch Normalization would make it, and mapped back: the gradient ``g`` of
    ``[b; w]`` becomes ``P P' g`` with ``P = (1/q) [1 -mu'; 0 I] [1 0; 0 diag(1/sd)]``. The network
    itself stays as it is. Parameters outside ``layers`` pass unchanged.

    It is ``preconditioned(optax.identity(), layers, ...)``: gradient descent in these variables. Adam,
    Muon and other optimizers that are not linear in the gradient belong inside :func:`preconditioned`;
    behind this transformation they divide its scale out again.

    ``update(updates, state, params=None, *, intermediates)`` requires the records of the layers'
    inputs (:func:`bnp_optax.linen.capture`), or :data:`KEEP_STATISTICS`. The running
    statistics absorb the batch first, so that this step already uses it. A layer whose moments are
    not finite keeps the statistics it had, and counts the batch in ``state[path].skipped``.

    Put it first in a chain: it wants the raw gradient.

    Args:
      layers: the layers to precondition.
      decay: rho, the decay of the running statistics, in [0, 1).
      eps_relative: eps1, damping relative to the largest variance among a unit's inputs.
      eps: eps2, absolute damping.
      variance: ``"mixture"`` is the exact variance of the weighted mixture of batches, right at
        every batch size; ``"batch"`` is the paper's average of batch variances.
      scaling: the rule of q2 = q ** 2, which divides a layer's step. With a number C and a batch of N
        examples it is max(C/N, 1): below C examples steps are in proportion to their batch, so that one
        learning rate serves batches of any size; decoupled weight decay is not, and wants N/C of its
        strength there to decay as much an epoch. ``"examples"`` is the paper's max(F/N, 1) for F
        inputs a unit, which slows wide layers down; ``"none"`` is 1.
      prior_examples: how many examples the start (mean 0, variance 1) weighs; ``None`` is the
        paper's constant decay, under which it lingers for 1 / (1 - decay) steps.

    Returns:
      The transformation, whose state is a :class:`Statistics`. Its updates have the gradients' tree,
      shapes and dtypes.

    Raises:
      ValueError: for an option out of range, or ``layers`` without a layer; by ``init`` if ``layers``
        does not describe the parameters; by ``update`` if the records lack a layer or have the wrong
        shape, or the state is of other layers.
      TypeError: by ``update`` if ``intermediates`` is not given or is not a tree of records.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1), bias=("b",)),))
      >>> params = {"w": jnp.zeros((2, 1)), "b": jnp.zeros(1)}
      >>> tx = optax.chain(bnp.scale_by_bnp(layers), optax.sgd(0.01, momentum=0.9))
      >>> state = tx.init(params)
      >>> x = jnp.array([[1.0, 200.0], [2.0, 400.0]])
      >>> loss = lambda p: jnp.mean((x @ p["w"] + p["b"] - 1) ** 2)
      >>> records = {"w": bnp.input_moments(x)}
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params, intermediates=records)
      >>> jax.tree.map(jnp.shape, updates), state[0]["w"].seen
      ({'b': (1,), 'w': (2, 1)}, Array([2], dtype=int32))

    References:
      Lange, Helfrich, Ye, Batch Normalization Preconditioning for Neural Network Training,
      JMLR 23(72), 2022, https://arxiv.org/abs/2108.01110
    """
    variables = _Variables(layers, decay, eps_relative, eps, variance, scaling, prior_examples)

    def update_fn(
        updates: optax.Updates,
        state: Statistics,
        params: optax.Params | None = None,
        *,
        intermediates: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Statistics]:
        del params, extra_args
        gradients = LayerTree.of(updates, layers)
        state, table = variables.refresh(state, gradients.layers, intermediates)
        return variables.map(Coordinates.precondition, table, gradients), state

    return optax.GradientTransformationExtraArgs(variables.init, update_fn)


def preconditioned(
    inner: optax.GradientTransformation,
    layers: Layers,
    decay: ArrayLike = 0.99,
    eps_relative: ArrayLike = 1e-2,
    eps: ArrayLike = 1e-4,
    *,
    variance: VarianceRule = "mixture",
    scaling: Scaling | ArrayLike = 128,
    prior_examples: ArrayLike | None = 128,
) -> optax.GradientTransformationExtraArgs:
    """Runs any optimizer in the variables that Batch Normalization would give the network.

    For a layer ``a = W h + b`` these are the ``z`` of ``[b; w] = P z`` with ``P`` as in
    :func:`scale_by_bnp`: what ``z`` multiplies is the input, centred and scaled by its running mean and
    variance. The inner optimizer sees ``P' g``, the gradient with respect to ``z``, and ``P^-1 w`` where
    ``update`` is given parameters; what it answers, ``dz``, comes back as ``P dz``. That is the inner
    optimizer on the network ``a = z_w (h - mu)/(q sd) + z_b/q``, while the network stays as it is.

    Parameters outside ``layers`` reach the inner optimizer as they are. Clipping, momentum and
    normalization belong inside. Decoupled weight decay, of kernels and biases alike, is the same step
    inside and outside, as P is linear. As P changes from step to step, what remembers parameters or tries
    others (``schedule_free``, ``prodigy``, line searches) does not belong inside: ``docs/wrappers.md``.

    ``update(updates, state, params=None, *, intermediates, **extra_args)`` takes ``intermediates`` as
    :func:`scale_by_bnp`, and hands other extra arguments on to the inner optimizer. A batch that is not
    finite does not enter the statistics; what it does to the inner optimizer is that optimizer's affair:
    put ``optax.apply_if_finite`` around.

    With the default ``scaling`` steps below 128 examples a batch shrink with it: those of SGD in
    proportion to the batch, those of Adam and others that normalize to its square root.

    Args:
      inner: the optimizer, learning rate included.
      layers: as all that follow, see :func:`scale_by_bnp`.
      decay: decay of the running statistics.
      eps_relative: relative damping.
      eps: absolute damping.
      variance: rule of the running variance.
      scaling: of the steps of small batches, a rule or a number of examples.
      prior_examples: weight of the start of the running statistics.

    Returns:
      The transformation, whose state is a :class:`PreconditionedState`.

    Raises:
      ValueError: as :func:`scale_by_bnp`; by ``init`` if ``inner`` keeps the first parameters or searches a step.
      TypeError: if ``inner`` is no transformation; and as :func:`scale_by_bnp`.

    Example:
      >>> import jax.numpy as jnp
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1), bias=("b",)),))
      >>> params = {"w": jnp.zeros((2, 1)), "b": jnp.zeros(1)}
      >>> tx = bnp.preconditioned(optax.adamw(1e-3), layers)
      >>> state = tx.init(params)
      >>> x = jnp.array([[1.0, 200.0], [2.0, 400.0]])
      >>> loss = lambda p: jnp.mean((x @ p["w"] + p["b"] - 1) ** 2)
      >>> records = {"w": bnp.input_moments(x)}
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params, intermediates=records)
      >>> jax.tree.map(jnp.shape, updates), state.statistics["w"].seen
      ({'b': (1,), 'w': (2, 1)}, Array([2], dtype=int32))

    References:
      The variables are those of Lange, Helfrich, Ye, JMLR 23(72), 2022; other optimizers than gradient
      descent in them are an extension of this library.
    """
    inner = checked_inner(inner)
    variables = _Variables(layers, decay, eps_relative, eps, variance, scaling, prior_examples)

    def init_fn(params: optax.Params) -> PreconditionedState:
        statistics, weights = variables.init(params), LayerTree.of(params, layers)
        z = variables.map(Coordinates.to_z, tabulate(statistics, weights.layers), weights)
        return PreconditionedState(statistics, start_in_z(inner, z, params))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        intermediates: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PreconditionedState]:
        if not isinstance(state, PreconditionedState):
            raise TypeError(f"The state must be what init returned, not {type(state).__name__}. {RESTORE}")
        gradients = LayerTree.of(updates, layers)
        statistics, table = variables.refresh(state.statistics, gradients.layers, intermediates)
        z_gradients = variables.map(Coordinates.gradient_in_z, table, gradients)
        z = None if params is None else variables.map(Coordinates.to_z, table, LayerTree.of(params, layers))
        dz, inner_state = inner.update(z_gradients, state.inner, z, **extra_args)
        steps = variables.map(Coordinates.from_z, table, LayerTree.of(dz, layers))
        return steps, PreconditionedState(statistics, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def bnp_sgd(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    weight_decay: ArrayLike = 0.0,
    *,
    decay: ArrayLike = 0.99,
    eps_relative: ArrayLike = 1e-2,
    eps: ArrayLike = 1e-4,
    variance: VarianceRule = "mixture",
    scaling: Scaling | ArrayLike = 128,
    prior_examples: ArrayLike | None = 128,
) -> optax.GradientTransformationExtraArgs:
    """SGD on preconditioned gradients, with decoupled weight decay and momentum.

    Per step, with ``g`` the preconditioned gradient::

        g <- g + weight_decay * params
        trace <- g + momentum * trace
        updates = -learning_rate * trace

    Args:
      learning_rate: a number or a schedule.
      layers: the layers to precondition.
      momentum: decay of the momentum's trace; ``None`` for none.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: strength of the decay, not preconditioned; ``update`` needs ``params`` unless 0.
      decay: see :func:`scale_by_bnp`, as for all that follow.
      eps_relative: relative damping.
      eps: absolute damping.
      variance: rule of the running variance.
      scaling: of the steps of small batches, a rule or a number of examples.
      prior_examples: weight of the start of the running statistics.

    Returns:
      The optimizer; its ``update`` requires ``intermediates=``.

    Raises:
      ValueError: for an option out of range, and as :func:`scale_by_bnp`.

    Example:
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1)),))
      >>> tx = bnp.bnp_sgd(optax.cosine_decay_schedule(0.01, 1000), layers, momentum=0.9)

    References:
      Lange, Helfrich, Ye, Batch Normalization Preconditioning for Neural Network Training,
      JMLR 23(72), 2022, https://arxiv.org/abs/2108.01110
    """
    if is_known(weight_decay) and not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, but is {weight_decay}.")
    return optax.chain(
        scale_by_bnp(
            layers, decay, eps_relative, eps, variance=variance, scaling=scaling, prior_examples=prior_examples
        ),
        optax.identity() if is_known(weight_decay) and weight_decay == 0 else optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum, nesterov),
    )


class _Variables:
    """The variables z of the layers: their running statistics, and the ways into and out of them."""

    def __init__(
        self,
        layers: Layers,
        decay: Any,
        eps_relative: Any,
        eps: Any,
        variance: VarianceRule,
        scaling: Any,
        prior_examples: Any,
    ) -> None:
        _check(layers, decay, eps_relative, eps, variance, scaling, prior_examples)
        self.layers, self.packing = layers, Packing.of(layers.included)
        match scaling:
            case "examples":
                full_step: Any = self.packing.per_entry(lambda path: layers[path].fan_in)
            case "none":
                full_step = 0
            case _:
                full_step = scaling
        self.options = Options(decay, eps_relative, eps, full_step, prior_examples, variance)

    def init(self, params: optax.Params) -> Statistics:
        """Returns the statistics of the start, in the dtype that the parameters ask for."""
        tree = LayerTree.of(params, self.layers)
        if self.layers.complete and (unlisted := tree.unlisted(self.layers)):
            raise ValueError(
                f"The parameters hold {', '.join(unlisted[:6])}{', ...' if len(unlisted) > 6 else ''}, which the pass "
                "that find_layers saw does not have. Join what it finds in each method, find_layers(..., method=a) | "
                "find_layers(..., method=b); what no layer of the model has passes unchanged with "
                "dataclasses.replace(layers, complete=False). Collections beside the parameters, as batch_stats, are "
                "not for an optimizer: tx.init(variables['params'])."
            )
        kernels = [kernel for kernel, _ in tree.weights.values()]
        dtype = statistics_dtype(np.result_type(np.float32, *(kernel.dtype for kernel in kernels)))
        return initial(self.packing, dtype, self.options)

    def refresh(
        self, statistics: Statistics, layers: Mapping[str, Layer], intermediates: Any
    ) -> tuple[Statistics, Table]:
        """Returns the statistics after a batch, and what the layers' coordinates are made of."""
        check(statistics, self.packing)
        if intermediates is None:
            raise TypeError(
                "update wants intermediates=, the records that capture(model)(...) returned beside the output, or "
                "KEEP_STATISTICS. What stands between your loop and update has to hand it on, as optax.chain and "
                "bnp_optax.linen.TrainState do; where something drops it, bind it: "
                "functools.partial(tx.update, intermediates=records). If this is an optimizer inside preconditioned, "
                "take BNP out of it: it would be applied twice."
            )
        records = None if intermediates is KEEP_STATISTICS else find_records(layers.values(), intermediates)

        def absorb_and_tabulate(
            statistics: Statistics, records: dict[str, InputMoments] | None, options: Options
        ) -> tuple[Statistics, Table]:
            if records is not None:
                statistics = absorb(statistics, records, options, layers)
            return statistics, tabulate(statistics, layers)

        like = (statistics, PartitionSpec())
        refreshed: tuple[Statistics, Table] = with_auto_axes(
            absorb_and_tabulate, statistics, records, self.options, like=like
        )
        return refreshed

    def map(self, method: Callable[[Coordinates, Weights], Weights], table: Table, tree: LayerTree) -> Any:
        """Applies a method of each layer's coordinates to its weights, and returns the whole tree."""

        def map_weights(table: Table, weights: dict[str, Weights]) -> dict[str, Weights]:
            mapped = {}
            for path, layer in tree.layers.items():
                canonical = to_canonical(layer, weights[path], table.mean.dtype)
                new = method(coordinates(self.packing, table, path), canonical)
                mapped[path] = from_canonical(layer, new, weights[path])
            return mapped

        return tree.replace(with_auto_axes(map_weights, table, tree.weights, like=tree.weights)).unflatten()


def _check(
    layers: Any, decay: Any, eps_relative: Any, eps: Any, variance: Any, scaling: Any, prior_examples: Any
) -> None:
    check_layers(layers)
    if is_known(decay) and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), but is {decay}.")
    for name, value in (("eps_relative", eps_relative), ("eps", eps), ("prior_examples", prior_examples)):
        if is_known(value) and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, but is {value}.")
    if variance not in get_args(VarianceRule):
        names = ", ".join(map(repr, get_args(VarianceRule)))
        raise ValueError(f"variance must be one of {names}, but is {variance!r}.")
    if is_known(scaling) and not 0 < scaling < float("inf"):
        raise ValueError(f"scaling must be a positive number of examples or the name of a rule, but is {scaling}.")
    is_rule = isinstance(scaling, str) and scaling in get_args(Scaling)
    if not (is_rule or is_known(scaling) or isinstance(scaling, jax.Array)):
        names = ", ".join(map(repr, get_args(Scaling)))
        raise ValueError(f"scaling must be a number of examples or one of {names}, but is {scaling!r}.")
