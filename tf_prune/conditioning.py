"""Sets the weights of a model and leaves its masks: drawn anew, or as near to an isometry as the masks allow."""

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from tf_prune.enforcement import apply_masks
from tf_prune.evidence import masks_of
from tf_prune.initializers import INITIALIZERS
from tf_prune.isometry import LayerGain, MaskedIsometry
from tf_prune.layouts import TRANSPOSED
from tf_prune.masks import Masks
from tf_prune.matching import fitted
from tf_prune.prunable import Filters, Include, find_prunable
from tf_prune.structures import Layout


def reinitialize(model: keras.Model, initializer: Any, *, filters: Filters = None, include: Include = ()) -> None:
    """Draws the kernels of a built model anew, in place; masks that it has stay, and pruned weights are zero.

    Each kernel is a draw of its own, and so is each gate of a recurrent one, each group of a grouped convolution, each
    channel of a depthwise one: the initializer gets their shapes `(*window, inputs, outputs)`, and from those the fans.
    Biases, normalization and embeddings stay as they are unless included; so does the state of an optimizer.

    Args:
        model: A built `keras.Model`.
        initializer: A `keras.initializers.Initializer`, one of `tf_prune.INITIALIZERS` or its name there, such as
            `"orthogonal"`. Its seed, if it has one, decides all kernels; they still differ from each other.
        filters: Which layers; see `find_prunable`.
        include: Which other weights, such as kernels of one's own layers; see `find_prunable`.

    Raises:
        ValueError: If the initializer is unknown, or gives values that are not finite; the model is unchanged then.

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(4)])
    >>> reinitialize(model, "orthogonal")
    >>> np.allclose(np.linalg.svd(np.asarray(model.layers[0].kernel), compute_uv=False), 1, atol=1e-5)
    True

    Source: Lee et al. 2020, footnote 1 re-initializes pruned networks before training. For recurrent layers Keras
    itself draws the gates as one matrix, whose fan-out is that of all of them.
    """
    survey = find_prunable(model, filters, include)
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
    config = initializer.get_config() if isinstance(seed, int) and hasattr(initializer, "get_config") else {}
    if "seed" in config:  # which would give all kernels of a shape the same values
        initializer = type(initializer).from_config({**config, "seed": keras.random.SeedGenerator(seed)})
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


