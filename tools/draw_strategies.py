"""Draw what the strategies generate from hard cases, and how fast `img2img` leaves its hard case
behind.

    python tools/draw_strategies.py --run RUN --denoiser FOLDER --classifier FOLDER --out docs/

RUN is a prepared run of HAM10000; the classifier was trained on its role `train`. Hard cases are
what mining takes from the role `mine` by this classifier. Writes ham10000-strategies.png and
img2img-similarity.png, and prints the similarities.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from adversa import config as cfg
from adversa.classify.features import FeatureSpace, make_features
from adversa.classify.score import make_scorer
from adversa.diffuse import generator
from adversa.mine.hard import hard_cases
from adversa.pipeline import generate
from adversa.pipeline.pictures import Pictures, sources
from adversa.run import folder as run_folder
from adversa.storage import tables
from adversa.types import GenerationRequest, HardCase, seed_of

SHOWN = (0.5, 1.0, 2.0, 4.0, 8.0)
MEASURED = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 40.0)
COLUMNS = [
    ("inpaint", 2, None),
    ("outpaint", 2, None),
    ("inout", 1, None),
    *(("img2img", 1, s) for s in SHOWN),
]
ROWS = 8
MASKED = (
    0.05,
    0.6,
    # share of the picture: a smaller or larger lesion shows little of what is generated in or
    # around it
)
ENLARGED, GAP, SIDE_TEXT, TOP_TEXT = 3, 4, 64, 46
INK, PAPER, GRID, LINES = (
    (40, 40, 40),
    (255, 255, 255),
    (225, 225, 225),
    ((31, 98, 163), (196, 88, 20)),
)


@dataclass(frozen=True)
class Scene:
    loaded: generator.ImageGenerator
    pictures: Pictures
    config: cfg.Generate

    def generate(
        self, cases: Sequence[HardCase], strategy: str, sigma: float | None, repeat: int = 0
    ) -> np.ndarray:
        """uint8 [N, R, R, 3]: one image for each case. sigma: the noise it starts from; None: the
        default of `fill_sigma`.
        """
        start = self.config.fill_sigma if sigma is None else sigma
        asked = [
            GenerationRequest(
                request_id=f"{c.example}-{strategy}-{start:g}-{repeat}",
                round=1,
                arm="guided",
                strategy=strategy,
                label=c.label,
                example=c.example,
                sigma_start=start,
                guidance=self.config.guidance,
                seed=seed_of("strategies", c.example, strategy, start, repeat),
            )
            for c in cases
        ]
        generated = self.loaded.generate(
            asked, sources(asked, self.pictures, self.config), self.config
        )
        return np.stack([p.image for p in generated])

    def originals(self, cases: Sequence[HardCase]) -> np.ndarray:
        found = self.pictures.images([c.example for c in cases])
        return np.stack([found[c.example] for c in cases])

    def masks(self, cases: Sequence[HardCase]) -> np.ndarray:
        """float32 [N, R, R]: what inpainting generates."""
        inside, _ = self.pictures.masks(
            [c.example for c in cases], self.config.margin, self.config.feather
        )
        return np.stack([inside[c.example] for c in cases])


def mined(data: Path, classifier: Path, pictures: Pictures, budget: int) -> list[HardCase]:
    rows = tables.read(data / "mine", ["id", "label"], tables.EXAMPLES)
    ids, labels = rows["id"].to_pylist(), rows["label"].to_numpy()
    images = pictures.images(ids)
    logits, embeddings = make_scorer(classifier, embed=True)(np.stack([images[i] for i in ids]))
    return hard_cases(ids, labels, logits, embeddings, cfg.Mine(budget=budget))


# ---- the grid ------------------------------------------------------------------------------------


def chosen(cases: Sequence[HardCase], scene: Scene) -> list[HardCase]:
    """Of each class its first hard cases in turn, as mining ranks them, whose lesion has a size to
    be seen by; ROWS in all.
    """
    shares = scene.masks(cases).mean((1, 2))
    fit = [c for c, share in zip(cases, shares, strict=True) if MASKED[0] <= share <= MASKED[1]]
    turn = {c.example: sum(d.label == c.label for d in fit[:i]) for i, c in enumerate(fit)}
    return sorted(
        sorted(fit, key=lambda c: (turn[c.example], c.rank))[:ROWS], key=lambda c: (c.label, c.rank)
    )


def grid(cases: Sequence[HardCase], scene: Scene, classes: Sequence[str]) -> Image.Image:
    originals, masks = scene.originals(cases), scene.masks(cases)
    columns = [
        ("hard case", "", originals),
        ("mask", "", np.repeat(np.rint(255 * masks).astype(np.uint8)[..., None], 3, 3)),
    ]
    for strategy, count, sigma in COLUMNS:
        under = f"noise {sigma or scene.config.fill_sigma:g}"
        columns += [
            (strategy, under, scene.generate(cases, strategy, sigma, i)) for i in range(count)
        ]
    side = ENLARGED * originals.shape[1]
    sheet = Image.new(
        "RGB",
        (SIDE_TEXT + len(columns) * (side + GAP), TOP_TEXT + len(cases) * (side + GAP)),
        PAPER,
    )
    draw, font, small = (
        ImageDraw.Draw(sheet),
        ImageFont.load_default(17),
        ImageFont.load_default(14),
    )
    for x, (title, under, images) in enumerate(columns):
        left = SIDE_TEXT + x * (side + GAP)
        draw.text((left + side / 2, 14), title, INK, font, anchor="mm")
        draw.text((left + side / 2, 33), under, INK, small, anchor="mm")
        for y, image in enumerate(images):
            sheet.paste(
                Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST),
                (left, TOP_TEXT + y * (side + GAP)),
            )
    for y, case in enumerate(cases):
        draw.text(
            (SIDE_TEXT / 2 - 2, TOP_TEXT + y * (side + GAP) + side / 2),
            classes[case.label],
            INK,
            font,
            anchor="mm",
        )
    return sheet


# ---- similarity ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """values [levels, N]: of each image to its own hard case; floor: the mean of other hard cases
    of the same class to it.
    """

    name: str
    values: np.ndarray
    floor: float


def curves(cases: Sequence[HardCase], scene: Scene, classifier: Path) -> list[Curve]:
    originals = scene.originals(cases)
    generated = [scene.generate(cases, "img2img", sigma) for sigma in MEASURED]
    features = make_features(FeatureSpace("classifier", folder=classifier), originals.shape[1])
    middle = features(originals).mean(
        0
    )  # features are positive: without it any two pictures are alike

    def pixels(images: np.ndarray) -> np.ndarray:
        x = images.astype(np.float64)
        return unit((x - x.mean((1, 2), keepdims=True)).reshape(len(x), -1))

    measures = {
        "correlation of pixels": pixels,
        "cosine of the classifier's features": lambda images: unit(features(images) - middle),
    }
    labels, found = np.array([c.label for c in cases]), []
    others = (labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool)
    for name, measure in measures.items():
        ours = measure(originals)
        found.append(
            Curve(
                name,
                np.stack([(ours * measure(p)).sum(1) for p in generated]),
                float((ours @ ours.T)[others].mean()),
            )
        )
    return found


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def chart(found: Sequence[Curve], size: tuple[int, int] = (1200, 720)) -> Image.Image:
    """Mean and standard deviation against the noise level, on a logarithmic axis. Drawn twice as
    large, then reduced.
    """
    w, h = 2 * size[0], 2 * size[1]
    sheet = Image.new("RGB", (w, h), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(44)
    left, right, top, bottom = 170, w - 60, 150, h - 190
    low, high = np.log(MEASURED[0]) - 0.15, np.log(MEASURED[-1]) + 0.15
    least = (
        np.floor(min(0.0, *((c.values.mean(1) - c.values.std(1)).min() for c in found)) / 0.2) * 0.2
    )

    def at(sigma: float, value: float) -> tuple[float, float]:
        x = left + (np.log(sigma) - low) / (high - low) * (right - left)
        return float(x), float(bottom - (value - least) / (1.0 - least) * (bottom - top))

    for value in np.arange(least, 1.01, 0.2):
        y = at(1.0, value)[1]
        draw.line([(left, y), (right, y)], GRID, 3)
        draw.text(
            (left - 20, y), f"{value + 0.0:.1f}".replace("-0.0", "0.0"), INK, font, anchor="rm"
        )
    for sigma in MEASURED:
        draw.text((at(sigma, 0)[0], bottom + 45), f"{sigma:g}", INK, font, anchor="mm")
    draw.text(((left + right) / 2, bottom + 125), "sigma_start of img2img", INK, font, anchor="mm")
    for i, (curve, colour) in enumerate(zip(found, LINES, strict=True)):
        mean, deviation, shift = (
            curve.values.mean(1),
            curve.values.std(1, ddof=1),
            1.02 ** (2 * i - 1),
        )
        for sigma, m, d in zip(
            MEASURED, mean, deviation, strict=True
        ):  # the bars of the two stand side by side
            ends = [at(sigma * shift, m - d), at(sigma * shift, m + d)]
            draw.line(ends, tuple((c + 255) // 2 for c in colour), 6)
        points = [at(s * shift, m) for s, m in zip(MEASURED, mean, strict=True)]
        draw.line(points, colour, 9, joint="curve")
        for x, y in points:
            draw.ellipse([x - 13, y - 13, x + 13, y + 13], colour)
        y = at(1.0, curve.floor)[1]
        for x in range(left, right, 48):
            draw.line([(x, y), (x + 20, y)], colour, 4)
        at_left = left + i * (right - left) // 3
        draw.line([(at_left, 70), (at_left + 70, 70)], colour, 9)
        draw.text((at_left + 90, 70), curve.name, INK, font, anchor="lm")
    return sheet.resize(size, Image.Resampling.LANCZOS).quantize(64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a prepared run")
    parser.add_argument("--denoiser", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cases", type=int, default=96, help="hard cases whose similarity is measured"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = args.run / "data"
    pictures, classes = Pictures(data / "mine"), run_folder.classes_of(data)
    scene = Scene(generator.load(args.denoiser, generate.device_name()), pictures, cfg.Generate())
    cases = mined(data, args.classifier, pictures, args.cases)
    args.out.mkdir(parents=True, exist_ok=True)
    grid(chosen(cases, scene), scene, classes).save(
        args.out / "ham10000-strategies.png", optimize=True
    )
    found = curves(cases, scene, args.classifier)
    chart(found).save(args.out / "img2img-similarity.png", optimize=True)
    counts = {name: sum(c.label == k for c in cases) for k, name in enumerate(classes)}
    print(f"{len(cases)} hard cases: {', '.join(f'{n} {name}' for name, n in counts.items())}")
    for curve in found:
        means, deviations = curve.values.mean(1), curve.values.std(1, ddof=1)
        said = "; ".join(
            f"{s:g}: {m:.3f} +- {d:.3f}"
            for s, m, d in zip(MEASURED, means, deviations, strict=True)
        )
        print(f"{curve.name}: {said}; another hard case of the class: {curve.floor:.3f}")


if __name__ == "__main__":
    main()
