r"""How fast images are generated, beside what a user would write with diffusers and Ray: ratios of
images a second.

    python benchmarks/generation.py             the shipped denoiser: no KID
    python benchmarks/generation.py --denoiser FOLDER --classifier FOLDER --data RUN \
        --features tf_efficientnet_lite0 --weights FILE
    python benchmarks/generation.py --quick

The same weights, machine and run; each ratio is the median over the rounds of the ratio within a
round, each rate that of the work without start-up (processes, imports, loading). On one process all
CPUs of the machine; on the pool and on Ray Data one actor a CPU.

    ddim      a diffusers pipeline as it comes: DDIM, 50 steps, classifier-free guidance at every
              step, float32
    dpm       the best single-process diffusers loop: DPMSolverMultistep with Karras' levels, as
              many steps as ours, bf16 autocast
    ray data  map_batches over an actor pool that runs the dpm loop: half of the requests sample,
              half img2img at four noise levels, so a batch is cut into groups of one level each
    ours      adversa's defaults, at the same steps and guidance scale; `everywhere` is without the
              interval of guidance; `compiled` with generate.compile=true, which the batch's static
              shape is for (compilation is start-up: not in the rate)
    start     from the command `adversa generate --labels ...=1` to its image on the disk

KID (with --data) is that of `--images` samples against held-out images, for ddim and for ours.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Result, parser, publish

from adversa import config as cfg
from adversa.diffuse import edm, generator
from adversa.diffuse.strategy import Sources
from adversa.generation import benchmark
from adversa.pipeline import generate
from adversa.run import environment
from adversa.storage import tables
from adversa.types import GenerationRequest, seed_of

BATCH = 64


# ---- in one process ------------------------------------------------------------------------------


def rival(
    denoiser: edm.EDMDenoiser,
    side: int,
    kind: str,
    steps: int,
    guidance: float,
    amp: bool,
    count: int,
) -> float:
    """Images a second of a diffusers loop, batches of BATCH."""
    from rivals import Epsilon, loop

    model, started = Epsilon(denoiser, side), time.perf_counter()
    for first in range(0, count, BATCH):
        labels = np.arange(first, first + BATCH) % denoiser.num_classes
        loop(
            model,
            kind,
            labels,
            [seed_of("benchmark", first + i) for i in range(BATCH)],
            steps,
            guidance,
            amp,
        )
    return count / (time.perf_counter() - started)


# ---- over actors ---------------------------------------------------------------------------------


class Diffusers:
    """What `map_batches` runs: a batch cut into groups that start at one noise level, each by the
    dpm loop.
    """

    def __init__(self, denoiser: Path, steps: int, threads: int, stamps: Path) -> None:
        from rivals import Epsilon

        torch.set_num_threads(threads)
        model, meta, _ = edm.load(denoiser)
        self.model, self.steps, self.stamps = Epsilon(model, meta["resolution"]), steps, stamps

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        from rivals import loop

        began = time.time()
        images: list[Any] = [None] * len(batch["label"])
        for level in np.unique(batch["sigma"]):
            rows = np.flatnonzero(batch["sigma"] == level)
            start = (
                None
                if batch["sample"][rows[0]]
                else (np.stack([benchmark.case(self.model.side)] * len(rows)), float(level))
            )
            guidance = float(batch["guidance"][rows[0]])
            seeds = [int(s) for s in batch["seed"][rows]]
            found = loop(
                self.model, "dpm", batch["label"][rows], seeds, self.steps, guidance, True, start
            )
            for row, image in zip(rows, found, strict=True):
                images[row] = tables.encode_png(image)
        benchmark.stamp(self.stamps, began, len(images))
        return {"image": images}


def ray_data(
    actors: int,
    denoiser: Path,
    config: cfg.Generate,
    asked: Sequence[GenerationRequest],
    base: Path,
) -> float:
    import ray

    stamps = Path(tempfile.mkdtemp(dir=base))
    rows = [
        {
            "label": r.label,
            "seed": r.seed,
            "sigma": r.sigma_start,
            "sample": r.strategy == "sample",
            "guidance": r.guidance,
        }
        for r in asked
    ]
    data = ray.data.from_items(rows, override_num_blocks=actors * 4)
    generated = data.map_batches(
        Diffusers,
        fn_constructor_args=(denoiser, config.steps, 1, stamps),
        batch_size=BATCH,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    generated.write_parquet(tempfile.mkdtemp(dir=base))
    return benchmark.stamped(stamps)


# ---- what is compared ----------------------------------------------------------------------------

BARS = {"ddim": 8.0, "dpm": 1.25, "ray data": 1.3, "two actors": 1.0, "hardness": 1.25}


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--denoiser", type=Path, default=edm.SHIPPED)
    found.add_argument(
        "--classifier",
        type=Path,
        help="a trained classifier's folder: the cost of classifier guidance",
    )
    found.add_argument("--data", type=Path, help="a prepared run: KID against its held-out images")
    found.add_argument(
        "--features", help="of KID: a timm model with --weights, or a classifier's folder"
    )
    found.add_argument("--weights")
    found.add_argument("--images", type=int, default=512, help="a measurement; of ddim an eighth")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--kid-images", type=int, default=1000)
    return found.parse_args()


def main() -> None:
    args = arguments()
    if args.quick:
        args.images, args.rounds = BATCH, 1
    with tempfile.TemporaryDirectory() as temporary:
        publish(list(measure(args, Path(temporary))), args.json)


def measure(args: argparse.Namespace, base: Path) -> list[Result]:
    threads = environment.cpus()
    torch.set_num_threads(threads)
    config = cfg.Generate(batch_size=BATCH)
    if args.quick:
        config = config.model_copy(update={"steps": 4})
    everywhere = config.model_copy(update={"guidance_low": 0.0, "guidance_high": config.sigma_max})
    fast = config.model_copy(update={"compile": True})
    denoiser, meta, _ = edm.load(args.denoiser)
    loaded, side, classes = generator.load(args.denoiser), meta["resolution"], len(meta["classes"])
    plain, mixed = (benchmark.requests(args.images, classes, config, m) for m in (False, True))
    ddim = (
        50 if not args.quick else 4,
        config.guidance,
        False,
        max(BATCH, args.images // 8 // BATCH * BATCH),
    )
    alone: dict[str, Callable[[], float]] = {
        "ddim": lambda: rival(denoiser, side, "ddim", *ddim),
        "dpm": lambda: rival(
            denoiser, side, "dpm", config.steps, config.guidance, True, args.images
        ),
        "ours": lambda: benchmark.rate(loaded, config, plain)[0],
        "ours, compiled": lambda: benchmark.rate(loaded, fast, plain)[0],
        "ours, guided everywhere": lambda: benchmark.rate(loaded, everywhere, plain)[0],
        "ours, unguided": lambda: benchmark.rate(
            loaded, config, [replace(r, guidance=1.0) for r in plain]
        )[0],
        "ours, mixed": lambda: benchmark.rate(loaded, config, mixed)[0],
    }
    if args.classifier is not None:
        pushed = config.model_copy(update={"classifier_guidance": 0.5})
        steering = generate.steering(loaded, args.classifier, pushed)
        alone["ours, hardness"] = lambda: benchmark.rate(
            loaded, pushed, [replace(r, classifier_guidance=0.5) for r in plain], steering
        )[0]
    rates: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, run in alone.items():
            rates.setdefault(name, []).append(run())
    many = [benchmark.requests(threads * args.images, classes, config, m) for m in (False, True)]
    over_actors(args, config, *many, threads, base, rates)
    found = table(args, rates) + [
        first_image(args, meta["classes"][0], engine, base) for engine in ("local", "ray")
    ]
    return found + (quality(args, denoiser, loaded, config) if args.data else [])


def first_image(args: argparse.Namespace, label: str, engine: str, base: Path) -> Result:
    """Seconds from a command to its only image, the median over the rounds."""
    seconds = []
    for _ in range(args.rounds):
        out, started = Path(tempfile.mkdtemp(dir=base)) / "images", time.perf_counter()
        order = [
            "generate",
            "--denoiser",
            str(args.denoiser),
            "--labels",
            f"{label}=1",
            "--out",
            str(out),
            "--engine",
            engine,
        ]
        subprocess.run(
            [sys.executable, "-m", "adversa.cli", *order], check=True, capture_output=True
        )
        seconds.append(time.perf_counter() - started)
    return Result(f"start to first image, --engine {engine}", statistics.median(seconds), "s")


def over_actors(
    args: argparse.Namespace,
    config: cfg.Generate,
    plain: list[GenerationRequest],
    mixed: list[GenerationRequest],
    cpus: int,
    base: Path,
    rates: dict[str, list[float]],
) -> None:
    from adversa.distributed.engine import RayEngine

    share = config.model_copy(update={"part_size": max(BATCH, args.images // 2)})
    fast = share.model_copy(update={"compile": True})
    for _ in range(args.rounds):
        for name, threads in (("one actor of all CPUs", cpus), ("one actor a CPU", 1)):
            engine = RayEngine(cfg.Cluster(sampler_threads=threads), base / "run", 1)
            try:
                rates.setdefault(name, []).append(
                    benchmark.pool_rate(engine, args.denoiser, share, plain, base)
                )
                if threads == 1:
                    rates.setdefault("pool, mixed", []).append(
                        benchmark.pool_rate(engine, args.denoiser, share, mixed, base)
                    )
                    rates.setdefault("pool, mixed, compiled", []).append(
                        benchmark.pool_rate(engine, args.denoiser, fast, mixed, base)
                    )
                    rates.setdefault("ray data", []).append(
                        ray_data(cpus, args.denoiser, config, mixed, base)
                    )
            finally:
                engine.close()


def table(args: argparse.Namespace, rates: dict[str, list[float]]) -> list[Result]:
    found = [Result(name, statistics.median(of), "images/s") for name, of in rates.items()]

    def ratio(
        name: str, one: str, other: str, least: float | None = None, most: float | None = None
    ) -> None:
        if one not in rates or other not in rates:
            return
        value = statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))
        if args.quick or (least is None and most is None):
            found.append(Result(name, value, "x"))
        elif least is not None:
            found.append(Result(name, value, "x", f"at least {least:g}", value >= least))
        else:
            found.append(Result(name, value, "x", f"at most {most:g}", value <= most))

    ratio("ours / ddim", "ours", "ddim", BARS["ddim"])
    ratio("ours / dpm", "ours", "dpm")
    ratio("ours, compiled / dpm", "ours, compiled", "dpm", BARS["dpm"])
    ratio("ours, guided everywhere / dpm", "ours, guided everywhere", "dpm")
    ratio("pool / ray data, mixed requests", "pool, mixed", "ray data")
    ratio(
        "pool, compiled / ray data, mixed requests",
        "pool, mixed, compiled",
        "ray data",
        BARS["ray data"],
    )
    ratio(
        "one actor a CPU / one actor of all",
        "one actor a CPU",
        "one actor of all CPUs",
        BARS["two actors"],
    )
    ratio("hardness: off / on", "ours", "ours, hardness", most=BARS["hardness"])
    ratio("guidance: off / on", "ours, unguided", "ours")
    return found


def quality(
    args: argparse.Namespace,
    denoiser: edm.EDMDenoiser,
    loaded: generator.ImageGenerator,
    config: cfg.Generate,
) -> list[Result]:
    """KID of ddim's samples and of ours, of the same classes."""
    from rivals import Epsilon, loop

    from adversa.classify.features import FeatureSpace, make_features, pretrained
    from adversa.evaluate.quality import kid
    from adversa.pipeline import arms
    from adversa.pipeline.sample_quality import HELD_OUT, held_out
    from adversa.run import folder as run_folder

    data, q = args.data / "data", cfg.Quality()
    space = (
        pretrained(args.features, args.weights)
        if args.weights
        else FeatureSpace(args.features, folder=Path(args.features))
    )
    compute = make_features(space, loaded.side)
    real = [
        tables.decode_images(tables.read(data / role, ["image"], tables.EXAMPLES)["image"])
        for role in HELD_OUT
    ]
    reference = compute(np.concatenate(real))
    counts = arms.shares(
        held_out(data).tolist(),
        args.kid_images,
        [args.kid_images] * len(run_folder.classes_of(data)),
    )
    labels = np.repeat(np.arange(len(counts)), counts)
    asked = [
        replace(r, label=int(k))
        for r, k in zip(
            benchmark.requests(len(labels), len(counts), config, False), labels, strict=True
        )
    ]
    mine = np.stack([p.image for p in loaded.generate(asked, Sources(), config)])
    model, theirs = Epsilon(denoiser, loaded.side), []
    for first in range(0, len(labels), BATCH):
        part = labels[first : first + BATCH]
        seeds = [r.seed for r in asked[first : first + BATCH]]
        theirs.append(loop(model, "ddim", part, seeds, 50, config.guidance, False))
    found = {}
    for name, images in (("ours", mine), ("ddim", np.concatenate(theirs))):
        found[name] = kid(compute(images), reference, q.subsets, q.subset_size, seed_of("kid"))
    rows = [
        Result(f"KID, {name}", value, f"(sd of a subset {std:.4f})")
        for name, (value, std) in found.items()
    ]
    holds = found["ours"][0] <= found["ddim"][0]
    return [
        *rows,
        Result("KID, ours - ddim", found["ours"][0] - found["ddim"][0], "", "at most 0", holds),
    ]


if __name__ == "__main__":
    main()
