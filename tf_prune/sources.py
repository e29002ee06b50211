"""What is exported, a Keras model or a SavedModel, seen alike: kernels, and inputs and outputs by name."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_prune.batches import Batches, inputs_like, why_no_inputs
from tf_prune.conversion import NOT_IN_TFLITE
from tf_prune.effective import check_not_quantized, multiplied
from tf_prune.evidence import check_masks_hold, masks_of
from tf_prune.examples import rows, size_of
from tf_prune.open_sizes import at_other_sizes, batch_size_of, open_shapes, stated_shapes
from tf_prune.parity import Arrays
from tf_prune.placing import PREFIX
from tf_prune.precision import computing_in
from tf_prune.prunable import check_call, check_model, find_kernels, owners_of, weights_by_path
from tf_prune.saved_model import (
    Shape,
    call_signature,
    has_trained_ranges,
    named_outputs,
    signatures_of,
    write_saved_model,
)

# So many examples are run at once: whole test sets come as one batch.
_AT_ONCE = 128


class KerasSource:
    """A Keras model as what is exported: its kernels, its inputs by name, and its outputs by name.

    Args:
        model: A built `keras.Model`.
        batches: The data.
        input_shape: Sizes of one example to make inputs of where there is no data, in the structure of the inputs.

    Attributes:
        layers: Name -> class.
        variables: Path -> variable of what is counted as kernels.
        shapes: What the SavedModel takes, `None` where a size is open.
        notes: What could not be as it should, a sentence each.
    """

    def __init__(self, model: keras.Model, batches: Batches, input_shape: Any = None):
        check_model(model)
        check_call(model, "An export")
        self._model, self._batches, self._owners = model, batches, owners_of(model)
        self.has_trained_ranges = False
        self.layers = {layer.name: type(layer).__name__ for layer in model._flatten_layers(include_self=False)}
        check_not_quantized(model, *NOT_IN_TFLITE)
        check_masks_hold(model)
        masks = masks_of(model)
        # Tables of embeddings, biases, and what is no kernel that is known, count where they were pruned.
        plain = find_kernels(model, ())
        kernels = {path: v for path, v in weights_by_path(model).items() if path in masks or path in plain}
        _check_weights(model)
        _check_forgets(model)
        self.variables = kernels
        self._example = self._first_input(input_shape)
        self._leaves = keras.tree.flatten(self._example)
        self.shapes, is_all = open_shapes(model, self._example)
        self.notes: tuple[str, ...] = ()
        if not is_all:
            sizes = ", ".join(str(shape[1:]) for shape in self.shapes)
            self.notes = (
                f"The SavedModel takes examples of shape {sizes} alone: the model takes others too, but TensorFlow "
                "cannot make a graph of it with open sizes.",
            )
        self._names: list[str] = []

    @property
    def kernels(self) -> dict[str, np.ndarray]:
        """The weights as the layers multiply by them now."""
        return {path: multiplied(self._owners.get(id(v)), v) for path, v in self.variables.items()}

    def shapes_for_tf_lite(self, batch_size: int | None, is_open: bool) -> list[Shape]:
        """What the TF-Lite file takes: what the model says where it says something, and else as the SavedModel.

        Args:
            batch_size: The batch's, or `None` for any.
            is_open: Whether sizes that are open stay so; else they are those of the data.
        """
        stated = stated_shapes(self._model, self._leaves) or self.shapes
        return [
            (
                said[0] if batch_size is None else batch_size,
                *(n or (size if is_open else m) for n, size, m in zip(said[1:], own[1:], leaf.shape[1:], strict=True)),
            )
            for said, own, leaf in zip(stated, self.shapes, self._leaves, strict=True)
        ]

    def write(self, folder: Path, shapes: list[Shape] | None = None) -> None:
        """Writes the SavedModel, or one that takes just these shapes."""
        self._names = write_saved_model(self._model, self._example, folder, shapes or self.shapes)

    def inputs(self, shapes: list[Shape] | None = None) -> Iterator[Arrays]:
        """Batches of the data, or the random ones; of these shapes and no others, if there are any given."""
        examples = (_as_inputs(self._model, x) for x, _, _ in self._batches)
        size = self.shapes[0][0]
        for x in examples if self._batches.given else [self._example]:
            _check_shapes(keras.tree.flatten(x), shapes)
            end = size_of(x) if size is None else size_of(x) // size * size
            for begin in range(0, end, size or _AT_ONCE):
                yield self._named(rows(x, begin, begin + (size or _AT_ONCE)))

    def at_other_sizes(self, shapes: list[Shape]) -> Iterator[Arrays]:
        """A few inputs of other sizes, of those that are open in the shapes."""
        return map(self._named, at_other_sizes(self._call, self._example, _but_batch(shapes)))

    def outputs(self, inputs: Arrays) -> Arrays:
        """What Keras computes, in float32 like the file."""
        x = keras.tree.pack_sequence_as(self._example, [inputs[name] for name in self._names])
        return {name: np.asarray(output) for name, output in named_outputs(self._call(x)).items()}

    def _call(self, x: Any) -> Any:
        with computing_in(self._model, "float32"):
            return self._model(x, training=False)

    def _named(self, x: Any) -> Arrays:
        return dict(zip(self._names, keras.tree.flatten(x), strict=True))

    def _first_input(self, input_shape: Any) -> Any:
        """One batch of inputs: of the data, or random ones of the shape that the model or `input_shape` says."""
        wanted = None if input_shape is None else _flat_shapes(self._model, input_shape)
        if self._batches.given:
            example = _as_inputs(self._model, next(iter(self._batches.take(1)))[0])
            _check_shapes(keras.tree.flatten(example), wanted and [(None, *shape) for shape in wanted])
            # What a Sequential model says may only be the size of its first batch.
            fixed = (not isinstance(self._model, keras.Sequential) and batch_size_of(self._model)) or _AT_ONCE
            if fixed != _AT_ONCE and size_of(example) < fixed:
                raise ValueError(
                    f"{self._model.name!r} takes batches of {fixed} examples, and data has fewer, {size_of(example)}. "
                    "Pass whole batches; or build it with keras.Input(shape), which leaves their size open."
                )
            return rows(example, None, fixed)
        generator, size = np.random.default_rng(0), batch_size_of(self._model) or 32

        def random(shape: tuple[int, ...], dtype: str) -> np.ndarray:
            return generator.standard_normal((size, *shape)).astype(dtype)

        inputs = inputs_like(self._model, random, wanted)
        if inputs is None:
            raise ValueError(
                f"The model {self._model.name!r} {why_no_inputs(self._model)}. Pass data=(x, y): x gives the shape, "
                "and real inputs to compare on."
            )
        return inputs


class SavedModelSource:
    """A signature of a SavedModel as what is exported; its variables stand for kernels."""

    def __init__(self, folder: Path, signature: str, batches: Batches):
        signatures = signatures_of(folder)
        if signature not in signatures:
            raise ValueError(f"{folder} has no signature {signature!r}. It has: {', '.join(sorted(signatures))}.")
        self._folder, self._function, self._batches = folder, signatures[signature], batches
        self._specs = self._function.structured_input_signature[1]
        self.layers: dict[str, str] = {}
        self.variables: dict[str, keras.Variable] = {}  # none that a sweep could change
        self.notes: tuple[str, ...] = ()
        self.has_trained_ranges = has_trained_ranges(folder)
        variables = {v.name: v for v in self._function.variables if v.shape.rank >= 2 and v.dtype.is_floating}
        self.kernels = {name.removesuffix(":0"): v.numpy() for name, v in variables.items()}
        self.shapes: list[Shape] = [tuple(spec.shape.as_list()) for spec in self._specs.values()]

    def shapes_for_tf_lite(self, batch_size: int | None, is_open: bool) -> list[Shape]:
        """Those of the signature."""
        return self.shapes

    def write(self, folder: Path, shapes: list[Shape] | None = None) -> None:
        """Copies it."""
        # It may be the directory that is written into: then the folder to copy to is in it.
        shutil.copytree(self._folder, folder, ignore=shutil.ignore_patterns(f"{PREFIX}*"))

    def inputs(self, shapes: list[Shape] | None = None) -> Iterator[Arrays]:
        """Batches of the data, or random ones of the signature's shapes."""
        if not self._batches.given:
            yield {name: self._random(spec) for name, spec in self._specs.items()}
        for x, _, _ in self._batches if self._batches.given else ():
            named = self._by_name(x)
            whole = {name: self._checked(np.asarray(named[name]), spec) for name, spec in self._specs.items()}
            for begin in range(0, size_of(whole), _AT_ONCE):
                yield rows(whole, begin, begin + _AT_ONCE)

    def at_other_sizes(self, shapes: list[Shape]) -> Iterator[Arrays]:
        """A few inputs of other sizes, of those that the signature leaves open."""
        return at_other_sizes(self.outputs, next(self.inputs()), _but_batch(shapes))

    def _by_name(self, x: Any) -> dict[str, Any]:
        """The inputs by the signature's names, which are in no order."""
        leaves = keras.tree.flatten(x)
        if not isinstance(x, dict) and len(leaves) == len(self._specs) == 1:
            return dict(zip(self._specs, leaves, strict=True))
        expected, given = ", ".join(sorted(self._specs)), "no names"
        if isinstance(x, dict):
            if self._specs.keys() <= x.keys():
                return x
            given = ", ".join(sorted(x))
        raise ValueError(f"data must be {{name: array}} with the signature's inputs {expected}; got {given}.")

    def _random(self, spec: Any) -> np.ndarray:
        shape = spec.shape.as_list()
        if None in shape[1:] or spec.dtype == "string":
            what = "takes strings" if spec.dtype == "string" else f"leaves sizes of its input open ({shape})"
            raise ValueError(f"The signature {what}. Pass data=(x, y) with real inputs.")
        generator = np.random.default_rng(0)
        return generator.standard_normal((shape[0] or 32, *shape[1:])).astype(spec.dtype.as_numpy_dtype)

    def _checked(self, array: np.ndarray, spec: Any) -> np.ndarray:
        if not spec.shape.is_compatible_with(array.shape):
            raise ValueError(f"data has inputs of shape {array.shape}, the signature expects {spec.shape}.")
        return array if spec.dtype == "string" else array.astype(spec.dtype.as_numpy_dtype, copy=False)

    def outputs(self, inputs: Arrays) -> Arrays:
        """What the signature computes."""
        return call_signature(self._function, inputs)


