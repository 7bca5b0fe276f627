"""Seconds that this machine takes for each kind of work: real steps of the run's own networks."""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adversa.config import Config, verifier_of
from adversa.training.precision import autocast
from adversa.types import UserError

SECONDS = 20.0  # of all kinds together; longer where their smallest steps take longer
STEPS, SMALL, CLASSES = 5, 4, ["0", "1"]  # timed steps of a kind; rows of its first ones
SHORT = {"steps": STEPS + 4, "weights": None, "evaluations": 1, "head_steps": 0} | {
    "first_size": None,
    "sample_steps": 0,
    "compile": False,
}


@dataclass(frozen=True)
class Measured:
    """What one machine was found to do.

    seconds: of a unit of each kind; memory: bytes at most, of the GPU or else of the process, of
    each training and a sampler; start: seconds of imports; took: seconds in all.
    """

    seconds: dict[str, float]
    memory: dict[str, int]
    gpu_memory: int | None
    start: float
    took: float


class Kind(NamedTuple):
    """Work that is measured. rows: of a step in a run; by: workers, samplers or tasks do it.

    work: does a step of each of so many rows. A unit is a step of a training, else a row.
    """

    name: str
    by: str
    rows: int
    work: Callable[[Iterable[int]], None]


class Steps:
    """Rows of STEPS + 3 steps: two of `small`, then as many as fit `limit` seconds, at most `most`.

    took: seconds of each of the last STEPS. The first step of each size warms up.
    """

    def __init__(self, most: int, limit: float, small: int = SMALL) -> None:
        self.most, self.limit, self.rows = most, limit, min(small, most)
        self.took = list[float]()

    def __iter__(self) -> Iterator[int]:
        yield self.rows
        before = _now()
        yield self.rows
        room = self.rows * self.limit / ((STEPS + 1) * min(_now() - before))
        self.rows = min(self.most, max(self.rows, int(room)))
        yield self.rows
        for _ in range(STEPS):
            before = _now()
            yield self.rows
            self.took.append(min(_now() - before))

    @property
    def seconds(self) -> float:
        """Seconds of a step on a machine without other work: their median."""
        return statistics.median(self.took)


