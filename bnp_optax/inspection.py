"""What BNP does in a training, layer by layer: for a person who wants to know whether it works."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from bnp_optax.bnp import KEEP_STATISTICS
from bnp_optax.layers import Layer, Layers
from bnp_optax.records import find_records
from bnp_optax.statistics import Statistics
from bnp_optax.table import align

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_LARGEST = 1024  # inputs of a layer whose eigenvalues are computed, in a second or less
_HEADER = ("layer", "examples", "skipped", "mean off", "variance ratio", "gradient times", "condition number")


class LayerInspection(NamedTuple):
    """What BNP does to one layer.

    Attributes:
      seen: examples that its statistics have absorbed, over its whole stack.
      skipped: batches that were left out, as their moments were not finite.
      mean_off: how far the batch's mean is from the running one, in running deviations: the root mean square over the
        inputs. Of independent examples it is about 1 / sqrt(positions of the batch); more than 1 says that the
        statistics lag, or that the batch is of another kind. nan without records.
      variance_ratio: the variance of the batch by the running one, both damped: the median over the inputs; nan
        likewise.
      rescaling: what ``scale_by_bnp`` multiplies a kernel's gradient by after centring, ``1 / (q sd)^2``: the least,
        the median, and the largest over the inputs.
      condition: the condition number of the second moments of the inputs and the constant 1, were the inputs
        uncorrelated, before and after the change of variables; the worst of a stack's and of the groups'. Inputs that
        never vary are left out. Before is nan for layers of more than 1,024 inputs.
    """

    seen: int
    skipped: int
    mean_off: float
    variance_ratio: float
    rescaling: tuple[float, float, float]
    condition: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Inspection(Mapping[str, LayerInspection]):
    """What BNP does, by layer: ``print`` and ``rich.print`` show a table, and :meth:`figure` draws it.

    Attributes:
      by_layer: what it does to each.
      excluded: how many parameters are excluded; ``print(layers)`` says which and why.
    """

    by_layer: Mapping[str, LayerInspection]
    excluded: int

    def __getitem__(self, path: str) -> LayerInspection:
        return self.by_layer[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_layer)

    def __len__(self) -> int:
        return len(self.by_layer)

    def __str__(self) -> str:
        """Returns the table."""
        text = align([_HEADER, *((path, *_cells(own)) for path, own in self.items())], "<" + ">" * (len(_HEADER) - 1))
        return f"{text}\n\n{self._about_excluded()}" if self.excluded else text

    def __rich__(self) -> "Table":
        """Returns the table for Rich, which calls this, to fit it to its console."""
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=self._about_excluded() if self.excluded else None)
        for number, title in enumerate(_HEADER):
            table.add_column(title, justify="right" if number else "left", overflow="fold")
        for path, own in self.items():
            table.add_row(*map(Text, (path, *_cells(own))))
        return table

    def _about_excluded(self) -> str:
        return f"Excluded parameters: {self.excluded}; print(layers) says why."

    def figure(self) -> "Figure":
        """Draws what the table says, a row a layer; wants matplotlib.

        Returns:
          A figure of three panels: how far the batch is from the running statistics, how steps are rescaled, and the
          condition numbers.

        Raises:
          ImportError: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import LogLocator
        except ImportError as error:
            raise ImportError("figure() wants matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(9, 1.6 + 0.25 * len(self)), layout="constrained")
        offsets, steps, conditions = figure.subplots(1, 3, sharey=True)
        places, own = np.arange(len(self)), list(self.values())
        offsets.plot([each.mean_off for each in own], places, "o", color="#0072B2", label="mean, in deviations")
        offsets.plot([each.variance_ratio for each in own], places, "^", color="#E69F00", label="variance, ratio")
        low, middle, high = np.transpose([each.rescaling for each in own])
        steps.hlines(places, low, high, color="#56B4E9", linewidth=4)
        steps.plot(middle, places, "o", color="#0072B2")
        before, after = np.transpose([each.condition for each in own])
        conditions.plot(before, places, "s", color="#555555", label="weights of the network")
        conditions.plot(after, places, "o", color="#0072B2", label="variables of BNP")
        offsets.set(xlabel="batch against running statistics", yticks=places, yticklabels=list(self))
        steps.set(xlabel="gradient of an input times", xscale="log")
        conditions.set(xlabel="condition number", xscale="log")
        for panel in (offsets, conditions):
            panel.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
        for panel in (offsets, steps, conditions):
            panel.grid(alpha=0.3)
        for panel, subs in ((steps, (1, 3)), (conditions, (1,))):
            panel.xaxis.set_major_locator(LogLocator(subs=subs, numticks=5))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
        offsets.set_ylim(len(self) - 0.5, -0.5)
        return figure


def inspect(layers: Layers, state: Any, records: Any = KEEP_STATISTICS) -> Inspection:
    """Returns what BNP does in a training, layer by layer.

    Call it outside of ``jit``, after some steps. What to look at: every layer should have seen examples and skipped no
    batch; a mean that is off by more than 1 deviation, or variances that are far from their running ones, say that the
    statistics lag behind what the layer sees; steps that are all rescaled by about 1, and condition numbers that hardly
    fall, say that the inputs are normalized already, and that BNP has little to do.

    Args:
      layers: the layers.
      state: any state of an optimizer that has that of :func:`~bnp_optax.scale_by_bnp` or
        :func:`~bnp_optax.preconditioned` somewhere in it.
      records: of a batch, as ``capture`` returns them, to be compared with the running statistics.

    Returns:
      A dictionary by layer, whose ``print`` is a table and whose ``figure()`` a picture.

    Raises:
      ValueError: if ``state`` holds no statistics, those of other layers, or those of several trainings; for records
        that do not fit.
      TypeError: for records that are none.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1), bias=("b",)),))
      >>> params = {"w": jnp.zeros((2, 1)), "b": jnp.zeros(1)}
      >>> tx = bnp.preconditioned(optax.adam(1e-3), layers, prior_examples=0)
      >>> records = {"w": bnp.input_moments(jnp.array([[1.0, 200.0], [2.0, 400.0]]))}
      >>> _, state = tx.update(params, tx.init(params), params, intermediates=records)
      >>> inspection = bnp.inspect(layers, state, records)
      >>> inspection["w"].seen, inspection["w"].mean_off
      (2, 0.0)
    """
    statistics = _statistics(state)
    if statistics.seen.ndim > 1:
        raise ValueError(
            f"The state holds {statistics.seen.shape[0]} states along a first axis, as jax.vmap makes them. Take one: "
            "jax.tree.map(lambda leaf: leaf[0], state)."
        )
    if missing := [path for path in layers if path not in statistics.packing.places]:
        raise ValueError(
            f"The state holds no statistics of {', '.join(missing)}. Pass the layers that the transformation was made "
            "of."
        )
    found = {} if records is KEEP_STATISTICS else find_records(layers.included, records)
    by_layer = {}
    for path, layer in layers.items():
        own, record = jax.device_get(statistics[path]), found.get(path)
        batch = None if record is None else (np.asarray(record.mean), np.asarray(record.variance))
        by_layer[path] = _inspect_layer(layer, own, batch)
    return Inspection(by_layer, len(layers.excluded))


def _statistics(state: Any) -> Statistics:
    """Returns the statistics in a state."""

    def is_statistics(node: Any) -> bool:
        return isinstance(node, Statistics)

    found: list[Statistics] = [node for node in jax.tree.leaves(state, is_leaf=is_statistics) if is_statistics(node)]
    if len(found) != 1:
        raise ValueError(
            f"The state holds {len(found)} states of BNP, not one. Pass what init and update of an optimizer with "
            "preconditioned or scale_by_bnp in it return, or the part of it that belongs to these layers."
        )
    return found[0]


def _inspect_layer(layer: Layer, own: Any, batch: tuple[np.ndarray, np.ndarray] | None) -> LayerInspection:
    """Returns what BNP does to a layer, with statistics of NumPy arrays, whose batch has this mean and variance."""
    damping, centred = own.damping[..., None], layer.bias is not None
    moment = own.variance if centred else own.variance + np.square(own.mean)
    damped = moment + damping
    inverse = np.divide(1, damped, out=np.zeros_like(damped), where=damped > 0)  # 0 for a constant input, as P has it
    rates = inverse / own.scale[:, None, None]
    mean_off, variance_ratio = np.nan, np.nan
    spread = own.variance + damping
    if batch is not None and (varies := spread > 0).any():
        mean, variance = batch
        mean_off = np.sqrt(np.mean(np.square(mean - own.mean)[varies] / spread[varies]))
        variance_ratio = np.median((variance + damping)[varies] / spread[varies])
    after = [_spread(np.append(row[row > 0], 1.0 if centred else [])) for row in _rows(moment * inverse)]
    before = [
        _condition(mean, variance) if centred else _spread(variance[variance > 0])
        for mean, variance in zip(_rows(own.mean), _rows(moment), strict=True)
    ]
    return LayerInspection(
        seen=int(own.seen.sum()),
        skipped=int(own.skipped.sum()),
        mean_off=float(mean_off),
        variance_ratio=float(variance_ratio),
        rescaling=(float(rates.min()), float(np.median(rates)), float(rates.max())),
        condition=(float(np.max(before)), float(np.max(after))),
    )


def _rows(x: np.ndarray) -> np.ndarray:
    """Returns numbers ``[stack, group, input]`` as ``[row, input]``."""
    return x.reshape(-1, x.shape[-1])


def _condition(mean: np.ndarray, variance: np.ndarray) -> float:
    """Returns the condition number of the second moments of uncorrelated inputs and the constant 1."""
    varies = variance > 0
    mean, variance = mean[varies].astype(np.float64), variance[varies].astype(np.float64)
    if mean.size > _LARGEST:
        return np.nan
    with_one = np.append(mean, 1.0)
    return _spread(np.linalg.eigvalsh(np.outer(with_one, with_one) + np.diag(np.append(variance, 0.0))))


def _spread(values: np.ndarray) -> float:
    """Returns the largest of positive numbers by the least; nan of none."""
    return float(values.max() / values.min()) if values.size else np.nan


def _cells(own: LayerInspection) -> tuple[str, ...]:
    low, middle, high = own.rescaling
    return (
        f"{own.seen:,}",
        f"{own.skipped:,}",
        "" if np.isnan(own.mean_off) else f"{own.mean_off:.2f}",
        "" if np.isnan(own.variance_ratio) else f"{own.variance_ratio:.2f}",
        f"{low:.2g} / {middle:.2g} / {high:.2g}",
        " -> ".join("?" if np.isnan(number) else f"{number:,.3g}" for number in own.condition),
    )
