r"""Kill parts of a three-node Ray cluster with -9 while a run works on it; the run must end like an
undisturbed one.

    python tools/chaos.py --out FOLDER          the built-in demo: 4 victims x 5 stages, 20 kills
    python tools/chaos.py --out FOLDER --config tiny.yaml --victims coordinator,head \
        --stages train,generate

The nodes are raylets on this machine, of one CPU each. Each victim gets a run of its own, in which
it dies once in every stage: a worker process (one that is at work), a worker node's raylet with all
below it (a new node joins ten seconds later), the coordinator, the whole head (a new cluster is
started, and the same command again). Prints a line a kill and a Markdown table at the end; exit
code 1 where a run's requests, images, accepted set or metrics differ from the undisturbed run's, or
where something finished was done again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

from kill_and_resume import finished_files, results  # noqa: E402

# stage: (what must be there at the kill, what must not): in the middle of the work, never at its
# edge.
STAGES = {
    "prepare": ("data/decoded/part-*.parquet", "data/manifest.json"),
    "train": ("denoiser/checkpoint.json", "denoiser/model.safetensors"),
    "generate": ("round-001/synthetic/part-*.parquet", "round-001/synthetic/manifest.json"),
    "curate": ("round-001/inspected/part-*.parquet", "round-001/verdicts/manifest.json"),
    "retrain": (
        "round-001/guided/seed-0/classifier/checkpoint.json",
        "round-001/guided/seed-0/classifier/model.safetensors",
    ),
}
VICTIMS = (
    "worker",
    "node",
    "coordinator",
    "head",
)  # and "controller": Ray Train's own, in train and retrain
WORKER = re.compile(
    r"ray::(RayTrainWorker|Actor|Map|ReadParquet|Write|.*Map)"
)  # at work on images, in one stage or another
CONTROLLER = re.compile("ray::TrainController")
DYING_SECONDS = {
    "node": 2.0
}  # after which nothing is left of the victim: workers notice that their raylet is gone
NEW_NODE_SECONDS = 10.0
STAGE_SECONDS = 1800.0
GOES_ON_SECONDS = 300.0
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "160",
    # after which a raylet whose head has died gives up
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}


@dataclass
class Kill:
    """moved: seconds from the death to the next sign of work (a part, a checkpoint, progress) in
    the run's folder.
    """

    victim: str
    stage: str
    what: str
    kept: int
    moved: float = float("nan")
    again: list[str] = field(default_factory=list)


class Nodes:
    """A Ray cluster of a head and two worker nodes, on this machine, in processes of ours."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.folder = tempfile.TemporaryDirectory(
            prefix="adv", ignore_cleanup_errors=True
        )  # short: sockets lie in it
        # Ray Train asks the dashboard whether a training's controller has died, and frees what that
        # held.
        dashboard = {
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": free_port(),
        }
        head = {
            "gcs_server_port": free_port(),
            "temp_dir": self.folder.name,
            "object_store_memory": 200 << 20,
        } | dashboard
        self.cluster = Cluster(True, head_node_args={"num_cpus": 1, **head})
        self.workers = [self.add(), self.add()]
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # Ray's own would drain the nodes, and let us go on

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=200 << 20)

    def raylets(self) -> list[psutil.Process]:
        every = [n for n in [self.cluster.head_node, *self.workers] if n is not None]
        pids = [
            n.all_processes["raylet"][0].process.pid for n in every if "raylet" in n.all_processes
        ]
        return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]

    def working(self, pattern: re.Pattern[str] = WORKER) -> list[psutil.Process]:
        """Ray's workers that are at work on images now."""
        below = [p for raylet in self.raylets() for p in raylet.children(recursive=True)]
        return [p for p in below if pattern.match(title(p))]

    def kill_node(self) -> str:
        """The raylet of the worker node that has most to do; its workers die with it."""
        busiest = max(self.workers, key=lambda n: sum(p.pid in below(n) for p in self.working()))
        raylet = busiest.all_processes["raylet"][0].process.pid
        psutil.Process(raylet).kill()
        self.workers.remove(busiest)
        self.gone = busiest
        return f"raylet {raylet}"

    def renew(self) -> Any:
        """Clear away what is left of the dead node, and let another join."""
        self.cluster.remove_node(self.gone, allow_graceful=False)
        self.workers.append(self.add())
        return self.workers[-1]

    def kill_head(self) -> str:
        """All of the head's processes. The worker nodes find out by themselves."""
        for kind in self.cluster.head_node.all_processes.values():
            for info in kind:
                info.process.kill()
        return "gcs_server, raylet and what else ran there"

    def close(self) -> None:
        family = [
            p for raylet in self.raylets() for p in [raylet, *raylet.children(recursive=True)]
        ]
        for node in [*self.workers, self.cluster.head_node]:
            if node is not None:
                node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        for process in psutil.wait_procs(family, timeout=10)[1]:
            process.kill()
        self.folder.cleanup()


