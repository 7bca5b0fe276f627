"""Train a denoiser. Resumed from a checkpoint, it ends with the very weights of an undisturbed run
(same machine, same threads).

On one worker or on several (adversa.workers): each sees its rows of every batch, all draws are made
for the whole batch.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adversa import config as cfg
from adversa.common.symmetry import turn
from adversa.diffuse import average, edm
from adversa.diffuse.objective import Objective, draw, validation_loss
from adversa.diffuse.paint import paint
from adversa.diffuse.strategy import Sources
from adversa.storage import files, tables, weights
from adversa.training import process_group
from adversa.types import GenerationRequest, UserError, digest, seed_of

# "id" list[str], "label" int64 [B], and "image" uint8 [B, H, W, 3] or "latent" float32 [B, C, h,
# w]; "size": int where these are a worker's rows of a larger batch
Batch = dict[str, Any]
LOG_STEPS = 50
VALIDATIONS = 5  # of a training with `select`, evenly spaced, the last step included
VALIDATED = 128  # images of `select`


@dataclass
class State:
    """All that a step reads and changes; `_commit` says what of it outlives the process."""

    objective: Objective  # the denoiser, and what is trained along with it
    parallel: (
        nn.Module
    )  # what a step calls: the objective, or its wrapper that averages gradients over the workers
    averaged: edm.Denoiser  # the moving average of the weights: what becomes the model
    optimizer: torch.optim.Optimizer
    init: str
    recipe: str  # digest of what makes the training: a checkpoint of another is refused
    device: torch.device
    step: int = 0
    loss: float = math.nan  # of the last step that was looked at
    losses: list[float] = field(default_factory=list)  # since the last line of history
    history: list[dict[str, float]] = field(default_factory=list)
    pending: tuple[int, list[str], Tensor, Tensor, Tensor] | None = (
        None  # a step not looked at yet: see `_look`
    )

    def __post_init__(self) -> None:
        self.trained, self.means = (
            list(self.objective.denoiser.parameters()),
            list(self.averaged.parameters()),
        )


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
    channels: int = 3,
    codec: dict[str, Any] | None = None,
    decode: Callable[[Tensor], np.ndarray] = edm.to_images,
    select: Callable[[], Iterable[Batch]] | None = None,
    committed: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Train for config.steps steps and write model.safetensors (the moving average), config.json,
    metrics.jsonl, samples.png.

    `batches` begins at step resume_step(out) and holds the steps that are left. resolution,
    channels: of the space that is diffused; codec: what config.json says of it where that is not
    pixels; decode: from there [B, C, h, w] to uint8 [B, R, R, 3]. select: held-out batches; the
    validation loss of VALIDATED images of them is then in metrics.jsonl, VALIDATIONS times.
    committed: called on every worker, with the step, once a checkpoint is on disk. Returns
    {"steps", "loss" (EDM's weighted error, mean since the last multiple of LOG_STEPS, whatever
    config.loss minimises), "init", "fingerprint", "parameters"}. UserError where a loss, a gradient
    or a weight stops being finite, naming step and ids, where config.weights do not fit, or where
    the checkpoint is one of other settings.
    """
    assert num_classes == len(classes), (num_classes, classes)
    if threads:
        torch.set_num_threads(threads)
    meta = edm.describe(
        config, classes, resolution, channels, **({} if codec is None else {"codec": codec})
    )
    state = _start(config, meta, out, seed)
    held_out = None if select is None else _held_out(select())
    iterator, told = iter(batches), 0.0
    while state.step < config.steps:
        batch = next(iterator, None)
        assert batch is not None, f"the batches ended at step {state.step} of {config.steps}"
        _train_step(state, batch, config, seed)
        last, news = state.step == config.steps, {}
        if last or state.step % LOG_STEPS == 0:
            _log(state, config)
        if held_out is not None and state.step in validation_steps(config.steps):
            news = _validate(state, held_out, config, seed)
        if config.sample_steps and state.step % config.sample_steps == 0 and not last:
            _write_samples(state, meta, seed, decode, out / f"samples-{state.step:06d}.png")
        if last or state.step % config.checkpoint_steps == 0:
            _commit(state, config, out)
            committed(state.step)
        if (
            process_group.lead()
            and (last or news or time.monotonic() - told > 1)
            and math.isfinite(state.loss)
        ):
            told = time.monotonic()
            report(
                {
                    "done": state.step,
                    "total": config.steps,
                    "unit": "step",
                    "loss": state.loss,
                    "init": state.init,
                    **news,
                }
            )
    return _finish(state, meta, out, seed, decode)


def learning_rate(config: cfg.Denoiser, step: int) -> float:
    """Linear warm-up over config.warmup of the steps, then a half cosine to 0."""
    warm = config.warmup * config.steps
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, config.steps - warm)))


def validation_steps(steps: int) -> set[int]:
    return {max(1, round(i * steps / VALIDATIONS)) for i in range(1, VALIDATIONS + 1)}


