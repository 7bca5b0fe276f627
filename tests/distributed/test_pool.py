"""The pool's scheduling on real actors that fail in stated ways, and the Sampler without Ray."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from adversa import tables
from adversa.loop.engine import Part
from adversa.types import UserError

PARTS = [Part(i, 2, {}) for i in range(6)]


def write(part: Part, path: Path) -> int:
    tables.write_part(path, pa.table({"index": [part.index, part.index], "pid": [os.getpid()] * 2}))
    return 2


def make_plain():
    return write


def make_dying(marker: Path, times: int, part: int):
    """kill -9 of its own process while it does `part`, the first `times` times."""

    def work(p: Part, path: Path) -> int:
        if p.index == part and len(list(marker.glob("died-*"))) < times:
            (marker / f"died-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(p, path)

    return work


def make_refusing(part: int):
    def work(p: Part, path: Path) -> int:
        if p.index == part:
            raise UserError("sigma is out of range: 3; take less")
        return write(p, path)

    return work


def make_nothing():
    raise UserError("denoiser/ holds a damaged model; delete the folder and run the command again")


def map_parts(make, out, attempts=3):
    from adversa.distributed import pool

    states = []
    done = pool.map_parts(make, PARTS, out, states.append, 2, attempts, {"num_cpus": 1}, 1)
    return done, states


def test_a_sampler_is_a_plain_object(tmp_path):
    from adversa.distributed.pool import Sampler

    done = Sampler(make_plain, tmp_path, 1).do(PARTS[3])
    assert (done.index, done.rows) == (3, 2) and (tmp_path / "part-00003.parquet").exists()


@pytest.mark.ray
def test_every_part_is_done_once_and_progress_adds_up(ray_engine, tmp_path):
    done, states = map_parts(make_plain, tmp_path)
    assert [d.index for d in done] == [0, 1, 2, 3, 4, 5]
    assert len(tables.parts(tmp_path)) == 6
    assert [s["done"] for s in states] == [0, 2, 4, 6, 8, 10, 12] and {s["total"] for s in states} == {12}


@pytest.mark.ray
def test_parts_that_are_there_are_left_alone(ray_engine, tmp_path):
    for part in PARTS[:4]:
        write(part, tmp_path / tables.part_name(part.index))
    done, states = map_parts(make_plain, tmp_path)
    assert [d.index for d in done] == [4, 5]
    assert states[0]["done"] == 8


@pytest.mark.ray
def test_a_dead_actor_gives_its_part_to_another(ray_engine, tmp_path):
    done, _ = map_parts(partial(make_dying, tmp_path, 2, 1), tmp_path / "out")
    assert len(list(tmp_path.glob("died-*"))) == 2
    assert sorted(d.index for d in done) == [0, 1, 2, 3, 4, 5]
    assert tables.read(tmp_path / "out", ["index"])["index"].to_pylist() == [i for i in range(6) for _ in range(2)]


@pytest.mark.ray
def test_a_part_that_kills_every_actor_ends_the_step_after_its_tries_and_keeps_the_others(ray_engine, tmp_path):
    with pytest.raises(RuntimeError, match="part 0 failed 2 times"):
        map_parts(partial(make_dying, tmp_path, 99, 0), tmp_path / "out", attempts=2)
    assert len(list(tmp_path.glob("died-*"))) == 2
    assert not (tmp_path / "out" / "part-00000.parquet").exists()
    assert len(tables.parts(tmp_path / "out")) >= 1


@pytest.mark.ray
def test_what_the_user_can_mend_comes_back_as_itself_and_is_not_tried_again(ray_engine, tmp_path):
    with pytest.raises(UserError, match="^sigma is out of range: 3; take less$"):
        map_parts(partial(make_refusing, 0), tmp_path)


@pytest.mark.ray
def test_so_does_what_stops_the_work_from_being_made(ray_engine, tmp_path):
    with pytest.raises(UserError, match="^denoiser/ holds a damaged model; delete the folder and run the command again$"):
        map_parts(make_nothing, tmp_path)
    assert tables.parts(tmp_path) == []
