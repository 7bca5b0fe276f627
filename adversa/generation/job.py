"""Images to order: so many of each class, painted without a loop, exported as a folder of pictures
or as Parquet.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from adversa import config as cfg
from adversa.engine.interface import Engine
from adversa.engine.step import Facts, inputs, run_step
from adversa.export import images
from adversa.pipeline import generate as pipeline_generate
from adversa.pipeline.folders import attacked_in
from adversa.pipeline.stage import Output, PlannedStage
from adversa.run import differences, step_folder
from adversa.run import folder as run_folder
from adversa.run.control import RunHandle
from adversa.run.folder import RunDir
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.path import storage_path
from adversa.storage.weights import CONFIG
from adversa.types import GenerationRequest, UserError, digest, seed_of

WORK = ".work"  # in the folder asked for: the steps, without their images once those are exported


@dataclass(frozen=True)
class Order:
    """labels: images wanted by class number. run: whose pictures the strategies start from, and
    whose classifier steers; None: the denoiser alone, which samples.
    """

    denoiser: Path
    labels: dict[int, int]
    strategy: str
    seed: int
    config: cfg.Generate
    out: Path
    form: str
    run: RunDir | None = None

    @property
    def work(self) -> RunDir:
        return RunDir((self.out / WORK).absolute())


def classes_of(denoiser: Path) -> list[str]:
    """UserError where the folder holds no denoiser."""
    meta = files.read_json(denoiser / CONFIG)
    if meta is None or "classes" not in meta:
        raise UserError(
            f"{denoiser} holds no denoiser ({CONFIG} is missing, or names no classes); "
            "give a denoiser's folder"
        )
    return [str(c) for c in meta["classes"]]


def check(order: Order) -> None:
    """UserError for what cannot be ordered; nothing is written."""
    if order.run is None and order.strategy != "sample":
        raise UserError(
            f"--strategy {order.strategy} starts from real pictures, a denoiser alone has "
            "none; give a run, or --strategy sample"
        )
    steered = [k for k in ("hardness", "likeness") if getattr(order.config, k)]
    if order.run is None and steered:
        key = steered[0]
        raise UserError(
            f"generate.{key} {getattr(order.config, key):g} needs a run's classifier and "
            "pictures; give a run, or set 0"
        )
    if order.form not in images.FORMATS:
        raise UserError(
            f"--format {order.form}: there is no such format; give {' or '.join(images.FORMATS)}"
        )
    with files.writing(order.out, "--out"):
        images.check_out(order.out)
    if order.run is not None:
        pipeline_generate.check_denoiser(order.denoiser, order.run.data)
    attacked(order)
    if order.config.weak:
        pipeline_generate.fingerprint(storage_path(order.config.weak))


def attacked(order: Order) -> Path | None:
    """The classifier that steers, where one does. UserError where the run has none yet."""
    if order.run is None or not pipeline_generate.steering_needs_classifier(order.config):
        return None
    found = attacked_in(cfg.load(order.run.config), order.run, 1)
    if not step_folder.is_finished(found):
        raise UserError(
            f"{order.run.root} has no finished classifier to steer by; train it with: "
            f"adversa train --run-dir {order.run.root}"
        )
    return found


def finished(order: Order) -> bool:
    """Whether this very order is exported. UserError where the folder holds another one."""
    done = files.read_json(order.work.root / "done.json")
    if done is None:
        return False
    if (asked := {k: v for k, v in done.items() if k != "images"}) != _identity(order):
        changed = "; ".join(differences.differences(asked, _identity(order)))
        raise UserError(
            f"--out {order.out} holds another order ({changed}); give an empty or new folder"
        )
    if images.images_in(order.out) < done["images"]:
        raise UserError(
            f"--out {order.out} held this order, but images are gone from it; give an "
            "empty or new folder"
        )
    return True


def _identity(order: Order) -> dict[str, object]:
    generate = order.config.model_dump(mode="json")
    asked = {
        "labels": {str(k): n for k, n in order.labels.items()},
        "strategy": order.strategy,
        "seed": order.seed,
    }
    models: dict[str, object] = {"denoiser": pipeline_generate.fingerprint(order.denoiser)}
    if (steers := attacked(order)) is not None:
        models["attacked"] = step_folder.fingerprint(steers)
    if order.config.weak:
        models["weak"] = pipeline_generate.fingerprint(storage_path(order.config.weak))
    if order.run is not None:
        models["data"] = step_folder.fingerprint(order.run.data)
    return {**asked, "format": order.form, "generate": generate, **models}


def paint(order: Order, engine: Engine) -> images.Exported:
    """Paint the order and export it. Called again after a cut it goes on where it was."""
    check(order)
    work, classes = order.work, classes_of(order.denoiser)
    requests, synthetic = work.root / "requests", work.root / "synthetic"
    plan(order, requests, engine.handle)
    data = order.run.data if order.run is not None else None
    pipeline_generate.generate(
        engine, requests, data, order.denoiser, attacked(order), order.config, synthetic, "--out"
    )
    own = order.run is not None and "external" not in (
        files.read_json(order.denoiser / CONFIG) or {}
    )
    trained_on = (
        f"the role `train` of the run {order.run.root.name}"
        if own and order.run is not None
        else "not recorded"
    )
    origin = images.Origin(
        str(order.denoiser), order.config.model_dump(mode="json"), order.seed, trained_on
    )
    found = images.export(synthetic, requests, classes, order.out, order.form, origin)
    if not found.images:
        raise UserError(
            f"none of the {sum(order.labels.values())} images could be painted; "
            f"{synthetic} says why (column fault)"
        )
    files.write_json(work.root / "done.json", _identity(order) | {"images": found.images})
    for part in tables.parts(synthetic):
        part.unlink()
    return found


def stages_of(run: RunDir) -> list[PlannedStage]:
    """The one stage of a job, in the folder that `paint` works in."""
    made = tuple(Output(run.root / name) for name in ("requests", "synthetic"))
    return [PlannedStage("order", 0, made)]


def plan(order: Order, out: Path, handle: RunHandle) -> None:
    """Requests, class by class; those that start from a picture take the pictures of their class in
    turn.
    """
    config = order.config
    names = inputs(data=order.run.data) if order.run is not None else {}
    recipe = Recipe("order", 1, _identity(order), names)

    def body(progress: Progress) -> Facts:
        examples = _examples(order) if order.strategy != "sample" or config.likeness else {}
        whose = digest(
            _identity(order) | {"labels": None, "format": None}, size=10
        )  # more images of a class: the same, and more
        asked = (
            _request(order, whose, label, i, examples.get(label, []))
            for label, n in order.labels.items()
            for i in range(n)
        )
        index = 0
        while chunk := list(
            itertools.islice(asked, config.part_size)
        ):  # one part is in memory at a time
            tables.write_part(
                out / tables.part_name(index), tables.to_table(chunk, tables.REQUESTS)
            )
            index += 1
        return {"rows": sum(order.labels.values())}

    run_step(out, recipe, body, handle, "--out")


# The id is the image's own; the noise is that of the same number in an order with other guidance:
# they can be compared.
def _request(
    order: Order, whose: str, label: int, number: int, examples: Sequence[str]
) -> GenerationRequest:
    config, strategy = order.config, order.strategy
    key, seed = (
        digest("order", whose, label, number, size=10),
        seed_of("order", order.seed, label, strategy, number),
    )
    start = {"sample": config.sigma_max, "vary": config.sigma_start, "blend": config.sigma_start}
    example = examples[number % len(examples)] if examples else None
    partner = None
    if strategy == "blend":  # each pair of two comes up before any does again
        n = len(examples)
        partner = examples[(number + 1 + number // n % (n - 1)) % n]
    return GenerationRequest(
        request_id=key,
        round=0,
        arm="order",
        strategy=strategy,
        label=label,
        example=example,
        sigma_start=start.get(strategy, config.fill_sigma),
        guidance=config.guidance,
        seed=seed,
        partner=partner,
        hardness=config.hardness,
        likeness=config.likeness,
    )


def _examples(order: Order) -> dict[int, list[str]]:
    """For each class asked for: the run's hard cases of the last round that has some, else all its
    pictures of the role mine.
    """
    assert order.run is not None
    rounds = (order.run.round(n, "hard") for n in itertools.count(1))
    hard = [folder for folder in itertools.takewhile(step_folder.is_finished, rounds)]
    cases = (
        tables.read(hard[-1], ["example", "label"], tables.HARD_CASES)
        if hard
        else tables.HARD_CASES.empty_table()
    )
    mine = tables.read(order.run.data / "mine", ["id", "label"], tables.EXAMPLES)
    classes, found = run_folder.classes_of(order.run.data), {}
    for label in order.labels:
        names = _of(cases, "example", label) or _of(mine, "id", label)
        least = 2 if order.strategy == "blend" else 1
        if len(names) < least:
            raise UserError(
                f"--strategy {order.strategy}: {order.run.root} has {len(names)} pictures "
                f"of {classes[label]} to start from, "
                f"{least} are needed; take --strategy sample"
            )
        found[label] = names
    return found


def _of(rows: pa.Table, column: str, label: int) -> list[str]:
    return rows.filter(pc.equal(rows["label"], label))[column].to_pylist()
