"""What predictions say beside the headline: the same comparison within the groups of an
attribute.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from adversa.evaluate.bootstrap import compare
from adversa.pipeline import results
from adversa.pipeline.results import Scored
from adversa.storage import tables
from adversa.types import seed_of


@pytest.fixture
def study(tmp_path, tiny):
    """(config, folder, arms): 40 lesions of the back that guided gets right and replay wrong, 35 of
    the face alike, 20 of the hand; all are of one sex but ten.
    """
    rng = np.random.default_rng(0)
    sites = ["back"] * 40 + ["face"] * 35 + ["hand"] * 20
    ids, labels = [f"i{i}" for i in range(len(sites))], rng.integers(0, 2, len(sites))
    rows = [
        {
            "id": i,
            "source": i,
            "label": int(k),
            "group": i,
            "patient": "",
            "image": b"",
            "mask": None,
            "attributes": [("site", site), ("sex", "male" if n < 10 else "female")],
        }
        for n, (i, k, site) in enumerate(zip(ids, labels, sites, strict=True))
    ]
    tables.write_part(
        tmp_path / tables.part_name(0), pa.Table.from_pylist(rows, schema=tables.EXAMPLES)
    )
    noise = rng.normal(size=(2, len(ids), 2))
    right, wrong = np.eye(2)[labels] * 9, np.eye(2)[1 - labels] * 9
    back = np.array([s == "back" for s in sites])[:, None]
    logits = {
        "guided": noise + back * right,
        "replay": noise + back * wrong,
        "real": noise,
        "unguided": noise,
    }
    arms = {name: Scored(x, labels, ids, ids, None) for name, x in logits.items()}
    return tiny(evaluate={"bootstrap": 200, "subgroups": ["sex", "site", "age"]}), tmp_path, arms


def test_the_headline_is_compared_within_groups_and_corrected_over_all(study):
    config, folder, arms = study
    found = results.subgroup_comparisons(config, folder, arms)
    assert (found["a"], found["b"], found["tested"]) == ("guided", "replay", 3) and list(
        found["attributes"]
    ) == ["sex", "site"]
    rows = {(a, r["value"]): r for a, of in found["attributes"].items() for r in of}
    assert rows["site", "back"]["word"] == "better" and rows["site", "back"]["difference"] > 0.5
    assert rows["site", "face"]["word"] == "not shown" and rows["site", "face"]["difference"] == 0
    for small in (("site", "hand"), ("sex", "male")):
        assert rows[small]["small"] and all(
            rows[small][k] is None for k in ("difference", "low", "p", "p_holm", "word")
        )
    assert rows["site", "hand"]["n"] == 20
    back, seed = slice(0, 40), seed_of("compare", config.seed, "site")
    alone = compare(
        arms["guided"].logits[:, back],
        arms["replay"].logits[:, back],
        arms["real"].labels[back],
        arms["real"].groups[back],
        200,
        seed,
    )
    assert rows["site", "back"]["low"] == pytest.approx(alone.low) and rows["site", "back"][
        "p"
    ] == pytest.approx(alone.p)
    least = min((r for r in rows.values() if r["p"] is not None), key=lambda r: r["p"])
    assert least["p_holm"] == pytest.approx(min(1, 3 * least["p"]))


def test_without_another_arm_or_an_attribute_there_is_nothing_to_compare(study, tiny):
    config, folder, arms = study
    assert (
        results.subgroup_comparisons(tiny(mix={"arms": ["real"]}), folder, {"real": arms["real"]})
        == {}
    )
    for asked in ([], ["age"]):
        assert results.subgroup_comparisons(tiny(evaluate={"subgroups": asked}), folder, arms) == {}


def test_a_difference_that_chance_gives_one_of_three_is_not_called_one(study, tiny):
    """Five of 95 lesions turn right against `real`, none against the others."""
    _, _, arms = study
    config = tiny(evaluate={"bootstrap": 1000, "seeds": 1})
    labels = arms["real"].labels
    right, worse = np.eye(2)[labels], np.eye(2)[labels]
    worse[:5] = 1 - worse[:5]
    given = {arm: replace(arms["real"], logits=right[None]) for arm in config.mix.arms}
    given["real"] = replace(arms["real"], logits=worse[None])
    hours = dict.fromkeys(config.mix.arms, 3600.0) | {"guided": 7200.0}
    spent = {arm: {"device_seconds": seconds} for arm, seconds in hours.items()}
    rows = {row["b"]: row for row in results.comparisons(config, given, spent)}
    real = rows["real"]
    assert len(rows) == 3 and real["p"] < 0.05 < real["p_holm"] == pytest.approx(3 * real["p"])
    assert real["low"] > 0 and real["word"] == "not shown"
    assert real["gain_per_device_hour"]["gain"] == pytest.approx(real["difference"])  # of an hour
    cheaper = results.comparisons(config, given, spent | {"guided": {"device_seconds": 1800.0}})
    assert all(row["gain_per_device_hour"] is None for row in cheaper)
