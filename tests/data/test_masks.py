import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from adversa.config import Data, Phantom
from adversa.data import images, masks, phantom, sources
from adversa.storage import tables
from adversa.types import UserError


def disk(side=32, r=8.0, at=None):
    cy, cx = at or ((side - 1) / 2, (side - 1) / 2)
    y, x = np.indices((side, side))
    return np.hypot(y - cy, x - cx) <= r


def skin(mask, seed=0, lesion=(120, 70, 60)):
    """A picture of noisy skin with a lesion where the mask is."""
    rng = np.random.default_rng(seed)
    picture = np.where(mask[..., None], lesion, (225, 180, 165)) + rng.normal(
        0, 4, (*mask.shape, 3)
    )
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def jaccard(a, b):
    return (a & b).sum((1, 2)) / np.maximum(1, (a | b).sum((1, 2)))


# ---- found ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ham(ham_zip):
    """(side, n) -> (images, masks) of n pictures of HAM10000 drawn by chance."""
    listing = sources.list_records(Data(source="ham10000", path=str(ham_zip)))
    records = [r for r in listing.records if r.mask_uri]
    chosen = [records[i] for i in np.random.default_rng(4).permutation(len(records))]

    def read(side, n):
        config = Data(source="ham10000", path=str(ham_zip), resolution=side)
        got = images.make_decoder(config, listing.classes)(chosen[:n])
        return np.stack([g.image for g in got]), np.stack([g.mask for g in got]) > 0

    return read


@pytest.mark.parametrize(("side", "n"), [(64, 300), (128, 150)])
def test_masks_of_ham10000_are_near_the_doctors(ham, side, n):
    pictures, given = ham(side, n)
    found, fell_back = masks.found(pictures)
    overlap, baseline = (
        jaccard(found, given).mean(),
        jaccard(masks.ellipse(side, side)[None], given).mean(),
    )
    assert baseline < 0.55 and overlap > baseline + 0.25 and overlap > 0.8, (overlap, baseline)
    assert np.median(jaccard(found, given)) > 0.86 and fell_back.mean() < 0.02


def test_masks_of_the_phantom_hold_for_every_skin_type():
    config = Phantom(images=400)
    drawn = [phantom.picture(i, config, 64) for i in range(150)]
    given, types = (
        np.stack([d[1] for d in drawn]) > 0,
        np.array([d[4]["fitzpatrick"] for d in drawn]),
    )
    overlap = jaccard(masks.found(np.stack([d[0] for d in drawn]))[0], given)
    baseline = jaccard(masks.ellipse(64, 64)[None], given)
    assert overlap.mean() > baseline.mean() + 0.2
    dark = np.isin(types, ["V", "VI"])
    assert dark.sum() >= 10 and overlap[dark].mean() > 0.65, overlap[dark].mean()


def test_plain_lesion_is_found_with_a_small_margin():
    for r, at in [(6, None), (14, None), (24, None), (10, (20, 40))]:
        lesion = disk(64, r, at)
        found, fell_back = masks.found(skin(lesion)[None])
        assert not fell_back[0] and lesion[found[0]].sum() == lesion.sum()
        assert (ndimage.distance_transform_edt(~lesion)[found[0]] <= 3).all()


def test_holes_are_filled_and_hair_is_no_lesion():
    lesion = disk(64, 14)
    picture = skin(lesion & ~disk(64, 4))
    for k in (5, 20, 50):
        picture[:, k] = picture[k, :] = (40, 30, 25)
    found, fell_back = masks.found(picture[None])
    assert not fell_back[0] and jaccard(found, lesion[None])[0] > 0.8 and found[0, 32, 32]


def test_black_corners_bars_and_rims_are_not_lesion():
    lesion = disk(128, 22, (58, 70))
    clean = skin(lesion)
    y, x = np.indices((128, 128)) - 63.5
    r = np.hypot(x, y) / 64
    rim = (clean * np.clip((1.05 - r) / 0.1, 0, 1)[..., None]).astype(np.uint8)
    bars = clean.copy()
    bars[:, :20] = bars[:, -20:] = 0
    corner = clean.copy()
    corner[(x + y) < -90] = 5
    pictures = np.stack([rim, bars, corner])
    found, fell_back = masks.found(pictures)
    assert not fell_back.any() and (jaccard(found, lesion[None]) > 0.8).all()
    for m, picture in zip(found, pictures, strict=True):
        assert not (m & masks.black_frame(picture)).any() and masks.black_frame(picture).any()
    assert not masks.black_frame(clean).any()


def test_a_black_lesion_is_no_frame():
    picture = skin(disk(64, 12), lesion=(12, 10, 9))
    assert not masks.black_frame(picture).any() and masks.found(picture[None])[0][0, 32, 32]


