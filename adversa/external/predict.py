"""Probabilities of images that have no label: those of an arm's classifiers after the last round,
averaged over the seeds.
"""

from __future__ import annotations

import csv
import glob
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from adversa import config as cfg
from adversa.common.statistics import softmax
from adversa.data import files, images
from adversa.data.records import ImageRecord
from adversa.engine.interface import BatchEngine
from adversa.engine.tasks import Part, Report, Work
from adversa.external import evaluate
from adversa.pipeline import folders, results
from adversa.run.folder import RunDir, classes_of
from adversa.storage import tables
from adversa.storage.files import read_json
from adversa.storage.path import StoragePath
from adversa.storage.weights import CONFIG
from adversa.types import BEFORE, UserError

CROPS = ("center", "pad", "squash")
ON_ERROR = ("fail", "skip")
CLASS = "?"  # of records whose label nobody knows
ROWS = pa.schema(
    [
        ("path", pa.string()),
        ("probability", pa.list_(pa.float64())),
        ("spread", pa.float64()),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True)
class Answers:
    """paths [N]; probability float64 [N, K], the mean over seeds; spread [N]: standard deviation
    over seeds of the predicted class's probability, NaN with one seed; problems: (path, what is
    wrong) of files left out.
    """

    paths: list[str]
    probability: np.ndarray
    spread: np.ndarray
    problems: list[tuple[str, str]]


def check_options(crop: str | None, on_error: str = "fail") -> None:
    """UserError where one of them has a value that there is not."""
    for option, value, known in (("--crop", crop, CROPS), ("--on-error", on_error, ON_ERROR)):
        if value is not None and value not in known:
            raise UserError(
                f"{option} {value}: there is no such way; give {', '.join(known[:-1])} or "
                f"{known[-1]}"
            )


def arm_of(arm: str | None, config: cfg.Config, run: RunDir) -> str:
    """The arm asked for; None: the one that the run is about. UserError where it has none such."""
    known: list[str] = [*config.mix.arms]
    if folders.home(config, "real", folders.last_round(config)):
        known.append(BEFORE)
    if arm is not None and arm not in known:
        raise UserError(f"--arm {arm}: {run.root.name} has no such arm; give {', '.join(known)}")
    return arm or results.candidate(known) or "real"


def models_of(arm: str, config: cfg.Config, run: RunDir) -> tuple[list[StoragePath], list[str]]:
    """(the folders of an arm's classifiers, one a seed; the classes)."""
    found = [folder for a, _, folder in evaluate.models(config, run) if a == arm]
    return found, classes_of(run.data)


def described(model: StoragePath) -> tuple[list[str], int]:
    """(classes, resolution) of a classifier's folder, which names no classes: 0, 1, ... UserError
    where it is none.
    """
    found = read_json(model / CONFIG) or {}
    if "num_classes" not in found or "resolution" not in found:
        raise UserError(f"{model} is no run and holds no classifier; give a run's folder")
    return [str(k) for k in range(int(found["num_classes"]))], int(found["resolution"])


def listed(names: Sequence[str]) -> list[str]:
    """The files that names stand for: files, folders (every picture in them) and globs, each file
    once, in the order given.

    UserError for a name that stands for nothing.
    """
    found: dict[str, None] = {}
    for name in names:
        path = Path(name)
        try:
            is_file, is_folder = path.is_file(), path.is_dir()
        except (OSError, ValueError):  # a name too long, or with a null character
            is_file = is_folder = False
        if is_file:
            these = [name]
        elif is_folder:
            these = _pictures(path)
            if not these:
                raise UserError(
                    f"{files.printable(name)}: this folder has no picture "
                    f"({', '.join(files.PICTURES)})"
                )
        elif glob.has_magic(name):
            these = sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file())
            if not these:
                raise UserError(f"{files.printable(name)}: no file matches")
        else:
            raise UserError(f"{files.printable(name)}: no such file or folder; check the spelling")
        found.update(dict.fromkeys(these))
    return list(found)


def _pictures(folder: Path) -> list[str]:
    return [
        str(folder / n)
        for n in sorted(files.walk(folder))
        if Path(n).suffix.lower() in files.PICTURES and _is_shown(n)
    ]


