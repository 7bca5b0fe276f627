"""The model card of an arm's classifiers: Hugging Face's README.md, figures in its `model-index`,
then what a person must know.

The YAML follows https://github.com/huggingface/hub-docs/blob/main/modelcard.md, the sections
Mitchell et al. 2019 (arXiv:1810.03993).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from adversa.config import Config
from adversa.export import run_card
from adversa.export.dataset_card import cell, table
from adversa.pipeline import generate
from adversa.run import differences
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.types import BEFORE, PAINTED, ROLES

ARM_WORDS = {
    "real": "real images alone",
    "resample": "real images, all of a class repeated by as much as the other arms add to it",
    "replay": "real images, the mined ones repeated by as much as the other arms add to their class",
    "unguided": "real images and synthetic ones of the same classes, painted for no hard case in "
    "particular",
    "guided": "real images and synthetic ones, painted for the hard cases that were mined",
}
ROLE_WORDS = {
    "train": "fits classifier and denoiser",
    "mine": "where hard cases are found",
    "select": "checkpoints and thresholds",
    "test": "the figures above; the near-copy gate knows it too, and can but remove an image",
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
    licence = (
        "# Fill in the licence: the terms of the pictures it was trained on, and of the "
        "weights it started from, bind it too."
    )
    parts = [
        _head(name, arm, summary, config),
        _result(arm, summary),
        _subgroups(arm, summary),
        _training(arm, metas, summary, config, run),
        _loading(metas[0], summary["classes"], config),
        _facts(arm, metas, summary, run),
    ]
    return f"---\n{licence}\n{front.to_yaml()}\n---\n\n" + "\n".join(parts)


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


def _head(name: str, arm: str, summary: dict[str, Any], config: Config) -> str:
    classes = ", ".join(cell(c) for c in summary["classes"])
    seeds = f"{summary['seeds']} classifier{'s' if summary['seeds'] > 1 else ''}, one a seed"
    return f"""# {name}

{seeds}, of {len(summary["classes"])} classes ({classes}), trained on {ARM_WORDS[arm]}: the arm `{arm}` of a run of adversa.

> **Not a medical device.** No one has validated these classifiers on patients, and no one may be diagnosed, reassured or treated by
> them.

## Intended use

Research: to compare what the arms of this run were trained on, to repeat its figures, to study failures.

Out of scope: diagnosis, triage, screening or any other care; pictures of another kind, camera, clinic or population than the ones
below; a class that is not among the {len(summary["classes"])}, which it will call one of them all the same.
"""


def _result(arm: str, summary: dict[str, Any]) -> str:
    figures = [(cell(m), f"{v:.3f}", _interval(i)) for m, v, i in _figures(arm, summary)]
    compared = [
        (
            c["a"],
            c["b"],
            f"{c['difference']:+.3f}",
            f"{c['low']:+.3f} to {c['high']:+.3f}",
            f"{c['p_holm']:.3g}",
            c["word"],
        )
        for c in summary["comparisons"]
    ]
    head = ("arm", "against", "difference", "95% interval", "p, Holm", "word")
    controls = table(head, compared) if compared else ""
    over = "the test lesions and the seeds" if summary["seeds"] > 1 else "the test lesions"
    return f"""## Result of the run

{cell(summary["verdict_sentence"])}

{controls}
## Figures of this arm on `test`

Means over {summary["seeds"]} seed{"s" if summary["seeds"] > 1 else ""}; intervals over {over}.
`test` was first opened {summary["test_opened"] or "at an unknown time"}{_openings(summary)}.

{table(("metric", "value", "95% interval"), figures)}"""


def _openings(summary: dict[str, Any]) -> str:
    times = summary.get("test_openings", 1)
    return f", and **{times} times in all**" if times > 1 else ""


def _interval(ends: Sequence[float] | None) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else "-"


def _subgroups(arm: str, summary: dict[str, Any]) -> str:
    """Balanced accuracy by attribute, of the arm and of the classifiers before; in words where it
    was not computed.
    """
    found = []
    for attribute, of in (summary.get("subgroups") or {}).items():
        before = {r["value"]: r for r in of.get(BEFORE, [])}
        for r in of.get(arm, []):
            values = [_small(r), _small(before.get(r["value"]))]
            found.append(
                (cell(attribute), cell(r["value"]), str(r["n"]), str(r["lesions"]), *values)
            )
    if not found:
        return "## Subgroups\n\nNot computed for this arm.\n"
    head = ("attribute", "value", "images", "lesions", "balanced accuracy", "before")
    return f"""## Subgroups

On `test`, with 95% intervals; before: the classifiers before the first round. Groups of fewer than 30 lesions are in
brackets, without an interval: they say little. Nothing here was tested.

