"""What a network does to a signal: spectra of its Jacobians, from its input to its logits and layer by layer."""

import dataclasses
import itertools
import re
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_prune.batches import Batches
from tf_prune.calls import Call, floats, layer_called, layers_with_kernels, on_logits, only_call, watched
from tf_prune.effective import check_not_quantized
from tf_prune.evidence import check_masks_hold
from tf_prune.examples import as_numpy
from tf_prune.noise import check_no_state, noise_off, why_not_repeatable
from tf_prune.precision import computing_in_float64, first_below_float64
from tf_prune.prunable import Filters, Include, check_call, check_include, check_model, matches
from tf_prune.spectrum import Spectrum, singular_values

_MOST_ENTRIES = 2**22  # of the Jacobians that are computed at once: 32 MiB
_MOST_OF_ONE = 2**27  # of one of them: 1 GiB


def jacobian_spectrum(
    model: keras.Model, data: Any, *, start: str | None = None, end: str | None = None, verbose: int = 1
) -> Spectrum:
    """Singular values of the Jacobian `J = ∂ end / ∂ start` at every example.

    Without names it is the input-output Jacobian of the logits: of what enters a final softmax or sigmoid of Keras. (Of
    a softmax that something follows, or in `TimeDistributed`, nothing is known: `end=` names the layer before.) Batch
    normalization uses its moving statistics, dropout is off, nothing of the model changes. All is computed in float64
    from the weights as they are, whatever precision the model trains in, so that condition numbers up to 1e12 are true.

    Args:
        model: A built `keras.Model`, dense, pruned or `Masked`. Several inputs count as one long vector, and so does an
            output that is a sequence or an image.
        data: Inputs `x`, an `(x, y)` batch or an iterable of either; labels are not used. Streamed: what is kept of
            an example is its singular values.
        start: Name of the layer whose output to derive by; `None` is the model's input.
        end: Name of the layer whose output to derive, of a softmax what enters it; `None` is the logits.
        verbose: 1 shows a progress bar.

    Returns:
        A `Spectrum`.

    Raises:
        ValueError: If there is no derivative (integer inputs, several outputs, layers that are not connected), if
            something on the way computes in less than float64, draws random numbers or writes a variable, or if the
            Jacobian of one example is too large or not finite; says what to do.

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, kernel_initializer="orthogonal")])
    >>> spectrum = jacobian_spectrum(model, np.ones((5, 8)), verbose=0)
    >>> spectrum.values.shape, round(spectrum.pooled_condition_number, 4)
    ((5, 4), 1.0)

    Source: Lee et al. 2020, Eq. 3 and Table 2; the logits and the pooling are those of their code.
    """
    check_model(model)
    check_masks_hold(model)
    check_not_quantized(model, "A spectrum is taken in float64", "Measure the model before model.quantize.")
    check_call(model, "A Jacobian")
    layers = {name: layer_called(model, name) for name in (start, end) if name is not None}

    def ends(calls: list[Call], inputs: list[tf.Tensor], outputs: Any) -> list["_Segment"]:
        source = inputs if start is None else only_call(calls, layers[start]).outputs
        target = _logits(model, outputs) if end is None else on_logits(only_call(calls, layers[end]).outputs)
        return [_Segment(start or "inputs", end or "logits", source, target, [])]

    return _spectra(model, data, list(layers.values()), ends, start is None, verbose)[0]


def layerwise_spectra(
    model: keras.Model, data: Any, *, filters: Filters = None, include: Include = (), verbose: int = 1
) -> dict[str, Spectrum]:
    """Singular values of the Jacobian `J^{l-1,l}` of each layer that has kernels, by the layer's name.

    `J^{l-1,l} = D^l W^l`: from the layer's input to the input of the next such layer that is called, with all that lies
    between (activation, normalization, pooling); of the last one to the logits. In a chain their product is the
    input-output Jacobian. A layer that does not lead to the next one, as beside a shortcut, is measured to its own
    output. Several inputs or outputs of a layer count as one long vector. Layerwise dynamical isometry is an
    `isometry_gap` near 0 of each.

    Args:
        model: As in `jacobian_spectrum`. A layer that is called several times is there as `name`, `name@2`, ...
        data: As in `jacobian_spectrum`; a few examples say much, and Jacobians of convolutions are large: one of
            1024 x 1024 takes seconds.
        filters: Which layers; see `find_prunable`. One that is left out belongs to the layer before it.
        include: Whose weights count as kernels, too, such as those of layers of one's own; see `find_prunable`.
        verbose: 1 shows a progress bar.

    Returns:
        Dict of `Spectrum`s in the order of the calls; `keras.Model`s inside are opened, other composite layers are not.

    Raises:
        ValueError: As in `jacobian_spectrum`.

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(4)])
    >>> [spectrum.shape for spectrum in layerwise_spectra(model, np.ones((5, 8)), verbose=0).values()]
    [(6, 8), (4, 6)]

    Source: Lee et al. 2020, Eq. 6 and Sec. 4.1.2.
    """
    check_model(model)
    check_masks_hold(model)
    check_not_quantized(model, "A spectrum is taken in float64", "Measure the model before model.quantize.")
    check_call(model, "A Jacobian")
    found = dict.fromkeys(layers_with_kernels(model, check_include(model, include)))
    layers = [layer for layer in found if matches(layer, filters)]
    if not layers:
        raise ValueError(f"The model {model.name!r} has no layer with kernels that filters={filters!r} chooses.")

    def chain(calls: list[Call], inputs: list[tf.Tensor], outputs: Any) -> list["_Segment"]:
        following = [call.inputs for call in calls[1:]] + [_logits(model, outputs)]
        names = [f"the input of {call.layer.name}" for call in calls[1:]] + ["logits"]
        return [
            _Segment(call.layer.name, name, call.inputs, target, on_logits(call.outputs))
            for call, target, name in zip(calls, following, names, strict=True)
        ]

    spectra: dict[str, Spectrum] = {}
    for spectrum in _spectra(model, data, layers, chain, False, verbose):
        count = sum(other.start == spectrum.start for other in spectra.values())
        spectra[spectrum.start if count == 0 else f"{spectrum.start}@{count + 1}"] = spectrum
    return spectra


