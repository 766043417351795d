"""Watch the calls of linear layers in an NNX model."""

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bnp_optax import layouts as kinds
from bnp_optax.layouts import Kind


def _einsum(module: nnx.Einsum, kernel: tuple[int, ...], x: jax.Array, einsum_str: str | None = None) -> Kind | None:
    kind = kinds.einsum(str(module.einsum_str if einsum_str is None else einsum_str), kernel)
    bias = None if module.bias is None else module.bias.shape
    return None if kind is None or bias not in (None, kind.bias[0]) else kind


# From a layer's class to its kind: a function of the module, its kernel's shape and its arguments.
KINDS: dict[type[Any], Callable[..., Kind | None]] = {
    nnx.Linear: lambda module, kernel, *_, **__: kinds.dense(kernel),
    nnx.LinearGeneral: lambda module, kernel, x, *_, **__: kinds.dense_general(
        kernel, module.axis, module.batch_axis, x.ndim
    ),
    nnx.Einsum: _einsum,
    nnx.Conv: lambda module, kernel, *_, **__: kinds.conv(kernel, module.feature_group_count),
    nnx.ConvTranspose: lambda module, kernel, *_, **__: kinds.conv_transpose(kernel, module.transpose_kernel),
}


_NORMALIZATIONS = (
    nnx.BatchNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.SpectralNorm,
    nnx.WeightNorm,
)


# What is done with a call of a layer: (module, its kind or the reason why it has none, input).
Observer = Callable[[nnx.Module, Kind | str, jax.Array], None]


_observer: contextvars.ContextVar[Observer | None] = contextvars.ContextVar("observer", default=None)


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Calls the observer after every call of a linear layer in this thread."""
    token = _observer.set(observer)
    _observed_classes.enter()
    try:
        yield
    finally:
        _observed_classes.leave()
        _observer.reset(token)


class _ObservedClasses:
    """Gives Flax's classes a ``__call__`` that observes, while any context of any thread needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_contexts = 0
        self._original: dict[type[Any], Any] = {}

    def enter(self) -> None:
        with self._lock:
            self._num_contexts += 1
            if self._num_contexts == 1:
                for cls in KINDS:
                    self._replace(cls, _observed(cls, cls.__call__))
                self._replace(nnx.RNN, _with_axis_of_time(nnx.RNN.__call__))

    def _replace(self, cls: type[Any], call: Callable[..., Any]) -> None:
        self._original[cls] = cls.__call__
        cls.__call__ = call

    def leave(self) -> None:
        with self._lock:
            self._num_contexts -= 1
            if self._num_contexts == 0:
                for cls, call in self._original.items():
                    cls.__call__ = call
                self._original.clear()


_observed_classes = _ObservedClasses()


def _observed(cls: type[Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if (observer := _observer.get()) is not None:
            x, *rest = args if args else (kwargs["inputs"],)
            options = {name: value for name, value in kwargs.items() if name != "inputs"}
            kind: Kind | str | None
            if getattr(self, "mask", None) is not None:
                kind = kinds.MASKED
            elif jnp.iscomplexobj(_kernel(self)) or jnp.iscomplexobj(x):
                kind = kinds.COMPLEX
            else:
                kind = KINDS[cls](self, _kernel(self).shape, x, *rest, **options)
            observer(self, kind or kinds.NO_CONTRACTION, x)
        return result

    return call


def _with_axis_of_time(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives what is stored inside an RNN an axis of time; by default the RNN carries all that its cell holds."""

    @functools.wraps(original)
    def call(self: nnx.RNN, *args: Any, **kwargs: Any) -> Any:
        return original(self if _observer.get() is None else _WithAxisOfTime(self), *args, **kwargs)

    return call


class _WithAxisOfTime:
    """An RNN seen with other ``state_axes``; the RNN itself stays as it is."""

    def __init__(self, rnn: nnx.RNN) -> None:
        self._rnn = rnn
        self.state_axes = dict[Any, Any]({nnx.Intermediate: 0}) | dict(rnn.state_axes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rnn, name)


def _kernel(module: Any) -> jax.Array:
    kernel: jax.Array = module.kernel[...]
    return kernel


def reason_to_exclude(module: nnx.Module) -> str:
    """Says why a parameter is excluded whose module was not called as a layer."""
    name = type(module).__name__
    if isinstance(module, nnx.Embed):
        return kinds.EMBEDDING
    if isinstance(module, _NORMALIZATIONS):
        return kinds.NORMALIZATION
    if isinstance(module, nnx.LoRA):
        return "factor of a low-rank update"
    for cls in KINDS:
        if isinstance(module, cls):
            if type(module).__call__ is cls.__call__:
                return "not called in this pass"
            return f"{name} overrides __call__ and does not call that of nnx.{cls.__name__} in this pass"
    return f"{name} is not one of Flax's linear layers"
