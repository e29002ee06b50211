"""What the experiments share: flags, a run's configuration and its name, training, and files."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import tf_prune
from experiments import datasets, models
from tf_prune.losses import LOSSES
from tf_prune.whole_files import replacing_file


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes. Its defaults are the main job.

    A field that is added later must have the default that changes nothing, so that older runs keep their names.
    """

    method: str = "force"
    sparsity: float = 0.95
    model: str = "digits_convnet"
    dataset: str = "digits"
    epochs: int = 20
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    score_batches: int = 10
    num_steps: int = 60
    scope: str = "global"
    structure: str = "weights"
    filters: str = ""
    score_loss: str = "labels"
    initializer: str = ""
    gamma: float = 1.0
    retrain_initializer: str = ""
    condition_gain: float = 0.0

    @property
    def name(self) -> str:
        """What the run is, readable, and a hash of what differs from the defaults."""
        changed = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.model}-{self.dataset}-{self.method}-{self.sparsity:g}-seed{self.seed}-{digest}"


_HELP = {
    "method": "How to prune; tfmot is TensorFlow's own toolkit, which prunes while it trains.",
    "sparsity": "Fraction of the prunable weights to remove, in [0, 1).",
    "model": "The network.",
    "dataset": "What it is trained on.",
    "epochs": "Of training, after pruning.",
    "seed": "Of the initial weights, of the order of the data and of random pruning.",
    "batch_size": "Of training and of scoring.",
    "learning_rate": "At the start; it falls to 0 along a cosine.",
    "weight_decay": "Decoupled, of SGD with momentum 0.9.",
    "score_batches": "Batches for scoring: averaged by one-shot methods, one a step by iterative ones.",
    "num_steps": "Steps of FORCE, iterative SNIP and GraSPIt.",
    "scope": "How what is removed is shared out over the layers.",
    "structure": "What is pruned together.",
    "filters": "Regular expression for the names of the layers that are pruned; empty for all.",
    "score_loss": "What scoring compares the outputs with.",
    "initializer": "Of the kernels; empty for the network's own.",
    "gamma": "Variance of the initializer scaled_gaussian.",
    "retrain_initializer": "Draws the kernels anew between pruning and training; empty to train what was pruned.",
    "condition_gain": "Singular values that the pruned kernels are brought near to before training; 0 leaves them.",
}
METHODS = (*tf_prune.METHODS, "tfmot")
_CHOICES = {
    "method": METHODS,
    "model": tuple(models.MODELS),
    "dataset": datasets.DATASETS,
    "scope": tf_prune.SCOPES,
    "structure": tuple(tf_prune.STRUCTURES),
    "score_loss": ("labels", *LOSSES),
    "initializer": ("", *tf_prune.INITIALIZERS),
    "retrain_initializer": ("", *tf_prune.INITIALIZERS),
}


def _define_flags() -> None:
    """One flag for each field of `Config`. Defined here, once: two binaries may be imported into one process."""
    for field in dataclasses.fields(Config):
        if field.name in _CHOICES:
            flags.DEFINE_enum(field.name, field.default, _CHOICES[field.name], _HELP[field.name])
        elif isinstance(field.default, int):
            lowest = 0 if field.name in ("seed", "epochs") else 1
            flags.DEFINE_integer(field.name, field.default, _HELP[field.name], lower_bound=lowest)
        elif isinstance(field.default, str):
            flags.DEFINE_string(field.name, field.default, _HELP[field.name])
        else:
            flags.DEFINE_float(field.name, field.default, _HELP[field.name])


_define_flags()
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of TensorFlow Datasets; its own default if not given.")
OUTPUT_DIR = flags.DEFINE_string("output_dir", "results", "Where results are written.")


def config_of_flags() -> Config:
    """The configuration that the command line asks for."""
    return Config(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Config)})


def method_of(config: Config) -> Any:
    """The pruning method that the configuration names."""
    if config.method in ("force", "iterative_snip", "grasp_it"):
        return tf_prune.METHODS[config.method](num_steps=config.num_steps)
    if config.method == "random":
        return tf_prune.Random(config.seed)
    return tf_prune.METHODS[config.method]()


def batches(data: datasets.Dataset, config: Config) -> tf.data.Dataset:
    """The training data, shuffled by the seed; each of CIFAR's images shifted by up to 4 pixels and flipped or not."""
    dataset = tf.data.Dataset.from_tensor_slices((data.x_train, data.y_train))
    dataset = dataset.shuffle(len(data.x_train), seed=config.seed)
    if data.augment:

        def augment(image: Any, number: tf.Tensor) -> Any:
            seed = tf.stack([number, 0])
            padded = tf.pad(image[0], [[4, 4], [4, 4], [0, 0]])
            cropped = tf.image.stateless_random_crop(padded, data.input_shape, seed)
            return tf.image.stateless_random_flip_left_right(cropped, seed), image[1]

        numbers = tf.data.Dataset.random(config.seed, rerandomize_each_iteration=True)
        dataset = tf.data.Dataset.zip((dataset, numbers)).map(augment, num_parallel_calls=2)
    return dataset.batch(config.batch_size).prefetch(2)


