"""Watch the calls of linear layers in a Linen model."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext

from bnp_optax import observing
from bnp_optax.counting import Counting
from bnp_optax.layouts import LAYERS, Product, products, reason_to_exclude, registered
from bnp_optax.linen.rnn import MaskedSteps
from bnp_optax.observing import Observers


class Observer(observing.Observer, Protocol):
    """What happens at the calls of modules."""

    def see(self, module: nn.Module, product: Product) -> None:
        """Called after a call of a linear layer."""

    def see_explicit(self, module: nn.Module, product: Product, owner: nn.Module) -> None:
        """Called after a call of a layer that one of the model's modules applies with parameters of its choice.

        Args:
          module: the layer, which is no part of the model.
          product: what it multiplies.
          owner: the module that applies it.
        """

    def leave(self, module: nn.Module, reason: str) -> None:
        """Called after a call of any module, with the reason why its parameters are excluded unless it is seen."""


class _Running(NamedTuple):
    """A call under way: its module, and that which applies it, or one around it, with explicit parameters."""

    module: nn.Module
    owner: nn.Module | None


_observers = Observers[Observer]()


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Lets the observer see every call in the context."""
    running: list[_Running] = []
    own = [observer]
    steps = MaskedSteps()

    def interceptor(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        module, observer = context.module, own[-1]
        owner = _owner(module, running)
        running.append(_Running(module, owner))
        try:
            with contextlib.ExitStack() as stack:
                counting = observer.counting
                if _method(context) is inspect.unwrap(nn.RNN.__call__):
                    args, kwargs, counting = stack.enter_context(steps.run(module, counting, args, kwargs))
                elif steps.is_of(module, context.method_name):
                    args, mask = stack.enter_context(steps.step(module, args))
                    counting = dataclasses.replace(counting or Counting(), mask=mask)
                if counting is not observer.counting:
                    own.append(dataclasses.replace(observer, counting=counting))  # type: ignore[type-var]
                    stack.callback(own.pop)
                    stack.enter_context(_observers.entered(own[-1]))
                result = next_fun(*args, **kwargs)
        finally:
            running.pop()
        if (cls := _class_called(context)) is not None:
            bound = inspect.signature(cls.__call__).bind(module, *args, **kwargs)
            bound.apply_defaults()
            _, *arguments = bound.args
            for product in products(cls, module, parameters(module), result, *arguments):
                if wrappers := [m for m, _ in running if isinstance(m, nn.WeightNorm | nn.SpectralNorm)]:
                    reason = f"its kernel is normalized by {type(wrappers[-1]).__name__}"
                    product = product._replace(layout=reason)
                if owner is None:
                    observer.see(module, product)
                else:
                    observer.see_explicit(module, product, owner)
        if owner is None:
            observer.leave(module, reason_to_exclude(module))
        return result

    with _observers.entered(observer), nn.intercept_methods(interceptor):
        yield


def _owner(module: nn.Module, running: list[_Running]) -> nn.Module | None:
    """Returns the module of the model that applies this one, or one around it, with explicit parameters.

    ``layer.apply({"params": ...}, x)`` inside a model makes the layer a root beneath the model's: its path is empty,
    though it is neither the model, which a transform copies, nor shares a scope with it.
    """
    if not running:
        return None
    root, around = running[0].module, running[-1]
    is_model = (type(module), module.name) == (type(root), root.name)
    is_root = not module.path and not (is_model and module.is_initializing() == root.is_initializing())
    if around.owner is None and is_root and all(module.scope is not other.scope for other, _ in running):
        return around.module
    return around.owner


def register(
    module: nn.Module,
    x: jax.Array,
    kernel: str = "kernel",
    bias: str | None = "bias",
    *,
    kernel_roles: str = "io",
    bias_roles: str = "o",
    input_axes: tuple[int, ...] = (-1,),
    stack_axes: tuple[int, ...] = (),
) -> None:
    """Makes a linear layer of your own known; call it in the layer's ``__call__``, once its parameters exist.

    Under ``find_layers`` it describes the layer, under ``capture`` it records its input, and
    elsewhere it does nothing.

    Args:
      module: the layer.
      x: what the kernel is multiplied by, ``[examples, ..., inputs]`` in some order of axes.
      kernel: the kernel's name.
      bias: the bias's name, ``None`` without one.
      kernel_roles: a letter for each axis of the kernel: ``i`` input, ``o`` output, ``s`` stack (a
        batch dimension: one kernel for each entry), ``g`` group, ``w`` window.
      bias_roles: likewise for the bias: ``o``, ``s`` and ``g``.
      input_axes: the axes of ``x`` that the kernel contracts, in the order of its ``i`` axes.
      stack_axes: the axes of ``x`` that the kernel's ``s`` axes go with, in their order.

    Raises:
      ValueError: if the module has no such parameter, or its axes and the roles differ in number.

    Example:
      A mixture of experts, each with a kernel of its own, over inputs that are already dispatched:

      >>> import flax.linen as nn
      >>> import jax
      >>> class Experts(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):  # [examples, experts, inputs]
      ...         shape = (x.shape[1], x.shape[2], 8)
      ...         w = self.param("w", nn.initializers.lecun_normal(batch_axis=0), shape)
      ...         b = self.param("b", nn.initializers.zeros, shape[::2])
      ...         register(self, x, "w", "b", kernel_roles="sio", bias_roles="so", stack_axes=(1,))
      ...         return jax.numpy.einsum("nei,eio->neo", x, w) + b
      >>> from bnp_optax.linen import find_layers
      >>> print(find_layers(Experts(), jax.numpy.ones((16, 4, 3))))
      layer  kind     kernel  fan-in  covers  parameters
      w      Experts   4x3x8       3  w, b           128
      <BLANKLINE>
      1 layer covers 128 of 128 parameters (100.0%).
      N, the examples of a batch, is the first axis of a layer's input: 16 here.
    """
    if (observer := _observers.current) is not None:
        where, own = "/".join(module.path) or type(module).__name__, parameters(module)
        product = registered(where, own, x, kernel, bias, kernel_roles, bias_roles, input_axes, stack_axes)
        observer.see(module, product)


def parameters(module: nn.Module) -> dict[str, jax.Array]:
    """Returns the arrays among a module's own parameters by name, as they are inside the transforms around it."""
    own = nn.unbox(module.variables.get("params", {}))
    return {name: value for name, value in own.items() if hasattr(value, "shape")}


def _class_called(context: InterceptorContext) -> type[nn.Module] | None:
    """Returns the class in the table whose own `__call__` has run, not one that only inherits or overrides it."""
    for cls in LAYERS:
        if isinstance(context.module, cls) and _method(context) is inspect.unwrap(cls.__call__):
            return cls
    return None


def _method(context: InterceptorContext) -> Any:
    """Returns the function that is called, as its class has it."""
    return getattr(context.orig_method, "func", None)
