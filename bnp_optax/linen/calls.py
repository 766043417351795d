"""Watch the calls of linear layers in a Linen model."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import flax.linen as nn
import jax
from flax.linen.module import InterceptorContext

from bnp_optax.layouts import LAYERS, Product, products, reason_to_exclude, registered


class Observer(Protocol):
    """What happens at the calls of modules."""

    def see(self, module: nn.Module, product: Product) -> None:
        """Called after a call of a linear layer."""

    def leave(self, module: nn.Module, reason: str) -> None:
        """Called after a call of any module, with the reason why its parameters are excluded unless it is seen."""


# jax.jit traces again under another observer, so that what nn.jit has in its cache is never used in its place.
_observer = jax.make_user_context(None)


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Lets the observer see every call in the context."""
    running: list[nn.Module] = []

    def interceptor(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        module = context.module
        running.append(module)
        try:
            result = next_fun(*args, **kwargs)
        finally:
            running.pop()
        if (cls := _class_called(context)) is not None:
            bound = inspect.signature(cls.__call__).bind(module, *args, **kwargs)
            bound.apply_defaults()
            _, *arguments = bound.args
            for product in products(cls, module, parameters(module), *arguments):
                if wrappers := [m for m in running if isinstance(m, nn.WeightNorm | nn.SpectralNorm)]:
                    reason = f"its kernel is normalized by {type(wrappers[-1]).__name__}"
                    product = product._replace(layout=reason)
                observer.see(module, product)
        observer.leave(module, reason_to_exclude(module))
        return result

    with _observer(observer), nn.intercept_methods(interceptor):
        yield


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
    """
    if (observer := _observer.value) is not None:
        where, own = "/".join(module.path) or type(module).__name__, parameters(module)
        product = registered(where, own, x, kernel, bias, kernel_roles, bias_roles, input_axes, stack_axes)
        observer.see(module, product)


def parameters(module: nn.Module) -> dict[str, jax.Array]:
    """Returns the arrays among a module's own parameters by name, as they are inside the transforms around it."""
    own = nn.unbox(module.variables.get("params", {}))
    return {name: value for name, value in own.items() if hasattr(value, "shape")}


def _class_called(context: InterceptorContext) -> type[nn.Module] | None:
    """Returns the class in the table whose own `__call__` has run, not one that only inherits or overrides it."""
    method = getattr(context.orig_method, "func", None)
    for cls in LAYERS:
        if isinstance(context.module, cls) and method is inspect.unwrap(cls.__call__):
            return cls
    return None
