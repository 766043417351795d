"""Find the linear layers of an NNX model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bnp_optax import tracing
from bnp_optax.layers import Layers, Path, layer_name
from bnp_optax.layouts import Product, reason_to_exclude
from bnp_optax.nnx.calls import observe, parameters
from bnp_optax.nnx.recording import SITE, LostError, Site, captured_by, module_paths, sparing_lists, store
from bnp_optax.observing import no_model, noting_the_call
from bnp_optax.records import record_key
from bnp_optax.searching import Call, Finder, Log, Watch
from bnp_optax.tracing import Traced, make_jaxpr
from bnp_optax.trees import as_path

_NOT_RECORDED = (
    "called where its record is lost: in a transform of jax, in one of nnx without axis 0 for nnx.Intermediate, or in "
    "one branch of nnx.cond alone"
)


def find_layers(model: nnx.Module, *args: Any, method: Callable[..., Any] | str | None = None, **kwargs: Any) -> Layers:
    """Finds the layers of a model whose gradients can be preconditioned.

    A copy of the model is traced abstractly: nothing is computed or allocated, and the model stays
    as it is, random counters and running statistics included.

    Found are ``nnx.Linear``, ``LinearGeneral`` (so attention too), ``Einsum``, ``Conv``,
    ``ConvTranspose``, ``LoRA``, the layers inside recurrent cells, subclasses that call these, and
    layers of your own that call :func:`register`; also under ``nnx.jit``, ``nnx.remat``, ``nnx.scan``,
    ``nnx.vmap`` and ``nnx.RNN``. See :func:`record_inputs` for what a scanned or mapped model must
    provide.

    Args:
      model: a Flax NNX module.
      *args: what it is called with; arrays may be `jax.ShapeDtypeStruct`. The batch size does not
        matter.
      method: what is traced instead of ``model(...)``: a method's name, or a function of the model
        and the arguments.
      **kwargs: keyword arguments of the call.

    Returns:
      The layers; ``print`` them for a table, which also says what is excluded and why. Their
      paths are those of ``nnx.state(model, nnx.Param)``.

    Raises:
      TypeError: if ``model`` is no NNX module.
      ValueError: naming the layer, if its input is empty.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs), nnx.relu)
      >>> print(find_layers(model, jnp.zeros((1, 4))))
      layer     kind    kernel  fan-in  covers        parameters
      layers/0  Linear     4x3       4  kernel, bias          15
      <BLANKLINE>
      Excluded: scale or shift of a normalization
        layers/1/bias   3
        layers/1/scale  3
      <BLANKLINE>
      1 layer covers 15 of 21 parameters (71.4%).
      N, the examples of a batch, is the first axis of a layer's input: 1 here.
    """
    if not isinstance(model, nnx.Module):
        raise no_model("find_layers(model, x) of NNX wants a flax.nnx.Module (of several, one nnx.Dict)", model)

    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        if callable(method):
            return method(model, *args, **kwargs)
        return (model if method is None else getattr(model, method))(*args, **kwargs)

    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Pytree | nnx.Variable))
    graphdef, state = nnx.split((model, leaves))  # together, as the arguments may refer to parts of the model
    shapes = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]
    modules = module_paths(model)
    sites = nnx.from_flat_state([((*keys, SITE), _Found(Site(path))) for path, (keys, _) in modules.items()])
    reasons = {path: reason_to_exclude(module) for path, (_, module) in modules.items()}

    def trace(watch: Watch, log: Log) -> Traced:
        def forward(state: Any, shapes: list[jax.Array]) -> list[Call]:
            model, leaves = nnx.merge(graphdef, state)
            remaining = iter(shapes)
            leaves = [next(remaining) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            with noting_the_call(model, args, kwargs), observe(_Finder(watch, log)):
                _, found = nnx.capture(sparing_lists(run), _Found, init=sites)(model, *args, **kwargs)
            values = [variable.get_value() for _, variable in nnx.to_flat_state(found)]
            return [value for value in values if isinstance(value, Call)]

        jaxpr, calls = make_jaxpr(forward, state, shapes)
        # the model is the first of the two in the state
        inputs = [path[1:] if path[0] == "0" else None for path, _ in _arrays(state)]
        return Traced(jaxpr, calls, [*inputs, *(None for _ in shapes)])

    shapes_by_path = {path: jnp.shape(array) for path, array in _arrays(nnx.state(model, nnx.Param))}
    return tracing.find(trace, trace, shapes_by_path, _NOT_RECORDED, reasons)


def _arrays(state: Any) -> list[tuple[Path, Any]]:
    """Returns the arrays in the variables of a state, of which one may hold several or none, each with its path."""
    arrays = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        path, inside = as_path(keys), jax.tree_util.tree_leaves_with_path(leaf)
        # an array that is all of the variable has the variable's path
        arrays += [((*path, *as_path(inner)) if len(inner) > 1 else path, array) for inner, array in inside]
    return arrays


class _Found(nnx.Intermediate[Any]):
    """What is stored in the search for layers."""


class _Finder(Finder):
    """Stores each call in the place of its record."""

    def see(self, module: nnx.Module, product: Product) -> None:
        """Stores the call, pooled with earlier ones."""
        captured = captured_by(module, _Found)
        if captured is None or SITE not in captured.get_value():
            return
        path = captured.get_value()[SITE].path
        if (call := self.log.note(path, module, product, parameters(module), self.watch)) is not None:
            call, key = self.log.marked(call), record_key(product.kernel)
            try:
                store(captured, key, call.pooled_with(captured.get_value().get(key)), layer_name(call.site))
            except LostError:
                self.log.reasons |= dict.fromkeys(self.log.seen[call.site], _NOT_RECORDED)

    def name_of(self, module: nnx.Module) -> str:
        """Returns nothing, as no mask asks for it."""
        return ""
