"""The pool on real actors that fail in stated ways; what needs no process is in
tests/engine/test_worker_pool.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from adversa.engine import worker_pool
from adversa.engine.tasks import Failed, Part, TaskStats
from adversa.storage import tables
from adversa.types import UserError

pytestmark = pytest.mark.ray

PARTS = [Part(i, 2, {}) for i in range(6)]


def write(part: Part, path: Path) -> TaskStats:
    faults = pa.array([part.skip.get(r) for r in range(part.rows)], pa.string())
    tables.write_part(
        path,
        pa.table(
            {"index": [part.index] * part.rows, "pid": [os.getpid()] * part.rows, "fault": faults}
        ),
    )
    return TaskStats(part.rows, 5 * part.rows)


def make_plain():
    return write


def make_slow(seconds: float):
    def work(p: Part, path: Path) -> TaskStats:
        time.sleep(seconds)
        return write(p, path)

    return work


def make_dying(marker: Path, times: int, part: int):
    """kill -9 of its own process while it does `part`, the first `times` times."""

    def work(p: Part, path: Path) -> TaskStats:
        if p.index == part and len(list(marker.glob("died-*"))) < times:
            (marker / f"died-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(p, path)

    return work


def make_poisoned(part: int, row: int):
    """kill -9 of its own process whenever it works on one row."""

    def work(p: Part, path: Path) -> TaskStats:
        if p.index == part and row not in p.skip:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(p, path)

    return work


def make_refusing(part: int):
    def work(p: Part, path: Path) -> TaskStats:
        if p.index == part:
            raise UserError("sigma is out of range: 3; take less")
        return write(p, path)

    return work


def make_nothing():
    raise UserError("denoiser/ holds a damaged model; delete the folder and run the command again")


def make_broken():
    raise ImportError("no module named flash_attention")


def make_affinity():
    def work(p: Part, path: Path) -> TaskStats:
        time.sleep(0.2)
        cores = sorted(os.sched_getaffinity(0))
        tables.write_part(path, pa.table({"cores": [cores], "pid": [os.getpid()]}))
        return TaskStats(1)

    return work


def map_parts(make, out, attempts=3, parts=PARTS, size=2, pinned=False):
    from adversa.distributed.pool import Actors

    states = []
    actors = Actors(make, out, {"num_cpus": 1}, None, pinned)
    shares = worker_pool.work_off(actors, parts, out, states.append, lambda: size, attempts)
    return shares, states


def test_every_part_is_done_once_and_progress_adds_up(ray_engine, tmp_path):
    shares, states = map_parts(make_plain, tmp_path)
    assert (
        sum(s.parts for s in shares) == 6
        and sum(s.rows for s in shares) == 12
        and sum(s.evaluations for s in shares) == 60
    )
    assert tables.read(tmp_path, ["index"])["index"].to_pylist() == [
        i for i in range(6) for _ in range(2)
    ]
    done = [s["done"] for s in states]
    assert (
        done[0] == 0
        and done[-1] == 12
        and done == sorted(done)
        and {s["total"] for s in states} == {12}
    )
    assert {s["unit"] for s in states} == {"image"} and sum(states[-1]["shares"].values()) == 12
    assert states[-1]["evaluations"] == 60 and states[-1]["failed"] == 0


def test_parts_that_are_there_are_left_alone(ray_engine, tmp_path):
    for part in PARTS[:4]:
        write(part, tmp_path / tables.part_name(part.index))
    shares, states = map_parts(make_plain, tmp_path)
    assert sum(s.parts for s in shares) == 2
    assert states[0]["done"] == 8
    pids = tables.read(tmp_path, ["pid"])["pid"].to_pylist()
    assert pids[:8] == [os.getpid()] * 8 and os.getpid() not in pids[8:]


def test_a_dead_actor_gives_its_part_to_another(ray_engine, tmp_path):
    shares, _ = map_parts(partial(make_dying, tmp_path, 2, 1), tmp_path / "out")
    assert len(list(tmp_path.glob("died-*"))) == 2
    assert sum(s.rows for s in shares) == 12 and not any(s.failed for s in shares)
    assert tables.read(tmp_path / "out", ["index"])["index"].to_pylist() == [
        i for i in range(6) for _ in range(2)
    ]


def test_a_part_that_kills_every_actor_ends_the_step_and_keeps_the_others(ray_engine, tmp_path):
    with pytest.raises(
        RuntimeError,
        match="every row of part 0 fails .row 0 of part 0, row 1 of part 0.; the last time: its "
        "worker died",
    ):
        map_parts(partial(make_dying, tmp_path, 99, 0), tmp_path / "out", attempts=2)
    assert (
        len(list(tmp_path.glob("died-*"))) == 2 + 2 * 2
    )  # twice as a whole, each row twice by itself
    assert not (tmp_path / "out" / "part-00000.parquet").exists()
    assert len(tables.parts(tmp_path / "out")) >= 1


def test_a_request_that_kills_every_actor_is_left_out_and_the_rest_done(ray_engine, tmp_path):
    parts = [Part(i, 4, {}) for i in range(8)]
    shares, states = map_parts(partial(make_poisoned, 3, 2), tmp_path, parts=parts, attempts=1)
    (failed,) = [f for s in shares for f in s.failed]
    assert (
        failed.name == "row 2 of part 3" and "died" in failed.reason and isinstance(failed, Failed)
    )
    faults = tables.read(tmp_path)["fault"].to_pylist()
    assert [i for i, fault in enumerate(faults) if fault] == [14] and faults[14] == failed.reason
    assert states[-1]["done"] == 32 and states[-1]["failed"] == 1


def test_what_the_user_can_mend_comes_back_as_itself_and_is_not_tried_again(ray_engine, tmp_path):
    with pytest.raises(UserError, match="^sigma is out of range: 3; take less$"):
        map_parts(partial(make_refusing, 0), tmp_path)


def test_so_does_what_stops_the_work_from_being_made(ray_engine, tmp_path):
    with pytest.raises(
        UserError,
        match="^denoiser/ holds a damaged model; delete the folder and run the command again$",
    ):
        map_parts(make_nothing, tmp_path)
    assert tables.parts(tmp_path) == []


def test_anything_else_that_does_is_tried_again(ray_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "STARTS", 2)
    with pytest.raises(
        RuntimeError,
        match="no worker comes up, each died 2 times .*ImportError: no module named "
        "flash_attention",
    ):
        map_parts(make_broken, tmp_path, size=1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform does not pin")
def test_pinned_actors_have_cores_of_their_own(ray_engine, tmp_path):
    usable = len(os.sched_getaffinity(0))
    map_parts(make_affinity, tmp_path, parts=[Part(i, 1) for i in range(8)], pinned=True)
    rows = tables.read(tmp_path).to_pylist()
    by_actor = {r["pid"]: tuple(r["cores"]) for r in rows}
    assert all(len(cores) == 1 for cores in by_actor.values()) and len(
        set(by_actor.values())
    ) == min(len(by_actor), usable)


def test_ctrl_c_ends_the_actors_and_keeps_what_is_committed(ray_engine, tmp_path):
    def stop():
        while not tables.parts(tmp_path):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where the tests were started in the background
    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            map_parts(partial(make_slow, 0.5), tmp_path, parts=[Part(i, 1) for i in range(200)])
    finally:
        signal.signal(signal.SIGINT, before)
    for _ in range(15):  # a kill takes a moment to arrive; a part takes half a second
        there = len(tables.parts(tmp_path))
        time.sleep(2)
        if len(tables.parts(tmp_path)) == there:
            break
    assert 1 <= there == len(tables.parts(tmp_path)) < 200


def come_and_go(out: Path) -> None:
    """Two samplers on two nodes; a third node comes, and takes one more; then one of the first goes
    for good, with its sampler.
    """
    from ray.cluster_utils import Cluster as Nodes

    from adversa.config import Cluster
    from adversa.distributed.engine import RayEngine

    worker_pool.LOOK_SECONDS = 1.0
    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, **small})
    second = nodes.add_node(num_cpus=1, **small)
    os.environ["RAY_ADDRESS"] = nodes.address
    engine = RayEngine(Cluster(), out.parent, 12)
    seen, enough, parts = [], out.parent / "enough", [Part(i, 1) for i in range(1500)]

    def work() -> None:  # nodes can be added from the main thread only
        try:
            engine.map_parts(
                partial(make_waiting, enough),
                parts,
                out,
                lambda state: seen.append(state["workers"]),
            )
        finally:
            seen.append(-1)

    def until(workers: int) -> None:
        while not seen or seen[-1] != workers:
            assert -1 not in seen[-1:], "the pool came to an end"
            time.sleep(0.1)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        until(2)
        nodes.add_node(num_cpus=1, **small)
        until(3)
        nodes.remove_node(second, allow_graceful=False)
        until(2)
        enough.touch()
        thread.join()
    finally:
        engine.close()
        nodes.shutdown()


def make_waiting(enough: Path):
    """Slow until there has been enough of it."""

    def work(p: Part, path: Path) -> TaskStats:
        if not enough.exists():
            time.sleep(0.5)
        return write(p, path)

    return work


def test_new_nodes_get_actors_and_a_node_that_goes_takes_only_its_own(tmp_path):
    """In a process of its own: the session's Ray has one node."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, __file__, str(out)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert tables.read(out, ["index"])["index"].to_pylist() == list(range(1500))


