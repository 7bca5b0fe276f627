"""Which trials of a list are finished, running, failed or ready, read from their folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adversa.run import step_folder
from adversa.storage.path import StoragePath
from adversa.types import Json, UserError

if TYPE_CHECKING:
    from adversa.engine.interface import Engine
from adversa.engine.interface import Tell, Trial


@dataclass
class TrialQueue:
    """Which trials of a list are finished, running, given up, or ready: all there is to know of a
    search, from the folders.

    Asked again and again, it looks at a folder no more once that is finished.
    """

    trials: Sequence[Trial]
    running: set[int] = field(default_factory=set)  # given away, begun or not
    begun: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)  # and why, in one line
    done: set[StoragePath] = field(default_factory=set)

    def __post_init__(self) -> None:
        names = [t.name for t in self.trials]
        assert len(set(names)) == len(names), "two trials of one name"
        ahead = {t.out for t in self.trials}
        for trial in self.trials:
            missing = [n for n in trial.needs if n not in ahead and not self.is_there(n)]
            assert not missing, f"{trial.name} needs {missing}, which no trial makes"

    def is_there(self, folder: StoragePath) -> bool:
        if folder not in self.done and step_folder.is_finished(folder):
            self.done.add(folder)
        return folder in self.done

    def left(self) -> list[int]:
        """Neither finished, nor running, nor given up."""
        busy = self.running | self.failed.keys()
        return [i for i, t in enumerate(self.trials) if i not in busy and not self.is_there(t.out)]

    def next(self) -> int | None:
        """The first that is ready; None where all that are left wait for others (or none is
        left).
        """
        return next(
            (i for i in self.left() if all(self.is_there(n) for n in self.trials[i].needs)), None
        )

    def stuck(self) -> bool:
        """Whether nothing runs and nothing can: the rest, if any, waits for what has failed."""
        return not self.running and self.next() is None

    def finished(self) -> int:
        return sum(self.is_there(t.out) for t in self.trials)

    def state(self) -> Json:
        """For a step's progress."""
        names = [self.trials[i].name for i in sorted(self.running & self.begun)]
        return {
            "done": self.finished(),
            "total": len(self.trials),
            "unit": "trial",
            "running": names,
            "failed": len(self.failed),
        }

    def settle(self) -> None:
        """UserError where trials failed."""
        if not self.failed:
            return
        first = min(self.failed)
        waiting = len(self.left())
        also = f"; {waiting} more wait for what these were to make" if waiting else ""
        raise UserError(
            f"{len(self.failed)} of {len(self.trials)} trials failed{also}; the first, "
            f"{self.trials[first].name}: "
            f"{self.failed[first]}; what the others made is kept, and the same command tries again"
        )


def fault(error: UserError) -> str:
    """A trial's UserError in one line."""
    return " ".join("; ".join([str(error), *getattr(error, "__notes__", [])]).split())


def in_turn(queue: TrialQueue, engine: Engine, report: Tell) -> Iterator[None]:
    """Work on the trials one after the other in this process; yields before each and at the end."""
    while (i := queue.next()) is not None:
        queue.running.add(i)
        queue.begun.add(i)
        report(queue.state())
        yield
        try:
            queue.trials[i].work(engine, lambda _: None)
        except UserError as e:
            queue.failed[i] = fault(e)
        finally:
            queue.running.discard(i)
    report(queue.state())
    yield