class ConditioningReport(dict[str, LayerGain]):
    """What `condition` did to each kernel, by path; `print(report)` shows it.

    Args:
        layers: Mapping of path to `LayerGain`.
    """

    def __init__(self, layers: Mapping[str, LayerGain]):
        super().__init__(layers)

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
    include: Include = (),
    verbose: int = 1,
) -> ConditioningReport:
    """Makes the sparse layers of a model near-isometric, in place, by their kept weights alone; without data.

    Minimizes `‖(C⊙W)ᵀ(C⊙W) - g² I‖²_F` over the kept weights of each kernel by itself (or `‖WWᵀ - g² I‖²` where it has
    fewer inputs than outputs), from the weights as they are. Meant for a model that was pruned and not trained yet: the
    weights change. A convolution is taken by its matrix: that of the circular convolution of images, which falls apart
    into one matrix for each frequency; strides are in it, zero padding is not. Gates of recurrent kernels are taken one
    by one. Each iteration costs two products of a kernel with the square matrix of its smaller side, and of a 3x3
    convolution 15 complex ones: seconds for LeNet-300-100, a minute for a convolution of 256 channels.

    Args:
        model: A built `keras.Model`.
        masks: Mapping of path to boolean arrays, which are attached; `None` takes those that the model has.
        gain: g, of all singular values: 1, or the `mean_field_gain` of the activation.
        max_iterations: At most so many for each kernel.
        include: Which other weights that have masks, such as kernels of one's own layers; see `find_prunable`.
        verbose: 1 shows a progress bar over the kernels.

    Returns:
        A `ConditioningReport`.

    Raises:
        ValueError: If there are no masks, they do not fit, or an argument is wrong; the model is unchanged then.

    >>> inputs = keras.Input((8,))
    >>> model = keras.Model(inputs, keras.layers.Dense(8, name="dense")(inputs))
    >>> masks = {"dense/kernel": np.arange(64).reshape(8, 8) % 3 != 0}
    >>> bool(condition(model, masks, verbose=0)["dense/kernel"].after < 0.01)
    True

    Source: Lee et al. 2020, ICLR version, "approximate isometry", whose code takes 10,000 steps of gradient descent on
    the sum of the norms, not squared, of `WᵀW - I` also where that cannot vanish, and convolutions as (window x inputs,
    outputs). This takes L-BFGS, each kernel's smaller side, and what the convolution does to an image.
    """
    if not (isinstance(gain, (int, float)) and math.isfinite(gain) and gain > 0):
        raise ValueError(f"gain must be a positive number, got {gain!r}.")
    if not (isinstance(max_iterations, int) and max_iterations > 0):
        raise ValueError(f"max_iterations must be a positive integer, got {max_iterations!r}.")
    survey = find_prunable(model, include=include)
    masks = masks_of(model) if masks is None else fitted(model, Masks(masks))
    chosen = {path: masks[path] for path in survey.prunable if path in masks}
    if not chosen:
        raise ValueError(
            f"The model {model.name!r} has no masks, so there is nothing to condition: prune it before, or pass masks "
            f"by the paths of its kernels, such as {next(iter(survey.prunable))!r}. Dense kernels become isometries by "
            'reinitialize(model, "orthogonal").'
        )
    bar = keras.utils.Progbar(len(chosen) * max_iterations, unit_name="iteration", verbose=verbose)
    kernels, layers = {}, {}
    for i, (path, mask) in enumerate(chosen.items()):
        kernel = np.asarray(survey.prunable[path], np.float64)
        if not np.isfinite(kernel).all() or (mask.any() and not kernel[mask].any()):
            what = "zero" if np.isfinite(kernel).all() else "not finite"
            raise ValueError(f"The kept weights of {path} are {what}. Begin with reinitialize(model, ...).")
        if mask.any():
            problem = _isometry(survey.layouts[path], survey.layers[path], path, mask, gain)
            kernels[path], layers[path] = problem.solve(kernel, max_iterations, lambda _: bar.add(1))
            layers[path] = _with_dead(layers[path], survey.layouts[path], mask)
        bar.update((i + 1) * max_iterations)  # most end before
    _assign(model, survey.prunable, kernels, {**masks_of(model), **masks})
    return ConditioningReport(layers)


def _isometry(layout: Layout, layer: keras.Layer, path: str, mask: np.ndarray, gain: float) -> MaskedIsometry:
    if isinstance(layer, TRANSPOSED):  # its stride is on the side of its outputs: take the adjoint
        layout = dataclasses.replace(layout, inputs=layout.outputs, outputs=layout.inputs)
    # The state of a ConvLSTM has the size of its output: what reads it takes no strides.
    strides = () if path.endswith("/recurrent_kernel") else tuple(getattr(layer, "strides", ()))
    return MaskedIsometry(layout, mask, strides, gain)


def _with_dead(layer: LayerGain, layout: Layout, mask: np.ndarray) -> LayerGain:
    masks = layout.to_matrices(mask)
    channels = np.any(masks.reshape(len(masks), -1, *masks.shape[-2:]), axis=1)
    dead = [int(np.sum(~np.any(channels, axis=axis))) for axis in (2, 1)]
    return dataclasses.replace(layer, dead_inputs=dead[0], dead_outputs=dead[1])


class ConditionBeforeTraining(keras.callbacks.Callback):
    """`condition` when the first epoch of `fit` begins; the callback that prunes comes before it in the list.

    A model whose optimizer has taken a step, as in a run that was interrupted and goes on, is left as it is. `compile`
    begins anew: to fine-tune weights that were trained before, leave this callback out.

    Args:
        gain: As in `condition`.
        max_iterations: As in `condition`.
        verbose: As in `condition`.
        include: As in `condition`.

    Attributes:
        report: The `ConditioningReport`, or `None` if nothing was conditioned.

    Raises:
        ValueError: When `fit` begins, if the model has no masks.

    >>> ConditionBeforeTraining(max_iterations=100).report is None
    True
    """

    def __init__(self, gain: float = 1.0, max_iterations: int = 300, verbose: int = 1, include: Include = ()):
        super().__init__()
        self.gain = gain
        self.max_iterations = max_iterations
        self.verbose = verbose
        self.include = include
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
            self.model,
            gain=self.gain,
            max_iterations=self.max_iterations,
            include=self.include,
            verbose=self.verbose,
        )
