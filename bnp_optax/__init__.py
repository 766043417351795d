"""Batch Normalization Preconditioning as an Optax gradient transformation."""

from bnp_optax import linen, nnx
from bnp_optax.alias import bnp_sgd
from bnp_optax.layers import Layer, Layers, LeftAlone, Parameter
from bnp_optax.moments import InputMoments, input_moments
from bnp_optax.transform import KEEP_STATISTICS, ScaleByBNPState, scale_by_bnp

__all__ = [
    "KEEP_STATISTICS",
    "InputMoments",
    "Layer",
    "Layers",
    "LeftAlone",
    "Parameter",
    "ScaleByBNPState",
    "bnp_sgd",
    "input_moments",
    "linen",
    "nnx",
    "scale_by_bnp",
]
