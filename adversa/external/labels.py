"""What the labels of an external cohort mean to a run: renamed, merged, left out; and the run's
classes made coarser.

A labels map is YAML with two sections, both optional:

    labels:               # a label of the set: the class it is
      melanoma: mel       # renamed
      naevus: nv
      atypical naevus: nv # two labels, one class
      scc: null           # its images are left out, and counted
    classes:              # a class of the run: a coarser one, where the set knows no finer
      mel: malignant
      bcc: malignant
      nv: benign          # a class that is not named here stays as it is

A label that is named as a class is needs no entry. The probability of a merged class is the sum of
its classes'.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from adversa.data.files import printable
from adversa.types import UserError

SECTIONS = ("labels", "classes")


@dataclass(frozen=True)
class Translation:
    """given: the K classes of the run. labels: a label of the set -> a class, or None: left out.
    classes: as in the file.
    """

    given: tuple[str, ...]
    labels: Mapping[str, str | None] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)

    def merged(self, name: str) -> str:
        """The class that a class of the run is part of."""
        return self.classes.get(name, name)

    @property
    def names(self) -> list[str]:
        """The classes that are scored, in the order of the run's."""
        return list(dict.fromkeys(self.merged(c) for c in self.given))

    @property
    def merges(self) -> bool:
        return self.names != list(self.given)

    def columns(self) -> np.ndarray:
        """The scored class of each class of the run, int [K]."""
        names = self.names
        return np.array([names.index(self.merged(c)) for c in self.given])

    def logits(self, logits: np.ndarray) -> np.ndarray:
        """[..., K] of the run's classes to [..., len(names)], whose softmax is the sum of the
        merged classes' probabilities.
        """
        if not self.merges:
            return logits
        columns = self.columns()
        each = [
            np.logaddexp.reduce(logits[..., columns == k].astype(np.float64), axis=-1)
            for k in range(len(self.names))
        ]
        return np.stack(each, axis=-1)

    def meaning(self, label: str) -> str | None:
        """The scored class of a label of the set, None where its images are left out. KeyError
        where nothing is known of it.
        """
        name = self.labels.get(label, label)
        if name is None or name in self.names:
            return name
        if name in self.given:
            return self.merged(name)
        raise KeyError(label)

    def groups(self, groups: Mapping[str, Sequence[str]]) -> tuple[dict[str, list[str]], list[str]]:
        """(named groups of the run's classes in scored classes, those that cannot be told: they cut
        through a merged class).
        """
        found, lost = {}, []
        for name, members in groups.items():
            scored = list(dict.fromkeys(self.merged(c) for c in members))
            whole = {c for c in self.given if self.merged(c) in scored} == set(members)
            if whole and len(scored) < len(self.names):
                found[name] = scored
            else:
                lost.append(name)
        return found, lost

    def check(self, labels: Iterable[str]) -> None:
        """UserError where labels of the cohort mean nothing to the run; all are named."""
        count = Counter(labels)
        unknown = [label for label in count if not self._knows(label)]
        if unknown:
            named = ", ".join(f"{printable(label)} ({count[label]})" for label in sorted(unknown))
            first = printable(sorted(unknown)[0])
            raise UserError(
                f"labels of the set that are none of the run's classes: {named}; say what "
                "they are in --labels-map FILE, under "
                f"`labels:` a line `{first}: CLASS`, or `{first}: null` to leave its "
                f"images out (classes: {', '.join(self.names)})"
            )

    def _knows(self, label: str) -> bool:
        try:
            self.meaning(label)
        except KeyError:
            return False
        return True


def read(path: Path | None, classes: Sequence[str]) -> Translation:
    """A labels map for a run of these classes; None: none. UserError with the file, the entry and
    the fix.
    """
    given = tuple(classes)
    if path is None:
        return Translation(given)
    tree = _sections(path)
    merges: dict[str, str] = {}
    for name, coarse in tree["classes"].items():
        if name not in given:
            raise UserError(
                f"{path}: classes: {printable(name)} is no class of the run; "
                f"{_nearest(name, given)}"
            )
        if coarse is None:
            raise UserError(
                f"{path}: classes: {name} is null, but a classifier cannot be kept from a "
                "class; name a coarser class it is part of"
            )
        merges[name] = coarse
    found = Translation(given, tree["labels"], merges)
    for coarse in merges.values():
        if coarse in given and found.merged(coarse) != coarse:
            raise UserError(
                f"{path}: classes: {coarse} is merged into {found.merged(coarse)} and "
                f"others into {coarse}; give that another name"
            )
    if len(found.names) < 2:
        raise UserError(
            f"{path}: classes: everything is merged into {found.names[0]}; leave two "
            "classes or more"
        )
    known = list(dict.fromkeys([*found.names, *given]))
    for label, meaning in tree["labels"].items():
        if meaning is not None and meaning not in known:
            raise UserError(
                f"{path}: labels: {printable(label)}: {printable(meaning)} is no class; "
                f"{_nearest(meaning, known)}"
            )
    return found


def _sections(path: Path) -> dict[str, dict[str, str | None]]:
    """The two sections, every key and value as it is written (`no` and `1` are labels like any
    other), null alone is None.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError(f"--labels-map {path}: no such file; check the spelling") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--labels-map {path} cannot be read: {e}") from None
    except yaml.YAMLError as e:
        raise UserError(
            f"--labels-map {path} is not valid YAML: {' '.join(str(e).split())}"
        ) from None
    found: dict[str, dict[str, str | None]] = {s: {} for s in SECTIONS}
    for name, node in _entries(root, path, "the file"):
        if name not in SECTIONS:
            raise UserError(
                f"{path}: there is no section {printable(name)}; put entries under "
                "`labels:` or `classes:`"
            )
        for key, value in _entries(node, path, name):
            if not isinstance(value, yaml.ScalarNode):
                raise UserError(
                    f"{path}: {name}: {printable(key)} holds more than one name; write a "
                    "line for each, `NAME: CLASS`"
                )
            if key in found[name]:
                raise UserError(f"{path}: {name}: {printable(key)} is there twice; keep one line")
            is_null = value.tag == "tag:yaml.org,2002:null"
            if not is_null and not value.value:
                raise UserError(
                    f"{path}: {name}: {printable(key)} is blank; name a class, or write "
                    "null to leave it out"
                )
            found[name][key] = None if is_null else value.value
    if not any(found.values()):
        raise UserError(
            f"--labels-map {path} is empty; write lines `LABEL OF THE SET: CLASS` under "
            "`labels:`, or `CLASS: COARSER CLASS` under "
            "`classes:`, or leave the option out"
        )
    return found


def _entries(node: yaml.Node | None, path: Path, where: str) -> list[tuple[str, yaml.Node]]:
    """The entries of a mapping; none of an empty document or section."""
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return []
    if not isinstance(node, yaml.MappingNode) or not all(
        isinstance(k, yaml.ScalarNode) for k, _ in node.value
    ):
        raise UserError(
            f"{path}: {where} must hold lines `NAME: CLASS` (sections labels and classes); "
            "see `adversa evaluate --help`"
        )
    return [(key.value, value) for key, value in node.value]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"the classes are {', '.join(known)}"
