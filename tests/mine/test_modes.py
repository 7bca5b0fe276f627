from __future__ import annotations

import json

import numpy as np
import pytest

from adversa.mine import association, explain
from adversa.mine.modes import FailureModes, ModeSettings, cluster, failure_modes

CLASSES = ("nevus", "melanoma", "vascular")


def simulated(seed: int = 0, rare: int = 12, n: int = 300) -> dict:
    """Three classes; `rare` amelanotic melanomas lie together, taken for vascular; other errors lie
    between their two classes.
    """
    random = np.random.default_rng(seed)
    labels = random.choice(3, n, p=[0.6, 0.25, 0.15])
    centres = np.eye(12)[:4] * 3
    predicted = np.where(
        random.random(n) < 0.15, (labels + 1 + (random.random(n) < 0.5)) % 3, labels
    )
    points = (centres[labels] + centres[predicted]) / 2
    amelanotic = np.flatnonzero(labels == 1)[:rare]
    predicted[amelanotic] = 2
    points[amelanotic] = centres[3] + 0.3 * centres[2]
    points = points + random.normal(scale=0.35, size=points.shape)
    logits = 4 * np.eye(3)[predicted] + random.normal(scale=0.3, size=(n, 3))
    attributes = [
        {
            "mode": "typical",
            "sex": str(random.choice(["male", "female"])),
            "age": str(random.integers(20, 90)),
            "site": str(s),
        }
        for s in random.choice(["back", "face", "leg", "arm"], n)
    ]
    for i in amelanotic:
        attributes[i]["mode"] = "amelanotic"
    ids = [f"i{i:04d}" for i in random.permutation(n)]
    return {
        "ids": ids,
        "labels": labels,
        "logits": logits,
        "embeddings": points,
        "classes": CLASSES,
        "attributes": attributes,
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_planted_mode_comes_out_by_name(seed: int) -> None:
    data = simulated(seed)
    found = failure_modes(**data)
    planted = {
        i for i, a in zip(data["ids"], data["attributes"], strict=True) if a["mode"] == "amelanotic"
    }
    (mode,) = [m for m in found.modes if any(f.value == "amelanotic" for f in m.attributes)]
    assert len(planted & set(mode.members)) >= 0.8 * len(planted)
    assert len(planted & set(mode.members)) >= 0.8 * mode.size
    assert (
        mode.name.startswith("melanoma, mode=amelanotic (")
        and CLASSES[mode.confused[0][0]] == "vascular"
    )
    assert mode.medoid in planted
    assert mode.share == pytest.approx(mode.errors / found.errors)


def test_modes_hold_every_hard_image_once_and_neighbours_are_right() -> None:
    data = simulated()
    found = failure_modes(**data)
    wrong = {
        i
        for i, y, z in zip(data["ids"], data["labels"], data["logits"], strict=True)
        if z.argmax() != y
    }
    members = [i for m in found.modes for i in m.members]
    assert len(members) == len(set(members)) and wrong <= set(members)
    assert sum(m.errors for m in found.modes) == found.errors == len(wrong)
    labels = dict(zip(data["ids"], data["labels"].tolist(), strict=True))
    for mode in found.modes:
        assert {labels[i] for i in mode.members} == {mode.label} and mode.medoid in mode.members
        assert not {n.example for n in mode.neighbours} & wrong
        assert all(labels[n.example] == n.label for n in mode.neighbours)
        assert [n.similarity for n in mode.neighbours] == sorted(
            (n.similarity for n in mode.neighbours), reverse=True
        )


def test_order_of_rows_makes_no_difference() -> None:
    data = simulated(1)
    p = np.random.default_rng(9).permutation(len(data["ids"]))
    shuffled = data | {k: data[k][p] for k in ("labels", "logits", "embeddings")}
    shuffled |= {k: [data[k][i] for i in p] for k in ("ids", "attributes")}
    first, again = failure_modes(**data), failure_modes(**shuffled)
    assert explain.lines(first, CLASSES) == explain.lines(again, CLASSES)
    assert [m.members for m in first.modes] == [m.members for m in again.modes]
    assert [m.neighbours for m in first.modes] == [m.neighbours for m in again.modes]


def test_no_false_name_where_nothing_is_associated() -> None:
    """Modes found once, attributes of the lesions drawn 200 times without regard to them: any
    finding is false.

    At most 5% of studies have one; were it 5% exactly, 15 or more of 200 would come with
    probability 0.08.
    """
    data, random = simulated(2, n=240), np.random.default_rng(0)
    lesion = np.arange(240) // 2
    row = {name: i for i, name in enumerate(data["ids"])}
    modes = failure_modes(**data, groups=[str(i) for i in lesion]).modes
    subsets = [np.sort([row[i] for i in m.members]) for m in modes]
    false, tests = 0, 0
    for _ in range(200):
        sex, site, age = (
            random.integers(0, 2, 120),
            random.integers(0, 8, 120),
            random.integers(15, 95, 120),
        )
        known = association.columns(
            [{"sex": str(sex[i]), "site": str(site[i]), "age": str(age[i])} for i in lesion]
        )
        tables = association.count(known, subsets, data["labels"], lesion)
        findings, tested = association.over_represented(tables, len(subsets))
        false, tests = false + any(findings), tests + tested
    assert tests > 200 * 20
    assert false / 200 <= 0.07


def test_nothing_over_represented_is_named_by_its_error() -> None:
    data = simulated()
    found = failure_modes(**data | {"attributes": [{}] * len(data["ids"])})
    assert found.tests == 0
    for m in found.modes:
        word = "predicted" if m.errors else "nearly"
        assert m.name == f"{CLASSES[m.label]}, {word} {CLASSES[m.confused[0][0]]}"


def test_a_perfect_classifier_has_no_modes_and_no_embedding_gives_a_mode_a_class() -> None:
    data = simulated()
    perfect = failure_modes(**data | {"logits": 9 * np.eye(3)[data["labels"]]})
    assert perfect.modes == ()
    assert "No image" in explain.lines(perfect, CLASSES)[0]
    plain = failure_modes(**data | {"embeddings": np.zeros((len(data["ids"]), 0))})
    assert sorted(m.label for m in plain.modes) == sorted({m.label for m in plain.modes})


def test_clusters_are_found_by_count_and_one_lump_is_not_parted() -> None:
    random = np.random.default_rng(0)
    lumps = np.repeat(np.eye(6)[:3], 10, axis=0) + random.normal(scale=0.05, size=(30, 6))
    lumps /= np.linalg.norm(lumps, axis=1, keepdims=True)
    found = cluster(lumps, ModeSettings())
    assert len(set(found)) == 3 and all(len(set(found[i : i + 10])) == 1 for i in (0, 10, 20))
    assert set(cluster(np.repeat(np.eye(6)[:1], 30, axis=0), ModeSettings())) == {0}
    assert set(cluster(lumps, ModeSettings(silhouette=0.99))) == {0}


def test_more_than_are_clustered_join_the_nearest_mode() -> None:
    data = simulated(4)
    whole, few = failure_modes(**data), failure_modes(**data, settings=ModeSettings(clustered=20))
    assert sum(m.size for m in few.modes) == sum(m.size for m in whole.modes)
    named = [m for m in few.modes if any(f.value == "amelanotic" for f in m.attributes)]
    assert len(named) == 1 and named[0].size >= 10


def test_lines_and_json_say_the_same() -> None:
    found = failure_modes(**simulated())
    said, kept = "\n".join(explain.lines(found, CLASSES)), explain.plain(found)
    assert f"corrected by Holm for {found.tests} tests" in said
    assert isinstance(found, FailureModes) and len(json.dumps(kept, allow_nan=False)) > 100
    assert kept["modes"] and all(m["name"] in said for m in kept["modes"])
    mode = found.modes[0]
    assert f"  {mode.errors} errors ({mode.share:.0%} of all), " in said and mode.medoid in said
