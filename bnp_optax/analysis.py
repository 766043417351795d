"""What preconditioning does to a layer's Hessian: dense matrices for small layers, Lanczos for large ones.

The paper's argument is that BNP takes gradient steps in variables ``z`` with ``w = P z``, in which the Hessian
``H`` of the loss with respect to a layer's parameters ``w`` becomes ``P' H P``, better conditioned. These functions
build the three and measure them.

A layer's parameters are seen as one vector of n numbers: the kernel, flattened in the model's own shape, followed by
the bias if there is one. Small eigenvalues need float64 (``jax.enable_x64(True)`` and parameters of that dtype).

This module is not imported by ``bnp_optax`` and needs matfree, the extra ``analysis``.

References:
  Lange, Helfrich, Ye, Batch Normalization Preconditioning for Neural Network Training, JMLR 23(72), 2022.
"""

from collections.abc import Callable

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from bnp_optax.coordinates import Coordinates
from bnp_optax.layers import Layer, Layers
from bnp_optax.statistics import Statistics, coordinates, tabulate
from bnp_optax.trees import LayerTree, Weights, from_canonical, to_canonical

try:
    from matfree import decomp, eig
except ImportError as error:
    raise ImportError("bnp_optax.analysis needs matfree: pip install matfree") from error

LossFn = Callable[[optax.Params], jax.Array]


def preconditioner(layer: Layer, statistics: Statistics) -> jax.Array:
    """Returns the matrix P of one layer, such that the gradient ``g`` of its parameters becomes ``P P' g``.

    For every output unit, with ``sd = sqrt(var + eps1 max(var) + eps2)`` and ``q ** 2`` for q2, the scalar that divided
    the step of the last recorded batch::

        P = (1/q) [1 -mu'; 0 I] [1 0; 0 diag(1/sd)]        on [bias; weights]

    and, without a bias, ``P = (1/q) diag(1/sd)`` with the second moment ``var + mu^2`` for ``var``. The statistics know
    the damping that they were absorbed with.

    Args:
      layer: the layer.
      statistics: the state of :func:`~bnp_optax.scale_by_bnp`, itself and not that of a chain around it, or
        ``state.statistics`` of :func:`~bnp_optax.preconditioned`.

    Returns:
      P, ``[n, n]`` for a layer of n parameters, in the dtype of the statistics.

    Raises:
      ValueError: if the statistics do not hold the layer.

    Example:
      >>> import dataclasses
      >>> import bnp_optax as bnp
      >>> layer = bnp.Layer.dense(("w",), (2, 1), bias=("b",))
      >>> tx = bnp.scale_by_bnp(bnp.Layers((layer,)), eps_relative=0.0, eps=0.0)
      >>> statistics = tx.init({"w": jnp.ones((2, 1)), "b": jnp.ones(1)})
      >>> preconditioner(layer, dataclasses.replace(statistics, mean=jnp.array([3.0, 5.0])))
      Array([[ 1.,  0.,  0.],
             [ 0.,  1.,  0.],
             [-3., -5.,  1.]], dtype=float32)
    """
    from_z = _change_of_variables(layer, statistics)
    zeros = jnp.zeros(sum(parameter.size for parameter in layer.parameters), statistics.mean.dtype)
    matrix: jax.Array = jax.jacfwd(from_z)(zeros)
    return matrix


def hessian(loss_fn: LossFn, params: optax.Params, layer: Layer, batch_size: int = 64) -> jax.Array:
    """Returns the Hessian H of a loss with respect to the parameters of one layer.

    Args:
      loss_fn: a function of all parameters whose value is a scalar.
      params: where the Hessian is taken.
      layer: the layer; the other parameters are constants.
      batch_size: how many of the n products of H with a unit vector are computed at once; fewer need less memory.

    Returns:
      H, ``[n, n]``, in the dtype of the parameters.

    Raises:
      ValueError: if the parameters do not hold the layer.

    Example:
      >>> import bnp_optax as bnp
      >>> layer = bnp.Layer.dense(("w",), (2, 1))
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> hessian(lambda p: jnp.square(x @ p["w"]).sum() / 2, {"w": jnp.ones((2, 1))}, layer)  # x' x
      Array([[10., 14.],
             [14., 20.]], dtype=float32)
    """
    product, zeros = _hessian_product(loss_fn, params, layer)
    matrix: jax.Array = jax.lax.map(product, jnp.eye(zeros.size, dtype=zeros.dtype), batch_size=batch_size)
    return matrix


