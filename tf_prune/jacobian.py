"""What a network does to a signal: spectra of its Jacobians, from its input to its logits and layer by layer."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_prune.batches import Batches
from tf_prune.gradients import computing_in_float64
from tf_prune.noise import check_no_state
from tf_prune.prunable import check_model, find_kernels
from tf_prune.spectrum import Spectrum, singular_values

_MOST_ENTRIES = 2**23  # of the Jacobians that are computed at once: 64 MiB
_MOST_OF_ONE = 2**27  # of one of them: 1 GiB


def jacobian_spectrum(
    model: keras.Model, data: Any, *, start: str | None = None, end: str | None = None, verbose: int = 1
) -> Spectrum:
    """Singular values of the Jacobian `J = ∂ end / ∂ start` at every example.

    Without names it is the input-output Jacobian of the logits: of what enters a final softmax or sigmoid. Batch
    normalization uses its moving statistics, dropout is off, nothing of the model changes. All is computed in float64
    from the weights as they are, whatever precision the model trains in, so that condition numbers up to 1e12 are true.

    Args:
        model: A built `keras.Model`, dense, pruned or `Masked`. Several inputs count as one long vector, and so does an
            output that is a sequence or an image.
        data: Inputs `x`, an `(x, y)` batch or an iterable of them; labels are not used. Streamed: what is kept of
            an example is its singular values.
        start: Name of the layer whose output to derive by; `None` is the model's input.
        end: Name of the layer whose output to derive; `None` is the logits.
        verbose: 1 shows a progress bar.

    Returns:
        A `Spectrum`.

    Raises:
        ValueError: If there is no derivative (integer inputs, several outputs, layers that are not connected), the
            Jacobian of one example is too large, or it is not finite; says what to do.

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, kernel_initializer="orthogonal")])
    >>> spectrum = jacobian_spectrum(model, np.ones((5, 8)), verbose=0)
    >>> spectrum.values.shape, round(spectrum.pooled_condition_number, 4)
    ((5, 4), 1.0)

    Source: Lee et al. 2020, Eq. 3 and Table 2; the logits and the pooling are those of their code.
    """
    check_model(model)
    layers = {name: _layer(model, name) for name in (start, end) if name is not None}

    def ends(calls: list["_Call"], inputs: Any, outputs: Any) -> list["_Segment"]:
        source = inputs if start is None else _only_call(calls, layers[start]).outputs
        target = _logits(model, outputs) if end is None else _only_call(calls, layers[end]).outputs
        return [_Segment(start or "inputs", end or "logits", source, target)]

    return _spectra(model, data, list(layers.values()), ends, start is None, verbose)[0]


def layerwise_spectra(model: keras.Model, data: Any, *, verbose: int = 1) -> dict[str, Spectrum]:
    """Singular values of the Jacobian `J^{l-1,l}` of each layer that has kernels, by the layer's name.

    `J^{l-1,l} = D^l W^l`: from the layer's input to the input of the next such layer that is called, with all that lies
    between (activation, normalization, pooling); of the last one to the logits. In a chain their product is the
    input-output Jacobian. A layer that the next one does not depend on, as beside a shortcut, is measured to its own
    output. Layerwise dynamical isometry is an `isometry_gap` near 0 of each.

    Args:
        model: As in `jacobian_spectrum`. A layer that is called several times is there as `name`, `name@2`, ...
        data: As in `jacobian_spectrum`; a few examples say much, and Jacobians of convolutions are large.
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
    layers = list(dict.fromkeys(_with_kernels(model)))

    def chain(calls: list["_Call"], inputs: Any, outputs: Any) -> list["_Segment"]:
        following = [call.inputs for call in calls[1:]] + [_logits(model, outputs)]
        names = [call.layer.name for call in calls[1:]] + ["logits"]
        return [
            _Segment(call.layer.name, f"the input of {name}", call.inputs, target, call.outputs)
            for call, target, name in zip(calls, following, names, strict=True)
        ]

    spectra: dict[str, Spectrum] = {}
    for spectrum in _spectra(model, data, layers, chain, False, verbose):
        count = sum(other.start == spectrum.start for other in spectra.values())
        spectra[spectrum.start if count == 0 else f"{spectrum.start}@{count + 1}"] = spectrum
    return spectra


# -- where a Jacobian begins and ends ---------------------------------------------------------------


