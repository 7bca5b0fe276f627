from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adversa.diffuse.guidance import (
    Answer,
    GuidedFn,
    classifier_free,
    classifier_gradient,
    gradient_guided,
    low_frequencies,
    masked,
    objective,
    padded,
    reference_gradient,
    reference_guided,
    rms,
)
from adversa.diffuse.solver import advance, heun, karras_sigmas

NULL = 2
X = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])
LABEL = torch.tensor([0, 1, 0, 1, 0])


class Counter:
    """An affine denoiser, different for every label; notes how many rows each call had."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        self.calls.append(len(x))
        return (x * 0.3 + label.float().view(-1, 1, 1, 1)) / (1 + sigma.view(-1, 1, 1, 1))


def flags(*rows: int) -> Tensor:
    return torch.tensor([i in rows for i in range(5)])


def test_a_rows_size_does_not_hang_on_how_many_there_are() -> None:
    x = torch.randn(20, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(rms(x), torch.cat([rms(r[None]) for r in x])) and torch.equal(
            rms(x)[3:14], rms(x[3:14])
        )
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(rms(x), x.square().mean((1, 2, 3)).sqrt())


def test_equation_and_rows() -> None:
    model, scale = Counter(), torch.tensor([3.0, 1.0, 3.0, 3.0, 0.0])
    conditional, null = model(X, SIGMA, LABEL), model(X, SIGMA, torch.full_like(LABEL, NULL))
    model.calls = []
    answer = classifier_free(model, scale, flags(0, 1, 4), NULL)(X, SIGMA, LABEL)
    assert model.calls == [8]  # one call: five rows, and three of them again
    torch.testing.assert_close(answer.x0[0], null[0] + 3 * (conditional[0] - null[0]))
    for row in (
        1,
        2,
        3,
    ):  # at scale 1, and without a second pass: the conditional answer to the bit
        assert torch.equal(answer.x0[row], conditional[row])
    torch.testing.assert_close(answer.x0[4], null[4])
    torch.testing.assert_close(answer.unit[[0, 1, 4]], rms(conditional - null)[[0, 1, 4]])
    assert answer.unit[[2, 3]].tolist() == [0, 0]


def test_without_a_second_pass_it_is_the_denoiser_bit_for_bit() -> None:
    model = Counter()
    answer = classifier_free(model, torch.ones(5), flags(), NULL)(X, SIGMA, LABEL)
    assert model.calls == [5] and torch.equal(answer.x0, model(X, SIGMA, LABEL))


def test_a_weaker_denoiser_takes_the_place_of_the_null_class() -> None:
    model, weak = Counter(), Counter()
    worse = torch.tensor(0.9)
    answer = classifier_free(
        model, torch.full((5,), 2.0), flags(1, 3), NULL, lambda x, s, y: worse * weak(x, s, y)
    )(X, SIGMA, LABEL)
    assert model.calls == [5] and weak.calls == [2]
    good = model(X, SIGMA, LABEL)
    torch.testing.assert_close(answer.x0[1], 0.9 * good[1] + 2 * (good[1] - 0.9 * good[1]))
    assert torch.equal(answer.x0[0], good[0])


def plain(x0: Tensor, unit: float = 1.0) -> GuidedFn:
    return lambda x, sigma, label: Answer(x0.clone(), torch.full((len(x),), unit))


def test_steering_towards_a_log_linear_classifier_is_the_closed_form() -> None:
    """ln p[label] = a_label x + const: its gradient is a_label wherever it is taken."""
    weights = torch.randn(2, 3 * 16, generator=torch.Generator().manual_seed(1))

    def classifier(pixels: Tensor) -> Tensor:  # two classes whose margin is linear in the pixels
        return pixels.flatten(1) @ weights.T

    strength, skipped = torch.tensor([0.5, 0.0, 2.0, 0.0, 1.0]), torch.zeros(5, dtype=torch.int64)
    answer = gradient_guided(
        plain(X, 0.7), classifier_gradient(classifier, lambda z: z, "margin"), strength, skipped
    )(X, SIGMA, LABEL)
    a = torch.stack([weights[1 - y] - weights[y] for y in LABEL]).view_as(X)
    expected = X + (0.7 * strength / rms(a)).view(-1, 1, 1, 1) * a
    torch.testing.assert_close(answer.x0, expected)
    for row in (1, 3):  # strength 0: to the bit
        assert torch.equal(answer.x0[row], X[row])
    assert skipped.sum() == 0


def test_with_the_posterior_variance_as_its_length_the_ode_ends_at_the_tilted_gaussian() -> None:
    """Data N(0, s^2), classifier ln p = a x: p(x0 | y) is N(s^2 a, s^2), and E[x0 | x, y] = E[x0 |
    x] + var(x0 | x) a exactly.
    """
    spread, a = 0.5, 0.8
    x = 20 * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(2))

    def ideal(x: Tensor, sigma: Tensor, label: Tensor) -> Answer:
        s = sigma.view(-1, 1, 1, 1)
        return Answer(spread**2 / (spread**2 + s**2) * x, torch.zeros(len(x)))

    def length(answer: Answer, sigma: Tensor) -> Tensor:
        return a * spread**2 * sigma**2 / (spread**2 + sigma**2)

    guided = gradient_guided(
        ideal,
        lambda x0, y, rows: torch.full_like(x0, a),
        torch.ones(2),
        torch.zeros(2, dtype=torch.int64),
        length,
    )
    plan, memory, point = heun(karras_sigmas(20.0, 0.002, 7.0, 120)), torch.zeros_like(x), x
    for sigma, combine in zip(plan.sigma, plan.combine, strict=True):
        x0 = guided(point, torch.full((2,), float(sigma)), torch.zeros(2, dtype=torch.int64)).x0
        point, memory = advance(
            point, memory, x0, torch.tensor(combine, dtype=torch.float32).repeat(2, 1)
        )
    ratio = (
        spread / (spread**2 + 20.0**2) ** 0.5
    )  # deviations from the tilted mean shrink with the spread
    torch.testing.assert_close(
        point, spread**2 * a + (x - spread**2 * a) * ratio, atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad: float) -> None:
    def gradient(x0: Tensor, label: Tensor, rows: Tensor) -> Tensor:
        g = torch.ones_like(x0)
        g[rows == 2] = bad
        return g

    skipped = torch.zeros(5, dtype=torch.int64)
    answer = gradient_guided(plain(X), gradient, torch.ones(5), skipped)(X, SIGMA, LABEL)
    assert (
        skipped.tolist() == [0, 0, 1, 0, 0]
        and torch.equal(answer.x0[2], X[2])
        and not torch.equal(answer.x0[1], X[1])
    )


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_length_of_a_push_does_not_hang_on_the_gradients_own(size: float) -> None:
    g = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(3))
    answer = gradient_guided(
        plain(X, 0.5),
        lambda x0, y, r: size * g.expand_as(x0),
        torch.ones(5),
        torch.zeros(5, dtype=torch.int64),
    )(X, SIGMA, LABEL)
    torch.testing.assert_close(rms(answer.x0 - X), torch.full((5,), 0.5), rtol=1e-4, atol=0)


def test_a_gradient_of_zero_changes_nothing_and_is_no_fault() -> None:
    skipped = torch.zeros(5, dtype=torch.int64)
    answer = gradient_guided(
        plain(X), lambda x0, y, r: torch.zeros_like(x0), torch.ones(5), skipped
    )(X, SIGMA, LABEL)
    assert torch.equal(answer.x0, X) and skipped.sum() == 0


def test_steering_passes_have_one_shape() -> None:
    seen = []

    def gradient(x0: Tensor, label: Tensor, rows: Tensor) -> Tensor:
        seen.append(len(x0))
        return torch.ones_like(x0)

    for strength in (torch.ones(5), torch.tensor([0.0, 1, 0, 0, 0])):
        gradient_guided(plain(X), gradient, strength, torch.zeros(5, dtype=torch.int64))(
            X, SIGMA, LABEL
        )
    assert set(seen) == {8}


@pytest.mark.parametrize("kind", ["loss", "entropy", "margin"])
def test_objectives_by_hand(kind: str) -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.0, 0.0]])
    label = torch.tensor([0, 2])
    p = logits.softmax(1)
    expected = {
        "loss": -p[[0, 1], label].log(),
        "entropy": -(p * p.log()).sum(1),
        "margin": torch.tensor([-1.0, 0.0]),
    }[kind]
    torch.testing.assert_close(objective(logits, label, kind), expected)


@pytest.mark.parametrize("kind", ["loss", "entropy", "margin"])
def test_classifier_guidance_raises_its_objective(kind: str) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    )
    gradient = classifier_gradient(net, lambda z: (z + 1) / 2, kind)
    before = objective(net((X + 1) / 2), LABEL, kind)
    answer = gradient_guided(
        plain(X, 0.05), gradient, torch.ones(5), torch.zeros(5, dtype=torch.int64)
    )(X, SIGMA, LABEL)
    assert (objective(net((answer.x0 + 1) / 2), LABEL, kind) > before).all()
    assert all(p.grad is None for p in net.parameters())


def test_resemblance_moves_towards_the_features_of_the_rows_own_goal() -> None:
    references = torch.randn(5, 48, generator=torch.Generator().manual_seed(4))
    answer = gradient_guided(
        plain(X, 0.1),
        reference_gradient(lambda p: p.flatten(1), lambda z: z, references),
        flags(1, 4).float(),
        torch.zeros(5).long(),
    )(X, SIGMA, LABEL)
    moved, way = answer.x0 - X, references.view_as(X) - X
    for row in (1, 4):
        torch.testing.assert_close(
            moved[row] / rms(moved)[row], way[row] / rms(way)[row], atol=1e-5, rtol=0
        )
    assert torch.equal(answer.x0[0], X[0])


def test_reference_guidance_at_one_has_the_references_low_frequencies() -> None:
    reference = torch.randn(5, 3, 4, 4)
    answer = reference_guided(plain(X), reference, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5]), 4)(
        X, SIGMA, LABEL
    )
    torch.testing.assert_close(answer.x0[0].mean((1, 2)), reference[0].mean((1, 2)))
    torch.testing.assert_close(answer.x0[4].mean((1, 2)), (reference[4] + X[4]).mean((1, 2)) / 2)
    assert torch.equal(answer.x0[1], X[1])
    flat = torch.full((1, 3, 6, 6), 0.25)
    torch.testing.assert_close(low_frequencies(flat, 4), flat)


def test_kept_is_exact_where_known_and_where_generated() -> None:
    source, mask = torch.randn(5, 3, 4, 4), torch.rand(5, 1, 4, 4)
    mask[:, :, 0], mask[:, :, 3] = 0, 1
    x0 = masked(plain(X), source, mask)(X, SIGMA, LABEL).x0
    assert torch.equal(x0[:, :, 0], source[:, :, 0]) and torch.equal(x0[:, :, 3], X[:, :, 3])
    torch.testing.assert_close(x0, source + mask * (X - source))


def test_padded_asks_for_one_shape() -> None:
    model = Counter()
    assert torch.equal(
        padded(model, 8)(X, SIGMA, LABEL), Counter()(X, SIGMA, LABEL)
    ) and model.calls == [8]
    with pytest.raises(AssertionError):
        padded(model, 4)(X, SIGMA, LABEL)
