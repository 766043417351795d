"""Let records out of ``nn.RNN``, and keep the steps that are padding out of them."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from flax.core import scope

from bnp_optax.counting import Counting, append_mask, axis_of_time, split_mask
from bnp_optax.layers import Path

_SIGNATURE = inspect.signature(nn.RNN.__call__)


class MaskedSteps:
    """Hands each step of an RNN its part of the mask.

    The RNN scans its inputs, so the mask travels with them, as one more feature that is taken off before the cell sees
    it: it is sliced, and where the RNN is reversed flipped, as the inputs are.
    """

    def __init__(self) -> None:
        self._cells: list[Path | None] = []  # of the RNNs under way, if their steps are masked

    @contextlib.contextmanager
    def run(
        self, rnn: Any, counting: Counting | None, args: Any, kwargs: Any
    ) -> Iterator[tuple[Any, Any, Counting | None]]:
        """Gives what an RNN holds an axis of time; yields the arguments to call it with, and how its steps count."""
        bound = _SIGNATURE.bind(rnn, *args, **kwargs)
        bound.apply_defaults()
        _, inputs = bound.args
        options = bound.kwargs
        features, time_axis = rnn.cell.num_feature_axes, axis_of_time(rnn, inputs, options["time_major"])
        name, lengths = "/".join(rnn.path), options["seq_lengths"]
        masked = None if counting is None else counting.of_steps(inputs, name, features, time_axis, lengths)
        if masked is not None:
            if options["initial_carry"] is None:
                key = jax.random.key(0) if options["init_key"] is None else options["init_key"]
                shape = (*inputs.shape[:time_axis], *inputs.shape[time_axis + 1 :])
                options["initial_carry"] = rnn.cell.initialize_carry(key, shape)
            inputs = append_mask(inputs, masked.mask)
        self._cells.append(None if masked is None else rnn.cell.path)
        axes = rnn.variable_axes
        filters = (*axes, rnn.variable_broadcast, rnn.variable_carry)
        if not any(scope.in_filter(each, "intermediates") for each in filters):
            # of the bound copy that Flax made for this pass
            object.__setattr__(rnn, "variable_axes", {**axes, "intermediates": 0})
        try:
            yield (inputs,), options, counting if masked is None else masked
        finally:
            object.__setattr__(rnn, "variable_axes", axes)
            self._cells.pop()

    def is_of(self, module: nn.Module, method: str) -> bool:
        """Returns whether a call is that of the cell of the innermost RNN, whose steps are masked."""
        return bool(self._cells) and method == "__call__" and module.path == self._cells[-1]

    @contextlib.contextmanager
    def step(self, cell: Any, args: Any) -> Iterator[tuple[Any, jax.Array]]:
        """Yields the arguments of the cell without the mask, and the mask of this step."""
        carry, inputs = args
        inputs, mask = split_mask(inputs, cell.num_feature_axes)
        self._cells.append(None)
        try:
            yield (carry, inputs), mask
        finally:
            self._cells.pop()
