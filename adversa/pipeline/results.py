"""What the predictions on a role say: each arm's figures with their intervals, arms compared,
subgroups, and what each arm cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

from adversa import config as cfg
from adversa.common.statistics import holm
from adversa.evaluate.bootstrap import compare, intervals
from adversa.evaluate.inference import gain_per_hour, mcnemar, word
from adversa.evaluate.metrics import metrics
from adversa.evaluate.operating import Measures, members, thresholds
from adversa.evaluate.subgroups import by_attribute, compare_by_attribute
from adversa.pipeline import ratio
from adversa.pipeline.folders import has_codec, home, last_round, ratio_folders, swept, verifiers
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import predictions, tables
from adversa.storage.path import StoragePath
from adversa.types import ARMS, BEFORE, GENERATED, ROLES, seed_of

HEADLINE = "balanced_accuracy"
AGAINST = ("replay", "unguided", "resample", "real")  # in the order of how much they would explain
EFFECT = 0.02  # of the headline: what many seeds it would take is told for


@dataclass(frozen=True)
class Scored:
    """An arm's S classifiers on a role: logits [S, N, K]; labels [N], groups [N], ids [N]; limits:
    of each, set on select.
    """

    logits: np.ndarray
    labels: np.ndarray
    groups: list[str]
    ids: list[str]
    limits: list[dict[str, float]] | None


def measures(config: cfg.Evaluate) -> Measures:
    return Measures(
        {k: tuple(v) for k, v in config.groups.items()}, tuple(config.specificities), config.floor
    )


def check_groups(config: cfg.Evaluate, classes: Sequence[str]) -> None:
    """Before anything is trained, and before test is opened. UserError for a group that is none
    (operating.members).
    """
    for name in config.groups:
        members(name, measures(config), classes)


def read(folder: StoragePath) -> pa.Table | None:
    """Predictions of a step, None where it was not done."""
    return (
        tables.read(folder, schema=tables.PREDICTIONS) if step_folder.is_finished(folder) else None
    )


def scored(
    rows: pa.Table,
    select: pa.Table | None,
    arm: str,
    seeds: int,
    classes: Sequence[str],
    asked: Measures,
) -> Scored:
    """rows, select: predictions on the role in question, and on the one that sets thresholds (None:
    none are set).
    """
    found = [predictions.predictions(rows, arm, s) for s in range(seeds)]
    limits = None
    if select is not None and asked.groups:
        chosen = [predictions.predictions(select, arm, s) for s in range(seeds)]
        limits = [thresholds(p.logits, p.labels, classes, asked) for p in chosen]
    first = found[0]
    return Scored(
        np.stack([p.logits for p in found]), first.labels, first.groups, first.ids, limits
    )


def figures(
    of: Scored, classes: Sequence[str], config: cfg.Evaluate, role: str
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(each metric's mean over seeds, its interval)."""
    asked = measures(config)
    each = [
        metrics(x, of.labels, classes, asked, of.limits[s] if of.limits else None)
        for s, x in enumerate(of.logits)
    ]
    means = {
        name: float(np.mean([m[name] for m in each]))
        for name in each[0]
        if all(name in m for m in each)
    }
    seed = seed_of("bootstrap", role)
    given = of.logits, of.labels, of.groups
    ranges = intervals(*given, classes, config.bootstrap, seed, asked, of.limits)
    return means, {name: [float(v) for v in ends] for name, ends in ranges.items()}


def candidate(names: Sequence[str]) -> str | None:
    """The arm that a run is about: guided, or the last that is more than `real`; None where there
    is none.
    """
    known = [arm for arm in ARMS[1:] if arm in names]
    return known[-1] if known else None


