"""Whether a network could fit its targets by moving some of its parameters, and a training that moves only those.

A network that is linear in some of its parameters, as in its last layer, is ``J theta`` there, with ``J`` its Jacobian.
So it reaches whatever lies in the column space of ``J`` by moving these alone, at a convex loss:
:func:`alignment_residual` says how much of the targets does not lie there. :func:`gated_head` stands in for the last
two layers, linear in the first of them once its gate is frozen; :func:`explore_then_exploit` is the training.

By its abstract, the paper has an alignment of data and architecture that is sufficient for global convergence and
necessary for global optimality, and modifies any training algorithm so that it holds. Its body could not be had, nor
code of its authors: the formulas of condition, gated layers and phases are recalled; all else was derived or chosen.

References:
  Kawaguchi, Zhang, Deng, Understanding Dynamics of Nonlinear Representation Learning and Its Application, Neural
  Computation 34(4), 2022, https://arxiv.org/abs/2106.14836
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike, DTypeLike

from bnp_optax.arguments import checked_inner, is_known, required_params
from bnp_optax.moments import statistics_dtype

# Of the gated head, by default: the slope, and the initializers by the inputs of each output's own units.
SLOPE = 20.0
hidden_init = jax.nn.initializers.he_normal(in_axis=0, out_axis=(1, 2))
output_init = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)


class Alignment(NamedTuple):
    """What :func:`alignment_residual` finds.

    Attributes:
      residual: the norm of the targets outside the column space by that of the targets, a scalar from 0 to 1.
      rank: the numerical rank of the Jacobian, an integer; ``None`` where the Jacobian was not built.
    """

    residual: jax.Array
    rank: jax.Array | None


def alignment_residual(
    f: Callable[[Any, Any], jax.Array], params: Any, x: Any, y: ArrayLike, *, iterations: int | None = None
) -> Alignment:
    """Returns how much of the targets lies outside the column space of a network's Jacobian.

    With ``J = d vec(f(params, x)) / d params``, a row for every entry of ``y`` and a column for every parameter, and
    ``P`` the projection onto its columns::

        residual = |vec(y) - P vec(y)| / |vec(y)|

    Where ``f`` is linear in ``params`` it is 0 if and only if moving them reaches a squared loss of 0, and its square
    is the lowest squared loss, relative to that of the output 0. Elsewhere it speaks of the linearization at
    ``params``.

    To ask it of some parameters, close over the others: ``f = lambda last, x: model.apply({"params": params | {"last":
    last}}, x)``. An NNX model is a function of parameters by ``nnx.split`` and ``nnx.merge``.

    By default ``J`` is built, which is for hundreds of examples, and decomposed. Its singular values count in rank and
    projection above ``max(J.shape) * eps * (the largest of them)``, as in ``numpy.linalg.matrix_rank``, with the
    machine epsilon of the dtype computed in. In float32 that is about 1e-4 of the largest at a thousand rows: weaker
    directions are taken for none, so that the rank is lower and the residual higher than in float64 (``jax.enable_x64``
    and arrays of that dtype), which alone tells what is 0.

    With ``iterations`` nothing is built: so many steps, at most, of conjugate gradients on the least-squares problem,
    each of one forward and one backward derivative. They end before where their gradient is all rounding. The residual
    is that of the point they reached: an upper bound up to rounding, which further iterations lower, slowly where ``J``
    is ill-conditioned, until rounding adds up. The rank is not known.

    Args:
      f: ``(params, x) -> outputs``.
      params: the parameters, a tree of real arrays; those of low precision are given to ``f`` in float32.
      x: the inputs, whatever ``f`` takes.
      y: the targets, of the shape of the outputs; one-hot rows for classes.
      iterations: at most so many, and no Jacobian; ``None`` builds it.

    Returns:
      The residual, in float32 or, as the outputs, float64; and the rank. Targets of 0 have residual 0. Where Jacobian
      or targets are not finite the residual is nan, and the rank means nothing.

    Raises:
      ValueError: if the outputs do not have the targets' shape, there are no parameters or no targets, or
        ``iterations`` is below 1.
      TypeError: if a parameter is no real array.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # a bias is missing
      >>> linear = lambda params, x: x @ params["w"]
      >>> found = alignment_residual(linear, {"w": jnp.zeros(2)}, x, jnp.array([3.0, 0.0, 4.0]))
      >>> print(f"{found.residual:.3f}", found.rank)
      0.800 2

    References:
      Kawaguchi, Zhang, Deng, 2022, https://arxiv.org/abs/2106.14836: that ``vec(y)`` is in the column space (recalled,
      for the squared loss). To measure by how much it is not, and how, is this library's.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is of dtype {jnp.result_type(leaf)}, and no parameter: a "
                "derivative needs real numbers. Close over it in f."
            )
    if iterations is not None and iterations < 1:
        raise ValueError(f"iterations must be at least 1, or None to build the Jacobian, but is {iterations}.")
    flat, unravel = ravel_pytree(jax.tree.map(_wide, params))
    shape = jax.eval_shape(f, unravel(flat), x)
    if getattr(shape, "shape", None) != jnp.shape(y):
        raise ValueError(
            f"f returns {getattr(shape, 'shape', shape)}, but the targets have the shape {jnp.shape(y)}. Let f return "
            "one array, and take targets like it: jax.nn.one_hot(labels, classes) for classes."
        )
    if not flat.size or not jnp.size(y):
        raise ValueError(f"There are {flat.size} parameters and {jnp.size(y)} targets: nothing to compare.")

    def outputs(flat: jax.Array) -> jax.Array:
        return _wide(f(unravel(flat), x)).reshape(-1)

    dtype = jax.eval_shape(outputs, flat).dtype
    target = _wide(y).reshape(-1).astype(dtype)
    largest = jnp.abs(target).max()
    target = target / jnp.where(largest > 0, largest, 1)  # so that no square overflows or vanishes
    if iterations is None:
        rest, rank = _outside_columns(outputs, flat, target)
    else:
        rest, rank = _least_squares_rest(outputs, flat, target, iterations), None
    size = jnp.linalg.norm(target)
    return Alignment(jnp.where(size == 0, rest, rest / jnp.where(size == 0, 1, size)), rank)


