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
from adversa.types import UserError

FILE = "precision.json"


def settle(config: Config, run: RunDir, engine: Engine) -> Config:
    """The configuration with every `amp: auto` settled; FILE says how, from the first call on.

    The caller holds the run's lock.
    """
    if not _has_auto(config.model_dump(mode="json")):
        return config
    record(run, engine)
    return settled(config, run)


def record(run: RunDir, engine: Engine) -> bool:
    """Whether what is made in this folder is made in bfloat16, as FILE says from the first call
    on.
    """
    here = engine.hardware()
    known = _begun(run)
    begun = known or {"amp": here.amp, "hardware": str(here)}
    if (now := begun | {"here": str(here), "amp_here": here.amp}) != known:
        files.write_json(run.root / FILE, now)
    return bool(begun["amp"])


def settled(config: Config, run: RunDir) -> Config:
    """The configuration as `settle` left it; as it is where the run has not come to that."""
    begun = _begun(run)
    if begun is None:
        return config
    return check(_replaced(config.model_dump(mode="json"), bool(begun["amp"])), FILE)


def line(run: RunDir) -> str | None:
    """What FILE says, or that it is damaged, for people; None where nothing was settled."""
    try:
        begun = _begun(run)
    except UserError as e:  # whoever only looks at the run goes on
        return str(e)
    if begun is None:
        return None
    kind = "bfloat16" if begun["amp"] else "float32"
    if begun.get("amp_here") == begun["amp"]:
        return f"model steps in {kind}: {begun['here']}"
    return f"model steps stay in {kind}, as begun on {begun['hardware']}; here: {begun['here']}"


def _begun(run: RunDir) -> dict[str, Any] | None:
    path = run.root / FILE
    found = files.read_json(path)
    if found is None and not path.exists():
        return None
    texts = ("hardware", "here")
    if found and isinstance(found.get("amp"), bool) and all(found.get(k) for k in texts):
        return found
    raise UserError(
        f"{path} is damaged, and says in which precision this run works; delete it, and the same "
        "command settles it anew by this hardware"
    )


def _has_auto(tree: Mapping[str, Any]) -> bool:
    return any(
        v == AUTO if k == "amp" else isinstance(v, dict) and _has_auto(v) for k, v in tree.items()
    )


def _replaced(tree: Mapping[str, Any], amp: bool) -> dict[str, Any]:
    return {
        k: amp if k == "amp" and v == AUTO else _replaced(v, amp) if isinstance(v, dict) else v
        for k, v in tree.items()
    }
