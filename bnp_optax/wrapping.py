"""What all transformations share that run another one inside."""

from typing import Any

import optax


def checked_inner(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that is run inside, which now takes extra arguments and ignores them if it must.

    Raises:
      TypeError: if it is no transformation.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "inner must be an optax.GradientTransformation, as optax.adam(1e-3) returns it, not "
            f"{type(inner).__name__}."
        )
    return optax.with_extra_args_support(inner)
