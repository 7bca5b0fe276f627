"""The loops that a GPU spends its time in, under a made-up CUDA: `python tests/hot_loops.py`.

Prints JSON: for each loop the waits of the host in one more unit of work (a step of training, a
chunk of 64 scored images, two noise levels in sampling), where they are, and the operations that
mix devices. Each loop runs with N and with 2 N units, so that what happens once does not count.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import made_up_cuda

COUNTS = made_up_cuda.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from adversa import config as cfg  # noqa: E402
from adversa.classify import model  # noqa: E402
from adversa.classify.fit import fit as fit_classifier  # noqa: E402
from adversa.classify.score import forward  # noqa: E402
from adversa.diffuse import edm, pipeline  # noqa: E402
from adversa.diffuse.codec_fit import fit_codec  # noqa: E402
from adversa.diffuse.fit import fit as fit_denoiser  # noqa: E402
from adversa.diffuse.guidance import classifier_gradient  # noqa: E402
from adversa.diffuse.strategy import Sources  # noqa: E402
from adversa.training.loop import Batch  # noqa: E402
from adversa.types import GenerationRequest  # noqa: E402

UNITS, ROWS, SIDE, CLASSES = 4, 8, 16, 3
COMMON: dict[str, Any] = {"batch_size": ROWS, "checkpoint_steps": 1000}
UNET = {"architecture": "unet", "channels": [16, 16], "patch": 2, "weights": None}
TRANSFORMER = {"architecture": "transformer", "width": 32, "depth": 1, "patch": 4, "weights": None}
NAMES = [f"class {k}" for k in range(CLASSES)]


def batches(count: int) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "id": [str(k) for k in range(ROWS)],
            "image": rng.integers(0, 256, (ROWS, SIDE, SIDE, 3), dtype=np.uint8),
            "label": np.arange(ROWS) % CLASSES,
        }


def denoiser(**settings: Any) -> Callable[[int], None]:
    def train(steps: int) -> None:
        config = cfg.Denoiser(**{**UNET, **settings}, steps=steps, **COMMON)
        with tempfile.TemporaryDirectory() as folder:
            given = {"num_classes": CLASSES, "classes": NAMES, "resolution": SIDE, "seed": 0}
            told = {"out": Path(folder), "threads": 1, "report": lambda _: None}
            fit_denoiser(batches(steps), config=config, **given, **told)

    return train


def classifier(**settings: Any) -> Callable[[int], None]:
    def train(steps: int) -> None:
        args = {"channels": [8, 8, 8, 8]}
        config = cfg.Classifier(
            model_args=args, input_size=32, steps=steps, evaluations=1, **COMMON, **settings
        )
        with tempfile.TemporaryDirectory() as folder:
            fit_classifier(
                batches(steps),
                config=config,
                num_classes=CLASSES,
                resolution=SIDE,
                select=lambda: batches(1),
                priors=[1 / CLASSES] * CLASSES,
                out=Path(folder),
                seed=0,
                threads=1,
                report=lambda _: None,
            )

    return train


def codec(steps: int) -> None:
    config = cfg.Codec(kind="tiny", width=16, halvings=2, steps=steps, **COMMON)
    with tempfile.TemporaryDirectory() as folder:
        fit_codec(
            batches(steps),
            config=config,
            resolution=SIDE,
            out=Path(folder),
            seed=0,
            threads=1,
            report=lambda _: None,
        )


def score(chunks: int) -> None:
    network = small_classifier()
    forward(network, np.zeros((64 * chunks, SIDE, SIDE, 3), np.uint8), amp=True)


def small_classifier() -> model.Network:
    config = cfg.Classifier(model_args={"channels": [8, 8, 8, 8]}, input_size=32)
    return model.build(config, CLASSES, SIDE).eval().to("cuda")


def sample(
    strategy: str, architecture: dict[str, Any] = UNET, **settings: Any
) -> Callable[[int], None]:
    def generate(steps: int) -> None:
        config = cfg.Generate(steps=2 * steps, batch_size=ROWS, **settings)
        trained = cfg.Denoiser(**architecture, steps=1, **COMMON)
        network = edm.build(trained, CLASSES, SIDE).eval().to("cuda")
        meta = edm.describe(trained, NAMES, SIDE)
        images = {str(k): np.full((SIDE, SIDE, 3), 16 * k, np.uint8) for k in range(ROWS)}
        half = np.zeros((SIDE, SIDE), np.float32)
        half[: SIDE // 2] = 1
        sources = Sources(images, dict.fromkeys(images, half), dict.fromkeys(images, 1 - half))
        steering = {}
        if config.classifier_guidance:
            target = small_classifier().requires_grad_(False)
            gradient = classifier_gradient(
                lambda p: target(p)[0],
                lambda x: (x + 1) / 2,
                config.classifier_guidance_objective,
            )
            steering["steering"] = pipeline.Steering(gradient)
        requests = [
            GenerationRequest(
                request_id=str(k),
                round=1,
                arm="guided",
                strategy=strategy,
                label=k % CLASSES,
                example=None if strategy == "sample" else str(k),
                sigma_start=config.sigma_max,
                guidance=2.0,
                seed=k,
                partner=str((k + 1) % ROWS) if strategy == "interpolate" else None,
                classifier_guidance=config.classifier_guidance,
                reference_guidance=config.reference_guidance,
            )
            for k in range(ROWS)
        ]
        pipeline.generate(network, requests, sources, config, meta, "cuda", **steering)

    return generate


LOOPS: dict[str, Callable[[int], None]] = {
    "denoiser, U-Net": denoiser(),
    "denoiser, transformer": denoiser(**TRANSFORMER),
    "denoiser, min_snr": denoiser(loss="min_snr"),
    "denoiser, uncertainty": denoiser(loss="uncertainty"),
    "classifier": classifier(),
    "classifier, logit_adjusted, mixup": classifier(loss="logit_adjusted", mixup=0.2),
    "classifier, turned alone": classifier(augment={"rotate": 0, "zoom": 0, "shift": 0}),
    "codec": codec,
    "score": score,
    **{
        f"sampler, {s}": sample(s)
        for s in ("sample", "img2img", "inpaint", "outpaint", "inout", "interpolate")
    },
    "sampler, transformer": sample("sample", TRANSFORMER),
    "sampler, classifier guidance": sample("img2img", classifier_guidance=1.0),
    "sampler, reference guidance": sample("img2img", reference_guidance=1.0),
}


def measured(loop: Callable[[int], None]) -> dict[str, Any]:
    found: list[Counter[tuple[str, str]]] = []
    mixed: Counter[tuple[str, str]] = Counter()
    for units in (UNITS, 2 * UNITS):
        COUNTS.clear()
        torch.manual_seed(0)
        loop(units)
        found.append(Counter(COUNTS.waits))
        mixed |= COUNTS.mixed
    more = found[1] - found[0]
    return {
        "waits": sum(more.values()) / UNITS,
        "where": {f"{what}, {where}": n / UNITS for (what, where), n in more.most_common()},
        "mixed": [f"{what}, {where}" for what, where in mixed],
    }


if __name__ == "__main__":
    names = sys.argv[1:] or list(LOOPS)
    print(json.dumps({name: measured(LOOPS[name]) for name in names}, indent=1))
