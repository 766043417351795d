"""Record the inputs of the linear layers of an NNX model."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import errors, nnx
from jax.typing import ArrayLike

from bnp_optax.counting import Counting, Mask
from bnp_optax.layers import Layers, Path, layer_name
from bnp_optax.layouts import Layout, Product, RecordError
from bnp_optax.moments import InputMoments
from bnp_optax.nnx.calls import observe
from bnp_optax.observing import no_model
from bnp_optax.records import by_layer, empty_record, moments_of, pool_records, record_key

_REMEDY = (
    "Pass the module as an argument to a transform of nnx (not of jax) that gives records an axis 0, as "
    "nnx.StateAxes({nnx.Intermediate: 0, ...: None}) does where parameters are shared; in nnx.cond, call it in all "
    "branches; or record the others alone: capture(model, layers=layers)"
)


class LostError(RecordError):
    """A record that cannot leave a transform."""


def capture(
    model: nnx.Module | Callable[..., Any],
    *,
    layers: Layers | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    mask: Mask | None = None,
    examples: ArrayLike | None = None,
) -> Callable[..., tuple[Any, dict[str, InputMoments]]]:
    """Makes a model return the moments of every layer's input beside its output.

    ``y, records = capture(model)(x)`` calls ``model(x)``; the records are what the ``update`` of
    :func:`~bnp_optax.preconditioned` and :func:`~bnp_optax.scale_by_bnp` takes as ``intermediates=``.
    They are reduced at once to a few floats a feature, and gradients do not flow through them. A
    layer called several times in one pass pools its calls. :func:`record_inputs` says what a scanned
    or mapped model must provide.

    Args:
      model: a Flax NNX module, a method of one, or a function whose first argument is one or a container of some.
      layers: record these only; by default all that can be. A layer that the pass does not reach
        then has an empty record, which leaves its statistics as they are: models with ``nnx.cond``
        need it, as all branches must record the same layers.
      axis_name: the name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which the batch is
        split; the records are those of the whole batch.
      mask: which positions of the layers' inputs count, as ``nnx.BatchNorm`` has it: an array of the shape of the
        inputs' leading axes, ``[examples]`` or ``[examples, time]``, of booleans or of weights that are not negative;
        several for inputs of several shapes, of which each takes the longest that fits; or a function of a layer's
        name and its input that returns such an array, ``None`` if all of it counts, or ``False`` if the call does not
        count. What does not count enters neither mean nor variance nor N. ``nnx.RNN`` masks its cell by its
        ``seq_lengths``, and by a mask that fits its input. Outside of ``jax.jit`` every pass with a mask compiles anew
        what is compiled inside it, JAX's own functions too.
      examples: N, how many examples the pass has, instead of the size of the first axis of a layer's input; a layer
        that a transform maps over single examples has no such axis, and counts what it is mapped over.

    Returns:
      A function with the arguments of ``model``, which returns its output and the records by layer.

    Raises:
      TypeError: if ``model`` is no NNX module and no function, or ``examples`` no integer; when it is called, if a
        function's arguments have no module.
      ValueError: when it is called, naming the layer, if a record cannot leave a transform inside
        the model, a layer's input is empty, no mask fits it, or the model has not the ``layers``. Where Flax or JAX
        refuses the record, the error is theirs, with a note that says what to do.

    Example:
      >>> from flax import nnx
      >>> import jax
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> y, records = capture(model)(jax.numpy.array([[1.0, 4.0], [3.0, 4.0]]))
      >>> print(records["layers/0"].mean, records["layers/0"].examples)
      [[[2. 4.]]] [2]
    """
    counting = Counting.of(axis_name, mask, examples)
    if isinstance(model, nn.Module) or not callable(model):
        raise no_model("capture(model) of NNX wants a flax.nnx.Module, or a function of one", model)

    def call_and_record(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, InputMoments]]:
        # as nnx.capture finds it: the model, that of a bound method, or a function's first argument, which may hold it
        first = args[0] if args else None
        owner = next((m for m in (model, getattr(model, "__self__", None)) if isinstance(m, nnx.Module)), first)
        modules = module_paths(owner)
        if not modules:
            raise TypeError("capture(function) wants the model as the function's first argument, an nnx.Module.")
        stored = [] if layers is None else _expected(modules, layers)
        stored += [((*keys, SITE), nnx.Intermediate[Any](Site(path))) for path, (keys, _) in modules.items()]
        init = nnx.from_flat_state(stored)

        def call(owner: Any) -> Any:
            return model(*args, **kwargs)

        with observe(_Recorder(counting, expected_only=layers is not None, captures=True)):
            try:
                y, intermediates = nnx.capture(sparing_lists(call), nnx.Intermediate, init=init)(owner)
            except BaseException as error:
                _forget_captures(owner, nnx.Module)
                if layers is None and isinstance(error, Exception) and not isinstance(error, RecordError):
                    error.add_note(f"If the model runs without capture, a record cannot leave a transform. {_REMEDY}.")
                raise
        return y, by_layer(intermediates)

    return call_and_record


def sparing_lists(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of a model for ``nnx.capture``, which keeps what this collects out of the model's lists.

    Flax cannot sort it among the numbers of their members, which a transform inside the model has to.
    """

    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        _forget_captures(model, nnx.List)
        return function(model, *args, **kwargs)

    return run


