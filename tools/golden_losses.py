"""Write the golden losses of tests/training/test_golden_losses.py: python tools/golden_losses.py

Twenty steps of each training, of a tiny network on phantoms, in float32 on one thread: the loss of
each step, and at the end the norms of the weights and of what parts them from their moving average.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adversa import config as cfg
from adversa.classify.fit import fit as fit_classifier
from adversa.data import phantom
from adversa.diffuse.codec_fit import fit_codec
from adversa.diffuse.fit import fit as fit_denoiser
from adversa.storage.weights import load_checkpoint
from adversa.training import schedule
from adversa.training.loop import METRICS, Batch

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "assets" / "losses"
STEPS, BATCH, SIDE = 20, 8, 16
COMMON: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "amp": False, "checkpoint_steps": 19}
# Learning rates and decays so large that a change of 2% in one of them shows within the few steps.
CONFIGS: dict[str, cfg.Classifier | cfg.Denoiser | cfg.Codec] = {
    "classifier": cfg.Classifier(
        model="test_vit",
        model_args={"img_size": SIDE, "patch_size": 4},
        lr=1e-3,
        weight_decay=4.0,
        ema=0.5,
        label_smoothing=0.1,
        loss="logit_adjusted",
        mixup=0.2,
        evaluations=STEPS,
        **COMMON,
    ),
    "denoiser": cfg.Denoiser(
        architecture="unet",
        channels=[16, 16],
        patch=2,
        lr=2e-3,
        ema=0.6,
        loss="min_snr",
        min_snr=2.0,
        **COMMON,
    ),
    "codec": cfg.Codec(kind="tiny", width=16, halvings=2, lr=5e-4, **COMMON),
}


def batches(first: int, count: int) -> Iterator[Batch]:
    """Batches first, first + 1, ... of phantoms."""
    pictures = cfg.Phantom(images=200)
    for i in range(first, first + count):
        index = [k % pictures.images for k in range(BATCH * i, BATCH * (i + 1))]
        found = [phantom.picture(k, pictures, SIDE) for k in index]
        label = np.array([phantom.CLASSES.index(f[2]) for f in found])
        yield {
            "id": [str(k) for k in index],
            "image": np.stack([f[0] for f in found]),
            "label": label,
        }


def record(config: cfg.Classifier | cfg.Denoiser | cfg.Codec) -> dict[str, list[float]]:
    """What one of the trainings goes through with this configuration."""
    classes = list(phantom.CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        out, source = Path(folder), batches(0, STEPS)
        given: dict[str, Any] = {"out": out, "seed": 0, "threads": 1, "report": lambda _: None}
        if isinstance(config, cfg.Classifier):
            fit_classifier(
                source,
                config=config,
                num_classes=len(classes),
                resolution=SIDE,
                select=lambda: batches(20, 1),
                priors=[0.3, 0.3, 0.2, 0.1, 0.1],
                **given,
            )
        elif isinstance(config, cfg.Denoiser):
            fit_denoiser(
                source,
                config=config,
                num_classes=len(classes),
                classes=classes,
                resolution=SIDE,
                select=lambda: batches(20, 1),
                **given,
            )
        else:
            fit_codec(source, config=config, resolution=SIDE, **given)
        rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
        saved = load_checkpoint(out)
    assert saved is not None
    found = {k: [r[k] for r in rows if k in r] for k in ("loss", "validation_loss")}
    return {k: v for k, v in found.items() if v} | weights(saved)


def weights(saved: dict[str, Any]) -> dict[str, list[float]]:
    """Norms of the last checkpoint's weights, and of what parts them from their average."""
    model = {k.removeprefix("denoiser."): v for k, v in saved["model"].items() if v.ndim > 1}
    found = {"weights": [norm(model)]}
    if "average" in saved:
        found["from_average"] = [norm({k: v - saved["average"][k] for k, v in model.items()})]
    return found


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for v in tensors.values()))


def main() -> None:
    schedule.LOG_STEPS = 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, config in CONFIGS.items():
        text = json.dumps(record(config), indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
