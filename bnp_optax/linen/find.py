"""Find the linear layers of a Linen model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bnp_optax import tracing
from bnp_optax.layers import Layers
from bnp_optax.layouts import Product
from bnp_optax.linen.calls import observe, parameters
from bnp_optax.records import record_key
from bnp_optax.tracing import Call, Log, Traced, Watch
from bnp_optax.trees import as_path

_REMEDY = "Add 'intermediates': 0 to the variable_axes of nn.scan, nn.vmap and nn.RNN"
_NOT_RECORDED = "inside a transform without 'intermediates': 0 in its variable_axes"


def find_layers(
    model: nn.Module,
    *args: Any,
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> Layers:
    """Finds the layers of a model whose gradients can be preconditioned.

    The model is traced abstractly, as its ``init`` would run: nothing is computed or allocated.

    Found are ``nn.Dense``, ``DenseGeneral`` (so attention too), ``Einsum``, ``Conv``, ``ConvLocal``,
    ``ConvTranspose``, the layers inside recurrent cells, subclasses that call these, and layers of
    your own that call :func:`record`; also where ``nn.scan``, ``nn.vmap``, ``nn.remat`` and other
    transforms lift them, if those that add axes have ``'intermediates': 0`` in ``variable_axes``.

    Args:
      model: a Flax Linen module.
      *args: what its method is called with; arrays may be `jax.ShapeDtypeStruct`. The batch size
        does not matter.
      rngs: random keys as for ``model.init``; by default one made for the purpose.
      method: which method is traced, ``__call__`` by default.
      **kwargs: keyword arguments of the method.

    Returns:
      The layers; ``print`` them for a table, which also says what is excluded and why.

    Raises:
      ValueError: if recording would make the model fail, as where a layer is called both inside and
        outside of a transform that adds an axis.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> model = nn.Sequential([nn.Dense(3), nn.LayerNorm(), nn.relu, nn.Dense(2, use_bias=False)])
      >>> print(find_layers(model, jnp.zeros((1, 4))))
      layer     kind   kernel  fan-in  covers        parameters
      layers_0  Dense     4x3       4  kernel, bias          15
      layers_3  Dense     3x2       3  kernel                 6
      <BLANKLINE>
      Excluded: scale or shift of a normalization
        layers_1/bias   3
        layers_1/scale  3
      <BLANKLINE>
      2 layers cover 21 of 27 parameters (77.8%).
    """
    init, arrays = _make_init(model, rngs, method, args, kwargs)
    params = jax.eval_shape(init, {}, arrays).get("params", {})
    shapes = {as_path(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(params))}
    log = Log()

    def trace(watch: Watch) -> Traced:
        def forward(params: Any, arrays: list[jax.Array]) -> list[Call]:
            with observe(_Finder(watch, log)):
                intermediates = init(params, arrays).get("intermediates", {})
            leaves = jax.tree.leaves(intermediates, is_leaf=_is_call)
            return [leaf for leaf in leaves if _is_call(leaf)]

        jaxpr, calls = jax.make_jaxpr(forward, return_shape=True)(params, arrays)
        return Traced(jaxpr, calls, [*shapes, *(None for _ in arrays)])

    return tracing.find(trace, log, shapes, _REMEDY, _NOT_RECORDED)


@dataclasses.dataclass(eq=False)
class _Finder:
    """Leaves each call in the place of its record.

    Attributes:
      watch: which calls it leaves.
      log: where it notes them.
    """

    watch: Watch
    log: Log

    def see(self, module: nn.Module, product: Product) -> None:
        """Leaves the call, pooled with earlier ones."""
        call = self.log.note(module.path, module, product, parameters(module), self.watch)
        if call is not None:
            key = record_key(product.kernel)
            if not module.sow(
                "intermediates", key, call, lambda earlier, call: call.pooled_with(earlier), lambda: None
            ):
                self.log.reasons |= dict.fromkeys(self.log.seen[call.site], _NOT_RECORDED)

    def leave(self, module: nn.Module, reason: str) -> None:
        """Notes the reason."""
        self.log.reasons[module.path] = reason


def _is_call(leaf: Any) -> bool:
    return isinstance(leaf, Call)


def _make_init(
    model: nn.Module, rngs: Any, method: Callable[..., Any] | str | None, args: Any, kwargs: Any
) -> tuple[Callable[[Mapping[str, Any], list[jax.Array]], Any], list[Any]]:
    """Returns ``model.init`` as a function of parameters and of arrays, and the arrays.

    To be recognized, parameters must be inputs of the traced program, where ``init`` makes its own. But it makes only
    those that it does not find, so that it is given them where it begins. So the model runs as in ``init``, in which it
    may call more than elsewhere (all branches of an ``nn.cond``, say).

    Returns:
      A function of parameters, in part or ``{}``, and of the arrays among the keys and arguments, the rest of which
      stay static; and these arrays.
    """
    leaves, treedef = jax.tree.flatten((rngs, args, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for leaf in leaves]

    def init(params: Mapping[str, Any], arrays: list[jax.Array]) -> Any:
        def begin(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for name, value in params.items():
                module.put_variable("params", name, value)
            if callable(method):
                return getattr(method, "__func__", method)(module, *args, **kwargs)
            return getattr(module, "__call__" if method is None else method)(*args, **kwargs)

        remaining = iter(arrays)
        merged = [next(remaining) if dynamic else leaf for leaf, dynamic in zip(leaves, is_array, strict=True)]
        rngs, args, kwargs = jax.tree.unflatten(treedef, merged)
        rngs = jax.random.key(0) if rngs is None else rngs
        return model.init(rngs, *args, method=begin, mutable=True, **kwargs)

    return init, [leaf for leaf, dynamic in zip(leaves, is_array, strict=True) if dynamic]
