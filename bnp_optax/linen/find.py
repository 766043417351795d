"""Find the linear layers of a Linen model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from bnp_optax import layouts as kinds
from bnp_optax.layers import Excluded, Layer, Layers, Parameter, Path, layer_name
from bnp_optax.layouts import Kind
from bnp_optax.linen.calls import observe
from bnp_optax.linen.lifts import AxisLog, Logged
from bnp_optax.records import record_key


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
    finder = _Finder()
    try:
        with observe(finder):
            variables = _abstract_init(model, rngs, method, args, kwargs)
    except Exception as error:
        _abstract_init(model, rngs, method, args, kwargs)  # raises what is not due to the search
        raise ValueError(
            f"The inputs of this model cannot be recorded: {error} Is one of {', '.join(map('/'.join, finder.calls))} "
            "called both inside and outside of a transform that adds an axis (nn.scan, nn.vmap)? Its records would "
            "have different shapes."
        ) from error

    layers, reasons = [], finder.reasons
    for call in finder.calls.values():
        layer = _describe(call, finder.log, variables)
        if isinstance(layer, Layer):
            layers.append(layer)
        else:
            reasons |= {parameter.path: layer for parameter in (call.kernel, call.bias) if parameter is not None}
    covered = {parameter.path for layer in layers for parameter in layer.parameters}
    excluded = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(variables.get("params", {}))):
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        if path not in covered:
            owner = max((known for known in reasons if path[: len(known)] == known), key=len)
            excluded.append(Excluded(path, leaf.shape, reasons[owner]))
    return Layers(tuple(layers), tuple(excluded))


class _Call(NamedTuple):
    """A layer as it was called while its model was traced, inside the transforms around it."""

    kind: str
    kernel: Parameter
    bias: Parameter | None
    has_examples: bool


class _Finder:
    """Notes each linear layer, and boxes its parameters so that transforms log the axes that they add."""

    def __init__(self) -> None:
        self.log = AxisLog()
        self.calls: dict[Path, _Call] = {}
        self.reasons: dict[Path, str] = {}

    def enter(self, module: nn.Module) -> None:
        """Nothing is to be done."""

    def see_layer(self, module: nn.Module, kernel: str, bias: str | None, kind: Kind, x: jax.Array) -> None:
        """Notes the layer, and marks the place of its record."""
        path = (*module.path, kernel)

        def parameter(name: str, split: kinds.Split) -> Parameter:
            value: Any = module.get_variable("params", name)
            if not isinstance(value, Logged):
                module.put_variable("params", name, Logged(value, self.log, path))
            return Parameter((*module.path, name), nn.unbox(value).shape, *split)

        # of the rank of a record's moments, so that a transform that puts its axis elsewhere than first can do so
        mark = Logged(self.log.watch_vmap(path, x).reshape(1, 1, 1), self.log, kernel=None)
        module.sow("intermediates", record_key(kernel), mark, reduce_fn=lambda _, new: new)
        self.calls[path] = _Call(
            type(module).__name__,
            parameter(kernel, kind.kernel),
            None if bias is None else parameter(bias, kind.bias),
            kind.has_examples(x.ndim),
        )

    def leave(self, module: nn.Module, reason: str) -> None:
        """Notes the reason."""
        self.reasons[module.path] = reason


def _abstract_init(model: nn.Module, rngs: Any, method: Any, args: Any, kwargs: Any) -> Mapping[str, Any]:
    """Returns the shapes of all the variables that ``model.init`` makes; arguments that are no arrays stay static."""
    leaves, treedef = jax.tree.flatten((rngs, args, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for leaf in leaves]

    def init(arrays: list[jax.Array]) -> Any:
        remaining = iter(arrays)
        merged = [next(remaining) if dynamic else leaf for leaf, dynamic in zip(leaves, is_array, strict=True)]
        rngs, args, kwargs = jax.tree.unflatten(treedef, merged)
        rngs = jax.random.key(0) if rngs is None else rngs
        return model.init(rngs, *args, method=method, mutable=True, **kwargs)

    arrays = [leaf for leaf, dynamic in zip(leaves, is_array, strict=True) if dynamic]
    variables: Mapping[str, Any] = jax.eval_shape(init, arrays)
    return variables


def _describe(call: _Call, log: AxisLog, variables: Mapping[str, Any]) -> Layer | str:
    """Returns the layer as it is outside the transforms around it, or the reason to leave it alone."""

    def lifted(parameter: Parameter) -> Parameter:
        for lift in _look_up(variables["params"], parameter.path).added:
            parameter = parameter.lift(lift.axis, lift.size)
        return parameter

    path = (*call.kernel.path[:-1], record_key(call.kernel.path[-1]))
    record = _look_up(variables.get("intermediates", {}), path)
    if not isinstance(_look_up(variables["params"], call.kernel.path), Logged):
        return "its parameters do not lie where its module does"
    kernel, bias = lifted(call.kernel), None if call.bias is None else lifted(call.bias)
    lifts = log.roles(kernel.path, record, call.has_examples) if isinstance(record, Logged) else ""
    if (
        not isinstance(record, Logged)
        or any(lift.axis != 0 for lift in record.added)
        or lifts.count("s") != len(kernel.stack_shape) - 1
    ):
        return "inside a transform without 'intermediates': 0 in its variable_axes"
    return Layer(call.kind, kernel, bias, layer_name(kernel.path), lifts)


def _look_up(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
