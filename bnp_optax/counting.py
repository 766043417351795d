"""What of a layer's input counts, and as how many examples: masks, N, and batches that are split over devices."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from bnp_optax.layouts import Layout, RecordError
from bnp_optax.moments import InputMoments, fits, pool_named_axis

# An array, several for inputs of different shapes, or a function of a layer's name and its input.
Mask = ArrayLike | Sequence[ArrayLike] | Callable[[str, jax.Array], ArrayLike | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Counting:
    """How a pass counts; compared and hashed as an object, as JAX does at each operation that it traces.

    Attributes:
      axis_name: the mapped axis over which the batch is split.
      mask: which positions count.
      examples: N, instead of the size of the axis of examples.
    """

    axis_name: str | tuple[str, ...] | None = None
    mask: Mask | None = None
    examples: ArrayLike | None = None

    @staticmethod
    def of(axis_name: str | tuple[str, ...] | None, mask: Mask | None, examples: ArrayLike | None) -> "Counting":
        """Returns the same object where there are no arrays, so that what is compiled inside a model stays so."""
        is_integer = isinstance(examples, int) or jnp.issubdtype(getattr(examples, "dtype", float), jnp.integer)
        if not (examples is None or is_integer):
            raise TypeError(f"examples must be an integer, how many examples the pass has, not {examples}.")
        if examples is not None and not isinstance(examples, jax.core.Tracer):
            examples = np.asarray(examples).item()
        if isinstance(examples, int) and examples < 1:
            raise ValueError(f"examples must be how many examples the pass has, at least 1, not {examples}.")
        if mask is None and isinstance(examples, int | None):
            return _without_arrays(axis_name, examples)
        return Counting(axis_name, mask, examples)

    @property
    def holds_arrays(self) -> bool:
        """Whether it holds any, or a function that may."""
        return self.mask is not None or not isinstance(self.examples, int | None)

    def moments(self, layout: Layout, x: jax.Array, name: str) -> InputMoments:
        """Returns the record of a layer's input.

        Args:
          layout: the layer's axis roles.
          x: the input.
          name: the layer's name.

        Raises:
          ValueError: saying of the input what is wrong.
        """
        record = layout.moments(x, self.mask_of(x, name, layout.input_axes), self.examples)
        if layout.examples(x) is None:
            record = dataclasses.replace(record, count=-record.count)
        return record if self.axis_name is None else pool_named_axis(record, self.axis_name)

    def mask_of(self, x: jax.Array, name: str, input_axes: Sequence[int]) -> ArrayLike | None:
        """Returns the mask of an input, ``None`` if all of it counts.

        Raises:
          ValueError: if no mask fits, or several do equally well.
        """
        mask: Any = self.mask(name, x) if callable(self.mask) else self.mask
        if mask is None or isinstance(mask, bool):
            return jnp.zeros((), bool) if mask is False else None
        masks = list(mask) if isinstance(mask, list | tuple) else [mask]
        fitting = [mask for mask in masks if fits(mask, x, input_axes)]
        longest = [mask for mask in fitting if jnp.ndim(mask) == max(map(jnp.ndim, fitting))]
        if len(longest) != 1:
            shapes = ", ".join(str(jnp.shape(mask)) for mask in masks)
            how_many = "several masks fit" if longest else "no mask fits"
            raise ValueError(
                f"{how_many} its shape {jnp.shape(x)}: those given have {shapes}, of which one has to be that of the "
                "input's leading axes. A function, mask=lambda name, x: ..., says which it is, None if all counts; "
                "layers that are excluded are left out by capture(model, layers=layers)"
            )
        chosen: ArrayLike = longest[0]
        return chosen

    def of_steps(
        self, x: jax.Array, name: str, num_features: int, time_axis: int, lengths: ArrayLike | None
    ) -> "Counting | None":
        """Returns how the steps of a sequence count, with its mask as a whole; ``None`` if all of it counts.

        Args:
          x: the sequence, ``[examples, time, *features]`` or ``[time, examples, *features]``.
          name: the name of what reads it.
          num_features: how many axes hold features.
          time_axis: that of time.
          lengths: how many steps of each example are no padding, ``None`` if all.

        Raises:
          RecordError: as :meth:`mask_of`.
        """
        shape = x.shape[: x.ndim - num_features]
        try:
            mask = self.mask_of(x, name, range(len(shape), x.ndim))
        except ValueError as error:
            raise RecordError(name or "an RNN", f": {error}") from error
        if mask is None and lengths is None:
            return None
        if num_features == 0:
            raise RecordError(name or "an RNN", ": it has no axis of features, in which its mask could reach its cell")
        if (
            mask is not None
            and jnp.issubdtype(jnp.result_type(mask), jnp.floating)
            and not jnp.issubdtype(x.dtype, jnp.floating)
        ):
            raise RecordError(name or "an RNN", f": of {x.dtype} it takes a mask of booleans, not of weights")
        every = jnp.ones(shape) if mask is None else jnp.asarray(mask).astype(float)
        every = jnp.broadcast_to(every.reshape(every.shape + (1,) * (len(shape) - every.ndim)), shape)
        if lengths is not None:
            time = jnp.arange(shape[time_axis]).reshape([-1 if k == time_axis else 1 for k in range(len(shape))])
            every = jnp.where(time < jnp.expand_dims(lengths, time_axis), every, 0)
        if self.examples is not None or len(shape) == 1:
            return dataclasses.replace(self, mask=every)
        # an example counts if any of its steps does, though not all that count do at one step
        counts = (every > 0).any(time_axis)
        examples = counts.any(tuple(range(1, counts.ndim))).sum(dtype=jnp.int32)
        return dataclasses.replace(self, mask=every, examples=examples)


def axis_of_time(rnn: Any, x: jax.Array, time_major: bool | None) -> int:
    """Returns which axis of its input an RNN, of either API, takes for time."""
    is_first = rnn.time_major if time_major is None else time_major
    return 0 if is_first else x.ndim - rnn.cell.num_feature_axes - 1


def append_mask(x: jax.Array, mask: Any) -> jax.Array:
    """Returns an input with its mask as one more feature, the last along its last axis."""
    column = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)).astype(x.dtype)
    return jnp.concatenate([x, jnp.broadcast_to(column, (*x.shape[:-1], 1))], axis=-1)


def split_mask(x: jax.Array, num_features: int) -> tuple[jax.Array, jax.Array]:
    """Takes the mask off again."""
    mask = x[..., -1]
    return x[..., :-1], mask[(..., *[0] * (num_features - 1))]


@functools.lru_cache
def _without_arrays(axis_name: Any, examples: int | None) -> Counting:
    return Counting(axis_name, None, examples)
