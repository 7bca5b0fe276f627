from __future__ import annotations

import pytest

from adversa.engine.step import cost, run_step
from adversa.engine.tasks import Done
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE, NullHandle
from adversa.run.run_lock import RunLockLost
from adversa.storage import files
from adversa.types import UserError


def recipe(**config):
    return step_folder.Recipe("demo", 1, config, {"data": "f00"})


def test_a_finished_step_is_not_done_again(tmp_path):
    calls = []

    def body(progress):
        calls.append(1)
        return {"rows": 3}

    run_step(tmp_path / "s", recipe(a=1), body, NULL_HANDLE)
    run_step(tmp_path / "s", recipe(a=1), body, NULL_HANDLE)
    assert calls == [1]
    assert step_folder.manifest(tmp_path / "s")["rows"] == 3


def test_another_recipe_is_refused_with_the_fields_that_differ(tmp_path):
    run_step(tmp_path / "s", recipe(a=1, b={"c": 2}), lambda p: {"rows": 0}, NULL_HANDLE)
    with pytest.raises(UserError, match=r"config\.b\.c: 2 -> 3") as e:
        run_step(tmp_path / "s", recipe(a=1, b={"c": 3}), lambda p: {"rows": 0}, NULL_HANDLE)
    assert "config.a" not in str(e.value)


def test_messages_name_the_option_that_gave_the_folder(tmp_path):
    run_step(tmp_path / "s", recipe(a=1), lambda p: {"rows": 0}, NULL_HANDLE)
    with pytest.raises(UserError, match="use those values again, or another --out"):
        run_step(tmp_path / "s", recipe(a=2), lambda p: {"rows": 0}, NULL_HANDLE, "--out")
    (tmp_path / "file").write_text("")
    for options, named in (((), "--run-dir"), (("--out",), "--out")):
        with pytest.raises(UserError, match=f"a file is in the way; give another {named}"):
            run_step(tmp_path / "file/s", recipe(a=1), lambda p: {"rows": 0}, NULL_HANDLE, *options)


def test_a_step_that_fails_has_no_manifest_and_is_done_again(tmp_path):
    def fails(progress):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run_step(tmp_path / "s", recipe(a=1), fails, NULL_HANDLE)
    assert not step_folder.is_finished(tmp_path / "s")
    run_step(tmp_path / "s", recipe(a=1), lambda p: {"rows": 1}, NULL_HANDLE)
    assert step_folder.is_finished(tmp_path / "s")


class Overtaken(NullHandle):
    """Of a run that another has taken over while the step worked."""

    def check(self):
        raise RunLockLost("another has taken it over")


def test_a_step_of_a_run_that_was_lost_is_not_marked_finished(tmp_path):
    with pytest.raises(RunLockLost):
        run_step(tmp_path / "s", recipe(a=1), lambda p: {"rows": 1}, Overtaken())
    assert not step_folder.is_finished(tmp_path / "s")


def test_the_fingerprint_follows_the_recipe_unless_the_step_gives_its_own(tmp_path):
    run_step(tmp_path / "a", recipe(a=1), lambda p: {"rows": 0}, NULL_HANDLE)
    run_step(tmp_path / "b", recipe(a=2), lambda p: {"rows": 0}, NULL_HANDLE)
    run_step(tmp_path / "c", recipe(a=1), lambda p: {"rows": 0, "fingerprint": "abc"}, NULL_HANDLE)
    assert step_folder.fingerprint(tmp_path / "a") != step_folder.fingerprint(tmp_path / "b")
    assert step_folder.fingerprint(tmp_path / "c") == "abc"


def test_cost_shares_parts_among_no_more_workers_than_parts():
    done = [Done(0, 1, 2.0), Done(1, 1, 4.0)]
    assert cost(done, 1, 7.0) == {"waited": 1.0, "device_seconds": 6.0, "lanes": 1}
    assert cost(done, 8, 7.0) == {"waited": 4.0, "device_seconds": 6.0, "lanes": 8}
    assert (
        cost(done, 2, 2.5)["waited"] == 0
    )  # parts that ran side by side on more workers than said: never below zero
    assert cost([], 8, 0.5) == {"waited": 0.5, "device_seconds": 0, "lanes": 8}


def test_a_steps_compute_is_its_own_time_less_what_it_waited_for(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(step_folder.time, "monotonic", lambda: now[0])

    def body(progress):
        now[0] += 10
        return cost([Done(0, 1, 2.0), Done(1, 1, 4.0)], 2, 8.0) | {"rows": 2}

    run_step(tmp_path / "a", recipe(a=1), body, NULL_HANDLE)
    found = step_folder.manifest(tmp_path / "a")
    assert (found["seconds"], found["compute_seconds"], found["device_seconds"]) == (
        10,
        5,
        6,
    )  # the driver's own 2 s count
    assert "waited" not in found

    def alone(progress):
        now[0] += 3
        return {"rows": 0}

    run_step(tmp_path / "b", recipe(a=1), alone, NULL_HANDLE)
    found = step_folder.manifest(tmp_path / "b")
    assert found["seconds"] == found["compute_seconds"] == found["device_seconds"] == 3


def test_device_seconds_of_an_attempt_that_was_cut_off_are_counted(tmp_path):
    folder = tmp_path / "step"
    files.write_json(folder / step_folder.PROGRESS, {"elapsed": 10.0})
    run_step(
        folder, recipe(a=1), lambda p: cost([Done(0, 1, 2.0)], 3, 2.0) | {"rows": 1}, NULL_HANDLE
    )
    made = step_folder.manifest(folder)
    assert (
        made["device_seconds"] == 2.0 + 3 * 10.0 and made["seconds"] >= 10.0 and "lanes" not in made
    )
