"""What a user calls a loss, as one that can be differentiated: a cross-entropy on logits wherever it is one."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

_SMALLEST = 1e-37  # nearly the smallest normal float32: the logarithm of a probability stays finite


class _Wrapped(keras.losses.Loss):
    """A user's function as a loss, with the casts and the ranks that `compile` would give it."""

    def __init__(self, function: Callable[[Any, Any], Any]):
        super().__init__(name=getattr(function, "__name__", "loss"))
        self._function = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if len(y_true.shape) == len(y_pred.shape) - 1 and y_pred.shape[-1] == 1:
            y_true = y_true[..., None]
        elif len(y_true.shape) == len(y_pred.shape) + 1 and y_true.shape[-1] == 1:
            y_true = y_true[..., 0]
        return self._function(y_true, y_pred)


class _OnLogits(keras.losses.Loss):
    """A loss that takes logits, whatever the model ends in; `from_logits=None` where nothing says what it ends in."""

    def __init__(self, from_logits: bool | None = None, **options: Any):
        super().__init__(**options)
        self.from_logits = from_logits

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "from_logits": self.from_logits}

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if y_pred.shape[-1] == 1:  # one logit of two classes
            y_pred = ops.concatenate([ops.zeros_like(y_pred), y_pred], -1)
        log_probabilities = ops.log_softmax(y_pred)
        return -ops.sum(self.target(y_pred) * log_probabilities, -1)

    def target(self, logits: Any) -> Any:
        raise NotImplementedError


class _Uniform(_OnLogits):
    """Cross-entropy with the uniform distribution in the place of the labels."""

    def target(self, logits: Any) -> Any:
        return 1.0 / logits.shape[-1]


class _Prediction(_OnLogits):
    """Cross-entropy with the prediction, averaged over the batch, in the place of the labels."""

    def target(self, logits: Any) -> Any:
        return ops.stop_gradient(ops.mean(ops.softmax(logits), 0, keepdims=True))


class _RawPrediction(_OnLogits):
    """The same, averaged before the softmax."""

    def target(self, logits: Any) -> Any:
        return ops.stop_gradient(ops.softmax(ops.mean(logits, 0, keepdims=True)))


class _RawLogit(_OnLogits):
    """`-mean(logit[label])`: a negative log-likelihood that is given logits."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if len(y_true.shape) < len(y_pred.shape) or y_true.shape[-1] != y_pred.shape[-1]:
            labels = y_true[..., 0] if len(y_true.shape) == len(y_pred.shape) else y_true
            y_true = ops.one_hot(ops.cast(labels, "int32"), y_pred.shape[-1])
        return -ops.sum(ops.cast(y_true, y_pred.dtype) * y_pred, -1)


# Losses that only scoring uses. The first three need no labels: Lee et al. 2020, Sec. 5.2, "Unif." and "Pred.
# (softmax / raw)". The paper says of the last two no more than "the averaged output prediction of the network".
LOSSES: dict[str, type[_OnLogits]] = {
    "uniform": _Uniform,
    "prediction": _Prediction,
    "prediction_raw": _RawPrediction,
    "quirk_raw_logit": _RawLogit,
}


def needs_labels(loss: Any) -> bool:
    """Whether the loss looks at the labels at all."""
    return not isinstance(loss, (_Uniform, _Prediction, _RawPrediction))


def resolve_loss(model: keras.Model, loss: Any) -> keras.losses.Loss | None:
    """The loss as an object, or `None` for the model's own `compute_loss`: several losses, or one of the user's."""
    if isinstance(loss, str) and loss in LOSSES:
        compiled = resolve_loss(model, None) if model.compiled and model.loss is not None else None
        from_logits = compiled.get_config().get("from_logits") if compiled is not None else None
        return LOSSES[loss](from_logits, name=loss)
    is_compiled = loss is None
    if is_compiled:
        if not model.compiled:
            raise ValueError(
                f"The model {model.name!r} is not compiled and no loss was given. Call model.compile(optimizer, loss), "
                "or pass loss=... here."
            )
        if type(model).compute_loss is not keras.Model.compute_loss:
            return None
        loss = model.loss
        if loss is None:
            raise ValueError(
                f"The model {model.name!r} was compiled without a loss. Pass loss=..., or compile with one."
            )
        if isinstance(loss, (list, tuple, dict)) and len(loss) == 1:
            (loss,) = loss.values() if isinstance(loss, dict) else loss
        if isinstance(loss, (list, tuple, dict)) or loss in ("crossentropy", "ce"):
            return None
    loss = keras.losses.get(loss)
    name = getattr(loss, "__name__", "")
    if name and loss is getattr(keras.losses, name, None):
        # The class of the same name knows how to reduce, and whether it takes logits.
        loss_class = getattr(keras.losses, "".join(word.title() for word in name.split("_")), None)
        loss = loss_class() if loss_class else loss
    if isinstance(loss, keras.losses.Loss):
        return loss
    return None if is_compiled else _Wrapped(loss)


def is_cross_entropy(loss: Any) -> bool:
    """Whether the loss is a cross-entropy, which can be taken on logits."""
    return isinstance(loss, keras.losses.Loss) and "from_logits" in loss.get_config()


def on_logits(loss: keras.losses.Loss, outputs: Any, temperature: float) -> tuple[keras.losses.Loss, Any]:
    """The same cross-entropy taking logits, and the logits: what went into the final softmax or sigmoid.

    Args:
        loss: A cross-entropy.
        outputs: Of the model.
        temperature: Divides the logits.
    """
    config = {**loss.get_config(), "from_logits": True, "dtype": loss.dtype}
    return type(loss).from_config(config), _logits(loss, outputs) / temperature


def _logits(loss: keras.losses.Loss, outputs: Any) -> Any:
    from_logits = loss.get_config()["from_logits"]
    if from_logits:
        return outputs
    if from_logits is None or hasattr(outputs, "_keras_logits"):
        return getattr(outputs, "_keras_logits", outputs)
    # A constant per example drops out of a softmax, so the logarithm is as good as the logits.
    probabilities = ops.maximum(ops.cast(outputs, "float32"), _SMALLEST)
    if "Binary" in type(loss).__name__ or (isinstance(loss, _OnLogits) and outputs.shape[-1] == 1):
        return ops.log(probabilities) - ops.log(ops.maximum(1.0 - probabilities, _SMALLEST))
    return ops.log(probabilities)
