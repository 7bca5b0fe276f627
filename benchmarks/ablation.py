"""Which part of the loop makes or loses the effect? `python benchmarks/ablation.py RUN`, of a
finished phantom run that generated.

Each variation changes one thing of what the arm `guided` is trained on, and trains the run's
classifier with the run's seeds for the run's steps. All are scored on fresh phantoms of another
seed, which no role of the run holds: `test` is not opened again. Run it again to resume. `oracle`
has real pictures of yet another seed in place of generated ones: what a perfect denoiser could
give.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from adversa.config import Config, load
from adversa.engine.interface import Engine
from adversa.engine.local import LocalEngine
from adversa.evaluate.bootstrap import compare
from adversa.pipeline import arms, evaluate, prepare
from adversa.pipeline import train as pipeline_train
from adversa.pipeline.folders import last_round, models_of
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files, predictions, tables
from adversa.types import digest, seed_of

Pairs = list[tuple[str, int]]
FRESH, ORACLE = 7001, 7002  # added to the run's phantom seed
AGAINST = "replay"


def world(engine: Engine, config: Config, seed: int, images: int, out: Path) -> Path:
    """Phantoms of another seed, nearly all of them in the role `test` of a data folder of their
    own.
    """
    phantom = config.data.phantom.model_copy(
        update={"seed": config.data.phantom.seed + seed, "images": images}
    )
    shares = {"train": 0.01, "mine": 0.01, "select": 0.01, "test": 0.97}
    split = config.data.split.model_copy(update=shares)
    prepare.prepare(
        engine, config.data.model_copy(update={"phantom": phantom, "split": split}), out
    )
    return out / "test"


def rows_of(run: RunDir, config: Config) -> tuple[Pairs, Pairs]:
    """(real images of train, mined images of all rounds)."""
    real = pipeline_train.pairs(
        tables.read(run.data / "train", ["id", "label"], tables.EXAMPLES), "id"
    )
    rounds = range(1, last_round(config) + 1)
    cases = {
        p
        for n in rounds
        for p in pipeline_train.pairs(
            tables.read(run.round(n, "hard"), schema=tables.HARD_CASES), "example"
        )
    }
    return real, sorted(cases) if config.mix.fold_mined == "all" else []


def verdicts(run: RunDir, config: Config, arm: str) -> list[dict[str, Any]]:
    found = [
        v
        for n in range(1, last_round(config) + 1)
        for v in tables.read(run.round(n, "verdicts")).to_pylist()
    ]
    return [v for v in found if v["arm"] == arm]


@dataclass(frozen=True)
class Variation:
    """What is added: images, how many of each class, the folder they lie in where not the run's
    own; the arm it is a kind of.
    """

    added: Pairs
    counts: list[int]
    at: Path | None = None
    arm: str = "guided"


def variations(
    run: RunDir, config: Config, counts: Sequence[int], oracle: Path
) -> dict[str, Variation]:
    """By name. Each is compared with a replay of as many images of each class: the run's own, or
    one of its own number.
    """
    guided = verdicts(run, config, "guided")
    kept = [(v["request_id"], v["label"]) for v in guided if v["keep"]]
    every = [
        (v["request_id"], v["label"])
        for v in guided
        if v["reason"] not in ("not painted", "not finite")
    ]
    refused = [
        (v["request_id"], v["label"])
        for v in guided
        if not v["keep"] and v["reason"] not in ("not painted", "not finite")
    ]
    real = pipeline_train.pairs(tables.read(oracle, ["id", "label"], tables.EXAMPLES), "id")
    quarter, half = [c // 4 for c in counts], [c // 2 for c in counts]
    found = {
        "no gate": Variation(every, list(counts)),
        "refused by the gate": Variation(refused, _at_most(refused, counts)),
        "quarter": Variation(kept, quarter),
        "half": Variation(kept, half),
        "oracle": Variation(real, _at_most(real, counts), oracle),
    }
    found = {name: v for name, v in found.items() if any(v.counts)}
    for name, v in list(found.items()):
        if v.counts != list(counts):
            found[f"replay: {name}"] = Variation([], v.counts, None, AGAINST)
    return found


def _at_most(pairs: Pairs, counts: Sequence[int]) -> list[int]:
    have = Counter(label for _, label in pairs)
    return [min(have[c], n) for c, n in enumerate(counts)]


def train(engine: Engine, run: RunDir, config: Config, name: str, v: Variation, out: Path) -> None:
    real, mined = rows_of(run, config)
    if not (out / "mix" / step_folder.MANIFEST).exists():
        tables.write_part(
            out / "mix" / tables.part_name(0), arms.mix(v.arm, real, mined, v.added, v.counts)
        )
        files.write_json(
            out / "mix" / step_folder.MANIFEST,
            {"fingerprint": name, "counts": v.counts, "files": {}},
        )
    folders = [
        run.data / "mine",
        *(
            [v.at]
            if v.at
            else [run.round(n, "synthetic") for n in range(1, last_round(config) + 1)]
        ),
    ]
    seeds = range(config.evaluate.seeds)
    engine.fit(
        [
            pipeline_train.classifier_job(
                run.data,
                out / "mix",
                folders,
                config.classifier,
                seed_of("classifier", config.seed, s),
                config.data.resolution,
                out / f"seed-{s}" / "classifier",
            )
            for s in seeds
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=6000, help="fresh pictures to score on")
    parser.add_argument("--only", action="append", help="a variation; repeat for several")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    run = RunDir(args.run.absolute())
    config = load(run.config)
    engine = LocalEngine(training_threads=args.threads)
    home = run.root / "ablation"
    fresh = world(engine, config, FRESH, args.images, home / "fresh")
    oracle = world(engine, config, ORACLE, 2 * config.data.phantom.images, home / "oracle")
    last = last_round(config)
    counts = step_folder.manifest(run.arm(last, "guided") / "mix")["added_by_class"]
    models = [(arm, seed, folder) for arm, seed, _, folder in models_of(config, run, last)]
    for name, v in variations(run, config, counts, oracle).items():
        if args.only and name.removeprefix("replay: ") not in args.only:
            continue
        out = home / name.replace(" ", "-").replace(":", "")
        train(engine, run, config, name, v, out)
        models += [
            (name, s, out / f"seed-{s}" / "classifier") for s in range(config.evaluate.seeds)
        ]
    scores = home / f"scores-{digest(*(name for name, _, _ in models), size=4)}"
    evaluate.score(engine, models, fresh, home / "fresh", False, scores)
    rows = tables.read(scores, schema=tables.PREDICTIONS)
    attributes = tables.read(fresh, ["id", "attributes"], tables.EXAMPLES).to_pylist()
    rare = {r["id"] for r in attributes if dict(r["attributes"]).get("mode") == "amelanotic"}
    print_and_keep(config, rows, list(dict.fromkeys(m for m, _, _ in models)), rare, args.json)


def print_and_keep(
    config: Config, rows: pa.Table, names: list[str], rare: set[str], path: Path | None
) -> None:
    seeds, logits, first = config.evaluate.seeds, {}, None
    for name in names:
        found = [predictions.predictions(rows, name, s) for s in range(seeds)]
        logits[name], first = np.stack([p.logits for p in found]), found[0]
    assert first is not None
    table = Table(
        "trained on",
        "balanced accuracy",
        "planted mode",
        f"minus {AGAINST} of as many",
        "95%",
        title=f"{len(first.labels)} fresh pictures",
    )
    kept = {}
    mode = np.array([i in rare for i in first.ids])
    for name in names:
        right = logits[name].argmax(2) == first.labels
        each = [
            np.mean([r[first.labels == c].mean() for c in np.unique(first.labels)]) for r in right
        ]
        other = logits.get(f"replay: {name}", logits[AGAINST])
        c = compare(logits[name], other, first.labels, first.groups, config.evaluate.bootstrap, 0)
        kept[name] = {
            "balanced_accuracy": float(np.mean(each)),
            "planted": float(right[:, mode].mean()),
            "difference": c.difference,
            "low": c.low,
            "high": c.high,
        }
        k = kept[name]
        table.add_row(
            name,
            f"{k['balanced_accuracy']:.3f}",
            f"{k['planted']:.3f}",
            f"{c.difference:+.3f}",
            f"{c.low:+.3f} to {c.high:+.3f}",
        )
    Console(width=110).print(table)
    if path:
        path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
