"""What stopped a piece of work on a worker, out of the wrappings Ray brings it home in."""

from __future__ import annotations

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
            found.__cause__,
            found.__context__,
            *getattr(found, "worker_failures", {}).values(),
        ]
    return None
