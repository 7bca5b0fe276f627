"""The filter as steps: thresholds measured on real images, and each generated image by itself
(`pipeline.finalize` follows).

The near-copy indices hold every role, `test` too: they can only ever remove an image. Of `test`
they have the pixels and the classifier's features, no label; no threshold is measured on it, no
verifier sees it, and which verifier judges an image does not depend on it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa

from adversa import config as cfg
from adversa.common.statistics import softmax
from adversa.curate import checks
from adversa.engine.interface import Engine
from adversa.engine.step import Facts, inputs, mapped, run_step
from adversa.engine.tasks import Part, Work
from adversa.pipeline.verifier import Verifiers, folders
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.folder import classes_of
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.arrays import RoleArray
from adversa.storage.path import BucketPath, StoragePath, storage_path
from adversa.storage.predictions import matrix
from adversa.types import ROLES, UserError

if TYPE_CHECKING:
    from adversa.curate.near_copy import NearCopy, NearFeatures, Scale
    from adversa.curate.realism import Manifold

CHOOSING = tuple(r for r in ROLES if r != "test")
# of the roles that may choose, those that the denoiser and the classifier were not fitted on
HELD_OUT = ("mine", "select")
THRESHOLDS, SCALE, INDEX = "thresholds.json", "scale.npz", "near_copy.npz"
HELD = 1000  # held-out images of the memorisation curve


# ---- what is measured on real images, once a run -------------------------------------------------


def features(
    engine: Engine,
    data: StoragePath,
    role: str,
    classifier: StoragePath,
    verifiers: Sequence[StoragePath],
    out: StoragePath,
) -> None:
    """Write tables.FEATURES: embeddings of a role's images, and the verifiers' p[label]."""
    names = inputs(
        data=data, classifier=classifier, **{f"judge-{k}": f for k, f in enumerate(verifiers)}
    )
    recipe = Recipe("features", 2, {"role": role}, names)

    def body(progress: Progress) -> Facts:
        paths = tables.parts(data / role)
        parts = [Part(i, tables.count(p), {"path": str(p)}) for i, p in enumerate(paths)]
        seen_by = () if role == "test" else tuple(verifiers)
        make = partial(make_features, data / role, classifier, seen_by)
        return mapped(engine, make, parts, out, progress, model=True)

    run_step(out, recipe, body, engine.handle)


def make_features(
    examples: StoragePath, classifier: StoragePath, verifiers: Sequence[StoragePath]
) -> Work:
    """The work of `features`; without verifiers (for `test`) labels are not read either."""
    from adversa.classify.score import make_scorer

    pictures = RoleArray(examples)
    scorer = make_scorer(classifier, embed=True)
    scorers = [make_scorer(folder, embed=True) for folder in verifiers]

    def work(part: Part, path: StoragePath) -> int:
        source = storage_path(part.payload["path"])
        rows = tables.read_part(source, ["id", *(("label", "group") if scorers else ())])
        images = pictures.part(source.name)
        found = [
            {"id": i, "classifier": x}
            for i, x in zip(rows["id"].to_pylist(), scorer(images)[1].tolist(), strict=True)
        ]
        if scorers:
            scored = [verify(images) for verify in scorers]
            labels = rows["label"].to_numpy()
            agreement = np.stack(
                [softmax(logits)[np.arange(len(labels)), labels] for logits, _ in scored], axis=1
            )
            columns = zip(
                labels.tolist(),
                rows["group"].to_pylist(),
                scored[0][1].tolist(),
                agreement.tolist(),
                strict=True,
            )
            for row, (label, group, embedding, agreed) in zip(found, columns, strict=True):
                row |= {"label": label, "group": group, "judge": embedding, "agreement": agreed}
        tables.write_part(path, pa.Table.from_pylist(found, schema=tables.FEATURES))
        return len(rows)

    return work


def measure_thresholds(
    data: StoragePath,
    features: StoragePath,
    config: cfg.Curate,
    out: StoragePath,
    handle: RunHandle = NULL_HANDLE,
) -> None:
    """Write thresholds.json, scale.npz and near_copy.npz: what a generated image must keep to,
    measured on the roles that may choose, and the index of all real images in pixels.

    thresholds.json holds near_copy, near_copy_features (quantiles of the similarity of real images
    of different lesions), most_agreement (quantile of each verifier's p[label] of held-out images),
    realism, realism_2 (quantiles of held-out images' distance to the manifold of `train`, a number
    a class), and held_out: similarities of held-out images to their nearest image of another
    lesion, of any role as those of generated images are, for the memorisation curve alone.
    """
    asked = {
        k: getattr(config, k)
        for k in ("near_copy_quantile", "realism_quantile", "trivial_quantile")
    }
    recipe = Recipe(
        "limits", 3, asked, inputs(data=data, **{f"features-{r}": features / r for r in CHOOSING})
    )

    def body(progress: Progress) -> Facts:
        progress({"done": 0, "total": 3, "unit": "index"})
        from adversa.curate.near_copy import NearCopy, threshold

        ids, groups, images = real_images(data, CHOOSING)
        index = NearCopy(ids, images)
        found: dict[str, Any] = {
            "near_copy": threshold(
                index.cross_lesion_neighbours(ids, groups)[1], config.near_copy_quantile
            )
        }
        progress({"done": 1, "total": 3, "unit": "index"})
        test, lesions, images = real_images(data, ["test"])
        index = index.extended(test, images)
        among = real_ids(data, HELD_OUT)
        nearest = index.cross_lesion_neighbours([*ids, *test], [*groups, *lesions], among, HELD)[1]
        found["held_out"] = nearest.tolist()
        _write(out / INDEX, index.save)
        _write(out / SCALE, lambda file: np.savez(file, **vars(index.scale)))
        progress({"done": 2, "total": 3, "unit": "index"})
        in_features = near_features(features, CHOOSING)
        lesion = dict(zip(ids, groups, strict=True))
        found["near_copy_features"] = in_features.threshold(
            in_features.ids, [lesion[i] for i in in_features.ids], config.near_copy_quantile
        )
        found |= _realism(data, features, config) | {"most_agreement": _trivial(features, config)}
        files.write_json(out / THRESHOLDS, found)
        return {"rows": len(ids)} | {
            k: found[k] for k in ("near_copy", "near_copy_features", "realism", "realism_2")
        }

    run_step(out, recipe, body, handle)


def _write(path: StoragePath, save: Callable[[BinaryIO], None]) -> None:
    buffer = io.BytesIO()
    save(buffer)
    files.replace_bytes(path, buffer.getbuffer())


def _trivial(features: StoragePath, config: cfg.Curate) -> float:
    if config.trivial_quantile is None:
        return 1.0
    given = matrix(read_features(features, HELD_OUT)["agreement"])
    return float(np.quantile(given, config.trivial_quantile))


def _realism(
    data: StoragePath, features: StoragePath, config: cfg.Curate
) -> dict[str, list[float] | None]:
    from adversa.curate import realism

    if config.realism_quantile is None:
        return {"realism": None, "realism_2": None}
    held, classes = read_features(features, HELD_OUT), len(classes_of(data))
    found = {}
    for name, column in (("realism", "classifier"), ("realism_2", "judge")):
        ratios = manifold(features, column).ratio(matrix(held[column]))
        found[name] = realism.thresholds(
            ratios, held["label"].to_numpy(), classes, config.realism_quantile
        ).tolist()
    return found


def manifold(features: StoragePath, column: str) -> Manifold:
    """The manifold of `train` in one feature space. UserError where there are too few lesions."""
    from adversa.curate.realism import NEIGHBOUR, Manifold

    rows = read_features(features, ["train"])
    groups = rows["group"].to_pylist()
    if len(set(groups)) <= NEIGHBOUR:
        raise UserError(
            f"train has {len(set(groups))} lesions, too few to say what is like a real "
            "image; give more, or set "
            "curate.realism_quantile=null"
        )
    return Manifold(matrix(rows[column]), groups)


def read_features(features: StoragePath, roles: Sequence[str]) -> pa.Table:
    return pa.concat_tables(tables.read(features / r, schema=tables.FEATURES) for r in roles)


def real_ids(data: StoragePath, roles: Sequence[str]) -> list[str]:
    return [
        i for r in roles for i in tables.read(data / r, ["id"], tables.EXAMPLES)["id"].to_pylist()
    ]


def real_images(
    data: StoragePath, roles: Sequence[str]
) -> tuple[list[str], list[str], Iterator[np.ndarray]]:
    """(ids, groups, blocks of uint8 images [n, H, W, 3] in their order) of some roles; one block is
    in memory at a time.
    """
    names = ["id", "group"]
    rows = pa.concat_tables(tables.read(data / role, names, tables.EXAMPLES) for role in roles)
    blocks = (block for role in roles for block in RoleArray(data / role).blocks())
    return rows["id"].to_pylist(), rows["group"].to_pylist(), blocks


# ---- each generated image by itself --------------------------------------------------------------


def thresholds_of(folder: StoragePath, config: cfg.Curate) -> checks.Thresholds:
    """The limits of the checks, of a run's measurements and settings."""
    measured = files.read_json(folder / THRESHOLDS)
    assert measured is not None, f"{folder} is not finished"
    return checks.thresholds(config, measured)


def inspect(
    engine: Engine,
    requests: StoragePath,
    synthetic: StoragePath,
    data: StoragePath,
    features: StoragePath,
    limits: StoragePath,
    classifier: StoragePath,
    judge: StoragePath,
    config: cfg.Curate,
    out: StoragePath,
) -> None:
    """Write tables.VERDICTS: the first pass of the filter over every image, none kept yet."""
    verifiers = {f"judge-{k}": f for k, f in enumerate(folders(judge, config.folds))}
    names = inputs(
        synthetic=synthetic,
        requests=requests,
        data=data,
        limits=limits,
        classifier=classifier,
        **verifiers,
    )
    names |= {f"features-{r}": step_folder.fingerprint(features / r) for r in ROLES}
    recipe = Recipe(
        "inspect", 2, config.model_dump(mode="json", exclude={"judge", "quota", "twins"}), names
    )

    def body(progress: Progress) -> Facts:
        paths = tables.parts(synthetic)
        counts = tables.each(tables.count, paths)
        parts = [
            Part(i, n, {"path": str(p), "requests": str(requests / p.name)})
            for i, (p, n) in enumerate(zip(paths, counts, strict=True))
        ]
        make = partial(make_inspected, data, features, limits, classifier, judge, config)
        return mapped(engine, make, parts, out, progress, model=True)

    run_step(out, recipe, body, engine.handle)


def make_inspected(
    data: StoragePath,
    features: StoragePath,
    limits: StoragePath,
    classifier: StoragePath,
    judge: StoragePath,
    config: cfg.Curate,
) -> Work:
    from adversa.classify.score import make_scorer
    from adversa.curate import filter

    thresholds = thresholds_of(limits, config)
    scorer = make_scorer(classifier, embed=True)
    verify = Verifiers(judge, config.folds, data) if config.folds else None
    copies = near_copies(limits)
    in_features, in_train = near_features(features, ROLES), near_features(features, ["train"])
    assert in_features.ids == copies.ids, f"{features} is not of the images of {limits}"
    on = thresholds["realism_limit"] is not None
    spaces = [manifold(features, c) for c in ("classifier", "judge")] if on else None

    def work(part: Part, path: StoragePath) -> int:
        rows = tables.read_part(storage_path(part.payload["path"]))
        asked = tables.read_part(
            storage_path(part.payload["requests"]), ["request_id", "strategy", "example"]
        ).to_pylist()
        request = {r["request_id"]: r for r in asked}
        names, labels = rows["request_id"].to_pylist(), rows["label"].to_pylist()
        pictures = tables.decode_images(rows["image"])
        similarity, nearest = copies.nearest(pictures)
        first = scorer(pictures)[1]
        probs, second = (
            verify(pictures, labels, in_train.nearest(first)[1]) if verify else (None, None)
        )
        similarity_2, nearest_2 = in_features.nearest(first)
        ratios: list[np.ndarray] | list[None] = [None, None]
        if spaces:
            assert second is not None, "realism is measured in the verifiers' features too"
            ratios = [space.ratio(x) for space, x in zip(spaces, (first, second), strict=True)]
        candidates = checks.Candidates(
            request_ids=names,
            arms=rows["arm"].to_pylist(),
            labels=labels,
            strategies=[request[i]["strategy"] for i in names],
            sources=[request[i]["example"] for i in names],
            finite=rows["finite"].to_pylist(),
            faults=rows["fault"].to_pylist(),
            images=pictures,
            probs=probs,
            ratio=ratios[0],
            ratio_2=ratios[1],
            similarity=similarity,
            nearest=nearest,
            similarity_2=similarity_2,
            nearest_2=nearest_2,
        )
        found = filter.inspect(candidates, thresholds)
        tables.write_part(path, tables.to_table(found, tables.VERDICTS))
        return len(rows)

    return work


def near_copies(limits: StoragePath) -> NearCopy:
    """The index of the real images of every role, in pixels."""
    from adversa.curate.near_copy import NearCopy

    file = limits / INDEX
    return NearCopy.load(io.BytesIO(file.read_bytes()) if isinstance(file, BucketPath) else file)


def near_features(features: StoragePath, roles: Sequence[str]) -> NearFeatures:
    """The index of the real images of some roles, in the classifier's features."""
    from adversa.curate.near_copy import NearFeatures

    rows = read_features(features, roles)
    return NearFeatures(rows["id"].to_pylist(), matrix(rows["classifier"]))


def scale_of(limits: StoragePath) -> Scale:
    """The scale by which a run's similarities are measured."""
    from adversa.curate.near_copy import Scale

    with np.load(io.BytesIO((limits / SCALE).read_bytes()), allow_pickle=False) as saved:
        return Scale(saved["signal"], saved["noise"])