def comparisons(
    config: cfg.Config,
    arms: dict[str, Scored],
    spent: dict[str, dict[str, float]],
    role: str = "test",
    unit: str = "lesion",
) -> list[dict[str, Any]]:
    """The arm in question against the others on a role: paired over seeds, lesions resampled,
    Holm-corrected, McNemar beside it.

    unit: what is resampled, as the notes call it.
    """
    asked = candidate(config.mix.arms)
    if asked is None:
        return []
    others = [a for a in AGAINST if a in config.mix.arms and a != asked]
    found = []
    for other in others:
        a, b = arms[asked], arms[other]
        c = compare(
            a.logits,
            b.logits,
            a.labels,
            a.groups,
            config.evaluate.bootstrap,
            seed_of("compare", config.seed),
            HEADLINE,
            unit=unit,
        )
        extra = spent[asked]["device_seconds"] - spent[other]["device_seconds"]
        row: dict[str, Any] = {
            "a": asked,
            "b": other,
            "metric": HEADLINE,
            "role": role,
            **{f.name: getattr(c, f.name) for f in fields(c) if f.name != "spread"},
            "each": list(c.each),
            "seeds_needed": c.spread.seeds_needed(EFFECT),
            "effect": EFFECT,
            "mcnemar": [
                asdict(mcnemar(x, y, a.labels, a.groups))
                for x, y in zip(a.logits, b.logits, strict=True)
            ],
            "gain_per_device_hour": asdict(gain_per_hour(c.difference, c.low, c.high, extra))
            if extra > 0
            else None,
        }
        found.append(row)
    for row, p in zip(found, holm([r["p"] for r in found]).tolist(), strict=True):
        row["p_holm"] = float(p)
        # The word needs both: an interval clear of zero, and significance after correction for
        # several comparisons.
        row["word"] = word(row["low"], row["high"]) if p < 0.05 else "not shown"
    return found


def subgroups(
    config: cfg.Config, folder: StoragePath, arms: dict[str, Scored], classes: Sequence[str]
) -> dict[str, Any]:
    """attribute -> arm -> a row a value: of the arm before and the one in question, for the
    attributes asked for.

    folder: of the examples that were scored.
    """
    if not config.evaluate.subgroups:
        return {}
    known = _attributes(folder)
    shown = {
        name: arms[name] for name in (BEFORE, candidate(config.mix.arms) or "real") if name in arms
    }
    found: dict[str, Any] = {}
    for attribute in _present(config, known, arms):
        found[attribute] = {
            name: [
                {
                    "value": g.value,
                    "n": g.n,
                    "lesions": g.lesions,
                    "small": g.small,
                    "value_of": g.metrics.get(HEADLINE),
                    "interval": g.intervals.get(HEADLINE),
                }
                for g in by_attribute(
                    of.logits,
                    of.labels,
                    of.groups,
                    classes,
                    [known[i] for i in of.ids],
                    attribute,
                    config.evaluate.bootstrap,
                    seed_of("subgroups", attribute),
                    measures(config.evaluate),
                    of.limits,
                    HEADLINE,
                )
            ]
            for name, of in shown.items()
        }
    return found


def subgroup_comparisons(
    config: cfg.Config, folder: StoragePath, arms: dict[str, Scored]
) -> dict[str, Any]:
    """The headline comparison (the arm in question against the first of AGAINST) within each value
    of the attributes asked for.

    a, b, metric; tested: groups; attributes: attribute -> a row a value. Holm counts the groups of
    all attributes; a small group, or one without a value, is not among them and has no difference.
    Empty where no arms are compared, or no attribute is known.
    """
    asked = candidate(config.mix.arms)
    other = next((arm for arm in AGAINST if arm in config.mix.arms and arm != asked), None)
    if asked is None or other is None or not config.evaluate.subgroups:
        return {}
    a, b, known = arms[asked], arms[other], _attributes(folder)
    compared = [
        compare_by_attribute(
            a.logits,
            b.logits,
            a.labels,
            a.groups,
            [known[i] for i in a.ids],
            attribute,
            config.evaluate.bootstrap,
            seed_of("compare", config.seed, attribute),
            HEADLINE,
        )
        for attribute in _present(config, known, arms)
    ]
    told = [c.comparison for groups in compared for c in groups if c.comparison is not None]
    adjusted = iter(holm([c.p for c in told]).tolist())
    found: dict[str, Any] = {}
    for group in (g for groups in compared for g in groups):
        row: dict[str, Any] = {
            "value": group.value,
            "n": group.n,
            "lesions": group.lesions,
            "small": group.small,
        }
        row |= dict.fromkeys(("difference", "low", "high", "p", "p_holm", "word"))
        if (c := group.comparison) is not None:
            p = float(next(adjusted))
            said = word(c.low, c.high) if p < 0.05 else "not shown"
            row |= {
                "difference": c.difference,
                "low": c.low,
                "high": c.high,
                "p": c.p,
                "p_holm": p,
                "word": said,
            }
        found.setdefault(group.attribute, []).append(row)
    return (
        {"a": asked, "b": other, "metric": HEADLINE, "tested": len(told), "attributes": found}
        if found
        else {}
    )


