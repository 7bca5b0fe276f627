"""How fast a denoiser generates on this machine or cluster: what `adversa bench generate` measures.

Rates are of the work alone: processes, imports and loading are not in them.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from adversa import config as cfg
from adversa.engine.interface import Engine
from adversa.engine.tasks import Make, Part, TaskStats, Work
from adversa.storage import tables
from adversa.storage.path import StoragePath
from adversa.types import GenerationRequest, UserError, seed_of

if TYPE_CHECKING:
    from adversa.diffuse.generator import ImageGenerator
    from adversa.diffuse.pipeline import Steering

LEVELS = (0.5, 1.0, 2.0, 4.0)  # of the varied half of mixed requests
CASE = "case"


@dataclass(frozen=True)
class Measurement:
    """A measured figure."""

    name: str
    value: float
    unit: str


def requests(
    count: int, classes: int, config: cfg.Generate, mixed: bool = False
) -> list[GenerationRequest]:
    """Classes in turn. mixed: every second request varies a picture, at the LEVELS in turn."""
    found = []
    for i in range(count):
        varies = mixed and i % 2 == 1
        found.append(
            GenerationRequest(
                f"{i:06d}",
                1,
                "guided",
                "img2img" if varies else "sample",
                i % classes,
                CASE if varies else None,
                LEVELS[i // 2 % len(LEVELS)] if varies else config.sigma_max,
                config.guidance,
                seed_of("benchmark", i),
            )
        )
    return found


def case(side: int) -> np.ndarray:
    """A picture to start from, uint8 [side, side, 3]."""
    y, x = np.mgrid[:side, :side]
    return np.stack(
        [120 + y * 80 // side, 90 + x * 60 // side, np.full((side, side), 110)], 2
    ).astype(np.uint8)


def rate(
    loaded: ImageGenerator,
    config: cfg.Generate,
    requested: Sequence[GenerationRequest],
    steering: Steering | None = None,
) -> tuple[float, float]:
    """(images, evaluations) a second in this process."""
    from adversa.diffuse.strategy import Sources

    pipeline, started = loaded.pipeline(config, steering), time.perf_counter()
    evaluations = [
        p.evaluations for p in pipeline.stream(requested, Sources({CASE: case(loaded.side)}))
    ]
    seconds = time.perf_counter() - started
    assert len(evaluations) == len(requested), (len(evaluations), len(requested))
    return len(requested) / seconds, sum(evaluations) / seconds


# ---- the device ----------------------------------------------------------------------------------


def peak(side: int = 2048, seconds: float = 1.0) -> float:
    """FLOP a second of products of bfloat16 matrices [side, side] on this process's device, the
    best of many.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def flops(loaded: ImageGenerator) -> int:
    """FLOP of one evaluation of one row: its matrix products and convolutions, as torch counts
    them.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    side, rows = loaded.meta["resolution"], 2
    x = torch.zeros(rows, loaded.meta.get("channels", 3), side, side, device=loaded.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loaded.denoiser(
            x,
            torch.ones(rows, device=loaded.device),
            torch.zeros(rows, dtype=torch.int64, device=loaded.device),
        )
    return int(counter.get_total_flops() // rows)


def memory() -> float:
    """GiB at most so far: of the GPU's memory where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---- over actors ---------------------------------------------------------------------------------


def stamp(folder: Path, began: float, rows: int) -> None:
    """Note when a piece of work began and ended."""
    (folder / f"{time.time_ns()}-{os.getpid()}").write_text(f"{began} {time.time()} {rows}")


def stamped(folder: Path) -> float:
    """Images a second from the first beginning to the last end of what was noted."""
    rows = [tuple(map(float, p.read_text().split())) for p in folder.iterdir()]
    return sum(r[2] for r in rows) / (max(r[1] for r in rows) - min(r[0] for r in rows))


def make_stamped(denoiser: StoragePath, config: cfg.Generate, stamps: Path) -> Work:
    """Generates a part's requests and commits them as a run does, and notes when."""
    import torch

    from adversa.diffuse import generator
    from adversa.diffuse.strategy import Sources

    loaded = generator.load(denoiser, "cuda" if torch.cuda.is_available() else "cpu")
    pipeline, pictures = loaded.pipeline(config), Sources({CASE: case(loaded.side)})

    def work(part: Part, path: StoragePath) -> TaskStats:
        began = time.time()
        found = list(
            pipeline.stream([GenerationRequest(**r) for r in part.payload["requests"]], pictures)
        )
        tables.write_part(path, pa.table({"image": [tables.encode_png(p.image) for p in found]}))
        stamp(stamps, began, len(found))
        return TaskStats(len(found), sum(p.evaluations for p in found))

    return work


