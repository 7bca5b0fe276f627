"""Kill a training worker with -9 at a random moment, many times; each run must end like one that
nobody disturbed.

    python tools/kill_training_worker.py                         ten kills of a classifier
    python tools/kill_training_worker.py --what denoiser --runs 3 --workers 2

Trains on Ray, on small phantoms. The worker is killed a random time after it was given the batch of
a random step, wherever it is by then: in the forward or backward pass, in a commit, an evaluation,
the writing of the model. Prints a line a run: where it was killed, how many steps were done again,
whether weights and metrics are equal; exit code 1 where any differs, or where more steps were done
again than lie between two checkpoints. With two workers a random one of them dies.
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
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from adversa.config import Config, check
from adversa.engine.interface import FitJob
from adversa.engine.local import LocalEngine
from adversa.pipeline import loop, train
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.storage.weights import read_model

# The longest wait between a step's batch and the kill, in mean times of a step. The mean has a
# share of commits and evaluations in it, which take longer than a step: so the death may fall into
# any of these, and into one of the next steps.
SPAN = 4.0


@dataclasses.dataclass(frozen=True)
class Killed:
    """A fit function that notes each step it takes, and kills its own process `delay` s after the
    batch of step `at` (None: never).

    Once: `.killed` beside the model's folder says that it happened, and where.
    """

    fit: Any
    at: int | None
    rank: int
    delay: float

    def __call__(self, batches: Any, *, out: Path, **options: Any) -> dict[str, Any]:
        return self.fit(self._watched(batches, out), out=out, **options)

    def _watched(self, batches: Any, out: Path) -> Iterator[Any]:
        from adversa.training import process_group

        with open(out.with_suffix(f".steps-{process_group.rank()}"), "a", buffering=1) as log:
            for batch in batches:
                log.write(f"{batch['step']}\n")
                if (
                    batch["step"] == self.at
                    and process_group.rank() == self.rank
                    and not out.with_suffix(".killed").exists()
                ):
                    threading.Thread(
                        target=self._die, args=(out, threading.get_ident()), daemon=True
                    ).start()
                yield batch

    def _die(self, out: Path, trainer: int) -> None:
        time.sleep(self.delay)
        place = where(sys._current_frames().get(trainer))
        out.with_suffix(".killed").write_text(
            f"{1000 * self.delay:.0f} ms after the batch of step {self.at}, {place}"
        )
        os.kill(os.getpid(), signal.SIGKILL)


def where(frame: FrameType | None) -> str:
    """The innermost function of a thread, and the innermost of adversa where that is another."""
    found: list[str] = []
    while frame is not None:
        code, ours = frame.f_code, f"{os.sep}adversa{os.sep}" in frame.f_code.co_filename
        if ours or not found:
            found.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
        if ours:
            break
        frame = frame.f_back
    return "in " + " of ".join(found) if found else "after the training's thread had ended"


def configuration(args: argparse.Namespace) -> Config:
    return check(
        {
            "data": {"phantom": {"images": 200}, "part_rows": 64},
            "classifier": {
                "model_args": {"channels": [16, 32, 32, 64]},
                "steps": args.steps,
                "batch_size": 32,
                "evaluations": 3,
                "checkpoint_steps": args.checkpoint_steps,
            },
            "denoiser": {
                "architecture": "unet",
                "patch": 2,
                "channels": [32, 32],
                "steps": args.steps,
                "batch_size": 16,
                "checkpoint_steps": args.checkpoint_steps,
            },
            "cluster": {
                "training_threads": 1,
                "training_workers": args.workers,
                "object_store_mb": 200,
            },
        },
        "kill_training_worker",
    )


def job_of(
    what: str,
    config: Config,
    run: run_folder.RunDir,
    out: Path,
    at: int | None,
    rank: int,
    delay: float,
) -> FitJob:
    mix = run.arm(0, "real") / "mix"
    if what == "classifier":
        job = train.classifier_job(
            run.data, mix, [], config.classifier, 0, config.data.resolution, out
        )
    else:
        job = train.denoiser_job(run.data, mix, config.denoiser, 0, config.data.resolution, out)
    return dataclasses.replace(job, fit=Killed(job.fit, at, rank, delay))


def taken(out: Path, rank: int) -> list[int]:
    return [int(x) for x in out.with_suffix(f".steps-{rank}").read_text().split()]


def differences(out: Path, undisturbed: Path) -> list[str]:
    """What of a run differs from the undisturbed one: weights (to the bit), metrics of the
    manifest, the lines of metrics.jsonl.
    """
    ours, theirs = read_model(out)[0], read_model(undisturbed)[0]
    equal = {
        "weights": ours.keys() == theirs.keys()
        and all(bool((ours[k] == theirs[k]).all()) for k in ours),
        "metrics": step_folder.manifest(out)["metrics"]
        == step_folder.manifest(undisturbed)["metrics"],
        "metrics.jsonl": lines(out) == lines(undisturbed),
    }
    return [name for name, same in equal.items() if not same]


def lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if "second" not in k and "time" not in k} for line in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=("classifier", "denoiser"), default="classifier")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint-steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which workers die")
    args = parser.parse_args()
    from adversa.distributed.engine import RayEngine

    config, faults, draw = configuration(args), [], random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        run = loop.open_run(config, base / "run")
        loop.run(config, run, LocalEngine(1, 1), None, until="prepare")
        train.mix(run.data, [], [], "real", config.mix, 1, run.arm(0, "real") / "mix")
        engine = RayEngine(config.cluster, run.root, config.data.resolution**2 * 3)
        try:
            step_seconds, kills, i = 0.0, 0, 0
            while kills < args.runs and i <= 2 * args.runs:
                at, rank = (
                    (draw.randrange(args.steps), draw.randrange(args.workers)) if i else (None, 0)
                )
                out, started = base / f"{args.what}-{i}", time.monotonic()
                engine.fit(
                    [
                        job_of(
                            args.what,
                            config,
                            run,
                            out,
                            at,
                            rank,
                            SPAN * step_seconds * draw.random(),
                        )
                    ]
                )
                found, seconds = taken(out, rank), time.monotonic() - started
                i += 1
                if at is None:
                    step_seconds = step_folder.manifest(out)["seconds"] / args.steps
                    print(
                        f"undisturbed: {len(found)} steps in {seconds:.1f} s, "
                        f"{1000 * step_seconds:.0f} ms each",
                        flush=True,
                    )
                    continue
                again, different = (
                    len(found) - args.steps,
                    differences(out, base / f"{args.what}-0"),
                )
                said = (
                    f"{'DIFFERENT: ' + ', '.join(different) if different else 'equal'}, "
                    f"{seconds:.1f} s"
                )
                if (died := out.with_suffix(".killed")).exists():
                    kills += 1
                    print(
                        f"worker {rank} killed {died.read_text()}: {again} steps done "
                        f"again, {said}",
                        flush=True,
                    )
                else:
                    print(
                        f"worker {rank} was done before its end after step {at}, another "
                        f"is drawn: {said}",
                        flush=True,
                    )
                faults += [f"run {i - 1}: {what}" for what in different]
                faults += (
                    [] if set(found) == set(range(args.steps)) else [f"run {i - 1}: steps missing"]
                )
                faults += (
                    [f"run {i - 1}: {again} steps done again"]
                    if again > args.checkpoint_steps
                    else []
                )
            faults += [f"only {kills} were killed"] if kills < args.runs else []
        finally:
            engine.close()
    said = "; ".join(faults) or "every run ended as undisturbed"
    print(f"{kills} kills, checkpoints every {args.checkpoint_steps} steps: {said}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
