"""The model card of an arm's classifiers: Hugging Face's README.md, figures in its `model-index`,
then what a person must know.

The YAML follows https://github.com/huggingface/hub-docs/blob/main/modelcard.md, the sections
Mitchell et al. 2019 (arXiv:1810.03993). The text is export/templates/model_card.md.j2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from adversa.common import markdown
from adversa.config import Config
from adversa.export import dataset_card, run_card
from adversa.pipeline import generate
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.types import BEFORE, GENERATED, ROLES

ARM_WORDS = {
    "real": "real images alone",
    "resample": "real images, all of a class repeated by as much as the other arms add to it",
    "replay": "real images, the mined ones repeated by as much as the other arms add to their "
    "class",
    "unguided": "real images and synthetic ones of the same classes, generated for no hard case in "
    "particular",
    "guided": "real images and synthetic ones, generated for the hard cases that were mined",
}
ROLE_WORDS = {
    "train": "fits classifier and denoiser",
    "mine": "where hard cases are found",
    "select": "checkpoints and thresholds",
    "test": "the figures above; the near-copy check reads it too, and can only remove images",
}


def text(
    name: str,
    arm: str,
    metas: Sequence[dict[str, Any]],
    summary: dict[str, Any],
    config: Config,
    run: RunDir,
) -> str:
    """The whole README.md. metas: each seed's config.json with the `sha256` of its weights;
    summary: the run's summary.json.
    """
    from huggingface_hub import ModelCardData

    front = ModelCardData(
        model_name=name,
        license="other",
        license_name="to-be-filled-in",
        library_name="adversa",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "adversa", "not-a-medical-device"],
        eval_results=results(arm, summary, config),
    )
    return dataset_card.render(
        "model_card",
        card_data=front.to_yaml(),
        name=name,
        arm=arm,
        arm_words=ARM_WORDS[arm],
        summary=summary,
        config=config,
        metas=metas,
        data=run_card.data(config),
        figures=[(m, f"{v:.3f}", _interval(ends)) for m, v, ends in _figures(arm, summary)],
        subgroups=_subgroups(arm, summary),
        roles=_roles(run),
        added=_added(arm, summary),
        settings=dataset_card.settings_rows(metas[0]["config"]),
        class_names=repr(list(summary["classes"])),
        denoiser=generate.fingerprint(run.denoiser) if arm in GENERATED else None,
        versions=dataset_card.with_commit(summary["versions"], summary.get("git")).items(),
    )


def results(arm: str, summary: dict[str, Any], config: Config) -> list[Any]:
    """huggingface_hub.EvalResult of every figure of the arm on `test`: means over seeds, 95%
    intervals in `args`.
    """
    from huggingface_hub import EvalResult

    found, source = _figures(arm, summary), config.data.source
    if not found:  # the Hub refuses a model-index without results
        return []
    about = {
        "role": "test",
        "split_hash": summary["split_hash"],
        "test_opened": summary["test_opened"],
        "seeds": summary["seeds"],
    }
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder" if source == "folder" else source,
            dataset_name=f"{run_card.data(config)}, role test",
            dataset_split="test",
            dataset_args=about,
            metric_type=metric.partition("/")[0],
            metric_name=metric,
            metric_value=value,
            metric_args={"low": interval[0], "high": interval[1], "level": 0.95}
            if interval
            else None,
        )
        for metric, value, interval in found
    ]


def _figures(arm: str, summary: dict[str, Any]) -> list[tuple[str, float, list[float] | None]]:
    """(metric, mean over seeds, interval) on `test`, what is no number left out."""
    values, intervals = summary["arms"][arm]["test"], summary["intervals"][arm]["test"]
    return [(m, v, _ends(intervals.get(m))) for m, v in values.items() if math.isfinite(v)]


def _ends(interval: Sequence[float] | None) -> list[float] | None:
    return list(interval) if interval and all(map(math.isfinite, interval)) else None


def _interval(ends: Sequence[float] | None) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else markdown.DASH


def _subgroups(arm: str, summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """(attribute, value, images, lesions, balanced accuracy of the arm, of the baseline); empty
    where it was not computed.
    """
    found: list[tuple[str, ...]] = []
    for attribute, of in (summary.get("subgroups") or {}).items():
        before = {r["value"]: r for r in of.get(BEFORE, [])}
        for r in of.get(arm, []):
            figures = (_small(r), _small(before.get(r["value"])))
            found.append((attribute, r["value"], str(r["n"]), str(r["lesions"]), *figures))
    return found


def _small(row: dict[str, Any] | None) -> str:
    if row is None or row["value_of"] is None or not math.isfinite(row["value_of"]):
        return markdown.DASH
    value = f"{row['value_of']:.3f}" + (
        f", {_interval(ends)}" if (ends := _ends(row["interval"])) else ""
    )
    return f"({value})" if row["small"] else value


def _roles(run: RunDir) -> list[tuple[str, ...]]:
    """(role, what it is for, images, lesions, images by class)."""
    split = files.read_json(run.data / "split.json") or {}
    return [
        (
            r,
            ROLE_WORDS[r],
            str(sum(n.values())),
            str(split["groups"][r]),
            ", ".join(f"{c} {k}" for c, k in n.items()),
        )
        for r, n in ((r, split["images"][r]) for r in ROLES)
    ]


def _added(arm: str, summary: dict[str, Any]) -> str:
    """What the arm was trained on beside the real images."""
    if arm in GENERATED:
        return f"{summary['used'].get(arm, 0)} synthetic images"
    repeats = summary["added"].get(arm, 0)
    return f"{repeats} repeats of real images" if repeats else "nothing"
