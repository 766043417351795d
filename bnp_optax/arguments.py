"""What transformations check of their arguments."""

from typing import Any, TypeGuard

import numpy as np
import optax


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
