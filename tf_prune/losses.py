"""The loss that `fit` minimizes on a batch, and the few that only scoring uses."""

import inspect
from typing import Any

import keras
from keras import ops

from tf_prune.compiled_loss import CompiledLoss, activation_before, is_binary, log_odds, standing_in, takes_logits
from tf_prune.terms import BatchLoss


class _OnLogits(keras.losses.Loss):
    """A loss that takes logits, whatever the model ends in; `from_logits=None` where nothing says what it ends in.

    The target is the labels; a subclass takes another one, and then needs none. One logit, or each of several in a
    model of binary labels, is two classes of which the first has the logit 0.
    """

    needs_labels = False

    def __init__(self, ends_in_logits: bool | None, binary: bool, temperature: float, name: str):
        super().__init__(name=name)
        self._ends_in_logits = ends_in_logits
        self._binary = binary
        self._temperature = temperature

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        logits = ops.cast(self._logits(y_pred), self.dtype) / self._temperature
        logits._keras_mask = getattr(y_pred, "_keras_mask", None)
        return super().__call__(y_true if self.needs_labels else logits, logits, sample_weight)

    def _logits(self, outputs: Any) -> Any:
        known = getattr(outputs, "_keras_logits", None)
        if self._ends_in_logits or (self._ends_in_logits is None and known is None):
            return outputs
        return log_odds(outputs, self._binary) if known is None else known

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if self._binary or y_pred.shape[-1] == 1:
            y_true = ops.reshape(y_true, ops.shape(y_pred))
            y_pred = ops.stack([ops.zeros_like(y_pred), y_pred], -1)
        return -ops.sum(self.target(y_true, y_pred) * self.log_likelihoods(y_pred), -1)

    def target(self, y_true: Any, logits: Any) -> Any:
        if len(y_true.shape) == len(logits.shape) and y_true.shape[-1] == 1:
            y_true = y_true[..., 0]
        if len(y_true.shape) < len(logits.shape):
            y_true = ops.one_hot(ops.cast(y_true, "int32"), logits.shape[-1])
        return ops.cast(y_true, logits.dtype)

    def log_likelihoods(self, logits: Any) -> Any:
        return ops.log_softmax(logits)


class _Uniform(_OnLogits):
    """Cross-entropy with the uniform distribution in the place of the labels."""

    def target(self, y_true: Any, logits: Any) -> Any:
        return 1.0 / logits.shape[-1]


class _Prediction(_OnLogits):
    """Cross-entropy with the prediction, averaged over the batch, in the place of the labels."""

    def target(self, y_true: Any, logits: Any) -> Any:
        return ops.stop_gradient(ops.mean(ops.softmax(logits), 0))


class _RawPrediction(_OnLogits):
    """The same, averaged before the softmax."""

    def target(self, y_true: Any, logits: Any) -> Any:
        return ops.stop_gradient(ops.softmax(ops.mean(logits, 0)))


class _RawLogit(_OnLogits):
    """`-mean(logit[label])`: a negative log-likelihood that is given logits."""

    needs_labels = True

    def log_likelihoods(self, logits: Any) -> Any:
        return logits


# Losses that only scoring uses. The first three need no labels: Lee et al. 2020, Sec. 5.2, "Unif." and "Pred.
# (softmax / raw)". The paper says of the last two no more than "the averaged output prediction of the network".
LOSSES: dict[str, type[_OnLogits]] = {
    "uniform": _Uniform,
    "prediction": _Prediction,
    "prediction_raw": _RawPrediction,
    "quirk_raw_logit": _RawLogit,
}


def _for_scoring(model: keras.Model, name: str, temperature: float) -> _OnLogits:
    """One of `LOSSES`; the compiled loss tells what the model ends in."""
    compiled = keras.tree.flatten(model.loss) if model.compiled else []
    is_told = len(compiled) == 1 and compiled[0] not in (None, "crossentropy", "ce")
    loss = keras.losses.get(compiled[0]) if is_told else None
    ends_in_logits = getattr(loss, "from_logits", False if activation_before(loss) else None)
    return LOSSES[name](ends_in_logits, is_binary(loss), temperature, name)


