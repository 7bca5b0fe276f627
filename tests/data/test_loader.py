import numpy as np
import pytest

from adversa.data.loader import ImageTable, draw_order
from adversa.storage import tables
from adversa.types import Example, SyntheticImage, UserError


@pytest.fixture
def folders(tmp_path):
    """600 real images in two parts and 40 synthetic ones; image k is filled with k % 251."""

    def png(k):
        return tables.encode_png(np.full((8, 8, 3), k % 251, np.uint8))

    real = [Example(f"r{k}", "s", 0, "g", "", {}, png(k)) for k in range(600)]
    for p in range(2):
        table = tables.to_table(real[p * 300 : (p + 1) * 300], tables.EXAMPLES)
        tables.write_part(tmp_path / "real" / tables.part_name(p), table)
    made = [SyntheticImage(f"s{k}", "guided", 0, png(k + 7), True, "f") for k in range(40)]
    tables.write_part(
        tmp_path / "synthetic" / tables.part_name(0), tables.to_table(made, tables.SYNTHETIC)
    )
    return [tmp_path / "real", tmp_path / "synthetic"]


@pytest.mark.parametrize("limit", ["1", "0"])
def test_fetch_gives_the_asked_images_in_order(folders, tmp_path, monkeypatch, limit):
    monkeypatch.setenv("ADVERSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ADVERSA_CACHE_GB", limit)
    table = ImageTable(folders)
    every = [f"r{k}" for k in range(600)] + [f"s{k}" for k in range(40)]
    rng = np.random.default_rng(0)
    for _ in range(5):
        picks = rng.choice(every, 64)
        got = table.fetch(list(picks))
        want = [(int(i[1:]) + (7 if i[0] == "s" else 0)) % 251 for i in picks]
        assert got.shape == (64, 8, 8, 3) and got.dtype == np.uint8
        assert (got == np.array(want)[:, None, None, None]).all()


def test_an_image_is_decoded_once(folders, monkeypatch):
    table = ImageTable(folders)
    every = [f"r{k}" for k in range(600)]
    first = table.fetch(every)
    monkeypatch.setattr(tables, "decode_png", None)
    assert (table.fetch(every) == first).all() and (table.fetch(every[::-1]) == first[::-1]).all()


def test_an_index_takes_tens_of_bytes_an_image(folders):
    table = ImageTable(folders)
    held = [
        *vars(table).values(),
        *(a.ids for a in table.arrays),
        *(a._sound for a in table.arrays),
    ]
    held += [a._entry.checksums for a in table.arrays]
    assert sum(a.nbytes for a in held if isinstance(a, np.ndarray)) <= 640 * (10 + 8 + 5) + 1000


def test_a_missing_or_double_id_is_said(folders):
    with pytest.raises(UserError, match="no image with the id nope"):
        ImageTable(folders).fetch(["r1", "nope"])
    with pytest.raises(UserError, match="a second time"):
        ImageTable([folders[0], folders[0]])


def test_draw_order_is_floor_or_ceil_in_every_pass():
    rng = np.random.default_rng(0)
    weights = rng.random(200) ** 3
    weights[:5] = 0
    expected = weights / weights.sum() * 200
    order = draw_order(weights, 1000, seed=4)
    assert order.dtype == np.int64 and order.shape == (1000,)
    for p in range(5):
        counts = np.bincount(order[p * 200 : (p + 1) * 200], minlength=200)
        assert (counts >= np.floor(expected - 1e-9)).all() and (
            counts <= np.ceil(expected + 1e-9)
        ).all()
    assert not np.isin(order, np.arange(5)).any()


def test_draw_order_uniform_is_a_permutation_each_pass_and_continues():
    order = draw_order(np.ones(30), 75, seed=1)
    assert sorted(order[:30]) == sorted(order[30:60]) == list(range(30))
    assert (order[:30] != order[30:60]).any()
    assert (draw_order(np.ones(30), 40, seed=1) == order[:40]).all()
    assert (draw_order(np.ones(30), 75, seed=2) != order).any()
    assert draw_order(np.ones(3), 0, seed=0).shape == (0,)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [np.nan, 1.0]])
def test_draw_order_refuses_nonsense(weights):
    with pytest.raises(ValueError, match="weights"):
        draw_order(np.array(weights), 5, seed=0)
