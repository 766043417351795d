"""The other methods' layers for Flax NNX."""

from bnp_optax.contrib.nnx.batch_group_norm import BatchGroupNorm
from bnp_optax.contrib.nnx.batch_renorm import BatchRenorm

__all__ = [
    "BatchGroupNorm",
    "BatchRenorm",
]
