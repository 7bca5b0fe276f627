"""A resolved configuration as YAML in which every key says what it is and who set it."""

from __future__ import annotations

from collections.abc import Mapping

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from adversa.config.root import Config


def commented(config: Config, sources: Mapping[str, str]) -> str:
    """YAML that `load` reads back as the same configuration, a comment above each key.

    Args:
        config: What is listed.
        sources: Dotted key -> who set it, as of `reading.read`; a key that is missing has its
            default. A mapping or section that was set as a whole stands for all keys below it.

    Returns:
        The text, with an end of line.
    """
    return "\n".join(_lines(config, "", "", sources)).lstrip("\n") + "\n"


def _lines(section: BaseModel, prefix: str, indent: str, sources: Mapping[str, str]) -> list[str]:
    values = section.model_dump(mode="json")
    lines = []
    for name, info in type(section).model_fields.items():
        key, value = prefix + name, getattr(section, name)
        below = isinstance(value, BaseModel)
        default = info.get_default(call_default_factory=True)
        comment = [info.description or ""]
        if below:
            comment = [info.description or _first_paragraph(value)]
        elif default is not PydanticUndefined:
            comment.append(f"default {_plain(default)}")
        if not below and (by := _source(key, sources)):
            comment.append(by)
        if below and not indent:
            lines.append("")
        text = "; ".join(part for part in comment if part)
        lines.append(f"{indent}# {text}")
        if below:
            lines.append(f"{indent}{name}:")
            lines += _lines(value, f"{key}.", indent + "  ", sources)
        else:
            lines.append(f"{indent}{name}: {_flow(values[name])}")
    return lines


def _first_paragraph(section: BaseModel) -> str:
    return " ".join((type(section).__doc__ or "").split("\n\n")[0].split()).removesuffix(".")


def _plain(default: object) -> str:
    """A default list or section as YAML would write it."""
    return _flow(default.model_dump(mode="json") if isinstance(default, BaseModel) else default)


def _flow(value: object) -> str:
    """A value on one line of YAML."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _source(key: str, sources: Mapping[str, str]) -> str:
    """Who set a key, or a key above or below it; "" where all of it is the default."""
    parents = [key.rsplit(".", n)[0] for n in range(key.count(".") + 1)]
    found = next((sources[k] for k in parents if k in sources), None)
    if found is None:
        found = next((by for k, by in sources.items() if k.startswith(f"{key}.")), None)
    return f"set by {found}" if found else ""
