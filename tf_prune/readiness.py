"""A model -> the same model in the form that sparse kernels need. Meant for before training."""

import dataclasses
import io
import warnings
from typing import Any

import keras
import numpy as np
from keras import layers
from rich.console import Console
from rich.table import Table

from tf_prune.batches import inputs_like
from tf_prune.enforcement import apply_masks
from tf_prune.evidence import masks_of
from tf_prune.layers import Masked, uncompiled
from tf_prune.prunable import EVERYTHING, check_model, find_kernels
from tf_prune.sparse_inference import Obstacle, explain
from tf_prune.xnnpack_operators import BY_MAKE_READY

_SPARSITY_ITSELF = ("sparsity", "encoding", "blocks")


@dataclasses.dataclass(frozen=True)
class Change:
    """What `make_ready` changed at one layer. `is_exact` says whether the outputs stay what they were."""

    where: str
    what: str
    is_exact: bool


@dataclasses.dataclass(frozen=True)
class ReadinessReport:
    """What `make_ready` did. `print(report)` shows it.

    Attributes:
        changes: Layer by layer.
        remaining: What keeps sparse kernels from running on ARM still, with what would help; not counting sparsity.
        is_trained: Whether the weights are known to be trained (by the optimizer's steps, or by the statistics of batch
            normalization).
        largest_difference: Of any output from the old model's, on four random inputs, relative to the largest output.
    """

    changes: tuple[Change, ...]
    remaining: tuple[Obstacle, ...]
    is_trained: bool
    largest_difference: float

    @property
    def is_ready(self) -> bool:
        """Whether nothing but sparsity is missing."""
        return not self.remaining

    def __str__(self) -> str:
        state = "ready: prune it, train it, export it" if self.is_ready else "not ready"
        table = Table(title=f"The model is {state}; {len(self.changes)} changes")
        for column in ("layer", "change", "outputs"):
            table.add_column(column, overflow="fold")
        for change in self.changes:
            table.add_row(change.where, change.what, "the same" if change.is_exact else "changed")
        remaining = Table(title="What could not be changed")
        for column in ("layer", "reason", "fix"):
            remaining.add_column(column, overflow="fold")
        for row in self.remaining:
            remaining.add_row(f"{row.where} {row.operator}".strip(), row.reason, row.fix)
        with io.StringIO() as stream:
            console = Console(file=stream, width=120)
            console.print(table)
            if self.remaining:
                console.print(remaining)
            if self.is_trained:
                difference = f"Outputs differ by up to {self.largest_difference:.2g} of the largest."
                console.print(f"The weights are trained. {difference} Train the new model further before use.")
            return stream.getvalue()


def make_ready(model: keras.Model) -> tuple[keras.Model, ReadinessReport]:
    """A new functional model whose sparse 1x1 convolutions XNNPACK will run, as far as that can be had.

    Changed are the paddings of the stem and of strided depthwise convolutions, which become the same on each side (they
    see the image shifted by a pixel, so trained weights need further training). Changed with outputs staying what they
    are: the squeezing of squeeze-and-excitation keeps its four axes, and the scalars in it get four; the last pooling
    keeps none, since XNNPACK computes wrongly what would read them, and 1x1 convolutions behind it become dense. Shapes
    of outputs, layers' names, weights, masks and the settings of `compile` are carried over; the optimizer starts anew.
    The model that is passed is not changed.

    Args:
        model: A built functional or Sequential `keras.Model` on images, channels last.

    Returns:
        The new model, and a `ReadinessReport` of what changed and of what could not be.

    Raises:
        ValueError: If the model is subclassed, or does not say the shape of its inputs.

    Warns:
        UserWarning: If weights are trained and outputs change, or if the new model cannot be compiled like the old one.

    Example:
        model, report = tf_prune.make_ready(keras.applications.MobileNetV2(weights=None, classes=10))
        print(report)
    """
    check_model(model)
    wrapped = [layer.name for layer in model._flatten_layers() if isinstance(layer, Masked)]
    if wrapped:
        raise ValueError(f"Layers are wrapped ({', '.join(wrapped[:3])}, ...). Call tf_prune.strip(model) first.")
    if not _is_functional(model):
        raise ValueError(
            f"make_ready lays a functional model anew, operator by operator; {model.name!r} is a "
            f"{type(model).__name__}, whose operators are in its code. Build it with keras.Model(inputs, outputs)."
        )
    rebuilding = _Rebuilding()
    with uncompiled(model):
        ready = rebuilding.rebuild(model)
    rebuilding.copy_weights()
    if model.compiled:
        _compile_like(model, ready)
    masks = masks_of(model)
    if masks:
        pairs = zip(find_kernels(model, EVERYTHING), find_kernels(ready, EVERYTHING).values(), strict=True)
        shapes = {path: variable.shape for path, variable in pairs}
        apply_masks(ready, {path: mask.reshape(shapes[path]) for path, mask in masks.items()})
    difference = _largest_difference(model, ready)
    report = ReadinessReport(
        tuple(rebuilding.changes),
        tuple(
            dataclasses.replace(row, fix=row.fix.removesuffix(BY_MAKE_READY))
            for row in explain(ready, "arm64").obstacles
            if row.kind not in _SPARSITY_ITSELF
        ),
        _is_trained(model),
        difference,
    )
    if report.is_trained and not all(change.is_exact for change in report.changes):
        warnings.warn(
            f"The weights of {model.name!r} are trained, and paddings changed: outputs differ by up to "
            f"{difference:.2g} of the largest. Train the new model further before use.",
            stacklevel=2,
        )
    return ready, report


