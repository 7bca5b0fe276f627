"""Show that the tests see a fault: small ones are planted, one at a time, in a copy of the tree.

    python tools/mutants.py --list
    python tools/mutants.py --out mutants.json                  # all; the same command resumes
    python tools/mutants.py --only curate evaluate-sign         # of packages, or single ones

Each fault of mutants.toml is what a slip of the hand makes: a sign, a role, an argument too few.
It is caught where one of its tests fails, and missed where all of them pass: then the test that
sees it is to be written. A list whose text has moved is refused, and so are tests that fail without
a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
COPIED = ("adversa", "tests")  # of a tree; all else in it is linked
SECONDS = 600.0  # for the tests of one fault: what hangs is caught


class BadList(Exception):
    """What is wrong with the list of faults, or with the tests that it names, in one line."""


@dataclass(frozen=True)
class Fault:
    """One fault. old: text that `file` holds once; breaks: what is wrong once it is `new`."""

    id: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    @property
    def package(self) -> str:
        """The folder below adversa/ that it lies in."""
        return self.file.split("/")[1]

    @property
    def digest(self) -> str:
        """Of all that is said of it."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """Of a fault: whether a test failed, the first that did, and how long that took."""

    caught: bool
    by: str
    seconds: float
    fault: str  # its digest


def read(path: Path, root: Path) -> list[Fault]:
    """The faults of a list.

    Args:
        path: The list.
        root: The tree that it is of.

    Returns:
        The faults, in their order.

    Raises:
        BadList: A text is not there exactly once, or is not changed.
    """
    known = tomllib.loads(path.read_text())
    faults = [Fault(id=name, **row | {"tests": tuple(row["tests"])}) for name, row in known.items()]
    for f in faults:
        text = (root / f.file).read_text() if (root / f.file).is_file() else ""
        if text.count(f.old) != 1 or f.old == f.new:
            raise BadList(f"{f.id}: its old text stands {text.count(f.old)} times in {f.file}")
        if gone := [t for t in f.tests if not (root / t.partition("::")[0]).exists()]:
            raise BadList(f"{f.id}: there is no {gone[0]}")
    return faults


def chosen(faults: Sequence[Fault], names: Sequence[str]) -> list[Fault]:
    """Those that the names (of packages or faults; none: all) stand for; BadList for a name of
    nothing.
    """
    if strange := set(names) - {n for f in faults for n in (f.id, f.package)}:
        raise BadList(f"--only {sorted(strange)[0]}: neither a package nor a fault")
    return [f for f in faults if not names or {f.id, f.package} & set(names)]


def digest_of(root: Path) -> str:
    """Of all Python files that are copied."""
    found = hashlib.sha256()
    for path in sorted(p for name in COPIED for p in (root / name).rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def copy(root: Path, tree: Path) -> None:
    """A tree to plant faults in: the code and its tests copied, the rest linked."""
    ignore = shutil.ignore_patterns("__pycache__")
    for path in root.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, tree / path.name, ignore=ignore)
        elif not path.name.startswith("."):
            (tree / path.name).symlink_to(path)


def run(tree: Path, tests: Iterable[str], *options: str) -> tuple[int | None, list[str]]:
    """(pytest's exit code, None where it took more than SECONDS; the tests that failed)."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests]
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    said = subprocess.Popen(
        words,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        text, code = said.communicate(timeout=SECONDS)[0], said.returncode
    except subprocess.TimeoutExpired:
        said.kill()
        text, code = said.communicate()[0], None
    lines = [line.split() for line in text.splitlines()]
    return code, [w[1] for w in lines if len(w) > 1 and w[0] in ("FAILED", "ERROR")]


@contextlib.contextmanager
def planted(tree: Path, fault: Fault) -> Iterator[None]:
    """The fault is in the tree, and nothing compiled from the sound file is."""
    path = tree / fault.file
    sound = path.read_text()
    compiled = Path(importlib.util.cache_from_source(str(path)))
    path.write_text(sound.replace(fault.old, fault.new))
    compiled.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.write_text(sound)
        compiled.unlink(missing_ok=True)


def attempt(tree: Path, fault: Fault) -> Outcome:
    """What the tests of a fault say of it; BadList where they could not be run."""
    started = time.monotonic()
    with planted(tree, fault):
        code, failed = run(tree, fault.tests, "-x")
    if code not in (0, 1, 2, None):  # 2: a module that a test imports breaks
        raise BadList(f"{fault.id}: pytest ends with exit code {code} on {' '.join(fault.tests)}")
    by = failed[0] if failed else "" if code == 0 else f"no end within {SECONDS:.0f} s"
    return Outcome(code != 0, by, round(time.monotonic() - started, 1), fault.digest)


def check_sound(tree: Path, tests: Sequence[str]) -> None:
    """BadList where one of the tests fails without a fault."""
    if tests:
        code, failed = run(tree, tests)
        if code != 0:
            raise BadList(f"without a fault: {', '.join(failed[:5]) or f'exit code {code}'} fails")


class Record:
    """Outcomes on disk, of this very tree; begun anew for another. path: None keeps none."""

    def __init__(self, path: Path | None, tree: str) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path is not None and path.is_file() else {}
        found = found if found.get("tree") == tree else {}
        self.sound: set[str] = set(found.get("sound", []))
        self.outcomes = {k: Outcome(**row) for k, row in found.get("faults", {}).items()}
        self.tree = tree

    def of(self, fault: Fault) -> Outcome | None:
        """What is known of a fault as it stands in the list now."""
        found = self.outcomes.get(fault.id)
        return found if found is not None and found.fault == fault.digest else None

    def write(self) -> None:
        """All that is known."""
        if self.path is not None:
            rows = {k: asdict(v) for k, v in sorted(self.outcomes.items())}
            text = {"tree": self.tree, "sound": sorted(self.sound), "faults": rows}
            self.path.write_text(json.dumps(text, indent=1) + "\n")


def work(faults: Sequence[Fault], root: Path, record: Record, jobs: int) -> None:
    """Try every fault that the record does not have, `jobs` at a time, each in its own tree."""
    todo = [f for f in faults if record.of(f) is None]
    if not todo:
        return
    tests = sorted({t for f in todo for t in f.tests} - record.sound)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(jobs):
            (tree := Path(folder) / str(i)).mkdir()
            copy(root, tree)
            trees.put(tree)
        check_sound(Path(folder) / "0", tests)
        record.sound |= set(tests)
        record.write()

        def one(fault: Fault) -> tuple[Fault, Outcome]:
            tree = trees.get()
            try:
                return fault, attempt(tree, fault)
            finally:
                trees.put(tree)

        try:
            for fault, outcome in pool.map(one, todo):
                record.outcomes[fault.id] = outcome
                record.write()
                print(row(fault, outcome), flush=True)
        except BaseException:  # Ctrl-C, say: those that wait are not begun
            pool.shutdown(cancel_futures=True)
            raise


def row(fault: Fault, outcome: Outcome) -> str:
    """A line of the table: the test that sees it, or what goes unseen."""
    word = "caught" if outcome.caught else "MISSED"
    return f"{word}  {outcome.seconds:6.1f} s  {fault.id:32} {outcome.by or fault.breaks}"


def summary(faults: Sequence[Fault], record: Record) -> str:
    """Of each package how many are caught, then of all."""
    caught = [f for f in faults if (o := record.of(f)) is not None and o.caught]
    of, seen = (Counter(f.package for f in some) for some in (faults, caught))
    lines = [f"{package:12} {seen[package]:3} of {n}" for package, n in of.items()]
    missed = [f.id for f in faults if f not in caught]
    said = f"; missed: {', '.join(missed)}" if missed else ""
    return "\n".join([*lines, f"{len(caught)} of {len(faults)} caught{said}"])


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 1 where a fault is missed, 2 where the list or its tests are no good."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="packages, or faults")
    parser.add_argument("--list", action="store_true", help="show the faults; run nothing")
    parser.add_argument("--out", type=Path, help="JSON file; what it has is not done again")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time (default 1)")
    parser.add_argument("--root", type=Path, default=HERE.parent, help="the tree (default: this)")
    parser.add_argument("--faults", type=Path, default=HERE / "mutants.toml", help="the list")
    asked = parser.parse_args(words)
    try:
        faults = chosen(read(asked.faults, asked.root), asked.only)
        if asked.list:
            print("\n".join(f"{f.id:32} {f.file}: {f.breaks}" for f in faults))
            return 0
        record = Record(asked.out, digest_of(asked.root))
        work(faults, asked.root, record, asked.jobs)
    except BadList as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(summary(faults, record))
    return 0 if all((o := record.of(f)) is not None and o.caught for f in faults) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the copies of the tree are removed
    sys.exit(main())
