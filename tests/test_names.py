"""A name is said once: each class of these packages is the only one of its name in adversa."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import adversa

ROOT = Path(adversa.__file__).parent
OWN = (
    "pipeline",
    "engine",
    "sweep",
    "distributed",
    "cli",
    "classify",
    "config",
    "data",
    "diffuse",
    "estimate",
    "evaluate",
    "export",
    "external",
    "generation",
    "run",
    "storage",
    "training",
)


@pytest.fixture(scope="module")
def classes():
    """Name -> the files that define a class of it."""
    found = defaultdict(set)
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name].add(path.relative_to(ROOT).as_posix())
    return found


@pytest.mark.parametrize("package", OWN)
def test_a_class_name_is_used_once(classes, package):
    twice = {
        name: sorted(files)
        for name, files in classes.items()
        if len(files) > 1 and any(f.startswith(f"{package}/") for f in files)
    }
    assert not twice
