from __future__ import annotations

import torch
from torch import Tensor

from adversa.diffuse.guidance import classifier_free

NULL = 2


class Counter:
    """An affine denoiser, different for every label; counts its passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        self.passes += 1
        return (x * 0.3 + label.float().view(-1, 1, 1, 1)) / (1 + sigma.view(-1, 1, 1, 1))


def test_equation_interval_and_rows() -> None:
    model = Counter()
    x, label = torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 0, 1, 0])
    scale = torch.tensor([3.0, 1.0, 3.0, 3.0, 0.0])
    sigma = torch.tensor([1.0, 1.0, 0.1, 20.0, 1.0])  # inside, inside at scale 1, below, above, inside at scale 0
    conditional, null = model(x, sigma, label), model(x, sigma, torch.full_like(label, NULL))
    model.passes = 0
    out = classifier_free(model, scale, NULL, 0.2, 10.0)(x, sigma, label)
    assert model.passes == 2
    torch.testing.assert_close(out[0], null[0] + 3 * (conditional[0] - null[0]))
    for row in (1, 2, 3):
        assert torch.equal(out[row], conditional[row])
    assert torch.equal(out[4], null[4])


def test_scale_one_is_unguided_bit_for_bit_and_costs_one_pass() -> None:
    model = Counter()
    x, sigma, label = torch.randn(3, 3, 4, 4), torch.full((3,), 1.0), torch.tensor([0, 1, 0])
    out = classifier_free(model, torch.ones(3), NULL, 0.2, 10.0)(x, sigma, label)
    assert model.passes == 1 and torch.equal(out, model(x, sigma, label))


def test_no_second_pass_outside_the_interval() -> None:
    model = Counter()
    guided = classifier_free(model, torch.full((2,), 4.0), NULL, 0.2, 10.0)
    guided(torch.randn(2, 3, 4, 4), torch.tensor([0.2, 10.1]), torch.tensor([0, 1]))
    assert model.passes == 1
    guided(torch.randn(2, 3, 4, 4), torch.tensor([0.2, 10.0]), torch.tensor([0, 1]))
    assert model.passes == 3
