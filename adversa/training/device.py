"""Tensors on their way to a GPU and numbers on their way back, so that the host need not wait.

A copy from memory that is not pinned, and a number that Python reads, stop the host until the GPU
has done all that it was given.
"""

from __future__ import annotations

import torch
from torch import Tensor

CPU = torch.device("cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device; to a GPU through pinned memory, and nobody waits."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Numbers:
    """Scalars of one device as numbers, to be read once they have come.

    On a GPU they are copied behind the work that was given to it before, into pinned memory.
    """

    def __init__(self, *scalars: Tensor) -> None:
        stacked = torch.stack([s.detach().float().reshape(()) for s in scalars])
        self._event: torch.cuda.Event | None = None
        if stacked.device.type == "cuda":
            self._values = torch.empty(len(scalars)).pin_memory()
            self._values.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = stacked

    def ready(self) -> bool:
        """Whether `read` returns at once."""
        return self._event is None or self._event.query()

    def read(self) -> list[float]:
        """The numbers, in float32; waits for them where it must."""
        if not self.ready():
            assert self._event is not None
            self._event.synchronize()
        return [float(v) for v in self._values.tolist()]
