"""The sampler as a Ray actor. Apart from pool.py, so that an actor imports no Ray Data or Ray
Train: half a second, tens of MB.
"""

from __future__ import annotations

import ray

from adversa.engine.worker import Sampler


class Actor(Sampler):
    def place(self) -> str:
        """The Ray node: a machine may have several, each with CPUs of its own."""
        return ray.get_runtime_context().get_node_id()
