"""The images that requests refer to, and the masks of their lesions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adversa import config as cfg
from adversa.storage import tables
from adversa.storage.path import StoragePath
from adversa.types import FILLING, GenerationRequest


class Pictures:
    """Examples of a role by id: their images, and the masks of their lesions."""

    def __init__(self, folder: StoragePath | None) -> None:
        from adversa.data.loader import ImageTable

        self.folder, self.table = folder, ImageTable([folder] if folder else [], build=False)

    def check_masks(self, ids: Sequence[str]) -> None:
        """UserError where a mask that the data set gave can't be read, is empty or has another size
        than its picture.
        """
        from adversa.data import masks

        rows = self._rows(ids, ["id", "mask"]).filter(pc.field("mask").is_valid())
        for batch in rows.to_batches(tables.ROW_GROUP):
            if batch.num_rows:
                named = batch.column("id").to_pylist()
                masks.of_rows(batch.column("mask").to_pylist(), self.table.fetch(named), named)

    def _rows(self, ids: Sequence[str], columns: list[str]) -> pa.Table:
        assert self.folder is not None, "masks of no examples"
        wanted = pc.field("id").isin(list(ids))
        return pa.concat_tables(
            tables.read_part(p, columns, wanted) for p in tables.parts(self.folder)
        )

    @cached_property
    def _given(self) -> dict[str, bytes]:
        """The data set's own masks, of a kilobyte each: read once, not with every part of the
        requests.
        """
        assert self.folder is not None, "masks of no examples"
        rows = pa.concat_tables(
            tables.read_part(p, ["id", "mask"]) for p in tables.parts(self.folder)
        )
        rows = rows.filter(pc.field("mask").is_valid())
        return dict(zip(rows["id"].to_pylist(), rows["mask"].to_pylist(), strict=True))

    def images(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """uint8 [R, R, 3] of each."""
        return dict(zip(ids, self.table.fetch(ids), strict=True)) if ids else {}

    def masks(
        self, ids: Sequence[str], margin: float, feather: float
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(what inpainting generates, what outpainting generates), float32 [R, R] in [0, 1] of
        each: the lesion, grown by a margin, and all but the lesion so grown. margin, feather:
        shares of the side. The data set's own masks, or masks that were found.
        """
        from adversa.data import masks

        images = self.images(ids)
        pixels = np.stack([images[i] for i in ids])
        lesion, _ = masks.of_rows([self._given.get(i) for i in ids], pixels, list(ids))
        side = pixels.shape[1]
        grown = masks.grow(lesion, margin * side)
        inside, outside = (
            masks.feather(grown, feather * side),
            masks.feather(~grown, feather * side),
        )
        return dict(zip(ids, inside, strict=True)), dict(zip(ids, outside, strict=True))


def sources(requests: Sequence[GenerationRequest], pictures: Pictures, config: cfg.Generate) -> Any:
    """The images and masks that requests refer to."""
    from adversa.diffuse.strategy import Sources

    wanted = {
        r.example
        for r in requests
        if r.example is not None and (r.strategy != "sample" or r.reference_guidance)
    }
    wanted |= {r.partner for r in requests if r.partner is not None}
    filled = sorted(
        {r.example for r in requests if r.example is not None and r.strategy in FILLING}
    )
    inside, outside = pictures.masks(filled, config.margin, config.feather) if filled else ({}, {})
    return Sources(pictures.images(sorted(wanted)), inside, outside)
