"""A Keras model as a SavedModel, open wherever the model is; and what a SavedModel serves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_prune.precision import computing_in
from tf_prune.quiet import quiet

SERVED = "serving_default"
Shape = tuple[int | None, ...]


def write_saved_model(
    model: keras.Model,
    examples: Any,
    directory: Path,
    shapes: Sequence[Shape] | None = None,
) -> list[str]:
    """Writes the plain model, each variable once, to serve under `serving_default`.

    It computes in float32, in whatever the model does: TF-Lite has few kernels for other floats.

    Args:
        model: A built `keras.Model`.
        examples: Inputs of the shapes and dtypes to serve, in the structure that the model takes.
        directory: The SavedModel.
        shapes: What it serves, one a leaf of the examples, `None` where a size is open; by default the batch's is.

    Returns:
        The names of the inputs, in the order of the flattened examples.
    """
    leaves = keras.tree.flatten(examples)
    names = [tensor.name for tensor in getattr(model, "inputs", None) or []]
    if len(set(names)) != len(leaves) or not all(name.isidentifier() for name in names):
        names = [f"input_{i}" for i in range(len(leaves))]

    specs = [
        tf.TensorSpec(shape, _dtype_of(leaf), name)
        for shape, leaf, name in zip(shapes or open_batch(leaves), leaves, names, strict=True)
    ]
    # An endpoint alone tracks the variables that it uses, once; Keras's own model.export writes each twice.
    archive = keras.export.ExportArchive()
    for table in _tables_of(model):
        archive.track(table)

    with computing_in(model, "float32"), quiet():
        signature = [keras.tree.pack_sequence_as(examples, specs)]
        archive.add_endpoint("serve", lambda inputs: _flat(model(inputs, training=False)), input_signature=signature)
        archive.write_out(str(directory), verbose=False)
    return names


def named_outputs(outputs: Any) -> dict[str, Any]:
    """A model's outputs by the names that a signature has for them."""
    leaves = keras.tree.flatten(outputs)
    if isinstance(outputs, dict) and len(outputs) == len(leaves):
        return {name: keras.tree.flatten(output)[0] for name, output in outputs.items()}
    return {f"output_{i}": leaf for i, leaf in enumerate(leaves)}


def _flat(outputs: Any) -> Any:
    """A signature has no dict of structures."""
    return named_outputs(outputs) if isinstance(outputs, dict) else outputs


def open_batch(leaves: Sequence[Any]) -> list[Shape]:
    """The shapes of arrays, with a batch of any size."""
    return [(None, *leaf.shape[1:]) for leaf in leaves]


def can_be_traced(model: keras.Model, examples: Any, shapes: Sequence[Shape]) -> bool:
    """Whether a graph of the model can be made with these sizes open; Python code that counts them cannot."""
    specs = [
        tf.TensorSpec(shape, _dtype_of(leaf)) for shape, leaf in zip(shapes, keras.tree.flatten(examples), strict=True)
    ]
    try:
        with computing_in(model, "float32"), quiet():
            tf.function(lambda inputs: model(inputs, training=False), autograph=False).get_concrete_function(
                keras.tree.pack_sequence_as(examples, specs)
            )
    except Exception:  # Whatever the code of a model makes of a size that is not known.
        return False
    return True


def signatures_of(saved_model: Path) -> dict[str, Any]:
    """The functions that a SavedModel serves, by name.

    Raises:
        ValueError: If the folder is no SavedModel.
    """
    check_is_saved_model(saved_model)
    with quiet():
        loaded = tf.saved_model.load(str(saved_model))
    # A signature works as long as what it was loaded with lives.
    functions = dict(loaded.signatures)
    for function in functions.values():
        function.kept_alive_by_tf_prune = loaded
    return functions


def call_signature(function: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a signature computes, by name."""
    tensors = {name: tf.constant(array) for name, array in inputs.items()}
    return {name: tensor.numpy() for name, tensor in function(**tensors).items()}


def has_trained_ranges(saved_model: Path) -> bool:
    """Whether quantization-aware training has put its ranges into a SavedModel."""
    return b"FakeQuantWithMinMaxVars" in (saved_model / "saved_model.pb").read_bytes()


def signature_names(saved_model: Path) -> set[str]:
    """The names of the signatures, without loading it."""
    from tensorflow.core.protobuf import saved_model_pb2

    content = saved_model_pb2.SavedModel()
    content.ParseFromString((saved_model / "saved_model.pb").read_bytes())
    return {name for graph in content.meta_graphs for name in graph.signature_def if not name.startswith("__")}


def check_is_saved_model(folder: Path) -> None:
    """Raises a ValueError if it is none."""
    if not (folder / "saved_model.pb").is_file():
        raise ValueError(f"Expected a SavedModel, a folder with saved_model.pb in it; got {folder}.")


def _dtype_of(leaf: Any) -> Any:
    return tf.string if leaf.dtype.kind in "OSU" else tf.as_dtype(leaf.dtype)


def _tables_of(model: keras.Model) -> list[Any]:
    """The tables that layers of text look words up in."""
    return [
        part
        for part in tf.train.TrackableView(model).descendants()
        if isinstance(part, tf.saved_model.experimental.TrackableResource)
    ]
