"""The one loop score -> schedule -> mask, and the papers' methods as compositions of it."""

import dataclasses
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from tf_prune.batches import Batches
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
from tf_prune.evaluation import Arrays
from tf_prune.gradients import Derivatives
from tf_prune.masks import Masks, masks_from_scores
from tf_prune.schedules import SCHEDULES


@dataclasses.dataclass(frozen=True)
class Iterative:
    """Scores and prunes `num_steps` times, each time at the weights that the mask before left.

    For t = 1 ... T: score the weights at `mask_{t-1} * w`, keep as many as the schedule says.

    Args:
        criterion: A criterion; it is scored at the masked weights.
        num_steps: T, at least 1.
        schedule: `"exponential"`, `"linear"`, or another one of `tf_prune.SCHEDULES`.
        revive: Whether a weight that was pruned at one step can come back at a later one.
        num_batches: At most so many batches for each step, the next ones of the data, starting over at its end; `None`
            takes all of the data at each step.
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
        if self.num_batches is not None and not _is_count(self.num_batches):
            raise ValueError(f"num_batches must be at least 1, or None for all batches; got {self.num_batches!r}.")
        if not _is_count(self.num_steps):
            raise ValueError(f"num_steps must be an integer of at least 1, got {self.num_steps!r}.")
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

        Nothing is scored where just as many are left as are to be kept: a model that was pruned to this sparsity keeps
        its masks.

        Args:
            derivatives: Of the model to prune.
            batches: The data, for a criterion that needs it.
            sparsity: The target, in [0, 1): the fraction of all groups that is removed.
            groups: Each kernel cut into what is pruned together.
            scope: As in `masks_from_scores`.
            among: Masks of the weights that may be kept at all.
            verbose: 0 is silent, 1 shows a progress bar if there is more than one step, or more than one batch.
        """
        shapes = {path: group.shape for path, group in groups.items()}
        if among is not None:
            left = _just_enough(groups, among, sparsity, scope, shapes)
            if left is not None:
                return _spread(groups, left, among), left
        progress = None
        if self.num_steps > 1:
            progress = keras.utils.Progbar(
                self.num_steps, verbose=verbose, stateful_metrics=["sparsity"], unit_name=self.name
            )
        current = among
        if current is None and self.num_steps > 1:
            # All ones, not None, so that the first step is traced like the others: once for all.
            current = Masks({path: np.ones(shape, bool) for path, shape in shapes.items()})
        is_blind = False
        for step in range(1, self.num_steps + 1):
            data = batches if self.num_batches is None else batches.take(self.num_batches)
            if verbose and self.num_steps == 1:
                data.progress = self.name
            scores = self.criterion.scores(derivatives, data, current, groups)
            is_last = step == self.num_steps
            now, table = self._after(step, sparsity), {}
            if isinstance(scope, Mapping):
                table = {path: self._after(step, target) for path, target in scope.items()}
            sparsities = {path: table.get(path, now) for path in groups}
            allowed, first = _candidates(
                groups, scores, among if self.revive else current, sparsities, is_last, self.revive
            )
            kept = masks_from_scores(
                scores,
                now,
                table if isinstance(scope, Mapping) else scope,
                allowed,
                first,
                # On a model that was pruned before, the first steps may ask for more weights than are left.
                or_fewer=not is_last,
                shapes=shapes,
            )
            if not is_blind:
                is_blind = self._warn_if_blind(step, scores, kept, allowed)
            current = _spread(groups, kept, among)
            del scores, allowed, first  # before the next step needs the memory
            if progress:
                progress.update(step, [("sparsity", kept.sparsity)], finalize=is_last)
        assert current is not None  # noqa: S101 - for the type checker: num_steps is at least 1
        return current, kept

    def _warn_if_blind(self, step: int, scores: Arrays, kept: Masks, allowed: Arrays | None) -> bool:
        """Says so if whole kernels score 0, yet some of their weights are chosen; later on, if all kernels do."""
        if step > 1 and any(score.any() for score in scores.values()):
            return False
        zero = [path for path, score in scores.items() if not score.any()]
        free = {path: kept[path] if allowed is None else kept[path][allowed[path]] for path in zero}
        blind = [path for path, mask in free.items() if mask.any() and not mask.all()]
        if blind:
            shown = ", ".join(blind[:4]) + (f" and {len(blind) - 4} more" if len(blind) > 4 else "")
            when = f", at step {step} of {self.num_steps}" if step > 1 else ""
            cut = "The step before has cut the network: ask for a lower sparsity or for more steps."
            warnings.warn(
                f"{self.name} gives 0 to every weight of {shown}{when}: which of them stay is decided by their "
                f"position. {cut if step > 1 else self.criterion.why_zero}",
                stacklevel=4,
            )
        return bool(blind)

    def _after(self, step: int, target: float) -> float:
        return SCHEDULES[self.schedule](target)(step / self.num_steps)


