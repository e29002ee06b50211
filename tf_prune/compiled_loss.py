"""Keras's own compiled loss, term by term; the one file that touches private parts of Keras's losses."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.trainers.compile_utils import CompileLoss

from tf_prune.terms import Term, term, watched

_SMALLEST = 1e-37  # nearly the smallest normal float32: the logarithm of a probability stays finite

# Keras's losses that can be taken on logits, objects of exactly these classes or functions, and the activation that
# makes probabilities of logits for them. Every other loss is called as it is, a subclass of these too.
_ON_LOGITS = {
    keras.losses.CategoricalCrossentropy: "softmax",
    keras.losses.CategoricalFocalCrossentropy: "softmax",
    keras.losses.SparseCategoricalCrossentropy: "softmax",
    keras.losses.BinaryCrossentropy: "sigmoid",
    keras.losses.BinaryFocalCrossentropy: "sigmoid",
    keras.losses.categorical_crossentropy: "softmax",
    keras.losses.categorical_focal_crossentropy: "softmax",
    keras.losses.sparse_categorical_crossentropy: "softmax",
    keras.losses.binary_crossentropy: "sigmoid",
    keras.losses.binary_focal_crossentropy: "sigmoid",
}


def activation_before(loss: Any) -> str | None:
    """What the table says of a loss."""
    kind = loss.fn if type(loss) is LossFunctionWrapper else loss if inspect.isfunction(loss) else type(loss)
    return next((activation for known, activation in _ON_LOGITS.items() if known is kind), None)


def is_binary(loss: Any) -> bool:
    """Whether each output is one of two classes, in a subclass too."""
    kinds = tuple(kind for kind, activation in _ON_LOGITS.items() if inspect.isclass(kind) and activation == "sigmoid")
    return activation_before(loss) == "sigmoid" or isinstance(loss, kinds)


def takes_logits(loss: Any) -> bool:
    """Whether it is known where the logits of a loss, or of what `compile` takes for one, are."""
    if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):
        return True
    loss = keras.losses.get(loss)
    return activation_before(loss) is not None or getattr(loss, "from_logits", None) is True


def log_odds(probabilities: Any, is_binary: bool) -> Any:
    """Logits of probabilities. A constant per example drops out of a softmax, so there the logarithm is as good."""
    probabilities = ops.maximum(ops.cast(probabilities, "float32"), _SMALLEST)
    if is_binary:
        return ops.log(probabilities) - ops.log(ops.maximum(1.0 - probabilities, _SMALLEST))
    return ops.log(probabilities)


def _seen_by(loss: keras.losses.Loss, outputs: Any, temperature: float) -> Any:
    """The outputs as the loss is to get them: as they are, unless a temperature or a cast takes their logits away."""
    activation, from_logits = activation_before(loss), getattr(loss, "from_logits", None) is True
    logits = getattr(outputs, "_keras_logits", None)
    if temperature == 1.0:
        # Keras finds logits behind an activation, but not behind the cast that mixed precision makes of it.
        is_cast = logits is not None and logits.dtype != loss.dtype and activation and not from_logits
        if not is_cast or getattr(getattr(outputs, "op", None), "type", "").lower() != activation:
            return outputs
    elif keras.tree.is_nested(outputs) or not (activation or from_logits):
        return outputs
    if logits is None or not activation:
        logits = outputs if from_logits else log_odds(outputs, activation == "sigmoid")
    seen = ops.cast(logits, loss.dtype) / temperature
    if not from_logits:
        # Puts the logits on its result, where Keras's losses find them.
        axis = {} if activation == "sigmoid" else {"axis": getattr(loss, "axis", -1)}
        seen = getattr(keras.activations, str(activation))(seen, **axis)
    seen._keras_mask = getattr(outputs, "_keras_mask", None)
    return seen


class _AsGiven(keras.losses.Loss):
    """A loss whose targets are not one for each output: no cast and no rank fits, so it gets them as they are."""

    def __init__(self, loss: Any):
        loss = keras.losses.get(loss)
        is_loss = isinstance(loss, keras.losses.Loss)
        super().__init__("loss", **({"reduction": loss.reduction, "dtype": loss.dtype} if is_loss else {}))
        self.from_logits = getattr(loss, "from_logits", None)
        self.fn = loss.call if is_loss else loss

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        values = ops.convert_to_tensor(self.fn(y_true, y_pred))
        if getattr(y_pred, "_keras_mask", None) is not None:
            values._keras_mask = y_pred._keras_mask
        return super().__call__(values, values, sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


class _NoMetric:
    """Where Keras keeps a mean of the loss of each output."""

    variables = ()

    def __bool__(self) -> bool:
        return False


class CompiledLoss(CompileLoss):
    """The losses of all outputs and their weighted sum, for one trace.

    Targets that are not one for each output, which `fit` refuses, go to a single loss as they are: a function gets
    `None`, or any structure, and all outputs.

    Args:
        loss: What `compile` takes.
        loss_weights: The same.
        output_names: The same.
        temperature: Divides logits.
        has_fixed_shape: As in `terms.term`.
        num_replicas: The same.

    Attributes:
        terms: Of all calls: a `compute_loss` of the model's own may make several.
    """

    def __init__(
        self,
        loss: Any,
        loss_weights: Any,
        output_names: list[str] | None,
        temperature: float,
        has_fixed_shape: bool,
        num_replicas: int,
    ):
        super().__init__(loss, loss_weights, output_names=output_names)
        self._temperature = temperature
        self._has_fixed_shape = has_fixed_shape
        self._num_replicas = num_replicas
        self._user_loss: Any
        self._user_loss_weights: Any
        self._flat_losses: Any
        self._found: Any = None
        self.terms: list[Term] = []

    @classmethod
    def of(cls, model: keras.Model, loss: Any, temperature: float, num_replicas: int) -> "CompiledLoss | None":
        """This loss, or the compiled one with its weights where it is `None`; `None` if there is neither."""
        compiled, weights = model._compile_loss, None
        if loss is None and compiled is not None:
            loss, weights = compiled._user_loss, compiled._user_loss_weights
        outputs = getattr(model, "outputs", None) or []
        is_fixed = bool(outputs) and all(None not in output.shape[1:] for output in outputs)
        names = getattr(model, "output_names", None)
        return None if loss is None else cls(loss, weights, names, temperature, is_fixed, num_replicas)

    def _build_nested(self, *args: Any) -> None:
        is_outermost = self._found is None
        self._found = self._flat_losses
        super()._build_nested(*args)
        if is_outermost:  # `build` is to find none: it would make a metric of each, with variables
            self._flat_losses = []

    def build(self, y_true: Any, y_pred: Any) -> None:
        """Finds the loss of each output."""
        super().build(y_true, y_pred)
        self._flat_losses = [one._replace(loss=functools.partial(self._one, one.loss)) for one in self._found]

    @property
    def metrics(self) -> list[Any]:
        """None that does anything."""
        return [_NoMetric()] * len(self._flat_losses or ())

    def call(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The weighted sum; adds to `terms`."""
        if isinstance(y_pred, (list, tuple)) and self.output_names:
            self._name_the_rest()
            if isinstance(y_true, dict) and set(y_true) <= set(self.output_names):
                y_true = [y_true.get(name) for name in self.output_names]
        elif not keras.tree.is_nested(y_pred) and len(keras.tree.flatten(y_true)) == 1:
            (y_true,) = keras.tree.flatten(y_true)
        is_one_loss = not keras.tree.is_nested(self._user_loss)
        if is_one_loss and (y_true is None or len(keras.tree.flatten(y_true)) != len(keras.tree.flatten(y_pred))):
            if self._temperature != 1.0 and keras.tree.is_nested(y_pred):
                raise ValueError("A temperature cannot divide the logits of all outputs at once. Use temperature=1.0.")
            return self._one(_AsGiven(self._user_loss), y_true, y_pred, sample_weight)
        return super().call(y_true, y_pred, sample_weight)

    def _name_the_rest(self) -> None:
        """For outputs without a loss Keras takes `None` in a list, but no table that leaves them out."""
        if isinstance(self._user_loss, dict) and set(self._user_loss) < set(self.output_names):
            self._user_loss = [self._user_loss.get(name) for name in self.output_names]
            if isinstance(self._user_loss_weights, dict):
                self._user_loss_weights = [self._user_loss_weights.get(name) for name in self.output_names]

    def _one(self, loss: keras.losses.Loss, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        outputs = _seen_by(loss, y_pred, self._temperature)
        with watched(loss) as seen:
            value = loss(y_true, outputs, sample_weight)
        name = f"term {len(self.terms)}"
        found = term(loss, value, seen, outputs, sample_weight, name, self._has_fixed_shape, self._num_replicas)
        self.terms.append(found)
        return found.value


@contextlib.contextmanager
def standing_in(model: keras.Model, loss: CompiledLoss | None) -> Iterator[None]:
    """Puts a loss in the place of the compiled one, which stays as it was, and switches weight regularizers off."""
    compiled = model._compile_loss
    regularizers = [(v, v.regularizer) for v in model.weights if v.regularizer is not None]
    try:
        model._compile_loss = loss
        for variable, _ in regularizers:
            variable.regularizer = None
        yield
    finally:
        model._compile_loss = compiled
        for variable, regularizer in regularizers:
            variable.regularizer = regularizer
