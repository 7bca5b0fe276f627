"""Train a denoiser. Resumed from a checkpoint, it ends with the very weights of an undisturbed run (same machine, same threads)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adversa import config as cfg
from adversa import tables, weights
from adversa.diffuse import edm
from adversa.diffuse.paint import paint
from adversa.types import GenerationRequest, UserError, seed_of

Batch = dict[str, Any]  # "id" list[str], "image" uint8 [B, H, W, 3], "label" int64 [B]
LOG_STEPS = 50


def resume_step(out: Path) -> int:
    """Steps finished in the committed checkpoint of `out`; 0 without one."""
    state = weights.load_checkpoint(out)
    return int(state["step"]) if state else 0


def fit(
    batches: Iterable[Batch],
    *,
    config: cfg.Denoiser,
    num_classes: int,
    resolution: int,
    classes: list[str],
    out: Path,
    seed: int,
    report: Callable[[dict[str, Any]], None],
    threads: int | None = None,
) -> dict[str, Any]:
    """Train for config.steps steps and write model.safetensors (the moving average), config.json, metrics.jsonl, samples.png.

    `batches` begins at step resume_step(out) and holds the steps that are left. Returns {"steps", "loss" (mean of the last
    LOG_STEPS), "init", "fingerprint", "parameters"}. UserError where the loss stops being finite, naming step and ids, or where
    config.weights do not fit.
    """
    assert num_classes == len(classes), (num_classes, classes)
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = _start(config, classes, resolution, out, seed, device)
    iterator, told = iter(batches), 0.0
    for step in range(run["step"], config.steps):
        batch = next(iterator, None)
        assert batch is not None, f"the batches ended at step {step} of {config.steps}"
        loss = _train_step(run, batch, config, step, seed, device)
        run["losses"].append(loss)
        run["step"] = step + 1
        if run["step"] % LOG_STEPS == 0 or run["step"] == config.steps:
            run["history"].append({"step": step + 1, "loss": float(np.mean(run["losses"])), "lr": learning_rate(config, step)})
            run["losses"] = []
        if run["step"] % config.checkpoint_steps == 0 or run["step"] == config.steps:
            _commit(run, out)
        if time.monotonic() - told > 1 or run["step"] == config.steps:
            told = time.monotonic()
            report({"done": step + 1, "total": config.steps, "unit": "step", "loss": loss, "init": run["init"]})
    return _finish(run, config, classes, resolution, out, seed, device)


def learning_rate(config: cfg.Denoiser, step: int) -> float:
    """Linear warm-up over config.warmup of the steps, then a half cosine to 0."""
    warm = config.warmup * config.steps
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, config.steps - warm)))


def training_loss(
    denoiser: edm.DenoiserFn, x: Tensor, label: Tensor, config: cfg.Denoiser, null_label: int, generator: torch.Generator
) -> Tensor:
    """Mean over the batch of  lambda(sigma) |D(x + n; sigma) - x|^2 / pixels,  ln sigma ~ N(p_mean, p_std^2).

    Karras et al. 2022, equation 8 and Table 1.

    x [B, 3, H, W] in [-1, 1]. All randomness is drawn on the CPU from `generator`: noise levels, noise, dropped labels, flips.
    """
    rows = len(x)
    sigma = (config.p_mean + config.p_std * torch.randn(rows, generator=generator)).exp().to(x.device)
    dropped = (torch.rand(rows, generator=generator) < config.null_probability).to(x.device)
    flips = torch.rand(3, rows, generator=generator) < 0.5
    if config.flips:
        x = turn(x, flips.to(x.device))
    n = torch.randn(x.shape, generator=generator).to(x.device) * sigma.view(-1, 1, 1, 1)
    label = torch.where(dropped, torch.full_like(label, null_label), label)
    x0 = denoiser(x + n, sigma, label)
    error = (x0 - x).square().flatten(1).mean(1)
    return (edm.loss_weight(sigma, config.sigma_data) * error).mean()


def turn(x: Tensor, flips: Tensor) -> Tensor:
    """One of the 8 symmetries of the square for each row: flips bool [3, B] says up-down, left-right, transpose."""
    a, b, c = (f.view(-1, 1, 1, 1) for f in flips)
    x = torch.where(a, x.flip(2), x)
    x = torch.where(b, x.flip(3), x)
    return torch.where(c, x.transpose(2, 3), x)


def _start(config: cfg.Denoiser, classes: list[str], resolution: int, out: Path, seed: int, device: torch.device) -> dict[str, Any]:
    """Model, moving average and optimizer: fresh, or as the checkpoint has them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("denoiser", seed))
        denoiser = edm.build(config, len(classes), resolution)
    saved = weights.load_checkpoint(out)
    init = saved["init"] if saved else edm.start_from(denoiser, config, classes, resolution)
    denoiser.to(device).train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    run: dict[str, Any] = {"denoiser": denoiser, "optimizer": optimizer, "init": init, "step": 0, "history": [], "losses": []}
    if saved:
        denoiser.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run.update(step=int(saved["step"]), history=saved["history"], losses=saved["losses"])
    average = saved["ema"] if saved else {k: v.detach().clone() for k, v in denoiser.state_dict().items()}
    run["ema"] = {k: v.to(device) for k, v in average.items()}
    return run


