"""Batch Group Normalization for Flax Linen."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.typing import ArrayLike

from bnp_optax.contrib.batch_group_norm import batch_group_normalize, batch_group_normalize_inference
from bnp_optax.contrib.linen.normalization import BatchStatisticsLayer


class BatchGroupNorm(BatchStatisticsLayer):
    """Batch Group Normalization in the place of ``nn.BatchNorm``, all of whose arguments it takes.

    See :func:`bnp_optax.contrib.batch_group_normalize` for the mathematics. The collection ``"batch_stats"`` holds the
    running ``mean`` and ``var`` of each group. As of ``nn.BatchNorm``, they change where that collection is mutable and
    ``use_running_average`` is false, not in ``init``. Scale and bias are a number a channel, as there.

    Attributes:
      use_running_average: as all that follow, see ``flax.linen.BatchNorm``.
      axis: the axis of the channels.
      momentum: how much of the running statistics stays at each step.
      epsilon: added to the variance.
      dtype: of the result.
      param_dtype: of scale and bias.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: a mapped axis over which the batch is split.
      axis_index_groups: groups of indices within it.
      use_fast_variance: whether to read the batch once for its variance.
      force_float32_reductions: whether statistics are in float32 at least.
      num_groups: the number of groups of channels, G; a keyword, and required.
      spatial_shape: allows G to be a multiple of the number of channels, and says the sizes of all axes but the first,
        of the examples, and the channels'.

    Example:
      >>> layer = BatchGroupNorm(num_groups=2)
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 6))
      >>> variables = layer.init(jax.random.key(1), x, use_running_average=False)
      >>> jax.tree.map(jax.numpy.shape, variables)
      {'batch_stats': {'mean': (2,), 'var': (2,)}, 'params': {'bias': (6,), 'scale': (6,)}}
      >>> y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> y = layer.apply(variables | updated, x, use_running_average=True)
    """

    num_groups: int = dataclasses.field(kw_only=True)
    spatial_shape: Sequence[int] | None = dataclasses.field(kw_only=True, default=None)

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes a batch.

        Args:
          x: the batch, its first axis that of the examples.
          use_running_average: whether to normalize by the running statistics, if the layer does not say it.
          mask: what counts in the statistics, an array of booleans that is broadcast to the batch.

        Returns:
          The batch, normalized.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        mean = self.statistic("mean", 0.0, (self.num_groups,))
        var = self.statistic("var", 1.0, (self.num_groups,))
        if use_running_average:
            normalized = batch_group_normalize_inference(
                x,
                mean.value,
                var.value,
                self.num_groups,
                axis=self.axis,
                spatial_shape=self.spatial_shape,
                epsilon=self.epsilon,
                dtype=self.dtype,
            )
        else:
            result = batch_group_normalize(
                x,
                mean.value,
                var.value,
                self.num_groups,
                spatial_shape=self.spatial_shape,
                mask=mask,
                **self.pooling(),
            )
            normalized = result.normalized
            if not self.is_initializing():
                mean.value, var.value = result.mean, result.var
        return self.finish(x, normalized)
