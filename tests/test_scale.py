"""What would grow faster than the images, or hold all of them at once, counted; benchmarks/scale.py
measures it in seconds.
"""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pytest

from adversa import config as cfg
from adversa.curate import filter
from adversa.curate.filter import Verdict
from adversa.engine.task_queue import TaskQueue
from adversa.engine.tasks import Part
from adversa.pipeline import curate, finalize, generate, planning
from adversa.pipeline.pictures import Pictures
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE
from adversa.run.folder import RunDir
from adversa.storage import files, tables
from adversa.storage.path import storage_path
from adversa.types import HardCase


@pytest.fixture
def calls(monkeypatch):
    """How often functions were called: calls(module, name) begins to count, and gives the arguments
    of each call so far.
    """

    def count(module, name):
        seen, real = [], getattr(module, name)

        def counted(*args, **kwargs):
            seen.append(args)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
        return seen

    return count


def finished(folder):
    step_folder.begin(folder, step_folder.Recipe("given", 1, {}, {}))
    files.write_json(folder / step_folder.MANIFEST, {"fingerprint": folder.name, "files": {}})


def hard(folder, cases):
    rows = [
        HardCase(f"case {i}", i % 2, 1 - i % 2, 1.0, -0.5, "misclassified", i) for i in range(cases)
    ]
    tables.write_part(folder / tables.part_name(0), tables.to_table(rows, tables.HARD_CASES))
    finished(folder)


def test_a_plan_holds_one_part_at_a_time(tmp_path, calls, monkeypatch):
    hard(tmp_path / "hard", 40)
    asked, write, held = calls(planning, "request"), tables.write_part, []

    def written(path, table):
        held.append(len(asked) - sum(map(len, before)))
        before.append(table)
        write(path, table)

    before = []
    monkeypatch.setattr(tables, "write_part", written)
    by = tmp_path / "hard", 0
    planning.plan(
        tmp_path / "hard",
        None,
        "run",
        1,
        ("unguided", "guided"),
        cfg.Generate(per_case=5, part_size=64),
        tmp_path / "r",
        by,
    )
    assert len(asked) == 400 and held == [64, 64, 64, 8] * 2


class EmptyRows:
    """In place of an engine: the images of a part are empty rows."""

    handle = NULL_HANDLE

    def map_parts(self, make, parts, out, report, name):
        for part in parts:
            ids = tables.read_part(generate.storage_path(part.payload["path"]), ["request_id"])[
                "request_id"
            ].to_pylist()
            rows = [{"request_id": i, "finite": True, "evaluations": 1, "skipped": 0} for i in ids]
            tables.write_part(
                out / tables.part_name(part.index),
                pa.Table.from_pylist(rows, schema=tables.SYNTHETIC),
            )
        return []

    def samplers(self):
        return 1


def test_twice_the_images_are_twice_the_looks_at_parts_and_no_more_listings(tmp_path, calls):
    finished(tmp_path / "denoiser")
    reads, counts, listings = (
        calls(tables, "read_part"),
        calls(tables, "count"),
        calls(tables, "parts"),
    )
    found = []
    for cases in (40, 80, 160):
        run = RunDir(tmp_path / str(cases))
        hard(run.round(1, "hard"), cases)
        config = cfg.Generate(per_case=4, part_size=16)
        planning.plan(
            run.round(1, "hard"),
            None,
            "run",
            1,
            ("unguided", "guided"),
            config,
            run.round(1, "requests"),
            (run.round(1, "hard"), 0),
        )
        before = [len(x) for x in (reads, counts, listings)]
        generate.generate(
            EmptyRows(),
            run.round(1, "requests"),
            None,
            tmp_path / "denoiser",
            None,
            config,
            run.round(1, "synthetic"),
        )
        found.append([len(x) - n for x, n in zip((reads, counts, listings), before, strict=True)])
    parts = [20, 40, 80]
    # The sampler's own, and the sums of the manifest.
    assert [f[0] for f in found] == [2 * n for n in parts]
    # The step's own, and the rows that its manifest lists.
    assert [f[1] for f in found] == [2 * n for n in parts]
    assert len({f[2] for f in found}) == 1


