"""What work asks for and where it fits: the rules by which Ray is asked, as functions of numbers.
No Ray, no torch.

The engine asks by these rules, `adversa plan` shows what they come to, and both refuse by the same
checks.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from adversa.config import Cluster
from adversa.types import UserError

# Share of a GPU that a task of map_batches with a model asks for: a classifier is small, its memory
# matters more than its speed.
GPU_SHARE = 0.25
DRIVER = "/dev/nvidiactl"  # there where a GPU of NVIDIA can be used
GPU_SECONDS = 10.0  # that `nvidia-smi` may take


Kind = tuple[float, float, str | None]  # of a node: CPUs, GPUs, what GPUs


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or this one. memory, gpu_memory (of one GPU): bytes; None where not
    known. id: Ray's own name.
    """

    name: str
    cpus: float
    gpus: float = 0
    memory: int | None = None
    gpu_type: str | None = None
    gpu_memory: int | None = None
    id: str = ""

    @property
    def kind(self) -> Kind:
        """Nodes of one kind are taken to be equally fast."""
        return self.cpus, self.gpus, self.gpu_type


def on_gpus(nodes: Sequence[Node]) -> bool:
    return any(node.gpus >= 1 for node in nodes)


# ---- what is asked for ---------------------------------------------------------------------------


def tasks(cpus: float, gpus: float, model: bool) -> int:
    """How many tasks of map_batches run at a time on a cluster of so much; model: they hold one,
    on a share of a GPU, and a CPU feeds it.
    """
    return int(min(gpus / GPU_SHARE, cpus)) if model and gpus else int(cpus)


def sampler_asks(cluster: Cluster, gpus: bool) -> dict[str, float]:
    """Of a sampler actor, as Ray takes it. gpus: whether the cluster has any."""
    return (
        {"num_gpus": cluster.gpus_per_sampler, "num_cpus": 1}
        if gpus
        else {"num_cpus": cluster.sampler_threads}
    )


def trial_asks(cluster: Cluster, gpus: float) -> dict[str, float]:
    """Of a trial of a search, as Ray Tune takes it."""
    return (
        {"gpu": cluster.gpus_per_trial, "cpu": 1.0}
        if gpus
        else {"cpu": float(cluster.training_threads or 1)}
    )


def trials_at_once(cluster: Cluster, nodes: Sequence[Node]) -> int:
    """How many trials of a search run at the same time; of several workers each, one."""
    if cluster.training_workers > 1:
        return 1
    gpus = on_gpus(nodes)
    asks = trial_asks(cluster, gpus)
    room = sum(
        int(min(n.cpus / asks["cpu"], _whole(n.gpus, asks["gpu"]) if gpus else n.cpus))
        for n in nodes
    )
    return max(1, min(cluster.trials or room, room))


def samplers_on(cpus: float, gpus: float, cluster: Cluster, on_gpus: bool) -> int:
    """How many samplers a machine has room for. on_gpus: whether the cluster has GPUs; each sampler
    then takes a CPU too.
    """
    if not on_gpus:
        return int(cpus / cluster.sampler_threads)
    return int(min(_whole(gpus, cluster.gpus_per_sampler), cpus))


def _whole(gpus: float, share: float) -> int:
    """Samplers on a machine's GPUs: a sampler's share lies on one GPU, or is some whole ones."""
    return int(gpus) * int(1 / share + 1e-6) if share < 1 else int(gpus / share)


def worker_asks(cpus: float, gpus: float, workers: int) -> dict[str, float]:
    """Of each of a training's workers on a cluster of so much in all.

    Workers that take the last CPU would leave none for the streams that feed them; and a group must
    ask for something. A power of two, because Ray's elastic policy counts by floor division: 0.99
    // 0.33 is 2.
    """
    free = (cpus - 1) / workers
    share = min(1.0, 2.0 ** math.floor(math.log2(free))) if free > 0 else 0.0
    asks: dict[str, float] = {"CPU": share} if share else {"memory": 1}
    return asks | ({"GPU": 1} if gpus else {})


def workers_on(nodes: Sequence[Node], asks: dict[str, float], count: int) -> list[int]:
    """Where Ray puts `count` workers of a training, a number for each node; fewer in all where
    there is no room for more.

    As its strategy PACK does: the node of which the first worker leaves the largest share free
    takes as many as fit, then the next.
    """
    free = [{"CPU": n.cpus, "GPU": n.gpus} for n in nodes]
    wants = {k: v for k, v in asks.items() if k in ("CPU", "GPU")}
    placed = [0] * len(nodes)
    while sum(placed) < count:
        left = {
            i: [1 - v / f[k] for k, v in wants.items()]
            for i, f in enumerate(free)
            if all(f[k] >= v for k, v in wants.items())
        }
        if not left:
            break
        best = max(left, key=lambda i: sum(left[i]) / max(1, len(left[i])))
        while sum(placed) < count and all(free[best][k] >= v for k, v in wants.items()):
            placed[best] += 1
            for k, v in wants.items():
                free[best][k] -= v
    return placed


# ---- what cannot fit -----------------------------------------------------------------------------


def worker_fault(cpus: float, gpus: float, cluster: Cluster) -> str | None:
    """Of a machine that cannot grow."""
    room, what = (int(gpus), "GPUs") if gpus else (int(cpus), "CPUs")
    if cluster.training_workers <= room:
        return None
    return (
        f"cluster.training_workers {cluster.training_workers}: there are {room} {what}; take "
        "at most so many"
    )


def faults(nodes: Sequence[Node], cluster: Cluster, grows: bool) -> list[str]:
    """Why these settings cannot work on these machines: a line each, with the value, the cause, the
    fix.

    grows: machines may join, as on any cluster; what waits for them is no fault. A sampler lies on
    one machine, though.
    """
    found, gpus, c = [], on_gpus(nodes), cluster
    widest = int(max((n.cpus for n in nodes), default=0))
    where = "there are" if len(nodes) == 1 else "no machine has more than"
    if not gpus and c.sampler_threads > widest:
        found.append(
            f"cluster.sampler_threads {c.sampler_threads}: {where} {widest} CPUs; take at "
            "most so many"
        )
    if grows:
        return found
    most = int(max((n.gpus for n in nodes), default=0))
    if gpus and c.gpus_per_sampler > most:
        found.append(
            f"cluster.gpus_per_sampler {c.gpus_per_sampler:g}: {where} {most} GPUs; take "
            "at most so many"
        )
    if not found and c.samplers:
        room = sum(samplers_on(n.cpus, n.gpus, c, gpus) for n in nodes)
        if c.samplers > room:
            found.append(
                f"cluster.samplers {c.samplers}: there is room for {room}; take at most so "
                "many, or null"
            )
    fault = worker_fault(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes), c)
    return [*found, fault] if fault else found


def refuse(found: Sequence[str]) -> None:
    """UserError where there are faults."""
    if found:
        raise UserError("; ".join(found))


def gpus_here() -> list[tuple[str, int]]:
    """(name, bytes of memory) of each GPU of NVIDIA in this machine, by `nvidia-smi`: torch would
    begin to use them by looking.
    """
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    if not os.path.exists(DRIVER) or shutil.which(words[0]) is None:
        return []
    try:
        said = subprocess.run(
            words, capture_output=True, text=True, timeout=GPU_SECONDS, check=True
        ).stdout
    except (subprocess.SubprocessError, OSError):
        return []  # a driver that does not answer is for the training to tell of
    rows = [line.rsplit(",", 1) for line in said.splitlines() if "," in line]
    return [(name.strip(), int(mib) << 20) for name, mib in rows if mib.strip().isdigit()]
