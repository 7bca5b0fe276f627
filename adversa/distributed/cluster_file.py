"""What adversa reads of a cluster file: a Ray cluster-launcher YAML as `ray up` takes it, or a
KubeRay manifest. No ray, no torch.

What adversa itself wants lies where Ray leaves room: under `metadata: {adversa: ...}` (the
launcher's schema: "Ray does not interpret these fields"), and in a manifest as YAML text in the
annotation `adversa`.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, field_validator

from adversa.common.sanitize import load_yaml
from adversa.config import Section, explain
from adversa.storage.path import storage_path
from adversa.types import UserError

KUBERAY = ("RayJob", "RayCluster", "RayService")
SETTINGS = (
    "training_workers",
    "training_workers_min",
    "samplers",
    "gpus_per_sampler",
    "sampler_threads",
)


class Asks(Section):
    """`metadata.adversa`. Those of SETTINGS override a configuration's `cluster` section, and are
    checked there once more.
    """

    address: str | None = Field(
        None,
        description="of the jobs server, say http://127.0.0.1:8265; null: found by Ray's launcher",
    )
    plain_http: bool = Field(
        False,
        description="whether a token may go to `address` without encryption; on loopback it may",
    )
    run_storage: str | None = Field(
        None, description="folder on the cluster, the same on every node, under which runs lie"
    )
    training_workers: int | None = Field(None, ge=1)
    training_workers_min: int | None = Field(None, ge=1)
    samplers: int | None = Field(None, ge=1)
    gpus_per_sampler: float | None = Field(None, gt=0)
    sampler_threads: int | None = Field(None, ge=1)

    @field_validator("address")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        return value if value is None else jobs_address(value)

    @field_validator("run_storage")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        try:
            if value is not None and not is_absolute(value):
                raise ValueError(
                    "must be the same on every node: an absolute path, s3://... or gs://..."
                )
        except UserError as e:  # of an address that cannot be used
            raise ValueError(str(e)) from None
        return value


@dataclass(frozen=True)
class ClusterFile:
    """workers: nodes beside the head that the launcher starts at once. provider of a manifest:
    "kuberay". mounts: what `ray up` takes along from this machine.
    """

    path: Path
    kind: Literal["ray", "kuberay"]
    name: str
    provider: str
    asks: Asks
    workers: int = 0
    mounts: tuple[str, ...] = ()


def read(path: Path) -> ClusterFile:
    """UserError (one line) for a file that is none, or that asks adversa for something unknown.
    Tags that would make Python objects are refused: a cluster file from a stranger runs nothing
    here.
    """
    tree = _tree(path)
    if str(tree.get("apiVersion", "")).startswith("ray.io/") and tree.get("kind") in KUBERAY:
        metadata = _mapping(tree.get("metadata"), f"{path}: metadata")
        text = _mapping(metadata.get("annotations"), f"{path}: metadata.annotations").get("adversa")
        where = f"{path}: metadata.annotations.adversa"
        asked = _parse(text, where) if isinstance(text, str) else text
        return ClusterFile(
            path, "kuberay", str(metadata.get("name", "")), "kuberay", _asks(asked, where)
        )
    provider = tree.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if not isinstance(kind, str) or not isinstance(tree.get("cluster_name"), str):
        missing = "cluster_name" if isinstance(kind, str) else "provider.type"
        raise UserError(
            f"{path} has no {missing}: it is neither a file for `ray up` nor a KubeRay "
            "manifest; start from one in cluster/"
        )
    asked = _mapping(tree.get("metadata"), f"{path}: metadata").get("adversa")
    asks, mounts = (
        _asks(asked, f"{path}: metadata.adversa"),
        _mapping(tree.get("file_mounts"), f"{path}: file_mounts"),
    )
    return ClusterFile(
        path,
        "ray",
        tree["cluster_name"],
        kind,
        asks,
        _workers(tree),
        tuple(map(str, mounts.values())),
    )


def overrides(asks: Asks) -> list[str]:
    """The settings that a cluster file makes, as `--set` takes them."""
    return [
        f"cluster.{key}={value}" for key in SETTINGS if (value := getattr(asks, key)) is not None
    ]


def is_absolute(where: str) -> bool:
    """Whether every node calls the same place so. UserError for an object store's address that
    cannot be used.
    """
    return storage_path(where).is_absolute()


def jobs_address(text: str) -> str:
    """A URL of a jobs server, without a slash at its end. ValueError for what is none."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of the port: not a number, or too large
        valid = False
    if not valid:
        raise ValueError("must be the jobs server's URL, for example http://127.0.0.1:8265")
    return text.rstrip("/")


def is_loopback(address: str) -> bool:
    """Whether a URL's host is this machine: `localhost`, or an address of the loopback."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _tree(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"no cluster file at {path}; start from one in cluster/") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    return _mapping(_parse(text, str(path)), str(path))


def _parse(text: str, where: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError as e:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(e).split())}") from None


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold keys (key: value), but holds a {type(value).__name__}")
    return value


def _asks(value: Any, where: str) -> Asks:
    try:
        return Asks.model_validate(_mapping(value, where))
    except ValidationError as e:
        known = f"known: {', '.join(Asks.model_fields)}"
        raise UserError(
            f"{where}: " + "; ".join(explain(err, Asks, known) for err in e.errors())
        ) from None


def _workers(tree: dict[str, Any]) -> int:
    """Of machines of one's own: all; of a cloud: the sum of min_workers."""
    listed = tree["provider"].get("worker_ips")
    if isinstance(listed, list):
        return len(listed)
    kinds = tree.get("available_node_types")
    found = (
        [kind.get("min_workers", 0) for kind in kinds.values() if isinstance(kind, dict)]
        if isinstance(kinds, dict)
        else []
    )
    return sum(n for n in found if isinstance(n, int))
