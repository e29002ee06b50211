"""Do the tests notice? Changes one thing at a time in a module, and runs the tests that reach the changed line.

    python -m benchmarks.mutants --modules=scopes,masks --mutants=50

Works on a copy of the repository. First each test file runs once with a module that notes which lines each test
reaches, and how long it takes. Then, for each of a seeded sample of mutants, the tests that reach its line run from the
quickest to the slowest, one of each way through the module before the second of any, until one fails or `--seconds` of
tests are over. Each run is a fork of a process that has TensorFlow imported. What was measured is kept in `--results`:
a run that was stopped goes on, and a larger `--mutants` or `--seconds`, or new tests, add to it: a survivor that other
tests are chosen for is tried again.
"""

import ast
import builtins
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

import hypothesis  # noqa: F401 - before the forks
import keras  # noqa: F401
import pytest
import tensorflow as tf  # noqa: F401
from absl import app, flags

from benchmarks.mutations import Mutant, instrumented, mutants_of

_MODULES = flags.DEFINE_list(
    "modules",
    [
        "scopes",
        "masks",
        "methods",
        "gradients",
        "evaluation",
        "losses",
        "terms",
        "compiled_loss",
        "enforcement",
        "parity",
    ],
    "Files of the package.",
)
_TESTS = flags.DEFINE_list("tests", [], "Test files that are measured, if they are not yet; none: what is known.")
_MUTANTS = flags.DEFINE_integer("mutants", 50, "How many of each module.", lower_bound=0)
_SECONDS = flags.DEFINE_float("seconds", 60, "How long the tests for a mutant would take without it.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sample.")
_RESULTS = flags.DEFINE_string("results", "mutants", "A folder of JSON lines.")
_AGAIN = flags.DEFINE_bool("again", False, "Only tries those again that were not killed.")
_TABLE = flags.DEFINE_bool("table", False, "Prints what is known, and runs nothing.")

_ROOT = pathlib.Path(__file__).parent.parent
_COPIED = ("tf_prune", "tests", "experiments", "benchmarks", "saved_models")


class _Watch:
    """Notes what each test reaches, how long it takes, and the first that fails."""

    def __init__(self) -> None:
        self.reached: set[tuple[str, int]] = set()
        self.tests: list[dict[str, Any]] = []
        self.failed = ""

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """A test with its fixtures."""
        self.reached.clear()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.tests.append({"test": item.nodeid, "seconds": seconds, "reached": sorted(self.reached)})

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One of its phases."""
        if report.failed and not self.failed:
            self.failed = report.nodeid
        if report.failed or report.skipped:
            self.reached.clear()  # no witness


def _lines(name: str) -> list[dict[str, Any]]:
    file = pathlib.Path(_RESULTS.value) / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _append(name: str, line: dict[str, Any]) -> None:
    with open(pathlib.Path(_RESULTS.value) / name, "a") as stream:
        stream.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def _copy() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name in _COPIED:
            shutil.copytree(_ROOT / name, f"{folder}/{name}", ignore=shutil.ignore_patterns("__pycache__"))
        for file in [*_ROOT.glob("*.cfg"), *_ROOT.glob("*.toml"), *_ROOT.glob("*.md")]:
            shutil.copy(file, folder)
        yield pathlib.Path(folder)


def _run(folder: pathlib.Path, arguments: list[str], seconds: float) -> dict[str, Any] | None:
    """What pytest says in a fork, in that folder; `None` if it is not over in time."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _answer(folder, arguments, answer)
    end = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.02)
    return json.loads(answer.read_text()) if answer.exists() else {"code": "died", "failed": "", "tests": []}


