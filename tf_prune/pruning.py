"""`prune()` and `score()`: from a model, a method and data to masks that hold, and a report."""

import dataclasses
import io
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from tf_prune.batches import Batches
from tf_prune.criteria import SNIP, Groups, SynapticFlow
from tf_prune.enforcement import apply_masks
from tf_prune.evidence import check_masks_hold, mask_again, masks_of, warn_of_unknown_zeros
from tf_prune.gradients import Derivatives
from tf_prune.masks import Masks, check_finite
from tf_prune.methods import Method, as_iterative
from tf_prune.prunable import (
    Filters,
    Include,
    Survey,
    find_prunable,
    listed,
    pattern_of,
    size_of,
    sparsity_of_each,
)
from tf_prune.scopes import TooLowSparsityError, check_sparsity
from tf_prune.structures import Structure, cut_into_groups

Scope = str | Mapping[keras.Layer | str, float]

# Where a share u stays dense, the sparsity of the whole is below 1 - u: beyond a tenth, "90 %" is less than 81 %. What
# ordinary models have of their own, such as tables of positions, is below it.
_NOTICEABLE = 0.1


def score(
    model: keras.Model,
    criterion: Method,
    data: Any = None,
    loss: Any = None,
    *,
    filters: Filters = None,
    include: Include = (),
    dropout: bool = False,
    num_batches: int | None = None,
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Scores every prunable weight and leaves the model exactly as it was, also when an error is raised.

    Args:
        model: A built `keras.Model`.
        criterion: A criterion or its lower-case name. Of an iterative method, its first step.
        data: As in `prune`; not needed by `SynFlow`, `Magnitude` and `Random`.
        loss: As in `prune`.
        filters: Which layers; see `find_prunable`.
        include: What is scored only on request, such as kernels of one's own layers; see `find_prunable`.
        dropout: Whether dropout, noise and augmentation layers act while scoring.
        num_batches: As in `prune`.
        batch_size: As in `prune`.

    Returns:
        Dict from `variable.path` to a float32 array of the kernel's shape; larger = keep.

    Raises:
        ValueError: If data or loss is missing or does not fit, or a score is not finite.

    >>> inputs = keras.Input((4,))
    >>> model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(inputs))
    >>> score(model, "magnitude")["logits/kernel"].shape
    (4, 3)
    """
    scores = Pruner(
        model,
        criterion,
        data,
        loss,
        filters=filters,
        include=include,
        dropout=dropout,
        num_batches=num_batches,
        batch_size=batch_size,
    ).scores()
    return {path: value if value.flags.writeable else value.copy() for path, value in scores.items()}


def warn_of_unknown(model: keras.Model, survey: Survey, stacklevel: int = 3) -> None:
    """Warns if a noticeable share of what may connect units has no mask and gets none: its layers are not known."""
    known = size_of(v for path, v in survey.prunable.items() if survey.layouts[path].kind != "bias")

    def is_noticeable(unknown: Mapping[str, keras.Variable]) -> bool:
        size = size_of(unknown.values())
        return size > 0 and size >= _NOTICEABLE * (size + known)

    if not is_noticeable(survey.unknown):
        return
    masks = masks_of(model)
    unknown = {path: variable for path, variable in survey.unknown.items() if path not in masks}
    if is_noticeable(unknown):
        size = size_of(unknown.values())
        reasons = ", ".join(dict.fromkeys(survey.skipped[path] for path in unknown))
        warnings.warn(
            f"{size / (size + known):.0%} of the weights that may connect units are left dense: {listed(unknown)} "
            f"({reasons}). Prune them too with include={pattern_of(unknown)}; or if that is how it shall be, leave "
            "their layers out with filters=...",
            stacklevel=stacklevel,
        )


def _existing_masks(model: keras.Model, derivatives: Derivatives) -> Masks | None:
    """The masks that the model has, all ones where a kernel has none; `None` if it has no mask at all."""
    masks = masks_of(model)
    shapes = {path: variable.shape for path, variable in derivatives.variables.items()}
    if not any(path in masks for path in shapes):
        return None
    return Masks({path: masks.get(path, np.ones(shape, bool)) for path, shape in shapes.items()})


def _check_least_sparsity(groups: Groups, sparsity: float, scope: str | Mapping[str, float]) -> None:
    leasts = {path: group.least_sparsity for path, group in groups.items()}
    if scope in ("global", "uniform", "erk"):  # what one kernel cannot lose, another one can
        leasts = {"the model": min(leasts.values())}
    table = scope if isinstance(scope, Mapping) else {}
    for where, least in leasts.items():
        asked = table.get(where, sparsity)
        if asked < least - 1e-12:
            raise TooLowSparsityError(
                f"The structure removes at least {least:g} of the weights of {where}, but a sparsity of {asked:g} is "
                f"asked for. Ask for {least:g} or more, or leave the layer out with filters=..."
            )


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """What `prune` did: `print(report)` shows each kernel, and what was left alone and why.

    Attributes:
        method: The method's name.
        scope: `"global"`, `"layerwise"`, `"uniform"`, `"erk"` or `"table"`.
        masks: The `Masks` that now hold.
        groups: `Masks` of what was pruned together, one entry a group; without a structure, the same.
        skipped: Mapping of path to the reason why this variable was left alone.
        emptied: Paths of the kernels that have no weight left: nothing passes through them.
        num_model_weights: Of the whole model, with biases and statistics, without masks.
    """

    method: str
    scope: str
    masks: Masks
    groups: Masks
    skipped: dict[str, str]
    emptied: tuple[str, ...]
    num_model_weights: int

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that is removed."""
        return self.masks.sparsity

    def __str__(self) -> str:
        share = self.masks.num_weights / self.num_model_weights
        removed = f"{self.sparsity:.4%} of {self.masks.num_weights:,} prunable weights removed"
        removed += f" ({share:.1%} of the model's {self.num_model_weights:,} are prunable)"
        is_grouped = self.groups.num_weights != self.masks.num_weights
        if is_grouped:
            removed += f", {self.groups.num_kept:,} of {self.groups.num_weights:,} groups kept"
        table = Table()
        for column in ("kernel", "shape", *(["groups", "kept"] if is_grouped else []), "weights", "kept", "sparsity"):
            table.add_column(column, justify="left" if column in ("kernel", "shape") else "right", overflow="fold")
        for path, mask in self.masks.items():
            kept = int(np.count_nonzero(mask))
            groups = self.groups[path]
            counts = [groups.size, np.count_nonzero(groups)] if is_grouped else []
            sparsity = f"{1 - kept / mask.size:.2%}" if kept else "emptied"
            counts += [mask.size, kept]
            table.add_row(path, "x".join(map(str, mask.shape)), *(f"{count:,}" for count in counts), sparsity)
        with io.StringIO() as stream:
            console = Console(file=stream, width=100)
            console.print(f"{self.method}, {self.scope}: {removed}", markup=False, highlight=False, soft_wrap=True)
            console.print(table)
            reasons: dict[str, list[str]] = {}
            for path, reason in self.skipped.items():
                reasons.setdefault(reason, []).append(path)
            for reason, paths in reasons.items():
                shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
                console.print(f"left alone ({reason}): {shown}", markup=False, highlight=False)
            return stream.getvalue()


