import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from absl.testing import flagsaver

import tf_prune
from experiments import common, compare_methods, datasets, models, prune_at_init, signal_propagation

ROOT = pathlib.Path(__file__).parent.parent
# From the papers, and from shared counts of their code.
PRUNABLE = {
    ("vgg19", (32, 32, 3)): (20_024_000, 17),
    ("resnet32x2", (32, 32, 3)): (1_855_584, 34),
    ("resnet50", (32, 32, 3)): (23_467_712, 54),
    ("lenet_300_100", (28, 28, 1)): (266_200, 3),
    ("lenet_5_caffe", (28, 28, 1)): (430_500, 4),
    ("resnet8", (32, 32, 3)): (77_360, 10),
    ("resnet8_narrow", (32, 32, 3)): (19_608, 10),
    **{
        (f"mlp_{name}_{k}", (28, 28, 1)): (79_400 + 10_000 * (k - 2), k)
        for name in ("linear", "tanh")
        for k in (3, 5, 7)
    },
    ("gru", (28, 28, 1)): (39_400, 3),
    ("mobilenet_v1", (32, 32, 3)): (3_195_328, 28),
    ("mobilenet_v1_ready", (32, 32, 3)): (3_195_328, 28),
    ("digits_mobilenet", (8, 8, 1)): (13_472, 8),
    ("digits_convnet", (8, 8, 1)): (60_688, 5),
}


@pytest.mark.parametrize(("model", "expected"), PRUNABLE.items(), ids=lambda value: value[0])
def test_networks_have_the_prunable_weights_of_their_papers(model, expected):
    network = models.build(*model, 10)
    kernels = tf_prune.find_prunable(network).prunable.values()
    assert (sum(int(np.prod(v.shape)) for v in kernels), len(kernels)) == expected
    assert network.output_shape == (None, 10)


def test_every_network_is_in_the_table_of_sizes():
    assert {name for name, _ in PRUNABLE} == set(models.MODELS)


def test_names_of_runs_never_change():
    # A run's name is how a comparison finds what is done; a new field must not rename older runs.
    golden = {
        common.Config(): "digits_convnet-digits-force-0.95-seed0-44136fa3",
        common.Config(method="snip", sparsity=0.9, seed=2): "digits_convnet-digits-snip-0.9-seed2-b49b7ba6",
        common.Config(
            model="lenet_300_100", dataset="mnist", epochs=10
        ): "lenet_300_100-mnist-force-0.95-seed0-2ce0685b",
    }
    assert [config.name for config in golden] == list(golden.values())


@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_the_main_job_writes_what_it_says(tmp_path, capsys):
    with flagsaver.flagsaver(
        epochs=1, num_steps=3, output_dir=str(tmp_path / "results"), export_dir=str(tmp_path / "exported")
    ):
        prune_at_init.main()
    name = dataclasses.replace(common.Config(), epochs=1, num_steps=3).name
    results = json.loads((tmp_path / "results" / name / "results.json").read_text())
    assert results["pruned"]["sparsity"] == pytest.approx(0.95, abs=1e-4)
    assert results["dense"]["sparsity"] == 0
    assert results["config"]["epochs"] == 1
    picture = (tmp_path / "results" / name / "kept_weights.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path / "exported" / name)) == [
        "model.tflite",
        "report.json",
        "report.md",
        "report.png",
        "saved_model",
    ]
    shown = capsys.readouterr().out
    for text in ("test accuracy", "dense", "force", "95.00%", "TF-Lite bytes"):
        assert text in shown


@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_a_comparison_prints_its_table_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    arguments = {
        "epochs": 1,
        "num_steps": 2,
        "score_batches": 1,
        "methods": ["snip", "random"],
        "sparsities": ["0.5", "0.9"],
        "seeds": ["0"],
        "output_dir": str(tmp_path),
    }
    with flagsaver.flagsaver(**arguments):
        compare_methods.main()
        first = capsys.readouterr().out
        assert len(list((tmp_path / "runs").iterdir())) == 1 + 4
        monkeypatch.setattr(common, "train", lambda *_: 1 / 0)
        compare_methods.main()
    assert capsys.readouterr().out == first
    lines = first.strip().splitlines()
    assert lines[0] == "| method | 50 % | 90 % |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["dense", "snip", "random"]
    assert lines[3].count("±") == 2


