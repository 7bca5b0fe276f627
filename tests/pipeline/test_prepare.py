"""prepare, whole: which picture gets which role, and that a cut-off attempt leaves nothing of
itself behind.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import zipfile
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from adversa.config import Data
from adversa.data import sources
from adversa.data.split import merge_groups
from adversa.engine.local import LocalEngine
from adversa.pipeline import loop, prepare
from adversa.report import page
from adversa.run import step_folder
from adversa.storage import tables
from adversa.types import ROLES


def noise(seed, width=32, height=24):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def table(root, rows):
    """A csv source. rows: (name, seed of the picture, label, lesion); the same seed is the same
    picture.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name, seed, _, _ in rows:
        Image.fromarray(noise(seed)).save(root / f"{name}.png")
    with open(root / "table.csv", "w", newline="") as f:
        csv.writer(f).writerows(
            [["path", "label", "group"], *([f"{n}.png", x, g] for n, _, x, g in rows)]
        )
    return root / "table.csv"


def section(path, **changes):
    base = {
        "source": "csv",
        "path": str(path),
        "resolution": 16,
        "part_rows": 16,
        "near_duplicate_bits": -1,
    }
    return Data(**base | changes)


def roles_of(data):
    """source -> role of what was prepared."""
    return {
        s: role
        for role in ROLES
        for s in tables.read(data / role, ["source"], tables.EXAMPLES)["source"].to_pylist()
    }


def written(data):
    """Everything that later steps read of it, byte for byte."""
    rows = {role: tables.read(data / role, schema=tables.EXAMPLES).to_pylist() for role in ROLES}
    return rows | {
        name: json.loads((data / f"{name}.json").read_text())
        for name in ("classes", "split", "leaks")
    }


def leaking(config, data):
    """The lesions, asked of the source and not of what was written, whose pictures have more than
    one role.
    """
    listing = sources.list_records(config)
    lesion = merge_groups(
        [r.group for r in listing.records], [(a, b) for a, b, _ in listing.merged]
    )
    group = {r.source: lesion[r.group] for r in listing.records}
    seen = defaultdict(set)
    for source, role in roles_of(data).items():
        seen[group[source]].add(role)
    return [g for g, r in seen.items() if len(r) > 1]


# ---- no lesion in two roles ----------------------------------------------------------------------

PAIRS = 24


def test_lesions_that_share_a_picture_are_one_lesion(tmp_path):
    """Lesion A = {x, y}, lesion B = {copy of x, z}: y and z show the same thing, although the copy
    itself is dropped.
    """
    rows = []
    for i in range(PAIRS):
        label = "ab"[i % 2]
        rows += [(f"{i}-x", 3 * i, label, f"A{i}"), (f"{i}-y", 3 * i + 1, label, f"A{i}")]
        rows += [(f"{i}-copy", 3 * i, label, f"B{i}"), (f"{i}-z", 3 * i + 2, label, f"B{i}")]
    prepare.prepare(LocalEngine(), section(table(tmp_path / "source", rows)), tmp_path / "data")
    role = roles_of(tmp_path / "data")
    assert len(role) == 3 * PAIRS and set(role.values()) == set(ROLES)
    assert [i for i in range(PAIRS) if len({role[f"{i}-{n}.png"] for n in "xyz"}) > 1] == []
    leaks = json.loads((tmp_path / "data/leaks.json").read_text())
    assert len(leaks["exact_copies_dropped"]) == PAIRS
    assert (leaks["groups_before"], leaks["groups_after"]) == (2 * PAIRS, PAIRS)


def test_also_where_the_copy_has_another_label_and_both_are_left_out(tmp_path):
    rows = []
    for i in range(PAIRS):
        label, other = "ab"[i % 2], "ba"[i % 2]
        rows += [(f"{i}-x", 3 * i, label, f"A{i}"), (f"{i}-y", 3 * i + 1, label, f"A{i}")]
        rows += [(f"{i}-copy", 3 * i, other, f"B{i}"), (f"{i}-z", 3 * i + 2, label, f"B{i}")]
    prepare.prepare(
        LocalEngine(), section(table(tmp_path / "source", rows), on_error="skip"), tmp_path / "data"
    )
    role = roles_of(tmp_path / "data")
    assert role.keys() == {f"{i}-{n}.png" for i in range(PAIRS) for n in "yz"}
    assert [i for i in range(PAIRS) if role[f"{i}-y.png"] != role[f"{i}-z.png"]] == []
    assert step_folder.manifest(tmp_path / "data")["problems"] == 2 * PAIRS


@pytest.mark.parametrize("grouped", [True, False])
def test_no_lesion_of_the_phantom_has_two_roles(tiny, tmp_path, grouped):
    config = tiny(data={"grouped": grouped, "resolution": 16}).data
    prepare.prepare(LocalEngine(), config, tmp_path / "data")
    leaks = leaking(config, tmp_path / "data")
    assert leaks == [] if grouped else len(leaks) > 10


