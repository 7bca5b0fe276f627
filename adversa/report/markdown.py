"""`report.md`: what the page says, without its pictures. Whatever comes from a user's files is
escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from adversa.report import words
from adversa.report.gather import Score
from adversa.report.words import count, counted, duration, fixed, listed, p_value, share, signed
from adversa.types import BEFORE

SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|~&!$@^]|:(?=//)|(?<=www)\.")
STARTS = re.compile(r"^([-+=]|\d+(?=[.)]))")


def text(value: object) -> str:
    """One line in which nothing is markup, not even a link."""
    line = " ".join(words.printable(str(value)).split())
    return STARTS.sub(
        lambda m: "\\" + m[0] if m[0] in "-+=" else m[0] + "\\",
        SPECIAL.sub(lambda m: "\\" + m[0], line),
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Cells as Markdown, the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def block(content: str) -> list[str]:
    """Text as it is, behind a fence that it does not hold."""
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + "yaml", words.printable(content).rstrip("\n"), fence, ""]


def bullets(found: Iterable[object]) -> list[str]:
    lines = [f"- {text(item)}" for item in found]
    return [*lines, ""] if lines else []


def value(s: Score | None) -> str:
    if s is None:
        return words.DASH
    return fixed(s.value) + (
        f" ({fixed(s.low)} to {fixed(s.high)})" if s.low is not None and s.high is not None else ""
    )


def render(view: dict[str, Any]) -> str:
    """view: the names that the page's templates use."""
    parts = (
        _head,
        _before_after,
        _arms,
        _comparisons,
        _groups,
        _within,
        _confusion,
        _modes,
        _budget,
        _acceptance,
        _memorisation,
    )
    parts += (_quality, _calibration, _cost, _origin, _unshown)
    return "\n".join(line for part in parts for line in part(view)).rstrip("\n") + "\n"


def _head(v: dict[str, Any]) -> list[str]:
    s = v["summary"]
    lines = ["# Did painting hard cases help?", ""]
    if s["test_openings"] > 1:
        lines += [
            f"**Test was opened {count(s['test_openings'])} times. The figures on it are "
            "no longer a first look.**",
            "",
        ]
    lines += [f"**{text(s['verdict'])}**", ""]
    if s["verdict_sentence"]:
        lines += [text(s["verdict_sentence"]), ""]
    facts = {
        "run": s["run"],
        "data": v["facts"].section("data").get("source", ""),
        "split": s["split_hash"],
        "seed": s["seed"],
        "classifiers an arm": s["seeds"] or "",
        "rounds": s["rounds"],
        "synthetic images": f"{count(s['generated'])} painted, {count(s['accepted'])} kept",
        "test opened": words.moment(s["test_opened"]),
    }
    lines += table(["", ""], [[name, text(found)] for name, found in facts.items() if found != ""])
    return lines + bullets(
        [
            *v["notes"],
            "This is a research result. It is no medical device and no basis for a diagnosis.",
        ]
    )


def _before_after(v: dict[str, Any]) -> list[str]:
    lines = ["## Before and after", ""]
    told = {
        "test": "**test: honest.** Nothing was fitted, guided or chosen on these images.",
        "mine": "**mine: optimistic.** These very images guided the generation. Never quote these "
        "as a result.",
    }
    for role in v["roles"]:
        lines += [
            told[role],
            "",
            *_changes(v, role, [(text(row.name), row) for row in v["overall"][role]]),
        ]
    lines += [
        "The mean of the classes' sensitivities and balanced accuracy are one figure under "
        "two names.",
        "",
    ]
    for kind, rows in v["per_class"].items():
        lines += [f"{kind.capitalize()}, class by class, on test:", ""]
        lines += _changes(
            v,
            "class",
            [(f"{text(row.name)} ({counted(images, 'image')})", row) for images, row in rows],
        )
    return lines


def _changes(v: dict[str, Any], first: str, rows: list[tuple[str, Any]]) -> list[str]:
    if not v["after"]:
        return table([first, "before"], [[name, value(row.before)] for name, row in rows])
    body = [[name, value(row.before), value(row.after), signed(row.change)] for name, row in rows]
    return table([first, "before", f"after ({text(v['after'])})", "change"], body)


