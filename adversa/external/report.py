"""What an external cohort says of a run: summary.json with the keys of the run's own, and
report.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from adversa import config as cfg
from adversa.common import markdown
from adversa.evaluate.metrics import absent
from adversa.evaluate.operating import thresholds
from adversa.external import notes
from adversa.external.clusters import clusters, counted
from adversa.external.cohort import ExternalCohort
from adversa.external.prepare import LEFT_OUT
from adversa.pipeline import results, summary
from adversa.pipeline.results import Scored
from adversa.run import environment, step_folder
from adversa.run.folder import run_id, split_hash
from adversa.storage import files, predictions, tables
from adversa.storage.files import replace_bytes
from adversa.types import ARMS, BEFORE, digest

VERSION = 2  # of what is in summary.json: another one is written anew
FIGURES = (
    ("balanced_accuracy", "balanced accuracy"),
    ("accuracy", "accuracy"),
    ("worst_class", "worst class's sensitivity"),
    ("auroc_macro", "macro AUROC"),
    ("brier", "Brier score"),
    ("ece", "calibration error (ECE)"),
)
NAMED = {  # of groups
    "auroc": "AUROC",
    "pauc_norm": "partial AUC above {} (1 is perfect)",
    "sensitivity": "sensitivity at specificity {}",
    "specificity": "specificity reached for {}",
}
UNTOLD = (
    "low",
    "high",
    "p",
    "p_holm",
    "se",
    "detectable",
    "seeds_needed",
    "gain_per_device_hour",
)  # where no interval can be had
PER_CLASS = ("sensitivity/", "specificity/")  # and not of a group at a threshold


def reported(external: ExternalCohort) -> dict[str, Any] | None:
    """The cohort's summary.json; None where it does not say what would be said now."""
    found = files.read_json(external.folder / "summary.json")
    there = (
        found is not None
        and (external.folder / "report.md").exists()
        and found["asked"] == _requested(external)
    )
    return found if there else None


def write(external: ExternalCohort) -> dict[str, Any]:
    """Figures, comparisons and words from scores/; written as summary.json and report.md."""
    found = reported(external)
    if found is None:
        found = _summary(external)
        replace_bytes(external.folder / "report.md", markdown_of(found).encode())
        files.write_json(external.folder / "summary.json", found)
    return found


def _requested(external: ExternalCohort) -> str:
    e = external.config.evaluate.model_dump(mode="json")
    return digest(
        VERSION,
        step_folder.fingerprint(external.scores),
        sorted(e.items()),
        external.config.seed,
        external.config.mix.arms,
    )


def scored(external: ExternalCohort, config: cfg.Config) -> dict[str, Scored]:
    """Each arm, and `before`, in scored classes; thresholds from the run's `select`. config: its
    groups are of scored classes.
    """
    t, run = external.translation, external.run
    rows = tables.read(external.scores, schema=tables.PREDICTIONS)
    select = results.read(run.select)
    known = set(rows["arm"].unique().to_pylist())
    names = {BEFORE: BEFORE if BEFORE in known else "real"} | {arm: arm for arm in config.mix.arms}
    measures, seeds, columns = results.measures(config.evaluate), config.evaluate.seeds, t.columns()
    found = {}
    for name, arm in names.items():
        on = results.scored(rows, None, arm, seeds, t.names, measures)
        limits = None
        if select is not None and measures.groups:
            chosen = [predictions.predictions(select, arm, s) for s in range(seeds)]
            limits = [
                thresholds(t.logits(p.logits), columns[p.labels], t.names, measures) for p in chosen
            ]
        found[name] = replace(on, logits=t.logits(on.logits), limits=limits)
    return found


def _summary(external: ExternalCohort) -> dict[str, Any]:
    run, t, facts = external.run, external.translation, step_folder.manifest(external.pictures)
    groups, lost = t.groups(external.config.evaluate.groups)
    config = external.config.model_copy(
        update={"evaluate": external.config.evaluate.model_copy(update={"groups": groups})}
    )
    arms = scored(external, config)
    figures = {
        name: results.figures(of, t.names, config.evaluate, "external") for name, of in arms.items()
    }
    spread = clusters(arms["real"].groups, arms["real"].labels, t.names, groups)
    figures = {
        name: (values, {m: v for m, v in ends.items() if spread.tell(m)})
        for name, (values, ends) in figures.items()
    }
    own = files.read_json(run.summary) or {}
    spent = own.get("cost") or results.costs(config, run)
    compared = results.comparisons(config, arms, spent, "external", external.outside.unit)
    for row in compared:
        if not spread.tell(results.HEADLINE):
            row |= dict.fromkeys(UNTOLD) | {"word": "not shown", "note": ""}
    word, sentence = summary.verdict(compared, config, f"external ({external.name})")
    missing = absent(arms["real"].labels, t.names)
    left = files.read_json(external.pictures / LEFT_OUT) or {}
    return _described(external, facts, left, missing) | {
        "arms": {arm: figures[arm][0] for arm in config.mix.arms},
        "intervals": {arm: figures[arm][1] for arm in config.mix.arms},
        "before": figures[BEFORE][0],
        "intervals_before": figures[BEFORE][1],
        "test": _own(own, config, bool(missing) or t.merges),
        "comparisons": compared,
        "verdict": word,
        "verdict_sentence": sentence,
        "subgroups": results.subgroups(config, external.pictures, arms, t.names),
        "notes": notes.notes(external, config, facts, left, missing, lost, spread),
        "versions": environment.versions(),
        "git": environment.git_commit(),
        "machine": environment.machine(),
    }


