"""The random networks of test_fuzz.py, with layers in the ways that models of other people call them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import bnp_optax as bnp

CHANNELS = 4
SCAN = 2

# What a layer makes of its kernel before the product, in JAX and in NumPy.
COMPUTED = {
    "standardized": lambda w: (w - w.mean(0, keepdims=True)) / (w.std(0, keepdims=True) + 0.1),
    "scaled": lambda w: 0.5 * w,
    "masked": lambda w: w * (abs(w) > 0.2).astype(w.dtype),
}


class Experts(nn.Module):
    """One kernel for each position of the sequence, by a layer of the user's own."""

    use_bias: bool
    dtype: type

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(0.5)
        w = self.param("kernel", init, (x.shape[1], CHANNELS, CHANNELS), self.dtype)
        b = self.param("bias", init, (x.shape[1], CHANNELS), self.dtype) if self.use_bias else None
        bias = "bias" if self.use_bias else None
        bnp.linen.register(self, x, "kernel", bias, kernel_roles="sio", bias_roles="so", stack_axes=(1,))
        y = jnp.einsum("nti,tio->nto", x, w)
        return y if b is None else y + b[None]


class ComputedKernel(nn.Dense):
    """A layer that multiplies with something else than its parameter."""

    how: str = ""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return COMPUTED[self.how](value) if name == "kernel" else value


class Net(nn.Module):
    network: tuple
    dtype: type
    time_axis: int

    @nn.compact
    def __call__(self, x, lengths):
        for k, (spec, use_bias) in enumerate(self.network):
            name = f"layer_{k}"
            given = {"use_bias": use_bias, "param_dtype": self.dtype, "name": name}
            match spec["kind"]:
                case "dense":
                    x = nn.Dense(CHANNELS, **given)(x)
                case "remat":
                    x = nn.remat(nn.Dense)(CHANNELS, **given)(x)
                case "jit":
                    x = nn.jit(nn.Dense)(CHANNELS, **given)(x)
                case "twice":
                    dense = nn.Dense(CHANNELS, **given)
                    x = dense(jnp.tanh(dense(x)))
                case "general":
                    x = nn.DenseGeneral((2, CHANNELS // 2), **given)(x).reshape(*x.shape[:-1], CHANNELS)
                case "experts":
                    x = Experts(use_bias, self.dtype, name=name)(x)
                case "reads":
                    dense = nn.Dense(CHANNELS, **given)
                    x = jnp.tanh(dense(x))
                    x = x @ dense.variables["params"]["kernel"].T
                case "pooled":
                    dense = nn.Dense(CHANNELS, **given)
                    x = dense(x) + jnp.expand_dims(dense(x.mean(self.time_axis)), self.time_axis)
                case "applied":
                    dense = nn.Dense(CHANNELS, **given)
                    other = nn.Dense(CHANNELS, **given | {"name": f"{name}_other"})
                    x = jnp.tanh(other(jnp.tanh(dense(x))))
                    x = other.apply({"params": dense.variables["params"]}, x)
                case "vmap":
                    x = jax.vmap(nn.Dense(CHANNELS, **given), 1, 1)(x)
                case "map":
                    dense = nn.Dense(CHANNELS, **given)
                    if self.is_initializing():
                        dense(x)
                    x = jax.lax.map(dense, x.swapaxes(0, 1)).swapaxes(0, 1)
                case "conv":
                    x = nn.Conv(
                        CHANNELS, (spec["window"],), spec["strides"], feature_group_count=spec["groups"], **given
                    )(x)
                case "rnn":
                    cell = nn.SimpleCell(CHANNELS, param_dtype=self.dtype, name=name)
                    rnn = nn.RNN(cell, time_major=self.time_axis == 0, reverse=spec["reverse"])
                    # A strided convolution leaves fewer steps, or fewer examples of a time-major batch.
                    own = jnp.minimum(lengths[: x.shape[1 - self.time_axis]], x.shape[self.time_axis])
                    x = rnn(x, seq_lengths=own if spec["lengths"] else None)
                case "scan":
                    axis = stack_axis(spec, use_bias)
                    scan = nn.scan(
                        lambda module, carry: (jnp.tanh(module(carry)), None),
                        variable_axes={"params": axis, "intermediates": 0},
                        split_rngs={"params": True},
                        length=SCAN,
                    )
                    x, _ = scan(nn.Dense(CHANNELS, **given), x)
                case how:
                    x = ComputedKernel(CHANNELS, **given, how=how)(x)
            x = jnp.tanh(x)
        return x


def stack_axis(spec, use_bias):
    """The parameters' axis of a scan; the bias has no axis 2 to put it before."""
    return min(spec["axis"], 1) if use_bias else spec["axis"]
