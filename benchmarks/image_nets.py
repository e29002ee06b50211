"""Small image networks, each with one thing that XNNPACK's sparse chain takes, or does not.

`benchmarks/verdicts.py` measures them, and the tests hold what `tf_prune.explain` says of them to what was measured.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

_WIDTH = 256


def pointwise(x: Any, filters: int = _WIDTH) -> Any:
    return layers.ReLU()(layers.Conv2D(filters, 1)(x))


def depthwise(x: Any, strides: int = 1, size: int = 3) -> Any:
    x = layers.ZeroPadding2D(size // 2)(x)
    return layers.ReLU()(layers.DepthwiseConv2D(size, strides)(x))


def stem(x: Any) -> Any:
    return layers.ReLU()(layers.Conv2D(32, 3, 2)(layers.ZeroPadding2D(1)(x)))


def head(x: Any) -> Any:
    return layers.Dense(10)(layers.GlobalAveragePooling2D()(x))


def network(
    middle: Callable[[Any], Any] = lambda x: x,
    begin: Callable[[Any], Any] = stem,
    end: Callable[[Any], Any] = head,
    size: int = 48,
) -> keras.Model:
    """A MobileNet of two blocks with something in the middle, at the beginning or at the end of it."""
    inputs = keras.Input((size, size, 3))
    x = middle(pointwise(depthwise(pointwise(begin(inputs)))))
    return keras.Model(inputs, end(pointwise(pointwise(depthwise(x)))), name="network")


def _squeeze_and_excite(x: Any) -> Any:
    pooled = _pooled(x)
    return layers.Multiply()([x, layers.Conv2D(_WIDTH, 1, activation="sigmoid")(pooled)])


def _two_outputs(x: Any) -> list[Any]:
    pooled = layers.GlobalAveragePooling2D()(x)
    return [pooled, layers.Dense(10)(pooled)]


def _constant(x: Any) -> Any:
    return keras.ops.multiply(x, np.linspace(0.5, 1, _WIDTH, dtype="float32").reshape(1, 1, 1, _WIDTH))


def _to_one_pixel(x: Any) -> Any:
    for _ in range(4):
        x = pointwise(depthwise(x, 2))
    return head(pointwise(x))


def _mean_of_rows(x: Any) -> Any:
    return layers.Dense(10)(keras.ops.mean(keras.ops.mean(x, 1), 1))


def _two_towers() -> keras.Model:
    inputs = keras.Input((48, 48, 3))
    # Of two paddings of the same image the converter makes one, which no convolution can take in.
    towers = [pointwise(depthwise(pointwise(stem(image)))) for image in (inputs, layers.ReLU()(inputs))]
    pooled = [layers.GlobalAveragePooling2D()(tower) for tower in towers]
    return keras.Model(inputs, layers.Dense(10)(layers.Concatenate()(pooled)), name="network")


def _pooled(x: Any) -> Any:
    return layers.GlobalAveragePooling2D(keepdims=True)(x)


def _convolution_as_head(x: Any) -> Any:
    return layers.Flatten()(layers.Conv2D(10, 1)(_pooled(x)))


def _reshaped_head(x: Any) -> Any:
    pooled = layers.Reshape((1, 1, _WIDTH))(layers.GlobalAveragePooling2D()(x))
    return layers.Flatten()(layers.Conv2D(10, 1)(pooled))


def _flattened_pooling(x: Any) -> Any:
    return layers.Dense(10)(layers.Flatten()(_pooled(x)))


# Name: how it is built, whether its sparse kernels run once 1x1 kernels are 90 % zeros, and what explain names if not.
NETS: dict[str, tuple[Callable[[], keras.Model], bool, str]] = {
    "plain": (network, True, ""),
    "preprocessing": (lambda: network(begin=lambda x: stem(layers.Rescaling(1 / 127.5, -1)(x))), True, ""),
    "depthwise same": (lambda: network(lambda x: layers.DepthwiseConv2D(3, padding="same")(x)), True, ""),
    "depthwise 5x5": (lambda: network(lambda x: depthwise(x, 2, 5)), True, ""),
    "one pixel left": (lambda: network(end=_to_one_pixel, size=32), True, ""),
    "residual": (lambda: network(lambda x: layers.Add()([x, pointwise(x)])), True, ""),
    "squeeze and excite": (lambda: network(_squeeze_and_excite), True, ""),
    "tanh": (lambda: network(layers.Activation("tanh")), True, ""),
    "gelu": (lambda: network(layers.Activation("gelu")), True, ""),
    "elu": (lambda: network(layers.ELU()), True, ""),
    "clip": (lambda: network(lambda x: keras.ops.clip(x, 0.0, 1.0)), True, ""),
    "cosine": (lambda: network(keras.ops.cos), True, ""),
    "sum as end": (lambda: network(end=lambda x: layers.Dense(10)(keras.ops.sum(x, (1, 2)))), True, ""),
    "two towers": (_two_towers, True, ""),
    "bilinear": (lambda: network(lambda x: layers.UpSampling2D(interpolation="bilinear")(depthwise(x, 2))), True, ""),
    "reshaped head": (lambda: network(end=_reshaped_head), True, ""),
    "flattened pooling": (lambda: network(end=_flattened_pooling), True, ""),
    "two outputs": (lambda: network(end=_two_outputs), True, ""),
    "stem of stride 1": (lambda: network(begin=lambda x: layers.Conv2D(32, 3, padding="same")(x)), False, "CONV_2D"),
    "stem of 5x5": (lambda: network(begin=lambda x: layers.Conv2D(32, 5, 2)(x)), False, "CONV_2D"),
    "stem same": (lambda: network(begin=lambda x: layers.Conv2D(32, 3, 2, "same")(x)), False, "CONV_2D"),
    "no stem": (lambda: network(begin=lambda x: x), False, "CONV_2D"),
    "depthwise same, strided": (
        lambda: network(lambda x: layers.DepthwiseConv2D(3, 2, padding="same")(x)),
        False,
        "DEPTHWISE_CONV_2D",
    ),
    "depthwise 7x7": (
        lambda: network(lambda x: layers.DepthwiseConv2D(7, padding="same")(x)),
        False,
        "DEPTHWISE_CONV_2D",
    ),
    "dilated": (
        lambda: network(lambda x: layers.DepthwiseConv2D(3, padding="same", dilation_rate=2)(x)),
        False,
        "SPACE_TO_BATCH_ND",
    ),
    "1x1 strided": (lambda: network(lambda x: layers.Conv2D(_WIDTH, 1, 2)(x)), False, "CONV_2D"),
    "3x3 amid": (lambda: network(lambda x: layers.Conv2D(64, 3, padding="same")(x)), False, "CONV_2D"),
    "max pooling": (lambda: network(layers.MaxPooling2D()), False, "MAX_POOL_2D"),
    "average pooling": (lambda: network(layers.AveragePooling2D(2)), False, "AVERAGE_POOL_2D"),
    "concatenation": (
        lambda: network(lambda x: pointwise(layers.Concatenate()([x, pointwise(x)]))),
        False,
        "CONCATENATION",
    ),
    "normalization behind ReLU": (lambda: network(layers.BatchNormalization()), False, "MUL"),
    "a constant": (lambda: network(_constant), False, "MUL"),
    "sign": (lambda: network(keras.ops.sign), False, "SIGN"),
    "added to itself": (lambda: network(lambda x: layers.Add()([x, x])), False, "ADD"),
    "odd image": (lambda: network(lambda x: depthwise(x, 2), size=42), False, "DEPTHWISE_CONV_2D"),
    "mean of rows": (lambda: network(end=_mean_of_rows), False, "MEAN"),
    "softmax amid": (lambda: network(layers.Softmax()), False, "SOFTMAX"),
    "nearest": (lambda: network(layers.UpSampling2D()), False, "TILE"),
    "cropping": (lambda: network(layers.Cropping2D(1)), False, "STRIDED_SLICE"),
    "flattened end": (lambda: network(end=lambda x: layers.Dense(10)(layers.Flatten()(x))), False, "RESHAPE"),
    "maximum as end": (
        lambda: network(end=lambda x: layers.Dense(10)(layers.GlobalMaxPooling2D()(x))),
        False,
        "REDUCE_MAX",
    ),
    "convolution as head": (lambda: network(end=_convolution_as_head), False, "CONV_2D"),
    "pooling with axes as output": (lambda: network(end=_pooled), False, "MEAN"),
    "ReLU behind pooling": (lambda: network(end=lambda x: layers.Flatten()(layers.ReLU()(_pooled(x)))), False, "RELU"),
    "attention, image as end": (lambda: network(_squeeze_and_excite, end=lambda x: x), False, "CONV_2D"),
    "image as output": (lambda: network(end=lambda x: [x, head(x)]), False, "CONV_2D"),
}
