"""Does guidance reach a rare mode? On phantoms: melanomas generated from hard cases of the planted
amelanotic mode, beside melanomas that are sampled from noise.

    python benchmarks/rare_mode.py      trains a denoiser (some minutes), then generates at
                                        several noise levels
    python benchmarks/rare_mode.py --denoiser FOLDER        one that was trained on phantoms
    python benchmarks/rare_mode.py --quick

The denoiser goes on from the shipped weights on phantoms of which one melanoma in twenty is
amelanotic. Mode and class are told by two models outside the loop, of phantoms of other seeds at
balanced proportions, half of the melanomas amelanotic: the mode by a logistic regression on optical
densities about the middle, the class by a network as the demo's. What they say of the real hard
cases is told too. Bars, at the default noise level: the mode at least 5 times as often as by
sampling, at a label agreement of at least 0.9 of it.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Result, parser, publish
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from adversa import config as cfg
from adversa.classify.score import make_scorer
from adversa.data import phantom
from adversa.diffuse import edm, fit, generator
from adversa.diffuse.generator import ImageGenerator
from adversa.diffuse.strategy import Sources
from adversa.engine.batches import Feed
from adversa.engine.local import LocalEngine
from adversa.pipeline import prepare
from adversa.pipeline import train as pipeline_train
from adversa.run import folder as run_folder
from adversa.training.loop import resume_step
from adversa.types import GenerationRequest, seed_of

SIDE = 32
RINGS = (0, 3, 6, 9, 12, 15)  # radii at SIDE pixels
LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)
BARS = {"ratio": 5.0, "agreement": 0.9}


@dataclass(frozen=True)
class Phantoms:
    """images uint8 [N, R, R, 3]; label: names; rare bool [N]: of the planted mode."""

    images: np.ndarray
    label: np.ndarray
    rare: np.ndarray


def draw(seed: int, count: int, rare: float) -> Phantoms:
    config = cfg.Phantom(seed=seed, images=count, tail=0.9, rare=rare)
    found = [phantom.picture(i, config, SIDE) for i in range(count)]
    modes = np.array([f[4]["mode"] for f in found])
    return Phantoms(
        np.stack([f[0] for f in found]), np.array([f[2] for f in found]), modes == phantom.RARE_MODE
    )


def density(images: np.ndarray) -> np.ndarray:
    """Optical density against the rim of each picture, by rings: uint8 [N, R, R, 3] to [N, F]. In
    linear light, gamma 2.2.
    """
    light = (images / 255.0) ** 2.2 + 0.01
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    radius = np.hypot(y, x)
    depth = np.log(np.median(light[:, radius > RINGS[-1]], 1)[:, None, None] / light)
    rings = [depth[:, (radius >= a) & (radius < b)] for a, b in zip(RINGS, RINGS[1:], strict=False)]
    flat = depth.reshape(len(images), -1, 3)
    columns = (
        [r.mean(1) for r in rings]
        + [r.std(1) for r in rings]
        + [np.quantile(flat, q, axis=1) for q in (0.5, 0.8, 0.95)]
    )
    return np.concatenate(columns, 1)


class Outsiders:
    """Who tells mode and class: fitted to phantoms that neither the denoiser nor a hard case comes
    from.
    """

    def __init__(self, count: int, folder: Path, epochs: int) -> None:
        known, new = draw(7001, count, 0.5), draw(7002, count // 2, 0.5)
        of = known.label == phantom.RARE_CLASS
        self.modes = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        self.modes.fit(density(known.images[of]), known.rare[of])
        self.names, self.scorer = judge(folder, count, epochs)
        of = new.label == phantom.RARE_CLASS
        said = self.modes.predict(density(new.images[of]))
        self.sensitivity, self.false_alarms = (
            float(said[new.rare[of]].mean()),
            float(said[~new.rare[of]].mean()),
        )
        self.accuracy = float((self.labels(new.images) == new.label).mean())

    def labels(self, images: np.ndarray) -> np.ndarray:
        return np.array(self.names)[self.scorer(images)[0].argmax(1)]

    def ask(self, images: np.ndarray) -> tuple[float, float]:
        """(share of the rare mode, share of melanomas) among uint8 [N, R, R, 3]."""
        return float(self.modes.predict(density(images)).mean()), float(
            (self.labels(images) == phantom.RARE_CLASS).mean()
        )


def judge(folder: Path, count: int, epochs: int) -> tuple[list[str], Any]:
    """(classes, scorer) of a network as the demo's."""
    data = cfg.Data(
        resolution=SIDE, phantom=cfg.Phantom(images=count, rare=0.5, tail=0.9, seed=7001)
    )
    prepare.prepare(LocalEngine(), data, folder / "data")
    pipeline_train.mix(folder / "data", [], [], "real", cfg.Mix(arms=["real"]), 1, folder / "mix")
    config, out = (
        cfg.load(None).classifier.model_copy(update={"steps": epochs}),
        folder / "classifier",
    )
    job = pipeline_train.classifier_job(
        folder / "data", folder / "mix", [], config, 7001, SIDE, out
    )
    LocalEngine(1, torch.get_num_threads()).fit([job])
    return run_folder.classes_of(folder / "data"), make_scorer(out)


