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


# What stands before the @ of an address: it may be a password. Of abfs:// it is a name unless a
# colon is in it; a Path has lost a slash; a key that was not quoted has slashes of its own.
_SIGNED = re.compile(
    r"\b(?:(?!abfss?:)(\w+:/{1,2})[^/@\s]+@|(\w+:/{1,2})[^/@:\s]*:(?!\d+(?:[/?#]|$))[^@\s]*@)"
)
# A query's values that prove who asks, by their names: of signed addresses and of tokens.
_QUERIED = re.compile(
    r"([?&;](?:[\w.-]*(?:token|secret|passw|signature|credential|auth|access_?key|api_?key)[\w.-]*"
    r"|pwd|sig|sas|key)=)[^&;#\s'\"]+",
    re.IGNORECASE,
)


def unsigned(text: str) -> str:
    """Without the credentials of the addresses in it."""
    return _QUERIED.sub(r"\1***", _SIGNED.sub(r"\1\2***@", text))


def is_signed(text: str) -> bool:
    """Whether an address in the text carries credentials."""
    return bool(_SIGNED.search(text) or _QUERIED.search(text))


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
    except yaml.MarkedYAMLError as e:
        if is_signed(text) and e.problem_mark is not None:  # its words quote the text
            raise yaml.YAMLError(f"see line {e.problem_mark.line + 1}") from None
        raise
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
