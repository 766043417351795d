"""The axis roles of each linear layer of Flax, Linen and NNX alike, and why other parameters are excluded.

:data:`LAYERS` has an entry for every class of layer. It says what a call multiplies: which input with which kernel
(:class:`Product`), and which of their axes play which role (:class:`Layout`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.recurrent import DenseParams
from jax.typing import ArrayLike

from bnp_optax.layers import NOT_CALLED
from bnp_optax.moments import InputMoments, input_moments

Split = tuple[tuple[int, ...], str]  # a shape whose axes play one role each, and those roles


class RecordError(ValueError):
    """An input that cannot be recorded."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"The input of {where} cannot be recorded{reason}.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the parameters and the input of one layer map to canonical shape.

    Attributes:
      kernel: the kernel's split shape and roles, as in :class:`~bnp_optax.Parameter`.
      bias: those of its bias, if it has one.
      input_axes: the input's axes that the kernel contracts, in the order of the kernel's.
      stack_axes: the input's axes along which the layer has kernels of their own, likewise.
      groups: into how many groups the input's features fall.
      num_spatial: how many axes of the input belong to one example whatever its rank.
    """

    kernel: Split
    bias: Split
    input_axes: tuple[int, ...] = (-1,)
    stack_axes: tuple[int, ...] = ()
    groups: int = 1
    num_spatial: int = 0

    def moments(self, x: jax.Array, mask: ArrayLike | None = None, examples: ArrayLike | None = None) -> InputMoments:
        """Returns the record of an input, with an entry for each entry of the layer's own stack."""
        record = input_moments(
            x,
            input_axes=self.input_axes,
            stack_axes=self.stack_axes,
            groups=self.groups,
            num_spatial=self.num_spatial,
            mask=mask,
            examples=examples,
        )
        stack = math.prod(size for size, role in zip(*self.kernel, strict=True) if role == "s")
        shared: InputMoments = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (stack, *leaf.shape[1:])), record)
        return shared

    def examples(self, x: jax.Array) -> int | None:
        """Returns how many examples an input has, ``None`` if it has no axis of examples."""
        kept = [axis % x.ndim for axis in (*self.input_axes, *self.stack_axes)]
        sizes = [size for axis, size in enumerate(x.shape) if axis not in kept]
        return sizes[0] if len(sizes) > self.num_spatial else None


def dense(kernel: tuple[int, ...], input_axes: tuple[int, ...] = (-1,), stack_axes: tuple[int, ...] = ()) -> Layout:
    """A dense layer, whose kernel has axes ``[*stack, *inputs, *outputs]``.

    Args:
      kernel: the kernel's shape.
      input_axes: the input's axes that are contracted, in the order of the kernel's.
      stack_axes: the input's axes that are batch dimensions of the contraction, likewise.
    """
    stack, outputs = kernel[: len(stack_axes)], kernel[len(stack_axes) + len(input_axes) :]
    stack_roles, output_roles = "s" * len(stack), "o" * len(outputs)
    return Layout(
        kernel=(kernel, f"{stack_roles}{'i' * len(input_axes)}{output_roles}"),
        bias=((*stack, *outputs), stack_roles + output_roles),
        input_axes=input_axes,
        stack_axes=stack_axes,
    )


def dense_general(
    kernel: tuple[int, ...], axis: int | Iterable[int], batch_axes: int | Iterable[int], ndim: int
) -> Layout:
    """Flax's dense layer over several axes of an input of rank ``ndim``, which it takes in the array's order."""
    input_axes, stack_axes = (
        tuple(sorted(a % ndim for a in ((axes,) if isinstance(axes, int) else axes))) for axes in (axis, batch_axes)
    )
    return dense(kernel, input_axes, stack_axes)


