"""Networks of the federated literature as linen modules; published parameter counts are in the docstrings and are tested."""

from collections.abc import Callable

import flax.linen as nn

from fl_jax.models.convolution import Convolution
from fl_jax.models.layers import Conv, max_pool
from fl_jax.types import Array

Norm = Callable[[bool], nn.Module]
"""(train) -> a normalisation layer. A function, since BatchNorm needs to know the mode and GroupNorm does not."""


def batch_norm(train: bool) -> nn.Module:
    """BatchNorm whose running averages move by a tenth a step (PyTorch's default; flax's own is a hundredth)."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)


def group_norm(train: bool) -> nn.Module:
    """GroupNorm with 32 groups: no statistics, so nothing that differs between training and evaluation."""
    del train
    return nn.GroupNorm(num_groups=32)


def layer_norm(train: bool) -> nn.Module:
    """LayerNorm: each record by its own mean and spread, so that, unlike BatchNorm, it suits a private gradient of records."""
    del train
    return nn.LayerNorm()


class LogisticRegression(nn.Module):
    """Multinomial logistic regression, one dense layer: x [B, ...], flattened -> logits [B, num_classes].

    7,850 parameters for 784 features and 10 classes.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


class LinearCox(nn.Module):
    """The linear proportional hazards model (Cox 1972): x [B, ...], flattened -> log hazards [B, 1], up to a constant.

    No bias, since the partial likelihood (losses.cox_partial_likelihood) does not see one.
    """

    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(1, use_bias=False, kernel_init=self.kernel_init)(x.reshape(x.shape[0], -1))


class TwoNN(nn.Module):
    """The "2NN": two hidden layers of 200 ReLU units (McMahan et al. 2017, arXiv 1602.05629, section 3).

    x [B, ...], flattened -> logits [B, num_classes]. 199,210 parameters for 784 features and 10 classes, as published.
    """

    num_classes: int = 10
    hidden: int = 200

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.num_classes)(x)


class TabularNet(nn.Module):
    """A small network for tables with one normalisation: dense, norm, ReLU, dense.

    x [B, features] -> logits [B, num_classes]. norm: (train) -> layer, by default `batch_norm`.
    """

    num_classes: int
    hidden: int = 64
    norm: Norm = batch_norm

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.Dense(self.hidden)(x)
        x = nn.relu(self.norm(train)(x))
        return nn.Dense(self.num_classes)(x)


class FedAvgCNN(nn.Module):
    """The CNN of McMahan et al. 2017 (arXiv 1602.05629, section 3): 5 x 5 convolutions to 32 and 64 channels, each with ReLU and
    2 x 2 max pooling, a dense layer of 512, softmax.

    x [B, 28, 28, 1] -> logits [B, num_classes]. 1,663,370 parameters for 10 classes, as published; EMNIST has 62 classes.
    padding: "VALID" for the network of this name in comparisons of personalised learning (PFLlib, Zhang et al. 2025, arXiv
    2312.04992), 582,026 parameters.
    """

    num_classes: int = 10
    implementation: Convolution | None = None
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for features in (32, 64):
            x = nn.relu(Conv(features, (5, 5), padding=self.padding, implementation=self.implementation)(x))
            x = max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(512)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x)


class DPSGDCNN(nn.Module):
    """The small CNN on which DP-SGD is commonly compared, that of TensorFlow Privacy's MNIST tutorial: an 8 x 8 convolution to 16
    channels with stride 2 and padding, a 4 x 4 one to 32 with stride 2 and without, each with ReLU and 2 x 2 max pooling of stride 1,
    a dense layer of 32 with ReLU, softmax.

    x [B, 28, 28, 1] -> logits [B, num_classes]. 26,010 parameters for 10 classes. No layer mixes records.
    """

    num_classes: int = 10
    implementation: Convolution | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for features, kernel_size, padding in ((16, (8, 8), "SAME"), (32, (4, 4), "VALID")):
            x = nn.relu(Conv(features, kernel_size, (2, 2), padding, implementation=self.implementation)(x))
            x = max_pool(x, (2, 2), strides=(1, 1))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x)


