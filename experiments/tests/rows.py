"""Rows of results as no program made them."""

import dataclasses
import math

from runs import Result, Run

ANY_RUN = Run("digits", "mlp", "bnp", 32, 0.1, 0, 320)


def make_result(rate, accuracy, loss=1.0, **changes):
    run = dataclasses.replace(ANY_RUN, rate=rate, **changes)
    test = accuracy if run.reads_test else math.nan
    return Result(run, "abc", 1.0, [160, 320], [2.0, loss], [2.0, loss], [50.0, accuracy], test, test)
