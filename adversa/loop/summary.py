"""summary.json: what a run found, in one file that other programs read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from adversa import runs, tables
from adversa.config import Config
from adversa.loop import steps
from adversa.loop.stages import has_codec, home, last_round, stages
from adversa.runs import RunDir
from adversa.types import ARMS, BEFORE, Verdict, seed_of

HEADLINE = "balanced_accuracy"
AGAINST = ("replay", "unguided", "resample", "real")  # in the order of how much they would explain


def write(config: Config, run: RunDir) -> dict[str, Any]:
    """Gather the finished run's folders into summary.json."""
    from adversa.curate.gate import acceptance

    classes = steps.classes_of(run.data)
    verdicts = [
        v
        for n in range(1, last_round(config) + 1)
        if config.mix.paints
        for v in tables.read(run.round(n, "verdicts"), schema=tables.VERDICTS).to_pylist()
    ]
    kept = [v for v in verdicts if v["keep"]]
    compared = comparisons(config, run)
    word, sentence = verdict(compared, config)
    manifests = {run.name_of(f): runs.manifest(f) for s in stages(config, run) for f in s.folders if f.suffix == ""}
    seconds = {name: round(m["seconds"], 2) for name, m in manifests.items()}
    compute = sum(m["compute_seconds"] for m in manifests.values())
    opened = runs.read_json(run.test / "opened.json") or {}
    summary = {
        "run": run.root.resolve().name,
        "run_id": runs.run_id((runs.read_json(run.recipe) or {})["recipe"]),
        "seed": config.seed,
        "seeds": config.evaluate.seeds,
        "split_hash": steps.split_hash(run.data),
        "rounds": last_round(config),
        "classes": classes,
        "arms": {arm: {role: _mean_card(config, run, arm, role) for role in ("mine", "test")} for arm in config.mix.arms},
        "intervals": {arm: {role: _interval(config, run, arm, role) for role in ("mine", "test")} for arm in config.mix.arms},
        "before": {role: _mean_card(config, run, BEFORE, role) for role in ("mine", "test")},
        "intervals_before": {role: _interval(config, run, BEFORE, role) for role in ("mine", "test")},
        "generated": len(verdicts),
        "accepted": len(kept),
        "rejected": dict(sorted(Counter(v["reason"] for v in verdicts if not v["keep"]).items())),
        "acceptance": acceptance([Verdict(**v) for v in verdicts], classes),
        "used": _used(config, run),
        "added": _added(config, run),
        "seconds": seconds,
        "device_seconds": round(sum(m["device_seconds"] for m in manifests.values()), 2),
        "overhead_seconds": round(max(0.0, runs.wall_seconds(run) - compute), 2),
        "wall_seconds": round(runs.wall_seconds(run), 2),
        "comparisons": compared,
        "verdict": word,
        "verdict_sentence": sentence,
        "notes": notes(config, run),
        "test_opened": opened.get("opened"),
        "versions": runs.versions(),
        "git": runs.git_commit(),
        "machine": runs.machine(),
    }
    runs.write_json(run.summary, summary)
    return summary


def comparisons(config: Config, run: RunDir) -> list[dict[str, Any]]:
    """The arm in question against every other on `test`: paired over seeds, lesions resampled, Holm-corrected."""
    from adversa.evaluate.bootstrap import compare, holm, word

    asked = candidate(config.mix.arms)
    others = [a for a in AGAINST if a in config.mix.arms and a != asked]
    if asked is None:
        return []
    rows = tables.read(run.test, schema=tables.PREDICTIONS)
    found = []
    for other in others:
        pairs = [(steps.predictions(rows, asked, s), steps.predictions(rows, other, s)) for s in range(config.evaluate.seeds)]
        a, b = np.stack([p[0][0] for p in pairs]), np.stack([p[1][0] for p in pairs])
        _, labels, groups = pairs[0][0]
        c = compare(a, b, labels, groups, config.evaluate.bootstrap, seed_of("compare", config.seed), metric=HEADLINE)
        found.append({"a": asked, "b": other, "metric": HEADLINE, "role": "test", "difference": c.difference,
                      "low": c.low, "high": c.high, "p": c.p})  # fmt: skip
    for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = float(p)
        # The word needs both: an interval clear of zero, and significance after correction for several comparisons.
        row["word"] = word(row["low"], row["high"]) if p < 0.05 else "not shown"
    return found


