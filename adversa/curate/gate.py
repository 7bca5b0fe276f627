"""A verdict for each synthetic image: may it enter training, and if not, why not.

It fails closed: an image about which something is unknown is rejected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from adversa.config import Curate
from adversa.types import Verdict

KEPT, NOT_PAINTED, NOT_FINITE, DISAGREES, NEAR_COPY = REASONS = (
    "kept", "not painted", "not finite", "judge disagrees", "near copy",
)  # fmt: skip


def verdicts(
    request_ids: Sequence[str],
    arms: Sequence[str],
    labels: Sequence[int],
    finite: Sequence[bool],
    images: np.ndarray,
    judge_probs: np.ndarray | None,
    similarity: np.ndarray,
    nearest: Sequence[str],
    config: Curate,
    threshold: float,
    faults: Sequence[str | None] | None = None,
) -> list[Verdict]:
    """One verdict for each of N images, in their order; the reason is the first of these that holds:

    - "not painted": the sampler failed at it every time (`faults` says how; None: at none);
    - "not finite": the sampler met a number that is not finite (`finite` false);
    - "judge disagrees": judge_probs [N, K] (None: there is no judge) gives the asked label less than
      config.min_agreement, or its row is no probability distribution;
    - "near copy": similarity [N] to a real image (`NearCopy.nearest`) is at least `threshold`, or not a number;
    - "kept".

    Images, uint8 [N, H, W, 3], are asked for so that nothing is judged without its picture; no pixel is read here.
    Where the judge gave no distribution, agreement is 0; where there is no similarity, it is 1.
    """
    n = len(request_ids)
    lengths = {len(x) for x in (arms, labels, finite, images, similarity, nearest)}
    assert lengths == {n} and (judge_probs is None or len(judge_probs) == n), (n, lengths)
    assert np.isfinite(threshold), threshold
    out = []
    for i in range(n):
        agreement = _agreement(None if judge_probs is None else np.asarray(judge_probs[i], np.float64), int(labels[i]))
        known = bool(np.isfinite(similarity[i]))
        if faults is not None and faults[i]:
            reason = NOT_PAINTED
        elif not finite[i]:
            reason = NOT_FINITE
        elif agreement is None or agreement < config.min_agreement:
            reason = DISAGREES
        elif not known or similarity[i] >= threshold:
            reason = NEAR_COPY
        else:
            reason = KEPT
        out.append(
            Verdict(
                request_id=request_ids[i],
                arm=arms[i],
                label=int(labels[i]),
                keep=reason == KEPT,
                reason=reason,
                agreement=0.0 if agreement is None else agreement,
                nearest=nearest[i],
                similarity=float(similarity[i]) if known else 1.0,
            )
        )
    return out


def acceptance(found: Iterable[Verdict], classes: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Counts {arm: {class name: {"generated": n, "accepted": n, "rejected": {reason: n}}}}.

    Arms are sorted, classes in the order of `classes` (indexed by a verdict's label). Every class appears under every
    arm that has a verdict, with zeros where nothing was painted.
    """
    found = list(found)
    counts: dict[str, dict[str, dict[str, Any]]] = {
        arm: {name: {"generated": 0, "accepted": 0, "rejected": {}} for name in classes} for arm in sorted({v.arm for v in found})
    }
    for v in sorted(found, key=lambda v: REASONS.index(v.reason)):
        row = counts[v.arm][classes[v.label]]
        row["generated"] += 1
        if v.keep:
            row["accepted"] += 1
        else:
            row["rejected"][v.reason] = row["rejected"].get(v.reason, 0) + 1
    return counts


def _agreement(row: np.ndarray | None, label: int) -> float | None:
    """p[label], or None where the row is no distribution (missing, not finite, negative, not adding up to 1)."""
    if row is None or not np.isfinite(row).all() or (row < 0).any() or abs(row.sum() - 1) > 1e-2:
        return None
    return float(row[label])
