"""Methods that act on what Batch Normalization does, beside BNP: to be compared with it, or used with it.

Transformations and functions of arrays are here, layers in :mod:`bnp_optax.contrib.linen` and
:mod:`bnp_optax.contrib.nnx`. This package is not imported by ``bnp_optax``: ``from bnp_optax import contrib``.
"""

from bnp_optax.contrib.effective import (
    CriticalLearningRateState,
    critical_learning_rate,
    effective_learning_rates,
    predict_effective_learning_rates,
    random_walk,
    scale_by_critical_learning_rate,
    spread,
)
from bnp_optax.contrib.psi import PsiSgdState, is_scale_invariant, psi_sgd, scale_by_psi

__all__ = [
    "CriticalLearningRateState",
    "PsiSgdState",
    "critical_learning_rate",
    "effective_learning_rates",
    "is_scale_invariant",
    "predict_effective_learning_rates",
    "psi_sgd",
    "random_walk",
    "scale_by_critical_learning_rate",
    "scale_by_psi",
    "spread",
]