def _outside_columns(
    outputs: Callable[[jax.Array], jax.Array], flat: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the norm of the target outside the column space of the Jacobian, and the rank of that."""
    differentiate = jax.jacrev if target.size <= flat.size else jax.jacfwd  # a pass a row, or a column
    jacobian = differentiate(outputs)(flat)
    columns, values, _ = jnp.linalg.svd(jacobian, full_matrices=False)
    counts = values > max(jacobian.shape) * jnp.finfo(jacobian.dtype).eps * values[0]
    rest = target - columns @ jnp.where(counts, target @ columns, 0)
    return jnp.linalg.norm(rest), counts.sum(dtype=jnp.int32)


def _least_squares_rest(
    outputs: Callable[[jax.Array], jax.Array], flat: jax.Array, target: jax.Array, iterations: int
) -> jax.Array:
    """Returns the norm of ``target - J theta`` for the ``theta`` that conjugate gradients reach from 0."""
    (slope,) = jax.vjp(outputs, flat)[1](target)
    largest = jnp.abs(slope).max()
    scale = jnp.where(largest > 0, largest, 1)  # so that no square overflows or vanishes
    _, forward = jax.linearize(lambda flat: outputs(flat) / scale, flat)
    backward = jax.linear_transpose(forward, flat)

    class Carry(NamedTuple):
        step: jax.Array
        theta: jax.Array
        rest: jax.Array  # target - J theta
        direction: jax.Array
        gradient: jax.Array  # the squared norm of J' rest
        size: jax.Array  # the largest |J direction|^2 / |direction|^2 yet, for the squared norm of J

    eps = jnp.finfo(target.dtype).eps

    def go_on(carry: Carry) -> jax.Array:
        # a gradient that is all rounding leads anywhere, and far away where J has a null space
        return (carry.step < iterations) & (carry.gradient > eps**2 * carry.size * (carry.rest @ carry.rest))

    def iterate(carry: Carry) -> Carry:
        image = forward(carry.direction)
        curvature = image @ image
        length = carry.gradient / jnp.where(curvature > 0, curvature, 1)
        rest = carry.rest - length * image
        (gradient,) = backward(rest)
        squared = gradient @ gradient
        direction = gradient + squared / carry.gradient * carry.direction
        size = jnp.maximum(carry.size, curvature / (carry.direction @ carry.direction))
        return Carry(carry.step + 1, carry.theta + length * carry.direction, rest, direction, squared, size)

    (gradient,) = backward(target)
    squared = gradient @ gradient
    begin = Carry(jnp.zeros((), jnp.int32), jnp.zeros_like(flat), target, gradient, squared, 0 * squared)
    end = jax.lax.while_loop(go_on, iterate, begin)
    # what the iterations carry along drifts from the residual of theta, which alone is a bound, as that of 0 is
    return jnp.minimum(jnp.linalg.norm(target - forward(end.theta)), jnp.linalg.norm(target))


def gated_head(
    z: ArrayLike,
    hidden: ArrayLike,
    output: ArrayLike,
    gate: ArrayLike | None = None,
    *,
    slope: ArrayLike = SLOPE,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Applies the last two layers of a network, the first gated by a smooth step of itself or of a frozen copy.

    For every output ``j``, with hidden weights ``W_j`` and a row ``v_j`` of the last layer of its own::

        f_j = v_j . (sigmoid(slope R_j z) * (W_j z))

    ``R = W`` where no gate is given, which tends to ReLU as the slope grows. With a gate that is held fixed the output
    is linear in ``hidden``, and a loss that is convex in it is convex in ``hidden``. Then all targets of n examples can
    be reached where, for every output, the n rows ``vec((v_j * sigmoid(slope R_j z_i)) z_i')`` are independent, which
    takes ``width * inputs >= n``: :func:`alignment_residual` tells.

    Args:
      z: the features, ``[..., inputs]``; let them have a constant 1 for biases.
      hidden: W, ``[inputs, features, width]``.
      output: v, ``[features, width]``.
      gate: R, of the shape of W.
      slope: of the smooth step.
      dtype: of the products and the outputs; by default the common one of features and weights.

    Returns:
      The outputs, ``[..., features]``; sums are of float32 or wider.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> z, hidden, output = jnp.array([2.0]), jnp.array([[[1.0, -1.0]]]), jnp.array([[1.0, 1.0]])
      >>> print(gated_head(z, hidden, output), gated_head(z, 3 * hidden, output, gate=-hidden))
      [2.] [-6.]

    References:
      Kawaguchi, Zhang, Deng, 2022, https://arxiv.org/abs/2106.14836; the formula is recalled, the slope of 20 is this
      library's.
    """
    gate = hidden if gate is None else gate
    arrays = [jnp.asarray(array) for array in (z, hidden, output, gate)]
    fits = jnp.ndim(hidden) == 3 and jnp.shape(z)[-1:] == jnp.shape(hidden)[:1]
    if not fits or jnp.shape(output) != jnp.shape(hidden)[1:] or jnp.shape(gate) != jnp.shape(hidden):
        z_shape, hidden_shape, output_shape, gate_shape = map(jnp.shape, (z, hidden, output, gate))
        raise ValueError(
            "Expected z [..., inputs], hidden and gate [inputs, features, width], output [features, width], but the "
            f"shapes are z {z_shape}, hidden {hidden_shape}, gate {gate_shape}, output {output_shape}."
        )
    dtype = jnp.result_type(*arrays) if dtype is None else jnp.dtype(dtype)
    wide = statistics_dtype(np.result_type(np.float32, dtype))
    features, w, v, r = (array.astype(dtype) for array in arrays)
    apply = functools.partial(jnp.einsum, "...i,ijk->...jk", preferred_element_type=wide)
    linear = apply(features, w)
    opened = jax.nn.sigmoid(jnp.asarray(slope, wide) * (linear if gate is hidden else apply(features, r)))
    return jnp.einsum("...jk,jk->...j", opened * linear, v.astype(wide)).astype(dtype)


def with_ones(z: jax.Array) -> jax.Array:
    """Returns features with a constant 1 behind them, whose weights are biases."""
    return jnp.concatenate([z, jnp.ones((*z.shape[:-1], 1), z.dtype)], axis=-1)


class ExploreThenExploitState(NamedTuple):
    """State of :func:`explore_then_exploit`.

    Attributes:
      count: how many steps there were.
      exploration: the state of the first optimizer, which stays as its last step left it.
      exploitation: the state of the second, of the selected parameters alone; made anew when it begins.
    """

    count: jax.Array  # type: ignore[assignment]  # as Optax's states call it
    exploration: optax.OptState
    exploitation: optax.OptState


def explore_then_exploit(
    exploration: optax.GradientTransformation,
    exploitation: optax.GradientTransformation,
    steps: ArrayLike,
    hidden: Any | Callable[[Any], Any],
) -> optax.GradientTransformationExtraArgs:
    """Trains all parameters by one optimizer for some steps, then a few of them by another.

    The first ``steps`` steps are those of ``exploration``. From then on ``exploitation`` moves the parameters that
    ``hidden`` selects, and all others get updates of 0. Its state begins with the parameters of that time: averages,
    anchors and norms are theirs, not those of the start.

    Select parameters in which the network is linear, the last layer or ``hidden`` of a
    :class:`~bnp_optax.contrib.linen.GatedHead` whose gate is frozen at that time, for a convex problem. First-order
    optimizers may be slow at it; ``optax.lbfgs()`` on the whole data is a solver.

    Both optimizers are compiled into one step (``jax.lax.cond``), which may be scanned; it runs but one, except under
    ``vmap``. ``exploitation`` sees the selected parameters alone, as in ``optax.masked``, also of trees among the extra
    arguments (``grad``); functions among them (``value_fn``) are called with all parameters. The states of both are
    kept, in the dtypes that ``init`` gave them.

    Args:
      exploration: the first optimizer.
      exploitation: the second.
      steps: how many steps the first takes; an array, too, as ``optax.inject_hyperparams`` makes of it.
      hidden: a tree of booleans like the parameters, or a prefix of it, or a function that returns one of a tree of
        parameters or updates.

    Returns:
      The optimizer. ``update`` needs ``params``; updates are in the wider dtype of gradient and parameter.

    Raises:
      ValueError: if ``steps`` is negative; by ``init`` if ``hidden`` is no tree like the parameters, or selects none;
        by ``update`` without ``params``.
      TypeError: if either optimizer is no transformation; by ``init`` if ``hidden`` has a leaf that is no boolean.

    Example:
      >>> tx = explore_then_exploit(optax.sgd(0.5), optax.sgd(0.1), 1, {"first": False, "last": True})
      >>> params = {"first": jnp.ones(1), "last": jnp.ones(1)}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      ...     print(updates["first"] + 0, updates["last"])
      [-0.5] [-0.5]
      [0.] [-0.1]

    References:
      Kawaguchi, Zhang, Deng, 2022, https://arxiv.org/abs/2106.14836. Recalled are both phases, and a noise on the
      parameters between them, which is left out here: the residual tells whether targets can be reached without.
    """
    explore = checked_inner(exploration, "exploration")
    if is_known(steps) and not steps >= 0:
        raise ValueError(f"steps must be a number of steps, at least 0, but is {steps}.")
    mask = functools.partial(_select, hidden)
    exploit = optax.masked(checked_inner(exploitation, "exploitation"), mask, mask_compatible_extra_args=True)

    def init_fn(params: optax.Params) -> ExploreThenExploitState:
        return ExploreThenExploitState(jnp.zeros((), jnp.int32), explore.init(params), exploit.init(params))

    def update_fn(
        updates: optax.Updates, state: ExploreThenExploitState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ExploreThenExploitState]:
        params = required_params(params)
        selected = mask(params)

        def in_dtype(new: Any) -> Any:
            return jax.tree.map(lambda u, g, p: u.astype(np.result_type(g.dtype, p.dtype)), new, updates, params)

        def first() -> Any:
            new, own = explore.update(updates, state.exploration, params, **extra_args)
            return in_dtype(new), _in_dtypes_of(state.exploration, own), state.exploitation

        def second() -> Any:
            begun = jax.lax.cond(
                state.count == steps,
                lambda: _in_dtypes_of(state.exploitation, exploit.init(params)),
                lambda: state.exploitation,
            )
            own_args = {name: _of_selected(value, selected, params) for name, value in extra_args.items()}
            new, own = exploit.update(updates, begun, params, **own_args)
            new = jax.tree.map(lambda moves, u: u if moves else jnp.zeros_like(u), selected, new)
            return in_dtype(new), state.exploration, _in_dtypes_of(state.exploitation, own)

        new, first_state, second_state = jax.lax.cond(state.count < steps, first, second)
        return new, ExploreThenExploitState(optax.safe_increment(state.count), first_state, second_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _select(hidden: Any, tree: Any) -> Any:
    """Returns a boolean for every leaf of a tree."""
    own = hidden(tree) if callable(hidden) else hidden
    for leaf in jax.tree.leaves(own):
        if not isinstance(leaf, (bool, np.bool_)):
            raise TypeError(f"hidden must be a tree of True and False, but has the leaf {leaf!r}.")
    try:
        mask = jax.tree.map(lambda moves, part: jax.tree.map(lambda _: moves, part), own, tree)
    except ValueError as error:
        raise ValueError(f"hidden is no tree like the parameters, nor a prefix of it: {error}") from error
    if not any(jax.tree.leaves(mask)):
        raise ValueError("hidden selects no parameter: nothing would move after the first steps.")
    return mask


def _of_selected(argument: Any, selected: Any, params: optax.Params) -> Any:
    """Returns a function of all parameters as one of the selected; anything else as it is."""
    if not callable(argument):
        return argument

    @functools.wraps(argument)  # Optax reads from its signature which further arguments it takes
    def of_selected(own: Any, *args: Any, **kwargs: Any) -> Any:
        whole = jax.tree.map(lambda moves, leaf, other: leaf if moves else other, selected, own, params)
        return argument(whole, *args, **kwargs)

    return of_selected


def _in_dtypes_of(old: Any, new: Any) -> Any:
    """Returns a new state in the dtypes of an old one, as both branches of a condition need them."""
    return jax.tree.map(lambda o, n: n if jnp.result_type(n) == jnp.result_type(o) else n.astype(o.dtype), old, new)


def _wide(array: ArrayLike) -> jax.Array:
    """Returns an array in float32, or in float64 if that is its own."""
    array = jnp.asarray(array)
    return array.astype(statistics_dtype(array.dtype))
