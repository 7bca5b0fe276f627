"""Generation jobs: so many of each class, generated without a loop, exported as a folder of
pictures or as Parquet.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from adversa import config as cfg
from adversa.config.base import AUTO
from adversa.engine.interface import Engine
from adversa.engine.step import Facts, inputs, run_step
from adversa.export import dataset_card, images
from adversa.pipeline import generate as pipeline_generate
from adversa.pipeline import precision
from adversa.pipeline.folders import attacked_in
from adversa.pipeline.stage import Output, PlannedStage
from adversa.run import differences, step_folder
from adversa.run import folder as run_folder
from adversa.run.control import RunHandle
from adversa.run.folder import RunDir
from adversa.run.step_folder import Progress, Recipe
from adversa.storage import files, tables
from adversa.storage.path import StoragePath, storage_path
from adversa.storage.weights import CONFIG
from adversa.types import STRATEGIES, GenerationRequest, UserError, digest, seed_of

WORK = ".work"  # in the folder asked for: the steps, without their images once those are exported


@dataclass(frozen=True)
class GenerationJob:
    """How many images of each class are to be generated, and how.

    Attributes:
        denoiser: The denoiser's folder.
        labels: Images wanted, by class number.
        strategy: One of types.STRATEGIES.
        seed: Of the images' seeds.
        config: The settings of generation.
        out: The folder that the images are exported to.
        form: The format of the export.
        run: Whose pictures the strategies start from, and whose classifier guides; None: the
            denoiser alone, which samples.
        examples: Ids of the role mine to start from in turn; none: each class's hard cases.
    """

    denoiser: StoragePath
    labels: dict[int, int]
    strategy: str
    seed: int
    config: cfg.Generate
    out: Path
    form: str
    run: RunDir | None = None
    examples: tuple[str, ...] = ()

    @property
    def work(self) -> RunDir:
        return RunDir((self.out / WORK).absolute())


def classes_of(denoiser: StoragePath) -> list[str]:
    """The names of a denoiser's classes. UserError where the folder holds none."""
    meta = files.read_json(denoiser / CONFIG)
    if meta is None or "classes" not in meta:
        raise UserError(
            f"{denoiser} holds no denoiser ({CONFIG} is missing, or names no classes); "
            "give a denoiser's folder"
        )
    return [str(c) for c in meta["classes"]]


def check(job: GenerationJob) -> None:
    """UserError where the job cannot be done; nothing is written."""
    if job.strategy not in STRATEGIES:
        raise UserError(
            f"--strategy {job.strategy}: there is no such strategy; give one of "
            f"{', '.join(STRATEGIES)}"
        )
    if job.run is None and job.strategy != "sample":
        raise UserError(
            f"--strategy {job.strategy} starts from real pictures, a denoiser alone has "
            "none; give a run, or --strategy sample"
        )
    steered = [k for k in ("classifier_guidance", "reference_guidance") if getattr(job.config, k)]
    if job.run is None and steered:
        key = steered[0]
        raise UserError(
            f"generate.{key} {getattr(job.config, key):g} needs a run's classifier and "
            "pictures; give a run, or set 0"
        )
    if job.examples and not _starts(job):
        raise UserError(f"--strategy {job.strategy} starts from no picture; leave examples out")
    if job.form not in images.FORMATS:
        raise UserError(
            f"--format {job.form}: there is no such format; give {' or '.join(images.FORMATS)}"
        )
    with files.writing(job.out, "--out"):
        images.check_out(job.out)
    if job.run is not None:
        pipeline_generate.check_denoiser(job.denoiser, job.run.data)
    target_of(job)
    if job.config.weak:
        pipeline_generate.fingerprint(storage_path(job.config.weak))


def target_of(job: GenerationJob) -> StoragePath | None:
    """The classifier that guides, None where none does. UserError where the run has none yet."""
    if job.run is None or not pipeline_generate.steering_needs_classifier(job.config):
        return None
    found = attacked_in(cfg.load(job.run.config), job.run, 1)
    if not step_folder.is_finished(found):
        raise UserError(
            f"{job.run.root} has no finished classifier to steer by; train it with: "
            f"adversa train --run-dir {job.run.root}"
        )
    return found


def finished(job: GenerationJob) -> bool:
    """Whether this job is exported. UserError where the folder holds another one, or images are
    gone from it.
    """
    done = files.read_json(job.work.root / "done.json")
    if done is None:
        return False
    if (requested := {k: v for k, v in done.items() if k != "images"}) != _identity(job):
        changed = "; ".join(differences.differences(requested, _identity(job)))
        raise UserError(
            f"--out {job.out} holds another generation job ({changed}); give an empty or new folder"
        )
    if images.images_in(job.out) < done["images"]:
        raise UserError(
            f"--out {job.out} held this generation job, but images are gone from it; give an "
            "empty or new folder"
        )
    return True


def _identity(job: GenerationJob) -> dict[str, object]:
    generate = job.config.model_dump(mode="json")
    requested = {
        "labels": {str(k): n for k, n in job.labels.items()},
        "strategy": job.strategy,
        "seed": job.seed,
    }
    models: dict[str, object] = {"denoiser": pipeline_generate.fingerprint(job.denoiser)}
    if (steers := target_of(job)) is not None:
        models["target"] = step_folder.fingerprint(steers)
    if job.config.weak:
        models["weak"] = pipeline_generate.fingerprint(storage_path(job.config.weak))
    if job.run is not None:
        models["data"] = step_folder.fingerprint(job.run.data)
    if job.examples:
        requested["examples"] = list(job.examples)
    return {**requested, "format": job.form, "generate": generate, **models}


