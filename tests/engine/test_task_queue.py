"""The bookkeeping of parts that fail: tries, the search for the rows to blame, and when a step is
called broken.
"""

from __future__ import annotations

import dataclasses

import pytest

from adversa.engine.task_queue import FailedTask, Task, TaskQueue
from adversa.engine.tasks import Failed, Part, row_name


def queue_of(rows, attempts=3, total=None):
    parts = [Part(i, n) for i, n in enumerate(rows)]
    return TaskQueue(parts, total if total is not None else sum(rows), attempts, row_name)


def work(queue, fails, worker=0, alone=True):
    """Do everything with one worker; fails: (part, rows that are tried) -> reason or None. The
    tasks, in turn.
    """
    tasks = []
    while queue.left:
        for task in queue.take(worker, 1, alone):
            tasks.append(task)
            rows = [r for r in range(task.part.rows) if r not in task.part.skip]
            reason = fails(task.part.index, rows)
            if reason is None:
                queue.succeeded(task)
            else:
                queue.failed(task, worker, reason)
    return tasks


def poison(*bad):
    return lambda part, rows: next((f"ValueError: {r}" for r in rows if (part, r) in bad), None)


def test_parts_that_do_not_fail_are_handed_out_once_in_order():
    tasks = work(queue_of([2, 2, 2]), poison())
    assert tasks == [Task(Part(i, 2)) for i in range(3)]


def test_several_parts_are_handed_out_together():
    queue = queue_of([1] * 5)
    assert [len(queue.take(0, 3, False)) for _ in range(3)] == [3, 2, 0]


def test_the_row_to_blame_is_found_and_the_part_is_committed_without_it():
    queue = queue_of([16] * 20)
    tasks = work(queue, poison((7, 5)))
    assert queue.given_up == [Failed("row 5 of part 7", "ValueError: 5")]
    of_part = [o for o in tasks if o.part.index == 7]
    assert [o.trial for o in of_part[:3]] == [False] * 3 and not of_part[-1].trial
    assert of_part[-1].part.skip == {5: "ValueError: 5"} and sum(not o.trial for o in of_part) == 4
    tried = [[r for r in range(16) if r not in o.part.skip] for o in of_part if o.trial]
    assert tried == [
        [*range(8)],
        [*range(4)],
        [4, 5, 6, 7],
        [4, 5],
        [4],
        [5],
        [5],
        [6, 7],
        [*range(8, 16)],
    ]
    assert sorted(o.part.index for o in tasks if not o.trial and o.part.index != 7) == [
        i for i in range(20) if i != 7
    ]


def test_several_rows_of_several_parts_are_found():
    queue = queue_of([8] * 100)
    work(queue, poison((3, 0), (3, 7), (3, 4), (50, 2)))
    assert sorted(f.name for f in queue.given_up) == [
        "row 0 of part 3",
        "row 2 of part 50",
        "row 4 of part 3",
        "row 7 of part 3",
    ]


def test_a_part_of_one_row_is_not_searched():
    queue = queue_of([1] * 10)
    tasks = [o for o in work(queue, poison((4, 0))) if o.part.index == 4]
    assert [(o.trial, o.part.skip) for o in tasks] == [(False, {})] * 3 + [
        (False, {0: "ValueError: 0"})
    ]


def test_a_failure_that_does_not_come_again_costs_one_try():
    failures = iter(["its worker died", None])
    queue = queue_of([4])
    assert len(work(queue, lambda part, rows: next(failures))) == 2 and queue.given_up == []


def test_one_coincidence_in_the_search_blames_nobody():
    """All three tries and one of a row alone are bad luck."""
    bad_luck = iter(
        [None] + ["died"] * 3 + ["died", "died"]
    )  # the part, then its first half, then its first row
    queue = queue_of([4, 4])
    work(queue, lambda part, rows: next(bad_luck, None))
    assert queue.given_up == []


def test_what_fails_with_one_worker_goes_to_another():
    queue = queue_of([4, 4])
    (task,) = queue.take(0, 1, False)
    queue.failed(task, 0, "broken GPU")
    assert queue.take(0, 1, False) == (Task(Part(1, 4)),)
    assert queue.take(0, 1, False) == ()
    assert queue.take(1, 1, False) == (Task(Part(0, 4)),)


def test_and_to_the_same_where_there_is_no_other():
    queue = queue_of([4])
    queue.failed(queue.take(0, 1, True)[0], 0, "x")
    assert queue.take(0, 1, False) == () and queue.take(0, 1, True) == (Task(Part(0, 4)),)


def test_orders_given_back_come_first_and_count_no_try():
    queue = queue_of([4] * 4)
    taken = queue.take(0, 3, False)
    queue.give_back(taken[1:])
    assert queue.take(0, 9, False) == tuple(Task(Part(i, 4)) for i in (1, 2, 3)) and not queue.cases


