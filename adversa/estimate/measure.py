"""How fast this machine does each kind of a run's work, found in seconds: real steps of the run's
own networks on random images.

A step too long for the time there is is measured with fewer rows and scaled; torch.compile is left
out, for it alone takes longer.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adversa import config as cfg
from adversa.types import UserError

SECONDS = 20.0  # in all
SHARES = {  # of that time
    "read": 1,
    "classifier": 4,
    "judge": 4,
    "denoiser": 4,
    "codec": 3,
    "paint": 4,
    "score": 1.5,
    "judge score": 1.5,
    "index": 1.5,
    "compare": 1.5,
    "encode": 1,
}
FIRST, GROWTH, MOST = 4, 4, 200  # rows of the first step, their growth; steps of a measurement
TICKS = 2  # calls of the denoiser that are timed at least
LONG = 10**9  # steps that a training is told of, so that none of its evaluations is due
CLASSES = 7  # where they are not known: what hangs on their number costs nothing


@dataclass(frozen=True)
class Timing:
    """Seconds of a unit of work: the median, and the 10th and 90th percentile of what was measured.
    scaled: from fewer rows.
    """

    seconds: float
    fast: float
    slow: float
    count: int
    scaled: bool = False


@dataclass(frozen=True)
class Measured:
    """What one machine was found to do. memory: bytes of a training or a sampler at its work;
    missing where it was not counted.

    device: cpu, or the GPU's name; start: seconds that a process takes to import what it works
    with; seconds: of it all; share: how much of a core the measurement had, on average (on a
    machine with other work, less than the one it wants).
    """

    timings: dict[str, Timing]
    memory: dict[str, int]
    device: str
    gpu_memory: int | None
    start: float
    seconds: float
    share: float = 1.0


class Enough(Exception):
    """Ends a training that is only timed."""


class Clocked:
    """Batches for a training, and the seconds it took for each: it asks for the next one when it is
    done with the last.

    Their rows grow up to `rows`, as long as a step of the next size is likely to fit `seconds`.
    """

    def __init__(self, rows: int, seconds: float, make: Callable[[int], dict[str, Any]]) -> None:
        self.rows, self.seconds, self.make = rows, seconds, make
        self.size, self.steps = min(rows, FIRST), list[float]()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield self.make(self.size)  # a process's first step imports and allocates
        until, fresh = time.perf_counter() + self.seconds, False
        while True:
            batch, began = self.make(self.size), time.perf_counter()
            yield batch
            took, left = time.perf_counter() - began, until - time.perf_counter()
            larger = min(self.rows, self.size * GROWTH)
            if not fresh and larger > self.size and 3 * took * larger / self.size < left:
                self.size, self.steps, fresh = larger, [], True
                continue
            if (
                not fresh or left <= 0
            ):  # the first step of a size is a warm-up, unless there is no time for another
                self.steps.append(took)
            fresh = False
            if left <= 0 or len(self.steps) >= MOST:
                raise Enough

    def timing(self) -> Timing:
        return timing([s * self.rows / self.size for s in self.steps], self.size < self.rows)


def timing(seconds: Sequence[float], scaled: bool = False) -> Timing:
    fast, median, slow = np.quantile(seconds, [0.1, 0.5, 0.9])
    return Timing(float(median), float(fast), float(slow), len(seconds), scaled)


def repeated(
    work: Callable[[], object], seconds: float, units: float = 1, most: int = MOST
) -> Timing:
    """Of one of `units` that each call does, after a first call that is a warm-up."""
    work()
    until, found = time.perf_counter() + seconds, list[float]()
    while not found or (time.perf_counter() < until and len(found) < most):
        began = time.perf_counter()
        work()
        found.append((time.perf_counter() - began) / units)
    return timing(found)


# ---- the whole -----------------------------------------------------------------------------------


def measure(config: cfg.Config, cpus: int, seconds: float = SECONDS) -> Measured:
    """On the GPU of this process where it has one. cpus: of the machine, for the threads of a
    training worker.
    """
    began, worked = time.perf_counter(), time.process_time()
    import torch

    from adversa.classify import fit as _  # noqa: F401  (timm)
    from adversa.diffuse import network as __  # noqa: F401  (diffusers)

    start, before = time.perf_counter() - began, torch.get_num_threads()
    gpu = torch.cuda.is_available()
    kinds = kinds_of(config)
    scale = seconds / sum(SHARES[k] for k in kinds)
    timings: dict[str, Timing] = {}
    memory: dict[str, int] = {}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="adversa-plan-") as folder,
            torch.random.fork_rng(devices=[]),
        ):
            bench = Bench(config, max(1, cpus), Path(folder))
            for kind in kinds:
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                timings[kind] = bench.time(kind, scale * SHARES[kind])
                if gpu and kind in TRAINED | {"paint"} and not timings[kind].scaled:
                    memory[kind] = torch.cuda.max_memory_allocated()
            if not gpu:
                memory = bench.memory(kinds, began + 2 * seconds)
    finally:
        torch.set_num_threads(before)
    properties = torch.cuda.get_device_properties(0) if gpu else None
    device, total = (
        (properties.name, int(properties.total_memory)) if properties is not None else ("cpu", None)
    )
    took = time.perf_counter() - began
    return Measured(
        timings, memory, device, total, start, took, (time.process_time() - worked) / took
    )


TRAINED = {"classifier", "judge", "denoiser", "codec"}


def kinds_of(config: cfg.Config) -> list[str]:
    """The kinds of work of a run, as keys of SHARES."""
    found = ["read", "classifier", "score"]
    if not config.mix.paints:
        return found
    found += ["judge", "judge score", "paint", "index", "compare"]
    if config.denoiser.external is None:
        found.append("denoiser")
    if config.codec.kind != "pixels":
        found += ["codec", "encode"] if config.codec.is_fitted else ["encode"]
    return [k for k in SHARES if k in found]


class Bench:
    """The measurements, a method a kind. cpus: of the machine."""

    def __init__(self, config: cfg.Config, cpus: int, folder: Path) -> None:
        self.config, self.cpus, self.folder = config, cpus, folder
        self.random = np.random.default_rng(0)

    def time(self, kind: str, seconds: float) -> Timing:
        """Of a step at the configuration's batch size (a worker's share), of an image, or of an
        evaluation of the denoiser.
        """
        import torch

        c = self.config.cluster
        threads = {"paint": c.sampler_threads} | dict.fromkeys(TRAINED, self._training_threads())
        torch.set_num_threads(threads.get(kind, 1))  # Ray gives a task one
        if kind in TRAINED:
            clocked = Clocked(self._rows(kind), seconds, lambda rows: self._batch(kind, rows))
            self._train(kind, clocked)
            return clocked.timing()
        return getattr(self, "_" + kind.replace(" ", "_"))(seconds)

    def memory(self, kinds: Sequence[str], until: float = math.inf) -> dict[str, int]:
        """Bytes of tensors at the height of a step, counted with few rows: so many fixed, and so
        many a row. An estimate.

        Nothing is begun after `until` (time.perf_counter): then some are missing.
        """
        from adversa.estimate.memory import of_rows, peak

        found = {}
        for kind in [k for k in kinds if k in TRAINED]:
            if time.perf_counter() > until:
                return found
            small, large = (
                peak(lambda n=n, kind=kind: self._train(kind, self._few(kind, n))) for n in (2, 4)
            )
            found[kind] = of_rows(small, large, 2, 4, self._rows(kind))
        if "paint" in kinds and time.perf_counter() < until:
            batch = self.config.generate.batch_size
            small, large = (peak(lambda n=n: self._paint(0.0, n)) for n in (2, 4))
            found["paint"] = of_rows(small, large, 2, 4, batch)
        return found

    # ---- training --------------------------------------------------------------------------------

    def _rows(self, kind: str) -> int:
        return -(-self._section(kind).batch_size // self.config.cluster.training_workers)

    def _training_threads(self) -> int:
        c = self.config.cluster
        return c.training_threads or max(1, self.cpus // c.training_workers)

    def _section(self, kind: str) -> Any:
        c = self.config
        return {
            "classifier": c.classifier,
            "judge": cfg.judge_of(c),
            "denoiser": c.denoiser,
            "codec": c.codec,
        }[kind]

    def _few(self, kind: str, rows: int) -> Iterator[dict[str, Any]]:
        yield self._batch(kind, rows)
        yield self._batch(kind, rows)
        raise Enough

    def _batch(self, kind: str, rows: int) -> dict[str, Any]:
        channels, side = self.space() if kind == "denoiser" else (3, self.config.data.resolution)
        found = {
            "id": [str(i) for i in range(rows)],
            "label": np.arange(rows, dtype=np.int64) % CLASSES,
        }
        if kind == "denoiser" and self.config.codec.kind != "pixels":
            return found | {
                "latent": self.random.standard_normal((rows, channels, side, side)).astype(
                    np.float32
                )
            }
        return found | {"image": self._images(rows, side)}

    def _train(self, kind: str, batches: Any) -> None:
        section, threads = self._section(kind), self._training_threads()
        given: dict[str, Any] = {
            "out": Path(tempfile.mkdtemp(dir=self.folder)),
            "threads": threads,
            "seed": 0,
            "report": _silent,
        }
        resolution = self.config.data.resolution
        try:
            if kind in ("classifier", "judge"):
                from adversa.classify import fit as classify

                # Images of their full size from the first step on; what is frozen for some steps
                # costs less than this.
                changes = {"weights": None, "steps": LONG, "head_steps": 0, "first_size": None}
                classify.fit(
                    batches,
                    config=section.model_copy(update=changes),
                    num_classes=CLASSES,
                    resolution=resolution,
                    select=_nothing,
                    counts=[1.0] * CLASSES,
                    priors=[1 / CLASSES] * CLASSES,
                    **given,
                )
            elif kind == "denoiser":
                from adversa.diffuse import fit as diffuse

                channels, side = self.space()
                changes = {"weights": None, "steps": LONG, "sample_steps": 0, "compile": False}
                classes = [str(k) for k in range(CLASSES)]
                diffuse.fit(
                    batches,
                    config=section.model_copy(update=changes),
                    num_classes=CLASSES,
                    classes=classes,
                    resolution=side,
                    channels=channels,
                    **given,
                )
            else:
                from adversa.diffuse import codec_fit

                codec_fit.fit_codec(
                    batches,
                    config=section.model_copy(update={"steps": LONG}),
                    resolution=resolution,
                    **given,
                )
        except Enough:
            return
        raise AssertionError(f"the training of the {kind} ended before it was told to")

    # ---- painting --------------------------------------------------------------------------------

    def space(self) -> tuple[int, int]:
        """(channels, side) of what is diffused."""
        codec, resolution = self.codec(), self.config.data.resolution
        if codec is None:
            return 3, resolution
        return codec.meta["channels"], resolution // codec.meta["factor"]

    def codec(self) -> Any:
        """diffuse.codec.Codec with fresh weights, or the one that was given; None where pixels are
        diffused.
        """
        import torch

        from adversa.diffuse import codec

        c = self.config.codec
        if c.kind == "pixels" or getattr(self, "_codec_", None) is not None:
            return getattr(self, "_codec_", None)
        device = _device()
        if c.is_fitted:
            model = codec.build(c)
            meta = codec.describe(model, "")
            one = torch.ones(meta["channels"])
            self._codec_ = codec.Codec(
                model.to(device).eval().requires_grad_(False), meta, "", 0 * one, one, device
            )
        else:
            codec.fetch(c, self.config.data.resolution, self.folder / "codec")
            self._codec_ = codec.load(self.folder / "codec", device)
        return self._codec_

    def _paint(self, seconds: float, rows: int | None = None) -> Timing:
        """Seconds of one evaluation of one row. rows: of a batch, and then two evaluations are
        all.
        """
        import torch

        from adversa.diffuse import edm, external
        from adversa.diffuse.painter import Painter

        c, (channels, side), device = self.config, self.space(), _device()
        if c.denoiser.external is not None:
            model: Any = external.read(
                c.denoiser.external, CLASSES if c.data.labels is None else len(c.data.labels)
            )
        else:
            model = edm.build(c.denoiser, CLASSES, side, channels)
        model = model.to(device).eval().requires_grad_(False)
        meta = {
            "resolution": side,
            "channels": channels,
            "classes": [str(k) for k in range(CLASSES)],
        }
        until, size = time.perf_counter() + seconds, rows or min(FIRST, c.generate.batch_size)
        while True:
            last = size == c.generate.batch_size
            ticks = Ticks(model, until if rows is None and last else 0.0)
            painter = Painter(ticks, self.codec(), meta, "", device)
            section = c.generate.model_copy(update={"batch_size": size, "compile": False})
            try:
                with torch.no_grad():
                    for _ in painter.canvas(section, self._steering(painter)).stream(
                        self._requests(size), self._sources()
                    ):
                        pass
            except Enough:
                pass
            steps = [s / size for s in ticks.seconds]
            larger, left = min(c.generate.batch_size, size * GROWTH), until - time.perf_counter()
            if (
                rows is not None or last or 4 * min(steps) * larger > left
            ):  # a warm-up and the calls that are timed
                return timing(steps, not last)
            size = larger

    def _requests(self, count: int) -> Any:
        """Of both arms in turn, without end."""
        from adversa.pipeline import generate as pipeline_generate
        from adversa.types import PAINTED

        arms = [a for a in self.config.mix.arms if a in PAINTED]
        generate = self.config.generate
        while True:
            for i in range(4 * count):
                case = {"example": "case", "label": i % CLASSES}
                yield pipeline_generate.request(
                    "plan", 1, arms[i % len(arms)], case, i, generate, partner="case"
                )

    def _sources(self) -> Any:
        from adversa.diffuse.strategy import Sources

        side = self.config.data.resolution
        inside = np.zeros((side, side), np.float32)
        inside[side // 4 : -side // 4, side // 4 : -side // 4] = 1
        return Sources({"case": self._images(1, side)[0]}, {"case": inside}, {"case": 1 - inside})

    def _steering(self, painter: Any) -> Any:
        from adversa.classify.model import build
        from adversa.diffuse.guidance import hardness
        from adversa.diffuse.paint import Steering
        from adversa.pipeline.generate import steering_needs_classifier

        g = self.config.generate
        weak = painter.denoiser if g.weak else None
        if not steering_needs_classifier(g):
            return Steering(weak=weak)
        network = build(
            self.config.classifier.model_copy(update={"weights": None}),
            CLASSES,
            self.config.data.resolution,
        )
        network = network.to(painter.device).eval().requires_grad_(False)
        gradient = (
            hardness(lambda p: network(p)[0], painter.pixels, g.hardness_kind)
            if g.hardness
            else None
        )
        features = (
            (lambda p: network(p)[1]) if g.likeness and g.likeness_kind == "features" else None
        )
        return Steering(gradient, features, painter.pixels, weak)

    # ---- the rest --------------------------------------------------------------------------------

    def _read(self, seconds: float) -> Timing:
        """Of a picture of the source, decoded and written as PNG."""
        from adversa.data import images, sources
        from adversa.storage import tables

        listing = sources.list_records(self.config.data)
        some = listing.records[:: max(1, len(listing.records) // 16)][:16]
        decode = images.make_decoder(self.config.data, listing.classes)
        return repeated(
            lambda: [tables.encode_png(d.image) for d in decode(some) if d.image is not None],
            seconds,
            len(some),
        )

    def _score(self, seconds: float) -> Timing:
        return self._scored(self.config.classifier, seconds)

    def _judge_score(self, seconds: float) -> Timing:
        return self._scored(cfg.judge_of(self.config), seconds)

    def _scored(self, section: cfg.Classifier, seconds: float) -> Timing:
        from adversa.classify import score
        from adversa.classify.model import build

        network = (
            build(
                section.model_copy(update={"weights": None}), CLASSES, self.config.data.resolution
            )
            .to(_device())
            .eval()
        )
        images = self._images(score.CHUNK, self.config.data.resolution)
        return repeated(
            lambda: score.forward(network, images, section.amp, section.views), seconds, score.CHUNK
        )

    def _encode(self, seconds: float) -> Timing:
        images = self._images(16, self.config.data.resolution)
        return repeated(lambda: self.codec().encode(images), seconds, len(images))

    def _index(self, seconds: float) -> Timing:
        """Of a real image in what near copies are looked for in: taken up, and compared with those
        of other lesions.
        """
        ids, images = [str(i) for i in range(64)], self._images(64, self.config.data.resolution)

        def work() -> None:
            self._near(ids, images).strangers(ids, ids)

        return repeated(work, seconds, len(ids))

    def _compare(self, seconds: float) -> Timing:
        """Of a painted image, looked for among the real ones."""
        ids, images = [str(i) for i in range(64)], self._images(64, self.config.data.resolution)
        index = self._near(ids, images)
        return repeated(lambda: index.nearest(images), seconds, len(ids))

    def _near(self, ids: list[str], images: np.ndarray) -> Any:
        from adversa.curate.near_copy import NearCopy

        return NearCopy(ids, images)

    def _images(self, rows: int, side: int) -> np.ndarray:
        """Soft random pictures, uint8 [rows, side, side, 3]."""
        coarse = self.random.integers(0, 256, (rows, -(-side // 8), -(-side // 8), 3), np.uint8)
        return np.ascontiguousarray(coarse.repeat(8, 1).repeat(8, 2)[:, :side, :side])


class Ticks:
    """A denoiser that notes the seconds from each call to the next: an evaluation and all that a
    step needs beside it.

    Ends what calls it, by Enough, once `until` (time.perf_counter) is over and TICKS calls have
    been timed.
    """

    def __init__(self, denoiser: Callable[..., Any], until: float) -> None:
        self.denoiser, self.until = denoiser, until
        self.seconds, self.last, self.calls = list[float](), 0.0, 0

    def __call__(self, x: Any, sigma: Any, label: Any) -> Any:
        if x.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.calls > 1:  # the first is a warm-up
            self.seconds.append(now - self.last)
        if (now > self.until and len(self.seconds) >= TICKS) or len(self.seconds) >= MOST:
            raise Enough
        self.last, self.calls = now, self.calls + 1
        return self.denoiser(x, sigma, label)


def check_kinds(found: Measured, config: cfg.Config) -> None:
    """UserError where a measurement, perhaps of another version on the cluster, lacks a kind of
    work.
    """
    if missing := [k for k in kinds_of(config) if k not in found.timings]:
        raise UserError(
            f"nothing was measured of {', '.join(missing)}; install the same adversa everywhere"
        )


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _silent(state: dict[str, Any]) -> None:
    """The progress of a training that is only timed."""


def _nothing() -> list[Any]:
    return []