FLAT = np.full((64, 64, 3), 180, np.uint8)
NOISE = np.random.default_rng(0).normal(180, 3, (64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    "picture",
    [FLAT, NOISE, np.zeros_like(FLAT), np.full_like(FLAT, 255)],
    ids=["flat", "noise", "black", "white"],
)
def test_where_nothing_is_found_the_row_says_so_and_has_an_ellipse(picture):
    lesion = disk(64, 14)
    found, fell_back = masks.found(np.stack([picture, skin(lesion)]))
    assert fell_back.tolist() == [True, False]
    assert (found[0] == masks.ellipse(64, 64)).all() and 0.3 < found[0].mean() < 0.45


def test_masks_do_not_depend_on_neighbours_or_on_the_run():
    pictures = np.stack([phantom.picture(i, Phantom(images=400), 64)[0] for i in range(6)])
    found, fell_back = masks.found(pictures)
    again, _ = masks.found(pictures[::-1].copy())
    assert (again[::-1] == found).all() and found.dtype == bool and fell_back.dtype == bool
    assert (masks.found(pictures[2:3])[0] == found[2:3]).all()


def test_a_mask_is_the_same_shape_at_any_resolution():
    lesion = disk(64, 15, (28, 36))
    for side in (32, 128, 320):
        big = np.asarray(Image.fromarray(lesion).resize((side, side), Image.Resampling.NEAREST))
        found, fell_back = masks.found(skin(big)[None])
        assert (
            not fell_back[0]
            and found.shape == (1, side, side)
            and jaccard(found, big[None])[0] > 0.8
        )
    wide = np.pad(lesion, ((0, 0), (16, 16)))
    assert jaccard(masks.found(skin(wide)[None])[0], wide[None])[0] > 0.8


def test_no_pictures_and_tiny_pictures():
    assert masks.found(np.zeros((0, 32, 32, 3), np.uint8))[0].shape == (0, 32, 32)
    for side in (3, 8, 16):
        found, fell_back = masks.found(np.full((1, side, side, 3), 9, np.uint8))
        assert fell_back[0] and found.any()


# ---- of_rows -------------------------------------------------------------------------------------


def png(mask):
    return tables.encode_png(np.where(mask, 255, 0).astype(np.uint8))


def test_of_rows_takes_given_masks_and_makes_the_others():
    lesion, other = disk(64, 14), disk(64, 9, (20, 20))
    out, origin = masks.of_rows(
        [png(other), None, None], np.stack([skin(lesion), skin(lesion), FLAT])
    )
    assert origin == [masks.GIVEN, masks.FOUND, masks.ELLIPSE]
    assert (
        (out[0] == other).all()
        and jaccard(out[1:2], lesion[None])[0] > 0.8
        and (out[2] == masks.ellipse(64, 64)).all()
    )
    assert masks.of_rows([], np.zeros((0, 64, 64, 3), np.uint8))[1] == []


def test_of_rows_refuses_bad_masks_by_name():
    pictures = FLAT[None]
    bad = {
        "empty": png(np.zeros((64, 64), bool)),
        "[32, 32]": png(disk(32)),
        "[64, 64, 3]": tables.encode_png(FLAT),
        "not a PNG": b"nonsense",
        "can be read": png(disk(64))[:60],
    }
    for reason, data in bad.items():
        with pytest.raises(UserError) as e:
            masks.of_rows([data], pictures, names=["ISIC_7"])
        assert (
            "mask of ISIC_7" in str(e.value) and reason in str(e.value) and "\n" not in str(e.value)
        )
    with pytest.raises(UserError, match="row 0"):
        masks.of_rows([b""], pictures)


def test_of_rows_reads_one_bit_masks():
    buffer = io.BytesIO()
    Image.fromarray(disk(64)).save(buffer, "PNG")
    out, _ = masks.of_rows([buffer.getvalue()], FLAT[None])
    assert (out[0] == disk(64)).all()


# ---- feather and grow ----------------------------------------------------------------------------


def test_feather_is_exactly_zero_outside_and_rises_to_one_inside():
    mask = disk(32, 11)[None]
    weight = masks.feather(mask, 4)
    assert weight.dtype == np.float32 and weight.shape == (1, 32, 32)
    assert (weight[~mask] == 0).all() and (weight[mask] > 0).all() and weight.max() == 1
    depth = ndimage.distance_transform_edt(mask[0])
    np.testing.assert_allclose(weight[0][mask[0]], np.minimum(depth / 4, 1)[mask[0]], rtol=1e-6)
    rng = np.random.default_rng(0)
    known, generated = rng.random((2, 1, 32, 32), np.float32)
    blend = generated * weight + known * (1 - weight)
    assert (blend[~mask] == known[~mask]).all() and (
        blend[weight == 1] == generated[weight == 1]
    ).all()


def test_feather_of_empty_full_and_thin_masks():
    row = np.zeros((4, 16, 16), bool)
    row[1] = True
    row[2, 5, 5] = True  # one pixel
    row[3, 2:12, 2:12] = True
    row[3, 14, 14] = True  # a square and, apart from it, one pixel
    weight = masks.feather(row, 8)
    assert (weight[0] == 0).all() and (weight[1] == 1).all()
    assert weight[2, 5, 5] == 1 and weight[2].sum() == 1
    assert (
        weight[3, 14, 14] == 1 and weight[3, 2, 6] == pytest.approx(1 / 5) and weight[3, 6, 6] == 1
    )
    for hard in (0, 0.5, 1):
        assert (masks.feather(row, hard) == row).all()
    assert masks.feather(row[:0], 3).shape == (0, 16, 16)


def test_feather_leaves_the_pictures_border_alone():
    mask = np.zeros((1, 16, 16), bool)
    mask[0, :8] = True  # touches three sides
    weight = masks.feather(mask, 4)
    assert (weight[0, 0] == 1).all() and weight[0, 7, 0] == weight[0, 7, 8] == 0.25


def test_grow_adds_a_round_margin():
    one = np.zeros((1, 17, 17), bool)
    one[0, 8, 8] = True
    assert (
        (masks.grow(one, 0) == one).all()
        and masks.grow(one, 1).sum() == 5
        and masks.grow(one, 1.5).sum() == 9
    )
    assert (masks.grow(one, 3)[0] == disk(17, 3)).all()
    both = np.stack([np.zeros((17, 17), bool), np.ones((17, 17), bool)])
    assert (masks.grow(both, 4) == both).all() and masks.grow(both[:0], 4).shape == (0, 17, 17)
    assert one.sum() == 1