def train(folder: Path, count: int, epochs: int) -> Path:
    """A denoiser of phantoms with one amelanotic melanoma in twenty."""
    data = cfg.Data(
        resolution=SIDE, phantom=cfg.Phantom(images=count, rare=0.05, tail=0.9, seed=11)
    )
    prepare.prepare(LocalEngine(), data, folder / "data")
    mixed, out = folder / "mix", folder / "denoiser"
    pipeline_train.mix(folder / "data", [], [], "real", cfg.Mix(arms=["real"]), 1, mixed)
    config = cfg.load(None).denoiser.model_copy(update={"steps": epochs, "checkpoint_steps": 200})
    names = (folder / "data" / "train",)
    feed = Feed(
        names,
        config.batch_size,
        mix=mixed,
        steps=config.steps,
        balance=config.balance,
        seed=seed_of("feed", 0),
    )
    classes = run_folder.classes_of(folder / "data")
    fit.fit(
        feed.batches(resume_step(out)),
        config=config,
        num_classes=len(classes),
        resolution=SIDE,
        classes=classes,
        out=out,
        seed=0,
        report=lambda _: None,
        threads=torch.get_num_threads(),
    )
    return out


def asked(
    loaded: ImageGenerator, cases: np.ndarray, level: float | None, config: cfg.Generate, count: int
) -> np.ndarray:
    """uint8 [count, R, R, 3]: melanomas varied from cases at a noise level, or sampled (None)."""
    label = list(loaded.meta["classes"]).index(phantom.RARE_CLASS)
    names = [str(i % len(cases)) if level else None for i in range(count)]
    found = [
        GenerationRequest(
            f"{i}",
            1,
            "guided" if level else "unguided",
            "img2img" if level else "sample",
            label,
            name,
            level or config.sigma_max,
            config.guidance,
            seed_of("rare mode", level or 0, i),
        )
        for i, name in enumerate(names)
    ]
    sources = Sources({str(i): case for i, case in enumerate(cases)} if level else {})
    return np.stack([p.image for p in loaded.generate(found, sources, config)])


def measure(
    loaded: ImageGenerator, outsiders: Outsiders, config: cfg.Generate, count: int
) -> dict[float | None, tuple[float, float]]:
    """Noise level (None: sampled, 0: the hard cases themselves) to (share of the mode, share of
    melanomas).
    """
    new = draw(7003, max(400, 10 * count // 4), 0.5)
    cases = new.images[new.rare & (new.label == phantom.RARE_CLASS)][:count]
    found = {
        level: outsiders.ask(asked(loaded, cases, level, config, count))
        for level in (None, *LEVELS)
    }
    return found | {0.0: outsiders.ask(cases)}


def results(
    found: dict[float | None, tuple[float, float]], outsiders: Outsiders, level: float, count: int
) -> list[Result]:
    rows = [
        Result("mode check: sensitivity on new phantoms", outsiders.sensitivity, ""),
        Result("mode check: false alarms", outsiders.false_alarms, ""),
        Result("class check: accuracy on new phantoms", outsiders.accuracy, ""),
    ]
    for at, (mode, label) in found.items():
        name = "sampled" if at is None else f"varied at {at:g}" if at else "real hard cases"
        rows += [
            Result(f"{name}: of the mode", mode, f"of {count}"),
            Result(f"{name}: seen as melanoma", label, f"of {count}"),
        ]
    ratio, agreement = (
        found[level][0] / max(found[None][0], 1 / count),
        found[level][1] / max(found[None][1], 1 / count),
    )
    rows.append(
        Result(
            "mode, varied / sampled",
            ratio,
            "x",
            f"at least {BARS['ratio']:g}",
            ratio >= BARS["ratio"],
        )
    )
    rows.append(
        Result(
            "label, varied / sampled",
            agreement,
            "x",
            f"at least {BARS['agreement']:g}",
            agreement >= BARS["agreement"],
        )
    )
    return rows


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("--denoiser", type=Path)
    found.add_argument("--images", type=int, default=384, help="generated at each noise level")
    found.add_argument("--steps", type=int, default=1500, help="of training")
    found.add_argument(
        "--keep", type=Path, help="the folder of what is trained; none: it is deleted at the end"
    )
    found.add_argument("--guidance", type=float, default=cfg.Generate().guidance)
    return found.parse_args()


def main() -> None:
    args = arguments()
    config: Any = cfg.Generate(guidance=args.guidance)
    if args.quick:
        args.denoiser, args.images, config = edm.SHIPPED, 48, config.model_copy(update={"steps": 6})
    with tempfile.TemporaryDirectory() as temporary:
        base = args.keep or Path(temporary)
        outsiders = Outsiders(
            600 if args.quick else 3000, base / "judge", 40 if args.quick else 600
        )
        folder = args.denoiser or train(base / "phantoms", 6000, args.steps)
        found = results(
            measure(generator.load(folder), outsiders, config, args.images),
            outsiders,
            config.sigma_start,
            args.images,
        )
    publish([Result(r.name, r.value, r.unit) for r in found] if args.quick else found, args.json)


if __name__ == "__main__":
    main()
