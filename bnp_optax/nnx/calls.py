"""Watch the calls of linear layers in an NNX model."""

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
from flax import nnx

from bnp_optax import observing
from bnp_optax.counting import append_mask, axis_of_time, split_mask
from bnp_optax.layouts import LAYERS, Product, products, registered
from bnp_optax.observing import Observers


class Observer(observing.Observer, Protocol):
    """What is done with a call of a layer."""

    def see(self, module: nnx.Module, product: Product) -> None:
        """Called after a call of a linear layer."""

    def name_of(self, module: nnx.Module) -> str:
        """Returns the name of a module, ``""`` where it is not known."""


_LAYERS = tuple(cls for cls in LAYERS if issubclass(cls, nnx.Module))

_observers = Observers[Observer]()


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Lets the observer see every call of a linear layer in this thread."""
    _observed_classes.enter()
    try:
        with _observers.entered(observer):
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
                self._replace(nnx.RNN, _letting_records_out(nnx.RNN.__call__))

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
        if (observer := _observers.current) is not None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            _, *arguments = bound.args
            for product in products(cls, self, parameters(self), result, *arguments):
                observer.see(self, product)
        return result

    return call


def _letting_records_out(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives what is stored inside an RNN an axis of time, and keeps the steps that are padding out of it.

    By default the RNN carries all that its cell holds. The mask travels with what the RNN scans, as one more feature
    that is taken off before the cell sees it: it is sliced, and where the RNN is reversed flipped, as the inputs are.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(self: nnx.RNN, *args: Any, **kwargs: Any) -> Any:
        if (observer := _observers.current) is None:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, inputs, *rest = bound.args
        options = bound.kwargs
        features, time_axis = self.cell.num_feature_axes, axis_of_time(self, inputs, options["time_major"])
        counting, lengths = observer.counting, options["seq_lengths"]
        masked = counting and counting.of_steps(inputs, observer.name_of(self), features, time_axis, lengths)
        if masked is None:
            return original(_SteppingRNN(self, self.cell), *args, **kwargs)
        rnn = _SteppingRNN(self, _MaskedCell(self.cell, features))
        with _observers.entered(dataclasses.replace(observer, counting=masked)):  # type: ignore[type-var]
            return original(rnn, append_mask(inputs, masked.mask), *rest, **options)

    return call


class _SteppingRNN:
    """An RNN seen with another cell and other ``state_axes``; the RNN itself stays as it is."""

    def __init__(self, rnn: nnx.RNN, cell: Any) -> None:
        self._rnn = rnn
        self.cell = cell
        self.state_axes = dict[Any, Any]({nnx.Intermediate: 0}) | dict(rnn.state_axes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rnn, name)


class _MaskedCell(nnx.Module):
    """A cell whose input has the mask of the step as its last feature."""

    def __init__(self, cell: Any, num_feature_axes: int) -> None:
        self.cell, self.num_feature_axes = cell, num_feature_axes

    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        inputs, mask = split_mask(inputs, self.num_feature_axes)
        observer: Any = _observers.current
        counting = dataclasses.replace(observer.counting, mask=mask)
        with _observers.entered(dataclasses.replace(observer, counting=counting)):
            return self.cell(carry, inputs)

    def initialize_carry(self, input_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
        return self.cell.initialize_carry((*input_shape[:-1], input_shape[-1] - 1), *args, **kwargs)


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
      N, the examples of a batch, is the first axis of a layer's input: 16 here.
    """
    if (observer := _observers.current) is not None:
        where, own = type(module).__name__, parameters(module)
        product = registered(where, own, x, kernel, bias, kernel_roles, bias_roles, input_axes, stack_axes)
        observer.see(module, product)


def parameters(module: nnx.Module) -> dict[str, jax.Array]:
    """Returns the arrays among a module's own variables by name, as they are inside the transforms around it."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Variable)}
    return {name: variable[...] for name, variable in own.items() if hasattr(variable.get_value(), "shape")}