def _arms(v: dict[str, Any]) -> list[str]:
    lines, matched = ["## Arms", ""], v["summary"]["matched"]
    if matched.get("steps"):
        lines += [
            f"Every classifier took {counted(matched['steps'], 'step')} on "
            f"{counted(matched['images'], 'image')}.",
            "",
        ]
    for role in v["roles"]:
        names, rows = v["arms"][role]
        lines += [f"{role}{' (optimistic)' if role == 'mine' else ''}:", ""]
        lines += table(
            ["arm", *names], [[text(arm), *map(value, scores)] for arm, scores in rows.items()]
        )
    arms = v["facts"].arms
    for group, rows in v["groups"].items():
        lines += [
            f"{text(group)} against all other classes, on test; thresholds were set on select:",
            "",
        ]
        lines += table(
            ["metric", *map(text, arms)],
            [[name, *(value(scores[a]) for a in arms)] for name, scores in rows],
        )
    if v["elsewhere"]:
        lines += [
            "On sets from elsewhere:",
            "",
            *bullets(f"{name}: {told}" for name, told in v["elsewhere"]),
        ]
    if v["by_round"]:
        lines += ["Balanced accuracy on mine (optimistic), round by round:", ""]
        lines += table(
            ["round", *map(text, arms)],
            [[str(n), *(fixed(of[a]) for a in arms)] for n, of in v["by_round"].items()],
        )
    return lines


def _comparisons(v: dict[str, Any]) -> list[str]:
    if not v["comparisons"]:
        return []
    lines = ["### Arm against arm", ""]
    rows = []
    for c in v["comparisons"]:
        mcnemar = "; ".join(
            f"{m['won']} won, {m['lost']} lost, p {p_value(m['p'])}" for m in c.mcnemar
        )
        needed = words.DASH if c.detectable is None else c.needed
        interval = f"{signed(c.low)} to {signed(c.high)}"
        found = [
            signed(c.difference),
            interval,
            p_value(c.p_holm),
            text(c.word),
            fixed(c.detectable),
            needed,
            mcnemar,
        ]
        rows.append([text(f"{c.name}, {c.on}"), *found])
    head = ["comparison", "difference", "95% interval", "p (Holm)", "word"]
    return lines + table([*head, "found 4 times in 5", "seeds needed", "McNemar, by seed"], rows)


def _groups(v: dict[str, Any]) -> list[str]:
    lines = []
    for attribute, rows in v["subgroups"].items():
        arms = list(rows[0]["scores"])
        body = [
            [
                text(r["value"]) + (" (too small)" if r["small"] else ""),
                count(r["n"]),
                count(r["lesions"]),
            ]
            + [value(r["scores"][a]) for a in arms]
            for r in rows
        ]
        lines += [f"### Balanced accuracy on test by {text(attribute)}", ""]
        lines += table(["value", "images", "lesions", *map(text, arms)], body)
    return lines


def _within(v: dict[str, Any]) -> list[str]:
    if not v["within"]:
        return []
    of = v["summary"]["subgroup_comparisons"]
    lines = [f"### Subgroups, on test: {text(of['a'])} minus {text(of['b'])}", ""]
    lines += [
        "Balanced accuracy; p values are corrected for the "
        f"{counted(of['tested'], 'group')} tested.",
        "",
    ]
    for attribute, rows in v["within"].items():
        body = [
            [text(r.value), count(r.n), count(r.lesions), signed(r.difference)]
            + [
                words.DASH if r.low is None else f"{signed(r.low)} to {signed(r.high)}",
                p_value(r.p_holm),
                text(r.word),
            ]
            for r in rows
        ]
        lines += table(
            [
                text(attribute),
                "images",
                "lesions",
                "difference",
                "95% interval",
                "p (Holm)",
                "word",
            ],
            body,
        )
    return lines


