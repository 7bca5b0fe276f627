"""`mix.synthetic_ratio: auto`: in every round a sweep over ratios, the choice among them on
`select`, and classes that get no more.

    round-00N/ratio/
        r-<ratio>/mix                 the training set of the swept arm at that ratio
        r-<ratio>/seed-K/classifier   trained as the arm's own of that round
        r-<ratio>/seed-K/select       what it says of select
        search                        the step that did the trials
        choice/choice.json            the ratio, why, and which classes get no more from then on

At ratio 0 the training set is the real and the mined images; at the chosen ratio the classifiers
are those of the arm.

What a round must know of earlier ones it reads from their choice.json alone. The rules are
evaluate/choosing.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from adversa.config import Config, Mix
from adversa.engine.interface import Engine, Tell, Trial
from adversa.engine.step import Facts, inputs, run_step
from adversa.evaluate import choosing
from adversa.pipeline import arms, evaluate, train
from adversa.pipeline.arms import Added
from adversa.pipeline.folders import last_round, ratio_folders
from adversa.run import step_folder
from adversa.run.control import NULL_HANDLE, RunHandle
from adversa.run.folder import RunDir, classes_of
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, predictions, tables
from adversa.storage.path import StoragePath
from adversa.types import GENERATED, seed_of

CHOICE = "choice.json"
RULE = "the smallest ratio whose mean lies within one standard error of the best mean"
ADDING = ("guided", "unguided", "replay", "resample")  # the first of these that a run has is swept

# ---- what holds for a round ----------------------------------------------------------------------


def arm_of(config: Config) -> str:
    """The arm whose ratio is swept: the one the run is about."""
    return next(arm for arm in ADDING if arm in config.mix.arms)


def read(run: RunDir, number: int) -> dict[str, Any] | None:
    """choice.json of a round; None where its ratio was not chosen (yet)."""
    folder = ratio_folders(run, number)[1]
    return files.read_json(folder / CHOICE) if step_folder.is_finished(folder) else None


def before(run: RunDir, number: int) -> dict[str, Any] | None:
    """choice.json of the last round before this one whose ratio was chosen, and not set by hand."""
    found = (read(run, n) for n in range(number - 1, 0, -1))
    return next((f for f in found if f is not None), None)


def caps(run: RunDir, number: int) -> dict[int, int]:
    """`Added.caps` of a round."""
    state = before(run, number)
    if state is None:
        return {}
    classes = classes_of(run.data)
    return {classes.index(name): stopped["most"] for name, stopped in state["stopped"].items()}


def resolve(mix: Mix, run: RunDir, number: int) -> Added:
    """What a round adds, by the settings of that round."""
    if isinstance(mix.synthetic_ratio, str):
        return Added(None, caps(run, number))
    return Added(mix.synthetic_ratio)  # set by hand, it is a number for all classes


# ---- the sweep -----------------------------------------------------------------------------------


def folder_of(run: RunDir, number: int, ratio: float) -> StoragePath:
    return run.round(number, "ratio") / f"r-{name_of(ratio)}"


def name_of(ratio: float) -> str:
    """0, 0.5, 1: shortest, and another for every ratio."""
    return repr(float(ratio)).removesuffix(".0")


def search(engine: Engine, config: Config, run: RunDir, number: int) -> None:
    """Train a classifier for each ratio and seed, and score it on select; of ratios that reach the
    same counts for the smallest.
    """
    c, arm, most = config, arm_of(config), caps(run, number)
    for r in c.mix.ratios:
        out = folder_of(run, number, r) / "mix"
        train.round_mix(c, run, number, arm, Added(r, most), out, engine.handle)
    mixes = {f"mix-{name_of(r)}": folder_of(run, number, r) / "mix" for r in c.mix.ratios}
    section = {"arm": arm, "ratios": c.mix.ratios, "seeds": c.evaluate.seeds, "seed": c.seed}
    section |= {"classifier": c.classifier.model_dump(mode="json", exclude={"checkpoint_steps"})}
    recipe = Recipe("ratio search", 1, section, inputs(data=run.data, **mixes))

    def body(progress: Progress) -> Facts:
        tried = trials(c, run, number)
        engine.search(tried, partial(_told, progress))
        made = [
            step_folder.manifest(f) for t in tried for f in (t.out, t.out.parent / "classifier")
        ]
        return {"rows": len(tried), "device_seconds": sum(m["device_seconds"] for m in made)}

    run_step(ratio_folders(run, number)[0], recipe, body, engine.handle)


def trials(config: Config, run: RunDir, number: int) -> list[Trial]:
    """Seed by seed, so that a sweep that is watched shows all ratios early. The mixes are
    written.
    """
    distinct = [r for r, twin in twins(_added(config, run, number)).items() if twin is None]
    return [
        Trial(
            f"ratio {name_of(r)} seed {seed}",
            folder_of(run, number, r) / f"seed-{seed}" / "select",
            partial(work, config, run, number, r, seed),
            (folder_of(run, number, r) / "mix",),
        )
        for seed in range(config.evaluate.seeds)
        for r in distinct
    ]


def work(
    config: Config, run: RunDir, number: int, ratio: float, seed: int, engine: Engine, tell: Tell
) -> None:
    """One trial, by steps: a module's function, so that it travels. Its progress lies in its
    classifier's folder.
    """
    arm, folder = arm_of(config), folder_of(run, number, ratio)
    out = folder / f"seed-{seed}" / "classifier"
    engine.fit([train.round_classifier(config, run, number, arm, seed, folder / "mix", out)])
    evaluate.score(
        engine, [(arm, seed, out)], run.data / "select", run.data, False, out.parent / "select"
    )


def twins(added: Mapping[float, Sequence[int]]) -> dict[float, float | None]:
    """Ratio -> a smaller one that adds exactly as many images of each class; None: it is trained
    itself.
    """
    first: dict[tuple[int, ...], float] = {}
    found: dict[float, float | None] = {}
    for ratio, counts in sorted(added.items()):
        twin = first.setdefault(tuple(counts), ratio)
        found[ratio] = None if twin == ratio else twin
    return found


def _told(progress: Progress, state: Mapping[str, Any]) -> None:
    """A search's state as a step shows its progress: what runs now is more than a count says."""
    now = [*state.get("running", ())]
    failed = [f"{state['failed']} failed"] if state.get("failed") else []
    note = "; ".join(
        [*failed, *([f"now {', '.join(now[:4])}{', ...' * (len(now) > 4)}"] if now else [])]
    )
    progress({"done": state["done"], "total": state["total"], "unit": state["unit"], "note": note})


