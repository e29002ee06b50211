"""The networks that the papers prune, each a function `(input_shape, num_classes) -> keras.Model`.

Every network returns logits, so that a loss is `from_logits=True`. Convolutions with stride 2 pad
by one pixel on every side, as the papers' own code does (Keras's `"same"` would pad one side only).

>>> build("lenet_300_100", (28, 28, 1), 10).count_params()
266610
"""

from collections.abc import Callable, Sequence

import keras
from keras import layers

# He et al. 2015, untruncated: what "Kaiming normal" means in GraSP, appendix, and in FORCE, appendix A.
HE_NORMAL = {
    "class_name": "VarianceScaling",
    "config": {"scale": 2.0, "mode": "fan_in", "distribution": "untruncated_normal"},
}


def _he_normal() -> keras.initializers.Initializer:
    return keras.initializers.get(HE_NORMAL)


def lenet_300_100(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """LeNet-300-100: 266,200 prunable weights on MNIST (Lee et al. 2019; LeCun-normal as there)."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Flatten(),
            layers.Dense(300, "relu", kernel_initializer="lecun_normal"),
            layers.Dense(100, "relu", kernel_initializer="lecun_normal"),
            layers.Dense(num_classes, kernel_initializer="lecun_normal"),
        ],
        name="lenet_300_100",
    )


def _mlp(activation: str, depth: int) -> Callable[[Sequence[int], int], keras.Model]:
    def mlp(input_shape: Sequence[int], num_classes: int) -> keras.Model:
        """Layers of 100 units, and a linear last one (Lee et al. 2020, section 3)."""
        hidden = [layers.Dense(100, activation) for _ in range(depth - 1)]
        name = f"mlp_{activation}_{depth}"
        return keras.Sequential(
            [keras.Input(input_shape), layers.Flatten(), *hidden, layers.Dense(num_classes)], name=name
        )

    return mlp


def gru(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """A GRU of 100 units over the rows of an image; Lee et al. 2020 do not give the size of theirs."""
    rows, columns, channels = input_shape
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Reshape((rows, columns * channels)),
            layers.GRU(100),
            layers.Dense(num_classes),
        ],
        name="gru",
    )


def lenet_5_caffe(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """LeNet-5-Caffe: 430,500 prunable weights on MNIST; no activation after the convolutions, as in Caffe."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(20, 5, kernel_initializer="lecun_normal"),
            layers.MaxPooling2D(),
            layers.Conv2D(50, 5, kernel_initializer="lecun_normal"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(500, "relu", kernel_initializer="lecun_normal"),
            layers.Dense(num_classes, kernel_initializer="lecun_normal"),
        ],
        name="lenet_5_caffe",
    )


