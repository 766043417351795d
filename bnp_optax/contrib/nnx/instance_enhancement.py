"""Instance Enhancement Batch Normalization for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from bnp_optax.contrib.instance_enhancement import (
    GATE_BIAS_INIT,
    instance_enhanced_normalize,
    instance_enhanced_normalize_inference,
)
from bnp_optax.contrib.nnx.normalization import BatchStatisticsLayer


class InstanceEnhancementBatchNorm(BatchStatisticsLayer):
    """Instance Enhancement Batch Normalization, IEBN, in the place of ``nnx.BatchNorm``.

    It takes all arguments of that layer. See :func:`bnp_optax.contrib.instance_enhanced_normalize` for the mathematics.
    Beside scale and bias it has two parameters a feature, ``gate_weight`` and ``gate_bias``. The running ``mean`` and
    ``var``, which are those of ``nnx.BatchNorm``, are ``nnx.BatchStat``. Examples are along the first axis that is none
    of features.

    Args:
      num_features: the number of input features.
      gate_weight_init: initializer of the gate's weight, by default the authors', 0.
      gate_bias_init: initializer of the gate's bias, by default the authors', -1.
      param_dtype: of scale, bias and gates.
      rngs: of the initializers.
      **arguments: the others of ``nnx.BatchNorm``, with its defaults.

    Example:
      >>> layer = InstanceEnhancementBatchNorm(3, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
      >>> y = layer(x)
      >>> print(layer.gate_weight[...], layer.gate_bias[...])
      [0. 0. 0.] [-1. -1. -1.]
      >>> layer.eval()
      >>> y = layer(x)
    """

    def __init__(
        self,
        num_features: int,
        *,
        gate_weight_init: jax.nn.initializers.Initializer = jax.nn.initializers.zeros,
        gate_bias_init: jax.nn.initializers.Initializer = GATE_BIAS_INIT,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **arguments: Any,
    ) -> None:
        super().__init__(num_features, param_dtype=param_dtype, rngs=rngs, **arguments)
        self.mean, self.var = self.statistic(0.0, num_features), self.statistic(1.0, num_features)
        self.gate_weight = nnx.Param(gate_weight_init(rngs.params(), (num_features,), param_dtype))
        self.gate_bias = nnx.Param(gate_bias_init(rngs.params(), (num_features,), param_dtype))

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes a batch.

        Args:
          x: the batch.
          use_running_average: whether to normalize by the running statistics; by default, what the layer says.
          mask: what counts, in the statistics and in the gates, an array of booleans that is broadcast to the batch.
            The gates want it in evaluation too.

        Returns:
          The batch, normalized.

        Raises:
          ValueError: if neither the call nor the layer says whether to use the running statistics.
        """
        mean, var = self.mean[...], self.var[...]
        gate = self.gate_weight[...], self.gate_bias[...]
        if self.uses_running_average(use_running_average):
            normalized = instance_enhanced_normalize_inference(
                x, mean, var, *gate, axis=self.axis, epsilon=self.epsilon, dtype=self.dtype, mask=mask
            )
        else:
            result = instance_enhanced_normalize(x, mean, var, *gate, mask=mask, **self.pooling())
            normalized = result.normalized
            self.mean[...], self.var[...] = result.mean, result.var
        return self.finish(x, normalized, mean, var)
