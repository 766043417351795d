"""The arguments of ``flax.linen.BatchNorm``, and its scale and shift, for layers that take its place."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import dtypes
from jax.typing import DTypeLike

from bnp_optax.contrib.normalization import feature_axes, float32_or_wider, scale_and_shift


class BatchStatisticsLayer(nn.Module):
    """What :class:`~bnp_optax.contrib.linen.BatchRenorm` and its neighbours share; it has no call of its own.

    Attributes:
      use_running_average: whether to normalize by the running statistics, as in evaluation; else the call says it.
      axis: the axis of the features, or several; all others are pooled.
      momentum: how much of the running statistics stays at each step.
      epsilon: added to the variance.
      dtype: of the result; by default it follows from the input and the parameters.
      param_dtype: of scale and bias. Statistics are of this dtype or float32, whichever is wider.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: the name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which the batch is split.
      axis_index_groups: groups of indices within that axis, each of which is a batch of its own.
      use_fast_variance: reads the batch once for its variance, which loses digits where the mean is much larger than
        the deviation; otherwise twice.
      force_float32_reductions: ``False`` keeps the running statistics in ``param_dtype`` even if that is narrower than
        float32. Sums are in float32 or wider in any case.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: jax.nn.initializers.Initializer = jax.nn.initializers.zeros
    scale_init: jax.nn.initializers.Initializer = jax.nn.initializers.ones
    axis_name: Any = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    def statistic(self, name: str, value: float, shape: tuple[int, ...]) -> nn.Variable[jax.Array]:
        """Returns a running statistic, a variable of the collection ``"batch_stats"`` that begins with this value."""
        dtype = float32_or_wider(self.param_dtype) if self.force_float32_reductions else self.param_dtype
        return self.variable("batch_stats", name, jnp.full, shape, value, dtype)

    def pooling(self) -> dict[str, Any]:
        """Returns what the functions of a batch want to know of it; while parameters are made, no axis is mapped."""
        axis_name = None if self.is_initializing() else self.axis_name
        groups = None if self.is_initializing() else self.axis_index_groups
        return {
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "dtype": self.dtype,
            "axis_name": axis_name,
            "axis_index_groups": groups,
            "use_fast_variance": self.use_fast_variance,
        }

    def finish(self, x: jax.Array, normalized: jax.Array) -> jax.Array:
        """Returns the normalized input with its scale and bias, in the dtype that ``nn.BatchNorm`` would return."""
        axes = feature_axes(normalized.ndim, self.axis)
        shape = tuple(normalized.shape[axis] for axis in axes)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        return scale_and_shift(normalized, scale, bias, axes).astype(dtype)
