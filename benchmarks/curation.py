"""How long the filter takes on a prepared run's real images: `python benchmarks/curation.py RUN
--images 20000`.

Stand-ins for generated images: the mean of two real ones chosen at random, which is a copy of
neither. The classifier and the verifiers are trained for two steps: what they say is of no account
here, and takes as long. Every step runs on Ray, as in a loop.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from adversa.config import Cluster, Config, check
from adversa.distributed.engine import RayEngine
from adversa.engine.local import LocalEngine
from adversa.pipeline import curate, finalize, train, verifier
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.storage import files, tables
from adversa.types import ROLES, GenerationRequest, SyntheticImage


def stand_ins(data: Path, images: int, part: int, out: Path) -> None:
    """`images` requests and images, `part` a part, half of them of either arm."""
    ids, _, blocks = curate.real_images(data, ROLES)
    real = np.concatenate(list(blocks))
    rng = np.random.default_rng(0)
    classes = len(run_folder.classes_of(data))
    for index, start in enumerate(range(0, images, part)):
        n = min(part, images - start)
        a, b = (real[rng.integers(0, len(real), n)] for _ in range(2))
        mixed = ((a.astype(np.uint16) + b) // 2).astype(np.uint8)
        names = [f"{start + i:08d}" for i in range(n)]
        arms = ["guided" if i % 2 else "unguided" for i in range(n)]
        labels = rng.integers(0, classes, n).tolist()
        source = [ids[int(k)] for k in rng.integers(0, len(ids), n)]
        requests = [
            GenerationRequest(k, 1, m, "img2img", c, s, 1.0, 1.0, 0)
            for k, m, c, s in zip(names, arms, labels, source, strict=True)
        ]
        generated = [
            SyntheticImage(k, m, c, tables.encode_png(x), True, "")
            for k, m, c, x in zip(names, arms, labels, mixed, strict=True)
        ]
        tables.write_part(
            out / "requests" / tables.part_name(index), tables.to_table(requests, tables.REQUESTS)
        )
        tables.write_part(
            out / "synthetic" / tables.part_name(index),
            tables.to_table(generated, tables.SYNTHETIC),
        )
    for name in ("requests", "synthetic"):
        files.write_json(out / name / step_folder.MANIFEST, {"fingerprint": name, "files": {}})


def settings(resolution: int) -> Config:
    """Every image passes the first pass, so that near-duplicates are looked for among all."""
    lenient = {"min_agreement": 0.0, "trivial_quantile": None, "realism_quantile": 1.0}
    return check(
        {
            "data": {"resolution": resolution},
            "classifier": {"steps": 2, "evaluations": 1},
            "curate": lenient,
        },
        "benchmark",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run that has been prepared")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--part", type=int, default=256)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = args.run.absolute() / "data"
    first = tables.decode_png(tables.read(data / "select", ["image"])["image"][0].as_py())
    config = settings(first.shape[0])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        train.mix(data, [], [], "real", config.mix, 1, out / "mix")
        jobs = [
            train.classifier_job(
                data,
                out / "mix",
                [],
                config.classifier,
                0,
                config.data.resolution,
                out / "classifier",
            )
        ]
        LocalEngine().fit([*jobs, *verifier.jobs(data, config, out / "judge")])
        stand_ins(data, args.images, args.part, out)
        engine = RayEngine(Cluster(cpus=args.cpus), out / "ray", first.nbytes)
        verifiers = verifier.folders(out / "judge", config.curate.folds)
        for role in ROLES:
            curate.features(
                engine, data, role, out / "classifier", verifiers, out / "features" / role
            )
        curate.measure_thresholds(data, out / "features", config.curate, out / "limits")
        curate.inspect(
            engine,
            out / "requests",
            out / "synthetic",
            data,
            out / "features",
            out / "limits",
            out / "classifier",
            out / "judge",
            config.curate,
            out / "inspected",
        )
        finalize.near_duplicates(
            engine, out / "synthetic", out / "inspected", out / "limits", out / "twins"
        )
        finalize.finalize(
            out / "inspected", out / "twins", out / "limits", config.curate, out / "verdicts"
        )
        engine.close()
        names = [*(f"features/{r}" for r in ROLES), "limits", "inspected", "twins", "verdicts"]
        manifests = {name: step_folder.manifest(out / name) for name in names}
    real = sum(manifests[f"features/{r}"]["rows"] for r in ROLES)
    found = {
        "real": real,
        "synthetic": args.images,
        "side": config.data.resolution,
        "cpus": args.cpus,
        "seconds": {k: round(m["seconds"], 1) for k, m in manifests.items()},
        "all": round(sum(m["seconds"] for m in manifests.values()), 1),
        "waiting_for_twins": manifests["twins"]["rows"],
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
