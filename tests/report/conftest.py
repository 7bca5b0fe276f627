"""A run folder as the loop leaves it, small and made up: the page is tested without running the
loop.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from adversa import config
from adversa.curate.filter import Verdict
from adversa.run.folder import RunDir
from adversa.storage import tables
from adversa.types import (
    Example,
    GenerationRequest,
    HardCase,
    Scorecard,
    SyntheticImage,
    digest,
)

HOSTILE = '<script>alert("x")</script> & <b>\u202egnissim</b>\x07'
CLASSES = ["nevus", "melanoma", HOSTILE]
REASONS = ["kept", "kept", "kept", "judge disagrees", "near copy", "not finite", "over quota"]
SEEDS = 2


def blob(seed: int, side: int = 32) -> np.ndarray:
    """uint8 [side, side, 3]: a dark, soft ellipse on skin."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    cx, cy, a, b = *random.normal(0, 0.06, 2), *random.uniform(0.15, 0.35, 2)
    inside = 1 / (1 + np.exp(14 * (((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 - 1)))
    skin, dark = np.array([226, 178, 160]), random.uniform([60, 30, 20], [170, 100, 90])
    image = skin + inside[..., None] * (dark - skin) + random.normal(0, 4, (side, side, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def card(step: Path, arm: str, number: int, role: str, seed: int, values: dict[str, float]) -> None:
    spread = {m: (v - 0.04, v + 0.04) for m, v in values.items()}
    scorecard = Scorecard(arm, seed, number, role, 120, values, spread)
    path = RunDir(step).scorecard(step, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(scorecard)))


def metrics_of(arm: str, role: str) -> dict[str, float]:
    base = {"real": 0.60, "unguided": 0.61, "guided": 0.645}[arm] - (0.2 if role == "mine" else 0)
    found = {"balanced_accuracy": base, "accuracy": base + 0.1, "auroc_macro": base + 0.15}
    for c, name in enumerate(CLASSES):
        found |= {
            f"sensitivity/{name}": base - 0.1 * (c - 1),
            f"specificity/{name}": 0.9 - 0.02 * c,
        }
    if role == "test":
        found |= {
            "worst_class": base - 0.1,
            "ece": 0.05,
            "brier": 0.4,
            "auroc/malignant": 0.8,
            "pauc_norm@0.80/malignant": 0.5,
        }
        found |= {"sensitivity@0.90/malignant": 0.7, "specificity@0.90/malignant": 0.88}
    return found


def predictions(images: list[Example], arms: tuple[str, ...], seeds: int) -> pa.Table:
    """Each image is read as what it is, but every fourth as the next class; `guided` gets every
    eighth wrong.
    """
    rows = []
    for arm in arms:
        for seed in range(seeds):
            for i, e in enumerate(images):
                wrong = i % (8 if arm == "guided" else 4) == seed
                logits = [0.0, 0.0, 0.0]
                logits[(e.label + wrong) % 3] = 1 + i % 3
                row = {"id": e.id, "arm": arm, "seed": seed, "label": e.label, "group": e.group}
                rows.append(row | {"logits": logits, "embedding": []})
    return pa.Table.from_pylist(rows, schema=tables.PREDICTIONS)


def build(
    root: Path,
    cases: int = 30,
    per_case: int = 10,
    rounds: int = 1,
    side: int = 32,
    **sections: Any,
) -> Path:
    tree = {
        "rounds": rounds,
        "data": {"resolution": side},
        "evaluate": {"groups": {"malignant": ["melanoma"]}},
    } | sections
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(config.dump(config.check(tree, "test")))
    images = {}
    for r, (role, n) in enumerate({"train": 60, "mine": 40, "select": 12, "test": 12}.items()):
        rows = images[role] = [
            Example(
                f"{role}{i:03d}",
                f"{i}.png",
                i % 3,
                f"{role}-g{i // 2}",
                "",
                {"site": "back"},
                tables.encode_png(blob(100 * r + i, side)),
            )
            for i in range(n)
        ]
        for k, half in enumerate((rows[: n // 2], rows[n // 2 :])):
            tables.write_part(
                root / "data" / role / tables.part_name(k), tables.to_table(half, tables.EXAMPLES)
            )
    for number in range(1, rounds + 1):
        _round(root / f"round-{number:03d}", number, cases, per_case, side)
        scores = predictions(images["mine"], ("real",), 1)
        tables.write_part(root / f"round-{number:03d}" / "scores" / tables.part_name(0), scores)
    tables.write_part(
        root / "test" / tables.part_name(0),
        predictions(images["test"], ("real", "unguided", "guided"), SEEDS),
    )
    for arm in ("real", "unguided", "guided"):
        for number in range(1, rounds + 1):
            trained = 0 if arm == "real" else number
            for role in ("mine", "test"):
                step = (
                    root / f"round-{number:03d}" / "evaluate" if role == "mine" else root / "test"
                )
                card(step, arm, trained, role, 0, metrics_of(arm, role))
    summary = {
        "run": "run-5f2c",
        "seed": 0,
        "seeds": SEEDS,
        "split_hash": "9c1d55ab20",
        "rounds": rounds,
        "classes": CLASSES,
        "arms": {
            a: {r: metrics_of(a, r) for r in ("mine", "test")}
            for a in ("real", "unguided", "guided")
        },
        "intervals": {
            a: {
                r: {m: [v - 0.04, v + 0.04] for m, v in metrics_of(a, r).items()}
                for r in ("mine", "test")
            }
            for a in ("real", "unguided", "guided")
        },
        "before": {r: metrics_of("real", r) for r in ("mine", "test")},
        "intervals_before": {
            r: {m: [v - 0.04, v + 0.04] for m, v in metrics_of("real", r).items()}
            for r in ("mine", "test")
        },
        "added": {},
        "used": {},
        "git": None,
        "machine": {},
        "test_openings": 1,
        "notes": ["the images are procedural phantoms", "one seed an arm: mind the interval."],
        "wall_seconds": 310.0,
        "restarts": 2,
        "restart_seconds": 45.0,
        "generated": 2 * cases * per_case,
        "accepted": cases * per_case,
        "rejected": {"near copy": 5},
        "seconds": {
            "data": 31.25,
            "denoiser": 172.4,
            "judge": 40.0,
            "round-001/guided/seed-0/classifier": 61.5,
        },
        "overhead_seconds": 12.5,
        "verdict": "not shown",
        "test_opened": "2026-01-02T03:04:05+00:00",
        "verdict_sentence": "Guided was not shown to help: +0.045 balanced accuracy on test "
        "(-0.010 to +0.100).",
        "versions": {"python": "3.12.1", "adversa": "0.1.0", "torch": "2.15.0"},
        "device_seconds": 480.0,
        "cost": {
            "real": {"seconds": 60.0, "device_seconds": 120.0},
            "unguided": {"seconds": 70.0, "device_seconds": 130.0},
            "guided": {"seconds": 90.0, "device_seconds": 150.0},
        },
        "subgroups": {
            "sex": {
                arm: [subgroup("female", 40, value), subgroup(HOSTILE, 7, value)]
                for arm, value in (("before", 0.6), ("guided", 0.7))
            }
        },
        "subgroup_comparisons": {
            "a": "guided",
            "b": "unguided",
            "metric": "balanced_accuracy",
            "tested": 1,
            "attributes": {
                "sex": [
                    within("female", 40, 0.1, "better"),
                    within(HOSTILE, 7, None, None),
                    within("x", 31, None, None),
                ]
            },
        },
        "matched": {"steps": 600, "images": 38400},
        "comparisons": [
            {
                "a": "guided",
                "b": "unguided",
                "metric": "balanced_accuracy",
                "role": "test",
                "difference": 0.035,
                "low": -0.012,
                "high": 0.081,
                "p_holm": 0.21,
                "word": "not shown",
                "detectable": 0.066,
                "seeds": 2,
                "lesions": 158,
                "seeds_needed": 31,
                "effect": 0.02,
                "note": "",
                "mcnemar": [{"won": 3, "lost": 1, "p": 0.625}],
                "gain_per_device_hour": {"gain": 1.25, "low": -0.5, "high": 2.0},
            },
            {
                "a": "guided",
                "b": "real",
                "metric": "balanced_accuracy",
                "role": "test",
                "difference": 0.045,
                "low": 0.006,
                "high": 0.1,
                "p_holm": 0.03,
                "word": "better",
                "detectable": None,
                "seeds": None,
                "lesions": None,
                "seeds_needed": None,
                "effect": None,
                "note": "",
                "mcnemar": [],
                "gain_per_device_hour": None,
            },
            {
                "a": "unguided",
                "b": "real",
                "metric": "accuracy",
                "role": "mine",
                "difference": -0.05,
                "low": -0.09,
                "high": -0.02,
                "p_holm": 0.01,
                "word": "worse",
                "detectable": None,
                "seeds": None,
                "lesions": None,
                "seeds_needed": None,
                "effect": None,
                "note": "",
                "mcnemar": [],
                "gain_per_device_hour": None,
            },
        ],
    }
    (root / "summary.json").write_text(json.dumps(summary))
    return root


def subgroup(value: str, lesions: int, figure: float) -> dict[str, Any]:
    small = lesions < 30
    interval = None if small else [figure - 0.1, figure + 0.1]
    return {
        "value": value,
        "n": lesions + 2,
        "lesions": lesions,
        "small": small,
        "value_of": figure,
        "interval": interval,
    }


def within(value: str, lesions: int, difference: float | None, word: str | None) -> dict[str, Any]:
    row = {
        "value": value,
        "n": lesions + 2,
        "lesions": lesions,
        "small": lesions < 30,
        "difference": difference,
        "word": word,
    }
    known = difference is not None
    return row | {
        "low": 0.02 if known else None,
        "high": 0.18 if known else None,
        "p_holm": 0.012 if known else None,
    }


def verdict(
    request: str,
    arm: str,
    label: int,
    strategy: str,
    example: str | None,
    reason: str,
    nearest: str,
) -> Verdict:
    """Every number and limit that the filter writes, in agreement with the reason."""
    return Verdict(
        request,
        arm,
        label,
        strategy,
        example,
        reason == "kept",
        reason,
        contrast=33.2,
        contrast_limit=2.0,
        clipped=0.01,
        clipped_limit=0.5,
        agreement=0.05 if reason == "judge disagrees" else 0.81,
        agreement_least=0.2,
        agreement_most=1.0,
        realism=1.04,
        realism_limit=1.5,
        nearest=nearest,
        similarity=0.99 if reason == "near copy" else 0.93,
        similarity_limit=0.97,
        twin_similarity=-1.0,
        twin_limit=0.97,
        place=7 if reason == "over quota" else 1,
        quota=6,
    )


def _round(folder: Path, number: int, cases: int, per_case: int, side: int) -> None:
    hard = [
        HardCase(
            f"mine{i:03d}",
            i % 3,
            (i + 1) % 3 if i % 4 else i % 3,
            2.5 - i / 20,
            -0.4 + i / 50,
            "misclassified" if i % 4 else "near miss",
            i,
        )
        for i in range(cases)
    ]
    requests, images, verdicts = [], [], []
    for arm in ("guided", "unguided"):
        for h in hard:
            for k in range(per_case):
                rid = digest("run", number, arm, h.example, k, size=10)
                example = h.example if arm == "guided" else None
                strategy = ("img2img", "inpaint")[k % 2] if arm == "guided" else "sample"
                requests.append(
                    GenerationRequest(rid, number, arm, strategy, h.label, example, 2.0, 2.0, k)
                )
                reason = REASONS[int(rid[:4], 16) % len(REASONS)]
                image = (
                    blob(int(rid[:6], 16), side)
                    if reason != "not finite"
                    else np.zeros((side, side, 3), np.uint8)
                )
                images.append(
                    SyntheticImage(
                        rid, arm, h.label, tables.encode_png(image), reason != "not finite", "d"
                    )
                )
                nearest = (h.example, f"train{k:03d}", f"test{k:03d}")[int(rid[4:8], 16) % 3]
                verdicts.append(verdict(rid, arm, h.label, strategy, example, reason, nearest))
    for name, rows, schema in (
        ("hard", hard, tables.HARD_CASES),
        ("requests", requests, tables.REQUESTS),
        ("synthetic", images, tables.SYNTHETIC),
        ("verdicts", verdicts, tables.VERDICTS),
    ):
        for part, start in enumerate(range(0, len(rows), 100)):
            tables.write_part(
                folder / name / tables.part_name(part),
                tables.to_table(rows[start : start + 100], schema),
            )
    curve = [[q / 20, 0.5 + q / 50, 0.45 + q / 50] for q in range(21)]
    memory = {
        "synthetic": 300,
        "held_out": 40,
        "curve": curve,
        "quantiles": {},
        "nearer": 0.52,
        "beyond": 0.013,
    }
    (folder / "verdicts" / "memorisation.json").write_text(
        json.dumps({"guided": None, "unguided": memory})
    )
    mode = {
        "name": HOSTILE + ", site=back (4 of 5)",
        "errors": 4,
        "size": 6,
        "share": 0.4,
        "confused": [[1, 4]],
    }
    (folder / "hard" / "modes.json").write_text(
        json.dumps({"modes": [mode], "errors": 10, "images": 40, "tests": 3})
    )


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
    return SimpleNamespace(CLASSES=CLASSES, HOSTILE=HOSTILE, REASONS=REASONS, blob=blob)
