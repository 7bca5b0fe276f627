"""Reading a configuration from YAML and from --set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import ValidationError

from adversa.common.sanitize import is_signed, load_yaml, unsigned
from adversa.config.base import SIGNED
from adversa.config.faults import explain
from adversa.config.root import Config
from adversa.types import Json, UserError


class TextFile(Protocol):
    """A path, local or of an object store."""

    def read_text(self) -> str: ...


def packaged(name: str) -> Path:
    """The path of a configuration that comes with adversa: `configs/` in a checkout,
    `adversa/configs/` when installed.
    """
    here = Path(__file__).parents[1]
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"no packaged configuration {name}; known: "
        f"{', '.join(sorted(p.name for p in (here.parent / 'configs').glob('*.yaml')))}"
    )


def read(
    path: TextFile | None, overrides: Sequence[str] = (), **top: Any
) -> tuple[Json, dict[str, str]]:
    """The tree of plain values of a YAML file after `key.sub=value` overrides, unchecked.

    Args:
        path: The file; None: the packaged demo.
        overrides: What `--set` was given.
        **top: Values of top-level keys that have an option of their own; None: not given.

    Returns:
        The tree, and who set each of its dotted keys.

    Raises:
        UserError: The file cannot be read, is not YAML, or an override does not fit it.
    """
    where = "the demo" if path is None else str(path)
    path = packaged("demo.yaml") if path is None else path
    try:
        tree = load_yaml(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"no configuration at {path}; give a YAML file, or none for the demo"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    except yaml.YAMLError as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} must hold sections (key: value), but holds a {type(tree).__name__}"
        )
    sources = dict.fromkeys(_leaves(tree), where)
    for override in overrides:
        name = _override(tree, override)
        # What was said of the whole, or of a part of it, is said anew.
        sources = {k: by for k, by in sources.items() if not k.startswith(f"{name}.")}
        sources[name] = "--set"
    given = {k: v for k, v in top.items() if v is not None}
    tree.update(given)
    return tree, sources | {k: f"--{k}" for k in given}


def load(path: TextFile | None, overrides: Sequence[str] = (), **top: Any) -> Config:
    """A checked configuration, as of `read`. UserError on any fault."""
    tree, _ = read(path, overrides, **top)
    return check(tree, str(packaged("demo.yaml") if path is None else path))


def _leaves(tree: dict[Any, Any], prefix: str = "") -> list[str]:
    """The dotted keys that hold a plain value."""
    found = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}")
    return found


def check(tree: Json, where: str) -> Config:
    """A tree of plain values to a Config; UserError with every fault, the nearest valid key for an
    unknown one.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        raise UserError(f"{where}: " + "; ".join(explain(err) for err in e.errors())) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML, sections in order."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def _override(tree: Json, text: str) -> str:
    """Set one key in the tree; returns its dotted name."""
    name, equals, value = text.partition("=")
    if is_signed(text):
        raise UserError(f"--set {name if not is_signed(name) else 'value'} {SIGNED}")
    if not equals or not name:
        raise UserError(f"--set {text}: write key.sub=value, for example data.resolution=64")
    try:
        parsed = load_yaml(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: the value is not valid YAML; quote it") from None
    override(tree, name, parsed)
    return name


def override(tree: Json, name: str, value: object) -> None:
    """Set the value of a dotted key in the tree. UserError where it leads through a plain value."""
    *sections, last = name.split(".")
    for i, section in enumerate(sections):
        node = tree.setdefault(section, {})
        if node is None:
            node = tree[section] = {}
        if not isinstance(node, dict):
            where = ".".join(sections[: i + 1])
            raise UserError(unsigned(f"--set {name}={value}: {where} is not a section"))
        tree = node
    tree[last] = value
