"""How much memory tensors take at the height of some work, counted while it is done: on the CPU
about what it is on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Count(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off as they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak(work: Callable[[], object]) -> int:
    """Bytes at most of what `work` made and still held."""
    with Count() as count:
        work()
    return count.most


def of_rows(small: int, large: int, few: int, many: int, rows: int) -> int:
    """Bytes with so many rows, by the line through two counts; never less than the larger count."""
    a_row = max(0.0, (large - small) / (many - few))
    return int(max(large, small + a_row * (rows - few)))