def _described(
    external: ExternalCohort, facts: dict[str, Any], left: dict[str, Any], missing: Sequence[str]
) -> dict[str, Any]:
    """What was scored: the run, the set, its classes and images."""
    run, t, config = external.run, external.translation, external.config
    return {
        "asked": _requested(external),
        "set": external.name,
        "path": external.data.path,
        "content": (files.read_json(external.folder / "set.json") or {})["content"],
        "run": run.root.resolve().name,
        "run_id": run_id((files.read_json(run.recipe) or {})["recipe"]),
        "split_hash": split_hash(run.data),
        "seed": config.seed,
        "seeds": config.evaluate.seeds,
        "classes": t.names,
        "classes_absent": list(missing),
        "run_classes": list(t.given),
        "merged": {c: t.merged(c) for c in t.given} if t.merges else {},
        "images": {
            "listed": facts["listed"],
            "scored": facts["rows"],
            "by_class": facts["by_class"],
        },
        "clusters": {"by": external.outside.unit, "n": facts["clusters"]},
        "left_out": {
            "labels": left["labels"],
            "problems": facts["problems"],
            "copies": facts["copies"],
            "known": facts["known"],
        },
        "resolution": external.data.resolution,
        "crop": external.data.crop,
    }


def _own(own: dict[str, Any], config: cfg.Config, other: bool) -> dict[str, Any]:
    """The headline on the run's own `test`, arm by arm: (value, interval); empty where other
    classes are averaged over.
    """
    if other or "arms" not in own:
        return {}
    values = {BEFORE: own["before"]} | {arm: own["arms"][arm] for arm in config.mix.arms}
    ranges = {BEFORE: own["intervals_before"]} | {
        arm: own["intervals"][arm] for arm in config.mix.arms
    }
    metric = results.HEADLINE
    return {
        arm: {"value": of["test"][metric], "interval": ranges[arm]["test"].get(metric)}
        for arm, of in values.items()
    }


# ---- report.md -----------------------------------------------------------------------------------


def markdown_of(found: dict[str, Any]) -> str:
    """The text of report.md. found: what summary.json holds."""
    template = markdown.environment("external/templates").get_template("report.md.j2")
    return template.render(
        found,
        titles={BEFORE: "baseline"} | {arm: arm for arm in ARMS if arm in found["arms"]},
        figures=rows(found),
        metric=results.HEADLINE.replace("_", " "),
        value=partial(value, found),
        with_interval=with_interval,
        counted=counted,
    )


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(metric, its name for people) of what any arm has a value of: the classes that are there,
    groups with their thresholds.
    """
    there = found["before"]
    named = [(m, name) for m, name in FIGURES if m in there]
    named += [
        (f"sensitivity/{c}", f"sensitivity, {c}")
        for c in found["classes"]
        if f"sensitivity/{c}" in there
    ]
    for metric in sorted(
        m
        for m in there
        if m.partition("/")[0].partition("@")[0] in NAMED and not m.startswith(PER_CLASS)
    ):
        kind, _, group = metric.partition("/")
        kind, _, at = kind.partition("@")
        named.append((metric, f"{NAMED[kind].format(at)}, {group}"))
    return named


def value(found: dict[str, Any], arm: str, metric: str) -> str:
    """A figure of an arm with its interval, a dash in place of what is not known."""
    values, ranges = (
        (found["before"], found["intervals_before"])
        if arm == BEFORE
        else (found["arms"][arm], found["intervals"][arm])
    )
    return with_interval(values[metric], ranges.get(metric)) if metric in values else markdown.DASH


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """A figure with its interval, a dash in place of what is not known."""
    if value is None:
        return markdown.DASH
    return (
        f"{value:.3f} ({interval[0]:.2f}-{interval[1]:.2f})"
        if interval
        else f"{value:.3f} ({markdown.DASH})"
    )
