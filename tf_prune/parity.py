"""Does a file do what the model does? Its outputs are compared with the model's on the same inputs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from tf_prune.judge import ExportError as ExportError
from tf_prune.judge import Judge

Arrays = Mapping[str, np.ndarray]
# Of the spread over the examples. A file that does not look at its input is wrong by 1 at least; `benchmarks/README.md`
# has what honest files of each kind are wrong by.
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "dynamic_int8": 0.3, "int8": 0.5}


@dataclasses.dataclass(frozen=True)
class Parity:
    """How the outputs of a file compare with the model's.

    Attributes:
        count: How many examples were compared.
        largest_difference: Of any output that is a number, absolute; `None` if none were.
        agreement: Fraction of examples with the same largest output; `None` where an output is a single number.
        undecided: What the data do not tell, a sentence for each output.
    """

    count: int
    largest_difference: float | None
    agreement: float | None
    undecided: tuple[str, ...] = ()


def compare(
    reference: Callable[[Arrays], Arrays],
    candidate: Callable[[Arrays], Arrays],
    batches: Iterable[Arrays],
    tolerance: float,
    *,
    steps: Mapping[str, float] | None = None,
) -> Parity:
    """Compares the outputs of two models, by name, on the same inputs.

    Each channel (place of the last axis) of each output is judged by itself: the root mean square of the differences
    must be at most `tolerance` times the standard deviation of the reference's outputs over the examples, but for the
    last digits of a float or a step of a quantized output. No single difference may be 10 times that, of the output's
    most varied channels; and the largest output must be the same one wherever the reference's margin is more than
    4 times what may be wrong. Whole numbers may instead be others in `tolerance` times as many places as a constant
    would be wrong in; so may truth values and what is infinite. Texts are equal.

    Where the outputs vary by less than can be told, a difference of that size is no error: it is said in `undecided`.

    Args:
        reference: Gives the outputs to agree with.
        candidate: The file.
        batches: Inputs by name.
        tolerance: See above.
        steps: The quantization step of the candidate's outputs, by name; 0 or left out for floats.

    Raises:
        ExportError: If they differ by more, in names, in shapes or in kind, or are not numbers.

    >>> x = np.random.default_rng(0).standard_normal((32, 3))
    >>> model, zeros = lambda inputs: {"y": 2 * inputs["x"]}, lambda inputs: {"y": 0 * inputs["x"]}
    >>> compare(model, model, [{"x": x}], 1e-3)
    Parity(count=32, largest_difference=0.0, agreement=1.0, undecided=())
    >>> compare(model, zeros, [{"x": x}], 0.3)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tf_prune.judge.ExportError: The TF-Lite model's output 'y' differs from the model's by up to 4.65, ...
    """
    count, judges = 0, dict[str, Judge]()
    for inputs in batches:
        size = num_examples(inputs)
        expected, got = reference(inputs), candidate(inputs)
        if expected.keys() != got.keys():
            raise ExportError(
                f"The TF-Lite model has the outputs {', '.join(sorted(got))}; the model has "
                f"{', '.join(sorted(expected))}. Nothing was written."
            )
        for name, output in expected.items():
            judge = judges.setdefault(name, Judge(name, tolerance, (steps or {}).get(name, 0.0)))
            judge.add(np.asarray(output), np.asarray(got[name]), size)
        count += size
    undecided = tuple(sentence for judge in judges.values() for sentence in judge.verdict())
    differences = [judge.largest for judge in judges.values() if judge.largest is not None]
    agreed = [judge.agreed for judge in judges.values() if judge.agreed[1]]
    return Parity(
        count,
        max(differences, default=None),
        sum(same for same, _ in agreed) / sum(all_ for _, all_ in agreed) if agreed else None,
        undecided if judges else ("No example was compared.",),
    )


def num_examples(inputs: Arrays) -> int:
    """How many examples a batch has: the length of most of its inputs, since some have none (a rate, a table)."""
    lengths = [len(array) for array in map(np.asarray, inputs.values()) if array.ndim]
    return max(lengths, key=lengths.count, default=1)


def rows(inputs: Arrays, start: int, stop: int) -> dict[str, np.ndarray]:
    """Some examples of a batch; inputs that are not of each example whole."""
    count = num_examples(inputs)
    return {
        name: array[start:stop] if array.ndim and len(array) == count else array
        for name, array in ((name, np.asarray(array)) for name, array in inputs.items())
    }
