"""What is written by others, and how it may be shown or read: names without control characters,
YAML that stays small.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import yaml

TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
MOST_NODES = 100_000  # values of a YAML text, each alias counted as all it stands for
SHOWN = 200  # characters of a value that is wrong, in the line that says so


def unsigned(text: str) -> str:
    """Without what stands before the @ of an address: it may be a password. (Of abfs:// it is a
    name; a Path has lost a slash.)
    """
    return re.sub(r"\b(?!abfss?:)(\w+:/{1,2})[^/@\s]+@", r"\1***@", text)


def printable(text: str) -> str:
    """Control and surrogate characters (a terminal obeys them, HTML forbids them) and those that
    turn the writing direction become U+FFFD; tabs and ends of lines stay.
    """
    return (
        text
        if text.isascii() and text.isprintable()
        else "".join("\ufffd" if _unfit(c) else c for c in text)
    )


def _unfit(c: str) -> bool:
    return c in TURNING or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")


def shortened(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def load_yaml(text: str) -> Any:
    """Plain values alone: tags that would make Python objects are refused. yaml.YAMLError for
    whatever is wrong with the text, also nesting that is too deep, and aliases that stand for
    themselves or for more than fits into memory.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}, set()) > MOST_NODES:
            raise yaml.YAMLError(f"it holds more than {MOST_NODES} values")
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, OverflowError) as e:  # a date that is none, a number of thousands of digits
        raise yaml.YAMLError(str(e)) from None
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Values below a node and itself, an alias counted as what it stands for."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in above:
        raise yaml.YAMLError("an alias stands for a value that holds it")
    if id(node) not in known:
        inside = [n for item in node.value for n in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_values(n, known, above | {id(node)}) for n in inside)
    return known[id(node)]
