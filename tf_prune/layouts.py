"""What a variable is to its layer, and how the axes of a kernel lie: the one list of Keras's layers."""

import re

import keras
from keras import layers

# Keras does not export the cell of the layers ConvLSTM1D, 2D and 3D.
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell

from tf_prune.structures import Kind, Layout

TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
CELLS = (layers.GRUCell, layers.LSTMCell, layers.SimpleRNNCell, ConvLSTMCell)
_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)

# A subclass counts as its parent: a layer of the user's own that extends Dense is prunable.
_KERNELS: list[tuple[tuple[type, ...], dict[str, Kind]]] = [
    (_SEPARABLE, {"depthwise_kernel": "depthwise", "pointwise_kernel": "convolution", "bias": "bias"}),
    ((ConvLSTMCell,), {"kernel": "convolution", "recurrent_kernel": "convolution"}),
    (CELLS, {"kernel": "recurrent", "recurrent_kernel": "recurrent"}),
    (_DEPTHWISE, {"kernel": "depthwise", "bias": "bias"}),
    ((*_CONVOLUTIONS, *TRANSPOSED), {"kernel": "convolution", "bias": "bias"}),
    ((layers.Dense, layers.EinsumDense), {"kernel": "dense", "bias": "bias"}),
    # Untied, a ReversibleEmbedding goes back by a dense kernel of its own.
    ((layers.ReversibleEmbedding,), {"embeddings": "embedding", "reverse_embeddings": "dense"}),
    ((layers.Embedding,), {"embeddings": "embedding"}),
    ((layers.STFTSpectrogram,), {"real_kernel": "convolution", "imag_kernel": "convolution"}),
]
# Their scales can have several axes.
_ELEMENTWISE = (
    layers.PReLU,
    layers.BatchNormalization,
    layers.GroupNormalization,
    layers.LayerNormalization,
    layers.RMSNormalization,
)


def kind_of(layer: keras.Layer, variable: keras.Variable) -> Kind | None:
    """What this variable is to its layer; `None` if the list does not say."""
    kinds = next((kinds for classes, kinds in _KERNELS if isinstance(layer, classes)), {})
    return kinds.get(variable.name)


def why_no_kernel(layer: keras.Layer, variable: keras.Variable) -> str | None:
    """Why a variable that is not on the list is no kernel either; `None` if it may be one of a layer of one's own."""
    is_state = any(variable is one for one in layer._non_trainable_variables)
    if is_state and variable.name.endswith("_mask"):
        return "a mask"
    if len(variable.shape) < 2 or variable.name == "bias" or is_state or isinstance(layer, _ELEMENTWISE):
        return "a bias, scale, statistic or state: not a connection between units"
    if variable.name.startswith("lora_") and getattr(layer, "lora_enabled", False):
        return "a factor of LoRA: its product is added to the kernel"
    return None


def _einsum_axes(equation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the kernel that the input has, and those that the output has, in their order there.

    What both have counts copies: each expert, or head, has a map of its own.
    """
    inputs, kernel, output = re.split(",|->", equation.replace(" ", ""))
    read, made = (tuple(kernel.index(letter) for letter in part if letter in kernel) for part in (inputs, output))
    return read, made


def layout_of(layer: keras.Layer, variable: keras.Variable, is_last: bool) -> Layout:
    """How the axes of a kernel lie. One of a layer that is not on the list has its inputs and outputs last."""
    kind = kind_of(layer, variable) or "other"
    shape = tuple(variable.shape)
    inputs: tuple[int, ...] = (len(shape) - 2,)
    outputs: tuple[int, ...] = (len(shape) - 1,)
    view, copies = shape, tuple[int, ...]()
    if kind == "bias":
        inputs = ()
    elif isinstance(layer, CELLS) and kind != "other":
        units = layer.filters if isinstance(layer, ConvLSTMCell) else layer.units
        view = (*shape[:-1], shape[-1] // units, units)
        copies, outputs = (len(shape) - 1,), (len(shape),)
    elif kind == "depthwise":
        outputs = (len(shape) - 2, len(shape) - 1)
    elif isinstance(layer, layers.EinsumDense) and kind == "dense":
        inputs, outputs = _einsum_axes(layer.equation)
    elif isinstance(layer, TRANSPOSED) and kind == "convolution":
        inputs, outputs = outputs, inputs
    elif kind == "convolution" and getattr(layer, "groups", 1) > 1:
        # (window, inputs of a group, groups, outputs of a group)
        view = (*shape[:-1], layer.groups, shape[-1] // layer.groups)
        inputs, outputs = (len(shape) - 1, len(shape) - 2), (len(shape) - 1, len(shape))
    return Layout(kind, shape, view, inputs, outputs, is_last, copies)
