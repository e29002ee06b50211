"""How much each weight matters: model + data -> scores, larger = keep. One short class a criterion."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from tf_prune.batches import Batches
from tf_prune.evaluation import Arrays, MaskMapping
from tf_prune.gradients import Derivatives
from tf_prune.structures import Grouping

Groups = Mapping[str, Grouping]


class Criterion(abc.ABC):
    """What the pruning loop asks of a criterion. Each is a frozen dataclass: its fields are its options."""

    # What a warning says where whole kernels score 0.
    why_zero: ClassVar[str] = (
        "Their weights are 0, or nothing of the loss reaches them: dead units, a scale that begins at 0, an output "
        "that is not trained. Mend that, leave them out with filters=..., or use another method, such as magnitude."
    )

    @abc.abstractmethod
    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None, groups: Groups) -> Arrays:
        """Scores every group of weights of the model at its weights times `masks`; `None` keeps all.

        Where single weights are pruned, each is a group and `groups[path].sum` changes nothing. A criterion without
        data does not read `batches`.
        """


@dataclasses.dataclass(frozen=True)
class SNIP(Criterion):
    """Connection sensitivity: how much the loss moves when a weight is scaled.

    `score = |w * dL/dw|`, with the gradient at the masked weights and averaged over all examples before the
    absolute value is taken. The weight itself is the unmasked one. Of a group: the sum of its weights' scores.

    Args:
        training: Whether batch normalization uses the batch's statistics while scoring.

    >>> SNIP(training=False)
    SNIP(training=False)

    Source: Lee et al. 2019, Eq. 4-5; at a mask other than all ones it is FORCE, de Jorge et al. 2020, Eq. 5.
    Deviations: Lee et al. divide by the sum of all scores, which changes no ranking; their code also prunes biases
    (`include=["quirk_biases"]` does so here), scores another draw of the weights than it trains, and takes batch
    normalization as the identity.
    """

    training: bool = True

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None, groups: Groups) -> Arrays:
        """See `Criterion.scores`."""
        products = derivatives.gradient(batches, masks, training=self.training, times_weights=True)
        return {path: groups[path].sum(np.abs(product)) for path, product in products.items()}


@dataclasses.dataclass(frozen=True)
class LossPreservation(Criterion):
    """How much the loss changes, to first order, when a group of weights is removed.

    `score = |w|^k |w * dL/dw|` with k the `magnitude_power`. For single weights and k = 0 it is `SNIP`. Of a group: for
    k = 0 the absolute value of the sum, `|sum(w * dL/dw)|`; for k = 1 the sum of the absolute values.

    Args:
        magnitude_power: 0, or 1 for the variant that removes small weights first.
        training: Whether batch normalization uses the batch's statistics while scoring.

    Raises:
        ValueError: If the power is neither.

    >>> LossPreservation(magnitude_power=1).magnitude_power
    1

    Source: Lubana and Dick 2021, Eq. 3 (k = 0) and Sec. 4.1, "proposed" (k = 1). Deviations: their experiments use
    trained statistics of batch normalization (`training=False`) and divide the logits by 5.
    """

    magnitude_power: int = 0
    training: bool = True

    def __post_init__(self) -> None:
        if self.magnitude_power not in (0, 1):
            raise ValueError(f"magnitude_power must be 0 or 1, got {self.magnitude_power!r}.")

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None, groups: Groups) -> Arrays:
        """See `Criterion.scores`."""
        products = derivatives.gradient(batches, masks, training=self.training, times_weights=True)
        if self.magnitude_power == 0:
            return {path: np.abs(groups[path].sum(product)) for path, product in products.items()}
        return {path: groups[path].sum(np.abs(w * products[path])) for path, w in derivatives.weights().items()}


@dataclasses.dataclass(frozen=True)
class SquaredGradient(Criterion):
    """How much of the squared gradient norm is lost with a weight, the others' gradients taken as unchanged.

    `score = (dL/dw)^2` at the masked weights. Of a group: the sum.

    Args:
        training: Whether batch normalization uses the batch's statistics while scoring.

    >>> SquaredGradient()
    SquaredGradient(training=True)

    Source: de Jorge et al. 2020, Eq. 17. `GraSPIt` is its method.
    """

    training: bool = True

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None, groups: Groups) -> Arrays:
        """See `Criterion.scores`."""
        gradients = derivatives.gradient(batches, masks, training=self.training)
        return {path: groups[path].sum(np.square(gradient)) for path, gradient in gradients.items()}


@dataclasses.dataclass(frozen=True)
class GraSP(Criterion):
    """Gradient signal preservation: how much removing a weight lowers the gradient norm.

    `score = w * Hg`, signed. The paper's score is `-w * Hg` and its largest are removed, so this is that score
    negated and the largest are kept. Of a group: the sum.

    Args:
        temperature: Divides the logits while scoring, not what `add_loss` adds. Needs a cross-entropy of Keras, or a
            loss object that has `from_logits=True`; use 1 with other losses.
        training: Whether batch normalization uses the batch's statistics while scoring.
        quirk_half_batches: Cuts each batch in the middle, as the release does, with statistics of batch normalization
            for each half. Give it batches of `class_balanced`, which are sorted by class like the release's.

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
    quirk_half_batches: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None, groups: Groups) -> Arrays:
        """See `Criterion.scores`."""
        batches = batches.halves() if self.quirk_half_batches else batches
        products = derivatives.hessian_gradient(
            batches, masks, temperature=self.temperature, training=self.training, times_weights=True
        )
        return {path: groups[path].sum(product) for path, product in products.items()}


