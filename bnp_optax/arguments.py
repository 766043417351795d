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


def check_keeps_no_params(inner: optax.GradientTransformation, params: optax.Params) -> None:
    """Checks that an optimizer does not begin with a copy of the parameters, which it would compare with later ones.

    Args:
      inner: the optimizer.
      params: the parameters, as it sees them.

    Raises:
      ValueError: if it does; names what it keeps.
    """
    names: list[str] = []

    def begin(params: optax.Params) -> list[Any]:
        arrays = [
            (keys, leaf)
            for keys, leaf in jax.tree_util.tree_leaves_with_path(inner.init(params))
            if isinstance(leaf, jax.Array | np.ndarray)
        ]
        names.extend(jax.tree_util.keystr(keys) for keys, _ in arrays)
        return [leaf for _, leaf in arrays]

    jaxpr, flow = jax.make_jaxpr(begin)(params).jaxpr, Dataflow()
    kept = [name for name, var in zip(names, jaxpr.outvars, strict=True) if flow.origin(jaxpr, var) is not None]
    if kept:
        raise ValueError(
            f"The optimizer inside keeps the parameters that it begins with (state{kept[0]}), which are another point "
            "in BNP's variables of a later step. Put it around, as schedule_free(preconditioned(...)), or behind "
            "scale_by_bnp in a chain: docs/wrappers.md says which."
        )
