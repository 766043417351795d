"""Methods that act on what Batch Normalization does, beside BNP: to be compared with it, or used with it.

Transformations and functions of arrays are here, layers in :mod:`bnp_optax.contrib.linen` and
:mod:`bnp_optax.contrib.nnx`. This package is not imported by ``bnp_optax``: ``from bnp_optax import contrib``.
"""

from bnp_optax.contrib import diagnostics
from bnp_optax.contrib.alignment import (
    Alignment,
    ExploreThenExploitState,
    alignment_residual,
    explore_then_exploit,
    gated_head,
)
from bnp_optax.contrib.batch_group_norm import batch_group_normalize, batch_group_normalize_inference
from bnp_optax.contrib.batch_renorm import batch_renormalize, batch_renormalize_inference, ramp
from bnp_optax.contrib.binary import binarize_standardized, binary_sign, block_betas, rprelu
from bnp_optax.contrib.centred import centre_kernels, centred
from bnp_optax.contrib.clipping import adaptive_grad_clip
from bnp_optax.contrib.effective import (
    CriticalLearningRateState,
    critical_learning_rate,
    effective_learning_rates,
    predict_effective_learning_rates,
    random_walk,
    scale_by_critical_learning_rate,
    spread,
)
from bnp_optax.contrib.fixup import fixup_normal
from bnp_optax.contrib.instance_enhancement import instance_enhanced_normalize, instance_enhanced_normalize_inference
from bnp_optax.contrib.mixture import Mixture, initial_mixture, mixture_normalize, mixture_normalize_inference
from bnp_optax.contrib.psi import PsiSgdState, is_scale_invariant, psi_sgd, scale_by_psi
from bnp_optax.contrib.quantized import QuantizeUpdatesState, quantize_updates, round_to_grid
from bnp_optax.contrib.sampling import BernoulliNoise, GaussianNoise, activation_probability, sample_units
from bnp_optax.contrib.standardized import nonlinearity_gain, standardize, standardized_layers
from bnp_optax.contrib.trajectory import TrajectoryRegularizedState, trajectory_regularized

__all__ = [
    "Alignment",
    "BernoulliNoise",
    "CriticalLearningRateState",
    "ExploreThenExploitState",
    "GaussianNoise",
    "Mixture",
    "PsiSgdState",
    "QuantizeUpdatesState",
    "TrajectoryRegularizedState",
    "activation_probability",
    "adaptive_grad_clip",
    "alignment_residual",
    "batch_group_normalize",
    "batch_group_normalize_inference",
    "batch_renormalize",
    "batch_renormalize_inference",
    "binarize_standardized",
    "binary_sign",
    "block_betas",
    "centre_kernels",
    "centred",
    "critical_learning_rate",
    "diagnostics",
    "effective_learning_rates",
    "explore_then_exploit",
    "fixup_normal",
    "gated_head",
    "initial_mixture",
    "instance_enhanced_normalize",
    "instance_enhanced_normalize_inference",
    "is_scale_invariant",
    "mixture_normalize",
    "mixture_normalize_inference",
    "nonlinearity_gain",
    "predict_effective_learning_rates",
    "psi_sgd",
    "quantize_updates",
    "ramp",
    "random_walk",
    "round_to_grid",
    "rprelu",
    "sample_units",
    "scale_by_critical_learning_rate",
    "scale_by_psi",
    "spread",
    "standardize",
    "standardized_layers",
    "trajectory_regularized",
]