def _attributes(folder: StoragePath) -> dict[str, dict[str, str]]:
    """id -> attributes of the examples of a folder."""
    examples = tables.read(folder, ["id", "attributes"], tables.EXAMPLES).to_pylist()
    return {
        e["id"]: {k: _banded(k, v) for k, v in dict(e["attributes"] or ()).items()}
        for e in examples
    }


def _present(
    config: cfg.Config, known: dict[str, dict[str, str]], arms: dict[str, Scored]
) -> list[str]:
    """The attributes asked for that an image scored has."""
    ids = next(iter(arms.values())).ids
    return [
        attribute
        for attribute in config.evaluate.subgroups
        if any(known[i].get(attribute) for i in ids)
    ]


def _banded(name: str, value: str) -> str:
    """Ages in bands of twenty years: single years are small groups."""
    if name != "age":
        return value
    try:
        low = int(float(value)) // 20 * 20
    except ValueError:
        return value
    return f"{low:02d} to {low + 19}"


def costs(config: cfg.Config, run: RunDir) -> dict[str, dict[str, float]]:
    """Seconds and device-seconds of what an arm needs beside the data: its classifiers of all
    rounds, the classifier that mines, and where it generates its share of the images and verdicts,
    the denoiser, the verifiers and what the filter measures on real images; where it is the one
    whose ratio was swept, the sweeps.
    """
    rounds, seeds = range(1, last_round(config) + 1), range(config.evaluate.seeds)
    filtered = ("inspected", *(("twins",) if config.curate.twins else ()), "verdicts")
    made = [run.denoiser, *verifiers(config, run), *(run.features / r for r in ROLES), run.limits]
    made += [run.codec] if has_codec(config) else []
    if has_codec(config) and not config.denoiser.external:
        made += [run.latents(role) for role in ("train", "select")]
    sweeps = [ratio_folders(run, n)[0] for n in swept(config, run)]
    found: dict[str, dict[str, float]] = {}
    for arm in config.mix.arms:
        places = {home(config, arm, n) for n in rounds} or {0}
        whole = [run.arm(n, arm, s) / "classifier" for n in places for s in seeds]
        if arm != "real" or home(config, arm, 1):  # its training set holds what was mined
            whole += [run.arm(0, "real", 0) / "classifier"]
            whole += [run.round(n, name) for n in rounds for name in ("scores", "hard")]
        if sweeps and arm == ratio.arm_of(config):
            whole += sweeps
        if arm == "guided" and config.generate.adaptive:
            whole += [run.round(n, "levels") for n in rounds]
        folders = dict.fromkeys([*whole, *(made if arm in GENERATED else ())], 1.0)
        for n in rounds if arm in GENERATED else ():
            share = _share(run.round(n, "verdicts"), arm)
            folders |= {run.round(n, name): share for name in ("synthetic", *filtered)}
        spent = [(share, step_folder.manifest(f)) for f, share in folders.items()]
        found[arm] = {
            k: round(sum(share * m[k] for share, m in spent), 2)
            for k in ("seconds", "device_seconds")
        }
    return found


def _share(verdicts: StoragePath, arm: str) -> float:
    arms = tables.read(verdicts, ["arm"], tables.VERDICTS)["arm"].to_pylist()
    return arms.count(arm) / len(arms) if arms else 0.0
