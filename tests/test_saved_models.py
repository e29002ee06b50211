"""The exported model that is kept in git is what its manifest says."""

import hashlib
import json
import pathlib
import re

import numpy as np
import tensorflow as tf

import tf_prune
from experiments import datasets
from tf_prune.litert import LiteRTModel

FOLDER = pathlib.Path(__file__).parent.parent / "saved_models"
MODEL = FOLDER / "digits_mobilenet"


def test_the_manifest_names_each_file_with_its_hash_and_all_are_small():
    rows = re.findall(r"^\| `(\S+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|", (FOLDER / "README.md").read_text(), re.M)
    listed = {name: (int(size.replace(",", "")), digest) for name, size, digest in rows}
    found = {
        str(file.relative_to(FOLDER)): (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in MODEL.rglob("*")
        if file.is_file()
    }
    assert listed == found
    assert sum(size for size, _ in found.values()) < 300_000


def test_the_kept_model_classifies_digits_as_the_manifest_says_in_both_forms():
    data = datasets.load("digits", None)
    results = json.loads((MODEL / "report.json").read_text())
    lite = LiteRTModel((MODEL / "model.tflite").read_bytes()).outputs({"keras_tensor": data.x_test})
    served = tf.saved_model.load(MODEL / "saved_model").signatures["serving_default"](tf.constant(data.x_test))
    (lite,), (served,) = lite.values(), served.values()
    np.testing.assert_allclose(lite, served.numpy(), atol=1e-3)
    accuracy = (lite.argmax(1) == data.y_test).mean()
    (claimed,) = re.findall(r"test accuracy ([\d.]+) %", (FOLDER / "README.md").read_text())
    assert f"{100 * accuracy:.2f}" == claimed
    assert results["sparsity"] >= 0.9
    assert tf_prune.explain(MODEL / "model.tflite", "arm64").runs_sparse