@dataclasses.dataclass
class _Call:
    """One call of a layer while the model is traced."""

    layer: keras.Layer
    inputs: Any
    outputs: Any


@dataclasses.dataclass
class _Segment:
    """From where to where a Jacobian goes; it ends at `through` if that does not lead to `target`."""

    start: str
    end: str
    source: Any
    target: Any
    through: Any = None
    instead: Any = None  # `through` as one vector an example


def _layer(model: keras.Model, name: str) -> keras.Layer:
    found = [layer for layer in model._flatten_layers(include_self=False) if layer.name == name]
    if len(found) != 1:
        names = ", ".join(dict.fromkeys(layer.name for layer in model._flatten_layers(include_self=False)))
        raise ValueError(
            f"The model {model.name!r} has {len(found) or 'no'} layers called {name!r}. Start and end name one of: "
            f"{names}."
        )
    return found[0]


def _with_kernels(model: keras.Model) -> Iterator[keras.Layer]:
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _with_kernels(layer)
        elif find_kernels(layer, ()):
            yield layer


def _only_call(calls: list[_Call], layer: keras.Layer) -> _Call:
    found = [call for call in calls if call.layer is layer]
    if len(found) != 1:
        raise ValueError(
            f"The layer {layer.name!r} is called {len(found)} times when the model is called, so it has "
            f"{'no output' if not found else 'several outputs'}. Name a layer that is called once, outside of loops."
        )
    return found[0]


