from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adversa import config as cfg
from adversa import weights
from adversa.diffuse import edm
from adversa.diffuse.fit import fit, learning_rate, resume_step, training_loss, turn
from adversa.types import UserError

CONFIG = cfg.Denoiser(channels=[16, 16], patch=2, attention=False, weights=None, steps=7, batch_size=4, lr=2e-3, checkpoint_steps=2)
CLASSES = ["a", "b"]


def batches(first: int, steps: int = CONFIG.steps) -> Iterator[dict[str, Any]]:
    for step in range(first, steps):
        rng = np.random.default_rng(step)
        label = rng.integers(0, 2, 4)
        image = (40 + 150 * label[:, None, None, None] + rng.integers(0, 20, (4, 16, 16, 3))).astype(np.uint8)
        yield {"id": [f"img{step}-{i}" for i in range(4)], "image": image, "label": label}


def run(
    out: Path, source: Iterator[dict[str, Any]], config: cfg.Denoiser = CONFIG, said: list[Any] | None = None, seed: int = 3
) -> dict[str, Any]:
    report = [] if said is None else said
    return fit(source, config=config, num_classes=2, resolution=16, classes=CLASSES, out=out, seed=seed, report=report.append)


class Killed(BaseException):
    pass


def dying(source: Iterator[dict[str, Any]], after: int) -> Iterator[dict[str, Any]]:
    for i, batch in enumerate(source):
        if i == after:
            raise Killed
        yield batch


def test_killed_and_resumed_training_ends_bit_identical(tmp_path: Path) -> None:
    undisturbed = run(tmp_path / "whole", batches(0))
    out = tmp_path / "broken"
    for deaths, (after, finished) in enumerate([(5, 4), (1, 4), (2, 6)]):
        with pytest.raises(Killed):
            run(out, dying(batches(resume_step(out)), after))
        assert resume_step(out) == finished, deaths
        torch.manual_seed(deaths)  # the global generator plays no part
    resumed = run(out, batches(resume_step(out)))
    assert resumed == undisturbed
    for name in ("model.safetensors", "config.json", "metrics.jsonl", "samples.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert resume_step(out) == 7  # whoever marks the model complete lets go of the training state: not fit


def test_what_is_written_and_reported(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    result = run(tmp_path, batches(0), said=said)
    assert said[-1]["done"] == said[-1]["total"] == 7 and said[-1]["unit"] == "step" and said[-1]["loss"] > 0
    denoiser, meta, fingerprint = edm.load(tmp_path)
    assert result["fingerprint"] == fingerprint and result["init"] == meta["init"] == "scratch" and result["steps"] == 7
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 7 and rows[-1]["loss"] == result["loss"]
    assert result["parameters"] == sum(p.numel() for p in denoiser.parameters())


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    a, b = (run(tmp_path / str(seed), batches(0), seed=seed) for seed in (0, 1))
    assert a["fingerprint"] != b["fingerprint"]


def test_training_lowers_the_loss_towards_the_data(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 150, "lr": 5e-3, "checkpoint_steps": 1000, "ema": 0.9})
    run(tmp_path, batches(0, 150), config)
    rows = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.8 * rows[0], rows
    denoiser, _, _ = edm.load(tmp_path)
    bright = denoiser(torch.randn(8, 3, 16, 16) * 40, torch.full((8,), 40.0), torch.ones(8, dtype=torch.long)).mean()
    dark = denoiser(torch.randn(8, 3, 16, 16) * 40, torch.full((8,), 40.0), torch.zeros(8, dtype=torch.long)).mean()
    assert float(bright - dark) > 0.5  # the classes differ by 150 / 127.5 = 1.18


def test_starting_from_a_folder(tmp_path: Path) -> None:
    first = run(tmp_path / "first", batches(0))
    config = CONFIG.model_copy(update={"weights": str(tmp_path / "first"), "steps": 0})
    copied = run(tmp_path / "copy", batches(0), config)
    assert copied["init"] == str(tmp_path / "first") and first["init"] == "scratch" and copied["steps"] == 0
    a, _, _ = weights.read_model(tmp_path / "first")
    b, meta, _ = weights.read_model(tmp_path / "copy")
    assert all(torch.equal(a[k], b[k]) for k in a) and meta["init"] == str(tmp_path / "first")
    with pytest.raises(UserError, match="denoiser.patch"):
        run(tmp_path / "no", batches(0), config.model_copy(update={"patch": 1}))


@pytest.mark.parametrize("lr", [1e30])
def test_a_loss_that_is_not_finite_stops_naming_step_and_images(tmp_path: Path, lr: float) -> None:
    with pytest.raises(UserError, match=r"at step [1-6] \(images img[1-6]-0, img") as caught:
        run(tmp_path, batches(0), CONFIG.model_copy(update={"lr": lr, "warmup": 0.0}))
    assert "\n" not in str(caught.value) and not (tmp_path / weights.MODEL).exists()


def test_loss_of_the_ideal_denoiser_for_gaussian_data() -> None:
    # For data N(0, s^2) the best denoiser errs by s^2 sigma^2 / (s^2 + sigma^2): weighted with sigma_data = s, by 1 at any sigma.
    s = 0.5
    g = torch.Generator().manual_seed(0)
    x = s * torch.randn(256, 3, 16, 16, generator=g)
    seen: list[torch.Tensor] = []

    def ideal(x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        seen.append(torch.stack([sigma.log(), label.float()]))
        return (s**2 / (s**2 + sigma**2)).view(-1, 1, 1, 1) * x

    config = CONFIG.model_copy(update={"null_probability": 0.25})
    losses = [float(training_loss(ideal, x, torch.zeros(256, dtype=torch.long), config, 9, g)) for _ in range(8)]
    assert np.mean(losses) == pytest.approx(1, rel=0.01)
    log_sigma, label = torch.cat(seen, 1)
    assert float(log_sigma.mean()) == pytest.approx(config.p_mean, abs=0.1)
    assert float(log_sigma.std()) == pytest.approx(config.p_std, rel=0.1)
    assert float((label == 9).float().mean()) == pytest.approx(0.25, abs=0.04)


def test_eight_symmetries() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4).repeat(8, 1, 1, 1)
    flips = torch.tensor([[i >> k & 1 for i in range(8)] for k in range(3)]).bool()
    turned = turn(x, flips)
    assert len({tuple(t.flatten().tolist()) for t in turned}) == 8 and torch.equal(turned[0], x[0])
    assert all(sorted(t.flatten().tolist()) == list(range(16)) for t in turned)


def test_learning_rate_rises_then_falls() -> None:
    config = CONFIG.model_copy(update={"steps": 100, "warmup": 0.1})
    rates = [learning_rate(config, step) for step in range(100)]
    assert max(rates) == pytest.approx(config.lr) and rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.01 * config.lr
