"""How much each weight matters: model + data -> scores, larger = keep. One short class a criterion."""

import dataclasses
from typing import Protocol

import numpy as np

from tf_prune.batches import Batches
from tf_prune.gradients import Arrays, Derivatives, MaskMapping


class Criterion(Protocol):
    """What the pruning loop asks of a criterion. Each is a frozen dataclass: its fields are its options."""

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None) -> Arrays:
        """Scores every prunable weight of the model at its weights times `masks`; `None` keeps all.

        A criterion without data does not read `batches`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SNIP:
    """Connection sensitivity: how much the loss moves when a weight is scaled.

    `score = |w * dL/dw|`, with the gradient at the masked weights and averaged over all examples before the
    absolute value is taken. The weight itself is the unmasked one.

    Args:
        training: Whether batch normalization uses the batch's statistics while scoring.

    >>> SNIP(training=False)
    SNIP(training=False)

    Source: Lee et al. 2019, Eq. 4-5; at a mask other than all ones it is FORCE, de Jorge et al. 2020, Eq. 5.
    Deviations: Lee et al. divide by the sum of all scores, which changes no ranking; their code also prunes biases
    and scores another draw of the weights than it trains.
    """

    training: bool = True

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None) -> Arrays:
        """See `Criterion.scores`."""
        scores = derivatives.gradient(batches, masks, training=self.training)
        for path, weight in derivatives.weights().items():
            np.multiply(weight, scores[path], out=scores[path])
            np.abs(scores[path], out=scores[path])
        return scores


@dataclasses.dataclass(frozen=True)
class GraSP:
    """Gradient signal preservation: how much removing a weight lowers the gradient norm.

    `score = w * Hg`, signed. The paper's score is `-w * Hg` and its largest are removed, so this is that score
    negated and the largest are kept.

    Args:
        temperature: Divides the logits while scoring. Needs a cross-entropy; use 1 with other losses.
        training: Whether batch normalization uses the batch's statistics while scoring.

    Raises:
        ValueError: If the temperature is not positive.

    >>> GraSP().temperature
    200.0

    Source: Wang et al. 2020, Eq. 8, Algorithms 1 and 2; the temperature is that of their code. Deviations: their code
    scores the classifier on weights that are not the ones trained, cuts the batch in two halves by class, and keeps
    one weight more than asked.
    """

    temperature: float = 200.0
    training: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None) -> Arrays:
        """See `Criterion.scores`."""
        products = derivatives.hessian_gradient(batches, masks, temperature=self.temperature, training=self.training)
        return {path: weight * products[path] for path, weight in derivatives.weights().items()}


@dataclasses.dataclass(frozen=True)
class SynapticFlow:
    """Synaptic saliency of a network of absolute weights on an input of ones: needs no data.

    `score = |w| * dR/d|w|` with `R = sum(f(ones; |w|))`. In a network of rectifiers without biases the scores of each
    layer add up to the same number, R: no layer can starve while others keep their flow.

    >>> SynapticFlow()
    SynapticFlow()

    Source: Tanaka et al. 2020, Eq. 2 and Algorithm 1. Deviation: a final softmax is left out.
    """

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None) -> Arrays:
        """See `Criterion.scores`. Of `batches` only the shape of one input is used."""
        example = next(iter(batches.take(1)))[0] if batches.given else None
        gradients = derivatives.synaptic_flow(masks, example)
        return {path: np.abs(weight * gradients[path]) for path, weight in derivatives.weights().items()}


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """`score = |w|`: the smallest weights go first. Needs no data.

    >>> Magnitude()
    Magnitude()

    Source: Han et al. 2015; baseline of Wang et al. 2020 and of Lubana and Dick 2021.
    """

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None) -> Arrays:
        """See `Criterion.scores`."""
        return {path: np.abs(weight) for path, weight in derivatives.weights().items()}


@dataclasses.dataclass(frozen=True)
class Random:
    """Uniform random scores: the control of every paper. Needs no data.

    Args:
        seed: Integer; the same seed gives the same scores in every process.

    >>> Random(seed=1).seed
    1
    """

    seed: int = 0

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None) -> Arrays:
        """See `Criterion.scores`."""
        generator = np.random.default_rng(self.seed)
        return {path: generator.random(w.shape, np.float32) for path, w in derivatives.weights().items()}
