"""A worker of map_parts as the plain object it is, and LocalEngine's one worker in this process."""

from __future__ import annotations

import os

import pyarrow as pa
import pytest
import torch

from adversa.engine.local import LocalEngine
from adversa.engine.task_queue import Task
from adversa.engine.tasks import Failed, Part, Share, TaskStats, do_part, missing
from adversa.engine.worker import Inline, Sampler, cores, pin
from adversa.engine.worker_pool import work_off
from adversa.storage import tables
from adversa.types import UserError

PARTS = [Part(i, 4) for i in range(5)]


def make_work(poison=(), fault=ValueError):
    """Work that writes which rows it was asked for; rows of `poison`, (part, row), raise."""

    def work(part, path):
        rows = [r for r in range(part.rows) if r not in part.skip]
        for row in rows:
            if (part.index, row) in poison:
                raise fault(f"cannot generate row {row}")
        faults = [part.skip.get(r) for r in range(part.rows)]
        tables.write_part(
            path,
            pa.table({"part": [part.index] * part.rows, "fault": pa.array(faults, pa.string())}),
        )
        return TaskStats(part.rows, 10 * len(rows))

    return work


def loaded(out, **kinds):
    sampler = Sampler()
    assert sampler.place() == os.uname().nodename
    sampler.load(lambda: make_work(**kinds), out, None, None)
    return sampler


def test_a_lease_comes_back_as_a_sum(tmp_path):
    found = loaded(tmp_path).do([Task(p) for p in PARTS])
    assert found.evaluations == 200 and found.failures == () and 0 < found.seconds < 10
    assert missing(PARTS, tmp_path) == [] and len(tables.parts(tmp_path)) == 5


def test_a_row_that_raises_is_left_out_and_the_rest_is_done(tmp_path):
    found = loaded(tmp_path, poison=[(1, 2)]).do([Task(p) for p in PARTS])
    (failure,) = found.failures
    assert (failure.position, failure.reason) == (1, "ValueError: cannot generate row 2")
    assert failure.committed and failure.rows == {2: "ValueError: cannot generate row 2"}
    assert "in work" in failure.trace and missing(PARTS, tmp_path) == []
    assert found.evaluations == 190
    faults = tables.read(tmp_path)["fault"].to_pylist()
    assert [i for i, fault in enumerate(faults) if fault] == [6]


def test_a_part_whose_rows_all_raise_does_not_keep_the_others_from_being_done(tmp_path):
    bad = [(1, r) for r in range(4)]
    found = loaded(tmp_path, poison=bad).do([Task(p) for p in PARTS])
    (failure,) = found.failures
    assert not failure.committed and failure.position == 1 and sorted(failure.rows) == [0, 1, 2, 3]
    assert missing(PARTS, tmp_path) == [PARTS[1]] and found.evaluations == 160


def test_what_does_not_come_again_costs_the_worker_a_second_try(tmp_path):
    raised = []

    def once(part, path):
        if not raised:
            raised.append(1)
            raise ValueError("bad luck")
        return make_work()(part, path)

    sampler = Sampler()
    sampler.load(lambda: once, tmp_path, None, None)
    (failure,) = sampler.do([Task(PARTS[0])]).failures
    assert failure.committed and failure.rows == {} and missing(PARTS[:1], tmp_path) == []


def test_the_rows_that_broke_a_step_are_worked_on_once_their_cause_is_mended(tmp_path):
    parts, bad = [Part(i, 10) for i in range(30)], [(i, 3) for i in range(5, 25)]
    broken = Inline(lambda: make_work(poison=bad), tmp_path, 1)
    with pytest.raises(RuntimeError, match="4 of 300 fail"):
        work_off(broken, parts, tmp_path, lambda s: None, lambda: 1, attempts=3)
    assert not any(tables.read(tmp_path)["fault"].to_pylist())
    assert 0 < len(tables.parts(tmp_path)) < 30
    mended = Inline(make_work, tmp_path, 1)
    assert work_off(mended, parts, tmp_path, lambda s: None, lambda: 1, attempts=3)
    assert missing(parts, tmp_path) == [] and len(tables.read(tmp_path)) == 300
    assert not any(tables.read(tmp_path)["fault"].to_pylist())


def test_one_bad_row_of_64_costs_one_call_and_no_resubmission(tmp_path):
    calls = []

    class Counted(Inline):
        def do(self, worker, tasks):
            calls.append(len(tasks))
            return super().do(worker, tasks)

    parts = [Part(0, 64), Part(1, 64)]
    backend = Counted(lambda: make_work(poison=[(1, 40)]), tmp_path, 1)
    (share,) = work_off(backend, parts, tmp_path, lambda s: None, lambda: 1, attempts=3)
    assert calls == [1, 1] and (share.parts, share.rows) == (2, 128)
    assert share.failed == (Failed("row 40 of part 1", "ValueError: cannot generate row 40"),)
    faults = tables.read(tmp_path)["fault"].to_pylist()
    assert [i for i, fault in enumerate(faults) if fault] == [104]


