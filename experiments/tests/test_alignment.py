"""The trainings of the gated head: when their phases change, what moves, and the quick form."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alignment
import methods
import methods_report
import runs
from protocol import Trial

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 1)), jnp.float32)
Y = jnp.arange(6) % 3


@pytest.mark.parametrize("method", [alignment.ALL, alignment.TWO])
def test_the_gate_is_that_of_half_of_the_steps_and_nothing_else_moves_then(method):
    task = alignment.make_task(Trial("digits", alignment.setting(2), method, 6, 0.0, 4, 0))
    state, step, states = task.init(jax.random.key(0), X[:1]), jax.jit(task.step), []
    for _ in range(4):
        states.append(state)
        state, _ = step(state, jnp.float32(0.01), X, Y)
    states.append(state)
    moved = [
        jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
        for before, after in itertools.pairwise(states)
    ]
    hidden_alone = {"features": {"bias": False, "kernel": False}, "head": {"hidden": True, "output": False}}
    assert moved[0] == moved[1] == jax.tree.map(lambda _: True, hidden_alone)
    assert moved[2] == moved[3] == (hidden_alone if method == alignment.TWO else moved[0])
    gates = [np.asarray(state.gate) for state in states]
    at_half = states[2 if method == alignment.TWO else 0].params["head"]["hidden"]
    for gate in gates[3:]:
        np.testing.assert_array_equal(gate, at_half)
    # the network in use is the one that was trained
    model = alignment.Network(2)
    gate = {"gate": {"head": {"hidden": state.gate}}}
    expected, _ = model.apply({"params": state.params, **gate}, X, method == alignment.TWO)
    np.testing.assert_allclose(jax.jit(task.predict)(state, X), expected, rtol=1e-4, atol=1e-5)


def test_the_quick_form_makes_both_tables(tmp_path):
    methods.main(["alignment", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, drawn = methods_report.make(tmp_path)
    assert set(texts) == {"alignment", "alignment_residuals"}
    assert not drawn
    rows = runs.read_rows(tmp_path / alignment.RESIDUALS, alignment.Residual)
    assert len(rows) == 2 * 3
    for row in rows:
        assert row.rank <= row.columns
        assert row.residual <= row.error + 1e-12 or row.steps == 0
    by_place = {(row.method, row.steps): dataclasses.replace(row, method="", commit="") for row in rows}
    for steps in (0, 10):  # the first phase is the same
        assert by_place[alignment.SOLVER, steps] == by_place[alignment.ALL, steps]
    # what can be reached is settled then
    np.testing.assert_allclose(*(by_place[alignment.SOLVER, steps].residual for steps in (10, 20)), rtol=1e-3)
    assert by_place[alignment.SOLVER, 20].error < by_place[alignment.SOLVER, 10].error


def test_numbers_are_shares_or_powers_of_ten():
    assert [alignment.number(value) for value in (0.4, 1.5471, 2.2e-15)] == ["0.400", "1.547", "2e-15"]
