"""What disturbs activations in training, for networks without normalization: BN's noise alone, and dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-5  # of BN's variances


class BatchNoise(nn.Module):
    """BN's noise: what statistics of a batch differ from running ones by, and no normalization.

    ``y = (x - batch mean) running deviation / batch deviation + running mean``, a channel at a time. Statistics are
    constants for the gradients; as the network is used, ``y = x``.

    Attributes:
      train: whether to disturb, and keep the running statistics in the collection ``batch_stats``.
      momentum: of these; their start is no part of them.
    """

    train: bool
    momentum: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns activations of the shape of ``x``, ``[n, ..., channels]``."""
        sums = self.variable("batch_stats", "moments", jnp.zeros, (2, x.shape[-1]))
        weight = self.variable("batch_stats", "weight", jnp.zeros, ())
        if not self.train or self.is_initializing():
            return x
        axes = tuple(range(x.ndim - 1))
        mean, var = own = jax.lax.stop_gradient(jnp.stack([x.mean(axes), x.var(axes)]))
        sums.value = self.momentum * sums.value + (1 - self.momentum) * own
        weight.value = self.momentum * weight.value + 1 - self.momentum
        running_mean, running_var = sums.value / weight.value
        scale = jnp.sqrt((running_var + EPSILON) / (var + EPSILON))
        return jnp.asarray((x - mean) * scale + running_mean)


class Dropout(nn.Module):
    """Dropout that keeps its own random key, in the collection ``batch_stats``.

    Attributes:
      train: whether to drop.
      rate: the part that is dropped.
    """

    train: bool
    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns activations of the shape of ``x``."""
        key = self.variable("batch_stats", "key", self.make_rng, "params")
        if not self.train:
            return x
        key.value, own = jax.random.split(key.value)
        return jnp.asarray(nn.Dropout(self.rate, deterministic=False)(x, rng=own))
