"""The precision of a run's model steps: what `amp: auto` comes to is settled once a run, by the
hardware that it begins on, and kept wherever it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adversa.config import Config, check
from adversa.config.base import AUTO
from adversa.engine.interface import Engine
from adversa.run.folder import RunDir
from adversa.storage import files

FILE = "precision.json"


def settle(config: Config, run: RunDir, engine: Engine) -> Config:
    """The configuration with every `amp: auto` settled; FILE says how, from the first call on.

    The caller holds the run's lock.
    """
    if not _has_auto(config.model_dump(mode="json")):
        return config
    here = engine.hardware()
    record = files.read_json(run.root / FILE) or {"amp": here.amp, "hardware": str(here)}
    files.write_json(run.root / FILE, record | {"here": str(here), "amp_here": here.amp})
    return settled(config, run)


def settled(config: Config, run: RunDir) -> Config:
    """The configuration as `settle` left it; as it is where the run has not come to that."""
    record = files.read_json(run.root / FILE)
    if record is None:
        return config
    return check(_replaced(config.model_dump(mode="json"), bool(record["amp"])), FILE)


def line(run: RunDir) -> str | None:
    """What FILE says, for people; None where nothing was settled."""
    record = files.read_json(run.root / FILE)
    if record is None:
        return None
    kind = "bfloat16" if record["amp"] else "float32"
    if record["amp_here"] == record["amp"]:
        return f"model steps in {kind}: {record['here']}"
    return f"model steps stay in {kind}, as begun on {record['hardware']}; here: {record['here']}"


def _has_auto(tree: Mapping[str, Any]) -> bool:
    return any(
        v == AUTO if k == "amp" else isinstance(v, dict) and _has_auto(v) for k, v in tree.items()
    )


def _replaced(tree: Mapping[str, Any], amp: bool) -> dict[str, Any]:
    return {
        k: amp if k == "amp" and v == AUTO else _replaced(v, amp) if isinstance(v, dict) else v
        for k, v in tree.items()
    }