def _compile_like(model: keras.Model, ready: keras.Model) -> None:
    """With the user's losses and metrics themselves, and a new optimizer of the same settings."""
    try:
        settings = dict(model._compile_config.config)
        optimizer = settings["optimizer"]
        if isinstance(optimizer, keras.optimizers.Optimizer):
            settings["optimizer"] = type(optimizer).from_config(optimizer.get_config())
        ready.compile(**settings)
    except Exception as error:
        warnings.warn(
            f"The new model is not compiled: what {model.name!r} was compiled with cannot be carried over "
            f"({type(error).__name__}: {error}). Compile it before you train it.",
            stacklevel=3,
        )


def _is_trained(model: keras.Model) -> bool:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and int(optimizer.iterations) > 0:
        return True
    statistics = (la.moving_mean for la in model._flatten_layers() if isinstance(la, layers.BatchNormalization))
    return any(np.asarray(mean).any() for mean in statistics)


def _largest_difference(old: keras.Model, new: keras.Model) -> float:
    generator = np.random.default_rng(0)
    inputs = inputs_like(old, lambda shape, dtype: generator.standard_normal((4, *shape)).astype(dtype))
    if inputs is None:
        raise ValueError(
            f"The model {old.name!r} does not fix the size of its inputs. XNNPACK's sparse kernels need it: build it "
            "with keras.Input(shape) of fixed sizes."
        )
    pairs = zip(
        keras.tree.flatten(old(inputs, training=False)), keras.tree.flatten(new(inputs, training=False)), strict=True
    )
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(a)).max(), 1e-30)) for a, b in pairs
    )


def _is_functional(layer: Any) -> bool:
    return isinstance(layer, keras.Sequential) or (isinstance(layer, keras.Model) and hasattr(layer, "operations"))