@contextlib.contextmanager
def _watched(layers: list[keras.Layer], tape: tf.GradientTape, calls: list[_Call]) -> Iterator[None]:
    """Notes what enters and leaves these layers while a function is traced, and makes it known to the tape."""

    def watching(layer: keras.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            inputs = next(leaf for leaf in keras.tree.flatten((args, kwargs)) if tf.is_tensor(leaf))
            tape.watch(inputs) if inputs.dtype.is_floating else None
            outputs = call(*args, **kwargs)
            tape.watch([leaf for leaf in keras.tree.flatten(outputs) if leaf.dtype.is_floating])
            calls.append(_Call(layer, inputs, outputs))
            return outputs

        return watched

    own = [layer.__dict__.get("call") for layer in layers]
    try:
        for layer in layers:
            object.__setattr__(layer, "call", watching(layer, layer.call))
        yield
    finally:
        for layer, call in zip(layers, own, strict=True):
            object.__delattr__(layer, "call") if call is None else object.__setattr__(layer, "call", call)


def _logits(model: keras.Model, outputs: Any) -> tf.Tensor:
    leaves = keras.tree.flatten(outputs)
    if len(leaves) != 1:
        raise ValueError(
            f"The model {model.name!r} has {len(leaves)} outputs, and a Jacobian is of one. Name it: end=the layer "
            "that makes it."
        )
    return getattr(leaves[0], "_keras_logits", leaves[0])


def _only_tensor(value: Any, name: str) -> tf.Tensor:
    leaves = keras.tree.flatten(value)
    if len(leaves) != 1:
        raise ValueError(f"The layer {name!r} has {len(leaves)} outputs, and a Jacobian is of one. Name another layer.")
    return leaves[0]


def _flattened(segment: _Segment) -> _Segment:
    """With a list of sources, and ends that are one vector an example."""

    def flat(value: Any, name: str) -> Any:
        tensor = _only_tensor(value, name)
        return tf.reshape(tensor, [-1, int(np.prod(tensor.shape[1:]))])

    return dataclasses.replace(
        segment,
        source=segment.source if isinstance(segment.source, list) else [_only_tensor(segment.source, segment.start)],
        target=flat(segment.target, segment.end),
        instead=None if segment.through is None else flat(segment.through, segment.start),
    )


# -- what is computed ---------------------------------------------------------------------------------


class _Traced:
    """Some Jacobians as one compiled function of a batch of inputs; called, it gives their singular values."""

    def __init__(self, model: keras.Model, layers: list[keras.Layer], segments: Any, by_inputs: bool, x: Any):
        self._model = model
        self._layers = layers
        self._segments = segments
        self._by_inputs = by_inputs
        self.found: list[tuple[str, str, tuple[int, int]]] = []
        check_no_state(model)
        specs = keras.tree.map_structure(lambda leaf: tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype), x)
        function = tf.function(self._jacobians, autograph=False)
        try:
            self._function = function.get_concrete_function(specs)
        except (tf.errors.OpError, TypeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ValueError(
                f"The model {model.name!r} cannot be computed in float64 on these inputs: "
                f"{lines[-1] if lines else error}. "
                "Check that x fits the model, and that no layer of its own asks for float32."
            ) from error

    def __call__(self, x: Any) -> list[np.ndarray]:
        jacobians = self._function(*[keras.tree.map_structure(tf.convert_to_tensor, x)])
        return [singular_values(np.asarray(memoryview(jacobian))) for jacobian in jacobians]

    def _jacobians(self, x: Any) -> list[tf.Tensor]:
        inputs = [leaf for leaf in keras.tree.flatten(x) if leaf.dtype.is_floating]
        if self._by_inputs and len(inputs) < len(keras.tree.flatten(x)):
            raise ValueError(
                f"The model {self._model.name!r} takes integers, and nothing can be derived by them. Begin behind the "
                "layer that looks them up: start=its name, such as that of the embedding."
            )
        calls: list[_Call] = []
        with (
            tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape,
            computing_in_float64(self._model),
            _watched(self._layers, tape, calls),
            keras.StatelessScope(),
        ):
            tape.watch(inputs)
            outputs = self._model(x, training=False)
            segments = [_flattened(segment) for segment in self._segments(calls, inputs, outputs)]
        return [self._of_segment(tape, segment) for segment in segments]

    def _of_segment(self, tape: tf.GradientTape, segment: _Segment) -> tf.Tensor:
        sources, target = segment.source, segment.target
        if target.dtype != tf.float64:
            raise ValueError(
                f"{segment.end} of the model {self._model.name!r} is of type {target.dtype.name}: a layer casts what "
                "it computes, and its derivative would be that of what is left. Let it compute in self.compute_dtype."
            )
        end = segment.end
        through = sources if segment.through is None else keras.tree.flatten(segment.through)
        if all(gradient is None for gradient in tape.gradient(target, through)):
            if segment.instead is None:
                raise ValueError(
                    f"{segment.end} does not depend on {segment.start}, or only by integers. Choose a start that comes "
                    "before the end."
                )
            target, end = segment.instead, "its own output"
        outputs, sizes = target.shape[1], [int(np.prod(source.shape[1:])) for source in sources]
        if outputs * sum(sizes) > _MOST_OF_ONE:
            raise ValueError(
                f"The Jacobian of {end} by {segment.start} is {outputs} x {sum(sizes)} for each example, which is too "
                "large to decompose. Choose a start and an end with fewer values, or a model for smaller images."
            )
        self.found.append((segment.start, end, (outputs, sum(sizes))))
        parts = [
            tf.reshape(tape.batch_jacobian(target, source, experimental_use_pfor=False), [-1, outputs, size])
            for source, size in zip(sources, sizes, strict=True)
        ]
        return tf.concat(parts, -1) if len(parts) > 1 else parts[0]


def _spectra(
    model: keras.Model, data: Any, layers: list[keras.Layer], segments: Any, by_inputs: bool, verbose: int
) -> list[Spectrum]:
    is_array = hasattr(data, "shape") and hasattr(data, "dtype")
    batches = Batches((data, None) if is_array else data)
    stream = iter(batches)
    first = next(stream)
    traced = _Traced(model, layers, segments, by_inputs, _in_float64(first[0]))
    fixed = model.inputs[0].shape[0] if getattr(model, "inputs", None) else None
    size = fixed or max(1, _MOST_ENTRIES // max(m * n for _, _, (m, n) in traced.found))
    is_single = is_array or isinstance(data, tuple)
    bar = keras.utils.Progbar(_length(first[0]) if is_single else None, unit_name="example", verbose=verbose)
    values: list[list[np.ndarray]] = [[] for _ in traced.found]
    done = 0
    for x, _, _ in itertools.chain([first], stream):
        x = _in_float64(x)
        for begin in range(0, _length(x), size):
            part = keras.tree.map_structure(lambda leaf, begin=begin: leaf[begin : begin + size], x)
            count = _length(part)
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


def _in_float64(x: Any) -> Any:
    def convert(leaf: Any) -> np.ndarray:
        array = keras.ops.convert_to_numpy(leaf)
        return array.astype(np.float64) if array.dtype.kind == "f" or array.dtype == "bfloat16" else array

    return keras.tree.map_structure(convert, x)


def _length(x: Any) -> int:
    return len(keras.tree.flatten(x)[0])
