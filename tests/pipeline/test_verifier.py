"""Verifiers trained without a fold, and who is asked."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from adversa import config as cfg
from adversa.classify.score import make_scorer
from adversa.common.statistics import softmax
from adversa.pipeline import verifier
from adversa.run import step_folder
from adversa.storage import files, tables


def test_a_lesion_is_in_one_fold_and_classes_are_shared_out(finished):
    config, run = finished
    place = verifier.fold_of(run.data, 2)
    rows = tables.read(run.data / "train", ["id", "label", "group"]).to_pylist()
    assert set(place) == {r["id"] for r in rows}
    folds, lesions = defaultdict(set), defaultdict(lambda: [0, 0])
    for r in rows:
        folds[r["group"]].add(place[r["id"]])
    assert all(len(f) == 1 for f in folds.values())
    for group, found in folds.items():
        label = next(r["label"] for r in rows if r["group"] == group)
        lesions[label][next(iter(found))] += 1
    assert all(abs(a - b) <= 1 for a, b in lesions.values())


def test_each_verifier_is_trained_without_its_fold_and_they_differ(finished):
    config, run = finished
    place = verifier.fold_of(run.data, 2)
    for k in range(2):
        ids = tables.read(verifier.mix_of(run.judge, k))["id"].to_pylist()
        assert ids and set(ids) == {i for i, f in place.items() if f != k}
    models = [run.arm(0, "real", 0) / "classifier", *verifier.folders(run.judge, 2)]
    assert len({step_folder.fingerprint(m) for m in models}) == 3
    kinds = [(files.read_json(m / "config.json") or {})["config"]["model"] for m in models]
    assert kinds[0] != kinds[1] == kinds[2]


@pytest.fixture(scope="module")
def pictures(finished):
    _, run = finished
    rows = tables.read(run.data / "train", ["id", "image", "label"]).slice(0, 12)
    return rows["id"].to_pylist(), tables.decode_images(rows["image"]), rows["label"].to_pylist()


def test_an_image_near_one_of_train_is_judged_by_the_verifier_that_has_not_seen_it(
    finished, pictures
):
    _, run = finished
    ids, images, labels = pictures
    each = [softmax(make_scorer(f)(images)[0]) for f in verifier.folders(run.judge, 2)]
    place = verifier.fold_of(run.data, 2)
    verifiers = verifier.Verifiers(run.judge, 2, run.data)
    verifiers.known = [set(labels)] * 2
    probs, embedding = verifiers(images, labels, ids)
    assert {place[i] for i in ids} == {0, 1}
    for row, i in enumerate(ids):
        np.testing.assert_allclose(probs[row], each[place[i]][row], rtol=1e-6)
    assert embedding.shape[0] == len(ids) and embedding.shape[1] > 0
    empty = verifiers(images[:0], [], [])
    assert empty[0].shape == (0, each[0].shape[1]) and len(empty[1]) == 0


def test_a_verifier_that_knows_no_image_of_the_class_is_not_asked(finished, pictures):
    _, run = finished
    ids, images, labels = pictures
    each = [softmax(make_scorer(f)(images)[0]) for f in verifier.folders(run.judge, 2)]
    verifiers = verifier.Verifiers(run.judge, 2, run.data)
    verifiers.known = [set(), set(labels)]
    np.testing.assert_allclose(verifiers(images, labels, ids)[0], each[1], rtol=1e-6)
    verifiers.known = [set(), set()]
    assert np.isnan(verifiers(images, labels, ids)[0]).all()


@pytest.mark.parametrize(
    ("model", "other"), [("resnet10t", "convnext_atto"), ("convnext_atto", "resnet10t")]
)
@pytest.mark.parametrize("side", [32, 64])
def test_the_verifier_is_of_another_architecture_from_scratch_and_can_be_built(model, other, side):
    from adversa.classify import model as models

    config = cfg.check(
        {
            "data": {"resolution": side},
            "classifier": {
                "model": model,
                "weights": "w",
                "layer_decay": 0.9,
                "freeze_norm": True,
                "lr": 1e-4,
                "steps": 77,
            },
        },
        "x",
    )
    verifier = cfg.verifier_of(config)
    assert (
        verifier.model,
        verifier.weights,
        verifier.layer_decay,
        verifier.freeze_norm,
        verifier.lr,
    ) == (
        other,
        None,
        1.0,
        False,
        2e-3,
    )
    assert verifier.steps == 77
    models.build(verifier, 5, side)
    given = cfg.check({"curate": {"judge": {"model": model, "steps": 9}}}, "x")
    assert cfg.verifier_of(given).steps == 9 and cfg.verifier_of(given).model == model
