"""The steps of a round. The only place where the core packages meet: each step reads folders, calls them, writes one folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adversa import config as cfg
from adversa import runs, tables
from adversa.loop import arms, latents
from adversa.loop.engine import Engine, FitJob, Part, Work
from adversa.loop.feed import Feed, balanced
from adversa.loop.step import Facts, cost, inputs, run_step
from adversa.places import place
from adversa.types import BEFORE, PAINTED, Scorecard, UserError, seed_of
from adversa.weights import MODEL

Row = dict[str, Any]
UNTOLD = ("dx_type",)  # how the diagnosis was made: of the archive, not of the patient


def classes_of(data: Path) -> list[str]:
    found = runs.read_json(data / "classes.json")
    assert found is not None, f"{data} is not prepared"
    return found["classes"]


def split_hash(data: Path) -> str:
    return (runs.read_json(data / "split.json") or {})["split_hash"]


# ---- training ----------------------------------------------------------------------------------------------------------


def mix(
    data: Path, hard: Sequence[Path], verdicts: Sequence[Path], arm: str, config: cfg.Mix, per_case: int, out: Path,
    most: Mapping[int, int] | None = None,
) -> None:  # fmt: skip
    """Ids and weights of an arm's training set (arms.mix).

    hard, verdicts: of every round so far; none before the first. per_case: what the controls repeat where no arm paints.
    config: with a number for the ratio (ratio.settled); auto only before the first round, where there is nothing to add. most: of
    some classes, no more than so many are added.
    """
    names = inputs(data=data) | {f"verdicts-{i}": runs.fingerprint(v) for i, v in enumerate(verdicts)}
    names |= {f"hard-{i}": runs.fingerprint(h) for i, h in enumerate(hard)}
    section = {"arm": arm, "per_case": per_case} | config.model_dump(mode="json", exclude={"ratios", "patience"})
    section |= {"most": {str(c): n for c, n in sorted(most.items())}} if most else {}
    recipe = runs.Recipe("mix", 2, section, names)
    ratio = 0.0 if isinstance(config.synthetic_ratio, str) else config.synthetic_ratio
    assert config.synthetic_ratio == ratio or not (hard or verdicts), "the ratio is not chosen yet"

    def body(progress: runs.Progress) -> Facts:
        real = pairs(tables.read(data / "train", ["id", "label"], tables.EXAMPLES), "id")
        cases = sorted({p for h in hard for p in pairs(tables.read(h, schema=tables.HARD_CASES), "example")})
        kept: dict[str, list[tuple[str, int]]] = {a: [] for a in config.arms if a in PAINTED}
        for folder in verdicts:
            rows = tables.read(folder, ["request_id", "arm", "label", "keep"], tables.VERDICTS)
            for a, these in kept.items():
                these += pairs(rows.filter(pc.and_(rows["keep"], pc.equal(rows["arm"], a))), "request_id")
        labels = {a: [label for _, label in rows] for a, rows in kept.items()}
        classes = len(classes_of(data))
        if kept:
            counts = arms.matched_counts(labels, classes, len(real), ratio, most)
        else:
            counts = arms.repeats([label for _, label in cases], classes, per_case, len(real), ratio, most)
        mined = cases if config.fold_mined == "all" else []
        table = arms.mix(arm, real, mined, kept.get(arm, []), counts)
        tables.write_part(out / tables.part_name(0), table)
        added = counts if arm != "real" else [0] * classes
        synthetic = len(table) - len(real) - len(mined)
        return {"rows": len(table), "mined": len(mined), "synthetic": synthetic, "added": sum(added), "added_by_class": added}

    run_step(out, recipe, body)


def round_mix(c: cfg.Config, run: runs.RunDir, number: int, arm: str, section: cfg.Mix, most: Mapping[int, int], out: Path) -> None:
    """`mix` of an arm in a round, of all that was mined and kept so far. section: c.mix with the round's ratio, or another."""
    rounds = range(1, number + 1)
    verdicts = [run.round(n, "verdicts") for n in rounds] if section.paints else []
    mix(run.data, [run.round(n, "hard") for n in rounds], verdicts, arm, section, c.generate.per_case, out, most)


