"""The process group of a training, made by Ray Train on its workers. No torch here: Ray Train's
controller imports this module.

Ray Train's own TorchConfig makes the controller import torch, 1.5 s of a core before the first
worker starts, and makes a process group for one worker too. Here one worker has none
(process_group.py then does nothing), and several get Ray Train's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import Backend, BackendConfig


@dataclass
class ProcessGroup(BackendConfig):
    """backend: gloo or nccl; None is filled in by TorchTrainer, by whether workers have GPUs."""

    backend: str | None = None

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend}


class _Backend(Backend):
    share_cuda_visible_devices = (
        True  # as TorchConfig has it: nccl between the GPUs of a machine wants to see them all
    )

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        if len(worker_group) > 1:
            self._torch(backend_config, "on_start", worker_group)

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        if len(worker_group) > 1:
            self._torch(backend_config, "on_shutdown", worker_group)

    def _torch(self, config: BackendConfig, method: str, worker_group: BaseWorkerGroup) -> None:
        from ray.train.torch import TorchConfig

        assert isinstance(config, ProcessGroup)
        theirs = TorchConfig(backend=config.backend)
        getattr(theirs.backend_cls(), method)(worker_group, theirs)
