"""Peak memory of `adversa prepare` and of streaming training batches, with few and with ten times
as many images.

    python benchmarks/memory.py             10,000 and 100,000 phantom images of 32 px, on Ray:
                                            tens of minutes
    python benchmarks/memory.py --quick     400 and 800: the same measurements, no bar
    python benchmarks/memory.py --images 10000 40000

Memory is the sum of the proportional set sizes of all processes of a command, those of Ray and its
object store included. The bar on the ratio alone hides what is small beside Ray: 20% of the base,
spread over the images that were added, is that many bytes an image. It is printed beside the growth
that was measured, in the same unit.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Memory, Result, parser, publish

SIZES, QUICK, STEPS, BATCH, BAR = (10_000, 100_000), (400, 800), 1000, 64, 1.2


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, nargs=2, metavar=("FEW", "MANY"))
    arguments.add_argument(
        "--stream",
        type=Path,
        help="of a prepared run, stream --steps batches and end; for this program itself",
    )
    arguments.add_argument("--steps", type=int, default=STEPS)
    args = arguments.parse_args()
    if args.stream is not None:
        stream(args.stream, args.steps)
        return
    sizes = tuple(args.images or (QUICK if args.quick else SIZES))
    steps = 20 if args.quick else args.steps
    with tempfile.TemporaryDirectory() as temporary:
        found = [measure(Path(temporary) / str(n), n, steps) for n in sizes]
    few, many = found
    results = [
        Result(f"{name}, {n} images", of[key], unit)
        for key, (name, unit) in NAMES.items()
        for n, of in zip(sizes, found, strict=True)
    ]
    for key in ("prepare", "stream"):
        growth = many[key] / few[key]
        bar = "" if args.quick else f"at most {BAR:g}"
        results.append(
            Result(
                f"memory of {key}, growth", growth, "x", bar, None if args.quick else growth <= BAR
            )
        )
        name, an_image = (
            {"prepare": "prepare", "stream": "streaming"}[key],
            2**30 / (sizes[1] - sizes[0]),
        )
        results.append(
            Result(f"growth of {name}", (many[key] - few[key]) * an_image, "bytes an image")
        )
        results.append(
            Result(
                f"growth of {name} that {BAR:g} x would hide",
                (BAR - 1) * few[key] * an_image,
                "bytes an image",
            )
        )
    publish(results, args.json)


NAMES = {
    "prepare": ("memory of prepare", "GiB"),
    "stream": ("memory of streaming", "GiB"),
    "seconds": ("prepare", "s"),
    "stream_seconds": ("streaming, with the start of Ray", "s"),
}


def measure(run: Path, images: int, steps: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "adversa.cli",
        "prepare",
        "--run-dir",
        str(run),
        "--set",
        "data.resolution=32",
    ]
    command += ["--set", f"data.phantom.images={images}", "--set", f"classifier.batch_size={BATCH}"]
    prepared, seconds = watched(command)
    streamed, stream_seconds = watched(
        [sys.executable, __file__, "--stream", str(run), "--steps", str(steps)]
    )
    return {
        "prepare": prepared / 2**30,
        "stream": streamed / 2**30,
        "seconds": seconds,
        "stream_seconds": stream_seconds,
    }


def watched(command: list[str]) -> tuple[int, float]:
    """(peak memory in bytes, seconds) of a command."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    memory = Memory(process.pid, 0.25)
    if process.wait():
        sys.exit(f"ended with {process.returncode}: {' '.join(command)}")
    return memory.stop(), time.monotonic() - started


def stream(root: Path, steps: int) -> None:
    """What a training of the prepared run reads, through Ray Train and Ray Data, by a training that
    does nothing with it.
    """
    from adversa.config import Mix, load
    from adversa.distributed.engine import RayEngine
    from adversa.engine.batches import Feed
    from adversa.engine.interface import FitJob
    from adversa.pipeline import train
    from adversa.run.folder import RunDir
    from adversa.run.step_folder import Recipe

    run = RunDir(root.absolute())
    config = load(run.config)
    mix, out = run.root / "mix", run.root / "stream"
    train.mix(run.data, [], [], "real", Mix(), 1, mix)
    feed = Feed(
        folders=(run.data / "train",), batch_size=BATCH, mix=mix, steps=steps, balance=0.5, seed=0
    )
    engine = RayEngine(config.cluster, run.root, config.data.resolution**2 * 3)
    try:
        engine.fit(
            [FitJob(out, Recipe("stream", 1, {"steps": steps}, {}), look, lambda _: 0, feed)]
        )
    finally:
        engine.close()


def look(batches: Any, *, out: Path, **_: Any) -> dict[str, Any]:
    """A training's outside: reads every pixel of every batch, leaves a model of one number."""
    import torch

    from adversa.storage.weights import save_model

    sums = [int(batch["image"].sum()) for batch in batches]
    save_model(out, {"total": torch.tensor([sum(sums)])}, {"kind": "nothing"})
    return {"steps": len(sums)}


if __name__ == "__main__":
    main()