def _conv_bn(x, filters: int, kernel_size: int = 3, strides: int = 1, activation: bool = True):
    if strides > 1 and kernel_size > 1:
        x = layers.ZeroPadding2D(kernel_size // 2)(x)
    x = layers.Conv2D(
        filters,
        kernel_size,
        strides,
        padding="valid" if strides > 1 else "same",
        use_bias=False,
        kernel_initializer=_he_normal(),
    )(x)
    # PyTorch's BatchNorm, which all papers use: momentum 0.1 of the new value, epsilon 1e-5.
    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
    return layers.ReLU()(x) if activation else x


def vgg19(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """VGG-19 with batch normalization and one dense layer: 20,024,000 prunable weights on CIFAR-10."""
    x = inputs = keras.Input(input_shape)
    for stage, widths in enumerate(([64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4)):
        if stage > 0:
            x = layers.MaxPooling2D(2)(x)
        for filters in widths:
            x = _conv_bn(x, filters)
    x = layers.AveragePooling2D(2)(x)
    x = layers.Flatten()(x)
    outputs = layers.Dense(num_classes, kernel_initializer=_he_normal())(x)
    return keras.Model(inputs, outputs, name="vgg19")


def _residual_block(x, filters: int, strides: int):
    shortcut = x
    y = _conv_bn(x, filters, strides=strides)
    y = _conv_bn(y, filters, activation=False)
    if strides != 1 or x.shape[-1] != filters:
        shortcut = _conv_bn(x, filters, kernel_size=1, strides=strides, activation=False)
    return layers.ReLU()(layers.Add()([y, shortcut]))


def _resnet(input_shape, num_classes, widths, blocks, name) -> keras.Model:
    inputs = keras.Input(input_shape)
    x = _conv_bn(inputs, widths[0])
    for stage, filters in enumerate(widths):
        for block in range(blocks):
            x = _residual_block(x, filters, strides=2 if stage > 0 and block == 0 else 1)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(num_classes, kernel_initializer=_he_normal())(x)
    return keras.Model(inputs, outputs, name=name)


def resnet32x2(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """ResNet-32 of doubled width (32, 64, 128): 1,855,584 prunable weights on CIFAR-10 (GraSP, section 5)."""
    return _resnet(input_shape, num_classes, (32, 64, 128), 5, "resnet32x2")


def resnet8(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """The same residual network with one block a stage and widths 16, 32, 64: 77,360 prunable weights on CIFAR-10."""
    return _resnet(input_shape, num_classes, (16, 32, 64), 1, "resnet8")


def resnet8_narrow(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """The same of half the width: 19,608 prunable weights on CIFAR-10."""
    return _resnet(input_shape, num_classes, (8, 16, 32), 1, "resnet8_narrow")


def _bottleneck_block(x, filters: int, strides: int):
    y = _conv_bn(x, filters, kernel_size=1)
    y = _conv_bn(y, filters, strides=strides)
    y = _conv_bn(y, 4 * filters, kernel_size=1, activation=False)
    shortcut = x
    if strides != 1 or x.shape[-1] != 4 * filters:
        shortcut = _conv_bn(x, 4 * filters, kernel_size=1, strides=strides, activation=False)
    return layers.ReLU()(layers.Add()([y, shortcut]))


def resnet50(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """ResNet-50 for small images, strides in the 3x3: 23,467,712 prunable weights on CIFAR-10 (FORCE, section 5)."""
    inputs = keras.Input(input_shape)
    x = _conv_bn(inputs, 64)
    for stage, (filters, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            x = _bottleneck_block(x, filters, strides=2 if stage > 0 and block == 0 else 1)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(num_classes, kernel_initializer=_he_normal())(x)
    return keras.Model(inputs, outputs, name="resnet50")


def _separable_block(x, filters: int, strides: int):
    if strides > 1:
        x = layers.ZeroPadding2D(1)(x)
    padding = "valid" if strides > 1 else "same"
    x = layers.DepthwiseConv2D(3, strides, padding, use_bias=False, depthwise_initializer=_he_normal())(x)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))
    return _conv_bn(x, filters, kernel_size=1)


def _mobilenet_v1(input_shape, num_classes, strides, name) -> keras.Model:
    inputs = keras.Input(input_shape)
    x = _conv_bn(inputs, 32, strides=strides[0])
    widths = [64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    for filters, stride in zip(widths, strides[1:], strict=True):
        x = _separable_block(x, filters, stride)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(num_classes, kernel_initializer=_he_normal())(x)
    return keras.Model(inputs, outputs, name=name)


def mobilenet_v1(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """MobileNet-V1 for small images, stem without strides: 3,195,328 prunable weights on CIFAR-10 (Lubana and Dick)."""
    strides = (1, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    return _mobilenet_v1(input_shape, num_classes, strides, "mobilenet_v1")


def mobilenet_v1_ready(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """The same with the first strides in the stem, as XNNPACK's sparse kernels need it; as many weights."""
    strides = (2, 1, 1, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    return _mobilenet_v1(input_shape, num_classes, strides, "mobilenet_v1_ready")


def digits_convnet(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """A small convolutional network for 8x8 images, with batch normalization: 60,688 prunable weights."""
    x = inputs = keras.Input(input_shape)
    x = _conv_bn(x, 16)
    x = _conv_bn(x, 32)
    x = layers.MaxPooling2D()(x)
    x = _conv_bn(x, 64)
    x = _conv_bn(x, 64)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(num_classes, kernel_initializer=_he_normal())(x)
    return keras.Model(inputs, outputs, name="digits_convnet")


def digits_mobilenet(input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """A small MobileNet for 8x8 images, of a form that XNNPACK runs sparse on ARM: 13,472 prunable weights.

    XNNPACK's stem has strides 2 and three channels, so the images are enlarged and their channel is repeated.
    """
    inputs = keras.Input(input_shape)
    x = layers.UpSampling2D(2, interpolation="bilinear")(inputs)
    x = _conv_bn(layers.Concatenate()([x, x, x]), 16, strides=2)
    for filters in (32, 64, 128):
        x = _separable_block(x, filters, strides=1)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(num_classes, kernel_initializer=_he_normal())(x)
    return keras.Model(inputs, outputs, name="digits_mobilenet")


MODELS: dict[str, Callable[[Sequence[int], int], keras.Model]] = {
    "digits_convnet": digits_convnet,
    "digits_mobilenet": digits_mobilenet,
    "lenet_300_100": lenet_300_100,
    "lenet_5_caffe": lenet_5_caffe,
    **{
        f"mlp_{activation}_{depth}": _mlp(activation, depth) for activation in ("linear", "tanh") for depth in (3, 5, 7)
    },
    "gru": gru,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v1_ready": mobilenet_v1_ready,
    "resnet8_narrow": resnet8_narrow,
    "resnet8": resnet8,
    "resnet32x2": resnet32x2,
    "resnet50": resnet50,
    "vgg19": vgg19,
}


def build(name: str, input_shape: Sequence[int], num_classes: int) -> keras.Model:
    """Builds the network called `name`, with a new draw of its weights (`keras.utils.set_random_seed` seeds it)."""
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}. Expected one of {', '.join(MODELS)}.")
    return MODELS[name](tuple(input_shape), num_classes)
