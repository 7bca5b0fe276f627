"""The near-copy check: planted copies caught, different lesions flagged, and seconds. `python
benchmarks/near_copy.py --help`.

Real images: a prepared run's folder (its data/<role>), or the phantom. A quarter of the lesions is
held out of the index and out of the threshold: the share of their pictures that is flagged is the
false rate.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from adversa.config import Phantom
from adversa.curate.near_copy import NearCopy
from adversa.curate.planted import KINDS, plant
from adversa.data.phantom import picture
from adversa.storage import tables
from adversa.types import ROLES, digest

Real = tuple[list[str], list[str], np.ndarray]


def prepared(run: Path) -> Real:
    rows = [tables.read(run / "data" / role, ["id", "group", "image"]) for role in ROLES]
    images = np.concatenate([tables.decode_images(r["image"]) for r in rows])
    return (
        [i for r in rows for i in r["id"].to_pylist()],
        [g for r in rows for g in r["group"].to_pylist()],
        images,
    )


def phantom(count: int, side: int) -> Real:
    found = [picture(i, Phantom(images=max(count, 50)), side) for i in range(count)]
    return (
        [f"p{i:06d}" for i in range(count)],
        [f[3] for f in found],
        np.stack([f[0] for f in found]),
    )


def rates(real: Real, copies: int, quantile: float) -> dict[str, object]:
    """Shares caught, by kind, of copies of indexed images, and flagged, of held-out lesions."""
    ids, groups, images = real
    held = np.array([int(digest("held", g), 16) % 4 == 0 for g in groups])
    known = np.flatnonzero(~held)
    names, lesions = [ids[i] for i in known], [groups[i] for i in known]
    index = NearCopy(names, images[known])
    threshold = index.threshold(names, lesions, quantile)
    source = np.random.default_rng(0).choice(known, copies, replace=len(known) < copies)
    caught, named = {}, {}
    for kind in KINDS:
        similarity, nearest = index.nearest(plant(images[source], kind))
        caught[kind] = float(np.mean(similarity >= threshold))
        named[kind] = float(np.mean([a == ids[b] for a, b in zip(nearest, source, strict=True)]))
        print(
            kind,
            caught[kind],
            named[kind],
            np.quantile(similarity, [0.005, 0.01, 0.05]).round(3).tolist(),
            flush=True,
        )
    other = np.flatnonzero(held)[: 4 * copies]
    similarity, _ = index.nearest(images[other])
    flagged = float(np.mean(similarity >= threshold))
    for q in (0.99, 0.995, 0.998):
        print("held out", q, np.quantile(similarity, q).round(3), flush=True)
    return {
        "indexed": len(known),
        "copies": copies,
        "threshold": threshold,
        "caught": caught,
        "source_named": named,
        "held_out": len(other),
        "flagged": flagged,
    }


def timing(real: Real, queries: int) -> dict[str, float]:
    """CPU and wall seconds of building the index, the threshold, and of `queries` pictures like no
    indexed one.

    Random pairs of real pictures, averaged, stand for synthetic ones.
    """
    ids, groups, images = real
    rng = np.random.default_rng(1)
    a, b = (images[rng.integers(0, len(images), queries)] for _ in range(2))
    mixed = ((a.astype(np.uint16) + b) // 2).astype(np.uint8)
    out: dict[str, float] = {"indexed": len(ids), "queries": queries}
    marks = [(time.process_time(), time.perf_counter())]
    index = NearCopy(ids, images)
    marks.append((time.process_time(), time.perf_counter()))
    index.threshold(ids, groups, 0.995)
    marks.append((time.process_time(), time.perf_counter()))
    index.nearest(mixed)
    marks.append((time.process_time(), time.perf_counter()))
    for name, old, new in zip(
        ("index", "threshold", "nearest"), marks[:-1], marks[1:], strict=True
    ):
        out |= {
            f"{name}_cpu_seconds": round(new[0] - old[0], 2),
            f"{name}_seconds": round(new[1] - old[1], 2),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a prepared run (default: the phantom)")
    parser.add_argument("--side", type=int, default=32, help="of the phantom's pictures, in pixels")
    parser.add_argument("--real", type=int, default=10_000, help="real pictures at most")
    parser.add_argument("--copies", type=int, default=1000, help="planted a kind; 0: none")
    parser.add_argument("--queries", type=int, default=0, help="pictures for the timing; 0: none")
    parser.add_argument("--quantile", type=float, default=0.995)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threadpool_limits(args.threads)
    ids, groups, images = prepared(args.run) if args.run else phantom(args.real, args.side)
    real = (ids[: args.real], groups[: args.real], images[: args.real])
    result: dict[str, object] = {"side": int(images.shape[1])}
    if args.copies:
        result |= rates(real, args.copies, args.quantile)
    if args.queries:
        result["timing"] = timing(real, args.queries)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
