import functools
import gc
import os
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import keras
import pytest
import tensorflow as tf
from absl import flags

# Two devices for the tests of tf.distribute; all others run on the first. To be said before TensorFlow starts.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

hypothesis.settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("tests")


def _as_keras_converts(function):
    """Keras's own saving and quantizing, and they alone, convert variables in the way of which NumPy 2 warns."""

    @functools.wraps(function)
    def excused(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning)
            return function(*args, **kwargs)

    return excused


for _name in ("save", "save_weights", "quantize"):
    setattr(keras.Model, _name, _as_keras_converts(getattr(keras.Model, _name)))


def pytest_collection_finish(session):
    """Leaves what was imported out of the garbage collections that `clear_session` does for each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_session():
    """Names, seeds and the dtype policy of one test do not reach the next."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(autouse=True, scope="session")
def _flags_are_parsed():
    flags.FLAGS.mark_as_parsed()