def _is_shown(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def predict(
    engine: BatchEngine,
    models: Sequence[StoragePath],
    data: cfg.Data,
    paths: Sequence[str],
    out: Path,
    on_error: str,
    report: Report,
) -> Answers:
    """Score files by the classifiers (one a seed). data: resolution, crop and limits. out: an empty
    folder for the parts.

    UserError for a file that is no picture, where on_error is `fail`.
    """
    size = data.part_rows
    chunks = [list(paths[i : i + size]) for i in range(0, len(paths), size)]
    parts = [Part(i, len(c), {"paths": c}) for i, c in enumerate(chunks)]
    engine.map_batches(
        partial(make_answers, tuple(models), data, on_error), parts, out, report, model=True
    )
    rows = tables.read(out, schema=ROWS)
    bad = rows.filter(pa.compute.is_valid(rows["problem"]))
    good = rows.filter(pa.compute.is_null(rows["problem"]))
    problems = list(zip(bad["path"].to_pylist(), bad["problem"].to_pylist(), strict=True))
    if not len(good):
        path, problem = problems[0]
        raise UserError(
            f"none of the {len(problems)} files is a picture that can be read: "
            f"{files.printable(path)}: {problem}"
        )
    probability = np.asarray(good["probability"].to_pylist(), np.float64)
    return Answers(
        good["path"].to_pylist(),
        probability,
        good["spread"].to_numpy(zero_copy_only=False),
        problems,
    )


def make_answers(models: Sequence[StoragePath], data: cfg.Data, on_error: str) -> Work:
    """Decodes and scores a part's files; one that cannot be read leaves a row with its problem."""
    from adversa.classify.score import make_scorer

    scorers = [make_scorer(folder) for folder in models]
    decode = images.make_decoder(data.model_copy(update={"on_error": "skip"}), [CLASS])

    def work(part: Part, path: StoragePath) -> int:
        names = part.payload["paths"]
        named = [n for n in names if _is_text(n)]
        found = {
            d.record.source: d
            for d in decode(
                [ImageRecord("", n, f"file:{Path(n).absolute()}", CLASS, n) for n in named]
            )
        }
        problems = {
            n: found[n].problem if n in found else "its name is not valid UTF-8; rename it"
            for n in names
        }
        bad = [(n, p) for n, p in problems.items() if p is not None]
        if bad and on_error == "fail":
            raise UserError(
                f"{files.printable(bad[0][0])}: {bad[0][1]}; leave such files out with "
                "--on-error skip"
            )
        good = [n for n in names if problems[n] is None]
        rows = [{"path": files.printable(n), "problem": p} for n, p in bad]
        if good:
            shown = (found[n].image for n in good)
            pictures = np.stack([image for image in shown if image is not None])
            each = np.stack([softmax(scorer(pictures)[0]) for scorer in scorers])
            mean, spread = summed_up(each)
            rows += [
                {"path": n, "probability": p, "spread": s}
                for n, p, s in zip(good, mean.tolist(), spread.tolist(), strict=True)
            ]
        tables.write_part(path, pa.Table.from_pylist(rows, schema=ROWS))
        return len(rows)

    return work


def _is_text(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


def summed_up(each: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[S, N, K] of S seeds -> (mean [N, K], standard deviation over seeds of the predicted class's
    probability [N], NaN of one).
    """
    mean = each.mean(0)
    predicted = mean.argmax(1)
    if len(each) < 2:
        return mean, np.full(len(mean), np.nan)
    return mean, each.std(0, ddof=1)[np.arange(len(mean)), predicted]


def as_table(answers: Answers, classes: Sequence[str]) -> pa.Table:
    """As `table`: path, predicted, p_<class> of each class, spread."""
    best = answers.probability.argmax(1).tolist()
    columns: dict[str, list[str] | np.ndarray] = {
        "path": answers.paths,
        "predicted": [classes[k] for k in best],
    }
    columns |= {f"p_{c}": answers.probability[:, k] for k, c in enumerate(classes)}
    return pa.table(columns | {"spread": answers.spread})


def table(answers: Answers, classes: Sequence[str]) -> str:
    """CSV: path, predicted, p_<class> of each class, spread (blank with one seed)."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["path", "predicted", *(f"p_{c}" for c in classes), "spread"])
    for path, p, s in zip(answers.paths, answers.probability, answers.spread, strict=True):
        lines.writerow(
            [
                path,
                classes[int(p.argmax())],
                *(f"{v:.9g}" for v in p),
                "" if np.isnan(s) else f"{s:.9g}",
            ]
        )
    return text.getvalue()
