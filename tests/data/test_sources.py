import os
import shutil
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from adversa.config import Columns, Data
from adversa.data import files, sources
from adversa.types import UserError


def save_image(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 16, 3), value, np.uint8)).save(path)


@pytest.fixture
def table(tmp_path):
    """A good CSV of six pictures of two classes; `write` replaces its rows."""
    for i in range(6):
        save_image(tmp_path / f"pictures/{i}.png", 20 * i)

    def write(rows, header="path,label,group,age"):
        (tmp_path / "data.csv").write_text("\n".join([header, *rows]) + "\n")
        return tmp_path / "data.csv"

    write.rows = [f"pictures/{i}.png,{'ab'[i % 2]},g{i // 2},{30 + i}" for i in range(6)]
    write.root = tmp_path
    return write


def check(config, text, left=None):
    """Under fail: one line with `text`. Under skip: `left` (problems, records); the same error
    where left is None.
    """
    with pytest.raises(UserError, match=text) as caught:
        sources.list_records(config)
    assert "\n" not in str(caught.value)
    skip = config.model_copy(update={"on_error": "skip"})
    if left is None:
        with pytest.raises(UserError, match=text):
            sources.list_records(skip)
        return None
    listing = sources.list_records(skip)
    assert (len(listing.problems), len(listing.records)) == left
    assert all(p["source"] and p["problem"] for p in listing.problems)
    return listing


def test_csv_good(table):
    listing = sources.list_records(Data(source="csv", path=str(table(table.rows))))
    assert listing.classes == ["a", "b"] and listing.problems == [] and len(listing.records) == 6
    first = listing.records[0]
    assert (
        first.source == "pictures/0.png"
        and first.group == "g0"
        and first.attributes == {"age": "30"}
    )
    assert first.uri == f"file:{(table.root / 'pictures/0.png').resolve()}"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("pictures/gone.png,a,g9,1", "no such file"),
        ("../outside.png,a,g9,1", "leads out of"),
        ("/etc/hostname,a,g9,1", "leads out of"),
        ("link.png,a,g9,1", "leads out of"),
        (",a,g9,1", "path is blank"),
        ("pictures/5.png,a,g9,1", "duplicate row"),
        ("pictures,a,g9,1", "no such file"),
        ("pictures/x.png,a,,1", "column group is blank"),
        ("pictures/x.png,,g,1", "column label is blank"),
        ("pictures/x.png,a,g", "3 cells, but 4 columns"),
        ("bad\0name.png,a,g9,1", "not a valid path"),
    ],
)
def test_csv_bad_row(table, row, text):
    save_image(table.root.parent / "outside.png")
    save_image(table.root / "pictures/x.png")
    (table.root / "link.png").symlink_to(table.root.parent / "outside.png")
    check(Data(source="csv", path=str(table([*table.rows, row]))), text, (1, 6))


def test_csv_labels(table):
    path = str(table([*table.rows, "pictures/6.png,c,g9,1"]))
    save_image(table.root / "pictures/6.png")
    assert sources.list_records(Data(source="csv", path=path)).classes == ["a", "b", "c"]
    listing = check(Data(source="csv", path=path, labels=["b", "a"]), "unknown label 'c'", (1, 6))
    assert listing.classes == ["b", "a"]
    listing = check(
        Data(source="csv", path=path, labels=["a", "b", "c", "d"]),
        "d: this class has no picture",
        (1, 7),
    )
    assert listing.classes == ["a", "b", "c"]
    check(Data(source="csv", path=path, labels=["a", "a"]), "names a class twice")


def test_csv_one_class_only(table):
    check(
        Data(source="csv", path=str(table([r for r in table.rows if ",a," in r]))),
        "only one class, 'a'",
    )


def test_messages_name_what_gave_the_path(table, tmp_path):
    config = Data(source="csv", path=str(table([r for r in table.rows if ",a," in r])))
    assert sources.list_records(config, "--on", least=1).classes == ["a"]
    (tmp_path / "empty").mkdir()
    for source, path, text in (
        ("csv", tmp_path, "is not a file"),
        ("folder", tmp_path / "empty", "has no sub-folder"),
        ("ham10000", tmp_path / "empty", "holds no HAM"),
        ("csv", tmp_path / "none", "no such file"),
    ):
        with pytest.raises(UserError, match=f"^--on {path}:? {text}"):
            sources.list_records(Data(source=source, path=str(path)), "--on")


