"""From bytes to square pictures at the run's resolution. Runs on a worker; needs the record and the
data section only.

Policy: EXIF orientation is applied; transparency is laid on white; 16-bit is scaled to 8; CMYK,
grey and palettes become RGB. Resampling: Pillow's bicubic, whose support grows with the reduction
(antialiased); masks: box average, then half or more is lesion.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from adversa.config import Data
from adversa.data import phantom
from adversa.data.files import Reader, printable
from adversa.data.near import THUMB, perceptual_hash
from adversa.data.records import FIX, ImageRecord
from adversa.types import UserError, digest

FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "TIFF",
    "WEBP",
    "GIF",
)  # no format whose reader starts another program
# What Pillow raises on damaged files, depending on the format and on where the damage is.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    EOFError,
    struct.error,
    MemoryError,
)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A picture that was read, or `problem` and no picture.

    image uint8 [R, R, 3]; mask uint8 [R, R], 0 or 255, or None; id: digest of the picture's pixels
    before cropping (so it does not depend on crop or, phantom apart, on resolution); phash:
    perceptual hash, 64 bits; thumb uint8 [32, 32], grey, of the whole picture.
    """

    record: ImageRecord
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    id: str = ""
    phash: int = 0
    thumb: np.ndarray | None = None
    problem: str | None = None


def make_decoder(
    config: Data, classes: Sequence[str]
) -> Callable[[Sequence[ImageRecord]], list[Decoded]]:
    """A function from records to as many `Decoded`, in order.

    With on_error=fail a damaged picture is a UserError instead.
    """
    known = frozenset(classes)
    reader = Reader(most_bytes=8 * config.max_pixels + (1 << 20))  # 16-bit RGBA, uncompressed

    def decode(records: Sequence[ImageRecord]) -> list[Decoded]:
        out = []
        with _own_limit():
            for record in records:
                assert record.label in known, record
                try:
                    out.append(_decode(record, config, reader))
                except DAMAGE as e:
                    problem = _explain(e)
                    if config.on_error == "fail":
                        raise UserError(f"{printable(record.source)}: {problem}; {FIX}") from None
                    out.append(Decoded(record, problem=problem))
        return out

    return decode


def _decode(record: ImageRecord, config: Data, reader: Reader) -> Decoded:
    mask = None
    if record.uri.startswith("phantom:"):
        size = min(
            512, max(64, 2 * config.resolution)
        )  # drawn larger, then reduced like any other picture
        pixels, drawn, _, _, attributes = phantom.picture(int(record.uri[8:]), config.phantom, size)
        image, mask = Image.fromarray(pixels), Image.fromarray(drawn)
        record = dataclasses.replace(record, attributes=attributes)
    else:
        image = _open(reader(record.uri), config.max_pixels)
        image = to_rgb(image)
        if record.mask_uri is not None:
            try:
                mask = _open(reader(record.mask_uri), config.max_pixels).convert("L")
            except DAMAGE as e:
                raise ValueError(f"its mask: {_explain(e)}") from None
    side = config.resolution
    small = None
    if mask is not None:
        mask = _fit_mask(mask, image.size)
        small = np.where(
            np.asarray(square(mask, side, config.crop, Image.Resampling.BOX)) >= 128, 255, 0
        ).astype(np.uint8)
    thumb = np.asarray(image.convert("L").resize((THUMB, THUMB), Image.Resampling.BOX))
    return Decoded(
        record=record,
        image=np.asarray(square(image, side, config.crop)),
        mask=small,
        id=digest(image.size, image.tobytes()),
        phash=int(perceptual_hash(thumb[None])[0]),
        thumb=thumb,
    )


def _fit_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """0 and 255, of the picture's size. ValueError where its proportions are not the picture's.

    What is at least half of the mask's largest value is lesion: masks come as 0 and 1 too.
    """
    (w, h), (width, height) = mask.size, size
    if abs(w * height - h * width) > max(w * height, h * width) / 50:
        raise ValueError(
            f"its mask has {w} x {h} pixels, the picture {width} x {height}: no size of "
            "the same picture"
        )
    peak = mask.getextrema()[1]
    mask = mask.point(lambda v: 255 if peak and 2 * v >= peak else 0)
    return mask if mask.size == size else mask.resize(size, Image.Resampling.NEAREST)


@contextmanager
def _own_limit() -> Iterator[None]:
    """Pillow's own limit of pixels and its warnings are set aside: `_open` holds every picture to
    data.max_pixels.
    """
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame, upright. The size is checked before a pixel is decoded."""
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"{image.width} x {image.height} pixels, more than data.max_pixels {max_pixels}"
        )
    image.load()
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB; transparency on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("pixels that are not finite")
        top = values.max()
        full = (
            65535
            if image.mode != "F" and (image.mode != "I" or top > 255)
            else 255
            if top > 1
            else 1
        )
        grey = np.clip(np.rint(values * (255 / full)), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def square(
    image: Image.Image, side: int, crop: str, how: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """`center`: the central square; `pad`: the whole picture between black bars; `squash`.

    The whole picture, proportions changed.
    """
    w, h = image.size
    if crop == "squash":
        return image.resize((side, side), how)
    if crop == "pad":
        scale = side / max(w, h)
        inner = image.resize((max(1, round(w * scale)), max(1, round(h * scale))), how)
        canvas = Image.new(image.mode, (side, side))
        canvas.paste(inner, ((side - inner.width) // 2, (side - inner.height) // 2))
        return canvas
    edge = min(w, h)
    left, top = (w - edge) / 2, (h - edge) / 2
    return image.resize((side, side), how, box=(left, top, left + edge, top + edge))


def _explain(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture that can be read ({', '.join(FORMATS)})"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join(text.split())) or type(error).__name__
