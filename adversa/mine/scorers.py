"""How hard an image is, in several senses with one signature: evidence in, one float64 score an
image out, higher is harder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from adversa.types import Floats, UserError


@dataclass(frozen=True)
class Evidence:
    """What M classifiers say of N images of K classes.

    labels: int [N]. logits: [M, N, K], finite, any float type; the ensemble's probability is the
    mean of its members'. history: bool [T, N], whether the image was classified correctly at T
    moments of a training, in their order; None: not recorded.
    """

    labels: np.ndarray
    logits: np.ndarray
    history: np.ndarray | None = None

    def __post_init__(self) -> None:
        m, n, k = self.logits.shape
        assert m >= 1 and k >= 2 and self.labels.shape == (n,), (
            self.logits.shape,
            self.labels.shape,
        )
        assert np.isfinite(self.logits).all(), "logits that are not finite reached mining"
        assert self.history is None or (self.history.ndim == 2 and self.history.shape[1] == n), (
            np.shape(self.history)
        )


Scorer = Callable[[Evidence], Floats]


def loss(evidence: Evidence) -> Floats:
    """-ln p[label], in nats."""
    found: Floats = -_mean_log_p(evidence)[np.arange(len(evidence.labels)), evidence.labels]
    return found


def margin(evidence: Evidence) -> Floats:
    """The largest other p minus p[label], in [-1, 1]: above 0 is wrong."""
    p, rows = np.exp(_mean_log_p(evidence)), np.arange(len(evidence.labels))
    own: Floats = p[rows, evidence.labels]
    p[rows, evidence.labels] = -1
    most: Floats = p.max(axis=1)
    return most - own


def entropy(evidence: Evidence) -> Floats:
    """-sum p ln p of the mean probability, in nats: all the doubt there is. Does not look at the
    label.
    """
    return _entropy(_mean_log_p(evidence))


def bald(evidence: Evidence) -> Floats:
    """Mutual information of prediction and model, in nats: the entropy of the mean minus the mean
    of the entropies.

    Houlsby et al. 2011; Gal, Islam and Ghahramani 2017. Large where members are sure and contradict
    each other, 0 where they all doubt alike: the part of the doubt that more data can remove. Does
    not look at the label. UserError with one member.
    """
    members = len(evidence.logits)
    if members < 2:
        raise UserError(
            f"scorer bald: {members} classifier; it measures how classifiers disagree: "
            "give two or more, or take loss"
        )
    own: Floats = _entropy(_log_p(evidence.logits)).mean(axis=0)
    return np.maximum(entropy(evidence) - own, 0)  # below 0 by rounding alone: entropy is concave


def forgetting(evidence: Evidence) -> Floats:
    """How often an image went from right to wrong between two moments (Toneva et al. 2019).
    UserError without a history.

    An image that was never right counts as forgotten at every moment (T), which is more than any
    other can reach: Toneva et al. take it as forgotten infinitely often.
    """
    if evidence.history is None:
        raise UserError(
            "scorer forgetting: no history of right and wrong was recorded in training; take loss"
        )
    right = np.asarray(evidence.history, bool)
    events = (right[:-1] & ~right[1:]).sum(axis=0)
    return np.where(right.any(axis=0), events, len(right)).astype(np.float64)


SCORERS: dict[str, Scorer] = {
    "loss": loss,
    "margin": margin,
    "entropy": entropy,
    "bald": bald,
    "forgetting": forgetting,
}


def scores(name: str, evidence: Evidence) -> Floats:
    """float64 [N] of the scorer called `name`. UserError for a name that is none, or for evidence
    that it needs and has not.
    """
    if name not in SCORERS:
        raise UserError(f"scorer {name}: no such scorer; take one of {', '.join(SCORERS)}")
    return SCORERS[name](evidence)


def _log_p(logits: np.ndarray) -> Floats:
    """In float64: at a logit lead of 20, 1 - p is 2e-9, which float32 rounds to 0."""
    found: Floats = log_softmax(np.asarray(logits, np.float64), axis=-1)
    return found


def _mean_log_p(evidence: Evidence) -> Floats:
    """float64 [N, K]: ln of the members' mean probability, by the largest member, so that a p of
    e^-1000 keeps its logarithm.
    """
    each = _log_p(evidence.logits)
    top: Floats = each.max(axis=0)
    mean: Floats = np.exp(each - top).mean(axis=0)
    return top + np.log(mean)


def _entropy(log_p: Floats) -> Floats:
    total: Floats = (np.exp(log_p) * log_p).sum(axis=-1)
    return -total
