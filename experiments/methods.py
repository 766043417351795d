"""Runs the experiments of the other methods, ``bnp_optax.contrib``, and continues where an earlier call stopped.

One experiment a method shows what its paper claims, or that it does not show here. ``methods_report.py`` draws the
figures and writes the tables of what comes out.
"""

import alignment
import batch_group_norm
import batch_renorm
import binary
import bjorck
import comparison
import instance_enhancement
import mixture
import normalizer_free
import programs
import psi_sgd
import quantized
import sampling
import trajectory
import trials
import warm_up

EXPERIMENTS: dict[str, trials.Experiment] = {
    "alignment": alignment.EXPERIMENT,
    "batch_group_norm": batch_group_norm.EXPERIMENT,
    "batch_renorm": batch_renorm.EXPERIMENT,
    "binary": binary.EXPERIMENT,
    "bjorck": bjorck.EXPERIMENT,
    "instance_enhancement": instance_enhancement.EXPERIMENT,
    "mixture": mixture.EXPERIMENT,
    "comparison": comparison.EXPERIMENT,
    "normalizer_free": normalizer_free.EXPERIMENT,
    "psi_sgd": psi_sgd.EXPERIMENT,
    "quantized": quantized.EXPERIMENT,
    "sampling": sampling.EXPERIMENT,
    "trajectory": trajectory.EXPERIMENT,
    "warm_up": warm_up.EXPERIMENT,
}


def main(argv: list[str] | None = None) -> None:
    """Runs the experiments and prints their tables."""
    trials.main("Runs the experiments of the other methods; continues earlier calls.", EXPERIMENTS, argv)


if __name__ == "__main__":
    programs.start(main)
