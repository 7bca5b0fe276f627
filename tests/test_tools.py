"""The tools that check adversa from outside must be able to find a fault."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return loaded("kill_and_resume")


@pytest.fixture(scope="module")
def mutants():
    return loaded("mutants")


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return {root / n for n in names}


def test_what_is_committed_is_watched_before_its_step_is_finished(tool, tmp_path):
    watched = touch(
        tmp_path,
        "round-001/synthetic/part-00000.parquet",
        "round-001/verdicts/part-00003.parquet",
        "round-001/scores/part-00000.parquet",
        "test/part-00000.parquet",
        "denoiser/model.safetensors",
        "denoiser/manifest.json",
        "round-001/requests/part-00000.parquet",
        "round-001/requests/manifest.json",
    )
    touch(
        tmp_path,
        "data/decoded/part-00000.parquet",
        "data/train/part-00000.parquet",
        "data/test/part-00000.parquet",
        "judge/model.safetensors",
        "judge/checkpoint.pt",
        "round-001/hard/part-00000.parquet",
        "round-001/synthetic/.part-00001.parquet.77",
    )
    assert tool.finished_files(tmp_path).keys() == watched
    watched |= {
        tmp_path / "data/train/part-00000.parquet",
        tmp_path / "data/test/part-00000.parquet",
    }
    watched |= touch(tmp_path, "data/manifest.json")
    assert tool.finished_files(tmp_path).keys() == watched


def test_a_finished_run_is_watched_whole(tool, finished):
    _, run = finished
    watched = tool.finished_files(run.root).keys()
    assert watched >= set(run.root.rglob("*.parquet")) | set(run.root.rglob("*.safetensors"))


SLEEPS = "import pathlib, sys, time\nroot = pathlib.Path(sys.argv[1])\n"


def test_a_kill_in_the_middle_and_kills_that_are_none(tool, tmp_path):
    def command(code):
        return [sys.executable, "-c", SLEEPS + code, str(tmp_path)]

    assert (
        tool.kill_at(
            command("(root / 'begun').touch(); time.sleep(60); (root / 'done').touch()"),
            tmp_path,
            "begun",
            "done",
        )
        > 0
    )
    assert not (tmp_path / "done").exists()
    with pytest.raises(RuntimeError, match="ended with 3 before never"):
        tool.kill_at(command("sys.exit(3)"), tmp_path, "never", "done")
    with pytest.raises(RuntimeError, match="too late: done is there already"):
        tool.kill_at(
            command("(root / 'done').touch(); (root / 'late').touch(); time.sleep(60)"),
            tmp_path,
            "late",
            "done",
        )


def test_every_fault_that_is_planted_has_its_place_and_every_package_its_handful(mutants):
    faults = mutants.read(ROOT / "tools" / "mutants.toml", ROOT)
    packages = {path.parent.name for path in ROOT.glob("adversa/*/__init__.py")}
    counts = Counter(fault.package for fault in faults)
    assert counts.keys() == packages and min(counts.values()) >= 3


SUMS = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n"
FAULTS = """
[{name}]
file = "adversa/toy/sums.py"
old = "return a {sign} b"
new = "return b"
breaks = "the first number is forgotten"
tests = ["tests/test_sums.py"]
"""


def test_a_fault_that_a_test_sees_and_one_that_none_does(mutants, tmp_path, capsys, monkeypatch):
    tree, out, listed = tmp_path / "tree", tmp_path / "out.json", tmp_path / "faults.toml"
    (sums,) = touch(tree, "adversa/toy/sums.py")
    (test,) = touch(tree, "tests/test_sums.py")
    touch(tree, "adversa/__init__.py", "adversa/toy/__init__.py")
    sums.write_text(SUMS)
    seen = "from adversa.toy.sums import add\n\n\ndef test_add():\n    assert add(1, 2) == {}\n"
    test.write_text(seen.format(3))
    listed.write_text(
        "".join(FAULTS.format(name=n, sign=s) for n, s in (("one", "+"), ("two", "-")))
    )
    words = ["--root", str(tree), "--faults", str(listed), "--out", str(out)]

    def told(*more):
        code = mutants.main([*words, *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    code, said = told()
    assert code == 1 and "toy            1 of 2\n1 of 2 caught; missed: two" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["caught", "one", "tests/test_sums.py::test_add"] in [w[:1] + w[3:] for w in lines]
    assert sums.read_text() == SUMS and not list(tree.rglob("__pycache__"))
    with monkeypatch.context() as known:
        known.setattr(mutants, "run", None)
        assert told()[0] == 1 and told("--only", "one")[0] == 0  # from what is known
    assert told("--only", "three") == (2, "error: --only three: neither a package nor a fault\n")
    test.write_text(seen.format(4))
    sound = "error: without a fault: tests/test_sums.py::test_add fails\n"
    assert told() == (2, sound)
    sums.write_text(SUMS + SUMS)
    moved = "error: one: its old text stands 2 times in adversa/toy/sums.py\n"
    assert told() == (2, moved)
