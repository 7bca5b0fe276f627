"""The batch that is kept full, with denoisers that note what they were asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from adversa.diffuse.batch import Batch, BatchRow, Finished, Schedule
from adversa.diffuse.solver import SolverTable, dpmpp_2m, heun, karras_sigmas, solve

SHAPE, NULL = (1, 4, 4), 3


class Spy:
    """D(x; sigma, label): smooth, different for every label. seen: (sigma, label) of each call."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        self.seen.append((sigma.clone(), label.clone()))
        s = sigma.view(-1, 1, 1, 1)
        return torch.tanh((x + label.view(-1, 1, 1, 1)) / (1 + s)) * 0.5


def schedule(table: SolverTable, guided: int = 0, hard: float = 0.0) -> Schedule:
    """Guidance at scale 2 (and pushes of `hard`) in the first `guided` evaluations."""
    first = np.arange(len(table)) < guided
    return Schedule(table, np.where(first, 2.0, 1.0), first, first * hard, np.zeros(len(table)))


def row(
    key: int, steps: int, guided: int = 0, top: float = 10.0, solver=dpmpp_2m, **more: object
) -> BatchRow:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(key))
    return BatchRow(
        key,
        top * noise,
        schedule(solver(karras_sigmas(top, 0.05, 7.0, steps)), guided),
        key % 3,
        **more,
    )  # type: ignore[arg-type]


def batch(denoiser: object, size: int = 4, **more: object) -> Batch:
    return Batch(denoiser, SHAPE, size, NULL, torch.device("cpu"), **more)  # type: ignore[arg-type]


