"""Models: flax modules behind one bridge, the losses, the networks of the literature, and layers that are fast on a CPU."""

from fl_jax.models.architectures import (
    DPSGDCNN,
    FedAvgCNN,
    LinearCox,
    LogisticRegression,
    NIIDBenchCNN,
    NormedCNN,
    PflCifarCNN,
    ResidualBlock,
    ResNet18,
    TabularNet,
    TwoNN,
    batch_norm,
    group_norm,
    layer_norm,
)
from fl_jax.models.bridge import bridge, images_uint8, owner
from fl_jax.models.convolution import (
    column_tiles,
    cpu_convolution,
    default_convolution,
    im2col,
    minimal_filtering,
    xla_convolution,
)
from fl_jax.models.layers import Conv, max_pool
from fl_jax.models.losses import (
    Loss,
    cox_partial_likelihood,
    masked_mean,
    per_record,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    squared_error,
)
from fl_jax.models.nnx import bridge_nnx

__all__ = [
    "DPSGDCNN",
    "Conv",
    "FedAvgCNN",
    "LinearCox",
    "LogisticRegression",
    "Loss",
    "NIIDBenchCNN",
    "NormedCNN",
    "PflCifarCNN",
    "ResNet18",
    "ResidualBlock",
    "TabularNet",
    "TwoNN",
    "batch_norm",
    "bridge",
    "bridge_nnx",
    "column_tiles",
    "cox_partial_likelihood",
    "cpu_convolution",
    "default_convolution",
    "group_norm",
    "im2col",
    "images_uint8",
    "layer_norm",
    "masked_mean",
    "max_pool",
    "minimal_filtering",
    "owner",
    "per_record",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "xla_convolution",
]
