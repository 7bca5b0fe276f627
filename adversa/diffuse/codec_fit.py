"""Fit a small autoencoder on the user's own pictures, so that latents need no download.

Resumed from a checkpoint, it ends with the very weights of an undisturbed run (same machine, same
threads).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversa import config as cfg
from adversa.common.symmetry import turn
from adversa.diffuse import codec
from adversa.diffuse.edm import to_tensor
from adversa.storage import files, tables, weights
from adversa.training import process_group
from adversa.types import UserError, digest, seed_of

Batch = dict[
    str, Any
]  # "id" list[str], "image" uint8 [B, R, R, 3]; "size": rows of all workers together (absent: B)
LOG_STEPS = 50
SHOWN = 8  # columns of reconstructions.png
# Noise on the latents in training, against their range of [-3, 3] (the decoder's tanh): a
# denoiser's answers are never exact, and latents that may lie anywhere within the noise of each
# other are smooth. It costs 0.4 dB where the latents are exact (phantoms, 600 steps: 32.9 to 32.5
# dB) and nothing where they are off by a tenth of their spread.
NOISE = 0.05


class Autoencoder(nn.Module):
    """Encoder, noise, decoder: one forward pass, so that data parallelism can wrap it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.model.decode(self.model.encode(x).latents + noise).sample


def resume_step(out: Path) -> int:
    """Steps finished in the committed checkpoint of `out`; 0 without one."""
    state = weights.load_checkpoint(out)
    return int(state["step"]) if state else 0