def pairs(rows: pa.Table, name: str) -> list[tuple[str, int]]:
    """(id, label) of each row."""
    return list(zip(rows[name].to_pylist(), rows["label"].to_pylist(), strict=True))


def classifier_job(
    data: Path, mix_folder: Path, added: Sequence[Path], config: cfg.Classifier, seed: int, resolution: int, out: Path
) -> FitJob:
    """Train a classifier on a mix. The seed alone decides initial weights, draws and augmentation: pairs of arms share it.

    added: folders of what is in the mix beside the images of `train`.
    """
    from adversa.classify import fit

    select = Feed(folders=(data / "select",), batch_size=config.batch_size)
    feed = Feed(
        folders=(data / "train", *added), mix=mix_folder, steps=config.steps, batch_size=config.batch_size,
        balance=config.balance, seed=seed_of("feed", seed),
    )  # fmt: skip
    section = config.model_dump(mode="json", exclude={"checkpoint_steps"})
    recipe = runs.Recipe("classifier", 1, section | {"seed": seed}, inputs(data=data, mix=mix_folder) | _weights(config.weights))
    classes = len(classes_of(data))
    counts, priors = class_shares(mix_folder, config.balance, classes)
    job = partial(fit.fit, config=config, num_classes=classes, resolution=resolution, seed=seed, counts=counts, priors=priors)
    return FitJob(out, recipe, job, fit.resume_step, feed, select)


def round_classifier(c: cfg.Config, run: runs.RunDir, number: int, arm: str, seed: int, mix_folder: Path, out: Path) -> FitJob:
    """A training of an arm in a round, from one of the run's seeds, on the arm's mix or another of that round."""
    rounds = range(1, number + 1) if arm in PAINTED else ()
    mined = [run.data / "mine"] if number and c.mix.fold_mined == "all" else []
    return classifier_job(
        run.data, mix_folder, [*mined, *(run.round(n, "synthetic") for n in rounds)], c.classifier,
        seed_of("classifier", c.seed, seed), c.data.resolution, out,
    )  # fmt: skip