def _is_count(number: Any) -> bool:
    return isinstance(number, numbers.Integral) and not isinstance(number, bool) and int(number) >= 1


def _candidates(
    groups: Groups,
    scores: Arrays,
    masks: Masks | None,
    sparsities: Mapping[str, float],
    is_last: bool,
    revive: bool,
) -> tuple[Arrays | None, Arrays | None]:
    """Which groups may be kept: those that have a weight which is not pruned; under N:M only the best of each m.

    On the way to its sparsity a method that starts from all weights may keep more of each m than n. If pruned weights
    cannot come back the best n of each m are kept before all others, so that a later step can still be exact. That
    works where all kernels are under N:M; in a mixed structure N:M holds from the first step.
    """
    has_pattern = any(group.at_most for group in groups.values())
    if masks is None and not has_pattern:
        return None, None
    among = {
        path: np.ones(group.group_shape, bool) if masks is None else group.any(masks[path])
        for path, group in groups.items()
    }
    strict = {path: group.best_of_each(scores[path], among[path]) for path, group in groups.items()}
    is_mixed = not all(group.at_most for group in groups.values())
    if is_last or (is_mixed and not revive):
        return strict, None
    loose = {
        path: group.best_of_each(scores[path], among[path], 1 - sparsities[path]) for path, group in groups.items()
    }
    return loose, None if revive else strict


def _just_enough(
    groups: Groups,
    masks: Masks,
    sparsity: float,
    scope: str | Mapping[str, float],
    shapes: Mapping[str, tuple[int, ...]],
) -> Masks | None:
    """The groups that are left, if they are those to be kept whatever their scores."""
    left = {path: group.any(masks[path]) for path, group in groups.items()}
    same = {path: np.zeros(mask.shape, np.float32) for path, mask in left.items()}
    table = scope if isinstance(scope, Mapping) else {}
    sparsities = {path: table.get(path, sparsity) for path in groups}
    allowed, first = _candidates(groups, same, masks, sparsities, is_last=True, revive=False)
    kept = masks_from_scores(same, sparsity, scope, allowed, first, shapes=shapes)
    return kept if all(np.array_equal(kept[path], left[path]) for path in groups) else None


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
        schedule: `"exponential"`, `"linear"`, or another one of `tf_prune.SCHEDULES`.
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
        schedule: `"exponential"`, `"linear"`, or another one of `tf_prune.SCHEDULES`.
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
        schedule: `"exponential"`, `"linear"`, or another one of `tf_prune.SCHEDULES`.
        num_batches: Fresh batches for each step; `None` takes all of the data each time.
        training: Whether batch normalization uses the batch's statistics while scoring.

    >>> GraSPIt(num_steps=10).criterion
    SquaredGradient(training=True)

    Source: de Jorge et al. 2020, App. E, Eq. 17; no revival as in their release.
    """
    return Iterative(SquaredGradient(training), num_steps, schedule, num_batches=num_batches, name="GraSPIt")


def SynFlow(num_steps: int = 100, schedule: str = "exponential") -> Iterative:
    """Iterative synaptic flow pruning: needs no data.

    In a chain of layers it empties none while others have more than one weight; a branch beside a shortcut it may.

    Args:
        num_steps: How often to score and prune.
        schedule: `"exponential"`, `"linear"`, or another one of `tf_prune.SCHEDULES`.

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
    "squared_gradient": SquaredGradient,
    "optimal_brain_damage": OptimalBrainDamage,
    "magnitude": Magnitude,
    "random": Random,
}

Method = str | Criterion | Iterative


def as_iterative(method: Method) -> Iterative:
    """The method as the loop runs it; a criterion is one step of it."""
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