def test_a_trial_leaves_nothing_behind(tmp_path):
    out = tmp_path / "out"
    found = loaded(out).do([Task(PARTS[0], trial=True)])
    assert found.failures == () and found.evaluations == 40 and not out.exists()


def test_what_the_user_can_mend_ends_the_lease(tmp_path):
    with pytest.raises(UserError, match="cannot generate row 2"):
        loaded(tmp_path, poison=[(1, 2)], fault=UserError).do([Task(p) for p in PARTS])
    assert missing(PARTS, tmp_path) == PARTS[1:]


def test_a_worker_whose_device_is_broken_is_of_no_use_any_more(tmp_path, monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(ValueError, match="cannot generate row 2"):
        loaded(tmp_path, poison=[(1, 2)]).do([Task(p) for p in PARTS])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert len(loaded(tmp_path, poison=[(1, 2)]).do([Task(p) for p in PARTS]).failures) == 1


def test_work_may_return_rows_alone(tmp_path):
    done = do_part(lambda part, path: 4, PARTS[2], tmp_path)
    assert (done.index, done.rows, done.evaluations) == (2, 4, 0)


def test_missing_parts_of_a_folder_that_is_not_there(tmp_path):
    assert missing(PARTS, tmp_path / "nothing") == PARTS


@pytest.mark.parametrize(
    ("usable", "place", "threads", "own"),
    [
        ([0, 1, 2, 3], 0, 1, {0}),
        ([0, 1, 2, 3], 1, 2, {2, 3}),
        ([0, 1, 2, 3], 5, 1, {1}),
        ([0, 1, 2], 1, 2, {2, 0}),
        ([4, 6], 1, 1, {6}),
        ([4, 6], 0, 8, {4, 6}),
    ],
)
def test_cores_of_its_own(usable, place, threads, own):
    assert cores(usable, place, threads) == own


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform does not pin")
def test_pinning_takes_hold():
    before = os.sched_getaffinity(0)
    try:
        pin(1, 1)
        assert len(os.sched_getaffinity(0)) == 1 and os.sched_getaffinity(0) <= before
    finally:
        os.sched_setaffinity(0, before)


# ---- LocalEngine ---------------------------------------------------------------------------------


def test_the_local_engine_does_every_part_and_puts_the_threads_back(tmp_path):
    before, states, threads = torch.get_num_threads(), [], []

    def make():
        threads.append(torch.get_num_threads())
        return make_work()

    (share,) = LocalEngine(sampler_threads=before + 1).map_parts(
        make, PARTS, tmp_path, states.append
    )
    assert (share.parts, share.rows, share.evaluations, share.failed) == (
        5,
        20,
        200,
        (),
    ) and isinstance(share, Share)
    assert threads == [before + 1] and torch.get_num_threads() == before
    assert states[0]["done"] == 0 and states[-1]["done"] == states[-1]["total"] == 20
    assert states[-1]["evaluations"] == 200 and states[-1]["shares"] == {0: 20}


def test_it_leaves_alone_what_is_there_and_makes_nothing_for_nothing(tmp_path):
    for part in PARTS:
        do_part(make_work(), part, tmp_path)
    assert LocalEngine().map_parts(None, PARTS, tmp_path, lambda s: None) == []


def test_it_finds_the_poisonous_row_too(tmp_path):
    parts = [Part(i, 4, {"ids": [f"id-{i}-{r}" for r in range(4)]}) for i in range(5)]
    shares = LocalEngine().map_parts(
        lambda: make_work(poison=[(3, 1)]),
        parts,
        tmp_path,
        lambda s: None,
        name=lambda part, row: part.payload["ids"][row],
    )
    assert shares[0].failed == (Failed("id-3-1", "ValueError: cannot generate row 1"),)
    faults = tables.read(tmp_path)["fault"].to_pylist()
    assert [i for i, fault in enumerate(faults) if fault] == [13] and faults[
        13
    ] == "ValueError: cannot generate row 1"


def test_a_model_that_cannot_generate_at_all_says_so_with_the_trace(tmp_path):
    every = [(i, r) for i in range(5) for r in range(4)]
    with pytest.raises(
        RuntimeError,
        match="^parts 0, 1, 2 failed, nothing else succeeded .*ValueError: cannot generate row 0",
    ) as e:
        LocalEngine().map_parts(lambda: make_work(poison=every), PARTS, tmp_path, lambda s: None)
    assert "in work" in e.value.__notes__[0] and missing(PARTS, tmp_path) == PARTS


def test_what_stops_the_work_from_being_made_comes_as_it_is(tmp_path):
    with pytest.raises(ZeroDivisionError):
        LocalEngine().map_parts(lambda: 1 // 0, PARTS, tmp_path, lambda s: None)
