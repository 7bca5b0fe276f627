"""`adversa plan` as a user types it, on this machine; and what `loop` refuses before it begins. No
Ray is started.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml

from adversa.config import dump
from adversa.estimate import measure
from adversa.estimate.measure import Measured


@pytest.fixture
def micro(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "micro.yaml").write_text(dump(tiny(cluster={"cpus": 2})))
    return tmp_path / "micro.yaml"


@pytest.fixture
def quick(monkeypatch):
    """A measurement that was made before."""
    kinds = "read", "classifier", "score", "verifier", "verify", "denoiser", "generate", "compare"
    each = dict.fromkeys(kinds, 0.1)
    memory = dict.fromkeys(("classifier", "verifier", "denoiser", "generate"), 3 << 28)
    asked = []

    def made(config, cpus, seconds):
        asked.append((cpus, seconds))
        return Measured(each, memory, None, 2.0, 19.6)

    monkeypatch.setattr(measure, "measure", made)
    return asked


def test_a_plan_says_where_how_much_and_how_long(adversa, micro, quick, tmp_path, monkeypatch):
    import ray

    before = ray.is_initialized()
    done = adversa("plan", micro, "--run-dir", tmp_path / "run", "--json", tmp_path / "plan.json")
    assert done.exit_code == 0, done.output
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, adversa("plan", micro).output.splitlines())) <= 80
    said = " ".join(done.output.split())
    for part in (
        "1 x 2 CPUs",
        "generate 768 MiB",
        "1 x classifier, 24 steps",
        "300 images",
        "at most 48 images",
        "in all",
        "Measured in 20 s",
    ):
        assert part in said
    assert quick == 2 * [(2, measure.SECONDS)]
    assert ray.is_initialized() == before and not (tmp_path / "run").exists()
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert [s["stage"] for s in figures["stages"]][:3] == ["prepare", "train", "round 1: mine"]
    assert figures["nodes"][0]["samplers"] == 2 and figures["seconds"] > 0
    assert figures["seconds"] == pytest.approx(sum(s["seconds"] for s in figures["stages"]))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "cluster.training_workers=3",
            "cluster.training_workers 3: there are 2 CPUs; take at most so many",
        ),
        (
            "cluster.samplers=3",
            "cluster.samplers 3: there is room for 2; take at most so many, or null",
        ),
        (
            "cluster.sampler_threads=3",
            "cluster.sampler_threads 3: there are 2 CPUs; take at most so many",
        ),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_measured(
    adversa, micro, quick, setting, said
):
    done = adversa("plan", micro, "--set", setting)
    assert done.exit_code == 2 and done.output == f"error: {said}\n" and not quick


def test_a_full_disk_is_refused_by_the_plan_and_by_the_loop(
    adversa, micro, quick, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for words in (("plan",), ("loop", "--engine", "local")):
        done = adversa(words[0], micro, "--run-dir", tmp_path / "run", *words[1:])
        assert (
            done.exit_code == 2
            and "the disk has 1000 B free, the run's images take about" in done.output
        )
    assert not quick and not (tmp_path / "run" / "data").exists()


def test_a_network_too_large_for_the_gpu_that_is_there_is_refused_by_the_loop(
    adversa, micro, tmp_path, monkeypatch
):
    from adversa.engine import resources

    monkeypatch.setattr(resources, "gpus_here", lambda: [("T4", 1 << 20)])
    done = adversa("loop", micro, "--run-dir", tmp_path / "run", "--engine", "local")
    assert (
        done.exit_code == 2
        and "a training of the classifier: at least" in done.output
        and "a GPU has 1 MiB" in done.output
    )


def test_memory_that_was_measured_is_refused_after_the_plan_is_shown(
    adversa, micro, quick, monkeypatch
):
    from adversa.distributed import nodes
    from adversa.engine.resources import Node

    monkeypatch.setattr(nodes, "here", lambda _: Node("this machine", 4, 1, 1 << 34, "T4", 1 << 30))
    done = adversa("plan", micro)
    assert done.exit_code == 2 and "in all" in done.output
    assert (
        "a training of the denoiser: about 1.3 GiB of memory, a GPU has 1.0 GiB; lower "
        "denoiser.batch_size" in done.output
    )


def test_a_plan_on_a_cluster_is_a_short_job_and_its_figures_come_home(
    adversa, micro, tmp_path, monkeypatch
):
    import contextlib

    from adversa.distributed import jobs, launcher

    seen = {}

    def beside(client, run, stage, entrypoint, folder):
        config = (folder / "config.yaml").read_text()
        seen.update(run=run, stage=stage, entrypoint=entrypoint, config=config)
        return "job"

    def follow(client, job, show):
        show("a table")
        show('adversa-plan-figures {"seconds": 1}')
        return SimpleNamespace(code=3, status="FAILED", exit_code=3)

    monkeypatch.setattr(launcher, "session", lambda cluster: contextlib.nullcontext("client"))
    monkeypatch.setattr(jobs, "beside", beside)
    monkeypatch.setattr(jobs, "follow", follow)
    asks = {"address": "http://127.0.0.1:1", "run_storage": "/shared/runs", "samplers": 2}
    tree = {
        "cluster_name": "c",
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "metadata": {"adversa": asks},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    done = adversa(
        "plan",
        micro,
        "--cluster",
        tmp_path / "c.yaml",
        "--set",
        "mine.budget=3",
        "--rounds",
        2,
        "--json",
        tmp_path / "p.json",
    )
    assert done.exit_code == 3 and done.output == "a table\n"
    assert (
        seen["run"] == "/shared/runs/micro"
        and seen["stage"] == "plan"
        and seen["config"] == micro.read_text()
    )
    assert seen["entrypoint"].startswith(
        "python -m adversa.cli plan config.yaml --run-dir /shared/runs/micro "
    )
    assert "--set cluster.samplers=2 --set mine.budget=3 --rounds 2 --json -" in seen["entrypoint"]
    assert json.loads((tmp_path / "p.json").read_text()) == {"seconds": 1}
