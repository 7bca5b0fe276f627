"""Make the phantom denoiser that adversa ships (adversa/diffuse/phantom), from phantom pictures no
run ever sees.

    python tools/pretrain_phantom.py --out adversa/diffuse/phantom

The pictures come from another phantom seed than a run's, so that none of them is a picture of the
demo. About 15 minutes on two cores with bf16; run again whenever adversa/data/phantom.py changes
its pictures. `--steps`, `--images` make it shorter for a look.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adversa import config as cfg
from adversa.data.images import make_decoder
from adversa.data.sources import list_records
from adversa.diffuse import edm
from adversa.diffuse.fit import fit
from adversa.storage import weights
from adversa.training.loop import resume_step

SEED = 1000  # data.phantom.seed of the pretraining pictures; the demo's is 0
MOST_BYTES = 4_000_000


def render(images: int, seed: int, resolution: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """uint8 [N, R, R, 3], labels int64 [N], classes: as `adversa prepare` would make them, all
    classes equally frequent.
    """
    data = cfg.Data(
        resolution=resolution,
        phantom=cfg.Phantom(images=images, seed=seed, tail=1.0, images_per_lesion=1.0),
    )
    listing = list_records(data)
    decode = make_decoder(data, listing.classes)
    decoded = decode(listing.records)
    pictures = np.stack([d.image for d in decoded if d.image is not None])
    labels = np.array([listing.classes.index(d.record.label) for d in decoded], dtype=np.int64)
    return pictures, labels, listing.classes


def batches(
    pictures: np.ndarray, labels: np.ndarray, size: int, first: int, steps: int
) -> Iterator[dict[str, Any]]:
    """Batch k holds pictures drawn by a generator seeded by k: a run that is resumed sees the
    batches it has missed.
    """
    for step in range(first, steps):
        rows = np.random.default_rng([SEED, step]).integers(0, len(labels), size)
        yield {"id": [str(i) for i in rows], "image": pictures[rows], "label": labels[rows]}


def half_precision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float16 where that is exact to 2^-11: weights are far from its range's ends."""
    half = {k: v.half() for k, v in state.items()}
    assert all(bool(torch.isfinite(v).all()) for v in half.values())
    return half


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=edm.SHIPPED, help="where model.safetensors and config.json go"
    )
    parser.add_argument(
        "--work", type=Path, help="training state is kept here; give the same again to resume"
    )
    parser.add_argument("--images", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--resolution", type=int, default=cfg.Data().resolution)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    work = args.work or Path(tempfile.mkdtemp(prefix="pretrain-phantom-"))

    began = time.monotonic()
    pictures, labels, classes = render(args.images, args.seed, args.resolution)
    seconds = time.monotonic() - began
    print(
        f"{len(labels)} pictures of phantom seed {args.seed} in {seconds:.0f} s; training "
        f"state in {work}",
        flush=True,
    )
    config = cfg.Denoiser(
        architecture="unet",
        patch=2,
        weights=None,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        ema=args.ema,
        checkpoint_steps=500,
    )

    def report(p: dict[str, Any]) -> None:
        if p["done"] % 50 < 2:
            print(
                f"step {p['done']}/{p['total']} loss {p['loss']:.3f} "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )

    result = fit(
        batches(pictures, labels, args.batch_size, resume_step(work), args.steps),
        config=config,
        num_classes=len(classes),
        resolution=args.resolution,
        classes=classes,
        out=work,
        seed=args.seed,
        report=report,
        threads=args.threads,
    )
    state, meta, _ = weights.read_model(work)
    meta["pretraining"] = {
        "pictures": args.images,
        "phantom_seed": args.seed,
        "steps": args.steps,
        "batch_size": args.batch_size,
    }
    fingerprint = weights.save_model(args.out, half_precision(state), meta)
    size = (args.out / weights.MODEL).stat().st_size
    print(
        f"{args.out}: {result['parameters']} parameters, {size / 1e6:.2f} MB, loss "
        f"{result['loss']:.4f}, {fingerprint}"
    )
    if size > MOST_BYTES:
        sys.exit(
            f"{size} bytes are more than the {MOST_BYTES} that may be shipped; take fewer "
            "denoiser.channels"
        )


if __name__ == "__main__":
    main()
