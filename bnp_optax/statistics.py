"""The running statistics of all layers: the state of the transformations, and how it absorbs the records of a batch."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax import moments
from bnp_optax.coordinates import Coordinates
from bnp_optax.layers import Layer
from bnp_optax.moments import InputMoments, VarianceRule
from bnp_optax.packing import Packing

RESTORE = "If it comes from a checkpoint, restore one of this model; if the model has changed, call init again."


class LayerStatistics(NamedTuple):
    """The running statistics of one layer.

    Attributes:
      mean: running mean of its input, ``[stack, group, input]``, float32 (float64 if any kernel is).
      variance: running variance, same shape and dtype.
      damping: ``eps1 max(variance) + eps2``, what the variance of every input of a unit is increased by,
        ``[stack, group]``; of a layer without a bias the raw second moment stands for the variance.
      scale: q2, what divides the step, of the last recorded batch, ``[stack]``.
      seen: examples absorbed so far, ``[stack]``, int32.
      skipped: batches left out because their moments were not finite, ``[stack]``, int32.
    """

    mean: jax.Array
    variance: jax.Array
    damping: jax.Array
    scale: jax.Array
    seen: jax.Array
    skipped: jax.Array


# What each array has one number of, and how many axes these have in a layer's own shape.
_NUMBERS_OF = {
    "mean": "inputs",
    "variance": "inputs",
    "damping": "rows",
    "scale": "entries",
    "seen": "entries",
    "skipped": "entries",
}
_RANKS = {"entries": 1, "rows": 2, "inputs": 3}


@functools.partial(jax.tree_util.register_dataclass, data_fields=LayerStatistics._fields, meta_fields=("packing",))
@dataclasses.dataclass(frozen=True)
class Statistics:
    """The running statistics of all layers; ``statistics["Conv_0"].mean`` is the mean of one.

    It is the state of :func:`~bnp_optax.scale_by_bnp`. Its arrays hold all layers behind one another; iterating over it
    yields the layers' paths, and by its path each layer is had as :class:`LayerStatistics`.

    Attributes:
      packing: which part of the arrays belongs to which layer; not an array, but part of the state's structure.
      mean: see :class:`LayerStatistics`, as for all that follow; ``[inputs of all layers]``.
      variance: ``[inputs of all layers]``.
      damping: ``[rows of all layers]``.
      scale: ``[entries of all layers]``.
      seen: ``[entries of all layers]``.
      skipped: ``[entries of all layers]``.

    Example:
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("a", "kernel"), (3, 8)), bnp.Layer.dense(("b", "kernel"), (8, 2))))
      >>> params = {"a": {"kernel": jnp.ones((3, 8))}, "b": {"kernel": jnp.ones((8, 2))}}
      >>> state = bnp.scale_by_bnp(layers).init(params)
      >>> list(state), state["a"].variance
      (['a', 'b'], Array([[[1., 1., 1.]]], dtype=float32))
    """

    packing: Packing
    mean: jax.Array
    variance: jax.Array
    damping: jax.Array
    scale: jax.Array
    seen: jax.Array
    skipped: jax.Array

    def __getitem__(self, path: str) -> LayerStatistics:
        if path not in self.packing.places:
            raise KeyError(f"no layer is {path}, but there are {', '.join(self)}")
        place = self.packing.places[path]

        def part(name: str) -> jax.Array:
            numbers = _NUMBERS_OF[name]
            x: jax.Array = getattr(self, name)
            shape = place.shape[: _RANKS[numbers]]
            return x[..., getattr(place, numbers)].reshape(*x.shape[:-1], *shape)  # leading axes: as under `jax.vmap`

        return LayerStatistics(*map(part, LayerStatistics._fields))

    def __iter__(self) -> Iterator[str]:
        return iter(self.packing.places)

    def __len__(self) -> int:
        return len(self.packing.places)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("decay", "eps_relative", "eps", "full_step", "prior_examples"),
    meta_fields=("variance",),
)
@dataclasses.dataclass(frozen=True)
class Options:
    """How statistics absorb a batch; the numbers may be arrays, as injected hyperparameters are.

    Attributes:
      decay: rho.
      eps_relative: eps1.
      eps: eps2.
      full_step: C of ``q2 = max(C / N, 1)``, the examples from which on steps are whole; a number, or one an entry.
      prior_examples: the weight of the start, ``None`` for a constant decay.
      variance: the rule of the running variance.
    """

    decay: Any
    eps_relative: Any
    eps: Any
    full_step: Any
    prior_examples: Any
    variance: VarianceRule


def initial(packing: Packing, dtype: jax.typing.DTypeLike, options: Options) -> Statistics:
    """Returns the statistics before the first batch: mean 0 and variance 1."""
    entries, rows, inputs = packing.size
    return Statistics(
        packing,
        mean=jnp.zeros(inputs, dtype),
        variance=jnp.ones(inputs, dtype),
        damping=jnp.full(rows, jnp.asarray(options.eps_relative, dtype) + jnp.asarray(options.eps, dtype)),
        scale=jnp.ones(entries, dtype),
        seen=jnp.zeros(entries, jnp.int32),
        skipped=jnp.zeros(entries, jnp.int32),
    )


def absorb(
    statistics: Statistics, records: Mapping[str, InputMoments], options: Options, layers: Mapping[str, Layer]
) -> Statistics:
    """Returns the statistics after a batch.

    Args:
      statistics: those before it.
      records: the moments of the layers' inputs by path, in canonical shape. A layer without a record, and one whose
        record has no positions or no examples, stays as it is; so does one whose moments are not finite, which counts
        that.
      options: how the batch is absorbed.
      layers: the layers by path; those without a bias are damped by their raw second moment.
    """
    packing, dtype = statistics.packing, statistics.mean.dtype
    batch = packing.pack(records, dtype)
    decay = moments.running_decay(statistics.seen, batch.examples, options.decay, options.prior_examples)
    decay_of_input = packing.rows_to_inputs(packing.entries_to_rows(decay))
    mean, variance = moments.absorb(
        statistics.mean, statistics.variance, batch.mean, batch.variance, decay_of_input, options.variance
    )
    # The maximum of a row also tells whether all of its numbers are finite.
    moment = jnp.where(jnp.isfinite(mean), _moment(packing, mean, variance, layers), jnp.nan)
    largest = packing.over_inputs(jnp.max, moment)
    finite = packing.over_groups(jnp.all, jnp.isfinite(largest))
    # not, for instance, in a branch that was not taken; a nan is to be skipped
    called = ~((batch.positions <= 0) | (batch.examples <= 0))
    accept = finite & called
    accept_row = packing.entries_to_rows(accept)
    accept_input = packing.rows_to_inputs(accept_row)
    damping = jnp.asarray(options.eps_relative, dtype) * largest + jnp.asarray(options.eps, dtype)
    scale = moments.batch_scale(options.full_step, batch.examples)
    return Statistics(
        packing,
        mean=jnp.where(accept_input, mean, statistics.mean),
        variance=jnp.where(accept_input, variance, statistics.variance),
        damping=jnp.where(accept_row, damping, statistics.damping),
        scale=jnp.where(called, scale, statistics.scale),
        seen=_saturating_add(statistics.seen, jnp.where(accept, batch.examples, 0)),
        skipped=_saturating_add(statistics.skipped, called & ~finite),
    )


class Table(NamedTuple):
    """What the coordinates of all layers are made of.

    Attributes:
      mean: mu, ``[inputs of all layers]``.
      rate: 1 / (q sd) of the inputs and, behind them, 1 / q of the rows, ``[inputs and rows of all layers]``.
    """

    mean: jax.Array
    rate: jax.Array


def tabulate(statistics: Statistics, layers: Mapping[str, Layer]) -> Table:
    """Computes what the coordinates of all layers are made of.

    Args:
      statistics: the statistics.
      layers: the layers by path; of those without a bias the raw second moment stands for the variance.
    """
    packing, mean = statistics.packing, statistics.mean
    s = _moment(packing, mean, statistics.variance, layers) + packing.rows_to_inputs(statistics.damping)
    q2 = packing.entries_to_rows(statistics.scale)
    q2_s = packing.rows_to_inputs(q2) * s
    # reciprocals of a few numbers here, as a division of the kernels' many would keep XLA from fusing it with its uses
    rate = jnp.where(q2_s > 0, jax.lax.rsqrt(jnp.where(q2_s > 0, q2_s, 1)), 0)
    return Table(mean, jnp.concatenate([rate, jax.lax.rsqrt(q2)]))


def coordinates(packing: Packing, table: Table, path: str) -> Coordinates:
    """Returns the coordinates of one layer."""
    shape, _, rows, inputs = packing.places[path]
    first_row = packing.size[2]
    own_inputs = np.arange(inputs.start, inputs.stop)
    own_rows = np.arange(first_row + rows.start, first_row + rows.stop)
    of_layer: Coordinates = _look_up(table, own_inputs, own_rows, shape)
    return of_layer


@functools.partial(jax.jit, static_argnums=3)  # so that it is traced once for all layers of a shape
def _look_up(table: Table, inputs: jax.Array, rows: jax.Array, shape: tuple[int, int, int]) -> Coordinates:
    """Returns the coordinates of a layer with these consecutive inputs and rows."""
    mean, rate, bias_rate = jax.lax.platform_dependent(table, inputs, rows, cpu=_by_gather, default=_by_slices)
    return Coordinates(mean.reshape(*shape, 1, 1), rate.reshape(*shape, 1, 1), bias_rate.reshape(*shape[:2], 1))


def _by_slices(table: Table, inputs: jax.Array, rows: jax.Array) -> tuple[jax.Array, ...]:
    def part(x: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, index[0], index.size)

    return part(table.mean, inputs), part(table.rate, inputs), part(table.rate, rows)


def _by_gather(table: Table, inputs: jax.Array, rows: jax.Array) -> tuple[jax.Array, ...]:
    """For CPUs, for which XLA compiles a slice of every place anew (13 ms each), as the place is part of its code.

    The indices of a gather are data, so that layers of equal shape share its code; but not of a single index, of which
    XLA makes a slice. So the rate of a bias is looked up with those of the inputs.
    """
    both = jnp.concatenate([inputs, rows])
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,))
    mean, rate = (
        jax.lax.gather(x, index[:, None], numbers, slice_sizes=(1,), mode="promise_in_bounds")
        for x, index in ((table.mean, inputs), (table.rate, both))
    )
    return mean, rate[: inputs.size], rate[inputs.size :]


def _moment(packing: Packing, mean: jax.Array, variance: jax.Array, layers: Mapping[str, Layer]) -> jax.Array:
    """Returns the variance of every input, or the raw second moment where a layer without a bias cannot centre it."""
    without_bias = packing.per_entry(lambda path: path in layers and layers[path].bias is None) > 0
    if not without_bias.any():
        return variance
    raw = packing.rows_to_inputs(packing.entries_to_rows(jnp.asarray(without_bias)))
    return jnp.where(raw, variance + jnp.square(mean), variance)


def _saturating_add(count: jax.Array, more: jax.Array) -> jax.Array:
    room = np.iinfo(count.dtype).max - count
    return count + jnp.minimum(room, more.astype(count.dtype))


def check(statistics: Any, packing: Packing) -> None:
    """Checks that statistics are those of the layers with this packing.

    Raises:
      TypeError: if they are something else.
      ValueError: if they are of other layers; names the first that differs.
    """
    if not isinstance(statistics, Statistics):
        raise TypeError(f"The state must be what init returned, not {type(statistics).__name__}. {RESTORE}")
    saved, needed = dict(statistics.packing.shapes), dict(packing.shapes)
    for path in (*needed, *saved):
        if saved.get(path) != needed.get(path):
            raise ValueError(
                f"The state's moments of {path} have shape {saved.get(path)}, but the layers need {needed.get(path)} "
                f"(stack, group, input). {RESTORE}"
            )
    for name, kind in _NUMBERS_OF.items():
        needed_shape = (packing.size[_RANKS[kind] - 1],)
        if (shape := jnp.shape(getattr(statistics, name))) != needed_shape:
            raise ValueError(f"The state's {name} has shape {shape}, but the layers need {needed_shape}. {RESTORE}")


def _to_state_dict(statistics: Statistics) -> dict[str, dict[str, jax.Array]]:
    return {path: statistics[path]._asdict() for path in statistics}


def _from_state_dict(target: Statistics, state: Mapping[str, Any]) -> Statistics:
    if differing := sorted(set(target) ^ set(state)):
        raise ValueError(f"The saved and the needed statistics differ in having {', '.join(differing)}. {RESTORE}")
    parts: dict[str, list[Any]] = {name: [] for name in LayerStatistics._fields}
    for path, place in target.packing.places.items():
        for name, numbers in _NUMBERS_OF.items():
            if name not in state[path]:
                raise ValueError(f"The saved statistics of {path} have no {name}. {RESTORE}")
            saved = np.asarray(state[path][name])
            leading = jnp.shape(getattr(target, name))[:-1]
            needed = (*leading, *place.shape[: _RANKS[numbers]])
            if saved.shape != needed:
                raise ValueError(f"{name} of {path} was saved in shape {saved.shape}, but is {needed}. {RESTORE}")
            parts[name].append(saved.reshape(*leading, -1))
    arrays: dict[str, Any] = {name: np.concatenate(own, axis=-1) for name, own in parts.items()}
    return Statistics(target.packing, **arrays)


# Checkpoints of flax.serialization hold the layers by name, in whatever order they lie in the arrays.
flax.serialization.register_serialization_state(Statistics, _to_state_dict, _from_state_dict)
