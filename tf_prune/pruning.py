"""`prune()`: the one loop score -> schedule -> mask, and the papers' methods as compositions of it."""

import dataclasses
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from tf_prune.batches import Batches, inputs_like
from tf_prune.criteria import (
    SNIP,
    Criterion,
    GradientNormPreservation,
    GraSP,
    Groups,
    LossPreservation,
    Magnitude,
    OptimalBrainDamage,
    Random,
    SquaredGradient,
    SynapticFlow,
)
from tf_prune.enforcement import apply_masks, masks_of
from tf_prune.gradients import Arrays, Derivatives
from tf_prune.masks import Masks, check_finite, masks_from_scores
from tf_prune.prunable import Filters, find_prunable, sparsity_of_each
from tf_prune.schedules import SCHEDULES
from tf_prune.scopes import check_sparsity
from tf_prune.structures import Structure, cut_into_groups

Scope = str | Mapping[keras.Layer, float]


@dataclasses.dataclass(frozen=True)
class Iterative:
    """Scores and prunes `num_steps` times, each time at the weights that the mask before left.

    For t = 1 ... T: score the weights at `mask_{t-1} * w`, keep as many as the schedule says.

    Args:
        criterion: A criterion; it is scored at the masked weights.
        num_steps: T, at least 1.
        schedule: `"exponential"` or `"linear"`.
        revive: Whether a weight that was pruned at one step can come back at a later one.
        num_batches: Batches for each step, the next ones of the data, starting over at its end; `None` takes all
            of the data at each step.
        name: What the report and the progress bar call it.

    Raises:
        ValueError: If an option is out of its range.

    >>> Iterative(SNIP(), num_steps=10).schedule
    'exponential'
    """

    criterion: Criterion
    num_steps: int = 1
    schedule: str = "exponential"
    revive: bool = False
    num_batches: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, got {self.schedule!r}.")
        if self.num_batches is not None and self.num_batches < 1:
            raise ValueError(f"num_batches must be at least 1, or None for all batches; got {self.num_batches}.")
        SCHEDULES[self.schedule](0.0, self.num_steps)  # checks num_steps
        object.__setattr__(self, "name", self.name or type(self.criterion).__name__)

    def masks(
        self,
        derivatives: Derivatives,
        batches: Batches,
        sparsity: float,
        groups: Groups,
        scope: str | Mapping[str, float] = "global",
        among: Masks | None = None,
        verbose: int = 0,
    ) -> tuple[Masks, Masks]:
        """The final masks, of the weights and of the groups; the model is not changed.

        Args:
            derivatives: Of the model to prune.
            batches: The data, for a criterion that needs it.
            sparsity: The target, in [0, 1): the fraction of all groups that is removed.
            groups: Each kernel cut into what is pruned together.
            scope: As in `masks_from_scores`.
            among: Masks of the weights that may be kept at all.
            verbose: 0 is silent, 1 shows a progress bar if there is more than one step, or more than one batch.
        """
        progress = None
        if self.num_steps > 1:
            progress = keras.utils.Progbar(
                self.num_steps, verbose=verbose, stateful_metrics=["sparsity"], unit_name=self.name
            )
        elif verbose:
            batches.progress = self.name
        shapes = {path: group.shape for path, group in groups.items()}
        current = among
        if current is None and self.num_steps > 1:
            # All ones, not None, so that the first step is traced like the others: once for all.
            current = Masks({path: np.ones(shape, bool) for path, shape in shapes.items()})
        for step in range(1, self.num_steps + 1):
            data = batches if self.num_batches is None else batches.take(self.num_batches)
            scores = self.criterion.scores(derivatives, data, current, groups)
            check_finite(scores)

            def after_step(target: float, step: int = step) -> float:
                return SCHEDULES[self.schedule](target, self.num_steps)(step)

            now = {path: after_step(target) for path, target in scope.items()} if isinstance(scope, Mapping) else scope
            allowed, first = _candidates(groups, scores, among if self.revive else current, now, after_step(sparsity))
            kept = masks_from_scores(
                scores,
                after_step(sparsity),
                now,
                allowed,
                first,
                # On a model that was pruned before, the first steps may ask for more weights than are left.
                or_fewer=step < self.num_steps,
                shapes=shapes,
            )
            current = _spread(groups, kept, among)
            if progress:
                progress.update(step, [("sparsity", kept.sparsity)], finalize=step == self.num_steps)
        assert current is not None  # noqa: S101 - for the type checker: num_steps is at least 1
        return current, kept


