"""What the tests of the diagnostics share: a network whose activations are perturbed, and how results are compared."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

seeds = st.integers(0, 2**16)
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


class Network(nn.Module):
    """Convolutions, or dense layers on vectors, whose activations are perturbed before the nonlinearity."""

    widths: tuple[int, ...] = (6, 5)
    normalized: bool = False
    activation: object = nn.tanh

    @nn.compact
    def __call__(self, x, train=True):
        wide = {"param_dtype": float, "bias_init": nn.initializers.normal(1.0)}
        for number, width in enumerate(self.widths):
            a = nn.Conv(width, (3, 3), **wide)(x) if x.ndim == 4 else nn.Dense(width, **wide)(x)
            a = self.perturb(f"before_{number}", a)
            if self.normalized:
                options = {"use_scale": False, "use_bias": False, "force_float32_reductions": False}
                a = nn.BatchNorm(use_running_average=not train, epsilon=0.0, dtype=float, **options)(a)
            x = self.activation(self.perturb(f"layer_{number}", a))
        return x


def ravel(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])
