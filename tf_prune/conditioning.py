"""Sets the weights of a model, and leaves its masks: drawn anew, or brought as near to an isometry as the masks allow."""

import dataclasses
import io
import math

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from tf_prune.enforcement import apply_masks, masks_of
from tf_prune.initializers import INITIALIZERS
from tf_prune.prunable import Filters, find_prunable
from tf_prune.structures import Layout


def reinitialize(model: keras.Model, initializer: Any, *, filters: Filters = None) -> None:
    """Draws the kernels of a built model anew, in place; masks that it has stay, and pruned weights are zero.

    Each kernel is a draw of its own, and so is each gate of a recurrent one, each group of a grouped convolution, each
    channel of a depthwise one: the initializer gets their shapes `(*window, inputs, outputs)`, and from those the fans.
    Biases, normalization and embeddings stay as they are; so does the state of an optimizer.

    Args:
        model: A built `keras.Model`.
        initializer: A `keras.initializers.Initializer`, one of `tf_prune.INITIALIZERS` or its name there, such as
            `"orthogonal"`. Its seed, if it has one, decides all kernels; they still differ from each other.
        filters: Which layers; see `find_prunable`.

    Raises:
        ValueError: If the initializer is unknown, or gives values that are not finite; the model is unchanged then.

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(4)])
    >>> reinitialize(model, "orthogonal")
    >>> np.allclose(np.linalg.svd(np.asarray(model.layers[0].kernel), compute_uv=False), 1, atol=1e-5)
    True

    Source: Lee et al. 2020, footnote 1 re-initializes pruned networks before training. For recurrent layers Keras itself
    draws the gates as one matrix, whose fan-out is that of all of them.
    """
    survey = find_prunable(model, filters)
    draw = _drawing(initializer)
    kernels = {}
    for path, variable in survey.prunable.items():
        layout = survey.layouts[path]
        count, *shape = layout.to_matrices(np.empty(layout.shape, bool)).shape
        matrices = np.stack([draw(tuple(shape)) for _ in range(count)])
        if not np.isfinite(matrices).all():
            raise ValueError(f"The initializer gave values that are not finite for {path}, of shape {variable.shape}.")
        kernels[path] = layout.from_matrices(matrices)
    _assign(model, survey.prunable, kernels, masks_of(model))


def _drawing(initializer: Any) -> Any:
    """A function of a shape that gives another draw at each call."""
    if isinstance(initializer, str) and initializer in INITIALIZERS:
        initializer = INITIALIZERS[initializer]()
    try:
        initializer = keras.initializers.get(initializer)
    except ValueError as error:
        names = ", ".join(map(repr, INITIALIZERS))
        raise ValueError(f"Unknown initializer {initializer!r}. Expected one of Keras, or of {names}.") from error
    seed = getattr(initializer, "seed", None)
    if isinstance(seed, int):  # which would give all kernels of a shape the same values
        config = {**initializer.get_config(), "seed": keras.random.SeedGenerator(seed)}
        initializer = type(initializer).from_config(config)
    return lambda shape: keras.ops.convert_to_numpy(initializer(shape, dtype="float32"))


def _assign(
    model: keras.Model,
    variables: Mapping[str, keras.Variable],
    kernels: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
) -> None:
    """Sets the kernels; the masks tell which weights stay zero, and hold from now on."""
    for path, kernel in kernels.items():
        variables[path].assign(kernel)
    if masks:
        apply_masks(model, masks)


# -- near-isometry ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerGain:
    """What `condition` did to one kernel.

    Attributes:
        before: The isometry gap, √mean (σ² - g²)² / g² over the kernel's singular values: those of the rows and columns
            that have weights left, at their best common scale before.
        after: The same, after.
        floor: What no weights can go below with this mask: √(1 - rank / size), where rank is the structural one.
        size: How many singular values the kernel can have: the smaller number of living inputs or outputs.
        dead_inputs: Inputs of which no weight is left; they count for nothing here.
        dead_outputs: The same of outputs.
        iterations: Of the optimizer.
    """

    before: float
    after: float
    floor: float
    size: int
    dead_inputs: int
    dead_outputs: int
    iterations: int

    @property
    def gain(self) -> float:
        """`before / after`."""
        return self.before / self.after if self.after else math.inf


