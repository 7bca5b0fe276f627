r"""Small denoisers at equal compute: validation loss and KID against held-out real images.

    python benchmarks/denoiser.py --data runs/ham --features tf_efficientnet_lite0 \
        --weights FILE --minutes 40 --threads 2
    python benchmarks/denoiser.py ... --architectures transformer --threads 1
        one a core: several of these, the same --out
    python benchmarks/denoiser.py ... --set loss=min_snr --label min-snr
        other settings of the denoiser, for all of them
    python benchmarks/denoiser.py --quick

--data is a run folder that is prepared (`adversa prepare`). Each architecture is timed first (CPU
seconds a step over --threads, which other work on the machine changes least), and given as many
steps as fit into --minutes, with its learning rate falling to zero at their end. Trained in this
process from `Feed`, without Ray; stopped and started again it goes on from its last checkpoint.
Each finished one appends a line to OUT/rows.jsonl and is not done again. The row `real images of
train` is the KID within reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import Result, parser, publish

from adversa import config as cfg
from adversa.classify.features import FeatureSpace, make_features, pretrained
from adversa.diffuse import edm, fit, pipeline
from adversa.diffuse.objective import validation_losses
from adversa.diffuse.strategy import Sources
from adversa.engine.batches import Feed
from adversa.engine.local import LocalEngine
from adversa.evaluate.quality import kid, prdc
from adversa.pipeline import arms, prepare
from adversa.pipeline import train as pipeline_train
from adversa.pipeline.sample_quality import HELD_OUT, held_out, request
from adversa.run import environment
from adversa.run import folder as run_folder
from adversa.storage import files, tables
from adversa.training.loop import Batch, resume_step
from adversa.types import digest, seed_of

# The first three cost about the same: 4.6, 5.4 and 5.4 ms of one core for an image of 32 px in
# training (batches of 64, bf16).
PRESETS: dict[str, dict[str, Any]] = {
    "unet": {"architecture": "unet", "channels": [64, 128, 128], "patch": 2, "lr": 2e-3},
    "unet-patch4": {
        "architecture": "unet",
        "channels": [128, 192],
        "layers": 2,
        "patch": 4,
        "lr": 2e-3,
    },
    "transformer": {"width": 256, "depth": 5, "patch": 4, "lr": 1e-3},
    "unet-small": {"architecture": "unet", "channels": [64, 80, 80], "patch": 2, "lr": 2e-3},
    "unet-attention": {
        "architecture": "unet",
        "channels": [64, 128, 128],
        "attention": True,
        "patch": 2,
        "lr": 2e-3,
    },
    "unet-large": {"architecture": "unet", "channels": [96, 192, 192], "patch": 2, "lr": 1.5e-3},
    "transformer-wide": {"width": 384, "depth": 4, "patch": 4, "lr": 1e-3},
}
COMPARED = ("unet", "unet-patch4", "transformer")
FLOOR = "real images of train"
WARM_UP = 12  # timed steps; the first third is left out
MOST_VALIDATED = 1024


class Clock:
    """An iterable of batches that notes the CPU seconds of this process from each to the next: of
    all steps but the last.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches
        self.seconds: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        before = None
        for batch in self.batches:
            now = time.process_time()
            if before is not None:
                self.seconds.append(now - before)
            before = now
            yield batch


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--data", type=Path, help="a prepared run folder")
    found.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/out/denoiser"),
        help="models, grids, rows.jsonl",
    )
    found.add_argument("--minutes", type=float, default=6.0, help="of training, each")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--architectures", nargs="+", choices=list(PRESETS), default=list(COMPARED))
    found.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the denoiser section, for all of them",
    )
    found.add_argument("--label", default="", help="added to the names, where settings differ")
    found.add_argument(
        "--features", help="a trained classifier's folder, or a timm model with --weights"
    )
    found.add_argument("--weights", help="imagenet or a safetensors file")
    found.add_argument("--images", type=int, default=2000, help="samples for KID")
    found.add_argument("--seed", type=int, default=0)
    args = found.parse_args()
    if not args.quick and (args.data is None or args.features is None):
        found.error("--data and --features are needed (or --quick)")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if not args.quick:
        compare(args, args.data / "data", space_of(args.features, args.weights))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.out, args.minutes, args.images = Path(temporary) / "out", 0.02, 48
        args.set += ["batch_size=8"]
        data = cfg.Data(phantom=cfg.Phantom(images=160), part_rows=64)
        prepare.prepare(LocalEngine(), data, Path(temporary) / "data")
        untrained = FeatureSpace(
            "an untrained test_resnet", config=cfg.Classifier(model="test_resnet", model_args={})
        )
        compare(args, Path(temporary) / "data", untrained)


