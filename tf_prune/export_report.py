"""What `export` wrote, as an object, a table, JSON, a page of Markdown and a plot."""

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tf_prune.sparse_inference import Explanation
from tf_prune.whole_files import replacing_file
from tf_prune.zeros import LayerSparsity

_KERNELS_ON_A_PAGE = 24
_ENCODINGS = ("dense", "sparse")


@dataclasses.dataclass(frozen=True)
class Point:
    """Size and latency of one file, for the plot: `encoding` is `"dense"` or `"sparse"`, latency in seconds.

    It has no latency if LiteRT does not run it, or not rightly.
    """

    sparsity: float
    encoding: str
    bytes: int
    latency: float | None


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export` wrote, and how it compares with the model. `print(report)` shows a table.

    Attributes:
        directory: Where `saved_model/`, `model.tflite`, `report.json` and `report.md` are.
        dtype: Of `model.tflite`, as in `export`.
        encoding: Of `model.tflite`, `"dense"` or `"sparse"`; `None` if the SavedModel was written alone.
        bytes: File sizes by encoding, e.g. `bytes["sparse"]["gzip"]`; and of the SavedModel.
        layers: Zeros of each kernel, before and after conversion.
        inputs: What the models were compared on.
        shapes: What the file takes, one an input, `None` where a size is open.
        largest_difference: Of any output, absolute, between the model and the file; `None` if it could not be run.
        agreement: Fraction of examples with the same largest output; `None` where an output is a single number.
        undecided: What the data do not tell of the outputs, since they hardly vary over the examples, in sentences.
        refused: Why an encoding could not be kept, though it is smaller: LiteRT does not run it, or not rightly.
        machine: Where latencies were measured, e.g. `"x86_64"`.
        points: Size and latency at this sparsity and at those of the sweep.
        explanations: What each target makes of the sparsity.
        notes: What was not asked for and had to be done otherwise, a sentence each.
    """

    directory: str
    dtype: str
    encoding: str | None
    bytes: dict[str, dict[str, int]]
    layers: tuple[LayerSparsity, ...]
    inputs: str
    shapes: tuple[tuple[int | None, ...], ...]
    largest_difference: float | None
    agreement: float | None
    undecided: tuple[str, ...]
    refused: dict[str, str]
    machine: str
    points: tuple[Point, ...]
    explanations: tuple[Explanation, ...]
    notes: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of exact zeros among the weights of the kernels, of those that are found in the TF-Lite file."""
        found = self._found()
        total = sum(row.num_weights for row in found)
        return sum(row.sparsity * row.num_weights for row in found) / total if total else 0.0

    @property
    def headline(self) -> str:
        """The sparsity, and of what it is."""
        found = self._found()
        size = sum(row.num_weights for row in found)
        text = f"{self.sparsity:.2%} of the {size:,} weights of {len(found)} kernels are zero"
        missing = len(self.layers) - len(found)
        return text + (f"; {missing} kernels were not found in the file, and do not count" if missing else "")

    def _found(self) -> list[LayerSparsity]:
        return [row for row in self.layers if self.encoding is None or row.tflite_sparsity is not None]

    @property
    def latency(self) -> dict[str, float]:
        """Median time of one example by encoding, in seconds, on `machine`, with one thread."""
        return {point.encoding: point.latency for point in self._here() if point.latency is not None}

    def _here(self) -> tuple[Point, ...]:
        """The points of the files themselves."""
        return self.points[: len(_ENCODINGS)]

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the report as JSON; an existing file is replaced in one step."""
        content = {**dataclasses.asdict(self), "sparsity": self.sparsity, "latency": self.latency}
        content["explanations"] = {
            explanation.target: {
                "verdict": explanation.verdict,
                "runs_sparse": explanation.runs_sparse,
                "obstacles": [dataclasses.asdict(obstacle) for obstacle in explanation.obstacles],
            }
            for explanation in self.explanations
        }
        with replacing_file(file) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")

    def __str__(self) -> str:
        table = Table(title=f"{self.directory}: {self.headline}")
        for column in ("kernel", "weights", "sparsity", "in the .tflite"):
            table.add_column(column, justify="left" if column == "kernel" else "right")
        for row in self.layers:
            table.add_row(*_cells(row))
        sizes = Table()
        for column in ("file", "bytes", "gzipped", f"ms on this {self.machine}"):
            sizes.add_column(column, justify="left" if column == "file" else "right")
        for cells in self._size_rows():
            sizes.add_row(*cells)
        with io.StringIO() as stream:
            console = Console(file=stream, width=100)
            console.print(table)
            console.print(sizes)
            console.print(self._parity())
            for note in self.notes:
                console.print(note)
            for name, reason in self.refused.items():
                console.print(f"The {name} encoding cannot be used: {reason}")
            for explanation in self.explanations:
                console.print(explanation.verdict)
            return stream.getvalue()

    def to_markdown(self, picture: str | None = None) -> str:
        """One page: the verdicts, sizes, parity, what is in the way, and the kernels.

        Args:
            picture: The plot's file name, to be shown on the page.
        """
        kind = f"`model.tflite` is {self.dtype}, {self.encoding} encoding, and takes {self._takes()}"
        lines = [
            f"# {Path(self.directory).name}",
            "",
            f"{self.headline}. {kind if self.encoding else f'The SavedModel takes {self._takes()}'}. " + self._parity(),
            *(line for note in self.notes for line in ("", note)),
            "",
            *self._verdicts(),
            "## Size and latency",
            "",
            f"| file | bytes | gzipped | ms on this {self.machine}, 1 thread |",
            "|---|---:|---:|---:|",
            *("| " + " | ".join(row) + " |" for row in self._size_rows()),
        ]
        if picture:
            lines += ["", f"![Size and latency against sparsity]({picture})"]
        if self.explanations:
            lines += ["", "## What is in the way", ""]
            lines += [f"- The {name} encoding cannot be used: {reason}" for name, reason in self.refused.items()]
            lines += self._obstacle_lines()
        lines += ["", "## Kernels", ""]
        lines += ["| kernel | weights | sparsity | in the file |", "|---|---:|---:|---:|"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in self.layers[:_KERNELS_ON_A_PAGE]]
        more = len(self.layers) - _KERNELS_ON_A_PAGE
        if more > 0:
            lines.append(f"| and {more} more, in report.json | | | |")
        return "\n".join(lines) + "\n"

    def _verdicts(self) -> list[str]:
        if not self.explanations:
            return []
        return ["## Is it faster?", "", *(f"- {explanation.verdict}" for explanation in self.explanations), ""]

    def _obstacle_lines(self) -> list[str]:
        lines = []
        for explanation in self.explanations:
            shown = explanation.obstacles[:4]
            lines += [f"- {explanation.target}: {o.where}: {o.reason}. Fix: {o.fix}." for o in shown]
            if len(explanation.obstacles) > len(shown):
                lines.append(f"- {explanation.target}: {len(explanation.obstacles) - len(shown)} more, in report.json")
        return lines or ["Nothing."]

    def _parity(self) -> str:
        if self.inputs.startswith("0 "):
            return " ".join(self.undecided)
        runtime = "LiteRT" if self.encoding else "the SavedModel"
        agreement = "" if self.agreement is None else f", the same prediction for {self.agreement:.2%}"
        difference = "" if self.largest_difference is None else f": largest difference {self.largest_difference:.2g}"
        return " ".join([f"The model and {runtime} on {self.inputs}{difference}{agreement}.", *self.undecided])

    def _takes(self) -> str:
        """Shapes, in words."""
        return " and ".join("(" + ", ".join("any" if n is None else str(n) for n in s) + ")" for s in self.shapes)

    def _size_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name, size in self.bytes.items():
            kept = " (kept as model.tflite)" if name == self.encoding else ""
            kept = " (LiteRT fails on it)" if name in self.refused else kept
            label = f"TF-Lite, {name}{kept}" if name in _ENCODINGS else name
            time = f"{1000 * self.latency[name]:.3g}" if name in self.latency else ""
            rows.append((label, f"{size['raw']:,}", f"{size['gzip']:,}", time))
        return rows


def _cells(row: LayerSparsity) -> tuple[str, ...]:
    after = "not found" if row.tflite_sparsity is None else f"{row.tflite_sparsity:.2%}"
    return row.path, f"{row.num_weights:,}", f"{row.sparsity:.2%}", after


def draw_sizes(file: str | os.PathLike[str], report: ExportReport) -> bool:
    """Draws size and latency of both encodings against sparsity; the model itself is ringed.

    Args:
        file: The PNG.
        report: With the points.

    Returns:
        Whether it was drawn: without matplotlib it is not.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels: tuple[tuple[Any, str, Any], ...] = (
        (left, "size, kB", lambda point: point.bytes / 1000),
        (right, f"latency on {report.machine}, ms", lambda point: point.latency and 1000 * point.latency),
    )
    for axes, label, value in panels:
        for encoding, color in (("dense", "#8a8a8a"), ("sparse", "#3b6ea5")):
            points = sorted((p.sparsity, value(p)) for p in report.points if p.encoding == encoding and value(p))
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=color, label=encoding)
        for point in report._here():
            if point.encoding == report.encoding and value(point):
                axes.plot(point.sparsity, value(point), "o", ms=12, mfc="none", mec="#c0392b", label="this model")
        axes.set(xlabel="sparsity", ylabel=label, ylim=(0, 1.15 * axes.get_ylim()[1]))
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)
    return True
