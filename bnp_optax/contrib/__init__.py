"""Methods that act on what Batch Normalization does, beside BNP: to be compared with it, or used with it.

Transformations and functions of arrays are here, layers in :mod:`bnp_optax.contrib.linen` and
:mod:`bnp_optax.contrib.nnx`. This package is not imported by ``bnp_optax``: ``from bnp_optax import contrib``.
"""

from bnp_optax.contrib.psi import PsiSgdState, is_scale_invariant, psi_sgd, scale_by_psi

__all__ = [
    "PsiSgdState",
    "is_scale_invariant",
    "psi_sgd",
    "scale_by_psi",
]
