"""The example of many devices as one of several processes; run by test_devices.py.

Arguments: the file for the parameters, which the first process writes, then the coordinator's address, how many
processes there are, and the number of this one; without these three the process is alone.
"""

import sys

import jax
import many_devices
import numpy as np
from flax.traverse_util import flatten_dict

output, *cluster = sys.argv[1:]
if cluster:
    coordinator, processes, process = cluster
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(processes), int(process))
many_devices.EPOCHS, many_devices.BATCH_SIZE = 2, 128
params, accuracy = many_devices.main()
print(f"accuracy {accuracy:.1f}")
if jax.process_index() == 0:
    np.savez(output, **flatten_dict(params, sep="/"))
if cluster:
    jax.distributed.shutdown()