def test_csv_ids_patients_masks_and_no_groups(table):
    save_image(table.root / "masks/0.png")
    columns = Columns(group=None, patient="who", mask="seg", id="key")
    config = Data(source="csv", path=str(table.root / "data.csv"), columns=columns)
    rows = [
        f"pictures/{i}.png,{'ab'[i % 2]},p{i},{'masks/0.png' if i == 0 else ''},k{i}"
        for i in range(4)
    ]
    header = "path,label,who,seg,key"
    table(rows, header)
    records = sources.list_records(config).records
    assert [r.id for r in records] == ["k0", "k1", "k2", "k3"] and [r.patient for r in records] == [
        "p0",
        "p1",
        "p2",
        "p3",
    ]
    assert records[0].mask_uri.endswith("masks/0.png") and records[1].mask_uri is None
    assert len({r.group for r in records}) == 4
    table([*rows, "pictures/4.png,a,p,,k0"], header)
    check(config, "duplicate id k0; the first is pictures/0.png", (1, 4))
    table([*rows, "pictures/4.png,a,p,../x.png,k9"], header)
    check(config, "its mask: leads out of", (1, 4))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "has no rows"),
        (b"path,label,group\n", "has no rows"),
        ("path,label,group\npictures/0.png,n\u00e4vus,g\n".encode("latin-1"), "is not UTF-8"),
        (b"path,class,group\npictures/0.png,a,g\n", "no column label; it has path, class, group"),
        (b"path,label\npictures/0.png,a\n", "no column group"),
        (b"path,label,group,label\npictures/0.png,a,g,b\n", "two columns named label"),
        (b'path,label,group\n"pictures/0.png,a,g\n', "not a valid CSV"),
        (
            b"path;label;group\npictures/0.png;a;1,5\n",
            "separated by semicolons, not by commas; save it as comma-separated",
        ),
        (b'\n"path";"label";"group"\n"pictures/0.png";"a";"g"\n', "separated by semicolons"),
        (b"path\tlabel\tgroup\npictures/0.png\ta\tg\n", "separated by tabs"),
    ],
)
def test_csv_unusable(table, data, text):
    path = table.root / "data.csv"
    path.write_bytes(data)
    check(Data(source="csv", path=str(path)), text)