def _confusion(v: dict[str, Any]) -> list[str]:
    lines, found, names = (
        ["## Confusion, on test", ""],
        v["confusions"],
        [text(c) for c in v["facts"].classes],
    )
    if found is None:
        return [*lines, "There are no predictions on test in the run folder.", ""]
    lines += [
        "Rows: what an image is. Columns: what it is read as. The share of the row, and "
        "the number of images.",
        "",
    ]
    digits = 1 if found.seeds > 1 else 0
    for title, rows in (
        ("before", found.before),
        (f"after ({v['after']})", found.after),
        ("after minus before", found.change),
    ):
        if rows is not None:
            cells = [
                [
                    _moved(c, digits)
                    if rows is found.change
                    else f"{fixed(c.share, 2)} ({count(c.count)})"
                    for c in row
                ]
                for row in rows
            ]
            lines += table(
                [text(title), *names],
                [[name, *row] for name, row in zip(names, cells, strict=True)],
            )
    return lines


def _moved(cell: Any, digits: int) -> str:
    return f"{signed(cell.share, 2)} ({signed(cell.count, digits)})"


def _modes(v: dict[str, Any]) -> list[str]:
    lines, found = ["## Failure modes", ""], v["modes"]
    if not found or not found["modes"]:
        return [*lines, "None." if found else "The run folder has no failure modes.", ""]
    classes = v["facts"].classes
    rows = [
        [
            text(m["name"]),
            count(m["errors"]),
            count(m["size"] - m["errors"]),
            f"{100 * m['share']:.0f}%",
            ", ".join(f"{text(classes[c])} {n}" for c, n in m["confused"]),
        ]
        for m in found["modes"]
    ]
    lines += [
        f"{count(found['errors'])} of {count(found['images'])} images of mine are misclassified.",
        "",
    ]
    return lines + table(["mode", "errors", "near misses", "of all errors", "taken for"], rows)


def _budget(v: dict[str, Any]) -> list[str]:
    lines = ["## Budget and acceptance", ""]
    head = ["class", "images of mine", "errors", "hard cases taken", "painted", "kept"]
    rows = [
        [
            text(b.name),
            count(b.images),
            count(b.errors),
            count(b.taken),
            count(b.painted),
            count(b.kept),
        ]
        for b in v["budget"]
    ]
    return lines + (table(head, rows) if rows else [])


def _acceptance(v: dict[str, Any]) -> list[str]:
    lines = []
    for arm, found in v["accepted"].items():
        head = [text(arm), "strategy", "painted", "kept", "share", *map(text, found.reasons)]
        rows = [
            [
                text(x.name),
                text(x.strategy or ", ".join(found.strategies)),
                count(x.painted),
                count(x.kept),
            ]
            + [f"{share(x.kept, x.painted):.1f}%" if x.painted else words.DASH]
            + [count(x.rejected.get(r, 0)) for r in found.reasons]
            for x in found.lines
        ]
        lines += table(head, rows)
    return lines or ["There are no verdicts in the run folder.", ""]


def _memorisation(v: dict[str, Any]) -> list[str]:
    told = bullets(sentence for _, _, sentence in v["memories"].values())
    return ["## Memorisation", "", *(told or ["It was not measured in this run.", ""])]


def _quality(v: dict[str, Any]) -> list[str]:
    q = v["quality"]
    if not q:
        return []
    rows = [
        [
            name,
            count(q["images"][key]),
            f"{fixed(1000 * row['kid'], 2)} \u00b1 {fixed(1000 * row['kid_std'], 2)}",
        ]
        + [fixed(row[m]) for m in v["measures"]]
        for name, key, row in (
            ("samples", "sample", q["samples"]),
            ("real images of train", "train", q["train"]),
        )
    ]
    rows += [
        [
            f"{text(name)} ({counted(row['real'], 'real image')})",
            count(row["fake"]),
            "",
            *(fixed(row[m]) for m in v["measures"]),
        ]
        for name, row in q["samples"]["classes"].items()
    ]
    against = (
        f"Against {counted(q['images']['real'], 'real image')} it was not trained on, in the "
        f"features of {text(q['features'])}."
    )
    lines = ["## How good the denoiser's samples are", "", against, ""]
    return lines + table(["", "images", "KID x 1000", *v["measures"]], rows)


