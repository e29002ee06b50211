"""The data that the experiments train on, whole in memory, normalized as the papers' code does.

`digits` comes with scikit-learn and needs no network; the others are read with TensorFlow Datasets.
"""

import contextlib
import dataclasses
import socket

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images (n, height, width, channels) in float32 and integer labels (n,), for training and for testing."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    augment: bool = False

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one image."""
        return self.x_train.shape[1:]


# Mean and standard deviation of the training pixels scaled to [0, 1].
_STATISTICS = {
    "mnist": ([0.1307], [0.3081]),
    "fashion_mnist": ([0.2860], [0.3530]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
}
DATASETS = ("digits", *_STATISTICS)


class DatasetNotFoundError(ValueError):
    """The data is neither on disk nor to be had."""


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Loads a dataset by name.

    Args:
        name: One of `DATASETS`.
        data_dir: Where TensorFlow Datasets keeps its data; `None` is its own default.

    Raises:
        DatasetNotFoundError: If TensorFlow Datasets can neither find nor download it.
    """
    if name == "digits":
        return _digits()
    if name not in _STATISTICS:
        raise ValueError(f"Unknown dataset {name!r}. Expected one of {', '.join(DATASETS)}.")
    train, test = (_read(name, split, data_dir) for split in ("train", "test"))
    mean, deviation = (np.array(values, np.float32) for values in _STATISTICS[name])
    x_train, x_test = ((part["image"].astype(np.float32) / 255.0 - mean) / deviation for part in (train, test))
    return Dataset(
        x_train,
        train["label"].astype(np.int64),
        x_test,
        test["label"].astype(np.int64),
        num_classes=100 if name == "cifar100" else 10,
        augment=name.startswith("cifar"),
    )


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = ((images.reshape(-1, 8, 8, 1) - 4.884) / 6.017).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels.astype(np.int64), test_size=0.2, random_state=0, stratify=labels
    )
    return Dataset(x_train, y_train, x_test, y_test, num_classes=10)


def _read(name: str, split: str, data_dir: str | None) -> dict[str, np.ndarray]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            if not _is_online():
                raise ConnectionError("this machine has no network")
            builder.download_and_prepare()
        return tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1))
    except Exception as error:  # whatever the network, the disk or TFDS raises, the user's way out is the same
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        cause = cause if len(cause) < 120 else cause[:120] + "..."
        raise DatasetNotFoundError(
            f"TFDS found no prepared {name!r} in {data_dir or 'its default folder'} and could not download it "
            f"({cause}): pass --data_dir with a folder that holds it, or use --dataset=digits, which needs neither."
        ) from error


def _is_online() -> bool:
    """Whether any host that TFDS downloads these datasets from can be found: its own retries take minutes."""
    for host in ("storage.googleapis.com", "www.cs.toronto.edu", "fashion-mnist.s3-website.eu-central-1.amazonaws.com"):
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, 443)
            return True
    return False
