"""The cache of decoded images: made once a machine, never believed, bounded, done without."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from adversa.data.loader import ImageTable
from adversa.run import step_folder
from adversa.run.step_folder import Recipe
from adversa.storage import arrays, once, tables
from adversa.storage.arrays import RoleArray
from adversa.types import Example, UserError

SIDE, ROWS = 8, 600  # in two parts, of two groups of rows each
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8)
BYTES = ROWS * (SIDE * SIDE * 3 + 64)  # what an entry takes, about


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own; lines are told anew."""
    monkeypatch.setenv("ADVERSA_CACHE", str(tmp_path / "cache"))
    arrays._tell.cache_clear()
    return tmp_path / "cache/arrays"


def write(folder, images=IMAGES):
    for k, i in enumerate(range(0, ROWS, 300)):
        some = [
            Example(f"r{n}", "s", 0, "g", "", {}, tables.encode_png(images[n]))
            for n in range(i, i + 300)
        ]
        tables.write_part(folder / tables.part_name(k), tables.to_table(some, tables.EXAMPLES))
    return folder


@pytest.fixture
def role(tmp_path):
    return write(tmp_path / "data/train")


@pytest.fixture
def decoded(monkeypatch):
    """The PNGs that were decoded."""
    found, real = [], tables.decode_png
    monkeypatch.setattr(tables, "decode_png", lambda data: found.append(data) or real(data))
    return found


def entries(cache):
    return sorted(p for p in cache.glob("*") if p.is_dir())


def is_right(array):
    picks = np.random.default_rng(1).integers(0, ROWS, 64)
    assert np.array_equal(array.take(picks), IMAGES[picks])
    assert np.array_equal(array.part("part-00001.parquet"), IMAGES[300:])
    assert [len(b) for b in array.blocks()] == [256, 44, 256, 44]
    assert np.array_equal(np.concatenate(list(array.blocks())), IMAGES)


# ---- once a machine ------------------------------------------------------------------------------


def test_a_folder_is_decoded_once_whoever_asks_again(role, cache, decoded):
    for _ in range(3):
        is_right(RoleArray(role))
        assert len(decoded) == ROWS
    assert len(entries(cache)) == 1 and [p.name for p in cache.iterdir() if p.is_file()] == [
        ".lock"
    ]