class _Rebuilding:
    """Clones a functional model operator by operator, with the changes that make it ready."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self._clones: dict[int, tuple[Any, Any]] = {}
        # By number of the new layer: what was taken out of the old one, to be put behind or before it.
        self._without_padding: set[int] = set()
        self._without_activation: set[int] = set()
        # Operations that give the model's outputs, by number of the old ones.
        self._last: set[int] = set()
        self._paddings: dict[int, keras.Layer] = {}

    def rebuild(self, model: keras.Model) -> keras.Model:
        if isinstance(model, keras.Sequential):
            model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
        self._last |= {id(tensor._keras_history.operation) for tensor in model.outputs}
        return keras.models.clone_model(model, clone_function=self._clone, call_function=self._call)

    def copy_weights(self) -> None:
        for old, new in self._clones.values():
            if not _is_functional(old):
                pairs = zip(old.get_weights(), new.weights, strict=True)
                new.set_weights([array.reshape(variable.shape) for array, variable in pairs])

    def _clone(self, operation: Any) -> Any:
        if not isinstance(operation, keras.Layer):
            return operation
        if id(operation) not in self._clones:
            self._clones[id(operation)] = operation, self._new(operation)
        return self._clones[id(operation)][1]

    def _new(self, layer: keras.Layer) -> keras.Layer:
        if _is_functional(layer):
            return self.rebuild(layer)
        if isinstance(layer, layers.Lambda):
            return layer  # It has no weights, and its code may not be written down.
        config = layer.get_config()
        if _is_head(layer):
            self.changes.append(Change(layer.name, "Dense in the place of a 1x1 convolution of one pixel", True))
            return _as_dense(layer)
        changes: list[tuple[set[int], dict[str, Any]]] = []
        if _is_strided(layer) and layer.padding == "same":
            changes.append((self._without_padding, {"padding": "valid"}))
        if _squeezed_hard_sigmoid(layer):
            changes.append((self._without_activation, {"activation": "linear"}))
        if isinstance(layer, layers.GlobalAveragePooling2D) and layer.keepdims and _is_end(layer):
            self.changes.append(Change(layer.name, "keepdims=False", True))
            changes.append((set(), {"keepdims": False}))
        for _, change in changes:
            config.update(change)
        new = type(layer).from_config(config)
        for noted, _ in changes:
            noted.add(id(new))
        return new

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and "inputs" in kwargs:
            args = (kwargs.pop("inputs"),)
        if _is_strided(operation):
            args = (self._padded(operation, args[0]), *args[1:])
        elif self._is_unsqueezing(operation, args):
            return self._with_axes_kept(args[0])
        elif type(operation).__name__ in ("Add", "Multiply") and not isinstance(operation, keras.Layer):
            args = self._with_four_axes(operation, args)
        specs = [spec for spec in keras.tree.flatten(getattr(operation, "input_spec", None)) if spec is not None]
        if any(4 in (spec.ndim, spec.min_ndim) for spec in specs) and len(args[0].shape) == 2:
            args = (layers.Reshape((1, 1, args[0].shape[-1]))(args[0]), *args[1:])
        outputs = operation(*args, **kwargs)
        if id(operation) in self._without_activation:
            self.changes.append(Change(operation.name, "constants of hard sigmoid with four axes", True))
            shifted = keras.ops.add(outputs, _four_axes(3, outputs))
            outputs = keras.ops.relu6(shifted) * _four_axes(1 / 6, outputs)
        return self._with_its_axes(operation, outputs)

    def _with_its_axes(self, operation: Any, outputs: Any) -> Any:
        """An output of the model has the axes that it had."""
        old = next((old for old, new in self._clones.values() if new is operation), operation)
        if id(old) not in self._last or keras.tree.is_nested(outputs):
            return outputs
        shape = old.output.shape[1:] if isinstance(old, keras.Layer) else outputs.shape[1:]
        if len(shape) != 3 or len(outputs.shape) != 2:
            return outputs
        return layers.Reshape(shape, name=f"{operation.name}_axes")(outputs)

    def _padded(self, layer: Any, image: Any) -> Any:
        """The image with the same padding on each side, if the layer's output keeps its size so; or else as it is."""
        half = layer.kernel_size[0] // 2
        if id(layer) in self._without_padding:
            source, what = image, "'same'"
            # Of odd sizes `same` pads evenly; and the converter writes it as `same` again.
            is_another = any(size is None or size % 2 == 0 for size in image.shape[1:3])
        else:
            before = image._keras_history.operation
            if type(before) is not layers.ZeroPadding2D or before.padding == ((half, half), (half, half)):
                return image
            source, what, is_another = before.input, f"ZeroPadding2D({before.padding})", True
            sizes = zip(source.shape[1:3], before.padding, strict=True)
            reach = 2 * half + 1
            if any(n is None or (n + sum(pads) - reach) // 2 != (n + 2 * half - reach) // 2 for n, pads in sizes):
                return image
        if is_another:
            self.changes.append(Change(layer.name, f"ZeroPadding2D({half}) in the place of {what}", False))
        # A layer that is called twice has one padding.
        padding = self._paddings.setdefault(id(layer), layers.ZeroPadding2D(half, name=f"{layer.name}_even_padding"))
        return padding(source)

    def _is_unsqueezing(self, operation: Any, args: tuple[Any, ...]) -> bool:
        """Whether it gives a squeezed image its axes back, for attention to the image."""
        if not isinstance(operation, layers.Reshape) or tuple(operation.target_shape[:2]) != (1, 1):
            return False
        pooling = args[0]._keras_history.operation
        if not isinstance(pooling, layers.GlobalAveragePooling2D) or pooling.keepdims:
            return False
        return any(new is pooling and not _is_end(old) for old, new in self._clones.values())

    def _with_axes_kept(self, pooled: Any) -> Any:
        pooling = pooled._keras_history.operation
        self.changes.append(Change(pooling.name, "keepdims=True in the place of Reshape", True))
        return layers.GlobalAveragePooling2D(keepdims=True, name=f"{pooling.name}_keepdims")(pooling.input)

    def _with_four_axes(self, operation: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        squeezed = [arg for arg in args if len(shape := getattr(arg, "shape", ())) == 4 and shape[1:3] == (1, 1)]
        if not squeezed or not any(isinstance(arg, (int, float)) for arg in args):
            return args
        self.changes.append(Change(operation.name, "a constant with four axes in the place of a scalar", True))
        return tuple(_four_axes(arg, squeezed[0]) if isinstance(arg, (int, float)) else arg for arg in args)


def _four_axes(number: float, beside: Any) -> np.ndarray:
    """XNNPACK takes a constant beside an image only with the axes of an image.

    With its channels, too: TensorFlow's optimizer of graphs swaps what is added to a bias with what the bias is added
    to, `(image + bias) + constant` becoming `(constant + bias) + image`, and fails where it has fewer channels.
    """
    return np.full((1, 1, 1, beside.shape[-1]), number, beside.dtype)


def _is_strided(layer: Any) -> bool:
    """Whether it is a stem, or a strided depthwise convolution, of a form that XNNPACK takes with even padding."""
    if not isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)):
        return False
    if layer.strides != (2, 2) or layer.dilation_rate != (1, 1) or layer.data_format != "channels_last":
        return False
    if isinstance(layer, layers.Conv2D):
        channels = layer.kernel.shape[2] if layer.built else 3
        return layer.kernel_size == (3, 3) and layer.groups == 1 and channels == 3
    return layer.kernel_size in ((3, 3), (5, 5)) and layer.depth_multiplier == 1


