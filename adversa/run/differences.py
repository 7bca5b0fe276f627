"""How two recipes differ, field by field."""

from __future__ import annotations

import json

from adversa.types import Json


def flatten(tree: Json, prefix: str = "") -> Json:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat: Json = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: Json, new: Json) -> list[str]:
    """ "key: old -> new" for each field that differs, dotted keys, sorted."""
    a, b = flatten(json.loads(json.dumps(old))), flatten(json.loads(json.dumps(new)))
    return [
        f"{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]


FREE = (
    "groups",
    "model_args",
)  # mappings whose keys a user chooses: one may be absent for an ordinary reason


def unknown(old: Json, new: Json) -> list[str]:
    """The fields and whole sections, dotted, that `new` has and `old`'s version of adversa did not
    know.

    Not what a mapping of FREE holds, nor a section that is a plain value (null) on the other side:
    settings do that.
    """
    found = []
    for key in sorted(new):
        if key not in old:
            found.append(key)
        elif isinstance(old[key], dict) and isinstance(new[key], dict) and key not in FREE:
            found += [f"{key}.{name}" for name in unknown(old[key], new[key])]
    return found


def _versions_apart(old: Json, new: Json) -> list[str]:
    """What one of two versions does not know, in words; empty where both recipes have the same
    fields.
    """
    pairs = (("that one", unknown(old, new)), ("this one", unknown(new, old)))
    return [f"{which} does not know {', '.join(fields)}" for which, fields in pairs if fields]
