"""How many workers a cluster has room for. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from adversa.config import Cluster
from adversa.types import UserError


def engine_of(cpus, gpus=0, **cluster):
    from adversa.distributed.engine import RayEngine

    engine = object.__new__(RayEngine)
    engine.cpus, engine.gpus, engine.cluster, engine.embedded = cpus, gpus, Cluster(**cluster), True
    return engine


@pytest.mark.parametrize(
    ("asked", "samplers"),
    [
        (dict(cpus=4), 4),
        (dict(cpus=4, sampler_threads=2), 2),
        (dict(cpus=5, sampler_threads=2), 2),
        (dict(cpus=4, samplers=3), 3),
        (dict(cpus=4, samplers=9), 4),  # the fifth actor would wait for ever for a CPU
        (dict(cpus=4, samplers=4, sampler_threads=2), 2),
        (dict(cpus=16, gpus=2), 2),
        (dict(cpus=16, gpus=2, samplers=8), 2),
        (dict(cpus=16, gpus=2, samplers=1), 1),
        (dict(cpus=3, gpus=8), 3),
        (dict(cpus=1, gpus=1, sampler_threads=8), 1),  # threads are a matter of CPUs
        (dict(cpus=16, gpus=2, gpus_per_sampler=0.5), 4),
        (dict(cpus=16, gpus=2, gpus_per_sampler=0.3), 6),  # three on each: none lies on two GPUs
        (dict(cpus=16, gpus=5, gpus_per_sampler=2), 2),
        (dict(cpus=3, gpus=2, gpus_per_sampler=0.1), 3),
    ],
)
def test_no_more_samplers_than_fit(monkeypatch, asked, samplers):
    from adversa.distributed import engine as module

    engine, node = engine_of(**asked), {"Alive": True}
    monkeypatch.setattr(module.ray, "nodes", lambda: [node])
    assert engine.samplers() == engine._samplers_wanted() == samplers
    node["Alive"] = False
    with pytest.raises(
        UserError,
        match="^Ray on this machine has died; run the same command again, finished parts are kept$",
    ):
        engine._samplers_wanted()


@pytest.mark.parametrize(
    ("asked", "nodes", "room", "wanted"),
    [
        (dict(), [(4, 0), (2, 0)], 6, 6),
        (
            dict(sampler_threads=3),
            [(4, 0), (2, 0), (3, 0)],
            2,
            2,
        ),  # not 9 // 3: none lies on two nodes
        (dict(samplers=16), [(4, 0)], 4, 16),  # the others join when nodes come
        (dict(gpus=1), [(8, 0), (8, 1), (1, 4)], 2, 2),
        (dict(gpus=1, gpus_per_sampler=2), [(8, 1), (8, 3)], 1, 1),
    ],
)
def test_a_cluster_is_looked_at_node_by_node_and_as_it_is_now(
    monkeypatch, asked, nodes, room, wanted
):
    from adversa.distributed import engine as module

    table = [{"Alive": True, "Resources": {"CPU": float(c), "GPU": float(g)}} for c, g in nodes]
    monkeypatch.setattr(
        module.ray, "nodes", lambda: [*table, {"Alive": False, "Resources": {"CPU": 64.0}}]
    )
    engine = engine_of(99, **asked)
    engine.embedded = False
    assert (engine.samplers(), engine._samplers_wanted()) == (room, wanted)


def test_a_share_of_gpus_that_cannot_be_had_is_refused(started):
    with pytest.raises(
        UserError, match="cluster.gpus_per_sampler 2: there are 1 GPUs; take at most so many"
    ):
        started({"CPU": 4.0, "GPU": 1.0}, gpus_per_sampler=2)
    with pytest.raises(
        ValueError, match="gpus_per_sampler 1.5 must be a whole number, or at most 1"
    ):
        Cluster(gpus_per_sampler=1.5)


def test_tasks_share_a_gpu_only_where_they_hold_a_model():
    assert engine_of(4).tasks() == engine_of(4).tasks(model=True) == 4
    assert engine_of(16, gpus=2).tasks() == 16 and engine_of(16, gpus=2).tasks(model=True) == 8


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "resources"),
    [
        (4, 0, 3, {"CPU": 1}),
        (2, 0, 1, {"CPU": 1}),
        (2, 0, 2, {"CPU": 0.5}),
        (4, 0, 4, {"CPU": 0.5}),
        (4, 0, 7, {"CPU": 0.25}),  # on a cluster, which may grow
        (2, 0, 3, {"CPU": 0.25}),
        (1, 0, 1, {"memory": 1}),  # a group that asks for nothing is refused
        (2, 2, 2, {"CPU": 0.5, "GPU": 1}),
    ],
)
def test_a_training_leaves_a_cpu_for_the_stream_that_feeds_it(cpus, gpus, workers, resources):
    engine = engine_of(cpus, gpus, training_workers=workers)
    engine.embedded = workers <= cpus
    assert engine.group().resources == resources and workers * resources.get("CPU", 0) <= cpus - 1
    if share := resources.get(
        "CPU"
    ):  # as Ray's elastic policy counts how many workers there is room for
        assert workers * share // share == workers


def test_a_training_that_may_shrink_has_a_least_and_a_most():
    engine = engine_of(4, training_workers=3, training_workers_min=2)
    engine.embedded = False
    assert engine.group().workers == (2, 3)


@pytest.mark.parametrize(("cpus", "gpus", "what"), [(8, 2, "2 GPUs"), (2, 0, "2 CPUs")])
def test_more_workers_than_an_embedded_ray_has_room_for_are_refused(cpus, gpus, what):
    engine = engine_of(cpus, gpus, training_workers=3)
    engine.embedded = True
    with pytest.raises(
        UserError, match=f"training_workers 3: there are {what}; take at most so many"
    ):
        engine.group()
    engine.embedded = False  # a cluster may grow
    assert engine.group().workers == (3, 3)


@pytest.fixture
def started(monkeypatch):
    """RayEngine on a cluster that is only said to be there."""
    from adversa.distributed import engine

    def start(resources, **cluster):
        monkeypatch.setattr(engine.start, "start", lambda *_: None)
        monkeypatch.setattr(engine.stream, "quiet", lambda *_: None)
        monkeypatch.setattr(engine.ray, "cluster_resources", lambda: resources)
        return engine.RayEngine(Cluster(**cluster), Path("run"), 3072)

    return start


def test_a_sampler_that_asks_for_more_threads_than_cpus_is_refused(started):
    with pytest.raises(
        UserError, match="cluster.sampler_threads 4: there are 2 CPUs; take at most so many"
    ):
        started({"CPU": 2.0}, sampler_threads=4)
    assert started({"CPU": 4.0}, sampler_threads=4).samplers() == 1
    assert started({"CPU": 2.0, "GPU": 1.0}, sampler_threads=4).samplers() == 1


@pytest.mark.parametrize(("deaths", "launches"), [(0, 1), (2, 3), (3, 3)])
def test_a_launch_whose_controller_dies_is_made_anew_with_what_is_left(
    started, monkeypatch, deaths, launches
):
    from adversa.distributed import engine as module

    engine, asked = started({"CPU": 2.0}, training_attempts=3), []
    feed = SimpleNamespace(folders=(), latent_std=None)
    jobs = [SimpleNamespace(name=name, feed=feed) for name in "abcd"]
    left, fourth = jobs[:3], jobs[3]

    def fit(todo, *_):
        asked.append(list(todo))
        if len(asked) <= deaths:
            left.pop(0)  # finished before the death
            raise module.training.ControllerLost("its node died")
        left.clear()
        return {}

    monkeypatch.setattr(module, "unfinished", lambda jobs, handle: list(left))
    monkeypatch.setattr(module.training, "fit", fit)
    engine.fit(left) if deaths < 3 else left.append(fourth)
    if deaths == 3:
        with pytest.raises(
            UserError,
            match=r"Ray Train was lost 3 times \(its node died\); run the same command again",
        ):
            engine.fit(left)
    assert len(asked) == launches and asked[0][0].name == "a"
    assert deaths == 0 or asked[1][0].name == "b"


def test_a_head_that_is_down_is_told_at_once(monkeypatch):
    import socket

    from adversa.distributed import start

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{s.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    monkeypatch.setattr(start.ray, "is_initialized", lambda: False)
    with pytest.raises(
        UserError,
        match=rf"no Ray cluster answers at RAY_ADDRESS={nobody} \(.*refused.*\); see whether",
    ):
        start.start(Cluster(), False)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_whose_name_is_too_long_is_named(monkeypatch, name):
    from adversa.distributed import start

    def init(**asked):
        raise OSError("AF_UNIX path length cannot exceed 107 bytes: /tmp/x/plasma_store")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, "/tmp/long")
    monkeypatch.setattr(start.ray, "init", init)
    with pytest.raises(UserError, match=rf"; set {name} \(now /tmp/long\) to a folder"):
        start.start(Cluster(), False)