def _candidates(
    groups: Groups, scores: Arrays, masks: Masks | None, scope: str | Mapping[str, float], sparsity: float
) -> tuple[Arrays | None, Arrays | None]:
    """Which groups may be kept, and which of them before all others so that a later step can be exact too.

    Those that have a weight which is not pruned; under N:M the best ones.
    """
    has_pattern = any(group.at_most for group in groups.values())
    if masks is None and not has_pattern:
        return None, None
    among = {
        path: np.ones(group.group_shape, bool) if masks is None else group.any(masks[path])
        for path, group in groups.items()
    }
    if not has_pattern:
        return among, None
    table = scope if isinstance(scope, Mapping) else {}
    allowed, first = {}, {}
    for path, group in groups.items():
        density = 1 - table.get(path, sparsity)
        allowed[path] = group.best_of_each(scores[path], among[path], density)
        first[path] = group.best_of_each(scores[path], among[path]) & np.bool_(group.at_most is not None)
    return allowed, first


def _spread(groups: Groups, kept: Masks, among: Masks | None) -> Masks:
    masks = {path: group.spread(kept[path]) for path, group in groups.items()}
    return Masks(masks if among is None else {path: mask & among[path] for path, mask in masks.items()})


def FORCE(
    num_steps: int = 60, schedule: str = "exponential", num_batches: int | None = 1, training: bool = True
) -> Iterative:
    """Foresight connection sensitivity: SNIP's score of the pruned network, step by step; weights may come back.

    `score = |w * dL(c * w) / d(c * w)|` with the dense weight w and the mask c of the step before, so a pruned weight
    has a score too. With one step it is SNIP.

    Args:
        num_steps: T; the paper uses 300 on CIFAR-10 and 60 elsewhere.
        schedule: `"exponential"` or `"linear"`.
        num_batches: Fresh batches for each step; `None` takes all of the data each time.
        training: Whether batch normalization uses the batch's statistics while scoring.

    >>> FORCE(num_steps=10).revive
    True

    Source: de Jorge et al. 2020, Eq. 5 and Algorithm 1; in the ICLR 2021 version this is what is called FORCE.
    Deviations: the loss is cross-entropy, as the paper says; the authors' release feeds raw logits to a negative
    log-likelihood. Signed gradients are averaged over batches, as in that release; the paper averages saliencies.
    """
    return Iterative(SNIP(training), num_steps, schedule, revive=True, num_batches=num_batches, name="FORCE")


def IterativeSNIP(
    num_steps: int = 60, schedule: str = "exponential", num_batches: int | None = 1, training: bool = True
) -> Iterative:
    """SNIP step by step, where a pruned weight never comes back; otherwise as `FORCE`.

    Args:
        num_steps: T.
        schedule: `"exponential"` or `"linear"`.
        num_batches: Fresh batches for each step; `None` takes all of the data each time.
        training: Whether batch normalization uses the batch's statistics while scoring.

    >>> IterativeSNIP(num_steps=10).revive
    False

    Source: de Jorge et al. 2020, Eq. 7, which its first version calls FORCE.
    """
    return Iterative(SNIP(training), num_steps, schedule, num_batches=num_batches, name="IterativeSNIP")


def GraSPIt(
    num_steps: int = 60, schedule: str = "exponential", num_batches: int | None = 1, training: bool = True
) -> Iterative:
    """GRASP-It: the gradient norm of the pruned network is kept as large as it goes, step by step.

    `score = (dL/dw)^2` at the masked weights; a pruned weight never comes back. With one step it is not `GraSP`.

    Args:
        num_steps: T.
        schedule: `"exponential"` or `"linear"`.
        num_batches: Fresh batches for each step; `None` takes all of the data each time.
        training: Whether batch normalization uses the batch's statistics while scoring.

    >>> GraSPIt(num_steps=10).criterion
    SquaredGradient(training=True)

    Source: de Jorge et al. 2020, App. E, Eq. 17; no revival as in their release.
    """
    return Iterative(SquaredGradient(training), num_steps, schedule, num_batches=num_batches, name="GraSPIt")


def SynFlow(num_steps: int = 100, schedule: str = "exponential") -> Iterative:
    """Iterative synaptic flow pruning: needs no data, and empties no layer while others have more than one weight.

    Args:
        num_steps: How often to score and prune.
        schedule: `"exponential"` or `"linear"`.

    >>> SynFlow().num_steps
    100

    Source: Tanaka et al. 2020, Algorithm 1.
    """
    return Iterative(SynapticFlow(), num_steps, schedule, name="SynFlow")