def below(node: Any) -> set[int]:
    pid = node.all_processes["raylet"][0].process.pid
    return (
        {p.pid for p in psutil.Process(pid).children(recursive=True)}
        if psutil.pid_exists(pid)
        else set()
    )


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Scene:
    """One run on a cluster, its command, and whoever dies."""

    def __init__(self, config: Path, run: Path, victim: str, say: Callable[[str], None]) -> None:
        self.config, self.run, self.victim, self.say = config, run, victim, say
        self.nodes = Nodes()
        self.log = run.with_suffix(".log")
        self.kills: list[Kill] = []
        self.left: dict[str, dict[Path, int]] = {}
        self.command = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        words = [
            sys.executable,
            "-m",
            "adversa.cli",
            "loop",
            str(self.config),
            "--run-dir",
            str(self.run),
        ]
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                words, stdout=log, stderr=log, env=os.environ | {"RAY_ADDRESS": self.nodes.address}
            )

    def kill_in(self, stage: str) -> None:
        self.wait_for(stage)
        self.left[stage] = before = finished_files(self.run)
        signs, owner = self.signs(), self.owner()
        died = time.time()
        what = self.kill()
        kill = Kill(self.victim, stage, what, len(before))
        self.kills.append(kill)
        if any(self.run.glob(STAGES[stage][1])):
            raise RuntimeError(
                f"the kill in {stage} came too late; take more steps, or more images"
            )
        if self.victim == "head":
            self.begin_anew()
        moved, whole = None, self.victim != "node"
        after = max(signs, died + DYING_SECONDS.get(self.victim, 0.2))
        waits = self.victim in (
            "coordinator",
            "head",
        )  # what others still write for a moment is no work of a new one
        while moved is None or not whole:
            if time.time() > died + GOES_ON_SECONDS or (
                self.command.poll() is not None and moved is None
            ):
                raise RuntimeError(f"nothing went on after the kill in {stage}: {self.log}")
            if waits and self.owner() != owner:
                after, waits = time.time(), False
            if moved is None and not waits and (found := self.signs()) > after:
                moved = found - died
            if not whole and time.time() > died + NEW_NODE_SECONDS:
                self.join(stage)
                whole = True
            time.sleep(0.1)
        kill.moved = moved
        self.say(
            f"{self.victim} in {stage}: {what} killed; work went on after {kill.moved:.1f} "
            f"s; {kill.kept} files must stay"
        )

    def wait_for(self, stage: str) -> None:
        there, missing = STAGES[stage]
        until = time.monotonic() + STAGE_SECONDS
        while not any(self.run.glob(there)):
            if (
                self.command.poll() is not None
                or any(self.run.glob(missing))
                or time.monotonic() > until
            ):
                raise RuntimeError(f"{stage} did not come, or is over: {self.log}")
            time.sleep(0.02)

    def kill(self) -> str:
        if self.victim in ("worker", "controller"):
            until, pattern = time.monotonic() + 5, WORKER if self.victim == "worker" else CONTROLLER
            while not (found := self.nodes.working(pattern)) and time.monotonic() < until:
                time.sleep(0.01)
            if not found:
                raise RuntimeError("no worker is at work")
            name = title(found[-1])
            found[-1].kill()
            return name
        if self.victim == "coordinator":
            pid = json.loads((self.run / "lock.json").read_text())["pid"]
            psutil.Process(pid).kill()
            return f"process {pid}"
        return self.nodes.kill_node() if self.victim == "node" else self.nodes.kill_head()

    def join(self, stage: str) -> None:
        """What a cloud does when it has taken a machine away. In generation the new one is watched
        until it has work.
        """
        node, joined = self.nodes.renew(), time.monotonic()
        while stage == "generate" and not any(self.run.glob(STAGES[stage][1])):
            if any(p.pid in below(node) for p in self.nodes.working()):
                self.say(
                    f"  the new node has a sampler {time.monotonic() - joined:.1f} s after "
                    "it joined"
                )
                return
            time.sleep(0.05)

    def begin_anew(self) -> None:
        """What a user does whose head has died."""
        try:
            self.command.wait(120)
            said = self.log.read_text().strip().splitlines()[-1]
            self.say(f"  the command ended with {self.command.returncode}: {said[:300]}")
        except subprocess.TimeoutExpired:
            self.say("  the command did not notice for 120 s; killed")
            self.command.kill()
            self.command.wait()
        self.nodes.close()
        self.nodes = Nodes()
        self.command = self.start()

    def owner(self) -> str:
        """Who works on the run, as its lock has it."""
        try:
            return str(json.loads((self.run / "lock.json").read_text())["owner"])
        except FileNotFoundError:
            return ""

    def signs(self) -> float:
        """When the run's folder last changed by work."""
        found = 0.0
        for pattern in (
            "progress.json",
            "part-*.parquet",
            "checkpoint.pt",
            "manifest.json",
            "model.safetensors",
        ):
            for path in self.run.rglob(pattern):
                try:
                    found = max(found, path.stat().st_mtime)
                except FileNotFoundError:
                    continue  # staging that has been cleared away
        return found

    def finish(self) -> int:
        code = self.command.wait(STAGE_SECONDS)
        for kill in self.kills:
            for path, changed in self.left[kill.stage].items():
                if not path.exists() or path.stat().st_mtime_ns != changed:
                    kill.again.append(str(path.relative_to(self.run)))
        return code

    def close(self) -> None:
        if self.command.poll() is None:
            self.command.kill()
            self.command.wait()
        self.nodes.close()


