"""Kill a training worker with -9 at a random step, many times; each run must end like one that nobody disturbed.

    python tools/kill_training_worker.py                         ten kills of a classifier
    python tools/kill_training_worker.py --what denoiser --runs 3 --workers 2

Trains on Ray, on small phantoms. The worker is killed while it waits for the batch of the chosen step, so that all before it are
done. Prints a line a run: where it was killed, how many steps were done again, whether weights and metrics are equal; exit code 1
where any differs, or where more steps were done again than lie between two checkpoints. With two workers a random one of them dies.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adversa import runs
from adversa.config import Config, check
from adversa.loop import cycle, steps
from adversa.loop.engine import FitJob, LocalEngine
from adversa.weights import read_model


@dataclasses.dataclass(frozen=True)
class Killed:
    """A fit function that notes each step it takes, and kills its own process before step `at`, once. None: never."""

    fit: Any
    at: int | None
    rank: int

    def __call__(self, batches: Any, *, out: Path, **options: Any) -> dict[str, Any]:
        return self.fit(self._watched(batches, out), out=out, **options)

    def _watched(self, batches: Any, out: Path) -> Iterator[Any]:
        from adversa import workers

        with open(out.with_suffix(f".steps-{workers.rank()}"), "a", buffering=1) as log:
            for batch in batches:
                if batch["step"] == self.at and workers.rank() == self.rank and not out.with_suffix(".killed").exists():
                    out.with_suffix(".killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                log.write(f"{batch['step']}\n")
                yield batch


def configuration(args: argparse.Namespace) -> Config:
    return check(
        {
            "data": {"phantom": {"images": 200}, "part_rows": 64},
            "classifier": {
                "model_args": {"channels": [16, 32, 32, 64]}, "steps": args.steps, "batch_size": 32, "evaluations": 3,
                "checkpoint_steps": args.checkpoint_steps,
            },
            "denoiser": {"channels": [32, 32], "steps": args.steps, "batch_size": 16, "checkpoint_steps": args.checkpoint_steps},
            "cluster": {"training_threads": 1, "training_workers": args.workers, "object_store_mb": 200},
        },
        "kill_training_worker",
    )  # fmt: skip


def job_of(what: str, config: Config, run: runs.RunDir, out: Path, at: int | None, rank: int) -> FitJob:
    mix = run.arm(0, "real") / "mix"
    if what == "classifier":
        job = steps.classifier_job(run.data, mix, [], config.classifier, 0, config.data.resolution, out)
    else:
        job = steps.denoiser_job(run.data, mix, config.denoiser, 0, config.data.resolution, out)
    return dataclasses.replace(job, fit=Killed(job.fit, at, rank))


def taken(out: Path, rank: int) -> list[int]:
    return [int(x) for x in out.with_suffix(f".steps-{rank}").read_text().split()]


def differences(out: Path, undisturbed: Path) -> list[str]:
    """What of a run differs from the undisturbed one: weights (to the bit), metrics of the manifest, the lines of metrics.jsonl."""
    ours, theirs = read_model(out)[0], read_model(undisturbed)[0]
    equal = {
        "weights": ours.keys() == theirs.keys() and all(bool((ours[k] == theirs[k]).all()) for k in ours),
        "metrics": runs.manifest(out)["metrics"] == runs.manifest(undisturbed)["metrics"],
        "metrics.jsonl": lines(out) == lines(undisturbed),
    }
    return [name for name, same in equal.items() if not same]


def lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "time" not in k} for line in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("classifier", "denoiser"), default="classifier")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint-steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which workers die")
    args = parser.parse_args()
    from adversa.distributed.engine import RayEngine

    config, faults, draw = configuration(args), [], random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        run = cycle.open_run(config, base / "run")
        cycle.run(config, run, LocalEngine(1, 1), None, until="prepare")
        steps.mix(run.data, [], "real", ["real"], config.mix, run.arm(0, "real") / "mix")
        engine = RayEngine(config.cluster, run.root, config.data.resolution**2 * 3)
        try:
            for i in range(args.runs + 1):
                at, rank = (draw.randrange(1, args.steps), draw.randrange(args.workers)) if i else (None, 0)
                out, started = base / f"{args.what}-{i}", time.monotonic()
                engine.fit([job_of(args.what, config, run, out, at, rank)])
                found, seconds = taken(out, rank), time.monotonic() - started
                if at is None:
                    print(f"undisturbed: {len(found)} steps in {seconds:.1f} s", flush=True)
                    continue
                again, different = len(found) - args.steps, differences(out, base / f"{args.what}-0")
                died = out.with_suffix(".killed").exists()
                print(
                    f"worker {rank} killed before step {at:3d}: {again} steps done again, "
                    f"{'DIFFERENT: ' + ', '.join(different) if different else 'equal'}, {seconds:.1f} s", flush=True,
                )  # fmt: skip
                faults += [f"run {i}: {what}" for what in different]
                faults += [] if died and set(found) == set(range(args.steps)) else [f"run {i}: not killed, or steps missing"]
                faults += [f"run {i}: {again} steps done again"] if again > args.checkpoint_steps else []
        finally:
            engine.close()
    said = "; ".join(faults) or "every run ended as undisturbed"
    print(f"{args.runs} kills, checkpoints every {args.checkpoint_steps} steps: {said}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
