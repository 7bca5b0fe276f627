"""A run folder as the loop leaves it, small and made up: the page is tested without running the loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adversa import config, tables
from adversa.types import Example, GenerationRequest, HardCase, Scorecard, SyntheticImage, Verdict, digest

HOSTILE = '<script>alert("x")</script> & <b>\u202egnissim</b>\x07'
CLASSES = ["nevus", "melanoma", HOSTILE]
REASONS = ["kept", "kept", "kept", "judge disagrees", "near copy", "not finite"]


def blob(seed: int, side: int = 32) -> np.ndarray:
    """uint8 [side, side, 3]: a dark, soft ellipse on skin."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    cx, cy, a, b = *random.normal(0, 0.06, 2), *random.uniform(0.15, 0.35, 2)
    inside = 1 / (1 + np.exp(14 * (((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 - 1)))
    skin, dark = np.array([226, 178, 160]), random.uniform([60, 30, 20], [170, 100, 90])
    image = skin + inside[..., None] * (dark - skin) + random.normal(0, 4, (side, side, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def card(folder: Path, arm: str, number: int, role: str, seed: int, values: dict[str, float]) -> None:
    spread = {m: (v - 0.04, v + 0.04) for m, v in values.items()}
    scorecard = Scorecard(arm, seed, number, role, 120, values, spread)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"scorecard-{role}.json").write_text(json.dumps(dataclasses.asdict(scorecard)))


def metrics_of(arm: str, role: str) -> dict[str, float]:
    base = {"real": 0.60, "unguided": 0.61, "guided": 0.645}[arm] - (0.2 if role == "mine" else 0)
    found = {"balanced_accuracy": base, "accuracy": base + 0.1, "auroc_macro": base + 0.15}
    for c, name in enumerate(CLASSES):
        found |= {f"sensitivity/{name}": base - 0.1 * (c - 1), f"specificity/{name}": 0.9 - 0.02 * c}
    return found


def build(root: Path, cases: int = 30, per_case: int = 10, rounds: int = 1, side: int = 32, **sections: Any) -> Path:
    tree = {"rounds": rounds, "data": {"resolution": side}} | sections
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(config.dump(config.check(tree, "test")))
    for r, (role, n) in enumerate({"train": 60, "mine": 40, "select": 12, "test": 12}.items()):
        rows = [
            Example(f"{role}{i:03d}", f"{i}.png", i % 3, f"{role}-g{i // 2}", "", {"site": "back"},
                    tables.encode_png(blob(100 * r + i, side)))
            for i in range(n)
        ]  # fmt: skip
        for k, half in enumerate((rows[: n // 2], rows[n // 2 :])):
            tables.write_part(root / "data" / role / tables.part_name(k), tables.to_table(half, tables.EXAMPLES))
    for number in range(1, rounds + 1):
        _round(root / f"round-{number:03d}", number, cases, per_case, side)
    for arm in ("real", "unguided", "guided"):
        for role in ("mine", "test"):
            for number in [0] if arm == "real" else range(1, rounds + 1):
                card(root / f"round-{number:03d}" / arm / "seed-0", arm, number, role, 0, metrics_of(arm, role))
    summary = {
        "run": "run-5f2c", "seed": 0, "split_hash": "9c1d55ab20", "rounds": rounds, "classes": CLASSES,
        "arms": {a: {r: metrics_of(a, r) for r in ("mine", "test")} for a in ("real", "unguided", "guided")},
        "intervals": {
            a: {r: {m: [v - 0.04, v + 0.04] for m, v in metrics_of(a, r).items()} for r in ("mine", "test")}
            for a in ("real", "unguided", "guided")
        },
        "notes": ["the images are procedural phantoms", "one seed an arm: mind the interval."],
        "wall_seconds": 310.0,
        "generated": 2 * cases * per_case, "accepted": cases * per_case, "rejected": {"near copy": 5},
        "seconds": {"data": 31.25, "denoiser": 172.4, "judge": 40.0, "round-001/guided/seed-0/classifier": 61.5},
        "overhead_seconds": 12.5, "verdict": "not shown", "test_opened": "2026-01-02T03:04:05+00:00",
        "verdict_sentence": "Guided was not shown to help: +0.045 balanced accuracy on test (-0.010 to +0.100).",
        "versions": {"python": "3.12.1", "adversa": "0.1.0", "torch": "2.15.0"},
        "comparisons": [
            {"a": "guided", "b": "unguided", "metric": "balanced_accuracy", "role": "test", "difference": 0.035,
             "low": -0.012, "high": 0.081, "p_holm": 0.21, "word": "not shown"},
            {"a": "guided", "b": "real", "metric": "balanced_accuracy", "role": "test", "difference": 0.045,
             "low": 0.006, "high": 0.1, "p_holm": 0.03, "word": "better"},
            {"a": "unguided", "b": "real", "metric": "accuracy", "role": "mine", "difference": -0.05,
             "low": -0.09, "high": -0.02, "p_holm": 0.01, "word": "worse"},
        ],
    }  # fmt: skip
    (root / "summary.json").write_text(json.dumps(summary))
    return root


def _round(folder: Path, number: int, cases: int, per_case: int, side: int) -> None:
    hard = [
        HardCase(f"mine{i:03d}", i % 3, (i + 1) % 3 if i % 4 else i % 3, 2.5 - i / 20, -0.4 + i / 50,
                 "misclassified" if i % 4 else "near miss", i)
        for i in range(cases)
    ]  # fmt: skip
    requests, images, verdicts = [], [], []
    for arm in ("guided", "unguided"):
        for h in hard:
            for k in range(per_case):
                rid = digest("run", number, arm, h.example, k, size=10)
                example = h.example if arm == "guided" else None
                strategy = "vary" if arm == "guided" else "sample"
                requests.append(GenerationRequest(rid, number, arm, strategy, h.label, example, 2.0, 2.0, k))
                reason = REASONS[int(rid[:4], 16) % len(REASONS)]
                image = blob(int(rid[:6], 16), side) if reason != "not finite" else np.zeros((side, side, 3), np.uint8)
                images.append(SyntheticImage(rid, arm, h.label, tables.encode_png(image), reason != "not finite", "d"))
                agreement = 0.05 if reason == "judge disagrees" else 0.81
                similarity = 0.99 if reason == "near copy" else 0.93
                verdicts.append(Verdict(rid, arm, h.label, reason == "kept", reason, agreement, h.example, similarity))
    for name, rows, schema in (
        ("hard", hard, tables.HARD_CASES),
        ("requests", requests, tables.REQUESTS),
        ("synthetic", images, tables.SYNTHETIC),
        ("verdicts", verdicts, tables.VERDICTS),
    ):
        for part, start in enumerate(range(0, len(rows), 100)):
            tables.write_part(folder / name / tables.part_name(part), tables.to_table(rows[start : start + 100], schema))


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return lambda **options: build(tmp_path_factory.mktemp("report") / "run", **options)


@pytest.fixture(scope="session")
def finished(make_run: Callable[..., Path]) -> Path:
    """A finished run; tests must not change it, except for report.html."""
    return make_run()


@pytest.fixture(scope="session")
def made_up() -> SimpleNamespace:
    """What the run was made of, for tests to compare with."""
    return SimpleNamespace(CLASSES=CLASSES, HOSTILE=HOSTILE, blob=blob)