METHODS: dict[str, Callable[[], Criterion | Iterative]] = {
    "snip": SNIP,
    "grasp": GraSP,
    "force": FORCE,
    "iterative_snip": IterativeSNIP,
    "grasp_it": GraSPIt,
    "synflow": SynFlow,
    "loss_preservation": LossPreservation,
    "gradient_norm_preservation": GradientNormPreservation,
    "optimal_brain_damage": OptimalBrainDamage,
    "magnitude": Magnitude,
    "random": Random,
}

Method = str | Criterion | Iterative


def _as_iterative(method: Method) -> Iterative:
    if isinstance(method, str) and method in METHODS:
        method = METHODS[method]()
    if isinstance(method, Iterative):
        return method
    if not isinstance(method, Criterion):
        raise ValueError(
            f"method must be one of {', '.join(map(repr, METHODS))}, or an object such as tf_prune.SNIP(), a "
            f"tf_prune.Criterion; got {method!r}."
        )
    return Iterative(method)


def score(
    model: keras.Model,
    criterion: Method,
    data: Any = None,
    loss: Any = None,
    *,
    filters: Filters = None,
    include: Sequence[str] = (),
    dropout: bool = False,
) -> dict[str, np.ndarray]:
    """Scores every prunable weight and leaves the model exactly as it was, also when an error is raised.

    Args:
        model: A built `keras.Model`.
        criterion: A criterion or its lower-case name. Of an iterative method, its first step.
        data: An `(x, y)` batch or an iterable of them; not needed by `SynFlow`, `Magnitude` and `Random`.
        loss: As in `prune`.
        filters: Which layers; see `find_prunable`.
        include: What is scored only on request; see `find_prunable`.
        dropout: Whether dropout and noise layers act while scoring.

    Returns:
        Dict from `variable.path` to a float32 array of the kernel's shape; larger = keep.

    Raises:
        ValueError: If data or loss is missing or does not fit, or a score is not finite.

    >>> inputs = keras.Input((4,))
    >>> model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(inputs))
    >>> score(model, "magnitude")["logits/kernel"].shape
    (4, 3)
    """
    method = _as_iterative(criterion)
    survey = find_prunable(model, filters, include)
    groups, _ = cut_into_groups(None, survey.layouts)
    derivatives = Derivatives(model, survey.prunable, loss, dropout)
    scores = method.criterion.scores(derivatives, Batches(data), _existing_masks(model, derivatives), groups)
    check_finite(scores)
    return {path: value if value.flags.writeable else value.copy() for path, value in scores.items()}


def _sees_its_input(model: keras.Model, derivatives: Derivatives, masks: Masks, example: Any) -> bool:
    """Whether anything of the input reaches the outputs; `True` where there is no input to try it on."""
    if example is None:
        generator = np.random.default_rng(0)
        example = inputs_like(model, lambda shape, dtype: generator.integers(0, 2, (8, *shape)).astype(dtype))
    if example is None:
        return True
    first = keras.ops.convert_to_numpy(keras.tree.flatten(example)[0])
    return bool((first == first[:1]).all()) or derivatives.sees_its_input(masks, example)


def _existing_masks(model: keras.Model, derivatives: Derivatives) -> Masks | None:
    """The masks that the model has, all ones where a kernel has none; `None` if it has no mask at all."""
    masks = masks_of(model)
    shapes = {path: variable.shape for path, variable in derivatives.variables.items()}
    if not any(path in masks for path in shapes):
        return None
    return Masks({path: masks.get(path, np.ones(shape, bool)) for path, shape in shapes.items()})


