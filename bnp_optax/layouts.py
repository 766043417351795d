"""The kinds of linear layers that Flax has, in Linen and in NNX alike."""

import dataclasses
import math
from collections.abc import Iterable

import jax

from bnp_optax.moments import InputMoments, input_moments

# Why parameters are excluded.
EMBEDDING = "embedding: its rows are looked up, not multiplied by an input"
NORMALIZATION = "scale or shift of a normalization"
MASKED = "masked kernel: its units see different inputs"
COMPLEX = "complex parameters or input"
NO_CONTRACTION = "its einsum is not the contraction of an input with the kernel"

Split = tuple[tuple[int, ...], str]  # a shape whose axes play one role each, and those roles


@dataclasses.dataclass(frozen=True)
class Kind:
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

    def moments(self, x: jax.Array) -> InputMoments:
        """Returns the record of an input."""
        return input_moments(
            x,
            input_axes=self.input_axes,
            stack_axes=self.stack_axes,
            groups=self.groups,
            num_spatial=self.num_spatial,
        )

    def has_examples(self, ndim: int) -> bool:
        """Returns whether an input of this rank has an axis of examples."""
        return ndim - len(self.input_axes) - len(self.stack_axes) > self.num_spatial


def dense(kernel: tuple[int, ...], input_axes: tuple[int, ...] = (-1,), stack_axes: tuple[int, ...] = ()) -> Kind:
    """A dense layer, whose kernel has axes ``[*stack, *inputs, *outputs]``.

    Args:
      kernel: the kernel's shape.
      input_axes: the input's axes that are contracted, in the order of the kernel's.
      stack_axes: the input's axes that are batch dimensions of the contraction, likewise.
    """
    stack, outputs = kernel[: len(stack_axes)], kernel[len(stack_axes) + len(input_axes) :]
    stack_roles, output_roles = "s" * len(stack), "o" * len(outputs)
    return Kind(
        kernel=(kernel, f"{stack_roles}{'i' * len(input_axes)}{output_roles}"),
        bias=((*stack, *outputs), stack_roles + output_roles),
        input_axes=input_axes,
        stack_axes=stack_axes,
    )


def dense_general(
    kernel: tuple[int, ...], axis: int | Iterable[int], batch_axes: int | Iterable[int], ndim: int
) -> Kind:
    """Flax's dense layer over several axes of an input of rank ``ndim``, which it takes in the array's order."""
    input_axes, stack_axes = (
        tuple(sorted(a % ndim for a in ((axes,) if isinstance(axes, int) else axes))) for axes in (axis, batch_axes)
    )
    return dense(kernel, input_axes, stack_axes)


def conv(kernel: tuple[int, ...], groups: int = 1) -> Kind:
    """A convolution, whose kernel has axes ``[*window, input, output]``; groups are outermost in the outputs."""
    window = kernel[:-2]
    # no axis for a single group, whose reshape would keep XLA from cancelling its transposes of the kernel and ours
    outputs, roles = ((groups, kernel[-1] // groups), "go") if groups > 1 else (kernel[-1:], "o")
    return Kind(
        kernel=((*window, kernel[-2], *outputs), "w" * len(window) + "i" + roles),
        bias=(outputs, roles),
        groups=groups,
        num_spatial=len(window),
    )


def conv_transpose(kernel: tuple[int, ...], transpose_kernel: bool = False) -> Kind:
    """A transposed convolution; ``transpose_kernel`` swaps the kernel's last axes to ``[*window, output, input]``."""
    roles = "w" * (len(kernel) - 2) + ("oi" if transpose_kernel else "io")
    outputs = kernel[-2] if transpose_kernel else kernel[-1]
    return Kind(kernel=(kernel, roles), bias=((outputs,), "o"), num_spatial=len(kernel) - 2)


def conv_local(kernel: tuple[int, ...], window: tuple[int, ...]) -> Kind:
    """An unshared convolution, whose kernel has axes ``[*positions, input * window, output]``.

    Its record holds each channel's moments over all positions once, for every entry of the stack.
    """
    positions, roles = kernel[:-2], "s" * (len(kernel) - 2)
    inputs = kernel[-2] // math.prod(window)
    return Kind(
        kernel=((*positions, inputs, *window, kernel[-1]), f"{roles}i{'w' * len(window)}o"),
        bias=((*positions, kernel[-1]), roles + "o"),
        num_spatial=len(window),
    )


def einsum(equation: str, kernel: tuple[int, ...]) -> Kind | None:
    """An einsum ``"input,kernel->output"``; ``None`` if it is no linear layer.

    Of the kernel's indices, one that the input shares and the output lacks is contracted (``i``),
    one that both share is a batch dimension (``s``), one that only the output has is an output
    feature (``o``). The bias has the indices ``s`` and ``o`` in the output's order. No linear layer is
    an equation that contracts nothing, sums an index of one operand alone or repeats one, or whose
    kernel has an ellipsis.
    """
    operands, result = equation.replace(" ", "").split("->")
    inputs, weights = operands.split(",")
    before, _, after = inputs.partition("...")
    letters = before + after
    if (
        any(len(set(indices)) < len(indices) for indices in (letters, weights, result.replace("...", "")))
        or not set(letters) - set(weights) <= set(result)
        or not set(weights) <= set(letters + result)
        or set(weights) & set(letters) <= set(result)
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
    return Kind((kernel, roles), bias, axes("i"), axes("s"))
