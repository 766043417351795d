"""The networks of the paper's experiments, each with batch, group or layer normalization, or none.

All take images ``[n, height, width, channels]`` and return logits ``[n, classes]``. Every linear layer has a bias.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import optax
import optax.contrib

# Or a function of whether it is trained, which returns what is applied.
Normalization = Literal["bn", "gn", "ln", "none"] | Callable[[bool], Callable[[jax.Array], Any]]

RUNNING_MOMENTUM = 0.9  # of BN's statistics: Flax's 0.99 lags behind the weights, see results/optimizers.md

he_normal = nn.initializers.he_normal()


def normalize(kind: Normalization, group_size: int, train: bool, x: jax.Array) -> Any:
    """Applies the normalization layer of that kind, in a compact module."""
    match kind:
        case "bn":
            return nn.BatchNorm(use_running_average=not train, momentum=RUNNING_MOMENTUM)(x)
        case "gn":
            return nn.GroupNorm(num_groups=None, group_size=group_size)(x)
        case "ln":
            return nn.LayerNorm()(x)
        case "none":
            return x
    return kind(train)(x)


class MLP(nn.Module):
    """Fully connected layers, each with a normalization before its activation.

    Attributes:
      normalization: the kind of normalization.
      widths: units of the hidden layers.
      group_size: channels of a group, for Group Normalization.
      dense: the layer of all but the last.
      classes: number of classes.
    """

    normalization: Normalization = "none"
    widths: tuple[int, ...] = (100, 100, 100)
    group_size: int = 4
    dense: Callable[..., Callable[[jax.Array], jax.Array]] = nn.Dense
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits."""
        x = x.reshape(x.shape[0], -1)
        for width in self.widths:
            x = nn.relu(normalize(self.normalization, self.group_size, train, self.dense(width)(x)))
        return nn.Dense(self.classes)(x)


class CNN(nn.Module):
    """3x3 convolutions, each followed by pooling, and two fully connected layers.

    Pooling takes the average, whose gradient XLA computes several times faster on CPUs than that of the maximum.

    Attributes:
      normalization: the kind of normalization, before every activation.
      widths: channels of the convolutions.
      hidden: units of the first fully connected layer.
      group_size: channels of a group, for Group Normalization.
      conv: the layer of the convolutions.
      dense: that of the first fully connected layer.
      activation: the nonlinearity.
      classes: number of classes.
    """

    normalization: Normalization = "none"
    widths: tuple[int, ...] = (32, 32, 64)
    hidden: int = 64
    group_size: int = 4
    conv: Callable[..., Callable[[jax.Array], jax.Array]] = nn.Conv
    dense: Callable[..., Callable[[jax.Array], jax.Array]] = nn.Dense
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits."""
        norm = functools.partial(normalize, self.normalization, self.group_size, train)
        for width in self.widths:
            x = nn.avg_pool(self.activation(norm(self.conv(width, (3, 3))(x))), (2, 2), strides=(2, 2))
        x = self.activation(norm(self.dense(self.hidden)(x.reshape(x.shape[0], -1))))
        return nn.Dense(self.classes)(x)


class ResNet(nn.Module):
    """Pre-activation residual network of blocks of two 3x3 convolutions (He et al., 2016).

    Attributes:
      normalization: the kind of normalization, before every activation.
      blocks: number of blocks of every stage; each stage after the first halves the image.
      width: channels of the first stage, doubled by each of the others.
      large_images: start with a 7x7 convolution and a pooling, which quarter the image, not with a 3x3 convolution.
      group_size: channels of a group, for Group Normalization.
      kernel_init: initializer of the kernels.
      classes: number of classes.
    """

    normalization: Normalization = "none"
    blocks: tuple[int, ...] = (18, 18, 18)
    width: int = 16
    large_images: bool = False
    group_size: int = 4
    kernel_init: Callable[..., jax.Array] = he_normal
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits."""
        norm = functools.partial(normalize, self.normalization, self.group_size, train)
        conv = functools.partial(nn.Conv, kernel_init=self.kernel_init)
        if self.large_images:
            x = nn.max_pool(conv(self.width, (7, 7), strides=2)(x), (3, 3), strides=(2, 2), padding="SAME")
        else:
            x = conv(self.width, (3, 3))(x)
        for stage, blocks in enumerate(self.blocks):
            width = self.width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                activated = nn.relu(norm(x))
                if x.shape[-1] != width:
                    x = conv(width, (1, 1), strides=stride)(activated)
                y = conv(width, (3, 3), strides=stride)(activated)
                x = x + conv(width, (3, 3))(nn.relu(norm(y)))
        x = nn.relu(norm(x)).mean(axis=(1, 2))
        return nn.Dense(self.classes, kernel_init=self.kernel_init)(x)


def tutorial_cnn(**attributes: Any) -> CNN:
    """Returns the network of Flax's MNIST tutorials, of two convolutions."""
    return CNN(widths=(32, 64), hidden=256, **attributes)


def resnet_18(*, group_size: int = 32, **attributes: Any) -> ResNet:
    """Returns the pre-activation network of 18 layers for ``large_images`` or small ones."""
    return ResNet(blocks=(2, 2, 2, 2), width=64, group_size=group_size, **attributes)


def resnet_20(**attributes: Any) -> ResNet:
    """Returns the pre-activation network of 20 layers for images of 32x32 pixels."""
    return ResNet(blocks=(3, 3, 3), width=16, **attributes)


def resnet_110(**attributes: Any) -> ResNet:
    """Returns the pre-activation network of 110 layers for images of 32x32 pixels."""
    return ResNet(blocks=(18, 18, 18), width=16, **attributes)


def kernel_matrices(params: optax.Params) -> Any:
    """Returns how each kernel is, for Muon, a matrix of its inputs, those of a window included, and outputs."""

    def as_matrix(leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        inputs = tuple(range(leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, leaf.ndim - 1) if inputs else None

    return jax.tree.map(as_matrix, params)
