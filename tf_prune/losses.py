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
    """A loss that takes logits, whatever the model ends in; `from_logits=None` where nothing says what it ends in.

    The target is the labels; a subclass takes another one, and then needs none. One logit, or each of several in a
    model of binary labels, is two classes of which the first has the logit 0.
    """

    needs_labels = False

    def __init__(self, from_logits: bool | None = None, binary: bool = False, **options: Any):
        super().__init__(**options)
        self.from_logits = from_logits
        self.binary = binary

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "from_logits": self.from_logits, "binary": self.binary}

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if self.binary or y_pred.shape[-1] == 1:
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
        return ops.stop_gradient(ops.mean(ops.softmax(logits), 0, keepdims=True))


class _RawPrediction(_OnLogits):
    """The same, averaged before the softmax."""

    def target(self, y_true: Any, logits: Any) -> Any:
        return ops.stop_gradient(ops.softmax(ops.mean(logits, 0, keepdims=True)))


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


def _resolve(model: keras.Model, loss: Any) -> keras.losses.Loss | None:
    """The loss as an object, or `None` for the model's own `compute_loss`: several losses, or one of the user's."""
    if isinstance(loss, str) and loss in LOSSES:
        compiled = _resolve(model, None) if model.compiled and model.loss is not None else None
        from_logits = compiled.get_config().get("from_logits") if compiled is not None else None
        return LOSSES[loss](from_logits, "Binary" in type(compiled).__name__, name=loss)
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
    try:
        loss = keras.losses.get(loss)
    except ValueError as error:
        raise ValueError(f"{error} Only for scoring there are {', '.join(map(repr, LOSSES))}.") from None
    name = getattr(loss, "__name__", "")
    if name and loss is getattr(keras.losses, name, None):
        # The class of the same name knows how to reduce, and whether it takes logits.
        loss_class = getattr(keras.losses, "".join(word.title() for word in name.split("_")), None)
        loss = loss_class() if loss_class else loss
    if isinstance(loss, keras.losses.Loss):
        return loss
    return None if is_compiled else _Wrapped(loss)


def _is_cross_entropy(loss: Any) -> bool:
    """Whether the loss is one that can be taken on logits."""
    return isinstance(loss, keras.losses.Loss) and "from_logits" in loss.get_config()


def _logits(loss: keras.losses.Loss, outputs: Any) -> Any:
    from_logits = loss.get_config()["from_logits"]
    if from_logits:
        return outputs
    if from_logits is None or hasattr(outputs, "_keras_logits"):
        return getattr(outputs, "_keras_logits", outputs)
    # A constant per example drops out of a softmax, so the logarithm is as good as the logits.
    probabilities = ops.maximum(ops.cast(outputs, "float32"), _SMALLEST)
    is_binary = isinstance(loss, _OnLogits) and (loss.binary or outputs.shape[-1] == 1)
    if is_binary or "Binary" in type(loss).__name__:
        return ops.log(probabilities) - ops.log(ops.maximum(1.0 - probabilities, _SMALLEST))
    return ops.log(probabilities)


class ModelLoss:
    """The mean loss of a model on a batch: on logits, whatever the model ends in, where it is a cross-entropy.

    Args:
        model: A built `keras.Model`.
        loss: A Keras loss, its name, one of `LOSSES`, or a callable `(y, outputs)`; `None` takes the compiled one.
    """

    def __init__(self, model: keras.Model, loss: Any = None):
        self._model = model
        self._given = loss
        self._loss: keras.losses.Loss | None = None
        self._is_resolved = False

    def check(self, temperature: float) -> None:
        """Finds the loss, and raises if there is none or it cannot have this temperature.

        Raises:
            ValueError: That says how to mend it.
        """
        if not self._is_resolved:
            outputs = getattr(self._model, "outputs", None) or []
            if self._given is not None and len(outputs) > 1:
                raise ValueError(
                    f"loss={self._given!r} cannot be taken for a model with {len(outputs)} outputs. Compile the model "
                    "with its losses and leave loss out."
                )
            self._loss, self._is_resolved = _resolve(self._model, self._given), True
        if temperature != 1.0 and not _is_cross_entropy(self._loss):
            raise ValueError(
                f"A temperature of {temperature:g} divides the logits of one cross-entropy, but the loss is "
                f"{self.name}. Use temperature=1.0, or compile with a keras.losses cross-entropy."
            )

    @property
    def name(self) -> str:
        """What an error calls it."""
        if self._loss is not None:
            return repr(self._loss.name)
        own = type(self._model).compute_loss is not keras.Model.compute_loss
        return "the model's own compute_loss" if own else repr(self._model.loss)

    @property
    def is_mean(self) -> bool:
        """Whether it averages over examples, as Keras's losses do unless asked otherwise."""
        return getattr(self._loss, "reduction", "mean") not in (None, "none", "sum")

    def value(self, x: Any, y: Any, sample_weight: Any, temperature: float, training: bool) -> Any:
        """The loss function's value alone, without regularizers; logits are divided by the temperature."""
        outputs = self._model(x, training=training)
        if len(keras.tree.flatten(outputs)) == 1:
            (outputs,) = keras.tree.flatten(outputs)
            y = keras.tree.flatten(y)[0] if len(keras.tree.flatten(y)) == 1 else y
        if _is_cross_entropy(self._loss):
            assert self._loss is not None  # noqa: S101 - for the type checker
            config = {**self._loss.get_config(), "from_logits": True, "dtype": self._loss.dtype}
            logits = _logits(self._loss, outputs) / temperature
            y = y if getattr(self._loss, "needs_labels", True) else logits
            return type(self._loss).from_config(config)(y, logits, sample_weight)
        if self._loss is not None:
            return self._loss(y, outputs, sample_weight)
        value = self._model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight)
        is_keras = type(self._model).compute_loss is keras.Model.compute_loss
        return value - sum(self._model.losses) if is_keras else value
