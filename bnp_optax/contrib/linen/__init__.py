"""The other methods' layers for Flax Linen."""

from bnp_optax.contrib.linen.alignment import GatedHead
from bnp_optax.contrib.linen.batch_group_norm import BatchGroupNorm
from bnp_optax.contrib.linen.batch_renorm import BatchRenorm
from bnp_optax.contrib.linen.binary import BinaryBlock, BinaryWSConv, BinaryWSDense, RPReLU, RSign
from bnp_optax.contrib.linen.fixup import FixupBlock, ScalarBias, ScalarScale
from bnp_optax.contrib.linen.instance_enhancement import InstanceEnhancementBatchNorm
from bnp_optax.contrib.linen.mixture import MixtureNorm
from bnp_optax.contrib.linen.sampling import NSMConv, NSMDense
from bnp_optax.contrib.linen.standardized import WSConv, WSDense

__all__ = [
    "BatchGroupNorm",
    "BatchRenorm",
    "BinaryBlock",
    "BinaryWSConv",
    "BinaryWSDense",
    "FixupBlock",
    "GatedHead",
    "InstanceEnhancementBatchNorm",
    "MixtureNorm",
    "NSMConv",
    "NSMDense",
    "RPReLU",
    "RSign",
    "ScalarBias",
    "ScalarScale",
    "WSConv",
    "WSDense",
]