@pytest.mark.filterwarnings("ignore:.*left no weight in", "ignore:.*no longer depend on its input")
def test_the_tables_of_signal_propagation_show_the_papers_figures_and_nothing_is_done_twice(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(signal_propagation, "_GAMMAS", (1e-2, 1e0))
    tables = {
        "_PAPER_1": {("tanh", 3): (2.52, 2.57)},
        "_PAPER_2": {g: signal_propagation._PAPER_2[g] for g in (1e-2, 1e0)},
        "_PAPER_3": {"lenet_300_100": signal_propagation._PAPER_3["lenet_300_100"][:1]},
        "_ROWS_3": [("orthogonal", "uniform")],
        "_PAPER_5": {"prediction": (3.11, 3.37, 3.56)},
    }
    for name, part in tables.items():
        monkeypatch.setattr(signal_propagation, name, part)
    with flagsaver.flagsaver(
        dataset="digits", epochs=1, score_batches=1, spectrum_images=5, runs=["0"], output_dir=str(tmp_path),
        tables=["1", "2", "3", "5"],
    ):  # fmt: skip
        signal_propagation.main()
        first = capsys.readouterr().out
        monkeypatch.setattr(common, "train", lambda *_: 1 / 0)
        monkeypatch.setattr(signal_propagation, "measure", lambda *_: 1 / 0)
        signal_propagation.main()
    assert capsys.readouterr().out == first
    for text in ("(2.52)", "(0.449)", "(6.7)", "(1.69)", "(3.56)"):
        assert text in first
    runs = [json.loads(file.read_text()) for file in (tmp_path / "signal_propagation").iterdir()]
    assert len(runs) == 2 + 2 + 2 + 3
    assert {run["config"]["retrain_initializer"] for run in runs} == {"", "glorot_normal"}


def test_the_picture_of_a_configuration_is_drawn(tmp_path, capsys):
    file = tmp_path / "picture.png"
    with flagsaver.flagsaver(
        dataset="digits", model="mlp_tanh_3", initializer="orthogonal", sparsity=0.5, score_batches=1,
        spectrum_images=5,
        picture=str(file),
    ):  # fmt: skip
        signal_propagation.main()
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "after conditioning: Jacobian 10 x 64" in capsys.readouterr().out


def test_pruned_networks_are_drawn_anew_and_conditioned_before_training():
    data = datasets.load("digits")
    config = common.Config(method="snip", model="mlp_tanh_3", sparsity=0.5, initializer="scaled_gaussian", gamma=4.0)
    config = dataclasses.replace(config, score_batches=1, epochs=1, learning_rate=1e-9)
    plain, _ = common.train(config, data)
    anew, _ = common.train(dataclasses.replace(config, retrain_initializer="glorot_normal"), data)
    conditioned, _ = common.train(dataclasses.replace(config, condition_gain=1.0), data)
    kernels = [np.asarray(model.layers[1].kernel) for model in (plain, anew, conditioned)]
    assert len({(kernel != 0).tobytes() for kernel in kernels}) == 1
    assert kernels[0][kernels[0] != 0].std() == pytest.approx(2, rel=0.5)
    assert kernels[1][kernels[1] != 0].std() == pytest.approx(np.sqrt(2 / 164), rel=0.1)
    kept = kernels[0] != 0
    assert abs(np.corrcoef(kernels[0][kept], kernels[1][kept])[0, 1]) < 0.1  # and not the same ones, smaller
    alive = kernels[2][kernels[2].any(1)].astype(float)
    np.testing.assert_allclose(np.linalg.svd(alive, compute_uv=False)[:20], 1, atol=0.05)


def test_the_same_seed_trains_the_same_network():
    data = datasets.load("digits")
    config = common.Config(method="random", epochs=1)
    accuracies = [common.train(config, data)[1]["accuracy"] for _ in range(2)]
    assert accuracies[0] == accuracies[1]


def test_structures_filters_and_losses_without_labels_are_flags():
    data = datasets.load("digits")
    config = common.Config(
        method="snip",
        sparsity=0.5,
        epochs=0,
        scope="layerwise",
        structure="output_channels",
        filters="^conv2d",
        score_loss="uniform",
    )
    model, results = common.train(config, data)
    kernels = [layer.kernel for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    silenced = [int((~np.asarray(kernel).any((0, 1, 2))).sum()) for kernel in kernels]
    assert sum(silenced) == (16 + 32 + 64 + 64) // 2
    assert results["emptied"] == []


def test_digits_are_split_the_same_way_each_time_and_normalized():
    one, other = datasets.load("digits"), datasets.load("digits")
    np.testing.assert_array_equal(one.x_test, other.x_test)
    assert one.x_train.shape == (1437, 8, 8, 1)
    assert abs(one.x_train.mean()) < 0.02
    assert abs(one.x_train.std() - 1) < 0.02


def test_each_image_is_shifted_and_flipped_by_itself_and_the_same_way_for_the_same_seed():
    image = np.random.default_rng(0).random((1, 32, 32, 3)).astype(np.float32)
    x, y = np.repeat(image, 64, axis=0), np.zeros(64, np.int64)
    data = datasets.Dataset(x, y, x, y, 10, augment=True)
    stream = common.batches(data, common.Config(batch_size=64))
    (one,), (second_epoch,), (again,) = stream, stream, common.batches(data, common.Config(batch_size=64))
    assert one[0].shape == (64, 32, 32, 3)
    distinct = {picture.tobytes() for picture in one[0].numpy()}
    assert 32 < len(distinct) <= 64
    middles = one[0].numpy()[:, 8:24, 8:24].reshape(64, -1)
    assert np.isin(middles, x).all()
    np.testing.assert_array_equal(one[0], again[0])
    assert not np.array_equal(one[0], second_epoch[0])


@pytest.mark.filterwarnings("ignore")  # of TensorFlow Datasets and what it imports
@pytest.mark.parametrize(("online", "cause"), [(False, "no network"), (True, "division by zero")])
def test_data_that_is_not_to_be_had_ends_in_one_clear_sentence(online, cause, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(datasets, "_is_online", lambda: online)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: 1 / 0)
    with pytest.raises(datasets.DatasetNotFoundError, match=rf"no prepared 'mnist' in .*{cause}.*: pass --data_dir"):
        datasets.load("mnist", str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--sparsity=95",
            "error: sparsity must be in [0, 1), the fraction of weights removed; got 95.0. Did you mean 0.95?",
        ),
        ("stray", "error: unexpected arguments ['stray']; flags are written --name=value"),
    ],
)
def test_a_wrong_command_line_ends_in_one_clear_sentence(flag, message, tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.prune_at_init",
        flag,
        f"--output_dir={tmp_path}",
        f"--export_dir={tmp_path}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == message
    assert os.listdir(tmp_path) == []


def test_the_networks_are_built_without_a_trace_of_the_session():
    one, other = (models.build("lenet_300_100", (28, 28, 1), 10) for _ in range(2))
    assert not np.array_equal(*(np.asarray(m.layers[1].kernel) for m in (one, other)))
    assert isinstance(one, keras.Model)
