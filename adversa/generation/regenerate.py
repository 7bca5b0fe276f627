"""Paint one image of a run again, from its request alone, and say whether it is the same."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from adversa import config as cfg
from adversa.engine.tasks import Part
from adversa.pipeline import generate as pipeline_generate
from adversa.pipeline.folders import attacked_in
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files, tables
from adversa.storage.path import storage_path
from adversa.types import GenerationRequest, UserError


@dataclass(frozen=True)
class Regenerated:
    """image, before: uint8 [R, R, 3], painted now and then; device: where it was painted now;
    seconds: without loading.
    """

    request: GenerationRequest
    image: np.ndarray
    before: np.ndarray
    device: str
    batch_size: int
    seconds: float

    @property
    def identical(self) -> bool:
        return bool(np.array_equal(self.image, self.before))

    @property
    def difference(self) -> tuple[int, int]:
        """(values that differ, largest difference of a value in 0 ... 255)."""
        apart = np.abs(self.image.astype(np.int16) - self.before)
        return int((apart > 0).sum()), int(apart.max())


def regenerate(config: cfg.Config, run: RunDir, request_id: str, temporary: Path) -> Regenerated:
    """By the run's own denoiser, classifier and settings, in a batch of the run's size.

    temporary: a folder to paint into. UserError where the run has no such image, its denoiser's
    weights are not those that painted it, or the classifier or weak denoiser that steered was
    trained again since.
    """
    import torch

    number, part, row = find(config, run, request_id)
    request = pipeline_generate.read_requests(part)[row]
    stored = tables.read_part(run.round(number, "synthetic") / part.name).to_pylist()[row]
    if stored.get("fault"):  # runs of earlier versions have no such column
        raise UserError(
            f"request {request_id} was not painted ({stored['fault']}); there is no image "
            "to compare with"
        )
    attacked = (
        attacked_in(config, run, number)
        if pipeline_generate.steering_needs_classifier(config.generate)
        else None
    )
    _check_steering(run.round(number, "synthetic"), attacked, config.generate)
    torch.set_num_threads(config.cluster.sampler_threads)
    work = pipeline_generate.make_paint(run.denoiser, run.data / "mine", attacked, config.generate)
    alone = temporary / "requests.parquet"
    tables.write_part(alone, tables.read_part(part).slice(row, 1))
    started = time.perf_counter()
    work(Part(0, 1, {"path": str(alone)}), temporary / tables.part_name(0))
    seconds = time.perf_counter() - started
    painted = tables.read_part(temporary / tables.part_name(0)).to_pylist()[0]
    if (now := painted["denoiser"]) != stored["denoiser"]:
        raise UserError(
            f"request {request_id} was painted by the denoiser {stored['denoiser']}, "
            f"{run.denoiser} holds {now} now"
        )
    image = tables.decode_png(painted["image"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Regenerated(
        request,
        image,
        tables.decode_png(stored["image"]),
        device,
        config.generate.batch_size,
        seconds,
    )


def _check_steering(synthetic: Path, attacked: Path | None, generate: cfg.Generate) -> None:
    then = (files.read_json(synthetic / step_folder.RECIPE) or {}).get("inputs", {})
    now = {"attacked": step_folder.fingerprint(attacked)} if attacked else {}
    if generate.weak:
        now["weak"] = pipeline_generate.fingerprint(storage_path(generate.weak))
    for name, found in now.items():
        if name in then and then[name] != found:
            raise UserError(
                f"{synthetic} was painted by another `{name}` model ({then[name]}) than "
                f"there is now ({found})"
            )


def find(config: cfg.Config, run: RunDir, request_id: str) -> tuple[int, Path, int]:
    """(round, part of its requests, row in it). UserError where there is none, or it is not painted
    yet.
    """
    for number in range(1, config.rounds + 1):
        for part in tables.parts(run.round(number, "requests")):
            ids = tables.read_part(part, ["request_id"])["request_id"]
            row = pc.index(ids, request_id).as_py()
            if row < 0:
                continue
            if not (run.round(number, "synthetic") / part.name).exists():
                raise UserError(
                    f"request {request_id} is not painted yet; adversa generate goes on "
                    f"with {run.root}"
                )
            return number, part, row
    raise UserError(
        f"{run.root} has no request {request_id}; the ids are in round-*/requests, and in "
        "the names under the pictures"
    )