class ModelLoss:
    """What `fit` would minimize on a batch: `model.compute_loss`, whatever is in it, but for weight regularizers.

    A loss that is given takes the place of the compiled one, of its weights, and of a `compute_loss` of the model's
    own. Those of `LOSSES` count alone, without `add_loss`.

    Args:
        model: A built `keras.Model`.
        loss: What `compile` takes, one of `LOSSES`, or a callable `(y, outputs)`; `None` takes the compiled one.

    Attributes:
        problem: What an error is to say in the place of any other one.
        remarks: What is to be told of the loss.
    """

    def __init__(self, model: keras.Model, loss: Any = None):
        self._model = model
        self._given = loss
        self._is_for_scoring = isinstance(loss, str) and loss in LOSSES
        self.problem: str | None = None
        self.remarks: set[str] = set()

    @property
    def _is_own(self) -> bool:
        """Whether a `compute_loss` of the model's own is what counts."""
        method = getattr(self._model.compute_loss, "__func__", None)
        return self._given is None and method is not keras.Model.compute_loss

    @property
    def _losses(self) -> list[Any]:
        """Each loss that is given or compiled."""
        losses = self._model.loss if self._given is None else self._given
        return [loss for loss in keras.tree.flatten(losses) if loss is not None]

    @property
    def name(self) -> str:
        """What an error calls it."""
        if self._is_own:
            return "the model's own compute_loss"
        names = (loss if isinstance(loss, str) else keras.losses.get(loss) for loss in self._losses)
        return ", ".join(repr(getattr(name, "name", getattr(name, "__name__", name))) for name in names)

    def check(self, temperature: float) -> None:
        """Raises if there is no loss or it cannot have this temperature.

        Raises:
            ValueError: That says how to mend it.
        """
        if self._given is None and not self._model.compiled:
            raise ValueError(
                f"The model {self._model.name!r} is not compiled and no loss was given. Call model.compile(optimizer, "
                "loss), or pass loss=... here."
            )
        if self._is_for_scoring:
            return
        try:
            has_logits = [takes_logits(loss) for loss in self._losses]
        except ValueError as error:
            raise ValueError(f"{error} Only for scoring there are {', '.join(map(repr, LOSSES))}.") from None
        if temperature != 1.0 and (self._is_own or not all(has_logits)):
            raise ValueError(
                f"A temperature of {temperature:g} divides the logits of a cross-entropy, but the loss is {self.name}. "
                "Use temperature=1.0, or a keras.losses cross-entropy, or a loss object that has from_logits=True."
            )

    def value(
        self, x: Any, y: Any, sample_weight: Any, temperature: float, training: bool, num_replicas: int
    ) -> BatchLoss:
        """The loss of a batch, in a `StatelessScope` that collects losses; a temperature divides the logits.

        Args:
            x: Inputs.
            y: Targets, or `None`.
            sample_weight: As in `fit`, or `None`.
            temperature: 1 for what `fit` minimizes.
            training: Passed to the model and to `compute_loss`.
            num_replicas: Keras divides means by it, to add up the gradients of the replicas. Here each has a batch
                of its own, and that is undone.
        """
        model = self._model
        loss = _for_scoring(model, self._given, temperature) if self._is_for_scoring else self._given
        scored = CompiledLoss.of(model, loss, temperature, num_replicas)
        with standing_in(model, scored):
            outputs = model(x, training=training)
            if self._is_for_scoring and scored is not None:
                total, has_rest = self._alone(scored, y, outputs, sample_weight), False
            elif self._is_own:
                takes_training = "training" in inspect.signature(model.compute_loss).parameters
                options = {"training": training} if takes_training else {}
                total, has_rest = model.compute_loss(x, y, outputs, sample_weight, **options), True
            elif scored is None and not model.losses:
                raise self._say(
                    f"The model {model.name!r} was compiled without a loss. Pass loss=..., or compile with one."
                )
            else:
                total = keras.Model.compute_loss(model, x, y, outputs, sample_weight)
                has_rest = bool(model.losses)
        if total is None:
            raise self._say(f"The loss of the model {model.name!r}, {self.name}, is None. It must be a tensor.")
        if has_rest and temperature != 1.0:
            self.remarks.add(
                f"A temperature of {temperature:g} divides the logits, not what add_loss and activity regularizers add "
                "to the loss, which so weighs more than in training. temperature=1.0 weighs it as fit does."
            )
        return BatchLoss(total * num_replicas, tuple(scored.terms if scored else ()), has_rest)

    def _alone(self, scored: CompiledLoss, y: Any, outputs: Any, sample_weight: Any) -> Any:
        if len(keras.tree.flatten(outputs)) > 1:
            raise self._say(
                f"loss={self._given!r} is for a model of one output, and {self._model.name!r} has "
                f"{len(keras.tree.flatten(outputs))}. Leave loss out, or pass what compile takes."
            )
        return scored(y if LOSSES[self._given].needs_labels else outputs, outputs, sample_weight)

    def _say(self, problem: str) -> ValueError:
        self.problem = problem
        return ValueError(problem)
