"""Bad input, end to end through `adversa prepare` and `train`: one line and exit code 2, or a
counted skip; nothing lost.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from adversa.cli.app import app
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files, tables
from adversa.types import ROLES

SMALL = {
    "denoiser.weights": "null",
    "data.resolution": 16,
    "data.part_rows": 5,
    "data.max_pixels": 900,
}
HEADER = ["id", "path", "label", "lesion"]


def pixels(seed, mean=(150, 110, 90), side=24):
    """Noise about a colour, uint8 [side, side, 3]: every picture is unlike every other."""
    noise = np.random.default_rng(seed).integers(-60, 61, (side, side, 3))
    return np.clip(np.asarray(mean) + noise, 0, 255).astype(np.uint8)


def save_image(path, seed=0, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path, **save)
    return path


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(result, *parts):
    """Exit code 2 and one line on stderr that holds all the parts."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr, (part, result.stderr)


@dataclass
class Source:
    """Eight good pictures of each of two classes below `root`, listed the way `kind` wants it, to
    be spoiled by a test.
    """

    kind: str
    root: Path
    rows: list[list[str]] = field(
        default_factory=list
    )  # csv: HEADER; ham10000: lesion_id, image_id, dx
    settings: dict[str, object] = field(default_factory=dict)

    def __post_init__(self):
        for i in range(16):
            label = "ab"[i // 8]
            if self.kind == "folder":
                save_image(self.root / label / f"{i}.jpg", i)
            elif self.kind == "csv":
                save_image(self.root / f"pictures/{i}.jpg", i)
                self.rows.append([f"id{i}", f"pictures/{i}.jpg", label, f"L{i}"])
            else:
                save_image(self.root / f"images/I{i}.jpg", i)
                self.rows.append([f"L{i}", f"I{i}", label])

    @property
    def path(self):
        return self.root / "table.csv" if self.kind == "csv" else self.root

    def prepare(self, out, **changes):
        if self.kind == "csv":
            self.path.write_text("\n".join(",".join(r) for r in [HEADER, *self.rows]) + "\n")
            self.settings |= {"data.columns.id": "id", "data.columns.group": "lesion"}
        elif self.kind == "ham10000":
            lines = [",".join(r) for r in [["lesion_id", "image_id", "dx"], *self.rows]]
            (self.root / "HAM10000_metadata.csv").write_text("\n".join(lines) + "\n")
        sets = SMALL | {"data.source": self.kind, "data.path": self.path} | self.settings | changes
        return run(
            "prepare",
            "--engine",
            "local",
            "--run-dir",
            out,
            *[a for k, v in sets.items() for a in ("--set", f"{k}={v}")],
        )


@pytest.fixture
def source(tmp_path):
    return lambda kind: Source(kind, tmp_path / "source")


def prepared(out):
    """id -> row of every role; the roles share no id and no group."""
    found, groups = {}, {}
    for role in ROLES:
        for row in tables.read(out / "data" / role).to_pylist():
            assert row["id"] not in found and groups.setdefault(row["group"], role) == role
            found[row["id"]] = row | {"role": role}
    return found


def leaks(out):
    return json.loads((out / "data/leaks.json").read_text())


# ---- one picture or row is bad: fail says which, skip leaves it out and counts it ----------------


def truncated(s):
    path = s.root / "a/0.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def zero_bytes(s):
    (s.root / "a/0.jpg").write_bytes(b"")


def not_a_picture(s):
    (s.root / "a/0.jpg").write_text("<html>404</html>")


def bomb(s):
    Image.fromarray(pixels(99, side=40)).save(s.root / "a/bomb.png")


def great_bomb(s):
    """2.5 gigapixels stated by a header of a few bytes, against the default limit."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    (s.root / "a/bomb.png").write_bytes(data)
    s.settings["data.max_pixels"] = 100_000_000


def empty_class(s):
    (s.root / "empty").mkdir()


def unknown_label(s):
    s.rows[3][2] = "zebra"
    s.settings["data.labels"] = "[a, b]"


def path_up(s):
    save_image(s.root.parent / "secret.png")
    s.rows.append(["id99", "../secret.png", "a", "L99"])


def path_absolute(s):
    s.rows.append(["id99", "/etc/hostname", "a", "L99"])


def path_by_link(s):
    (s.root / "pictures/link.jpg").symlink_to(save_image(s.root.parent / "secret.jpg"))
    s.rows.append(["id99", "pictures/link.jpg", "a", "L99"])


def duplicate_id(s):
    save_image(s.root / "pictures/again.jpg", 77)
    s.rows.append(["id3", "pictures/again.jpg", "a", "L99"])


def row_without_image(s):
    s.rows.append(["L99", "I99", "a"])


def csv_row_without_image(s):
    s.rows.append(["id99", "pictures/99.jpg", "a", "L99"])


def image_without_row(s):
    save_image(s.root / "images/I99.jpg", 99)


def blank_group(s):
    s.rows[3][3] = "  "


def blank_lesion(s):
    s.rows[3][0] = ""


def no_group_found(s):
    save_image(s.root / "a/odd.jpg", 99)
    s.settings["data.group_regex"] = "'([0-9]+)'"


def name_not_utf8(s):
    os.rename(s.root / "a/0.jpg", os.fsencode(s.root / "a") + b"/\xff.jpg")


# name, source, what is said, how many rows are left of 16
BAD = [
    (truncated, "folder", ["a/0.jpg", "truncated"], 15),
    (zero_bytes, "folder", ["a/0.jpg", "empty (0 bytes)"], 15),
    (not_a_picture, "folder", ["a/0.jpg", "not a picture"], 15),
    (bomb, "folder", ["a/bomb.png", "40 x 40 pixels, more than data.max_pixels 900"], 16),
    (
        great_bomb,
        "folder",
        ["a/bomb.png", "50000 x 50000 pixels, more than data.max_pixels 100000000"],
        16,
    ),
    (empty_class, "folder", ["empty", "no picture"], 16),
    (unknown_label, "csv", ["pictures/3.jpg", "'zebra'", "a, b"], 15),
    (path_up, "csv", ["../secret.png", "leads out of"], 16),
    (path_absolute, "csv", ["/etc/hostname", "leads out of"], 16),
    (path_by_link, "csv", ["pictures/link.jpg", "leads out of"], 16),
    (duplicate_id, "csv", ["pictures/again.jpg", "duplicate id id3", "pictures/3.jpg"], 16),
    (csv_row_without_image, "csv", ["pictures/99.jpg", "no such file"], 16),
    (row_without_image, "ham10000", ["I99", "no such image"], 16),
    (image_without_row, "ham10000", ["I99.jpg", "not in HAM10000_metadata.csv"], 16),
    (blank_group, "csv", ["pictures/3.jpg", "column lesion is blank"], 15),
    (blank_lesion, "ham10000", ["I3", "lesion_id is blank"], 15),
    (no_group_found, "folder", ["a/odd.jpg", "data.group_regex", "no group"], 16),
    (name_not_utf8, "folder", ["a/\\udcff.jpg", "not valid UTF-8; rename it"], 15),
]


@pytest.mark.parametrize(("spoil", "kind", "parts", "left"), BAD, ids=[b[0].__name__ for b in BAD])
def test_a_bad_picture_or_row(source, tmp_path, spoil, kind, parts, left):
    s = source(kind)
    spoil(s)
    refused(
        s.prepare(tmp_path / "fail"),
        *parts,
        "fix it, or leave such pictures out with --set data.on_error=skip",
    )
    assert not (tmp_path / "fail/data/manifest.json").exists()
    status = files.read_json(tmp_path / "fail/status.json")
    assert status["state"] == "failed" and all(p in status["error"] for p in parts)

    result = s.prepare(tmp_path / "skip", **{"data.on_error": "skip"})
    assert result.exit_code == 0, (result.output, result.exception)
    problems = leaks(tmp_path / "skip")["problems"]
    assert len(problems) == 1 and set(problems[0]) == {"source", "problem"}
    assert step_folder.manifest(tmp_path / "skip/data")["problems"] == 1
    assert len(prepared(tmp_path / "skip")) == left


def test_what_is_left_out_does_not_move_the_others(source, tmp_path):
    s = source("folder")
    assert s.prepare(tmp_path / "all").exit_code == 0
    truncated(s)
    assert s.prepare(tmp_path / "skip", **{"data.on_error": "skip"}).exit_code == 0
    everything, some = prepared(tmp_path / "all"), prepared(tmp_path / "skip")
    gone = everything.keys() - some.keys()
    assert [everything[i]["source"] for i in gone] == ["a/0.jpg"]
    assert all(some[i]["image"] == everything[i]["image"] for i in some)


# ---- the source as a whole is bad: an error under fail and under skip ----------------------------


def missing_folder(s):
    s.root.rename(s.root.with_name("moved"))


def one_class(s):
    for p in (s.root / "b").iterdir():
        p.unlink()
    (s.root / "b").rmdir()


def one_label(s):
    for row in s.rows:
        row[2] = "a"


def few_groups(s):
    for i in range(8, 16):
        s.rows[i][3] = f"G{i % 3}"


def all_damaged(s):
    for p in s.root.rglob("*.jpg"):
        p.write_bytes(b"")


def no_column(s):
    s.settings["data.columns.label"] = "diagnosis"


WHOLE = [
    (missing_folder, "folder", ["no such file or folder", "check the spelling"]),
    (one_class, "folder", ["only one class, 'a'", "needs two or more"]),
    (one_label, "csv", ["only one class, 'a'", "needs two or more"]),
    (
        few_groups,
        "csv",
        ["class 'b' has 3 groups", "fewer than the 4 roles", "add pictures of other lesions"],
    ),
    (no_column, "csv", ["no column diagnosis", "set data.columns"]),
]


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize(("spoil", "kind", "parts"), WHOLE, ids=[w[0].__name__ for w in WHOLE])
def test_a_bad_source(source, tmp_path, spoil, kind, parts, on_error):
    s = source(kind)
    spoil(s)
    refused(s.prepare(tmp_path / "run", **{"data.on_error": on_error}), *parts)
    assert not (tmp_path / "run/data/manifest.json").exists()


def test_a_path_too_long_for_the_file_system(tmp_path):
    args = [
        "prepare",
        "--engine",
        "local",
        "--run-dir",
        tmp_path / "run",
        "--set",
        "data.source=folder",
    ]
    sets = ["--set", "denoiser.weights=null", "--set", f"data.path={'n' * 300}"]
    refused(run(*args, *sets), "no such file or folder")


def test_nothing_but_damaged_pictures(source, tmp_path):
    s = source("folder")
    all_damaged(s)
    refused(
        s.prepare(tmp_path / "run", **{"data.on_error": "skip"}),
        "none of the 16 pictures",
        "a/0.jpg",
        "and 15 more",
    )


def test_a_class_whose_pictures_are_all_damaged_is_named(source, tmp_path):
    s = source("folder")
    for p in (s.root / "b").iterdir():
        p.write_bytes(b"")
    refused(s.prepare(tmp_path / "run", **{"data.on_error": "skip"}), "class 'b' has 0 groups")


def test_one_picture_under_two_labels(source, tmp_path):
    s = source("folder")
    (s.root / "b/again.jpg").write_bytes((s.root / "a/0.jpg").read_bytes())
    refused(
        s.prepare(tmp_path / "fail"),
        "a/0.jpg (a)",
        "b/again.jpg (b)",
        "leave both out with --set data.on_error=skip",
    )
    assert s.prepare(tmp_path / "skip", **{"data.on_error": "skip"}).exit_code == 0
    assert len(leaks(tmp_path / "skip")["problems"]) == 2 and len(prepared(tmp_path / "skip")) == 15


# ---- unusual pictures are converted --------------------------------------------------------------


def cmyk(path):
    Image.fromarray(pixels(50)).convert("CMYK").save(path.with_suffix(".jpg"), quality=95)


def rgba(path):
    alpha = np.full((24, 24, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([pixels(50), alpha], 2)).save(path.with_suffix(".png"))


def palette(path):
    Image.fromarray(pixels(50)).quantize(64).save(path.with_suffix(".gif"))


def grey(path):
    Image.fromarray(pixels(50)).convert("L").save(path.with_suffix(".jpg"), quality=95)


def deep(path):
    """16 bits a pixel."""
    Image.fromarray(pixels(50).mean(2).astype(np.uint16) * 257).save(path.with_suffix(".png"))


@pytest.mark.parametrize("save", [cmyk, rgba, palette, grey, deep], ids=lambda f: f.__name__)
def test_unusual_pictures_are_converted(source, tmp_path, save):
    s = source("folder")
    save(s.root / "a/odd")
    result = s.prepare(tmp_path / "run")
    assert result.exit_code == 0, result.output
    row = next(r for r in prepared(tmp_path / "run").values() if r["source"].startswith("a/odd."))
    image = tables.decode_png(row["image"])
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    wanted = pixels(50).reshape(-1, 3).mean(0)
    if save in (grey, deep):
        assert np.ptp(image, axis=2).max() == 0
        wanted = np.full(3, wanted.mean() if save is deep else wanted @ [0.299, 0.587, 0.114])
    assert np.abs(image.reshape(-1, 3).mean(0) - wanted).max() < 4
    assert leaks(tmp_path / "run")["problems"] == []


# ---- a fixed source, a full disk, a folder that cannot be written -------------------------------


def test_the_same_command_goes_on_once_the_picture_is_fixed(source, tmp_path):
    s = source("folder")
    assert s.prepare(tmp_path / "undisturbed").exit_code == 0
    good = (s.root / "b/9.jpg").read_bytes()
    (s.root / "b/9.jpg").write_bytes(good[:-300])
    refused(s.prepare(tmp_path / "run"), "b/9.jpg")
    (s.root / "b/9.jpg").write_bytes(good)
    assert s.prepare(tmp_path / "run").exit_code == 0
    assert prepared(tmp_path / "run") == prepared(tmp_path / "undisturbed")


def test_nothing_old_survives_when_the_table_is_fixed(source, tmp_path):
    """The first rows were decoded and committed before the bad picture stopped the run; their
    labels are then corrected.
    """
    s = source("csv")
    picture = s.root / "pictures/15.jpg"
    good = picture.read_bytes()
    picture.write_bytes(b"")
    refused(s.prepare(tmp_path / "run"), "pictures/15.jpg")
    assert tables.parts(tmp_path / "run/data/decoded")
    picture.write_bytes(good)
    s.rows[0][2] = "b"
    assert s.prepare(tmp_path / "run").exit_code == 0
    label = {r["source"]: r["label"] for r in prepared(tmp_path / "run").values()}
    assert label["pictures/0.jpg"] == 1 and label["pictures/1.jpg"] == 0


class Full:
    """A disk that is full from the n-th part on."""

    def __init__(self, monkeypatch, after):
        self.real, self.after, self.written = os.fsync, after, 0
        monkeypatch.setattr(files.os, "fsync", self)

    def __call__(self, file):
        if ".parquet" not in os.readlink(f"/proc/self/fd/{file}"):
            return self.real(file)
        if self.written >= self.after:
            os.ftruncate(file, 16)  # half a part
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written += 1
        return self.real(file)


@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_disk_that_fills_up_while_a_part_is_written(source, tmp_path, monkeypatch, after):
    """16 pictures, 5 a part: 4 parts are decoded, then the roles are written."""
    s = source("folder")
    with monkeypatch.context() as m:
        undisturbed = Full(m, after=1000)
        assert s.prepare(tmp_path / "undisturbed").exit_code == 0
    with monkeypatch.context() as m:
        Full(m, after)
        told = "the disk is full; free some space and run the same command again"
        refused(s.prepare(tmp_path / "run"), str(tmp_path / "run/data"), told)
    assert not list((tmp_path / "run").rglob(".part*"))
    with monkeypatch.context() as m:
        rest = Full(m, after=1000)
        assert s.prepare(tmp_path / "run").exit_code == 0
        assert rest.written == undisturbed.written - after  # no part is made again
    hashes = [
        json.loads((tmp_path / n / "data/split.json").read_text())["split_hash"]
        for n in ("run", "undisturbed")
    ]
    assert hashes[0] == hashes[1] and prepared(tmp_path / "run") == prepared(
        tmp_path / "undisturbed"
    )
    assert not (tmp_path / "run/data/decoded").exists()


def test_a_disk_so_full_that_not_even_the_status_fits_is_one_line_too(
    source, tmp_path, monkeypatch
):
    s = source("folder")
    real, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    refused(
        s.prepare(tmp_path / "run"), "the disk is full", "status.json could not be written either"
    )
    monkeypatch.undo()
    assert s.prepare(tmp_path / "run").exit_code == 0


def test_a_run_folder_that_cannot_be_made(source, tmp_path):
    s = source("folder")
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file/run", tmp_path / "file"]
    if os.path.isdir("/proc/self"):
        places += [Path("/proc/adversa/run")]
    for place in places:
        refused(
            s.prepare(place),
            f"cannot write to {place if place.parts[1] != 'proc' else '/proc'}",
            "another --run-dir",
        )


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_run_folder_that_has_become_read_only(source, tmp_path, monkeypatch, code):
    s = source("folder")
    assert s.prepare(tmp_path / "run").exit_code == 0

    def forbidden(self, *a, **k):
        raise OSError(code, os.strerror(code), str(self))

    with monkeypatch.context() as m:
        m.setattr(Path, "touch", forbidden)
        refused(
            s.prepare(tmp_path / "run"),
            str(tmp_path / "run"),
            "give a --run-dir that can be written",
        )
    assert len(prepared(tmp_path / "run")) == 16


# ---- training that diverges ----------------------------------------------------------------------

TRAIN = {
    "data.phantom.images": 120,
    "data.resolution": 32,
    "classifier.steps": 8,
    "classifier.batch_size": 16,
    "classifier.evaluations": 1,
    "classifier.model_args": "{channels: [8, 8, 8, 8]}",
    "denoiser.architecture": "unet",
    "denoiser.patch": 2,
    "denoiser.channels": "[8, 8]",
    "denoiser.weights": "null",
    "denoiser.steps": 6,
    "denoiser.batch_size": 8,
    "denoiser.checkpoint_steps": 2,
    "cluster.training_threads": 1,
}


def train(root, **changes):
    sets = [a for k, v in (TRAIN | changes).items() for a in ("--set", f"{k}={v}")]
    return run("train", "--engine", "local", "--run-dir", root, *sets)


def test_a_classifier_that_diverges_is_stopped_and_loses_nothing(tmp_path):
    hot = {"classifier.lr": 1e30, "mix.arms": "[real]"}
    refused(train(tmp_path / "run", **hot), "diverged at step", "lower classifier.lr (1e+30)")
    data = RunDir(tmp_path / "run").data
    before = (data / "manifest.json").stat().st_mtime_ns
    refused(train(tmp_path / "run", **hot), "diverged at step")
    assert (data / "manifest.json").stat().st_mtime_ns == before
    assert not (tmp_path / "run/round-000/real/seed-0/classifier/model.safetensors").exists()
    assert run("status", tmp_path / "run").exit_code == 0


def test_a_denoiser_that_diverges_is_stopped_and_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    from adversa.diffuse.objective import Objective

    real, counts = Objective.forward, Counter()

    def forward(*args):
        counts["calls"] += 1
        return tuple(rows * (float("nan") if counts["calls"] == 6 else 1) for rows in real(*args))

    monkeypatch.setattr(Objective, "forward", forward)
    refused(train(tmp_path / "run"), "denoiser", "nan", "step 6", "lower denoiser.lr")
    run_dir = RunDir(tmp_path / "run")
    before = (run_dir.data / "manifest.json").stat().st_mtime_ns
    assert train(tmp_path / "run").exit_code == 0
    assert (run_dir.data / "manifest.json").stat().st_mtime_ns == before
    assert counts["calls"] == 6 + 2  # steps 5 and 6 of 6: the checkpoint holds 4
    assert step_folder.is_finished(run_dir.denoiser) and step_folder.is_finished(
        run_dir.arm(0, "real", 0) / "classifier"
    )