def test_a_machine_without_affinity_decodes_too(role, monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # macOS
    is_right(RoleArray(role))


def test_rows_are_a_mapped_file_of_which_copies_are_given(role):
    array = RoleArray(role)
    assert isinstance(array._entry.rows.base, np.memmap) and not array._entry.rows.flags.writeable
    first = array.take(np.array([3, 3]))
    first[:] = 0
    is_right(array)


def test_two_runs_over_the_same_images_share_them(role, tmp_path, cache, decoded):
    is_right(RoleArray(role))
    is_right(RoleArray(write(tmp_path / "elsewhere")))
    assert len(entries(cache)) == 1 and len(decoded) == ROWS
    other = write(tmp_path / "other", IMAGES[::-1])
    assert np.array_equal(RoleArray(other).take(np.arange(ROWS)), IMAGES[::-1])
    assert len(entries(cache)) == 2


def test_it_is_known_by_the_manifest_and_no_part_is_read(role, monkeypatch):
    """That of the step's folder, or of the folder itself."""
    step_folder.finish(role.parent, Recipe("prepare", 1, {}, {}))
    is_right(RoleArray(role))
    monkeypatch.setattr(arrays.tables, "opened", None)
    monkeypatch.setattr(arrays.tables, "count", None)
    real = arrays.files.sha256
    monkeypatch.setattr(
        arrays.files, "sha256", lambda p: real(p) if p.suffix != ".parquet" else 1 / 0
    )
    is_right(RoleArray(role))


def test_those_who_read_few_decode_few(role, cache, decoded):
    array = RoleArray(role, build=False)
    assert np.array_equal(array.take(np.array([5, 2, 5])), IMAGES[[5, 2, 5]])
    assert len(decoded) == 2 and entries(cache) == []
    is_right(array)
    RoleArray(role)
    decoded.clear()
    is_right(RoleArray(role, build=False))
    assert not decoded


def test_latents_are_mapped_too(tmp_path, cache):
    latents = np.random.default_rng(0).random((300, 2, 4, 3, 3)).astype(np.float16)
    rows = tables.latents_table([f"r{i}" for i in range(300)], [0] * 300, latents)
    tables.write_part(tmp_path / tables.part_name(0), rows)
    for build in (False, True):
        found = ImageTable([tmp_path], "latent", build).fetch(["r7", "r299", "r7"])
        assert found.dtype == np.float16 and np.array_equal(found, latents[[7, 299, 7]])
    assert len(entries(cache)) == 1


def test_a_folder_of_no_rows_has_no_entry(tmp_path, cache):
    assert len(RoleArray(tmp_path / "nothing").ids) == 0
    tables.write_part(tmp_path / "empty" / tables.part_name(0), tables.EXAMPLES.empty_table())
    assert len(RoleArray(tmp_path / "empty").ids) == 0 and entries(cache) == []


def test_images_of_two_sizes_are_refused_and_nothing_is_left(role, cache):
    image = Example("x", "s", 0, "g", "", {}, tables.encode_png(np.zeros((4, 4, 3), np.uint8)))
    tables.write_part(role / tables.part_name(2), tables.to_table([image], tables.EXAMPLES))
    with pytest.raises(UserError, match=r"part-00002.parquet has images of \(4, 4, 3\), others"):
        RoleArray(role)
    assert entries(cache) == []


AT_ONCE = """
import sys, time
from pathlib import Path
from adversa.storage import arrays
build, folder = arrays._build, Path(sys.argv[1])
def slow(*args):
    print("builds", flush=True)
    time.sleep(1)
    return build(*args)
arrays._build = slow
print(int(arrays.RoleArray(folder).take(arrays.np.arange(600)).sum()))
"""


def test_two_processes_at_once_build_once(role):
    started = [
        subprocess.Popen([sys.executable, "-c", AT_ONCE, role], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [p.communicate(timeout=60)[0].split() for p in started]
    assert sorted(map(len, told)) == [1, 2]
    assert {int(lines[-1]) for lines in told} == {int(IMAGES.sum())}


def test_what_a_killed_build_left_goes_with_the_next(role, cache):
    (cache / ".new-of-a-dead-process").mkdir(parents=True)
    is_right(RoleArray(role))
    assert not list(cache.glob(".new*"))


# ---- damage --------------------------------------------------------------------------------------


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flipped, cut, os.unlink])
@pytest.mark.parametrize("name", [arrays.ROWS, arrays.INDEX, arrays.ENTRY])
def test_damage_is_told_in_one_line_and_mended(role, cache, caplog, name, damage):
    RoleArray(role)
    (entry,) = entries(cache)
    damage(entry / name)
    is_right(RoleArray(role))
    if name == arrays.ENTRY and damage is flipped:  # a letter of the folder's name, which is shown
        return
    assert [r.getMessage() for r in caplog.records] == [
        f"{entry} is damaged: made anew from {role}"
    ]
    caplog.clear()
    is_right(RoleArray(role))
    assert not caplog.records


def test_a_command_that_has_read_what_was_damaged_reads_it_anew(role, cache, caplog):
    RoleArray(role)
    (entry,) = entries(cache)
    cut(entry / arrays.ENTRY)
    with once.command():
        array = RoleArray(role)
        assert array._entry is not None
        is_right(array)
    assert len(caplog.records) == 1


def test_a_cache_that_is_only_read_is_used(role, cache, caplog, monkeypatch, decoded):
    RoleArray(role)
    decoded.clear()

    def refused(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(arrays.os, "utime", refused)
    monkeypatch.setattr(arrays.shutil, "rmtree", refused)
    monkeypatch.setattr(arrays, "FileLock", refused)
    array = RoleArray(role)
    is_right(array)
    assert not decoded and not caplog.records
    array._sound[:] = False
    monkeypatch.setattr(arrays, "crc32", lambda data: 0)  # damage that cannot be mended there
    is_right(array)
    assert array._entry is None and "(Read-only file system)" in caplog.text
    assert len(caplog.records) == 1


def test_a_disk_that_keeps_failing_is_done_without(role, caplog, monkeypatch):
    real = arrays.crc32
    array = RoleArray(role)
    monkeypatch.setattr(arrays, "crc32", lambda data: real(data) ^ os.urandom(1)[0] ^ 256)
    is_right(array)
    assert array._entry is None and len(caplog.records) <= 2


def test_a_part_that_is_not_what_its_manifest_lists_is_refused(role, tmp_path, cache):
    """Or a folder from elsewhere could say that its pictures are those of another run."""
    step_folder.finish(role.parent, Recipe("prepare", 1, {}, {}))
    other = write(tmp_path / "other/train", IMAGES[::-1])
    (other.parent / "manifest.json").write_bytes((role.parent / "manifest.json").read_bytes())
    with pytest.raises(UserError, match="part-00000.parquet holds other bytes than were written"):
        RoleArray(other)
    assert entries(cache) == []
    is_right(RoleArray(role))


# ---- room ----------------------------------------------------------------------------------------


def limit(monkeypatch, entries):
    monkeypatch.setenv("ADVERSA_CACHE_GB", str(entries * BYTES / 1e9))


def test_where_there_is_no_room_rows_come_from_parquet_and_one_line_says_so(
    role, cache, caplog, monkeypatch, decoded
):
    limit(monkeypatch, 0.5)
    table = ImageTable([role])
    assert np.array_equal(table.fetch(["r599", "r0", "r599"]), IMAGES[[599, 0, 599]])
    assert len(decoded) <= 2 + arrays.tables.ROW_GROUP and entries(cache) == []
    is_right(RoleArray(role))
    (told,) = {r.getMessage() for r in caplog.records}
    assert told.startswith(f"{role}: its images cannot be kept decoded in {cache} (")
    assert "read from Parquet" in told and "ADVERSA_CACHE_GB" in told and "\n" not in told
    assert len(caplog.records) == 1


def test_a_full_disk_likewise(role, cache, caplog, monkeypatch):
    full = SimpleNamespace(total=1 << 40, free=arrays.RESERVE + BYTES // 2)
    monkeypatch.setattr(arrays.shutil, "disk_usage", lambda _: full)
    is_right(RoleArray(role))
    assert "1.1 GB are free and the limit is 549.8 GB" in caplog.text and not entries(cache)


def test_a_disk_that_fills_up_while_it_is_written_likewise(role, cache, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(arrays.np.lib.format, "write_array_header_1_0", full)
    is_right(RoleArray(role))
    assert "(No space left on device)" in caplog.text and entries(cache) == []


def test_a_cache_that_cannot_be_made_likewise(role, tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADVERSA_CACHE", str(tmp_path / "file/cache"))
    is_right(RoleArray(role))
    assert "(Not a directory)" in caplog.text and len(caplog.records) == 1


def test_the_longest_unused_goes_first_and_one_in_use_stays(tmp_path, cache, monkeypatch, decoded):
    folders = [write(tmp_path / f"{i}", np.roll(IMAGES, i, axis=0)) for i in range(4)]
    limit(monkeypatch, 2.5)
    places = [RoleArray(f)._place for f in folders[:2]]
    for n, place in enumerate(places):
        os.utime(place / arrays.ENTRY, (n, n))
    used = RoleArray(folders[0])
    assert used._entry is not None
    RoleArray(folders[2])  # takes the place of the second
    assert [p.exists() for p in places] == [True, False]
    for f in folders[1:]:
        RoleArray(f)
        assert len(entries(cache)) == 2 and places[0].exists()
    assert np.array_equal(used.take(np.arange(ROWS)), IMAGES)


def test_what_was_not_used_for_a_month_goes_with_the_next(role, tmp_path, cache):
    places = []
    for days in (29, 31):
        places.append(RoleArray(write(tmp_path / f"{days}", np.roll(IMAGES, days, axis=0)))._place)
        os.utime(places[-1] / arrays.ENTRY, (time.time() - days * 86_400,) * 2)
    new = RoleArray(role)._place
    assert entries(cache) == sorted([places[0], new])


def test_nothing_is_evicted_for_what_would_not_fit_even_so(role, tmp_path, cache, monkeypatch):
    held = RoleArray(role)
    limit(monkeypatch, 1.5)
    RoleArray(write(tmp_path / "other", IMAGES[::-1]))
    assert entries(cache) == [held._place]


@pytest.mark.parametrize("limit", ["lots", "inf", "nan"])
def test_a_limit_that_is_no_number_is_said(role, monkeypatch, limit):
    monkeypatch.setenv("ADVERSA_CACHE_GB", limit)
    with pytest.raises(UserError, match=f"ADVERSA_CACHE_GB={limit}: give a number of gigabytes"):
        RoleArray(role)


def test_a_user_without_a_home_has_the_folder_that_is_named(monkeypatch):
    """In a container that runs as any number."""
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nothing known
    assert str(arrays.cache_folder()) == f"{os.environ['ADVERSA_CACHE']}/arrays"
    monkeypatch.delenv("ADVERSA_CACHE")
    assert str(arrays.cache_folder()) == "/.cache/adversa/arrays"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(arrays.cache_folder()) == "/x/adversa/arrays"


def test_an_entry_that_another_process_evicts_is_not_counted(role, cache, caplog, monkeypatch):
    """check_room looks without the cache's lock."""
    other = RoleArray(role)._place
    monkeypatch.setattr(arrays.Path, "glob", _gone(arrays.Path.glob, other))
    arrays.check_room(write(role.parent / "mine", IMAGES[::-1]), SIDE * SIDE * 3)
    assert not caplog.records


def _gone(glob, entry):
    """Path.glob; a folder's files are gone as soon as they were listed."""

    def found(path, pattern):
        listed = list(glob(path, pattern))
        if path == entry:
            for file in listed:
                file.unlink()
        return listed

    return found


def test_a_cache_that_may_not_be_looked_into_is_told_of(role, caplog, monkeypatch):
    def refused(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(type(arrays.cache_folder()), "exists", refused)
    arrays.check_room(role, SIDE * SIDE * 3)
    assert "(Permission denied)" in caplog.text


def test_a_command_on_ray_is_told_by_its_own_process(role, caplog, monkeypatch):
    arrays.check_room(role, SIDE * SIDE * 3)
    assert not caplog.records
    limit(monkeypatch, 0.5)
    arrays.check_room(role, SIDE * SIDE * 3)
    arrays.check_room(role, SIDE * SIDE * 3)
    assert len(caplog.records) == 1 and "read from Parquet" in caplog.text
