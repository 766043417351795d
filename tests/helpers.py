"""What several tests do to the library's objects."""

import dataclasses

import jax
import jax.numpy as jnp
import optax.contrib


def with_statistics(statistics, path, **fields):
    """Returns statistics in which those of one layer have other values, given in the layer's own shapes."""
    _, entries, rows, inputs = statistics.packing.places[path]
    parts = {"mean": inputs, "variance": inputs, "damping": rows, "scale": entries, "seen": entries, "skipped": entries}
    changed = {
        name: getattr(statistics, name).at[parts[name]].set(jnp.ravel(jnp.asarray(value)))
        for name, value in fields.items()
    }
    return dataclasses.replace(statistics, **changed)


def muon_dimensions(params):
    """Muon on all kernels, that of the convolution as `[window * inputs, outputs]`."""
    two, four = optax.contrib.MuonDimensionNumbers(), optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
    return jax.tree.map(lambda leaf: {2: two, 4: four}.get(leaf.ndim), params)
