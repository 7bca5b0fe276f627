"""The run folder: where each step lies, what it was asked, whether it is finished, and what the run is doing now.

Everything a person can ask about a run is answered from these files alone, without Ray and without torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from adversa.places import Place, Remote, StoreError
from adversa.tables import replace_bytes
from adversa.types import UserError, digest

RECIPE, MANIFEST, PROGRESS, OPENED = "recipe.json", "manifest.json", "progress.json", "opened.json"


@dataclass(frozen=True)
class RunDir:
    """Places of a run, of the kind of `root`. `round-00N/<arm>` of the arm `real` is always round 0: it never changes."""

    root: Place

    @property
    def config(self) -> Place:
        return self.root / "config.yaml"

    @property
    def recipe(self) -> Place:
        return self.root / "run.json"

    @property
    def data(self) -> Place:
        return self.root / "data"

    @property
    def denoiser(self) -> Place:
        return self.root / "denoiser"

    @property
    def codec(self) -> Place:
        return self.root / "codec"

    def latents(self, role: str) -> Place:
        return self.root / "latents" / role

    @property
    def judge(self) -> Place:
        return self.root / "judge"

    @property
    def features(self) -> Place:
        """What two classifiers make of the real images, a folder for each role: the gate measures distances in them."""
        return self.root / "features"

    @property
    def limits(self) -> Place:
        """What a painted image must keep to, as measured on real images."""
        return self.root / "limits"

    @property
    def test(self) -> Place:
        return self.root / "test"

    @property
    def openings(self) -> Place:
        """Every time `test` was opened: outside its folder, which may be deleted."""
        return self.root / "openings.json"

    @property
    def select(self) -> Place:
        """What the classifiers of `test` say of `select`: where thresholds are set."""
        return self.root / "select"

    @property
    def summary(self) -> Place:
        return self.root / "summary.json"

    @property
    def status(self) -> Place:
        return self.root / "status.json"

    def round(self, number: int, step: str = "") -> Place:
        return self.root / f"round-{number:03d}" / step

    def arm(self, number: int, arm: str, seed: int | None = None) -> Place:
        folder = self.round(number) / arm
        return folder if seed is None else folder / f"seed-{seed}"

    def inside(self, name: str) -> Place:
        """A place of the run by its relative name, as a file of the run says it. UserError for one that would lie elsewhere."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{self.root} names a file outside of itself ({name}); not read")
        return self.root / name

    def name_of(self, folder: Place) -> str:
        return folder.relative_to(self.root).as_posix()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_json(path: Place) -> dict[str, Any] | None:
    """The JSON object of a file, or None where there is none (or it is being replaced on a file system without atomic rename)."""
    try:
        value = json.loads(_fresh(path))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError):  # ValueError: no JSON, no UTF-8
        return None
    return value if isinstance(value, dict) else None


def _fresh(path: Place) -> str:
    """Of a network file system: a file that another machine replaces while it is read is a stale handle, once or twice."""
    for _ in range(3):
        try:
            return path.read_text()
        except OSError as e:
            if e.errno != errno.ESTALE:
                raise
    return path.read_text()


