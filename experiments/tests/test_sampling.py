"""The experiment on neural sampling machines: its units, its predictions, and the quick form."""

import jax
import jax.numpy as jnp
import numpy as np

import methods
import methods_report
import sampling
from protocol import Trial
from sampling import EVERYWHERE, SAMPLES, SCALES


def trial(method, setting="weights x 1"):
    return Trial("digits", setting, method, 10, 0.01, 10, 1)


def test_signs_have_the_gradient_of_the_identity_between_minus_one_and_one():
    u = jnp.array([-2.0, -1.0, -0.3, 0.0, 0.7, 1.5])
    np.testing.assert_array_equal(sampling.sign(u), [-1, -1, -1, 1, 1, 1])
    np.testing.assert_array_equal(jax.grad(lambda u: sampling.sign(u).sum())(u), [0, 1, 1, 1, 1, 0])


def test_a_prediction_is_the_mean_of_the_probabilities_of_as_many_samples():
    """One of one sample is some sample's own; one of many has a value between, and is of one key."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4, 1)), jnp.float32)
    few, many = (sampling.make_task(trial(method)) for method in ("NSM, 1 sample", "NSM, 100 samples"))
    state = few.init(jax.random.key(0), x)
    mean = many.predict(state, x)
    np.testing.assert_allclose(mean.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(mean, many.predict(state, x))
    predict = jax.jit(lambda key: few.predict(state._replace(key=key), x))
    samples = np.stack([predict(key) for key in jax.random.split(jax.random.key(7), 200)])
    spread = samples.std(0) * (1 / 100 + 1 / 200) ** 0.5
    assert (spread > 0).all()
    assert (np.abs(samples.mean(0) - mean) < 5 * spread + 1e-6).all()


def test_the_scale_of_the_weights_is_that_of_the_setting():
    x = jnp.ones((1, 8, 8, 1))
    for method in EVERYWHERE:
        for setting, scale in SCALES.items():
            params = sampling.make_task(trial(method, setting)).init(jax.random.key(0), x).params
            kinds = sorted(name for name in params if params[name]["kernel"].shape[-1] == 100)
            assert len(kinds) == 2
            for name in kinds:
                kernel = params[name]["kernel"]
                np.testing.assert_allclose(kernel.std() * len(kernel) ** 0.5, scale, rtol=0.05)


def test_the_quick_form_makes_a_table(tmp_path):
    methods.main(["sampling", "--quick", "--results", str(tmp_path), "--workers", "1"])
    texts, _ = methods_report.make(tmp_path)
    cells = [tuple(row.split(" | ")[1:4:2]) for row in texts["sampling"].splitlines()[2:]]
    assert cells == [("weights x 1", method) for method in EVERYWHERE]


def test_all_numbers_of_samples_are_tried_at_the_default_scale():
    cells = {(trial.setting, trial.method) for trial in sampling.tuning(quick=False)}
    assert {method for setting, method in cells if setting == "weights x 1"} == set(SAMPLES)
    assert {method for setting, method in cells if setting == "weights x 10"} == set(EVERYWHERE)
