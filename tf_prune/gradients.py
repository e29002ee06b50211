"""First and second derivatives of a model's loss by its weights. The only nested `GradientTape`s."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_prune.batches import Batches, inputs_like, why_no_inputs
from tf_prune.calls import floats, on_logits
from tf_prune.evaluation import Arrays, Evaluation, MaskMapping, Tensors, as_tensor
from tf_prune.examples import Batch, rows
from tf_prune.precision import computing_in_float64, first_below_float64
from tf_prune.prunable import check_call
from tf_prune.terms import EXAMPLES, BatchLoss, Mean, Parts

_SCORING = "Scoring by derivatives (which magnitude does without)"


class Derivatives(Evaluation):
    """Derivatives of one model's loss by its prunable weights, at the weights times a mask.

    The loss is what `fit` minimizes, `model.compute_loss`, with padding masks, sample weights, `add_loss` and activity
    regularizers, but without weight regularizers. A cross-entropy of Keras is taken on logits, also if the model ends
    in a softmax or sigmoid; every other loss is called as it is. Several batches are weighed as the loss weighs its
    elements, so that they are one large batch: by examples, by the steps that a mask leaves, by sample weights; sums
    are added up. A function that gives one number for a batch is taken for a mean over its examples. Dropout, noise
    and augmentation layers are off unless they are asked for. The model stays as it is; see `Evaluation`.

    Args:
        model: A built `keras.Model`.
        variables: Mapping of path to the variables to differentiate by.
        loss: What `compile` takes, or a callable `(y, outputs)`; `None` takes the compiled one. `"uniform"`,
            `"prediction"` and `"prediction_raw"` need no labels.
        dropout: Whether dropout, noise and augmentation act; the same in each batch, as the model's seeds stay.
    """

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

    # -- what is traced ------------------------------------------------------------------------

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


def _as_dense(leaf: Any) -> Any:
    return tf.sparse.to_dense(leaf) if isinstance(leaf, tf.SparseTensor) else leaf


def _as_ones(leaf: Any) -> Any:
    """Ones in the place of each value; of strings, which have none, the strings themselves."""
    leaf = as_tensor(leaf)
    if leaf.dtype == tf.string:
        return leaf
    if isinstance(leaf, tf.RaggedTensor):
        return leaf.with_flat_values(tf.ones_like(leaf.flat_values))
    return tf.ones(leaf.shape, leaf.dtype)


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
