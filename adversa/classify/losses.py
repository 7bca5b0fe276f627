"""What training minimises: cross-entropy on soft targets, corrected for the long tail in one of two
ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adversa.config import Classifier

# (logits [B, K], targets [B, K] whose rows add up to 1, not smoothed) -> loss of each row [B]
Loss = Callable[[Tensor, Tensor], Tensor]
# of a class that is never drawn: its logit stays finite, and so does the loss of smoothed labels
LEAST_PRIOR = 1e-6


def make_loss(
    config: Classifier,
    counts: Sequence[float] | None,
    priors: Sequence[float] | None,
    device: torch.device | str = "cpu",
) -> Loss:
    """The loss of a training. counts [K]: each class's weight in the training set; priors [K]: its
    share of the draws.

    logit_adjusted adds tau log(prior) to the logits, here and nowhere else, so that the plain
    logits that are scored rank the classes as if all were equally frequent (Menon et al. 2021,
    equation 10). effective_number multiplies a row's loss by its class's weight; a mixed row has
    the mixed weight. Label smoothing comes after mixing: both are linear, so their order is the
    same to the targets.
    """
    offset = weight = None
    if config.loss == "logit_adjusted":
        assert priors is not None, "the logit-adjusted loss needs the priors"
        shares = np.maximum(np.asarray(priors, np.float64) / np.sum(priors), LEAST_PRIOR)
        offset = torch.tensor(config.adjust * np.log(shares), dtype=torch.float32, device=device)
    elif config.loss == "effective_number":
        assert counts is not None and priors is not None, (
            "effective numbers need the counts and the priors"
        )
        weight = torch.tensor(
            effective_weights(counts, priors, config.effective_beta),
            dtype=torch.float32,
            device=device,
        )

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float() if offset is None else logits.float() + offset
        smoothed = torch.lerp(
            targets, torch.full_like(targets, 1 / targets.shape[1]), config.label_smoothing
        )
        losses = F.cross_entropy(logits, smoothed, reduction="none")
        return losses if weight is None else losses * (targets @ weight)

    return loss


def effective_weights(counts: Sequence[float], priors: Sequence[float], beta: float) -> np.ndarray:
    """Weights under which rows drawn with the shares `priors` have the expected loss of Cui et al.
    2019, equation 6.

    There rows come as they are, n_k of a class, and weigh (1 - beta) / (1 - beta^n_k). Drawn q_k of
    the time they weigh that times n_k / q_k: without it balanced draws would be corrected for a
    tail they no longer have. beta 0 undoes the balance. Scaled so that a row weighs 1 on average,
    with one scale for the run: scaled within each batch, a row's weight would depend on its
    neighbours. 0 for a class with no image.
    """
    n, drawn = np.asarray(counts, np.float64), np.asarray(priors, np.float64) / np.sum(priors)
    there = (n > 0) & (drawn > 0)
    weights = np.zeros_like(n)
    weights[there] = (1 - beta) / (1 - np.power(beta, n[there])) * n[there] / drawn[there]
    found: np.ndarray = weights / (drawn @ weights)
    return found