def candidate(names: Sequence[str]) -> str | None:
    """The arm that a run is about: guided, or the last that is more than `real`; None where there is none."""
    known = [arm for arm in ARMS[1:] if arm in names]
    return known[-1] if known else None


def verdict(compared: list[dict[str, Any]], config: Config) -> tuple[str, str]:
    """better: the arm in question beats every other; worse: it loses to one; else not shown."""
    if not compared:
        return "not shown", "The arm real alone was trained, so nothing is compared."
    words = [c["word"] for c in compared]
    word = "better" if all(w == "better" for w in words) else "worse" if "worse" in words else "not shown"
    parts = [f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}] against {c['b']} ({c['word']})" for c in compared]
    seeds = f"{config.evaluate.seeds} seed{'s' if config.evaluate.seeds > 1 else ''}"
    return word, f"{word.capitalize()}: test balanced accuracy of {compared[0]['a']}, {seeds}: {'; '.join(parts)}."


def notes(config: Config, run: RunDir) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if config.data.source == "phantom":
        found.append("the images are procedural phantoms, not photographs: the figures say nothing about skin")
    if config.mix.paints and config.denoiser.weights == "phantom":
        found.append("the denoiser started from weights shipped with adversa, trained on phantoms of another seed")
    if has_codec(config):
        psnr = runs.manifest(run.codec)["metrics"]["psnr"]
        found.append(f"painted in the latents of an autoencoder: {psnr:.1f} dB on pictures of select, no painted one is sharper")
    seeds = "one seed an arm" if config.evaluate.seeds == 1 else f"{config.evaluate.seeds} seeds an arm, averaged"
    found.append(f"{seeds}: the intervals hold the choice of test lesions, not the luck of training")
    if not config.data.grouped:
        found.append("data.grouped is off: lesions leak between roles and every figure is too good")
    if skipped := runs.manifest(run.data).get("problems", 0):
        found.append(f"{skipped} pictures or rows were left out; data/leaks.json names each")
    if config.mix.mines and not any(_added(config, run).values()):
        found.append("nothing was added to the real images: every arm was trained on the same")
    return found


def _cards(config: Config, run: RunDir, arm: str, role: str) -> list[dict[str, Any]]:
    at, arm = (0, "real") if arm == BEFORE else (home(config, arm, last_round(config)), arm)
    cards = [runs.read_json(run.arm(at, arm, s) / f"scorecard-{role}.json") for s in range(config.evaluate.seeds)]
    return [c for c in cards if c is not None]


def _mean_card(config: Config, run: RunDir, arm: str, role: str) -> dict[str, float]:
    """Each metric's mean over seeds."""
    values: dict[str, list[float]] = defaultdict(list)
    for card in _cards(config, run, arm, role):
        for name, value in card["metrics"].items():
            values[name].append(value)
    return {name: float(np.mean(v)) for name, v in values.items()}


def _interval(config: Config, run: RunDir, arm: str, role: str) -> dict[str, list[float]]:
    """The interval of each metric where there is one seed; over several seeds, the mean of the bounds."""
    bounds: dict[str, list[list[float]]] = defaultdict(list)
    for card in _cards(config, run, arm, role):
        for name, low_high in card["intervals"].items():
            bounds[name].append(low_high)
    return {name: np.mean(v, axis=0).tolist() for name, v in bounds.items()}


def _used(config: Config, run: RunDir) -> dict[str, int]:
    """Synthetic images in each arm's last training set, after matching the counts."""
    return {arm: mix["synthetic"] for arm, mix in _mixes(config, run).items()}


def _added(config: Config, run: RunDir) -> dict[str, int]:
    """What each arm's last training set has on top of the real and mined images: synthetic images, or repeats."""
    return {arm: mix["added"] for arm, mix in _mixes(config, run).items()}


def _mixes(config: Config, run: RunDir) -> dict[str, dict[str, Any]]:
    last = last_round(config)
    return {arm: runs.manifest(run.arm(home(config, arm, last), arm) / "mix") for arm in config.mix.arms}
