"""The commands about single images, without a loop: to order, again, and how fast. `cli.py`
declares them.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adversa import api
from adversa.cli import view
from adversa.cli.console import say
from adversa.config import Config, load
from adversa.engine.interface import Engine
from adversa.run import environment
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.storage.path import StoragePath
from adversa.types import UserError

MakeEngine = Callable[[Config, RunDir], Engine]


def settings(run: RunDir | None, overrides: list[str]) -> Config:
    """The run's configuration, or the demo's defaults, under --set; of it `generate` and `cluster`
    are used.
    """
    return load(run.config if run is not None else None, overrides)


def source(
    run: StoragePath | None, denoiser: StoragePath | None
) -> tuple[RunDir | None, StoragePath]:
    """(the run, if one is given; the denoiser's folder). UserError for none, both, or a run whose
    denoiser is not trained.
    """
    if (run is None) == (denoiser is None):
        raise UserError("give a run's folder, or --denoiser FOLDER: one of the two")
    if denoiser is not None:
        return None, denoiser
    assert run is not None
    folder = api.Run(run).generator().run.folder
    return folder, folder.denoiser


def order(
    run: StoragePath | None,
    denoiser: StoragePath | None,
    labels: str,
    strategy: str | None,
    out: Path | None,
    form: str,
    seed: int,
    overrides: list[str],
    make_engine: MakeEngine,
    screen: Console,
) -> None:
    """`adversa generate --labels`: so many images of each class, into a folder."""
    from adversa.export import images
    from adversa.generation import job

    saved, folder = source(run, denoiser)
    config = settings(saved, overrides)
    classes = job.classes_of(folder)
    if out is None:
        raise UserError("--labels needs --out FOLDER: where the images go")
    wanted = job.GenerationJob(
        folder,
        images.parse_labels(labels, classes),
        strategy or "sample",
        seed,
        config.generate,
        out,
        form,
        saved,
    )
    watch = partial(view.LiveView, screen)
    found = api.fulfil(wanted, config, lambda: make_engine(config, wanted.work), watch)
    if found is None:
        say(screen, f"{out} holds this order already; nothing to do")
        return
    counts = ", ".join(f"{n} {name}" for name, n in found.by_class.items())
    left = [
        f"{n} {what}"
        for n, what in ((found.not_finite, "not finite"), (found.not_generated, "not generated"))
        if n
    ]
    text = f"{found.images} images in {out}: {counts}" + (
        f"; left out: {', '.join(left)}" if left else ""
    )
    say(screen, text)


def regenerate(run: StoragePath, request_id: str, out: Path | None, screen: Console) -> None:
    """`adversa regenerate`: one image of a run again."""
    from PIL import Image

    from adversa.generation import regenerate

    saved, _ = source(run, None)
    assert saved is not None
    with files.writing(out or saved.root, "--out"):
        if out is not None and out.is_dir():
            raise UserError(f"--out {out} is a folder; give the name of a PNG file")
    with tempfile.TemporaryDirectory() as temporary:
        found = regenerate.regenerate(load(saved.config), saved, request_id, Path(temporary))
    r = found.request
    values, largest = found.difference
    verdict = (
        "identical"
        if found.identical
        else (
            f"not identical: {values} of {found.image.size} values differ, by at most "
            f"{largest} of 255"
        )
    )
    where = f"{found.device}, {found.batch_size} rows a batch"
    say(
        screen,
        f"request {request_id}: round {r.round}, arm {r.arm}, strategy {r.strategy}, class "
        f"{r.label}, "
        f"sigma_start {r.sigma_start:g}, guidance {r.guidance:g}, seed {r.seed}\ngenerated "
        f"again on {where}: {verdict}",
    )
    if out is not None:
        with files.writing(out.parent, "--out"):
            out.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(found.image).save(out, format="PNG")


def bench(
    run: StoragePath | None,
    denoiser: StoragePath | None,
    images: int,
    rounds: int,
    samplers: str | None,
    record: Path | None,
    overrides: list[str],
    make_engine: MakeEngine,
    screen: Console,
) -> None:
    """`adversa bench generate`: rates, costs of guidance, share of the device's peak, scaling,
    memory.
    """
    import torch

    from adversa.diffuse import edm
    from adversa.generation import benchmark
    from adversa.pipeline import folders, generate

    saved, folder = source(run, denoiser) if run or denoiser else (None, edm.SHIPPED)
    config = settings(saved, overrides)
    counts = _counts(samplers)
    target = folders.attacked_in(config, saved, 1) if saved is not None else None
    torch.set_num_threads(config.cluster.sampler_threads)
    table = Table(box=None, pad_edge=False)
    for column in ("", "value", "unit"):
        table.add_column(column, justify="right" if column == "value" else "left")
    rows = []
    # In the run's folder, where there is one: all nodes of a cluster see it.
    beside = saved.root if saved is not None and isinstance(saved.root, Path) else None
    with (
        tempfile.TemporaryDirectory(prefix=".bench-", dir=beside) as temporary,
        screen.status("measuring") as status,
    ):
        at = RunDir(Path(temporary) / "run")

        def engine(n: int | None) -> Engine:
            cluster = config.cluster.model_copy(update={"samplers": n})
            return make_engine(config.model_copy(update={"cluster": cluster}), at)

        engines = {n: partial(engine, n) for n in counts}
        for row in benchmark.generate(
            folder, target, config.generate, engines, images, rounds, Path(temporary)
        ):
            rows.append(row)
            status.update(f"measured: {row.name}")
            digits = ".3g" if row.value < 1000 else ".0f"
            table.add_row(row.name, format(row.value, digits), row.unit)
    screen.print(table)
    if record is not None:
        reported = {
            "denoiser": generate.fingerprint(folder),
            "machine": environment.machine(),
            "generate": config.generate.model_dump(mode="json"),
        }
        with files.writing(record.parent, "--json"):
            files.write_json(record, reported | {"results": [asdict(r) for r in rows]})


def _counts(samplers: str | None) -> list[int | None]:
    """ "1,2,4" to numbers of samplers; None: one, and as many as there is room for (None)."""
    if samplers is None:
        return [1, None]
    words = [w.strip() for w in samplers.split(",")]
    if not all(re.fullmatch("[0-9]{1,6}", w) and int(w) > 0 for w in words):
        raise UserError(
            f"--samplers {samplers}: write numbers above 0 with commas between, for example 1,2,4"
        )
    return [*sorted({int(w) for w in words})]