def _start(config: cfg.Denoiser, meta: dict[str, Any], out: Path, seed: int) -> State:
    """Model, moving average and optimizer: fresh, or as the checkpoint has them."""
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    space = meta["resolution"], meta["channels"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("denoiser", seed))
        denoiser = edm.build(config, len(meta["classes"]), *space)
        objective = Objective(denoiser, config)
    # All but how often it is saved and shown.
    recipe = digest(
        config.model_dump_json(exclude={"checkpoint_steps", "sample_steps"}),
        meta["classes"],
        *space,
        json.dumps(meta.get("codec"), sort_keys=True),
        seed,
    )
    saved = weights.load_checkpoint(out)
    if saved and saved.get("recipe") != recipe:
        raise UserError(
            f"{out} holds an unfinished training with other settings; delete that folder "
            "to start it anew"
        )
    init = (
        saved["init"]
        if saved
        else edm.start_from(denoiser, config, meta["classes"], *space, meta.get("codec"))
    )
    objective.to(device).train()
    averaged = copy.deepcopy(denoiser).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    if saved:
        objective.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
    if config.compile:
        denoiser.network.compile(
            dynamic=False
        )  # in place: the weights keep their names, and the average is asked eagerly
    state = State(
        objective,
        process_group.parallel(objective, device),
        averaged,
        optimizer,
        init,
        recipe,
        device,
    )
    if saved:
        state.step, state.history, state.losses = (
            int(saved["step"]),
            saved["history"],
            saved["losses"],
        )
    return state


def _train_step(state: State, batch: Batch, config: cfg.Denoiser, seed: int) -> None:
    """One step. Its loss is looked at when the next one is on its way, so that a GPU need not wait
    for the CPU in between.
    """
    device, size = state.device, int(batch.get("size", len(batch["id"])))
    x, label = (t.to(device) for t in _tensors(batch))
    draws = draw(
        (size, *x.shape[1:]),
        config,
        seed_of("denoiser", seed, state.step),
        device,
        process_group.rows(size),
    )
    assert x.shape == draws.noise.shape, (x.shape, draws.noise.shape)
    if (
        config.flips and "image" in batch
    ):  # a turned latent is not the latent of the turned image: whoever encodes, turns
        x = turn(x, draws.symmetry)
    label = label.masked_fill(draws.dropped, state.averaged.num_classes)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
        losses, errors = state.parallel(x, draws.sigma, draws.noise, label)
    state.optimizer.zero_grad(set_to_none=True)
    process_group.share(losses, size).backward()
    norm = nn.utils.clip_grad_norm_(state.trained, config.clip)
    state.optimizer.step()
    beta = average.decay(config, state.step + 1, state.init == "scratch")
    average.update(state.means, state.trained, beta)
    _look(state, config)
    # Of the losses nothing is wanted but whether they are finite: 0 times one that is not, is not.
    state.pending = (
        state.step,
        batch["id"],
        process_group.share(errors + 0 * losses.detach(), size),
        norm,
        losses.detach(),
    )
    state.step += 1


def _look(state: State, config: cfg.Denoiser) -> None:
    """Note the loss of the pending step; UserError where it, or its gradient, is not finite. On all
    workers alike.
    """
    if state.pending is None:
        return
    (step, ids, error, norm, losses), state.pending = state.pending, None
    state.loss, gradient = process_group.mean(error), float(norm)
    if not math.isfinite(state.loss) or not math.isfinite(gradient):
        guilty = [
            i for i, finite in zip(ids, torch.isfinite(losses).tolist(), strict=True) if not finite
        ]
        rows = (
            process_group.gather(np.array(guilty, str)).tolist()
            or process_group.gather(np.array(ids, str)).tolist()
        )
        raise _diverged(f"loss {state.loss:g}, gradient {gradient:g}", step, rows, config)
    state.losses.append(state.loss)


def _diverged(what: str, step: int, ids: list[str], config: cfg.Denoiser) -> UserError:
    shown = ", ".join(ids[:8]) + (", ..." if len(ids) > 8 else "")
    return UserError(
        f"denoiser training is not finite: {what} at step {step} (images {shown}); lower "
        f"denoiser.lr (now {config.lr:g}), "
        "or look at the images"
    )


def _tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    """(the batch in the diffused space, float32 [B, C, h, w]; labels int64 [B])."""
    latent = batch.get("latent")
    x = (
        edm.to_tensor(np.asarray(batch["image"]))
        if latent is None
        else torch.as_tensor(np.asarray(latent, np.float32))
    )
    return x, torch.as_tensor(np.asarray(batch["label"]), dtype=torch.int64)


def _log(state: State, config: cfg.Denoiser) -> None:
    _look(state, config)
    lr = learning_rate(config, state.step - 1)
    state.history.append({"step": state.step, "loss": float(np.mean(state.losses)), "lr": lr})
    state.losses = []


