r"""Kill a run with -9, process tree and all, at five points; the same command must finish it, like
an undisturbed run.

    python tools/kill_and_resume.py --run-dir RUN --undisturbed OTHER_RUN -- \
        adversa loop configs/demo.yaml

Prints a line a kill, then what is equal and what is not; exit code 1 where anything differs or
finished work was done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

from adversa.storage import tables

# name: (what must be there at the kill, what must not): in the middle of a part of the work, never
# at its edge.
POINTS = {
    "prepare: some images decoded": ("data/decoded/part-*.parquet", "data/manifest.json"),
    "train: first classifier begun": (
        "round-000/real/seed-0/classifier/progress.json",
        "round-000/real/seed-0/classifier/model.safetensors",
    ),
    "train: denoiser at a checkpoint": ("denoiser/checkpoint.pt", "denoiser/model.safetensors"),
    "generate: some images generated": (
        "round-001/synthetic/part-*.parquet",
        "round-001/synthetic/manifest.json",
    ),
    "retrain: an arm begun": (
        "round-001/guided/seed-0/classifier/progress.json",
        "round-001/guided/seed-0/classifier/model.safetensors",
    ),
}

# Steps that workers fill part by part: what is committed stays, finished or not. The others write
# all they have in one go.
BY_PARTS = ("scores", "synthetic", "inspected", "verdicts", "evaluate", "test")


def kill_at(
    command: list[str], run: Path, there: str, missing: str, timeout: float = 1200
) -> float:
    """Start the command, kill its tree as soon as `there` matches a file; seconds it lived.

    RuntimeError if the command ended before, or if `missing` is there after all: then the kill came
    too late.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(run.glob(there)):
        if process.poll() is not None:
            raise RuntimeError(
                f"the command ended with {process.returncode} before {there} appeared"
            )
        if time.monotonic() - started > timeout:
            kill_tree(process.pid)
            raise RuntimeError(f"no {there} within {timeout:.0f} s")
        time.sleep(0.02)
    kill_tree(process.pid)
    process.wait()
    if any(run.glob(missing)):
        raise RuntimeError(
            f"the kill came too late: {missing} is there already; take more steps, or "
            "checkpoints closer together"
        )
    return time.monotonic() - started


def kill_tree(pid: int) -> None:
    """kill -9 of a process and all that descend from it, found before the first dies."""
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue  # it went with its parent


def finished_files(run: Path) -> dict[Path, int]:
    """What must never be written again, with the time of its last change: manifests, models, and
    committed parts.

    Staging (data/decoded) and the training state may go; the parts of data/<role> count once `data`
    has its manifest.
    """
    files = [
        *run.rglob("part-*.parquet"),
        *run.rglob("model.safetensors"),
        *run.rglob("manifest.json"),
    ]
    return {p: p.stat().st_mtime_ns for p in files if _is_committed(p, run)}


def _is_committed(path: Path, run: Path) -> bool:
    step = path.parent
    if run / "data" in path.parents:
        return step.name != "decoded" and (run / "data/manifest.json").exists()
    return (step / "manifest.json").exists() or (
        path.suffix == ".parquet" and step.name in BY_PARTS
    )


def results(run: Path) -> dict[str, object]:
    """What must not depend on how a run was carried out."""
    verdicts = tables.read(run / "round-001/verdicts").to_pylist()
    synthetic = tables.read(run / "round-001/synthetic", ["request_id", "image"]).to_pylist()
    return {
        "split hash": json.loads((run / "summary.json").read_text())["split_hash"],
        "request ids": sorted(
            tables.read(run / "round-001/requests", ["request_id"])["request_id"].to_pylist()
        ),
        "images": {r["request_id"]: r["image"] for r in synthetic},
        "accepted": sorted(v["request_id"] for v in verdicts if v["keep"]),
        "metrics": json.loads((run / "summary.json").read_text())["arms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", dest="run", type=Path, required=True)
    parser.add_argument("--undisturbed", type=Path, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = [*args.command[args.command[0] == "--" :], "--run-dir", str(args.run)]
    faults: list[str] = []
    kept: dict[str, dict[Path, int]] = {}
    for name, (there, missing) in POINTS.items():
        lived = kill_at(command, args.run, there, missing)
        before = finished_files(args.run)
        print(
            f"killed after {lived:5.1f} s at {name}; {len(before)} files that must stay", flush=True
        )
        kept[name] = before
    started = time.monotonic()
    code = subprocess.call(command, stdout=subprocess.DEVNULL)
    print(f"finished by the same command in {time.monotonic() - started:.1f} s, exit code {code}")
    for name, before in kept.items():
        redone = [str(p) for p, t in before.items() if not p.exists() or p.stat().st_mtime_ns != t]
        if redone:
            faults.append(f"done again after the kill at {name}: {', '.join(redone[:3])}")
    ours, theirs = results(args.run), results(args.undisturbed)
    for key in ours:
        equal = ours[key] == theirs[key]
        print(f"{key}: {'equal' if equal else 'DIFFERENT'} ({len(ours[key])})")
        faults += [] if equal else [key]
    if code or faults:
        sys.exit("; ".join(faults) or f"exit code {code}")


if __name__ == "__main__":
    main()