def _starts(job: GenerationJob) -> bool:
    """Whether its images start from pictures, or are drawn towards them."""
    return job.strategy != "sample" or bool(job.config.reference_guidance)


def draw(job: GenerationJob, engine: Engine) -> tuple[StoragePath, StoragePath]:
    """The folders of the job's requests and of its images (tables.REQUESTS, tables.SYNTHETIC)."""
    requests, synthetic = job.work.root / "requests", job.work.root / "synthetic"
    plan(job, requests, engine.handle)
    data, config = job.run.data if job.run is not None else None, _settled(job, engine)
    pipeline_generate.generate(
        engine, requests, data, job.denoiser, target_of(job), config, synthetic, "--out"
    )
    return requests, synthetic


def _settled(job: GenerationJob, engine: Engine) -> cfg.Generate:
    """The settings that its images are made with, whatever `amp: auto` would come to later."""
    if job.config.amp != AUTO:
        return job.config
    return job.config.model_copy(update={"amp": precision.record(job.work, engine)})


def generate(job: GenerationJob, engine: Engine) -> images.Exported:
    """What was exported, after the images of a job are generated. A job that was cut off goes on
    where it was.
    """
    check(job)
    work, classes = job.work, classes_of(job.denoiser)
    requests, synthetic = draw(job, engine)
    own = job.run is not None and "external" not in (files.read_json(job.denoiser / CONFIG) or {})
    trained_on = (
        f"the role `train` of the run {job.run.root.name}"
        if own and job.run is not None
        else "not recorded"
    )
    origin = dataset_card.Origin(
        str(job.denoiser), _settled(job, engine).model_dump(mode="json"), job.seed, trained_on
    )
    found = images.export(synthetic, requests, classes, job.out, job.form, origin)
    if not found.images:
        raise UserError(
            f"none of the {sum(job.labels.values())} images could be generated; "
            f"{synthetic} says why (column fault)"
        )
    files.write_json(work.root / "done.json", _identity(job) | {"images": found.images})
    for part in tables.parts(synthetic):
        part.unlink()
    return found


def stages_of(run: RunDir) -> list[PlannedStage]:
    """The one stage of a job, in the folder that `generate` works in."""
    made = tuple(Output(run.root / name) for name in ("requests", "synthetic"))
    return [PlannedStage("order", 0, made)]


def plan(job: GenerationJob, out: StoragePath, handle: RunHandle) -> None:
    """Write the requests, class by class; those that start from a picture take the pictures of
    their class in turn.
    """
    config = job.config
    names = inputs(data=job.run.data) if job.run is not None else {}
    recipe = Recipe("order", 1, _identity(job), names)

    def body(progress: Progress) -> Facts:
        examples = _examples(job) if _starts(job) else {}
        whose = digest(
            _identity(job) | {"labels": None, "format": None}, size=10
        )  # more images of a class: the same, and more
        requested = (
            _request(job, whose, label, i, examples.get(label, []))
            for label, n in job.labels.items()
            for i in range(n)
        )
        return {"rows": tables.write_parts(out, requested, config.part_size, tables.REQUESTS)}

    run_step(out, recipe, body, handle, "--out")


# The id is the image's own; the noise is that of the same number in a job with other guidance:
# they can be compared.
def _request(
    job: GenerationJob, whose: str, label: int, number: int, examples: Sequence[str]
) -> GenerationRequest:
    config, strategy = job.config, job.strategy
    key, seed = (
        digest("order", whose, label, number, size=10),
        seed_of("order", job.seed, label, strategy, number),
    )
    start = {
        "sample": config.sigma_max,
        "img2img": config.sigma_start,
        "interpolate": config.sigma_start,
    }
    example = examples[number % len(examples)] if examples else None
    partner = None
    if strategy == "interpolate":  # each pair of two comes up before any does again
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
        classifier_guidance=config.classifier_guidance,
        reference_guidance=config.reference_guidance,
    )


def _examples(job: GenerationJob) -> dict[int, list[str]]:
    """The pictures that each class's images start from: the run's hard cases of the last round that
    has some, else all its pictures of the role mine.
    """
    assert job.run is not None
    rounds = (job.run.round(n, "hard") for n in itertools.count(1))
    hard = [folder for folder in itertools.takewhile(step_folder.is_finished, rounds)]
    cases = (
        tables.read(hard[-1], ["example", "label"], tables.HARD_CASES)
        if hard
        else tables.HARD_CASES.empty_table()
    )
    mine = tables.read(job.run.data / "mine", ["id", "label"], tables.EXAMPLES)
    classes, found = run_folder.classes_of(job.run.data), {}
    if strange := sorted(set(job.examples) - set(mine["id"].to_pylist())):
        raise UserError(f"{job.run.root} has no picture {strange[0]} of the role mine")
    for label in job.labels:
        names = list(job.examples) or _of(cases, "example", label) or _of(mine, "id", label)
        least = 2 if job.strategy == "interpolate" else 1
        if len(names) < least:
            raise UserError(
                f"--strategy {job.strategy}: {job.run.root} has {len(names)} pictures "
                f"of {classes[label]} to start from, "
                f"{least} are needed; take --strategy sample"
            )
        found[label] = names
    return found


def _of(rows: pa.Table, column: str, label: int) -> list[str]:
    found: list[str] = rows.filter(pc.equal(rows["label"], label))[column].to_pylist()
    return found
