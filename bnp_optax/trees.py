"""A tree of parameters, or of gradients, seen layer by layer.

Transformations that treat a layer as a whole go from the user's tree to its layers and back here, whatever the tree is
made of: dictionaries, boxes around parameters (``nn.Partitioned``, ``nnx.Variable``), places that a mask has emptied.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bnp_optax.layers import Layer, Layers, Parameter, Path


class Weights(NamedTuple):
    """The kernel and the bias of one layer, or their gradients.

    In canonical shape (:mod:`bnp_optax.layers`) the kernel is ``[stack, group, input, window, output]`` and the bias
    ``[stack, group, output]``; a layer without a bias has ``None``.
    """

    kernel: Any
    bias: Any


@dataclasses.dataclass(frozen=True)
class LayerTree:
    """A tree of parameters or gradients with the layers that it holds.

    Attributes:
      layers: the layers whose kernel the tree holds, by path. A masked kernel takes its layer out; a masked bias is a
        constant to the transformation, so that its layer is one without bias.
      leaves: all leaves by path, in the order of the tree; a boxed parameter has the path of its box. If all layers lie
        beneath one key, as in ``{"params": ...}``, the paths begin there, and those outside with ``".."``.
      treedef: the structure of the tree.

    Example:
      >>> layers = Layers((Layer.dense(("out", "kernel"), (2, 3)),))
      >>> tree = LayerTree.of({"embed": jnp.ones(4), "out": {"kernel": jnp.ones((2, 3))}}, layers)
      >>> {path: kernel.shape for path, (kernel, bias) in tree.weights.items()}
      {'out': (2, 3)}
      >>> jax.tree.map(jnp.shape, tree.replace({"out": Weights(jnp.zeros((2, 3)), None)}).unflatten())
      {'embed': (4,), 'out': {'kernel': (2, 3)}}
    """

    layers: dict[str, Layer]
    leaves: dict[Path, Any]
    treedef: Any

    @classmethod
    def of(cls, tree: Any, layers: Layers) -> "LayerTree":
        """Takes a tree apart.

        Args:
          tree: parameters, or gradients of the same structure.
          layers: the layers that describe them.

        Raises:
          ValueError: if the tree lacks a parameter of a layer, or has it in another shape, or if the layers may lie
            beneath several keys.
        """
        with_keys, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_masked)
        paths = [as_path(keys) for keys, _ in with_keys]
        if not paths:  # optax.tree.map_params calls init with a placeholder that has no leaves
            return cls({}, {}, treedef)
        leaves = dict(zip(paths, (leaf for _, leaf in with_keys), strict=True))
        prefix = _prefix(leaves, layers)
        parameters = _listed(layers)
        leaves = {_without(prefix, parameters, path): leaf for path, leaf in leaves.items()}
        held = {}
        for layer in layers.included:
            own = [parameter for parameter in layer.parameters if _is_held(parameter, leaves)]
            if layer.kernel in own:
                held[layer.path] = layer if layer.bias in own else dataclasses.replace(layer, bias=None)
        return cls(held, leaves, treedef)

    def unlisted(self, layers: Layers) -> list[str]:
        """Returns the names of the parameters that are neither in a layer nor excluded."""
        listed = _listed(layers)
        return ["/".join(path) for path, leaf in self.leaves.items() if path not in listed and not _is_masked(leaf)]

    @property
    def weights(self) -> dict[str, Weights]:
        """The kernel and bias of every layer by its path, in the tree's own shapes."""
        return {
            path: Weights(self.leaves[layer.kernel.path], None if layer.bias is None else self.leaves[layer.bias.path])
            for path, layer in self.layers.items()
        }

    def replace(self, weights: Mapping[str, Weights]) -> "LayerTree":
        """Returns the tree with other kernels and biases, in the tree's own shapes."""
        leaves = dict(self.leaves)
        for path, (kernel, bias) in weights.items():
            layer = self.layers[path]
            leaves[layer.kernel.path] = kernel
            if layer.bias is not None:
                leaves[layer.bias.path] = bias
        return dataclasses.replace(self, leaves=leaves)

    def unflatten(self) -> Any:
        """Returns the tree as the user knows it."""
        return self.treedef.unflatten(self.leaves.values())