def undisturbed(config: Path, out: Path, say: Callable[[str], None]) -> tuple[Path, float]:
    """A run that nobody disturbs, on the same kind of cluster, and its seconds (of one that is
    there already: nan).
    """
    run = out / "undisturbed"
    if (run / "summary.json").exists():
        return run, float("nan")
    started = time.monotonic()
    scene = Scene(config, run, "nobody", say)
    try:
        if scene.finish():
            raise RuntimeError(f"the undisturbed run failed: {scene.log}")
    finally:
        scene.close()
    say(f"undisturbed: {time.monotonic() - started:.0f} s")
    return run, time.monotonic() - started


def disturbed(
    config: Path,
    out: Path,
    victim: str,
    stages: list[str],
    reference: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    started = time.monotonic()
    scene = Scene(config, out / victim, victim, say)
    try:
        for stage in stages:
            scene.kill_in(stage)
        code = scene.finish()
    finally:
        scene.close()
    ours, theirs = (
        (results(r) for r in (scene.run, reference)) if code == 0 else ({}, {"everything": None})
    )
    different = [key for key in theirs if ours.get(key) != theirs[key]]
    found = {
        "victim": victim,
        "code": code,
        "seconds": time.monotonic() - started,
        "different": different,
    }
    say(
        f"{victim}: exit code {code}, {found['seconds']:.0f} s, different: "
        f"{', '.join(different) or 'nothing'}"
    )
    return found | {"kills": [asdict(k) for k in scene.kills]}


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| killed | in | work went on after | finished files at the kill | done again |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kill in (k for run in found for k in run["kills"]):
        again = ", ".join(kill["again"][:2]) or "none"
        lines.append(
            f"| {kill['victim']} | {kill['stage']} | {kill['moved']:.1f} s | "
            f"{kill['kept']} | {again} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--victims", default=",".join(VICTIMS))
    parser.add_argument("--stages", default=",".join(STAGES))
    args = parser.parse_args()
    os.environ |= ENVIRONMENT
    os.environ.pop("RAY_ADDRESS", None)
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out / "config.yaml"
    tree = yaml.safe_load((args.config or ROOT / "configs/demo.yaml").read_text())
    tree["cluster"] = {
        "training_threads": 1,
        "sampler_threads": 1,
        "object_store_mb": 200,
    } | tree.get("cluster", {})
    config.write_text(yaml.safe_dump(tree))
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)

    reference, seconds = undisturbed(config, args.out, say)
    found = [
        disturbed(config, args.out, v, args.stages.split(","), reference, say)
        for v in args.victims.split(",")
    ]
    (args.out / "chaos.json").write_text(
        json.dumps({"undisturbed": seconds, "runs": found}, indent=1)
    )
    print(table(found))
    if faults := [
        r["victim"]
        for r in found
        if r["code"] or r["different"] or any(k["again"] for k in r["kills"])
    ]:
        sys.exit(f"not as undisturbed: {', '.join(faults)}")


if __name__ == "__main__":
    main()
