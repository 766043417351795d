"""Many devices, one program: every scheme of distribution computes what one device computes, in float64 to rounding.

The devices are eight virtual ones of the CPU, which a process must ask for before JAX starts: so these run beside.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnp_optax as bnp

TESTS = Path(__file__).parent


def start(*command, devices):
    """Starts a Python program on so many virtual devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # two processes must not share one, see conftest.py
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS.parent / "examples")]),
    }
    return subprocess.Popen(  # noqa: S603
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes, timeout):
    """Returns what the programs printed; none is left running."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [printed for printed, _ in outputs]


def report_of(program):
    (printed,) = finish(start(TESTS / "programs" / program, devices=8), timeout=300)
    return json.loads(printed)


@pytest.fixture(scope="module")
def report():
    return report_of("distribution_schemes.py")


def measured(report, scheme):
    result = report[scheme]
    assert not isinstance(result["error"], str), result["error"]
    assert result["error"] < 1e-12
    return result


@pytest.mark.parametrize(
    "scheme",
    [
        "jit_uneven_batch",
        "shard_map_whole_step",
        "shard_map_stacked_records",
        "shard_map_over_one_of_two_explicit_axes",
        "pmap_with_summed_records",
        "explicit_vmap_over_examples",
        "explicit_without_a_mesh_in_context",
    ],
)
def test_twenty_steps_equal_those_of_one_device(report, scheme):
    measured(report, scheme)


@pytest.mark.parametrize("scheme", ["jit_data_parallel", "jit_data_parallel_with_adam_in_z"])
def test_data_parallel_jit_adds_one_reduction_a_layer_and_gathers_nothing(report, scheme):
    """Five layers, of which one is called twice, and the one reduction of the gradients."""
    result = measured(report, scheme)
    assert result["all-gather"] == result["collective-permute"] == 0
    assert result["all-reduce"] <= 7


@pytest.mark.parametrize(
    ("scheme", "shard"),
    [
        ("fully_sharded_outputs", [64, 1]),
        ("fully_sharded_inputs", [8, 8]),
        ("fully_sharded_inputs_with_adam_in_z", [8, 8]),
    ],
)
def test_fully_sharded_state_keeps_the_sharding_it_was_given(report, scheme, shard):
    """The kernel of a layer is [64, 8]."""
    result = measured(report, scheme)
    assert result["stable"]
    assert result["traces"] == result["compilations"] == 1
    assert result["replicated"]
    assert result["shard of momentum"] == shard


@pytest.mark.parametrize(
    "scheme",
    [
        "explicit_data_parallel",
        "explicit_fully_sharded_outputs",
        "explicit_fully_sharded_inputs_with_injected_hyperparameters",
        "explicit_fully_sharded_outputs_with_adam_in_z",
    ],
)
def test_explicit_mesh_keeps_types_compiles_once_and_scans(report, scheme):
    result = measured(report, scheme)
    assert result["stable"]
    assert result["traces"] == result["compilations"] == 1


def test_explicitly_sharded_kernels_of_all_kinds(report):
    result = measured(report, "explicit_kinds_of_kernels")
    assert result["stable"]
    assert result["layers"] == 4


def test_nnx_optimizer_of_a_model_that_says_how_it_is_split():
    """The statistics have no parameter's shape, so that Flax must not give them a parameter's sharding."""
    for result in report_of("nnx_sharding.py").values():
        assert result["error"] < 1e-12
        assert result["movement"] > 1e-3
        assert result["shard of kernel"] == [32, 16 / 8]
        assert result["statistics are replicated"]
        assert result["kept like parameters"]


def test_a_forgotten_axis_name_is_refused():
    """Even on one device JAX sees that the state would differ between devices."""
    layers = bnp.Layers((bnp.Layer.dense(("w",), (2, 1)),))
    params, x = {"w": jnp.ones((2, 1))}, jnp.ones((4, 2))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    tx = bnp.scale_by_bnp(layers)

    def update(state, x):
        return tx.update(params, state, intermediates={"w": bnp.input_moments(x)})[1]

    step = jax.shard_map(update, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match="shard_map"):
        step(tx.init(params), x)


def run_example(tmp_path, name, clusters, devices):
    """Returns the test accuracy that every process prints, and the parameters that the first saves."""
    output = tmp_path / f"{name}.npz"
    program = TESTS / "programs" / "two_processes.py"
    printed = finish(*(start(program, output, *cluster, devices=devices) for cluster in clusters), timeout=120)
    for text in printed:
        assert f"processes: {len(clusters)}, devices: {len(clusters) * devices}" in text
    return [float(text.split()[-1]) for text in printed], dict(np.load(output))


def test_two_processes_equal_one(tmp_path):
    """Two of two devices each run the example as one device does."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    accuracies, params = run_example(tmp_path, "two", [(coordinator, 2, k) for k in range(2)], devices=2)
    (accuracy,), expected = run_example(tmp_path, "one", [()], devices=1)
    assert accuracies == [accuracy, accuracy]
    assert accuracy > 70  # a guess is right in 10 %
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