@pytest.fixture(scope="module")
def some_of_ham(ham_zip, tmp_path_factory):
    """(folder, pair): lesions of three classes with several pictures each, and one pair that is
    said to be one lesion.
    """
    root = tmp_path_factory.mktemp("ham")
    (root / "images").mkdir()
    with zipfile.ZipFile(ham_zip) as z:
        names = {n.rpartition("/")[2]: n for n in z.namelist()}
        lines = z.read(names["HAM10000_metadata.csv"]).decode().splitlines()
        rows = list(csv.DictReader(lines))
        of = defaultdict(list)
        for row in rows:
            of[row["lesion_id"]].append(row)
        wanted = {"nv": 20, "mel": 20, "bkl": 20}
        taken = sorted(x for x, r in of.items() if r[0]["dx"] == "mel" and len(r) > 1)[:2]
        pair = {"lesion_a": taken[0], "lesion_b": taken[1]}
        for label, n in wanted.items():
            several = [
                x for x, r in of.items() if r[0]["dx"] == label and len(r) > 1 and x not in taken
            ]
            taken += sorted(several)[:n]
        kept = [r for lesion in taken for r in of[lesion]]
        for r in kept:
            (root / "images" / f"{r['image_id']}.jpg").write_bytes(
                z.read(names[f"{r['image_id']}.jpg"])
            )
    for name, found in (("HAM10000_metadata.csv", kept), ("duplicate_lesion_pairs.csv", [pair])):
        with open(root / name, "w", newline="") as f:
            writer = csv.DictWriter(f, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    return root, tuple(pair.values())


@pytest.mark.parametrize("grouped", [True, False])
def test_no_lesion_of_ham_has_two_roles(some_of_ham, tmp_path, grouped):
    root, pair = some_of_ham
    config = Data(source="ham10000", path=str(root), resolution=16, grouped=grouped, part_rows=64)
    listing = sources.list_records(config)
    assert [(a, b) for a, b, _ in listing.merged] == [pair] and len(listing.records) > 100
    prepare.prepare(LocalEngine(), config, tmp_path / "data")
    leaks = leaking(config, tmp_path / "data")
    assert leaks == [] if grouped else len(leaks) > 10
    if grouped:
        role = roles_of(tmp_path / "data")
        assert len({role[r.source] for r in listing.records if r.group in pair}) == 1
        assert len(json.loads((tmp_path / "data/leaks.json").read_text())["known_pairs"]) == 1


# ---- cut off, and asked for something else -------------------------------------------------------


class Cut(BaseException):
    """A power cut: not an Exception, so that nothing may catch it."""


def cut_while_decoding(monkeypatch):
    """The third part of pictures is never written."""
    real = prepare.tables.write_part

    def write(path, rows):
        if path.name == "part-00002.parquet" and path.parent.name == "decoded":
            raise Cut
        real(path, rows)

    monkeypatch.setattr(prepare.tables, "write_part", write)


def cut_while_dealing(monkeypatch):
    """The first role's first part is there, and no more."""
    real = prepare.tables.write_part

    def write(path, rows):
        real(path, rows)
        if path.parent.name in ROLES:
            raise Cut

    monkeypatch.setattr(prepare.tables, "write_part", write)


def cut_before_the_manifest(monkeypatch):
    def finish(*a, **k):
        raise Cut

    monkeypatch.setattr(step_folder, "finish", finish)


CUTS = {f.__name__: f for f in (cut_while_decoding, cut_while_dealing, cut_before_the_manifest)}
OTHER = {
    "nothing": {},
    "crop": {"crop": "squash"},
    "resolution": {"resolution": 24},
    "split": {"split": {"seed": 7, "train": 0.4, "mine": 0.2, "select": 0.2, "test": 0.2}},
    "part_rows": {"part_rows": 50},
}


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_off_prepare_with_other_settings_ends_like_a_fresh_one(
    tiny, tmp_path, monkeypatch, cut, other
):
    rows = [(f"p{i}", i, "ab"[i // 2 % 2], f"g{i // 2}") for i in range(90)]
    path = table(tmp_path / "source", rows)
    base = {"source": "csv", "path": str(path), "resolution": 16, "part_rows": 16, "crop": "center"}
    first, second = tiny(data=base), tiny(data=base | OTHER[other])

    def go(config, root):
        run = loop.open_run(config, root)
        loop.run(config, run, LocalEngine(), page.write, "prepare")
        return run

    with monkeypatch.context() as m, pytest.raises(Cut):
        CUTS[cut](m)
        go(first, tmp_path / "run")
    assert not step_folder.is_finished(tmp_path / "run/data") and list(
        (tmp_path / "run/data").rglob("*.parquet")
    )
    again, fresh = go(second, tmp_path / "run"), go(second, tmp_path / "fresh")
    assert written(again.data) == written(fresh.data)
    assert step_folder.fingerprint(again.data) == step_folder.fingerprint(fresh.data)

    def files(run):
        return {run.name_of(p) for p in run.data.rglob("*") if p.is_file()}

    assert files(again) == files(fresh)


def test_what_is_trained_on_hangs_on_shape_and_labels_too_and_not_on_the_split_alone(tmp_path):
    """Two preparations with one split and other pictures must not pass for each other's input."""
    rows = [(f"p{i}", i, "ab"[i % 2], f"g{i}") for i in range(24)]
    path = table(tmp_path / "source", rows)
    found = {}
    for name, changes in {
        "one": {},
        "same": {},
        "large": {"resolution": 24},
        "squashed": {"crop": "squash"},
    }.items():
        prepare.prepare(LocalEngine(), section(path, **changes), tmp_path / name)
        split_hash = json.loads((tmp_path / name / "split.json").read_text())["split_hash"]
        found[name] = (split_hash, step_folder.fingerprint(tmp_path / name))
    assert len({s for s, _ in found.values()}) == 1
    assert found["one"] == found["same"] and len({f for _, f in found.values()}) == 3


# ---- pictures stay with the tasks ----------------------------------------------------------------


class Driver(LocalEngine):
    """Knows whether it is at work on a part."""

    at_work = False

    def map_batches(self, *args, **kwargs):
        self.at_work = True
        try:
            return super().map_batches(*args, **kwargs)
        finally:
            self.at_work = False


@pytest.mark.parametrize(
    "engine", ["local", pytest.param("ray", marks=pytest.mark.ray)], ids=["local", "ray"]
)
def test_no_picture_passes_the_driver(tiny, tmp_path, monkeypatch, request, engine):
    """It reads no column of pictures, and writes no part; tasks on Ray have processes of their
    own.
    """
    config = tiny(data={"phantom": {"images": 120}}).data
    carried_out = Driver() if engine == "local" else request.getfixturevalue("ray_engine")
    read, allowed = tables.read_part, ("decode_png", "encode_png", "write_part", "opened")

    def looks(path, columns=None, filters=None):
        driver = not getattr(carried_out, "at_work", False)
        assert not driver or not {"image", "mask"} & set(columns or tables.EXAMPLES.names)
        return read(path, columns, filters)

    def only_at_work(name, real):
        def called(*args, **kwargs):
            assert getattr(carried_out, "at_work", False), f"{name} in the driver"
            return real(*args, **kwargs)

        return called

    with monkeypatch.context() as m:
        m.setattr(tables, "read_part", looks)
        for name in allowed:
            m.setattr(tables, name, only_at_work(name, getattr(tables, name)))
        prepare.prepare(carried_out, config, tmp_path / "data")
    prepare.prepare(LocalEngine(), config, tmp_path / "again")
    assert written(tmp_path / "data") == written(tmp_path / "again")


def test_a_dealing_that_is_cut_off_goes_on_where_it_was(tmp_path, monkeypatch):
    rows = [(f"p{i}", i, "ab"[i % 2], f"g{i}") for i in range(90)]
    config, out = section(table(tmp_path / "source", rows)), tmp_path / "data"
    with monkeypatch.context() as m, pytest.raises(Cut):
        cut_while_dealing(m)
        prepare.prepare(LocalEngine(), config, out)
    (first,) = (p for role in ROLES for p in tables.parts(out / role))
    made = first.stat().st_ino
    prepare.prepare(LocalEngine(), config, out)
    assert first.stat().st_ino == made
    prepare.prepare(LocalEngine(), config, tmp_path / "fresh")
    assert written(out) == written(tmp_path / "fresh")


def test_groups_that_turn_out_to_be_one_are_dealt_anew(tmp_path, monkeypatch):
    """Known pairs of lesions lie in a file of their own: no record tells of them."""
    rows = [(f"p{i}", i, "ab"[i % 2], f"g{i}") for i in range(90)]
    config, out = section(table(tmp_path / "source", rows)), tmp_path / "data"
    with monkeypatch.context() as m, pytest.raises(Cut):
        cut_while_dealing(m)
        prepare.prepare(LocalEngine(), config, out)
    listed = sources.list_records(config)
    pairs = [(f"g{i}", f"g{i + 44}", "pairs.csv") for i in range(44)]
    found = dataclasses.replace(listed, merged=pairs)
    monkeypatch.setattr(prepare.sources, "list_records", lambda _: found)
    prepare.prepare(LocalEngine(), config, out)
    prepare.prepare(LocalEngine(), config, tmp_path / "fresh")
    assert written(out) == written(tmp_path / "fresh")
    assert leaking(config, out) == []
