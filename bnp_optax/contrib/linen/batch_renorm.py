"""Batch Renormalization for Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from bnp_optax.contrib.batch_renorm import PAPER, batch_renormalize, batch_renormalize_inference, limit_at
from bnp_optax.contrib.linen.normalization import BatchStatisticsLayer
from bnp_optax.contrib.normalization import feature_axes


class BatchRenorm(BatchStatisticsLayer):
    """Batch Renormalization in the place of ``nn.BatchNorm``, all of whose arguments it takes.

    See :func:`bnp_optax.contrib.batch_renormalize` for the mathematics. The collection ``"batch_stats"`` holds the
    running ``mean`` and ``std``, a standard deviation, and ``steps``, how many batches they have seen, which the limits
    may depend on. As of ``nn.BatchNorm``, they change where that collection is mutable and ``use_running_average`` is
    false, not in ``init``.

    Attributes:
      use_running_average: as all that follow, see ``flax.linen.BatchNorm``.
      axis: the axis of the features, or several.
      momentum: the paper's alpha is ``1 - momentum``, and 0.01.
      epsilon: added to the variance in training; running deviations hold it already. The default is that of Flax.
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
      r_max: the limit of the ratio of deviations: a number, or a schedule, a function of ``steps``.
      d_max: the limit of the shift, likewise. Both have the paper's by default, ``ramp()``: for 5,000 steps this is
        Batch Normalization. A short training wants other numbers, see :func:`bnp_optax.contrib.ramp`.

    Example:
      >>> from bnp_optax import contrib
      >>> limits = contrib.ramp(hold=100, r_end=800, d_end=500)
      >>> layer = BatchRenorm(r_max=limits.r_max, d_max=limits.d_max)
      >>> x = jax.random.normal(jax.random.key(0), (4, 3))
      >>> variables = layer.init(jax.random.key(1), x, use_running_average=False)
      >>> jax.tree.map(jnp.shape, variables)
      {'batch_stats': {'mean': (3,), 'std': (3,), 'steps': ()}, 'params': {'bias': (3,), 'scale': (3,)}}
      >>> y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> print(updated["batch_stats"]["steps"])
      1
      >>> y = layer.apply(variables | updated, x, use_running_average=True)
    """

    r_max: float | optax.Schedule = PAPER.r_max
    d_max: float | optax.Schedule = PAPER.d_max

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes a batch.

        Args:
          x: the batch.
          use_running_average: whether to normalize by the running statistics, if the layer does not say it.
          mask: what counts in the statistics, an array of booleans that is broadcast to the batch.

        Returns:
          The batch, normalized.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        shape = tuple(x.shape[axis] for axis in feature_axes(x.ndim, self.axis))
        mean, std = self.statistic("mean", 0.0, shape), self.statistic("std", 1.0, shape)
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
        if use_running_average:
            normalized = batch_renormalize_inference(x, mean.value, std.value, axis=self.axis, dtype=self.dtype)
        else:
            r_max, d_max = limit_at(self.r_max, steps.value), limit_at(self.d_max, steps.value)
            result = batch_renormalize(x, mean.value, std.value, r_max, d_max, mask=mask, **self.pooling())
            normalized = result.normalized
            if not self.is_initializing():
                mean.value, std.value, steps.value = result.mean, result.std, steps.value + 1
        return self.finish(x, normalized)