def _is_head(layer: Any) -> bool:
    """Whether it is a 1x1 convolution of one pixel that no image follows: the classifier of some networks."""
    if type(layer) is not layers.Conv2D or layer.kernel_size != (1, 1) or layer.strides != (1, 1) or layer.groups != 1:
        return False
    shape = getattr(layer.input, "shape", ()) if len(layer._inbound_nodes) == 1 else ()
    return len(shape) == 4 and shape[1:3] == (1, 1) and _is_end(layer)


def _as_dense(layer: Any) -> keras.Layer:
    config, kept = layer.get_config(), {}
    for name in ("name", "trainable", "dtype", "activation", "use_bias", "kernel_initializer", "bias_initializer"):
        kept[name] = config[name]
    for name in ("kernel_regularizer", "bias_regularizer", "activity_regularizer", "bias_constraint"):
        kept[name] = config[name]
    return layers.Dense.from_config({"units": layer.filters, **kept})


def _squeezed_hard_sigmoid(layer: Any) -> bool:
    if getattr(layer, "activation", None) is not keras.activations.hard_sigmoid:
        return False
    shape = getattr(layer.output, "shape", ()) if len(layer._inbound_nodes) == 1 else ()
    return len(shape) == 4 and shape[1:3] == (1, 1)


def _is_end(layer: keras.Layer) -> bool:
    """Whether no image follows, as it does where channels are squeezed for attention."""
    waiting, seen = [layer], set()
    while waiting:
        for node in waiting.pop()._outbound_nodes:
            if any(len(t.shape) == 4 and t.shape[1:3] != (1, 1) for t in node.outputs):
                return False
            if id(node.operation) not in seen:
                seen.add(id(node.operation))
                waiting.append(node.operation)
    return True
