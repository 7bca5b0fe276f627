"""Continuous batching: a batch of fixed size that is kept full.

Every row walks its own course: noise levels, solver, guidance. A tick picks, oldest first, as many
rows as fill the batch's evaluations, those with a second pass (guidance) taking two, and moves each
a step on; a finished row leaves and the next request takes its place. Nothing waits for the
slowest, and the network sees one shape only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from adversa.diffuse.edm import DenoiserFn
from adversa.diffuse.guidance import (
    Answer,
    GradientFn,
    GuidedFn,
    classifier_free,
    kept,
    padded,
    pulled,
    resemblance,
    steered,
)
from adversa.diffuse.solver import Plan, advance


@dataclass(frozen=True)
class Course:
    """What a row does at each of its E evaluations. All float64 [E]; second bool [E]: it gets a
    second pass.

    scale: of classifier-free guidance, 1 none; hardness, likeness: strengths, 0 none.
    """

    plan: Plan
    scale: np.ndarray
    second: np.ndarray
    hardness: np.ndarray
    likeness: np.ndarray

    def __post_init__(self) -> None:
        shapes = {
            len(self.plan),
            len(self.scale),
            len(self.second),
            len(self.hardness),
            len(self.likeness),
        }
        assert len(shapes) == 1, shapes

    @property
    def evaluations(self) -> int:
        return len(self.plan) + int(self.second.sum())


@dataclass
class Row:
    """start [C, h, w]: where the ODE starts. known [C, h, w] and soft [1, h, w]: of inpainting, see
    guidance.kept. goal: what likeness pulls towards, [C, h, w] of the diffused space, or features
    [D]. then: the row that follows it, made of its end, and which it is not finished without.
    """

    key: int
    start: Tensor
    course: Course
    label: int
    known: Tensor | None = None
    soft: Tensor | None = None
    goal: Tensor | None = None
    then: Callable[[Tensor], Row] | None = None
    at: int = 0
    evaluations: int = 0
    skipped: int = 0  # of the rows before it


@dataclass(frozen=True)
class Finished:
    """x0 [C, h, w] on the device. evaluations: rows of the denoiser it took; skipped: gradients
    that were not finite.
    """

    key: int
    x0: Tensor
    evaluations: int
    skipped: int


@dataclass
class Batch:
    """size: rows of an evaluation, even. gradient: of hardness. pull: size of the pixels that
    likeness pulls at, in the diffused space; features and pixels: likeness in features instead
    (guidance.resemblance).
    """

    denoiser: DenoiserFn
    shape: tuple[int, int, int]
    size: int
    null_label: int
    device: torch.device
    amp: bool = False
    weak: DenoiserFn | None = None
    gradient: GradientFn | None = None
    pull: int = 4
    features: Callable[[Tensor], Tensor] | None = None
    pixels: Callable[[Tensor], Tensor] | None = None
    ticks: int = 0
    slots: int = 0  # evaluations that were of use, of ticks * size
    _rows: list[Row | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.size >= 2, self.size
        self._rows, self._order = [None] * self.size, []  # slots, the oldest row's first
        self.point = torch.zeros(self.size, *self.shape, device=self.device)
        self.memory, self.label = (
            torch.zeros_like(self.point),
            torch.zeros(self.size, dtype=torch.int64, device=self.device),
        )
        self.skipped = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        self.known: Tensor | None = None
        self.soft: Tensor | None = None
        self.goal: Tensor | None = None

    @torch.no_grad()
    def run(self, source: Iterable[Row]) -> Iterator[Finished]:
        """Every row of `source`, in the order in which they finish. Rows are asked for when there
        is room for them.
        """
        rows = iter(source)
        more = True
        while True:
            while more and len(self._order) < self.size:
                row = next(rows, None)
                more = row is not None
                if row is not None:
                    self._enter(row, self._rows.index(None))
            if not self._order:
                return
            yield from self._tick()

    def _enter(self, row: Row, slot: int) -> None:
        self._rows[slot] = row
        self._order.append(slot)
        self.point[slot] = row.start.to(self.device)
        self.memory[slot], self.label[slot], self.skipped[slot] = 0, row.label, 0
        if row.known is not None and self.known is None:
            self.known, self.soft = torch.zeros_like(self.point), torch.ones_like(self.point[:, :1])
        if self.known is not None and self.soft is not None:
            assert (row.known is None) == (row.soft is None)
            # Zeros where nothing is kept, not the row's before: NaN there would come through a
            # weight of 0.
            self.known[slot] = 0 if row.known is None else row.known.to(self.device)
            self.soft[slot] = 1 if row.soft is None else row.soft.to(self.device)
        if row.goal is not None:
            if self.goal is None:
                self.goal = torch.zeros(self.size, *row.goal.shape, device=self.device)
            self.goal[slot] = row.goal.to(self.device)

    def _choose(self) -> list[int]:
        """Slots of the rows to move: oldest first, as long as their evaluations fit."""
        chosen, left = [], self.size
        for slot in self._order:
            row = self._rows[slot]
            assert row is not None
            cost = 1 + int(row.course.second[row.at] and self.weak is None)
            if cost <= left:
                chosen.append(slot)
                left -= cost
            if not left:
                break
        self.ticks, self.slots = self.ticks + 1, self.slots + self.size - left
        return chosen

    def _tick(self) -> Iterator[Finished]:
        chosen = self._choose()
        rows = [row for slot in chosen if (row := self._rows[slot]) is not None]
        slots = torch.tensor(chosen, device=self.device)
        now = [(r.course, r.at) for r in rows]
        sigma = torch.tensor([c.plan.sigma[i] for c, i in now], dtype=torch.float32).to(self.device)
        combine = torch.tensor(
            np.stack([c.plan.combine[i] for c, i in now]), dtype=torch.float32
        ).to(self.device)
        point, memory, label = self.point[slots], self.memory[slots], self.label[slots]
        answer = self._guided(slots, now)(point, sigma, label)
        self.point[slots], self.memory[slots] = advance(point, memory, answer.x0, combine)
        for slot, row in zip(chosen, rows, strict=True):
            row.evaluations += 1 + int(row.course.second[row.at])
            row.at += 1
            if row.at == len(row.course.plan):
                yield from self._leave(slot, row)

    def _guided(self, slots: Tensor, now: list[tuple[Course, int]]) -> GuidedFn:
        """The denoiser under all that these rows ask for."""

        def column(name: str) -> Tensor:
            return torch.tensor([float(getattr(c, name)[i]) for c, i in now])

        second, hard, like = column("second").bool(), column("hardness"), column("likeness")
        weak = None if self.weak is None else padded(self._autocast(self.weak), self.size)
        guided = classifier_free(
            padded(self._autocast(self.denoiser), self.size),
            column("scale"),
            second,
            self.null_label,
            weak,
        )
        skipped = torch.zeros(len(now), dtype=torch.int64, device=self.device)
        if hard.any():
            assert self.gradient is not None, "hardness without a classifier"
            guided = steered(guided, self.gradient, hard, skipped)
        if like.any():
            assert self.goal is not None, "likeness without a goal"
            if self.features is not None and self.pixels is not None:
                guided = steered(
                    guided, resemblance(self.features, self.pixels, self.goal[slots]), like, skipped
                )
            else:
                guided = pulled(guided, self.goal[slots], like, self.pull)
        if self.known is not None and self.soft is not None:
            guided = kept(guided, self.known[slots], self.soft[slots])
        if not (hard.any() or like.any()):
            return guided

        def counted(x: Tensor, sigma: Tensor, label: Tensor) -> Answer:
            answer = guided(x, sigma, label)
            self.skipped.index_add_(0, slots, skipped)
            return answer

        return counted

    def _autocast(self, denoiser: DenoiserFn) -> DenoiserFn:
        def run(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                return denoiser(x, sigma, label)

        return run

    def _leave(self, slot: int, row: Row) -> Iterator[Finished]:
        x0 = self.point[slot].clone()
        # Only rows that were steered are asked for: on a GPU it waits for all that is on its way.
        skipped = row.skipped + (
            int(self.skipped[slot]) if row.course.hardness.any() or row.course.likeness.any() else 0
        )
        self._rows[slot] = None
        self._order.remove(slot)
        if row.then is None:
            yield Finished(row.key, x0, row.evaluations, skipped)
            return
        following = row.then(x0)
        following.evaluations, following.skipped = row.evaluations, skipped
        self._enter(following, slot)
