"""Two workers of one training (torch.distributed over gloo, no Ray) against one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from adversa import config as cfg
from adversa.diffuse import fit
from adversa.storage import weights
from adversa.training import process_group, schedule
from adversa.training.loop import resume_step
from adversa.types import UserError

SIZE = 5  # of a batch: two rows for one worker, three for the other
PLAIN = cfg.Denoiser(
    architecture="unet",
    channels=[16, 16],
    patch=2,
    steps=8,
    batch_size=SIZE,
    lr=2e-3,
    checkpoint_steps=4,
    amp=False,
)
CASES = {
    "plain": PLAIN,
    "uncertainty": PLAIN.model_copy(
        update={"loss": "uncertainty", "ema_width": 0.1, "flips": False}
    ),
    "transformer": PLAIN.model_copy(
        update={"architecture": "transformer", "width": 32, "depth": 2, "loss": "min_snr"}
    ),
}


def batches(first: int, last: int, nan_at: int | None = None) -> Iterator[dict[str, Any]]:
    """This worker's rows of them."""
    rows = process_group.rows(SIZE)
    for step in range(first, last):
        rng = np.random.default_rng(step)
        latent = rng.normal(0, 0.5, (SIZE, 3, 16, 16)).astype(np.float32)
        if step == nan_at:
            latent[SIZE - 1, 0, 0, 0] = np.nan
        image = rng.integers(0, 255, (SIZE, 16, 16, 3)).astype(np.uint8)
        data = {"image": image[rows]} if nan_at is None else {"latent": latent[rows]}
        yield {
            "id": [f"{step}-{i}" for i in range(SIZE)][rows],
            "label": np.arange(SIZE)[rows] % 2,
            "size": SIZE,
        } | data


def run(
    out: Path, config: cfg.Denoiser, last: int = 8, nan_at: int | None = None, **more: Any
) -> dict[str, Any]:
    schedule.LOG_STEPS = 1  # every step's loss in metrics.jsonl
    source = batches(resume_step(out), last, nan_at)
    return fit.fit(
        source,
        config=config,
        num_classes=2,
        resolution=16,
        classes=["a", "b"],
        out=out,
        seed=3,
        report=lambda _: None,
        threads=1,
        select=lambda: batches(100, 102),
        **more,
    )


def train_all(root: Path) -> dict[str, Any]:
    told: list[int] = []
    found: dict[str, Any] = {
        name: run(root / name, config, committed=told.append) for name, config in CASES.items()
    }
    assert told == [4, 8] * len(CASES)
    with pytest.raises(AssertionError, match="the batches ended at step 6"):
        run(root / "killed", CASES["uncertainty"], last=6)
    process_group.barrier()
    assert resume_step(root / "killed") == 4
    found["killed"] = run(root / "killed", CASES["uncertainty"])
    with pytest.raises(UserError) as caught:
        run(root / "nan", PLAIN, nan_at=2)
    return found | {"nan": str(caught.value)}


def worker(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    (root / f"{rank}.json").write_text(json.dumps(train_all(root)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of everything trained by one worker (this process), and by two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    logged = schedule.LOG_STEPS
    mp.spawn(worker, (two,), nprocs=2)
    (one / "0.json").write_text(json.dumps(train_all(one)))
    schedule.LOG_STEPS = logged
    return one, two


def test_one_and_two_workers_have_the_same_loss_curve(both: tuple[Path, Path]) -> None:
    for name in CASES:
        one, two = (
            [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
            for root in both
        )
        assert [row["step"] for row in one if "loss" in row] == list(range(1, 9))
        assert sum("validation_loss" in row for row in one) == 5
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys() and list(a.values()) == pytest.approx(
                list(b.values()), rel=1e-4
            ), name


def test_all_workers_return_the_same_and_the_lead_writes_it(both: tuple[Path, Path]) -> None:
    first, second = (json.loads((both[1] / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for name in CASES:
        assert weights.read_model(both[1] / name)[2] == first[name]["fingerprint"]
        a, b = (weights.read_model(root / name)[0] for root in both)
        apart = sum(float((a[k] - b[k]).square().sum()) for k in a) / sum(
            float(v.square().sum()) for v in a.values()
        )
        assert (
            apart**0.5 < 1e-3
        )  # single weights may differ more: Adam divides a gradient near 0 by itself


def test_two_killed_workers_go_on_to_the_same_weights(both: tuple[Path, Path]) -> None:
    for root in both:
        assert (root / "killed/model.safetensors").read_bytes() == (
            root / "uncertainty/model.safetensors"
        ).read_bytes()
        assert (root / "killed/metrics.jsonl").read_bytes() == (
            root / "uncertainty/metrics.jsonl"
        ).read_bytes()


def test_both_name_the_image_that_only_one_has_seen(both: tuple[Path, Path]) -> None:
    for path in (both[0] / "0.json", both[1] / "0.json", both[1] / "1.json"):
        text = json.loads(path.read_text())["nan"]
        assert "at step 3: loss nan" in text and text.endswith("images: 2-4")
