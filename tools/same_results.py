"""Show that two versions of adversa give identical images and metrics: same machine, same seeds.

    python tools/same_results.py record OUT_A            # in a checkout of the one version
    python tools/same_results.py record OUT_B            # in a checkout of the other
    python tools/same_results.py compare OUT_A OUT_B     # exit code 1 where anything differs

`record` runs two short loops (RUNS) with the code that this file lies beside, on the local engine
and a fixed number of threads, and writes what they gave into OUT/facts.json. A fact is keyed by
what it is of (round, arm, seed, role, class), never by a path; LAYOUT, COLUMNS and WORDS hold all
that is known of names, so that a version with other names needs other rows there and nothing else,
and `read OUT_A`, which writes the facts of runs that are there again.

The seed of an image is hashed from its request, and that from names of settings, arms and
strategies. Where a version gives those other names, `record OUT_B --seeds-of OUT_A` hashes those
that OUT_A had.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

CHECKOUT, CALL = Path(__file__).resolve().parents[1], "call"
Fact = str | int | float | bool | None
Facts = dict[str, dict[str, Fact]]  # kind: {what it is of: fact}
Row = dict[str, Any]  # of a table
Files = Sequence[tuple[dict[str, str], Path]]  # (what the path says, path)


class Record(TypedDict):
    """Of one run. run_id: what request ids are hashed from; made: where, by what, how long."""

    run_id: str
    made: dict[str, Fact]
    facts: Facts


# ---- names: all that is known of how a version of adversa calls things ---------------------------

# kind: files of a run folder; a named group of the path becomes part of the key.
ROUND, ARM, PART = r"round-(?P<round>\d+)", r"(?P<arm>[\w-]+)", r"part-\d+\.parquet"
LAYOUT = (
    ("data", rf"data/(?P<role>train|mine|select|test|pool)/{PART}"),
    ("mix", rf"{ROUND}/{ARM}/mix/{PART}"),
    ("mix", rf"(?P<model>judge|verifier)/mix-(?P<fold>\d+)/{PART}"),
    ("weights", r"(?P<model>denoiser|generator|codec)/model\.safetensors"),
    ("weights", r"(?P<model>judge|verifier)/fold-(?P<fold>\d+)/model\.safetensors"),
    ("weights", rf"{ROUND}/{ARM}/seed-(?P<seed>\d+)/classifier/model\.safetensors"),
    ("hard", rf"{ROUND}/hard/{PART}"),
    ("request", rf"{ROUND}/requests/{PART}"),
    ("image", rf"{ROUND}/synthetic/{PART}"),
    ("verdict", rf"{ROUND}/verdicts/{PART}"),
    ("prediction", rf"{ROUND}/(?P<step>scores|evaluate)/{PART}"),
    ("prediction", rf"(?P<role>select|test)/{PART}"),
    ("scorecard", r"round-\d+/[\w-]+/seed-\d+/scorecard-\w+\.json"),
    ("scorecard", r"(round-\d+/evaluate|test)/[\w-]+/seed-\d+/scorecard\.json"),
    ("summary", r"summary\.json"),
)
KINDS = tuple(dict.fromkeys(kind for kind, _ in LAYOUT))  # in the order in which a run makes them
CLASSES = "classes"  # of summary.json: names of the classes, in order
RUN_ID, COMMIT = "run_id", "git"  # of summary.json
# meaning: the column that holds it, in one version or another.
COLUMNS = {
    "request": ("request_id",),
    "image": ("id", "example", "example_id"),
    "noise": ("sigma_start",),
}
# Phrase of a newer version: what it was called, in keys, reasons and names hashed into seeds.
WORDS = {
    "baseline": "before",
    "img2img": "vary",
    "interpolate": "blend",
    "verifiers": "judges",
    "verifier": "judge",
    "generator": "denoiser",
    "near-duplicate": "near twin",
    "parity": "matched",
    "thresholds": "limits",
    "classifier guidance": "hardness",
    "reference guidance": "likeness",
}
# A key of summary.json with one of these words is of time, machine, version, place, or a sentence.
NOT_COMPARED = re.compile(
    r"\b(seconds|hour|overhead|restarts?|wall|cost|opened|settings|versions|git|machine|device"
    r"|threads|workers|run|notes?|sentence)\b"
)

# ---- runs ----------------------------------------------------------------------------------------

SHOWN = 3  # differing items of a kind that `compare` prints
HAM_SHARE = 6  # one lesion in so many
# name: (file of configs/, what makes it short: keys of --set)
RUNS: dict[str, tuple[str, dict[str, str | float]]] = {
    # As shipped, but classifier 600 -> 200, judges likewise, denoiser 150 -> 50 steps.
    "demo": ("demo.yaml", {"classifier.steps": 200, "denoiser.steps": 50}),
    # Steps a tenth of what is shipped, one lesion in HAM_SHARE, smaller batches, fewer images.
    "ham10000": (
        "ham10000-cpu.yaml",
        {
            "data.path": "ham10000.zip",
            "classifier.weights": "classifier.safetensors",
            "classifier.steps": 70,
            "classifier.batch_size": 16,
            "classifier.evaluations": 2,
            "classifier.views": 2,
            "denoiser.steps": 400,
            "denoiser.batch_size": 32,
            "mine.budget": 24,
            "generate.per_case": 4,
            "curate.min_agreement": 0.12,  # of judges trained so briefly, who turn down nearly all
        },
    ),
}


def adversa(
    arguments: Sequence[str], folder: Path, threads: int, seeds_of: str | None, log: Path
) -> None:
    """Run a command of this checkout in `folder`; what it says goes to `log`.

    seeds_of: run id of another version, to hash ids and seeds from its names; None: from its own.
    CalledProcessError where the command fails.
    """
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    env |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, CALL, seeds_of or "", *arguments]
    with open(log, "w") as f:
        subprocess.run(command, cwd=folder, env=env, stdout=f, stderr=subprocess.STDOUT, check=True)


def rename(run_id: str) -> None:
    """From now on ids and seeds are hashed from `run_id`, and from what WORDS has for new names.

    To be called before any other module takes the two functions.
    """
    from adversa import types

    plain_digest, plain_id = types.digest, types.request_id

    def digest(*parts: object, size: int = 16) -> str:
        old = (WORDS.get(p, p) if isinstance(p, str) else p for p in parts)
        return plain_digest(*old, size=size)

    def request_id(
        run: str, round: int, arm: str, example: str, strategy: str, replicate: int
    ) -> str:
        return plain_id(run_id, round, arm, example, strategy, replicate)

    types.digest, types.request_id = digest, request_id


def call(seeds_of: str, arguments: Sequence[str]) -> None:
    """The command line of adversa, in this process: the same for a module and a package."""
    if seeds_of:
        rename(seeds_of)
    from adversa.cli.app import main

    sys.argv = ["adversa", *arguments]
    main()


def record(
    out: Path, names: Iterable[str], ham: Path, weights: Path, threads: int, seeds_of: Path | None
) -> None:
    """Carry out the runs `names` in `out`, each in a new folder; write or extend out/facts.json."""
    known = read_facts(seeds_of)["runs"] if seeds_of else {}
    for name in names:
        missing = [p for p in (ham, weights) if not p.exists()] if name == "ham10000" else []
        if missing:
            print(f"{name}: left out, there is no {missing[0]} (--ham, --weights)")
            continue
        if seeds_of and name not in known:
            sys.exit(f"{seeds_of} has no run {name}; name one that it has with --only")
        (folder := out / name).mkdir(parents=True)
        if name == "ham10000":
            part_of_ham(ham, folder / "ham10000.zip", HAM_SHARE)
            (folder / "classifier.safetensors").symlink_to(weights.resolve())
        config, short = RUNS[name]
        arguments = ["loop", str(CHECKOUT / "configs" / config), "--engine", "local"]
        arguments += ["--run-dir", "run"]
        both = {f"cluster.{kind}_threads": threads for kind in ("training", "sampler")}
        pairs = [f"{key}={value}" for key, value in (short | both).items()]
        arguments += [word for pair in pairs for word in ("--set", pair)]
        seeds, started = known[name]["run_id"] if seeds_of else None, time.monotonic()
        adversa(arguments, folder, threads, seeds, folder / "log.txt")
        seconds = round(time.monotonic() - started, 1)
        made = about(threads) | {"settings": " ".join(pairs), "seconds": seconds}
        read(out, name, made, seeds)


def read(out: Path, name: str, made: dict[str, Fact], run_id: str | None) -> None:
    """Write into out/facts.json what the finished run `name` gave; run_id: None for its own."""
    facts, file = facts_of(out / name / "run"), out / "facts.json"
    summary = json.loads((out / name / "run" / "summary.json").read_text())
    found = read_facts(out) if file.exists() else {"runs": {}}
    made = made | {"commit": summary[COMMIT]}
    found["runs"][name] = {"run_id": run_id or summary[RUN_ID], "made": made, "facts": facts}
    file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    counts = ", ".join(f"{len(items)} {kind}" for kind, items in facts.items())
    print(f"{name}: {made['seconds']} s; {counts}")


def about(threads: int) -> dict[str, Fact]:
    """What the facts hang on beside the code: `compare` tells where it differs."""
    packages = ("torch", "timm", "diffusers", "numpy", "pillow", "pyarrow", "scikit-learn")
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    where = {"threads": threads, "machine": platform.platform(), "cpu": models[0] if models else ""}
    return where | {name: metadata.version(name) for name in packages}


def part_of_ham(source: Path, out: Path, share: int) -> None:
    """Write one lesion in `share` of HAM10000's archive, chosen by its hash."""
    with zipfile.ZipFile(source) as z, zipfile.ZipFile(out, "w") as part:
        head, *lines = z.read("HAM10000_metadata.csv").decode().splitlines()
        names = head.split(",")
        lesion, image = names.index("lesion_id"), names.index("image_id")
        chosen = [x for x in lines if int(digest(x.split(",")[lesion]), 16) % share == 0]
        images = {x.split(",")[image] for x in chosen}
        part.writestr(zipfile.ZipInfo("HAM10000_metadata.csv"), "\n".join([head, *chosen]))
        for name in z.namelist():
            stem = Path(name).stem.removesuffix("_segmentation")
            if stem in images or name == "duplicate_lesion_pairs.csv":
                part.writestr(zipfile.ZipInfo(name), z.read(name))


