from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq

from adversa.engine.batches import Feed, balanced
from adversa.storage import tables


def test_balance_moves_class_totals_from_as_they_come_to_equal():
    labels, weights = np.array([0] * 8 + [1] * 2), np.ones(10)

    def share(b):
        w = balanced(weights, labels, b)
        return w[labels == 1].sum() / w.sum()

    assert np.isclose(share(0.0), 0.2)
    assert np.isclose(share(1.0), 0.5)
    assert np.isclose(share(0.5), 2**0.5 / (2**0.5 + 8**0.5))


def feed_of(finished, **changes):
    _, run = finished
    base = {
        "folders": (run.data / "train",),
        "mix": run.arm(0, "real") / "mix",
        "steps": 9,
        "batch_size": 16,
        "balance": 0.5,
        "seed": 3,
    }
    return Feed(**base | changes)


def test_batches_from_step_k_are_those_of_an_undisturbed_stream(finished):
    feed = feed_of(finished)
    whole, rest = list(feed.batches()), list(feed.batches(5))
    assert len(whole) == 9 and len(rest) == 4
    for a, b in zip(whole[5:], rest, strict=True):
        assert (
            a["id"] == b["id"]
            and np.array_equal(a["image"], b["image"])
            and np.array_equal(a["label"], b["label"])
        )


def test_images_and_labels_belong_to_their_ids(finished):
    _, run = finished
    table = pq.read_table(tables.parts(run.data / "train")[0])
    known = {r["id"]: r for r in table.to_pylist()}
    batch = feed_of(finished).batch(0)
    checked = 0
    for i, image, label in zip(batch["id"], batch["image"], batch["label"], strict=True):
        if i in known:
            assert (
                np.array_equal(image, tables.decode_png(known[i]["image"]))
                and label == known[i]["label"]
            )
            checked += 1
    assert checked > 0


def test_another_seed_draws_other_images(finished):
    assert feed_of(finished, seed=3).batch(0)["id"] != feed_of(finished, seed=4).batch(0)["id"]


def test_without_a_mix_every_row_comes_once_and_the_last_batch_is_short(finished):
    _, run = finished
    feed = Feed(folders=(run.data / "select",), batch_size=16)
    ids = [i for b in feed.batches() for i in b["id"]]
    assert ids == tables.read(run.data / "select", ["id"])["id"].to_pylist()
    assert feed.count() == -(-len(ids) // 16)
