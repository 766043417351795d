"""What transformations check of their arguments."""

from typing import Any, TypeGuard

import jax
import numpy as np
import optax

from bnp_optax.dataflow import Dataflow


def is_known(number: Any) -> TypeGuard[float]:
    """Returns whether an option is a number whose range can be checked.

    An injected hyperparameter is a JAX array, whose value may be traced.
    """
    return isinstance(number, int | float | np.number) or (isinstance(number, np.ndarray) and number.ndim == 0)


def checked_inner(inner: Any, name: str = "inner") -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that is run inside, which now takes extra arguments and ignores them if it must.

    Args:
      inner: the transformation.
      name: that of the argument.

    Raises:
      TypeError: if it is no transformation.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, as optax.adam(1e-3) returns it, not "
            f"{type(inner).__name__}."
        )
    return optax.with_extra_args_support(inner)


def required_params(params: optax.Params | None) -> optax.Params:
    """Returns the parameters that a transformation cannot do without.

    Raises:
      ValueError: if there are none.
    """
    if params is None:
        raise ValueError("This transformation needs the parameters: call update(updates, state, params).")
    return params


def start_in_z(inner: optax.GradientTransformation, z: optax.Params, params: optax.Params) -> optax.OptState:
    """Returns the state that an optimizer begins with, checked for what would not do in variables that change.

    It may not keep a copy of the parameters, to compare it with later ones, of which none is looked for where ``init``
    cannot be traced; nor may it search along its step, as the loss is a function of the parameters.

    Args:
      inner: the optimizer.
      z: the parameters, as it sees them.
      params: the parameters; those outside of all layers are the same arrays.

    Raises:
      ValueError: if it does either; names the part of the state that says so.
    """
    names: list[str] = []

    def begin(z: optax.Params) -> list[Any]:
        arrays = [
            (keys, leaf)
            for keys, leaf in jax.tree_util.tree_leaves_with_path(inner.init(z))
            if isinstance(leaf, jax.Array | np.ndarray)
        ]
        names.extend(jax.tree_util.keystr(keys) for keys, _ in arrays)
        return [leaf for _, leaf in arrays]

    state = inner.init(z)
    for keys, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_line_search):
        if _is_line_search(node):
            raise ValueError(
                f"The optimizer inside searches along its step (state{jax.tree_util.keystr(keys)}) for a lower loss, "
                "which is a function of the parameters, not of BNP's variables. Put the search behind preconditioned "
                "in a chain, and use lbfgs without BNP: docs/wrappers.md says more."
            )
    try:
        jaxpr, flow = jax.make_jaxpr(begin)(z).jaxpr, Dataflow()
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return state
    changed = [ours is not theirs for ours, theirs in zip(jax.tree.leaves(z), jax.tree.leaves(params), strict=True)]
    for name, var in zip(names, jaxpr.outvars, strict=True):
        if (origin := flow.origin(jaxpr, var)) is not None and changed[origin.source]:
            raise ValueError(
                f"The optimizer inside keeps the parameters that it begins with (state{name}), which are another point "
                "in BNP's variables of a later step. Put it around, as schedule_free(preconditioned(...)), or behind "
                "scale_by_bnp in a chain: docs/wrappers.md says which."
            )
    return state


def _is_line_search(node: Any) -> bool:
    return isinstance(node, optax.ScaleByBacktrackingLinesearchState | optax.ScaleByZoomLinesearchState)
