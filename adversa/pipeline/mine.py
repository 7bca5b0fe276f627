"""The hard cases of the mining pool, and the failure modes they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from adversa import config as cfg
from adversa.engine.step import Facts, inputs, run_step
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.folder import classes_of
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.path import StoragePath
from adversa.storage.predictions import matrix

if TYPE_CHECKING:
    from adversa.mine.modes import FailureModes

Row = dict[str, Any]
UNTOLD = ("dx_type",)  # how the diagnosis was made: of the archive, not of the patient


# ---- mining --------------------------------------------------------------------------------------


MODES = "modes.json"  # beside the hard cases: what they have in common


def mine(
    scores: StoragePath,
    data: StoragePath,
    config: cfg.Mine,
    out: StoragePath,
    earlier: Sequence[StoragePath] = (),
    handle: RunHandle = NULL_HANDLE,
) -> None:
    """The hard cases of the mine role under the classifier that was scored, and the failure modes
    they belong to.

    Scored by several seeds, the first is the target and all are the ensemble of scorer `bald`.
    earlier: the scores of the rounds before, in their order; scorer `forgetting` counts what was
    right in one round and wrong in the next.
    """
    from adversa.mine import explain
    from adversa.mine.hard import hard_cases

    def body(progress: Progress) -> Facts:
        rows = target_scores(scores)
        found = hard_cases(
            rows["id"].to_pylist(),
            rows["label"].to_numpy(),
            matrix(rows["logits"]),
            matrix(rows["embedding"]),
            config,
            scorer=config.scorer,
            temperature=config.temperature,
            ratio_cap=config.ratio_cap,
            ensemble=ensemble(scores),
            history=np.stack([right(s, rows["id"].to_pylist()) for s in (*earlier, scores)]),
        )
        tables.write_part(out / tables.part_name(0), tables.to_table(found, tables.HARD_CASES))
        files.write_json(out / MODES, explain.plain(modes(scores, data, config)))
        return {"rows": len(found), "scored": len(rows)}

    names = inputs(scores=scores, data=data, **{f"scores-{i}": s for i, s in enumerate(earlier)})
    run_step(out, Recipe("mine", 3, config.model_dump(mode="json"), names), body, handle)


def target_scores(scores: StoragePath, seed: int = 0) -> pa.Table:
    """What the classifier of one seed says: rows of tables.PREDICTIONS, in the order of the
    role.
    """
    rows = tables.read(scores, schema=tables.PREDICTIONS)
    return rows.filter(pa.compute.equal(rows["seed"], seed))


def ensemble(scores: StoragePath) -> np.ndarray:
    """Logits [M, N, K] of every seed that was scored."""
    seeds = sorted(tables.read(scores, ["seed"], tables.PREDICTIONS)["seed"].unique().to_pylist())
    return np.stack([matrix(target_scores(scores, s)["logits"]) for s in seeds or [0]])


def right(scores: StoragePath, ids: Sequence[str]) -> np.ndarray:
    """bool [N]: which of the images the target classifier got right."""
    rows = target_scores(scores)
    known = dict(
        zip(
            rows["id"].to_pylist(),
            matrix(rows["logits"]).argmax(1) == rows["label"].to_numpy(),
            strict=True,
        )
    )
    return np.array([known[i] for i in ids], dtype=bool)


def modes(scores: StoragePath, data: StoragePath, config: cfg.Mine) -> FailureModes:
    """What the hard cases of what was scored have in common."""
    from adversa.mine.modes import ModeSettings, failure_modes

    rows = target_scores(scores)
    examples = tables.read(
        data / "mine", ["id", "group", "attributes"], tables.EXAMPLES
    ).to_pylist()
    known = {e["id"]: e for e in examples}
    ids = rows["id"].to_pylist()
    return failure_modes(
        ids,
        rows["label"].to_numpy(),
        matrix(rows["logits"]),
        matrix(rows["embedding"]),
        classes_of(data),
        [
            {k: v for k, v in dict(known[i]["attributes"] or ()).items() if k not in UNTOLD}
            for i in ids
        ],
        [known[i]["group"] for i in ids],
        config.near_margin,
        ModeSettings(most=config.modes, alpha=config.alpha),
    )
