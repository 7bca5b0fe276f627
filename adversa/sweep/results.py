"""sweep.json and sweep.parquet: what a sweep found, from the folders of its trials. Of an
unfinished one: what is there.

All trials answer for the same images of `select`, and all see the same resamples of its lesions,
drawn once: curves, contrasts and equivalent real images are paired over arms, ratios and cells by
their seeds and lesions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from adversa.common.statistics import holm
from adversa.config import Config
from adversa.evaluate import dose_response, equivalent
from adversa.evaluate.bootstrap import difference, interval
from adversa.evaluate.inference import ALPHA, word
from adversa.pipeline import train
from adversa.run import environment, status, step_folder
from adversa.run.folder import RunDir, classes_of, split_hash
from adversa.storage import files, tables
from adversa.sweep import grid, regimes, wording
from adversa.sweep.grid import DataRegime, Variant
from adversa.sweep.trials import REAL, ROLE, Condition, Trials, read, table
from adversa.types import UserError, digest

COUNTS = ("real", "mined", "added", "synthetic", "added_by_class")  # of a trial
POINTS = 80  # of a curve, as many again at the ratios
FEWEST = 3  # ratios of a curve
# What is asked of two arms; the p values of each are one family, over all cells and ratios.
QUESTIONS = {
    "replay": "generated images against as many repeats of the hard cases",
    "unguided": "guided against unguided",
    "sees": "the denoiser saw the cell's images alone, against all of train",
    "real": "something added against nothing added",
}


def write(config: Config, run: RunDir) -> dict[str, Any]:
    """Write sweep.parquet and sweep.json into the sweep's folder; returns what the latter holds."""
    found = results(config, run)
    with files.writing(run.root):
        tables.write_part(run.root / "sweep.parquet", table(config, run))
        files.write_json(run.root / "sweep.json", found)
    return found


def results(config: Config, run: RunDir) -> dict[str, Any]:
    """Everything a sweep says, for JSON. UserError where the metric has no value on `select`."""
    found = read(config, run)
    pools = [
        pool(run, cell, v)
        for cell in _cells(config)
        for v in grid.variants(config, cell)
        if v.generates
    ]
    known = {
        "run": run.root.name,
        "what": what(config, run, found, pools),
        "questions": QUESTIONS,
        "points": points(found),
        "curves": curves(found),
        "contrasts": contrasts(found),
        "real": real(found),
        "equivalent_images": equivalents(found),
    }
    verdicts = wording.verdicts(known)
    return known | {
        "verdicts": verdicts,
        "sentences": [v["sentence"] for v in verdicts],
        "notes": wording.notes(config, known),
        "versions": environment.versions(),
        "git": environment.git_commit(),
        "machine": environment.machine(),
    }


# ---- what was swept ------------------------------------------------------------------------------


def what(config: Config, run: RunDir, found: Trials, pools: list[dict[str, Any]]) -> dict[str, Any]:
    classes, requested = classes_of(run.data), found.requested
    missing = [p.name for p in requested if p not in found.drawn]
    split = files.read_json(run.data / "split.json") or {}
    return {
        "classes": classes,
        "split_hash": split_hash(run.data),
        "metric": config.sweep.metric,
        "role": ROLE,
        "images": found.images or sum(split.get("images", {}).get(ROLE, {}).values()),
        "lesions": found.lesions,
        "seed": config.seed,
        "seeds": config.sweep.seeds,
        "subset_seed": config.sweep.subset_seed,
        "source": config.data.source,
        "resamples": config.sweep.bootstrap,
        "ratios": sorted(config.sweep.ratios),
        "variants": list(
            {v.name: None for c in grid.cells(config.sweep) for v in grid.variants(config, c)}
        ),
        "cells": [cell_facts(config, run, c, len(classes)) for c in _cells(config)],
        "pools": pools,
        "trials": {
            "asked": len(requested),
            "done": len(found.drawn),
            "missing": len(missing),
            "names": missing,
        },
        "cost": cost(run),
    }


def cell_facts(config: Config, run: RunDir, cell: DataRegime, classes: int) -> dict[str, Any]:
    """Counts, by class; None where the cell isn't made yet. verifiers: whether they had a say in
    its filter (grid.filter_of).
    """
    d = grid.cell_dir(run, cell)
    made, hard = files.read_json(d.data / step_folder.MANIFEST), d.round(regimes.ROUND, "hard")
    mined = None
    if step_folder.is_finished(hard):
        cases = set(
            train.pairs(tables.read(hard, ["example", "label"], tables.HARD_CASES), "example")
        )
        mined = np.bincount([label for _, label in cases], minlength=classes).tolist()
    counts = {k: made[k] if made else None for k in ("real", "lesions")}
    return {
        "cell": cell.name,
        "count": cell.count,
        "title": wording.title(cell.name),
        **counts,
        "mined": mined,
        "verifiers": grid.filter_of(config.curate, made["lesions"]) == config.curate
        if made
        else None,
    }


