"""The cells of a sweep: nested real images, and what is asked of the denoiser for their hard
cases.
"""

from __future__ import annotations

import numpy as np
import pytest

from adversa.config import Generate
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files, tables
from adversa.sweep import regimes
from adversa.sweep.grid import DataRegime, Variant


def rows(lesions=20, images=3, classes=2):
    names = [
        (c, f"{c}-{g}", i) for c in range(classes) for g in range(lesions) for i in range(images)
    ]
    return [{"id": f"{group}-{i}", "label": c, "group": group} for c, group, i in names]


def ids(found):
    return {r["id"] for r in found}


def test_smaller_sets_are_part_of_larger_ones_whatever_the_order_of_rows():
    given = rows()
    mixed = [given[i] for i in np.random.default_rng(0).permutation(len(given))]
    before: set[str] = set()
    for count in (1, 5, 20, 41, 60, None):
        found = regimes.nested(given, count, 0)
        assert ids(found) == ids(regimes.nested(mixed, count, 0)) and before <= ids(found)
        each = np.bincount([r["label"] for r in found]).tolist()
        assert each == [60, 60] if count is None else each == [count, count]
        before = ids(found)


def test_as_many_lesions_as_there_are_images_and_another_seed_has_others():
    found = regimes.nested(rows(), 20, 0)
    assert len({r["group"] for r in found}) == 40  # one image each
    assert ids(found) != ids(regimes.nested(rows(), 20, 1))


def test_a_class_with_fewer_gives_what_it_has():
    given = [r for r in rows() if r["label"] == 0 or r["group"] == "1-0"]
    assert np.bincount([r["label"] for r in regimes.nested(given, 10, 0)]).tolist() == [10, 3]


def test_a_cell_has_its_own_train_and_mine_and_the_runs_select_and_test(finished, tmp_path):
    data = finished[1].data
    d = RunDir(tmp_path / "cell")
    regimes.subset(data, DataRegime(3), 0, d.data)
    made = step_folder.manifest(d.data)
    assert made["real"] == [3] * 5 and made["lesions"] == [3] * 5 and max(made["mine"]) <= 3
    for role in ("train", "mine"):
        whole = {r["id"]: r for r in tables.read(data / role, ["id", "label", "image"]).to_pylist()}
        kept = tables.read(d.data / role, ["id", "label", "image"]).to_pylist()
        assert kept and all(whole[r["id"]] == r for r in kept)
    for role in ("select", "test"):
        assert tables.read(d.data / role).equals(tables.read(data / role))
    assert run_folder.classes_of(d.data) == run_folder.classes_of(data) and run_folder.split_hash(
        d.data
    ) == run_folder.split_hash(data)
    split = files.read_json(d.data / "split.json")
    assert list(split["images"]["train"].values()) == [3] * 5
    assert split["images"]["select"] == files.read_json(data / "split.json")["images"]["select"]
    assert step_folder.fingerprint(d.data) != step_folder.fingerprint(data)


CASES = [{"example": f"e{i}", "label": label, "rank": i} for i, label in enumerate([0, 1, 0, 2])]


def test_images_of_a_class_are_shared_among_its_hard_cases():
    found = list(
        regimes.replicates(
            CASES, [5, 2, 0, 4], Variant("guided", "img2img", "subset"), "run", Generate(), "clf"
        )
    )
    labels = [r.label for r in found]
    assert [labels.count(c) for c in range(4)] == [
        5,
        2,
        0,
        0,
    ]  # of class 2 none is wanted, of class 3 there is no hard case
    assert [r.example for r in found if r.label == 0] == ["e0", "e2", "e0", "e2", "e0"]
    assert len({r.request_id for r in found}) == len(found) == len({r.seed for r in found})
    assert {r.classifier for r in found} == {"clf"} and {r.strategy for r in found} == {"img2img"}
    more = list(
        regimes.replicates(
            CASES, [9, 9, 9, 9], Variant("guided", "img2img", "subset"), "run", Generate(), "clf"
        )
    )
    assert {r.request_id for r in found} < {r.request_id for r in more}  # the same, and more


def test_the_unguided_arm_asks_for_as_many_and_takes_nothing_of_the_cases():
    found = list(
        regimes.replicates(
            CASES, [3, 3, 3, 3], Variant("unguided", "", "subset"), "run", Generate(), "clf"
        )
    )
    assert [sum(r.label == c for r in found) for c in range(4)] == [3, 3, 3, 0]
    assert {r.example for r in found} == {None} and {r.strategy for r in found} == {"sample"}


@pytest.mark.parametrize(
    ("scorer", "used"), [("bald", "loss"), ("forgetting", "loss"), ("margin", "margin")]
)
def test_every_class_is_mined_alike(finished, tmp_path, scorer, used):
    config, run = finished
    d = RunDir(tmp_path / "cell")
    regimes.subset(run.data, DataRegime(3), 0, d.data)
    config = config.model_copy(update={"mine": config.mine.model_copy(update={"scorer": scorer})})
    own = regimes.config_of(config, d)
    assert (own.mine.near_margin, own.mine.ratio_cap, own.mine.scorer, own.curate.folds) == (
        1.0,
        1.0,
        used,
        0,
    )