# -- where a Jacobian begins and ends ---------------------------------------------------------------


@dataclasses.dataclass
class _Segment:
    """From where to where a Jacobian goes; it ends at `through` if that does not lead to `target`."""

    start: str
    end: str
    source: list[tf.Tensor]
    target: list[tf.Tensor]
    through: list[tf.Tensor]


def _logits(model: keras.Model, outputs: Any) -> list[tf.Tensor]:
    leaves = keras.tree.flatten(outputs)
    if len(leaves) != 1:
        raise ValueError(
            f"The model {model.name!r} has {len(leaves)} outputs, and a Jacobian is of one. Name the layer that makes "
            "it by end=..., or measure keras.Model(model.inputs, that output)."
        )
    return on_logits(floats(leaves))


def _flat(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """Several tensors as one vector an example, in a list; an empty list stays empty."""
    flat = [tf.reshape(tensor, [-1, int(np.prod(tensor.shape[1:]))]) for tensor in tensors]
    return [tf.concat(flat, 1)] if len(flat) > 1 else flat


# -- what is computed ---------------------------------------------------------------------------------


class _Traced:
    """Some Jacobians as one compiled function of a batch of inputs; called, it gives their singular values."""

    def __init__(self, model: keras.Model, layers: list[keras.Layer], segments: Any, by_inputs: bool, x: Any):
        self._model = model
        self._layers = layers
        self._segments = segments
        self._by_inputs = by_inputs
        self._shapes = [leaf.shape[1:] for leaf in keras.tree.flatten(x)]
        self.found: list[tuple[str, str, tuple[int, int]]] = []
        check_no_state(model)
        specs = keras.tree.map_structure(lambda leaf: tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype), x)
        try:
            with noise_off(model):
                self._function = tf.function(self._jacobians, autograph=False).get_concrete_function(specs)
        except (tf.errors.OpError, TypeError) as error:
            raise ValueError(
                f"The model {model.name!r} cannot be computed in float64 on these inputs: {_cause(error)}. Check that "
                "x fits the model, that no layer of its own asks for float32, and that none is quantized."
            ) from error

    def __call__(self, x: Any) -> list[np.ndarray]:
        shapes = [leaf.shape[1:] for leaf in keras.tree.flatten(x)]
        if shapes != self._shapes:
            raise ValueError(
                f"A batch has examples of shape {shapes}, the first one of {self._shapes}: Jacobians of one spectrum "
                "have one shape. Pad the examples, or measure those of each shape by themselves."
            )
        jacobians = self._function(*[keras.tree.map_structure(tf.convert_to_tensor, x)])
        return [singular_values(np.asarray(memoryview(jacobian))) for jacobian in jacobians]

    def _jacobians(self, x: Any) -> list[tf.Tensor]:
        inputs = floats(x)
        if self._by_inputs and len(inputs) < len(keras.tree.flatten(x)):
            raise ValueError(
                f"The model {self._model.name!r} takes integers or booleans, and nothing can be derived by them. Begin "
                "behind the layer that takes them: start=its name, such as that of the embedding."
            )
        calls: list[Call] = []
        with (
            tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape,
            computing_in_float64(self._model),
            watched(self._layers, tape, calls),
            keras.StatelessScope(),
        ):
            tape.watch(inputs)
            outputs = self._model(x, training=False)
            segments = self._segments(calls, inputs, outputs)
            ends = [(_flat(segment.target), _flat(segment.through)) for segment in segments]
        jacobians = [self._of_segment(tape, segment, *end) for segment, end in zip(segments, ends, strict=True)]
        graph = tf.compat.v1.get_default_graph()
        low = first_below_float64(graph, [*inputs, *(source for segment in segments for source in segment.source)])
        problem = why_not_repeatable(graph)
        if low is not None:
            problem = (
                f"{low.name!r} ({low.type}) computes in {low.outputs[0].dtype.name}, and what comes out of it is not "
                "exact enough to be decomposed. Let a layer of your own compute in self.compute_dtype; TensorFlow has "
                "some operations, such as bilinear resizing, in float32 only: choose start and end on one side of it."
            )
        if problem:
            raise ValueError(problem)  # before it runs
        return jacobians

    def _of_segment(
        self, tape: tf.GradientTape, segment: _Segment, target: list[tf.Tensor], through: list[tf.Tensor]
    ) -> tf.Tensor:
        sources, end = segment.source, segment.end
        if not sources:
            raise ValueError(f"The layer {segment.start!r} takes integers, and nothing can be derived by them. {_OUT}")
        if target and all(gradient is None for gradient in tape.gradient(target, segment.through or sources)):
            target, end = through, "its own output"
        if not target:
            raise ValueError(
                f"{segment.end} does not depend on {segment.start}, or only by integers. Choose a start that comes "
                "before the end."
            )
        outputs, sizes = target[0].shape[1], [int(np.prod(source.shape[1:])) for source in sources]
        if outputs * sum(sizes) > _MOST_OF_ONE:
            raise ValueError(
                f"The Jacobian of {end} by {segment.start} is {outputs} x {sum(sizes)} for each example, which is too "
                f"large to decompose. Take a model for smaller images, or a start and an end with fewer values. {_OUT}"
            )
        self.found.append((segment.start, end, (outputs, sum(sizes))))
        parts = [
            tf.reshape(tape.batch_jacobian(target[0], source, experimental_use_pfor=False), [-1, outputs, size])
            for source, size in zip(sources, sizes, strict=True)
        ]
        return tf.concat(parts, -1) if len(parts) > 1 else parts[0]


