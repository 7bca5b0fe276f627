"""The Python API: what the commands do, as functions and as views of a run's folder.

Nothing here exits, and no signal handler is installed off the main thread. torch, ray, pyarrow and
numpy are imported where they are needed.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adversa.api import start
from adversa.api.run import Run
from adversa.types import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from adversa.api.start import Watch
    from adversa.config import Config
    from adversa.engine.interface import Engine
    from adversa.export.images import Exported
    from adversa.generation.job import GenerationJob
    from adversa.storage.path import StoragePath

__all__ = ["Run", "UserError", "generate", "loop", "predict"]


def loop(
    config: Config | Mapping[str, Any] | str | StoragePath | None,
    run_dir: str | StoragePath,
    engine: str = "local",
    overrides: Mapping[str, Any] | None = None,
    wait: bool = True,
) -> Run:
    """The run, after `adversa loop` has worked on it; the same call again resumes it.

    Example:
        run = adversa.loop({"data": {"source": "folder", "path": "lesions"}}, "runs/mine")

    Args:
        config: A Config, its tree of plain values, a YAML file, or None: the demo.
        run_dir: The run's folder, or s3://BUCKET/FOLDER.
        engine: "local" (this process) or "ray" (this machine, or the cluster of RAY_ADDRESS).
        overrides: Values by dotted key, say {"mine.budget": 8}.
        wait: False: return as soon as another process (on a cluster the coordinator) works on it.

    Returns:
        The run; with `wait` it is finished.

    Raises:
        UserError: Anything that the user can fix, in one line.
        KeyboardInterrupt: It was stopped; what is finished is kept.
    """
    from adversa.storage.path import storage_path

    settings, root = configuration(config, overrides or {}), storage_path(run_dir)
    start.check_engine(engine, settings)
    if not wait:
        start.in_child(settings, root.absolute(), engine)
        return Run(root)
    try:
        start.work_on("loop", settings, root, engine, print, start.printed)
    except KeyboardInterrupt:
        print(f"stopped; everything finished is kept in {root}, and the same call resumes it")
        raise
    return Run(root)


def configuration(
    source: Config | Mapping[str, Any] | str | StoragePath | None,
    overrides: Mapping[str, Any],
) -> Config:
    """A checked configuration, from what `loop` takes. UserError on any fault."""
    from adversa.config import Config, check, packaged, read
    from adversa.config.reading import override
    from adversa.storage.path import storage_path

    if isinstance(source, Config):
        source = source.model_dump(mode="json")
    if isinstance(source, Mapping):
        tree, where = copy.deepcopy(dict(source)), "config"
    else:
        path = packaged("demo.yaml") if source is None else storage_path(source)
        tree, where = read(path)[0], str(path)
    for name, value in overrides.items():
        override(tree, name, value)
    return check(tree, where)


# ---- images on demand ----------------------------------------------------------------------------


def generate(
    source: str | StoragePath,
    labels: Mapping[str, int],
    out: str | Path,
    strategy: str = "sample",
    form: str = "folder",
    seed: int = 0,
    engine: str = "local",
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """The folder of generated images, so many of each class, with a dataset card.

    Example:
        adversa.generate("runs/mine", {"melanoma": 100}, "melanomas", strategy="img2img")

    Args:
        source: A run's folder, or a denoiser's.
        labels: Images by class.
        out: An empty or new folder; one that holds part of the same job is completed.
        strategy: How they are made; a denoiser alone can only "sample".
        form: "folder" (a PNG each) or "parquet".
        seed: Of the images.
        engine: "local" or "ray".
        overrides: Values by dotted key, of `generate` and `cluster`.

    Returns:
        `out`.

    Raises:
        UserError: Anything that the user can fix.
    """
    from adversa.export import images
    from adversa.generation import job
    from adversa.storage.path import storage_path

    root = storage_path(source)
    run = Run(root).folder if (root / "config.yaml").is_file() else None
    if run is not None:
        Run(root).generator()
    config = configuration(run.config if run is not None else None, overrides or {})
    start.check_engine(engine, config)
    folder = run.denoiser if run is not None else root
    text = ",".join(f"{name}={n}" for name, n in labels.items())
    wanted = images.parse_labels(text, job.classes_of(folder))
    order = job.GenerationJob(folder, wanted, strategy, seed, config.generate, Path(out), form, run)
    fulfil(order, config, lambda: start.engine_of(engine, config, order.work), _unwatched)
    return order.out


def _unwatched(config: Config, run: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def fulfil(
    order: GenerationJob, config: Config, engine: Callable[[], Engine], watch: Watch
) -> Exported | None:
    """What was generated and exported; None where this very order is exported already. engine:
    makes one, once there is work to do; watch: what follows the work.
    """
    from adversa.generation import job
    from adversa.run import file_lock, status
    from adversa.storage import files

    job.check(order)
    if job.finished(order):
        return None
    with files.writing(order.out, "--out"):
        order.work.root.mkdir(parents=True, exist_ok=True)
    with file_lock.lock(order.work, "--out"):
        status.set_status(order.work, "running", "order", command="order")
        try:
            with watch(config, order.work), contextlib.closing(engine()) as on:
                found = job.generate(order, on)
        except KeyboardInterrupt:
            status.set_status(order.work, "stopped")
            raise
        status.set_status(order.work, "finished")
    return found


# ---- predictions ---------------------------------------------------------------------------------


def predict(
    source: str | StoragePath,
    images: Sequence[str],
    arm: str | None = None,
    crop: str | None = None,
    on_error: str = "fail",
    engine: str = "local",
) -> pa.Table:
    """Class probabilities of pictures: path, predicted, p_CLASS of each class, and spread.

    Example:
        adversa.predict("runs/mine", ["clinic/*.jpg"]).to_pandas()

    Args:
        source: A run's folder, whose classifiers of all seeds are averaged, or one classifier's.
        images: Files, folders and globs.
        arm: Whose classifiers; None: those of the arm that the run is about.
        crop: center, pad or squash; None: as the run (a classifier alone: center).
        on_error: "fail", or "skip" what cannot be read.
        engine: "local" or "ray".

    Returns:
        A row an image. spread: standard deviation over seeds of the predicted class's probability,
        NaN with one seed.

    Raises:
        UserError: Anything that the user can fix.
    """
    from adversa.config import load
    from adversa.external import predict as external
    from adversa.run.folder import RunDir
    from adversa.storage.path import storage_path

    root = storage_path(source)
    external.check_options(crop, on_error)
    if (root / "config.yaml").is_file() or not (root / "config.json").is_file():
        run = Run(root)
        config, folder = run.config, run.folder
        models, classes = external.models_of(external.arm_of(arm, config, folder), config, folder)
        data = config.data
    else:
        config, folder, models = load(None), RunDir(root), [root]
        classes, resolution = external.described(root)
        data = config.data.model_copy(update={"resolution": resolution, "crop": "center"})
    data = data.model_copy(update={"crop": crop or data.crop})
    paths = external.listed(images)
    with (
        tempfile.TemporaryDirectory(prefix="adversa-") as parts,
        contextlib.closing(start.engine_of(engine, config, folder)) as on,
    ):
        found = external.predict(on, models, data, paths, Path(parts), on_error, lambda _: None)
    return external.as_table(found, classes)
