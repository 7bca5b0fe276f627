"""What every engine does with a training: count what it saw, mark it complete, and only then let go
of its checkpoint.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch

from adversa.engine.batches import Feed
from adversa.engine.fit import Waited, do_job, unfinished
from adversa.engine.interface import FitJob
from adversa.engine.local import LocalEngine
from adversa.run import environment, step_folder
from adversa.run.control import NULL_HANDLE
from adversa.storage import files, tables
from adversa.storage.weights import CHECKPOINT, load_checkpoint, save_checkpoint, save_model
from adversa.types import Example


class FakeFeed:
    """Five batches of four."""

    steps, batch_size = 5, 4

    def count(self):
        return self.steps

    def batches(self, start=0):
        for step in range(start, self.steps):
            yield {"id": [f"{step}/{i}" for i in range(self.batch_size)]}


def job_of(out, takes=5, at=3):
    """A training that takes so many batches and commits its state after `at` of them."""

    def resume(out):
        state = load_checkpoint(out)
        return 0 if state is None else state["step"]

    def fit(batches, *, out, report, threads, committed):
        step = resume(out)
        for _ in itertools.islice(batches, takes - step):
            step += 1
            if step == at:
                save_checkpoint(out, {"step": step})
                committed(step)
        save_model(out, {"w": torch.zeros(1)}, {"threads": threads})
        return {"steps": step}

    return FitJob(out, step_folder.Recipe("fake", 1, {}, {}), fit, resume, FakeFeed())


def test_a_folder_that_was_made_anew_is_read_anew(tmp_path):
    """Two runs in one process, as in a notebook: the second's folder has the first's name."""
    feed = Feed((tmp_path / "train",), 4, tmp_path / "mix", steps=2)
    seen = []

    def fit(stream, *, out, report, threads, committed):
        seen.append(np.unique(np.concatenate([b["image"] for b in stream])).tolist())
        save_model(out, {"w": torch.zeros(1)}, {})
        return {"steps": 2}

    for n in (10, 20):
        image = tables.encode_png(np.full((4, 4, 3), n, np.uint8))
        rows = [Example(f"r{i}", "s", 0, "g", "", {}, image) for i in range(8)]
        drawn = [{"id": r.id, "kind": "real", "label": 0, "weight": 1.0} for r in rows]
        tables.write_part(
            tmp_path / "train" / tables.part_name(0), tables.to_table(rows, tables.EXAMPLES)
        )
        tables.write_part(
            tmp_path / "mix" / tables.part_name(0),
            pa.Table.from_pylist(drawn, schema=tables.MIX),
        )
        recipe = step_folder.Recipe("fake", 1, {}, {})
        LocalEngine(1, 1).fit([FitJob(tmp_path / f"out-{n}", recipe, fit, lambda _: 0, feed)])
    assert seen == [[10], [20]]


class Cut(BaseException):
    pass


def test_a_training_takes_the_cpus_that_it_may_use(tmp_path, monkeypatch):
    """Two spinning threads on one core are many times slower than one."""
    monkeypatch.setattr(environment, "cpus", lambda: 3)
    job = job_of(tmp_path)
    unfinished([job], NULL_HANDLE)
    do_job(job, job.feed.batches(), None, None)
    assert step_folder.manifest(tmp_path)["threads"] == 3


def test_a_training_that_saw_all_its_images_is_marked_with_what_it_cost(tmp_path):
    job = job_of(tmp_path)
    assert unfinished([job], NULL_HANDLE) == [job]
    do_job(job, job.feed.batches(), None, 3)
    found = step_folder.manifest(tmp_path)
    assert (found["rows"], found["threads"], found["workers"], found["metrics"]) == (
        20,
        3,
        1,
        {"steps": 5},
    )
    assert found["compute_seconds"] == pytest.approx(found["seconds"] - found["data_wait_seconds"])


def test_how_many_workers_a_training_has_is_seen_while_it_goes_on(tmp_path):
    def fit(batches, *, report, **given):
        report({"done": 1, "total": 5})
        assert (
            files.read_json(tmp_path / step_folder.PROGRESS)["workers"],
            files.read_json(tmp_path / step_folder.PROGRESS)["done"],
        ) == (1, 1)
        return plain.fit(batches, report=report, **given)

    plain = job_of(tmp_path)
    unfinished([plain], NULL_HANDLE)
    do_job(dataclasses.replace(plain, fit=fit), plain.feed.batches(), None, 1)
    assert step_folder.is_finished(tmp_path)


def test_one_that_ends_early_says_so(tmp_path):
    job = job_of(tmp_path, takes=4)
    unfinished([job], NULL_HANDLE)
    told = []
    do_job(job, job.feed.batches(), None, 1, told.append)
    assert step_folder.manifest(tmp_path)["rows"] == 16 and told == [3]


def test_one_that_saw_other_images_than_its_steps_hold_is_refused(tmp_path):
    job = job_of(tmp_path)
    unfinished([job], NULL_HANDLE)
    with pytest.raises(AssertionError, match="saw 5 images in 5 steps"):
        do_job(job, [{"id": ["a"]}] * 5, None, 1)
    assert not step_folder.is_finished(tmp_path)


def test_rows_are_those_of_all_workers(tmp_path):
    job = job_of(tmp_path)
    unfinished([job], NULL_HANDLE)
    do_job(job, [{"id": ["a", "b"], "size": 4}] * 5, None, 1)
    assert step_folder.manifest(tmp_path)["rows"] == 20


def test_images_of_an_attempt_that_was_cut_off_count(tmp_path):
    job = job_of(tmp_path)
    unfinished([job], NULL_HANDLE)
    save_checkpoint(tmp_path, {"step": 3})
    do_job(job, job.feed.batches(3), None, 1)
    assert step_folder.manifest(tmp_path)["rows"] == 20


def test_the_checkpoint_stays_until_the_manifest_is_there(tmp_path, monkeypatch):
    job = job_of(tmp_path)
    unfinished([job], NULL_HANDLE)
    finish, seen = step_folder.finish, []

    def cut_after(*a, **k):
        finish(*a, **k)
        raise Cut

    def cut_before(*a, **k):
        seen.append((tmp_path / CHECKPOINT).exists())
        raise Cut

    monkeypatch.setattr(step_folder, "finish", cut_before)
    with pytest.raises(Cut):
        do_job(job, job.feed.batches(), None, 1)
    assert (
        seen == [True]
        and (tmp_path / CHECKPOINT).exists()
        and unfinished([job], NULL_HANDLE) == [job]
    )
    assert job.resume(job.out) == 3  # two steps are done again, not five

    monkeypatch.setattr(step_folder, "finish", cut_after)
    with pytest.raises(Cut):
        do_job(job, job.feed.batches(3), None, 1)
    assert step_folder.is_finished(tmp_path) and (tmp_path / CHECKPOINT).exists()
    assert unfinished([job], NULL_HANDLE) == []  # and takes what was left over
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_finished_training_keeps_no_checkpoint_and_is_not_done_again(tmp_path):
    job = job_of(tmp_path)
    LocalEngine(1, 1).fit([job])
    assert not (tmp_path / CHECKPOINT).exists()
    before = (tmp_path / step_folder.MANIFEST).stat().st_mtime_ns
    LocalEngine(1, 1).fit([job])
    assert (tmp_path / step_folder.MANIFEST).stat().st_mtime_ns == before


def test_waiting_is_counted_apart_from_what_the_reader_does(monkeypatch):
    from adversa.engine import fit

    now = [0.0]
    monkeypatch.setattr(fit.time, "perf_counter", lambda: now[0])

    def slow():
        for i in range(3):
            now[0] += 2
            yield {"id": ["a"] * (i + 1)}

    waited = Waited(slow())
    for _ in waited:
        now[0] += 10
    assert (waited.seconds, waited.images, now[0]) == (6, 6, 36)
