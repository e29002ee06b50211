"""The picture of signal propagation: what pruning did to the spectrum, to the layers and to their connections."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tf_prune.spectrum import Spectrum
from tf_prune.whole_files import replacing_file

_COLORS = ("#3b6ea5", "#c8553d", "#5a9367", "#8a6bb1", "#b08a2e")
_MOST_PATTERNS = 8


def draw_propagation(
    file: str | Path,
    spectra: Mapping[str, Spectrum],
    masks: Mapping[str, np.ndarray] | None = None,
    scores: Mapping[str, np.ndarray] | None = None,
    title: str = "",
) -> Path:
    """Draws spectra, densities and sensitivities into one PNG file.

    Above: the singular values of each spectrum, pooled, on a logarithmic scale; which fraction of each kernel is kept;
    the connection sensitivity `s = |score| / Σ|score|` of each kernel's weights, as median and quantiles. Below, as far
    as they are given, the mask of each kernel (kept is white) and its sensitivity, as matrices with the kernel's last
    axis from left to right; of more than 8 kernels, 8.

    Args:
        file: Where to write; its folder is made. An existing file is replaced.
        spectra: Mapping of a label, such as `"before pruning"`, to a `Spectrum`.
        masks: Such as `report.masks`; `None` leaves them out.
        scores: Such as those of `tf_prune.score`, taken before pruning; `None` leaves them out.
        title: Above everything.

    Returns:
        The path of the file.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw.

    Source: Lee et al. 2020, Figure 1.
    """
    if not (spectra or masks or scores):
        raise ValueError("There is nothing to draw: pass spectra, masks or scores.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_propagation needs matplotlib: pip install matplotlib.") from error
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure, spectra, masks or {}, scores or {})
    if title:
        figure.suptitle(title)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return file


def _draw(
    figure: Any, spectra: Mapping[str, Spectrum], masks: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray]
) -> None:
    paths = list(dict.fromkeys([*masks, *scores]))
    shown = paths if len(paths) <= _MOST_PATTERNS else [paths[i] for i in _evenly(len(paths), _MOST_PATTERNS)]
    rows = bool(masks) + bool(scores)
    figure.set_size_inches(13, 4.5 + 1.9 * rows + 0.12 * max(0, len(paths) - 8))
    upper, *lower = figure.subfigures(1 + rows, 1, height_ratios=[3.6, *[1.6] * rows], squeeze=False)[:, 0]
    panels = upper.subplots(1, 3)
    _draw_spectra(panels[0], spectra)
    _draw_densities(panels[1], masks)
    _draw_sensitivities(panels[2], scores)
    total = sum(float(np.abs(score).sum()) for score in scores.values()) or 1.0
    for part, arrays, label in zip(
        lower,
        [arrays for arrays in (masks, scores) if arrays],
        ["kept"] * bool(masks) + ["log sensitivity"],
        strict=False,
    ):
        images = {path: _as_matrix(np.asarray(arrays[path])) for path in shown if path in arrays}
        if arrays is not masks:
            with np.errstate(divide="ignore"):
                images = {path: np.log10(np.abs(image) / total) for path, image in images.items()}
        _draw_matrices(part, images, label)


def _evenly(count: int, number: int) -> list[int]:
    return [round(i * (count - 1) / (number - 1)) for i in range(number)]


def _short(path: str) -> str:
    return path.removesuffix("/kernel").split("/", 1)[-1]


def _as_matrix(kernel: np.ndarray) -> np.ndarray:
    return kernel.reshape(-1, kernel.shape[-1])


def _draw_spectra(axes: Any, spectra: Mapping[str, Spectrum]) -> None:
    positive = {label: spectrum.values[spectrum.values > 0] for label, spectrum in spectra.items()}
    values = np.concatenate(list(positive.values())) if positive else np.empty(0)
    axes.set_title("Jacobian singular values", fontsize=10)
    axes.set_xlabel("singular value")
    axes.spines[["top", "right"]].set_visible(False)
    if not values.size:
        axes.text(0.5, 0.5, "no values above 0", ha="center", transform=axes.transAxes)
        return
    low, high = values.min(), values.max()
    if high / low < 1.001:  # an isometry: all the same
        low, high = low / 1.1, high * 1.1
    bins = np.geomspace(low * 0.999, high * 1.001, 60)
    for color, (label, spectrum) in zip(_COLORS * len(spectra), spectra.items(), strict=False):
        lost = spectrum.values.size - positive[label].size
        number = spectrum.condition_number_of_means
        text = f"{label}: condition number {number:.3g}" + (
            f", {lost / spectrum.values.size:.0%} are 0" if lost else ""
        )
        weights = np.full(positive[label].size, 1 / spectrum.values.size)
        axes.hist(positive[label], bins, weights=weights, histtype="step", color=color, label=text, linewidth=1.6)
    axes.set_xscale("log")
    axes.set_ylabel("fraction of the values")
    axes.margins(y=0.25)
    axes.legend(fontsize=7, loc="upper left", frameon=False)


def _draw_densities(axes: Any, masks: Mapping[str, np.ndarray]) -> None:
    axes.set_title("density of each kernel", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if not masks:
        axes.set_axis_off()
        return
    density = [float(np.mean(mask)) for mask in masks.values()]
    bars = axes.barh([_short(path) for path in masks], density, color=_COLORS[0])
    axes.bar_label(bars, [f"{value:.1%}" for value in density], padding=3, fontsize=7)
    axes.set_xlim(0, 1.15 * max(*density, 1e-6))
    axes.set_xlabel("fraction of weights kept")
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()


def _draw_sensitivities(axes: Any, scores: Mapping[str, np.ndarray]) -> None:
    axes.set_title("connection sensitivity of each kernel", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    total = sum(float(np.abs(score).sum()) for score in scores.values())
    if not scores or not total:
        axes.set_axis_off()
        return
    smallest = min(float(np.abs(score)[score != 0].min()) for score in scores.values() if np.any(score)) / total
    for i, score in enumerate(scores.values()):
        least, low, middle, high, most = np.quantile(np.abs(score) / total, [0.05, 0.25, 0.5, 0.75, 0.95]).clip(
            smallest
        )
        axes.plot([least, most], [i, i], color=_COLORS[1], linewidth=1)
        axes.plot([low, high], [i, i], color=_COLORS[1], linewidth=5, solid_capstyle="butt")
        axes.plot([middle], [i], "|", color="black", markersize=9)
    axes.set_yticks(range(len(scores)), [_short(path) for path in scores], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("share of the sum; 5 to 95 %, quartiles, median")
    axes.invert_yaxis()


def _draw_matrices(part: Any, images: Mapping[str, np.ndarray], label: str) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis"].with_extremes(bad="black")
    grid = part.subplots(1, len(images), squeeze=False)[0]
    part.supylabel(label, fontsize=9)
    finite = [image[np.isfinite(image)] for image in images.values()]
    finite = [image for image in finite if image.size] or [np.zeros(1)]
    # The same scale for all kernels; the lowest part of it is rounding errors and zeros.
    high = max(float(image.max()) for image in finite)
    low = max(min(float(image.min()) for image in finite), high - 6)
    for axes, (path, image) in zip(grid, images.items(), strict=True):
        is_mask = image.dtype == bool
        bounds = (0, 1) if is_mask else (low, high)
        axes.imshow(
            image,
            cmap="gray" if is_mask else colors,
            vmin=bounds[0],
            vmax=bounds[1],
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_title(f"{_short(path)}\n{image.shape[0]} x {image.shape[1]}", fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
