import inspect
import pathlib
import re
import subprocess
import sys
from importlib import metadata

import pytest

import tf_prune

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC = {
    name: value for name, value in vars(tf_prune).items() if not name.startswith("_") and not inspect.ismodule(value)
}


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if callable(value)])
def test_every_public_object_says_what_it_is_and_documents_its_arguments(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    assert text
    if isinstance(value, type) and issubclass(value, Exception):
        return
    documented = text + (inspect.getdoc(value.__mro__[1]) or "" if isinstance(value, type) else "")
    for parameter in inspect.signature(value).parameters.values():
        assert re.search(rf"^\s+\**{parameter.name}[:,]", documented, re.M), parameter.name


def test_the_version_is_written_in_one_place():
    assert tf_prune.__version__ == metadata.version("tf_prune")
    assert f"version = {tf_prune.__version__}" in (ROOT / "setup.cfg").read_text()
    assert f"[{tf_prune.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_import_takes_none_of_the_extras():
    # Keras itself imports matplotlib and scikit-learn where they are installed.
    extras = ["tensorflow_datasets", "keras_tuner", "matplotlib", "sklearn", "ai_edge_litert", "tf_keras"]
    code = f"""
import sys, keras
before = set(sys.modules)
import tf_prune
print([name for name in [*{extras}, "tensorflow_model_optimization"] if name in set(sys.modules) - before])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tensorflow_is_imported_only_where_the_design_allows_it():
    allowed = {"evaluation.py", "gradients.py", "jacobian.py", "conversion.py", "saved_model.py"}
    allowed |= {"loops.py", "scales.py", "tfmot.py", "legacy_keras.py"}
    importing = {
        file.name
        for file in (ROOT / "tf_prune").glob("*.py")
        if re.search(r"^\s*(import|from) tensorflow", file.read_text(), re.M)
    }
    assert importing == allowed


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.filterwarnings("ignore:.*left no weight in", "ignore:The data do not tell")
@pytest.mark.parametrize("block", blocks("python"))
def test_readme_examples_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "tf.distribute" in block:  # a process has one strategy
        block += "assert tf_prune.masks_of(model).sparsity >= 0.9\n"
        subprocess.run([sys.executable, "-c", block], check=True, capture_output=True)
        return
    namespace: dict = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert tf_prune.masks_of(namespace["model"]).sparsity >= 0.9


def test_the_readme_has_exactly_two_commands_of_one_line():
    commands = [line for block in blocks("sh") for line in block.strip().splitlines()]
    assert len(commands) == 2
    assert "python -m experiments.prune_at_init" in commands[0]
    assert "pytest" in commands[1]
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_the_readme_names_every_method():
    text = (ROOT / "README.md").read_text()
    for name in tf_prune.METHODS:
        assert f'"{name}"' in text
