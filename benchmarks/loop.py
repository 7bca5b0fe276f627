"""Seconds per step of a run of the loop, memory of all its processes together, and the share of its
time that is not compute.

    python benchmarks/loop.py                       the built-in demo, on Ray, from nothing
    python benchmarks/loop.py --quick               a loop of seconds: the same measurements
    python benchmarks/loop.py configs/ham10000-cpu.yaml --run-dir runs/ham10000-cpu

A run folder that is finished already is measured from its manifests (memory is then not known).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Memory, Result, parser, publish

QUICK = [
    "mix.arms=[real,guided]",
    "data.phantom.images=200",
    "data.part_rows=256",
    "classifier.steps=10",
    "classifier.batch_size=32",
    "classifier.evaluations=1",
    "denoiser.steps=5",
    "denoiser.batch_size=16",
    "mine.budget=6",
    "generate.per_case=2",
    "generate.steps=4",
    "generate.batch_size=16",
    "evaluate.bootstrap=100",
]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config", nargs="?", help="a configuration; default: the demo")
    arguments.add_argument("--run-dir", type=Path, help="default: a new temporary folder")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = args.run_dir or Path(temporary) / "run"
        command = [
            sys.executable,
            "-m",
            "adversa.cli",
            "loop",
            *([args.config] if args.config else []),
            "--run-dir",
            str(run),
        ]
        for override in QUICK if args.quick else []:
            command += ["--set", override]
        new = not (run / "summary.json").exists()
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        memory = Memory(process.pid)
        if process.wait():
            sys.exit(f"the loop ended with {process.returncode}: {' '.join(command)}")
        publish(
            results(
                run,
                time.monotonic() - started if new else None,
                memory.stop() if new else None,
                args,
            ),
            args.json,
        )


def results(run: Path, wall: float | None, peak: int | None, args: object) -> list[Result]:
    summary = json.loads((run / "summary.json").read_text())
    found = [
        Result(f"{name}", seconds, "s")
        for name, seconds in summary["seconds"].items()
        if seconds >= 0.05
    ]
    total = summary["wall_seconds"]
    demo = not getattr(args, "config", None) and not getattr(args, "quick", False)
    whole = wall if wall is not None else total
    found.append(
        Result(
            "whole command",
            whole,
            "s",
            "at most 480" if demo else "",
            whole <= 480 if demo else None,
        )
    )
    found.append(Result("not compute", summary["overhead_seconds"], "s"))
    found.append(Result("share not compute", summary["overhead_seconds"] / total, ""))
    if peak is not None:
        found.append(
            Result(
                "memory of all processes",
                peak / 2**30,
                "GiB",
                "under 8" if demo else "",
                peak < 8 * 2**30 if demo else None,
            )
        )
    return found


if __name__ == "__main__":
    main()
