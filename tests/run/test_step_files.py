"""A finished step is held against its manifest: each kind of damage is named, with the file."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pytest

from adversa.engine.step import inputs, run_step
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE
from adversa.run.step_folder import Recipe
from adversa.storage import files, tables
from adversa.types import UserError


def make(folder):
    """A step of a part and a JSON file in a folder of its own."""

    def body(progress):
        tables.write_part(folder / "train" / tables.part_name(0), pa.table({"id": list("abc")}))
        files.write_json(folder / "found.json", {"limit": 0.5})
        return {"rows": 3}

    run_step(folder, Recipe("made", 1, {}, {}), body, NULL_HANDLE)
    return folder


@pytest.fixture
def step(tmp_path):
    step_folder._check_contents.cache_clear()
    return make(tmp_path / "made")


def test_the_manifest_lists_every_file_with_its_bytes_digest_and_rows(step):
    (step / "checkpoint.pt").touch()
    listed = step_folder.manifest(step)["files"]
    part = listed["train/part-00000.parquet"]
    assert set(listed) == {"found.json", "train/part-00000.parquet"}
    assert part["rows"] == 3 and part["bytes"] == (step / "train/part-00000.parquet").stat().st_size
    assert "rows" not in listed["found.json"] and len(part["digest"]) == 64
    assert step_folder.checked(step)["rows"] == 3


def lost(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def doubled(path):
    path.write_bytes(path.read_bytes() * 2)


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    lost: "is gone",
    cut: r"has \d+ bytes, and \d+ were written",
    doubled: r"has \d+ bytes, and \d+ were written",
    zeroed: "holds other bytes than were written",
    a_folder: "is no file",
}


@pytest.mark.parametrize("name", ["found.json", "train/part-00000.parquet"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_step_that_reads_a_damaged_one_names_the_file_and_the_fix(step, damage, name):
    damage(step / name)
    with pytest.raises(UserError, match=f"{name} {DAMAGES[damage]}; put the file back") as e:
        inputs(made=step)
    assert "\n" not in str(e.value) and f"or delete {step}: the same command makes it" in str(
        e.value
    )
    shutil.rmtree(step)
    assert inputs(made=make(step))


def test_a_manifest_that_lists_no_files_is_damaged(step):
    """Otherwise a part that is lost beside it would not be missed."""
    path = step / step_folder.MANIFEST
    found = json.loads(path.read_text())
    del found["files"]
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"manifest\.json does not list the step's files; put"):
        inputs(made=step)


def test_a_manifest_that_is_cut_is_told_as_well(step):
    cut(step / step_folder.MANIFEST)
    with pytest.raises(UserError, match=r"manifest\.json is no manifest; put the file back"):
        inputs(made=step)


def test_what_a_step_holds_is_read_once_a_command_and_its_files_are_looked_for_each_time(
    step, monkeypatch
):
    read = []
    digest = step_folder.sha256
    monkeypatch.setattr(step_folder, "sha256", lambda path: read.append(path) or digest(path))
    inputs(made=step)
    inputs(made=step)
    assert len(read) == 2
    lost(step / "found.json")
    with pytest.raises(UserError, match="is gone"):
        inputs(made=step)