def alone(r: BatchRow) -> Tensor:
    """The row by the plain loop, guidance by its equation."""
    denoiser, i = Spy(), iter(range(10**6))

    def guided(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        c, at = denoiser(x, sigma, label), next(i)
        if not r.schedule.second[at]:
            return c
        u = denoiser(x, sigma, torch.full_like(label, NULL))
        return u + r.schedule.scale[at] * (c - u)

    return solve(guided, r.start[None].clone(), [r.schedule.table], torch.tensor([r.label]))[0]


MIXED = [(0, 6, 3), (1, 4, 0), (2, 9, 9), (3, 2, 1), (4, 5, 0), (5, 7, 2), (6, 3, 3)]


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("solver", [dpmpp_2m, heun])
def test_every_row_ends_where_the_plain_loop_does(size: int, solver) -> None:
    rows = [row(k, s, g, solver=solver) for k, s, g in MIXED]
    found = {f.key: f for f in batch(Spy(), size).run(iter(rows))}
    assert sorted(found) == list(range(7))
    for r in rows:
        torch.testing.assert_close(found[r.key].x0, alone(r), atol=1e-5, rtol=1e-5)
        assert found[r.key].evaluations == r.schedule.evaluations


def test_the_batch_is_full_until_there_is_nothing_left_to_ask_for() -> None:
    spy = Spy()
    rows = [row(k, 5 + k % 3, 2) for k in range(200)]
    b = batch(spy, 8)
    total = sum(r.schedule.evaluations for r in rows)
    list(b.run(iter(rows)))
    assert {len(s) for s, _ in spy.seen} == {8} and len(spy.seen) == b.steps and b.slots == total
    assert b.slots / (b.steps * 8) > 0.97


def test_a_row_without_a_second_pass_costs_one_evaluation() -> None:
    b = batch(Spy(), 2)
    (f,) = b.run(iter([row(0, 6)]))
    assert f.evaluations == 6
    (f,) = b.run(iter([row(0, 6, guided=4)]))
    assert f.evaluations == 10 and b.steps == 12


def test_rows_are_asked_for_when_there_is_room() -> None:
    asked = []

    def source():
        for k in range(6):
            asked.append(k)
            yield row(k, 3)

    b = batch(Spy(), 2)
    run = b.run(source())
    next(run)
    assert asked == [0, 1]
    next(run), next(run)
    assert asked == [0, 1, 2, 3]


def test_the_oldest_goes_first_and_none_starves() -> None:
    rows = [row(k, 4, 4) for k in range(6)]  # every evaluation takes two: two rows a step
    finished = [f.key for f in batch(Spy(), 4).run(iter(rows))]
    assert finished == [0, 1, 2, 3, 4, 5]


def test_a_row_is_the_same_to_the_bit_whatever_its_neighbours() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16)
    )

    def denoiser(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        return net(x / (1 + s) + label.view(-1, 1, 1, 1)).view_as(x).float()

    made = [(k, s, g) for k, s, g in MIXED]
    whole = {f.key: f.x0 for f in batch(denoiser, 8, amp=True).run(row(*m) for m in made)}
    backwards = {f.key: f.x0 for f in batch(denoiser, 8, amp=True).run(row(*m) for m in made[::-1])}
    for m in made:
        (f,) = batch(denoiser, 8, amp=True).run(iter([row(*m)]))
        assert torch.equal(f.x0, whole[m[0]]) and torch.equal(f.x0, backwards[m[0]])


def test_known_pixels_come_back_exactly_and_slots_are_clean_afterwards() -> None:
    source, mask = torch.full(SHAPE, 0.25), torch.zeros(1, 4, 4)
    mask[:, :2] = 1

    def rows():
        for k in range(5):
            r = row(k, 4, 2)
            if k % 2 == 0:
                r.source, r.mask, r.start = source, mask, source + r.start
            yield r

    found = {f.key: f.x0 for f in batch(Spy(), 2).run(rows())}
    for k, x0 in found.items():
        if k % 2 == 0:
            assert torch.equal(x0[:, 2:], source[:, 2:]) and not torch.equal(
                x0[:, :2], source[:, :2]
            )
        else:
            torch.testing.assert_close(x0, alone(row(k, 4, 2)), atol=1e-5, rtol=1e-5)


def test_what_was_kept_of_a_row_before_cannot_spoil_the_next() -> None:
    rows = [row(0, 4, 1), row(1, 4, 1), row(2, 4, 1)]
    rows[0].source, rows[0].mask = torch.full(SHAPE, float("nan")), torch.zeros(1, 4, 4)
    found = {f.key: f.x0 for f in batch(Spy(), 2).run(iter(rows))}
    assert found[0].isnan().all() and found[1].isfinite().all() and found[2].isfinite().all()


def test_a_row_may_be_followed_by_one_made_of_its_end() -> None:
    def then(end: Tensor) -> BatchRow:
        return BatchRow(0, end + 1, schedule(dpmpp_2m(karras_sigmas(1.0, 0.05, 7.0, 3))), 1)

    first = row(0, 4, then=then)
    (f,) = batch(Spy(), 2).run(iter([first]))
    torch.testing.assert_close(f.x0, alone(then(alone(row(0, 4)))), atol=1e-5, rtol=1e-5)
    assert f.evaluations == 7


def test_gradients_that_are_not_finite_are_counted_for_their_own_row() -> None:
    def gradient(x0: Tensor, label: Tensor, rows: Tensor) -> Tensor:
        g = torch.ones_like(x0)
        g[label == 1] = float("nan")
        return g

    def rows():
        for k in range(4):
            r = row(k, 5)
            yield BatchRow(
                k, r.start, schedule(r.schedule.table, guided=3, hard=0.5 if k else 0.0), k % 3
            )

    found: dict[int, Finished] = {f.key: f for f in batch(Spy(), 4, gradient=gradient).run(rows())}
    assert {k: f.skipped for k, f in found.items()} == {0: 0, 1: 3, 2: 0, 3: 0}
    assert all(f.x0.isfinite().all() for f in found.values())


def test_reference_guidance_pulls_each_row_to_its_own_reference() -> None:
    def made(k: int, like: float) -> BatchRow:
        r = row(k, 6)
        n = len(r.schedule.table)
        c = Schedule(r.schedule.table, np.ones(n), np.zeros(n, bool), np.zeros(n), np.full(n, like))
        return BatchRow(k, r.start, c, r.label, reference=torch.full(SHAPE, 0.1 * (k + 1)))

    found = {f.key: f.x0 for f in batch(Spy(), 2, factor=4).run(made(k, 1.0) for k in range(4))}
    for k, x0 in found.items():
        assert x0.mean().item() == pytest.approx(0.1 * (k + 1), abs=1e-5)
    free = {f.key: f.x0 for f in batch(Spy(), 2, factor=4).run(made(k, 0.0) for k in range(4))}
    for k, x0 in free.items():
        torch.testing.assert_close(x0, alone(row(k, 6)), atol=1e-5, rtol=1e-5)
