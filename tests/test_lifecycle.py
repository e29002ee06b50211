"""Whatever is done with a pruned model, in any order: pruned is zero, kept is not frozen, the count is exact."""

import math
import pathlib
import tempfile

import hypothesis
import keras
import numpy as np
from hypothesis import strategies as st

import tf_prune
from tests import helpers

OPTIMIZERS = {
    "sgd": lambda **o: keras.optimizers.SGD(0.05, momentum=0.9, **o),
    "adam": lambda **o: keras.optimizers.Adam(0.01, **o),
    "adamw": lambda **o: keras.optimizers.AdamW(0.01, weight_decay=0.1, **o),
    "rmsprop": lambda **o: keras.optimizers.RMSprop(0.01, **o),
    "lion": lambda **o: keras.optimizers.Lion(0.003, **o),
}
ACTIONS = ("fit", "save", "load_weights", "prune_more", "set_weights", "strip", "wrap")


class Life:
    """A model, its masks, and what can be done with them."""

    def __init__(self, draw):
        keras.config.set_dtype_policy(draw(st.sampled_from(["float32", "mixed_float16", "mixed_bfloat16"])))
        self.model = helpers.build("mlp", seed=draw(st.integers(0, 3)))
        self.dense = self.kernels()
        self.name = draw(st.sampled_from(sorted(OPTIMIZERS)))
        self.options = {"use_ema": True} if draw(st.booleans()) else {}
        if draw(st.booleans()):
            self.options["gradient_accumulation_steps"] = 2
        self.jit = draw(st.booleans())
        self.compile()
        self.sparsity = draw(st.floats(0.05, 0.6))
        self.masks = tf_prune.prune(self.model, "random", self.sparsity).masks

    def kernels(self):
        return [np.asarray(v).copy() for v in tf_prune.find_prunable(self.model).prunable.values()]

    def compile(self):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(OPTIMIZERS[self.name](**self.options), loss, jit_compile=self.jit)
        self.model.optimizer.build(self.model.trainable_variables)

    def fit(self):
        before = self.kernels()
        x, y = helpers.batch(32)
        self.model.fit(x, y, batch_size=8, epochs=1, verbose=0)
        for a, b, mask in zip(before, self.kernels(), self.masks.values(), strict=True):
            assert (a != b)[mask].mean() > 0.1, "kept weights must not be frozen"

    def save(self):
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(pathlib.Path(folder) / "model.keras")
            self.model = keras.models.load_model(pathlib.Path(folder) / "model.keras")
        self.attach()

    def load_weights(self):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "model.weights.h5"
            self.model.save_weights(file)
            for variable in tf_prune.find_prunable(self.model).prunable.values():
                variable.assign(keras.ops.ones_like(variable))
            self.model.load_weights(file)

    def prune_more(self):
        self.sparsity = (1 + self.sparsity) / 2
        self.masks = tf_prune.prune(self.model, "magnitude", self.sparsity).masks

    def set_weights(self):
        """Dense weights from outside; the masks hold again from the next step on."""
        for variable, value in zip(tf_prune.find_prunable(self.model).prunable.values(), self.dense, strict=True):
            variable.assign(value)
        self.fit()

    def strip(self):
        self.model = tf_prune.strip(self.model)
        self.compile()

    def wrap(self):
        self.model = tf_prune.wrap(self.model)
        self.compile()

    def attach(self):
        """What a user does after loading; a model of wrapped layers needs it not."""
        tf_prune.apply_masks(self.model, tf_prune.masks_of(self.model))

    def check(self):
        found = tf_prune.masks_of(self.model)
        for mask, expected in zip(found.values(), self.masks.values(), strict=True):
            np.testing.assert_array_equal(mask, expected)
        helpers.assert_pruned_is_zero(self.model, found)
        assert found.num_kept == math.floor((1 - self.sparsity) * found.num_weights + 1e-9)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.data(), st.lists(st.sampled_from(ACTIONS), min_size=3, max_size=6))
def test_pruned_stays_zero_and_the_count_exact_whatever_is_done(data, actions):
    try:
        life = Life(data.draw)
        life.check()
        for action in [*actions, "fit"]:
            getattr(life, action)()
            life.check()
    finally:
        keras.config.set_dtype_policy("float32")
