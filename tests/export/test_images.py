import csv
import json
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from adversa.export import dataset_card, formats, images
from adversa.export.images import parse_labels
from adversa.run import file_lock
from adversa.run import folder as run_folder
from adversa.storage import tables
from adversa.types import GenerationRequest, SyntheticImage, UserError, digest, seed_of

CLASSES = ["mel", "a/b", "..", "test", "Größe व्रण", "unused"]
ORIGIN = images.Origin(
    "runs/demo/denoiser",
    {"solver": "dpmpp_2m", "steps": 16, "guidance_low": 0.2},
    seed=7,
    trained_on="the phantom",
)


def picture(number):
    return tables.encode_png(np.full((8, 8, 3), number, np.uint8))


@pytest.fixture
def generated(tmp_path):
    """(synthetic, requests) of 3 parts of 6 rows: the first not finite, the last not generated;
    parts in another order of rows.
    """
    for k in range(3):
        asked, made = [], []
        for i in range(6):
            key, n = digest("r", k, i, size=10), 6 * k + i
            asked.append(
                GenerationRequest(
                    key,
                    1,
                    "guided",
                    "img2img" if k else "sample",
                    n % 5,
                    digest("e", i) if k else None,
                    0.1 * n,
                    2.0,
                    seed_of(key),
                )
            )
            made.append(SyntheticImage(key, "guided", n % 5, picture(n), n != 0, "f00d"))
        made = made[::-1] if k < 2 else made[:-1]
        tables.write_part(
            tmp_path / "requests" / tables.part_name(k), tables.to_table(asked, tables.REQUESTS)
        )
        tables.write_part(
            tmp_path / "synthetic" / tables.part_name(k), tables.to_table(made, tables.SYNTHETIC)
        )
    return tmp_path / "synthetic", tmp_path / "requests"


def run(generated, out, form, **changes):
    return images.export(*generated, changes.pop("classes", CLASSES), out, form, ORIGIN, **changes)


def front(out):
    return yaml.safe_load((out / "README.md").read_text().split("---\n")[1])


