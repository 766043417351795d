"""The other methods' layers for Flax NNX."""

from bnp_optax.contrib.nnx.alignment import Gate, GatedHead
from bnp_optax.contrib.nnx.batch_group_norm import BatchGroupNorm
from bnp_optax.contrib.nnx.batch_renorm import BatchRenorm
from bnp_optax.contrib.nnx.binary import BinaryBlock, BinaryWSConv, BinaryWSLinear, RPReLU, RSign
from bnp_optax.contrib.nnx.fixup import FixupBlock, ScalarBias, ScalarScale
from bnp_optax.contrib.nnx.instance_enhancement import InstanceEnhancementBatchNorm
from bnp_optax.contrib.nnx.mixture import MixtureNorm
from bnp_optax.contrib.nnx.sampling import NSMConv, NSMLinear
from bnp_optax.contrib.nnx.standardized import WSConv, WSLinear

__all__ = [
    "BatchGroupNorm",
    "BatchRenorm",
    "BinaryBlock",
    "BinaryWSConv",
    "BinaryWSLinear",
    "FixupBlock",
    "Gate",
    "GatedHead",
    "InstanceEnhancementBatchNorm",
    "MixtureNorm",
    "NSMConv",
    "NSMLinear",
    "RPReLU",
    "RSign",
    "ScalarBias",
    "ScalarScale",
    "WSConv",
    "WSLinear",
]
