"""Record the inputs of the linear layers of an NNX model."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from bnp_optax.layers import Layers
from bnp_optax.layouts import Kind
from bnp_optax.moments import InputMoments, pool_named_axis
from bnp_optax.nnx.calls import observe
from bnp_optax.nnx.storing import RECORD, RecordError, captured_by, moments_of, pool_records, store
from bnp_optax.records import by_layer


def capture(
    model: nnx.Module | Callable[..., Any],
    *,
    layers: Layers | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., tuple[Any, dict[str, InputMoments]]]:
    """Makes a model return the moments of every layer's input beside its output.

    ``y, records = capture(model)(x)`` calls ``model(x)``.

    Example:
      >>> from flax import nnx
      >>> import jax
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> y, records = capture(model)(jax.numpy.array([[1.0, 4.0], [3.0, 4.0]]))
      >>> print(records["layers/0"].mean)
      [[[2. 4.]]]
    """

    def call_and_record(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, InputMoments]]:
        with record_inputs(axis_name):
            y, intermediates = nnx.capture(model, nnx.Intermediate)(*args, **kwargs)
        return y, by_layer(intermediates)

    return call_and_record


@contextlib.contextmanager
def record_inputs(axis_name: str | tuple[str, ...] | None = None) -> Iterator[None]:
    """Records the moments of every layer's input as ``nnx.Intermediate`` variables.

    Inside the context, ``nnx.capture(model, nnx.Intermediate)(x)`` returns beside the model's output
    the records that :func:`~bnp_optax.scale_by_bnp` takes. They are reduced at once to a few floats
    a feature, and gradients do not flow through them. A layer called several times in one pass pools
    its calls. Enter the context inside of what is compiled by `jit`, which otherwise may answer out
    of its cache.

    **Transforms inside the model** must let the records out, which NNX calls giving them an axis:

    * a stack of layers under ``nnx.scan`` or ``nnx.vmap`` with ``in_axes=0`` does; with
      ``nnx.StateAxes`` write ``nnx.StateAxes({nnx.Intermediate: 0, nnx.Param: 0, ...: None})``;
    * parameters shared along the axis, as in a map over examples or a loop over time, need
      ``in_axes=(nnx.StateAxes({nnx.Intermediate: 0, ...: None}), 0)``, or, without graph updates,
      ``nnx.prefix(module, {nnx.Intermediate: 0, ...: None})`` made in the forward pass;
    * ``nnx.RNN``, ``nnx.Bidirectional``, ``nnx.jit`` and ``nnx.remat`` need nothing;
    * the branches of ``nnx.cond`` must call the same layers, and ``nnx.while_loop`` and
      ``nnx.fori_loop`` none;
    * JAX's own transforms drop or refuse records.

    While a context is active, the classes of Flax's linear layers have another ``__call__``. It
    records in the thread (more precisely, the context of `contextvars`) that entered, the innermost
    one where several are active, and is replaced by the original one when the last one ends.

    Args:
      axis_name: the name of a mapped axis (`jax.shard_map`, `jax.vmap`) over which the batch is
        split; the records are those of the whole batch.

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

    def see_layer(module: Any, kind: Kind | str, x: jax.Array) -> None:
        if isinstance(kind, Kind):
            where = f"{type(module).__name__} with a kernel of shape {module.kernel.shape}"
            if (captured := captured_by(module, nnx.Intermediate)) is None:
                raise RecordError(where, ", as nothing collects it. Call nnx.capture(model, nnx.Intermediate)(x)")
            record = moments_of(kind, x, where)
            if axis_name is not None:
                record = pool_named_axis(record, axis_name)
            store(captured, pool_records(captured.get_value().get(RECORD), record, where), where)

    with observe(see_layer):
        yield
