"""Watch the calls of linear layers in a Linen model."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from flax.linen.recurrent import DenseParams

from bnp_optax import layouts as kinds
from bnp_optax.layouts import Kind


class Observer(Protocol):
    """What happens at the calls of modules."""

    def enter(self, module: nn.Module) -> None:
        """Called before a call of any module."""

    def see_layer(self, module: nn.Module, kernel: str, bias: str | None, kind: Kind, x: jax.Array) -> None:
        """Called after a call of a linear layer, with the names of its kernel and bias, and its input."""

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
        observer.enter(module)
        running.append(module)
        try:
            result = next_fun(*args, **kwargs)
        finally:
            running.pop()
        refusal = _refusal(module, running)
        make_kind = _KINDS.get(_class_called(context))
        if make_kind is not None and refusal is None:
            x, *rest = args if args else (kwargs["inputs"],)
            options = {name: value for name, value in kwargs.items() if name != "inputs"}
            if (kind := make_kind(module, _shape(module, "kernel"), x, *rest, **options)) is not None:
                observer.see_layer(module, "kernel", "bias" if module.has_variable("params", "bias") else None, kind, x)
        observer.leave(module, refusal or _reason_to_exclude(module))
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

    Under ``find_layers`` it describes the layer, under ``record_inputs`` it records its input, and
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
    observer: Observer | None = _observer.value
    if observer is None:
        return
    kernel_shape = _shape(module, kernel)
    bias_shape = () if bias is None else _shape(module, bias)
    for name, shape, roles in ((kernel, kernel_shape, kernel_roles), (bias, bias_shape, bias_roles)):
        if name is not None and len(shape) != len(roles):
            where = "/".join((*module.path, name))
            raise ValueError(f"{where} has shape {shape}, but {len(roles)} roles {roles!r}: give one a axis.")
    kind = Kind(
        kernel=(kernel_shape, kernel_roles),
        bias=(bias_shape, bias_roles),
        input_axes=input_axes,
        stack_axes=stack_axes,
        groups=math.prod(size for size, role in zip(kernel_shape, kernel_roles, strict=True) if role == "g"),
    )
    observer.see_layer(module, kernel, bias, kind, x)


def _einsum(module: nn.Einsum, kernel: tuple[int, ...], x: jax.Array, einsum_str: str | None = None) -> Kind | None:
    return kinds.einsum(module.einsum_str if module.einsum_str is not None else str(einsum_str), kernel)


def _conv_local(module: nn.ConvLocal, kernel: tuple[int, ...], x: jax.Array) -> Kind:
    window = module.kernel_size
    return kinds.conv_local(kernel, (window,) if isinstance(window, int) else tuple(window))


# From a layer's class to its kind: a function of the module, its kernel's shape and its arguments.
_KINDS: dict[type[nn.Module], Callable[..., Kind | None]] = {
    nn.Dense: lambda module, kernel, x: kinds.dense(kernel),
    nn.DenseGeneral: lambda module, kernel, x: kinds.dense_general(kernel, module.axis, module.batch_dims, x.ndim),
    nn.Einsum: _einsum,
    nn.Conv: lambda module, kernel, x: kinds.conv(kernel, module.feature_group_count),
    nn.ConvLocal: _conv_local,
    nn.ConvTranspose: lambda module, kernel, x: kinds.conv_transpose(kernel, module.transpose_kernel),
    DenseParams: lambda module, kernel, x: kinds.dense(kernel),  # holds the parameters of OptimizedLSTMCell
}

_NORMALIZATIONS = (
    nn.BatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.SpectralNorm,
    nn.WeightNorm,
)


def _class_called(context: InterceptorContext) -> type[nn.Module]:
    """Returns the class whose own `__call__` is running, of those that are linear layers; else `nn.Module`."""
    method = getattr(context.orig_method, "func", None)
    for cls in _KINDS:
        if isinstance(context.module, cls) and method is inspect.unwrap(cls.__call__):
            return cls
    return nn.Module


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """Returns the shape of a parameter inside the transforms around its module."""
    if not module.has_variable("params", name):
        where = "/".join(module.path) or type(module).__name__
        raise ValueError(f"{where} has no parameter {name!r}. Call register after self.param, with its name.")
    shape: tuple[int, ...] = nn.unbox(module.get_variable("params", name)).shape
    return shape


def _refusal(module: nn.Module, around: list[nn.Module]) -> str | None:
    """Says why a linear layer cannot be preconditioned all the same, if so."""
    if getattr(module, "mask", None) is not None:
        return kinds.MASKED
    if jnp.issubdtype(getattr(module, "param_dtype", jnp.float32), jnp.complexfloating):
        return kinds.COMPLEX
    if wrappers := [m for m in around if isinstance(m, nn.WeightNorm | nn.SpectralNorm)]:
        return f"its kernel is normalized by {type(wrappers[-1]).__name__}"
    return None


def _reason_to_exclude(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Embed):
        return kinds.EMBEDDING
    if isinstance(module, _NORMALIZATIONS):
        return kinds.NORMALIZATION
    if isinstance(module, nn.Einsum):
        return kinds.NO_CONTRACTION
    for cls in _KINDS:
        if isinstance(module, cls):
            return f"{name} overrides __call__ without calling that of nn.{cls.__name__}"
    return f"{name} is not one of Flax's linear layers; linen.register makes it known if it is linear"
