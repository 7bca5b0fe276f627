"""Two workers of one training (torch.distributed over gloo, no Ray) against one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from adversa.classify.fit import fit
from adversa.config import Augment, Classifier
from adversa.storage.weights import read_model
from adversa.training import process_group
from adversa.training.loop import Batch, resume_step
from adversa.types import UserError

COMMON: dict[str, Any] = {
    "steps": 6,
    "evaluations": 6,
    "checkpoint_steps": 2,
    "lr": 1e-3,
    "amp": False,
}
CASES = {
    "norms-frozen": Classifier(
        model="test_resnet",
        batch_size=8,
        freeze_norm=True,
        head_steps=3,
        mixup=0.4,
        cutmix=1.0,
        loss="logit_adjusted",
        augment=Augment(rotate=180, erase=0.5),
        **COMMON,
    ),
    "no-norms": Classifier(
        model="test_vit",
        model_args={"img_size": 32},
        batch_size=7,
        layer_decay=0.8,
        loss="effective_number",
        views=2,
        **COMMON,
    ),
}
NORMS = Classifier(model="test_resnet", batch_size=8, **COMMON)
CASES["norms"] = NORMS


def batch(seed: int, n: int, rows: slice) -> Batch:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 120, (n, 32, 32, 3))
    images[np.arange(n), :, :, labels] += 90
    part = {"image": images.astype(np.uint8)[rows], "label": labels[rows].astype(np.int64)}
    return {"id": [f"{seed}/{i}" for i in range(n)][rows], "size": n, **part}


def run(
    out: Path,
    config: Classifier,
    stop_at: int | None = None,
    black_at: int | None = None,
    **more: Any,
) -> dict[str, float]:
    def stream() -> Iterator[Batch]:
        for step in range(resume_step(out) + 1, 100):
            if step == stop_at:
                raise KeyboardInterrupt
            yield batch(step, config.batch_size, process_group.rows(config.batch_size))

    return fit(
        stream(),
        config=config,
        num_classes=3,
        resolution=32,
        out=out,
        seed=0,
        threads=1,
        counts=[5, 2, 1],
        priors=[0.5, 0.3, 0.2],
        select=lambda: [batch(10**6 + i, n, process_group.rows(n)) for i, n in enumerate((9, 1))],
        **more,
    )


def worker(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    told = []
    metrics = {
        name: run(root / name, config, committed=told.append) for name, config in CASES.items()
    }
    assert told == [2, 4] * len(CASES)
    try:
        run(root / "killed", NORMS, stop_at=6)
    except KeyboardInterrupt:
        process_group.barrier()
    assert resume_step(root / "killed") == 4
    metrics["killed"] = run(root / "killed", NORMS)
    try:
        run(root / "diverged", NORMS.model_copy(update={"lr": 1e30, "clip": 1e30, "warmup": 0.0}))
    except UserError as e:
        metrics["diverged"] = str(e)
    (root / f"{rank}.json").write_text(json.dumps(metrics))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (root,), nprocs=2)
    return root


def losses(out: Path) -> np.ndarray:
    return np.array(
        [json.loads(x)["loss"] for x in (out / "metrics.jsonl").read_text().splitlines()]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_two_workers_have_the_loss_curve_of_one(tmp_path: Path, two: Path, name: str) -> None:
    one = run(tmp_path, CASES[name])
    # float32, and nothing but the order of summation differs
    assert (
        np.allclose(losses(tmp_path), losses(two / name), rtol=2e-4, atol=0)
        and len(losses(tmp_path)) == 6
    )
    assert losses(tmp_path)[-1] != losses(tmp_path)[0]
    both = [json.loads((two / f"{rank}.json").read_text())[name] for rank in (0, 1)]
    assert both[0] == both[1] == pytest.approx(one)
    a, b = read_model(tmp_path)[0], read_model(two / name)[0]
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=2e-3) for k in a)


@pytest.mark.slow
def test_two_workers_killed_and_resumed_are_bit_identical(two: Path) -> None:
    a, b = read_model(two / "norms")[0], read_model(two / "killed")[0]
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (two / "norms" / "metrics.jsonl").read_bytes() == (
        two / "killed" / "metrics.jsonl"
    ).read_bytes()


@pytest.mark.slow
def test_all_workers_end_together_when_training_diverges(two: Path) -> None:
    said = [json.loads((two / f"{rank}.json").read_text())["diverged"] for rank in (0, 1)]
    assert all(s.startswith("training diverged at step ") for s in said)
    assert (
        said[0] == said[1] and len(said[0].split("images: ")[1].split(", ")) == 8
    )  # both halves of the batch
    assert not (two / "diverged" / "model.safetensors").exists()