def _flat_shapes(model: keras.Model, input_shape: Any) -> list[Any]:
    """One shape an input, in their order."""
    if isinstance(input_shape, (tuple, list)) and all(isinstance(size, int) for size in input_shape):
        input_shape = [tuple(input_shape)]
    given = [input_shape[key] for key in sorted(input_shape)] if isinstance(input_shape, dict) else input_shape
    shapes = [tuple(shape) for shape in given]
    said = [tensor.shape[1:] for tensor in getattr(model, "inputs", None) or []] or shapes
    fits = len(shapes) == len(said) and all(
        len(own) == len(shape) and all(map(_fits, own, shape)) for own, shape in zip(said, shapes, strict=True)
    )
    if not fits:
        raise ValueError(
            f"input_shape is the shape of one example, without the batch, or one for each input; got {input_shape!r}, "
            f"but {model.name!r} takes {', '.join(map(str, said))}."
        )
    return shapes


def _fits(stated: int | None, size: Any) -> bool:
    return isinstance(size, int) and size > 0 and stated in (None, size)


def _but_batch(shapes: list[Shape]) -> list[Shape]:
    return [(0, *shape[1:]) for shape in shapes]


def _check_shapes(leaves: list[np.ndarray], shapes: list[Shape] | None) -> None:
    for leaf, shape in zip(leaves, shapes or [], strict=False):
        if any(size not in (None, own) for size, own in zip(shape[1:], leaf.shape[1:], strict=True)):
            raise ValueError(
                f"data has inputs of shape {leaf.shape}, but the TF-Lite file takes examples of just one shape here, "
                f"{shape[1:]}. Pass data of that shape, padded or cropped to it; input_shape= says another one."
            )