def write_json(path: Place, value: dict[str, Any] | list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """ "key: old -> new" for each field that differs, dotted keys, sorted."""
    a, b = flatten(json.loads(json.dumps(old))), flatten(json.loads(json.dumps(new)))
    return [f"{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


SHAPELESS = ("order",)  # steps whose recipes have as many fields as were asked for
FREE = ("groups", "model_args")  # mappings whose keys a user chooses: one may be absent for an ordinary reason


def unknown(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fields and whole sections, dotted, that `new` has and `old`'s version of adversa did not know.

    Not what a mapping of FREE holds, nor a section that is a plain value (null) on the other side: settings do that.
    """
    found = []
    for key in sorted(new):
        if key not in old:
            found.append(key)
        elif isinstance(old[key], dict) and isinstance(new[key], dict) and key not in FREE:
            found += [f"{key}.{name}" for name in unknown(old[key], new[key])]
    return found


def _versions_apart(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What one of two versions does not know, in words; empty where both recipes have the same fields."""
    pairs = (("that one", unknown(old, new)), ("this one", unknown(new, old)))
    return [f"{which} does not know {', '.join(fields)}" for which, fields in pairs if fields]


def _advice(apart: list[str], made: Place) -> str:
    """What to do about a recipe that differs. apart: of _versions_apart; made: a folder whose manifest may name who made it."""
    if not apart:
        return "use those values again, or another --run-dir"
    known = read_json(made / MANIFEST) or {}
    version, commit = known.get("versions", {}).get("adversa"), known.get("git")
    named = ", ".join([f"adversa {version}"] * bool(version) + [f"commit {commit}"] * bool(commit))
    that = f"that version ({named})" if named else "that version"
    return f"another version of adversa made it: {', '.join(apart)}; finish it with {that}, or give another --run-dir"


def open_run(
    root: Place, recipe: dict[str, Any], config_yaml: str, reopen: bool = False, busy: Callable[[RunDir], bool] | None = None
) -> RunDir:
    """Create the run folder, or check that it was made by the same recipe.

    busy: whether somebody works on the run (default: on this machine): then nothing is changed in it.
    reopen: `test` may be opened again, so how it is read may differ where it was opened before (READING). UserError with the fields
    that differ, or why the folder can't be written.
    """
    run = RunDir(root)
    with _opening(root):
        saved = read_json(run.recipe)
        if saved is not None:
            check_links(root)
    if saved is None:
        if root.is_dir() and any(p for p in root.iterdir() if not p.name.startswith(".")):
            raise UserError(f"{root} is not empty and not a run; give an empty or new folder with --run-dir")
        with _opening(root):
            root.mkdir(parents=True, exist_ok=True)
            write_json(run.recipe, {"recipe": recipe, "created": now()})
            replace_bytes(run.config, config_yaml.encode())
        return run
    if _of_sweep(saved.get("recipe", {})) != _of_sweep(recipe):
        kinds = ("a run of the loop", "a sweep") if _of_sweep(recipe) else ("a sweep", "a run of the loop")
        raise UserError(f"{root} holds {kinds[0]}, this command is for {kinds[1]}; give another --run-dir")
    changed = differences(saved.get("recipe", {}), recipe)
    idle = bool(changed) and not (busy or is_locked)(run)
    if changed and _may_change(run, changed) and idle:
        with _opening(root):
            for stale in root.rglob(RECIPE):
                if not is_finished(stale.parent) and (stale.parent == run.data or not _begun(stale.parent)):
                    stale.unlink()
            write_json(run.recipe, {"recipe": recipe, "created": now()})
            replace_bytes(run.config, config_yaml.encode())
    elif changed and reopen and _only_reads(run, changed) and idle:
        with _opening(root):
            write_json(run.recipe, saved | {"recipe": recipe})
            replace_bytes(run.config, config_yaml.encode())
    elif changed:
        again = ", or --reopen-test: test is read a second time, and the report says so" if _only_reads(run, changed) else ""
        advice = _advice(_versions_apart(saved.get("recipe", {}), recipe), run.data)
        raise UserError(f"{root} was made by another recipe ({'; '.join(changed)}); {advice}{again}")
    with _opening(root):
        if not run.config.exists():  # killed between the two files
            replace_bytes(run.config, config_yaml.encode())
        probe = root / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    return run


# What comes before the first classifier, and the sections and fields it is made of beside those of the folders above it. The steps'
# own recipes do not guard these: a finished stage is not asked again, and latents of eight views would be trained on without a word
# where `denoiser.flips` is off.
MADE_OF = {
    "data": ("data",), "round-000/real/mix": ("mix",), "judge/mix": ("curate.folds",),
    "codec": ("codec", "denoiser.balance", "seed"), "latents/train": ("denoiser.flips",), "latents/select": (),
}  # fmt: skip


def _may_change(run: RunDir, changed: list[str]) -> bool:
    """Whether nothing made so far hangs on the fields that differ: then a setting that stopped a step may be mended in place.

    A training that has a checkpoint counts as made: it would go on from the weights of the old settings. Not so a data folder that
    is not finished: it looks through its parts itself.
    """
    made = {p.parent for p in run.root.rglob(MANIFEST)}
    made |= {p.parent for p in run.root.rglob(RECIPE) if p.parent != run.data and _begun(p.parent)}
    names = [re.sub(r"^judge/mix-\d+$", "judge/mix", run.name_of(folder)) for folder in made]
    if any(name not in MADE_OF for name in names):
        return False
    fields = [field for name in names for field in MADE_OF[name]]
    keys = [c.partition(":")[0] for c in changed]
    return not any(key == field or key.startswith(f"{field}.") for key in keys for field in fields)


# The fields that only say how `test` is read once it is open: no classifier hangs on them.
READING = tuple(f"evaluate.{field}" for field in ("bootstrap", "groups", "specificities", "floor", "subgroups"))


def _only_reads(run: RunDir, changed: list[str]) -> bool:
    """Whether `test` was opened before, and nothing but READING differs."""
    keys = [c.partition(":")[0] for c in changed]
    opened = run.openings.exists() or (run.test / OPENED).exists()
    return opened and all(any(key == field or key.startswith(f"{field}.") for field in READING) for key in keys)


@contextlib.contextmanager
def _opening(root: Place) -> Iterator[None]:
    """Whatever a file system says against a new run folder is for the user to mend: here it can't be a fault of ours."""
    try:
        with writing(root):
            yield
    except StoreError:
        raise
    except OSError as e:
        raise UserError(f"cannot write to {e.filename or root}: {e.strerror or e}; give another --run-dir") from None


def is_sweep(run: RunDir) -> bool:
    """Whether the folder holds a sweep, and no run of the loop."""
    return _of_sweep((read_json(run.recipe) or {}).get("recipe", {}))


def _of_sweep(recipe: dict[str, Any]) -> bool:
    """Whether it is a sweep's: that has no `mix` (sweep.recipe_of)."""
    return "sweep" in recipe and "mix" not in recipe


def run_id(recipe: dict[str, Any]) -> str:
    """The same for the same question on any machine: the recipe without the place of the data."""
    data = {k: v for k, v in recipe["data"].items() if k != "path"}
    return digest(json.dumps(recipe | {"data": data}, sort_keys=True), size=8)


# {option}: what says where to write; {kept}: that the same command goes on where it was.
FIXES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again{kept}",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again{kept}",
    errno.EIO: "the disk fails (input/output error); check it, then run the same command again{kept}",
    errno.ESTALE: "the network file system has lost it; mount it again, then run the same command again{kept}",
    errno.EBUSY: "something else holds it; wait for that to end and run the same command again, or give another {option}",
    errno.EROFS: "the file system is read-only; give a {option} that can be written",
    errno.EACCES: "permission denied; give a {option} that can be written",
    errno.EPERM: "permission denied; give a {option} that can be written",
    errno.ENOTDIR: "a file is in the way; give another {option}",
    errno.EEXIST: "a file is in the way; give another {option}",
    errno.EISDIR: "a folder is in the way; give another {option}",
    errno.ELOOP: "symbolic links lead in a circle; give another {option}",
    errno.ENAMETOOLONG: "the name is too long; give another {option}, a shorter one",
    errno.EFBIG: "the file system takes no file so large; give another {option}",
    errno.ENOENT: "the folder cannot be made, or is gone; see whether it was deleted or unmounted, or give another {option}",
}


@contextlib.contextmanager
def writing(folder: Place, option: str = "--run-dir") -> Iterator[None]:
    """Turn the faults of a file system that a user can mend into a UserError. option: what the user gave the folder by."""
    try:
        yield
    except OSError as e:
        if e.errno not in FIXES or _is_ours(folder, e):
            raise
        kept = ", finished parts are kept" if option == "--run-dir" else ""
        where = e.filename2 or e.filename or folder  # of two names (a rename) the second is where it was to go
        raise UserError(f"cannot write to {where}: {FIXES[e.errno].format(option=option, kept=kept)}") from None


def _is_ours(folder: Place, error: OSError) -> bool:
    """Whether it is a fault of ours: a file missing in a folder that is there, or something in the way elsewhere."""
    if isinstance(folder, Remote):
        return True  # what a store refuses is told by it
    named = Path(error.filename) if isinstance(error.filename, str) else folder
    near = named == folder or folder in named.parents or named in folder.parents
    if error.errno == errno.ENOENT:
        return os.path.exists(folder) or not near
    return error.errno in (errno.EEXIST, errno.EISDIR) and not near


def check_links(root: Place, below: str = "") -> None:
    """UserError where a link in a run (below one of its folders) leads out of it: what is written there would be written elsewhere.

    Who owns the run may put all of it elsewhere and link that.
    """
    if not isinstance(root, Path):
        return
    real = root.resolve()
    waiting = [root / below] if (root / below).is_dir() else []
    if below and waiting and not waiting[0].resolve().is_relative_to(real):
        raise UserError(f"{waiting[0]} is a link that leads out of the run; put the folder itself there")
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(real):
                    raise UserError(
                        f"{entry.path} is a link that leads out of the run; put the file itself there, or link the whole run"
                    )
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def lock_file(run: RunDir) -> Path:
    """What a process locks to hold the run: in its folder; of an object store, which knows no locks, in this user's temporary
    folder, where it is seen by this machine alone (of several containers on one machine: by this one)."""
    if isinstance(run.root, Path):
        return run.root / ".lock"
    return Path(tempfile.gettempdir()) / f"adversa-{os.getuid()}-{digest(str(run.root), size=8)}.lock"


@contextlib.contextmanager
def lock(run: RunDir) -> Iterator[None]:
    """Hold the run for this process; the kernel lets go when the process dies, however it dies. See lock_file; lease.py holds it
    against all others."""
    with open(lock_file(run), "a", opener=no_link) as f:
        for tries_left in (4, 3, 2, 1, 0):  # `status` holds a shared lock for a moment
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if tries_left == 0:
                    pid = (read_json(run.status) or {}).get("pid", "unknown")
                    raise UserError(
                        f"{run.root} is in use by process {pid}; wait for it, or stop it, or use another --run-dir"
                    ) from None
                time.sleep(0.05)
            except OSError as e:
                if e.errno not in NO_LOCKS:
                    raise
                raise UserError(
                    f"{run.root}: its file system knows no locks ({e.strerror}); mount it with them (Lustre: -o flock), or give "
                    "another --run-dir"
                ) from None
        yield


def no_link(path: str, flags: int) -> int:
    """Not through a link: in a temporary folder, or a folder from a stranger, it may lead to a file of this user's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def is_locked(run: RunDir) -> bool:
    """Whether a process of this machine holds the run. Reads only."""
    try:
        with open(lock_file(run)) as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        return False


# ---- steps -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a step was asked: its own section of the configuration and the fingerprints of what it reads."""

    step: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "version": self.version, "config": self.config, "inputs": self.inputs}

    @property
    def fingerprint(self) -> str:
        return digest(json.dumps(self.to_json(), sort_keys=True))


def begin(folder: Place, recipe: Recipe) -> bool:
    """True where the step is finished already. Writes the recipe; UserError with the fields where another one is there."""
    asked, saved = recipe.to_json(), read_json(folder / RECIPE)
    if saved is None:
        assert not (folder / MANIFEST).exists(), f"{folder} has a manifest and no recipe"
        write_json(folder / RECIPE, asked)
    elif (changed := differences(saved, asked)) and not _begun(folder):
        write_json(folder / RECIPE, asked)
    elif changed:
        advice = _advice(_steps_apart(saved, asked), folder)
        raise UserError(f"{folder} was made by another recipe ({'; '.join(changed)}); {advice}")
    return is_finished(folder)


def _steps_apart(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """As _versions_apart, of a step's recipe: it has another number in another version, and what it reads has other names in other
    settings. Some steps (codec, denoiser) have recipes of two shapes, which differ in a field that both have as well."""
    a, b = (flatten(json.loads(json.dumps(r.get("config", {})))) for r in (saved, asked))
    same = all(a[k] == b[k] for k in a.keys() & b.keys()) and asked["step"] not in SHAPELESS
    apart = _versions_apart(saved.get("config", {}), asked["config"]) if same else []
    if saved.get("version") != asked["version"]:
        apart.append(f"its step {asked['step']} has number {saved.get('version')}, here it has {asked['version']}")
    return apart


def _begun(folder: Place) -> bool:
    """Whether a step has anything to lose: a part, a model, training state, or its manifest."""
    return any(next(folder.rglob(p), None) for p in ("*.parquet", "*.safetensors", "*.pt", MANIFEST))


def is_finished(folder: Place) -> bool:
    return (folder / MANIFEST).exists()


def finish(folder: Place, recipe: Recipe, **facts: Any) -> dict[str, Any]:
    """Mark a step complete: the manifest is the last thing written.

    facts: at least seconds, compute_seconds, device_seconds and rows.
    """
    manifest = {"step": recipe.step, "fingerprint": recipe.fingerprint, "finished": now()}
    manifest |= {"versions": versions(), "git": git_commit(), "machine": machine()} | facts
    (folder / PROGRESS).unlink(missing_ok=True)
    write_json(folder / MANIFEST, manifest)
    return manifest


def manifest(folder: Place) -> dict[str, Any]:
    found = read_json(folder / MANIFEST)
    assert found is not None, f"{folder} is not finished"
    return found


def fingerprint(folder: Place) -> str:
    return manifest(folder)["fingerprint"]


REMOTE_SECONDS = 2.0  # a put takes tens of milliseconds, and costs


class Progress:
    """Writes progress.json into a step's folder, at most twice a second: the one source of the live view and of `status`.

    On an object store every REMOTE_SECONDS.

    `elapsed` carries on from an attempt that was cut off, so that the manifest's seconds are the step's whole cost.
    """

    def __init__(self, folder: Place, interval: float = 0.5) -> None:
        self.folder, self.interval = folder, max(interval, REMOTE_SECONDS) if isinstance(folder, Remote) else interval
        self.started = time.monotonic()
        self.before = float((read_json(folder / PROGRESS) or {}).get("elapsed", 0.0))
        self.first: tuple[float, float] | None = None  # when, and how much was done, at the first report of this attempt
        self.written = 0.0

    @property
    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.started

    def __call__(self, state: dict[str, Any]) -> None:
        t = time.monotonic()
        if self.first is None:
            self.first = (t, float(state.get("done", 0)))
        if t - self.written < self.interval:
            return
        self.written = t
        rate = (float(state.get("done", 0)) - self.first[1]) / (t - self.first[0]) if t > self.first[0] else 0.0
        with writing(self.folder):
            write_json(self.folder / PROGRESS, state | {"elapsed": self.elapsed, "rate": rate, "updated": time.time()})


# ---- what the run is doing ----------------------------------------------------------------------------------------------


def set_status(run: RunDir, state: str, stage: str = "", **more: Any) -> None:
    """state: running, finished, stopped (by the user) or failed; stage: a step folder's name."""
    with writing(run.root):
        write_json(
            run.status,
            {"state": state, "stage": stage, "pid": os.getpid(), "host": socket.gethostname(), "updated": time.time()} | more,
        )


class Clock:
    """Adds this command's wall time to clock.json every other second, so that time lost to a kill is counted too.

    On an object store every five seconds.

    since: time.monotonic() at the start of the command; its start-up counts.
    """

    def __init__(self, run: RunDir, since: float | None = None) -> None:
        self.path = run.root / "clock.json"
        self.since = time.monotonic() if since is None else since
        self.before = wall_seconds(run)
        self.writing = threading.Lock()  # two threads must not share the temporary name
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def tick(self) -> None:
        with self.writing:
            write_json(self.path, {"wall_seconds": self.before + time.monotonic() - self.since})

    def _beat(self) -> None:
        stopped = False
        while not stopped:
            stopped = self.stopped.wait(5 if isinstance(self.path, Remote) else 2)
            try:
                self.tick()
            except StoreError:
                continue  # a store that cannot be reached now may be in a moment
            except OSError:
                return  # the disk is full or gone: the step that is running says so itself

    def __enter__(self) -> Clock:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()


def wall_seconds(run: RunDir) -> float:
    """Wall time of all commands on this run so far."""
    return float((read_json(run.root / "clock.json") or {}).get("wall_seconds", 0.0))


def sweep(run: RunDir) -> None:
    """Remove what a killed process left half-written: hidden files that end in its process id. The caller holds the run's lock.

    An object store has no such files.
    """
    if isinstance(run.root, Remote):
        return
    for path in run.root.rglob(".*"):
        if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
            path.unlink(missing_ok=True)


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in ("adversa", "torch", "ray", "timm", "diffusers", "numpy", "pyarrow", "scikit-learn", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # ray and diffusers are absent where only the core is installed
            found[package] = metadata.version(package)
    return found


@cache
def git_commit() -> str | None:
    """The commit of the checkout adversa runs from, with + when changed; None when installed."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "") if commit.returncode == 0 else None


CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of a container: "QUOTA PERIOD" in microseconds, or "max PERIOD"


def cpus() -> int:
    """How many CPUs this process may use: affinity (taskset, batch systems) and a container's quota; the machine may have more."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_MAX.read_text().split()
        return max(1, min(free, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no quota
        return max(1, free)


@cache
def machine() -> dict[str, Any]:
    return {"platform": platform.platform(), "cpus": os.cpu_count()}
