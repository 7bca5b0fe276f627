"""A command reads each JSON file once, and never what it, or another process, has replaced."""

from __future__ import annotations

import threading
from collections import Counter
from contextvars import copy_context
from pathlib import Path

import pytest

from adversa.config import dump
from adversa.pipeline import stages
from adversa.storage import files, once, tables
from adversa.storage.path import move, rmtree


@pytest.fixture
def reads(monkeypatch) -> Counter[Path]:
    """How often each .json file was read."""
    found: Counter[Path] = Counter()

    def counted(name: str):
        read = getattr(Path, name)

        def wrapped(path: Path, *args, **kwargs):
            value = read(path, *args, **kwargs)
            found[path] += path.suffix == ".json"
            return value

        monkeypatch.setattr(Path, name, wrapped)

    counted("read_bytes")
    counted("read_text")
    return found


def test_a_loop_and_a_report_read_no_file_of_the_run_twice(
    tmp_path, adversa, tiny, monkeypatch, reads
):
    config = tiny(
        data={"phantom": {"images": 120}},
        denoiser={"steps": 4},
        mix={"arms": ["real", "replay", "guided"], "synthetic_ratio": "auto", "ratios": [0, 0.5]},
    )
    (tmp_path / "tiny.yaml").write_text(dump(config))
    run, planned = tmp_path / "run", []
    plan = stages._planned
    monkeypatch.setattr(
        stages, "_planned", lambda *a: planned.append(threading.get_ident()) or plan(*a)
    )
    for command in (
        ["loop", tmp_path / "tiny.yaml", "--engine", "local", "--run-dir", run],
        ["loop", tmp_path / "tiny.yaml", "--engine", "local", "--run-dir", run],
        ["report", run],
        ["status", run],
    ):
        reads.clear()
        planned.clear()
        done = adversa(*command)
        assert done.exit_code == 0, done.output
        own = {p: n for p, n in reads.items() if p.is_relative_to(run)}
        again = {p: n for p, n in own.items() if n > 1 and p.name not in once.LIVE}
        assert not again, (command, again)
        # Before the first stage, and for the summary, whose settings may have changed by then.
        assert planned.count(threading.get_ident()) <= 2, command


def test_what_a_command_writes_moves_or_removes_it_sees(tmp_path):
    path, moved = tmp_path / "a" / "x.json", tmp_path / "b"
    with once.command():
        assert files.read_json(path) is None
        path.parent.mkdir()
        path.write_text('{"n": 1}')  # by a worker process
        assert files.read_json(path) == {"n": 1}
        files.write_json(path, {"n": 2})
        assert files.read_json(path) == {"n": 2}
        move(path.parent, moved)
        assert files.read_json(path) is None and files.read_json(moved / "x.json") == {"n": 2}
        rmtree(moved)
        assert files.read_json(moved / "x.json") is None


def test_what_others_write_is_read_every_time(tmp_path):
    with once.command():
        for name in once.LIVE:
            for n in range(2):
                (tmp_path / name).write_text(f'{{"n": {n}}}')
                assert files.read_json(tmp_path / name) == {"n": n}


def test_a_value_changed_by_its_reader_is_not_what_the_next_one_gets(tmp_path):
    files.write_json(tmp_path / "x.json", {"n": [1]})
    with once.command():
        (files.read_json(tmp_path / "x.json") or {})["n"].append(2)
        assert files.read_json(tmp_path / "x.json") == {"n": [1]}


def test_that_settings_are_missing_is_read_once(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(once, "_read", lambda p: tried.append(p) or p.read_bytes())
    with once.command():
        for name in ("settings.json", "settings.json", "manifest.json", "manifest.json"):
            assert files.read_json(tmp_path / name) is None
        assert [p.name for p in tried] == ["settings.json", "manifest.json", "manifest.json"]
        files.write_json(tmp_path / "settings.json", {"1": {}})
        assert files.read_json(tmp_path / "settings.json") == {"1": {}}


def test_of_two_threads_one_reads(tmp_path, monkeypatch):
    path, tried, wait = tmp_path / "x.json", [], threading.Event()
    path.write_text('{"n": 1}')

    def slow(p):
        tried.append(p)
        wait.wait(1)
        return p.read_bytes()

    monkeypatch.setattr(once, "_read", slow)
    with once.command():
        both = [
            threading.Thread(target=copy_context().run, args=(files.read_json, path))
            for _ in range(2)
        ]
        for thread in both:
            thread.start()
        wait.set()
        for thread in both:
            thread.join()
        assert files.read_json(path) == {"n": 1} and tried == [path]


def test_what_is_removed_while_another_thread_reads_it_is_not_kept(tmp_path, monkeypatch):
    """By the live view, say: a step would count as finished whose folder is gone."""
    path, reading, removed = tmp_path / "step/manifest.json", threading.Event(), threading.Event()
    files.write_json(path, {"n": 1})

    def slow(p):
        found = p.read_bytes()
        reading.set()
        removed.wait(10)
        return found

    with once.command():
        with monkeypatch.context() as patch:
            patch.setattr(once, "_read", slow)
            other = threading.Thread(target=copy_context().run, args=(files.read_json, path))
            other.start()
            reading.wait(10)
            rmtree(path.parent)
            removed.set()
            other.join()
        assert files.read_json(path) is None


def test_a_folder_is_forgotten_while_another_thread_reads(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.json").write_text("{}")
    gone, over = tmp_path / "gone", threading.Event()

    def look():
        for i in range(200):
            files.read_json(tmp_path / f"{i}.json")
        over.set()

    class Slow(type(tmp_path)):
        """A path that lets the other thread in when it is compared."""

        def __eq__(self, other):
            over.wait(0.001)
            return super().__eq__(other)

        __hash__ = type(tmp_path).__hash__

    with once.command():
        (tmp_path / "first.json").write_text("{}")
        files.read_json(tmp_path / "first.json")
        thread = threading.Thread(target=copy_context().run, args=(look,))
        thread.start()
        while not over.is_set():
            once.forget(Slow(gone))
        thread.join()


def test_nothing_is_kept_beyond_the_command_or_beside_it(tmp_path, reads):
    path = tmp_path / "x.json"
    path.write_text('{"n": 1}')
    with once.command():
        with once.command():
            files.read_json(path)
        files.read_json(path)
        tables.each(files.read_json, [path, path])
        assert reads[path] == 1
        other = threading.Thread(target=files.read_json, args=(path,))
        other.start()
        other.join()
        assert reads[path] == 2
        mine = threading.Thread(target=copy_context().run, args=(files.read_json, path))
        mine.start()
        mine.join()
        assert reads[path] == 2
    files.read_json(path)
    assert reads[path] == 3