def space_of(features: str, weights: str | None) -> FeatureSpace:
    if Path(features).is_dir():
        return FeatureSpace(features, folder=Path(features))
    if weights is None:
        sys.exit(f"--features {features}: no such folder, and a timm model needs --weights")
    return pretrained(features, weights)


def compare(args: argparse.Namespace, data: Path, space: FeatureSpace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    ledger = args.out / "rows.jsonl"
    real = Real(args, data, space)
    if FLOOR not in done(ledger):
        append(ledger, {"name": FLOOR, "features": space.name, **real.measure(real.train_images)})
    for preset in args.architectures:
        name = "-".join(
            [preset, f"{args.minutes:g}min", f"{args.threads}t", *filter(None, [args.label])]
        )
        if name not in done(ledger):
            append(ledger, {"name": name} | row(args, preset, name, data, real))
    publish(list(results(done(ledger))), args.json)


def done(ledger: Path) -> dict[str, dict[str, Any]]:
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return {found["name"]: found for found in map(json.loads, lines)}


def append(ledger: Path, found: dict[str, Any]) -> None:
    """One write of one line: several processes may share the file."""
    with open(ledger, "a") as f:
        f.write(json.dumps(found) + "\n")


def results(rows: dict[str, dict[str, Any]]) -> Iterator[Result]:
    for name, found in rows.items():
        yield Result(f"{name}: KID", found["kid"], "")
        if "validation_loss" in found:
            yield Result(f"{name}: validation loss", found["validation_loss"], "")
            yield Result(f"{name}: images trained on", found["images"], "")
            yield Result(f"{name}: training", found["ms_an_image"], "ms an image")
            yield Result(f"{name}: sampling", found["sampling_ms"], "ms an image and evaluation")


def section(args: argparse.Namespace, preset: str, **more: Any) -> cfg.Denoiser:
    """The preset, then --set, then `more`."""
    pairs = dict(text.split("=", 1) for text in args.set)
    asked = {"weights": None, "ema_width": 0.08, "checkpoint_steps": 500} | PRESETS[preset]
    asked |= {k: yaml.safe_load(v) for k, v in pairs.items()} | more
    return cfg.check({"denoiser": asked}, preset).denoiser


class Real:
    """The held-out real images, their features, and how far a set of images is from them."""

    def __init__(self, args: argparse.Namespace, data: Path, space: FeatureSpace) -> None:
        self.classes, self.data, self.images = run_folder.classes_of(data), data, args.images
        pictures = [self.read(role) for role in HELD_OUT]
        self.held, self.labels = (np.concatenate(parts) for parts in zip(*pictures, strict=True))
        self.resolution = self.held.shape[1]
        self.features = self.cached(args.out, space)
        self.counts = arms.shares(
            held_out(data).tolist(), args.images, [args.images] * len(self.classes)
        )

    def read(self, role: str) -> tuple[np.ndarray, np.ndarray]:
        table = tables.read(self.data / role, ["image", "label"], tables.EXAMPLES)
        return tables.decode_images(table["image"]), table["label"].to_numpy().astype(np.int64)

    def cached(self, out: Path, space: FeatureSpace) -> Callable[[np.ndarray], np.ndarray]:
        compute = make_features(space, self.resolution)
        found = out / f"real-{digest(space, run_folder.split_hash(self.data), size=6)}.npy"
        if not found.exists():
            np.save(found, compute(self.held))
        self.reference = np.load(found)
        return compute

    @property
    def train_images(self) -> np.ndarray:
        """As many images of `train` as samples are drawn, in the same proportions of classes, as
        far as there are so many.
        """
        images, labels = self.read("train")
        return np.concatenate([images[labels == k][:n] for k, n in enumerate(self.counts)])

    def measure(self, images: np.ndarray) -> dict[str, Any]:
        values, q = self.features(images), cfg.Quality()
        mean, std = kid(values, self.reference, q.subsets, q.subset_size, seed_of("kid"))
        return {"kid": mean, "kid_std": std, "compared": len(values)} | prdc(
            self.reference, values, q.neighbours
        )


def row(args: argparse.Namespace, preset: str, name: str, data: Path, real: Real) -> dict[str, Any]:
    """Train one preset for its budget and measure it."""
    out = args.out / name
    seconds = plan(args, preset, out, data, real)
    config = section(args, preset, steps=max(1, round(60 * args.minutes / seconds)))
    started, cpu = time.perf_counter(), time.process_time()
    begun = resume_step(out)
    trained = train(args, config, out, data, real, print_progress(name))
    wall, cpu = time.perf_counter() - started, (time.process_time() - cpu) / args.threads
    denoiser, meta, _ = edm.load(out)
    some = np.random.default_rng(0).permutation(len(real.held))[
        :MOST_VALIDATED
    ]  # the held-out images come class by class
    x, label = edm.to_tensor(real.held[some]), torch.from_numpy(real.labels[some])
    losses = validation_losses(denoiser, x, label, config, args.seed)
    pictures, sampling = sample(denoiser, meta, real)
    return {
        "minutes": args.minutes,
        "threads": args.threads,
        "steps": config.steps,
        "images": config.steps * config.batch_size,
        "parameters": trained["parameters"],
        "ms_an_image": 1e3 * seconds / config.batch_size,
        "sampling_ms": sampling,
        "seconds": wall,
        "cpu_seconds_a_thread": cpu,
        "since_step": begun,
        "training_loss": trained["loss"],
        "validation_loss": float(losses.mean()),
        "validation_losses": losses.tolist(),
        **real.measure(pictures),
        "denoiser": config.model_dump(mode="json"),
        "machine": environment.machine(),
        "commit": environment.git_commit(),
    }


def plan(args: argparse.Namespace, preset: str, out: Path, data: Path, real: Real) -> float:
    """Seconds a step, measured once: started again, a training must have the same number of
    steps.
    """
    noted = out / "step.json"
    if not noted.exists():
        with tempfile.TemporaryDirectory() as temporary:
            clock = train(args, section(args, preset, steps=WARM_UP), Path(temporary), data, real)[
                "clock"
            ]
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(
            noted, {"seconds": statistics.median(clock.seconds[WARM_UP // 3 :]) / args.threads}
        )
    return float(json.loads(noted.read_text())["seconds"])


def train(
    args: argparse.Namespace,
    config: cfg.Denoiser,
    out: Path,
    data: Path,
    real: Real,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    mix = out / "mix"
    pipeline_train.mix(data, [], [], "real", cfg.Mix(arms=["real"]), 1, mix)
    feed = Feed(
        (data / "train",),
        config.batch_size,
        mix=mix,
        steps=config.steps,
        balance=config.balance,
        seed=seed_of("feed", args.seed),
    )
    clock = Clock(feed.batches(resume_step(out)))
    trained = fit.fit(
        clock,
        config=config,
        num_classes=len(real.classes),
        resolution=real.resolution,
        classes=real.classes,
        out=out,
        seed=args.seed,
        report=report,
        threads=args.threads,
    )
    return trained | {"clock": clock}


def sample(denoiser: edm.EDMDenoiser, meta: dict[str, Any], real: Real) -> tuple[np.ndarray, float]:
    """(uint8 [N, R, R, 3], CPU milliseconds of an image and evaluation of the network over the
    threads). The noise of a sample is that of its class and number, so that all denoisers are
    compared on the same draws.
    """
    generate, guidance = cfg.Generate(solver="dpmpp_2m"), cfg.Quality().guidance
    asked = [
        request(k, i, guidance, generate.sigma_max)
        for k, n in enumerate(real.counts)
        for i in range(n)
    ]
    started = time.process_time()
    generated = pipeline.generate(denoiser, asked, Sources(), generate, meta)
    spent = (time.process_time() - started) / torch.get_num_threads()
    assert all(p.finite for p in generated), "a sample is not finite"
    return np.stack([p.image for p in generated]), 1e3 * spent / sum(
        p.evaluations for p in generated
    )


def print_progress(name: str) -> Callable[[dict[str, Any]], None]:
    told = [0.0]

    def report(p: dict[str, Any]) -> None:
        if time.monotonic() - told[0] > 30 or p["done"] == p["total"]:
            told[0] = time.monotonic()
            print(f"{name}: step {p['done']}/{p['total']}, loss {p['loss']:.4f}", flush=True)

    return report


if __name__ == "__main__":
    main()
