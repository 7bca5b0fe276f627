from __future__ import annotations

import torch

from adversa.classify.augment import affine, augment, colour, turn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 64, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=generator(9))


def test_the_generator_decides_all() -> None:
    x = pictures()
    torch.manual_seed(0)
    a = augment(x, generator(1))
    torch.manual_seed(1)
    assert torch.equal(a, augment(x, generator(1))) and not torch.equal(a, augment(x, generator(2)))


def test_shape_range_and_input_kept() -> None:
    x = pictures()
    before = x.clone()
    y = augment(x, generator())
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1 and torch.equal(x, before)


def test_turn_gives_all_eight_symmetries_and_only_those() -> None:
    x = pictures(1).expand(400, -1, -1, -1)
    turns = [torch.rot90(x[0], k, (1, 2)) for k in range(4)]
    symmetries = turns + [t.flip(2) for t in turns]
    counts = [sum(torch.equal(y, s) for y in turn(x, generator())) for s in symmetries]
    assert sum(counts) == 400 and min(counts) > 25


def test_affine_keeps_a_flat_picture_and_the_mean() -> None:
    flat = torch.full((8, 3, 16, 16), 0.3)
    assert torch.allclose(affine(flat, generator()), flat, atol=1e-5)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    disc = ((x - 15.5) ** 2 + (y - 15.5) ** 2 < 64).float().expand(256, 3, 32, 32)
    moved = affine(disc, generator())
    area = moved.mean((1, 2, 3)) / disc[0].mean()
    assert 0.6 < area.min() < 0.85 and 1.15 < area.max() < 1.6  # exp(+-2 * 0.15)


def test_colour_changes_each_picture_as_a_whole() -> None:
    flat = torch.full((256, 3, 8, 8), 0.5)
    y = colour(flat, generator())
    assert torch.allclose(y.amax((2, 3)), y.amin((2, 3)), atol=1e-5)
    level = y.mean((1, 2, 3))
    assert 0.4 < level.min() < 0.45 and 0.55 < level.max() < 0.6