def condition_number(matrix: jax.Array, tolerance: float | None = None) -> jax.Array:
    """Returns the condition number of a symmetric matrix over its nonzero part.

    It is the largest by the smallest of the nonzero eigenvalues' magnitudes. The Hessian of a layer is singular as a
    rule: an input that is constantly zero, a unit that is never active, or fewer examples than parameters suffice.

    Args:
      matrix: symmetric, ``[n, n]``.
      tolerance: an eigenvalue counts as nonzero if its magnitude exceeds ``tolerance`` times the largest one; by
        default n times the dtype's machine epsilon, below which rounding decides (the rule of
        ``numpy.linalg.matrix_rank``). The result never exceeds ``1 / tolerance``; where the spectrum falls off
        without a gap it says little else than that, and the same ``tolerance`` must be used for what is compared.

    Returns:
      A scalar, at least 1; nan for a matrix of zeros.

    Example:
      >>> print(condition_number(jnp.diag(jnp.array([8.0, 2.0, 0.0]))))
      4.0
    """
    magnitudes = jnp.abs(jnp.linalg.eigvalsh(matrix))
    if tolerance is None:
        tolerance = matrix.shape[-1] * float(jnp.finfo(matrix.dtype).eps)
    largest = magnitudes.max()
    smallest = jnp.where(magnitudes > tolerance * largest, magnitudes, jnp.inf).min()
    return jnp.where(largest > 0, largest / smallest, jnp.nan)


def top_eigenvalue(
    loss_fn: LossFn,
    params: optax.Params,
    layer: Layer,
    statistics: Statistics | None = None,
    *,
    products: int = 20,
    seed: int = 0,
) -> jax.Array:
    """Returns the largest eigenvalue of H, or of P'HP, of a layer too large to build them.

    It is found by the Lanczos iteration from a random vector, with full reorthogonalization: a lower bound that
    converges fast where the largest eigenvalue stands apart. Gradient descent in ``z`` is stable for learning rates
    below 2 divided by the largest eigenvalue of P'HP.

    Args:
      loss_fn: a function of all parameters whose value is a scalar.
      params: where the Hessian is taken.
      layer: the layer; the other parameters are constants.
      statistics: as for :func:`preconditioner`, for P'HP; ``None`` for H.
      products: how many products of the matrix with a vector are computed; memory grows with it times n.
      seed: of the random vector.

    Returns:
      A scalar, in the dtype of the parameters.

    Raises:
      ValueError: if the parameters or the statistics do not hold the layer.

    Example:
      >>> import bnp_optax as bnp
      >>> layer = bnp.Layer.dense(("w",), (3, 1))
      >>> loss_fn = lambda p: (jnp.array([1.0, 2.0, 7.0]) @ jnp.square(p["w"])).sum() / 2
      >>> print(top_eigenvalue(loss_fn, {"w": jnp.ones((3, 1))}, layer).round(4))
      7.0
    """
    product, zeros = _hessian_product(loss_fn, params, layer)
    if statistics is not None:
        from_z = _change_of_variables(layer, statistics)
        transposed = jax.linear_transpose(from_z, zeros)
        product_of_h = product

        def product(z: jax.Array) -> jax.Array:
            transformed: jax.Array = transposed(product_of_h(from_z(z)))[0]
            return transformed

    start = jax.random.normal(jax.random.key(seed), zeros.shape, zeros.dtype)
    eigh = eig.eigh_partial(decomp.tridiag_sym(min(products, zeros.size)))
    values, _ = eigh(product, start / jnp.linalg.norm(start))
    largest: jax.Array = values.max()
    return largest


def _change_of_variables(layer: Layer, statistics: Statistics) -> Callable[[jax.Array], jax.Array]:
    """Returns the linear function z -> P z on a layer's vectors."""
    if not isinstance(statistics, Statistics) or layer.path not in statistics.packing.places:
        raise ValueError(
            f"The statistics hold no {layer.kernel.name}. Pass the state of scale_by_bnp itself (in a chain, its place "
            "in the tuple of states), or the statistics of that of preconditioned."
        )
    of_layer: Coordinates = coordinates(statistics.packing, tabulate(statistics, {layer.path: layer}), layer.path)

    def from_z(z: jax.Array) -> jax.Array:
        kernel, rest = jnp.split(z, [layer.kernel.size])
        bias = None if layer.bias is None else rest.reshape(layer.bias.shape)
        own = Weights(kernel.reshape(layer.kernel.shape), bias)
        new = from_canonical(layer, of_layer.from_z(to_canonical(layer, own, z.dtype)), own)
        return jnp.concatenate([jnp.ravel(x) for x in new if x is not None])

    return from_z


def _hessian_product(
    loss_fn: LossFn, params: optax.Params, layer: Layer
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Returns the function v -> H v on a layer's vectors, and a vector of zeros."""
    tree = LayerTree.of(params, Layers((layer,)))
    vector, unravel = jax.flatten_util.ravel_pytree(tree.weights[layer.path])

    def loss_of_layer(vector: jax.Array) -> jax.Array:
        return loss_fn(tree.replace({layer.path: unravel(vector)}).unflatten())

    def product(v: jax.Array) -> jax.Array:
        _, derivative = jax.jvp(jax.grad(loss_of_layer), (vector,), (v,))
        return jnp.asarray(derivative)

    return product, jnp.zeros_like(vector)