def pool_rate(
    engine: Engine,
    denoiser: StoragePath,
    config: cfg.Generate,
    requested: Sequence[GenerationRequest],
    base: Path,
) -> float:
    """Images a second of an engine's samplers. base: a folder that all of them see."""
    stamps, out = (Path(tempfile.mkdtemp(dir=base)) for _ in range(2))
    chunks = [
        requested[i : i + config.part_size] for i in range(0, len(requested), config.part_size)
    ]
    parts = [
        Part(i, len(chunk), {"requests": [asdict(r) for r in chunk]})
        for i, chunk in enumerate(chunks)
    ]
    make: Make = partial(make_stamped, denoiser, config, stamps)
    engine.map_parts(make, parts, out, lambda _: None)
    return stamped(stamps)


# ---- the whole -----------------------------------------------------------------------------------


def variants(config: cfg.Generate, classifier: bool) -> dict[str, cfg.Generate]:
    """What costs are told apart, by name; the first is what the others are compared with."""
    found = {
        "unguided": config.model_copy(update={"guidance": 1.0}),
        "classifier-free, in its interval": config,
        "classifier-free, everywhere": config.model_copy(
            update={"guidance_low": 0.0, "guidance_high": config.sigma_max}
        ),
        "reference guidance in pixels": config.model_copy(update={"reference_guidance": 0.5}),
    }
    if classifier:
        found["classifier guidance"] = config.model_copy(update={"classifier_guidance": 0.5})
    return found


STRENGTHS = ("guidance", "classifier_guidance", "reference_guidance")


def generate(
    denoiser: StoragePath,
    classifier: StoragePath | None,
    config: cfg.Generate,
    engines: Mapping[int | None, Callable[[], Engine]],
    images: int,
    rounds: int,
    base: Path,
) -> Iterator[Measurement]:
    """Rates, costs of guidance, share of the peak, and memory of this process; then of engines:
    {samplers: makes an engine}.

    None: as many samplers as there is room for. UserError where there is no room for a number.
    base: a folder that all nodes see.
    """
    import statistics

    from adversa.diffuse import generator
    from adversa.pipeline import generate as pipeline_generate

    loaded = generator.load(denoiser, pipeline_generate.device_name())
    plain = requests(images, len(loaded.meta["classes"]), config)
    found: dict[str, list[tuple[float, float]]] = {}
    settings = variants(config, classifier is not None)
    rate(loaded, config, plain[: config.batch_size])  # kernels and compilation
    for _ in range(rounds):
        for name, section in settings.items():
            strengths = {k: getattr(section, k) for k in STRENGTHS}
            requested = [replace(r, example=CASE, **strengths) for r in plain]
            steering = pipeline_generate.steering(loaded, classifier, section)
            found.setdefault(name, []).append(rate(loaded, section, requested, steering))
    for name, rates in found.items():
        median = statistics.median(r[0] for r in rates)
        yield Measurement(f"one sampler, {name}", median, "images/s")
    first = next(iter(found))
    for name in list(found)[1:]:
        cost = statistics.median(
            a[0] / b[0] for a, b in zip(found[first], found[name], strict=True)
        )
        yield Measurement(f"cost of {name}", cost, f"x {first}")
    evaluations = statistics.median(r[1] for r in found[first])
    yield Measurement("evaluations", evaluations, "1/s")
    yield Measurement("an evaluation", flops(loaded) / 1e9, "GFLOP")
    most = peak()
    yield Measurement("bf16 matrix peak, measured", most / 1e12, "TFLOP/s")
    yield Measurement("share of that peak", evaluations * flops(loaded) / most, "")
    yield Measurement("memory", memory(), "GiB")
    yield from _scaling(denoiser, config, engines, plain, rounds, base)


def _scaling(
    denoiser: StoragePath,
    config: cfg.Generate,
    engines: Mapping[int | None, Callable[[], Engine]],
    requested: Sequence[GenerationRequest],
    rounds: int,
    base: Path,
) -> Iterator[Measurement]:
    import statistics

    medians: dict[int, float] = {}
    for wanted, make in engines.items():
        engine = make()
        try:
            samplers = engine.samplers()
            if wanted not in (None, samplers):
                raise UserError(
                    f"--samplers {wanted}: there is room for {samplers}; take at most so "
                    "many, or --engine ray"
                )
            if samplers in medians:
                continue
            many = [
                replace(r, request_id=f"{r.request_id}-{k}")
                for k in range(samplers)
                for r in requested
            ]  # as much for each
            medians[samplers] = statistics.median(
                pool_rate(engine, denoiser, config, many, base) for _ in range(rounds)
            )
        finally:
            engine.close()
        yield Measurement(f"pool of {samplers}", medians[samplers], "images/s")
        least = min(medians)
        if samplers != least:
            yield Measurement(
                f"pool of {samplers}, scaling",
                medians[samplers] / medians[least] * least / samplers,
                f"of {least}'s, each",
            )
