"""What normalization changes in a network: activations and gradients by depth, and how large a step may be.

Bjorck et al. trace what Batch Normalization does to one thing: it enables training with larger learning rates. Without
it, large steps make activations grow with depth and the loss diverge. These functions measure that on any network, by
any optimizer; they take arrays, or a function of the parameters that returns the loss, and can be compiled.

An activation is ``[examples, ..., channels]``, the axes between being positions, and its gradient ``d loss / d a`` has
the same shape; ``docs/contrib/diagnostics.md`` gets both from Linen, by ``capture_intermediates`` and ``perturb``, and
from NNX. A function of one array goes over those of all layers, in whatever tree Flax returns them, by
``jax.tree.map(diagnostics.layer_moments, activations)``. Statistics are taken in float32 or wider.

Where a network is normalized, take what enters the activation function: the gradient before Batch Normalization sums to
zero over a channel, whatever the network does. One thing to compare is a setting and no function: a network with Batch
Normalization before its classifier alone.

The first two sentences are the paper's abstract; the definitions by formulas are this library's.

References:
  Bjorck, Gomes, Selman, Weinberger, Understanding Batch Normalization, NeurIPS 2018, https://arxiv.org/abs/1806.02375
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from bnp_optax.contrib.units import norms
from bnp_optax.moments import statistics_dtype


class Moments(NamedTuple):
    """Means and variances of activations."""

    mean: jax.Array
    variance: jax.Array


class ChannelGradients(NamedTuple):
    """How the gradients of each channel's activations add up, ``[channels]``.

    Attributes:
      net: the magnitude of their sum over examples and positions.
      total: the sum of their magnitudes.
    """

    net: jax.Array
    total: jax.Array

    @property
    def ratio(self) -> jax.Array:
        """``net / total``, from 0 to 1; nan for a channel that has no gradient at all."""
        return jnp.where(self.total > 0, self.net / jnp.where(self.total > 0, self.total, 1), jnp.nan)


def channel_moments(activations: ArrayLike) -> Moments:
    """Returns mean and variance of every channel over examples and positions.

    Args:
      activations: of a layer, ``[examples, ..., channels]``; mean and variance are ``[channels]``.

    Raises:
      ValueError: if the activations have no axis of examples, or no elements.

    Example:
      >>> channel_moments(jnp.array([[1.0, -2.0], [3.0, -2.0]]))
      Moments(mean=Array([ 2., -2.], dtype=float32), variance=Array([1., 0.], dtype=float32))
    """
    array, positions = _with_positions(activations)
    mean = array.mean(positions, keepdims=True)
    return Moments(mean.reshape(-1), jnp.square(array - mean).mean(positions))


def layer_moments(activations: ArrayLike) -> Moments:
    """Returns how far a layer's channels are from mean 0, and how large their variance is.

    ``mean_c |mean_{n,x,y} a|`` and ``mean_c var_{n,x,y} a``: by depth, on a logarithmic axis, at the start and after a
    step of some size, they tell whether activations grow with depth.

    Args:
      activations: of a layer, ``[examples, ..., channels]``; mean and variance are scalars.

    Raises:
      ValueError: as :func:`channel_moments`.

    Example:
      >>> activations = {"first": jnp.array([[1.0, -2.0], [3.0, -2.0]]), "second": jnp.array([[0.0], [4.0]])}
      >>> print({name: float(own.mean) for name, own in jax.tree.map(layer_moments, activations).items()})
      {'first': 2.0, 'second': 2.0}
    """
    mean, variance = channel_moments(activations)
    return Moments(jnp.abs(mean).mean(), variance.mean())


def channel_heat_map(rows: Sequence[ArrayLike], order: int | None = None) -> Moments:
    """Returns mean and variance of every channel as matrices to be shown in colours.

    A row is a layer, or the same layer at a step of training. The argument is a sequence because a compiled function
    gets the names of a mapping in the order of the alphabet, ``Dense_10`` before ``Dense_2``.

    Args:
      rows: activations of equal numbers of channels, each ``[examples, ..., channels]``.
      order: the row by whose rising means all rows are sorted, which suits steps, as a column stays one channel;
        ``None`` sorts each by its own, which suits layers, whose channels have nothing to do with each other.

    Returns:
      Two matrices ``[rows, channels]``; the variances stand where the means do.

    Raises:
      ValueError: as :func:`channel_moments`, or if there is no row, or rows of different channels.

    Example:
      >>> print(channel_heat_map([jnp.array([[3.0, 1.0]]), jnp.array([[5.0, 6.0]])], order=0).mean)
      [[1. 3.]
       [6. 5.]]
    """
    moments = [channel_moments(row) for row in rows]
    if len(widths := {own.mean.size for own in moments}) != 1:
        raise ValueError(f"Rows must be equally wide, but have {sorted(widths)} channels: select layers of one width.")
    mean, variance = (jnp.stack(own) for own in zip(*moments, strict=True))
    by = jnp.argsort(mean) if order is None else jnp.broadcast_to(jnp.argsort(mean[order]), mean.shape)
    return Moments(jnp.take_along_axis(mean, by, 1), jnp.take_along_axis(variance, by, 1))


def gradient_norm(gradients: ArrayLike) -> jax.Array:
    """Returns the Euclidean norm of an array, however small its entries are.

    Gradients of activations may shrink by orders of magnitude from layer to layer; float32 loses their squares long
    before it loses them.

    Args:
      gradients: of a layer's activations or of a kernel, of any shape; the norm is a scalar.

    Example:
      >>> print(gradient_norm(jnp.array([3e-30, 4e-30])))
      5e-30
    """
    return norms(_wide(gradients)).squeeze()


def magnitude_histogram(values: ArrayLike, edges: ArrayLike) -> jax.Array:
    """Counts entries by their magnitude, the bins usually equal on a logarithmic scale.

    Args:
      values: the gradient of one kernel, say, of any shape.
      edges: rising and positive, ``[bins + 1]``: ``jnp.logspace(-8, 0, 33)``.

    Returns:
      Counts, ``[bins + 2]`` int32: entries below the first edge, zeros among them; those of each bin, its lower edge
      included; those from the last edge on, with whatever is not finite. They sum to the number of entries.

    Raises:
      ValueError: if the edges are not a vector of at least one.

    Example:
      >>> print(magnitude_histogram(jnp.array([0.0, -0.02, 0.1, 0.5, 7.0]), jnp.array([0.01, 0.1, 1.0])))
      [1 1 2 1]
    """
    array, edges = jnp.abs(_wide(values)).reshape(-1), jnp.asarray(edges)
    if edges.ndim != 1 or not edges.size:
        raise ValueError(f"edges must be a vector of rising magnitudes, [bins + 1], but its shape is {edges.shape}.")
    bins = jnp.searchsorted(edges.astype(array.dtype), array, side="right")
    return jnp.zeros(edges.size + 1, jnp.int32).at[bins].add(1)


def input_independence(gradients: ArrayLike) -> ChannelGradients:
    """Returns how much of the gradient of each channel's activations is the same for all examples and positions.

    ``|sum_{n,x,y} g|`` beside ``sum_{n,x,y} |g|``. A ratio of 1 says that all push the channel the same way, whatever
    the input; at 0 they cancel. The numerator is what a bias of the channel would get as its gradient.

    Args:
      gradients: of a layer's activations, ``[examples, ..., channels]``.

    Raises:
      ValueError: as :func:`channel_moments`.

    Example:
      >>> print(input_independence(jnp.array([[1.0, 2.0], [1.0, -2.0], [2.0, 0.0]])).ratio)
      [1. 0.]
    """
    array, positions = _with_positions(gradients)
    return ChannelGradients(jnp.abs(array.sum(positions)), jnp.abs(array).sum(positions))


def logit_gradients(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Returns the gradient of the mean cross entropy with respect to the logits, to be shown in colours.

    ``(softmax(logits) - one_hot(labels)) / examples``. Where a network gives all examples the same answer
    (:func:`modal_share`), its rows are constant but for the labels.

    Args:
      logits: ``[examples, classes]``.
      labels: the classes, ``[examples]`` of integers.

    Returns:
      The gradient transposed, ``[classes, examples]``; nan for an example whose label is no class.

    Raises:
      ValueError: if the shapes are others.
      TypeError: if the labels are no integers.

    Example:
      >>> print(logit_gradients(jnp.zeros((2, 2)), jnp.array([0, 1])))
      [[-0.25  0.25]
       [ 0.25 -0.25]]
    """
    (array, _), classes = _with_positions(logits), jnp.asarray(labels)
    if array.ndim != 2 or classes.shape != array.shape[:1]:
        raise ValueError(f"Expected logits [examples, classes] and labels [examples]: {array.shape}, {classes.shape}.")
    if not jnp.issubdtype(classes.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, the classes' numbers, but their dtype is {classes.dtype}.")
    one_hot = jax.nn.one_hot(classes, array.shape[1], dtype=array.dtype)
    known = one_hot.sum(1, keepdims=True) > 0
    return jnp.where(known, jax.nn.softmax(array) - one_hot, jnp.nan).T / array.shape[0]


def modal_share(logits: ArrayLike) -> jax.Array:
    """Returns which share of the examples is given the class that most are given.

    1 says that the network gives all the same answer, ``1 / classes`` that its answers are evenly spread.

    Args:
      logits: ``[..., classes]``, all axes but the last being examples.

    Returns:
      A scalar; nan if a logit is nan, as then there are no answers.

    Raises:
      ValueError: as :func:`channel_moments`.

    Example:
      >>> print(modal_share(jnp.array([[1.0, 0.0], [3.0, 1.0], [2.0, 5.0], [1.0, 0.0]])))
      0.75
    """
    array, _ = _with_positions(logits)
    answers = array.argmax(-1).reshape(-1)
    counts = jnp.zeros(array.shape[-1], jnp.int32).at[answers].add(1)
    return jnp.where(jnp.isnan(array).any(), jnp.nan, counts.max().astype(array.dtype) / answers.size)


def largest_usable_rate(
    rates: ArrayLike, accuracies: ArrayLike, losses: ArrayLike | None = None, *, margin: float
) -> jax.Array:
    """Returns the largest learning rate at which a method comes near its best, of a grid of equal trainings.

    Args:
      rates: of the runs, ``[runs]``, in any order; a geometric grid.
      accuracies: at their ends, ``[runs]``; of a loss, its negative.
      losses: at their ends, ``[runs]``.
      margin: how much below the best accuracy is near, in the unit of the accuracies: 1 for a point of percent.

    Returns:
      A scalar; a run whose accuracy or loss is not finite has diverged and does not count, and if all have, it is nan.

    Raises:
      ValueError: if the arguments are not vectors of one length, or the margin is negative.

    Example:
      >>> rates = jnp.array([0.01, 0.1, 1.0, 10.0])
      >>> print(largest_usable_rate(rates, jnp.array([91.0, 96.0, 95.5, jnp.nan]), margin=1.0))
      1.0
    """
    columns = [_wide(column) for column in (rates, accuracies, accuracies if losses is None else losses)]
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1:
        raise ValueError(f"Expected vectors of one length, but the shapes are {[column.shape for column in columns]}.")
    if not margin >= 0:
        raise ValueError(f"margin must not be negative, but is {margin}.")
    finite = jnp.isfinite(columns[1]) & jnp.isfinite(columns[2])
    usable = finite & (columns[1] >= columns[1].max(initial=-jnp.inf, where=finite) - margin)
    return jnp.where(usable.any(), columns[0].max(initial=-jnp.inf, where=usable), jnp.nan)


def loss_along(
    loss_fn: Callable[[optax.Params], jax.Array], params: optax.Params, direction: optax.Updates, sizes: ArrayLike
) -> jax.Array:
    """Returns the loss after steps of several sizes in one direction, relative to the loss before.

    ``L(params + s direction) / L(params)``. With the update of an optimizer of learning rate 1 for the direction, the
    sizes are learning rates: ``jax.tree.map(jnp.negative, grads)`` for SGD; for BNP, Adam or any other what ``update``
    returns. Take the same batch for the loss and the direction. Losses are computed one after the other, so that memory
    does not grow with their number.

    Args:
      loss_fn: a function of the parameters whose value is a scalar.
      params: where the steps begin; they stay as they are.
      direction: a tree like ``params``.
      sizes: ``[sizes]``, for example ``jnp.logspace(-3, 1, 9)``.

    Returns:
      The ratios, ``[sizes]``; not finite where the loss is not.

    Raises:
      ValueError: if the direction is no tree like the parameters, or the sizes are no vector.

    Example:
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> loss_fn = lambda p: jnp.square(p["w"]).sum() / 2
      >>> downhill = jax.tree.map(jnp.negative, jax.grad(loss_fn)(params))
      >>> print(loss_along(loss_fn, params, downhill, jnp.array([0.0, 0.5, 1.0, 3.0])))
      [1.   0.25 0.   4.  ]
    """
    start, end = ({(path, jnp.shape(x)) for path, x in jax.tree.leaves_with_path(tree)} for tree in (params, direction))
    if differ := sorted({jax.tree_util.keystr(path) for path, _ in start ^ end}):
        raise ValueError(
            f"The direction is no tree like the parameters: they differ at {', '.join(differ[:6])}. Pass what an "
            "optimizer's update returned for them, or their gradients."
        )
    array = jnp.asarray(sizes)
    if array.ndim != 1:
        raise ValueError(f"sizes must be a vector, but its shape is {array.shape}.")

    def loss_at(size: jax.Array) -> jax.Array:
        def move(leaf: Any, step: Any) -> jax.Array:
            start = _wide(leaf)
            change = size.astype(start.dtype) * jnp.asarray(step).astype(start.dtype)
            return (start + change).astype(jnp.result_type(leaf))

        return _wide(loss_fn(jax.tree.map(move, params, direction)))

    losses: jax.Array = jax.lax.map(loss_at, array)
    return losses / _wide(loss_fn(params))


def sgd_noise(
    loss_fn: Callable[[optax.Params, Any], jax.Array],
    params: optax.Params,
    examples: Any,
    rate: ArrayLike,
    batch_size: int,
) -> jax.Array:
    """Returns the expected squared distance of a step of SGD from that of the whole gradient.

    With ``g_i`` the gradients of the single examples and ``g`` their mean::

        rate^2 mean_i |g_i - g|^2 / batch_size

    exactly so for batches drawn with replacement; for batches of an epoch of N examples ``(N - batch_size) / (N - 1)``
    of it, so that it is a bound. Gradients are computed one after the other, twice: memory holds but one. With Batch
    Normalization an example has no loss of its own: let ``examples`` be whole batches then, with a further axis, and
    ``batch_size`` be 1, for the noise of a step on one of them.

    Args:
      loss_fn: ``(params, example) -> scalar``.
      params: where the gradients are taken.
      examples: a tree of arrays whose first axis is the examples'.
      rate: the learning rate.
      batch_size: examples a step.

    Raises:
      ValueError: if ``batch_size`` is below 1, or ``examples`` have no common first axis.

    Example:
      >>> loss_fn = lambda params, x: params["w"] * x  # gradients 1, 2 and 6, of variance 14 / 3
      >>> noise = sgd_noise(loss_fn, {"w": jnp.ones(())}, jnp.array([1.0, 2.0, 6.0]), rate=0.1, batch_size=2)
      >>> print(noise.round(5))
      0.02333
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(examples)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(f"examples must be arrays with one common first axis, but their first axes are {lengths}.")
    if not batch_size >= 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}.")
    count = lengths.pop()[0]

    def gradient(example: Any) -> Any:
        return jax.tree.map(_wide, jax.grad(loss_fn)(params, example))

    def add(total: Any, example: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(example)), None

    def squared_distance(example: Any) -> jax.Array:
        return jnp.asarray(optax.tree.norm(optax.tree.sub(gradient(example), whole), squared=True))

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(_wide(leaf)), params)
    total, _ = jax.lax.scan(add, zeros, examples)
    whole = jax.tree.map(lambda leaf: leaf / count, total)
    distances: jax.Array = jax.lax.map(squared_distance, examples)
    return jnp.square(jnp.asarray(rate, distances.dtype)) * distances.mean() / batch_size


def _wide(array: ArrayLike) -> jax.Array:
    """Returns an array in float32, or in float64 if that is its own."""
    array = jnp.asarray(array)
    return array.astype(statistics_dtype(array.dtype))


def _with_positions(activations: ArrayLike) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns activations in float32 or wider, and which of their axes are examples and positions."""
    array = _wide(activations)
    if array.ndim < 2 or not array.size:
        raise ValueError(
            f"Expected an array [examples, ..., channels] that is not empty, but the shape is {array.shape}; a tree of "
            "such arrays goes through jax.tree.map."
        )
    return array, tuple(range(array.ndim - 1))