def _added(config: Config, run: RunDir, number: int) -> dict[float, list[int]]:
    """Ratio -> images added, [K]."""
    return {
        r: list(step_folder.manifest(folder_of(run, number, r) / "mix")["added_by_class"])
        for r in config.mix.ratios
    }


# ---- the choice ----------------------------------------------------------------------------------


def choose(config: Config, run: RunDir, number: int, handle: RunHandle = NULL_HANDLE) -> Added:
    """What the round adds: choice.json from what the trials say of select, and from the choice
    before; nothing else is read.
    """
    c, out = config, ratio_folders(run, number)[1]
    tried = trials(c, run, number)
    names = inputs(data=run.data, **{run.name_of(t.out).split("/ratio/")[1]: t.out for t in tried})
    known = [n for n in range(1, number) if read(run, n) is not None]
    names |= inputs(**{f"choice-{n}": ratio_folders(run, n)[1] for n in known[-1:]})
    section = {
        "arm": arm_of(c),
        "ratios": c.mix.ratios,
        "seeds": c.evaluate.seeds,
        "patience": c.mix.patience,
    }
    section |= {"bootstrap": c.evaluate.bootstrap, "metric": choosing.METRIC}

    def body(progress: Progress) -> Facts:
        found = decide(c, run, number)
        files.write_json(out / CHOICE, found)
        return {"rows": len(tried), "chosen": found["chosen"], "stopped": sorted(found["stopped"])}

    run_step(out, Recipe("ratio choice", 1, section, names), body, handle)
    found = read(run, number)
    assert found is not None, f"the ratio of round {number} is not chosen"
    return Added(found["chosen"], caps(run, number))


def decide(config: Config, run: RunDir, number: int) -> dict[str, Any]:
    """What choice.json holds. ratios: a row each, `same_as` of one that reached what a smaller one
    did and was not trained; reached: added images a real training image; judged: the ratio at which
    classes are compared with ratio 0.
    """
    c, classes, added = config, classes_of(run.data), _added(config, run, number)
    alike = twins(added)
    scored, labels, groups = _scored(
        c, run, number, [r for r, twin in alike.items() if twin is None]
    )
    resampled = c.evaluate.bootstrap, seed_of("ratio", "select")
    choice = choosing.choose(scored, labels, groups, classes, *resampled)
    positive = {r: f for r, f in choice.figures.items() if r > 0}
    judged = choice.chosen or (choosing.pick(positive) if positive else None)
    helped = {}
    if judged is not None:
        helped = choosing.help_by_class(
            scored[judged], scored[0.0], labels, groups, classes, added[judged], *resampled
        )
    in_a_row, stopped = carried(
        before(run, number),
        {name: h.word for name, h in helped.items()},
        dict(zip(classes, added[choice.chosen], strict=True)),
        number,
        c.mix.patience,
    )
    rows = [
        _row(folder_of(run, number, r) / "mix", r, twin, choice.figures.get(r))
        for r, twin in alike.items()
    ]
    return {
        "round": number,
        "arm": arm_of(c),
        "role": "select",
        "metric": choosing.METRIC,
        "rule": RULE,
        "chosen": choice.chosen,
        "best": choice.best,
        "bar": choice.bar,
        "ratios": rows,
        "judged": judged,
        "patience": c.mix.patience,
        "classes": {name: asdict(h) for name, h in helped.items()},
        "in_a_row": in_a_row,
        "stopped": stopped,
    }


