"""A plan's counts are those of a run that was done; what cannot fit is refused by value, cause and
fix. No Ray.
"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adversa.config import Cluster
from adversa.engine import resources
from adversa.engine.resources import Node
from adversa.estimate import measure, memory, plan
from adversa.estimate.measure import STEPS, Measured, Steps
from adversa.pipeline.folders import trained, verifiers
from adversa.pipeline.stages import stages
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.storage.path import storage_path
from adversa.types import UserError

GIB = 1 << 30


def manifest(folder):
    return files.read_json(folder / step_folder.MANIFEST)


def works(config, run):
    role = plan.roles(config, run)
    return {(s.name, s.round): plan.work_of(s, config, run, role) for s in stages(config, run)}


def amounts(config, run, command, number=0):
    """(kind of work, who does it) to its amount in a stage."""
    found = {}
    for work in works(config, run)[command, number]:
        found[work.kind, work.by] = found.get((work.kind, work.by), 0) + work.amount
    return found


KINDS = {
    "read",
    "classifier",
    "score",
    "verifier",
    "verify",
    "codec",
    "encode",
    "denoiser",
    "generate",
    "compare",
}


def measurable(config, folder):
    return {
        kind.name
        for kind in (*measure.trained(config, folder, 1), *measure.applied(config, folder))
    }


# ---- how much ------------------------------------------------------------------------------------


def test_the_amounts_of_a_stage_are_those_of_a_run_that_was_done(finished):
    config, run = finished
    assert amounts(config, run, "prepare")["read", "reading"] == manifest(run.data)["rows"]
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
    folds = [f for f in verifiers(config, run) if "fold" in f.name]
    assert first["verifier", "workers"] == sum(manifest(f)["metrics"]["steps"] for f in folds)
    assert first["denoiser", "workers"] == manifest(run.denoiser)["metrics"]["steps"]


def test_the_images_of_a_run_are_counted_or_looked_up_or_bounded(finished, tiny, tmp_path):
    config, run = finished
    assert sum(plan.roles(config, run).values()) == manifest(run.data)["rows"]
    fresh = RunDir(tmp_path / "run")
    assert sum(plan.roles(tiny(), fresh).values()) == 300
    source = tiny(data={"source": "folder", "path": str(tmp_path / "nowhere")})
    assert plan.roles(source, fresh, look=False) == {"train": 0, "mine": 12, "select": 0, "test": 0}


def test_what_mining_finds_is_bounded(finished):
    config, run = finished
    done, mined = manifest(run.round(1, "synthetic")), plan.roles(config, run)["mine"]
    assert 0 < done["rows"] <= plan.generated(config, mined)
    found = works(config, run)["generate", 1]
    assert all(w.bound for w in found) and done["evaluations"] <= sum(w.amount for w in found)
    few = config.model_copy(update={"mine": config.mine.model_copy(update={"budget": 10**6})})
    assert (
        plan.generated(few, mined) == 2 * mined * config.generate.per_case
    )  # no more cases than images


def test_an_image_takes_the_evaluations_that_it_took(finished):
    config, run = finished
    done = manifest(run.round(1, "synthetic"))
    without_tails = config.model_copy(
        update={"generate": config.generate.model_copy(update={"part_size": 10**9})}
    )
    each = [plan.evaluations(without_tails, arm) for arm in ("unguided", "guided")]
    assert done["evaluations"] == pytest.approx(done["rows"] / 2 * sum(each), rel=1e-6)


def test_a_run_that_generates_nothing_has_no_verifier_and_no_denoiser(tiny, tmp_path):
    config = tiny(mix={"arms": ["real", "replay"]})
    kinds = {w.kind for found in works(config, RunDir(tmp_path / "run")).values() for w in found}
    assert kinds == {"read", "classifier", "score"} == measurable(config, tmp_path)


def test_every_kind_of_work_is_measured(tiny, tmp_path):
    latent = {"kind": "tiny"}
    for config in (
        tiny(),
        tiny(codec=latent),
        tiny(generate={"adaptive": True}),
        tiny(rounds=2, evaluate={"seeds": 2}),
    ):
        kinds = {
            w.kind for found in works(config, RunDir(tmp_path / "run")).values() for w in found
        }
        assert kinds == measurable(config, tmp_path)


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
    assert (at.shares["workers"], at.shares["samplers"], at.waiting) == ([2, 0], [4, 0], (1, 4))
    assert (at.shares["reading"], at.shares["tasks"]) == ([8, 4], [8, 0])  # models wait for GPUs


@pytest.mark.parametrize(
    ("nodes", "asked", "trials"),
    [
        ([(4, 0)], {}, 4),
        ([(4, 0)], {"training_threads": None}, 1),
        ([(8, 2)], {}, 2),
        ([(4, 0)], {"training_workers": 2}, 1),
    ],
)
def test_trials_at_a_time_are_those_that_do_not_slow_each_other(tiny, nodes, asked, trials):
    at = plan.placement([Node("n", c, g) for c, g in nodes], tiny(cluster=asked))
    assert at.shares["trials"] == [trials * n for n in at.shares["workers"]]


# ---- how long ------------------------------------------------------------------------------------


def measured(seconds, start=1.0):
    return Measured(dict.fromkeys(KINDS, seconds), {}, None, start, 20.0)


def costs(config, run, nodes, found):
    return plan.costs(config, run, plan.roles(config, run), plan.placement(nodes, config), found)


def test_time_is_work_over_devices_and_a_trainings_devices_are_its_workers(tiny, tmp_path):
    config, run, node = (
        tiny(cluster={"training_workers": 2}),
        RunDir(tmp_path / "run"),
        Node("n", 4),
    )
    every = costs(config, run, [node], {node.kind: measured(0.5)})
    found = {c.stage: c for c in every}
    generate, train = found["round 1: generate"], found["train"]
    assert generate.seconds == pytest.approx(generate.device_seconds / 4 + 1)  # start
    assert train.seconds == pytest.approx(train.device_seconds / 2 + 1)
    steps, looks = 24 + 2 * 8 + 12, (2 + 2 * 1) * plan.roles(config, run)["select"]
    assert train.device_seconds == pytest.approx((steps + looks) * 0.5 * 2)


def test_a_training_waits_for_the_slowest_and_samplers_add_up(tiny, tmp_path):
    config, run = tiny(cluster={"training_workers": 6}), RunDir(tmp_path / "run")
    fast, slow = Node("fast", 4), Node("slow", 3)
    both = costs(config, run, [fast, slow], {fast.kind: measured(0.1), slow.kind: measured(0.4)})
    alone = costs(config, run, [fast, slow], {fast.kind: measured(0.4), slow.kind: measured(0.4)})
    found, worst = ({c.stage: c.device_seconds for c in x} for x in (both, alone))
    assert found["train"] == worst["train"]
    ratio = found["round 1: generate"] / worst["round 1: generate"]
    assert ratio == pytest.approx(7 / (4 / 0.1 + 3 / 0.4) / 0.4)


def test_what_is_finished_costs_nothing(finished):
    config, run = finished
    node = Node("n", 2)
    found = costs(config, run, [node], {node.kind: measured(1.0)})
    assert all(c.done and c.seconds == c.device_seconds == 0 for c in found)


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
    role = plan.roles(config, RunDir(tmp_path / "run"))
    needed = memory.disk_bytes(config, role)
    assert (
        needed == (2 * 300 + 3 * 2 * 12 * 2) * 32 * 32 * 2
    )  # real ones twice; rounds, arms, cases, images a case
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert memory.disk_faults(config, tmp_path / "not" / "yet", role) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    assert memory.disk_faults(config, tmp_path / "run", role) == [
        f"--run-dir {tmp_path}/run: the disk has 1 MiB free, the run's images take about 1 "
        "MiB; free some, or take another"
    ]
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "part").write_bytes(b"12")
    assert (
        memory.disk_faults(config, tmp_path / "run", role) == []
    )  # what is there need not be written again
    assert memory.disk_faults(config, storage_path("s3://bucket/run?region=x"), role) == []


def test_what_takes_more_than_a_gpu_has_is_told_of(tiny):
    node = Node("n", 8, 2, gpu_type="T4", gpu_memory=16 * GIB)
    needs = {"classifier": 2 * GIB, "verifier": 17 * GIB, "denoiser": 20 * GIB, "generate": 9 * GIB}
    config = tiny(cluster={"gpus_per_sampler": 0.5})
    assert memory.faults(needs, config, [node]) == [
        "a training of the verifier: about 17.0 GiB of memory, a GPU has 16.0 GiB; lower "
        "curate.judge.batch_size, or a larger GPU",
        "a training of the denoiser: about 20.0 GiB of memory, a GPU has 16.0 GiB; lower "
        "denoiser.batch_size, or a larger GPU",
        "2 samplers a GPU: about 18.0 GiB of memory, a GPU has 16.0 GiB; lower "
        "generate.batch_size or raise "
        "cluster.gpus_per_sampler, or a larger GPU",
    ]
    assert memory.faults(needs, config, [Node("n", 8, 2)]) == []  # not known
    assert memory.faults(needs, config, [Node("n", 8, 0, gpu_memory=1)]) == []


def test_networks_are_weighed_without_memory(tiny, tmp_path):
    config, run = tiny(), RunDir(tmp_path / "run")
    found = memory.least(config)
    assert set(found) == {"classifier", "verifier", "denoiser", "generate"}
    assert found["denoiser"] - memory.CONTEXT == memory.COPIES * (
        found["generate"] - memory.CONTEXT
    )
    memory.check(config, run, [])
    with pytest.raises(
        UserError, match="at least .* of memory, a GPU has 1 MiB; take a smaller network"
    ):
        memory.check(config, run, [Node("n", 8, 1, gpu_memory=1 << 20)])


# ---- the measurement -----------------------------------------------------------------------------


def spent(steps, *, a_row=0.0, stalls=(), clock=None):
    """Do steps that take so long a row on a clock of their own, and a second more where something
    else comes between.
    """
    for i, rows in enumerate(steps):
        clock[0] += a_row * rows + (i in stalls)
        clock[1] += a_row * rows


@pytest.fixture
def clock(monkeypatch):
    """[seconds by the clock, seconds of this process]"""
    now = [0.0, 0.0]
    monkeypatch.setattr(measure, "_now", lambda: np.array(now))
    return now


def test_a_step_has_as_many_rows_as_there_is_time_for(clock):
    for a_row, rows in ((0.001, 64), (0.01, 16), (1.0, 4)):
        steps = Steps(64, (STEPS + 1) * 0.16)
        spent(steps, a_row=a_row, clock=clock)
        assert steps.rows == rows and len(steps.took) == STEPS
        assert steps.seconds == pytest.approx(a_row * rows)


def test_a_slow_step_is_not_drawn_on(clock):
    """One that something came between moves no median; where it came between all, the process's own
    seconds count.
    """
    steps = Steps(8, 100.0)
    spent(steps, a_row=0.01, stalls=[5], clock=clock)
    assert steps.seconds == pytest.approx(0.08)
    steps = Steps(8, 100.0)
    spent(steps, a_row=0.01, stalls=range(20), clock=clock)
    assert steps.seconds == pytest.approx(0.08)


def test_each_kind_of_work_is_really_done(tiny):
    config = tiny(codec={"kind": "tiny", "width": 8}, denoiser={"patch": 1})
    found = measure.measure(config, 1, 0.2)
    assert set(found.seconds) == KINDS
    assert all(s > 0 for s in found.seconds.values())
    assert set(found.memory) == {"classifier", "verifier", "denoiser", "codec", "generate"}
    assert all(takes > 50 << 20 for takes in found.memory.values()) and found.gpu_memory is None


def test_a_denoiser_and_a_codec_from_elsewhere_are_timed_as_they_are(tiny, tmp_path):
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(tmp_path / "vae")
    UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=6,
    ).save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    codec = {"kind": "kl", "path": str(tmp_path / "vae")}
    found = measure.measure(tiny(codec=codec, denoiser={"external": str(tmp_path)}), 1, 0.2)
    assert set(found.seconds) == KINDS - {"codec", "denoiser"}
    found = measure.measure(tiny(codec=codec), 1, 0.2)
    assert set(found.seconds) == KINDS - {"codec"}


def test_a_step_that_a_gpu_has_no_room_for_is_told_of(tiny, monkeypatch):
    def work(sizes):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(
        measure, "trained", lambda *_: [measure.Kind("denoiser", "workers", 64, work)]
    )
    with pytest.raises(
        UserError,
        match="denoiser: a step of 4 rows is too large for this GPU; lower its batch_size",
    ):
        measure.measure(tiny(), 1, 0.1)
