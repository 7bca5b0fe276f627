from __future__ import annotations

import pytest
import torch

from adversa.classify.mixing import mix
from adversa.types import share_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(n: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i is flat at i, target i is its own class: what a mixed row is made of can be read off
    both.
    """
    return torch.arange(float(n))[:, None, None, None].expand(
        n, 3, size, size
    ).contiguous(), torch.eye(n)


@pytest.mark.parametrize("kinds", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_targets_keep_their_mass_and_say_what_is_in_the_image(kinds: tuple[float, float]) -> None:
    x, t = numbered(64)
    y, mixed = mix(x, t, *kinds, generator())
    assert torch.allclose(mixed.sum(1), torch.ones(64)) and mixed.min() >= 0
    assert torch.allclose(
        y.mean((1, 2, 3)), mixed @ torch.arange(64.0), atol=1e-4
    )  # the pixels' share is the target's
    rows = torch.arange(64)
    others = mixed.clone()
    others[rows, rows] = others[rows, rows ^ 1] = 0
    assert others.abs().max() == 0 and (mixed[rows, rows ^ 1] > 0).sum() > 32


def test_mixup_blends_and_cutmix_cuts() -> None:
    x, t = numbered(64)
    blended, _ = mix(x, t, 0.4, 0.0, generator())
    assert (blended.amax((1, 2, 3)) - blended.amin((1, 2, 3))).max() == 0
    cut, mixed = mix(x, t, 0.0, 1.0, generator())
    for i, (image, target) in enumerate(zip(cut, mixed, strict=True)):
        inside = image[0] == i ^ 1
        assert ((image[0] == i) | inside).all() and torch.equal(image[0], image[2])
        assert torch.equal(inside, inside.any(1)[:, None] & inside.any(0)[None])  # one box
        assert inside.float().mean().item() == pytest.approx(target[i ^ 1].item(), abs=1e-6)


def test_of_two_kinds_each_batch_gets_one() -> None:
    x, t = numbered(8)
    spread = [
        (y.amax((1, 2, 3)) - y.amin((1, 2, 3))).max().item()
        for y, _ in (mix(x, t, 1.0, 1.0, generator(s)) for s in range(60))
    ]
    assert 15 < sum(s > 0 for s in spread) < 45


def test_lambda_follows_the_beta_distribution() -> None:
    x, t = torch.zeros(4000, 1, 1, 1), torch.eye(2).repeat(2000, 1)
    for alpha in (0.2, 1.0):
        _, mixed = mix(x, t, alpha, 0.0, generator())
        own = (mixed * t).sum(1)
        assert own.mean().item() == pytest.approx(0.5, abs=0.03)
        assert own.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@pytest.mark.parametrize("kinds", [(0.4, 0.0), (0.0, 1.0)])
def test_the_workers_slices_are_the_whole_batch(kinds: tuple[float, float]) -> None:
    x, t = numbered(12)
    whole, targets = mix(x, t, *kinds, generator(4))
    for rows in (share_of(12, rank, world) for world in range(1, 7) for rank in range(world)):
        y, mixed = mix(x[rows], t[rows], *kinds, generator(4), 12, rows)
        assert torch.equal(y, whole[rows]) and torch.equal(mixed, targets[rows])
    for rows, alone in (
        (slice(0, 5), 4),
        (slice(5, 12), 5),
    ):  # cut between partners: these two stay as they are
        y, mixed = mix(x[rows], t[rows], *kinds, generator(4), 12, rows)
        assert torch.equal(y[alone - rows.start], x[alone]) and torch.equal(
            mixed[alone - rows.start], t[alone]
        )
        rest = [i for i in range(rows.start, rows.stop) if i != alone]
        assert torch.equal(y[[i - rows.start for i in rest]], whole[rest])


def test_a_last_row_without_a_partner_and_no_mixing_at_all() -> None:
    x, t = numbered(5)
    y, mixed = mix(x, t, 1.0, 0.0, generator())
    assert torch.equal(y[4], x[4]) and torch.equal(mixed[4], t[4])
    assert mix(x, t, 0.0, 0.0, generator())[0] is x