class Pruner:
    """A model and all that says how to prune it: what `prune` does once, and `GradualPruning` again and again.

    What is checked, traced and read of the data stays from one pruning to the next. Arguments are those of `prune`, and
    `limit`: so many batches are read of data that is endless or does not say its length.
    """

    def __init__(
        self,
        model: keras.Model,
        method: Method,
        data: Any = None,
        loss: Any = None,
        *,
        scope: Scope = "global",
        structure: str | Structure | None = None,
        filters: Filters = None,
        include: Include = (),
        dropout: bool = False,
        num_batches: int | None = None,
        batch_size: int | None = None,
        limit: int | None = None,
    ):
        self.model = model
        self._method = as_iterative(method)
        if num_batches is not None:
            self._method = dataclasses.replace(self._method, num_batches=num_batches)
        self._survey = find_prunable(model, filters, include)
        warn_of_unknown(model, self._survey, stacklevel=4)
        self._groups, self._left = cut_into_groups(structure, self._survey.layouts)
        self._shown_scope = "table" if isinstance(scope, Mapping) else scope
        self._scope = scope
        if isinstance(scope, Mapping):
            self._scope = sparsity_of_each({path: self._survey.layers[path] for path in self._groups}, scope, model)
        self.variables = {path: self._survey.prunable[path] for path in self._groups}
        self._derivatives = Derivatives(model, self.variables, loss, dropout)
        self.batches = Batches(data, batch_size, limit)
        self._has_looked = False

    @property
    def num_batches(self) -> int | None:
        """How many batches each step of the method takes; `None` for all."""
        return self._method.num_batches

    def scores(self) -> dict[str, np.ndarray]:
        """The scores of the groups as the model is, at the first step; it stays so."""
        check_masks_hold(self.model)
        masks = _existing_masks(self.model, self._derivatives)
        batches = self.batches.anew()
        batches = batches if self.num_batches is None else batches.take(self.num_batches)
        scores = self._method.criterion.scores(self._derivatives, batches, masks, self._groups)
        check_finite(scores)
        return scores

    def check(self, sparsity: float) -> None:
        """Raises if the structure removes more than this sparsity; looks once for zeros that nothing explains."""
        _check_least_sparsity(self._groups, sparsity, self._scope)
        mask_again(self.model)
        if not self._has_looked:
            self._has_looked = True
            warn_of_unknown_zeros(self.model, self.variables, _existing_masks(self.model, self._derivatives))

    def prune(self, sparsity: float, verbose: int = 0) -> PruningReport:
        """Prunes the model and attaches the masks, with those that other kernels had."""
        self.check(sparsity)
        existing = _existing_masks(self.model, self._derivatives)
        groups = self._groups
        if existing is not None:
            groups = {path: dataclasses.replace(group, alive=existing[path]) for path, group in groups.items()}
        masks, kept = self._method.masks(
            self._derivatives, self.batches, sparsity, groups, self._scope, existing, verbose
        )
        emptied = self._warn_if_cut(masks, sparsity)
        apply_masks(self.model, {**masks_of(self.model), **masks})
        skipped = {**self._survey.skipped, **self._left}
        size = self._survey.num_weights
        return PruningReport(self._method.name, self._shown_scope, masks, kept, skipped, emptied, size)

    def _warn_if_cut(self, masks: Masks, sparsity: float) -> tuple[str, ...]:
        """The kernels of which nothing is left."""
        layouts, name = self._survey.layouts, self._method.name
        emptied = tuple(path for path, mask in masks.items() if not mask.any() and layouts[path].kind != "bias")
        if emptied:
            warnings.warn(
                f"{name} at sparsity {sparsity:g} left no weight in {', '.join(emptied)}: nothing passes through "
                f"there any more. Ask for {self._advice(emptied)}.",
                stacklevel=4,
            )
        elif not self._derivatives.sees_its_input(masks, self.batches.example):
            warnings.warn(
                f"{name} at sparsity {sparsity:g} left a network whose outputs no longer depend on its input: "
                f"they are the same for different inputs, every path is cut or dead. Ask for {self._advice(emptied)}.",
                stacklevel=4,
            )
        return emptied

    def _advice(self, emptied: tuple[str, ...]) -> str:
        """What may help against a cut network, of what was not done."""
        method = self._method
        others = [] if isinstance(method.criterion, SynapticFlow) else ["SynFlow"]
        others += [] if isinstance(method.criterion, SNIP) and method.revive else ["FORCE"]
        advice = ["a lower sparsity"]
        if method.num_steps > 1:
            advice.append(f"more than {method.num_steps} steps")
        advice.append(f"another method ({', '.join(others)})")
        if emptied and self._scope == "global":
            advice.append('scope="layerwise"')
        return f"{', '.join(advice[:-1])} or {advice[-1]}"


