from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adversa.curate.checks import Candidates, Thresholds
from adversa.curate.filter import (
    EVERY_REASON,
    Verdict,
    acceptance,
    acceptance_by_strategy,
    finalize,
    inspect,
)

GOOD = [0.2, 0.7, 0.1]


K = 3
THRESHOLDS = {
    "contrast_limit": 2.0,
    "clipped_limit": 0.5,
    "agreement_least": 0.2,
    "agreement_most": 0.9,
    "realism_limit": (1.5, 2.0, 1.0),
    "realism_2_limit": (3.0, 3.0, 3.0),
    "similarity_limit": 0.4,
    "similarity_2_limit": 0.95,
    "twin_limit": 0.5,
    "quota": 2,
}


def candidates(n: int = 1, **changes: object) -> Candidates:
    images = np.random.default_rng(0).integers(60, 200, (n, 8, 8, 3), dtype=np.uint8)
    good = Candidates(
        [f"q{i:02d}" for i in range(n)],
        ["guided"] * n,
        [1] * n,
        ["img2img"] * n,
        [f"e{i}" for i in range(n)],
        [True] * n,
        [None] * n,
        images,
        np.tile(GOOD, (n, 1)),
        np.full(n, 1.0),
        np.full(n, 2.0),
        np.full(n, 0.1),
        ["real"] * n,
        np.full(n, 0.5),
        ["real2"] * n,
    )
    return replace(good, **changes)


def entered(p: Candidates, thresholds: Thresholds = THRESHOLDS) -> list[Verdict]:
    return finalize(inspect(p, thresholds), p.request_ids, (), thresholds)


def test_a_finding_has_every_number_and_limit() -> None:
    (f,) = entered(candidates())
    assert f.keep and f.reason == "kept"
    got = (
        f.agreement,
        f.agreement_least,
        f.agreement_most,
        f.realism,
        f.realism_limit,
        f.realism_2,
        f.realism_2_limit,
    )
    assert got == pytest.approx((0.7, 0.2, 0.9, 1.0, 2.0, 2.0, 3.0))
    assert (f.nearest, f.similarity, f.similarity_limit) == ("real", 0.1, 0.4)
    assert (f.nearest_2, f.similarity_2, f.similarity_2_limit) == ("real2", 0.5, 0.95)
    assert (f.contrast_limit, f.clipped, f.clipped_limit, f.twin_limit, f.place, f.quota) == (
        2.0,
        0.0,
        0.5,
        0.5,
        1,
        2,
    )
    assert f.contrast == pytest.approx(candidates().images[0].mean(axis=2).std())


NAN = float("nan")
HALVES = (
    np.where(np.arange(8)[None, :, None, None] < 4, 255, 0)
    .repeat(8, 2)
    .repeat(3, 3)
    .astype(np.uint8)
)
FAILING = [
    ({"faults": ["out of memory"]}, "not painted"),
    ({"finite": [False]}, "not finite"),
    ({"finite": [None]}, "not finite"),
    ({"images": np.full((1, 8, 8, 3), 90, np.uint8)}, "flat"),
    ({"images": HALVES}, "out of range"),
    ({"probs": np.array([[0.5, 0.1, 0.4]])}, "judge disagrees"),
    ({"probs": np.array([[NAN, 0.5, 0.5]])}, "judge disagrees"),
    ({"probs": None}, "judge disagrees"),
    ({"probs": np.array([[0.02, 0.95, 0.03]])}, "trivial"),
    ({"ratio": np.array([2.1])}, "unlike real images"),
    ({"ratio": np.array([NAN])}, "unlike real images"),
    ({"ratio": None}, "unlike real images"),
    ({"ratio_2": np.array([3.1])}, "unlike real images (second)"),
    ({"ratio_2": None}, "unlike real images (second)"),
    ({"similarity": np.array([0.4])}, "near copy"),
    ({"similarity": np.array([NAN])}, "near copy"),
    ({"similarity": None, "nearest": None}, "near copy"),
    ({"similarity_2": np.array([0.95])}, "near copy in features"),
    ({"similarity_2": None, "nearest_2": None}, "near copy in features"),
]


@pytest.mark.parametrize(("changes", "reason"), FAILING)
def test_each_check_rejects_and_what_is_unknown_does_not_pass(changes: dict, reason: str) -> None:
    (f,) = entered(candidates(**changes))
    assert (f.keep, f.reason) == (False, reason) and reason in EVERY_REASON


def test_the_first_check_that_fails_is_the_reason() -> None:
    order = [r for r in EVERY_REASON if r not in ("kept", "not settled", "near twin", "over quota")]
    for i, first in enumerate(order):
        changes: dict[str, object] = {}
        for c, reason in reversed(FAILING):  # of those that change the same, the earliest stays
            if reason in order[i:]:
                changes |= c
        assert entered(candidates(**changes))[0].reason == first


def test_limits_of_realism_are_the_class_s() -> None:
    p = candidates(
        3,
        labels=[0, 1, 2],
        probs=np.full((3, K), 1 / 3),
        ratio=np.full(3, 1.2),
        strategies=["img2img"] * 3,
    )
    assert [f.reason for f in entered(p)] == ["kept", "kept", "unlike real images"]