class NormedCNN(nn.Module):
    """A small CNN in which normalisation matters: 3 x 3 convolutions of stride 2 to `width` and 2 `width` channels and a dense layer of
    32, each with a norm and ReLU, softmax.

    x [B, 28, 28, 1] -> logits [B, num_classes]. norm: (train) -> layer, by default `batch_norm`. 26,490 parameters for width 8 and 2
    classes.
    """

    num_classes: int
    width: int = 8
    norm: Norm = batch_norm
    implementation: Convolution | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for features in (self.width, 2 * self.width):
            x = Conv(features, (3, 3), (2, 2), use_bias=False, implementation=self.implementation)(x)
            x = nn.relu(self.norm(train)(x))
        x = nn.Dense(32, use_bias=False)(x.reshape(x.shape[0], -1))
        return nn.Dense(self.num_classes)(nn.relu(self.norm(train)(x)))


class NIIDBenchCNN(nn.Module):
    """The CNN of NIID-Bench (Li et al. 2022, arXiv 2102.02079, section V), of LeNet's shape: 5 x 5 convolutions without padding to 6 and 16
    channels, each with ReLU and 2 x 2 max pooling, dense layers of 120 and 84 with ReLU, softmax.

    x [B, H, W, channels] -> logits [B, num_classes]. For 10 classes, 44,426 parameters with 28 x 28 x 1 and 62,006 with 32 x 32 x 3.
    """

    num_classes: int = 10
    implementation: Convolution | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for features in (6, 16):
            x = nn.relu(Conv(features, (5, 5), padding="VALID", implementation=self.implementation)(x))
            x = max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for features in (120, 84):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.num_classes)(x)


class PflCifarCNN(nn.Module):
    """The CIFAR-10 CNN of personalised-learning comparisons: 3 x 3 convolutions without padding to 32 and 64 channels with ReLU,
    2 x 2 max pooling, dropout .25, a dense layer of 128 with ReLU, dropout .5, softmax (the layers of PyTorch's MNIST example).

    x [B, 32, 32, 3] -> logits [B, num_classes]. 1,626,442 parameters for 10 classes.
    """

    num_classes: int = 10
    implementation: Convolution | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.relu(Conv(32, (3, 3), padding="VALID", implementation=self.implementation)(x))
        x = nn.relu(Conv(64, (3, 3), padding="VALID", implementation=self.implementation)(x))
        x = max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


class ResidualBlock(nn.Module):
    """A basic block (He et al. 2016, figure 2): two 3 x 3 convolutions beside a shortcut.

    Where the shape changes, the shortcut is a 1 x 1 convolution with a norm of its own.
    """

    features: int
    strides: tuple[int, int]
    norm: Norm
    implementation: Convolution | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        def conv(kernel_size: tuple[int, int], strides: tuple[int, int]) -> nn.Module:
            # torch pads a strided 3 x 3 convolution by (1, 1); "SAME" would pad by (0, 1) and shift the image
            padding = tuple(((k - 1) // 2, (k - 1) // 2) for k in kernel_size)
            return Conv(self.features, kernel_size, strides, padding, use_bias=False, implementation=self.implementation)

        y = nn.relu(self.norm(train)(conv((3, 3), self.strides)(x)))
        y = self.norm(train)(conv((3, 3), (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm(train)(conv((1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016, arXiv 1512.03385, table 1) with the CIFAR stem: a 3 x 3 convolution and no pooling.

    x [B, H, W, channels] -> logits [B, num_classes]. norm: (train) -> layer, e.g. `batch_norm` or `group_norm` (Hsieh et al.
    2020, arXiv 1910.00189: BatchNorm suffers from skewed labels, GroupNorm does not). 11,173,962 parameters for 3 channels and 10
    classes.
    """

    num_classes: int
    norm: Norm
    width: int = 64
    implementation: Convolution | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = Conv(self.width, (3, 3), use_bias=False, implementation=self.implementation)(x)
        x = nn.relu(self.norm(train)(x))
        for stage in range(4):
            for block in range(2):
                strides = (2, 2) if stage > 0 and block == 0 else (1, 1)
                x = ResidualBlock(self.width * 2**stage, strides, self.norm, self.implementation)(x, train)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))