def _forget_captures(model: Any, kind: type[nnx.Module]) -> None:
    """Takes away what ``nnx.capture`` has put into modules of a kind, where a pass that fails leaves it, too."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, kind) and hasattr(module, "__captures__"):
            del module.__captures__


@contextlib.contextmanager
def record_inputs(
    axis_name: str | tuple[str, ...] | None = None, mask: Mask | None = None, examples: ArrayLike | None = None
) -> Iterator[None]:
    """Records the moments of every layer's input as ``nnx.Intermediate`` variables.

    What :func:`capture` does beneath: inside the context, ``nnx.capture(model, nnx.Intermediate)(x)``
    returns the records beside the model's output and what else the model sows.

    **Transforms inside the model** must let the records out, which NNX calls giving them an axis:

    * a stack of layers under ``nnx.scan`` or ``nnx.vmap`` with ``in_axes=0`` does; with
      ``nnx.StateAxes`` write ``nnx.StateAxes({nnx.Intermediate: 0, nnx.Param: 0, ...: None})``;
    * parameters shared along the axis, as in a map over examples or a loop over time, need
      ``in_axes=(nnx.StateAxes({nnx.Intermediate: 0, ...: None}), 0)``, or, without graph updates,
      ``nnx.prefix(module, {nnx.Intermediate: 0, ...: None})`` made in the forward pass;
    * ``nnx.RNN``, ``nnx.Bidirectional``, ``nnx.jit`` and ``nnx.remat`` need nothing;
    * the branches of ``nnx.cond`` must call the same layers, unless ``capture`` is given ``layers``
      (which a method that calls all branches finds); ``nnx.while_loop`` and ``nnx.fori_loop`` must
      call none;
    * an ``nnx.List``, or ``nnx.Sequential``, needs :func:`capture`: ``nnx.capture`` alone fails in transforms of one;
    * JAX's own transforms drop or refuse records.

    While a context is active, the classes of Flax's linear layers have another ``__call__``. It
    records in the thread that entered, for the innermost context where several are active, and is
    replaced by the original one when the last one ends.

    Args:
      axis_name: the name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which the batch is
        split; the records are those of the whole batch.
      mask: as in :func:`capture`, but that names of layers are not known here: ``""``.
      examples: as in :func:`capture`.

    Yields:
      Nothing.

    Raises:
      ValueError: in the forward pass, naming the layer, if ``nnx.capture`` is not around it or the
        layer's input is empty.

    Example:
      >>> from flax import nnx
      >>> import jax
      >>> model, x = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jax.numpy.array([[1.0, 4.0], [3.0, 4.0]])
      >>> with record_inputs():
      ...     y, intermediates = nnx.capture(model, nnx.Intermediate)(x)
      >>> print(intermediates["kernel_input"].get_value().mean)
      [[[2. 4.]]]
    """
    with observe(_Recorder(Counting.of(axis_name, mask, examples))):
        yield


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """Stores the moments of every layer's input."""

    counting: Counting
    expected_only: bool = False
    captures: bool = False

    def see(self, module: nnx.Module, product: Product) -> None:
        """Stores the record of the layer's input in the module, pooled with those of earlier calls."""
        if not isinstance(product.layout, Layout):
            return
        site = self.name_of(module)
        name = layer_name((*site.split("/"), product.kernel)) if site else ""
        where = name or f"{type(module).__name__} with a kernel of shape {getattr(module, product.kernel).shape}"
        if (captured := captured_by(module, nnx.Intermediate)) is None:
            if self.captures:
                return  # a layer that the pass makes, which is none of the model
            raise RecordError(where, ", as nothing collects it. Call nnx.capture(model)(x) of bnp_optax")
        key = record_key(product.kernel)
        if self.expected_only and key not in captured.get_value():
            return
        earlier = captured.get_value().get(key)
        if callable(self.counting.mask) and self.captures and not name:
            raise RecordError(where, ": no name to ask the mask for, as it is not in the model that capture was given")
        record = moments_of(self.counting, product.layout, product.x, name, where)
        store(captured, key, pool_records(None if earlier == _Expected() else earlier, record, where), where)

    def name_of(self, module: nnx.Module) -> str:
        """Returns the path of a module where ``capture`` has left it."""
        captured = captured_by(module, nnx.Intermediate)
        site = None if captured is None else captured.get_value().get(SITE)
        return "" if site is None else "/".join(site.path)


