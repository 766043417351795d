"""The output units of every layer: what the methods of this package treat as a whole.

A unit is one output of a layer, and its weights are all that lead there: a column of a dense kernel, a whole filter of
a convolution, one head's feature of an attention. In canonical shape (:mod:`bnp_optax.layers`) its axes are the window
and the inputs, whatever the layer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnp_optax.arguments import required_params
from bnp_optax.layers import Layer, Layers, check_layers
from bnp_optax.moments import statistics_dtype
from bnp_optax.trees import LayerTree, Weights, from_canonical, to_canonical


def sum_over_units(array: jax.Array, num_groups: int | None = None) -> jax.Array:
    """Sums an array in the shape of a kernel over each output unit's weights, or over those of several units.

    Args:
      array: ``[stack, group, input, window, output]``.
      num_groups: ``None`` sums over every unit alone; a number over each of so many groups of neighbouring outputs, as
        Group Normalization has them: 1 over the whole kernel.

    Returns:
      The sums, ``[stack, group, 1, 1, output]``.

    Raises:
      ValueError: if the number of groups does not divide that of the outputs.

    Example:
      >>> kernel = jnp.arange(6.0).reshape(1, 1, 2, 1, 3)  # two inputs, three outputs
      >>> print(sum_over_units(kernel).ravel(), sum_over_units(kernel, num_groups=1).ravel())
      [3. 5. 7.] [15. 15. 15.]
    """
    return _reduce(functools.partial(jnp.sum, keepdims=True), array, num_groups)


def unit_norms(kernel: jax.Array, num_groups: int | None = None) -> jax.Array:
    """Returns the Euclidean norm of every output unit's weights, however large or small they are.

    Args:
      kernel: ``[stack, group, input, window, output]``.
      num_groups: as for :func:`sum_over_units`.

    Returns:
      The norms, ``[stack, group, 1, 1, output]``.

    Raises:
      ValueError: as :func:`sum_over_units`.

    Example:
      >>> print(unit_norms(jnp.array([3.0, 4.0]).reshape(1, 1, 2, 1, 1)).item())
      5.0
    """
    return _reduce(norms, kernel, num_groups)


def norms(array: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Returns Euclidean norms over some axes, which stay with a length of 1.

    float32 loses the squares of numbers beyond 1e19, or below 1e-19, long before it loses the numbers: so the largest
    magnitude is taken out first.

    Args:
      array: of floating-point numbers.
      axes: those that the norms are of; ``None`` for all.

    Returns:
      The norms, in the array's dtype: infinite or nan where a number is.

    Example:
      >>> print(norms(jnp.array([[3e30, 4e30], [3e-30, 4e-30]]), (1,)).ravel())
      [5.e+30 5.e-30]
    """
    largest = jnp.abs(array).max(axes, keepdims=True, initial=0)
    scale = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
    return scale * jnp.sqrt(jnp.square(array / scale).sum(axes, keepdims=True))


def _reduce(reduce: Callable[..., jax.Array], array: jax.Array, num_groups: int | None) -> jax.Array:
    """Reduces every unit's weights to one number, and those of a group's units to one that they share."""
    of_units = reduce(array, (2, 3))
    if num_groups is None:
        return of_units
    stack, outputs = array.shape[0], array.shape[1] * array.shape[4]
    if num_groups < 1 or outputs % num_groups:
        raise ValueError(f"num_groups is {num_groups}, which must divide the {outputs} outputs of a layer.")
    of_groups = of_units.reshape(stack, num_groups, outputs // num_groups)
    return jnp.broadcast_to(reduce(of_groups, (2,)), of_groups.shape).reshape(of_units.shape)


def map_layers(
    function: Callable[[Layer, Weights, Any], Weights], updates: Any, params: optax.Params | None, layers: Layers
) -> Any:
    """Changes the updates of every layer; those of other parameters pass unchanged.

    Args:
      function: called with a layer, its updates and its parameters, both in canonical shape and in float32 or wider;
        returns the new updates.
      updates: a tree of gradients or updates.
      params: the parameters, in the same tree; ``None`` for a function that is called with ``None`` in their place.
      layers: the layers.

    Returns:
      The new updates, in the tree, shapes and dtypes of the old.

    Raises:
      ValueError: if ``layers`` does not describe the trees.

    Example:
      >>> layers = Layers((Layer.dense(("w",), (2, 1)),))
      >>> tree = {"w": jnp.ones((2, 1)), "b": jnp.ones(1)}
      >>> print(map_layers(lambda _, update, weights: Weights(3 * update.kernel, None), tree, tree, layers))
      {'b': Array([1.], dtype=float32), 'w': Array([[3.],
             [3.]], dtype=float32)}
    """
    of_updates = LayerTree.of(updates, layers)
    of_params = {} if params is None else LayerTree.of(params, layers).weights
    new = {}
    for path, own in of_updates.weights.items():
        layer, weights = of_updates.layers[path], of_params.get(path)
        dtypes = [each.kernel.dtype for each in (own, weights) if each is not None]
        dtype = statistics_dtype(np.result_type(np.float32, *dtypes))
        wide = None if weights is None else to_canonical(layer, weights, dtype)
        new[path] = from_canonical(layer, function(layer, to_canonical(layer, own, dtype), wide), own)
    return of_updates.replace(new).unflatten()


def transform_layers(
    function: Callable[[Layer, Weights, Any], Weights], layers: Layers, needs_params: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation without a state that changes the updates of every layer.

    Args:
      function: as for :func:`map_layers`.
      layers: the layers.
      needs_params: whether the function is called with the parameters, and not with ``None``.

    Returns:
      The transformation. Its ``init`` refuses parameters that the layers do not describe.

    Raises:
      TypeError: if ``layers`` is no :class:`~bnp_optax.Layers`.
      ValueError: if it holds no layer; by ``init`` and ``update``, as :func:`map_layers`, and by ``update`` without
        parameters that are needed.

    Example:
      >>> layers = Layers((Layer.dense(("w",), (2, 1)),))
      >>> tx = transform_layers(lambda _, update, weights: Weights(3 * update.kernel, None), layers)
      >>> tree = {"w": jnp.ones((2, 1))}
      >>> print(tx.update(tree, tx.init(tree), tree)[0]["w"].ravel())
      [3. 3.]
    """
    check_layers(layers)

    def init_fn(params: optax.Params) -> optax.EmptyState:
        LayerTree.of(params, layers)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        return map_layers(function, updates, required_params(params) if needs_params else None, layers), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
