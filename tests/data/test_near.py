import io
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from adversa.config import Data, Phantom
from adversa.data import images, near, phantom, sources


def thumb(image):
    return np.asarray(image.convert("L").resize((near.THUMB, near.THUMB), Image.Resampling.BOX))


@lru_cache
def pictures(n=12, size=192):
    return [
        Image.fromarray(phantom.picture(i, Phantom(images_per_lesion=1), size)[0]) for i in range(n)
    ]


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


COPIES = {
    "recompressed": lambda im: jpeg(im, 50),
    "halved": lambda im: im.resize((96, 96), Image.Resampling.BICUBIC),
    "mirrored": lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda im: im.transpose(Image.Transpose.ROTATE_90),
    "transposed": lambda im: im.transpose(Image.Transpose.TRANSPOSE),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found_and_nothing_else(name):
    originals = pictures()
    all_ = originals + [COPIES[name](originals[k]) for k in range(4)]
    thumbs = np.stack([thumb(im) for im in all_])
    ids = [f"i{k:02d}" for k in range(16)]
    groups = [f"g{k}" for k in range(16)]
    found = near.near_identical(ids, near.perceptual_hash(thumbs), thumbs, groups, bits=8)
    assert [p[:2] for p in found] == [(f"i{k:02d}", f"i{12 + k}") for k in range(4)]
    assert all(d <= 8 and near.MIN_CORRELATION <= r <= 1.0001 for _, _, d, r in found)
    same_group = [f"g{k % 12}" for k in range(16)]
    assert near.near_identical(ids, near.perceptual_hash(thumbs), thumbs, same_group, bits=8) == []
    assert near.near_identical(ids, near.perceptual_hash(thumbs), thumbs, groups, bits=-1) == []
    order = np.random.default_rng(0).permutation(16)
    again = near.near_identical(
        [ids[i] for i in order],
        near.perceptual_hash(thumbs)[order],
        thumbs[order],
        [groups[i] for i in order],
        bits=8,
    )
    assert again == found


def test_equal_pictures_by_the_thousand_give_a_chain():
    thumbs = np.zeros((3000, near.THUMB, near.THUMB), np.uint8)
    ids = [f"{i:04d}" for i in range(3000)]
    found = near.near_identical(ids, near.perceptual_hash(thumbs), thumbs, ids, bits=8)
    assert len(found) == 2999 and {a for a, *_ in found} == {"0000"}


def test_one_spot_in_the_same_place_is_no_copy():
    """Two smooth blobs of one size share hash and low frequencies; their detail differs."""
    rng = np.random.default_rng(0)
    y, x = np.indices((32, 32)) - 15.5
    blob = 200 - 120 * np.exp(-(x**2 + y**2) / 60)
    thumbs = np.stack(
        [np.clip(blob + rng.normal(0, 6, (32, 32)), 0, 255).astype(np.uint8) for _ in range(2)]
    )
    assert np.corrcoef(thumbs[0].ravel(), thumbs[1].ravel())[0, 1] > 0.9
    assert (
        near.near_identical(["a", "b"], near.perceptual_hash(thumbs), thumbs, ["a", "b"], bits=16)
        == []
    )


def test_hash_ignores_brightness_and_contrast():
    thumbs = np.stack([thumb(im) for im in pictures()[:4]])
    changed = (thumbs.astype(float) * 0.5 + 60).round().astype(np.uint8)
    assert np.bitwise_count(near.perceptual_hash(thumbs) ^ near.perceptual_hash(changed)).max() <= 4
    assert near.perceptual_hash(np.full((1, 32, 32), 9, np.uint8))[0] == 0


def test_detail_has_none_of_the_low_frequencies():
    thumbs = np.stack([thumb(im) for im in pictures()[:3]])
    rest = near.detail(thumbs).reshape(-1, 32, 32)
    assert np.abs(dctn(rest, axes=(1, 2), norm="ortho")[:, : near.LOW, : near.LOW]).max() < 1e-4
    assert np.linalg.norm(rest.reshape(3, -1), axis=1) == pytest.approx(1, abs=1e-5)


def written_out(thumbs):
    """The hash with the cosines written out."""
    k, x = np.arange(near.LOW)[:, None], np.arange(near.THUMB) + 0.5
    basis = np.cos(np.pi * k * x / near.THUMB) * np.sqrt(np.where(k == 0, 1, 2) / near.THUMB)
    c = np.round(basis @ thumbs.astype(np.float64) @ basis.T, 6).reshape(len(thumbs), -1)
    bits = c > np.median(c[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False
    return (bits.astype(np.uint64) << np.arange(64, dtype=np.uint64)).sum(1, dtype=np.uint64)


def test_hashes_are_those_of_the_transform_written_out(ham_zip):
    """Their last bits differ; no hash does, of phantoms, of HAM10000, nor where zeros are exact
    (symmetric, coarse).
    """
    config = Data(source="ham10000", path=str(ham_zip))
    listing = sources.list_records(config)
    ham = [d.thumb for d in images.make_decoder(config, listing.classes)(listing.records[:300])]
    real = np.stack([thumb(im) for im in pictures()] + ham)
    symmetric = real // 2 + real[:, :, ::-1] // 2
    thumbs = np.concatenate(
        [real, symmetric, symmetric // 2 + symmetric.transpose(0, 2, 1) // 2, real & 192]
    )
    assert np.array_equal(near.perceptual_hash(thumbs), written_out(thumbs))


def test_ham_pair_that_is_one_picture(ham_zip):
    """ISIC_0025226 and ISIC_0030074 are one photograph in two colours; lookalikes beside them are
    not merged.
    """
    names = {
        "ISIC_0025226",
        "ISIC_0030074",
        "ISIC_0032568",
        "ISIC_0032999",
        "ISIC_0030431",
        "ISIC_0025279",
    }
    config = Data(source="ham10000", path=str(ham_zip))
    listing = sources.list_records(config)
    got = images.make_decoder(config, listing.classes)(
        [r for r in listing.records if r.id in names]
    )
    hashes, thumbs = np.array([d.phash for d in got], np.uint64), np.stack([d.thumb for d in got])
    ids = [d.record.id for d in got]
    found = near.near_identical(ids, hashes, thumbs, [d.record.group for d in got], bits=16)
    assert [p[:2] for p in found] == [("ISIC_0025226", "ISIC_0030074")]
