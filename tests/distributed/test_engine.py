"""RayEngine against LocalEngine: the same ids, the same noise, the same images, the same
weights.
"""

from __future__ import annotations

import os
import subprocess
from functools import partial

import pytest
import ray

from adversa.engine.local import LocalEngine
from adversa.engine.tasks import Part
from adversa.pipeline import loop
from adversa.pipeline.stages import stages
from adversa.report import page
from adversa.run import step_folder
from adversa.storage import files, tables
from adversa.types import UserError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def by_ray(tiny, ray_engine, tmp_path_factory):
    """The run of `finished`, on Ray."""
    config = tiny()
    run = loop.open_run(config, tmp_path_factory.mktemp("by-ray") / "run")
    loop.run(config, run, ray_engine, page.write)
    return run


def same(a, b, folder, columns):
    one, other = tables.read(a.root / folder, columns), tables.read(b.root / folder, columns)
    return len(one) > 0 and one.equals(other)


@pytest.mark.slow
def test_ray_and_local_ask_for_the_same_and_generate_the_same(finished, by_ray):
    config, local = finished
    assert step_folder.fingerprint(local.data) == step_folder.fingerprint(by_ray.data)
    assert files.read_json(local.data / "split.json") == files.read_json(by_ray.data / "split.json")
    for role in ("train", "mine", "select", "test"):
        assert same(local, by_ray, f"data/{role}", ["id", "group", "image"])
    assert same(local, by_ray, "round-001/requests", None)
    assert same(local, by_ray, "round-001/synthetic", ["request_id", "image"])
    assert same(local, by_ray, "round-001/verdicts", ["request_id", "keep", "reason"])


@pytest.mark.slow
def test_ray_and_local_train_the_same_weights(finished, by_ray):
    config, local = finished
    for stage in stages(config, local):
        for folder in stage.folders:
            if (folder / "model.safetensors").exists():
                name = local.name_of(folder)
                assert step_folder.fingerprint(folder) == step_folder.fingerprint(
                    by_ray.root / name
                ), name


@pytest.mark.slow
def test_ray_and_local_report_the_same_figures(finished, by_ray):
    _, local = finished
    assert files.read_json(local.summary)["arms"] == files.read_json(by_ray.summary)["arms"]


def make_failing(message):
    def work(part, path):
        raise UserError(message)

    return work


def test_a_fault_the_user_can_mend_comes_home_from_ray_data(ray_engine, tmp_path):
    with pytest.raises(UserError, match="^picture 7 is truncated; replace it$"):
        ray_engine.map_batches(
            partial(make_failing, "picture 7 is truncated; replace it"),
            [Part(0, 1)],
            tmp_path,
            lambda s: None,
        )


def test_a_fault_the_user_can_mend_comes_home_from_ray_train_and_nothing_is_lost(
    finished, ray_engine, tiny, tmp_path
):
    """A learning rate that explodes: one line that names the step, no model, and what was finished
    before stays.
    """
    config = tiny(classifier={"lr": 1e30}, mix={"arms": ["real"]})
    run = loop.open_run(config, tmp_path / "run")
    with pytest.raises(UserError, match="step") as e:
        loop.run(config, run, ray_engine, page.write)
    assert "\n" not in str(e.value)
    assert step_folder.is_finished(run.data) and not step_folder.is_finished(
        run.arm(0, "real", 0) / "classifier"
    )


def test_only_processes_of_ray_are_looked_for(ray_engine):
    from adversa.distributed.engine import ray_processes

    other = subprocess.Popen(["sleep", "60"])
    try:
        assert ray.get(ray.remote(lambda: os.getpid()).remote()) in {p.pid for p in ray_processes()}
        assert other.pid not in {p.pid for p in ray_processes()}
        assert all(p.cmdline()[0].startswith("ray::") for p in ray_processes())
    finally:
        other.kill()
        other.wait()


def test_engines_offer_the_same_methods(ray_engine):
    for name in ("map_batches", "map_parts", "fit", "tasks", "samplers", "close"):
        assert callable(getattr(ray_engine, name)) and callable(getattr(LocalEngine(), name))


def test_a_model_of_ray_train_keeps_no_checkpoint(by_ray):
    assert list(by_ray.root.rglob("model.safetensors")) and not list(
        by_ray.root.rglob("checkpoint.pt")
    )


def make_nothing():
    raise UserError("no weights at x; give a file")


def test_a_fault_while_the_work_is_made_comes_home_from_ray_data(ray_engine, tmp_path):
    with pytest.raises(UserError, match="^no weights at x; give a file$"):
        ray_engine.map_batches(make_nothing, [Part(0, 1)], tmp_path, lambda s: None, model=True)