def _check_weights(model: keras.Model) -> None:
    for variable in model.weights:
        array = np.asarray(variable)
        if keras.backend.is_float_dtype(variable.dtype) and not np.isfinite(array).all():
            raise ValueError(
                f"{variable.path!r} holds NaN or infinity, so the outputs would mean nothing. Train with a smaller "
                "learning rate, or load weights from before it happened."
            )


def _check_forgets(model: keras.Model) -> None:
    for layer in model._flatten_layers(include_self=False):
        if getattr(layer, "stateful", False):
            raise ValueError(
                f"{layer.name!r} is stateful: what it answers depends on earlier calls, so outputs cannot be compared. "
                "Build it with stateful=False and load the weights; a state can be an input and an output of the model."
            )


def _as_inputs(model: keras.Model, x: Any) -> Any:
    """The examples in the dtypes that the model takes: NumPy's float64 is not what a file should ask for."""
    leaves = [np.asarray(leaf) for leaf in keras.tree.flatten(x)]
    tensors = getattr(model, "inputs", None) or []
    dtypes = [tensor.dtype for tensor in tensors]
    if len(dtypes) != len(leaves):
        dtypes = [keras.config.floatx() if leaf.dtype == np.float64 else leaf.dtype for leaf in leaves]
    for tensor, leaf in zip(tensors, leaves, strict=False):
        sizes = zip(tensor.shape[1:], leaf.shape[1:], strict=False)
        if len(tensor.shape) != leaf.ndim or any(a not in (None, b) for a, b in sizes):
            raise ValueError(
                f"data has inputs of shape {leaf.shape}, but {model.name!r} takes (batch, "
                f"{', '.join(map(str, tensor.shape[1:]))}). Pass data=(x, y) with x as the model takes it."
            )
    converted = [a if d == "string" else a.astype(d, copy=False) for a, d in zip(leaves, dtypes, strict=True)]
    return keras.tree.pack_sequence_as(x, converted)
