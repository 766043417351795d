"""Batch Renormalization for Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from bnp_optax.contrib.batch_renorm import (
    PAPER,
    batch_renormalize,
    batch_renormalize_inference,
    limit_at,
)
from bnp_optax.contrib.nnx.normalization import BatchStatisticsLayer


class BatchRenorm(BatchStatisticsLayer):
    """Batch Renormalization in the place of ``nnx.BatchNorm``, all of whose arguments it takes.

    See :func:`bnp_optax.contrib.batch_renormalize` for the mathematics. The running ``mean`` and ``std``, a standard
    deviation, and ``steps``, how many batches they have seen, which the limits may depend on, are ``nnx.BatchStat``.

    Args:
      num_features: the number of input features.
      r_max: the limit of the ratio of deviations: a number, or a schedule, a function of ``steps``.
      d_max: the limit of the shift, likewise. Both have the paper's by default, ``ramp()``: for 5,000 steps this is
        Batch Normalization. A short training wants other numbers, see :func:`bnp_optax.contrib.ramp`.
      **arguments: those of ``nnx.BatchNorm``, with its defaults, ``rngs`` among them. The paper's alpha is
        ``1 - momentum``, and 0.01; the default of ``epsilon`` is that of Flax.

    Example:
      >>> from bnp_optax import contrib
      >>> limits = contrib.ramp(hold=100, r_end=800, d_end=500)
      >>> layer = BatchRenorm(3, r_max=limits.r_max, d_max=limits.d_max, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (4, 3))
      >>> y = layer(x)
      >>> print(layer.steps[...])
      1
      >>> layer.eval()
      >>> y = layer(x)
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float | optax.Schedule = PAPER.r_max,
        d_max: float | optax.Schedule = PAPER.d_max,
        **arguments: Any,
    ) -> None:
        super().__init__(num_features, **arguments)
        self.mean, self.std = self.statistic(0.0, num_features), self.statistic(1.0, num_features)
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.r_max, self.d_max = r_max, d_max

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes a batch.

        Args:
          x: the batch.
          use_running_average: whether to normalize by the running statistics; by default, what the layer says.
          mask: what counts in the statistics, an array of booleans that is broadcast to the batch.

        Returns:
          The batch, normalized.

        Raises:
          ValueError: if neither the call nor the layer says whether to use the running statistics.
        """
        mean, std = self.mean[...], self.std[...]
        if self.uses_running_average(use_running_average):
            normalized = batch_renormalize_inference(x, mean, std, axis=self.axis, dtype=self.dtype)
        else:
            r_max, d_max = limit_at(self.r_max, self.steps[...]), limit_at(self.d_max, self.steps[...])
            result = batch_renormalize(x, mean, std, r_max, d_max, mask=mask, **self.pooling())
            normalized = result.normalized
            self.mean[...], self.std[...], self.steps[...] = result.mean, result.std, self.steps[...] + 1
        return self.finish(x, normalized, mean, std)
