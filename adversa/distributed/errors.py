"""What stopped a piece of work on a worker, out of the wrappings Ray brings it home in."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from adversa.types import UserError


def user_error(error: BaseException) -> UserError | None:
    """The UserError at the root of an exception, or None where it is something else."""
    queue: list[BaseException | None] = [error]
    seen: set[int] = set()
    while queue:
        found = queue.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, UserError):
            return UserError(*found.args[:1])
        queue += [
            getattr(found, "cause", None),
            getattr(found, "controller_failure", None),
            found.__cause__,
            found.__context__,
            *getattr(found, "worker_failures", {}).values(),
        ]
    return None


class NoRetry(UserCallback):
    """Ends a training at once where another attempt would end the same way: in what the user must
    fix, or in a broken invariant.

    Ray Train starts a worker group again whatever stopped it; an exception in its controller ends
    the run.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if (found := user_error(error)) is not None:
                raise found
            if isinstance(error, AssertionError):
                raise error
