"""Effective learning rates: how far a step turns each layer's weights, how these rates spread, and a warm-up by them.

In front of a normalization only the direction of a layer's weights W counts. A step of SGD with learning rate r and
gradient g turns it by the angle atan(r e), with the layer's effective learning rate per unit of learning rate

    e = ||g|| / ||W||

The gradient is orthogonal to W and in inverse proportion to its norm, so that ``e = c / ||W||^2`` with the base
gradient ``c = ||g|| ||W||``, the same at every scale of W. A step makes ``||W||^2`` grow by the factor ``1 + (r e)^2``;
if the base gradient stays, one step of learning rate r makes of e

    e / (1 + (r e)^2)

and under any constant learning rate all layers' rates become equal in the end. Deep networks begin with rates that are
orders of magnitude apart. A layer with ``r e > 1`` is turned too far: its rate falls to about ``1 / (r^2 e)``, below
those of layers that began far beneath it. So the learning rate at which ``r e = 1`` is critical.

The effective learning rates, their spread, a critical learning rate that depends on them alone, and a warm-up without
hyper-parameters are those of Mehmeti-Göpel and Wand, The Weight Dynamics of Learning Networks, ICML 2024, PMLR 235,
https://arxiv.org/abs/2306.00700, in whose abstract they stand. All formulas here are derived and may differ from
theirs. The model holds for plain SGD: momentum and weight decay change how norms grow.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from bnp_optax.arguments import required_params
from bnp_optax.contrib.units import unit_norms
from bnp_optax.layers import Layers, check_layers
from bnp_optax.moments import statistics_dtype
from bnp_optax.trees import LayerTree, to_canonical

SpreadKind = Literal["log10_range", "log10_std"]
CriticalRule = Literal["max", "top_two", "extremes"]


def effective_learning_rates(
    gradients: Any, params: Any, layers: Layers, *, per_unit: bool = False
) -> dict[str, jax.Array]:
    """Returns every layer's effective learning rate ``||g|| / ||W||``, per unit of learning rate.

    The learning rate times it is how large a step of plain SGD is, by the weights. It means what it says of layers in
    front of a normalization (:func:`~bnp_optax.contrib.is_scale_invariant`), with the gradient of the batch of the
    step, taken before the step.

    Args:
      gradients: the gradients, not changed by any optimizer.
      params: the parameters, in the same tree.
      layers: the layers; their biases do not count.
      per_unit: return the rate of every output unit instead, that of its own weights and gradient.

    Returns:
      The rates by layer, in float32 or wider: a scalar, or ``[stack]`` where one array holds the kernels of several
      layers, as of a scan; with ``per_unit``, ``[stack, group, output]``. Weights that are all zero have no direction,
      and 0 here.

    Raises:
      ValueError: if the trees do not hold the layers.

    Example:
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 2)),))
      >>> params, gradients = {"w": jnp.array([[3.0, 0.0], [4.0, 12.0]])}, {"w": jnp.array([[0.0, 0.0], [5.0, 12.0]])}
      >>> rates = effective_learning_rates(gradients, params, layers)
      >>> print(rates["w"], effective_learning_rates(gradients, params, layers, per_unit=True)["w"])
      1.0 [[[1. 1.]]]
    """
    of_gradients, of_params = LayerTree.of(gradients, layers), LayerTree.of(params, layers).weights
    rates = {}
    for path, own in of_gradients.weights.items():
        layer, weights = of_gradients.layers[path], of_params[path]
        dtype = statistics_dtype(np.result_type(np.float32, own.kernel.dtype, weights.kernel.dtype))
        of_gradient, of_kernel = (
            unit_norms(to_canonical(layer, each, dtype).kernel, None if per_unit else 1)[:, :, 0, 0]
            for each in (own, weights)
        )
        by_unit = jnp.where(of_kernel == 0, 0, of_gradient / jnp.where(of_kernel == 0, 1, of_kernel))
        rates[path] = by_unit if per_unit else by_unit[:, 0, 0].reshape(() if len(by_unit) == 1 else -1)
    return rates


def spread(rates: Any, kind: SpreadKind = "log10_range") -> jax.Array:
    """Returns how many orders of magnitude effective learning rates are apart.

    It does not depend on the learning rate. Rates of 0, of layers that got no gradient, are left out. Which measure the
    paper takes is not known to us: compare spreads of one kind alone.

    Args:
      rates: an array, or a tree of arrays, as :func:`effective_learning_rates` returns them.
      kind: ``"log10_range"``, the decimal logarithm of the largest by the smallest; ``"log10_std"``, the standard
        deviation of the decimal logarithms.

    Returns:
      A scalar; nan if no rate is positive.

    Raises:
      ValueError: if there is no such kind.

    Example:
      >>> print(spread({"first": jnp.float32(10.0), "last": jnp.float32(0.1)}).round(4))
      2.0
    """
    _check_name("kind", kind, SpreadKind)
    flat = _flat(rates)
    counts = flat != 0
    logarithms = jnp.log10(jnp.where(counts, flat, 1))
    if kind == "log10_std":
        return jnp.std(logarithms, where=counts)
    high = jnp.max(logarithms, where=counts, initial=-jnp.inf)
    low = jnp.min(logarithms, where=counts, initial=jnp.inf)
    return jnp.where(counts.any(), high - low, jnp.nan)


def critical_learning_rate(rates: Any, rule: CriticalRule = "max") -> jax.Array:
    """Returns the learning rate beyond which a step overshoots, of current effective learning rates alone.

    Of two layers with rates e and f, a step with learning rate ``1 / sqrt(e f)`` makes them equal in the model. A
    smaller one brings them closer; a greater one changes their order, and leaves them apart, in the limit as far as
    before (derived). In real networks base gradients change, so that large steps also widen the spread.

    Args:
      rates: an array, or a tree of arrays, as :func:`effective_learning_rates` returns them; 0 is left out.
      rule: which layers decide: ``"max"``, the fastest alone, 1/max(e), so that no layer turns by more than 45 degrees;
        ``"top_two"``, the two fastest, up to which all layers keep their order; ``"extremes"``, the fastest and the
        slowest, which overshoots those between.

    Returns:
      A scalar; infinite if no rate is positive, and nan if one is not finite.

    Raises:
      ValueError: if there is no such rule.

    Example:
      >>> rates = jnp.array([4.0, 1.0, 0.25])
      >>> print([float(critical_learning_rate(rates, rule)) for rule in ("max", "top_two", "extremes")])
      [0.25, 0.5, 1.0]
    """
    _check_name("rule", rule, CriticalRule)
    flat = _flat(rates)
    second, first = jnp.sort(jnp.concatenate([jnp.zeros(2, flat.dtype), flat]))[-2:]
    match rule:
        case "max":
            other = first
        case "top_two":
            other = jnp.where(second == 0, first, second)
        case "extremes":
            other = jnp.min(jnp.where(flat == 0, jnp.inf, flat), initial=jnp.inf)
    return jnp.where(first == 0, jnp.inf, jnp.sqrt(first / other) / first)


def predict_effective_learning_rates(rates: Any, learning_rate: ArrayLike, steps: int) -> Any:
    """Returns the effective learning rates that the model predicts: ``e <- e / (1 + (learning_rate e)^2)`` a step.

    The model (derived) is exact for SGD without momentum and weight decay where a layer's base gradient
    ``c = ||g|| ||W||`` stays, which training does not promise.

    Args:
      rates: an array, or a tree of arrays, as :func:`effective_learning_rates` returns them.
      learning_rate: of all steps.
      steps: how many.

    Returns:
      The tree, each array with a leading axis of ``steps + 1``: before the first step, after it, and so on.

    Example:
      >>> print(predict_effective_learning_rates(jnp.array([2.0, 0.5]), 1.0, steps=2)[:2])
      [[2.  0.5]
       [0.4 0.4]]
    """

    def step(rates: Any, _: None) -> tuple[Any, Any]:
        return jax.tree.map(lambda e: e / (1 + jnp.square(jnp.asarray(learning_rate, e.dtype) * e)), rates), rates

    _, path = jax.lax.scan(step, jax.tree.map(jnp.asarray, rates), length=steps + 1)
    return path


def random_walk(key: jax.Array, weights: Any, base_gradients: Any, learning_rate: ArrayLike, steps: int) -> Any:
    """Returns the effective learning rates of weights that random gradients drive, orthogonal to them.

    A network without data: each layer's gradient has a random direction orthogonal to its weights W, and the norm
    ``c / ||W||`` of a constant base gradient c. Its rates follow :func:`predict_effective_learning_rates`. It
    reconstructs a simulation of the paper.

    Args:
      key: of the directions.
      weights: a tree of arrays, each the weights of a layer, of two numbers at least.
      base_gradients: the tree of their base gradients c, each a number: of a network, ``e ||W||^2``.
      learning_rate: of all steps.
      steps: how many.

    Returns:
      The tree of rates, each ``[steps + 1]``, before the first step and after each.

    Example:
      >>> rates = random_walk(jax.random.key(0), jnp.ones(4), 8.0, learning_rate=1.0, steps=2)
      >>> print([round(float(rate), 3) for rate in rates])
      [2.0, 0.4, 0.345]
    """
    vectors = jax.tree.map(jnp.ravel, weights)
    constants = jax.tree.map(lambda w, c: jnp.asarray(c, w.dtype), vectors, base_gradients)
    treedef: Any = jax.tree.structure(vectors)

    def move(key: jax.Array, w: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = jax.random.normal(key, w.shape, w.dtype)
        z -= jnp.dot(z, w) / jnp.dot(w, w) * w
        gradient = c / jnp.linalg.norm(w) * z / jnp.linalg.norm(z)
        return w - jnp.asarray(learning_rate, w.dtype) * gradient, jnp.linalg.norm(gradient) / jnp.linalg.norm(w)

    def step(vectors: Any, key: jax.Array) -> tuple[Any, Any]:
        keys = treedef.unflatten(jax.random.split(key, treedef.num_leaves))
        moved = jax.tree.map(move, keys, vectors, constants)
        new, rates = jax.tree.transpose(treedef, None, moved)
        return new, rates

    _, rates = jax.lax.scan(step, vectors, jax.random.split(key, steps + 1))
    return rates


class CriticalLearningRateState(NamedTuple):
    """State of :func:`scale_by_critical_learning_rate`.

    Attributes:
      count: how many steps there were.
      reached: whether the warm-up is over.
      rate: the learning rate of the last step, float32 or wider; 0 before the first.
    """

    count: jax.Array  # type: ignore[assignment]  # as Optax's states call it
    reached: jax.Array
    rate: jax.Array


def scale_by_critical_learning_rate(
    learning_rate: optax.ScalarOrSchedule, layers: Layers, rule: CriticalRule = "max"
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus a learning rate that a warm-up leads up to its target, without hyper-parameters.

    In each step the learning rate is the target, or the critical one of the current effective learning rates if that is
    smaller. Once the critical one reaches the target, the warm-up is over for good::

        min(learning_rate, critical_learning_rate(e, rule))

    It takes the place of ``optax.scale_by_learning_rate``, and wants raw gradients and ``params``: first in a chain,
    with momentum or weight decay behind it. Norms double where ``r e = 1``, and with them the critical learning rate: a
    warm-up takes about log2(target / first critical rate) steps (derived).

    Layers without a gradient do not decide. If none has one, or if a layer's is not finite, the warm-up does not end in
    that step; the learning rate is the target in the first case and that of the step before in the second. What such
    gradients do to the parameters is for ``optax.apply_if_finite`` around the optimizer to prevent.

    Args:
      learning_rate: the target, a number or a schedule; not one that begins with a warm-up of its own.
      layers: the layers in front of a normalization, as :func:`~bnp_optax.contrib.is_scale_invariant` tells them. They
        decide on the learning rate, which is that of all parameters.
      rule: as for :func:`critical_learning_rate`.

    Returns:
      The transformation, whose state is a :class:`CriticalLearningRateState`.

    Raises:
      TypeError: if ``layers`` is no :class:`~bnp_optax.Layers`.
      ValueError: if it holds no layer, or there is no such rule; by ``init`` and ``update`` if it does not describe the
        parameters; by ``update`` if ``params`` is missing.

    Example:
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1)),))
      >>> params, gradients = {"w": jnp.array([[3.0], [4.0]])}, {"w": jnp.array([[8.0], [-6.0]])}
      >>> tx = optax.chain(scale_by_critical_learning_rate(1.0, layers), optax.trace(0.9))
      >>> updates, (state, _) = tx.update(gradients, tx.init(params), params)
      >>> print(state.rate, state.reached, updates["w"].ravel())
      0.5 False [-4.  3.]

    References:
      Mehmeti-Göpel and Wand, ICML 2024, https://arxiv.org/abs/2306.00700, has a warm-up without hyper-parameters from a
      critical learning rate. This one is derived.
    """
    check_layers(layers)
    _check_name("rule", rule, CriticalRule)

    def init_fn(params: optax.Params) -> CriticalLearningRateState:
        kernels = [kernel for kernel, _ in LayerTree.of(params, layers).weights.values()]
        dtype = statistics_dtype(np.result_type(np.float32, *(kernel.dtype for kernel in kernels)))
        return CriticalLearningRateState(jnp.zeros((), jnp.int32), jnp.zeros((), bool), jnp.zeros((), dtype))

    def update_fn(
        updates: optax.Updates,
        state: CriticalLearningRateState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CriticalLearningRateState]:
        del extra_args
        params = required_params(params)
        dtype = state.rate.dtype
        target = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate, dtype)
        rates = _flat(effective_learning_rates(updates, params, layers)).astype(dtype)
        critical = critical_learning_rate(rates, rule)
        reached = state.reached | (jnp.isfinite(critical) & (critical >= target))
        rate = jnp.where(reached, target, jnp.where(jnp.isnan(critical), state.rate, jnp.minimum(critical, target)))
        steps = jax.tree.map(functools.partial(_times, -rate), updates)
        return steps, CriticalLearningRateState(optax.safe_increment(state.count), reached, rate)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _times(number: jax.Array, array: jax.Array) -> jax.Array:
    """Returns the product in the dtype of the array; its range may be too small for the number."""
    return (number * array.astype(number.dtype)).astype(array.dtype)


def _flat(rates: Any) -> jax.Array:
    """Returns all rates of a tree as one vector in float32 or wider."""
    leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(rates)]
    dtype = statistics_dtype(np.result_type(np.float32, *(leaf.dtype for leaf in leaves)))
    return jnp.concatenate([jnp.zeros(0, dtype), *(leaf.astype(dtype) for leaf in leaves)])


def _check_name(argument: str, name: Any, names: Any) -> None:
    if name not in get_args(names):
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, get_args(names)))}, but is {name!r}.")
