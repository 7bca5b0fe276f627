from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from adversa.classify.augment import ERASED, augment, colour, erase, placement, rectangles, warp
from adversa.common.symmetry import symmetry, turn
from adversa.config import Augment

OFF = Augment(
    flips=False, rotate=0, zoom=0, shift=0, brightness=0, contrast=0, saturation=0, tint=0, erase=0
)
ALL_ON = Augment(rotate=180, erase=0.5)


def only(**strengths: object) -> Augment:
    return OFF.model_copy(update=strengths)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 64, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=generator(9))


def test_the_generator_decides_all() -> None:
    x = pictures()
    torch.manual_seed(0)
    a = augment(x, ALL_ON, generator(1))
    torch.manual_seed(1)
    assert torch.equal(a, augment(x, ALL_ON, generator(1))) and not torch.equal(
        a, augment(x, ALL_ON, generator(2))
    )


@pytest.mark.parametrize(
    "config",
    [Augment(), ALL_ON, only(flips=True), only(brightness=0.9, contrast=0.9), only(erase=1.0)],
)
def test_shape_range_layout_and_input_kept(config: Augment) -> None:
    x = pictures()
    before = x.clone()
    y = augment(x, config, generator())
    assert (
        y.shape == x.shape
        and y.min() >= 0
        and y.max() <= 1
        and torch.equal(x, before)
        and not torch.equal(x, y)
    )
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_nothing_asked_is_nothing_done() -> None:
    x = pictures()
    assert torch.equal(augment(x, OFF, generator()), x)


def test_an_image_is_changed_alike_on_however_many_workers() -> None:
    x = pictures(9)
    whole = augment(x, ALL_ON, generator(3))
    for rows in (slice(0, 4), slice(4, 9)):
        assert torch.allclose(
            augment(x[rows], ALL_ON, generator(3), 9, rows), whole[rows], atol=1e-6
        )


def test_one_kind_does_not_move_the_draws_of_another() -> None:
    x = pictures()
    turned = augment(x, only(flips=True), generator(5))
    assert torch.equal(
        augment(turned, only(brightness=0.3), generator(5)),
        augment(x, only(flips=True, brightness=0.3), generator(5)),
    )


def test_turn_gives_all_eight_symmetries_and_only_those() -> None:
    x = pictures(1)
    turns = [torch.rot90(x[0], k, (1, 2)) for k in range(4)]
    symmetries = turns + [t.flip(2) for t in turns]
    found = [symmetry(x, k)[0] for k in range(8)]
    assert sorted(sum(torch.equal(f, s) for f in found) for s in symmetries) == [1] * 8
    assert torch.equal(found[0], x[0]) and torch.equal(found[1], x[0].flip(2))
    drawn = augment(x.expand(400, -1, -1, -1), only(flips=True), generator())
    counts = [sum(torch.equal(y, s) for y in drawn) for s in symmetries]
    assert sum(counts) == 400 and min(counts) > 25


def test_the_resampling_does_the_symmetry_too() -> None:
    x, u = pictures(), torch.rand(4, 64, generator=generator(1))
    which = torch.arange(64) % 8
    moved = warp(x, placement(Augment(), u, None), x.shape[-1])
    assert torch.allclose(
        warp(x, placement(Augment(), u, which), x.shape[-1]), turn(moved, which), atol=1e-5
    )
    assert torch.allclose(warp(x, placement(OFF, u, which), x.shape[-1]), turn(x, which), atol=1e-5)


def test_placement_reaches_the_strengths_asked_for() -> None:
    u = torch.stack([torch.zeros(4), torch.full((4,), 1.0)], 1)
    low, high = placement(only(rotate=90), u, None)
    assert torch.allclose(low, torch.tensor([[0.0, 1, 0], [-1, 0, 0]]), atol=1e-6)
    assert torch.allclose(high, torch.tensor([[0.0, -1, 0], [1, 0, 0]]), atol=1e-6)
    assert placement(only(zoom=0.5), u, None)[:, 0, 0].tolist() == pytest.approx(
        [math.exp(-0.5), math.exp(0.5)]
    )
    assert placement(only(shift=0.1), u, None)[:, :, 2].tolist() == [
        pytest.approx([-0.2] * 2),
        pytest.approx([0.2] * 2),
    ]


def test_any_angle_comes_up() -> None:
    u = torch.rand(4, 2000, generator=generator())
    theta = placement(only(rotate=180), u, None)
    angles = torch.atan2(theta[:, 1, 0], theta[:, 0, 0])
    counts = torch.histc(angles, 12, -math.pi, math.pi)
    assert counts.min() > 110 and torch.allclose(theta[:, :, :2].det(), torch.ones(2000), atol=1e-5)