def files(folder):
    """name -> (bytes, when written) of all files but the lock."""
    return {
        p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


def requests_of(generated):
    return {r["request_id"]: r for r in tables.read(generated[1]).to_pylist()}


# ---- what is written -----------------------------------------------------------------------------


def test_folder_has_each_finite_image_and_its_whole_request(generated, tmp_path):
    out, asked, seen = tmp_path / "out", requests_of(generated), []
    result = run(generated, out, "folder", progress=seen.append)
    assert (result.images, result.not_finite, result.not_generated) == (16, 1, 1) and seen[-1] == {
        "done": 3,
        "total": 3,
    }
    with open(out / "metadata.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    folders = formats.folder_names(CLASSES)
    assert len(rows) == 16 and {f"{p.parent.name}/{p.name}" for p in out.glob("*/*.png")} == {
        r["file_name"] for r in rows
    }
    for row in rows:
        request = asked[row["request_id"]]
        assert {k: row[k] for k in request} == {
            k: "-" if v is None else str(v) for k, v in request.items()
        }
        label = request["label"]
        assert (
            row["class"] == CLASSES[label]
            and row["file_name"] == f"{folders[label]}/{row['request_id']}.png"
        )
        assert (row["finite"], row["denoiser"]) == ("True", "f00d")
        image = tables.decode_png((out / row["file_name"]).read_bytes())
        assert image[0, 0, 0] == round(request["sigma_start"] / 0.1)
    assert result.by_class == {c: sum(r["class"] == c for r in rows) for c in CLASSES[:5]}


def test_parquet_has_image_and_request_in_one_table(generated, tmp_path):
    out, asked = tmp_path / "out", requests_of(generated)
    result = run(generated, out, "parquet")
    table = tables.read(out / "data")
    assert result.images == len(table) == 16 and table.schema.names == images.ROWS.names
    for row in table.to_pylist():
        request = asked[row["request_id"]]
        assert {k: row[k] for k in request} == request and row["class"] == CLASSES[row["label"]]
        assert (
            row["finite"]
            and row["denoiser"] == "f00d"
            and row["image"]["path"] == f"{row['request_id']}.png"
        )
        assert tables.decode_png(row["image"]["bytes"])[0, 0, 0] == round(row["sigma_start"] / 0.1)
    features = json.loads(
        pq.read_schema(out / "data" / tables.part_name(0)).metadata[b"huggingface"]
    )["info"]["features"]
    assert features["image"] == {"_type": "Image"} and features["label"]["names"] == CLASSES
    assert list(features) == images.ROWS.names and features["seed"]["dtype"] == "int64"


@pytest.mark.parametrize("form", images.FORMATS)
def test_card_says_what_a_person_must_know(generated, tmp_path, form):
    out = tmp_path / "out"
    (generated[0] / "recipe.json").write_text("{}")
    (generated[0] / "manifest.json").write_text('{"finished": "2031-01-02T03:04:05+00:00"}')
    run(generated, out, form)
    text, head = (out / "README.md").read_text(), front(out)
    for word in (
        "16 images in 5 classes",
        "Not for diagnosis",
        "derived from",
        "`f00d`",
        "runs/demo/denoiser",
        "the phantom",
        "dpmpp_2m",
        "guidance_low",
        "2031-01-02T03:04:05",
        "adversa | 0.",
        "| seed | 7 |",
        "img2img (11), sample (5)",
        "| guidance | 2 |",
        "0.1 to 1.6 (16 values)",
        "1 more came out not finite",
        "1 more could not be generated",
        "not done",
        "Fill in the licence",
    ):
        assert word in text, word
    assert head["license"] == "other" and head["size_categories"] == ["n<1K"]
    (files_,) = head["configs"]
    assert files_["data_files"] == [{"split": "train", "path": dataset_card.FILES[form]}]
    features = {f["name"]: f["dtype"] for f in head["dataset_info"]["features"]}
    assert features["image"] == "image" and features["label"]["class_label"]["names"]["1"] == "a/b"
    assert list(features) == images.ROWS.names
    by_class = dict(
        re.findall(r"^\| (\S.*?) \|(?: .* \|)? (\d+) \|$", text.split("## How")[0], re.M)
    )
    assert by_class == {"mel": "3", "a/b": "4", "..": "3", "test": "3", "Größe व्रण": "3"}


def test_card_reports_a_near_copy_check():
    origin = images.Origin("d", {}, near_copies="done: 3 of 500 images removed.")
    text = dataset_card.text(
        origin, dataset_card.Tally(), ["a"], ["a"], "today", "folder", images.ROWS
    )
    assert (
        "Near-copy check: done: 3 of 500" in text
        and "not done" not in text
        and "none: no image" in text
    )
    assert [dataset_card._size(n) for n in (0, 999, 1000, 9_999, 10_000, 2_000_000, 10**12)] == [
        "n<1K",
        "n<1K",
        "1K<n<10K",
        "1K<n<10K",
        "10K<n<100K",
        "1M<n<10M",
        "n>1B",
    ]


@pytest.mark.parametrize("form", images.FORMATS)
def test_datasets_reads_it(generated, tmp_path, form, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip(
        "datasets", reason="Hugging Face's datasets is no dependency of the project"
    )
    run(generated, tmp_path / "out", form)
    explicit = (
        {"data_dir": str(tmp_path / "out")}
        if form == "folder"
        else {"data_files": str(tmp_path / "out/data/*.parquet")}
    )
    for words, more in [((str(tmp_path / "out"),), {}), ((dataset_card.BUILDERS[form],), explicit)]:
        loaded = datasets.load_dataset(*words, **more, cache_dir=str(tmp_path / "cache"))
        assert list(loaded) == ["train"] and len(loaded["train"]) == 16
        row = loaded["train"][0]
        assert (
            row["image"].size == (8, 8)
            and row["request_id"] in requests_of(generated)
            and row["class"] in CLASSES
        )


# ---- again, cut off, elsewhere -------------------------------------------------------------------


@pytest.mark.parametrize("form", images.FORMATS)
def test_a_second_run_writes_nothing(generated, tmp_path, form):
    first = run(generated, tmp_path / "out", form)
    before = files(tmp_path / "out")
    again = run(generated, tmp_path / "out", form)
    assert files(tmp_path / "out") == before and again.written == 0 < first.written
    assert again.by_class == first.by_class and again.images == first.images


@pytest.mark.parametrize("form", images.FORMATS)
def test_what_is_lost_or_torn_is_written_again_and_nothing_else(generated, tmp_path, form):
    out = tmp_path / "out"
    run(generated, out, form)
    before = files(out)
    images = sorted(n for n in before if n.endswith((".png", ".parquet")))
    (out / images[0]).unlink()
    (out / images[1]).write_bytes(before[images[1]][0][:40])
    (out / "README.md").write_text("the licence is mine")
    left = out / Path(images[2]).parent / ".half.png.12345"  # of a killed process
    left.write_bytes(b"x")
    again = run(generated, out, form)
    after = files(out)
    assert (
        again.written == 2 and after["README.md"][0] == b"the licence is mine" and not left.exists()
    )
    assert {n: b for n, (b, _) in after.items() if n != "README.md"} == {
        n: b for n, (b, _) in before.items() if n != "README.md"
    }
    assert all(after[n] == before[n] for n in images[2:])


@pytest.mark.parametrize("form", images.FORMATS)
def test_a_cut_off_export_goes_on(generated, tmp_path, form):
    whole = run(generated, tmp_path / "whole", form)

    def stop(state):
        if state["done"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(generated, tmp_path / "out", form, progress=stop)
    begun = files(tmp_path / "out")
    assert (
        "README.md" not in begun
        and "metadata.csv" not in begun
        and not [n for n in begun if Path(n).name.startswith(".")]
    )
    rest = run(generated, tmp_path / "out", form)
    assert 0 < rest.written < whole.written
    after = files(tmp_path / "out")
    assert all(after[n] == before for n, before in begun.items())
    assert {n: b for n, (b, _) in after.items() if n != "README.md"} == {
        n: b for n, (b, _) in files(tmp_path / "whole").items() if n != "README.md"
    }


def test_one_part_at_a_time(generated, tmp_path, monkeypatch):
    """No part is read before the one before it is on disk."""
    out, seen = tmp_path / "out", []
    rows = images.rows

    def spy(path, *rest):
        seen.append((path.name, len(list(out.glob("*/*.png")))))
        return rows(path, *rest)

    monkeypatch.setattr(images, "rows", spy)
    run(generated, out, "folder")
    assert seen == [
        ("part-00000.parquet", 0),
        ("part-00001.parquet", 5),
        ("part-00002.parquet", 11),
    ]


# ---- refusals ------------------------------------------------------------------------------------


def refused(generated, out, form="folder", **changes):
    with pytest.raises(UserError) as e:
        run(generated, out, form, **changes)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_out_that_holds_something_else_is_refused_untouched(generated, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.doc").write_text("mine")
    assert "not empty and not an export" in refused(generated, out)
    assert [p.name for p in out.iterdir()] == ["thesis.doc"]
    assert "is a file" in refused(generated, out / "thesis.doc")
    (out / "thesis.doc").rename(out / ".DS_Store")
    assert run(generated, out, "folder").images == 16  # a hidden file is no content
    before = files(out)
    assert "format: folder -> parquet" in refused(generated, out, "parquet")
    assert "classes" in refused(generated, out, classes=["other", *CLASSES[1:]])
    part = tables.read(generated[0]).slice(0, 3)
    shutil.rmtree(generated[0])
    tables.write_part(generated[0] / tables.part_name(0), part)
    assert "images: " in refused(generated, out) and files(out) == before


def test_bad_questions_are_refused_before_anything_is_written(generated, tmp_path):
    out = tmp_path / "out"
    assert "--format tar" in refused(generated, out, "tar")
    assert "no generated images" in refused((tmp_path / "nothing", generated[1]), out)
    assert "part-00000.parquet" in refused((generated[0], tmp_path / "nothing"), out)
    (generated[0] / "recipe.json").write_text("{}")
    assert "not finished" in refused(generated, out)
    assert not out.exists()


def test_requests_of_other_images_are_refused(generated, tmp_path):
    (generated[1] / tables.part_name(0)).write_bytes(
        (generated[1] / tables.part_name(1)).read_bytes()
    )
    assert "has no request" in refused(generated, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_that_cannot_be_written(generated, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    message = refused(generated, tmp_path / "closed" / "out")
    assert "--out" in message and "permission" in message


def test_out_below_a_file_names_the_option(generated, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(generated, tmp_path / "file" / "out")
    assert "--out" in message and "--run-dir" not in message


def test_out_in_use_is_refused(generated, tmp_path):
    (tmp_path / "out").mkdir()
    with file_lock.lock(run_folder.RunDir(tmp_path / "out")):
        message = refused(generated, tmp_path / "out")
    assert "in use" in message and message.endswith("use another --out")


def test_a_part_that_was_never_generated_is_counted(generated, tmp_path):
    (generated[0] / tables.part_name(2)).unlink()
    result = run(generated, tmp_path / "out", "folder")
    assert (result.images, result.not_generated) == (11, 6)


def test_a_row_with_a_fault_was_not_generated(generated, tmp_path):
    path = generated[0] / tables.part_name(1)
    rows = pq.read_table(path).to_pylist()
    rows[0] |= {"finite": False, "fault": "its sampler died 3 times"}
    tables.write_part(path, pa.Table.from_pylist(rows, schema=tables.SYNTHETIC))
    result = run(generated, tmp_path / "out", "folder")
    assert (result.images, result.not_finite, result.not_generated) == (15, 1, 2)


def test_nothing_finite_is_an_empty_export(tmp_path):
    asked = GenerationRequest("a", 1, "guided", "sample", 0, None, 40.0, 2.0, 1)
    tables.write_part(
        tmp_path / "r" / tables.part_name(0), tables.to_table([asked], tables.REQUESTS)
    )
    made = SyntheticImage("a", "guided", 0, picture(0), False, "f00d")
    tables.write_part(
        tmp_path / "s" / tables.part_name(0), tables.to_table([made], tables.SYNTHETIC)
    )
    for form in images.FORMATS:
        result = images.export(tmp_path / "s", tmp_path / "r", ["a"], tmp_path / form, form, ORIGIN)
        assert (result.images, result.not_finite) == (0, 1) and "0 images" in (
            tmp_path / form / "README.md"
        ).read_text()


# ---- names of folders ----------------------------------------------------------------------------

NASTY = [
    "a/b",
    "a\\b",
    "a:b",
    "..",
    ".",
    "",
    "  ",
    ".hidden",
    "__pycache__",
    "CON",
    "nul.txt",
    "a*b?[c]",
    "x" * 300,
    "é" * 100,
    "tab\there",
    "new\nline",
    "\x00",
    "name.",
    "-rf",
    "metadata.csv",
    "README.md",
    "export.json",
    "data",
    "Mel",
    "mel",
    "MEL ",
    "e\u0301",
    "\u00e9",
    "\ufb01ne",
    "fine",
    "黑色素瘤",
    "व्रण",
    "test",
    "my-test",
    "dev 2",
    "TRAIN",
    "latest",
    "validated",
    "a_b",
]


def test_folder_names_are_safe_and_different(tmp_path):
    names = formats.folder_names(NASTY)
    assert len({unicodedata.normalize("NFKC", n).casefold() for n in names}) == len(NASTY)
    own = {formats.MARK.lower(), formats.METADATA.lower(), formats.README.lower(), "data"}
    for n in names:
        assert (
            n.strip() == n
            and not re.search(r'[/\\:*?"<>|\[\]\x00-\x1f]', n)
            and n[0] not in "._-"
            and not n.endswith(".")
        )
        assert (
            len(n.encode()) < 100 and n.lower() not in own and n.lower() not in ("con", "nul.txt")
        )
        words = re.split(r"[-._ 0-9]+", n.lower())
        assert not set(words) & set(formats.SPLIT_WORDS), n  # `datasets` would take it for a split
        (tmp_path / n).mkdir()
    plain = [
        "mel",
        "bkl",
        "basal cell carcinoma",
        "Größe",
        "黑色素瘤",
        "व्रण",
        "grade_2 (high)",
        "latest",
    ]
    assert formats.folder_names(plain) == plain


# ---- --labels ------------------------------------------------------------------------------------

NAMES = ["akiec", "bcc", "mel", "df", "Melanoma, NOS", "a=b"]


def test_labels_are_read():
    assert parse_labels("mel=500,df=200", NAMES) == {2: 500, 3: 200}
    assert list(parse_labels(" df = 1 , akiec = 2 ", NAMES).items()) == [(0, 2), (3, 1)]
    assert parse_labels("Melanoma, NOS=5,a=b=6,mel=7", NAMES) == {4: 5, 5: 6, 2: 7}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty entry"),
        ("  ", "empty entry"),
        ("mel=1,", "empty entry"),
        (",", "empty entry"),
        ("mel", "not a class and a number"),
        ("=5", "not a class and a number"),
        ("mel=", "not a whole number"),
        ("mel=0", "mel=0"),
        ("mel=-3", "mel=-3"),
        ("mel=1.5", "mel=1.5"),
        ("mel=1e3", "whole number"),
        ("mel=many", "whole number"),
        ("mel=1_000", "whole number"),
        ("mel=٣", "whole number"),
        ("mel=1,mel=2", "mel is given twice"),
        ("mal=5", "did you mean mel?"),
        ("MEL=5", "did you mean mel?"),
        ("zzz=5", "the classes are akiec, bcc"),
        ("mel=1;df=2", "no class mel=1;df"),
        ("melanoma nos=1", "did you mean Melanoma, NOS?"),
    ],
)
def test_bad_labels_are_refused(text, reason):
    with pytest.raises(UserError) as e:
        parse_labels(text, NAMES)
    assert reason in str(e.value) and "--labels" in str(e.value) and "\n" not in str(e.value)


def test_rows_have_every_field_of_a_request():
    assert set(tables.REQUESTS.names) <= set(images.ROWS.names) and isinstance(
        images.ROWS, pa.Schema
    )