def _answer(folder: pathlib.Path, arguments: list[str], answer: pathlib.Path) -> None:
    try:
        os.setsid()
        os.chdir(folder)
        sys.dont_write_bytecode = True
        sys.path[:] = [str(folder), *(path for path in sys.path if pathlib.Path(path).resolve() != _ROOT)]
        os.environ["PYTHONPATH"] = str(folder)
        quiet = os.open("pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        for name in [name for name in sys.modules if name.split(".")[0] in ("benchmarks", "tf_prune", "tests")]:
            del sys.modules[name]
        watch = _Watch()
        builtins.__reached__ = watch.reached.add  # type: ignore[attr-defined]
        code = pytest.main(["-n", "0", "-p", "no:cacheprovider", "--assert=plain", "-q", *arguments], plugins=[watch])
        answer.write_text(json.dumps({"code": int(code), "failed": watch.failed, "tests": watch.tests}))
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def _measure(folder: pathlib.Path) -> None:
    """Which lines of the modules each test reaches."""
    known = {line["file"] for line in _lines("tests.jsonl")}
    for file in (_ROOT / "tf_prune").glob("*.py"):
        (folder / "tf_prune" / file.name).write_text(instrumented(file.read_text(), file.stem))
    for file in _TESTS.value:
        if file not in known:
            start = time.perf_counter()
            found = _run(folder, [file], 3600) or {}
            for test in found.get("tests", ()):
                _append("tests.jsonl", {"file": file, **test})
            print(f"{file}: {time.perf_counter() - start:.0f} s, {found.get('failed') or 'passed'}", flush=True)
    for file in (_ROOT / "tf_prune").glob("*.py"):
        shutil.copy(file, folder / "tf_prune" / file.name)


def _tests_of(module: str, line: int, tests: list[dict[str, Any]], seconds: float) -> tuple[list[str], float, bool]:
    """The tests that reach the line, within so many seconds; how long they take; whether there are more."""
    ways = collections.Counter[tuple[int, ...]]()
    ranked = []
    for test in sorted(tests, key=lambda one: one["seconds"]):
        way = tuple(number for name, number in test["reached"] if name == module)
        if line in way:
            ranked.append((ways[way], test["seconds"], test["test"]))
            ways[way] += 1
    chosen, total = [], 0.0
    for _, cost, name in sorted(ranked):
        if total + cost <= seconds or not chosen:
            chosen.append(name)
            total += cost
    return chosen, total, len(chosen) < len(ranked)


def _try(folder: pathlib.Path, module: str, mutant: Mutant, tests: list[dict[str, Any]]) -> dict[str, Any]:
    names, total, is_cut = _tests_of(module, mutant.line, tests, _SECONDS.value)
    result = {"module": module, "line": mutant.line, "what": mutant.what, "tests": _digest(names), "cut": is_cut}
    if not names:
        return {**result, "outcome": "not reached", "by": "", "seconds": 0.0}
    (folder / "tf_prune" / f"{module}.py").write_text(mutant.source)
    start = time.perf_counter()
    found = _run(folder, ["-x", *names], 120 + 6 * total)
    outcomes = {0: "survived", 4: "tests are gone"}  # of those that were measured
    outcome = "timed out" if found is None else outcomes.get(found["code"], "killed")
    by = "" if found is None else found["failed"] or str(found["code"])
    return {**result, "outcome": outcome, "by": by, "seconds": round(time.perf_counter() - start, 1)}


def _mutate(folder: pathlib.Path, module: str) -> None:
    source = (_ROOT / "tf_prune" / f"{module}.py").read_text()
    tests, mutants = _lines("tests.jsonl"), mutants_of(source)
    known = {(line["module"], line["line"], line["what"]): line for line in _lines("mutants.jsonl")}
    if (module, 0, "") not in known:
        _check_control(folder, module, source, tests, mutants)
    random.Random(_SEED.value).shuffle(mutants)
    for mutant in mutants[: _MUTANTS.value]:
        before = known.get((module, mutant.line, mutant.what))
        if not _has_more(before, mutant, tests) if before else _AGAIN.value:
            continue
        result = _try(folder, module, mutant, tests)
        _append("mutants.jsonl", result)
        print(f"{result['outcome']:>11} {result['seconds']:5.1f} s {module}:{mutant.line} {mutant.what}", flush=True)
    shutil.copy(_ROOT / "tf_prune" / f"{module}.py", folder / "tf_prune" / f"{module}.py")


def _has_more(before: dict[str, Any], mutant: Mutant, tests: list[dict[str, Any]]) -> bool:
    """Whether a mutant that was not killed has other tests by now."""
    if before["outcome"] in ("killed", "timed out"):
        return False
    return _digest(_tests_of(before["module"], mutant.line, tests, _SECONDS.value)[0]) != before["tests"]


def _digest(names: list[str]) -> str:
    return hashlib.md5("\n".join(sorted(names)).encode()).hexdigest()[:8]


def _check_control(
    folder: pathlib.Path, module: str, source: str, tests: list[dict[str, Any]], mutants: list[Mutant]
) -> None:
    """What is no mutant, written as mutants are, must pass: a test that fails of itself kills all."""
    names = {name for mutant in mutants for name in _tests_of(module, mutant.line, tests, 0)[0]}
    (folder / "tf_prune" / f"{module}.py").write_text(ast.unparse(ast.parse(source)))
    found = _run(folder, sorted(names), 900) if names else {"code": 0}
    if found is None or found["code"] != 0:
        raise RuntimeError(f"{module} as it is does not pass: {found and found['failed']}.")
    _append("mutants.jsonl", {"module": module, "line": 0, "what": "", "outcome": "control", "all": len(mutants)})


def _print_table() -> None:
    latest = {(line["module"], line["line"], line["what"]): line for line in _lines("mutants.jsonl")}
    print("| module | mutants | tried | killed | timed out | survived | not reached |\n|---|---|---|---|---|---|---|")
    for module in _MODULES.value:
        lines = [line for line in latest.values() if line["module"] == module]
        counts = collections.Counter(line["outcome"] for line in lines)
        total = sum(line.get("all", 0) for line in lines)
        outcomes = " | ".join(str(counts[name]) for name in ("killed", "timed out", "survived", "not reached"))
        print(f"| {module} | {total} | {len(lines) - counts['control']} | {outcomes} |")


def main(argv: list[str]) -> None:
    if _TABLE.value:
        return _print_table()
    pathlib.Path(_RESULTS.value).mkdir(parents=True, exist_ok=True)
    with _copy() as folder:
        _measure(folder)
        for module in _MODULES.value:
            _mutate(folder, module)


if __name__ == "__main__":
    app.run(main)
