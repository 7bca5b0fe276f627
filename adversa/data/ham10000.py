"""HAM10000 (Tschandl, Rosendahl, Kittler, Sci Data 2018) as it is distributed: in folders or in one
archive.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from adversa.data import files
from adversa.data.records import ImageRecord, Problems, read_csv
from adversa.types import UserError

HAM_FOLDERS = ("", "images", "ham10000_images_part_1", "ham10000_images_part_2")
HAM_METADATA = ("HAM10000_metadata.csv", "HAM10000_metadata")
HAM_PAIRS = "duplicate_lesion_pairs.csv"
HAM_ATTRIBUTES = ("age", "sex", "localization", "dx_type")


def list_ham10000(
    path: Path, problems: Problems, option: str = "data.path"
) -> tuple[list[ImageRecord], list[tuple[str, str, str]]]:
    """(records, groups known to be one lesion). option: what the user gave the path by, for
    messages.
    """
    names, read, uri = _tree(path, option)
    images: dict[str, str] = {}  # stem -> name
    masks: dict[str, str] = {}
    for name in sorted(names):
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.rpartition(".")
        if stem.endswith("_segmentation") and suffix.lower() == "png":
            masks.setdefault(stem.removesuffix("_segmentation"), name)
        elif folder.lower() in HAM_FOLDERS and suffix.lower() in ("jpg", "jpeg", "png"):
            images.setdefault(stem, name)  # some distributions hold the same folder twice
    table = next((n for n in HAM_METADATA if n in names), None)
    if table is None:
        raise UserError(
            f"{option} {path} holds no HAM10000_metadata.csv; put the metadata beside the "
            "folders of images"
        )
    rows = read_csv(read(table), table, ("image_id", "lesion_id", "dx"), problems)
    records, listed = [], set()
    for row in rows:
        image, lesion = row["image_id"], row["lesion_id"]
        listed.add(image)
        if image not in images:
            problems.add(image, f"in {table}, but there is no such image")
        elif not lesion:
            problems.add(image, f"lesion_id is blank in {table}")
        elif not row["dx"]:
            problems.add(image, f"dx is blank in {table}")
        else:
            attributes = {k: row[k] for k in HAM_ATTRIBUTES if row.get(k)}
            name = images[image]
            mask = uri(masks[image]) if image in masks else None
            records.append(
                ImageRecord(
                    image,
                    name.rpartition("/")[2],
                    uri(name),
                    row["dx"],
                    lesion,
                    "",
                    attributes,
                    mask,
                )
            )
    for stem in sorted(images.keys() - listed):
        problems.add(images[stem], f"not in {table}")
    merged = []
    if HAM_PAIRS in names:
        pairs = read_csv(read(HAM_PAIRS), HAM_PAIRS, ("lesion_a", "lesion_b"), problems)
        merged = [(r["lesion_a"], r["lesion_b"], HAM_PAIRS) for r in pairs]
    return records, merged


def _tree(path: Path, option: str) -> tuple[set[str], Callable[[str], bytes], Callable[[str], str]]:
    """(relative names with /, read a name's bytes, a name's uri) of a folder or a .zip.

    A lone top folder in it is looked through.
    """
    if path.is_dir():
        names, prefix = _lone_folder(files.walk(path))
        return (
            names,
            lambda n: files.read(f"file:{path / (prefix + n)}"),
            lambda n: f"file:{path / (prefix + n)}",
        )
    if path.suffix.lower() != ".zip":
        raise UserError(
            f"{option} {path} is neither a folder nor a .zip; give HAM10000's folder or archive"
        )
    try:
        with zipfile.ZipFile(path) as z:
            found = {
                i.filename for i in z.infolist() if not i.is_dir() and "__MACOSX" not in i.filename
            }
    except (zipfile.BadZipFile, OSError) as e:
        raise UserError(
            f"{option} {path} cannot be read ({e}); download the archive again"
        ) from None
    names, prefix = _lone_folder(found)
    return (
        names,
        lambda n: files.read(f"zip:{path}!{prefix}{n}"),
        lambda n: f"zip:{path}!{prefix}{n}",
    )


def _lone_folder(names: Iterable[str]) -> tuple[set[str], str]:
    names = set(names)
    tops = {n.split("/", 1)[0] for n in names}
    if len(tops) == 1 and all("/" in n for n in names):
        top = tops.pop() + "/"
        return {n.removeprefix(top) for n in names}, top
    return names, ""