def _held_out(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """VALIDATED images of all workers' batches together, and their labels: those whose ids hash
    lowest.

    A random choice, which no order changes: data sets often list one class after the other.
    """
    kept: list[tuple[int, np.ndarray, np.int64]] = []
    for batch in batches:  # to the end: a stream that is left half-read keeps its workers
        x, label = _tensors(batch)
        rows = zip(
            [seed_of("validated", i) for i in batch["id"]],
            map(np.array, x.numpy()),
            label.numpy(),
            strict=True,
        )
        kept = sorted([*kept, *rows], key=lambda row: row[0])[:VALIDATED]
    found = sorted(
        (row for rows in process_group.everyones(kept) for row in rows), key=lambda row: row[0]
    )[:VALIDATED]
    assert found, "the select role is empty"
    return torch.from_numpy(np.stack([x for _, x, _ in found])), torch.tensor(
        [int(label) for _, _, label in found]
    )


def _validate(
    state: State, held_out: tuple[Tensor, Tensor], config: cfg.Denoiser, seed: int
) -> dict[str, float]:
    """On the lead alone: the others wait for it in the next step."""
    _look(state, config)
    if not process_group.lead():
        return {}
    found = {
        "validation_loss": validation_loss(state.averaged, *held_out, config, seed, state.device)
    }
    state.history.append({"step": state.step, **found})
    return found


def _write_samples(
    state: State,
    meta: dict[str, Any],
    seed: int,
    decode: Callable[[Tensor], np.ndarray],
    path: Path,
) -> None:
    if process_group.lead():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_bytes(
            path,
            tables.encode_png(sample_grid(state.averaged, meta, seed, state.device, decode=decode)),
        )


def _commit(state: State, config: cfg.Denoiser, out: Path) -> None:
    """Everything to go on from, on disk; UserError instead where a weight is not finite."""
    ids = state.pending[1] if state.pending else []
    _look(state, config)
    largest = torch.stack(torch._foreach_norm([*state.trained, *state.means], math.inf)).sum()
    if not math.isfinite(process_group.mean(largest)):
        raise _diverged(
            "a weight is not finite",
            state.step - 1,
            process_group.gather(np.array(ids, str)).tolist(),
            config,
        )
    if process_group.lead():
        weights.save_checkpoint(
            out,
            {
                "step": state.step,
                "model": state.objective.state_dict(),
                "ema": state.averaged.state_dict(),
                "optimizer": state.optimizer.state_dict(),
                "history": state.history,
                "losses": state.losses,
                "init": state.init,
                "recipe": state.recipe,
            },
        )
        _write_history(state, out)
    process_group.barrier()


def _write_history(state: State, out: Path) -> None:
    files.replace_bytes(
        out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in state.history).encode()
    )


def _finish(
    state: State, meta: dict[str, Any], out: Path, seed: int, decode: Callable[[Tensor], np.ndarray]
) -> dict[str, Any]:
    """Write the model and a grid of samples."""
    if process_group.lead():
        weights.save_model(
            out, state.averaged.state_dict(), meta | {"steps": state.step, "init": state.init}
        )
        _write_history(state, out)
        _write_samples(state, meta, seed, decode, out / "samples.png")
    process_group.barrier()
    fingerprint = weights.read_model(out)[2]
    loss = next(
        (row["loss"] for row in reversed(state.history) if "loss" in row), None
    )  # none without a step
    parameters = sum(p.numel() for p in state.means)
    return {
        "steps": state.step,
        "loss": loss,
        "init": state.init,
        "fingerprint": fingerprint,
        "parameters": parameters,
    }


def sample_grid(
    denoiser: edm.DenoiserFn,
    meta: dict[str, Any],
    seed: int,
    device: torch.device | str = "cpu",
    columns: int = 8,
    generate: cfg.Generate | None = None,
    decode: Callable[[Tensor], np.ndarray] = edm.to_images,
) -> np.ndarray:
    """One row of `columns` samples a class: uint8 [classes * R, columns * R, 3].

    generate None: cfg.Generate's solver, steps and guidance whatever the run generates with, so
    that grids of all runs compare; but bf16 only where the denoiser is trained in it (amp), and no
    guidance where it has seen no null class (null_probability 0).
    """
    if generate is None:
        trained = meta["denoiser"]
        generate = cfg.Generate(
            amp=trained["amp"], **({} if trained["null_probability"] else {"guidance": 1.0})
        )
    top, scale = generate.sigma_max, generate.guidance
    requests = [
        GenerationRequest(
            f"{k}-{i}", 0, "unguided", "sample", k, None, top, scale, seed_of("samples", seed, k, i)
        )
        for k in range(len(meta["classes"]))
        for i in range(columns)
    ]
    generate = generate.model_copy(
        update={"batch_size": min(generate.batch_size, len(requests))}
    )  # no row in vain
    pictures = np.stack(
        [
            p.image
            for p in paint(denoiser, requests, Sources(), generate, meta, device, decode=decode)
        ]
    )
    side = pictures.shape[1]
    return (
        pictures.reshape(-1, columns, side, side, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(-1, columns * side, 3)
    )