def _check_least_sparsity(groups: Groups, sparsity: float) -> None:
    least = min(group.least_sparsity for group in groups.values())
    if sparsity < least - 1e-12:
        raise ValueError(
            f"The structure removes at least {least:g} of the weights, but a sparsity of {sparsity:g} is asked for. "
            f"Ask for {least:g} or more."
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
    """

    method: str
    scope: str
    masks: Masks
    groups: Masks
    skipped: dict[str, str]
    emptied: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that is removed."""
        return self.masks.sparsity

    def __str__(self) -> str:
        removed = f"{self.sparsity:.4%} of {self.masks.num_weights:,} weights removed"
        is_grouped = self.groups.num_weights != self.masks.num_weights
        if is_grouped:
            removed += f", {self.groups.num_kept:,} of {self.groups.num_weights:,} groups kept"
        table = Table(title=f"{self.method}, {self.scope}: {removed}")
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
            console.print(table)
            reasons: dict[str, list[str]] = {}
            for path, reason in self.skipped.items():
                reasons.setdefault(reason, []).append(path)
            for reason, paths in reasons.items():
                shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
                console.print(f"left alone ({reason}): {shown}", markup=False, highlight=False)
            return stream.getvalue()


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
    include: Sequence[str] = (),
    dropout: bool = False,
    verbose: int = 1,
) -> PruningReport:
    """Prunes the model in place and attaches the masks, so that training keeps them.

    Of the d prunable weights, ceil(sparsity * d) become zero; exactly the others are kept. With a structure, d counts
    the groups that are pruned together. On a model that has masks already, pruned weights stay pruned, and count as
    removed.

    Args:
        model: A built `keras.Model`: Sequential, functional, subclassed, nested.
        method: `"snip"`, `"grasp"`, `"force"`, `"iterative_snip"`, `"grasp_it"`, `"synflow"`, `"loss_preservation"`,
            `"gradient_norm_preservation"`, `"optimal_brain_damage"`, `"magnitude"`, `"random"`, or an object such as
            `FORCE(num_steps=100)`.
        sparsity: Fraction in [0, 1) to remove.
        data: An `(x, y)` batch or an iterable of them.
        loss: A Keras loss, its name, or a callable; defaults to the compiled loss. `"uniform"` (cross-entropy with the
            uniform distribution), `"prediction"` and `"prediction_raw"` (with the network's own prediction, averaged
            over the batch after or before the softmax) need no labels. `"quirk_raw_logit"` is the loss of FORCE's
            release, `-mean(logit[label])`.
        scope: `"global"` ranks all weights together. `"layerwise"` removes this fraction of each kernel; `"uniform"`
            of the whole, as evenly as it goes; `"erk"` of the whole, and keeps in each kernel a fraction in proportion
            to `sum(shape) / prod(shape)`. A table `{layer: sparsity}` says it for these layers, and `sparsity` is that
            of the others.
        structure: What is pruned together: `None` for single weights, or `"2:4"`, `"1x4"`, `"1x16"`, `"2_outputs"`,
            `"4_outputs"`, `"output_channels"`, `"input_channels"`, `"hybrid"`, or an object such as
            `Blocks(inputs=8)`.
        filters: Which layers; see `find_prunable`. Kernels of the others do not count in d.
        include: What is prunable only on request, `"embeddings"` for one; see `find_prunable`.
        dropout: Whether dropout and noise layers act while scoring.
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
    iterative = _as_iterative(method)
    sparsity = check_sparsity(sparsity)
    survey = find_prunable(model, filters, include)
    groups, left = cut_into_groups(structure, survey.layouts)
    _check_least_sparsity(groups, sparsity)
    table = sparsity_of_each(survey, scope) if isinstance(scope, Mapping) else scope
    if isinstance(table, dict):
        table = {path: value for path, value in table.items() if path in groups}
    derivatives = Derivatives(model, {path: survey.prunable[path] for path in groups}, loss, dropout)
    batches = Batches(data)
    existing = _existing_masks(model, derivatives)
    masks, kept = iterative.masks(derivatives, batches, sparsity, groups, table, existing, verbose)
    emptied = tuple(path for path, mask in masks.items() if not mask.any() and survey.layouts[path].kind != "bias")
    if emptied:
        warnings.warn(
            f"{iterative.name} at sparsity {sparsity:g} left no weight in {', '.join(emptied)}: nothing passes through "
            "there any more. Ask for a lower sparsity, another method (SynFlow, FORCE with more steps), or "
            'scope="layerwise".',
            stacklevel=2,
        )
    elif not _sees_its_input(model, derivatives, masks, batches.example):
        warnings.warn(
            f"{iterative.name} at sparsity {sparsity:g} left a network whose outputs no longer depend on its input: "
            "they are the same for different inputs, every path is cut or dead. Ask for a lower sparsity, or another "
            "method (SynFlow, FORCE with more steps).",
            stacklevel=2,
        )
    apply_masks(model, masks)
    shown = "table" if isinstance(scope, Mapping) else scope
    return PruningReport(iterative.name, shown, masks, kept, {**survey.skipped, **left}, emptied)