def fit_codec(
    batches: Iterable[Batch],
    *,
    config: cfg.Codec,
    resolution: int,
    out: Path,
    seed: int,
    report: Callable[[dict[str, Any]], None],
    threads: int | None = None,
    select: Callable[[], Iterable[Batch]] | None = None,
    committed: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Fit for config.steps steps; write model.safetensors, config.json, metrics.jsonl,
    reconstructions.png.

    `batches` begins at step resume_step(out). select: pictures it is not fitted on; their PSNR is
    told and chooses nothing. Returns {"steps", "loss", "psnr" (dB; None without select),
    "fingerprint", "parameters"}. committed(step) is called on every worker after a checkpoint.
    UserError where a loss, a gradient or a weight stops being finite, naming step and ids, or where
    the checkpoint is one of other settings.
    """
    assert config.is_fitted and resolution % 2**config.halvings == 0, (config, resolution)
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = _start(config, resolution, out, seed, device)
    iterator, told = iter(batches), 0.0
    for step in range(run["step"], config.steps):
        batch = next(iterator, None)
        assert batch is not None, f"the batches ended at step {step} of {config.steps}"
        run["losses"].append(_train_step(run, batch, config, step, seed, device))
        run["step"] = step + 1
        last = run["step"] == config.steps
        if run["step"] % LOG_STEPS == 0 or last:
            rate = learning_rate(config, step)
            run["history"].append(
                {"step": step + 1, "loss": float(np.mean(run["losses"])), "lr": rate}
            )
            run["losses"] = []
        if run["step"] % config.checkpoint_steps == 0 or last:
            _commit(run, out, batch, config)
            committed(run["step"])
        if time.monotonic() - told > 1 or last:
            told = time.monotonic()
            report({"done": step + 1, "total": config.steps, "unit": "step"})
    return _finish(run, config, resolution, out, device, select)


def learning_rate(config: cfg.Codec, step: int) -> float:
    """Linear warm-up over config.warmup of the steps, then a half cosine to 0."""
    warm = config.warmup * config.steps
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, config.steps - warm)))


def losses(x: Tensor, y: Tensor) -> Tensor:
    """[B]: mean |x - y|, plus the same of their differences between neighbours, at the full and at
    half the resolution.

    The absolute error alone forgives a blurred edge or hair, which covers few pixels; its
    differences hold nothing but those.
    """
    error = y.float() - x
    found = error.abs().flatten(1).mean(1)
    for scale in (1, 2):
        e = F.avg_pool2d(error, scale) if scale > 1 else error
        found = (
            found + e.diff(dim=2).abs().flatten(1).mean(1) + e.diff(dim=3).abs().flatten(1).mean(1)
        )
    return found


def turned(x: Tensor, views: int, generator: torch.Generator, rows: slice, size: int) -> Tensor:
    """Each row in one of the first `views` symmetries of the square, drawn for the batch of all
    workers.
    """
    return turn(x, torch.randint(0, views, (size,), generator=generator)[rows])


def _start(
    config: cfg.Codec, resolution: int, out: Path, seed: int, device: torch.device
) -> dict[str, Any]:
    """Model and optimizer: fresh, or as the checkpoint has them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("codec", seed))
        model = codec.build(config)
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    recipe = digest(config.model_dump_json(exclude={"checkpoint_steps"}), resolution, seed)
    run: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "step": 0,
        "history": [],
        "losses": [],
        "recipe": recipe,
    }
    if (saved := weights.load_checkpoint(out)) is not None:
        if saved.get("recipe") != recipe:
            raise UserError(
                f"{out} holds an unfinished training with other settings; delete that "
                "folder to start it anew"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run.update(step=int(saved["step"]), history=saved["history"], losses=saved["losses"])
    run["parallel"] = process_group.parallel(Autoencoder(model), device)
    return run


def _train_step(
    run: dict[str, Any], batch: Batch, config: cfg.Codec, step: int, seed: int, device: torch.device
) -> float:
    model, optimizer = run["model"], run["optimizer"]
    generator = torch.Generator("cpu").manual_seed(seed_of("codec", seed, step))
    size = int(batch.get("size", len(batch["id"])))
    rows = process_group.rows(size)
    x = turned(
        to_tensor(np.asarray(batch["image"])).to(device), config.views, generator, rows, size
    )
    side = x.shape[-1] >> config.halvings
    noise = NOISE * torch.randn(size, config.latent_channels, side, side, generator=generator)[
        rows
    ].to(device)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
        y = run["parallel"](x.to(memory_format=torch.channels_last), noise)
    each = losses(x, y)
    loss = process_group.share(each, size)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    value = process_group.mean(loss)
    if not math.isfinite(value) or not bool(torch.isfinite(norm)):
        guilty = [
            i
            for i, finite in zip(batch["id"], torch.isfinite(each).tolist(), strict=True)
            if not finite
        ]
        raise _diverged(
            f"loss {value:g}, gradient {float(norm):g}",
            step,
            _everyones(guilty) or _everyones(batch["id"]),
            config,
        )
    optimizer.step()
    return value


def _everyones(ids: list[str]) -> list[str]:
    return process_group.gather(np.array(ids, str)).tolist()


def _diverged(what: str, step: int, ids: list[str], config: cfg.Codec) -> UserError:
    shown = ", ".join(ids[:8]) + (", ..." if len(ids) > 8 else "")
    return UserError(
        f"codec training is not finite: {what} at step {step} (images {shown}); lower "
        f"codec.lr (now {config.lr:g}), "
        "or look at the images"
    )


def _commit(run: dict[str, Any], out: Path, batch: Batch, config: cfg.Codec) -> None:
    """Everything to go on from, on disk; UserError instead where a weight is not finite. batch: of
    the last step.
    """
    largest = torch.stack(torch._foreach_norm(list(run["model"].parameters()), math.inf)).sum()
    if not math.isfinite(process_group.mean(largest)):
        raise _diverged("a weight is not finite", run["step"] - 1, _everyones(batch["id"]), config)
    if process_group.lead():
        weights.save_checkpoint(
            out,
            {
                "step": run["step"],
                "model": run["model"].state_dict(),
                "optimizer": run["optimizer"].state_dict(),
                "history": run["history"],
                "losses": run["losses"],
                "recipe": run["recipe"],
            },
        )
        _write_history(run, out)
    process_group.barrier()


def _write_history(run: dict[str, Any], out: Path) -> None:
    weights.replace_bytes(
        out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in run["history"]).encode()
    )


def _finish(
    run: dict[str, Any],
    config: cfg.Codec,
    resolution: int,
    out: Path,
    device: torch.device,
    select: Callable[[], Iterable[Batch]] | None,
) -> dict[str, Any]:
    """Write the model; tell its PSNR on `select`, and show some of it: originals above,
    reconstructions below.
    """
    model = run["model"].eval()
    meta = codec.describe(model, "fitted", steps=run["step"], resolution=resolution)
    if process_group.lead():
        weights.save_model(out, model.state_dict(), meta)
        _write_history(run, out)
    process_group.barrier()
    loaded = codec.load(out, device)
    found, shown = [], []
    for batch in select() if select is not None else ():
        images = np.asarray(batch["image"])
        if not len(images):
            continue
        again = loaded.decode(loaded.to_space(images))
        found += [codec.psnr(a[None], b[None]) for a, b in zip(images, again, strict=True)]
        shown += [np.concatenate([a, b]) for a, b in zip(images, again, strict=True)][
            : SHOWN - len(shown)
        ]
    if shown and process_group.lead():
        files.replace_bytes(
            out / "reconstructions.png", tables.encode_png(np.concatenate(shown, axis=1))
        )
    every = process_group.gather(np.array(found))
    return {
        "steps": run["step"],
        "loss": run["history"][-1]["loss"],
        "psnr": float(every.mean()) if len(every) else None,
        "fingerprint": loaded.fingerprint,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
