"""Fit a small autoencoder on the user's own pictures, so that latents need no download."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversa import config as cfg
from adversa.common.symmetry import turn
from adversa.diffuse import codec
from adversa.diffuse.edm import to_tensor
from adversa.storage import files, tables, weights
from adversa.storage.path import StoragePath
from adversa.training import loop, process_group
from adversa.training.device import to_device
from adversa.training.loop import Batch
from adversa.training.precision import autocast
from adversa.training.schedule import log_steps, set_rates
from adversa.types import Json, digest, seed_of

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

SHOWN = 8  # columns of reconstructions.png
# Noise on the latents in training, against their range of [-3, 3] (the decoder's tanh): a
# denoiser's answers are never exact, and latents that may lie anywhere within the noise of each
# other are smooth. It costs 0.4 dB where the latents are exact (phantoms, 600 steps: 32.9 to 32.5
# dB) and nothing where they are off by a tenth of their spread.
NOISE = 0.05


class Autoencoder(nn.Module):
    """Encoder, noise, decoder: one forward pass, so that data parallelism can wrap it."""

    def __init__(self, model: ModelMixin) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        found: Tensor = self.model.decode(self.model.encode(x).latents + noise).sample
        return found


def fit_codec(
    batches: Iterable[Batch],
    *,
    config: cfg.Codec,
    resolution: int,
    out: StoragePath,
    seed: int,
    report: Callable[[Json], None],
    threads: int | None = None,
    select: Callable[[], Iterable[Batch]] | None = None,
    committed: Callable[[int], None] = lambda _: None,
) -> Json:
    """Fit for config.steps steps; write the model, metrics.jsonl and reconstructions.png.

    Resumed from a checkpoint, it ends with the very weights of an undisturbed run.

    Args:
        batches: From step resume_step(out) on: "image" uint8 [B, R, R, 3].
        config: The autoencoder and its schedule.
        resolution: R.
        out: The model's folder, which holds checkpoints too.
        seed: Of all that is drawn.
        report: Told of the progress, in the main process alone.
        threads: Of torch; None: as many as it has.
        select: Pictures it is not fitted on; their PSNR is told and chooses nothing.
        committed: Called in every process, with the step, once a checkpoint is on disk.

    Returns:
        {"steps", "loss", "psnr" (dB; None without select), "fingerprint", "parameters"}.

    Raises:
        UserError: A loss, a gradient or a weight is not finite (step and ids), or the checkpoint is
            one of other settings.
    """
    assert config.is_fitted and resolution % 2**config.halvings == 0, (config, resolution)
    recipe = digest(config.model_dump_json(exclude={"checkpoint_steps"}), resolution, seed)
    with loop.session(threads) as device:
        torch.manual_seed(seed_of("codec", seed))
        model = codec.build(config)
        module: nn.Module = model  # whose `to` has types
        module.to(device).to(memory_format=torch.channels_last).train()
        training = _describe(config, model, recipe, seed, device)
        record = loop.run(training, batches, loop.load(out, recipe), out, report, committed)
        if process_group.is_main_process():
            model.eval()
            meta = codec.describe(model, "fitted", steps=record.step, resolution=resolution)
            weights.save_model(out, model.state_dict(), meta)
        process_group.barrier()
        loaded = codec.load(out, device)
        psnr = None if select is None else _reconstruct(loaded, select(), out)
    return {
        "steps": record.step,
        "loss": record.mean_loss,
        "psnr": psnr,
        "fingerprint": loaded.fingerprint,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


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
    return turn(x, to_device(torch.randint(0, views, (size,), generator=generator)[rows], x.device))


def _describe(
    config: cfg.Codec, model: ModelMixin, recipe: str, seed: int, device: torch.device
) -> loop.Training:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    parallel = process_group.data_parallel(Autoencoder(model), device)
    return loop.Training(
        section="codec",
        config=config,
        recipe=recipe,
        modules={"model": model},
        optimizer=optimizer,
        clipped=parameters,
        forward=partial(_forward, config, parallel, seed, device),
        set_rates=partial(set_rates, optimizer, config),
        log_steps=log_steps(config.steps),
    )


def _forward(
    config: cfg.Codec, parallel: nn.Module, seed: int, device: torch.device, batch: Batch, step: int
) -> tuple[Tensor, Tensor]:
    """Losses [B] of a batch; they are what is reported too."""
    generator = torch.Generator("cpu").manual_seed(seed_of("codec", seed, step - 1))
    size = int(batch.get("size", len(batch["id"])))
    rows = process_group.rows(size)
    x = to_tensor(np.asarray(batch["image"]), device)
    x = turned(x, config.views, generator, rows, size)
    side = x.shape[-1] >> config.halvings
    noise = torch.randn(size, config.latent_channels, side, side, generator=generator)
    noise = to_device((NOISE * noise)[rows], device)
    with autocast(device, config.amp):
        y = parallel(x.to(memory_format=torch.channels_last), noise)
    each = losses(x, y)
    return each, each


def _reconstruct(
    loaded: codec.ImageCodec, batches: Iterable[Batch], out: StoragePath
) -> float | None:
    """Mean PSNR in dB; some pictures are shown: originals above, reconstructions below."""
    found: list[float] = []
    shown: list[np.ndarray] = []
    for batch in batches:
        images = np.asarray(batch["image"])
        if not len(images):
            continue
        again = loaded.decode(loaded.to_space(images))
        pairs = list(zip(images, again, strict=True))
        found += [codec.psnr(a[None], b[None]) for a, b in pairs]
        shown += [np.concatenate(pair) for pair in pairs][: SHOWN - len(shown)]
    if shown and process_group.is_main_process():
        grid = np.concatenate(shown, axis=1)
        files.replace_bytes(out / "reconstructions.png", tables.encode_png(grid))
    every = process_group.all_gather_rows(np.array(found))
    return float(every.mean()) if len(every) else None