def prune(
    model: keras.Model,
    method: Method,
    sparsity: float,
    data: Any = None,
    loss: Any = None,
    *,
    scope: Scope = "global",
    structure: str | Structure | None = None,
    filters: Filters = None,
    include: Include = (),
    dropout: bool = False,
    num_batches: int | None = None,
    batch_size: int | None = None,
    verbose: int = 1,
) -> PruningReport:
    """Prunes the model in place and attaches the masks, so that training keeps them.

    Of the d prunable weights, ceil(sparsity * d) become zero; exactly the others are kept. With a structure, d counts
    the groups that are pruned together. It warns where much of the model belongs to layers that it does not know, which
    are pruned only with `include`. On a model that has masks already, pruned weights stay pruned, and count as
    removed.

    Args:
        model: A built `keras.Model`: Sequential, functional, subclassed, nested.
        method: `"snip"`, `"grasp"`, `"force"`, `"iterative_snip"`, `"grasp_it"`, `"synflow"`, `"loss_preservation"`,
            `"gradient_norm_preservation"`, `"squared_gradient"`, `"optimal_brain_damage"`, `"magnitude"`, `"random"`,
            or an object such as `FORCE(num_steps=100)`.
        sparsity: Fraction in [0, 1) to remove.
        data: One batch of arrays, `(x, y)` or `(x, y, sample_weight)`, or an iterable of such batches: a list, a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, a generator. Where no labels are needed, x alone or
            `(x, None)` will do. The parts are what `fit` takes: numbers or strings, of NumPy, TensorFlow, pandas or
            SciPy, ragged or sparse, and dicts and lists of them.
        loss: What `compile` takes, for one output or several, or a function `(y, outputs)` of any targets or none;
            defaults to what `fit` minimizes, `model.compute_loss`. Weight regularizers do not count; `add_loss`,
            activity regularizers, padding masks and sample weights do. Kernels that it does not read score 0. Only for
            scoring there are `"uniform"` (cross-entropy with the uniform distribution), `"prediction"` and
            `"prediction_raw"` (with the network's own prediction, averaged over the batch after or before the
            softmax), which need no labels, and `"quirk_raw_logit"`, the loss of FORCE's release, `-mean(logit[label])`.
        scope: `"global"` ranks all weights together. `"layerwise"` removes this fraction of each kernel; `"uniform"`
            of the whole, as evenly as it goes; `"erk"` of the whole, and keeps in each kernel a fraction in proportion
            to `sum(shape) / prod(shape)`. A table `{layer: sparsity}` of layers, or of their names, says it for these,
            and `sparsity` is that of the others.
        structure: What is pruned together: `None` for single weights, or `"2:4"`, `"1x4"`, `"1x16"`, `"2_outputs"`,
            `"4_outputs"`, `"output_channels"`, `"input_channels"`, `"hybrid"`, or an object such as
            `Blocks(inputs=8)`.
        filters: Which layers; see `find_prunable`. Kernels of the others do not count in d.
        include: What is prunable only on request, such as `"embeddings"`, or kernels of one's own layers by a pattern
            or a predicate; see `find_prunable`.
        dropout: Whether dropout, noise and augmentation layers act while scoring.
        num_batches: How many batches are read at most, which endless data needs; of an iterative method, for each step,
            the next ones of the data. `None` leaves it to the method, of which `FORCE` takes 1, others all. Criteria
            that read them twice (`GraSP`) keep them in memory.
        batch_size: Cuts one batch of arrays into batches of so many examples, without a copy; the scores are the same
            but for rounding and for batch normalization. `None` scores it as one batch, as the papers do.
        verbose: 0 is silent, 1 shows a progress bar while an iterative method runs, or over several batches.

    Returns:
        A `PruningReport`.

    Raises:
        TypeError: If `model` is not a Keras 3 model.
        ValueError: If an argument is wrong or a score is not finite; the model is unchanged then.

    >>> model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10)])
    >>> report = prune(model, "magnitude", sparsity=0.95)
    >>> report.masks.num_kept
    5
    """
    pruner = Pruner(
        model,
        method,
        data,
        loss,
        scope=scope,
        structure=structure,
        filters=filters,
        include=include,
        dropout=dropout,
        num_batches=num_batches,
        batch_size=batch_size,
    )
    return pruner.prune(check_sparsity(sparsity), verbose)
