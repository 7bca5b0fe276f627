"""Parts are written whole or not at all, and hold what was put in."""

from __future__ import annotations

import errno
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adversa.curate.filter import Verdict
from adversa.storage import files as storage_files
from adversa.storage import tables
from adversa.types import HardCase, UserError

ROWS = pa.table(
    {"id": ["a", "b"], "kind": ["real", "real"], "label": [0, 1], "weight": [1.0, 0.5]},
    schema=tables.MIX,
)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def verdict():
    numbers = [
        "contrast",
        "clipped",
        "agreement",
        "agreement_least",
        "agreement_most",
        "realism",
        "realism_2",
        "similarity",
    ]
    numbers += ["similarity_2", "twin_similarity"]
    return Verdict(
        "r1",
        "guided",
        1,
        "img2img",
        None,
        False,
        "near copy",
        nearest="e9",
        similarity_limit=0.9,
        place=2,
        quota=3,
        **{name: 0.25 * i for i, name in enumerate(numbers)},
    )


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_part_reads_back(tmp_path):
    tables.write_part(tmp_path / "x" / tables.part_name(3), ROWS)
    assert files(tmp_path / "x") == ["part-00003.parquet"]
    assert tables.read(tmp_path / "x").equals(ROWS)
    assert tables.read(tmp_path / "x", ["label"])["label"].to_pylist() == [0, 1]


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_part_that_fails_late_leaves_nothing_and_is_the_users_to_mend(
    tmp_path, monkeypatch, where
):
    monkeypatch.setattr(where, full)
    with (
        pytest.raises(UserError, match="the disk is full; free some space") as e,
        storage_files.writing(tmp_path),
    ):
        tables.write_part(tmp_path / tables.part_name(0), ROWS)
    assert str(tmp_path) in str(e.value) and files(tmp_path) == []


def test_a_part_that_fails_half_written_leaves_nothing(tmp_path, monkeypatch):
    def half(table, sink, **_):
        sink.write(b"PAR1")
        full()

    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(OSError, match="No space"):
        tables.write_part(tmp_path / tables.part_name(0), ROWS)
    assert files(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_whatever_is_written_says_which_error_a_full_disk_is(tmp_path, monkeypatch):
    """The real thing: whatever writes, the errno that `files.writing` looks for survives."""
    import torch

    from adversa.storage import weights

    real_open = open
    monkeypatch.setattr(
        "builtins.open",
        lambda path, mode="r", **k: real_open("/dev/full" if "w" in mode else path, mode, **k),
    )
    with pytest.raises(UserError, match="disk is full"), storage_files.writing(tmp_path):
        weights.save_checkpoint(tmp_path, {"step": 1, "model": {"w": torch.zeros(100_000)}})
    with pytest.raises(UserError, match="disk is full"), storage_files.writing(tmp_path):
        storage_files.replace_bytes(tmp_path / "x.json", b"x" * 100_000)
    with pytest.raises(UserError, match="disk is full"), storage_files.writing(tmp_path):
        tables.write_part(tmp_path / tables.part_name(0), pa.concat_tables([ROWS] * 2_000))
    assert files(tmp_path) == []


def test_an_interrupted_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    storage_files.replace_bytes(path, b"old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage_files.replace_bytes(path, b"new")
    assert path.read_bytes() == b"old" and files(tmp_path) == ["a.json"]


def test_hidden_and_foreign_files_are_not_parts(tmp_path):
    for index in (1, 0):
        tables.write_part(tmp_path / tables.part_name(index), ROWS)
    (tmp_path / ".part-00002.parquet.77").write_bytes(b"half")
    (tmp_path / ".part-00003.parquet").write_bytes(b"half")
    (tmp_path / "manifest.json").write_text("{}")
    assert [p.name for p in tables.parts(tmp_path)] == ["part-00000.parquet", "part-00001.parquet"]
    assert len(tables.read(tmp_path)) == 4


def test_an_empty_folder_reads_as_an_empty_table_of_the_schema(tmp_path):
    assert tables.read(tmp_path, schema=tables.MIX).schema == tables.MIX
    assert tables.read(tmp_path, ["id"], tables.MIX).column_names == ["id"]
    with pytest.raises(FileNotFoundError):
        tables.read(tmp_path)


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        (HardCase("e1", 2, 0, 1.5, -0.25, "misclassified", 0), tables.HARD_CASES),
        (verdict(), tables.VERDICTS),
    ],
)
def test_a_noun_survives_the_disk(tmp_path, row, schema):
    tables.write_part(tmp_path / tables.part_name(0), tables.to_table([row], schema))
    assert [type(row)(**r) for r in tables.read(tmp_path).to_pylist()] == [row]


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7)])
def test_png_is_lossless(shape):
    image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(tables.decode_png(tables.encode_png(image)), image)
    assert np.array_equal(
        tables.decode_images([tables.encode_png(image)] * 2), np.stack([image, image])
    )


def test_parts_come_in_the_order_of_their_numbers(tmp_path):
    numbers = [3, 99_999, 100_000, 100_001]
    for n in reversed(numbers):
        tables.write_part(tmp_path / tables.part_name(n), ROWS)
    assert tables.parts(tmp_path) == [tmp_path / tables.part_name(n) for n in numbers]