def _row(
    mix: StoragePath, ratio: float, twin: float | None, figure: choosing.Figure | None
) -> dict[str, Any]:
    """Of `ratios` in choice.json."""
    made = step_folder.manifest(mix)
    real, added = made["rows"] - made["mined"] - made["synthetic"], list(made["added_by_class"])
    return {
        "ratio": ratio,
        "reached": sum(added) / real,
        "filled": sum(added) == arms.budget(ratio, real),
        "added": sum(added),
        "added_by_class": added,
        "same_as": twin,
        "seeds": len(figure.each) if figure else 0,
        "mean": figure.mean if figure else None,
        "se": figure.se if figure else None,
        "each": list(figure.each) if figure else [],
    }


def carried(
    previous: Mapping[str, Any] | None,
    words: Mapping[str, str],
    added: Mapping[str, int],
    number: int,
    patience: int | None,
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """(class -> rounds in a row in which images did not help it, class -> since which round it is
    stopped and its most images).

    previous: choice.json before; words: of choosing.Help, by class; added: what this round's arms
    get. A round that cannot tell leaves the count as it is. A class that is stopped stays so.
    """
    in_a_row, stopped = (dict(previous[k]) if previous else {} for k in ("in_a_row", "stopped"))
    for name, word in words.items():
        if word != choosing.UNKNOWN:
            in_a_row[name] = 0 if word == choosing.HELPED else in_a_row.get(name, 0) + 1
        if patience is not None and in_a_row.get(name, 0) >= patience and name not in stopped:
            stopped[name] = {"since": number + 1, "most": added[name]}
    return in_a_row, stopped


def _scored(
    config: Config, run: RunDir, number: int, ratios: Sequence[float]
) -> tuple[dict[float, np.ndarray], np.ndarray, list[str]]:
    """(ratio -> logits [S, N, K] on select, labels [N], lesions [N])"""
    arm, found = arm_of(config), {}
    for r in ratios:
        folders = [
            folder_of(run, number, r) / f"seed-{s}" / "select" for s in range(config.evaluate.seeds)
        ]
        found[r] = [
            predictions.predictions(tables.read(f, schema=tables.PREDICTIONS), arm, s)
            for s, f in enumerate(folders)
        ]
    first = found[ratios[0]][0]
    assert all(p.ids == first.ids for rows in found.values() for p in rows), (
        "trials were scored on other images"
    )
    return (
        {r: np.stack([p.logits for p in rows]) for r, rows in found.items()},
        first.labels,
        first.groups,
    )


# ---- what is told of it --------------------------------------------------------------------------


def facts(config: Config, run: RunDir) -> dict[str, Any]:
    """Round -> its choice.json, for summary.json; the rounds whose ratio was chosen."""
    every = {n: read(run, n) for n in range(1, last_round(config) + 1)}
    return {str(n): found for n, found in every.items() if found is not None}


def notes(config: Config, run: RunDir) -> list[str]:
    """Lines for a reader of the report."""
    told = facts(config, run)
    if not told:
        return []
    arm, found = arm_of(config), []
    for number, choice in told.items():
        if choice["chosen"] == 0:
            found.append(
                f"round {number}: ratio 0 was chosen on select: no {_thing(arm)} enters "
                f"training; {_why(choice)}"
            )
        if (short := [row for row in choice["ratios"] if not row["filled"]]) and short[-1]["added"]:
            asked, most = ", ".join(name_of(row["ratio"]) for row in short), short[-1]["reached"]
            found.append(
                f"round {number}: there were images for a ratio of {most:.2f}, and too few "
                f"for {asked}"
            )
    for name, stop in list(told.values())[-1]["stopped"].items():
        if stop["since"] <= last_round(config):
            why = f"they did not help it in {config.mix.patience} rounds in a row"
            found.append(
                f"from round {stop['since']} on {name} gets no more images, at most "
                f"{stop['most']} in all: {why}"
            )
    found.append(
        f"mix.synthetic_ratio auto: the ratio was tuned for {arm} on select; the other "
        "arms take the same counts, which is fair in "
        f"number, but tuned for {arm}"
    )
    return found


def _thing(arm: str) -> str:
    return "synthetic image" if arm in GENERATED else "repeated image"


def _why(choice: Mapping[str, Any]) -> str:
    tried = {row["ratio"]: row for row in choice["ratios"] if row["same_as"] is None}
    none, best = tried[0], tried[choice["best"]]
    if len(tried) == 1:
        return "there was none to try"
    if choice["best"] == 0:
        return f"no other ratio was better than {none['mean']:.3f} of balanced accuracy"
    return (
        f"ratio 0 has a balanced accuracy of {none['mean']:.3f}, the best, ratio "
        f"{name_of(choice['best'])}, {best['mean']:.3f} "
        f"with a standard error of {best['se']:.3f}"
    )