class Ids(list):
    """Counts how often it is gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_the_search_for_near_duplicates_goes_through_its_ids_once_and_holds_one_block(
    tmp_path, calls
):
    picture = tables.encode_png(np.zeros((8, 8, 3), np.uint8))
    for part in range(12):
        rows = [{"request_id": f"{part:02d}-{i}", "image": picture} for i in range(4)]
        tables.write_part(
            tmp_path / tables.part_name(part), pa.Table.from_pylist(rows, schema=tables.SYNTHETIC)
        )
    decoded = calls(tables, "decode_images")
    wanted = Ids(f"{part:02d}-{i}" for part in range(12) for i in (0, 2) if part != 5)
    names, blocks = finalize.pictures_of(tmp_path, wanted)
    assert len(decoded) == 0 and names == list.copy(wanted)
    assert len(next(blocks)) == 2 and len(decoded) == 1
    assert sum(len(block) for block in blocks) == 20 and len(decoded) == 11 and wanted.passes == 1


def test_a_row_that_is_given_up_is_named_once(tmp_path):
    """Its name is in its part, which is read for it."""
    named = []

    def name(part, row):
        named.append((part.index, row))
        return f"{part.index}/{row}"

    bad = {(part, row) for part in range(0, 100, 10) for row in (0, 1, 2, 5)}
    queue = TaskQueue([Part(i, 8) for i in range(100)], 8_000, 2, name)
    while queue.left:
        for order in queue.take(0, 1, True):
            rows = {(order.part.index, r) for r in range(8) if r not in order.part.skip}
            if rows & bad:
                queue.failed(order, 0, "ValueError")
            else:
                queue.succeeded(order)
    assert sorted(named) == sorted(bad) and len(queue.given_up) == len(bad)


def test_masks_are_read_once_and_not_for_every_part(tmp_path, calls):
    picture = tables.encode_png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    mask = np.zeros((32, 32), np.uint8)
    mask[10:20, 10:20] = 255
    for part in range(3):
        rows = [
            {"id": f"{part}-{i}", "image": picture, "mask": tables.encode_png(mask)}
            for i in range(4)
        ]
        tables.write_part(
            tmp_path / tables.part_name(part), pa.Table.from_pylist(rows, schema=tables.EXAMPLES)
        )
    pictures, reads = Pictures(tmp_path), calls(tables, "read_part")
    for part in range(3):
        inside, _ = pictures.masks([f"{part}-{i}" for i in range(4)], 0.0, 0.0)
        assert all(found[15, 15] == 1 and found[0, 0] == 0 for found in inside.values())
    assert len(reads) == 3


def test_on_an_object_store_many_parts_are_looked_into_at_the_same_time():
    """Each look waits here until eight have begun."""
    together, folder = threading.Barrier(8, timeout=30), storage_path("s3://bucket/run")
    paths = [folder / tables.part_name(i) for i in range(16)]
    assert tables.each(lambda p: together.wait() >= 0 and p.name, paths) == [p.name for p in paths]


def test_parts_are_in_the_order_of_their_numbers_beyond_100_000(tmp_path):
    """The part of the images has the number of the part of the requests."""
    for index in (99_999, 100_000, 9, 1_000_000, 10_000):
        (tmp_path / tables.part_name(index)).touch()
    assert [p.name for p in tables.parts(tmp_path)] == [
        tables.part_name(i) for i in (9, 10_000, 99_999, 100_000, 1_000_000)
    ]


@pytest.mark.parametrize("rows", [1, 5, 7, 12, 100])
def test_verdicts_are_settled_alike_in_parts_of_any_size(tmp_path, monkeypatch, rows):
    """All that the first pass wrote is still there; a part has at least so many rows, but for the
    last.
    """
    reasons = [filter.PENDING, "flat", filter.PENDING]
    told = [
        Verdict(
            f"{i:02d}",
            "guided",
            i % 3,
            "img2img",
            f"case {i % 4}",
            False,
            reasons[i % 3],
            contrast=float(i),
            similarity=0.1,
        )
        for i in range(12)
    ]
    inspected, twins, limits = tmp_path / "inspected", tmp_path / "twins", tmp_path / "limits"
    for index in range(4):
        tables.write_part(
            inspected / tables.part_name(index),
            tables.to_table(told[3 * index : 3 * index + 3], tables.VERDICTS),
        )
    pairs = [{"a": v.request_id} for v in told] + [{"a": "00", "b": "03", "similarity": 0.95}]
    tables.write_part(twins / tables.part_name(0), pa.Table.from_pylist(pairs, schema=tables.TWINS))
    files.write_json(
        limits / curate.THRESHOLDS,
        {"near_copy": 0.9, "near_copy_features": 0.9, "most_agreement": 1.0, "held_out": [0.1]}
        | dict.fromkeys(("realism", "realism_2"), [1.0] * 3),
    )
    for folder in (inspected, twins, limits):
        finished(folder)
    monkeypatch.setattr(finalize, "VERDICT_ROWS", rows)
    config = cfg.Curate(quota=2)
    finalize.finalize(inspected, twins, limits, config, tmp_path / "verdicts")
    expected = filter.finalize(
        told,
        [v.request_id for v in told],
        [("00", "03", 0.95)],
        curate.thresholds_of(limits, config),
    )
    found = tables.read(tmp_path / "verdicts").to_pylist()
    assert repr(found) == repr(
        tables.to_table(expected, tables.VERDICTS).to_pylist()
    )  # NaN is not equal to itself
    assert [v["reason"] for v in found[:4]] == ["kept", "flat", "kept", "near twin"]
    sizes = [tables.count(p) for p in tables.parts(tmp_path / "verdicts")]
    assert (
        sum(sizes) == 12
        and all(n >= rows for n in sizes[:-1])
        and len(sizes) == -(-12 // (3 * -(-rows // 3)))
    )