_OUT = "Layer by layer, leave it out with filters=..."


def _cause(error: Exception) -> str:
    """What a layer that failed says, without what Keras writes around it."""
    text = re.sub("\x1b\\[[0-9]*m", "", str(error))
    lines = [line.strip() for line in text.split("Arguments received by")[0].splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Exception encountered", "in user code", "File "))]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _spectra(
    model: keras.Model, data: Any, layers: list[keras.Layer], segments: Any, by_inputs: bool, verbose: int
) -> list[Spectrum]:
    batches = Batches(data)
    stream = (keras.tree.map_structure(_as_dense, x) for x, _, _ in batches)
    first = next(stream)
    types = [tensor.dtype for tensor in getattr(model, "inputs", None) or ()]
    example = keras.tree.map_structure(lambda leaf: leaf[:1], first)
    traced = _Traced(model, layers, segments, by_inputs, _in_float64(example, types))
    fixed = model.inputs[0].shape[0] if types else None
    size = fixed or max(1, _MOST_ENTRIES // max(m * n for _, _, (m, n) in traced.found))
    is_single = batches.length == 1
    bar = keras.utils.Progbar(_length(first) if is_single else None, unit_name="example", verbose=verbose)
    values: list[list[np.ndarray]] = [[] for _ in traced.found]
    done = 0
    for x in itertools.chain([first], stream):
        for begin in range(0, _length(x), size):
            part = keras.tree.map_structure(lambda leaf, begin=begin: leaf[begin : begin + size], x)
            part, count = _in_float64(part, types), _length(part)
            if fixed:
                part = keras.tree.map_structure(lambda leaf: np.resize(leaf, (fixed, *leaf.shape[1:])), part)
            for list_, value in zip(values, traced(part), strict=True):
                list_.append(value[:count])
            done += count
            bar.update(done)
    if not is_single:
        bar.update(done, finalize=True)
    return [_spectrum(model, np.concatenate(list_), *found) for list_, found in zip(values, traced.found, strict=True)]


def _spectrum(model: keras.Model, values: np.ndarray, start: str, end: str, shape: tuple[int, int]) -> Spectrum:
    broken = int(np.isnan(values[:, 0]).sum())
    if broken:
        raise ValueError(
            f"The Jacobian of {end} by {start} is not finite at {broken} of {len(values)} examples: the signal of "
            f"{model.name!r} overflows on its way. Initialize it with less variance, see tf_prune.reinitialize."
        )
    return Spectrum(values, shape, start, end)


def _in_float64(x: Any, types: list[str]) -> Any:
    """Floats in float64, and integers too where the model takes floats."""
    leaves = [keras.ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(x)]
    types = types if len(types) == len(leaves) else [str(leaf.dtype) for leaf in leaves]
    converted = [
        leaf.astype(np.float64) if keras.backend.is_float_dtype(type_) and leaf.dtype.kind != "b" else leaf
        for leaf, type_ in zip(leaves, types, strict=True)
    ]
    return keras.tree.pack_sequence_as(x, converted)


def _as_dense(leaf: Any) -> Any:
    return as_numpy(leaf) if hasattr(leaf, "dense_shape") or hasattr(leaf, "tocsr") else leaf


def _length(x: Any) -> int:
    return len(keras.tree.flatten(x)[0])
