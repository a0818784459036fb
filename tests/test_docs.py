"""The documents link to files that exist, and the scripts of results/ use names that exist."""
import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/running.md", "docs/scale.md",
             "results/README.md"]
SCRIPTS = sorted(path.name for path in (ROOT / "results").glob("*.py"))
LOCAL = {"model", "train", "sample", "bench", "compare", "convert"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_name_files_that_exist(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def is_local(module):
    return module.split(".")[0] in LOCAL | {"nanogqa"}


def local_names(tree):
    """(module, name) of everything that a script takes from this repository."""
    modules = set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_local(node.module):
            names |= {(node.module, alias.name) for alias in node.names}
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if is_local(alias.name)}
    for node in ast.walk(tree):
        is_attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if is_attribute and node.value.id in modules:
            names.add((node.value.id, node.attr))
    return names


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_of_results_use_names_that_exist(name):
    """No test runs these scripts: they take minutes. A renamed function would go unnoticed."""
    for module, attribute in local_names(ast.parse((ROOT / "results" / name).read_text())):
        assert hasattr(importlib.import_module(module), attribute), f"{module}.{attribute}"


def test_contributing_names_files_that_exist():
    for target in re.findall(r"`((?:\w+/)*\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text()):
        if not target.startswith(("data/NAME", "config/NAME")):
            assert (ROOT / target).exists(), target