def by_gpus(out: Path) -> None:
    """Half a made-up GPU a sampler: a machine of two GPUs takes four, one of four GPUs and one CPU
    takes one, the head none.
    """
    import ray
    from ray.cluster_utils import Cluster as Nodes

    from adversa.config import Cluster
    from adversa.distributed.engine import RayEngine
    from adversa.engine import resources

    small = {"object_store_memory": 100 << 20, "include_dashboard": False}
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, **small})
    nodes.add_node(num_cpus=4, num_gpus=2, **small)
    nodes.add_node(num_cpus=1, num_gpus=4, **small)
    os.environ["RAY_ADDRESS"] = nodes.address
    engine = RayEngine(Cluster(gpus_per_sampler=0.5), out.parent, 12)
    try:
        assert engine.samplers() == 5
        engine.map_parts(
            partial(make_telling, out.parent, 5),
            [Part(i, 1) for i in range(100)],
            out,
            lambda state: None,
        )
        told = [path.read_text().split() for path in out.parent.glob("place-*")]
        machines = {n["NodeID"]: n["Resources"].get("GPU", 0) for n in ray.nodes()}
        here = sorted((int(machines[node]), gpu) for node, gpu in told)
        assert [gpus for gpus, _ in here] == [2, 2, 2, 2, 4], here
        assert [gpu for gpus, gpu in here if gpus == 2] == ["0", "0", "1", "1"], here
        asked = [
            resources.Node("", n["Resources"].get("CPU", 0), n["Resources"].get("GPU", 0))
            for n in ray.nodes()
        ]
        assert (
            sum(resources.samplers_on(n.cpus, n.gpus, engine.cluster, True) for n in asked) == 5
        )  # what `adversa plan` says
    finally:
        engine.close()
        nodes.shutdown()


def make_telling(folder: Path, samplers: int):
    """Says on which node and GPU it is; begins when all have."""
    import ray

    (folder / f"place-{os.getpid()}").write_text(
        f"{ray.get_runtime_context().get_node_id()} {os.environ['CUDA_VISIBLE_DEVICES']}"
    )
    while len(list(folder.glob("place-*"))) < samplers:
        time.sleep(0.1)
    return write


def test_samplers_are_placed_by_gpus_machine_by_machine(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "out"), "gpus"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert tables.read(tmp_path / "out", ["index"])["index"].to_pylist() == list(range(100))


if __name__ == "__main__":
    (by_gpus if sys.argv[2:] == ["gpus"] else come_and_go)(Path(sys.argv[1]))