def class_shares(mix_folder: Path, balance: float, classes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(weight of each class in a mix, its share of the draws once they are balanced), each [K]."""
    rows = tables.read(mix_folder, ["label", "weight"], tables.MIX)
    labels, weights = rows["label"].to_numpy().astype(np.int64), rows["weight"].to_numpy()
    drawn = np.bincount(labels, balanced(weights, labels, balance), minlength=classes)
    return tuple(np.bincount(labels, weights, minlength=classes).tolist()), tuple((drawn / drawn.sum()).tolist())


def denoiser_job(
    data: Path, mix_folder: Path, config: cfg.Denoiser, seed: int, resolution: int, out: Path,
    codec: tuple[Path, Path] | None = None,
) -> FitJob:  # fmt: skip
    """Train the denoiser on what the arm `real` sees, and nothing else.

    codec: (codec folder, folder of every role's latents) where latents are diffused; resolution is the side of what is diffused.
    """
    from adversa.diffuse import edm, fit

    classes = classes_of(data)
    images, std = (codec[1], config.sigma_data) if codec else (data, None)
    feed = Feed(
        folders=(images / "train",), mix=mix_folder, steps=config.steps, batch_size=config.batch_size, balance=config.balance,
        seed=seed_of("feed", "denoiser", seed), latent_std=std,
    )  # fmt: skip
    section = config.model_dump(mode="json", exclude={"checkpoint_steps"})
    start = str(edm.SHIPPED) if config.weights == "phantom" else config.weights
    names = inputs(data=data, mix=mix_folder) | (inputs(codec=codec[0], latents=codec[1] / "train") if codec else {})
    recipe = runs.Recipe("denoiser", 1, section | {"seed": seed}, names | _weights(start))
    given = {"num_classes": len(classes), "resolution": resolution, "classes": classes, "seed": seed_of("denoiser", seed)}
    job = partial(fit.fit, config=config, **given)
    if codec:
        space = latents.scaling(codec[0], codec[1] / "train", config.sigma_data)
        job = partial(latents.fit_denoiser, codec_folder=codec[0], codec=space, config=config, **given)
    select = Feed(folders=(images / "select",), batch_size=config.batch_size, latent_std=std)
    return FitJob(out, recipe, job, fit.resume_step, feed, select)


def _weights(name: str | None) -> dict[str, str]:
    """The contents of a local weight file or folder are part of the recipe: another file under the same name is another run."""
    if name is None or name == "imagenet":
        return {}
    return {"weights": hashlib.sha256(weight_file(name).read_bytes()).hexdigest()[:32]}


def weight_file(name: str) -> Path:
    """The file of local weights (a folder stands for its model.safetensors). UserError where there is none."""
    path = Path(name) / MODEL if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise UserError(f"weights {name}: no such file; give a safetensors file, a model folder, or null to start from scratch")
    return path


def check_weights(config: cfg.Config) -> None:
    """Before anything runs: the weight files are there, and the shipped denoiser has not seen this run's pictures."""
    from adversa.diffuse import edm, external, painter

    if config.denoiser.external:
        external.places(config.denoiser.external)
    judge = cfg.judge_of(config).weights
    if config.generate.weak and config.mix.arms != ["real"]:
        painter.fingerprint(Path(config.generate.weak))
    for name in (config.classifier.weights, judge, config.denoiser.weights):
        if name not in (None, "imagenet", "phantom"):
            weight_file(name)
    seen = runs.read_json(edm.SHIPPED / "config.json") or {}
    if config.denoiser.weights == "phantom" and seen.get("pretraining", {}).get("phantom_seed") == config.data.phantom.seed:
        seed = config.data.phantom.seed
        raise UserError(f"data.phantom.seed {seed}: the shipped denoiser was trained on these very pictures; take another seed")


def check_models(config: cfg.Config, classes: list[str], synthetic: bool, codec: Path) -> None:
    """Before the first training: every model the run needs can be built. UserError now, and not after an hour of training.

    synthetic: whether the run paints, and so needs a judge and a denoiser. codec: the run's folder of the codec, there if it is a
    given one.
    """
    from adversa.classify import model
    from adversa.diffuse import edm, external

    model.build(config.classifier, len(classes), config.data.resolution)
    if not synthetic:
        return
    model.build(cfg.judge_of(config), len(classes), config.data.resolution)
    channels, side = latents.space(config, codec)
    if (path := config.denoiser.external) is not None:
        external.check(external.read(path, len(classes)), path, channels, side, config.generate.guidance)
        return
    denoiser = edm.build(config.denoiser, len(classes), side, channels)
    pixels = config.codec.kind == "pixels"
    if pixels or runs.is_finished(codec):  # before it is fitted, nothing can be said of weights that are to go on in its latents
        space = None if pixels else {"fingerprint": runs.fingerprint(codec)}
        edm.start_from(denoiser, config.denoiser, classes, side, channels, space)


# ---- scoring -----------------------------------------------------------------------------------------------------------


def score(engine: Engine, models: Sequence[tuple[str, int, Path]], examples: Path, data: Path, embed: bool, out: Path) -> None:
    """Logits (and embeddings) of every image of a role under each model (arm, seed, folder): tables.PREDICTIONS."""
    names = inputs(data=data) | {f"{arm}-{seed}": runs.fingerprint(folder) for arm, seed, folder in models}
    recipe = runs.Recipe("score", 1, {"role": examples.name, "embed": embed}, names)

    def body(progress: runs.Progress) -> Facts:
        return _score(engine, models, examples, embed, out, progress)

    run_step(out, recipe, body)


def _score(
    engine: Engine, models: Sequence[tuple[str, int, Path]], examples: Path, embed: bool, out: Path, progress: runs.Progress
) -> Facts:
    paths = tables.parts(examples)
    rows = [tables.count(p) * len(models) for p in paths]
    parts = [Part(i, n, {"path": str(p)}) for i, (p, n) in enumerate(zip(paths, rows, strict=True))]
    started = time.perf_counter()
    done = engine.map_batches(partial(make_score, tuple(models), embed), parts, out, progress, model=True)
    return cost(done, engine.tasks(model=True), time.perf_counter() - started) | {"rows": sum(rows)}


def make_score(models: Sequence[tuple[str, int, Path]], embed: bool) -> Work:
    from adversa.classify.score import make_scorer

    scorers = [(arm, seed, make_scorer(folder, embed=embed)) for arm, seed, folder in models]

    def work(part: Part, path: Path) -> int:
        examples = tables.read_part(place(part.payload["path"]), ["id", "label", "group", "image"])
        images = tables.decode_images(examples["image"])
        scored = []
        for arm, seed, scorer in scorers:
            logits, embedding = scorer(images)
            scored.append(
                pa.table(
                    {"id": examples["id"], "arm": [arm] * len(images), "seed": [seed] * len(images), "label": examples["label"],
                     "group": examples["group"], "logits": list(logits), "embedding": list(embedding)},
                    schema=tables.PREDICTIONS,
                )
            )  # fmt: skip
        tables.write_part(path, pa.concat_tables(scored))
        return sum(len(t) for t in scored)

    return work


# ---- mining ------------------------------------------------------------------------------------------------------------


MODES = "modes.json"  # beside the hard cases: what they have in common


def mine(scores: Path, data: Path, config: cfg.Mine, out: Path, earlier: Sequence[Path] = ()) -> None:
    """The hard cases of the mine role under the classifier that was scored, and the failure modes they belong to.

    Scored by several seeds, the first is under attack and all are the ensemble of scorer `bald`. earlier: the scores of the rounds
    before, in their order; scorer `forgetting` counts what was right in one round and wrong in the next.
    """
    from adversa.mine import explain
    from adversa.mine.hard import hard_cases

    def body(progress: runs.Progress) -> Facts:
        rows = under_attack(scores)
        found = hard_cases(
            rows["id"].to_pylist(), rows["label"].to_numpy(), matrix(rows["logits"]), matrix(rows["embedding"]), config,
            scorer=config.scorer, temperature=config.temperature, ratio_cap=config.ratio_cap, ensemble=ensemble(scores),
            history=np.stack([right(s, rows["id"].to_pylist()) for s in (*earlier, scores)]),
        )  # fmt: skip
        tables.write_part(out / tables.part_name(0), tables.to_table(found, tables.HARD_CASES))
        runs.write_json(out / MODES, explain.plain(modes(scores, data, config)))
        return {"rows": len(found), "scored": len(rows)}

    names = inputs(scores=scores, data=data, **{f"scores-{i}": s for i, s in enumerate(earlier)})
    run_step(out, runs.Recipe("mine", 3, config.model_dump(mode="json"), names), body)


def under_attack(scores: Path, seed: int = 0) -> pa.Table:
    """What the classifier of one seed says: rows of tables.PREDICTIONS, in the order of the role."""
    rows = tables.read(scores, schema=tables.PREDICTIONS)
    return rows.filter(pa.compute.equal(rows["seed"], seed))


def ensemble(scores: Path) -> np.ndarray:
    """Logits [M, N, K] of every seed that was scored."""
    seeds = sorted(tables.read(scores, ["seed"], tables.PREDICTIONS)["seed"].unique().to_pylist())
    return np.stack([matrix(under_attack(scores, s)["logits"]) for s in seeds or [0]])


def right(scores: Path, ids: Sequence[str]) -> np.ndarray:
    """bool [N]: which of the images the classifier under attack got right."""
    rows = under_attack(scores)
    known = dict(zip(rows["id"].to_pylist(), matrix(rows["logits"]).argmax(1) == rows["label"].to_numpy(), strict=True))
    return np.array([known[i] for i in ids], dtype=bool)


def modes(scores: Path, data: Path, config: cfg.Mine) -> Any:
    """mine.modes.FailureModes of what was scored."""
    from adversa.mine.modes import ModeSettings, failure_modes

    rows = under_attack(scores)
    examples = tables.read(data / "mine", ["id", "group", "attributes"], tables.EXAMPLES).to_pylist()
    known = {e["id"]: e for e in examples}
    ids = rows["id"].to_pylist()
    return failure_modes(
        ids, rows["label"].to_numpy(), matrix(rows["logits"]), matrix(rows["embedding"]), classes_of(data),
        [{k: v for k, v in dict(known[i]["attributes"] or ()).items() if k not in UNTOLD} for i in ids],
        [known[i]["group"] for i in ids], config.near_margin, ModeSettings(most=config.modes, alpha=config.alpha),
    )  # fmt: skip


# ---- evaluation --------------------------------------------------------------------------------------------------------


def evaluate(
    engine: Engine, run: runs.RunDir, models: Sequence[tuple[str, int, int, Path]], role: str, config: cfg.Evaluate, out: Path,
    opening: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Predictions of each model (arm, seed, round, folder) on a role, and its scorecard beside it.

    opening: called before a classifier sees the first image (for `test`, which is opened once, and that is written down; only the
    near-copy gate has read it before, and that can but remove a synthetic image).
    """
    names = inputs(data=run.data) | {f"{arm}-{seed}": runs.fingerprint(folder) for arm, seed, _, folder in models}
    recipe = runs.Recipe("evaluate", 1, {"role": role, "bootstrap": config.bootstrap}, names)
    classes = classes_of(run.data)

    def body(progress: runs.Progress) -> Facts:
        if opening is not None:
            opening()
        facts = _score(engine, [(a, s, f) for a, s, _, f in models], run.data / role, False, out, progress)
        rows = tables.read(out, schema=tables.PREDICTIONS)
        for arm, seed, number, folder in models:
            card = scorecard(rows, arm, seed, number, role, classes, config)
            runs.write_json(folder.parent / f"scorecard-{role}.json", asdict(card))
        return facts

    run_step(out, recipe, body)


def scorecard(rows: pa.Table, arm: str, seed: int, number: int, role: str, classes: list[str], config: cfg.Evaluate) -> Scorecard:
    from adversa.evaluate.bootstrap import intervals
    from adversa.evaluate.metrics import metrics

    p = predictions(rows, arm, seed)
    ranges = intervals(p.logits, p.labels, p.groups, classes, config.bootstrap, seed_of("bootstrap", role))
    name = "real" if arm == BEFORE else arm
    return Scorecard(name, seed, number, role, len(p.labels), metrics(p.logits, p.labels, classes), ranges)


class Predictions(NamedTuple):
    """Of one classifier, rows in order of their image ids: logits [N, K], labels [N], groups, ids."""

    logits: np.ndarray
    labels: np.ndarray
    groups: list[str]
    ids: list[str]


def predictions(rows: pa.Table, arm: str, seed: int) -> Predictions:
    pc = pa.compute
    chosen = rows.filter(pc.and_(pc.equal(rows["arm"], arm), pc.equal(rows["seed"], seed))).sort_by("id")
    return Predictions(matrix(chosen["logits"]), chosen["label"].to_numpy(), chosen["group"].to_pylist(), chosen["id"].to_pylist())


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A list column of equal lengths to float32 [N, D]."""
    rows = column.to_pylist()
    return np.asarray(rows, dtype=np.float32).reshape(len(rows), -1 if rows else 0)


def softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [N, K] to probabilities, in float64."""
    z = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True, initial=-np.inf))
    return z / z.sum(1, keepdims=True)
