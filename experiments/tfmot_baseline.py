"""TensorFlow's own toolkit (tfmot) as a baseline: magnitudes, pruned further and further while the network trains.

Needs the extra `[tfmot]`. The network is brought to `tf_keras` by `tf_prune.tfmot` and back, and trained there on the
same batches by the same optimizer; without pruning it is the same training, but for the moving variance of batch
normalization, which `tf_keras` takes with Bessel's correction. Each layer is pruned to the same sparsity, whatever
`--scope` says: tfmot has no other. From 0 it grows by a cubic schedule over the first three quarters of the run, in
about 75 steps. (tfmot rounds to the nearest, tf_prune up: the kept weights of a layer may differ by one.)
"""

from collections.abc import Iterator
from typing import Any

import keras

from experiments import common, datasets


def fit(model: keras.Model, config: common.Config, data: datasets.Dataset) -> tuple[keras.Model, list[float]]:
    """Trains and prunes a copy of the compiled model; returns it, compiled for evaluation, and each epoch's loss."""
    left_out = [name for name in ("filters", "retrain_initializer", "condition_gain") if getattr(config, name)]
    if config.structure != "weights" or left_out or not config.epochs:
        raise ValueError(
            "--method=tfmot prunes single weights of all layers while it trains: it needs --epochs of at least 1 and "
            f"--structure=weights (got {config.epochs} and {config.structure}), and takes no --filters, "
            "--retrain_initializer or --condition_gain."
        )
    import tf_keras

    from tf_prune import tfmot

    sparsity = tfmot.import_tfmot().sparsity.keras
    steps = config.epochs * -(-len(data.x_train) // config.batch_size)
    frequency = max(1, steps // 100)
    # tfmot reaches its target only if the steps from one pruning to the next lead there.
    end = max(1, int(0.75 * steps) // frequency) * frequency
    schedule = sparsity.PolynomialDecay(0.0, config.sparsity, 0, end, frequency=frequency)
    pruned = sparsity.prune_low_magnitude(tfmot.to_tf_keras(model), schedule)
    pruned.compile(
        tf_keras.optimizers.SGD(
            tf_keras.optimizers.schedules.CosineDecay(config.learning_rate, steps),
            momentum=0.9,
            weight_decay=config.weight_decay,
        ),
        tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = pruned.fit(
        _passes(data, config),
        epochs=config.epochs,
        steps_per_epoch=steps // config.epochs,
        callbacks=[sparsity.UpdatePruningStep()],
        verbose=0,
    )
    trained, _ = tfmot.from_tfmot(pruned)
    trained.compile(loss=model.loss, metrics=["accuracy"])
    return trained, history.history["loss"]


def _passes(data: datasets.Dataset, config: common.Config) -> Iterator[Any]:
    """The batches in the order of `fit` in Keras 3, which after each epoch starts a pass and leaves it."""
    training = common.batches(data, config)
    for _ in range(config.epochs):
        yield from training
        next(iter(training))  # each pass is shuffled anew
