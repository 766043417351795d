"""Find the linear layers of a Linen model."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import errors

from bnp_optax import tracing
from bnp_optax.layers import Layers
from bnp_optax.layouts import Product
from bnp_optax.linen.calls import observe, parameters
from bnp_optax.observing import no_model, noting_the_call
from bnp_optax.records import record_key
from bnp_optax.searching import Call, Finder, Log, Watch, explicit_call
from bnp_optax.tracing import Traced, make_jaxpr
from bnp_optax.trees import as_path

_NOT_RECORDED = "inside a transform without 'intermediates': 0 in its variable_axes"


def find_layers(
    model: nn.Module,
    *args: Any,
    rngs: Any = None,
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> Layers:
    """Finds the layers of a model whose gradients can be preconditioned.

    The model is traced abstractly, as its ``init`` and its ``apply`` would run: nothing is computed or allocated.

    Found are ``nn.Dense``, ``DenseGeneral`` (so attention too), ``Einsum``, ``Conv``, ``ConvLocal``,
    ``ConvTranspose``, the layers inside recurrent cells, subclasses that call these, and layers of
    your own that call :func:`register`; also where ``nn.scan``, ``nn.vmap``, ``nn.remat`` and other
    transforms lift them, if ``nn.scan`` and ``nn.vmap`` have ``'intermediates': 0`` in ``variable_axes``.

    Args:
      model: a Flax Linen module.
      *args: what its method is called with; arrays may be `jax.ShapeDtypeStruct`. The batch size
        does not matter.
      rngs: random keys as for ``model.init`` or ``model.apply``; by default one made for the purpose.
      method: which method is traced, ``__call__`` by default.
      **kwargs: keyword arguments of the method.

    Returns:
      The layers; ``print`` them for a table, which also says what is excluded and why.

    Raises:
      TypeError: if ``model`` is no Linen module.
      ValueError: naming the layer, if its input is empty.

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
      N, the examples of a batch, is the first axis of a layer's input: 1 here.
    """
    if not isinstance(model, nn.Module):
        raise no_model("find_layers(model, x) of Linen wants a flax.linen.Module", model)
    init, apply, arrays = _make_init(model, rngs, method, args, kwargs)
    with noting_the_call(model, args, kwargs):
        variables = jax.eval_shape(init, {}, arrays)
    params = variables.get("params", {})
    # traced, as a box constrains what it holds where a mesh is set
    unboxed = jax.tree_util.tree_leaves_with_path(jax.eval_shape(nn.unbox, params))
    shapes = {as_path(keys): leaf.shape for keys, leaf in unboxed}

    def trace(run: Callable[..., Any], variables: Any, watch: Watch, log: Log) -> Traced:
        def forward(variables: Any, arrays: list[jax.Array]) -> list[Call]:
            with observe(_Finder(watch, log)):
                intermediates = run(variables, arrays).get("intermediates", {})
            leaves = jax.tree.leaves(intermediates, is_leaf=_is_call)
            return [leaf for leaf in leaves if _is_call(leaf)]

        jaxpr, calls = make_jaxpr(forward, variables, arrays)
        return Traced(jaxpr, calls, [*shapes, *[None] * (len(jaxpr.jaxpr.invars) - len(shapes))])

    def trace_init(watch: Watch, log: Log) -> Traced:
        return trace(init, params, watch, log)

    def trace_pass(watch: Watch, log: Log) -> Traced:
        others = {name: value for name, value in variables.items() if name not in ("params", "intermediates")}
        return trace(apply, (params, others), watch, log)

    try:
        return tracing.find(trace_init, trace_pass, shapes, _NOT_RECORDED, reasons={})
    except errors.ScopeParamShapeError:  # init makes parameters in another shape than it finds them in
        return tracing.find(trace_pass, trace_pass, shapes, _NOT_RECORDED, reasons={})


class _Finder(Finder):
    """Sows each call in the place of its record."""

    def see(self, module: nn.Module, product: Product) -> None:
        """Leaves the call, pooled with earlier ones."""
        call = self.log.note(module.path, module, product, parameters(module), self.watch)
        if call is not None and not _sow(module, product.kernel, call):
            self.log.reasons |= dict.fromkeys(self.log.seen[call.site], _NOT_RECORDED)

    def see_explicit(self, module: nn.Module, product: Product, owner: nn.Module) -> None:
        """Leaves the call with the module that makes it, so that its kernel's parameter is known."""
        self.log.explicit += 1  # each is of its own parameters, also where two modules have equal names
        site = (*owner.path, f"apply_{self.log.explicit}", *module.path, product.kernel)
        if self.watch(site):
            _sow(owner, "/".join(site), explicit_call(site, product, parameters(module)))

    def leave(self, module: nn.Module, reason: str) -> None:
        """Notes the reason, unless what the module multiplies gave one."""
        self.log.reasons.setdefault(module.path, reason)


def _sow(module: nn.Module, kernel: str, call: Call) -> bool:
    """Leaves a call with a module; returns whether a transform around it lets it out."""
    return module.sow(
        "intermediates", record_key(kernel), call, lambda earlier, call: call.pooled_with(earlier), lambda: None
    )


def _is_call(leaf: Any) -> bool:
    return isinstance(leaf, Call)


def _make_init(
    model: nn.Module, rngs: Any, method: Callable[..., Any] | str | None, args: Any, kwargs: Any
) -> tuple[Callable[..., Any], Callable[..., Any], list[Any]]:
    """Returns ``model.init`` and ``model.apply`` as functions of variables and of arrays, and the arrays.

    To be recognized, parameters must be inputs of the traced program, where ``init`` makes its own. But it makes only
    those that it does not find, so that it is given them where it begins. So the model runs as in ``init``, in which it
    may call more than elsewhere (all branches of an ``nn.cond``, say).

    Returns:
      A function of parameters, in part or ``{}``, and of the arrays among the keys and arguments, the rest of which
      stay static; one of a pair, the parameters and the other variables, and of these arrays, which returns the updated
      variables; and the arrays.
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

        rngs, args, kwargs = merge(arrays)
        return nn.Module.init(model, rngs, *args, method=begin, mutable=True, **kwargs)  # a field may be named init

    def apply(params_and_others: tuple[Any, Mapping[str, Any]], arrays: list[jax.Array]) -> Any:
        params, others = params_and_others
        rngs, args, kwargs = merge(arrays)
        return nn.Module.apply(
            model, {"params": params, **others}, *args, rngs=rngs, method=method, mutable=True, **kwargs
        )[1]

    def merge(arrays: list[jax.Array]) -> tuple[Any, Any, Any]:
        remaining = iter(arrays)
        merged = [next(remaining) if dynamic else leaf for leaf, dynamic in zip(leaves, is_array, strict=True)]
        rngs, args, kwargs = jax.tree.unflatten(treedef, merged)
        streams = dict(rngs) if isinstance(rngs, Mapping) else {} if rngs is None else {"params": rngs}
        return {"params": jax.random.key(0), **streams}, args, kwargs  # of which Flax makes the others

    return init, apply, [leaf for leaf, dynamic in zip(leaves, is_array, strict=True) if dynamic]
