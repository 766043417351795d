"""Batch Normalization Preconditioning as an Optax gradient transformation."""

from bnp_optax.layers import Layer, Layers, LeftAlone, Parameter
from bnp_optax.moments import InputMoments, input_moments

__all__ = ["InputMoments", "Layer", "Layers", "LeftAlone", "Parameter", "input_moments"]
