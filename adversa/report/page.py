"""`report.html`, one file, nothing fetched, no script, and `report.md`, from templates over one
view.

Whatever comes from a user's files is escaped in both.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from adversa.common import markdown
from adversa.report import curation, evidence, plots, predictions, words
from adversa.report import gallery as pictures
from adversa.report.gather import Facts, by_round, read_facts
from adversa.report.unshown import unshown
from adversa.report.words import duration, fixed, signed
from adversa.storage.files import read_json, replace_bytes, writing
from adversa.storage.path import StoragePath, storage_path

__all__ = ["duration", "environment", "fixed", "signed", "view", "write"]

TEMPLATES = "report/templates"  # in the package
ROLES_SHOWN = ("test", "mine")
MEASURES = ("precision", "recall", "density", "coverage")
TONES = {
    "better": "better",
    "worse": "worse",
    "not shown": "unclear",
}  # verdict -> its colour in the style sheet


def write(run_dir: StoragePath) -> StoragePath:
    """Write `report.html` and `report.md` into a finished run's folder, from what lies there alone;
    the path of the page.

    UserError where the run is not finished, or cannot be written.
    """
    facts = read_facts(storage_path(run_dir))
    known = view(facts)
    html = environment().get_template("page.html.j2").render(known)
    text = markdown_environment().get_template("report.md.j2").render(known)
    path = facts.run.root / "report.html"
    with writing(facts.run.root):
        replace_bytes(facts.run.root / "report.md", text.encode())
        replace_bytes(path, html.encode())  # last: `report` is done where it is there
    return path


def environment() -> Environment:
    """Jinja for the HTML templates."""
    found = Environment(
        loader=PackageLoader("adversa", TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=words.printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"axis_bar": evidence.bar}
    return _with_words(found)


def markdown_environment() -> Environment:
    """Jinja for `report.md.j2`."""
    return _with_words(markdown.environment(TEMPLATES))


def _with_words(found: Environment) -> Environment:
    """The environment with what formats numbers and names, the same in HTML and Markdown."""
    names = ("fixed", "signed", "count", "duration", "moment", "sentence", "listed", "p_value")
    found.filters |= {name: getattr(words, name) for name in names}
    found.globals |= {"share": words.share, "counted": words.counted}
    return found


def view(facts: Facts) -> dict[str, Any]:
    """The names that the templates use."""
    rounds = facts.rounds
    last = rounds[-1] if rounds else None
    compared = evidence.comparisons(facts.summary["comparisons"])
    said = predictions.of_test(facts)
    calibrations = predictions.calibrations(facts, said)
    accepted = curation.accepted(facts)
    strategies = {arm: found.strategies for arm, found in accepted.items()}
    memories = curation.memories(facts, last) if last is not None else {}
    return {
        "facts": facts,
        "summary": facts.summary,
        "tones": TONES,
        "notes": [words.sentence(note) for note in facts.summary["notes"]],
        "grouped": facts.section("data").get("grouped", True),
        "after": facts.after,
        "titles": predictions.titles(facts),
        "folded": facts.summary["before"] != facts.summary["arms"].get("real"),
        "roles": ROLES_SHOWN,
        "overall": {role: evidence.overall(facts, role) for role in ROLES_SHOWN},
        "per_class": evidence.per_class(facts),
        "arms": {role: evidence.arms(facts, role) for role in ROLES_SHOWN},
        "groups": evidence.groups(facts),
        "comparisons": compared,
        "reach": evidence.reach(compared),
        "subgroups": evidence.subgroups(facts.summary["subgroups"]),
        "within": evidence.within(facts.summary["subgroup_comparisons"]),
        "elsewhere": evidence.elsewhere(facts),
        "by_round": by_round(facts, "mine", "balanced_accuracy") if len(rounds) > 1 else {},
        "confusions": predictions.confusions(facts, said),
        "modes": read_json(facts.run.round(last, "hard") / "modes.json")
        if last is not None
        else None,
        "gallery": pictures.gallery(facts, last) if last is not None else None,
        "most": pictures.OFFSPRING,
        "budget": curation.budget(facts, last) if last is not None else [],
        "accepted": accepted,
        "memories": {
            arm: (
                m,
                plots.uri(plots.curves(m.curve)),
                curation.memory_sentence(arm, m, strategies.get(arm, ())),
            )
            for arm, m in memories.items()
        },
        "quality": facts.quality,
        "measures": MEASURES,
        "grid": pictures.sheet(facts.run.inside(facts.quality["grid"])) if facts.quality else None,
        "calibrations": {
            arm: (c, plots.uri(plots.reliability(c.bins))) for arm, c in calibrations.items()
        },
        "calibration_sentences": predictions.calibration_sentences(
            calibrations, predictions.titles(facts)
        ),
        "costs": evidence.costs(facts),
        "made": facts.made_with,
        "steps": sorted(facts.summary["seconds"].items(), key=lambda s: (-s[1], s[0])),
        "unshown": unshown(facts, compared, rounds),
    }
