"""Batch Normalization Preconditioning as an Optax gradient transformation."""

from bnp_optax import linen, nnx
from bnp_optax.bnp import KEEP_STATISTICS, PreconditionedState, bnp_sgd, preconditioned, scale_by_bnp
from bnp_optax.inspection import Inspection, LayerInspection, inspect
from bnp_optax.layers import Excluded, Layer, Layers, Parameter
from bnp_optax.moments import InputMoments, input_moments
from bnp_optax.muon import muon_dimension_numbers
from bnp_optax.statistics import LayerStatistics, Statistics

__version__ = "0.1.0"

__all__ = [
    "KEEP_STATISTICS",
    "Excluded",
    "InputMoments",
    "Inspection",
    "Layer",
    "LayerInspection",
    "LayerStatistics",
    "Layers",
    "Parameter",
    "PreconditionedState",
    "Statistics",
    "bnp_sgd",
    "input_moments",
    "inspect",
    "linen",
    "muon_dimension_numbers",
    "nnx",
    "preconditioned",
    "scale_by_bnp",
]
