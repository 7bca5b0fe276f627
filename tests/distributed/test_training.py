"""Trainings on Ray Train: one worker against two, what is not repeated, what is not tried again,
elastic groups.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from adversa.engine.interface import FitJob
from adversa.pipeline import train
from adversa.run import step_folder
from adversa.storage.weights import save_checkpoint, save_model
from adversa.types import UserError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 8
# float32: then only the order of summation differs, and AdamW's first steps blow up the last bits
# of tiny gradients. With BatchNorm over half batches the very first loss would be off by per cents.
EXACT = {"amp": False, "steps": STEPS, "batch_size": 24, "checkpoint_steps": 3}


def with_workers(engine, most, least=None):
    """The session's engine, with groups of another size."""
    found = copy.copy(engine)
    found.cluster = engine.cluster.model_copy(
        update={"training_workers": most, "training_workers_min": least}
    )
    return found


@pytest.fixture(scope="module")
def jobs_in(prepared):
    """jobs_in(folder): a classifier with BatchNorm, scored after every step, and a denoiser."""
    config, run = prepared
    classifier = config.classifier.model_copy(update=EXACT | {"evaluations": STEPS})
    denoiser = config.denoiser.model_copy(update=EXACT)
    mix = run.arm(0, "real") / "mix"

    def build(base):
        return [
            train.classifier_job(run.data, mix, [], classifier, 0, 32, base / "classifier"),
            train.denoiser_job(run.data, mix, denoiser, 0, 32, base / "denoiser"),
        ]

    return build


@pytest.fixture(scope="module")
def one_and_two(jobs_in, ray_engine, tmp_path_factory):
    found = []
    for workers in (1, 2):
        base = tmp_path_factory.mktemp(f"workers-{workers}")
        with_workers(ray_engine, workers).fit(jobs_in(base))
        found.append(base)
    return found


def curve(folder):
    """Every training and validation loss, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([v for line in lines for k, v in line.items() if k.endswith("loss")])


@pytest.mark.parametrize(("what", "points"), [("classifier", STEPS), ("denoiser", 5)])
def test_two_workers_have_the_loss_curve_of_one(one_and_two, what, points):
    one, two = (curve(base / what) for base in one_and_two)
    assert len(one) >= points and np.allclose(one, two, rtol=1e-3, atol=0)
    assert [step_folder.manifest(base / what)["workers"] for base in one_and_two] == [1, 2]
    assert [step_folder.manifest(base / what)["rows"] for base in one_and_two] == [STEPS * 24] * 2


def test_a_finished_job_of_a_launch_is_not_repeated(one_and_two, jobs_in, ray_engine):
    """As after a death in the second job: the first keeps its files, the second is trained again,
    to the same weights.
    """
    base = one_and_two[0]
    before = (
        step_folder.fingerprint(base / "denoiser"),
        (base / "classifier" / "model.safetensors").stat().st_mtime_ns,
    )
    (base / "denoiser" / step_folder.MANIFEST).unlink()
    (base / "denoiser" / "model.safetensors").unlink()
    ray_engine.fit(jobs_in(base))
    assert before == (
        step_folder.fingerprint(base / "denoiser"),
        (base / "classifier" / "model.safetensors").stat().st_mtime_ns,
    )


class TenBatches:
    """Stands in for a feed: numbers instead of images. Picklable, for the stream's tasks."""

    steps, batch_size = 10, 4
    folders, latent_std = (), None

    def count(self):
        return self.steps

    def batch(self, step, rank=0, world=1):
        from adversa.types import share_of

        part = share_of(self.batch_size, rank, world)
        image = np.full((self.batch_size, 2, 2, 3), step, np.uint8)
        return {
            "id": [f"{step}/{i}" for i in range(self.batch_size)][part],
            "image": image[part],
            "size": self.batch_size,
        }


