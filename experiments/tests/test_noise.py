"""What disturbs activations, against the moments that it is defined by."""

import jax
import jax.numpy as jnp
import numpy as np

import noise


def applied(module, batches):
    variables = module.init(jax.random.key(0), batches[0])
    outputs = []
    for batch in batches:
        y, variables = module.apply(variables, batch, mutable=["batch_stats"])
        outputs.append(np.asarray(y))
    return outputs, variables


def test_batch_noise_gives_a_batch_the_running_moments():
    rng = np.random.default_rng(0)
    batches = rng.normal(3.0, 2.0, (4, 8, 5, 2)).astype(np.float32)
    outputs, variables = applied(noise.BatchNoise(True, 0.9), batches)
    np.testing.assert_allclose(outputs[0], batches[0], rtol=0, atol=1e-5)  # the first is what runs
    parts = 0.9 ** np.arange(3, -1, -1)
    parts /= parts.sum()
    mean, var = parts @ batches.mean((1, 2)), parts @ batches.var((1, 2))
    np.testing.assert_allclose(outputs[-1].mean((0, 1)), mean, rtol=1e-5)
    np.testing.assert_allclose(outputs[-1].var((0, 1)), var, rtol=1e-4)
    correlation = np.corrcoef(outputs[-1][..., 0].ravel(), batches[-1][..., 0].ravel())[0, 1]
    assert correlation > 1 - 1e-6
    np.testing.assert_array_equal(noise.BatchNoise(False, 0.9).apply(variables, batches[0]), batches[0])


def test_batch_noise_is_constant_for_gradients():
    x = jax.random.normal(jax.random.key(0), (8, 2))
    module = noise.BatchNoise(True, 0.9)
    variables = module.init(jax.random.key(0), x)
    gradient = jax.grad(lambda x: module.apply(variables, x, mutable=["batch_stats"])[0].sum())(x)
    np.testing.assert_allclose(gradient, np.ones((8, 2)), rtol=1e-5)  # BN's would be zero


def test_dropout_drops_anew_at_every_step_and_keeps_the_mean():
    ones = jnp.ones((500, 200))
    (first, second), variables = applied(noise.Dropout(True, 0.1), [ones, ones])
    for own in (first, second):
        assert set(np.unique(own)) == {0.0, np.float32(1 / 0.9)}
        assert abs((own == 0).mean() - 0.1) < 0.005  # five standard deviations
    assert (first != second).any()
    np.testing.assert_array_equal(noise.Dropout(False, 0.1).apply(variables, ones), ones)
