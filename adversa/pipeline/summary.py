"""summary.json: what a run found, in one file that other programs read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from adversa.config import Config, verifier_of
from adversa.curate.filter import Verdict, acceptance
from adversa.pipeline import parity_check, ratio, results, test_access
from adversa.pipeline.folders import has_codec, home, last_round
from adversa.run import control, environment, status, step_folder
from adversa.run.folder import RunDir, classes_of, run_id, split_hash
from adversa.storage import files, tables
from adversa.storage.path import StoragePath
from adversa.types import BEFORE


def write(config: Config, run: RunDir, folders: Sequence[StoragePath]) -> dict[str, Any]:
    """Gather the finished run's folders into summary.json. folders: of all its steps.

    UserError where test was read with other classifiers, or in another way, than the run has now,
    or the arms are not matched.
    """
    test_access.review(run, test_access.asked(config, run), reopen=False)
    classes = classes_of(run.data)
    generated = range(1, last_round(config) + 1) if config.mix.generates else ()
    gated = [run.round(n, "verdicts") for n in generated]
    verdicts = [v for f in gated for v in tables.read(f, schema=tables.VERDICTS).to_pylist()]
    kept = [v for v in verdicts if v["keep"]]
    spent = results.costs(config, run)
    on = {role: _scored(config, run, role, classes) for role in ("mine", "test")}
    compared = results.comparisons(config, on["test"], spent)
    word, sentence = verdict(compared, config)
    opened, mixes = test_access.ledger(run), _mixes(config, run)
    summary = {
        "run": run.root.resolve().name,
        "run_id": run_id((files.read_json(run.recipe) or {})["recipe"]),
        "seed": config.seed,
        "seeds": config.evaluate.seeds,
        "split_hash": split_hash(run.data),
        "rounds": last_round(config),
        "classes": classes,
        "subgroups": results.subgroups(config, run.data / "test", on["test"], classes),
        "subgroup_comparisons": results.subgroup_comparisons(config, run.data / "test", on["test"]),
        "cost": spent,
        "generated": len(verdicts),
        "accepted": len(kept),
        "rejected": dict(sorted(Counter(v["reason"] for v in verdicts if not v["keep"]).items())),
        "acceptance": acceptance([Verdict(**v) for v in verdicts], classes),
        "used": {arm: mix["synthetic"] for arm, mix in mixes.items()},
        "added": {arm: mix["added"] for arm, mix in mixes.items()},
        "comparisons": compared,
        "verdict": word,
        "verdict_sentence": sentence,
        "settings": {str(n): values for n, values in control.recorded(run).items()},
        "ratio": ratio.facts(config, run),
        "notes": notes(config, run),
        "test_opened": opened[0]["opened"] if opened else None,
        "test_openings": len(opened),
        "matched": parity_check.facts(config, run),
        "versions": environment.versions(),
        "git": environment.git_commit(),
        "machine": environment.machine(),
    }
    summary |= _figures(config, on, classes) | _times(run, folders)
    files.write_json(run.summary, summary)
    return summary


def _figures(
    config: Config, on: dict[str, dict[str, results.Scored]], classes: Sequence[str]
) -> dict[str, Any]:
    """Every arm's metrics and their intervals, by role. on: role to what `_scored` gives."""
    told = {
        role: {a: results.figures(s, classes, config.evaluate, role) for a, s in arms.items()}
        for role, arms in on.items()
    }
    return {
        "arms": {arm: {role: told[role][arm][0] for role in told} for arm in config.mix.arms},
        "intervals": {arm: {role: told[role][arm][1] for role in told} for arm in config.mix.arms},
        "before": {role: told[role][BEFORE][0] for role in told},
        "intervals_before": {role: told[role][BEFORE][1] for role in told},
    }


def _times(run: RunDir, folders: Sequence[StoragePath]) -> dict[str, Any]:
    """Seconds of each step, and of the whole run."""
    made = {run.name_of(f): step_folder.manifest(f) for f in folders}
    compute, wall = sum(m["compute_seconds"] for m in made.values()), status.wall_seconds(run)
    restarts, lost = control.restarts(run)
    return {
        "seconds": {name: round(m["seconds"], 2) for name, m in made.items()},
        "device_seconds": round(sum(m["device_seconds"] for m in made.values()), 2),
        "overhead_seconds": round(max(0.0, wall - compute), 2),
        "restarts": restarts,
        "restart_seconds": lost,
        "wall_seconds": round(wall, 2),
    }


