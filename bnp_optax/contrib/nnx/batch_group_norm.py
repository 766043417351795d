"""Batch Group Normalization for Flax NNX."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from bnp_optax.contrib.batch_group_norm import batch_group_normalize, batch_group_normalize_inference
from bnp_optax.contrib.nnx.normalization import BatchStatisticsLayer


class BatchGroupNorm(BatchStatisticsLayer):
    """Batch Group Normalization in the place of ``nnx.BatchNorm``, all of whose arguments it takes.

    See :func:`bnp_optax.contrib.batch_group_normalize` for the mathematics. The running ``mean`` and ``var`` of each
    group are ``nnx.BatchStat``. Scale and bias are a number a channel, as there.

    Args:
      num_features: the number of channels, C.
      num_groups: the number of groups of channels, G.
      spatial_shape: allows G to be a multiple of C, and says the sizes of all axes but the first, of the examples, and
        the channels'.
      **arguments: those of ``nnx.BatchNorm``, with its defaults, ``rngs`` among them.

    Example:
      >>> from flax import nnx
      >>> layer = BatchGroupNorm(6, num_groups=2, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 6))
      >>> y = layer(x)
      >>> print(layer.mean.shape, layer.scale.shape)
      (2,) (6,)
      >>> layer.eval()
      >>> y = layer(x)
    """

    def __init__(
        self, num_features: int, *, num_groups: int, spatial_shape: Sequence[int] | None = None, **arguments: Any
    ) -> None:
        super().__init__(num_features, **arguments)
        self.mean, self.var = self.statistic(0.0, num_groups), self.statistic(1.0, num_groups)
        self.num_groups = num_groups
        self.spatial_shape = None if spatial_shape is None else tuple(spatial_shape)

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Normalizes a batch.

        Args:
          x: the batch, its first axis that of the examples.
          use_running_average: whether to normalize by the running statistics; by default, what the layer says.
          mask: what counts in the statistics, an array of booleans that is broadcast to the batch.

        Returns:
          The batch, normalized.

        Raises:
          ValueError: if neither the call nor the layer says whether to use the running statistics.
        """
        mean, var = self.mean[...], self.var[...]
        if self.uses_running_average(use_running_average):
            normalized = batch_group_normalize_inference(
                x,
                mean,
                var,
                self.num_groups,
                axis=self.axis,
                spatial_shape=self.spatial_shape,
                epsilon=self.epsilon,
                dtype=self.dtype,
            )
        else:
            result = batch_group_normalize(
                x, mean, var, self.num_groups, spatial_shape=self.spatial_shape, mask=mask, **self.pooling()
            )
            normalized = result.normalized
            self.mean[...], self.var[...] = result.mean, result.var
        return self.finish(x, normalized, mean, var)
