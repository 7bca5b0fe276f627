"""A call in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """A call that `start` begins, once; the thread does not keep the process alive."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.call, self.future = call, Future[T]()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        if self.thread.ident is None:
            self.thread.start()

    def _run(self) -> None:
        try:
            self.future.set_result(self.call())
        except BaseException as e:  # raised where the result is asked for, whatever it is
            self.future.set_exception(e)

    def result(self) -> T:
        """What the call returned, or raised, once it has ended."""
        self.start()
        return self.future.result()