def pool(run: RunDir, cell: DataRegime, variant: Variant) -> dict[str, Any]:
    """asked, kept and why the rest was turned down; None until it is generated and judged."""
    d = grid.pool_dir(run, cell, variant)
    facts: dict[str, Any] = {"cell": cell.name, "variant": variant.name, "sees": variant.sees}
    if not step_folder.is_finished(regimes.verdicts_of(d)):
        return facts | dict.fromkeys(("asked", "kept", "share", "reasons"))
    rows = tables.read(regimes.verdicts_of(d), ["keep", "reason"], tables.VERDICTS)
    reasons = Counter(rows.filter(pc.invert(rows["keep"]))["reason"].to_pylist())
    requested, kept = step_folder.manifest(d / "requests")["rows"], len(rows) - reasons.total()
    reported = {"asked": requested, "kept": kept, "share": kept / requested if requested else None}
    return (
        facts | reported | {"reasons": dict(sorted(reasons.items(), key=lambda r: (-r[1], r[0])))}
    )


def cost(run: RunDir) -> dict[str, Any]:
    """Device-seconds of finished steps (a core or a GPU each) by what they are for, and wall time.
    A trial's result repeats its classifier's seconds, which may be gone.
    """
    spent = {}
    for name in ("data", "cells", "pools", "trials"):
        made = [
            p
            for p in (run.root / name).rglob(step_folder.MANIFEST)
            if name != "trials" or p.parent.name != "classifier"
        ]
        spent[name] = sum(
            float((m or {}).get("device_seconds", 0.0)) for m in tables.each(files.read_json, made)
        )
    return {
        "device_hours": sum(spent.values()) / 3600,
        "device_seconds": spent,
        "wall_seconds": status.wall_seconds(run),
    }


# ---- points and curves ---------------------------------------------------------------------------


def _reported(d: Condition) -> dict[str, Any]:
    """The regime, variant and ratio in plain values."""
    names = {"cell": d.cell.name, "variant": d.variant.name}
    return names | asdict(d.variant) | {"ratio": d.ratio}


def _every(found: Trials) -> list[Condition]:
    order = _cells(found.config)
    every = dict.fromkeys(Condition(p.cell, p.variant, p.ratio) for p in found.requested)
    return sorted(every, key=lambda d: order.index(d.cell))


def points(found: Trials) -> list[dict[str, Any]]:
    """Every point of the grid; without finished trials its figures are None. low, high: 95%, over
    seeds and lesions.
    """
    rows = []
    for d in _every(found):
        done = found.of(d)
        facts: dict[str, Any] = dict.fromkeys((*COUNTS, "reached", "mean", "low", "high"))
        if done:
            values = found.matrix(d)
            ends = interval(found.config.sweep.metric, values, found.lesions) or (None, None)
            facts = {k: found.row(d)[k] for k in COUNTS} | {
                "reached": found.reached(d),
                "mean": float(values[:, 0].mean()),
                "low": ends[0],
                "high": ends[1],
            }
        rows.append(
            _reported(d)
            | facts
            | {"seeds": len(done), "missing": found.config.sweep.seeds - len(done)}
        )
    return rows


def _cells(config: Config) -> list[DataRegime]:
    """The smallest first."""
    return grid.cells(config.sweep)[::-1]


def _arms(found: Trials) -> list[tuple[DataRegime, Variant]]:
    return [(c, v) for c in _cells(found.config) for v in grid.variants(found.config, c)]


def _added(found: Trials) -> list[Condition]:
    """Doses above 0, each once, with finished trials."""
    return [
        d
        for c, v in _arms(found)
        for d in found.conditions(c, v)[0]
        if d.ratio and found.row(d)["added"]
    ]


def curves(found: Trials) -> list[dict[str, Any]]:
    """The dose response of each regime and arm over the ratios reached, or None and why."""
    return [curve(found, cell, variant) for cell, variant in _arms(found)]


def curve(found: Trials, cell: DataRegime, variant: Variant) -> dict[str, Any]:
    conditions, same = found.conditions(cell, variant)
    reached = [found.reached(d) for d in conditions]
    facts = {k: v for k, v in _reported(Condition(cell, variant, 0.0)).items() if k != "ratio"} | {
        "ratios": [d.ratio for d in conditions],
        "reached": reached,
        "same": same,
        "response": None,
        "seeds_vary": False,
        "why": "",
    }
    if len(conditions) < FEWEST:
        return facts | {"why": f"{len(conditions)} of the {FEWEST} ratios that a curve needs"}
    replicates, vary = found.replicates(conditions, f"{cell.name}/{variant.name}")
    try:
        response = dose_response.response(
            reached, found.scores(conditions), replicates, grid=_grid(reached).tolist()
        )
    except UserError as e:  # too few resamples have a value
        return facts | {"why": str(e)}
    words = response.words.replace(
        f"ratio {response.ratios[-1]:g}", f"ratio {response.ratios[-1]:.3g}"
    )
    return facts | {"response": asdict(response) | {"words": words}, "seeds_vary": vary}


def _grid(ratios: Sequence[float]) -> np.ndarray:
    """Ratios at which a curve is given: close where the measured ratios are."""
    low, high = ratios[0], ratios[-1]
    inner = low + np.geomspace((ratios[1] - low) / 10, high - low, POINTS)
    return np.unique(np.clip(np.concatenate([ratios, inner]), low, high))


