"""What a reader of an external cohort's report must know before believing the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from adversa import config as cfg
from adversa.data.files import printable
from adversa.external import cohort
from adversa.external.clusters import Clusters, counted
from adversa.external.cohort import ExternalCohort
from adversa.external.prepare import LEFT_OUT, WHY


def notes(
    external: ExternalCohort,
    config: cfg.Config,
    facts: dict[str, Any],
    left: dict[str, Any],
    missing: Sequence[str],
    lost: Sequence[str],
    spread: Clusters,
) -> list[str]:
    """One a line. config: its groups are of scored classes; facts: of the pictures' manifest; left:
    of LEFT_OUT; missing: classes that the set does not have; lost: groups that cannot be told.
    """
    return [
        *_of_clusters(external, facts, spread),
        *_of_classes(external, config, missing, lost),
        *_left_out(facts, left),
        *_of_settings(external, config),
    ]


def _of_clusters(
    external: ExternalCohort, facts: dict[str, Any], spread: Clusters
) -> Iterator[str]:
    unit, n = external.outside.unit, facts["clusters"]
    if unit == cohort.IMAGE:
        yield (
            "clustered by image: the set names neither patients nor lesions; where one lesion has "
            "several images, the intervals are too narrow (look-alikes are taken for one image: "
            f"{n} of {facts['rows']} are resampled)"
        )
    else:
        yield (
            f"clustered by {unit}: intervals and comparisons resample {counted(n, unit)}, of "
            f"{counted(facts['rows'], 'image')}"
        )
    if unit == cohort.PATIENT and (alone := facts["without_patient"]):
        names, whose = ("name", "of their lesions") if alone != 1 else ("names", "such lesion")
        yield f"{counted(alone, 'image')} {names} no patient: each {whose} is taken for one"
    if spread.few:
        verb = "is" if len(spread.few) == 1 else "are"
        yield (
            f"{', '.join(spread.few)} {verb} of one {unit} alone: one {unit} says nothing of "
            "others, so what is made of it has no interval and is not compared"
        )


def _of_classes(
    external: ExternalCohort, config: cfg.Config, missing: Sequence[str], lost: Sequence[str]
) -> Iterator[str]:
    t = external.translation
    if missing:
        yield (
            f"the set has no {', '.join(missing)}: balanced accuracy and AUROC are over the "
            f"{len(t.names) - len(missing)} classes that are there, and an answer that is not "
            "among them counts as wrong"
        )
    if t.merges:
        members = {c: [g for g in t.given if t.merged(g) == c] for c in t.names}
        merged = "; ".join(f"{c} = {' + '.join(of)}" for c, of in members.items() if of != [c])
        yield f"classes of the run merged, probabilities added: {merged}"
    if lost:
        yield (
            f"evaluate.groups {', '.join(lost)} cannot be told from the rest in these classes, "
            "and are not given"
        )
    if config.evaluate.groups:
        yield "thresholds of groups were set on the run's select, not on this set"


def _left_out(facts: dict[str, Any], left: dict[str, Any]) -> Iterator[str]:
    if left["labels"]:
        labels = ", ".join(f"{n} {printable(label)}" for label, n in left["labels"].items())
        yield f"left out by the labels map: {labels}"
    if known := sum(facts["known"].values()):
        why = ", ".join(f"{n} {reason}" for reason in WHY if (n := facts["known"][reason]))
        yield (
            "left out, for the run has seen them (train, mine or select): "
            f"{counted(known, 'image')} ({why})"
        )
    if facts["copies"]:
        yield f"left out, copies within the set: {counted(facts['copies'], 'image')}"
    if facts["problems"]:
        lost = f"{facts['problems']}; pictures/{LEFT_OUT} names each"
        yield f"left out, unreadable or at odds: {lost}"


def _of_settings(external: ExternalCohort, config: cfg.Config) -> Iterator[str]:
    if external.outside.unused:
        unused = ", ".join(map(printable, external.outside.unused))
        yield f"the labels map names {unused}, which the set does not have"
    if external.data.crop != config.data.crop:
        yield f"made square by {external.data.crop}, the run's own pictures by {config.data.crop}"
    if config.evaluate.seeds == 1:
        yield (
            f"one seed an arm: the intervals hold the choice of {external.outside.unit}s, not the "
            "luck of training"
        )