def test_a_check_that_is_off_rejects_nothing_but_a_limit_that_is_no_number_stops() -> None:
    off = dict.fromkeys(THRESHOLDS) | {"agreement_most": 1.0}
    nothing = candidates(
        ratio=None, ratio_2=None, similarity=None, nearest=None, similarity_2=None, nearest_2=None
    )
    assert entered(nothing, off)[0].keep
    for name in ("similarity_limit", "agreement_least", "twin_limit", "contrast_limit"):
        with pytest.raises(AssertionError):
            inspect(nothing, THRESHOLDS | {name: NAN})
    with pytest.raises(AssertionError):
        finalize([], [], [], THRESHOLDS | {"realism_limit": (1.0, NAN, 1.0)})


def test_nothing_is_kept_before_it_is_final() -> None:
    found = inspect(candidates(4), THRESHOLDS)
    assert {(f.keep, f.reason) for f in found} == {(False, "not settled")}
    unsearched = finalize(found, ["q00"], (), THRESHOLDS)
    assert [f.reason for f in unsearched] == ["kept", "near twin", "near twin", "near twin"]
    assert np.isnan(unsearched[1].twin_similarity)


def test_of_near_duplicates_the_first_by_request_id_is_kept() -> None:
    p = candidates(6, arms=["guided"] * 5 + ["unguided"])
    pairs = [("q01", "q03", 0.8), ("q03", "q04", 0.6), ("q00", "q02", 0.49), ("q00", "q05", 1.0)]
    found = finalize(inspect(p, THRESHOLDS), p.request_ids, pairs, THRESHOLDS)
    assert [f.reason for f in found] == ["kept", "kept", "kept", "near twin", "near twin", "kept"]
    assert [f.twin for f in found] == ["", "", "", "q01", "q01", ""]
    assert [f.twin_similarity for f in found] == [-1, 0.8, -1, 0.8, 0.6, -1]


def test_a_rejected_picture_is_nobody_s_near_duplicate_and_takes_no_place() -> None:
    p = candidates(3, finite=[False, True, True], sources=["e"] * 3)
    limits = THRESHOLDS | {"quota": 1}
    found = finalize(inspect(p, limits), p.request_ids, [("q00", "q01", 1.0)], limits)
    assert [f.reason for f in found] == ["not finite", "kept", "over quota"]
    assert [f.place for f in found] == [0, 1, 2]


def test_quota_is_of_a_source_in_an_arm() -> None:
    p = candidates(
        8,
        sources=["e"] * 4 + ["f", None, None, None],
        arms=["guided", "guided", "guided", "replay"] + ["guided"] * 4,
    )
    assert [f.reason for f in entered(p)] == [
        "kept",
        "kept",
        "over quota",
        "kept",
        "kept",
        "kept",
        "kept",
        "kept",
    ]


def test_order_and_parts_make_no_difference() -> None:
    rng = np.random.default_rng(3)
    n = 60
    probs = rng.dirichlet(np.ones(K), n)
    p = candidates(
        n,
        probs=probs,
        similarity=rng.uniform(0, 0.5, n),
        ratio=rng.uniform(0, 2.4, n),
        sources=[f"e{i % 7}" for i in range(n)],
    )
    pairs = [(f"q{a:02d}", f"q{b:02d}", 0.7) for a, b in rng.choice(n, (30, 2)) if a != b]
    whole = finalize(inspect(p, THRESHOLDS), p.request_ids, pairs, THRESHOLDS)
    assert len({f.reason for f in whole}) >= 5
    order = rng.permutation(n)

    def rows(x: object, take: np.ndarray) -> object:
        return x[take] if isinstance(x, np.ndarray) else [x[i] for i in take]

    parts = [
        Candidates(*(rows(x, take) for x in vars(p).values())) for take in np.array_split(order, 4)
    ]
    again = finalize(
        [f for part in parts for f in inspect(part, THRESHOLDS)],
        order_ids(p, order),
        pairs[::-1],
        THRESHOLDS,
    )
    assert sorted(map(repr, again)) == sorted(map(repr, whole))


def order_ids(p: Candidates, order: np.ndarray) -> list[str]:
    return [p.request_ids[i] for i in order]


def test_acceptance_counts_every_image_once() -> None:
    p = candidates(
        4,
        similarity=np.array([0.1, 0.1, 0.9, 0.1]),
        finite=[True, True, True, False],
        labels=[1, 1, 1, 0],
    )
    assert acceptance(entered(p), ["a", "b", "c"]) == {
        "guided": {
            "a": {"generated": 1, "accepted": 0, "rejected": {"not finite": 1}},
            "b": {"generated": 3, "accepted": 2, "rejected": {"near copy": 1}},
            "c": {"generated": 0, "accepted": 0, "rejected": {}},
        }
    }


def test_rows_must_match() -> None:
    with pytest.raises(AssertionError):
        inspect(candidates(2, labels=[1]), THRESHOLDS)


def test_acceptance_by_arm_class_strategy_and_reason() -> None:
    p = candidates(
        4,
        strategies=["img2img", "sample", "img2img", "img2img"],
        similarity=np.array([0.1, 0.1, 0.9, 0.1]),
        labels=[1, 1, 1, 0],
    )
    assert acceptance_by_strategy(entered(p), ["a", "b", "c"]) == {
        "guided": {
            "a": {"img2img": {"generated": 1, "accepted": 1, "rejected": {}}},
            "b": {
                "sample": {"generated": 1, "accepted": 1, "rejected": {}},
                "img2img": {"generated": 2, "accepted": 1, "rejected": {"near copy": 1}},
            },
        }
    }
