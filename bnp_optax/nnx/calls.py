"""Watch the calls of linear layers in an NNX model."""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from bnp_optax.layouts import LAYERS, Product, products, registered

# What is done with a call of a layer.
Observer = Callable[[nnx.Module, Product], None]

_LAYERS = tuple(cls for cls in LAYERS if issubclass(cls, nnx.Module))

# jax.jit traces again under another observer, so that what nnx.jit has in its cache is never used in its place.
_observer = jax.make_user_context(None)


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Calls the observer after every call of a linear layer in this thread."""
    _observed_classes.enter()
    try:
        with _observer(observer):
            yield
    finally:
        _observed_classes.leave()


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
                for cls in _LAYERS:
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
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if (observer := _observer.value) is not None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            _, *arguments = bound.args
            for product in products(cls, self, parameters(self), *arguments):
                observer(self, product)
        return result

    return call


def _with_axis_of_time(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives what is stored inside an RNN an axis of time; by default the RNN carries all that its cell holds."""

    @functools.wraps(original)
    def call(self: nnx.RNN, *args: Any, **kwargs: Any) -> Any:
        return original(self if _observer.value is None else _WithAxisOfTime(self), *args, **kwargs)

    return call


class _WithAxisOfTime:
    """An RNN seen with other ``state_axes``; the RNN itself stays as it is."""

    def __init__(self, rnn: nnx.RNN) -> None:
        self._rnn = rnn
        self.state_axes = dict[Any, Any]({nnx.Intermediate: 0}) | dict(rnn.state_axes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rnn, name)


def register(
    module: nnx.Module,
    x: jax.Array,
    kernel: str = "kernel",
    bias: str | None = "bias",
    *,
    kernel_roles: str = "io",
    bias_roles: str = "o",
    input_axes: tuple[int, ...] = (-1,),
    stack_axes: tuple[int, ...] = (),
) -> None:
    """Makes a linear layer of your own known; call it in the layer's ``__call__``.

    Under ``find_layers`` it describes the layer, under ``capture`` it records its input, and
    elsewhere it does nothing.

    Args:
      module: the layer.
      x: what the kernel is multiplied by, ``[examples, ..., inputs]`` in some order of axes.
      kernel: the name of the kernel, an ``nnx.Variable`` that is an attribute of the layer.
      bias: that of the bias, ``None`` without one.
      kernel_roles: a letter for each axis of the kernel: ``i`` input, ``o`` output, ``s`` stack (a
        batch dimension: one kernel for each entry), ``g`` group, ``w`` window.
      bias_roles: likewise for the bias: ``o``, ``s`` and ``g``.
      input_axes: the axes of ``x`` that the kernel contracts, in the order of its ``i`` axes.
      stack_axes: the axes of ``x`` that the kernel's ``s`` axes go with, in their order.

    Raises:
      ValueError: if the module has no such parameter, or its axes and the roles differ in number.

    Example:
      A mixture of experts, each with a kernel of its own, over inputs that are already dispatched:

      >>> from flax import nnx
      >>> import jax
      >>> class Experts(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.w = nnx.Param(rngs.params.normal((4, 3, 8)))
      ...         self.b = nnx.Param(jax.numpy.zeros((4, 8)))
      ...     def __call__(self, x):  # [examples, experts, inputs]
      ...         register(self, x, "w", "b", kernel_roles="sio", bias_roles="so", stack_axes=(1,))
      ...         return jax.numpy.einsum("nei,eio->neo", x, self.w[...]) + self.b[...]
      >>> from bnp_optax.nnx import find_layers
      >>> print(find_layers(Experts(nnx.Rngs(0)), jax.numpy.ones((16, 4, 3))))
      layer  kind     kernel  fan-in  covers  parameters
      w      Experts   4x3x8       3  w, b           128
      <BLANKLINE>
      1 layer covers 128 of 128 parameters (100.0%).
    """
    if (observer := _observer.value) is not None:
        where, own = type(module).__name__, parameters(module)
        product = registered(where, own, x, kernel, bias, kernel_roles, bias_roles, input_axes, stack_axes)
        observer(module, product)


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """Returns the arrays among a module's own variables by name, as they are inside the transforms around it."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Variable)}
    return {name: variable[...] for name, variable in own.items() if hasattr(variable.get_value(), "shape")}