{table(head, found)}"""


def _small(row: dict[str, Any] | None) -> str:
    if row is None or row["value_of"] is None or not math.isfinite(row["value_of"]):
        return "-"
    value = f"{row['value_of']:.3f}" + (
        f", {_interval(ends)}" if (ends := _ends(row["interval"])) else ""
    )
    return f"({value})" if row["small"] else value


def _training(
    arm: str, metas: Sequence[dict[str, Any]], summary: dict[str, Any], config: Config, run: RunDir
) -> str:
    split = files.read_json(run.data / "split.json") or {}
    roles = [
        (
            r,
            ROLE_WORDS[r],
            str(sum(split["images"][r].values())),
            str(split["groups"][r]),
            ", ".join(f"{cell(c)} {n}" for c, n in split["images"][r].items()),
        )
        for r in ROLES
    ]
    settings = differences.flatten(metas[0]["config"])
    extra = summary["added"].get(arm, 0)
    synthetic = summary["used"].get(arm, 0)
    added = (
        f"{synthetic} synthetic images"
        if arm in PAINTED
        else f"{extra} repeats of real images"
        if extra
        else "nothing"
    )
    folded = (
        "The mined images joined them, in every arm."
        if config.mix.fold_mined == "all"
        else "No image of `mine` did."
    )
    grouped = (
        "each lesion has one role"
        if config.data.grouped
        else "**lesions have images in several roles**"
    )
    limits = "\n".join(f"- {note[:1].upper()}{note[1:]}." for note in summary["notes"])
    return f"""## Training data

{cell(run_card.data(config))}, {config.data.resolution} px, cropped by `{config.data.crop}`; {grouped}.
Trained on `train`. {folded} On top of that: {added} (weights, after matching the counts of the arms).

{table(("role", "what it is for", "images", "lesions", "by class"), roles)}
Every arm was trained for {metas[0]["config"]["steps"]} steps of {metas[0]["config"]["batch_size"]} images, from the same seeds.

{table(("setting", "value"), [(k, cell(v)) for k, v in settings.items()])}
## Limitations

{limits}
- Not calibrated for any clinic: a probability is that of this mix of classes.
- Skin types, ages and sites that are rare in the training data are rare in what it knows.
"""


def _loading(meta: dict[str, Any], classes: Sequence[str], config: Config) -> str:
    """Code that works as it stands in the folder of the card; the tests run it."""
    asked, side = meta["config"], meta["resolution"]
    size = asked["input_size"]
    resize = (
        ""
        if size in (None, side)
        else f"""
    mode = "bilinear" if about["interpolation"] == "bilinear" else "bicubic"
    pixels = torch.nn.functional.interpolate(pixels, ({size}, {size}), mode=mode, antialias=True).clamp(0, 1)"""
    )
    kind = "bf16" if asked["amp"] else "float32"
    views = (
        f" and the mean over {asked['views']} symmetries of the picture"
        if asked["views"] > 1
        else ""
    )
    return f"""## How to load it

With adversa, scored as in the run ({kind}{views}):

```python
from pathlib import Path

import numpy as np
from PIL import Image

from adversa.classify.score import make_scorer
from adversa.data.images import square, to_rgb

CLASSES = {list(classes)!r}

score = make_scorer(Path("seed-0"))
picture = square(to_rgb(Image.open("picture.png")), {side}, "{config.data.crop}")
logits, _ = score(np.asarray(picture)[None])
print(CLASSES[int(logits[0].argmax())])
```

With timm alone, in float32 and of the picture as it is:

```python
import json

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

asked, state = json.load(open("seed-0/config.json"))["config"], load_file("seed-0/model.safetensors")
trunk = timm.create_model(asked["model"], **{{**asked["model_args"], "num_classes": 0}}).eval()
trunk.load_state_dict({{k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}})
about = timm.data.resolve_model_data_config(trunk)
mean, std = (torch.tensor(about[k]).view(1, 3, 1, 1) for k in ("mean", "std"))

picture = np.array(Image.open("picture.png").convert("RGB"))  # {side} x {side} pixels
pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
with torch.inference_mode():{resize}
    logits = trunk((pixels - mean) / std) @ state["head.weight"].T + state["head.bias"]
```
"""


def _facts(arm: str, metas: Sequence[dict[str, Any]], summary: dict[str, Any], run: RunDir) -> str:
    seeds = [
        (
            f"seed-{i}",
            str(m["best_step"]),
            f"{m['select_balanced_accuracy']:.3f}",
            f"`{m['sha256']}`",
        )
        for i, m in enumerate(metas)
    ]
    found = run_card.versions(summary["versions"], summary.get("git"))
    painter = (
        [("denoiser, fingerprint", generate.fingerprint(run.denoiser))] if arm in PAINTED else []
    )
    facts = [
        ("run", f"{cell(summary['run'])} ({summary['run_id']})"),
        ("seed", str(summary["seed"])),
        ("rounds", str(summary["rounds"])),
        ("split hash", summary["split_hash"]),
        ("test opened", f"{summary['test_opened']}{_openings(summary)}"),
        *painter,
        *found.items(),
    ]
    return f"""## Where it comes from

{table(("what", "value"), facts)}
{table(("folder", "step of the weights", "balanced accuracy on select", "sha256 of model.safetensors"), seeds)}
## Licence

Fill in: the terms of the pictures it was trained on, and of the weights it started from, bind it too. Then set `license` above.
"""
