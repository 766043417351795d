"""Independent float64 computations that the library's results are compared with."""

import itertools

import numpy as np


def paper_dense_step(h, g_w, g_b, mu, var, rho, eps1, eps2, q2, mixture=True):
    """Algorithm 2 of the paper, line by line in loops: returns the new G_w, G_b, mu and var.

    `h` is the batch `[N, n]`, `g_w` is `[n, m]`, `g_b` is `[m]`.
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


def bnp_update(inputs, examples, g_w, g_b=None, window=1, eps1=1e-2, eps2=1e-4):
    """The update of a layer by the default options whose statistics are those of the batch, from the rows of its input.

    `inputs` is `[positions, n]`, `g_w` is `[window * n, m]` with the window outermost, `g_b` is `[m]`.
    """
    mean, variance = inputs.mean(0), inputs.var(0)
    moment = variance if g_b is not None else variance + mean**2
    s = np.tile(moment + eps1 * moment.max() + eps2, window)[:, None]
    q2 = max(128 / examples, 1)
    if g_b is None:
        return g_w / (q2 * s), None
    mu = np.tile(mean, window)[:, None]
    new_w = (g_w - mu * g_b) / (q2 * s)
    return new_w, g_b / q2 - (mu * new_w).sum(0)
