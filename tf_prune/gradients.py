"""First and second derivatives of a model's loss by its weights. The only nested `GradientTape`s."""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_prune.batches import Batches, inputs_like, why_no_inputs
from tf_prune.calls import floats, on_logits
from tf_prune.examples import Batch, as_numpy, rows, size_of
from tf_prune.losses import ModelLoss
from tf_prune.noise import check_no_state, noise_off, why_not_repeatable
from tf_prune.precision import computing_in_float64, first_below_float64
from tf_prune.prunable import check_call
from tf_prune.terms import EXAMPLES, BatchLoss, Mean, Parts

Arrays = dict[str, np.ndarray]
Tensors = list[tf.Tensor]
MaskMapping = Mapping[str, np.ndarray]
_NUMBERS = itertools.count()
_NO_LABELS = (
    "missing (only the losses 'uniform', 'prediction' and 'prediction_raw' need none, and a function that does not "
    "look at it)"
)


_LARGE = 4096  # examples in one batch, above which it is told how to cut it


def _as_tensor(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
        return leaf
    if hasattr(leaf, "tocoo"):  # a sparse matrix of SciPy
        matrix = leaf.tocoo()
        return tf.sparse.reorder(tf.SparseTensor(np.stack([matrix.row, matrix.col], 1), matrix.data, matrix.shape))
    return tf.convert_to_tensor(leaf)


def _as_dense(leaf: Any) -> Any:
    return tf.sparse.to_dense(leaf) if isinstance(leaf, tf.SparseTensor) else leaf


def _as_ones(leaf: Any) -> Any:
    """Ones in the place of each value; of strings, which have none, the strings themselves."""
    leaf = _as_tensor(leaf)
    if leaf.dtype == tf.string:
        return leaf
    if isinstance(leaf, tf.RaggedTensor):
        return leaf.with_flat_values(tf.ones_like(leaf.flat_values))
    return tf.ones(leaf.shape, leaf.dtype)


_SCORING = "Scoring by derivatives (which magnitude does without)"


def _describe(part: Any) -> str:
    leaves = [as_numpy(leaf) for leaf in keras.tree.flatten(part) if leaf is not None]
    texts = [
        f"{a.dtype}{list(a.shape)}" + (f" from {a.min()} to {a.max()}" if a.size and a.dtype.kind not in "OSU" else "")
        for a in leaves
    ]
    return ", ".join(texts) or _NO_LABELS


class Derivatives:
    """Derivatives of one model's loss by its prunable weights, at the weights times a mask.

    The model is evaluated in a `keras.StatelessScope` with other weights in the place of its own: no variable
    of the model is written, neither weights nor batch-normalization statistics nor seeds, also when an error is
    raised. Each derivative is traced once; masks enter the compiled function as arguments.

    The loss is what `fit` minimizes, `model.compute_loss`, with padding masks, sample weights, `add_loss` and activity
    regularizers, but without weight regularizers. A cross-entropy of Keras is taken on logits, also if the model ends
    in a softmax or sigmoid; every other loss is called as it is. Several batches are weighed as the loss weighs its
    elements, so that they are one large batch: by examples, by the steps that a mask leaves, by sample weights; sums
    are added up. A function that gives one number for a batch is taken for a mean over its examples. Dropout, noise
    and augmentation layers are off unless they are asked for. XLA compiles it where the model was compiled with
    `jit_compile=True`.

    Args:
        model: A built `keras.Model`.
        variables: Mapping of path to the variables to differentiate by.
        loss: What `compile` takes, or a callable `(y, outputs)`; `None` takes the compiled one. `"uniform"`,
            `"prediction"` and `"prediction_raw"` need no labels.
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

    def gradient(
        self,
        batches: Batches,
        masks: MaskMapping | None = None,
        *,
        training: bool = True,
        times_weights: bool = False,
    ) -> Arrays:
        """Gradient of the mean loss at the masked weights, by every weight: `dL(w) / dw` at `w = mask * weight`.

        It is dense: where a mask is `False` it tells what the loss would do if the weight came back. Signed
        gradients are averaged over all examples of all batches.

        Args:
            batches: The examples, read once.
            masks: Masks of all variables; `None` keeps all.
            training: Whether batch normalization uses the batch's statistics; the moving ones never change.
            times_weights: Multiplies each derivative by its weight, the unmasked one.
        """
        return self._mean(self._gradient_function(1.0, training, times_weights), batches, masks)

    def hessian_gradient(
        self,
        batches: Batches,
        masks: MaskMapping | None = None,
        *,
        temperature: float = 1.0,
        training: bool = True,
        times_weights: bool = False,
    ) -> Arrays:
        """Product Hg of the Hessian of the mean loss with its gradient g, both over the prunable weights.

        `Hg = d(g . stop(g)) / dw`, reverse over reverse. With several batches g is averaged over all of them
        before H is applied, so the data is read twice and the result is that of one large batch. Data that is shuffled
        or augmented anew at each pass gives g and H of different examples: keep it in a list.

        Args:
            batches: The examples.
            masks: Masks of all variables; `None` keeps all.
            temperature: Divides the logits; other than 1 it needs a cross-entropy.
            training: As in `gradient`.
            times_weights: As in `gradient`.

        Raises:
            ValueError: If a temperature is asked of another loss, or several batches come from a generator.
        """
        product = self._hessian_product_function(temperature, training, times_weights)
        batches = batches.kept()
        stream = iter(batches)
        start = list(itertools.islice(stream, 2))
        if len(start) == 1 and not self._is_multi_worker:
            return self._mean(product, start, masks, None)
        if len(start) > 1:
            _check_read_again(batches, "The Hessian-gradient product reads the data twice")
        gradient = self._mean(self._gradient_function(temperature, training), itertools.chain(start, stream), masks)
        again = start if len(start) == 1 else batches
        return self._mean(product, again, masks, [tf.constant(g) for g in gradient.values()])

    def hessian_diagonal(
        self,
        batches: Batches,
        masks: MaskMapping | None = None,
        *,
        num_probes: int = 10,
        seed: int = 0,
        training: bool = True,
    ) -> Arrays:
        """Estimate of the diagonal of the Hessian of the mean loss: `E[v * Hv]` over random signs v (Hutchinson).

        Unbiased; the variance of an entry is the sum of the squares of the other entries of its row of H, divided by
        `num_probes`. All batches share the signs, so the result is that of one large batch.

        Args:
            batches: The examples, read `num_probes` times.
            masks: Masks of all variables; `None` keeps all.
            num_probes: How many vectors of signs.
            seed: Of the signs.
            training: As in `gradient`.
        """
        batches = batches.kept()
        stream = iter(batches)
        start = list(itertools.islice(stream, 2))
        if len(start) > 1 and num_probes > 1:
            _check_read_again(batches, f"The Hessian's diagonal reads the data {num_probes} times")
        product = self._hessian_product_function(1.0, training)
        generator = np.random.default_rng(seed)
        diagonal = {path: np.zeros(v.shape, np.float32) for path, v in self.variables.items()}
        for probe in range(num_probes):
            signs = [2.0 * generator.integers(0, 2, d.shape).astype(np.float32) - 1.0 for d in diagonal.values()]
            source = start if len(start) == 1 else batches if probe else itertools.chain(start, stream)
            products = self._mean(product, source, masks, [tf.constant(sign) for sign in signs])
            for sign, (path, value) in zip(signs, products.items(), strict=True):
                diagonal[path] += sign * value / num_probes
        return diagonal

    def synaptic_flow(self, masks: MaskMapping | None = None, example: Any = None) -> Arrays:
        """Gradient of `R = sum(f(ones; |w|))` by `|w|` at the masked weights.

        Every other float weight is made absolute too. Batch normalization uses its moving statistics. A final
        softmax or sigmoid is left out: the sum of a softmax is constant.

        R multiplies up layer by layer, beyond float32 for a ResNet of 32 layers. Where it does, it is computed in
        float64 and the gradients get the factor 1 / |R|: their ranking stays.

        Args:
            masks: Masks of all variables; `None` keeps all.
            example: An input batch that gives the shape where the model does not (subclassed, or of any size); of
                strings, which have no ones, the input itself.
        """
        check_call(self._model, _SCORING)
        ones, mask_tensors = self._ones(example), self._mask_tensors(masks)
        gradients = self._flow("float32", ones, mask_tensors)
        # Too small a flow has lost its digits before it is zero. NaN compares as False.
        if not 1e-20 < np.max([np.abs(g).max() for g in gradients.values()]) < np.inf:
            gradients = self._flow("float64", ones, mask_tensors)
        return gradients

    def _flow(self, precision: str, *args: Any) -> Arrays:
        try:
            mean = Mean()
            mean.add({EXAMPLES: (tf.ones(()), self._flow_function(precision)(*args))})
            return self._named(self._over_workers(mean))
        except ValueError:
            if self._problem:
                raise ValueError(self._problem) from None
            raise

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
            inputs = keras.tree.map_structure(_as_tensor, example)
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

    def _gradient_function(
        self, temperature: float, training: bool, times_weights: bool = False
    ) -> Callable[..., Parts]:
        check_call(self._model, _SCORING)
        self._loss.check(temperature)

        def gradient(batch: Batch, masks: Tensors | None) -> Parts:
            weights = self._masked_weights(masks)
            with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
                tape.watch(weights)
                loss = self._loss_value(weights, batch, temperature, training)
            parts = self._connected(loss.gradients(tape, weights, _num_examples(batch)))
            return {
                group: (size, self._finished(_dense(gradients, weights), self._scale * temperature, times_weights))
                for group, (size, gradients) in parts.items()
            }

        return self._function(("gradient", temperature, training, times_weights), gradient)

    def _hessian_product_function(
        self, temperature: float, training: bool, times_weights: bool = False
    ) -> Callable[..., Parts]:
        """Hessian times a vector, or times the gradient of the batch itself, the only one, where it is `None`."""
        check_call(self._model, _SCORING)
        self._loss.check(temperature)

        def hessian_product(batch: Batch, masks: Tensors | None, vector: Tensors | None) -> Parts:
            batch = keras.tree.map_structure(_as_dense, batch)  # TensorFlow derives sparse products only once
            weights = self._masked_weights(masks)
            with tf.GradientTape(persistent=True, watch_accessed_variables=False) as outer:
                outer.watch(weights)
                with tf.GradientTape(persistent=True, watch_accessed_variables=False) as inner:
                    inner.watch(weights)
                    loss = self._loss_value(weights, batch, temperature, training)
                if vector is None:
                    loss = BatchLoss(loss.total)
                parts = self._connected(loss.gradients(inner, weights, _num_examples(batch)))
                parts = {group: (size, _dense(gradients, weights)) for group, (size, gradients) in parts.items()}
            scale = self._scale * temperature
            products = {}
            for group, (size, gradients) in parts.items():
                # The vector enters as the gradient of what comes after: no products, no sum.
                upstream = gradients if vector is None else [v * scale for v in vector]
                values = _dense(outer.gradient(gradients, weights, upstream), weights)
                products[group] = size, self._finished(values, scale**2, times_weights)
            return products

        return self._function(("hessian_product", temperature, training, times_weights), hessian_product)

    def _flow_function(self, precision: str) -> Callable[..., Tensors]:
        def flow_gradient(ones: Any, masks: Tensors | None) -> Tensors:
            weights = [tf.abs(weight) for weight in self._masked_weights(masks)]
            prunable = {id(variable) for variable in self.variables.values()}
            others = [v for v in self._model.weights if id(v) not in prunable and keras.backend.is_float_dtype(v.dtype)]
            mapping = [(v, tf.abs(tf.convert_to_tensor(v.value))) for v in others]
            mapping += list(zip(self.variables.values(), weights, strict=True))
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                with keras.StatelessScope(state_mapping=mapping):
                    outputs = on_logits(floats(self._model(ones, training=False)))
                if not outputs:
                    self._problem = f"No output of {self._model.name!r} is of floats, so there is no flow to derive."
                    raise ValueError(self._problem)
                if precision == "float64":
                    self._warn_if_below_float64(ones)
                logits = [tf.cast(output, precision) for output in outputs]
                flow = tf.add_n([tf.reduce_sum(output) for output in logits])
                if precision == "float64":  # a factor that keeps the ranking, and the signs where R is negative
                    flow = flow / tf.stop_gradient(tf.where(flow == 0, tf.ones_like(flow), tf.abs(flow)))
            return _dense(tape.gradient(flow, weights), weights)

        def in_float64(*args: Any) -> Tensors:
            with computing_in_float64(self._model):
                return flow_gradient(*args)

        return self._function(("flow", precision), in_float64 if precision == "float64" else flow_gradient)

    def _warn_if_below_float64(self, ones: Any) -> None:
        low = first_below_float64(tf.compat.v1.get_default_graph(), keras.tree.flatten(ones))
        if low is not None:
            warnings.warn(
                f"The synaptic flow is beyond float32, and {low.name!r} ({low.type}) computes in "
                f"{low.outputs[0].dtype.name} all the same: what overflows or vanishes there is not seen. Let a "
                "layer of your own compute in self.compute_dtype, or initialize the weights smaller.",
                stacklevel=2,
            )

    def _connected(self, parts: Parts) -> Parts:
        """The same; notes what the loss does not depend on."""
        of_each = zip(*(gradients for _, gradients in parts.values()), strict=True)
        self._disconnected = [p for p, g in zip(self.variables, of_each, strict=True) if all(v is None for v in g)]
        return parts

    def _finished(self, values: Tensors, scale: float, times_weights: bool) -> Tensors:
        """In the compiled function, on all cores."""
        values = [value / scale for value in values]
        if not times_weights:
            return values
        weights = (tf.convert_to_tensor(variable.value) for variable in self.variables.values())
        return [value * tf.cast(weight, tf.float32) for value, weight in zip(values, weights, strict=True)]

    def _masked_weights(self, masks: Tensors | None) -> Tensors:
        weights = [tf.convert_to_tensor(variable.value) for variable in self.variables.values()]
        if masks is None:
            return weights
        return [tf.where(mask, weight, tf.zeros((), weight.dtype)) for mask, weight in zip(masks, weights, strict=True)]

    def _loss_value(self, weights: Tensors, batch: Batch, temperature: float, training: bool) -> BatchLoss:
        """The loss times the temperature, which keeps its gradient in range, and times the scale of float16."""
        mapping = list(zip(self.variables.values(), weights, strict=True))
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True):
            loss = self._loss.value(*batch, temperature, training, num_replicas)
        return dataclasses.replace(loss, total=loss.total * (self._scale * temperature))

    # -- what is checked, and what is averaged ---------------------------------------------------

    def _mask_tensors(self, masks: MaskMapping | None) -> Tensors | None:
        return None if masks is None else [tf.constant(masks[path]) for path in self.variables]

    def _ones(self, example: Any) -> Any:
        if example is not None:
            return keras.tree.map_structure(_as_ones, rows(example, None, 1))
        ones = inputs_like(self._model, lambda shape, dtype: np.ones((1, *shape), dtype))
        if ones is None:
            raise ValueError(
                f"The model {self._model.name!r} {why_no_inputs(self._model)}, and synaptic flow needs an input of "
                "ones. Pass data=(x, y): only the shape of x is used, or its first strings."
            )
        return keras.tree.map_structure(tf.convert_to_tensor, ones)

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
        tensors = [keras.tree.map_structure(_as_tensor, batch) for batch in batches]
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


def _num_examples(batch: Batch) -> tf.Tensor:
    leaf = next(leaf for leaf in keras.tree.flatten(batch) if leaf is not None)
    return tf.cast(leaf.nrows() if isinstance(leaf, tf.RaggedTensor) else tf.shape(leaf)[0], tf.float32)


def _dense(gradients: list[tf.Tensor | None], weights: Tensors) -> Tensors:
    """Gradients in float32, zeros where there is none."""
    return [
        tf.zeros_like(w, tf.float32) if g is None else tf.cast(tf.convert_to_tensor(g), tf.float32)
        for g, w in zip(gradients, weights, strict=True)
    ]


def _check_read_again(batches: Batches, what: str) -> None:
    if batches.once_only:
        raise ValueError(
            f"{what}, but data is a generator, which can be read once. Say how many batches to keep with "
            "num_batches=..., or pass a list of batches, a tf.data.Dataset or a keras.utils.PyDataset."
        )