def _calibration(v: dict[str, Any]) -> list[str]:
    lines = ["## Calibration, on test", ""]
    if not v["calibrations"]:
        return [*lines, "There are no predictions on test in the run folder.", ""]
    lines += bullets(v["calibration_sentences"])
    for arm, (c, _) in v["calibrations"].items():
        rows = [
            [f"{b.low:.2f} to {b.high:.2f}", count(b.n), fixed(b.confidence), fixed(b.accuracy)]
            for b in c.bins
            if b.n
        ]
        lines += table(
            [
                arm if arm == BEFORE else f"after ({text(arm)})",
                "images",
                "mean probability",
                "right",
            ],
            rows,
        )
    return lines


def _cost(v: dict[str, Any]) -> list[str]:
    s, steps = v["summary"], v["steps"]
    again = (
        f" Work was taken up again {s['restarts']} time{'s' * (s['restarts'] > 1)} after a death; "
    )
    again = f"{again}{duration(s['restart_seconds'])} passed in between." if s["restarts"] else ""
    lines = [
        "## Seconds and cost",
        "",
        f"{duration(s['wall_seconds'] or sum(t for _, t in steps))} in all.{again}",
    ]
    if s["device_seconds"] is not None:
        lines.append(f"{duration(s['device_seconds'])} of devices, a core or a GPU each.")
    lines.append("")
    if v["costs"]:
        rows = [
            [text(arm), *(words.DASH if t is None else duration(t) for t in times)]
            for arm, *times in v["costs"]
        ]
        lines += table(["arm", "time", "device time"], rows)
    gains = [
        [
            text(c.name),
            signed(c.gain["gain"]),
            f"{signed(c.gain['low'])} to {signed(c.gain['high'])}",
        ]
        for c in v["comparisons"]
        if c.gain
    ]
    if gains:
        lines += table(["gain a device-hour", "", "95% interval"], gains)
    return lines + table(["step", "time"], [[text(name), duration(t)] for name, t in steps])


def _origin(v: dict[str, Any]) -> list[str]:
    facts, s = v["facts"], v["summary"]
    how = "by lesion" if v["grouped"] else "one by one: a lesion may have several roles"
    lines = [
        "## Split, configuration, versions",
        "",
        f"Images are split {how}. The split is {text(s['split_hash'])}.",
        "",
    ]
    rows = [
        [text(name), *(count(n[c]) for n in facts.images.values())]
        for c, name in enumerate(facts.classes)
    ]
    rows += [
        ["all", *(count(sum(n)) for n in facts.images.values())],
        ["lesions", *map(count, facts.lesions.values())],
    ]
    lines += table(["images", *facts.images], rows)
    made = s["versions"] | ({"commit": s["git"]} if s["git"] else {}) | s["machine"]
    lines += (
        table(["made with", "version"], [[text(name), text(found)] for name, found in made.items()])
        if made
        else []
    )
    return [*lines, *block(facts.config_text)]


def _unshown(v: dict[str, Any]) -> list[str]:
    u = v["unshown"]
    lines = ["## What was not shown", "", *bullets(u.comparisons)]
    if u.arms:
        lines += ["Arms that were not trained, so the run cannot tell:", "", *bullets(u.arms)]
    groups = [
        f"Fewer than 30 lesions of test, by {attribute}: {found}."
        for attribute, found in u.small.items()
    ]
    groups += (
        [f"No image of test has {listed(u.unknown)}: nothing is known about them."]
        if u.unknown
        else []
    )
    groups += [f"No image of test is of {listed(u.empty)}."] if u.empty else []
    lines += bullets(groups)
    if u.checks:
        lines += ["Checks that were off:", "", *bullets(u.checks)]
    last = (
        "The figures on test are of the archive that the run was trained on. Another camera or "
        "clinic may give others"
    )
    return lines + bullets(
        [*v["notes"], last + ("." if v["elsewhere"] else "; no set from elsewhere was scored.")]
    )