@dataclasses.dataclass(frozen=True)
class GradientNormPreservation(Criterion):
    """How much the gradient norm changes, either way, when a group of weights is removed: |GraSP|.

    `score = |w * Hg|`, without a temperature. Of a group: `|sum(w * Hg)|`.

    Args:
        training: Whether batch normalization uses the batch's statistics while scoring.

    >>> GradientNormPreservation()
    GradientNormPreservation(training=True)

    Source: Lubana and Dick 2021, Sec. 4.3, Observation 5. Deviations: H and g run over the prunable weights only, in
    their code over all parameters; their experiments use trained statistics of batch normalization
    (`training=False`).
    """

    training: bool = True

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None, groups: Groups) -> Arrays:
        """See `Criterion.scores`."""
        products = derivatives.hessian_gradient(batches, masks, training=self.training, times_weights=True)
        return {path: np.abs(groups[path].sum(product)) for path, product in products.items()}


@dataclasses.dataclass(frozen=True)
class OptimalBrainDamage(Criterion):
    """How much the loss rises, to second order, when a weight is removed at a minimum.

    `score = h * w^2 / 2` with h the diagonal of the Hessian, estimated by Hutchinson's method: `h = E[v * Hv]` over
    random signs v. That is unbiased, for any loss; a score can be negative, by noise or by curvature. Of a group: the
    sum.

    Args:
        num_probes: How many vectors v, each as dear as one GraSP.
        seed: Of the signs.
        training: Whether batch normalization uses the batch's statistics while scoring.

    Raises:
        ValueError: If there is not at least one probe.

    >>> OptimalBrainDamage(num_probes=30).seed
    0

    Source: LeCun et al. 1990, Eq. 5; a baseline of Wang et al. 2020. Deviation: LeCun et al. propagate the diagonal
    back through the layers in the Gauss-Newton approximation, which no network with shared weights or batch
    normalization allows exactly.
    """

    num_probes: int = 10
    seed: int = 0
    training: bool = True

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ValueError(f"num_probes must be at least 1, got {self.num_probes}.")

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None, groups: Groups) -> Arrays:
        """See `Criterion.scores`."""
        diagonal = derivatives.hessian_diagonal(
            batches, masks, num_probes=self.num_probes, seed=self.seed, training=self.training
        )
        return {path: groups[path].sum(0.5 * diagonal[path] * w**2) for path, w in derivatives.weights().items()}


@dataclasses.dataclass(frozen=True)
class SynapticFlow(Criterion):
    """Synaptic saliency of a network of absolute weights on an input of ones: needs no data.

    `score = |w| * dR/d|w|` with `R = sum(f(ones; |w|))`. In a chain of rectifiers without biases the scores of each
    layer add up to the same number, R: no layer can starve while others keep their flow. Of a group: the sum.

    >>> SynapticFlow()
    SynapticFlow()

    Activations that saturate, such as ReLU6, let no flow of absolute weights through: kernels before them score 0, of
    which `prune` warns.

    Source: Tanaka et al. 2020, Eq. 2 and Algorithm 1. Deviation: a final softmax is left out.
    """

    why_zero: ClassVar[str] = (
        "The absolute weights drive the activations behind them to where they are flat (ReLU6, sigmoid, tanh). Use "
        "activations that do not saturate, smaller initial weights, or another method."
    )

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None, groups: Groups) -> Arrays:
        """See `Criterion.scores`. Of `batches` only the shape of one input is used."""
        if batches.given and batches.example is None:
            next(iter(batches.take(1)))
        example = batches.example
        gradients = derivatives.synaptic_flow(masks, example)
        return {path: groups[path].sum(np.abs(w * gradients[path])) for path, w in derivatives.weights().items()}


@dataclasses.dataclass(frozen=True)
class Magnitude(Criterion):
    """`score = |w|`: the smallest weights go first. Of a group: its p-norm. Needs no data.

    Args:
        p: 1, 2, infinity (the largest magnitude of the group) or -infinity (the smallest). Single weights do not
            depend on it.

    Raises:
        ValueError: If p is none of these.

    >>> Magnitude(p=2).p
    2

    Source: Han et al. 2015; groups as in Li et al. 2017 (p = 1), Lubana and Dick 2021 (p = 2), Paganini and Forde 2020
    (1, 2, -infinity).
    """

    p: float = 1

    def __post_init__(self) -> None:
        if self.p not in (1, 2, math.inf, -math.inf):
            raise ValueError(f"p must be 1, 2, math.inf or -math.inf, got {self.p!r}.")

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None, groups: Groups) -> Arrays:
        """See `Criterion.scores`."""
        return {path: groups[path].norm(weight, self.p) for path, weight in derivatives.weights().items()}


@dataclasses.dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores, one for each group: the control of every paper. Needs no data.

    With `scope="uniform"` or `"layerwise"` every kernel loses the same fraction: the papers' uniform pruning.

    Args:
        seed: Integer; the same seed gives the same scores in every process.

    >>> Random(seed=1).seed
    1
    """

    seed: int = 0

    def scores(self, derivatives: Derivatives, batches: Batches, masks: MaskMapping | None, groups: Groups) -> Arrays:
        """See `Criterion.scores`."""
        generator = np.random.default_rng(self.seed)
        return {path: generator.random(groups[path].group_shape, np.float32) for path in derivatives.variables}
