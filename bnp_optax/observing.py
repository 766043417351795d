"""What both APIs need to observe a model: who observes it in this thread, and the error for what is no model."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from bnp_optax.counting import Counting


class Observer(Protocol):
    """What both APIs' observers have."""

    @property
    def counting(self) -> Counting | None:
        """How records count, ``None`` if they are not made."""


Kind = TypeVar("Kind", bound=Observer)


class _Token:
    """Stands for an observer that holds arrays, which JAX's caches would keep alive."""


class Observers(Generic[Kind]):
    """The observer of the innermost context, ``None`` outside of one.

    `jax.jit` traces again under another observer, so that what is compiled inside a model is never used in its place.
    """

    def __init__(self) -> None:
        self._key = jax.make_user_context(None)
        self._by_token: dict[_Token, Kind] = {}

    @property
    def current(self) -> Kind | None:
        """The observer."""
        key = self._key.value
        observer: Kind | None = self._by_token[key] if isinstance(key, _Token) else key
        return observer

    @contextlib.contextmanager
    def entered(self, observer: Kind) -> Iterator[None]:
        """Makes it the observer in the context."""
        if observer.counting is None or not observer.counting.holds_arrays:
            with self._key(observer):
                yield
            return
        token = _Token()
        self._by_token[token] = observer
        try:
            with self._key(token):
                yield
        finally:
            del self._by_token[token]


def no_model(wanted: str, given: Any) -> TypeError:
    """Returns the error that something else than a model of this API was given, as one of the other."""
    other = {nn.Module: "linen", nnx.Module: "nnx"}
    of_other = next((name for cls, name in other.items() if isinstance(given, cls)), None)
    remedy = "Pass the model itself." if of_other is None else f"That of bnp_optax.{of_other} is for this model."
    return TypeError(f"{wanted}, not {type(given).__name__}. {remedy}")


@contextlib.contextmanager
def noting_the_call(model: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Adds to an error inside what a search for layers calls the model with, as the error is the model's or Flax's."""
    try:
        yield
    except Exception as error:
        given = [*map(_brief, args), *(f"{name}={_brief(value)}" for name, value in kwargs.items())]
        error.add_note(
            f"find_layers called {type(model).__name__} with ({', '.join(given)}). Give it, behind the model, what a "
            "training step calls the model with: a batch of inputs, or their jax.ShapeDtypeStruct, and no variables."
        )
        raise


def _brief(argument: Any) -> str:
    """Returns the shape and type of an array, a plain value, and the type of all else."""
    if isinstance(argument, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"{argument.dtype}[{', '.join(map(str, argument.shape))}]"
    return repr(argument) if isinstance(argument, bool | int | float | str | None) else type(argument).__name__
