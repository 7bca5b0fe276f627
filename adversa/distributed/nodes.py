"""What machines a cluster has, and measurements on one of each kind. No Ray Data, no Ray Train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adversa.config import Cluster, Config
from adversa.engine.resources import Kind, Node, gpus_here
from adversa.types import UserError

if TYPE_CHECKING:
    from adversa.estimate.measure import Measured

TYPE = "accelerator_type:"  # how Ray's resources name the kind of a node's GPUs
WAIT_SECONDS = 180.0  # for a measurement: other work on the cluster may hold what it needs


def there() -> list[Node]:
    """Of the cluster that this process is connected to, those that are up."""
    up = alive()
    names = Counter(_name(n) for n in up)
    return [_node(n, names[_name(n)] > 1) for n in up]


def head() -> str | None:
    """The id of the cluster's head, where it can be told."""
    return next((n["NodeID"] for n in alive() if "node:__internal_head__" in n["Resources"]), None)


def alive() -> list[dict[str, Any]]:
    """What Ray says of the nodes that are up."""
    found: list[dict[str, Any]] = ray.nodes()
    return [n for n in found if n["Alive"]]


def _name(found: dict[str, Any]) -> str:
    return str(found.get("NodeManagerHostname") or found.get("NodeManagerAddress") or "node")


def _node(found: dict[str, Any], shared: bool) -> Node:
    """shared: its name is another's too, as of several nodes on one machine."""
    resources, key = found["Resources"], str(found.get("NodeID", ""))
    kind = next((k.removeprefix(TYPE) for k in resources if k.startswith(TYPE)), None)
    memory = int(resources["memory"]) if "memory" in resources else None
    name = f"{_name(found)}-{key[:4]}" if shared and key else _name(found)
    return Node(name, resources.get("CPU", 0), resources.get("GPU", 0), memory, kind, id=key)


def here(cluster: Cluster) -> Node:
    """This machine as an embedded Ray would take it; none is started."""
    import psutil
    from ray._private.accelerators import NvidiaGPUAcceleratorManager as Gpus
    from ray._private.utils import get_num_cpus

    gpus, known = Gpus.get_current_node_num_accelerators(), gpus_here()
    if (visible := Gpus.get_current_process_visible_accelerator_ids()) is not None:
        gpus = min(gpus, len(visible))
    kind, memory = known[0] if known and gpus else (None, None)
    cpus = cluster.cpus or get_num_cpus(override_docker_cpu_warning=True)
    return Node("this machine", cpus, gpus, psutil.virtual_memory().total, kind, memory)


def measured(config: Config, nodes: Sequence[Node], seconds: float) -> dict[Kind, Measured]:
    """{kind of node: measure.Measured}, on the first node of each kind that can hold a worker, all
    at once.

    UserError where the cluster has no room for them in time.
    """
    from adversa.estimate import measure

    firsts = {n.kind: n for n in reversed(nodes) if n.cpus >= 1}
    calls = {}
    measuring: Callable[[Config, int, float], Measured] = measure.measure
    for kind, node in firsts.items():
        place = NodeAffinitySchedulingStrategy(node.id, soft=False)
        task = ray.remote(measuring).options(
            num_cpus=1, num_gpus=min(1, int(node.gpus)), max_retries=1, scheduling_strategy=place
        )
        calls[kind] = task.remote(config, int(node.cpus), seconds)
    ready, _ = ray.wait(
        list(calls.values()), num_returns=len(calls), timeout=WAIT_SECONDS + seconds
    )
    if len(ready) < len(calls):
        for call in calls.values():
            ray.cancel(call, force=True)
        raise UserError(
            f"{len(calls) - len(ready)} of {len(calls)} kinds of machines had no room to "
            "measure in; is the cluster busy?"
        )
    found: dict[Kind, Measured] = {kind: ray.get(call) for kind, call in calls.items()}
    return found


def with_memory(nodes: Sequence[Node], found: Mapping[Kind, Measured]) -> list[Node]:
    """The nodes with their GPUs' memory, where it was measured."""
    return [
        replace(
            n, gpu_memory=n.gpu_memory or (found[n.kind].gpu_memory if n.kind in found else None)
        )
        for n in nodes
    ]
