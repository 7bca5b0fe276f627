"""Continuous batching: a batch of fixed size that is kept full.

Each row follows its own schedule of noise levels, solver and guidance. A step takes the oldest rows
whose evaluations fit the batch (a row with a second pass, for guidance, takes two) and moves each
on by one; a finished row leaves and the next request takes its place. No row waits for the slowest
one, and the network sees a single shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from adversa.config.base import Amp
from adversa.diffuse.edm import DenoiserFn
from adversa.diffuse.guidance import (
    Answer,
    GradientFn,
    GuidedFn,
    classifier_free,
    gradient_guided,
    masked,
    padded,
    reference_gradient,
    reference_guided,
)
from adversa.diffuse.solver import SolverTable, advance
from adversa.training.device import to_device
from adversa.training.precision import autocast


@dataclass(frozen=True)
class Schedule:
    """What happens at each of a row's E evaluations.

    Attributes:
        table: The solver's noise levels and coefficients.
        scale: Of classifier-free guidance, float64 [E]; 1: none.
        second: Which evaluations have a second pass, bool [E].
        classifier_guidance: Its strength, float64 [E]; 0: none.
        reference_guidance: Its strength, float64 [E]; 0: none.
    """

    table: SolverTable
    scale: np.ndarray
    second: np.ndarray
    classifier_guidance: np.ndarray
    reference_guidance: np.ndarray

    def __post_init__(self) -> None:
        shapes = {
            len(self.table),
            len(self.scale),
            len(self.second),
            len(self.classifier_guidance),
            len(self.reference_guidance),
        }
        assert len(shapes) == 1, shapes

    @property
    def evaluations(self) -> int:
        """The evaluations of the denoiser that a row takes, second passes included."""
        return len(self.table) + int(self.second.sum())


@dataclass
class BatchRow:
    """One image on its way through the batch.

    Attributes:
        key: What the caller knows the image by.
        start: Where the ODE starts, [C, h, w].
        schedule: What happens at each evaluation.
        label: The class it is generated as.
        source: The image that is kept where `mask` is 0, [C, h, w]; None: nothing is kept.
        mask: Which part is generated, [1, h, w] in [0, 1] (guidance.masked).
        reference: What reference guidance pulls towards: [C, h, w] of the diffused space, or
            features [D].
        then: Makes the row that follows from this one's end; the image is finished with that one.
        at: Evaluations done.
        evaluations: Rows of the denoiser so far, second passes included.
        skipped: Guidance gradients of the rows before it that were not finite.
    """

    key: int
    start: Tensor
    schedule: Schedule
    label: int
    source: Tensor | None = None
    mask: Tensor | None = None
    reference: Tensor | None = None
    then: Callable[[Tensor], BatchRow] | None = None
    at: int = 0
    evaluations: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Finished:
    """A finished image: x0 [C, h, w] on the device.

    evaluations: rows of the denoiser that it took; skipped: guidance gradients that were not
    finite.
    """

    key: int
    x0: Tensor
    evaluations: int
    skipped: int


@dataclass
class Batch:
    """The rows that are sampled together.

    Attributes:
        denoiser: What is evaluated.
        shape: (C, h, w) of the diffused space.
        size: Rows of an evaluation, even.
        null_label: The label of no class.
        device: Where it runs.
        amp: Whether evaluations are autocast to bfloat16.
        weak: The denoiser of autoguidance.
        gradient: Of classifier guidance.
        factor: Pixels of the diffused space that reference guidance takes means over, a side.
        features: With `pixels`: reference guidance in features instead (reference_gradient).
        pixels: The diffused space to pixels in [0, 1].
        steps: Steps done.
        slots: Evaluations that were of use, of steps * size.
    """

    denoiser: DenoiserFn
    shape: tuple[int, int, int]
    size: int
    null_label: int
    device: torch.device
    amp: Amp = False
    weak: DenoiserFn | None = None
    gradient: GradientFn | None = None
    factor: int = 4
    features: Callable[[Tensor], Tensor] | None = None
    pixels: Callable[[Tensor], Tensor] | None = None
    steps: int = 0
    slots: int = 0
    _rows: list[BatchRow | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.size >= 2, self.size
        self._rows = [None] * self.size
        self._order: list[int] = []  # slots, the oldest row's first
        self.point = torch.zeros(self.size, *self.shape, device=self.device)
        self.memory, self.label = (
            torch.zeros_like(self.point),
            torch.zeros(self.size, dtype=torch.int64, device=self.device),
        )
        self.skipped = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        self.source: Tensor | None = None
        self.mask: Tensor | None = None
        self.reference: Tensor | None = None

    @torch.no_grad()
    def run(self, source: Iterable[BatchRow]) -> Iterator[Finished]:
        """Yield every row of `source` in the order in which they finish; the next is taken when
        there is room for it.
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
            yield from self._step()

    def _enter(self, row: BatchRow, slot: int) -> None:
        self._rows[slot] = row
        self._order.append(slot)
        self.point[slot] = to_device(row.start, self.device)
        self.memory[slot], self.label[slot], self.skipped[slot] = 0, row.label, 0
        if row.source is not None and self.source is None:
            self.source, self.mask = (
                torch.zeros_like(self.point),
                torch.ones_like(self.point[:, :1]),
            )
        if self.source is not None and self.mask is not None:
            assert (row.source is None) == (row.mask is None)
            # Zeros where nothing is kept, not the row's before: NaN there would come through a
            # weight of 0.
            self.source[slot] = 0 if row.source is None else to_device(row.source, self.device)
            self.mask[slot] = 1 if row.mask is None else to_device(row.mask, self.device)
        if row.reference is not None:
            if self.reference is None:
                self.reference = torch.zeros(self.size, *row.reference.shape, device=self.device)
            self.reference[slot] = to_device(row.reference, self.device)

    def _choose(self) -> list[int]:
        """The slots of the rows to move: the oldest first, as long as their evaluations fit."""
        chosen, left = [], self.size
        for slot in self._order:
            row = self._rows[slot]
            assert row is not None
            cost = 1 + int(row.schedule.second[row.at] and self.weak is None)
            if cost <= left:
                chosen.append(slot)
                left -= cost
            if not left:
                break
        self.steps, self.slots = self.steps + 1, self.slots + self.size - left
        return chosen

    def _step(self) -> Iterator[Finished]:
        chosen = self._choose()
        rows = [row for slot in chosen if (row := self._rows[slot]) is not None]
        slots = to_device(torch.tensor(chosen), self.device)
        now = [(r.schedule, r.at) for r in rows]
        levels = torch.tensor([c.table.sigma[i] for c, i in now], dtype=torch.float32)
        stacked = np.stack([c.table.combine[i] for c, i in now])
        sigma = to_device(levels, self.device)
        combine = to_device(torch.tensor(stacked, dtype=torch.float32), self.device)
        point, memory, label = self.point[slots], self.memory[slots], self.label[slots]
        answer = self._guided(slots, now)(point, sigma, label)
        self.point[slots], self.memory[slots] = advance(point, memory, answer.x0, combine)
        for slot, row in zip(chosen, rows, strict=True):
            row.evaluations += 1 + int(row.schedule.second[row.at])
            row.at += 1
            if row.at == len(row.schedule.table):
                yield from self._leave(slot, row)

    def _guided(self, slots: Tensor, now: list[tuple[Schedule, int]]) -> GuidedFn:
        """The denoiser under the guidance that these rows request."""

        def column(name: str) -> Tensor:
            return torch.tensor([float(getattr(c, name)[i]) for c, i in now])

        second, hard, like = (
            column("second").bool(),
            column("classifier_guidance"),
            column("reference_guidance"),
        )
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
            assert self.gradient is not None, "classifier guidance without a classifier"
            guided = gradient_guided(guided, self.gradient, hard, skipped)
        if like.any():
            assert self.reference is not None, "reference guidance without a reference"
            if self.features is not None and self.pixels is not None:
                guided = gradient_guided(
                    guided,
                    reference_gradient(self.features, self.pixels, self.reference[slots]),
                    like,
                    skipped,
                )
            else:
                guided = reference_guided(guided, self.reference[slots], like, self.factor)
        if self.source is not None and self.mask is not None:
            guided = masked(guided, self.source[slots], self.mask[slots])
        if not (hard.any() or like.any()):
            return guided

        def counted(x: Tensor, sigma: Tensor, label: Tensor) -> Answer:
            answer = guided(x, sigma, label)
            self.skipped.index_add_(0, slots, skipped)
            return answer

        return counted

    def _autocast(self, denoiser: DenoiserFn) -> DenoiserFn:
        def run(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
            with autocast(self.device, self.amp):
                return denoiser(x, sigma, label)

        return run

    def _leave(self, slot: int, row: BatchRow) -> Iterator[Finished]:
        x0 = self.point[slot].clone()
        # Only rows that were steered are asked for: on a GPU it waits for all that is on its way.
        skipped = row.skipped + (
            int(self.skipped[slot])
            if row.schedule.classifier_guidance.any() or row.schedule.reference_guidance.any()
            else 0
        )
        self._rows[slot] = None
        self._order.remove(slot)
        if row.then is None:
            yield Finished(row.key, x0, row.evaluations, skipped)
            return
        following = row.then(x0)
        following.evaluations, following.skipped = row.evaluations, skipped
        self._enter(following, slot)