def test_warp_keeps_a_flat_picture_and_scales_areas() -> None:
    flat = torch.full((8, 3, 16, 16), 0.3)
    assert torch.allclose(
        augment(flat, only(rotate=180, zoom=0.15, shift=0.06), generator()), flat, atol=1e-5
    )
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    disc = ((x - 15.5) ** 2 + (y - 15.5) ** 2 < 64).float().expand(256, 3, 32, 32)
    area = (
        augment(disc, only(rotate=20, zoom=0.15, shift=0.06), generator()).mean((1, 2, 3))
        / disc[0].mean()
    )
    assert 0.6 < area.min() < 0.85 and 1.15 < area.max() < 1.6  # exp(+-2 * 0.15)


def test_colour_is_its_steps_one_after_the_other() -> None:
    x, config = pictures() * 0.3 + 0.35, Augment()  # nothing leaves [0, 1], which would be clipped
    u = torch.rand(6, 64, generator=generator(2))
    v = (2 * u - 1)[:, :, None, None, None]
    gain = (1 + config.brightness * v[0]) * (1 + config.tint * torch.cat([v[1], v[2], v[3]], 1))
    y = x * gain
    y = torch.lerp(y.mean((1, 2, 3), keepdim=True), y, 1 + config.contrast * v[4])
    y = torch.lerp(y.mean(1, keepdim=True), y, 1 + config.saturation * v[5])
    assert torch.allclose(colour(x, config, u), y, atol=1e-5)
    assert torch.allclose(
        colour(x.contiguous(memory_format=torch.channels_last), config, u), y, atol=1e-5
    )


def test_colour_changes_each_picture_as_a_whole_within_its_strength() -> None:
    flat = torch.full((256, 3, 8, 8), 0.5)
    y = augment(flat, only(brightness=0.15), generator())
    assert torch.allclose(y.amax((2, 3)), y.amin((2, 3)), atol=1e-5)
    level = y.mean((1, 2, 3))
    assert 0.425 - 1e-5 <= level.min() < 0.43 and 0.57 < level.max() <= 0.575 + 1e-5
    tinted = augment(flat, only(tint=0.04), generator())
    assert (tinted.amax((1, 2, 3)) - tinted.amin((1, 2, 3))).max() > 0.02 and abs(
        tinted - 0.5
    ).max() <= 0.02 + 1e-5


def test_erasing_takes_rectangles_of_the_published_sizes_as_often_as_asked() -> None:
    x = torch.full((4000, 3, 32, 32), 2.0)  # no colour is 2
    y = erase(x, 0.3, torch.rand(8, 4000, generator=generator()))
    gone = (y != 2).all(1)
    hit = gone.flatten(1).any(1)
    assert hit.float().mean() == pytest.approx(0.3, abs=0.02)
    share = gone[hit].float().mean((1, 2))
    assert share.min() > 0.8 * ERASED[0] and share.max() < 1.1 * ERASED[1]  # rounding to pixels
    assert share.mean().item() == pytest.approx(sum(ERASED) / 2, abs=0.01)
    rows, columns = gone[hit].any(2), gone[hit].any(1)
    assert torch.equal(
        gone[hit], rows[:, :, None] & columns[:, None, :]
    )  # a rectangle, and a full one
    ratio = rows.sum(1) / columns.sum(1)
    assert ratio.min() < 0.4 and ratio.max() > 2.5 and ratio.min() > 0.25 and ratio.max() < 4
    everywhere = gone[hit].float().mean(0)
    assert everywhere.min() > 0 and everywhere[12:20, 12:20].mean() > everywhere[0, 0]
    inside = y[hit].flatten(2)
    assert (
        inside.masked_fill(inside == 2, 0).amax(2) - inside.amin(2)
    ).max() < 1e-6  # one colour a rectangle
    assert torch.equal(erase(x, 0.0, torch.rand(8, 4000, generator=generator())), x)


def test_rectangles_are_half_open() -> None:
    one = torch.tensor
    mask = rectangles(one([1, 2]), one([3, 2]), one([0, 0]), one([2, 4]), 4)
    assert (
        mask[0, 0].int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
        and not mask[1].any()
    )


def test_a_smaller_side_shows_the_same_picture() -> None:
    """Progressive resizing: every second pixel of a smooth picture, whatever the other
    strengths.
    """
    ramp = torch.linspace(0, 1, 64)
    x = torch.stack(
        [ramp[None].expand(64, 64), ramp[:, None].expand(64, 64), (ramp[None] + ramp[:, None]) / 2]
    )[None]
    small = augment(x, OFF, generator(), side=32)
    assert small.shape == (1, 3, 32, 32)
    assert torch.allclose(small, F.avg_pool2d(x, 2), atol=1e-5)
    large, small = augment(x, Augment(), generator(3)), augment(x, Augment(), generator(3), side=48)
    assert torch.allclose(
        F.interpolate(large, (48, 48), mode="bilinear", antialias=True), small, atol=0.03
    )
