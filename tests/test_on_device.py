import argparse
import ast
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from absl.testing import flagsaver
from ai_edge_litert.interpreter import Interpreter

from benchmarks import aarch64, inference, on_device
from tf_prune.conversion import convert
from tf_prune.saved_model import write_saved_model

# Of TensorFlow's own converter, when it calibrates int8.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*Warning. tf.lite.Interpreter is deprecated")

QUICK = ["--runs=5", "--examples=4"]


def mlp(*sizes):
    return keras.Sequential([keras.Input((sizes[0],)), *[keras.layers.Dense(size) for size in sizes[1:]]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of small models: one of each that the tests need."""
    made = tmp_path_factory.mktemp("models")
    keras.utils.set_random_seed(0)
    left, right = keras.Input((6,), name="left"), keras.Input((3,), name="right")
    both = keras.layers.Concatenate()([keras.layers.Dense(4)(left), right])
    models = {
        "mlp": mlp(8, 16, 5),
        "other_inputs": mlp(7, 5),
        "other_outputs": mlp(8, 4),
        "two_inputs": keras.Model([left, right], [keras.layers.Dense(2)(both), keras.layers.Dense(1)(both)]),
    }
    for name, model in models.items():
        generator = np.random.default_rng(0)
        examples = [generator.standard_normal((64, *i.shape[1:])).astype("float32") for i in model.inputs]
        names = write_saved_model(model, examples if len(examples) > 1 else examples[0], made / name)
        (made / f"{name}.tflite").write_bytes(convert(made / name))
        if name == "mlp":
            np.save(made / "examples.npy", examples[0])
            calibration = [{names[0]: example[None]} for example in examples[0]]
            (made / "int8.tflite").write_bytes(convert(made / name, dtype="int8", representative=calibration))
            np.savez(made / "weights.npz", *model.get_weights())
    (made / "text.tflite").write_text("no model at all")
    (made / "empty.tflite").write_bytes(b"")
    (made / "broken.tflite").write_bytes((made / "mlp.tflite").read_bytes()[:64])
    np.save(made / "narrow.npy", np.zeros((4, 7), np.float32))
    (made / "text.npy").write_text("no array")
    return made


def run(capsys, *arguments):
    on_device.main([*map(str, arguments), *QUICK, "--json"])
    return json.loads(capsys.readouterr().out)


def outputs_of(file, x):
    """What a file computes, with the two formulas of quantization written out here once more."""
    interpreter = Interpreter(str(file))
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(taken["index"], x.shape)
    interpreter.allocate_tensors()
    if taken["dtype"] == np.int8:
        scale, zero = taken["quantization"]
        x = np.clip(np.round(x / scale + zero), -128, 127).astype(np.int8)
    interpreter.set_tensor(taken["index"], x)
    interpreter.invoke()
    y = interpreter.get_tensor(given["index"])
    return (y.astype(float) - given["quantization"][1]) * given["quantization"][0] if y.dtype == np.int8 else y


def test_the_file_needs_nothing_but_numpy_and_litert():
    tree = ast.parse(pathlib.Path(on_device.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(node.level for node in imports if isinstance(node, ast.ImportFrom))
    names = {
        name.split(".")[0]
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert names - set(sys.stdlib_module_names) == {"numpy", "ai_edge_litert", "tflite_runtime"}


def test_it_runs_when_it_is_copied_alone(folder, tmp_path):
    shutil.copy(on_device.__file__, tmp_path)
    shutil.copy(folder / "mlp.tflite", tmp_path)
    command = [sys.executable, "-I", "on_device.py", "mlp.tflite", "--runs=5", "--label=emulated"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "emulated" in done.stdout
    assert f"{(tmp_path / 'mlp.tflite').stat().st_size:,} bytes" in done.stdout


@pytest.mark.parametrize("name", ["mlp", "int8", "two_inputs"])
def test_a_model_agrees_with_itself(folder, capsys, name):
    file = folder / f"{name}.tflite"
    result = run(capsys, file, "--against", file)
    assert result["agreement"] == {"largest_difference": 0, "relative": 0, "top1": 1, "examples": 4}


def test_float_and_int8_are_compared_as_real_values(folder, capsys):
    x = np.load(folder / "examples.npy")
    first, first_bias, second, second_bias = np.load(folder / "weights.npz").values()
    exact = (x @ first + first_bias) @ second + second_bias
    np.testing.assert_allclose(outputs_of(folder / "mlp.tflite", x), exact, rtol=1e-4, atol=1e-5)
    quantized = outputs_of(folder / "int8.tflite", x)
    result = run(
        capsys, folder / "int8.tflite", "--against", folder / "mlp.tflite", "--inputs", folder / "examples.npy"
    )
    found = result["agreement"]
    assert found["largest_difference"] == pytest.approx(np.abs(quantized - exact).max(), rel=1e-4)
    assert 0 < found["largest_difference"] < 0.2
    assert found["relative"] == pytest.approx(found["largest_difference"] / np.abs(exact).max(), rel=1e-4)
    assert found["top1"] == np.mean(quantized.argmax(1) == exact.argmax(1))
    assert found["examples"] == 64


def test_the_batch_and_the_threads_are_what_was_asked_for(folder, capsys):
    result = run(capsys, folder / "mlp.tflite", "--against", folder / "int8.tflite", "--batch=3", "--threads=1,2")
    assert result["batch"] == 3
    for rows in (*(model["latency"] for model in result["models"]), result["speedup"]):
        assert [row["threads"] for row in rows] == [1, 2]
    for row in result["models"][0]["latency"]:
        assert row["runs"] == 5
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    assert result["machine"] == platform.machine()
    assert result["runtime"].startswith("ai-edge-litert ")
    assert result["models"][0]["bytes"] == os.path.getsize(folder / "mlp.tflite")


def test_several_inputs_are_read_by_name(folder, capsys, tmp_path):
    generator = np.random.default_rng(3)
    arrays = {"right": generator.random((5, 3)), "left": generator.random((5, 6))}
    np.savez(tmp_path / "examples.npz", **arrays)
    file = folder / "two_inputs.tflite"
    shown = run(capsys, file, "--against", file, "--inputs", tmp_path / "examples.npz", "--batch=2")
    assert shown["agreement"]["examples"] == 5
    model = on_device.Model(str(file))
    shapes = on_device.common_shapes([model], None)
    read = on_device.read_examples(str(tmp_path / "examples.npz"), model, shapes)
    for details, array in zip(model.inputs, read, strict=True):
        np.testing.assert_array_equal(array, arrays["left" if "left" in details["name"] else "right"])


def test_each_example_is_counted_once():
    for count, size in [(1, 1), (7, 1), (7, 3), (6, 3), (3, 3)]:
        seen = []
        for (batch,), new in on_device.batches([np.arange(count)], size):
            assert len(batch) == size
            seen.extend(batch[new])
        assert seen == list(range(count))


REFUSED = {
    "missing.tflite": "missing.tflite cannot be read: No such file",
    ".": "cannot be read",
    "text.tflite": "text.tflite is not a TF-Lite file; expected",
    "empty.tflite": "empty.tflite is not a TF-Lite file",
    "broken.tflite": "LiteRT cannot load broken.tflite",
    "mlp.tflite --against=missing.tflite": "missing.tflite cannot be read",
    "mlp.tflite --against=other_inputs.tflite": "float32 (?, 8); other_inputs.tflite takes",
    "mlp.tflite --against=two_inputs.tflite": "different inputs",
    "mlp.tflite --against=other_outputs.tflite": "different outputs",
    "mlp.tflite --inputs=narrow.npy": "an array float32 (4, 7), but mlp.tflite takes",
    "mlp.tflite --inputs=text.npy": "text.npy is no .npy or .npz file",
    "mlp.tflite --inputs=missing.npy": "No such file",
    "mlp.tflite --inputs=examples.npy --batch=65": "65, or more, examples",
    "two_inputs.tflite --inputs=examples.npy": "an array float32 (64, 8), but two_inputs.tflite takes left",
}


def test_what_cannot_be_measured_is_refused_in_one_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for arguments, expected in REFUSED.items():
        with pytest.raises(SystemExit) as refused:
            on_device.main([*arguments.split(), *QUICK])
        message = refused.value.code
        assert message.startswith("error: ")
        assert expected in message
        assert "\n" not in message


class Fake:
    """A model whose calls take so many seconds, on a clock that goes ever slower."""

    def __init__(self, name, seconds, clock, calls):
        self.name, self.seconds, self.clock, self.calls = name, seconds, clock, calls
        self.interpreter = self

    def invoke(self):
        self.calls.append(self.name)
        self.clock[0] += self.seconds * (1 + self.clock[0] / 5)


def fakes(monkeypatch, *seconds):
    clock, calls = [0.0], []
    monkeypatch.setattr(on_device.time, "perf_counter", lambda: clock[0])
    return [Fake(i, value, clock, calls) for i, value in enumerate(seconds)], calls


def test_drift_falls_on_both_models(monkeypatch):
    models, calls = fakes(monkeypatch, 0.02, 0.06)
    turns = on_device.seconds_of_calls(models, runs=100, warmup=1, limit=100)
    assert calls[2:10] == [0, 1, 1, 0, 0, 1, 1, 0]
    assert turns[0][-1][0] > 4 * turns[0][0][0]  # the drift is larger than the difference
    found = on_device._speedup(*turns)
    assert found["ratio"] == pytest.approx(3, rel=0.02)
    assert found["low"] <= 3 <= found["high"]
    assert found["turns"] == 100


def test_it_ends_when_the_time_is_over_but_not_before_a_few_runs(monkeypatch):
    models, _ = fakes(monkeypatch, 1.0, 1.0)
    turns = on_device.seconds_of_calls(models, runs=100, warmup=1, limit=0.5)
    assert [len(values) for values in turns] == [on_device.FEWEST_RUNS] * 2


def test_short_calls_come_several_in_a_row(monkeypatch):
    models, calls = fakes(monkeypatch, 1.1e-3, 1e-4)
    turns = on_device.seconds_of_calls(models, runs=1000, warmup=1, limit=10)
    assert {len(turn) for values in turns for turn in values} == {9}  # 10 ms of the slower one
    assert calls[2:21] == [0] * 9 + [1] * 10  # two turns of the other one follow each other


def options(**changes):
    given = {"inputs": None, "batch": None, "examples": 4, "seed": 0, "threads": [1], "runs": 5, "seconds": 1}
    return argparse.Namespace(**{**given, "warmup": 1, "label": "", **changes})


def test_outputs_that_are_not_finite_are_said_to_be_so(folder, capsys):
    file = str(folder / "mlp.tflite")
    np.save(folder / "nan.npy", np.full((2, 8), np.nan, np.float32))
    result = on_device.measure([file, file], options(inputs=str(folder / "nan.npy")))
    assert result["agreement"]["largest_difference"] is None
    json.dumps(result, allow_nan=False)
    on_device.show(result)
    assert "not finite" in capsys.readouterr().out


@pytest.fixture
def on_x86(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in ("_require_tools", "_unpack_packages", "_unpack_wheels"):
        monkeypatch.setattr(aarch64, name, getattr(aarch64, name))
    return monkeypatch


def test_where_packages_cannot_be_had_one_line_says_so(on_x86, tmp_path, capsys):
    on_x86.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(aarch64.UnavailableError, match=r"^no emulated aarch64: .* apt-get is not here$"):
        aarch64.run(["script.py"], tmp_path / "aarch64")
    with pytest.raises(SystemExit) as ended:
        aarch64.main(["--folder", str(tmp_path / "aarch64"), "script.py"])
    assert ended.value.code.count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_a_command_that_fails_is_one_line_too():
    command = [sys.executable, "-c", "import sys; sys.exit('Reading lists ...\\nE: no network')"]
    with pytest.raises(aarch64.UnavailableError, match=r"^no emulated aarch64: python.* ended with 1: E: no network$"):
        aarch64._call(command)


def test_a_folder_that_is_half_made_is_never_taken_for_whole(on_x86, tmp_path):
    folder, calls = tmp_path / "aarch64", []
    on_x86.setattr(aarch64, "_require_tools", lambda: None)

    def packages(temporary, whole):
        calls.append(whole)
        (whole / "root").mkdir(parents=True)

    def interrupted(temporary, whole):
        raise KeyboardInterrupt

    on_x86.setattr(aarch64, "_unpack_packages", packages)
    on_x86.setattr(aarch64, "_unpack_wheels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aarch64.set_up(folder)
    assert not list(tmp_path.iterdir())
    on_x86.setattr(aarch64, "_unpack_wheels", lambda temporary, whole: None)
    (folder / "root").mkdir(parents=True)  # as another version may have left it
    (folder / "old").touch()
    for _ in range(2):
        assert aarch64.set_up(folder) == folder
    assert len(calls) == 2  # the interrupted one and one more
    assert sorted(os.listdir(folder)) == ["recipe.txt", "root"]
    assert os.listdir(tmp_path) == ["aarch64"]


def test_on_aarch64_itself_nothing_is_emulated(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert aarch64.command() == [sys.executable]
    assert "ON_DEVICE_LABEL" not in aarch64.environment()
    assert aarch64.run(["-c", "print(1 + 1)"]).strip() == "2"


def test_the_table_of_inference_is_made_and_nothing_is_measured_twice(tmp_path, capsys, monkeypatch):
    def layer():
        return mlp(32, 32)

    rows = [
        inference.Case("Dense 32 x 32", layer, 0.75, "1x4"),
        inference.Case("Dense 32 x 32", layer, 0.5, "1x16", dtype="int8", batch=2),
        *[inference.Case("Dense 32 x 32", layer, sparsity, is_aarch64=True) for sparsity in (0.5, 0.6)],
    ]

    def unavailable():
        raise aarch64.UnavailableError("no emulated aarch64: no network")

    monkeypatch.setattr(inference, "cases", lambda: rows)
    monkeypatch.setattr(aarch64, "command", unavailable)
    with flagsaver.flagsaver(output_dir=str(tmp_path), cases="", seconds_a_case=0.1):
        inference.main()
        first = capsys.readouterr().out
        monkeypatch.setattr(inference, "measure", lambda *_: 1 / 0)
        inference.main()
        assert capsys.readouterr().out == first
    lines = first.strip().splitlines()
    assert lines[0] == "Without the rows on aarch64: no emulated aarch64: no network"
    assert [line.split("|")[2].strip() for line in lines[3:]] == ["75%, 1x4", "50%, 1x16"]
    assert len(list((tmp_path / "inference").iterdir())) == 2


def test_figures_from_an_emulator_are_marked_and_those_of_wrong_outputs_are_not_given():
    case = inference.Case("net", mlp, 0.9, is_aarch64=True)
    result = {
        "machine": "aarch64",
        "label": "emulated",
        "models": [{"bytes": 10, "latency": [{"median_ms": 2.0}]}, {"bytes": 40, "latency": [{"median_ms": 6.0}]}],
        "speedup": [{"ratio": 3.0, "low": 2.9, "high": 3.1}],
        "agreement": {"relative": 1e-6},
    }
    cells = inference.row(case, result)
    assert cells[3:] == ("aarch64 (emulated)", "6 ms", "2 ms", "3.00 (2.90 - 3.10) (emulated)", "0.25")
    for relative in (0.4, None):
        wrong = inference.row(case, {**result, "agreement": {"relative": relative}})
        assert "WRONG" in wrong[6]
        assert "3.00" not in wrong[6]


def test_rows_have_names_of_their_own():
    names = [case.name for case in inference.cases()]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_the_emulated_aarch64_runs_the_same_file(folder):
    try:
        aarch64.command()
    except aarch64.UnavailableError as problem:
        pytest.skip(str(problem))
    file = str(folder / "mlp.tflite")
    result = json.loads(aarch64.run([on_device.__file__, file, "--against", file, "--json", *QUICK]))
    assert (result["machine"], result["agreement"]["largest_difference"]) == ("aarch64", 0)
    assert result["label"] == ("" if aarch64.is_native() else "emulated")
