"""What both APIs need to observe a model: who observes it in this thread, and the error for what is no model."""

import contextlib
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import flax.linen as nn
import jax
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
