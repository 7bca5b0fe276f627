from collections import Counter, defaultdict

import numpy as np
import pytest

from adversa.config import Data, Phantom
from adversa.data import draw, images, near, phantom, sources


def ita_of(rgb):
    """ITA in degrees of a mean sRGB colour in [0, 255]: the inverse of what the phantom draws
    with.
    """
    x = rgb / 255
    linear = np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    m = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = m @ linear / np.array([0.95047, 1.0, 1.08883])
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.degrees(np.arctan2(116 * f[1] - 16 - 50, 200 * (f[1] - f[2])))


def test_a_picture_depends_on_seed_and_index_alone():
    config = Phantom()
    a = phantom.picture(7, config, 48)
    phantom.picture(3, config, 48)
    b = phantom.picture(7, Phantom(), 48)
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all() and a[2:] == b[2:]
    assert (phantom.picture(7, Phantom(seed=1), 48)[0] != a[0]).any()
    assert a[0].shape == (48, 48, 3) and a[0].dtype == np.uint8 and set(np.unique(a[1])) == {0, 255}


def test_a_larger_picture_is_the_same_picture():
    small, large = (phantom.picture(11, Phantom(), s)[0].astype(float) for s in (48, 144))
    reduced = large.reshape(48, 3, 48, 3, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), reduced.ravel())[0, 1] > 0.97


def test_long_tail_rare_mode_and_pictures_a_lesion():
    config = Phantom()
    slots = phantom.slots(config)
    assert len(slots) == config.images
    counts = Counter(s.label for s in slots)
    for more, fewer in zip(phantom.CLASSES, phantom.CLASSES[1:], strict=False):
        assert counts[fewer] / counts[more] == pytest.approx(config.tail, abs=0.02)
    rare = sum(s.mode == phantom.RARE_MODE for s in slots)
    assert rare / counts[phantom.RARE_CLASS] == pytest.approx(config.rare, abs=0.02)
    assert {s.label for s in slots if s.mode == phantom.RARE_MODE} == {phantom.RARE_CLASS}
    lesions = defaultdict(set)
    for s in slots:
        lesions[s.lesion].add((s.label, s.mode))
    assert all(len(v) == 1 for v in lesions.values())
    assert len(slots) / len(lesions) == pytest.approx(config.images_per_lesion, abs=0.08)
    assert not any(s.mode == phantom.RARE_MODE for s in phantom.slots(Phantom(rare=0)))
    assert all(n >= 8 for n in Counter(s.label for s in phantom.slots(Phantom(images=50))).values())


def test_skin_has_the_stated_ita():
    """Over many pictures: the stated angle, give or take lamp and white balance."""
    stated, seen = [], []
    for i in range(80):
        image, mask, _, _, attributes = phantom.picture(i, Phantom(), 48)
        if attributes["frame"] == "no" and attributes["hair"] == "none":
            stated.append(float(attributes["ita"]))
            seen.append(ita_of(np.median(image[mask == 0], 0)))
            low, high = phantom.SKIN[attributes["fitzpatrick"]]
            assert low - 0.5 <= stated[-1] <= high + 0.5
    assert np.corrcoef(stated, seen)[0, 1] > 0.9
    assert abs(np.median(np.subtract(seen, stated))) < 10
    for lightness, a, b in ((70.0, 12.0, 17.0), (38.0, 12.0, 12.0)):
        rgb = draw.encode(draw.lab_to_linear(lightness, a, b)) * 255
        assert ita_of(rgb) == pytest.approx(np.degrees(np.arctan2(lightness - 50, b)), abs=0.3)


def test_the_lesion_is_where_the_mask_says_and_darker():
    for i in range(12):
        image, mask, label, _, attributes = phantom.picture(i, Phantom(), 64)
        inside = mask == 255
        assert 0.02 < inside.mean() < 0.8
        if attributes["frame"] == "no" and label in ("nevus", "vascular"):
            assert np.median(image[inside]) < np.median(image[~inside])


def test_pictures_of_one_lesion_are_alike_but_no_copies():
    by_lesion = defaultdict(list)
    for i, s in enumerate(phantom.slots(Phantom())):
        by_lesion[s.lesion].append(i)
    several = [v for v in by_lesion.values() if len(v) > 1][:10]
    for first, second, *_ in several:
        a, b = phantom.picture(first, Phantom(), 32), phantom.picture(second, Phantom(), 32)
        assert a[2:4] == b[2:4] and a[4]["ita"] == b[4]["ita"]
        assert np.abs(a[0].astype(int) - b[0]).mean() > 2


def test_no_two_lesions_are_near_identical():
    config = Data(phantom=Phantom(images=160))
    listing = sources.list_records(config)
    decoded = images.make_decoder(config, listing.classes)(listing.records)
    ids = [d.id for d in decoded]
    assert len(set(ids)) == 160
    hashes = np.array([d.phash for d in decoded], np.uint64)
    thumbs = np.stack([d.thumb for d in decoded])
    assert (
        near.near_identical(ids, hashes, thumbs, [d.record.group for d in decoded], bits=16) == []
    )


def test_contact_sheet(tmp_path):
    phantom.sheet(str(tmp_path / "sheet.png"), columns=2, size=16)
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_honeycomb_and_arcs_closed_forms():
    x, y = np.array([[0.0, 2 * np.pi / 10]]), np.zeros((1, 2))
    assert draw.honeycomb(x, y, 10.0)[0, 0] == pytest.approx(
        0
    )  # all three waves are 1 at the origin: a hole
    gx, gy = draw.grid(64)
    line = draw.arcs(
        gx,
        gy,
        2 / 64,
        np.array([[-2.0, 0.0]]),
        np.zeros(1),
        np.zeros(1),
        np.full(1, 99.0),
        np.full(1, 0.1),
    )
    assert line.sum() / 64**2 == pytest.approx(
        0.1, abs=0.012
    )  # width 0.2 of 2, 15% wider at the root
    assert (line[:20] == 0).all()


def test_smooth_fields_are_periodic_and_of_unit_variance():
    field = draw.smooth(np.random.default_rng(0), 6, 60)
    assert field.std() == pytest.approx(1) and field.mean() == pytest.approx(0, abs=1e-9)
    assert np.abs(field[0] - field[-1]).max() < 3 * np.abs(np.diff(field, axis=0)).max()
    u = np.array([[0.3, 0.3 + 4.0, 0.3 - 8.0]])
    assert np.ptp(draw.sample(field, u, np.full_like(u, 1.1))) < 1e-9
