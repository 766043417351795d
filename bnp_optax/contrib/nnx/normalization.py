"""The arguments of ``flax.nnx.BatchNorm``, and its scale and shift, for layers that take its place."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import PromoteDtypeFn
from jax.typing import DTypeLike

from bnp_optax.contrib.normalization import NO_CHOICE, feature_axes, float32_or_wider, scale_and_shift


class BatchStatisticsLayer(nnx.Module):
    """What :class:`~bnp_optax.contrib.nnx.BatchRenorm` and its neighbours share; it has no call of its own.

    Args:
      num_features: the number of input features.
      use_running_average: whether to normalize by the running statistics, as in evaluation; ``model.train()``,
        ``model.eval()`` and ``nnx.view`` change it, the call may say it.
      axis: the axis of the features, or several; all others are pooled.
      momentum: how much of the running statistics stays at each step.
      epsilon: added to the variance.
      dtype: of the result; by default it follows from the input, the statistics and the parameters.
      param_dtype: of scale and bias. Statistics are of this dtype or float32, whichever is wider.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: the name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which the batch is split.
      axis_index_groups: groups of indices within that axis, each of which is a batch of its own.
      use_fast_variance: reads the batch once for its variance, which loses digits where the mean is much larger than
        the deviation; otherwise twice.
      promote_dtype: says of which dtype the result is: that of the first of the tuple that it returns when called with
        the tuple of input, two statistics, scale and bias, and ``dtype=``. Sums are in float32 or wider in any case.
      rngs: of the initializers.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: jax.nn.initializers.Initializer = jax.nn.initializers.zeros,
        scale_init: jax.nn.initializers.Initializer = jax.nn.initializers.ones,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        def parameter(init: jax.nn.initializers.Initializer, metadata: Mapping[str, Any]) -> nnx.Param[jax.Array]:
            return nnx.Param(init(rngs.params(), (num_features,), param_dtype), **metadata)

        self.scale = parameter(scale_init, scale_metadata) if use_scale else nnx.data(None)
        self.bias = parameter(bias_init, bias_metadata) if use_bias else nnx.data(None)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def statistic(self, value: float, size: int) -> nnx.BatchStat[jax.Array]:
        """Returns a running statistic that begins with this value."""
        return nnx.BatchStat(jnp.full((size,), value, float32_or_wider(self.param_dtype)))

    def uses_running_average(self, use_running_average: bool | None) -> bool:
        """Returns what the call says or else the layer.

        Args:
          use_running_average: what the call says.

        Returns:
          Whether to normalize by the running statistics.

        Raises:
          ValueError: if neither says it.
        """
        for choice in (use_running_average, self.use_running_average):
            if choice is not None:
                return choice
        raise ValueError(NO_CHOICE.format(type(self).__name__))

    def pooling(self) -> dict[str, Any]:
        """Returns what the functions of a batch want to know of it."""
        return {
            "axis": self.axis,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "dtype": self.dtype,
            "axis_name": self.axis_name,
            "axis_index_groups": self.axis_index_groups,
            "use_fast_variance": self.use_fast_variance,
        }

    def finish(self, x: jax.Array, normalized: jax.Array, *statistics: jax.Array) -> jax.Array:
        """Returns the normalized input with its scale and bias, in the dtype that ``nnx.BatchNorm`` would return."""
        scale, bias = (None if each is None else each[...] for each in (self.scale, self.bias))
        promoted, *_ = self.promote_dtype((x, *statistics, scale, bias), dtype=self.dtype)
        axes = feature_axes(normalized.ndim, self.axis)
        return scale_and_shift(normalized, scale, bias, axes).astype(jnp.result_type(promoted))

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Changes the layer as ``nnx.view`` asks for.

        Args:
          use_running_average: whether to normalize by the running statistics; ``None`` leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
