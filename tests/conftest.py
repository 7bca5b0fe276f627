"""What tests share: real data where it is, weights, one Ray session, a tiny configuration of the
whole loop.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

# Before torch is imported: processes of two threads each, on two cores, wait for each other at
# every layer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For the clusters that tests start; an embedded Ray has them by itself (distributed/start.py).
# Workers that give way to everything else are starved by the tests beside them.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_num_workers_soft_limit", "16")
# The cache of decoded images, that of the processes which tests start as well.
os.environ["ADVERSA_CACHE"] = tempfile.mkdtemp(prefix="adversa-cache-")

# Not part of the project; the default is where this project's own runners have it.
HAM10000 = Path(__file__).resolve().parents[2] / "shared" / "data" / "ham10000_200x150.zip"


# Files that start a Ray, those that take minutes first: `--dist loadfile` gives each to the process
# that is free, and a long one at the end would keep the others waiting.
LONGEST = (
    "test_coordinator",
    "test_kill",
    "test_jobs",
    "test_search",
    "test_runs",
    "test_training",
)


def pytest_unconfigure():
    shutil.rmtree(os.environ["ADVERSA_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Files that start a Ray come first: they take longest and mostly wait."""
    ray = {
        item.path
        for item in items
        if item.get_closest_marker("ray") or "distributed" in item.path.parts
    }
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (item.path not in ray, place.get(item.path.stem, len(LONGEST))))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): the folder `name`, which make(folder) fills in one of pytest's processes
    and all read.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def shared(name, make):
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder

    return shared


@pytest.fixture(scope="session")
def ham_zip() -> Path:
    """A .zip of the complete HAM10000: 10,015 images with masks and HAM10000_metadata.csv."""
    path = Path(os.environ.get("ADVERSA_HAM10000", HAM10000))
    if not path.exists():
        pytest.skip(
            f"no HAM10000 at {path}: get it from Harvard Dataverse, "
            "doi:10.7910/DVN/DBW86T, put images,"
            " masks and HAM10000_metadata.csv into one .zip and name that in ADVERSA_HAM10000"
        )
    return path


@pytest.fixture(scope="session")
def timm_weights(tmp_path_factory) -> Path:
    """Weights of tf_efficientnet_lite0 under timm's names, drawn by chance: none is where it
    starts.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = timm.create_model("tf_efficientnet_lite0").state_dict()
        for v in state.values():
            v.add_(0.01 * torch.rand_like(v) if v.is_floating_point() else 1)
    path = tmp_path_factory.mktemp("weights") / "tf_efficientnet_lite0.safetensors"
    save_file(state, path)
    return path


@pytest.fixture
def adversa(monkeypatch):
    """Runs a command in this process."""
    from typer.testing import CliRunner

    from adversa.cli.app import app

    monkeypatch.setenv("COLUMNS", "160")

    def run(*args):
        return CliRunner().invoke(app, [str(a) for a in args])

    return run


TINY = {
    "data": {"source": "phantom", "resolution": 32, "part_rows": 64, "phantom": {"images": 300}},
    "classifier": {
        "model_args": {"channels": [16, 32, 32, 64]},
        "steps": 24,
        "batch_size": 32,
        "evaluations": 2,
        "checkpoint_steps": 8,
    },
    "denoiser": {
        "architecture": "unet",
        "patch": 2,
        "channels": [32, 32],
        "weights": None,
        "steps": 12,
        "batch_size": 16,
        "checkpoint_steps": 4,
    },
    "mine": {"budget": 12},
    "generate": {"per_case": 2, "steps": 4, "batch_size": 8, "part_size": 8},
    "curate": {
        "min_agreement": 0.1,
        "judge": {
            "model": "convnext_atto",
            "model_args": {"depths": [1, 1, 1, 1], "dims": [16, 16, 16, 16]},
            "steps": 8,
            "batch_size": 32,
            "evaluations": 1,
        },
    },
    "evaluate": {"bootstrap": 200},
    "cluster": {"training_threads": 1, "object_store_mb": 200},
}


@pytest.fixture(scope="session")
def tiny():
    """Builds a checked configuration of seconds: tiny(seed=1, mine={"budget": 4})."""
    from adversa.config import check

    def build(**changes):
        tree = {k: dict(v) for k, v in TINY.items()}
        for key, value in changes.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
        return check(tree, "tiny")

    return build


@pytest.fixture(scope="session")
def finished(tiny, once):
    """(config, run) of a tiny run that went through undisturbed on the local engine. Read only."""
    from adversa.engine.local import LocalEngine
    from adversa.pipeline import loop
    from adversa.report import page
    from adversa.run.folder import RunDir

    config = tiny()

    def make(folder):
        loop.run(config, loop.open_run(config, folder / "run"), LocalEngine(1, 1), page.write)

    return config, RunDir(once("finished", make) / "run")


SWEEP = {
    "real": [2, 4],
    "ratios": [0, 1, 2],
    "arms": ["replay", "unguided", "guided"],
    "seeds": 1,
    "bootstrap": 200,
}


@pytest.fixture(scope="session")
def tiny_sweep(tiny):
    """Builds the configuration of a sweep of seconds: tiny_sweep(real=[2]); cluster: of that
    section.
    """

    def build(cluster=None, **changes):
        return tiny(
            data={"phantom": {"images": 240}},
            generate={"part_size": 16},
            classifier={"steps": 12, "checkpoint_steps": 6},
            sweep=SWEEP | changes,
            cluster=cluster or {},
        )

    return build


@pytest.fixture(scope="session")
def swept(tiny_sweep, once):
    """(config, run) of a tiny sweep on the local engine, 14 trials, without its report. Read
    only.
    """
    from adversa.engine.local import LocalEngine
    from adversa.run.folder import RunDir
    from adversa.sweep import run as sweep_run

    config = tiny_sweep()

    def make(folder):
        run = sweep_run.open_run(config, folder)
        page = sweep_run.run(
            config, run, LocalEngine(1, 1), lambda config, run: run.root / "sweep.html"
        )
        assert page == run.root / "sweep.html"

    return config, RunDir(once("swept", make))


@pytest.fixture(scope="session")
def ray_engine(tmp_path_factory):
    """One RayEngine for all tests marked ray."""
    from adversa.config import Cluster
    from adversa.distributed.engine import RayEngine

    engine = RayEngine(
        Cluster(cpus=2, object_store_mb=200, training_threads=1),
        tmp_path_factory.mktemp("ray"),
        32 * 32 * 3,
    )
    yield engine
    engine.close()


@pytest.fixture
def relist():
    """Lets the manifest of a finished step list its files as they are now: it holds something else,
    and is not damaged.
    """

    from adversa.run import step_folder
    from adversa.storage import files

    def done(folder):
        found = step_folder.manifest(folder) | {"files": step_folder._listed(folder)}
        files.write_json(folder / step_folder.MANIFEST, found)

    return done