def to_canonical(layer: Layer, weights: Weights, dtype: jax.typing.DTypeLike) -> Weights:
    """Returns the kernel and the bias of a layer in canonical shape, and in a dtype to compute in."""
    bias = None if layer.bias is None else layer.bias.to_canonical(weights.bias).astype(dtype)
    return Weights(layer.kernel.to_canonical(weights.kernel).astype(dtype), bias)


def from_canonical(layer: Layer, weights: Weights, like: Weights) -> Weights:
    """Returns what is in canonical shape in the layer's own shapes, and in the dtypes of ``like``."""
    kernel = layer.kernel.from_canonical(weights.kernel).astype(like.kernel.dtype)
    return Weights(
        kernel, None if layer.bias is None else layer.bias.from_canonical(weights.bias).astype(like.bias.dtype)
    )


def as_path(keys: tuple[Any, ...]) -> Path:
    """Returns the keys of JAX to a leaf as the path of a parameter."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _parameters(layers: Layers) -> list[Parameter]:
    return [parameter for layer in layers.included for parameter in layer.parameters]


def _listed(layers: Layers) -> set[Path]:
    """Returns the paths of all parameters that layers know of."""
    return {other.path for other in layers.excluded} | {parameter.path for parameter in _parameters(layers)}


def _prefix(leaves: Mapping[Path, Any], layers: Layers) -> Path:
    """Returns the keys beneath which a tree holds all layers, ``()`` if it does not."""
    unboxed = {path[:-1] for path in leaves}

    def holds_all(prefix: Path) -> bool:
        paths = [(*prefix, *parameter.path) for parameter in _parameters(layers)]
        held = [path in leaves or path in unboxed for path in paths]
        return any(held) and all(own or _is_emptied(path, leaves) for path, own in zip(paths, held, strict=True))

    if not layers or holds_all(()):
        return ()
    depth = min(len(parameter.path) for parameter in _parameters(layers))
    ends = {path[:-k] for path in (*leaves, *unboxed) for k in range(depth, len(path) + 1)}
    prefixes = sorted(prefix for prefix in ends if holds_all(prefix))
    if len(prefixes) > 1:
        names = ", ".join("/".join(prefix) or "no key" for prefix in prefixes)
        raise ValueError(
            f"The parameters hold {layers.included[0].path} and all other layers beneath each of {names}. Say which: "
            f"layers.under({', '.join(map(repr, prefixes[0]))}), and | for several networks."
        )
    return prefixes[0] if prefixes else ()


def _is_emptied(path: Path, leaves: Mapping[Path, Any]) -> bool:
    """Returns whether a mask is in the place of a path, or of a tree around it."""
    return any(_is_masked(leaves.get(path[:depth])) for depth in range(1, len(path) + 1))


def _without(prefix: Path, parameters: set[Path], path: Path) -> Path:
    """Returns the path of a leaf beneath a prefix, without the key that a box adds."""
    inner = path[len(prefix) :] if path[: len(prefix)] == prefix else ("..", *path)
    return inner[:-1] if inner[:-1] in parameters else inner


def _is_held(parameter: Parameter, leaves: Mapping[Path, Any]) -> bool:
    """Returns whether a tree holds a parameter, rather than a mask of it or of a tree around it."""
    if _is_emptied(parameter.path, leaves):
        return False
    if parameter.path not in leaves:
        raise ValueError(
            f"layers describes {parameter.name}, which the parameters do not hold. They hold "
            f"{', '.join('/'.join(path) for path in list(leaves)[:6])}{', ...' if len(leaves) > 6 else ''}. "
            "Call find_layers on the model that made these parameters. If they are some of the model's layers, take "
            "layers.select(...); if they lie beneath other keys, layers.under(...); if biases are to be left alone, "
            "mask these with optax.masked or optax.partition, as they may not be missing."
        )
    if (shape := jnp.shape(leaves[parameter.path])) != parameter.shape:
        raise ValueError(
            f"layers describes {parameter.name} with shape {parameter.shape}, but it has shape {shape}. Call "
            "find_layers again, on this model and with inputs of this shape."
        )
    return True