def conv(kernel: tuple[int, ...], groups: int = 1) -> Layout:
    """A convolution, whose kernel has axes ``[*window, input, output]``; groups are outermost in the outputs."""
    window = kernel[:-2]
    # no axis for a single group, whose reshape would keep XLA from cancelling its transposes of the kernel and ours
    outputs, roles = ((groups, kernel[-1] // groups), "go") if groups > 1 else (kernel[-1:], "o")
    return Layout(
        kernel=((*window, kernel[-2], *outputs), "w" * len(window) + "i" + roles),
        bias=(outputs, roles),
        groups=groups,
        num_spatial=len(window),
    )


def conv_transpose(kernel: tuple[int, ...], transpose_kernel: bool = False) -> Layout:
    """A transposed convolution; ``transpose_kernel`` swaps the kernel's last axes to ``[*window, output, input]``."""
    roles = "w" * (len(kernel) - 2) + ("oi" if transpose_kernel else "io")
    outputs = kernel[-2] if transpose_kernel else kernel[-1]
    return Layout(kernel=(kernel, roles), bias=((outputs,), "o"), num_spatial=len(kernel) - 2)


def conv_local(kernel: tuple[int, ...], window: tuple[int, ...]) -> Layout:
    """An unshared convolution, whose kernel has axes ``[*positions, input * window, output]``.

    Each channel's moments over all positions serve all entries of the stack.
    """
    positions, roles = kernel[:-2], "s" * (len(kernel) - 2)
    inputs = kernel[-2] // math.prod(window)
    return Layout(
        kernel=((*positions, inputs, *window, kernel[-1]), f"{roles}i{'w' * len(window)}o"),
        bias=((*positions, kernel[-1]), roles + "o"),
        num_spatial=len(window),
    )


def einsum(equation: str, kernel: tuple[int, ...]) -> Layout | None:
    """An einsum ``"input,kernel->output"``; ``None`` if it is no linear layer.

    Of the kernel's indices, one that the input shares and the output lacks is contracted (``i``),
    one that both share is a batch dimension (``s``), one that only the output has is an output
    feature (``o``). The bias has the indices ``s`` and ``o`` in the output's order. No linear layer is
    an equation that contracts nothing, sums an index of one operand alone or repeats one, or whose
    kernel has an ellipsis.

    Example:
      >>> heads = einsum("nthd,hdf->nthf", (2, 4, 3))  # two heads, each with a kernel of 4 inputs and 3 outputs
      >>> heads.kernel, heads.bias, heads.input_axes, heads.stack_axes
      (((2, 4, 3), 'sio'), ((2, 3), 'so'), (3,), (2,))
    """
    operands, result = equation.replace(" ", "").split("->")
    inputs, weights = operands.split(",")
    before, _, after = inputs.partition("...")
    letters = before + after
    if (
        any(
            len(set(indices)) < len(indices) for indices in (letters, weights, result.replace("...", ""))
        )  # "aab,bc->ac"
        or not set(letters) - set(weights) <= set(result)  # "abc,bd->ad" sums c of the input alone
        or not set(weights) <= set(letters + result)  # "ab,bcd->ac" sums d of the kernel alone
        or set(weights) & set(letters) <= set(result)  # "ab,b->ab" contracts nothing
        or ("..." in inputs) != ("..." in result)
        or "." in weights
    ):
        return None

    def axes(role: str) -> tuple[int, ...]:
        chosen = [c for c, r in zip(weights, roles, strict=True) if r == role]
        return tuple(before.index(c) if c in before else after.index(c) - len(after) for c in chosen)

    roles = "".join("o" if c not in letters else "s" if c in result else "i" for c in weights)
    shared = [weights.index(c) for c in result if c in weights]
    bias = tuple(kernel[axis] for axis in shared), "".join(roles[axis] for axis in shared)
    return Layout((kernel, roles), bias, axes("i"), axes("s"))


class Product(NamedTuple):
    """An input that a layer multiplies with a kernel of its own.

    Attributes:
      x: the input.
      layout: the axis roles, or the reason why the kernel cannot be preconditioned.
      kernel: the kernel's name in the module.
      bias: the name of the bias that is added, ``None`` without one.
      y: what must be the sum of the product of input and kernel as they stand and the bias, or the kernel itself;
        ``None`` where only the layer's author knows.
      is_of_x: whether the kernel is multiplied by the input itself, rather than something made of it.
    """

    x: Any
    layout: Layout | str
    kernel: str = "kernel"
    bias: str | None = "bias"
    y: Any = None
    is_of_x: bool = True


def registered(
    where: str,
    parameters: Mapping[str, jax.Array],
    x: Any,
    kernel: str,
    bias: str | None,
    kernel_roles: str,
    bias_roles: str,
    input_axes: tuple[int, ...],
    stack_axes: tuple[int, ...],
) -> Product:
    """Returns what a layer of the user's own says that it multiplies.

    Args:
      where: the layer, for errors.
      parameters: its parameters by name.
      x: the input, as all that follow see :func:`bnp_optax.linen.register`.
      kernel: the kernel's name.
      bias: the bias's name.
      kernel_roles: the roles of the kernel's axes.
      bias_roles: those of the bias's.
      input_axes: the axes of the input that are contracted.
      stack_axes: those that go with stacked kernels.

    Raises:
      ValueError: if there is no such parameter, or its axes and roles differ in number.
    """
    splits = []
    for name, roles in ((kernel, kernel_roles), (bias, bias_roles)):
        if name is not None and name not in parameters:
            remedy = "Call register after self.param, or where its nnx.Variable is set, with its name."
            raise ValueError(f"{where} has no parameter {name!r}. {remedy}")
        shape, roles = ((), "") if name is None else (parameters[name].shape, roles)
        if len(shape) != len(roles):
            raise ValueError(f"{where}/{name} has shape {shape}, but {len(roles)} roles {roles!r}: give one an axis.")
        splits.append((shape, roles))
    groups = math.prod(size for size, role in zip(*splits[0], strict=True) if role == "g")
    return Product(x, Layout(splits[0], splits[1], input_axes, stack_axes, groups), kernel, bias)


EMBEDDING = "embedding: its rows are looked up, not multiplied by an input"
NORMALIZATION = "scale or shift of a normalization"
MASKED = "masked kernel: its units see different inputs"
COMPLEX = "complex parameters or input"
NOT_ITS_OWN = "its kernel is not a parameter of its own"
BESIDE = "neither kernel nor bias of its layer"
NO_CONTRACTION = "its einsum is not the contraction of an input with the kernel"


Shapes = Mapping[str, tuple[int, ...]]


def _dense(module: Any, shapes: Shapes, x: Any, *_: Any) -> list[Product]:
    return [Product(x, dense(shapes["kernel"]))]


def _dense_general(module: Any, shapes: Shapes, x: Any, *_: Any) -> list[Product]:
    batch_axes = module.batch_dims if isinstance(module, nn.Module) else module.batch_axis
    return [Product(x, dense_general(shapes["kernel"], module.axis, batch_axes, x.ndim))]


def _einsum(module: Any, shapes: Shapes, x: Any, equation: str | None, *_: Any) -> list[Product]:
    layout = einsum(module.einsum_str if equation is None else equation, shapes["kernel"])
    is_known = layout is not None and shapes.get("bias", layout.bias[0]) == layout.bias[0]
    return [Product(x, layout if layout is not None and is_known else NO_CONTRACTION)]


def _conv(module: Any, shapes: Shapes, x: Any, *_: Any) -> list[Product]:
    return [Product(x, conv(shapes["kernel"], module.feature_group_count))]


def _conv_transpose(module: Any, shapes: Shapes, x: Any, *_: Any) -> list[Product]:
    return [Product(x, conv_transpose(shapes["kernel"], module.transpose_kernel))]


def _conv_local(module: Any, shapes: Shapes, x: Any, *_: Any) -> list[Product]:
    window = module.kernel_size
    layout = conv_local(shapes["kernel"], (window,) if isinstance(window, int) else tuple(window))
    return [Product(x, layout, is_of_x=False)]  # but by patches of it


def _lora(module: Any, shapes: Shapes, x: Any, *_: Any) -> list[Product]:
    low_rank = jnp.matmul(*module.promote_dtype((x, module.lora_a[...]), dtype=module.dtype))
    a, b = dense(shapes["lora_a"]), dense(shapes["lora_b"])
    return [Product(x, a, "lora_a", None, y=low_rank), Product(low_rank, b, "lora_b", None, is_of_x=False)]


# From a layer's class to the products of a call: a function of the module, the shapes of its parameters by name, and
# the call's arguments, defaults included.
LAYERS: dict[type[Any], Callable[..., list[Product]]] = {
    nn.Dense: _dense,
    nnx.Linear: _dense,
    DenseParams: _dense,  # of OptimizedLSTMCell
    nn.DenseGeneral: _dense_general,
    nnx.LinearGeneral: _dense_general,
    nn.Einsum: _einsum,
    nnx.Einsum: _einsum,
    nn.Conv: _conv,
    nnx.Conv: _conv,
    nn.ConvTranspose: _conv_transpose,
    nnx.ConvTranspose: _conv_transpose,
    nn.ConvLocal: _conv_local,
    nnx.LoRA: _lora,
}

_NORMALIZATIONS = tuple(
    getattr(api, name)
    for api in (nn, nnx)
    for name in ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "SpectralNorm", "WeightNorm")
)


def products(
    cls: type[Any], module: Any, parameters: Mapping[str, jax.Array], result: Any, *args: Any
) -> list[Product]:
    """Returns what a call of a layer of Flax multiplies.

    Args:
      cls: the class in :data:`LAYERS` whose ``__call__`` ran.
      module: the layer.
      parameters: its parameters by name, as they are inside the transforms around the call.
      result: what the call returned.
      *args: the arguments of the call, defaults included.

    Raises:
      RecordError: if the input is no array, but a list or tuple of numbers, which Flax makes one of inside.
    """
    shapes = {name: value.shape for name, value in parameters.items()}
    if cls is not nnx.LoRA and "kernel" not in shapes:
        return [Product(None, NOT_ITS_OWN)]
    if isinstance(args[0], list | tuple):
        where = f"{cls.__name__} with a kernel of shape {shapes['kernel']}"
        raise RecordError(where, f": it is a {type(args[0]).__name__}. Call the model with an array, jnp.asarray(...)")
    y = result[0] if cls is DenseParams else result  # it only returns its kernel and bias
    found = []
    for product in LAYERS[cls](module, shapes, *args):
        is_complex = jnp.iscomplexobj(parameters[product.kernel]) or jnp.iscomplexobj(product.x)
        is_masked = getattr(module, "mask", None) is not None
        layout = MASKED if is_masked else COMPLEX if is_complex else product.layout
        bias = product.bias if product.bias in parameters else None
        found.append(product._replace(layout=layout, bias=bias, y=y if product.y is None else product.y))
    return found


def reason_to_exclude(module: Any) -> str:
    """Says why the parameters of a module are excluded that no product told of."""
    name = type(module).__name__
    if isinstance(module, nn.Embed | nnx.Embed):
        return EMBEDDING
    if isinstance(module, _NORMALIZATIONS):
        return NORMALIZATION
    for cls in LAYERS:
        if isinstance(module, cls):
            if type(module).__call__ is cls.__call__:
                return NOT_CALLED
            return f"{name} overrides __call__ and does not call that of {cls.__name__} in this pass"
    return f"{name} is not one of Flax's linear layers; register makes it known if it is linear"
