"""The faults of a configuration in words, and its keys."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import (
    BaseModel,
)

from adversa.common.sanitize import shortened, unsigned
from adversa.config.root import Config


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key."""
    found = []
    for name, info in model.model_fields.items():
        found.append(prefix + name)
        if (sub := _section(info.annotation)) is not None:
            found += keys(sub, f"{prefix}{name}.")
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    for kind in getattr(annotation, "__args__", (annotation,)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def explain(
    err: Any, model: type[BaseModel] = Config, listed: str = "`adversa config show` lists the keys"
) -> str:
    """One of pydantic's faults in words; for an unknown key the nearest of the model's, or where
    they are listed.
    """
    key = ".".join(str(p) for p in err["loc"])
    if err["type"] == "extra_forbidden":
        valid = keys(model)
        near = (
            difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            or [k for k in valid if k.rsplit(".")[-1] == key.rsplit(".")[-1]][:1]
        )
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else f"; {listed}")
    message = err["msg"].removeprefix("Value error, ")
    return unsigned(
        f"{key} = {shortened(repr(err['input']))}: {message}"
        if key and not isinstance(err["input"], dict)
        else f"{key + ': ' if key else ''}{message}"
    )
