"""Mixture Normalization for Flax Linen."""

import dataclasses

import flax.linen as nn
import jax
from jax.typing import ArrayLike

from bnp_optax.contrib.linen.normalization import BatchStatisticsLayer
from bnp_optax.contrib.mixture import Mixture, initial_mixture, mixture_normalize, mixture_normalize_inference
from bnp_optax.contrib.normalization import feature_axes


class MixtureNorm(BatchStatisticsLayer):
    """Mixture Normalization in the place of ``nn.BatchNorm``, all of whose arguments it takes.

    See :func:`bnp_optax.contrib.mixture_normalize` for the mathematics, and for what of it is this library's choice.
    The collection ``"batch_stats"`` holds the running ``mean`` and ``var`` of each feature, which are those of
    ``nn.BatchNorm``, and the running mixture in their units: ``component_weights``, ``component_mean`` and
    ``component_var``. They change where that collection is mutable and ``use_running_average`` is false, not in
    ``init``. No random numbers are needed.

    Attributes:
      use_running_average: as all that follow, see ``flax.linen.BatchNorm``.
      axis: the axis of the features, or several.
      momentum: how much of the running statistics stays at each step.
      epsilon: added to the variances.
      dtype: of the result.
      param_dtype: of scale and bias.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: a mapped axis over which the batch is split.
      axis_index_groups: groups of indices within it.
      use_fast_variance: whether to read the batch once for its variances.
      force_float32_reductions: whether statistics are in float32 at least.
      num_components: the number of components, K; a keyword, and required. 1 is Batch Normalization.
      em_steps: how many steps of EM a batch takes.

    Example:
      >>> layer = MixtureNorm(num_components=2)
      >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
      >>> variables = layer.init(jax.random.key(1), x, use_running_average=False)
      >>> jax.tree.map(jax.numpy.shape, variables["batch_stats"])
      {'component_mean': (2, 3), 'component_var': (2, 3), 'component_weights': (2,), 'mean': (3,), 'var': (3,)}
      >>> y, updated = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> y = layer.apply(variables | updated, x, use_running_average=True)
    """

    num_components: int = dataclasses.field(kw_only=True)
    em_steps: int = dataclasses.field(kw_only=True, default=2)

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
        mean, var = self.statistic("mean", 0.0, shape), self.statistic("var", 1.0, shape)
        initial = initial_mixture(self.num_components, shape, mean.value.dtype)
        of_components = [
            self.variable("batch_stats", f"component_{name}", lambda start=start: start)
            for name, start in initial._asdict().items()
        ]
        mixture = Mixture(*(variable.value for variable in of_components))
        if use_running_average:
            normalized = mixture_normalize_inference(
                x, mean.value, var.value, mixture, axis=self.axis, epsilon=self.epsilon, dtype=self.dtype
            )
        else:
            result = mixture_normalize(
                x, mean.value, var.value, mixture, em_steps=self.em_steps, mask=mask, **self.pooling()
            )
            normalized = result.normalized
            if not self.is_initializing():
                mean.value, var.value = result.mean, result.var
                for variable, value in zip(of_components, result.mixture, strict=True):
                    variable.value = value
        return self.finish(x, normalized)
