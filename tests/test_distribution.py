"""Scoring and masked training on several devices and workers, against one."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_prune
from tests import helpers

ROOT = pathlib.Path(__file__).parent.parent
DATA = [helpers.batch(seed=i) for i in range(3)]  # an odd number of batches for two devices


@pytest.fixture(scope="module")
def strategy():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def pair(name, strategy, optimizer=lambda: keras.optimizers.SGD(0.1, momentum=0.9)):
    """The same model on one device and on two."""
    one = helpers.build(name, optimizer=optimizer())
    with strategy.scope():
        two = helpers.MODELS[name]()
        two.compile(optimizer(), one.loss)
    for variable, same in zip(two.weights, one.weights, strict=True):
        variable.assign(same)
    return one, two


def assert_same_on_each_device(model, strategy):
    for variable in tf_prune.find_prunable(model).prunable.values():
        first, second = (np.asarray(value) for value in strategy.experimental_local_results(variable.value))
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "method", "within_scope"),
    [
        ("mlp", "snip", False),
        ("conv_bn", "snip", True),
        ("residual", "snip", False),
        ("conv_bn", "grasp", False),
        ("mlp", "grasp", True),
        ("conv_bn", "optimal_brain_damage", False),
        ("residual", "synflow", True),
        ("conv_bn", "force", False),
        ("residual", "gradient_norm_preservation", False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_two_devices_score_and_prune_as_one(name, method, within_scope, strategy):
    one, two = pair(name, strategy)
    method = tf_prune.FORCE(3, num_batches=2) if method == "force" else helpers.METHODS[method]
    scores = tf_prune.score(one, method, DATA)
    masks = tf_prune.prune(one, method, 0.7, DATA, verbose=0).masks
    with strategy.scope() if within_scope else contextlib.nullcontext():
        again = tf_prune.score(two, method, DATA)
        masks_again = tf_prune.prune(two, method, 0.7, DATA, verbose=0).masks
    for path, expected in scores.items():
        np.testing.assert_allclose(again[path], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    assert masks_again == masks


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        # Not with ema_overwrite_frequency or gradient_accumulation_steps: Keras 3.15 has them on one device only.
        lambda: keras.optimizers.AdamW(0.01, use_ema=True),
    ],
    ids=["sgd", "ema"],
)
def test_masks_hold_in_fit_on_two_devices_and_are_the_same_on_both(optimizer, strategy):
    _, model = pair("conv_bn", strategy, optimizer)
    callback = tf_prune.SnipPruning(0.7, DATA)
    x, y = helpers.batch(64)
    model.fit(x, y, batch_size=16, epochs=2, callbacks=[callback], verbose=0)
    helpers.assert_masks_hold(model, callback.report.masks)
    assert_same_on_each_device(model, strategy)


def test_training_on_two_devices_goes_as_on_one(strategy):
    one, two = pair("mlp", strategy)
    x, y = helpers.batch(64)
    for model in (one, two):
        tf_prune.prune(model, "snip", 0.7, DATA)
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(one.weights, two.weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_wrapped_layers_and_gradual_pruning_work_on_two_devices(strategy):
    _, two = pair("mlp", strategy)
    model = tf_prune.wrap(two)
    with strategy.scope():
        model.compile(keras.optimizers.Adam(0.01), two.loss)
    x, y = helpers.batch(64)
    callback = tf_prune.GradualPruning("snip", tf_prune.Cubic(0.8), frequency=2, data=DATA)
    model.fit(x, y, batch_size=16, epochs=2, callbacks=[callback], verbose=0)
    helpers.assert_masks_hold(model, callback.report.masks)
    assert callback.report.masks.num_kept == tf_prune.masks_of(model).num_kept == 128
    assert_same_on_each_device(model, strategy)


def test_a_loss_that_sums_scores_as_on_one_device(strategy):
    one, two = pair("mlp", strategy)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    expected, scores = (tf_prune.score(model, "snip", DATA, loss) for model in (one, two))
    for path in expected:
        np.testing.assert_allclose(scores[path], expected[path], rtol=1e-5)


# -- several workers -----------------------------------------------------------------------------


def start_workers(folder, steps, die_after=0):
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    workers = []
    for index in range(2):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        workers.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.worker", str(folder), str(steps), str(die_after)],
                env={**os.environ, "TF_CONFIG": json.dumps(config)},
                cwd=ROOT,
                stderr=subprocess.PIPE,
            )
        )
    errors = []
    for worker in workers:
        try:
            errors.append(worker.communicate(timeout=120)[1].decode())
        except subprocess.TimeoutExpired:
            worker.kill()
            errors.append("it hung")
    return [worker.returncode for worker in workers], "\n".join(error[-1500:] for error in errors)


def results(folder):
    masks = [tf_prune.Masks.load(folder / f"masks_{rank}.npz") for rank in (0, 1)]
    weights = [dict(np.load(folder / f"weights_{rank}.npz")) for rank in (0, 1)]
    assert masks[0] == masks[1]
    for path, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][path])
    for value, mask in zip(weights[0].values(), masks[0].values(), strict=True):
        assert not value[~mask].any()
        assert value[mask].all()
    return masks[0], weights[0]


def test_two_workers_prune_and_train_as_one_and_a_killed_one_comes_back_with_its_masks(tmp_path):
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    for folder in (whole, killed, alone):
        folder.mkdir()
    codes, errors = start_workers(whole, steps=6)
    assert codes == [0, 0], errors
    masks, weights = results(whole)

    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    command = [sys.executable, "-m", "tests.worker", str(alone), "6", "0"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    assert tf_prune.Masks.load(alone / "masks_0.npz") == masks
    for path, value in np.load(alone / "weights_0.npz").items():
        np.testing.assert_allclose(weights[path], value, rtol=1e-3, atol=1e-5)

    codes, errors = start_workers(killed, steps=6, die_after=3)
    assert codes[1] == -9, errors
    assert codes[0] != 0, "the other worker stops with an error when one is gone"
    assert (killed / "steps").exists()
    codes, errors = start_workers(killed, steps=6)
    assert codes == [0, 0], errors
    assert results(killed)[0] == masks
