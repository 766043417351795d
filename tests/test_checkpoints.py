"""Saving and restoring: Orbax in a new process and after a kill, flax.serialization, checkpoints that do not fit."""

import functools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import compiled, forward, init

import bnp_optax as bnp

TRAINING = Path(__file__).parent / "programs" / "resumable_training.py"


def train(directory, *arguments, devices=1):
    command = [sys.executable, str(TRAINING), str(directory), *map(str, arguments)]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    }
    return subprocess.run(  # noqa: S603
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def whole_and_killed(tmp_path_factory):
    """The digest of a training that was not disturbed, and the folder of one that was killed after its first save."""
    folder = tmp_path_factory.mktemp("trainings")
    whole = train(folder / "whole", 30)
    assert whole.returncode == 0, whole.stderr
    killed = train(folder / "killed", 30, 17)
    assert killed.returncode == 9
    return whole.stdout.split()[2], folder / "killed"


@pytest.mark.parametrize("devices", [1, 4])
def test_a_killed_training_goes_on_in_a_new_process_and_ends_bit_identical(tmp_path, devices, whole_and_killed):
    """On as many devices as before, or on more."""
    whole, killed = whole_and_killed
    shutil.copytree(killed, tmp_path / "killed")
    resumed = train(tmp_path / "killed", 30, devices=devices)
    assert resumed.returncode == 0, resumed.stderr
    num_devices, start, digest = resumed.stdout.split()
    assert (int(num_devices), int(start)) == (devices, 10)
    assert digest == whole


@functools.cache
def trained(features=5):
    """Parameters, optimizer, its state after a step, and the records of that."""
    model, x = nn.Sequential([nn.Dense(features), nn.relu, nn.Dense(2)]), jnp.ones((4, 3))
    params = init(model, x)
    tx = compiled(bnp.bnp_sgd(0.1, bnp.linen.find_layers(model, x), momentum=0.9))
    _, records = jax.jit(forward(model))(params, x)
    _, state = tx.update(params, tx.init(params), params, intermediates=records)
    return params, tx, state, records


def test_flax_serialization_round_trip():
    params, tx, state, _ = trained()
    restored = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_dtypes(restored, state)


def test_orbax_round_trip_without_a_template(tmp_path):
    """What is restored as plain dictionaries holds every field of the state."""
    _, _, state, _ = trained()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        plain = checkpointer.restore(tmp_path / "state")
    np.testing.assert_array_equal(plain[0]["mean"], state[0].mean)


def test_a_checkpoint_of_another_model_is_refused_naming_the_leaf(tmp_path):
    params, tx, state, records = trained()
    _, _, other, _ = trained(features=7)
    with pytest.raises(
        ValueError, match=r"mean of layers_2 was saved in shape \(1, 1, 7\), but is \(1, 1, 5\)\. .*restore"
    ):
        flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(other))
    with pytest.raises(
        ValueError, match=r"moments of layers_2 have shape \(1, 1, 7\), but the layers need \(1, 1, 5\)"
    ):
        tx.update(params, other, params, intermediates=records)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "other", other)
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="is not compatible with the stored shape"):
            checkpointer.restore(tmp_path / "other", state)


def test_a_checkpoint_of_another_version_is_refused_naming_the_field():
    params, tx, state, _ = trained()
    without_a_field, without_a_layer = (flax.serialization.to_state_dict(state) for _ in range(2))
    del without_a_field["0"]["layers_0"]["skipped"]
    with pytest.raises(ValueError, match=r"statistics of layers_0 have no skipped\. .*restore"):
        flax.serialization.from_state_dict(tx.init(params), without_a_field)
    del without_a_layer["0"]["layers_0"]
    with pytest.raises(ValueError, match="differ in having layers_0"):
        flax.serialization.from_state_dict(tx.init(params), without_a_layer)


def test_layers_are_restored_by_name():
    """A network in which the layers lie in another order in the arrays."""
    params, tx, state, _ = trained()
    saved = flax.serialization.to_state_dict(state)
    saved["0"] = dict(reversed(saved["0"].items()))
    chex.assert_trees_all_equal(flax.serialization.from_state_dict(tx.init(params), saved), state)


def test_states_of_several_members_and_abstract_ones_are_restored_too():
    params, tx, state, _ = trained()
    members = jax.vmap(tx.init)(jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 3 * leaf]), params))
    numbered = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), members)
    data = flax.serialization.to_bytes(numbered)
    chex.assert_trees_all_equal(flax.serialization.from_bytes(members, data), numbered)
    restored = flax.serialization.from_bytes(jax.eval_shape(tx.init, params), flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    with pytest.raises(ValueError, match=r"mean of layers_0 was saved in shape \(3, .*, but is \(1, "):
        flax.serialization.from_bytes(state, data)


def test_pickle_round_trip():
    _, _, state, _ = trained()
    restored = pickle.loads(pickle.dumps(jax.device_get(state)))  # noqa: S301
    chex.assert_trees_all_equal(restored, state)
