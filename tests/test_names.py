"""A name is said once: no two classes of adversa have the same one."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import adversa

ROOT = Path(adversa.__file__).parent


def test_a_class_name_is_used_once() -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name].add(path.relative_to(ROOT).as_posix())
    assert not {name: sorted(files) for name, files in found.items() if len(files) > 1}
