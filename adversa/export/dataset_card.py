"""The dataset card of an export: Hugging Face's README.md, YAML in front, then what a person must
know before using the images.

The YAML follows https://github.com/huggingface/hub-docs/blob/main/datasetcard.md;
`datasets.load_dataset(FOLDER)` reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from adversa.run import differences, environment
from adversa.storage import tables

FOLDER, PARQUET, WEBDATASET = "folder", "parquet", "webdataset"
FILES = {
    FOLDER: ["metadata.csv", "**/*.png"],
    PARQUET: "data/*.parquet",
    WEBDATASET: "images-*.tar",
}
BUILDERS = {FOLDER: "imagefolder", PARQUET: "parquet", WEBDATASET: "webdataset"}
# Of each image its own, or told apart from the rest.
HIDDEN = (
    "request_id",
    "round",
    "arm",
    "label",
    "example",
    "partner",
    "seed",
    "classifier",
    "classifier_round",
)


@dataclass(frozen=True)
class Origin:
    """How the images came about, as far as their own rows do not say.

    denoiser: where it came from (a folder, a hub id); trained_on: the pictures it was trained on,
    in words; settings: the `generate` section, plain values; seed: of the run or the command;
    near_copies: what a check against the real images found, in words of Markdown, None: there was
    no check. versions: of what painted them, None: of what writes the card.

    title, facts (what, value), sections (Markdown, after the counts) and columns (a sentence on
    further columns) add to the card.
    """

    denoiser: str
    settings: Mapping[str, Any]
    seed: int | None = None
    trained_on: str = "not recorded"
    near_copies: str | None = None
    versions: Mapping[str, str] | None = None
    title: str = "Synthetic images painted by adversa"
    facts: Sequence[tuple[str, str]] = ()
    sections: str = ""
    columns: str = ""


@dataclass
class Tally:
    """What the rows of an export add up to; filled part by part."""

    classes: Counter[str] = field(default_factory=Counter)
    denoisers: Counter[str] = field(default_factory=Counter)
    values: dict[str, Counter[Any]] = field(
        default_factory=dict
    )  # of the requests' fields that hold for many images
    not_finite: int = 0
    unpainted: int = 0

    def add(self, rows: pa.Table) -> None:
        """rows: of the images written, with every request field, `class` and `denoiser`."""
        self.classes.update(rows["class"].to_pylist())
        self.denoisers.update(rows["denoiser"].to_pylist())
        for name in (n for n in tables.REQUESTS.names if n not in HIDDEN):
            self.values.setdefault(name, Counter()).update(rows[name].to_pylist())

    @property
    def images(self) -> int:
        return self.classes.total()


def text(
    origin: Origin,
    tally: Tally,
    classes: Sequence[str],
    folders: Sequence[str],
    date: str,
    form: str,
    features: pa.Schema,
) -> str:
    """The whole README.md. folders: of each class; features: the columns of an image's row, `image`
    first.
    """
    from huggingface_hub import DatasetCardData

    front = DatasetCardData(
        license="other",
        license_name="to-be-filled-in",
        pretty_name=origin.title,
        task_categories=["image-classification"],
        annotations_creators=["machine-generated"],
        size_categories=[_size(tally.images)],
        tags=["synthetic", "diffusion", "adversa"],
        configs=[
            {"config_name": "default", "data_files": [{"split": "train", "path": FILES[form]}]}
        ],
        dataset_info={"features": _features(form, classes, features)},
    )
    licence = (
        "# Fill in the licence: the terms of the pictures the denoiser was trained on bind "
        "these images too."
    )
    return f"---\n{licence}\n{front.to_yaml()}\n---\n\n{_body(origin, tally, classes, folders, date, form)}"


def _features(form: str, classes: Sequence[str], schema: pa.Schema) -> list[dict[str, Any]]:
    """The columns in `datasets`' own words; of WebDataset those that it makes of a sample's
    files.
    """
    label = {"class_label": {"names": {str(i): c for i, c in enumerate(classes)}}}
    kinds: dict[str, Any] = {"image": "image", "label": label}
    plain = [{"name": f.name, "dtype": kinds.get(f.name) or dtype(f.type)} for f in schema]
    if form != WEBDATASET:
        return plain
    struct = [
        {"name": f.name, "dtype": dtype(f.type)}
        for f in sorted(schema, key=lambda f: f.name)
        if f.name != "image"
    ]
    names = [{"name": name, "dtype": "string"} for name in ("__key__", "__url__")]
    return [
        {"name": "cls", "dtype": label},
        {"name": "json", "struct": struct},
        {"name": "png", "dtype": "image"},
        *names,
    ]


def dtype(kind: pa.DataType) -> str:
    """Its name in `datasets`."""
    return {"double": "float64"}.get(str(kind), str(kind))


def _size(n: int) -> str:
    """The Hub's word for a number of images."""
    edges = [
        (10**3, "1K"),
        (10**4, "10K"),
        (10**5, "100K"),
        (10**6, "1M"),
        (10**7, "10M"),
        (10**8, "100M"),
        (10**9, "1B"),
    ]
    if n < edges[0][0]:
        return "n<1K"
    for (_, low), (limit, high) in zip(edges, edges[1:], strict=False):
        if n < limit:
            return f"{low}<n<{high}"
    return "n>1B"


