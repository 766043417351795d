"""The other methods' layers for Flax Linen."""

from bnp_optax.contrib.linen.batch_group_norm import BatchGroupNorm
from bnp_optax.contrib.linen.batch_renorm import BatchRenorm

__all__ = [
    "BatchGroupNorm",
    "BatchRenorm",
]
