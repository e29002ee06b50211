"""What a loss is the sum of on one batch, and how several batches make the one of all their examples."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

# How a term goes from batches to all of their examples: as a mean over the examples, or as a sum. Any other name is
# that of one term, a mean over something else: elements, those that a padding mask leaves, or sample weights.
EXAMPLES = "examples"
SUM = "sum"
# Of each group of terms that combine alike: what its mean is over in a batch, and derivatives by each weight.
Parts = dict[str, tuple[Any, list[Any]]]


@dataclasses.dataclass(frozen=True)
class Term:
    """The value of one loss function on a batch.

    Attributes:
        value: A tensor; a scalar where it is reduced.
        group: `EXAMPLES`, `SUM`, or a name of its own.
        size: What the mean is over, as a scalar; `None` for the other two.
    """

    value: Any
    group: str
    size: Any = None


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """The loss of a batch.

    Attributes:
        total: A tensor, whose sum counts.
        terms: Parts of it whose batches combine in ways that are known.
        has_rest: Whether there is anything else in it, `add_loss` for one: a mean over examples.
    """

    total: Any
    terms: tuple[Term, ...] = ()
    has_rest: bool = True

    def gradients(self, tape: Any, weights: list[Any], num_examples: Any) -> Parts:
        """Of each group of terms that combine alike, what its mean is over, and its gradient; they sum to the total's.

        Args:
            tape: A persistent one, under which the loss was computed.
            weights: What to differentiate by.
            num_examples: The size of the batch, as a scalar.
        """
        sizes = {EXAMPLES: num_examples} if self.has_rest else {}
        for term in self.terms:
            sizes[term.group] = num_examples if term.size is None else term.size
        first, *others = sizes
        if not others:
            return {first: (sizes[first], tape.gradient(self.total, weights))}
        # By loss weights, and by what a compute_loss of the model's own does with the terms.
        factors = tape.gradient(self.total, [term.value for term in self.terms])
        known = [(term, factor) for term, factor in zip(self.terms, factors, strict=True) if factor is not None]
        parts = {}
        for group in others:
            targets = [term.value for term, _ in known if term.group == group]
            upstream = [factor for term, factor in known if term.group == group]
            parts[group] = sizes[group], tape.gradient(targets, weights, upstream) if targets else [None] * len(weights)
        # What is left of the total when the others' share is taken back where it begins: there it is exactly 0.
        targets = [self.total, *(term.value for term, _ in known if term.group != first)]
        upstream = [ops.ones_like(self.total), *(-factor for term, factor in known if term.group != first)]
        return {first: (sizes[first], tape.gradient(targets, weights, upstream)), **parts}


class Mean:
    """The parts of all batches, as those of one large batch. They may come one by one; the last are let go."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}
        self._sizes: dict[str, Any] = {}

    def add(self, parts: Parts) -> None:
        """Adds those of one more batch."""
        for group, (size, values) in parts.items():
            if group not in self._values:
                self._values[group], self._sizes[group] = list(values), size
                continue
            mean = self._values[group]
            self._sizes[group] = self._sizes[group] + size
            share = ops.divide_no_nan(size, self._sizes[group])
            for i, value in enumerate(values):
                mean[i] = mean[i] + (value if group == SUM else (value - mean[i]) * share)

    def as_sums(self) -> Parts:
        """In a form in which those of several workers can be added up."""
        return {
            group: (self._sizes[group], values if group == SUM else [value * self._sizes[group] for value in values])
            for group, values in self._values.items()
        }

    @classmethod
    def of_sums(cls, sums: Parts) -> "Mean":
        """The inverse of `as_sums`."""
        mean = cls()
        mean._values = {
            group: values if group == SUM else [ops.divide_no_nan(value, size) for value in values]
            for group, (size, values) in sums.items()
        }
        return mean

    def result(self) -> list[Any]:
        """The derivatives of the loss of all batches."""
        first, *others = self._values.values()
        return [sum(values[1:], values[0]) for values in zip(first, *others, strict=True)]


@contextlib.contextmanager
def watched(loss: keras.losses.Loss) -> Iterator[list[Any]]:
    """Sees what the loss gives element by element, before Keras reduces it: of the last call, if there was one.

    A name that TensorFlow does not take for a scope would stay in Keras's, and in the paths of all later variables.
    """
    seen: list[Any] = []
    own = vars(loss).get("call")
    name, call = loss.name, loss.call

    def watched_call(*args: Any, **kwargs: Any) -> Any:
        seen[:] = [call(*args, **kwargs)]
        return seen[0]

    object.__setattr__(loss, "call", watched_call)
    object.__setattr__(loss, "name", re.sub(r"[^A-Za-z0-9_.]", "_", name))
    try:
        yield seen
    finally:
        object.__setattr__(loss, "name", name)
        object.__delattr__(loss, "call")
        if own is not None:
            object.__setattr__(loss, "call", own)


def term(
    loss: keras.losses.Loss,
    value: Any,
    seen: list[Any],
    outputs: Any,
    sample_weight: Any,
    name: str,
    has_fixed_shape: bool,
    num_replicas: int,
) -> Term:
    """What Keras made of `seen`, so that several batches of it can be weighed.

    Args:
        loss: The loss.
        value: What it gave.
        seen: What `watched` saw: its values of the elements.
        outputs: What it was called with.
        sample_weight: The same.
        name: For a mean over something of its own.
        has_fixed_shape: Whether all batches have outputs of the same shape, but for their length.
        num_replicas: Keras divides means by it, and what `add_loss` adds. Then all is, until `BatchLoss` undoes it.
    """
    function = getattr(loss, "fn", None)  # a foreign loss object may say that it sums
    is_scalar = not seen or not len(seen[0].shape)
    if loss.reduction == "sum" or (is_scalar and getattr(function, "reduction", None) == "sum"):
        return Term(value / num_replicas, SUM)
    if is_scalar:  # what a function makes of a batch, nobody else can tell
        return Term(value / num_replicas, EXAMPLES)
    if loss.reduction in (None, "none"):
        return Term(value / num_replicas, SUM)
    (values,) = seen
    masks = [m for m in (getattr(t, "_keras_mask", None) for t in (outputs, values)) if m is not None]
    mask = ops.cast(ops.all(ops.stack(masks), 0) if len(masks) > 1 else masks[0], "float32") if masks else None
    if loss.reduction == "mean_with_sample_weight" and sample_weight is not None:
        weights = ops.cast(sample_weight, "float32")
        if mask is not None:
            rank = max(len(weights.shape), len(mask.shape))
            weights, mask = (ops.reshape(t, (*ops.shape(t), *[1] * (rank - len(t.shape)))) for t in (weights, mask))
            weights = weights * mask
        return Term(value, name, ops.sum(weights))
    if mask is not None:
        return Term(value, name, ops.sum(mask))
    rank = max(len(leaf.shape) for leaf in keras.tree.flatten(outputs))
    # All elements of an example, of which there are always as many: it is a mean over the examples, too.
    if len(values.shape) >= rank - 1 and (len(values.shape) == 1 or has_fixed_shape):
        return Term(value, EXAMPLES)
    return Term(value, name, ops.cast(ops.size(values), "float32"))
