"""A pool of actors that take parts, one at a time: bounded in flight, requeued when an actor dies, capped tries.

No image passes through the driver: the actor reads its part's requests, paints, and commits the file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from adversa.distributed.errors import user_error
from adversa.loop.engine import Done, Make, Part, Report, Work, do_part, missing


class Sampler:
    """What an actor is made of: work made once, parts done one by one. Plain, so that it is tested without Ray."""

    def __init__(self, make: Make, out: Path, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.make, self.out = make, out
        self.work: Work | None = None

    def do(self, part: Part) -> Done:
        if self.work is None:  # here and not in __init__: an actor that fails to start loses the reason
            self.work = self.make()
        return do_part(self.work, part, self.out)


def map_parts(
    make: Make, parts: Sequence[Part], out: Path, report: Report, size: int, attempts: int, options: dict[str, Any], threads: int
) -> list[Done]:
    """Do every missing part on `size` actors.

    A part's UserError comes back as itself; a part that fails `attempts` times ends the step.

    options: of each actor (num_cpus, num_gpus).
    """
    todo = missing(parts, out)
    actor = ray.remote(**options)(Sampler)

    def start() -> Any:
        return actor.remote(make, out, threads)

    def call(worker: Any, part: Part) -> Any:
        return worker.do.remote(part)

    total = sum(p.rows for p in parts)
    before = total - sum(p.rows for p in todo)
    report({"done": before, "total": total, "unit": "image"})

    def on_done(done: list[Done]) -> None:
        report({"done": before + sum(d.rows for d in done), "total": total, "unit": "image"})

    return schedule(todo, start, call, ray.kill, min(size, len(todo)), attempts, on_done)


def schedule(
    parts: Sequence[Part],
    start: Callable[[], Any],
    call: Callable[[Any, Part], Any],
    stop: Callable[[Any], None],
    size: int,
    attempts: int,
    on_done: Callable[[list[Done]], None],
) -> list[Done]:
    """Hand parts to idle workers, wait for any, hand out the next. One part in flight a worker; a dead worker is replaced."""
    queue, tries = deque(parts), dict.fromkeys((p.index for p in parts), 0)
    idle, busy, done = [start() for _ in range(size)], {}, []
    try:
        while queue or busy:
            while queue and idle:
                part, worker = queue.popleft(), idle.pop()
                tries[part.index] += 1
                busy[call(worker, part)] = (part, worker)
            ready, _ = ray.wait(list(busy), num_returns=1)
            part, worker = busy.pop(ready[0])
            try:
                done.append(ray.get(ready[0]))
            except RayActorError as e:
                _again(part, tries[part.index], attempts, queue, e)
                idle.append(start())
                continue
            except RayTaskError as e:
                if (mendable := user_error(e)) is not None:
                    raise mendable from None
                _again(part, tries[part.index], attempts, queue, e)
            idle.append(worker)
            on_done(done)
    finally:
        for worker in [*idle, *(w for _, w in busy.values())]:
            stop(worker)
    return sorted(done, key=lambda d: d.index)


def _again(part: Part, tried: int, attempts: int, queue: deque[Part], error: Exception) -> None:
    if tried >= attempts:
        raise RuntimeError(f"part {part.index} failed {tried} times; the last time: {error}") from error
    queue.append(part)
