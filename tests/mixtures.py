"""Mixtures, and EM and the formula of Mixture Normalization written out in NumPy: what its tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax.contrib import Mixture, mixture_normalize, mixture_normalize_inference
from bnp_optax.contrib.mixture import FLOOR


def log_density(row, mean, var, counted):
    return -0.5 * sum(
        (row[c] - mean[c]) ** 2 / var[c] + np.log(2 * np.pi * var[c]) for c in range(len(row)) if counted[c]
    )


def probabilities(x, weights, means, variances, counted=None):
    """Returns the probability of each row to come from each component, row by row."""
    counted = np.ones(x.shape, bool) if counted is None else counted
    tau = np.empty((len(x), len(weights)))
    for i, row in enumerate(x):
        logs = [
            np.log(max(w, FLOOR)) + log_density(row, m, v, counted[i])
            for w, m, v in zip(weights, means, variances, strict=True)
        ]
        tau[i] = [np.exp(each - max(logs)) for each in logs]
        tau[i] /= tau[i].sum()
    return tau


def moments_of(x, tau, epsilon, floor, counted=None):
    """Returns weights, means and variances of the components, of which none is empty."""
    counted = np.ones(x.shape, bool) if counted is None else counted
    rows = [i for i in range(len(x)) if counted[i].any()]
    weights = [sum(tau[i, k] for i in rows) / len(rows) for k in range(tau.shape[1])]
    means, variances = np.empty((2, tau.shape[1], x.shape[1]))
    for k in range(tau.shape[1]):
        for c in range(x.shape[1]):
            share = {i: tau[i, k] for i in range(len(x)) if counted[i, c]}
            total = sum(share.values())
            means[k, c] = sum(share[i] * x[i, c] for i in share) / total
            variance = sum(share[i] * (x[i, c] - means[k, c]) ** 2 for i in share) / total
            variances[k, c] = max(variance + epsilon, floor[c])
    return np.array(weights), means, variances


def normalized_by(x, tau, weights, means, variances):
    return sum(
        tau[:, [k]] / np.sqrt(max(weights[k], FLOOR)) * (x - means[k]) / np.sqrt(variances[k])
        for k in range(len(weights))
    )


def written_out(x, mixture, em_steps, epsilon, counted=None):
    """Returns the batch `[rows, features]` normalized, its moments, and its mixture in their units.

    EM runs in the units of x, unlike the library's.
    """
    x, mixture = np.asarray(x), Mixture(*map(np.asarray, mixture))
    counted = np.ones(x.shape, bool) if counted is None else np.asarray(counted)
    mean = np.array([np.mean(x[counted[:, c], c]) for c in range(x.shape[1])])
    var = np.array([np.var(x[counted[:, c], c]) for c in range(x.shape[1])])
    unit = var + epsilon
    own = mixture.weights, mean + np.sqrt(unit) * mixture.mean, unit * mixture.var
    for _ in range(em_steps):
        tau = probabilities(x, *own, counted)
        own = moments_of(x, tau, epsilon, FLOOR * unit, counted)
    weights, means, variances = own
    return normalized_by(x, tau, *own), mean, var, Mixture(weights, (means - mean) / np.sqrt(unit), variances / unit)


def some_mixture(seed, num_components, features):
    """Components that differ in everything."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2, num_components)
    return Mixture(
        jnp.asarray(weights / weights.sum()),
        jnp.asarray(rng.normal(0, 1, (num_components, features))),
        jnp.asarray(rng.uniform(0.3, 2, (num_components, features))),
    )


def traced_step(x, mixture, **options):
    """A step from running statistics that are not those of the batch."""
    start = jnp.full_like(mixture.mean[0], 3), jnp.full_like(mixture.mean[0], 2)
    options = {"use_fast_variance": False} | options
    return mixture_normalize(x, *start, mixture, **options)


step = jax.jit(traced_step, static_argnames=("em_steps", "use_fast_variance", "axis"))
inference = jax.jit(mixture_normalize_inference)


def modes(seed, sizes, centres, deviation=1.0):
    """Rows around the centres, `[modes, features]`, and which mode each row is of."""
    rng, centres = np.random.default_rng(seed), np.asarray(centres, float)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return jnp.asarray(centres[labels] + rng.normal(0, deviation, (len(labels), centres.shape[1]))), labels
