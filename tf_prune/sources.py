"""What is exported, a Keras model or a SavedModel, seen alike: kernels, and inputs and outputs by name."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tf_prune.batches import Batches, inputs_like, why_no_inputs
from tf_prune.conversion import NOT_IN_TFLITE, batch_size_of, has_trained_ranges, signatures_of, write_saved_model
from tf_prune.effective import check_not_quantized, multiplied
from tf_prune.evidence import check_masks_hold, masks_of
from tf_prune.parity import Arrays
from tf_prune.placing import PREFIX
from tf_prune.precision import computing_in
from tf_prune.prunable import check_call, check_model, find_kernels, owners_of, weights_by_path


class KerasSource:
    """A Keras model as what is exported: its kernels, its inputs by name, and its outputs by name."""

    def __init__(self, model: keras.Model, batches: Batches):
        check_model(model)
        check_call(model, "An export")
        self._model, self._batches, self._owners = model, batches, owners_of(model)
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
        self._example = self._first_input()
        self._names: list[str] = []

    @property
    def kernels(self) -> dict[str, np.ndarray]:
        """The weights as the layers multiply by them now."""
        return {path: multiplied(self._owners.get(id(v)), v) for path, v in self.variables.items()}

    def write(self, folder: Path, batch_size: int | None = None) -> None:
        """Writes the SavedModel."""
        self._names = write_saved_model(self._model, self._example, folder, batch_size)

    def inputs(self) -> Iterator[Arrays]:
        """Batches of the data, or the random ones."""
        examples = (_as_inputs(self._model, x) for x, _, _ in self._batches)
        for x in examples if self._batches.given else [self._example]:
            yield dict(zip(self._names, keras.tree.flatten(x), strict=True))

    def outputs(self, inputs: Arrays) -> Arrays:
        """What Keras computes, in float32 like the file."""
        x = keras.tree.pack_sequence_as(self._example, [inputs[name] for name in self._names])
        with computing_in(self._model, "float32"):
            outputs = self._model(x, training=False)
        leaves = [np.asarray(leaf) for leaf in keras.tree.flatten(outputs)]
        keys = sorted(outputs) if isinstance(outputs, dict) else [f"output_{i}" for i in range(len(leaves))]
        return dict(zip(keys, leaves, strict=True))

    def _first_input(self) -> Any:
        """One batch of inputs: of the data, or random ones of the shape that the model says."""
        if self._batches.given:
            return _as_inputs(self._model, next(iter(self._batches.take(1)))[0])
        generator, size = np.random.default_rng(0), batch_size_of(self._model) or 32

        def random(shape: tuple[int, ...], dtype: str) -> np.ndarray:
            return generator.standard_normal((size, *shape)).astype(dtype)

        inputs = inputs_like(self._model, random)
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
        self.has_trained_ranges = has_trained_ranges(folder)
        variables = {v.name: v for v in self._function.variables if v.shape.rank >= 2 and v.dtype.is_floating}
        self.kernels = {name.removesuffix(":0"): v.numpy() for name, v in variables.items()}

    def write(self, folder: Path, batch_size: int | None = None) -> None:
        """Copies it."""
        # It may be the directory that is written into: then the folder to copy to is in it.
        shutil.copytree(self._folder, folder, ignore=shutil.ignore_patterns(f"{PREFIX}*"))

    def inputs(self) -> Iterator[Arrays]:
        """Batches of the data, or random ones of the signature's shapes."""
        if not self._batches.given:
            yield {name: self._random(spec) for name, spec in self._specs.items()}
        for x, _, _ in self._batches if self._batches.given else ():
            named = self._by_name(x)
            yield {name: self._checked(np.asarray(named[name]), spec) for name, spec in self._specs.items()}

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
        if None in shape[1:]:
            raise ValueError(f"The signature leaves sizes of its input open ({shape}). Pass data=(x, y) to fix them.")
        generator = np.random.default_rng(0)
        return generator.standard_normal((shape[0] or 32, *shape[1:])).astype(spec.dtype.as_numpy_dtype)

    def _checked(self, array: np.ndarray, spec: Any) -> np.ndarray:
        if not spec.shape.is_compatible_with(array.shape):
            raise ValueError(f"data has inputs of shape {array.shape}, the signature expects {spec.shape}.")
        return array.astype(spec.dtype.as_numpy_dtype, copy=False)

    def outputs(self, inputs: Arrays) -> Arrays:
        """What the signature computes."""
        tensors = {name: keras.ops.convert_to_tensor(array) for name, array in inputs.items()}
        return {name: tensor.numpy() for name, tensor in self._function(**tensors).items()}


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
