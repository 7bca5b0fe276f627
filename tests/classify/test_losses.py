from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from adversa.classify.losses import effective_weights, make_loss
from adversa.config import Classifier


def drawn(n: int = 32, k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=g) * 2, torch.randint(k, (n,), generator=g)


def config(**changes: object) -> Classifier:
    return Classifier(**{"label_smoothing": 0.0, **changes})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    logits, labels = drawn()
    loss = make_loss(config(label_smoothing=smoothing), None, None)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    assert torch.allclose(loss(logits, F.one_hot(labels, 4).float()), expected, atol=1e-5)


def test_a_mixed_target_has_the_mixed_loss() -> None:
    logits, labels = drawn()
    for name in ("cross_entropy", "logit_adjusted"):
        loss = make_loss(config(loss=name, label_smoothing=0.1), [4, 3, 2, 1], [0.4, 0.3, 0.2, 0.1])
        a, b = F.one_hot(labels, 4).float(), F.one_hot((labels + 1) % 4, 4).float()
        assert torch.allclose(
            loss(logits, 0.3 * a + 0.7 * b),
            0.3 * loss(logits, a) + 0.7 * loss(logits, b),
            atol=1e-5,
        )


def test_logit_adjusted_is_menons_equation_10() -> None:
    # log(1 + sum over y' != y of (pi_y' / pi_y)^tau exp(f_y' - f_y))
    logits, labels = drawn()
    priors, tau = torch.tensor([0.7, 0.2, 0.09, 0.01]), 1.3
    loss = make_loss(
        config(loss="logit_adjusted", adjust=tau), None, (priors * 5).tolist()
    )  # scaled to shares
    for f, y, found in zip(
        logits, labels.tolist(), loss(logits, F.one_hot(labels, 4).float()), strict=True
    ):
        others = sum(
            (priors[k] / priors[y]) ** tau * torch.exp(f[k] - f[y]) for k in range(4) if k != y
        )
        assert found.item() == pytest.approx(math.log(1 + others), abs=1e-5)


def test_logit_adjustment_finds_the_balanced_bayes_rule() -> None:
    """Two classes N(-1, 1) and N(1, 1), 95% of the first: log odds are 2x + log(prior ratio), the
    balanced rule is x > 0.
    """
    rng = np.random.default_rng(0)
    labels = torch.from_numpy((rng.random(40_000) < 0.05).astype(np.int64))
    x = torch.from_numpy(rng.standard_normal(40_000)).float() + 2 * labels - 1
    targets, share = F.one_hot(labels, 2).float(), labels.float().mean().item()

    def threshold(name: str) -> float:
        loss = make_loss(config(loss=name), None, [1 - share, share])
        w = torch.zeros(2, requires_grad=True)  # slope and offset of the second logit
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(torch.stack([torch.zeros_like(x), w[0] * x + w[1]], 1), targets).mean()
            value.backward()
            return value

        optimizer.step(closure)
        assert w[0].item() == pytest.approx(2, abs=0.1)
        return -(w[1] / w[0]).item()

    assert threshold("logit_adjusted") == pytest.approx(0, abs=0.05)
    assert threshold("cross_entropy") == pytest.approx(math.log((1 - share) / share) / 2, abs=0.05)


def test_a_class_that_is_never_drawn_leaves_the_loss_finite() -> None:
    logits, labels = drawn()
    for name in ("logit_adjusted", "effective_number"):
        loss = make_loss(config(loss=name, label_smoothing=0.1), [5, 5, 5, 0], [0.5, 0.3, 0.2, 0])
        assert torch.isfinite(loss(logits, F.one_hot(labels % 3, 4).float())).all()


def test_effective_weights_by_the_formula() -> None:
    counts, priors, beta = [5000, 500, 50, 5], np.array([0.4, 0.3, 0.2, 0.1]), 0.999
    w = effective_weights(counts, priors, beta)
    raw = np.array([(1 - beta) / (1 - beta**n) for n in counts])
    plain = np.array(counts) / sum(counts)
    as_they_come = effective_weights(counts, plain, beta)
    assert np.allclose(
        as_they_come / as_they_come[0], raw / raw[0]
    ) and plain @ as_they_come == pytest.approx(1)
    assert np.allclose(
        priors * w, plain * as_they_come
    )  # however drawn, a class has the same share of the loss
    assert np.allclose(
        priors * effective_weights(counts, priors, 0.0), plain
    )  # beta 0: as they come
    limit = effective_weights(counts, priors, 1 - 1e-9)  # beta to 1: every class the same share
    assert np.allclose(limit * priors, 0.25, atol=1e-4)
    assert effective_weights([10, 0], [1.0, 0.0], beta).tolist() == [1.0, 0.0]


def test_a_row_has_its_classs_effective_weight_whatever_its_neighbours() -> None:
    logits, labels = drawn()
    counts, priors = [900, 90, 9, 1], [0.4, 0.3, 0.2, 0.1]
    targets = F.one_hot(labels, 4).float()
    loss = make_loss(config(loss="effective_number", label_smoothing=0.1), counts, priors)
    weights = torch.tensor(effective_weights(counts, priors, 0.999), dtype=torch.float32)
    plain = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    assert torch.allclose(loss(logits, targets), plain * weights[labels], atol=1e-4)
    assert torch.allclose(loss(logits[:1], targets[:1]), loss(logits, targets)[:1])
