from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adversa.config import Phantom
from adversa.curate import near_copy
from adversa.curate import window as win
from adversa.curate.near_copy import LARGEST_THRESHOLD, NOTHING, NearCopy, NearFeatures
from adversa.curate.planted import KINDS, plant
from adversa.data.phantom import picture
from adversa.types import digest


def pictures(n: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, about as alike as photographs of different things."""
    random = np.random.default_rng(seed)
    coarse = random.integers(30, 220, (n, 6, 6, 3), dtype=np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BILINEAR))
            for c in coarse
        ]
    )


def names(n: int) -> list[str]:
    return [f"r{i:05d}" for i in range(n)]


@pytest.fixture(scope="module")
def phantoms() -> tuple[list[str], np.ndarray]:
    """(lesions, uint8 [500, 32, 32, 3])"""
    found = [picture(i, Phantom(images=500), 32) for i in range(500)]
    return [f[3] for f in found], np.stack([f[0] for f in found])


@pytest.fixture(scope="module")
def halves(phantoms) -> tuple[NearCopy, float, np.ndarray, np.ndarray]:
    """(index of about 3/4 of the lesions, its threshold, the pictures indexed, those of the other
    lesions).
    """
    lesions, images = phantoms
    held = np.array([int(digest("held", g), 16) % 4 == 0 for g in lesions])
    ids, groups = (
        names(int((~held).sum())),
        [g for g, h in zip(lesions, held, strict=True) if not h],
    )
    index = NearCopy(ids, images[~held])
    return index, index.threshold(ids, groups, 0.995), images[~held], images[held]


@pytest.mark.parametrize("kind", KINDS)
def test_planted_copies_of_phantoms_are_caught(halves, kind: str) -> None:
    index, threshold, images, _ = halves
    similarity, nearest = index.nearest(plant(images[:120], kind))
    assert np.mean(similarity >= threshold) >= 0.99, (threshold, np.sort(similarity)[:5])
    assert np.mean([a == b for a, b in zip(nearest, names(120), strict=True)]) >= 0.99
    if kind in ("exact", "turned"):
        assert (similarity == 1).all()


def test_other_lesions_of_phantoms_are_not_flagged(halves) -> None:
    index, threshold, _, other = halves
    similarity, _ = index.nearest(other)
    assert (
        len(other) > 100 and np.sum(similarity >= threshold) <= 4
    )  # 1% of 125 and three standard deviations


def test_copies_of_two_kinds_at_once_are_caught(halves) -> None:
    index, threshold, images, _ = halves
    for first, second in (("turned", "cropped"), ("shifted", "jpeg"), ("brightness", "turned")):
        similarity, _ = index.nearest(plant(plant(images[:40], first), second))
        assert np.mean(similarity >= threshold) >= 0.95, (first, second)


def test_the_planted_kinds_are_what_they_say() -> None:
    one = pictures(1, 40)[0]
    for kind in KINDS:
        copies = plant(np.stack([one] * 30), kind)
        assert copies.shape == (30, 40, 40, 3) and copies.dtype == np.uint8
        assert (copies == one).all() == (kind == "exact")
        np.testing.assert_array_equal(plant(np.stack([one] * 30), kind), copies)
    turns = {x.tobytes() for x in plant(np.stack([one] * 60), "turned")}
    assert len(turns) == 7 and one.tobytes() not in turns
    wide = plant(np.stack([one[:30]] * 60), "turned")
    assert len({x.tobytes() for x in wide}) == 3 and wide.shape == (60, 30, 40, 3)
    noise = plant(np.full((200, 16, 16, 3), 128, np.uint8), "noisy").std(axis=(1, 2, 3))
    assert noise.min() > 3.7 and noise.max() < 8.4
    moved = plant(np.stack([one] * 200), "shifted")
    assert max(np.abs(m[8:-8, 8:-8].astype(int) - one[8:-8, 8:-8]).max() for m in moved) > 0
    assert all(
        any(
            (m[4:-4, 4:-4] == one[4 + y : 36 + y, 4 + x : 36 + x]).all()
            for y in range(-3, 4)
            for x in range(-3, 4)
        )
        for m in moved
    )


def test_area_average_is_the_mean_of_each_cell() -> None:
    np.testing.assert_allclose(
        win.area_average(64) @ np.arange(64), np.arange(64).reshape(32, 2).mean(axis=1)
    )
    for size in (32, 48, 40, 150, 7):
        np.testing.assert_allclose(win.area_average(size).sum(axis=1), 1, rtol=1e-6)
    # 48 pixels: the first cell is pixel 0 and half of pixel 1
    np.testing.assert_allclose(win.area_average(48)[0, :3], [2 / 3, 1 / 3, 0], atol=1e-6)


def test_a_window_moved_sees_the_picture_moved() -> None:
    x = win.planes(pictures(1))
    middle = win.window(1, 0)
    moved = np.roll(x, (2, -1), axis=(2, 3))  # what was at row i is at row i + 2
    np.testing.assert_allclose(
        win.coefficients(moved, win.window(1, 2), win.window(1, -1)),
        win.coefficients(x, middle, middle),
        atol=1e-3,
    )
    # The window's own numbers are the orthonormal DCT of its 26 x 26 pixels: all of them would have
    # the pixels' power.
    low = np.cos(np.pi * 2 * (np.arange(26) + 0.5) / 26)
    wave = np.zeros((1, 3, 32, 32), np.float32)
    wave[0, 0, 3:29, 3:29] = np.outer(np.ones(26), low)
    c = win.coefficients(wave, middle, middle)[0]
    assert (
        np.abs(c).max() == pytest.approx(np.sqrt((low**2).sum() * 26), rel=1e-5)
        and np.sum(np.abs(c) > 1e-4) == 1
    )


def test_a_window_is_its_transform_written_out() -> None:
    k, x = np.arange(win.GREY)[:, None], np.arange(win.WINDOW)
    cosines = np.cos(np.pi * k * (x + 0.5) / win.WINDOW) * np.sqrt(
        np.where(k == 0, 1, 2) / win.WINDOW
    )
    expected = np.zeros((win.GREY, win.SIDE))
    expected[:, 5 : 5 + win.WINDOW] = cosines  # moved by two whole pixels, nothing lies between
    np.testing.assert_allclose(win.window(1, 2), expected, atol=1e-7)


def test_evidence_is_the_log_ratio_of_the_two_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.stats import norm

    monkeypatch.setattr(win, "LEVELS", (1.0,))
    rng = np.random.default_rng(0)
    signal, noise = rng.uniform(50, 900, win.COUNT), rng.uniform(1, 40, win.COUNT)
    real = rng.normal(0, np.sqrt(signal))
    query = 1.2 * real + rng.normal(0, np.sqrt(noise))
    gain = (query * real / noise).sum() / (real**2 / noise).sum()
    expected = (
        norm.logpdf(query, gain * real, np.sqrt(noise)).sum()
        - norm.logpdf(query, 0, np.sqrt(signal + noise)).sum()
    )
    value, residue = win.evidence(query[None], real[None], signal, noise)
    assert value[0] == pytest.approx(expected, rel=1e-9) and gain == pytest.approx(1.2, abs=0.02)
    assert residue[0] == pytest.approx(np.sqrt(((query - gain * real) ** 2).sum() / 26**2 / 3))
    stranger, _ = win.evidence(rng.normal(0, np.sqrt(signal))[None], real[None], signal, noise)
    assert stranger[0] < 0 < value[0]


@pytest.mark.parametrize("side", [32, 24, 40])
def test_exact_copies_have_similarity_one_at_any_size(side: int) -> None:
    real = pictures(60, side)
    similarity, nearest = NearCopy(names(60), real).nearest(
        np.stack([np.rot90(real[i], i % 4) for i in range(20)])
    )
    assert nearest == names(20) and (similarity == 1).all()


def test_flat_pictures_resemble_nothing() -> None:
    found = NearCopy(names(20), pictures(20))
    similarity, _ = found.nearest(np.full((1, 32, 32, 3), 128, np.uint8))
    assert similarity.tolist() == [NOTHING]


def test_order_of_rows_and_blocks_makes_no_difference(phantoms) -> None:
    lesions, images = phantoms
    real, groups, ids = images[:90], lesions[:90], names(90)
    p = np.random.default_rng(1).permutation(90)
    one = NearCopy(ids, real)
    two = NearCopy([ids[i] for i in p], (real[p[s]] for s in (slice(0, 7), slice(7, 90))))
    assert one.ids == two.ids
    q = np.concatenate([images[200:210], plant(real[:10], "jpeg")])
    assert one.nearest(q)[1] == two.nearest(q)[1]
    np.testing.assert_allclose(one.nearest(q)[0], two.nearest(q)[0], atol=2e-5)
    assert one.threshold(ids, groups, 0.9) == pytest.approx(
        two.threshold([ids[i] for i in p], [groups[i] for i in p], 0.9), abs=2e-5
    )


def test_a_picture_s_answer_does_not_hang_on_those_beside_it(halves) -> None:
    index, _, images, other = halves
    q = np.concatenate([other[:20], plant(images[:10], "noisy")])
    whole = index.nearest(q)
    for part in (slice(0, 1), slice(3, 10), slice(9, 30)):
        alone = index.nearest(q[part])
        assert alone[1] == whole[1][part]
        np.testing.assert_allclose(alone[0], whole[0][part], atol=2e-5)


def test_of_equals_the_smallest_id_is_named() -> None:
    real = pictures(3)
    real[0] = real[2]
    assert NearCopy(["b", "c", "a"], real).nearest(real[:1])[1] == ["a"]


def test_pictures_of_the_same_lesion_do_not_set_the_threshold() -> None:
    real = pictures(60)
    copies = np.concatenate([real, np.clip(real.astype(int) + 3, 0, 255).astype(np.uint8)])
    ids = names(120)
    found = NearCopy(ids, copies)
    assert found.threshold(ids, [f"g{i % 60}" for i in range(120)], 0.99) < 0.6
    assert (
        found.threshold(ids, ids, 0.99) == LARGEST_THRESHOLD
    )  # every picture has its copy in another group
    assert (
        found.threshold(ids, ["g"] * 120, 0.99) == LARGEST_THRESHOLD
    )  # no pair of different lesions


def test_pairs_are_the_near_copies_within(halves) -> None:
    index, threshold, _, _ = halves
    real = pictures(12)
    generated = np.concatenate([real, plant(real[:4], "noisy"), plant(real[:2], "turned")])
    pairs = NearCopy([f"s{i:02d}" for i in range(18)], generated, like=index.scale).pairs(threshold)
    alike = [(0, 12), (0, 16), (12, 16), (1, 13), (1, 17), (13, 17), (2, 14), (3, 15)]
    assert [(a, b) for a, b, _ in pairs] == sorted((f"s{i:02d}", f"s{j:02d}") for i, j in alike)
    assert all(s >= threshold for _, _, s in pairs)


def test_memory_is_bounded_by_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, turned = 0, win.turned

    def spy(x: np.ndarray) -> np.ndarray:
        nonlocal largest
        largest = max(largest, len(x))
        return turned(x)

    monkeypatch.setattr(win, "turned", spy)
    NearCopy(names(5), pictures(5)).nearest(pictures(600, 16))
    assert 0 < largest <= near_copy.QUERIES


def test_features_find_copies_and_set_their_threshold() -> None:
    rng = np.random.default_rng(0)
    lesion = rng.normal(0, 1, (400, 24))
    features = np.repeat(lesion, 2, axis=0) + rng.normal(0, 0.05, (800, 24))
    ids, groups = names(800), [f"g{i // 2}" for i in range(800)]
    p = rng.permutation(800)
    index = NearFeatures([ids[i] for i in p], features[p])
    threshold = index.threshold(ids, groups, 0.99)
    fresh, _ = index.nearest(rng.normal(0, 1, (1000, 24)))
    assert np.mean(fresh >= threshold) < 0.03 and threshold < 0.95
    copies, nearest = index.nearest(3 * features[:100])
    assert nearest == ids[:100] and (copies > LARGEST_THRESHOLD).all()
    broken, _ = index.nearest(np.array([[np.nan] * 24, [1.0] * 24]))
    assert np.isnan(broken[0]) and np.isfinite(broken[1])
    assert index.threshold(ids, ["g"] * 800, 0.99) == LARGEST_THRESHOLD


def ham(path: Path, count: int) -> tuple[list[str], list[str], np.ndarray]:
    """The first `count` pictures, by id: ids, lesions, uint8 [count, 32, 32, 3]."""
    with zipfile.ZipFile(path) as archive:
        listing = sorted(archive.namelist())
        metadata = next(n for n in listing if n.endswith("HAM10000_metadata.csv"))
        rows = list(csv.DictReader(io.StringIO(archive.read(metadata).decode())))
        member = {Path(n).stem: n for n in listing if n.endswith(".jpg")}
        rows = sorted(rows, key=lambda r: r["image_id"])[:count]
        images = []
        for row in rows:
            image = Image.open(io.BytesIO(archive.read(member[row["image_id"]])))
            left = (image.width - image.height) // 2
            square = image.crop((left, 0, left + image.height, image.height))
            images.append(np.asarray(square.resize((32, 32), Image.Resampling.BOX)))
    return [r["image_id"] for r in rows], [r["lesion_id"] for r in rows], np.stack(images)


@pytest.mark.slow
def test_real_lesions_are_flagged_at_the_stated_rate_and_copies_caught(ham_zip: Path) -> None:
    ids, lesions, images = ham(ham_zip, 2400)
    held = {name for name in set(lesions) if sum(name.encode()) % 4 == 0}
    known = [i for i, name in enumerate(lesions) if name not in held]
    fresh = [i for i, name in enumerate(lesions) if name in held]
    assert len(fresh) > 400
    found = NearCopy([ids[i] for i in known], images[known])
    similarity, _ = found.nearest(images[fresh])
    for quantile in (0.995, 0.95):
        threshold = found.threshold([ids[i] for i in known], [lesions[i] for i in known], quantile)
        rate, expected = np.mean(similarity >= threshold), 1 - quantile
        assert abs(rate - expected) < 4 * np.sqrt(expected * quantile / len(fresh)), (
            rate,
            threshold,
        )
    threshold = found.threshold(
        [ids[i] for i in known], [lesions[i] for i in known], 0.993
    )  # the default
    for kind in KINDS:
        similarity, _ = found.nearest(plant(images[known[:300]], kind))
        assert np.mean(similarity >= threshold) >= 0.985, (
            kind
        )  # 99% and a standard deviation of 300


def test_an_index_that_grew_and_was_saved_is_the_index_of_all_to_the_bit(tmp_path: Path) -> None:
    ids, images = [digest(i) for i in range(60)], pictures(60)
    first = NearCopy(ids[:41], images[:41])
    whole = NearCopy(ids, images, like=first.scale)
    grown = first.extended(ids[41:], [images[41:50], images[50:]])
    with open(tmp_path / "index", "wb") as file:
        grown.save(file)
    for index in (grown, NearCopy.load(tmp_path / "index")):
        assert index.ids == whole.ids
        for name in ("small", "signal", "noise", "_weight", "_entries"):
            assert np.array_equal(getattr(index, name), getattr(whole, name)), name
    assert first.extended([], []).ids == first.ids
    with pytest.raises(AssertionError):
        first.extended(ids[:1], [images[:1]])