# ---- from a run folder to facts ------------------------------------------------------------------


def facts_of(root: Path) -> Facts:
    """All facts of a finished run; ValueError for a kind that has none: LAYOUT does not fit."""
    files: dict[str, list[tuple[dict[str, str], Path]]] = defaultdict(list)
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        for kind, pattern in LAYOUT:
            if match := re.fullmatch(pattern, name):
                files[kind].append((match.groupdict(), path))
    if missing := [kind for kind in KINDS if not files[kind]]:
        raise ValueError(f"{root} has no {', '.join(missing)}; change the rows of LAYOUT")
    classes = json.loads(files["summary"][0][1].read_text())[CLASSES]
    requests = _requests(files["request"], classes)
    found: Facts = {kind: {} for kind in KINDS}
    found["request"] = dict(requests.values())
    asked = {name: key for name, (key, _) in requests.items()}
    found["data"] = _digests(
        files["data"], lambda r: (_get(r, "image"), r["label"], pixels(r["image"]))
    )
    found["mix"] = _digests(
        files["mix"],
        lambda r: (
            asked.get(_get(r, "image"), _get(r, "image")),
            meant(r["kind"]),
            r["label"],
            r["weight"],
        ),
    )
    found["hard"] = _digests(files["hard"], lambda r: (r["rank"], _get(r, "image"), r["label"]))
    found["prediction"] = _digests(
        files["prediction"], lambda r: (_get(r, "image"), r["label"], r["logits"]), "arm", "seed"
    )
    for groups, path in files["weights"]:
        found["weights"][_key(groups)] = weights_digest(path)
    for _, row in _rows(files["image"]):
        found["image"][asked[_get(row, "request")]] = pixels(row["image"])
    for _, row in _rows(files["verdict"]):
        told = "kept" if row["keep"] else f"rejected: {meant(row['reason'])}"
        found["verdict"][asked[_get(row, "request")]] = told
    for _, path in files["scorecard"]:
        found["scorecard"] |= _scorecard(json.loads(path.read_text()))
    found["summary"] = dict(_numbers(json.loads(files["summary"][0][1].read_text())))
    return found


