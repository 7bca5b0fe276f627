import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from adversa.config import Data
from adversa.data import images, sources
from adversa.data.sources import ImageRecord
from adversa.types import UserError


def decode(data, mask=None, tmp=None, **config):
    path = tmp / "x"
    path.write_bytes(data)
    if mask is not None:
        (tmp / "m").write_bytes(mask)
    record = ImageRecord(
        "",
        "x",
        f"file:{path}",
        "a",
        "g",
        mask_uri=f"file:{tmp / 'm'}" if mask is not None else None,
    )
    settings = dict(source="csv", path="x", resolution=16) | config
    return images.make_decoder(Data(**settings), ["a"])([record])[0]


def encoded(array_or_image, kind="PNG", **options):
    image = (
        array_or_image
        if isinstance(array_or_image, Image.Image)
        else Image.fromarray(array_or_image)
    )
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


PHOTO = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
BAD = {
    "zero bytes": (b"", "empty"),
    "no picture": (b"hello, world" * 20, "not a picture"),
    "truncated jpeg": (encoded(PHOTO, "JPEG")[:900], "truncated"),
    "truncated png": (encoded(PHOTO)[:900], "."),
    "bomb": (bomb(), "60000 x 60000 pixels, more than data.max_pixels 100000000"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_pictures_stop_or_are_skipped(tmp_path, name):
    data, text = BAD[name]
    with pytest.raises(UserError, match=text) as caught:
        decode(data, tmp=tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("x: ")
    skipped = decode(data, tmp=tmp_path, on_error="skip")
    assert skipped.image is None and skipped.problem and skipped.id == ""


def test_damaged_mask_and_missing_file(tmp_path):
    assert "its mask" in decode(encoded(PHOTO), b"", tmp=tmp_path, on_error="skip").problem
    decoder = images.make_decoder(Data(source="csv", path="x", on_error="skip"), ["a"])
    good = tmp_path / "good.png"
    good.write_bytes(encoded(PHOTO))
    gone = ImageRecord("", "gone", f"file:{tmp_path / 'gone.png'}", "a", "g")
    first, second = decoder([gone, ImageRecord("", "good", f"file:{good}", "a", "g")])
    assert "No such file" in first.problem and second.problem is None and second.image is not None


def grey16():
    return encoded(np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16))


def palette():
    return encoded(Image.fromarray(PHOTO).quantize(8))


def rgba():
    return encoded(np.dstack([PHOTO, np.full(PHOTO.shape[:2], 0, np.uint8)]))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.new("CMYK", (30, 30), (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
        (encoded(Image.new("CMYK", (30, 30), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (encoded(Image.new("L", (30, 30), 77)), (77, 77, 77)),
        (encoded(Image.new("1", (30, 30), 1)), (255, 255, 255)),
        (encoded(np.full((30, 30), 128 * 257, np.uint16)), (128, 128, 128)),
        (encoded(np.full((30, 30), 0.5, np.float32), "TIFF"), (128, 128, 128)),
        (encoded(Image.new("RGBA", (30, 30), (10, 20, 30, 255))), (10, 20, 30)),
        (encoded(Image.new("RGBA", (30, 30), (10, 20, 30, 0))), (255, 255, 255)),
        (encoded(Image.new("LA", (30, 30), (50, 255))), (50, 50, 50)),
        (encoded(Image.new("RGB", (30, 30), (9, 99, 199)).quantize(4)), (9, 99, 199)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, data, expected):
    image = decode(data, tmp=tmp_path).image
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).max() <= 3


def test_exif_orientation(tmp_path):
    upright = np.zeros((20, 20, 3), np.uint8)
    upright[:10] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    turned = decode(
        encoded(np.rot90(upright).copy(), "JPEG", quality=95, exif=exif), tmp=tmp_path
    ).image
    plain = decode(encoded(upright, "JPEG", quality=95), tmp=tmp_path).image
    assert (
        np.abs(turned.astype(int) - plain).mean() < 3 and plain[0].mean() > 150 > plain[-1].mean()
    )


def test_crop_policies(tmp_path):
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :12] = 255  # outside the central square
    centre, pad, squash = (
        decode(encoded(wide), tmp=tmp_path, crop=c).image for c in ("center", "pad", "squash")
    )
    assert centre.max() <= 1
    assert pad[:3].max() == 0 and pad[8, 0].min() > 240 and pad[8, -1].max() < 5
    assert (squash[:, 0] > 250).all() and (squash[:, 5:] < 10).all()


def test_resampling_is_antialiased(tmp_path):
    """A one-pixel checkerboard reduced by 8 is grey; sampled points would be black or white."""
    board = ((np.indices((128, 128)).sum(0) % 2) * 255).astype(np.uint8)
    assert np.abs(decode(encoded(board), tmp=tmp_path).image.astype(int) - 127).max() < 4


def test_masks_stay_binary_and_follow_the_crop(tmp_path):
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[10:30, 20:40] = 255
    got = decode(encoded(picture), encoded(picture[..., 0]), tmp=tmp_path)
    assert set(np.unique(got.mask)) == {0, 255}
    assert ((got.image[..., 0] > 127) == (got.mask == 255)).mean() > 0.95
    small = decode(
        encoded(picture), encoded(picture[::2, ::2, 0].copy()), tmp=tmp_path
    )  # a mask of another size
    assert (small.mask == got.mask).mean() > 0.9
    ones = decode(
        encoded(picture), encoded(picture[..., 0] // 255), tmp=tmp_path
    )  # 0 and 1 in place of 0 and 255
    assert np.array_equal(ones.mask, got.mask)
    other = decode(
        encoded(picture), encoded(picture[:, :20, 0].copy()), tmp=tmp_path, on_error="skip"
    )
    assert (
        other.problem
        == "its mask has 20 x 40 pixels, the picture 60 x 40: no size of the same picture"
    )


def test_ids_come_from_pixels(tmp_path):
    a, b = (
        decode(encoded(PHOTO), tmp=tmp_path),
        decode(encoded(PHOTO, "BMP"), tmp=tmp_path, crop="pad", resolution=32),
    )
    assert a.id == b.id and a.phash == b.phash and len(a.id) == 32
    other = PHOTO.copy()
    other[0, 0, 0] ^= 1
    assert decode(encoded(other), tmp=tmp_path).id != a.id


def test_zip_members_and_damage(tmp_path):
    path = tmp_path / "p.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("images/a!b.zip!c.png", encoded(PHOTO))
        z.writestr("images/ok.png", encoded(PHOTO))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 50] ^= 255  # the first member fails its checksum
    path.write_bytes(bytes(data))
    decoder = images.make_decoder(Data(source="ham10000", path=str(path), on_error="skip"), ["a"])
    names = ("images/a!b.zip!c.png", "images/ok.png", "images/none.png")
    first, second, third = decoder([ImageRecord("", n, f"zip:{path}!{n}", "a", "g") for n in names])
    assert "damaged" in first.problem and second.problem is None and "is not in" in third.problem


def test_phantom_decodes_with_its_attributes():
    config = Data(resolution=24)
    listing = sources.list_records(config)
    got = images.make_decoder(config, listing.classes)(listing.records[:3])
    assert all(d.image.shape == (24, 24, 3) and d.mask.shape == (24, 24) for d in got)
    assert {"mode", "fitzpatrick", "ita", "hair", "bubbles", "ruler"} <= got[
        0
    ].record.attributes.keys()
    again = images.make_decoder(config, listing.classes)(listing.records[2:3])[0]
    assert again.id == got[2].id and (again.image == got[2].image).all()


def test_ham_subset_from_the_zip(ham_zip):
    config = Data(source="ham10000", path=str(ham_zip))
    listing = sources.list_records(config)
    some = listing.records[::500]
    for d in images.make_decoder(config, listing.classes)(some):
        assert d.image.shape == (32, 32, 3) and d.mask.shape == (32, 32) and d.problem is None
        assert 0 < (d.mask == 255).mean() <= 1
