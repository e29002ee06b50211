"""Runs TF-Lite files that may crash their runtime: one file a line of standard input, one line of output for each.

Needs nothing of tf_prune, so that it starts fast: `benchmarks/damaged_files.py` starts it again after each crash.
"""

import resource
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter

_MOST_MEMORY = 4 << 30


def run(file: str) -> str:
    """What LiteRT says of a file."""
    try:
        interpreter = Interpreter(file, num_threads=1)
        interpreter.allocate_tensors()
        for details in interpreter.get_input_details():
            interpreter.set_tensor(details["index"], np.zeros(details["shape"], details["dtype"]))
        interpreter.invoke()
    except (MemoryError, RuntimeError, TypeError, ValueError):
        return "refused"
    return "ran"


def main() -> None:
    """Reads names of files until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    for line in sys.stdin:
        print(run(line.rstrip("\n")), flush=True)


if __name__ == "__main__":
    main()
