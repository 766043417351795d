"""Instance Enhancement Batch Normalization for Flax Linen."""

import flax.linen as nn
import jax
from jax.typing import ArrayLike

from bnp_optax.contrib.instance_enhancement import (
    GATE_BIAS_INIT,
    instance_enhanced_normalize,
    instance_enhanced_normalize_inference,
)
from bnp_optax.contrib.linen.normalization import BatchStatisticsLayer
from bnp_optax.contrib.normalization import feature_axes


class InstanceEnhancementBatchNorm(BatchStatisticsLayer):
    """Instance Enhancement Batch Normalization, IEBN, in the place of ``nn.BatchNorm``.

    It takes all arguments of that layer. See :func:`bnp_optax.contrib.instance_enhanced_normalize` for the mathematics.
    Beside scale and bias it has two parameters a feature, ``gate_weight`` and ``gate_bias``. The collection
    ``"batch_stats"`` holds the running ``mean`` and ``var``, which are those of ``nn.BatchNorm``, and change where that
    collection is mutable and ``use_running_average`` is false, not in ``init``. Examples are along the first axis that
    is none of features.

    Attributes:
      use_running_average: as all that follow, see ``flax.linen.BatchNorm``.
      axis: the axis of the features, or several.
      momentum: how much of the running statistics stays at each step.
      epsilon: added to the variance.
      dtype: of the result.
      param_dtype: of scale, bias and gates.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: a mapped axis over which the batch is split.
      axis_index_groups: groups of indices within it.
      use_fast_variance: whether to read the batch once for its variance.
      force_float32_reductions: whether statistics are in float32 at least.
      gate_weight_init: initializer of the gate's weight, by default the authors', 0.
      gate_bias_init: initializer of the gate's bias, by default the authors', -1.

    Example:
      >>> layer = InstanceEnhancementBatchNorm()
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
      >>> variables = layer.init(jax.random.key(1), x, use_running_average=False)
      >>> jax.tree.map(jax.numpy.shape, variables["params"])
      {'bias': (3,), 'gate_bias': (3,), 'gate_weight': (3,), 'scale': (3,)}
      >>> y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> y = layer.apply(variables | updated, x, use_running_average=True)
    """

    gate_weight_init: jax.nn.initializers.Initializer = jax.nn.initializers.zeros
    gate_bias_init: jax.nn.initializers.Initializer = GATE_BIAS_INIT

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes a batch.

        Args:
          x: the batch.
          use_running_average: whether to normalize by the running statistics, if the layer does not say it.
          mask: what counts, in the statistics and in the gates, an array of booleans that is broadcast to the batch.
            The gates want it in evaluation too.

        Returns:
          The batch, normalized.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        shape = tuple(x.shape[axis] for axis in feature_axes(x.ndim, self.axis))
        mean, var = self.statistic("mean", 0.0, shape), self.statistic("var", 1.0, shape)
        gate_weight = self.param("gate_weight", self.gate_weight_init, shape, self.param_dtype)
        gate_bias = self.param("gate_bias", self.gate_bias_init, shape, self.param_dtype)
        if use_running_average:
            normalized = instance_enhanced_normalize_inference(
                x,
                mean.value,
                var.value,
                gate_weight,
                gate_bias,
                axis=self.axis,
                epsilon=self.epsilon,
                dtype=self.dtype,
                mask=mask,
            )
        else:
            result = instance_enhanced_normalize(
                x, mean.value, var.value, gate_weight, gate_bias, mask=mask, **self.pooling()
            )
            normalized = result.normalized
            if not self.is_initializing():
                mean.value, var.value = result.mean, result.var
        return self.finish(x, normalized)