class ConditioningReport(dict[str, LayerGain]):
    """A `LayerGain` for each conditioned kernel, by path; `print(report)` shows them."""

    def __str__(self) -> str:
        table = Table(title="isometry gap of the kept weights")
        for column in ("kernel", "before", "after", "gain", "floor", "singular values", "dead in", "dead out"):
            table.add_column(column, justify="left" if column == "kernel" else "right", overflow="fold")
        for path, layer in self.items():
            gaps = (f"{layer.before:.3f}", f"{layer.after:.3g}", f"{layer.gain:.1f} x", f"{layer.floor:.3f}")
            table.add_row(path, *gaps, *map(str, (layer.size, layer.dead_inputs, layer.dead_outputs)))
        with io.StringIO() as stream:
            Console(file=stream, width=110).print(table)
            return stream.getvalue()


def condition(
    model: keras.Model,
    masks: Mapping[str, np.ndarray] | None = None,
    *,
    gain: float = 1.0,
    max_iterations: int = 300,
    verbose: int = 1,
) -> ConditioningReport:
    """Makes the sparse layers of a model near-isometric, in place, by their kept weights alone; without data.

    Minimizes `‖(C⊙W)ᵀ(C⊙W) - g² I‖²_F` over the kept weights of each kernel by itself (or `‖WWᵀ - g² I‖²` where it has
    fewer inputs than outputs), from the weights as they are. Meant for a model that was pruned and not trained yet: the
    weights change. A convolution is taken by its matrix: that of the circular convolution of images, which falls apart into
    one matrix for each frequency; strides are in it, zero padding is not. Gates of recurrent kernels are taken one by one.

    Args:
        model: A built `keras.Model`.
        masks: Mapping of path to boolean arrays, which are attached; `None` takes those that the model has.
        gain: g, of all singular values: 1, or the `mean_field_gain` of the activation.
        max_iterations: At most so many for each kernel.
        verbose: 1 shows a progress bar over the kernels.

    Returns:
        A `ConditioningReport`.

    Raises:
        ValueError: If there are no masks, they do not fit, or an argument is wrong; the model is unchanged then.

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="dense")])
    >>> masks = {"dense/kernel": np.arange(64).reshape(8, 8) % 3 != 0}
    >>> bool(condition(model, masks, verbose=0)["dense/kernel"].after < 0.01)
    True

    Source: Lee et al. 2020, ICLR version, "approximate isometry", whose code takes 10,000 steps of gradient descent on the sum
    of the norms, not squared, of `WᵀW - I` also where that cannot vanish, and convolutions as (window x inputs,
    outputs). This takes L-BFGS, each kernel's smaller side, and what the convolution does to an image.
    """
    if not (isinstance(gain, (int, float)) and math.isfinite(gain) and gain > 0):
        raise ValueError(f"gain must be a positive number, got {gain!r}.")
    if not (isinstance(max_iterations, int) and max_iterations > 0):
        raise ValueError(f"max_iterations must be a positive integer, got {max_iterations!r}.")
    masks = masks_of(model) if masks is None else {path: np.asarray(mask) for path, mask in masks.items()}
    survey = find_prunable(model)
    chosen = {path: masks[path] for path in survey.prunable if path in masks}
    if not chosen:
        raise ValueError(
            f"The model {model.name!r} has no masks, so there is nothing to condition: prune it before, or pass masks by "
            f"the paths of its kernels, such as {next(iter(survey.prunable))!r}. Dense kernels become isometries by "
            'reinitialize(model, "orthogonal").'
        )
    bar = keras.utils.Progbar(len(chosen), unit_name="kernel", verbose=verbose)
    kernels, report = {}, ConditioningReport()
    for path, mask in chosen.items():
        kernel = np.asarray(survey.prunable[path], np.float64)
        if mask.shape != kernel.shape or mask.dtype != bool:
            raise ValueError(
                f"The mask of {path} is {mask.dtype} of shape {mask.shape}; expected bool of shape {kernel.shape}."
            )
        if mask.any():
            problem = _Isometry(survey.layouts[path], mask, _strides(survey.layers[path]), gain)
            kernels[path], report[path] = problem.solve(kernel, max_iterations)
        bar.add(1)
    _assign(model, survey.prunable, kernels, masks)
    return report


