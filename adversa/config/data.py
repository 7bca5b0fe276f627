"""Where images come from and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from adversa.config.base import Section


def _local(value: str | None) -> str | None:
    if value is not None and "://" in value:
        raise ValueError(
            "must be a path: images are read from file systems, not from object stores"
        )
    return value


class Phantom(Section):
    """The built-in procedural pictures (source: phantom)."""

    images: int = Field(1600, ge=50, description="number of pictures")
    seed: int = Field(
        0, ge=0, description="seed of the pictures; the run's own seed does not change them"
    )
    tail: float = Field(
        0.55, gt=0, le=1, description="each class has this share of the one before it"
    )
    rare: float = Field(
        0.25, ge=0, le=1, description="share of the planted atypical sub-mode within its class"
    )
    images_per_lesion: float = Field(
        1.5, ge=1, le=10, description="mean number of pictures of one lesion"
    )


class Columns(Section):
    """Names of columns of the metadata table (source: csv). Every other column becomes an
    attribute.
    """

    path: str = Field("path", description="file of the picture, relative to the table's folder")
    label: str = Field("label", description="class of the picture")
    group: str | None = Field("group", description="lesion; null: every image is its own group")
    patient: str | None = Field(
        None, description="carried along; the split keeps lesions apart, not patients"
    )
    mask: str | None = Field(None, description="path of a lesion mask")
    id: str | None = Field(None, description="an id of the user's own; must be unique")


class Split(Section):
    """Shares of the groups by role, within each class."""

    train: float = Field(0.55, gt=0, lt=1, description="fits classifier, verifiers and denoiser")
    mine: float = Field(0.15, gt=0, lt=1, description="where hard cases are found")
    select: float = Field(
        0.15, gt=0, lt=1, description="chooses checkpoints, ratios and thresholds"
    )
    test: float = Field(0.15, gt=0, lt=1, description="opened once, at the end")
    seed: int = Field(
        0, ge=0, description="seed of the split; the run's own seed does not change it"
    )

    @model_validator(mode="after")
    def _sum(self) -> Split:
        total = self.train + self.mine + self.select + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"train + mine + select + test is {total:g}; make the four shares add up to 1"
            )
        return self


class Data(Section):
    """Where images come from, and how they are split into roles."""

    source: Literal["phantom", "ham10000", "csv", "folder"] = Field(
        "phantom",
        description="built-in procedural pictures; HAM10000 as distributed; a table; one folder a "
        "class",
    )
    path: Annotated[str | None, AfterValidator(_local)] = Field(
        None, description="folder, .zip or .csv; not used by phantom"
    )
    resolution: int = Field(
        32, ge=16, le=1024, multiple_of=8, description="side of the square images, in pixels"
    )
    crop: Literal["center", "pad", "squash"] = Field(
        "center",
        description="how a picture becomes square: central square, black bars, or changed "
        "proportions",
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="a picture that cannot be read: stop, or skip and count"
    )
    max_pixels: int = Field(
        100_000_000, ge=1, description="a larger picture is refused as a decompression bomb"
    )
    phantom: Phantom = Phantom()
    columns: Columns = Columns()
    labels: list[str] | None = Field(
        None, description="the classes, in order; null: those found, sorted by name"
    )
    group_regex: str | None = Field(
        None, description="folder source: first capture group, searched in the path, is the group"
    )
    grouped: bool = Field(
        True,
        description="false ignores lesions in the split; for showing the leak, never for results",
    )
    near_duplicate_bits: int = Field(
        8,
        ge=-1,
        le=16,
        description="look-alikes whose 64-bit perceptual hashes differ in at most so many bits are "
        "one group; -1: off",
    )
    split: Split = Split()
    part_rows: int = Field(512, ge=1, description="images a Parquet part")
