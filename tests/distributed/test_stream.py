"""Streams of training batches: the feed's order, whatever the number of workers, from whatever
step.
"""

from __future__ import annotations

import numpy as np
import pytest
import ray

from adversa.distributed import stream
from adversa.engine.batches import Feed
from adversa.storage.weights import save_checkpoint
from adversa.types import share_of

pytestmark = pytest.mark.ray


def feed_of(prepared, **changes):
    _, run = prepared
    usual = {
        "folders": (run.data / "train",),
        "mix": run.arm(0, "real") / "mix",
        "batch_size": 15,
        "steps": 40,
        "seed": 1,
    }
    return Feed(**usual | changes)


@ray.remote(num_cpus=0)
def read(shard, rank):
    """What worker `rank` gets. The arrays become lists: a batch on a worker is a view into Ray's
    memory.
    """
    return [
        b | {"image": b["image"].copy(), "label": b["label"].tolist()}
        for b in stream.batches(shard, rank)()
    ]


def read_all(streams, name, world):
    shards = streams.configure({name: None}, world, None, None)
    return ray.get([read.remote(shard[name], rank) for rank, shard in enumerate(shards)])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_worker_gets_its_rows_of_every_batch_in_order(prepared, ray_engine, tmp_path, world):
    feed = feed_of(prepared)
    streams = stream.Streams(
        {"train": (feed, tmp_path)}, {}, 3_000_000
    )  # many blocks, out of order if let be
    shares = read_all(streams, "train", world)
    assert [len(s) for s in shares] == [40] * world
    for step, whole in enumerate(feed.batches()):
        parts = [s[step] for s in shares]
        assert [p["step"] for p in parts] == [step] * world and all(p["size"] == 15 for p in parts)
        assert (
            [len(p["id"]) for p in parts] == [15]
            if world == 1
            else max(len(p["id"]) for p in parts) <= -(-15 // world) + 1
        )
        assert sum((p["id"] for p in parts), []) == whole["id"]
        assert sum((p["label"] for p in parts), []) == whole["label"].tolist()
        assert np.array_equal(np.concatenate([p["image"] for p in parts]), whole["image"])


def test_a_start_of_the_workers_gets_what_is_left_after_the_last_commit(
    prepared, ray_engine, tmp_path
):
    streams = stream.Streams({"train": (feed_of(prepared, steps=9), tmp_path)}, {}, 3072)
    save_checkpoint(tmp_path, {"step": 7})
    for world in (2, 1):  # and for as many workers as there are now
        assert [[b["step"] for b in share] for share in read_all(streams, "train", world)] == [
            [7, 8]
        ] * world


@pytest.mark.parametrize("world", [1, 2])
def test_a_select_role_is_shared_to_its_last_short_batch(prepared, ray_engine, world):
    feed = feed_of(
        prepared, folders=(prepared[1].data / "select",), mix=None, batch_size=len_of(prepared) - 1
    )
    shares = read_all(stream.Streams({}, {"select": feed}, 3072), "select", world)
    ids = [[i for b in share for i in b["id"]] for share in shares]
    assert sorted(sum(ids, [])) == sorted(i for b in feed.batches() for i in b["id"])
    assert (
        [len(share) for share in shares] == [2] if world == 1 else [1, 2]
    )  # the one row of the last batch is the last worker's


def len_of(prepared):
    return sum(
        len(b["id"])
        for b in feed_of(prepared, folders=(prepared[1].data / "select",), mix=None).batches()
    )


class Numbered:
    """A feed of one step: row i is i."""

    def __init__(self, size):
        self.batch_size = self.size = size

    def count(self):
        return 1

    def batch(self, step, rank, world):
        rows = share_of(self.size, rank, world)
        numbers = np.arange(self.size)[rows]
        return {"id": [str(i) for i in numbers], "label": numbers, "size": self.size}


@pytest.mark.parametrize("size", [4, 15, 30, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_blocks_have_room_for_the_largest_share(size, world):
    rows = [
        stream._FeedTask(Numbered(size), 0, 1, (rank,), world)({"id": [0]}) for rank in range(world)
    ]
    assert len({r["label"].shape for r in rows}) == 1  # a dataset's rows are of one shape
    assert [i for r in rows for i in r["label"][0, : r["rows"][0]]] == list(range(size))


class Shard:
    def __init__(self, *rows):
        self.rows = rows

    def iter_batches(self, **_):
        for step, rank in self.rows:
            yield {
                "step": [step],
                "rank": [rank],
                "rows": [1],
                "ids": ["a"],
                "size": [1],
                "image": [np.zeros((1, 2, 2, 3))],
            }


@pytest.mark.parametrize("rows", [[(3, 0), (5, 0)], [(3, 0), (3, 0)], [(3, 1)], [(3, 0), (4, 1)]])
def test_a_shard_with_another_step_or_anothers_rows_stops_the_run(rows):
    with pytest.raises(AssertionError, match="instead of"):
        list(stream.batches(Shard(*rows))())
