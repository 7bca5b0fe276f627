"""What a sweep says in sentences: a verdict for each arm that generates, and what a reader must
know before believing the figures.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from adversa.config import Config
from adversa.sweep import grid

NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "auroc_macro": "AUROC, mean of classes",
    "worst_class": "sensitivity of the worst class",
}
KINDS = {  # of dose_response.Response, in the words of a list
    "no gain": "no gain shown",
    "falls": "the score falls",
    "misfit": "no saturating curve",
    "rising": "still rising",
    "unclear": "may lie anywhere",
}


def title(cell: str) -> str:
    return "all of train" if cell == grid.ALL else f"{int(cell)} a class"


def _at(row: dict[str, Any]) -> str:
    return f"{title(row['cell'])}, ratio {row['ratio']:g}"


def _difference(row: dict[str, Any]) -> str:
    return f"{row['difference']:+.3f}, 95% {row['low']:+.3f} to {row['high']:+.3f}"


def listed(found: Sequence[str], most: int = 4) -> str:
    """The items with semicolons between them, the last ones as a count: a; b; c; and 3 more."""
    more = [f"and {len(found) - most} more"] if len(found) > most else []
    return "; ".join([*found[:most], *more])


# ---- verdicts ------------------------------------------------------------------------------------


def verdicts(known: dict[str, Any]) -> list[dict[str, Any]]:
    """variant, word, sentence of each arm that generates. word: better or worse than replay (or,
    without replay, than nothing added) somewhere and the contrary nowhere; mixed; not shown.
    """
    generated = list(dict.fromkeys(c["variant"] for c in known["curves"] if c["arm"] != "replay"))
    return [verdict(known, name) for name in generated]


def verdict(known: dict[str, Any], name: str) -> dict[str, Any]:
    rival = (
        "replay"
        if any(c["question"] == "replay" for c in known["contrasts"])
        or "replay" in known["what"]["variants"]
        else "real"
    )
    rows = [c for c in known["contrasts"] if c["question"] == rival and c["a"] == name]
    better, worse = ([r for r in rows if r["word"] == w] for w in ("better", "worse"))
    word = (
        "mixed" if better and worse else "better" if better else "worse" if worse else "not shown"
    )
    parts = [
        _compared(rows, better, worse, rival, not known["what"]["trials"]["missing"]),
        _saturation_points([c for c in known["curves"] if c["variant"] == name]),
    ]
    parts.append(
        _equivalent_images([w for w in known["equivalent_images"] if w["variant"] == name])
    )
    return {
        "variant": name,
        "against": rival,
        "word": word,
        "sentence": f"{name}: {'; '.join(parts)}.",
    }


def _compared(
    rows: list[dict[str, Any]],
    better: list[dict[str, Any]],
    worse: list[dict[str, Any]],
    rival: str,
    complete: bool,
) -> str:
    rival = "nothing added" if rival == "real" else rival
    if not rows:
        return (
            f"not compared with {rival}: nothing could be added"
            if complete
            else f"not compared with {rival} yet"
        )
    of = f"{len(rows)} point{'s' if len(rows) > 1 else ''}"
    found = []
    for word, some, ends in (("better", better, max), ("worse", worse, min)):
        if some:
            most = ends(some, key=lambda r: r["difference"])
            found.append(
                f"{word} than {rival} at {len(some)} of {of} (most at {_at(most)}: "
                f"{_difference(most)})"
            )
    if found:
        return ", ".join(found)
    most = max(rows, key=lambda r: r["difference"])
    return (
        f"not shown to differ from {rival} at any of {of} (largest at {_at(most)}: "
        f"{_difference(most)})"
    )


def _saturation_points(curves: list[dict[str, Any]]) -> str:
    reported = [(c, c["response"]) for c in curves if c["response"] is not None]
    if not reported:
        return "too few ratios for a saturation point"
    points = [
        f"{r['saturation_point']:.3g} (95% {r['saturation_low']:.3g} to "
        f"{r['saturation_high']:.3g}) at {title(c['cell'])}"
        for c, r in reported
        if r["saturation_point"] is not None
    ]
    others = Counter(KINDS[r["kind"]] for _, r in reported if r["saturation_point"] is None)
    why = ", ".join(f"{name} in {n} cell{'s' if n > 1 else ''}" for name, n in others.items())
    return (
        f"saturation point at ratio {listed(points)}" + (f" (elsewhere {why})" if why else "")
        if points
        else f"no saturation point told ({why})"
    )


def _equivalent_images(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "its equivalent real images need two counts of real images"
    sure = [w for w in rows if w["low"] is not None and w["low"] > 0]
    if sure:
        best = max(sure, key=lambda w: w["low"])
        return (
            f"worth more than nothing at {len(sure)} of {len(rows)} points, surest at "
            f"{_at(best)}: {best['words']}"
        )
    return f"one image is not shown to be worth any real one at any of {len(rows)} points"


# ---- notes ---------------------------------------------------------------------------------------


def notes(config: Config, known: dict[str, Any]) -> list[str]:
    what, s = known["what"], config.sweep
    found = []
    if config.data.source == "phantom":
        found.append(
            "the images are procedural phantoms, not photographs: the figures say nothing "
            "about skin"
        )
    trials = what["trials"]
    if trials["missing"]:
        found.append(
            f"{trials['missing']} of {trials['asked']} trials are missing: run the same "
            "command again to do the rest"
        )
    of_seeds = (
        "one seed a point: intervals and bands hold the choice of select's lesions, not "
        "the luck of training"
        if s.seeds == 1
        else f"{s.seeds} seeds a point, averaged: intervals and bands hold the choice of "
        "select's lesions and the seeds"
    )
    found += [
        of_seeds,
        f"each cell is one draw of its real images (sweep.subset_seed {s.subset_seed}): "
        "what another would do is in no interval",
        "every trial's checkpoint was chosen on select, where it is scored too: levels are "
        "optimistic, differences between arms "
        "favour none of them; test was not scored",
        "Holm's correction of p values is within a question, over all cells and ratios; "
        "intervals (of differences, saturation points, equivalent real images) "
        "are not corrected, and the largest of many is optimistic",
    ]
    if not config.data.grouped:
        found.append("data.grouped is off: lesions leak between roles and every figure is too good")
    found += _of_models(config) if grid.generates(s) else []
    return (
        found
        + _of_cells(what)
        + _of_pools(what)
        + _unreached(known)
        + _of_curves(known)
        + _zero_best(known)
    )


def _of_models(config: Config) -> list[str]:
    """What reaches a cell from outside of its images."""
    found = []
    given = {
        "denoiser.external": config.denoiser.external,
        "denoiser.weights": config.denoiser.weights,
        "codec.path": config.codec.path,
        "generate.weak": config.generate.weak,
    }
    if named := [name for name, value in given.items() if value]:
        found.append(
            f"{', '.join(named)}: what these were trained on, every cell profits from, "
            "beside its own images"
        )
    if any(not isinstance(n, int) or n >= grid.VERIFIABLE for n in config.sweep.real):
        found.append(
            "where verifiers have a say, the limits of the filter (what is trivial, unlike real "
            "images, a near copy) are measured on "
            "held-out real images, those of select among them"
        )
    return found


def _of_cells(what: dict[str, Any]) -> list[str]:
    found = []
    bare = [c["title"] for c in what["cells"] if c["verifiers"] is False]
    if bare:
        found.append(
            f"no verifiers and no manifold in the filter of the cells {', '.join(bare)}: a "
            f"class there has fewer than {grid.VERIFIABLE} "
            "lesions, so a label was never checked"
        )
    for c in what["cells"]:
        if c["mined"] is not None and c["real"] is not None:
            none = [
                name
                for name, n, m in zip(what["classes"], c["real"], c["mined"], strict=True)
                if n and not m
            ]
            if none:
                found.append(
                    f"{c['title']}: no hard case of {', '.join(none)}, so nothing was "
                    f"added to {_them(none)}"
                )
    return found


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _of_pools(what: dict[str, Any]) -> list[str]:
    found = []
    if any(p["sees"] == grid.ALL for p in what["pools"]):
        found.append(
            "in the arms that end in -all the denoiser saw all of train (the protocol of "
            "Sagers et al. 2023): their pictures may "
            "hold copies of real images outside the cell, which the cell's near-copy filter "
            "does not know, so a gain there is no "
            "gain from the cell's images alone"
        )
    waiting = sum(p["asked"] is None for p in what["pools"])
    return found + (
        [f"{waiting} of {len(what['pools'])} pools of images are not generated yet"]
        if waiting
        else []
    )


def _unreached(known: dict[str, Any]) -> list[str]:
    """Ratios that the poorest pool of a cell, or a class without hard cases, did not allow."""
    real = {c["cell"]: c["real"] for c in known["what"]["cells"]}
    found = []
    for cell, counts in real.items():
        short = {
            p["ratio"]: p["reached"]
            for p in known["points"]
            if p["cell"] == cell
            and p["ratio"]
            and p["reached"] is not None
            and p["added"] < sum(grid.wanted(counts, p["ratio"]))
        }
        if none := _bare(known, cell):
            found.append(
                f"{title(cell)}: nothing was added to {', '.join(none)}: some pool kept no "
                f"picture of {_them(none)}"
            )
        if short:
            reported = ", ".join(
                f"{ratio:g} (reached {reached:.3g})" for ratio, reached in sorted(short.items())
            )
            found.append(
                f"{title(cell)}: too few images for ratio {reported}{_poorest(known, cell)}"
            )
    return found


def _bare(known: dict[str, Any], cell: str) -> list[str]:
    """Classes with hard cases that got nothing even at the largest ratio."""
    of = next(c for c in known["what"]["cells"] if c["cell"] == cell)
    added = [
        p["added_by_class"]
        for p in known["points"]
        if p["cell"] == cell and p["ratio"] and p["added"] is not None
    ]
    if not added or of["mined"] is None:
        return []
    most = [max(counts) for counts in zip(*added, strict=True)]
    return [
        name
        for name, n, m in zip(known["what"]["classes"], most, of["mined"], strict=True)
        if m and not n
    ]


def _poorest(known: dict[str, Any], cell: str) -> str:
    pools = [p for p in known["what"]["pools"] if p["cell"] == cell and p["kept"] is not None]
    if not pools:
        return ""
    p = min(pools, key=lambda p: p["kept"])
    return (
        "; all arms take as many of a class as the poorest has (fewest in all: "
        f"{p['variant']}, {p['kept']} of {p['asked']} kept)"
    )


def _of_curves(known: dict[str, Any]) -> list[str]:
    found = []
    same = {(c["cell"], tuple(pair)) for c in known["curves"] for pair in c["same"]}
    for cell, (ratio, first) in sorted(same):
        found.append(
            f"{title(cell)}: ratio {ratio:g} reached no more than ratio {first:g}, so they "
            "are one point"
        )
    for why in sorted({c["why"] for c in known["curves"] if c["why"]}):
        where = sorted({title(c["cell"]) for c in known["curves"] if c["why"] == why})
        found.append(f"no curve at {', '.join(where)}: {why}")
    if known["real"]["same"]:
        cells = ", ".join(title(c) for c in known["real"]["same"])
        found.append(
            f"as many real images as a smaller cell: {cells}, left out of the curve of real images"
        )
    if not known["equivalent_images"]:
        found.append(
            "no equivalent real images: fewer than two counts of real images were scored, or "
            "nothing was added"
        )
    return found


def _zero_best(known: dict[str, Any]) -> list[str]:
    """Where adding did not help, said of each arm and its cells."""
    best: dict[str, list[str]] = defaultdict(list)
    unshown: dict[str, list[str]] = defaultdict(list)
    means = {(p["cell"], p["variant"], p["ratio"]): p["mean"] for p in known["points"]}
    beaten = {
        (r["cell"], r["a"])
        for r in known["contrasts"]
        if r["question"] == "real" and r["word"] == "better"
    }
    for c in known["curves"]:
        zero, others = (
            means.get((c["cell"], "real", 0.0)),
            [means[c["cell"], c["variant"], r] for r in c["ratios"] if r],
        )
        if zero is None or not others:
            continue
        if max(others) <= zero:
            best[c["variant"]].append(title(c["cell"]))
        elif (c["cell"], c["variant"]) not in beaten:
            unshown[c["variant"]].append(title(c["cell"]))
    found = [f"0 is the best, no ratio scores above it: {_by_arm(best)}"] if best else []
    return found + ([f"no ratio is shown to beat 0: {_by_arm(unshown)}"] if unshown else [])


def _by_arm(found: dict[str, list[str]]) -> str:
    return "; ".join(f"{name} ({', '.join(where)})" for name, where in found.items())