def initializer_of(name: str, config: Config, seed: int) -> keras.initializers.Initializer:
    """The initializer of this name."""
    options = {"gamma": config.gamma} if name == "scaled_gaussian" else {}
    return tf_prune.INITIALIZERS[name](seed=seed, **options)


def initial_model(config: Config, data: datasets.Dataset) -> keras.Model:
    """The compiled model before pruning; the same for the same seed, whatever the method."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(config.seed)
    model = models.build(config.model, data.input_shape, data.num_classes)
    if config.initializer:
        tf_prune.reinitialize(model, initializer_of(config.initializer, config, config.seed))
    steps = config.epochs * -(-len(data.x_train) // config.batch_size)
    model.compile(
        keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(config.learning_rate, max(steps, 1)),
            momentum=0.9,
            weight_decay=config.weight_decay,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def pruning(config: Config, data: datasets.Dataset, verbose: int = 0) -> list[keras.callbacks.Callback]:
    """What is done to the model before training, as callbacks; the first of them prunes."""
    if config.method == "dense":
        return []
    if config.method == "tfmot":
        raise ValueError("--method=tfmot prunes while it trains: there is no pruned network before. Choose another.")
    # Of a stream of its own, which leaves the order of training alone; kept, since each pass shuffles anew.
    scoring = list(batches(data, config).take(config.score_batches))
    callbacks: list[keras.callbacks.Callback] = [
        tf_prune.PruneBeforeTraining(
            method_of(config),
            config.sparsity,
            scoring,
            None if config.score_loss == "labels" else config.score_loss,
            scope=config.scope,
            structure=config.structure,
            filters=config.filters or None,
            verbose=verbose,
        )
    ]
    if config.condition_gain:
        callbacks.append(tf_prune.ConditionBeforeTraining(config.condition_gain, verbose=verbose))
    if config.retrain_initializer:
        # Of another seed: the same one would give the weights that were pruned, only of another size.
        callbacks.append(_Reinitialize(initializer_of(config.retrain_initializer, config, 1_000_003 + config.seed)))
    return callbacks


class _Reinitialize(keras.callbacks.Callback):
    def __init__(self, initializer: keras.initializers.Initializer):
        super().__init__()
        self.initializer = initializer

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 0:
            tf_prune.reinitialize(self.model, self.initializer)


def train(config: Config, data: datasets.Dataset, verbose: int = 0) -> tuple[keras.Model, dict[str, Any]]:
    """Builds the model, prunes it unless the method is `dense`, trains it, and tests it after the last epoch.

    The same seed gives every method the same initial weights, the same scoring batches, and the same order of the data.
    """
    model = initial_model(config, data)
    callbacks: list[Any] = []
    if config.method == "tfmot":
        from experiments import tfmot_baseline

        model, losses = tfmot_baseline.fit(model, config, data)
    else:
        training = batches(data, config)
        callbacks = pruning(config, data, verbose)
        history = model.fit(training, epochs=config.epochs, callbacks=callbacks, shuffle=False, verbose=0)
        losses = history.history.get("loss", [])
    loss, accuracy = model.evaluate(data.x_test, data.y_test, batch_size=500, verbose=0)
    kernels = tf_prune.find_prunable(model).prunable.values()
    zeros = sum(int(np.count_nonzero(np.asarray(kernel) == 0)) for kernel in kernels)
    results = {
        "accuracy": float(accuracy),
        "loss": float(loss),
        "train_loss": float(losses[-1]) if losses else None,
        "sparsity": zeros / sum(int(np.prod(kernel.shape)) for kernel in kernels),
        "emptied": list(callbacks[0].report.emptied) if callbacks else [],
    }
    return model, results


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    return {
        "python": sys.version.split()[0],
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "tf_prune": tf_prune.__version__,
    }


def write_json(file: Path, content: Any) -> None:
    """Writes whole or not at all, so that an interrupted run leaves no half of a result."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def start(main: Callable[[], None]) -> None:
    """Starts a binary; what the user can mend is said in one sentence, without a traceback."""
    logging.set_verbosity(logging.WARNING)

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unexpected arguments {argv[1:]}; flags are written --name=value")
        try:
            main()
        except ValueError as error:
            sys.exit(f"error: {error}")

    app.run(guarded)
