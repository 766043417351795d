"""Independent float64 computations that the library's results are compared with."""

import itertools

import numpy as np

EPS = (1e-2, 1e-4)  # the default options


def algorithm_2(h, g_w, g_b, mu, var, rho, eps1, eps2, q2, mixture=True):
    """Algorithm 2 of the paper, line by line in loops: returns the new G_w, G_b, mu and var.

    `h` is the batch `[N, n]`, `g_w` is `[n, m]`, `g_b` is `[m]`. It reads like the paper and is written apart from
    `absorbed` and `bnp_step`, which all tests use: test_oracles.py holds these to it, and so to the paper.
    """
    examples, n = h.shape
    m = g_b.shape[0]
    mu_b = np.array([sum(h[k, j] for k in range(examples)) / examples for j in range(n)])
    var_b = np.array([sum((h[k, j] - mu_b[j]) ** 2 for k in range(examples)) / examples for j in range(n)])
    new_var = rho * var + (1 - rho) * var_b
    if mixture:
        new_var = new_var + rho * (1 - rho) * (mu_b - mu) ** 2
    mu, var = rho * mu + (1 - rho) * mu_b, new_var
    s = var + eps1 * max(var) + eps2
    new_w, new_b = np.zeros_like(g_w), np.zeros_like(g_b)
    for j, i in itertools.product(range(n), range(m)):
        new_w[j, i] = (g_w[j, i] - mu[j] * g_b[i]) / (q2 * s[j])
    for i in range(m):
        new_b[i] = g_b[i] / q2 - sum(mu[j] * new_w[j, i] for j in range(n))
    return new_w, new_b, mu, var


def running_decay(decay, prior_examples, seen, examples):
    """The decay of a batch: the start weighs as many examples as the prior has."""
    if prior_examples is None:
        return decay
    return min(decay, (prior_examples + seen) / (prior_examples + seen + examples))


def absorbed(mean, variance, rows, rho, rule="mixture"):
    """The running mean and variance after a batch, from the rows `[positions, n]` that a linear map reads."""
    rows = np.asarray(rows, np.float64)
    new = rho * variance + (1 - rho) * rows.var(0)
    if rule == "mixture":
        new = new + rho * (1 - rho) * (rows.mean(0) - mean) ** 2
    return rho * mean + (1 - rho) * rows.mean(0), new


def bnp_step(mean, variance, g_w, g_b=None, q2=1.0, eps=EPS):
    """What BNP makes of the gradients of one linear map: the new G_w and G_b.

    `mean` and `variance` are `[n]`, `g_w` is `[window * n, m]` with the window outermost, `g_b` is `[m]`, or `None`
    where there is no bias to centre with.
    """
    g_w = np.asarray(g_w, np.float64)
    window = g_w.shape[0] // mean.size
    moment = variance if g_b is not None else variance + mean**2
    s = np.tile(moment + eps[0] * moment.max() + eps[1], window)[:, None]
    if g_b is None:
        return g_w / (q2 * s), None
    g_b = np.asarray(g_b, np.float64)
    mu = np.tile(mean, window)[:, None]
    new_w = (g_w - mu * g_b) / (q2 * s)
    return new_w, g_b / q2 - (mu * new_w).sum(0)


def batch_scale(scaling, examples, fan_in):
    """q2 of a batch by each of the rules."""
    if scaling == "none":
        return 1.0
    return max((fan_in if scaling == "examples" else scaling) / examples, 1.0)


def step_of_batch(rows, examples, g_w, g_b=None):
    """The step by the default options where the statistics are those of the batch, from the rows that the map reads."""
    rows = np.asarray(rows, np.float64)
    return bnp_step(rows.mean(0), rows.var(0), g_w, g_b, batch_scale(128, examples, len(g_w)))


def preconditioner(mu, s, q2):
    """The matrix P of `[b; w] = P z` for one output unit, as the product of its two factors."""
    n = mu.size
    centre, scale = np.eye(n + 1), np.eye(n + 1)
    centre[0, 1:] = -mu
    scale[1:, 1:] = np.diag(1 / np.sqrt(s))
    return centre @ scale / np.sqrt(q2)


def patches(x, window, strides, padding):
    """The inputs `[N * positions, window * channels]` that each output position of a convolution sees.

    `x` is `[N, *spatial, C]`; `padding` holds a (low, high) pair for every spatial axis.
    """
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    counts = [(size - w) // s + 1 for size, w, s in zip(x.shape[1:-1], window, strides, strict=True)]
    rows = []
    for example in x:
        for corner in itertools.product(*(range(count) for count in counts)):
            box = tuple(slice(c * s, c * s + w) for c, s, w in zip(corner, strides, window, strict=True))
            rows.append(example[box].reshape(-1))
    return np.array(rows)


def same_padding(size, window, stride):
    """The (low, high) padding of `SAME`, as XLA defines it."""
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2