def _now() -> np.ndarray:
    """Seconds by the clock, and those that this process worked (on a GPU: the same)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return np.full(2, time.perf_counter())
    return np.array([time.perf_counter(), time.process_time()])


def measure(config: Config, cpus: int, seconds: float = SECONDS) -> Measured:
    """On the GPU of this process where it has one. cpus: of the machine, for a training."""
    began, worked, c = time.perf_counter(), time.process_time(), config.cluster
    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    # Threads that wait for each other beside other work take many times as long: then only one.
    busy = not gpu and os.getloadavg()[0] > (os.cpu_count() or 1)
    training = 1 if busy else c.training_threads or max(1, cpus // c.training_workers)
    threads = {"workers": training, "samplers": 1 if busy else c.sampler_threads, "tasks": 1}
    found, memory = dict[str, float](), dict[str, int]()
    with tempfile.TemporaryDirectory(prefix="adversa-plan-") as folder, torch.random.fork_rng([]):
        kinds = [*trained(config, Path(folder), training), *applied(config, Path(folder))]
        start, before = time.process_time() - worked, torch.get_num_threads()
        until = time.perf_counter() + seconds
        for i, kind in enumerate(kinds):
            small = kind.rows if kind.by == "tasks" else SMALL
            steps = Steps(kind.rows, (until - time.perf_counter()) / (len(kinds) - i), small)
            torch.set_num_threads(threads[kind.by])
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            try:
                kind.work(steps)
            except torch.OutOfMemoryError:
                large = f"a step of {steps.rows} rows is too large for this GPU"
                raise UserError(f"{kind.name}: {large}; lower its batch_size") from None
            unit = (kind.rows if kind.by == "workers" else 1) / steps.rows
            found[kind.name] = steps.seconds * unit
            if kind.by != "tasks":
                resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                memory[kind.name] = torch.cuda.max_memory_allocated() if gpu else resident
        torch.set_num_threads(before)
    total = int(gpu.total_memory) if gpu else None
    return Measured(found, memory, total, start, time.perf_counter() - began)


# ---- the table of what is measured --------------------------------------------------------------


def pictures(rows: int, side: int) -> np.ndarray:
    """Random ones, uint8 [rows, side, side, 3]."""
    return np.random.default_rng(rows).integers(0, 256, (rows, side, side, 3), np.uint8)


def trained(c: Config, folder: Path, threads: int) -> Iterator[Kind]:
    """The trainings of a run; their models stay in `folder`, a given codec lies there first."""
    from adversa.classify.fit import fit as fit_classifier
    from adversa.diffuse import codec, edm
    from adversa.diffuse.codec_fit import fit_codec
    from adversa.diffuse.fit import fit as fit_denoiser
    from adversa.pipeline.latents import space

    def batch(rows: int) -> dict[str, Any]:
        labels, image = np.arange(rows) % len(CLASSES), pictures(rows, c.data.resolution)
        return {"id": [str(i) for i in range(rows)], "label": labels, "image": image}

    def latents(rows: int) -> dict[str, Any]:
        drawn = np.random.default_rng(rows).standard_normal((rows, channels, side, side))
        return batch(rows) | {"latent": drawn.astype(np.float32)}

    def training(name: str, fit: Any, section: Any, make: Any = batch, **given: Any) -> Kind:
        kept = type(section).model_fields
        short = section.model_copy(update={k: v for k, v in SHORT.items() if k in kept})
        given |= {"config": short, "out": folder / name, "seed": 0, "threads": threads}

        def work(sizes: Iterable[int]) -> None:
            batches = map(make, itertools.chain(sizes, [2]))  # shows when the last of sizes ended
            fit(batches, report=lambda _: None, **given)

        return Kind(name, "workers", -(-section.batch_size // c.cluster.training_workers), work)

    network: dict[str, Any] = {"num_classes": len(CLASSES), "resolution": c.data.resolution}
    scored = network | {"counts": [1, 1], "priors": [0.5, 0.5], "select": lambda: [batch(2)]}
    yield training("classifier", fit_classifier, c.classifier, **scored)
    if not c.mix.generates:
        return
    yield training("verifier", fit_classifier, verifier_of(c), **scored)
    if c.codec.is_fitted:
        yield training("codec", fit_codec, c.codec, resolution=c.data.resolution)
    elif c.codec.kind != "pixels":
        codec.fetch(c.codec, c.data.resolution, folder / "codec")
    if not c.denoiser.external:
        channels, side = space(c, folder / "codec")
        network |= {"resolution": side, "channels": channels, "classes": CLASSES}
        network |= {"decode": lambda x: edm.to_images(x[:, [0, 0, 0]])}
        yield training("denoiser", fit_denoiser, c.denoiser, latents, **network)


def applied(c: Config, folder: Path) -> Iterator[Kind]:
    """What a run does with the source's pictures, and with the models in `folder`."""
    import torch

    from adversa.classify.score import CHUNK, make_scorer
    from adversa.curate.near_copy import NearCopy
    from adversa.diffuse import codec

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    some = pictures(CHUNK, c.data.resolution)

    def kind(name: str, load: Callable[[], Callable[[Any], object]], rows: int) -> Kind:
        def work(sizes: Iterable[int]) -> None:
            step = load()
            for rows in sizes:
                step(some[:rows])

        return Kind(name, "tasks", rows, work)

    yield kind("read", partial(_reader, c), 16)
    yield kind("score", lambda: make_scorer(folder / "classifier"), CHUNK)
    if c.mix.generates:
        yield kind("verify", lambda: make_scorer(folder / "verifier"), CHUNK)
        if c.codec.kind != "pixels":
            yield kind("encode", lambda: codec.load(folder / "codec", device).encode, 16)
        size = c.generate.batch_size
        yield Kind("generate", "samplers", size, partial(_evaluate, c, folder, device))
        yield kind("compare", lambda: NearCopy([str(i) for i in range(CHUNK)], some).nearest, 16)


def _reader(c: Config) -> Callable[[np.ndarray], object]:
    """Decodes as many of the source's pictures as it is given rows, and encodes them as PNG."""
    from adversa.data import images, sources
    from adversa.storage import tables

    listing = sources.list_records(c.data)
    decode = images.make_decoder(c.data, listing.classes)
    records = itertools.cycle(listing.records[:: max(1, len(listing.records) // 100)])

    def step(rows: np.ndarray) -> list[bytes]:
        decoded = decode(list(itertools.islice(records, len(rows))))
        return [tables.encode_png(d.image) for d in decoded if d.image is not None]

    return step


def _evaluate(c: Config, folder: Path, device: Any, sizes: Iterable[int]) -> None:
    """Evaluations of the denoiser, which are nearly all of what a sampler does."""
    import torch

    from adversa.data import sources
    from adversa.diffuse import edm, external
    from adversa.pipeline.latents import space

    if c.denoiser.external:
        classes = len(sources.list_records(c.data).classes)
        model: torch.nn.Module = external.read(c.denoiser.external, classes).to(device).eval()
    else:
        model = edm.load(folder / "denoiser", device)[0]
    channels, side = space(c, folder / "codec")
    x = torch.randn(c.generate.batch_size, channels, side, side, device=device)
    sigma, label = x.new_ones(len(x)), x.new_zeros(len(x), dtype=torch.int64)
    for rows in sizes:
        with torch.no_grad(), autocast(device, c.generate.amp):
            model(x[:rows], sigma[:rows], label[:rows])
