"""The training worker's parts, without Ray: streams that start early, select roles that are kept,
what ends a run at once.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest

from adversa.distributed.errors import NoRetry, user_error
from adversa.distributed.worker import BatchCache, Loop, Prefetcher, fed
from adversa.engine.batches import Feed
from adversa.engine.interface import FitJob
from adversa.run.step_folder import Recipe, begin, finish
from adversa.types import UserError


def steps_of(*steps):
    return [{"id": ["a"], "step": s} for s in steps]


def test_a_stream_is_started_ahead_and_given_whole():
    came, went = threading.Event(), threading.Event()

    def stream():
        came.set()
        yield from steps_of(0, 1, 2)

    ahead = Prefetcher(stream, went.set)
    ahead.start()
    assert came.wait(5) and went.wait(5)  # nobody has asked for a batch
    assert [b["step"] for b in ahead] == [0, 1, 2] and ahead.arrived > 0


def test_a_stream_that_nobody_started_starts_when_it_is_read_and_may_be_empty():
    assert list(Prefetcher(lambda: iter(()), lambda: None)) == []
    assert [b["step"] for b in Prefetcher(lambda: iter(steps_of(4)), lambda: None)] == [4]


def test_a_fault_of_the_stream_comes_out_where_it_is_read():
    def broken():
        raise UserError("picture 7 is truncated; replace it")
        yield

    ahead = Prefetcher(broken, lambda: None)
    ahead.start()
    with pytest.raises(UserError, match="picture 7"):
        next(iter(ahead))


def test_a_stream_left_in_the_middle_is_ended():
    ended = []

    def stream():
        try:
            yield from steps_of(0, 1, 2)
        finally:
            ended.append(True)

    ahead = Prefetcher(stream, lambda: None)
    assert next(iter(ahead))["step"] == 0 and not ended
    ahead.close()
    assert ended


@pytest.mark.parametrize(("limit", "times"), [(10_000, 1), (100, 3)])
def test_a_select_role_that_fits_is_read_once(limit, times):
    read = []

    def stream():
        read.append(True)
        for i in range(3):
            yield {"image": np.full((64,), i, np.uint8), "size": 64}

    held = BatchCache(stream, limit)
    held.start()
    for _ in range(2):
        assert [int(b["image"][0]) for b in held()] == [0, 1, 2]
    assert len(read) == times  # too large: once to find out, then each time


def test_a_fault_of_a_select_role_comes_out_where_it_is_read():
    def broken():
        raise UserError("no image with the id x")

    held = BatchCache(broken)
    held.start()
    with pytest.raises(UserError, match="id x"):
        list(held())


def test_earlier_steps_are_passed_over_and_the_next_stream_starts_before_the_last():
    called = []
    got = [
        (b["step"], len(called))
        for b in fed(steps_of(3, 4, 5, 6), 7, 5, lambda: called.append(True))
    ]
    assert got == [(5, 0), (6, 1)]


@pytest.mark.parametrize("steps", [(6, 7), (5, 7), (5, 5)])
def test_a_stream_that_is_not_where_the_training_is_stops_the_run(steps):
    with pytest.raises(AssertionError, match="the training is at step"):
        list(fed(steps_of(*steps), 9, 5, lambda: None))


def test_workers_that_replace_ones_that_had_finished_everything_go_home(tmp_path, monkeypatch):
    recipe = Recipe("classifier", 1, {}, {})
    job = FitJob(
        tmp_path / "model",
        recipe,
        fit=None,
        resume=None,
        feed=Feed((tmp_path,), batch_size=4, mix=tmp_path, steps=3),
    )
    job.out.mkdir()
    begin(job.out, recipe)
    finish(job.out, recipe, rows=12)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: None)
    assert set(Loop([job], None, tmp_path)()) == {"began"}


def test_what_would_fail_again_is_not_tried_again():
    callback = NoRetry()
    with pytest.raises(UserError, match="^lower classifier.lr$"):
        callback.after_exception(
            None, {0: RuntimeError("connection closed"), 1: UserError("lower classifier.lr")}
        )
    with pytest.raises(AssertionError):
        callback.after_exception(None, {0: AssertionError("saw 3 images")})
    callback.after_exception(
        None, {0: RuntimeError("connection closed by peer")}
    )  # a neighbour died


def test_a_user_error_is_found_in_what_ray_train_wraps_around_it():
    from ray.train import ControllerError, WorkerGroupError

    found = UserError("take less")
    assert str(user_error(ControllerError(found))) == "take less"
    assert str(user_error(WorkerGroupError("failed", {0: RuntimeError(), 1: found}))) == "take less"
    assert user_error(WorkerGroupError("failed", {0: RuntimeError()})) is None