def verdict(compared: list[dict[str, Any]], config: Config, on: str = "test") -> tuple[str, str]:
    """better: the arm in question beats every other; worse: it loses to one; else not shown. on:
    what was scored, in words.
    """
    if not compared:
        return "not shown", "The arm real alone was trained, so nothing is compared."
    words = [c["word"] for c in compared]
    word = (
        "better"
        if all(w == "better" for w in words)
        else "worse"
        if "worse" in words
        else "not shown"
    )
    parts = [f"{c['difference']:+.3f} {_range(c)} against {c['b']} ({c['word']})" for c in compared]
    seeds = f"{config.evaluate.seeds} seed{'s' if config.evaluate.seeds > 1 else ''}"
    return (
        word,
        f"{word.capitalize()}: {on} balanced accuracy of {compared[0]['a']}, {seeds}: "
        f"{'; '.join(parts)}.",
    )


def _range(c: dict[str, Any]) -> str:
    return "[no interval]" if c["low"] is None else f"[{c['low']:+.3f}, {c['high']:+.3f}]"


def notes(config: Config, run: RunDir) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if config.data.source == "phantom":
        found.append(
            "the images are procedural phantoms, not photographs: the figures say nothing "
            "about skin"
        )
    if config.mix.generates and verifier_of(config).model == config.classifier.model:
        found.append(
            f"the verifiers are {config.classifier.model}, as the classifier is: they may "
            "share its mistakes"
        )
    if (reopened := test_access.note(run)) is not None:
        found.append(reopened)
    if config.mix.generates and config.denoiser.weights == "phantom":
        found.append(
            "the denoiser started from weights shipped with adversa, trained on phantoms "
            "of another seed"
        )
    if has_codec(config):
        psnr = step_folder.manifest(run.codec)["metrics"]["psnr"]
        found.append(
            f"generated in the latents of an autoencoder: {psnr:.1f} dB on pictures of "
            "select, no generated one is sharper"
        )
    if config.evaluate.seeds == 1:
        found.append(
            "one seed an arm: the intervals hold the choice of test lesions, not the luck "
            "of training"
        )
    else:
        found.append(
            f"{config.evaluate.seeds} seeds an arm, averaged: the intervals hold the "
            "choice of test lesions and the seeds"
        )
    if not config.data.grouped:
        found.append("data.grouped is off: lesions leak between roles and every figure is too good")
    found += [*control.notes(run), *ratio.notes(config, run)]
    if skipped := step_folder.manifest(run.data).get("problems", 0):
        found.append(f"{skipped} pictures or rows were left out; data/leaks.json names each")
    if config.mix.mines and not any(m["added"] for m in _mixes(config, run).values()):
        found.append("nothing was added to the real images: every arm was trained on the same")
    return found


def _scored(
    config: Config, run: RunDir, role: str, classes: Sequence[str]
) -> dict[str, results.Scored]:
    """Arm, and `before`, to what its classifiers say on a role; before any round that is the arm
    `real` as it is.
    """
    rows = results.read(run.test if role == "test" else run.round(last_round(config), "evaluate"))
    assert rows is not None, f"{role} is not scored"
    select = results.read(run.select) if role == "test" else None
    asked = results.measures(config.evaluate)
    known = set(rows["arm"].unique().to_pylist())
    names = {arm: arm for arm in config.mix.arms} | {BEFORE: BEFORE if BEFORE in known else "real"}
    return {
        name: results.scored(rows, select, arm, config.evaluate.seeds, classes, asked)
        for name, arm in names.items()
    }


def _mixes(config: Config, run: RunDir) -> dict[str, dict[str, Any]]:
    """The manifest of each arm's last training set. `synthetic`: images of it; `added`: what it has
    on top of the real and mined images: synthetic images, or repeats.
    """
    last = last_round(config)
    return {
        arm: step_folder.manifest(run.arm(home(config, arm, last), arm) / "mix")
        for arm in config.mix.arms
    }
