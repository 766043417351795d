"""Meshes with explicit axes, where every operation on a sharded array must know how its result is sharded."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def with_auto_axes(function: Callable[..., Any], *args: Any, like: Any = None) -> Any:
    """Calls a function with the explicit axes of its arguments' mesh automatic, so that it may slice and reshape.

    Args:
      function: a function of arrays, which it must not close over.
      *args: its arguments, trees of arrays.
      like: a tree of arrays, whose sharding the results get, or of PartitionSpecs; ``None`` replicates them.

    Returns:
      What it returns. Without explicit axes this is just the call.
    """
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(args)]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return function(*args)
    out = jax.tree.map(
        lambda leaf: NamedSharding(mesh, leaf if isinstance(leaf, PartitionSpec) else jax.typeof(leaf).sharding.spec),
        PartitionSpec() if like is None else like,
    )
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=out)(*args)
