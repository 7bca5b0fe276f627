"""Trials and what they wait for, on the local engine."""

from __future__ import annotations

from functools import partial

import pytest

from adversa.engine.interface import Trial
from adversa.engine.local import LocalEngine
from adversa.engine.step import run_step
from adversa.engine.trials import TrialQueue
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE
from adversa.types import UserError


def fill(out, order, fails, engine, tell):
    order.append(out.name)
    if fails:
        raise UserError(f"{out.name} cannot be")
    run_step(out, step_folder.Recipe("test", 1, {}, {}), lambda progress: {"rows": 1}, NULL_HANDLE)


def trial(root, order, name, *needs, fails=False):
    return Trial(
        name, root / name, partial(fill, root / name, order, fails), tuple(root / n for n in needs)
    )


def test_a_trial_waits_for_what_it_needs_and_is_done_once(tmp_path):
    order, told = [], []
    trials = [
        trial(tmp_path, order, "c", "b"),
        trial(tmp_path, order, "a"),
        trial(tmp_path, order, "b", "a"),
    ]
    LocalEngine().search(trials, told.append)
    assert order == ["a", "b", "c"]
    assert told[0] == {"done": 0, "total": 3, "unit": "trial", "running": ["a"], "failed": 0}
    assert told[-1] == {"done": 3, "total": 3, "unit": "trial", "running": [], "failed": 0}
    LocalEngine().search(trials, told.append)
    assert order == ["a", "b", "c"]


def test_one_that_fails_stops_only_what_waits_for_it_and_is_told_at_the_end(tmp_path):
    order = []
    names = [("a", (), True), ("b", ("a",), False), ("c", (), False)]
    trials = [trial(tmp_path, order, n, *needs, fails=fails) for n, needs, fails in names]
    with pytest.raises(UserError) as told:
        LocalEngine().search(trials, lambda _: None)
    assert order == ["a", "c"]
    assert str(told.value) == (
        "1 of 3 trials failed; 1 more wait for what these were to make; the first, a: a "
        "cannot be; what the others made is kept, "
        "and the same command tries again"
    )
    fixed = [trial(tmp_path, order, n, *needs) for n, needs, _ in names]
    LocalEngine().search(fixed, lambda _: None)
    assert order == ["a", "c", "a", "b"]


def test_a_fault_of_ours_is_not_hidden(tmp_path):
    def fault(engine, tell):
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        LocalEngine().search([Trial("a", tmp_path / "a", fault)], lambda _: None)


def test_what_nobody_makes_and_two_of_a_name_are_faults_of_ours(tmp_path):
    with pytest.raises(AssertionError, match="which no trial makes"):
        TrialQueue([trial(tmp_path, [], "a", "elsewhere")])
    with pytest.raises(AssertionError, match="two trials of one name"):
        TrialQueue([trial(tmp_path, [], "a"), trial(tmp_path, [], "a")])


def test_a_board_gives_each_trial_away_once(tmp_path):
    queue = TrialQueue(
        [trial(tmp_path, [], "a"), trial(tmp_path, [], "b", "a"), trial(tmp_path, [], "c")]
    )
    assert queue.next() == 0
    queue.running.add(0)
    assert queue.next() == 2 and queue.left() == [1, 2] and not queue.stuck()
    queue.running.add(2)
    assert queue.next() is None and not queue.stuck()
    queue.running.discard(0)
    queue.failed[0] = "no"
    queue.running.discard(2)
    fill(tmp_path / "c", [], False, None, None)
    assert queue.stuck() and queue.finished() == 1
