"""Muon, for layers of every kind: which axes of a kernel are the inputs and the outputs of a matrix."""

import dataclasses
import itertools
import operator
from collections.abc import Callable
from typing import Any

import optax
import optax.contrib

from bnp_optax.layers import Layers, Parameter, check_layers
from bnp_optax.trees import LayerTree


def muon_dimension_numbers(layers: Layers) -> Callable[[optax.Params], Any]:
    """Says how each kernel is a matrix, or several, for ``optax.contrib.muon``.

    Muon makes the singular values of a matrix's step equal, so that it matters what the matrix is. Here it is what the
    layer multiplies its input with, as BNP sees it: all inputs of a unit, those of a convolution's window too, by all
    units, those of all heads of an attention too. Layers in one array, as ``nn.scan`` and ``nn.vmap`` stack them, are
    a matrix each; the groups of a grouped convolution are one, with the inputs of a group by the units of all.

    What is no kernel of a layer (biases, embeddings, scales) is left to the Adam inside Muon, and so are the kernels
    that ``layers.select(...)`` leaves out. Without these numbers ``optax.contrib.muon`` takes what has two axes.

    Args:
      layers: the layers whose kernels Muon trains.

    Returns:
      ``params -> tree``, for ``muon(..., muon_weight_dimension_numbers=...)``: a tree like the parameters, of
      ``optax.contrib.MuonDimensionNumbers`` for kernels and ``None`` elsewhere.

    Raises:
      TypeError: if ``layers`` is no :class:`~bnp_optax.Layers`.
      ValueError: if it holds no layer; from what is returned, if ``layers`` does not describe the parameters.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> import bnp_optax as bnp
      >>> model, x = nn.Conv(8, (3, 3)), jax.numpy.ones((1, 5, 5, 2))
      >>> layers = bnp.linen.find_layers(model, x)
      >>> numbers = bnp.muon_dimension_numbers(layers)
      >>> numbers(model.init(jax.random.key(0), x)["params"])
      {'bias': None, 'kernel': MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))}
      >>> tx = bnp.preconditioned(optax.contrib.muon(0.01, muon_weight_dimension_numbers=numbers), layers)

    References:
      Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
      https://kellerjordan.github.io/posts/muon/, flattens the window and the inputs of a convolution likewise. What the
      matrix of other layers is, is a choice of this library.
    """
    check_layers(layers)

    def of_params(params: optax.Params) -> Any:
        tree = LayerTree.of(params, layers)
        numbers: dict[Any, Any] = dict.fromkeys(tree.leaves)
        for layer in tree.layers.values():
            numbers[layer.kernel.path] = _of_kernel(layer.kernel)
        return dataclasses.replace(tree, leaves=numbers).unflatten()

    return of_params


def _of_kernel(kernel: Parameter) -> optax.contrib.MuonDimensionNumbers | None:
    roles = _roles_of_axes(kernel)
    outputs = tuple(axis for axis, own in enumerate(roles) if "o" in own)
    # the last factor of an unshared window may be 1, and then seems to be of the next axis, the outputs'
    inputs = tuple(axis for axis, own in enumerate(roles) if own & set("iw") and axis not in outputs)
    return optax.contrib.MuonDimensionNumbers(inputs, outputs) if inputs and outputs else None


def _roles_of_axes(kernel: Parameter) -> list[set[str]]:
    """Returns the roles that each axis of a kernel has in its own shape."""
    ends = list(itertools.accumulate(kernel.shape, operator.mul, initial=1))[1:]
    roles: list[set[str]] = [set() for _ in kernel.shape]
    axis, end = 0, 1
    for size, role in zip(kernel.split, kernel.roles, strict=True):
        end *= size
        roles[axis].add(role)
        if end == ends[axis] and axis + 1 < len(roles):
            axis += 1
    return roles
