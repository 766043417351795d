"""PSI-SGD: gradient descent that sees no scale of weights in front of a normalization.

In front of Batch Normalization, every output unit's weights ``w`` may be multiplied by a positive number of its own,
and the loss stays: it is positively scale-invariant (PSI). SGD's path depends on that number, as the gradient is in
inverse proportion to it. PSI-SGD is gradient descent on the manifold whose points are weights up to such numbers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from bnp_optax.arguments import is_known, required_params
from bnp_optax.contrib.units import map_layers, sum_over_units, transform_layers, unit_norms
from bnp_optax.layers import Layer, Layers, check_layers
from bnp_optax.moments import statistics_dtype
from bnp_optax.trees import LayerTree, Weights, from_canonical, to_canonical


def scale_by_psi(layers: Layers, num_groups: int | None = None) -> optax.GradientTransformationExtraArgs:
    """Multiplies the gradient of every unit's weights by their squared norm: the Riemannian gradient of PSI weights.

    For a unit with weights ``w`` and gradient ``g``::

        g <- ||w||^2 g

    The paper's step has the learning rate inside the momentum::

        optax.chain(scale_by_psi(layers), optax.scale_by_learning_rate(rate), optax.trace(momentum))

    The usual order, the momentum before the learning rate, is the same under a constant rate alone. Norms grow, faster
    than under SGD, and nothing bounds them here: :func:`psi_sgd` does.

    Weight decay keeps the invariance where it is decoupled, behind this transformation and before the learning rate
    (``optax.add_decayed_weights``), and loses it in front (derived; the paper's experiments have none, for that reason,
    or, in its appendix, a regularizer in the loss).

    ``update`` needs ``params``. Biases of the layers and all other parameters pass unchanged. A unit whose weights are
    all zero stays so.

    Args:
      layers: the layers in front of a normalization, as :func:`is_scale_invariant` tells them: others must be left out
        (``layers.select``).
      num_groups: which weights share a scale: ``None``, those of every unit, in front of BatchNorm; 1, the whole
        kernel, in front of LayerNorm or RMSNorm; the number of groups in front of GroupNorm. The paper has BatchNorm
        alone, the others are derived.

    Returns:
      The transformation, without a state. Its updates have the gradients' tree, shapes and dtypes.

    Raises:
      TypeError: if ``layers`` is no :class:`~bnp_optax.Layers`.
      ValueError: if it holds no layer; by ``init`` and ``update`` if it does not describe the parameters; by ``update``
        if ``params`` is missing or ``num_groups`` does not divide a layer's outputs.

    Example:
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1)),))
      >>> params, gradients = {"w": jnp.array([[3.0], [4.0]])}, {"w": jnp.array([[4.0], [-3.0]])}
      >>> tx = scale_by_psi(layers)
      >>> updates, _ = tx.update(gradients, tx.init(params), params)
      >>> print(updates["w"].ravel())
      [100. -75.]

    References:
      Yi, Accelerating Training of Batch Normalization: A Manifold Perspective, UAI 2022, PMLR 180, eq. 7, 9 and 10,
      https://arxiv.org/abs/2101.02916
    """

    def scale(layer: Layer, updates: Weights, weights: Weights) -> Weights:
        squared_norms = sum_over_units(jnp.square(weights.kernel), num_groups)
        return Weights(squared_norms * updates.kernel, updates.bias)

    return transform_layers(scale, layers)


class PsiSgdState(NamedTuple):
    """State of :func:`psi_sgd`.

    Attributes:
      count: how many steps there were.
      trace: the momentum u of every parameter, learning rate included; ``None`` without momentum.
    """

    count: jax.Array  # type: ignore[assignment]  # as Optax's states call it
    trace: optax.Updates | None


def psi_sgd(
    learning_rate: optax.ScalarOrSchedule,
    layers: Layers,
    momentum: ArrayLike | None = None,
    max_norm: ArrayLike | None = 1e4,
    num_groups: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """PSI-SGD, or PSI-SGDM with a momentum, with norms of weights that stay bounded.

    Per step and unit, with weights ``w``, their gradient ``g`` and momentum ``u``::

        u <- momentum * u - learning_rate * ||w||^2 g
        w <- w + u
        w, u <- w / ||w||, u / ||w||        where ||w|| > max_norm

    Without momentum this is SGD on weights of norm 1 that are normalized after every step (derived). The paper
    normalizes ``w`` and does not say what becomes of ``u``; divided alike, as here, the normalization changes no
    function on the path (derived). BN's running statistics do not know of it: until they have forgotten the old scale,
    a network that is evaluated with them is wrong. A step adds to ``w``, and the sum is rounded: at the default bound
    to a thousandth of the new weights in float32. In lower precision the last line divides by no more than keeps that
    to a hundredth, and acts in several steps (our choice).

    Biases of the layers and all other parameters take the steps of SGD with the same learning rate and momentum (our
    choice: the paper updates them "by SGD", with rates it does not give). ``optax.partition`` gives them other values.

    It is an optimizer, and has to be the last of a chain: its steps are not to be scaled. ``update`` needs ``params``.
    A unit whose weights are all zero stays so. Weight decay in front of it is not invariant; see :func:`scale_by_psi`.

    Args:
      learning_rate: a number or a schedule.
      layers: as for :func:`scale_by_psi`.
      momentum: rho, the decay of the momentum; ``None`` for none, without a buffer.
      max_norm: which norm is normalized when it is exceeded, at least 1; ``None`` for none, where norms grow until
        training ends or overflows. The paper's is 10000.
      num_groups: as for :func:`scale_by_psi`; the norm is that of all weights that share a scale.

    Returns:
      The optimizer, whose state is a :class:`PsiSgdState`; the momentum has the dtypes of the parameters, steps the
      wider of theirs and the gradients'.

    Raises:
      TypeError: as :func:`scale_by_psi`.
      ValueError: if ``momentum`` or ``max_norm`` is out of range, and as :func:`scale_by_psi`.

    Example:
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1)),))
      >>> params, gradients = {"w": jnp.array([[3.0], [4.0]])}, {"w": jnp.array([[4.0], [-3.0]])}
      >>> tx = psi_sgd(0.5, layers, momentum=0.9)
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> print(updates["w"].ravel())
      [-50.   37.5]

    References:
      Yi, UAI 2022, PMLR 180, Algorithm 1 and section 6, https://arxiv.org/abs/2101.02916
    """
    if is_known(momentum) and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), or None, but is {momentum}.")
    if is_known(max_norm) and not 1 <= max_norm < float("inf"):
        raise ValueError(
            f"max_norm must be finite and at least 1, which weights are normalized to, or None, but is {max_norm}."
        )
    riemannian = scale_by_psi(layers, num_groups)

    def init_fn(params: optax.Params) -> PsiSgdState:
        riemannian.init(params)
        trace = None if momentum is None else optax.tree.zeros_like(params)
        return PsiSgdState(jnp.zeros((), jnp.int32), trace)

    def update_fn(
        updates: optax.Updates, state: PsiSgdState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PsiSgdState]:
        del extra_args
        params = required_params(params)
        # before the rate shortens them, float16 does not hold gradients times squared norms
        wide = jax.tree.map(lambda g, param: g.astype(_wide(g, param)), updates, params)
        gradients, _ = riemannian.update(wide, optax.EmptyState(), params)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        steps = jax.tree.map(lambda g: _times(-rate, g, g.dtype), gradients)
        if momentum is not None:
            steps = jax.tree.map(lambda step, u: step + _times(momentum, u, step.dtype), steps, state.trace)
        trace = steps
        if max_norm is not None:
            steps, trace = _bound_norms(steps, params, layers, max_norm, num_groups)
        kept = None if momentum is None else optax.tree.cast_like(trace, state.trace)
        steps = jax.tree.map(lambda step, g, w: step.astype(np.result_type(g.dtype, w.dtype)), steps, updates, params)
        return steps, PsiSgdState(optax.safe_increment(state.count), kept)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def is_scale_invariant(
    loss_fn: Callable[[Any], jax.Array],
    params: Any,
    layers: Layers,
    *,
    num_groups: int | None = None,
    tolerance: float = 1e-3,
) -> dict[str, bool]:
    """Finds the layers whose loss does not depend on the scale of their units' weights, by trying.

    A layer is scale-invariant if, for all of its units, the gradient is orthogonal to the weights, and if the loss
    stays the same when the weights of every unit are multiplied by a number of its own between 1.5 and 3. The first
    alone also holds where a statistic is a constant to the gradient, as in Batch Renormalization; the second alone
    might hold by chance. A layer whose gradient is zero shows nothing, and is not. Biases are tried at random values:
    in front of LayerNorm a layer is invariant without a bias, and seems so as long as its bias is zero.

    BatchNorm's ``epsilon`` breaks the invariance to about ``epsilon`` by the variance that it is added to. So the loss
    is to be that of training, in float32 at least, of a batch of ordinary inputs. If layers are not found that should
    be, their variance is small: take a smaller ``epsilon`` in this loss, or a greater tolerance.

    Args:
      loss_fn: a function of all parameters whose value is a scalar; BatchNorm takes statistics of the batch.
      params: where it is tried.
      layers: the layers to try.
      num_groups: which weights share a scale, as for :func:`scale_by_psi`.
      tolerance: how far from orthogonal the gradient may be, by the largest ``||w|| ||g||`` of the layer's units, and
        how much the loss may change, by its magnitude and that; in float64 with ``epsilon`` 0, 1e-9 holds.

    Returns:
      Whether each layer is scale-invariant, by its path: ``layers.select(lambda layer: invariant[layer.path])`` are
      those for the methods of this package that want it.

    Raises:
      TypeError: if ``layers`` is no :class:`~bnp_optax.Layers`.
      ValueError: if it holds no layer, or does not describe the parameters; if the loss is not finite.

    Example:
      >>> import bnp_optax as bnp
      >>> layers = bnp.Layers((bnp.Layer.dense(("hidden",), (3, 4)), bnp.Layer.dense(("out",), (4, 1))))
      >>> x = jnp.arange(15.0).reshape(5, 3) % 4
      >>> normalize = lambda z: (z - z.mean(0)) / z.std(0)
      >>> loss_fn = lambda p: jnp.square(jax.nn.relu(normalize(x @ p["hidden"])) @ p["out"] - 1).mean()
      >>> params = {"hidden": jnp.cos(jnp.arange(12.0).reshape(3, 4)), "out": jnp.ones((4, 1))}
      >>> is_scale_invariant(loss_fn, params, layers)
      {'hidden': True, 'out': False}
    """
    check_layers(layers)
    loss_fn = jax.jit(loss_fn)
    params = jax.jit(lambda params: _with_random_biases(LayerTree.of(params, layers)).unflatten())(params)
    loss, gradients = jax.value_and_grad(loss_fn)(params)
    if not jnp.isfinite(loss):
        raise ValueError(f"The loss is {loss}, so that nothing can be said of any layer. Pass parameters that train.")
    tree = LayerTree.of(params, layers)
    tried = _try_scales(params, gradients, layers, num_groups)
    invariant = dict.fromkeys(layers, False)
    for path, (size, radial, rescaled) in tried.items():
        change = jnp.abs(loss_fn(tree.replace({path: rescaled}).unflatten()) - loss)
        is_level = radial <= tolerance * size and change <= tolerance * (jnp.abs(loss) + size)
        invariant[path] = bool(size > 0 and is_level)
    return invariant


def _wide(*arrays: Any) -> Any:
    """Returns the dtype to compute in."""
    return statistics_dtype(np.result_type(np.float32, *(array.dtype for array in arrays)))


def _times(number: Any, array: jax.Array, dtype: Any) -> jax.Array:
    """Returns the product in a dtype."""
    return jnp.asarray(number, dtype) * array.astype(dtype)


def _bound_norms(
    steps: optax.Updates, params: optax.Params, layers: Layers, max_norm: ArrayLike, num_groups: int | None
) -> tuple[optax.Updates, optax.Updates]:
    """Returns steps to weights that are normalized where their norm would exceed the bound, and the momentum there."""
    kernels = [kernel for kernel, _ in LayerTree.of(params, layers).weights.values()]
    # new weights that are this much smaller are exact to a hundredth, as the sum of old ones and a step
    largest_divisor = 0.01 / max((float(jnp.finfo(kernel.dtype).eps) for kernel in kernels), default=1.0)

    def factors(new: jax.Array) -> jax.Array:
        norms = unit_norms(new, num_groups)
        # an infinite one stays, to be seen
        exceeds = (norms > jnp.asarray(max_norm, norms.dtype)) & jnp.isfinite(norms)
        return 1 / jnp.where(exceeds, jnp.minimum(norms, largest_divisor), 1)

    def step_to_bounded(layer: Layer, step: Weights, weights: Weights) -> Weights:
        new = weights.kernel + step.kernel
        scale = factors(new)
        return Weights(jnp.where(scale == 1, step.kernel, scale * new - weights.kernel), step.bias)

    def bounded_momentum(layer: Layer, step: Weights, weights: Weights) -> Weights:
        return Weights(factors(weights.kernel + step.kernel) * step.kernel, step.bias)

    bounded = map_layers(step_to_bounded, steps, params, layers)
    return bounded, map_layers(bounded_momentum, steps, params, layers)


def _with_random_biases(tree: LayerTree) -> LayerTree:
    """Adds to every layer's bias random numbers of the size of what its weights make of inputs of size 1."""
    new = {}
    for number, (path, own) in enumerate(tree.weights.items()):
        layer = tree.layers[path]
        weights = to_canonical(layer, own, _wide(own.kernel))
        if weights.bias is not None:
            noise = jax.random.normal(jax.random.key(number), weights.bias.shape, weights.bias.dtype)
            bias = weights.bias + unit_norms(weights.kernel)[:, :, 0, 0] * noise
            new[path] = from_canonical(layer, Weights(weights.kernel, bias), own)
    return tree.replace(new)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _try_scales(
    params: Any, gradients: Any, layers: Layers, num_groups: int | None
) -> dict[str, tuple[jax.Array, jax.Array, Weights]]:
    """Returns each layer's largest ``||w|| ||g||``, its largest ``|<w, g>|``, and its weights at other scales."""
    tree, of_gradients, tried = LayerTree.of(params, layers), LayerTree.of(gradients, layers).weights, {}
    for path, own in tree.weights.items():
        layer, dtype = tree.layers[path], _wide(own.kernel)
        weights, gradient = (to_canonical(layer, each, dtype) for each in (own, of_gradients[path]))
        size = unit_norms(weights.kernel, num_groups) * unit_norms(gradient.kernel, num_groups)
        radial = jnp.abs(sum_over_units(weights.kernel * gradient.kernel, num_groups))
        drawn = jax.random.uniform(jax.random.key(0), size.shape, dtype, 1.5, 3)
        # the mean of a group is one number for all weights that share a scale
        factors = sum_over_units(drawn, num_groups) / sum_over_units(jnp.ones_like(drawn), num_groups)
        rescaled = from_canonical(layer, Weights(factors * weights.kernel, weights.bias), own)
        tried[path] = size.max(), radial.max(), rescaled
    return tried
