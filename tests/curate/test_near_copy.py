from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adversa.curate import near_copy
from adversa.curate.near_copy import LARGEST_THRESHOLD, NearCopy, area_average, fingerprints, turned


def pictures(n: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, about as alike as photographs of different things."""
    random = np.random.default_rng(seed)
    coarse = random.integers(30, 220, (n, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BILINEAR)) for c in coarse])


def names(n: int) -> list[str]:
    return [f"r{i:05d}" for i in range(n)]


def test_area_average_is_the_mean_of_each_cell() -> None:
    np.testing.assert_allclose(area_average(32) @ np.arange(32), np.arange(32).reshape(16, 2).mean(axis=1))
    for size in (16, 24, 40, 150, 7):
        np.testing.assert_allclose(area_average(size).sum(axis=1), 1, rtol=1e-6)
    # 24 pixels: the first cell is pixel 0 and half of pixel 1
    np.testing.assert_allclose(area_average(24)[0, :3], [2 / 3, 1 / 3, 0], atol=1e-6)


def test_fingerprint_is_the_correlation_of_the_miniatures() -> None:
    a, b = pictures(2, side=16).astype(np.float64)
    a, b = a - a.mean(axis=(0, 1)), b - b.mean(axis=(0, 1))
    expected = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    one, two = fingerprints(pictures(2, side=16))
    assert one @ two == pytest.approx(expected, abs=1e-5)
    assert one @ one == pytest.approx(1, abs=1e-6)


def test_the_eight_turns_are_those_of_the_picture() -> None:
    picture = pictures(1)[0]
    expected = [np.rot90(p, k) for p in (picture, picture[:, ::-1]) for k in range(4)]
    got = turned(fingerprints(picture[None]))[:, 0]
    np.testing.assert_allclose(got, fingerprints(np.stack(expected)), atol=1e-6)
    assert len({tuple(np.round(g, 4)) for g in got}) == 8


@pytest.mark.parametrize("side", [32, 24, 40])
def test_planted_copies_are_caught(side: int) -> None:
    real = pictures(300, side)
    found = NearCopy(names(300), real)
    threshold = found.threshold(names(300), names(300), 0.99)
    source = real[123]
    noise = np.random.default_rng(5).normal(0, 8, source.shape)
    noisy = np.clip(source + noise, 0, 255).astype(np.uint8)
    softer = (source * 0.5 + 60).astype(np.uint8)
    copies = np.stack(
        [source, source[:, ::-1], source[::-1], np.rot90(source), np.rot90(source, 2), np.rot90(source[:, ::-1], 3),
         source + np.uint8(20), source - np.uint8(20), softer, noisy]
    )  # fmt: skip
    similarity, nearest = found.nearest(copies)
    assert set(nearest) == {"r00123"}
    assert (similarity >= threshold).all(), (similarity, threshold)
    np.testing.assert_allclose(similarity[:8], 1, atol=2e-5)
    fresh, _ = found.nearest(pictures(200, side, seed=9))
    assert np.mean(fresh >= threshold) < 0.05


def test_flat_pictures_resemble_nothing() -> None:
    found = NearCopy(names(20), pictures(20))
    similarity, _ = found.nearest(np.full((1, 32, 32, 3), 128, np.uint8))
    assert similarity.tolist() == [0.0]


def test_order_of_rows_and_blocks_makes_no_difference() -> None:
    real, ids = pictures(60), names(60)
    groups = [f"g{i // 2}" for i in range(60)]
    p = np.random.default_rng(1).permutation(60)
    one = NearCopy(ids, real)
    two = NearCopy([ids[i] for i in p], (real[p[s]] for s in (slice(0, 7), slice(7, 60))))
    assert one.ids == two.ids
    q = pictures(10, seed=3)
    assert one.nearest(q)[1] == two.nearest(q)[1]
    np.testing.assert_array_equal(one.nearest(q)[0], two.nearest(q)[0])
    assert one.threshold(ids, groups, 0.9) == two.threshold([ids[i] for i in p], [groups[i] for i in p], 0.9)


def test_blocks_of_the_search_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    found, q = NearCopy(names(60), pictures(60)), pictures(30, seed=3)
    whole = found.nearest(q)
    monkeypatch.setattr(near_copy, "QUERIES", 7)
    monkeypatch.setattr(near_copy, "REALS", 13)
    assert found.nearest(q)[1] == whole[1]
    np.testing.assert_allclose(found.nearest(q)[0], whole[0], atol=1.5e-5)


def test_of_equals_the_smallest_id_is_named() -> None:
    real = pictures(3)
    real[0] = real[2]
    assert NearCopy(["b", "c", "a"], real).nearest(real[:1])[1] == ["a"]


def test_pictures_of_the_same_lesion_do_not_set_the_threshold() -> None:
    real = pictures(100)
    twins = np.concatenate([real, np.clip(real.astype(int) + 3, 0, 255).astype(np.uint8)])
    ids = names(200)
    found = NearCopy(ids, twins)
    grouped = found.threshold(ids, [f"g{i % 100}" for i in range(200)], 0.99)
    assert grouped < 0.9
    assert found.threshold(ids, ids, 0.99) == LARGEST_THRESHOLD  # every picture has its twin in another group
    assert found.threshold(ids, ["g"] * 200, 0.99) == LARGEST_THRESHOLD  # no pair of different lesions


def test_memory_is_bounded_by_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    def spy(a: np.ndarray) -> np.ndarray:
        nonlocal largest
        largest = max(largest, a.shape[0])
        return turned(a)

    monkeypatch.setattr(near_copy, "turned", spy)
    NearCopy(names(5), pictures(5)).nearest(pictures(600, 16))
    assert 0 < largest <= near_copy.QUERIES


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
            images.append(np.asarray(image.crop((25, 0, 175, 150)).resize((32, 32), Image.Resampling.BOX)))
    return [r["image_id"] for r in rows], [r["lesion_id"] for r in rows], np.stack(images)


def test_different_lesions_are_flagged_at_the_stated_rate(ham_zip: Path) -> None:
    ids, lesions, images = ham(ham_zip, 2400)
    held = {name for name in set(lesions) if sum(name.encode()) % 4 == 0}
    known = [i for i, name in enumerate(lesions) if name not in held]
    fresh = [i for i, name in enumerate(lesions) if name in held]
    assert len(fresh) > 400
    found = NearCopy([ids[i] for i in known], images[known])
    similarity, _ = found.nearest(images[fresh])
    for quantile in (0.95, 0.9):
        threshold = found.threshold([ids[i] for i in known], [lesions[i] for i in known], quantile)
        rate, expected = np.mean(similarity >= threshold), 1 - quantile
        assert abs(rate - expected) < 4 * np.sqrt(expected * quantile / len(fresh)), (rate, threshold)
    copies = np.stack([np.rot90(images[i], i % 4)[:, :: (-1) ** i] for i in known[:50]])
    similarity, nearest = found.nearest(copies)
    assert nearest == [ids[i] for i in known[:50]] and (similarity > 0.9999).all()
