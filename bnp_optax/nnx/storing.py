"""Store records where `nnx.capture` collects them."""

from typing import Any

import jax
from flax import errors, nnx

from bnp_optax.layouts import Kind
from bnp_optax.moments import InputMoments, pool_with_earlier
from bnp_optax.records import record_key

REMEDY = (
    "Pass the module as an argument to a transform of nnx (not of jax) that gives records an axis 0, as "
    "nnx.StateAxes({nnx.Intermediate: 0, ...: None}) does where parameters are shared"
)


RECORD = record_key("kernel")


class RecordError(ValueError):
    """An input that cannot be recorded."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"The input of {where} cannot be recorded{reason}.")


def moments_of(kind: Kind, x: jax.Array, where: str) -> InputMoments:
    """Returns the record of an input; an error says of which layer."""
    try:
        return kind.moments(x)
    except ValueError as error:
        raise RecordError(where, f": {error}") from error


def captured_by(module: nnx.Module, variable_type: type[nnx.Intermediate[Any]]) -> nnx.Intermediate[Any] | None:
    """Returns the dictionary in which `nnx.capture` collects what a module stores, ``None`` if it does not."""
    for _, variable in nnx.iter_graph(module):
        if type(variable) is variable_type and isinstance(variable.get_value(), dict):
            return variable
    return None


def store(captured: nnx.Intermediate[Any], value: Any, where: str) -> None:
    """Stores a record as `nnx.Module.sow` would, which does not notice that it cannot come out of a transform."""
    try:
        captured.set_value({**captured.get_value(), RECORD: value})
    except errors.TraceContextError as error:
        raise RecordError(where, f", as a transform around it closes over the module. {REMEDY}") from error


def pool_records(earlier: InputMoments | None, record: InputMoments, where: str) -> InputMoments:
    """Pools a record with that of earlier calls; an error says of which layer."""
    try:
        return pool_with_earlier(earlier, record)
    except ValueError as error:
        raise RecordError(where, f": {error}") from error
