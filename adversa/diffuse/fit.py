"""Train a denoiser, in one process or several (adversa/training).

All that a step draws is drawn for its whole batch.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adversa import config as cfg
from adversa.common.symmetry import turn
from adversa.diffuse import average, edm, pipeline
from adversa.diffuse.objective import Objective, draw, validation_loss
from adversa.diffuse.strategy import Sources
from adversa.storage import files, tables, weights
from adversa.storage.path import StoragePath
from adversa.training import loop, process_group
from adversa.training.device import CPU, to_device
from adversa.training.loop import Batch
from adversa.training.precision import autocast
from adversa.training.schedule import evenly_spaced, log_steps, set_rates
from adversa.types import GenerationRequest, Json, digest, seed_of

VALIDATIONS = 5  # of a training with `select`, evenly spaced, the last step included
VALIDATED = 128  # images of `select`
Decode = Callable[[Tensor], np.ndarray]  # the diffused space [B, C, h, w] to uint8 [B, R, R, 3]


@dataclass(frozen=True)
class DenoiserFit:
    """What a step reads and changes.

    Attributes:
        config: Its settings.
        objective: The denoiser, and what is trained along with it.
        parallel: What a step calls: the objective, or its wrapper that averages the gradients.
        averaged: The moving average of the denoiser's weights: what becomes the model.
        meta: The model's config.json.
        init: Where the weights came from: "scratch", or a folder.
        seed: Of all that is drawn.
        device: Where it runs.
        out: The model's folder.
        decode: The diffused space to pictures, for samples.
    """

    config: cfg.Denoiser
    objective: Objective
    parallel: nn.Module
    averaged: edm.EDMDenoiser
    meta: Json
    init: str
    seed: int
    device: torch.device
    out: StoragePath
    decode: Decode


def fit(
    batches: Iterable[Batch],
    *,
    config: cfg.Denoiser,
    num_classes: int,
    resolution: int,
    classes: list[str],
    out: StoragePath,
    seed: int,
    report: Callable[[Json], None],
    threads: int | None = None,
    channels: int = 3,
    codec: Json | None = None,
    decode: Decode = edm.to_images,
    select: Callable[[], Iterable[Batch]] | None = None,
    committed: Callable[[int], None] = lambda _: None,
) -> Json:
    """Train for config.steps steps; write the model (the moving average), metrics and samples.png.

    Resumed from a checkpoint, it ends with the very weights of an undisturbed run.

    Args:
        batches: From step resume_step(out) on: "label" int64 [B], and "image" uint8 [B, H, W, 3] or
            "latent" float32 [B, C, h, w].
        config: The network, its objective and its schedule.
        num_classes: K.
        resolution: Of the space that is diffused.
        classes: Their K names.
        out: The model's folder, which holds checkpoints too.
        seed: Of all that is drawn.
        report: Told of the progress, in the main process alone.
        threads: Of torch; None: as many as it has.
        channels: Of the space that is diffused.
        codec: What config.json says of that space where it is not pixels.
        decode: That space to pictures, for samples.
        select: Held-out batches; the validation loss of VALIDATED images of them is then in
            metrics.jsonl, VALIDATIONS times.
        committed: Called in every process, with the step, once a checkpoint is on disk.

    Returns:
        {"steps", "loss" (EDM's weighted error, mean since the last multiple of LOG_STEPS, whatever
        config.loss minimises), "init", "fingerprint", "parameters"}.

    Raises:
        UserError: A loss, a gradient or a weight is not finite (step and ids), config.weights do
            not fit, or the checkpoint is one of other settings.
    """
    assert num_classes == len(classes), (num_classes, classes)
    space = {} if codec is None else {"codec": codec}
    meta = edm.describe(config, classes, resolution, channels, **space)
    with loop.session(threads) as device:
        recipe = _recipe(config, meta, seed)
        saved = loop.load(out, recipe)
        state = _start(config, meta, saved, out, seed, device, decode)
        held_out = None if select is None else _held_out(select())
        training = _describe(state, recipe, held_out)
        record = loop.run(training, batches, saved, out, report, committed)
        return _finish(state, record)


def _recipe(config: cfg.Denoiser, meta: Json, seed: int) -> str:
    """Of all but how often the training is saved and shown."""
    given = config.model_dump_json(exclude={"checkpoint_steps", "sample_steps"})
    codec = json.dumps(meta.get("codec"), sort_keys=True)
    return digest(given, meta["classes"], meta["resolution"], meta["channels"], codec, seed)


def _start(
    config: cfg.Denoiser,
    meta: Json,
    saved: dict[str, Any] | None,
    out: StoragePath,
    seed: int,
    device: torch.device,
    decode: Decode,
) -> DenoiserFit:
    classes, space, codec = (
        meta["classes"],
        (meta["resolution"], meta["channels"]),
        meta.get("codec"),
    )
    torch.manual_seed(seed_of("denoiser", seed))
    denoiser = edm.build(config, len(classes), *space)
    objective = Objective(denoiser, config)
    start = partial(edm.start_from, denoiser, config, classes, *space, codec)
    init = saved["extra"]["init"] if saved else start()
    objective.to(device).train()
    averaged = copy.deepcopy(denoiser).eval().requires_grad_(False)
    if config.compile:  # in place: the weights keep their names, and the average is asked eagerly
        denoiser.network.compile(dynamic=False)
    parallel = process_group.data_parallel(objective, device)
    return DenoiserFit(config, objective, parallel, averaged, meta, init, seed, device, out, decode)


def _describe(
    state: DenoiserFit, recipe: str, held_out: tuple[Tensor, Tensor] | None
) -> loop.Training:
    config = state.config
    trained: list[Tensor] = [*state.objective.denoiser.parameters()]
    means: list[Tensor] = [*state.averaged.parameters()]
    optimizer = torch.optim.AdamW(
        state.objective.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    validated = set() if held_out is None else evenly_spaced(config.steps, VALIDATIONS)
    return loop.Training(
        section="denoiser",
        config=config,
        recipe=recipe,
        modules={"model": state.objective, "average": state.averaged},
        optimizer=optimizer,
        clipped=trained,
        forward=partial(_forward, state),
        set_rates=partial(set_rates, optimizer, config),
        update=partial(_update, state, trained, means),
        log_steps=log_steps(config.steps),
        evaluation_steps=validated,
        evaluate=lambda _: _validate(state, held_out),
        extra=lambda: {"init": state.init},
    )


def _forward(state: DenoiserFit, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    """(what config.loss minimises, EDM's weighted error), each [B]."""
    config, device = state.config, state.device
    size = int(batch.get("size", len(batch["id"])))
    x, label = _tensors(batch, device)
    seed, rows = seed_of("denoiser", state.seed, step - 1), process_group.rows(size)
    draws = draw((size, *x.shape[1:]), config, seed, device, rows)
    assert x.shape == draws.noise.shape, (x.shape, draws.noise.shape)
    # A turned latent is not the latent of the turned image: whoever encodes, turns.
    if config.flips and "image" in batch:
        x = turn(x, draws.symmetry)
    label = label.masked_fill(draws.dropped, state.averaged.num_classes)
    with autocast(device, config.amp):
        losses, errors = state.parallel(x, draws.sigma, draws.noise, label)
    return losses, errors + 0 * losses.detach()  # 0 times what is not finite is not finite


def _update(state: DenoiserFit, trained: list[Tensor], means: list[Tensor], step: int) -> None:
    config = state.config
    average.update(means, trained, average.decay(config, step, state.init == "scratch"))
    if config.sample_steps and step % config.sample_steps == 0 and step < config.steps:
        _write_samples(state, f"samples-{step:06d}.png")


def _tensors(batch: Batch, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """(the batch in the diffused space, float32 [B, C, h, w]; labels int64 [B])."""
    latent = batch.get("latent")
    x = (
        edm.to_tensor(np.asarray(batch["image"]), device)
        if latent is None
        else to_device(torch.as_tensor(np.asarray(latent, np.float32)), device)
    )
    return x, to_device(torch.as_tensor(np.asarray(batch["label"]), dtype=torch.int64), device)


def _held_out(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """VALIDATED images of all processes' batches, and their labels: those whose ids hash lowest.

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
    every = itertools.chain(*process_group.all_gather_object(kept))
    found = sorted(every, key=lambda row: row[0])[:VALIDATED]
    assert found, "the select role is empty"
    return torch.from_numpy(np.stack([x for _, x, _ in found])), torch.tensor(
        [int(label) for _, _, label in found]
    )


def _validate(state: DenoiserFit, held_out: tuple[Tensor, Tensor] | None) -> dict[str, float]:
    """In the main process alone: the others wait for it in the next step."""
    if held_out is None or not process_group.is_main_process():
        return {}
    loss = validation_loss(state.averaged, *held_out, state.config, state.seed, state.device)
    return {"validation_loss": loss}


def _write_samples(state: DenoiserFit, name: str) -> None:
    if process_group.is_main_process():
        state.out.mkdir(parents=True, exist_ok=True)
        given = state.averaged, state.meta, state.seed, state.device
        grid = sample_grid(*given, decode=state.decode)
        files.replace_bytes(state.out / name, tables.encode_png(grid))


def _finish(state: DenoiserFit, record: loop.TrainingRecord) -> Json:
    """Write the model and a grid of samples."""
    if process_group.is_main_process():
        made = state.meta | {"steps": record.step, "init": state.init}
        weights.save_model(state.out, state.averaged.state_dict(), made)
        _write_samples(state, "samples.png")
    process_group.barrier()
    return {
        "steps": record.step,
        "loss": record.mean_loss,
        "init": state.init,
        "fingerprint": weights.read_model(state.out)[2],
        "parameters": sum(p.numel() for p in state.averaged.parameters()),
    }


def sample_grid(
    denoiser: edm.DenoiserFn,
    meta: Json,
    seed: int,
    device: torch.device | str = "cpu",
    columns: int = 8,
    generate: cfg.Generate | None = None,
    decode: Decode = edm.to_images,
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
            for p in pipeline.generate(
                denoiser, requests, Sources(), generate, meta, device, decode=decode
            )
        ]
    )
    side = pictures.shape[1]
    return (
        pictures.reshape(-1, columns, side, side, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(-1, columns * side, 3)
    )