def test_csv_with_a_byte_order_mark_and_blank_lines(table):
    path = table([*table.rows, "", ",,,"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(sources.list_records(Data(source="csv", path=str(path))).records) == 6


@pytest.mark.parametrize("source", ["csv", "folder", "ham10000"])
def test_missing_path(tmp_path, source):
    check(Data(source=source, path=str(tmp_path / "nowhere")), "no such file or folder")


def test_folder(tmp_path):
    for name in (
        "a/l1_1.png",
        "a/l1_2.png",
        "a/deep/l2_1.PNG",
        "b/l3_1.png",
        "b/notes.txt",
        "b/.hidden.png",
    ):
        save_image(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text(
            "x"
        )
    config = Data(source="folder", path=str(tmp_path), group_regex=r"(l\d+)_")
    listing = sources.list_records(config)
    assert [(r.source, r.label, r.group) for r in listing.records] == [
        ("a/deep/l2_1.PNG", "a", "l2"),
        ("a/l1_1.png", "a", "l1"),
        ("a/l1_2.png", "a", "l1"),
        ("b/l3_1.png", "b", "l3"),
    ]
    assert (
        len(
            {
                r.group
                for r in sources.list_records(Data(source="folder", path=str(tmp_path))).records
            }
        )
        == 4
    )

    (tmp_path / "c").mkdir()
    assert check(config, "c: this class has no picture", (1, 4)).classes == ["a", "b"]
    (tmp_path / "c").rmdir()
    save_image(tmp_path / "b/odd.png")
    check(config, "b/odd.png: .* finds no group", (1, 4))
    (tmp_path / "b/odd.png").rename(tmp_path / "b/odd_l9_.heic")
    check(config, "not a kind of picture", (1, 4))
    (tmp_path / "b/odd_l9_.heic").rename(tmp_path / "l9_1.png")
    check(config, "lies beside the class folders", (1, 4))
    (tmp_path / "l9_1.png").unlink()
    check(config.model_copy(update={"group_regex": "(l"}), "not a regular expression")
    check(config.model_copy(update={"group_regex": "l"}), "captures nothing")
    shutil.rmtree(tmp_path / "b")
    check(config, "only one class")
    shutil.rmtree(tmp_path / "a")
    check(config, "no sub-folder")


def test_a_folder_gives_no_file_from_elsewhere_and_waits_for_no_pipe(tmp_path):
    for name in ("here/a/one.png", "here/a/kept.png", "here/b/two.png", "away/secret.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(tmp_path / name)
    root = tmp_path / "here"
    (root / "a/away.png").symlink_to(tmp_path / "away/secret.png")
    (root / "a/within.png").symlink_to(root / "b/two.png")
    (root / "b/folder").symlink_to(tmp_path / "away")
    os.mkfifo(root / "b/x.png")
    config = Data(source="folder", path=str(root), on_error="skip")
    for name, said in {
        "a/away.png": "leads out of",
        "b/folder/secret.png": "leads out of",
        "b/x.png": "no regular file",
    }.items():
        listing = sources.list_records(config)
        assert any(name in str(p) and said in str(p) for p in listing.problems)
    assert [r.source for r in listing.records] == [
        "a/kept.png",
        "a/one.png",
        "a/within.png",
        "b/two.png",
    ]
    with pytest.raises(OSError, match="no regular file"):
        files.Reader()(f"file:{root / 'b/x.png'}")


META = "lesion_id,image_id,dx,dx_type,age,sex,localization"


def ham(root, rows, folders=("",), images=()):
    root.mkdir(parents=True, exist_ok=True)
    (root / "HAM10000_metadata.csv").write_text("\n".join([META, *rows]) + "\n")
    for i, name in enumerate(images):
        save_image(root / folders[i % len(folders)] / f"{name}.jpg", 40 * i)
    return root


ROWS = [
    "L1,I1,nv,histo,50.0,male,back",
    "L1,I2,nv,histo,50.0,male,back",
    "L2,I3,mel,histo,,female,",
]


@pytest.mark.parametrize(
    "folders", [("images",), ("",), ("HAM10000_images_part_1", "HAM10000_images_part_2")]
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("top", ["", "archive"])
def test_ham_layouts(tmp_path, folders, packed, top):
    root = ham(tmp_path / "d" / top, ROWS, folders, ["I1", "I2", "I3"])
    save_image(root / "masks" / "I1_segmentation.png")
    (root / "duplicate_lesion_pairs.csv").write_text("lesion_a,lesion_b\nL2,L1\nL1,L77\n")
    path = tmp_path / "d"
    if packed:
        path = tmp_path / "d.zip"
        with zipfile.ZipFile(path, "w") as z:
            for p in (tmp_path / "d").rglob("*"):
                z.write(p, p.relative_to(tmp_path / "d"))
    listing = sources.list_records(Data(source="ham10000", path=str(path)))
    assert listing.classes == ["mel", "nv"] and listing.merged == [
        ("L2", "L1", "duplicate_lesion_pairs.csv")
    ]
    first, _, third = listing.records
    assert (first.id, first.source, first.group, first.label) == ("I1", "I1.jpg", "L1", "nv")
    assert first.attributes == {
        "age": "50.0",
        "sex": "male",
        "localization": "back",
        "dx_type": "histo",
    }
    assert third.attributes == {"sex": "female", "dx_type": "histo"}
    assert (
        first.mask_uri
        and third.mask_uri is None
        and first.uri.startswith("zip:" if packed else "file:")
    )


def test_ham_faults(tmp_path):
    def fresh(name, rows, images=("I1", "I2", "I3")):
        return Data(source="ham10000", path=str(ham(tmp_path / name, rows, ("images",), images)))

    check(
        fresh("a", [*ROWS, "L9,I9,nv,histo,,,"]),
        "I9: in HAM10000_metadata.csv, but there is no such image",
        (1, 3),
    )
    check(
        fresh("b", ROWS, ("I1", "I2", "I3", "I4")),
        "images/I4.jpg: not in HAM10000_metadata.csv",
        (1, 3),
    )
    check(fresh("c", [*ROWS, "L9,I3,mel,histo,,,"]), "duplicate id I3", (1, 3))
    check(
        fresh("d", [*ROWS, ",I4,mel,histo,,,"], ("I1", "I2", "I3", "I4")),
        "I4: lesion_id is blank",
        (1, 3),
    )
    check(
        fresh("e", [*ROWS, "L9,I4,,histo,,,"], ("I1", "I2", "I3", "I4")), "I4: dx is blank", (1, 3)
    )
    config = fresh("f", ROWS)
    (tmp_path / "f" / "HAM10000_metadata.csv").unlink()
    check(config, "holds no HAM10000_metadata.csv")
    (tmp_path / "g.zip").write_bytes(b"PK not a zip")
    check(Data(source="ham10000", path=str(tmp_path / "g.zip")), "cannot be read")
    check(
        Data(source="ham10000", path=str(tmp_path / "f" / "images" / "I1.jpg")),
        "neither a folder nor a .zip",
    )


def test_ham_complete(ham_zip):
    listing = sources.list_records(Data(source="ham10000", path=str(ham_zip)))
    counts = Counter(r.label for r in listing.records)
    assert counts == dict(nv=6705, mel=1113, bkl=1099, bcc=514, akiec=327, vasc=142, df=115)
    assert len({r.group for r in listing.records}) == 7470 and listing.problems == []
    with zipfile.ZipFile(ham_zip) as z:  # the list is not part of HAM10000 itself
        listed = any(n.endswith("duplicate_lesion_pairs.csv") for n in z.namelist())
    assert len(listing.merged) == (18 if listed else 0)
    assert all(r.mask_uri for r in listing.records)


def test_phantom_lists_without_drawing():
    listing = sources.list_records(Data())
    assert (
        len(listing.records) == 1600
        and len(listing.classes) == 5
        and listing.records[3].uri == "phantom:3"
    )
    assert {r.attributes["mode"] for r in listing.records if r.label == "melanoma"} == {
        "typical",
        "amelanotic",
    }
