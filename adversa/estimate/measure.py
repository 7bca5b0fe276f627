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
class Range:
    """The least, the median and the most of a quantity."""

    low: float
    mid: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def __mul__(self, by: float) -> Range:
        return Range(self.low * by, self.mid * by, self.high * by)


@dataclass(frozen=True)
class Measured:
    """What one machine was found to do.

    seconds: of a unit of each kind; scaled: kinds timed with fewer rows than a run's steps have;
    memory: bytes at most, of the GPU or else of the process, of each training and a sampler;
    start: seconds of work of imports; took: seconds in all; share: of a core that other work left.
    """

    seconds: dict[str, Range]
    scaled: list[str]
    memory: dict[str, int]
    device: str
    gpu_memory: int | None
    start: float
    took: float
    share: float = 1.0


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

    wall, own: seconds of each of the last STEPS, and of them those that this process worked: on a
    GPU all. The first step of each size warms up.
    """

    def __init__(self, most: int, limit: float, small: int = SMALL) -> None:
        self.most, self.limit, self.rows = most, limit, min(small, most)
        self.wall, self.own = list[float](), list[float]()

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
            wall, own = _now() - before
            self.wall.append(wall)
            self.own.append(min(wall, own))

    @property
    def seconds(self) -> Range:
        """Seconds of a step on a machine without other work; at most as many as it took beside
        some.
        """
        middle = statistics.median(self.own)
        return Range(min(self.own), middle, max(*self.own, statistics.median(self.wall)))


def _now() -> np.ndarray:
    """Seconds by the clock, and those that this process worked (on a GPU: the same)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return np.full(2, time.perf_counter())
    return np.array([time.perf_counter(), time.process_time()])


def measure(config: Config, cpus: int, seconds: float = SECONDS) -> Measured:
    """On the GPU of this process where it has one. cpus: of the machine, for a training."""
    began, worked = time.perf_counter(), time.process_time()
    import torch

    # Threads that wait for each other beside other work take many times as long: then only one.
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    busy, c = not gpu and os.getloadavg()[0] > (os.cpu_count() or 1), config.cluster
    training = 1 if busy else c.training_threads or max(1, cpus // c.training_workers)
    threads = {"workers": training, "samplers": 1 if busy else c.sampler_threads, "tasks": 1}
    found, scaled, memory = dict[str, Range](), list[str](), dict[str, int]()
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
            scaled += [kind.name] if steps.rows < kind.rows else []
            if kind.by != "tasks":
                resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                memory[kind.name] = torch.cuda.max_memory_allocated() if gpu else resident
        torch.set_num_threads(before)
    took = time.perf_counter() - began
    device, total = (gpu.name, int(gpu.total_memory)) if gpu else ("cpu", None)
    share = 1.0 if gpu else min(1.0, (time.process_time() - worked) / took)
    return Measured(found, scaled, memory, device, total, start, took, share)


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
        rows = -(-section.batch_size // c.cluster.training_workers)

        def work(sizes: Iterable[int]) -> None:
            batches = map(make, itertools.chain(sizes, [2]))  # shows when the last of sizes ended
            fit(batches, report=lambda _: None, **given)

        return Kind(name, "workers", rows, work)

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
    from adversa.data import images, sources
    from adversa.diffuse import codec, edm, external
    from adversa.pipeline.latents import space
    from adversa.storage import tables

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    some, size = pictures(CHUNK, c.data.resolution), c.generate.batch_size

    def kind(
        name: str, load: Callable[[], Callable[[int], object]], rows: int, by: str = "tasks"
    ) -> Kind:
        def work(sizes: Iterable[int]) -> None:
            step = load()
            for rows in sizes:
                step(rows)

        return Kind(name, by, rows, work)

    def reader() -> Callable[[int], object]:
        listing = sources.list_records(c.data)
        decode = images.make_decoder(c.data, listing.classes)
        records = itertools.cycle(listing.records[:: max(1, len(listing.records) // 100)])

        def read(rows: int) -> list[bytes]:
            decoded = decode(list(itertools.islice(records, rows)))
            return [tables.encode_png(d.image) for d in decoded if d.image is not None]

        return read

    def scorer(name: str) -> Callable[[int], object]:
        score = make_scorer(folder / name)
        return lambda rows: score(some[:rows])

    def encoder() -> Callable[[int], object]:
        loaded = codec.load(folder / "codec", device)
        return lambda rows: loaded.encode(some[:rows])

    def index() -> Callable[[int], object]:
        found = NearCopy([str(i) for i in range(len(some))], some)
        return lambda rows: found.nearest(some[:rows])

    def denoiser() -> Callable[[int], object]:
        """One evaluation, which is nearly all of what a sampler does."""
        model: torch.nn.Module
        if c.denoiser.external:
            classes = len(sources.list_records(c.data).classes)
            model = external.read(c.denoiser.external, classes).to(device).eval()
        else:
            model = edm.load(folder / "denoiser", device)[0]
        channels, side = space(c, folder / "codec")
        x = torch.randn(size, channels, side, side, device=device)
        sigma, label = x.new_ones(size), x.new_zeros(size, dtype=torch.int64)

        @torch.no_grad()
        def step(rows: int) -> None:
            with autocast(device, c.generate.amp):
                model(x[:rows], sigma[:rows], label[:rows])

        return step

    yield kind("read", reader, 16)
    yield kind("score", partial(scorer, "classifier"), CHUNK)
    if c.mix.generates:
        yield kind("verify", partial(scorer, "verifier"), CHUNK)
        if c.codec.kind != "pixels":
            yield kind("encode", encoder, 16)
        yield kind("generate", denoiser, size, "samplers")
        yield kind("compare", index, 16)
