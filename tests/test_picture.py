import subprocess
import sys

import numpy as np
import pytest

import tf_prune
from tests import helpers


def spectrum(*rows):
    return tf_prune.Spectrum(np.array(rows, float), (2, 3))


@pytest.mark.parametrize("name", ["mlp", "separable"])
def test_one_call_draws_one_png_that_matplotlib_can_read(name, tmp_path):
    from matplotlib import image

    model = helpers.build(name)
    data = helpers.batch()
    scores = tf_prune.score(model, "snip", data)
    before = tf_prune.jacobian_spectrum(model, data, verbose=0)
    report = tf_prune.prune(model, "snip", 0.7, data, verbose=0)
    after = tf_prune.jacobian_spectrum(model, data, verbose=0)
    spectra = {"before pruning": before, "after": after}
    file = tf_prune.draw_propagation(tmp_path / "new" / "picture.png", spectra, report.masks, scores, "title")
    pixels = image.imread(file)
    assert pixels.shape[0] > 500
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_each_panel_shows_what_it_says():
    from matplotlib.figure import Figure

    generator = np.random.default_rng(0)
    masks = {"a/kernel": generator.random((4, 3)) < 0.5, "b/kernel": generator.random((3, 2, 2)) < 0.5}
    scores = {path: generator.standard_normal(mask.shape) for path, mask in masks.items()}
    figure = Figure()
    tf_prune.picture._draw(figure, {"before": spectrum([4, 2]), "after": spectrum([3, 0])}, masks, scores)
    spectra, densities, sensitivities, *matrices = figure.axes
    assert [text.get_text() for text in spectra.get_legend().get_texts()] == [
        "before: condition number 2",
        "after: condition number inf, 50% are 0",
    ]
    np.testing.assert_allclose([bar.get_width() for bar in densities.patches], [m.mean() for m in masks.values()])
    total = sum(np.abs(score).sum() for score in scores.values())
    medians = [line.get_xdata()[0] for line in sensitivities.lines if line.get_marker() == "|"]
    np.testing.assert_allclose(medians, [np.median(np.abs(score)) / total for score in scores.values()])
    drawn = [axes.images[0].get_array() for axes in matrices]
    for image, mask in zip(drawn, masks.values(), strict=False):
        np.testing.assert_array_equal(image, mask.reshape(-1, mask.shape[-1]))
    for image, score in zip(drawn[2:], scores.values(), strict=True):
        np.testing.assert_allclose(10.0**image, np.abs(score).reshape(-1, score.shape[-1]) / total)


@pytest.mark.parametrize(
    "spectra",
    [{"isometry": spectrum([1, 1])}, {"cut": spectrum([0, 0])}, {}, {"both": spectrum([3, 0], [2, 1])}],
    ids=lambda spectra: next(iter(spectra), "none"),
)
def test_extreme_spectra_and_emptied_kernels_are_drawn(spectra, tmp_path):
    masks = {"a/kernel": np.zeros((4, 3), bool), "b/kernel": np.ones((3, 2), bool)}
    scores = {"a/kernel": np.zeros((4, 3)), "b/kernel": np.ones((3, 2))}
    assert tf_prune.draw_propagation(tmp_path / "picture.png", spectra, masks, scores).stat().st_size > 10_000


def test_many_kernels_are_drawn_and_nothing_at_all_is_refused(tmp_path):
    masks = {f"layer_{i}/kernel": np.eye(3, dtype=bool) for i in range(30)}
    tf_prune.draw_propagation(tmp_path / "picture.png", {}, masks)
    with pytest.raises(ValueError, match="nothing to draw"):
        tf_prune.draw_propagation(tmp_path / "other.png", {})
    assert not (tmp_path / "other.png").exists()


def test_matplotlib_is_imported_by_the_call_alone():
    code = "import sys; sys.modules['matplotlib'] = None\nfrom tf_prune.picture import draw_propagation\n"
    code += "try: draw_propagation('x.png', {'a': object()})\nexcept ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "draw_propagation needs matplotlib: pip install matplotlib." in done.stdout