@dataclasses.dataclass(frozen=True)
class Fit:
    """Notes every start and step of every worker; commits every other step; at step 5 of the first
    start does `then`.
    """

    then: str

    def __call__(self, batches, *, out, report, threads, committed):
        from adversa.training import process_group

        step = resume(out)
        with open(out / "log", "a", buffering=1) as log:
            log.write(f"start {process_group.rank()}/{process_group.world_size()} at {step}\n")
            for batch in batches:
                assert batch["image"].max() == step
                if (
                    step == 5
                    and self.then
                    and len([x for x in (out / "log").read_text().splitlines() if "start 0" in x])
                    == 1
                ):
                    if self.then == "refuse":
                        raise UserError("lower classifier.lr (1e+30)")
                    if self.then == "wait":
                        (out / "half").touch()
                        time.sleep(3600)
                    if process_group.rank() == process_group.world_size() - 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                step += 1
                process_group.all_reduce_mean(
                    np_to_tensor(step)
                )  # as a training step does: nobody runs ahead
                if step % 2 == 0:
                    if process_group.is_main_process():
                        save_checkpoint(out, {"step": step})
                    process_group.barrier()
                    committed(step)
        if process_group.is_main_process():
            save_model(out, {"w": np_to_tensor(step)}, {})
        process_group.barrier()
        return {"steps": step}


def np_to_tensor(value):
    import torch

    return torch.tensor([float(value)])


def resume(out):
    from adversa.storage.weights import load_checkpoint

    state = load_checkpoint(out)
    return 0 if state is None else state["step"]


def fit(engine, out, then):
    job = FitJob(out, step_folder.Recipe("counted", 1, {}, {}), Fit(then), resume, TenBatches())
    engine.fit([job])
    return [x for x in (out / "log").read_text().splitlines() if x.startswith("start")]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_is_replaced_and_the_group_goes_on_from_what_was_committed(
    ray_engine, tmp_path, workers
):
    starts = fit(with_workers(ray_engine, workers), tmp_path, "die")
    assert sorted(starts) == sorted(
        f"start {r}/{workers} at {step}" for step in (0, 4) for r in range(workers)
    )
    assert step_folder.manifest(tmp_path)["rows"] == 40 and step_folder.manifest(tmp_path)[
        "metrics"
    ] == {"steps": 10}


def test_what_the_user_must_mend_is_not_tried_again(ray_engine, tmp_path):
    with pytest.raises(UserError, match=r"^lower classifier.lr \(1e\+30\)$"):
        fit(ray_engine, tmp_path, "refuse")
    assert (tmp_path / "log").read_text().count("start") == 1 and not step_folder.is_finished(
        tmp_path
    )


def test_a_group_that_may_shrink_trains_with_as_many_as_there_is_room_for(ray_engine, tmp_path):
    """Two CPUs, half of one a worker (the stream needs one too): both start."""
    assert sorted(fit(with_workers(ray_engine, 2, least=1), tmp_path, "")) == [
        "start 0/2 at 0",
        "start 1/2 at 0",
    ]


def lose_a_node(out):
    """A cluster of two nodes, one worker on each; the second node dies at step 5 of 10 and does not
    come back.
    """
    from ray.cluster_utils import Cluster as Nodes

    from adversa.config import Cluster
    from adversa.distributed.engine import RayEngine

    small = {"object_store_memory": 100 << 20, "include_dashboard": False, "resources": {"slot": 1}}
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 2, **small})
    second = nodes.add_node(num_cpus=1, **small)
    os.environ["RAY_ADDRESS"] = nodes.address
    engine = RayEngine(
        Cluster(training_workers=2, training_workers_min=1, training_threads=1), out.parent, 12
    )
    group = engine.group()
    engine.group = lambda: dataclasses.replace(
        group, resources=group.resources | {"slot": 1}
    )  # Ray would pack both on one node

    def lose():
        while not (out / "half").exists():
            time.sleep(0.1)
        nodes.remove_node(second, allow_graceful=False)

    threading.Thread(target=lose, daemon=True).start()
    try:
        fit(engine, out, "wait")
    finally:
        engine.close()
        nodes.shutdown()


def test_a_group_that_loses_a_node_for_good_goes_on_with_the_workers_that_are_left(tmp_path):
    """In a process of its own: the session's Ray has one node."""
    out = tmp_path / "counted"
    done = subprocess.run(
        [sys.executable, __file__, str(out)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    starts = [x for x in (out / "log").read_text().splitlines() if x.startswith("start")]
    assert sorted(starts) == ["start 0/1 at 4", "start 0/2 at 0", "start 1/2 at 0"]
    found = step_folder.manifest(out)
    assert (found["rows"], found["metrics"], found["workers"]) == (40, {"steps": 10}, 1)


if __name__ == "__main__":
    lose_a_node(Path(sys.argv[1]))
