"""`test` is opened once. Each opening is written down before a classifier answers to the first
image, and a second one needs leave.

`openings.json` at the run's root has them all, oldest first; `opened.json` in the test folder says
which of them the folder holds. So a reading that was cut off goes on as the same opening, and one
whose folder is gone can't be passed off as the first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adversa.config import Config
from adversa.pipeline.folders import last_round, models_of
from adversa.run import differences, environment
from adversa.run.folder import RunDir
from adversa.run.step_folder import MANIFEST, OPENED
from adversa.storage import files, once
from adversa.storage.path import StoragePath, move
from adversa.types import UserError

# The keys that only say how `test` is read once it is open: no classifier is made of them.
READING = tuple(
    f"evaluate.{field}" for field in ("bootstrap", "groups", "specificities", "floor", "subgroups")
)
RESULTS = (
    "summary.json",
    "report.html",
    "report.md",
)  # what is told of an opening: it goes where the opening goes


@dataclass(frozen=True)
class Opening:
    """What is read (None: not known), by which weights ("arm-seed" to their fingerprint), and how
    (the fields of READING).
    """

    split_hash: str | None
    models: dict[str, str]
    evaluate: dict[str, Any]


def was_opened(run: RunDir) -> bool:
    return run.openings.exists() or (run.test / OPENED).exists()


def asked(config: Config, run: RunDir) -> Opening:
    """The opening that this configuration and the classifiers of the last round, as they are now,
    would make.
    """
    section = config.evaluate.model_dump(mode="json")
    how = {field.partition(".")[2]: section[field.partition(".")[2]] for field in READING}
    models = {
        f"{arm}-{seed}": _weights(folder)
        for arm, seed, _, folder in models_of(config, run, last_round(config))
    }
    return Opening((files.read_json(run.data / "split.json") or {}).get("split_hash"), models, how)


def _weights(folder: StoragePath) -> str:
    return str((files.read_json(folder / MANIFEST) or {}).get("fingerprint", "not trained"))


def ledger(run: RunDir) -> list[dict[str, Any]]:
    """Every opening so far, oldest first. UserError where the file can't be read: then nobody
    knows.

    A run that was killed between the two files has its last one in the test folder alone.
    """
    entries, mark = _written(run), files.read_json(run.test / OPENED)
    return entries if mark is None or mark["opening"] <= len(entries) else [*entries, mark]


def _written(run: RunDir) -> list[dict[str, Any]]:
    try:
        found = json.loads(once.read_bytes(run.openings).decode())
    except FileNotFoundError:
        return []
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, list):
        raise UserError(
            f"{run.openings} is no list of openings, and it alone knows of them; put back "
            "the file as it was"
        )
    return found


def review(run: RunDir, now: Opening, reopen: bool) -> None:
    """Before anything is done that may open test: nothing where it never was, or where the test
    folder holds this very opening.

    Else UserError; with `reopen` what was read before is set aside, so that the stages after it are
    to be done again.
    """
    entries = ledger(run)
    if not entries or not (changed := _changed(files.read_json(run.test / OPENED), now)):
        return
    if not reopen:
        when = f"{entries[-1]['opened']} (split {str(entries[-1].get('split_hash'))[:8]})"
        raise UserError(
            f"{run.root}: test was opened at {when}, and {_said(changed)}: reading it now "
            "would open it again; put back what was "
            "there, or use adversa loop --reopen-test: the report then says how often test "
            "was opened"
        )
    _set_aside(run, len(entries))


def enter(run: RunDir, now: Opening) -> None:
    """Write the opening down: first in the test folder, then in the ledger, both before the first
    image is seen.

    One that was cut off is written down already, and stays the same. The caller has asked `review`.
    """
    if files.read_json(run.test / OPENED) is None:
        entries = ledger(run)
        reason = _said(_changed(entries[-1], now) or [GONE]) if entries else "the end of the run"
        mark = {
            "opened": environment.now(),
            "opening": len(entries) + 1,
            "reason": reason,
        } | asdict(now)
        files.write_json(run.test / OPENED, mark)
    files.write_json(run.openings, ledger(run))


GONE = "what it read then is gone (test/opened.json)"


def _changed(mark: dict[str, Any] | None, now: Opening) -> list[str]:
    """What is not as it was in the opening of the test folder, one string each; empty: it is that
    very opening.
    """
    if mark is None:
        return [GONE]
    before = {
        "model": mark["models"],
        "evaluate": mark["evaluate"],
        "split": now.split_hash and mark.get("split_hash"),
    }
    return differences.differences(
        before, {"model": now.models, "evaluate": now.evaluate, "split": now.split_hash}
    )


def _said(changed: Sequence[str]) -> str:
    """At most three of them: a run of five arms and five seeds has thirty models."""
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(changed[:3]) + more


def _set_aside(run: RunDir, number: int) -> None:
    """Keep opening `number` under another name: test, select, and what was told of them. Killed on
    the way, it goes on.
    """
    with files.writing(run.root):
        # Killed between the two files, its only record is in the folder that goes.
        files.write_json(run.openings, ledger(run))
        if run.select.exists():
            move(run.select, _free(run, "select", number, MANIFEST), MANIFEST)
        keep = run.test if run.test.exists() else run.root / f"test-opening-{number}"
        keep.mkdir(exist_ok=True)
        for name in RESULTS:
            if (run.root / name).exists():
                move(run.root / name, keep / name)
        if keep == run.test:
            move(run.test, _free(run, "test", number, OPENED), OPENED)


def _free(run: RunDir, name: str, number: int, last: str) -> StoragePath:
    """The name of what is set aside, with `+` for each time that it is taken: by a reading that was
    never written down.

    On an object store a folder without `last`, the file that is moved last, is what a cut left: the
    moving goes on there.
    """
    path = run.root / f"{name}-opening-{number}"
    while path.exists() and (isinstance(path, Path) or (path / last).exists()):
        path = path.with_name(path.name + "+")
    return path


def note(run: RunDir) -> str | None:
    """What a reader must know of several openings; None where test was opened once."""
    entries = ledger(run)
    if len(entries) < 2:
        return None
    return (
        f"test was opened {len(entries)} times, first at {entries[0]['opened']} (the last "
        f"time because: {entries[-1]['reason']}): "
        "what was chosen after the first look may have been chosen by it, so these figures "
        "may be too good"
    )