SITE = "bnp_optax.site"  # no name of a module


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Site:
    """Tells a module its path, also inside transforms, where another object stands for it."""

    path: Path


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Expected:
    """Stands for a record whose shape depends on the batch, until its layer is called."""


def _expected(
    modules: Mapping[Path, tuple[tuple[Any, ...], nnx.Module]], layers: Layers
) -> list[tuple[tuple[Any, ...], nnx.Intermediate[Any]]]:
    """Returns what the modules of the layers hold before a pass: empty records."""
    keys_by_name = {"/".join(path): keys for path, (keys, _) in modules.items()}
    state = []
    for layer in layers.included:
        module, kernel = (layer.record, "kernel") if layer.record in keys_by_name else layer.record.rpartition("/")[::2]
        if module not in keys_by_name:
            raise ValueError(f"layers describes {layer.path}, which the model does not have. Find its own layers.")
        value = nnx.Intermediate[Any](empty_record(layer) or _Expected())
        state.append(((*keys_by_name[module], record_key(kernel)), value))
    return state


def captured_by(module: nnx.Module, variable_type: type[nnx.Intermediate[Any]]) -> nnx.Intermediate[Any] | None:
    """Returns the dictionary in which `nnx.capture` collects what a module stores, ``None`` if it does not."""
    for path, variable in nnx.iter_graph(module):
        is_own = len(path) == 2  # ("__captures__", 0), not that of a module inside
        if is_own and type(variable) is variable_type and isinstance(variable.get_value(), dict):
            return variable
    return None


def store(captured: nnx.Intermediate[Any], key: str, value: Any, where: str) -> None:
    """Stores a record as `nnx.Module.sow` would, which does not notice that it cannot come out of a transform."""
    try:
        captured.set_value({**captured.get_value(), key: value})
    except errors.TraceContextError as error:
        raise LostError(where, f", as a transform around it closes over the module. {_REMEDY}") from error


def module_paths(model: Any) -> dict[Path, tuple[tuple[Any, ...], nnx.Module]]:
    """Returns every module of a model, or of a container of models, with its keys, by its path."""
    modules = nnx.iter_modules(model)
    # what a list held beside its numbered members, Flax could not sort
    return {tuple(map(str, keys)): (keys, module) for keys, module in modules if not isinstance(module, nnx.List)}