def _body(
    origin: Origin,
    tally: Tally,
    classes: Sequence[str],
    folders: Sequence[str],
    date: str,
    form: str,
) -> str:
    counts = [
        (cell(c), f, str(tally.classes[c]))
        for c, f in zip(classes, folders, strict=True)
        if tally.classes[c]
    ]
    head = ("class", "folder", "images") if form == FOLDER else ("class", "images")
    counted = table(head, [row if form == FOLDER else (row[0], row[2]) for row in counts])
    painters = ", ".join(f"`{d}`" for d in sorted(tally.denoisers)) or "none: no image was painted"
    facts = [
        ("denoiser, fingerprint", painters),
        ("denoiser, from", cell(origin.denoiser)),
        ("denoiser, trained on", cell(origin.trained_on)),
        *((name, values(counter)) for name, counter in tally.values.items()),
        ("seed", "not recorded" if origin.seed is None else str(origin.seed)),
        ("painted", date),
        *origin.facts,
        *(_versions() if origin.versions is None else origin.versions.items()),
    ]
    lost = [
        (tally.not_finite, "came out not finite and are left out"),
        (tally.unpainted, "could not be painted and are missing"),
    ]
    missing = "".join(f" {n} more {what}." for n, what in lost if n)
    check = origin.near_copies or (
        "**not done.** Nothing was compared with the real images: a diffusion model can "
        "repeat what it was trained on."
    )
    notes = {
        FOLDER: " A `-` stands for none.",
        WEBDATASET: " A sample is REQUEST_ID.png, REQUEST_ID.cls (the label) and REQUEST_ID.json (all "
        "the rest).",
    }
    pattern = 'data_dir="."' if form == FOLDER else f'data_files="{FILES[form]}"'
    loading = f'load_dataset(".")  # or load_dataset("{BUILDERS[form]}", {pattern})'
    if (
        form == WEBDATASET
        # without the card `datasets` guesses types from the first samples, and stumbles over what
        # they lack
    ):
        loading = (
            'load_dataset(".")  # or, with webdataset: WebDataset(glob("images-*.tar"), '
            'shardshuffle=False).decode("pil")'
        )
    return f"""# {origin.title}

{tally.images} images in {len(counts)} classes, painted by a class-conditional diffusion model. No image is a photograph.{missing}

> **Not for diagnosis.** These images are synthetic. A label is what was asked of the model, not what a doctor saw: no one has
> confirmed any of them. They are derived from the pictures the denoiser was trained on, with those pictures' gaps and biases, and
> whatever terms bind those pictures. Evaluate on real images only.

Near-copy check: {check}

## Images

{counted}{origin.sections}
## How they were made

{table(("what", "value"), facts)}
Settings of the sampler:

{table(("setting", "value"), [(k, cell(v)) for k, v in differences.flatten(dict(origin.settings)).items()])}
## Columns

Each image has its request: `request_id`, `seed` (of its noise), `strategy`, `example` (the real image it started from, where there
is one), noise level and guidance; `label` is the class's number, `class` its name; `finite` and `denoiser` (fingerprint) say how it
came out and of what.{origin.columns}{notes.get(form, "")}

```python
from datasets import load_dataset

{loading}
```

## Licence

Fill in: the terms of the pictures the denoiser was trained on bind these images too. Then set `license` above.
"""


def _versions() -> list[tuple[str, str]]:
    found, commit = environment.versions(), environment.git_commit()
    return [("adversa", found.get("adversa", "unknown") + (f" ({commit})" if commit else ""))]


def values(counter: Counter[Any], most: int = 6) -> str:
    """What a field holds and how often; numbers of many values as a range."""
    if len(counter) == 1:
        return cell(next(iter(counter)))
    if len(counter) > most and all(isinstance(v, int | float) for v in counter):
        return f"{min(counter):g} to {max(counter):g} ({len(counter)} values)"
    return ", ".join(f"{cell(v)} ({n})" for v, n in counter.most_common(most)) + (
        ", ..." if len(counter) > most else ""
    )


def cell(value: object) -> str:
    """One line that a table's cell can hold; a float without trailing digits."""
    text = f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
