from __future__ import annotations

import numpy as np
import pytest

from adversa.config import Curate
from adversa.curate.gate import REASONS, acceptance, verdicts
from adversa.types import Verdict

GOOD = [0.2, 0.7, 0.1]


def judge(probs: object = (GOOD,), finite: bool = True, similarity: float = 0.5, threshold: float = 0.9, label: int = 1) -> Verdict:
    (verdict,) = verdicts(
        ["q"], ["guided"], [label], [finite], np.zeros((1, 8, 8, 3), np.uint8),
        None if probs is None else np.array(probs, np.float32), np.array([similarity]), ["real"],
        Curate(min_agreement=0.2), threshold,
    )  # fmt: skip
    return verdict


def test_a_good_image_is_kept() -> None:
    v = judge()
    assert (v.keep, v.reason, v.nearest, v.similarity, v.arm, v.label) == (True, "kept", "real", 0.5, "guided", 1)
    assert v.agreement == pytest.approx(0.7)


def test_reasons_are_exactly_these() -> None:
    assert REASONS == ("kept", "not painted", "not finite", "judge disagrees", "near copy")
    assert judge(finite=False).reason == "not finite"
    assert judge(label=2).reason == "judge disagrees"
    assert judge(similarity=0.95).reason == "near copy"
    assert not any(v.keep for v in (judge(finite=False), judge(label=2), judge(similarity=0.95)))


def test_the_first_reason_that_holds_is_given() -> None:
    assert judge(finite=False, label=2, similarity=1).reason == "not finite"
    assert judge(label=2, similarity=1).reason == "judge disagrees"


def test_the_limits_belong_to_the_stated_side() -> None:
    assert judge([[0.125, 0.25, 0.625]]).keep
    assert judge(similarity=0.9).reason == "near copy"
    assert judge(similarity=np.nextafter(0.9, 0)).keep


@pytest.mark.parametrize(
    "probs", [None, [[np.nan] * 3], [[0.3, np.inf, 0.1]], [[0.0, 0.0, 0.0]], [[-0.5, 1.0, 0.5]], [[9.0, 8, 7]]]
)
def test_no_judge_no_entry(probs: object) -> None:
    v = judge(probs)
    assert (v.keep, v.reason, v.agreement) == (False, "judge disagrees", 0.0)


def test_an_unknown_similarity_is_a_near_copy() -> None:
    v = judge(similarity=float("nan"))
    assert (v.keep, v.reason, v.similarity) == (False, "near copy", 1.0)


def test_rows_must_match() -> None:
    with pytest.raises(AssertionError):
        images = np.zeros((1, 8, 8, 3), np.uint8)
        verdicts(["q", "r"], ["guided"], [1], [True], images, None, np.zeros(1), ["x"], Curate(), 0.9)
    with pytest.raises(AssertionError):
        judge(threshold=float("nan"))


def test_acceptance_counts_every_image_once() -> None:
    found = [judge(), judge(), judge(similarity=1), judge(finite=False), judge([[0.9, 0.05, 0.05]], label=0)]
    assert acceptance(found, ["a", "b", "c"]) == {
        "guided": {
            "a": {"generated": 1, "accepted": 1, "rejected": {}},
            "b": {"generated": 4, "accepted": 2, "rejected": {"not finite": 1, "near copy": 1}},
            "c": {"generated": 0, "accepted": 0, "rejected": {}},
        }
    }
