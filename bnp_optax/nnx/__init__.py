"""Flax NNX: find the linear layers of a model, and record their inputs.

The layers of a model are found once, by tracing it abstractly (:func:`find_layers`); their inputs
are recorded in each forward pass by :func:`capture`, already reduced to moments. Both watch the calls
of Flax's linear layers, and those that a layer of the user's own makes known by :func:`register`.
"""

from bnp_optax.nnx.calls import register
from bnp_optax.nnx.find import find_layers
from bnp_optax.nnx.recording import capture, record_inputs

__all__ = ["capture", "find_layers", "record_inputs", "register"]
