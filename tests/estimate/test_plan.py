"""A plan's counts are those of a run that was done; what cannot fit is refused by value, cause and
fix. No Ray.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adversa.config import Cluster
from adversa.engine import resources
from adversa.engine.resources import Node
from adversa.estimate import measure, plan
from adversa.estimate.measure import Enough, Measured, Timing
from adversa.estimate.memory import of_rows, peak
from adversa.pipeline.stages import judges, stages, trained
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.storage.path import place
from adversa.types import UserError

GIB = 1 << 30


def manifest(folder):
    return files.read_json(folder / step_folder.MANIFEST)


def amounts(config, run, command, number=0):
    """kind of work to its amount in a stage."""
    stage = next(s for s in stages(config, run) if (s.command, s.round) == (command, number))
    found = {}
    for work in plan.work_of(stage, config, run, plan.roles(config, 0, run)):
        found[work.kind, work.lanes] = found.get((work.kind, work.lanes), 0) + work.amount
    return found


# ---- how much ------------------------------------------------------------------------------------


def test_the_amounts_of_a_stage_are_those_of_a_run_that_was_done(finished):
    config, run = finished
    assert (
        amounts(config, run, "prepare")["read", "tasks"]
        == manifest(run.data)["rows"]
        == plan.images_of(config, run)
    )
    assert (
        amounts(config, run, "mine", 1)["score", "tasks"]
        == manifest(run.round(1, "scores"))["rows"]
    )
    assert (
        amounts(config, run, "evaluate", 1)["score", "tasks"]
        == manifest(run.round(1, "evaluate"))["rows"]
    )
    assert amounts(config, run, "test")["score", "tasks"] == manifest(run.test)["rows"]
    first, later = amounts(config, run, "train"), amounts(config, run, "evaluate", 1)
    steps = {
        n: sum(manifest(f)["metrics"]["steps"] for f in trained(config, run, n)) for n in (0, 1)
    }
    assert (first["classifier", "workers"], later["classifier", "workers"]) == (steps[0], steps[1])
    assert first["judge", "workers"] == sum(
        manifest(f)["metrics"]["steps"] for f in judges(config, run) if "fold" in f.name
    )
    assert first["denoiser", "workers"] == manifest(run.denoiser)["metrics"]["steps"]


def test_what_mining_finds_is_bounded(finished):
    config, run = finished
    done, mined = manifest(run.round(1, "synthetic")), plan.roles(config, 0, run)["mine"]
    assert 0 < done["rows"] <= plan.painted(config, mined)
    stage = next(s for s in stages(config, run) if s.command == "generate")
    works = plan.work_of(stage, config, run, plan.roles(config, 0, run))
    assert all(w.bound for w in works) and done["evaluations"] <= sum(w.amount for w in works)
    few = config.model_copy(update={"mine": config.mine.model_copy(update={"budget": 10**6})})
    assert (
        plan.painted(few, mined) == 2 * mined * config.generate.per_case
    )  # no more cases than images


def test_an_image_takes_the_evaluations_that_it_took(finished):
    config, run = finished
    done = manifest(run.round(1, "synthetic"))
    without_tails = config.model_copy(
        update={"generate": config.generate.model_copy(update={"part_size": 10**9})}
    )
    each = [plan.evaluations(without_tails, arm) for arm in ("unguided", "guided")]
    assert done["evaluations"] == pytest.approx(done["rows"] / 2 * sum(each), rel=1e-6)


def test_a_run_that_paints_nothing_has_no_judge_and_no_denoiser(tiny, tmp_path):
    config, run = tiny(mix={"arms": ["real", "replay"]}), RunDir(tmp_path / "run")
    kinds = {
        w.kind
        for s in stages(config, run)
        for w in plan.work_of(s, config, run, plan.roles(config, 300))
    }
    assert kinds == {"read", "classifier", "score"} == set(measure.kinds_of(config))


def test_every_kind_of_work_is_measured(tiny, tmp_path):
    run = RunDir(tmp_path / "run")
    latent = {"kind": "tiny"}
    for config in (
        tiny(),
        tiny(codec=latent),
        tiny(generate={"adaptive": True}),
        tiny(rounds=2, evaluate={"seeds": 2}),
    ):
        kinds = {
            w.kind
            for s in stages(config, run)
            for w in plan.work_of(s, config, run, plan.roles(config, 300))
        }
        assert kinds == set(measure.kinds_of(config))


# ---- where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "asks", "count", "placed"),
    [
        ([(4, 0), (8, 0)], {"CPU": 1}, 3, [0, 3]),  # the roomier one first, and filled
        ([(4, 0), (2, 0)], {"CPU": 1}, 5, [4, 1]),
        ([(1, 0), (2, 0)], {"CPU": 1}, 9, [1, 2]),  # the others wait
        ([(64, 0), (8, 2), (8, 4)], {"CPU": 1, "GPU": 1}, 5, [0, 1, 4]),
        ([(2, 0)], {"CPU": 0.5}, 2, [2]),
        ([(1, 0)], {"memory": 1}, 1, [1]),
    ],
)
def test_workers_are_packed(nodes, asks, count, placed):
    assert resources.workers_on([Node("n", c, g) for c, g in nodes], asks, count) == placed


def test_a_placement_says_who_waits(tiny):
    nodes = [Node("a", 8, 2, gpu_type="T4"), Node("b", 4, 0)]
    at = plan.placement(
        nodes, tiny(cluster={"training_workers": 3, "samplers": 8, "gpus_per_sampler": 0.5})
    )
    assert (at.workers, at.samplers, at.waiting) == ((2, 0), (4, 0), (1, 4))
    assert (at.tasks, at.model_tasks) == (12, 8)


# ---- how long ------------------------------------------------------------------------------------


def measured(seconds, kinds=tuple(measure.SHARES)):
    return Measured(
        {k: Timing(seconds, seconds / 2, 2 * seconds, 9) for k in kinds}, {}, "cpu", None, 1.0, 20.0
    )


def test_time_is_work_over_lanes_and_a_trainings_devices_are_its_workers(tiny, tmp_path):
    config, run = tiny(cluster={"training_workers": 2}), RunDir(tmp_path / "run")
    node, role = Node("n", 4), plan.roles(tiny(), 300)
    at = plan.placement([node], config)
    found = {
        c.stage.command: c for c in plan.costs(config, run, role, at, {node.kind: measured(0.5)})
    }
    start = plan.STARTS["generate"]
    assert found["generate"].seconds.mid == pytest.approx(
        found["generate"].device_seconds.mid / 4 + start
    )
    assert found["train"].seconds.mid == pytest.approx(
        found["train"].device_seconds.mid / 2 + plan.STARTS["train"]
    )
    assert (
        found["generate"].device_seconds.low == 0 < found["train"].device_seconds.low
    )  # there may be no hard case
    steps = 24 + 2 * 8 + 12
    looks = (2 + 2 * 1) * role["select"]
    assert found["train"].device_seconds.mid == pytest.approx((steps + looks) * 0.5 * 2)
    wall, _ = plan.total(list(found.values()))
    assert (
        wall.mid == pytest.approx(sum(c.seconds.mid for c in found.values()))
        and wall.low < wall.mid < wall.high
    )


def test_the_range_reaches_further_up_where_the_work_shares_cores_with_ray(tiny, tmp_path):
    config, run, node = tiny(), RunDir(tmp_path / "run"), Node("n", 4)
    at = plan.placement([node], config)
    for device, above in (("cpu", 2.2), ("H100", 1.35)):
        known = {node.kind: replace(measured(0.5), device=device, start=0.0)}
        found = {
            c.stage.command: c.seconds
            for c in plan.costs(config, run, plan.roles(config, 300), at, known)
        }
        assert found["train"].high == pytest.approx(
            found["train"].mid * 2 * above
        )  # the slowest step took twice the median
        assert found["train"].low == pytest.approx(found["train"].mid / 2 / 1.35)


def test_a_training_waits_for_the_slowest_and_samplers_add_up(tiny, tmp_path):
    config, run = tiny(cluster={"training_workers": 6}), RunDir(tmp_path / "run")
    fast, slow = Node("fast", 4), Node("slow", 3)
    at, role = plan.placement([fast, slow], config), plan.roles(tiny(), 300)
    both = plan.costs(config, run, role, at, {fast.kind: measured(0.1), slow.kind: measured(0.4)})
    alone = plan.costs(config, run, role, at, {fast.kind: measured(0.4), slow.kind: measured(0.4)})
    found, worst = ({c.stage.command: c.device_seconds.mid for c in x} for x in (both, alone))
    assert found["train"] == pytest.approx(worst["train"])
    assert found["generate"] / worst["generate"] == pytest.approx(7 / (4 / 0.1 + 3 / 0.4) / 0.4)


def test_what_is_finished_costs_nothing(finished):
    config, run = finished
    at = plan.placement([Node("n", 2)], config)
    found = plan.costs(
        config, run, plan.roles(config, 0, run), at, {at.nodes[0].kind: measured(1.0)}
    )
    assert all(c.done for c in found) and plan.total(found)[0].high == 0


# ---- what cannot fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "grows", "asked", "said"),
    [
        (
            [(2, 0)],
            False,
            dict(training_workers=3),
            ["cluster.training_workers 3: there are 2 CPUs; take at most so many"],
        ),
        (
            [(8, 2)],
            False,
            dict(training_workers=3),
            ["cluster.training_workers 3: there are 2 GPUs; take at most so many"],
        ),
        ([(2, 0)], True, dict(training_workers=3, samplers=9), []),  # they wait for machines
        (
            [(2, 0)],
            False,
            dict(samplers=3),
            ["cluster.samplers 3: there is room for 2; take at most so many, or null"],
        ),
        (
            [(4, 0)],
            False,
            dict(samplers=4, sampler_threads=2),
            ["cluster.samplers 4: there is room for 2; take at most so many, or null"],
        ),
        (
            [(4, 0), (2, 0)],
            True,
            dict(sampler_threads=5),
            ["cluster.sampler_threads 5: no machine has more than 4 CPUs; take at most so many"],
        ),
        ([(4, 1)], False, dict(sampler_threads=8), []),  # threads are a matter of CPUs
        (
            [(4, 1)],
            False,
            dict(gpus_per_sampler=2),
            ["cluster.gpus_per_sampler 2: there are 1 GPUs; take at most so many"],
        ),
        ([(2, 0)], False, dict(), []),
    ],
)
def test_sizes_that_cannot_be_had_are_told_of(nodes, grows, asked, said):
    assert resources.faults([Node("n", c, g) for c, g in nodes], Cluster(**asked), grows) == said


def test_every_fault_is_told_at_once():
    found = resources.faults([Node("n", 2)], Cluster(sampler_threads=4, training_workers=3), False)
    with pytest.raises(
        UserError, match="^cluster.sampler_threads 4: .*; cluster.training_workers 3: "
    ):
        resources.refuse(found)
    resources.refuse([])


def test_a_disk_too_small_for_the_images_is_told_of(tiny, tmp_path, monkeypatch):
    config = tiny(rounds=3)
    needed = plan.disk_bytes(config, 300)
    assert (
        needed == (2 * 300 + 3 * 2 * 12 * 2) * 32 * 32 * 2
    )  # real ones twice; rounds, arms, cases, images a case
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert plan.disk_fault(config, tmp_path / "not" / "yet", 300) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    assert (
        "the disk has 1 MiB free, the run's images take about 1 MiB; free some, or take another"
        in plan.disk_fault(config, tmp_path / "run", 300)
    )
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "part").write_bytes(b"12")
    assert (
        plan.disk_fault(config, tmp_path / "run", 300) is None
    )  # what is there need not be written again
    assert plan.disk_fault(config, place("s3://bucket/run?region=x"), 300) is None


def test_what_takes_more_than_a_gpu_has_is_told_of(tiny):
    node = Node("n", 8, 2, gpu_type="T4", gpu_memory=16 * GIB)
    needs = {"classifier": 2 * GIB, "denoiser": 20 * GIB, "paint": 9 * GIB}
    config = tiny(cluster={"gpus_per_sampler": 0.5})
    assert plan.memory_faults(needs, config, [node]) == [
        "a training of the denoiser: about 20.0 GiB of memory, a GPU has 16.0 GiB; lower "
        "denoiser.batch_size, or a larger GPU",
        "2 samplers a GPU: about 18.0 GiB of memory, a GPU has 16.0 GiB; lower "
        "generate.batch_size or raise "
        "cluster.gpus_per_sampler, or a larger GPU",
    ]
    assert plan.memory_faults(needs, config, [Node("n", 8, 2)]) == []  # not known
    assert plan.memory_faults(needs, config, [Node("n", 8, 0, gpu_memory=1)]) == []


def test_networks_are_weighed_without_memory(tiny, tmp_path):
    config, run = tiny(), RunDir(tmp_path / "run")
    found = plan.least_memory(config)
    assert set(found) == {"classifier", "judge", "denoiser", "paint"}
    assert found["denoiser"] - plan.CONTEXT == plan.COPIES * (found["paint"] - plan.CONTEXT)
    plan.check(config, run, [])
    with pytest.raises(
        UserError, match="at least .* of memory, a GPU has 1 MiB; take a smaller network"
    ):
        plan.check(config, run, [Node("n", 8, 1, gpu_memory=1 << 20)])


# ---- the measurement -----------------------------------------------------------------------------


def test_memory_is_counted_at_its_height():
    def work():
        a = torch.zeros(1000)
        b = a + 1  # 8 kB are held
        del a
        c = b * 2
        del b, c

    assert peak(work) == 8000
    assert of_rows(100, 140, 2, 4, 10) == 260 and of_rows(100, 90, 2, 4, 10) == 100


def test_rows_grow_while_there_is_time_and_the_rest_is_scaled():
    for a_row, whole in ((0.0, True), (0.02, False)):
        clocked, seen = measure.Clocked(64, 0.3, lambda rows: {"rows": rows}), []
        with pytest.raises(Enough):
            for batch in clocked:
                seen.append(batch["rows"])
                time.sleep(a_row * batch["rows"])
        found = clocked.timing()
        assert found.scaled is not whole and seen[0] == measure.FIRST and len(clocked.steps) >= 1
        assert (seen[-1] == 64) is whole
        if not whole:
            assert found.seconds >= 0.02 * 64  # as if of all rows


def test_each_kind_of_work_is_really_done(tiny, tmp_path):
    config = tiny(
        generate={"strategy": "inout", "hardness": 1.0},
        codec={"kind": "tiny", "width": 8},
        denoiser={"patch": 1},
    )
    found, bench = measure.measure(config, 1, 0.2), measure.Bench(config, 1, tmp_path)
    found = replace(
        found, memory=bench.memory(measure.kinds_of(config))
    )  # however busy the machine is
    assert bench.memory(measure.kinds_of(config), until=0.0) == {}
    measure.check_kinds(found, config)
    assert set(found.timings) == set(measure.SHARES) and all(
        t.fast <= t.seconds <= t.slow for t in found.timings.values()
    )
    assert set(found.memory) == {"classifier", "judge", "denoiser", "codec", "paint"}
    least = plan.least_memory(
        config
    )  # weights, gradients, AdamW's state and the average, and a step's tensors beside them
    assert all(found.memory[k] > least[k] - plan.CONTEXT > 0 for k in least)
    with pytest.raises(UserError, match="nothing was measured of paint"):
        measure.check_kinds(measured(1.0, tuple(k for k in measure.SHARES if k != "paint")), tiny())
