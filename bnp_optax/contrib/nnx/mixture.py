"""Mixture Normalization for Flax NNX."""

from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from bnp_optax.contrib.mixture import Mixture, initial_mixture, mixture_normalize, mixture_normalize_inference
from bnp_optax.contrib.nnx.normalization import BatchStatisticsLayer


class MixtureNorm(BatchStatisticsLayer):
    """Mixture Normalization in the place of ``nnx.BatchNorm``, all of whose arguments it takes.

    See :func:`bnp_optax.contrib.mixture_normalize` for the mathematics, and for what of it is this library's choice.
    The running ``mean`` and ``var`` of each feature, which are those of ``nnx.BatchNorm``, and the running mixture in
    their units, ``component_weights``, ``component_mean`` and ``component_var``, are ``nnx.BatchStat``. No random
    numbers are needed but those of the initializers.

    Args:
      num_features: the number of input features.
      num_components: the number of components, K. 1 is Batch Normalization.
      em_steps: how many steps of EM a batch takes.
      **arguments: those of ``nnx.BatchNorm``, with its defaults, ``rngs`` among them.

    Example:
      >>> layer = MixtureNorm(3, num_components=2, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
      >>> y = layer(x)
      >>> print(layer.component_weights.shape, layer.component_mean.shape, layer.mean.shape)
      (2,) (2, 3) (3,)
      >>> layer.eval()
      >>> y = layer(x)
    """

    def __init__(self, num_features: int, *, num_components: int, em_steps: int = 2, **arguments: Any) -> None:
        super().__init__(num_features, **arguments)
        self.mean, self.var = self.statistic(0.0, num_features), self.statistic(1.0, num_features)
        initial = initial_mixture(num_components, (num_features,), self.mean.dtype)
        self.component_weights, self.component_mean, self.component_var = map(nnx.BatchStat, initial)
        self.num_components, self.em_steps = num_components, em_steps

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
        mean, var = self.mean[...], self.var[...]
        mixture = Mixture(self.component_weights[...], self.component_mean[...], self.component_var[...])
        if self.uses_running_average(use_running_average):
            normalized = mixture_normalize_inference(
                x, mean, var, mixture, axis=self.axis, epsilon=self.epsilon, dtype=self.dtype
            )
        else:
            result = mixture_normalize(x, mean, var, mixture, em_steps=self.em_steps, mask=mask, **self.pooling())
            normalized = result.normalized
            self.mean[...], self.var[...] = result.mean, result.var
            self.component_weights[...], self.component_mean[...], self.component_var[...] = result.mixture
        return self.finish(x, normalized, mean, var)
