"""The verifiers of the filter: classifiers of another architecture, each trained without one fold
of `train`'s lesions.

A verifier that had learnt a real image by heart would also vouch for a copy of it that was
generated as another class. So an image is judged by those that have not seen the image of `train`
it is nearest to (cross-fitting: Chernozhukov et al. 2018, section 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from adversa import config as cfg
from adversa.common.statistics import softmax
from adversa.engine.interface import FitJob
from adversa.engine.step import Facts, inputs, run_step
from adversa.pipeline import train
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import tables
from adversa.storage.path import StoragePath
from adversa.types import digest, seed_of


def mix_of(root: StoragePath, fold: int) -> StoragePath:
    return root / f"mix-{fold}"


def folders(root: StoragePath, folds: int) -> list[StoragePath]:
    return [root / f"fold-{k}" for k in range(folds)]


def fold_of(data: StoragePath, folds: int) -> dict[str, int]:
    """id -> fold, for every image of `train`: by lesion, each class's lesions dealt out in the
    order of their hashes.
    """
    rows = tables.read(data / "train", ["id", "label", "group"], tables.EXAMPLES).to_pylist()
    label = {r["group"]: r["label"] for r in rows}
    dealt: dict[str, int] = {}
    for c in sorted(set(label.values())):
        groups = sorted((g for g in label if label[g] == c), key=lambda g: digest("fold", g))
        dealt |= {g: i % folds for i, g in enumerate(groups)}
    return {r["id"]: dealt[r["group"]] for r in rows}


def jobs(
    data: StoragePath, config: cfg.Config, root: StoragePath, handle: RunHandle = NULL_HANDLE
) -> list[FitJob]:
    """The training of each verifier; writes what each is trained on. Verifier k is trained on all
    folds but k.
    """
    folds, section = config.curate.folds, cfg.verifier_of(config)
    found = []
    for k, out in enumerate(folders(root, folds)):
        without(data, k, folds, mix_of(root, k), handle)
        seed = seed_of("judge", config.seed, k)
        found.append(
            train.classifier_job(
                data, mix_of(root, k), [], section, seed, config.data.resolution, out
            )
        )
    return found


def without(data: StoragePath, fold: int, folds: int, out: StoragePath, handle: RunHandle) -> None:
    """tables.MIX of `train` less one fold."""

    def body(progress: Progress) -> Facts:
        place = fold_of(data, folds)
        rows = tables.read(data / "train", ["id", "label"], tables.EXAMPLES).to_pylist()
        rows = [r | {"kind": "real", "weight": 1.0} for r in rows if place[r["id"]] != fold]
        tables.write_part(out / tables.part_name(0), pa.Table.from_pylist(rows, schema=tables.MIX))
        return {"rows": len(rows), "classes": sorted({r["label"] for r in rows})}

    recipe = Recipe("fold", 1, {"fold": fold, "folds": folds}, inputs(data=data))
    run_step(out, recipe, body, handle)


class Verifiers:
    """Loaded once; verifies images by those that have not seen the image of `train` that they are
    nearest to.
    """

    def __init__(self, root: StoragePath, folds: int, data: StoragePath) -> None:
        from adversa.classify.score import make_scorer

        self.place = fold_of(data, folds)
        self.scorers = [make_scorer(f, embed=k == 0) for k, f in enumerate(folders(root, folds))]
        self.known = [set(step_folder.manifest(mix_of(root, k))["classes"]) for k in range(folds)]

    def __call__(
        self, images: np.ndarray, labels: Sequence[int], nearest: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] -> (probabilities [N, K], embedding of the first verifier [N, D]).

        nearest: ids of the images of `train` they are nearest to; the verifier trained without it
        speaks. Where that one has seen no image of the class, the mean of those that have counts;
        where none has, the row is NaN.
        """
        scored = [scorer(images) for scorer in self.scorers]
        each = np.stack([softmax(logits) for logits, _ in scored])  # [folds, N, K]
        knows = np.array([[int(c) in known for c in labels] for known in self.known], dtype=bool)
        knows = knows.reshape(len(each), len(images))
        apart = (
            np.arange(len(each))[:, None]
            == np.array([self.place[i] for i in nearest], dtype=int)[None]
        )
        asked = np.where((knows & apart).any(axis=0), knows & apart, knows)
        total = asked.sum(axis=0)
        mean = (
            np.einsum("fn,fnk->nk", asked.astype(np.float64), each) / np.maximum(total, 1)[:, None]
        )
        return np.where(total[:, None] > 0, mean, np.nan), scored[0][1]
