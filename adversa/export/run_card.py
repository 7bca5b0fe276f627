"""What the dataset card of a run's images says beyond that of an order: arms, the gate,
memorisation, the split, the versions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adversa.config import Config
from adversa.export.dataset_card import Origin, cell, table
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.run.folder import RunDir, split_hash
from adversa.storage import files

MEMORISATION = "memorisation.json"  # beside the verdicts
# The limits that a verdict carries, in words.
LIMITS = {
    "contrast_limit": "standard deviation of brightness, grey levels, at least",
    "clipped_limit": "share of values that are 0 or 255, at most",
    "agreement_least": "judge's probability of the label, at least",
    "agreement_most": "judge's probability of the label, at most",
    "realism_limit": "distance to real images, first feature space, at most",
    "realism_2_limit": "distance to real images, second feature space, at most",
    "similarity_limit": "similarity to the nearest real image in pixels, below",
    "similarity_2_limit": "similarity to the nearest real image in features, below",
    "twin_limit": "similarity to another image of the arm, below",
    "quota": "images of one hard case, an arm and round, at most",
}


def origin(
    config: Config,
    run: RunDir,
    rounds: Sequence[int],
    arms: Sequence[str],
    verdicts: Sequence[dict[str, Any]],
    classes: Sequence[str],
    rejected: bool,
) -> tuple[Origin, str]:
    """(what the card says of the images' making, when the last was painted). verdicts: of every
    image of the rounds and arms.
    """
    painted = [step_folder.manifest(run.round(n, "synthetic")) for n in rounds]
    source = config.denoiser.external
    trained_on = "not recorded: it was given" if source else f"the role `train` of {data(config)}"
    started = config.denoiser.weights
    if started and not source:
        trained_on += f", from the weights {place(started)}"
    among = (
        f" The {sum(not v['keep'] for v in verdicts)} images that the gate refused, but those "
        "without a picture, are here too."
    )
    made = Origin(
        denoiser=f"given: {place(source)}" if source else f"trained by the run `{name(run)}`",
        settings=settings(config.generate.model_dump(mode="json"), ("weak",)),
        seed=config.seed,
        trained_on=trained_on,
        near_copies=_near_copies(verdicts),
        versions=versions(painted[-1]["versions"], painted[-1].get("git")),
        title=f"Synthetic images of the run {cell(name(run))}, painted by adversa",
        facts=[
            ("run", f"{name(run)} ({run_id(run)})"),
            ("rounds", ", ".join(map(str, rounds))),
            ("split hash", split_hash(run.data)),
        ],
        sections="\n".join(
            [_counts(verdicts, classes), _gate(verdicts, classes), _memorised(run, rounds, arms)]
        ),
        columns=" The gate's numbers follow, each with its limit: empty where not known, or not "
        "checked."
        + (
            f"{among} `keep` tells them apart, `reason` says why."
            if rejected
            else " All images passed."
        ),
    )
    return made, painted[-1]["finished"]


def name(run: RunDir) -> str:
    return run.root.resolve().name


def run_id(run: RunDir) -> str:
    return run_folder.run_id((files.read_json(run.recipe) or {})["recipe"])


def data(config: Config) -> str:
    """The source of the pictures, without where it lies on the machine that made the run."""
    d = config.data
    if d.source == "phantom":
        return f"procedural phantoms (seed {d.phantom.seed})"
    return f"{d.source} ({cell(Path(d.path).name)})" if d.path else d.source


def place(text: str) -> str:
    """A file's or folder's own name, without where it lies; a hub id (owner/name) as it is."""
    known = (
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text)
        and not text.startswith(".")
        and not text.endswith(".safetensors")
    )
    return text if known and not Path(text).exists() else Path(text).name


def settings(section: dict[str, Any], places: Sequence[str]) -> dict[str, Any]:
    """A section of the configuration, plain values; `places`: its fields that may name a file or
    folder.
    """
    return section | {k: place(section[k]) for k in places if section.get(k)}


def versions(found: dict[str, str], commit: str | None) -> dict[str, str]:
    return found | (
        {"adversa": f"{found['adversa']} ({commit})"} if commit and "adversa" in found else {}
    )


def _near_copies(verdicts: Sequence[dict[str, Any]]) -> str:
    refused = Counter(v["reason"] for v in verdicts if v["reason"].startswith("near copy"))
    words = ", ".join(f"{n} {reason}" for reason, n in refused.items())
    return (
        f"done, against the real images of every role: {refused.total()} of "
        f"{len(verdicts)} painted images refused"
        f"{f' ({words})' if words else ''}. It finds what resembles a real image more than "
        "different lesions resemble each other; "
        "it is no proof of privacy."
    )


def _counts(verdicts: Sequence[dict[str, Any]], classes: Sequence[str]) -> str:
    """Painted, kept and refused of each arm, strategy and class."""
    groups: dict[tuple[str, str, int], Counter[str]] = {}
    for v in verdicts:
        groups.setdefault((v["arm"], v.get("strategy") or "-", v["label"]), Counter())[
            v["reason"]
        ] += 1
        groups[v["arm"], v.get("strategy") or "-", v["label"]]["kept images"] += v["keep"]
    found = []
    for (arm, strategy, label), counter in sorted(groups.items()):
        kept = counter.pop("kept images")
        refused = sorted((r, n) for r, n in counter.items() if r != "kept")
        total = counter.total()
        reasons = ", ".join(f"{n} {r}" for r, n in refused) or "-"
        found.append(
            (
                arm,
                strategy,
                cell(classes[label]),
                str(total),
                str(kept),
                f"{kept / total:.0%}",
                reasons,
            )
        )
    return "\n" + table(
        ("arm", "strategy", "class", "painted", "kept", "accepted", "refused"), found
    )


def _gate(verdicts: Sequence[dict[str, Any]], classes: Sequence[str]) -> str:
    """Its limits, as the verdicts carry them."""
    known = [key for key in LIMITS if verdicts and key in verdicts[0]]
    found = [
        (LIMITS[key], _limit([(v["label"], v[key]) for v in verdicts], classes)) for key in known
    ]
    checks = table(("check", "limit"), found) if found else "Its limits are not recorded.\n"
    return f"""## The gate

An image was kept where it passed every check; what could not be measured did not pass. The judge is a classifier that had no part
in painting; limits were set on real images, none on the role `test`.

{checks}"""


def _limit(values: Iterable[tuple[int, float | None]], classes: Sequence[str]) -> str:
    """One number, one a class, or a range."""
    known = sorted({(label, v) for label, v in values if v is not None})
    numbers = {v for _, v in known}
    if len(numbers) <= 1:
        return cell(float(numbers.pop())) if numbers else "off"
    if len({label for label, _ in known}) == len(known):
        return ", ".join(f"{cell(classes[label])} {v:g}" for label, v in known)
    return f"{min(numbers):g} to {max(numbers):g}"


def _memorised(run: RunDir, rounds: Sequence[int], arms: Sequence[str]) -> str:
    """How near the images lie to the real ones, against held-out real images; nothing where it was
    not measured.
    """
    found = []
    for number in rounds:
        saved = files.read_json(run.round(number, "verdicts") / MEMORISATION) or {}
        for arm in (a for a in arms if saved.get(a)):
            m = saved[arm]
            middle, high = (m["quantiles"].get(q) for q in ("0.5", "0.99"))
            ends = [f"{pair[0]:.3f} / {pair[1]:.3f}" if pair else "-" for pair in (middle, high)]
            numbers = (
                str(m["synthetic"]),
                str(m["held_out"]),
                *ends,
                f"{m['nearer']:.3f}",
                f"{m['beyond']:.3f}",
            )
            found.append((str(number), arm, *numbers))
    if not found:
        return ""
    head = ("round", "arm", "painted", "held out", "median", "99%", "nearer", "beyond")
    return f"""
## Memorisation

Similarity to the nearest real image, of painted images (kept or not) and of held-out real ones to another lesion (painted /
held out). nearer: how often a painted image is nearer than a held-out one; 0.5 where it copies no more than real images resemble
each other. beyond: the share of painted images nearer than 99% of the held-out ones; 0.01 is expected.

{table(head, found)}"""
