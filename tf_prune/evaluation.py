"""Evaluates a model at other weights than its own, batch by batch, on all devices, and leaves it as it was."""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_prune.batches import inputs_like
from tf_prune.examples import Batch, as_numpy, size_of
from tf_prune.losses import ModelLoss
from tf_prune.noise import check_no_state, noise_off, why_not_repeatable
from tf_prune.terms import BatchLoss, Mean, Parts

Arrays = dict[str, np.ndarray]
Tensors = list[tf.Tensor]
MaskMapping = Mapping[str, np.ndarray]

_LARGE = 4096  # examples in one batch, above which it is told how to cut it
_NUMBERS = itertools.count()
_NO_LABELS = (
    "missing (only the losses 'uniform', 'prediction' and 'prediction_raw' need none, and a function that does not "
    "look at it)"
)


class Evaluation:
    """A model, its loss and variables that are replaced while it is evaluated.

    The model is called in a `keras.StatelessScope` with other weights in the place of its own: no variable of the model
    is written, neither weights nor batch-normalization statistics nor seeds, also when an error is raised. What is
    evaluated is traced once; masks enter the compiled function as arguments. XLA compiles it where the model was
    compiled with `jit_compile=True`.

    Args:
        model: A built `keras.Model`.
        variables: Mapping of path to the variables that are replaced.
        loss: What `compile` takes, or a callable `(y, outputs)`; `None` takes the compiled one.
        dropout: Whether dropout, noise and augmentation act; the same in each batch, as the model's seeds stay.
    """

    def __init__(
        self,
        model: keras.Model,
        variables: Mapping[str, keras.Variable],
        loss: Any = None,
        dropout: bool = False,
    ):
        self._dropout = dropout
        self._jit = True if model.compiled and model.jit_compile is True else None
        self._model = model
        self.variables = dict(variables)
        self._loss = ModelLoss(model, loss)
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._disconnected: list[str] = []
        self._told: set[str] = set()
        self._problem: str | None = None
        # Gradients that pass through float16 would underflow, as in training; exact, being a power of 2.
        halves = any(layer.compute_dtype == "float16" for layer in model._flatten_layers())
        self._scale = 128.0 if halves else 1.0
        self._strategy = model.distribute_strategy
        num_replicas = self._strategy.num_replicas_in_sync
        self._num_devices = len(self._strategy.extended.worker_devices) if num_replicas > 1 else 1  # of this worker
        self._is_multi_worker = num_replicas > self._num_devices

    def weights(self) -> Arrays:
        """The weights as they are, in float32, read-only: not a copy where the variable is of that type."""
        return self._named([tf.cast(tf.convert_to_tensor(v.value), tf.float32) for v in self.variables.values()])

    def sees_its_input(self, masks: MaskMapping, example: Any = None) -> bool:
        """Whether the masked network's outputs differ between the examples of a batch.

        In a deep network that was never trained they may with the batch's statistics alone: with the moving ones its
        signals fade. Either will do. `True` also where it cannot be told: without inputs that differ, without outputs
        of floats that have a row for each example, or if the model cannot be called on them.

        Args:
            masks: Masks of all variables.
            example: Inputs; `None` draws some, if the model says their shape.
        """
        try:
            example = self._differing(example)
            return example is None or any(self._outputs_differ(masks, example, training) for training in (False, True))
        except Exception:  # It serves a warning alone, and must not fail where pruning does not.
            return True

    def _differing(self, example: Any) -> Any:
        """Inputs that are not the same for each example, or `None`."""
        if example is None:
            generator = np.random.default_rng(0)
            example = inputs_like(self._model, lambda shape, dtype: generator.integers(0, 2, (8, *shape)).astype(dtype))
        fixed = getattr(self._model, "inputs", None) and self._model.inputs[0].shape[0]
        if example is not None and fixed:  # a model of one batch size only
            example = keras.tree.map_structure(lambda leaf: np.resize(leaf, (fixed, *np.shape(leaf)[1:])), example)
        leaves = [as_numpy(leaf) for leaf in keras.tree.flatten(example) if leaf is not None]
        return example if any((leaf != leaf[:1]).any() for leaf in leaves) else None

    def _outputs_differ(self, masks: MaskMapping, example: Any, training: bool) -> bool:
        weights = self._masked_weights(self._mask_tensors(masks))
        scope = keras.StatelessScope(state_mapping=list(zip(self.variables.values(), weights, strict=True)))
        with scope, noise_off(self._model):
            inputs = keras.tree.map_structure(as_tensor, example)
            outputs = keras.tree.flatten(self._model(inputs, training=training))
        # Classes are the same for many inputs, and a loss is one for all of them.
        rows = size_of(example)
        tensors = [output.to_tensor() if isinstance(output, tf.RaggedTensor) else output for output in outputs]
        tensors = [tensor for tensor in tensors if tf.is_tensor(tensor) and tensor.dtype.is_floating]
        tensors = [tensor for tensor in tensors if tensor.shape.rank and len(tensor) == rows]
        return not tensors or any(bool(tf.reduce_any(tensor != tensor[:1])) for tensor in tensors)

    # -- what is traced ------------------------------------------------------------------------

    def _function(self, key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        if key not in self._functions:
            check_no_state(self._model)

            def traced(*args: Any) -> Any:
                value = function(*args)
                self._problem = why_not_repeatable(tf.compat.v1.get_default_graph())
                if self._problem:
                    raise ValueError(self._problem)  # before it runs, and writes
                return value

            # TensorFlow warns of retracing by code, and all models have this one.
            traced.__code__ = traced.__code__.replace(co_name=f"derivative_{next(_NUMBERS)}")
            self._functions[key] = tf.function(traced, reduce_retracing=True, autograph=False, jit_compile=self._jit)
        return self._functions[key]

    def _masked_weights(self, masks: Tensors | None) -> Tensors:
        weights = [tf.convert_to_tensor(variable.value) for variable in self.variables.values()]
        if masks is None:
            return weights
        return [tf.where(mask, weight, tf.zeros((), weight.dtype)) for mask, weight in zip(masks, weights, strict=True)]

    def _mask_tensors(self, masks: MaskMapping | None) -> Tensors | None:
        return None if masks is None else [tf.constant(masks[path]) for path in self.variables]

    def _loss_value(self, weights: Tensors, batch: Batch, temperature: float, training: bool) -> BatchLoss:
        """The loss times the temperature, which keeps its gradient in range, and times the scale of float16."""
        mapping = list(zip(self.variables.values(), weights, strict=True))
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True):
            loss = self._loss.value(*batch, temperature, training, num_replicas)
        return dataclasses.replace(loss, total=loss.total * (self._scale * temperature))

    # -- what is checked, and what is averaged ---------------------------------------------------

    def _mean(
        self, function: Callable[..., Parts], batches: Iterable[Batch], masks: MaskMapping | None, *rest: Any
    ) -> Arrays:
        """Averages what `function` gives for each batch over all examples, those of other workers included.

        Each device of this worker takes the next batch, and the average is taken in their order: it is that of one
        device, since no batch is cut. Workers may have different numbers of batches.
        """
        mask_tensors = self._mask_tensors(masks)
        mean = Mean()
        stream = iter(batches)
        while dealt := list(itertools.islice(stream, self._num_devices)):
            for parts in self._evaluate(function, dealt, mask_tensors, *rest):
                mean.add(parts)
        self._tell()
        return self._named(self._over_workers(mean))

    def _over_workers(self, mean: Mean) -> Tensors:
        """The mean over the examples of all workers, the same on each of them bit for bit."""
        if not self._is_multi_worker:
            return mean.result()

        def all_reduce(values: Tensors) -> Tensors:
            context = tf.distribute.get_replica_context()
            is_first = context.replica_id_in_sync_group % self._num_devices == 0
            own = [tf.where(is_first, value, tf.zeros_like(value)) for value in values]
            return context.all_reduce(tf.distribute.ReduceOp.SUM, own)

        if "all_reduce" not in self._functions:
            self._functions["all_reduce"] = tf.function(lambda values: self._strategy.run(all_reduce, (values,)))
        sums = mean.as_sums()
        reduced = self._functions["all_reduce"](tf.nest.flatten(sums))
        total = [self._strategy.experimental_local_results(value)[0] for value in reduced]
        return Mean.of_sums(tf.nest.pack_sequence_as(sums, total)).result()

    def _run(self, function: Callable[..., Parts], batches: list[Batch], *rest: Any) -> list[Parts]:
        """What `function` gives for each batch: one after the other, or each on a device of its own."""
        tensors = [keras.tree.map_structure(as_tensor, batch) for batch in batches]
        if len(batches) == 1 or len(batches) < self._num_devices:
            return [function(batch, *rest) for batch in tensors]
        placed = self._strategy.experimental_distribute_values_from_function(
            lambda context: tensors[context.replica_id_in_sync_group % self._num_devices]
        )
        values = self._strategy.run(function, (placed, *rest))
        of_each = [self._strategy.experimental_local_results(value) for value in tf.nest.flatten(values)]
        return [tf.nest.pack_sequence_as(values, list(parts)) for parts in zip(*of_each, strict=True)]

    def _evaluate(self, function: Callable[..., Parts], batches: list[Batch], *rest: Any) -> list[Parts]:
        self._tell_of_size(size_of(batches[0]))
        try:
            with contextlib.nullcontext() if self._dropout else noise_off(self._model):
                values = self._run(function, batches, *rest)
        except Exception as error:  # of the user's own functions, too
            problem = self._problem or self._loss.problem
            if problem:
                raise ValueError(problem) from None
            x, y, _ = batches[0]
            lines = [line.strip() for line in str(error).splitlines() if line.strip() and "{{node" not in line]
            raise ValueError(
                f"The loss cannot be computed on this batch: x is {_describe(x)}, y is {_describe(y)}, the loss is "
                f"{self._loss.name}. Check that x fits the model and y the loss: a sparse "
                "categorical cross-entropy takes integers below the number of outputs, a categorical one takes one-hot "
                f"rows.{self._unbatched(x)} The cause: {lines[-1] if lines else type(error).__name__}"
            ) from error
        if len(self._disconnected) == len(self.variables):
            raise ValueError(
                f"The loss, {self._loss.name}, gives no gradient to any kernel that is to be scored: "
                f"{', '.join(self._disconnected)}. Take another loss or other layers, or a criterion without data."
            )
        return values

    def _tell_of_size(self, size: int) -> None:
        """In one sentence, and once."""
        if size > _LARGE and "size" not in self._told:
            self._told.add("size")
            warnings.warn(
                f"A batch of {size:,} examples is scored at once, which takes memory for all of them; batch_size=128 "
                "cuts arrays into batches whose scores are averaged, and a data set is batched smaller.",
                stacklevel=2,
            )

    def _unbatched(self, x: Any) -> str:
        """What is probably wrong where x has an axis less than the model takes; empty if it has not."""
        inputs, leaves = getattr(self._model, "inputs", None) or [], keras.tree.flatten(x)
        for tensor, leaf in zip(inputs, leaves, strict=False):
            if leaf is not None and len(leaf.shape) == len(tensor.shape) - 1:
                return (
                    f" The model takes {tuple(tensor.shape)}, so x lacks the axis of examples: a data set is batched "
                    "by data.batch(32), and a single example is x[:1], y[:1]."
                )
        return ""

    def _tell(self) -> None:
        """What is to be known of the scores, once."""
        remarks = set(self._loss.remarks)
        if self._disconnected:
            remarks.add(
                f"The loss does not depend on {', '.join(self._disconnected)}. What it does not need scores 0 and is "
                "removed first, or early. Leave their layers out with filters=... to keep them."
            )
        for remark in sorted(remarks - self._told):
            warnings.warn(remark, stacklevel=5)
        self._told |= remarks

    def _named(self, tensors: Tensors) -> Arrays:
        """As read-only arrays on the tensors' own memory."""
        return {path: np.asarray(memoryview(tensor)) for path, tensor in zip(self.variables, tensors, strict=True)}


def as_tensor(leaf: Any) -> Any:
    """As TensorFlow takes it: ragged and sparse parts as they are."""
    if leaf is None or isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
        return leaf
    if hasattr(leaf, "tocoo"):  # a sparse matrix of SciPy
        matrix = leaf.tocoo()
        return tf.sparse.reorder(tf.SparseTensor(np.stack([matrix.row, matrix.col], 1), matrix.data, matrix.shape))
    return tf.convert_to_tensor(leaf)


def _describe(part: Any) -> str:
    leaves = [as_numpy(leaf) for leaf in keras.tree.flatten(part) if leaf is not None]
    texts = [
        f"{a.dtype}{list(a.shape)}" + (f" from {a.min()} to {a.max()}" if a.size and a.dtype.kind not in "OSU" else "")
        for a in leaves
    ]
    return ", ".join(texts) or _NO_LABELS