def test_where_nothing_succeeds_the_third_part_out_of_tries_ends_the_step():
    with pytest.raises(
        RuntimeError,
        match="^parts 0, 1, 2 failed, nothing else succeeded .tries of each: 2.; the last time: "
        "no CUDA$",
    ):
        queue = queue_of([64] * 1000, attempts=2)
        tasks = work(queue, lambda part, rows: "no CUDA")
    assert queue.left == 1000 and "tasks" not in locals()


def test_a_part_out_of_tries_waits_for_the_first_success():
    queue = queue_of([4] * 4, attempts=1)
    queue.failed(queue.take(0, 1, True)[0], 0, "x")
    (other,) = queue.take(0, 1, True)
    assert other.part.index == 1
    queue.succeeded(other)
    (task,) = queue.take(0, 1, True)
    assert task.trial and task.part.index == 0


def test_the_only_part_left_is_searched_though_nothing_has_succeeded():
    queue = queue_of([8], attempts=1, total=800)
    work(queue, poison((0, 3)))
    assert [f.name for f in queue.given_up] == ["row 3 of part 0"]


def test_a_part_whose_rows_all_fail_ends_the_step():
    with pytest.raises(
        RuntimeError,
        match=r"every row of part 2 fails \(row 0 of part 2, row 1 of part 2\); the last time: "
        r"ValueError: 1",
    ):
        work(queue_of([2] * 1000), poison((2, 0), (2, 1)))


def test_more_than_one_in_a_hundred_ends_the_step():
    bad = [(i, 0) for i in range(0, 9, 3)]
    queue = queue_of([10] * 30)  # 3 of 300 may fail
    work(queue, poison(*bad))
    assert len(queue.given_up) == 3
    with pytest.raises(
        RuntimeError,
        match=r"^4 of 300 fail \(row 0 of part 0, .*row 0 of part 9\), more than the 3 that may; "
        r"the last",
    ):
        work(queue_of([10] * 30), poison(*bad, (9, 0)))


def test_one_row_may_always_fail_but_not_the_only_one():
    queue = queue_of([2, 2])
    work(queue, poison((1, 1)))
    assert len(queue.given_up) == 1
    with pytest.raises(RuntimeError, match="^1 of 1 fail"):
        work(queue_of([1]), poison((0, 0)))


def test_rows_that_raised_are_given_up_with_their_part_and_count_towards_the_limit():
    queue = queue_of([10] * 30)  # 3 of 300 may fail
    for i, task in enumerate(queue.take(0, 30, True)[:4]):
        if i < 3:
            failed = queue.succeeded(task, {4: "ValueError: x"}, "Traceback")
            assert failed == (Failed(f"row 4 of part {i}", "ValueError: x"),)
        else:
            with pytest.raises(RuntimeError, match=r"^4 of 300 fail .*; the last time: x") as e:
                queue.succeeded(task, {4: "x"}, "Traceback")
            assert e.value.__notes__ == ["on the worker:\nTraceback"]


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ({0: "x", 1: "x"}, r"every row of part 1 fails \(row 0 of part 1, row 1 of part 1\)"),
        ({}, "part 1 fails though each of its rows does not"),
    ],
)
def test_a_part_that_raises_without_a_row_to_leave_out_is_not_searched(raised, said):
    queue = queue_of([2] * 100)
    first, second = queue.take(0, 2, True)
    queue.succeeded(first)
    for _ in range(2):
        queue.failed(second, 0, "out of memory", raised=raised)
        (second,) = queue.take(0, 1, True)
        assert not second.trial
    with pytest.raises(RuntimeError, match=f"^{said}; the last time: out of memory"):
        queue.failed(second, 0, "out of memory", raised=raised)


def test_a_part_that_fails_only_as_a_whole_is_given_up_in_the_end():
    with pytest.raises(
        RuntimeError,
        match="^part 1 fails though each of its rows does not; the last time: out of memory",
    ):
        work(
            queue_of([8, 8]),
            lambda part, rows: "out of memory" if part == 1 and len(rows) == 8 else None,
        )


def test_work_that_does_not_heed_skip_is_found_out():
    """It fails on its third row, whichever are skipped: then all rows seem to be bad."""
    with pytest.raises(RuntimeError, match="every row of part 1 fails"):
        work(queue_of([4] * 200), lambda part, rows: "x" if part == 1 else None)


def test_the_trace_of_the_worker_is_a_note_of_the_error():
    queue = queue_of([1], attempts=1)
    with pytest.raises(RuntimeError) as e:
        queue.failed(queue.take(0, 1, True)[0], 0, "ValueError: x", "Traceback ... generate.py")
        queue.take(0, 1, True)
    assert e.value.__notes__ == ["on the worker:\nTraceback ... generate.py"]


def test_a_trial_names_the_rows_it_leaves_out():
    case = FailedTask(Part(3, 4, {"path": "x"}))
    case.search()
    assert case.task == Task(dataclasses.replace(case.part, skip={2: "", 3: ""}), trial=True)