def _train_step(run: dict[str, Any], batch: Batch, config: cfg.Denoiser, step: int, seed: int, device: torch.device) -> float:
    denoiser, optimizer = run["denoiser"], run["optimizer"]
    generator = torch.Generator("cpu").manual_seed(seed_of("denoiser", seed, step))
    x = edm.to_tensor(np.asarray(batch["image"])).to(device)
    label = torch.as_tensor(np.asarray(batch["label"]), dtype=torch.int64).to(device)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
        loss = training_loss(denoiser, x, label, config, denoiser.num_classes, generator)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(denoiser.parameters(), config.clip)
    value = float(loss.detach())
    if not math.isfinite(value) or not bool(torch.isfinite(norm)):
        ids = ", ".join(str(i) for i in batch["id"][:4])
        where = f"loss {value:g}, gradient {float(norm):g} at step {step} (images {ids}, ...)"
        raise UserError(f"denoiser training is not finite: {where}; lower denoiser.lr (now {config.lr:g})")
    optimizer.step()
    decay = min(config.ema, (1 + step) / (10 + step)) if run["init"] == "scratch" else config.ema
    state = denoiser.state_dict()
    torch._foreach_lerp_(list(run["ema"].values()), [state[k] for k in run["ema"]], 1 - decay)
    return value


def _commit(run: dict[str, Any], out: Path) -> None:
    weights.save_checkpoint(
        out,
        {"step": run["step"], "model": run["denoiser"].state_dict(), "ema": run["ema"], "optimizer": run["optimizer"].state_dict(),
         "history": run["history"], "losses": run["losses"], "init": run["init"]},
    )  # fmt: skip
    _write_history(run, out)


def _write_history(run: dict[str, Any], out: Path) -> None:
    weights.replace_bytes(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in run["history"]).encode())


def _finish(
    run: dict[str, Any], config: cfg.Denoiser, classes: list[str], resolution: int, out: Path, seed: int, device: torch.device
) -> dict[str, Any]:
    """Write the model and a grid of samples."""
    meta = edm.describe(config, classes, resolution, steps=run["step"], init=run["init"])
    fingerprint = weights.save_model(out, run["ema"], meta)
    run["denoiser"].load_state_dict(run["ema"])
    _write_history(run, out)
    (out / "samples.png").write_bytes(tables.encode_png(sample_grid(run["denoiser"].eval(), meta, seed, device)))
    loss = run["history"][-1]["loss"] if run["history"] else None  # none without a step
    parameters = sum(v.numel() for v in run["ema"].values())
    return {"steps": run["step"], "loss": loss, "init": run["init"], "fingerprint": fingerprint, "parameters": parameters}


def sample_grid(
    denoiser: edm.DenoiserFn, meta: dict[str, Any], seed: int, device: torch.device | str = "cpu", columns: int = 8,
    generate: cfg.Generate | None = None,
) -> np.ndarray:  # fmt: skip
    """One row of `columns` samples a class: uint8 [classes * R, columns * R, 3]."""
    generate = generate or cfg.Generate()
    top, scale = generate.sigma_max, generate.guidance
    requests = [
        GenerationRequest(f"{k}-{i}", 0, "unguided", "sample", k, None, top, scale, seed_of("samples", seed, k, i))
        for k in range(len(meta["classes"]))
        for i in range(columns)
    ]
    pictures = np.stack([p for _, p, _ in paint(denoiser, requests, {}, generate, meta, device)])
    side = meta["resolution"]
    return pictures.reshape(-1, columns, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, columns * side, 3)