# ---- one arm against another ---------------------------------------------------------------------


def contrasts(found: Trials) -> list[dict[str, Any]]:
    """Paired differences a minus b within a cell and a ratio, over the seeds that both have;
    QUESTIONS. Two ratios that reached the same count are one, and where nothing could be added
    nothing is compared.
    """
    rows: list[dict[str, Any]] = []
    for d in _added(found):
        rows += [
            row
            for requested, b in _against(found, d)
            if (row := contrast(found, requested, d, b)) is not None
        ]
    for requested in QUESTIONS:
        family = [r for r in rows if r["question"] == requested]
        for row, p in zip(family, holm([r["p"] for r in family]).tolist(), strict=True):
            row |= {
                "p_holm": p,
                "family": len(family),
                "word": word(row["low"], row["high"]) if p < ALPHA else "not shown",
            }
    return rows


def _against(found: Trials, a: Condition) -> list[tuple[str, Condition]]:
    """What a point is held against, where the grid has it."""
    known, v = grid.variants(found.config, a.cell), a.variant
    requested = [("replay", Variant("replay"))] if v.generates else []
    requested += [("unguided", Variant("unguided", "", v.sees))] if v.arm == "guided" else []
    requested += [("sees", replace(v, sees=grid.ALL))] if v.generates and v.sees != grid.ALL else []
    return [(name, a._replace(variant=b)) for name, b in requested if b in known] + [
        ("real", Condition(a.cell, REAL, 0.0))
    ]


def contrast(found: Trials, requested: str, a: Condition, b: Condition) -> dict[str, Any] | None:
    """None where no seed of both is finished."""
    seeds = sorted(found.of(a).keys() & found.of(b).keys())
    c = difference(found.matrix(a, seeds), found.matrix(b, seeds), found.lesions) if seeds else None
    if c is None:
        return None
    return (
        {
            "question": requested,
            "cell": a.cell.name,
            "ratio": a.ratio,
            "reached": found.reached(a),
            "a": a.variant.name,
            "b": b.variant.name,
            "metric": found.config.sweep.metric,
            "role": ROLE,
        }
        | asdict(c)
        | {"each": list(c.each)}
    )


# ---- in real images ------------------------------------------------------------------------------


def real_conditions(found: Trials) -> tuple[list[Condition], list[str]]:
    """(ratio 0 of each cell by its number of real images in training, hard cases too; cells with as
    many as one before).
    """
    every = [d for c in _cells(found.config) if found.of(d := Condition(c, REAL, 0.0))]
    first: dict[int, Condition] = {}
    for d in every:
        first.setdefault(_count(found, d), d)
    return [first[n] for n in sorted(first)], [
        d.cell.name for d in every if d not in first.values()
    ]


def _count(found: Trials, d: Condition) -> int:
    row = found.row(d)
    return int(row["real"] + row["mined"])


def real(found: Trials) -> dict[str, Any]:
    """The score of real images alone by their number, with a 95% band; isotonic: what
    `equivalent_images` reads (equivalent.real_curve).
    """
    conditions, same = real_conditions(found)
    facts: dict[str, Any] = {
        "cells": [d.cell.name for d in conditions],
        "counts": [_count(found, d) for d in conditions],
        "same": same,
    }
    if not conditions:
        return facts | {"mean": [], "low": [], "high": [], "isotonic": [], "seeds_vary": False}
    replicates, vary = found.replicates(conditions, "real")
    mean = np.nanmean(found.scores(conditions), axis=1)
    low, high = mean + np.percentile(
        replicates - replicates.mean(0), [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)], axis=0
    )
    return facts | {
        "mean": mean.tolist(),
        "low": np.clip(low, 0, mean).tolist(),
        "high": np.clip(high, mean, 1).tolist(),
        "isotonic": equivalent.real_curve(mean[None])[0].tolist(),
        "seeds_vary": vary,
    }


def equivalents(found: Trials) -> list[dict[str, Any]]:
    """The equivalent real images of each regime, arm and ratio above 0; none where fewer than two
    counts of real images were scored.
    """
    conditions, _ = real_conditions(found)
    if len(conditions) < 2:
        return []
    return [
        _reported(d) | {"reached": found.reached(d)} | equivalent_images(found, conditions, d)
        for d in _added(found)
    ]


def equivalent_images(
    found: Trials, conditions: Sequence[Condition], d: Condition
) -> dict[str, Any]:
    """The equivalent real images of one condition, with words for what was added."""
    name = digest("worth", d.cell.name, d.variant.name, d.ratio, size=8)
    replicates, vary = found.replicates([*conditions, d], name)
    counts = [_count(found, x) for x in conditions]
    w = equivalent.equivalent_images(
        counts,
        found.scores(conditions),
        _count(found, d),
        found.row(d)["added"],
        found.scores([d])[0],
        replicates[:, :-1],
        replicates[:, -1],
    )
    added = "one synthetic image" if d.variant.generates else "one repeat"
    return asdict(w) | {"words": w.words.replace("one synthetic image", added), "seeds_vary": vary}
