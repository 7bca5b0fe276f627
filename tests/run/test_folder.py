"""The run folder: recipes, the lock, progress, the clock, and the faults of a file system."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adversa.run import create as run_create
from adversa.run import differences, environment, file_lock, status, step_folder
from adversa.run import folder as run_folder
from adversa.run import status as run_status
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.types import UserError

RECIPE = {"seed": 0, "data": {"resolution": 32, "path": None}, "mix": {"arms": ["real", "guided"]}}
# What a folder's step reads of it.
READS = {
    "data": ("data",),
    "round-000/real/mix": ("mix",),
    "codec": ("codec", "denoiser.balance", "seed"),
    "latents/train": ("denoiser.flips",),
    "latents/select": (),
}


@pytest.fixture
def run(tmp_path):
    return run_create.open_run(tmp_path / "run", RECIPE, "seed: 0\n")


def message(call, *args):
    with pytest.raises(UserError) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- recipes -------------------------------------------------------------------------------------


def test_a_run_opens_again_with_the_same_recipe(run):
    assert run_create.open_run(run.root, RECIPE, "seed: 0\n") == run
    assert not [p for p in run.root.iterdir() if p.name not in ("config.yaml", "run.json")]


def test_another_recipe_is_refused_with_each_field_that_differs(run):
    other = {
        "seed": 1,
        "data": {"resolution": 64, "path": None},
        "mix": {"arms": ["real"]},
        "rounds": 2,
    }
    files.write_json(run.data / step_folder.MANIFEST, {})
    text = message(run_create.open_run, run.root, other, "")
    for part in (
        "seed: 0 -> 1",
        "data.resolution: 32 -> 64",
        "mix.arms: ['real', 'guided'] -> ['real']",
        "rounds: absent -> 2",
    ):
        assert part in text
    assert "data.path" not in text and "--run-dir" in text
    assert run.config.read_text() == "seed: 0\n"


def test_while_nothing_is_finished_a_setting_may_be_fixed_in_place(run):
    other = RECIPE | {"seed": 1}
    files.write_json(run.data / step_folder.RECIPE, {"of": "the old one"})
    assert run_create.open_run(run.root, other, "seed: 1\n") == run
    assert run.config.read_text() == "seed: 1\n" and not (run.data / step_folder.RECIPE).exists()


def test_once_the_data_are_prepared_what_they_do_not_hang_on_may_be_fixed(run):
    files.write_json(run.data / step_folder.RECIPE, {})
    files.write_json(run.data / step_folder.MANIFEST, {})
    assert run_create.open_run(run.root, RECIPE | {"seed": 1}, "seed: 1\n", READS) == run
    assert run.config.read_text() == "seed: 1\n" and (run.data / step_folder.RECIPE).exists()
    other = RECIPE | {"seed": 1, "data": {"resolution": 64, "path": None}}
    assert "data.resolution: 32 -> 64" in message(run_create.open_run, run.root, other, "", READS)
    files.write_json(run.judge / step_folder.MANIFEST, {})
    assert "seed: 1 -> 0" in message(run_create.open_run, run.root, RECIPE, "", READS)


# What is finished, and a change that it allows and one that it does not.
EARLY = [
    (["data"], {"mix": {"arms": ["real"]}}, {"data": {"resolution": 64, "path": None}}),
    (
        ["data", "round-000/real/mix"],
        {"classifier": {"lr": 1}, "seed": 3},
        {"mix": {"arms": ["real"]}},
    ),
    (["data", "codec"], {"denoiser": {"external": "x"}}, {"codec": {"kind": "kl"}}),
    (
        ["data", "codec", "round-000/real/mix"],
        {"denoiser": {"channels": [8]}},
        {"denoiser": {"balance": 1.0}},
    ),
    (
        ["data", "codec", "round-000/real/mix"],
        {"generate": {"steps": 4}, "quality": {"images": 9}},
        {"seed": 3},
    ),
    (
        ["data", "codec", "round-000/real/mix", "latents/train"],
        {"denoiser": {"balanced": 0}},
        {"denoiser": {"flips": False}},
    ),
]


@pytest.mark.parametrize(("finished", "allowed", "refused"), EARLY)
def test_before_the_first_training_what_is_finished_says_what_may_be_fixed(
    run, finished, allowed, refused
):
    for name in finished:
        files.write_json(run.root / name / step_folder.MANIFEST, {})
    assert "was made by another recipe" in message(
        run_create.open_run, run.root, RECIPE | refused, "", READS
    )
    assert run.config.read_text() == "seed: 0\n"
    run_create.open_run(run.root, RECIPE | allowed, "fixed\n", READS)
    assert run.config.read_text() == "fixed\n"


def test_a_training_with_a_checkpoint_goes_on_with_its_own_settings_alone(run):
    """It would go on from weights that other settings made."""
    files.write_json(run.data / step_folder.MANIFEST, {})
    files.write_json(run.denoiser / step_folder.RECIPE, {})
    lower = RECIPE | {"denoiser": {"lr": 1}}
    run_create.open_run(run.root, lower, "", READS)  # it has no step yet
    assert not (run.denoiser / step_folder.RECIPE).exists()
    files.write_json(run.denoiser / step_folder.RECIPE, {})
    (run.denoiser / "checkpoint.pt").touch()
    assert "denoiser.lr: 1 -> absent" in message(run_create.open_run, run.root, RECIPE, "", READS)
    assert (run.denoiser / step_folder.RECIPE).exists()
    files.write_json(run.codec / step_folder.RECIPE, {})
    (run.denoiser / "checkpoint.pt").unlink()
    (run.codec / "checkpoint.pt").touch()
    assert "codec.lr" in message(
        run_create.open_run, run.root, lower | {"codec": {"lr": 1}}, "", READS
    )
    run_create.open_run(run.root, RECIPE, "", READS)
    assert (run.codec / step_folder.RECIPE).exists() and not (
        run.denoiser / step_folder.RECIPE
    ).exists()


def test_differences_do_not_see_what_json_does_not_keep():
    assert differences.differences({"a": (1, 2), "b": {}}, {"a": [1, 2], "b": {}}) == []
    assert differences.differences({"a": {}}, {"a": {"b": 1}}) == [
        "a: {} -> absent",
        "a.b: absent -> 1",
    ]


def test_a_run_of_another_version_is_finished_with_that_version(run):
    """Its fields cannot be given again: one of the two versions does not know them."""
    files.write_json(
        run.data / step_folder.MANIFEST, {"versions": {"adversa": "0.0.9"}, "git": "c0ffee"}
    )
    newer = RECIPE | {
        "data": RECIPE["data"] | {"crop": "pad"},
        "curate": {"quantile": 0.98, "folds": 2},
    }
    text = message(run_create.open_run, run.root, newer, "")
    assert (
        "curate.folds: absent -> 2; curate.quantile: absent -> 0.98; data.crop: absent -> pad"
        in text
    )
    assert (
        "that one does not know curate, data.crop; finish it with that version (adversa "
        "0.0.9, commit c0ffee)" in text
    )
    assert "or give another --run-dir" in text and "use those values again" not in text
    files.write_json(run.recipe, {"recipe": newer})
    assert "this one does not know curate, data.crop;" in message(
        run_create.open_run, run.root, RECIPE, ""
    )


FREE = [
    ({"evaluate": {"groups": {}}}, {"evaluate": {"groups": {"malignant": ["mel"]}}}),
    (
        {"classifier": {"model_args": {"channels": [8]}}},
        {"classifier": {"model_args": {"dims": [8]}}},
    ),
    ({"curate": {"judge": None}}, {"curate": {"judge": {"model": "x"}}}),
]


@pytest.mark.parametrize(("old", "new"), FREE)
def test_what_a_setting_adds_or_takes_away_is_of_no_other_version(run, old, new):
    files.write_json(run.recipe, {"recipe": RECIPE | old})
    files.write_json(run.denoiser / step_folder.MANIFEST, {})
    assert "; use those values again, or another --run-dir" in message(
        run_create.open_run, run.root, RECIPE | new, ""
    )
    assert differences.unknown(old, new) == differences.unknown(new, old) == []


def test_a_step_of_another_version_too(tmp_path):
    def asked(version=1, inputs=None, **config):
        return step_folder.Recipe("codec", version, config, inputs or {})

    step_folder.begin(tmp_path, asked(kind="tiny", path=None))
    (tmp_path / "checkpoint.pt").touch()
    assert "does not know views; finish it with that version, or" in message(
        step_folder.begin, tmp_path, asked(kind="tiny", path=None, views=8)
    )
    assert "step codec has number 1, here it has 2" in message(
        step_folder.begin, tmp_path, asked(2, kind="tiny", path=None)
    )
    # The recipe of another kind has other fields, and weights are read where there are some:
    # settings, both.
    for other in (
        asked(kind="kl", steps=4),
        asked(inputs={"weights": "f00"}, kind="tiny", path=None),
    ):
        assert "use those values again" in message(step_folder.begin, tmp_path, other)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "is not empty and not a run" in message(run_create.open_run, tmp_path, RECIPE, "")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kill_between_the_two_files_of_a_new_run_is_fixed(run):
    run.config.unlink()
    run_create.open_run(run.root, RECIPE, "seed: 0\n")
    assert run.config.read_text() == "seed: 0\n"


def test_a_run_id_does_not_depend_on_where_the_data_lie():
    moved = RECIPE | {"data": RECIPE["data"] | {"path": "/elsewhere"}}
    assert run_folder.run_id(moved) == run_folder.run_id(RECIPE)
    assert run_folder.run_id(RECIPE | {"seed": 1}) != run_folder.run_id(RECIPE)


def test_begin_checks_the_recipe_and_finish_is_the_last_word(tmp_path):
    recipe = step_folder.Recipe("score", 1, {"a": {"b": 2}}, {"data": "f00"})
    assert (
        step_folder.begin(tmp_path, recipe) is False
        and step_folder.begin(tmp_path, recipe) is False
    )
    step_folder.finish(tmp_path, recipe, rows=3)
    assert step_folder.begin(tmp_path, recipe) is True
    assert (
        step_folder.manifest(tmp_path)["rows"] == 3
        and step_folder.fingerprint(tmp_path) == recipe.fingerprint
    )
    assert "inputs.data: f00 -> f11" in message(
        step_folder.begin,
        tmp_path,
        step_folder.Recipe("score", 1, {"a": {"b": 2}}, {"data": "f11"}),
    )


# ---- faults of a file system ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "disk fails"),
        (errno.EBUSY, "something else holds it"),
        (errno.EISDIR, "a folder is in the way"),
        (errno.ELOOP, "lead in a circle"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.ESTALE, "mount it again"),
    ],
)
def test_writing_names_the_place_and_the_fix(tmp_path, code, fix):
    def fails(name):
        with files.writing(tmp_path):
            raise OSError(code, os.strerror(code), name)

    assert f"cannot write to {tmp_path / 'part'}" in message(fails, str(tmp_path / "part"))
    assert f"cannot write to {tmp_path}" in message(fails, None) and fix in message(fails, None)


def test_writing_lets_our_own_faults_through(tmp_path):
    for folder, name in (
        (tmp_path, "model"),
        (tmp_path, str(tmp_path / "model")),
        (tmp_path / "gone", "/elsewhere/model"),
    ):
        with pytest.raises(FileNotFoundError), files.writing(folder):
            raise FileNotFoundError(errno.ENOENT, "no such file", name)


def test_a_folder_that_went_away_is_told(tmp_path):
    def fails():
        with files.writing(tmp_path / "gone"):
            (tmp_path / "gone/part").write_text("")

    assert (
        f"cannot write to {tmp_path / 'gone/part'}: the folder cannot be made, or is gone"
        in message(fails)
    )


def test_the_fix_names_the_option_that_gave_the_folder(tmp_path):
    def fails(code, option):
        with files.writing(tmp_path, option):
            raise OSError(code, "", "of a temporary name", None, str(tmp_path / "there"))

    assert message(fails, errno.EROFS, "--out").endswith(
        "there: the file system is read-only; give a --out that can be written"
    )
    assert message(fails, errno.ENOSPC, "--out").endswith("run the same command again")
    assert message(fails, errno.ENOSPC, "--run-dir").endswith(
        "run the same command again, finished parts are kept"
    )


def test_places_where_no_run_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/run", tmp_path / ("n" * 300)):
        assert "another --run-dir" in message(run_create.open_run, place, RECIPE, "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("place", ["/proc/adversa/run", "/sys/run"])
def test_a_file_system_that_takes_no_files(place):
    assert "--run-dir" in message(run_create.open_run, Path(place), RECIPE, "")


def test_a_run_that_has_become_read_only_is_told_before_anything_is_done(run, monkeypatch):
    def read_only(self, *a, **k):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "touch", read_only)
    assert "the file system is read-only; give a --run-dir that can be written" in message(
        run_create.open_run, run.root, RECIPE, ""
    )


def test_the_cpus_are_those_that_may_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6}, raising=False)
    monkeypatch.setattr(environment, "CPU_MAX", tmp_path / "cpu.max")
    assert environment.cpus() == 3
    for quota, wanted in (
        ("max 100000", 3),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("800000 100000", 3),
        ("", 3),
    ):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert environment.cpus() == wanted
    monkeypatch.delattr(os, "sched_getaffinity")
    (tmp_path / "cpu.max").unlink()
    assert environment.cpus() == os.cpu_count()


def test_a_torn_or_foreign_json_file_reads_as_none(tmp_path):
    (tmp_path / "a").write_text('{"done": 1')
    (tmp_path / "b").write_text("[1]")
    assert [files.read_json(tmp_path / n) for n in ("a", "b", "none", "a/below")] == [None] * 4


# ---- the lock ------------------------------------------------------------------------------------

HOLD = (
    "import sys, time; from pathlib import Path; from adversa.run.folder import RunDir; r = "
    "RunDir(Path(sys.argv[1]))\n"
)
HOLD += (
    "from adversa.run import file_lock, status\nwith file_lock.lock(r):\n    "
    "status.set_status(r, 'running'); print('held', flush=True); time.sleep(60)"
)


def test_a_second_process_is_refused_and_a_killed_one_lets_go(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.root)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert file_lock.is_locked(run)
        with (
            pytest.raises(UserError, match=f"in use by process {holder.pid}; wait for it"),
            file_lock.lock(run),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert not file_lock.is_locked(run)
        with file_lock.lock(run):
            assert file_lock.is_locked(run)
        assert not file_lock.is_locked(run)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_folder_that_was_never_locked_is_not_locked(tmp_path):
    assert not file_lock.is_locked(RunDir(tmp_path))
    assert list(tmp_path.iterdir()) == []


# ---- progress and the clock ----------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch):
    """The time, in seconds, to be set by the test."""
    now = [1000.0]
    monkeypatch.setattr(step_folder.time, "monotonic", lambda: now[0])
    return now


def test_progress_carries_the_elapsed_time_over_a_kill(tmp_path, now):
    files.write_json(
        tmp_path / step_folder.PROGRESS, {"done": 5, "total": 10, "elapsed": 100.0, "rate": 1.0}
    )
    progress = step_folder.Progress(tmp_path)
    assert progress.elapsed == 100
    now[0] += 3
    progress({"done": 6, "total": 10, "unit": "step"})
    saved = files.read_json(tmp_path / step_folder.PROGRESS)
    assert (saved["done"], saved["elapsed"]) == (6, 103)


def test_progress_counts_the_rate_from_this_attempt_alone_and_is_written_seldom(tmp_path, now):
    progress = step_folder.Progress(tmp_path, interval=0.5)
    progress({"done": 50, "total": 100})  # a resumed step begins at 50
    now[0] += 0.25
    progress({"done": 55, "total": 100})
    assert files.read_json(tmp_path / step_folder.PROGRESS)["done"] == 50
    now[0] += 1.75
    progress({"done": 60, "total": 100})
    saved = files.read_json(tmp_path / step_folder.PROGRESS)
    assert (saved["done"], saved["rate"], saved["elapsed"]) == (60, 5.0, 2.0)


def test_the_clock_adds_up_over_commands_and_counts_start_up(run, now):
    for _ in range(2):
        with status.Clock(run, since=now[0] - 10) as clock:
            clock.tick()
            assert run_status.wall_seconds(run) in (10, 25)
            now[0] += 5
    assert run_status.wall_seconds(run) == 30
    assert run_status.wall_seconds(RunDir(run.root / "none")) == 0


def test_the_clock_holds_what_passed_when_the_command_fails(run, now):
    with pytest.raises(RuntimeError), status.Clock(run, since=now[0] - 7):
        raise RuntimeError
    assert run_status.wall_seconds(run) == 7


def test_what_a_killed_process_left_half_written_is_swept_and_nothing_else(run):
    left = [
        "data/train/.part-00003.parquet.123",
        "denoiser/.checkpoint.pt.12",
        ".run.json.4711",
        "judge/.progress.json.7",
    ]
    kept = [
        ".lock",
        "data/train/part-00003.parquet",
        "denoiser/checkpoint.pt",
        "judge/.hidden",
        "round-001/notes.12",
        ".12",
    ]
    for name in [*left, *kept]:
        (run.root / name).parent.mkdir(parents=True, exist_ok=True)
        (run.root / name).write_text(name)
    (run.root / ".folder.12").mkdir()
    run_folder.remove_partial_files(run)
    assert not [n for n in left if (run.root / n).exists()]
    assert all((run.root / n).read_text() == n for n in kept) and (run.root / ".folder.12").is_dir()
    assert run.config.exists() and run.recipe.exists()


def test_the_temporary_names_that_are_written_are_those_that_are_swept(run, monkeypatch):
    """A process that dies before the rename leaves its temporary file: sweep must know both kinds
    by their names.
    """
    import pyarrow as pa

    from adversa.storage import tables

    class Killed(BaseException):
        pass

    def dies(*_):
        raise Killed

    monkeypatch.setattr(os, "replace", dies)
    monkeypatch.setattr(Path, "unlink", lambda *a, **k: None)  # nor does a killed process tidy up
    with pytest.raises(Killed):
        tables.write_part(run.data / "part-00000.parquet", pa.table({"a": [1]}))
    with pytest.raises(Killed):
        files.write_json(run.data / "progress.json", {"done": 1})
    assert len(list(run.data.iterdir())) == 2
    monkeypatch.undo()
    run_folder.remove_partial_files(run)
    assert list(run.data.iterdir()) == []


def test_status_is_whole_json_with_the_process(run):
    run_status.set_status(run, "running", "prepare", folders=["data"])
    status = json.loads(run.status.read_text())
    assert (status["state"], status["stage"], status["pid"], status["folders"]) == (
        "running",
        "prepare",
        os.getpid(),
        ["data"],
    )


def test_a_file_system_without_locks_is_told_and_a_stale_handle_is_read_again(run, monkeypatch):
    stale = [OSError(errno.ESTALE, "stale"), OSError(errno.ESTALE, "stale")]
    read = type(run.recipe).read_bytes

    def reading(path, *args, **more):
        if stale:
            raise stale.pop()
        return read(path, *args, **more)

    monkeypatch.setattr(type(run.recipe), "read_bytes", reading)
    assert files.read_json(run.recipe)["recipe"] == RECIPE and not stale

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not file_lock.is_locked(run)
    with (
        pytest.raises(
            UserError, match=r"knows no locks \(No locks available\); mount it with them"
        ),
        file_lock.lock(run),
    ):
        pass