def _rows(files: Files) -> Iterator[tuple[dict[str, str], Row]]:
    """(what the path says, row) of every row of the tables."""
    for groups, path in files:
        yield from ((groups, row) for row in pq.read_table(path).to_pylist())


def _get(row: Row, meaning: str) -> Any:
    """The value of the column that has this meaning. KeyError where there is none."""
    for name in COLUMNS[meaning]:
        if name in row:
            return row[name]
    raise KeyError(f"none of {COLUMNS[meaning]} among {sorted(row)}; change the rows of COLUMNS")


def _key(groups: dict[str, str]) -> str:
    """ "round=1 arm=guided" of what a path's groups say."""
    known = {k: v for k, v in groups.items() if v is not None}
    return " ".join(f"{k}={int(v) if v.isdigit() else meant(v)}" for k, v in known.items())


def _requests(files: Files, classes: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Request id to (what is asked for, told without the id; its seed, noise and guidance)."""
    found, count = {}, Counter[str]()
    for groups, row in _rows(files):
        key = _key(groups | {"arm": row["arm"], "strategy": row["strategy"]})
        key += f" class={classes[row['label']]} of={_get(row, 'image')}"
        count[key] += 1
        told = f"seed {row['seed']}, noise {_get(row, 'noise')!r}, guidance {row['guidance']!r}"
        found[_get(row, "request")] = (f"{key} n={count[key]}", told)
    return found


def _digests(files: Files, of: Callable[[Row], tuple[object, ...]], *by: str) -> dict[str, Fact]:
    """How many rows each table has, and their digest, whatever its parts and the order of its rows.

    by: columns that divide what one path holds into several tables.
    """
    rows: dict[str, list[str]] = defaultdict(list)
    for groups, row in _rows(files):
        rows[_key(groups | {name: str(row[name]) for name in by})].append(repr(of(row)))
    return {key: f"{len(each)} rows, {digest(*sorted(each))}" for key, each in rows.items()}


def _scorecard(card: Row) -> dict[str, Fact]:
    key = f"arm={meant(card['arm'])} seed={card['seed']} round={card['round']} role={card['role']}"
    values = {"n": card["n"], "metrics": card["metrics"], "intervals": card["intervals"]}
    return {f"{key} {name}": value for name, value in _numbers(values)}


def _numbers(tree: Any, *above: str) -> Iterator[tuple[str, Fact]]:
    """(dotted key, value) of every leaf of JSON whose key has no word of NOT_COMPARED."""
    if isinstance(tree, dict):
        children = [(meant(str(k)), v) for k, v in tree.items()]
    elif isinstance(tree, list):
        children = [(_label(v, i), v) for i, v in enumerate(tree)]
    else:
        yield ".".join(above), meant(tree) if isinstance(tree, str) else tree
        return
    for name, value in children:
        if not NOT_COMPARED.search(name):
            yield from _numbers(value, *above, name)


def _label(value: object, position: int) -> str:
    """What an entry of a list is about (two arms, or a subgroup's value), else its place."""
    said = (
        [str(value[k]) for k in ("a", "b", "value") if k in value]
        if isinstance(value, dict)
        else []
    )
    return meant(" against ".join(said)) if said else str(position)


def meant(text: str) -> str:
    """The text with the phrases of WORDS as they were, and spaces for - and _."""
    text = re.sub("[-_]", " ", text)
    for phrase in sorted(WORDS, key=len, reverse=True):
        text = re.sub(rf"\b{re.escape(phrase.replace('-', ' '))}\b", WORDS[phrase], text)
    return text


def digest(*parts: str | bytes) -> str:
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


def pixels(image: bytes | None) -> str:
    """Digest of an image's values, however it is compressed; "none" where there is no image."""
    if not image:
        return "none"
    values = np.asarray(Image.open(io.BytesIO(image)))
    return digest(str(values.shape), str(values.dtype), values.tobytes())


def weights_digest(path: Path) -> str:
    """Of the tensors of a safetensors file, whatever their names and order."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    each = []
    for tensor in header.values():
        low, high = tensor["data_offsets"]
        each.append(digest(tensor["dtype"], str(tensor["shape"]), data[start + low : start + high]))
    return f"{len(each)} tensors, {digest(*sorted(each))}"


# ---- comparing -----------------------------------------------------------------------------------


def read_facts(path: Path) -> dict[str, dict[str, Record]]:
    text = (path / "facts.json" if path.is_dir() else path).read_text()
    found: dict[str, dict[str, Record]] = json.loads(text)
    return found


def compare(a: dict[str, Record], b: dict[str, Record]) -> tuple[list[str], bool]:
    """(what to print, whether nothing differs) of two records by run; ValueError where none is."""
    lines, same = [], bool(a.keys() | b.keys())
    if not same:
        raise ValueError("neither record has a run")
    for run in sorted(a.keys() | b.keys()):
        if run not in a or run not in b:
            lines.append(f"{run}: only in {'A' if run in a else 'B'}")
            same = False
            continue
        x, y = a[run]["facts"], b[run]["facts"]
        told = [line for kind in KINDS for line in _differences(kind, x[kind], y[kind])]
        if told:
            old, new = a[run]["made"], b[run]["made"]
            keys = [k for k in old if k not in ("commit", "seconds") and old[k] != new.get(k)]
            apart = "; ".join(f"{k} {old[k]} -> {new.get(k)}" for k in keys)
            note = f" ({apart}, which alone may change last bits)" * bool(apart)
            lines += [f"{run}: DIFFERENT{note}, in the order in which a run makes them", *told]
        else:
            lines.append(f"{run}: identical ({', '.join(f'{len(x[k])} {k}' for k in KINDS)})")
        same = same and not told
    return lines, same


def _differences(kind: str, a: dict[str, Fact], b: dict[str, Fact]) -> list[str]:
    """Lines on what differs between the items of one kind; ValueError where there are none."""
    if not a and not b:
        raise ValueError(f"neither record has a {kind}")
    changed = [k for k in a if k in b and not _equal(a[k], b[k])]
    missing, added = [k for k in a if k not in b], [k for k in b if k not in a]
    if not changed and not missing and not added:
        return []
    head = f"  {kind}: {len(changed)} of {len(a)} differ"
    head += "".join(f", {len(k)} only in {x}" for k, x in ((missing, "A"), (added, "B")) if k)
    numbers = [(k, a[k], b[k]) for k in changed]
    gaps = {k: abs(x - y) for k, x, y in numbers if _is_number(x) and _is_number(y)}
    if gaps := {k: gap for k, gap in gaps.items() if not math.isnan(gap)}:
        worst = max(gaps, key=lambda k: gaps[k])
        head += f"; largest absolute difference {gaps[worst]:g} ({worst})"
    lines = [head, *(f"    {k}: {a[k]} -> {b[k]}" for k in changed[:SHOWN])]
    lines += [f"    only in A: {k}: {a[k]}" for k in missing[:SHOWN]]
    return lines + [f"    only in B: {k}: {b[k]}" for k in added[:SHOWN]]


def _is_number(value: Fact) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(a: Fact, b: Fact) -> bool:
    """Not-a-number equals itself here, and a number never equals a flag."""
    return _is_number(a) == _is_number(b) and (a == b or (a != a and b != b))


def main() -> None:
    if sys.argv[1:2] == [CALL]:
        return call(sys.argv[2], sys.argv[3:])
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True)
    r = commands.add_parser("record", help="run this checkout, and write down what it gave")
    r.add_argument("out", type=Path, metavar="OUT")
    shared = CHECKOUT.parent / "shared"
    r.add_argument("--ham", type=Path, default=shared / "data/ham10000_200x150.zip")
    weights = shared / "weights/tf_efficientnet_lite0.safetensors"
    r.add_argument("--weights", type=Path, default=weights)
    r.add_argument("--threads", type=int, default=1, help="of torch, in trainings and samplers")
    named = "a record of a version with other names"
    r.add_argument("--seeds-of", type=Path, metavar="OUT", help=named)
    told = "write down again what the runs of a record gave"
    commands.add_parser("read", help=told).add_argument("out", type=Path, metavar="OUT")
    c = commands.add_parser("compare", help="what differs between two records")
    c.add_argument("a", type=Path, metavar="A")
    c.add_argument("b", type=Path, metavar="B")
    for command in (r, c):
        command.add_argument("--only", choices=list(RUNS), help="one run alone")
    args = parser.parse_args()
    names = [args.only] if getattr(args, "only", None) else list(RUNS)
    if args.command == "record":
        record(args.out.resolve(), names, args.ham, args.weights, args.threads, args.seeds_of)
    elif args.command == "read":
        for name, run in read_facts(args.out)["runs"].items():
            read(args.out, name, run["made"], run["run_id"])
    else:
        found = [read_facts(path)["runs"] for path in (args.a, args.b)]
        lines, same = compare(*({n: x[n] for n in names if n in x} for x in found))
        print("\n".join(lines))
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