def _strides(layer: keras.Layer) -> tuple[int, ...]:
    strides = getattr(layer, "strides", ())
    return (strides,) if isinstance(strides, int) else tuple(strides)


class _Isometry:
    """The distance of one masked kernel from an isometry, as a function of its kept weights.

    The kernel is cut into independent matrices or convolutions. A convolution of a stride is one without a stride of the
    image's phases, and at each frequency a matrix; as many frequencies as the products of two kernels have taps tell all.
    """

    def __init__(self, layout: Layout, mask: np.ndarray, strides: tuple[int, ...], gain: float):
        self._layout = layout
        self._mask = mask
        self._gain = gain
        masks = layout.to_matrices(mask)
        window = masks.shape[1:-2]
        self._strides = strides if len(strides) == len(window) else (1,) * len(window)
        self._axes = tuple(range(1, 1 + len(window)))
        phases = self._phases(masks)
        self._grid = tuple(2 * n - 1 for n in phases.shape[1:-2])
        connected = phases.any(self._axes) if self._axes else phases  # (copies, inputs, outputs)
        self._inputs, self._outputs = connected.any(2), connected.any(1)
        self._sizes = np.minimum(self._inputs.sum(1), self._outputs.sum(1))
        self._is_wide = self._inputs.sum(1) < self._outputs.sum(1)
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import structural_rank

        self._rank = sum(structural_rank(csr_array(one)) for one in connected)

    def solve(self, kernel: np.ndarray, max_iterations: int) -> tuple[np.ndarray, LayerGain]:
        from scipy.optimize import minimize

        start = kernel[self._mask]
        norm = np.sum(np.abs(self._transfers(start)) ** 2) / math.prod(self._grid)
        size = int(self._sizes.sum())
        if norm == 0:
            raise ValueError("A kernel whose kept weights are all zero cannot be conditioned; reinitialize the model.")
        start *= self._gain * math.sqrt(size / norm)
        before = self._gap(start)
        found = minimize(
            self._value, start, jac=True, method="L-BFGS-B", options={"maxiter": max_iterations, "maxfun": 10**9}
        )
        weights = found.x if self._gap(found.x) <= before else start
        result = np.zeros(self._mask.shape)
        result[self._mask] = weights
        layer = LayerGain(
            before,
            self._gap(weights),
            math.sqrt(max(0.0, 1 - self._rank / size)),
            size,
            int((~self._inputs).sum()),
            int((~self._outputs).sum()),
            int(found.nit),
        )
        return result, layer

    def _gap(self, weights: np.ndarray) -> float:
        return math.sqrt(4 * self._value(weights)[0] / self._sizes.sum()) / self._gain**2

    def _value(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """`¼ ‖AᴴA - g² I‖²_F`, the mean over frequencies, of the living smaller side; and its gradient."""
        transfers = self._transfers(weights)
        value, gradient = 0.0, np.empty_like(transfers)
        for i, a in enumerate(transfers):
            one, gradient[i] = self._of_one(a, bool(self._is_wide[i]), self._inputs[i], self._outputs[i])
            value += one
        count = math.prod(self._grid)
        return value / count, self._back(gradient)

    def _of_one(self, a: np.ndarray, is_wide: bool, inputs: np.ndarray, outputs: np.ndarray) -> tuple[float, Any]:
        adjoint = np.conj(np.swapaxes(a, -1, -2))
        difference = a @ adjoint if is_wide else adjoint @ a
        difference -= self._gain**2 * np.diag((inputs if is_wide else outputs).astype(np.float64))
        gradient = difference @ a if is_wide else a @ difference
        return 0.25 * float(np.sum(np.abs(difference) ** 2)), gradient

    def _transfers(self, weights: np.ndarray) -> np.ndarray:
        """(copies, *frequencies, inputs, outputs); a dense kernel itself."""
        kernel = np.zeros(self._mask.shape)
        kernel[self._mask] = weights
        phases = self._phases(self._layout.to_matrices(kernel))
        return np.fft.fftn(phases, self._grid, self._axes) if self._axes else phases

    def _back(self, gradient: np.ndarray) -> np.ndarray:
        """The gradient by the kept weights from that by the transfers: the adjoint of `_transfers`."""
        if self._axes:
            gradient = np.real(np.fft.ifftn(gradient, self._grid, self._axes))
        return self._layout.from_matrices(self._merged(gradient))[self._mask]

    def _phases(self, matrices: np.ndarray) -> np.ndarray:
        """A convolution of the phases of a strided image: `window / stride` taps of `stride x inputs` inputs."""
        if all(stride == 1 for stride in self._strides):
            return matrices
        count, *window, inputs, outputs = matrices.shape
        taps = [-(-n // s) for n, s in zip(window, self._strides, strict=True)]
        fill = [(0, t * s - n) for t, s, n in zip(taps, self._strides, window, strict=True)]
        padded = np.pad(matrices, [(0, 0), *fill, (0, 0), (0, 0)])
        split = padded.reshape(count, *(n for pair in zip(taps, self._strides, strict=True) for n in pair), inputs, outputs)
        rank = len(window)
        order = [0, *range(1, 1 + 2 * rank, 2), *range(2, 2 + 2 * rank, 2), 1 + 2 * rank, 2 + 2 * rank]
        return split.transpose(order).reshape(count, *taps, math.prod(self._strides) * inputs, outputs)

    def _merged(self, phases: np.ndarray) -> np.ndarray:
        """The adjoint of `_phases`; taps beyond the window are cut off."""
        count, *window, inputs, outputs = self._layout.to_matrices(self._mask).shape
        taps = [-(-n // s) for n, s in zip(window, self._strides, strict=True)]
        phases = phases[(slice(None), *(slice(t) for t in taps))]
        if all(stride == 1 for stride in self._strides):
            return phases
        rank = len(window)
        split = phases.reshape(count, *taps, *self._strides, inputs, outputs)
        order = [0, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)), 1 + 2 * rank, 2 + 2 * rank]
        merged = split.transpose(order).reshape(
            count, *(t * s for t, s in zip(taps, self._strides, strict=True)), inputs, outputs
        )
        return merged[(slice(None), *(slice(n) for n in window))]


class ConditionBeforeTraining(keras.callbacks.Callback):
    """`condition` when the first epoch of `fit` begins, after the callback that prunes, which comes before it in the list.

    A model that has been trained, as in a run that was interrupted and goes on, is left as it is.

    Args:
        gain: As in `condition`.
        max_iterations: As in `condition`.
        verbose: As in `condition`.

    Attributes:
        report: The `ConditioningReport`, or `None` if nothing was conditioned.

    Raises:
        ValueError: When `fit` begins, if the model has no masks.

    >>> ConditionBeforeTraining(max_iterations=100).report is None
    True
    """

    def __init__(self, gain: float = 1.0, max_iterations: int = 300, verbose: int = 1):
        super().__init__()
        self.gain = gain
        self.max_iterations = max_iterations
        self.verbose = verbose
        self.report: ConditioningReport | None = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Conditions the model, unless it has been trained."""
        if int(np.asarray(self.model.optimizer.iterations)) > 0:
            return
        if not masks_of(self.model):
            raise ValueError(
                "ConditionBeforeTraining found no masks. Put it behind the callback that prunes: "
                "callbacks=[SnipPruning(...), ConditionBeforeTraining()]."
            )
        self.report = condition(
            self.model, gain=self.gain, max_iterations=self.max_iterations, verbose=self.verbose
        )
