"""A run's folder, to look at and to steer: its tables, images and models."""

from __future__ import annotations

import html
import itertools
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adversa.types import ROLES, UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from adversa.config import Config
    from adversa.run.folder import RunDir
    from adversa.storage.path import StoragePath


class Run:
    """A run in its folder, whoever works or has worked on it. Nothing is kept but its path.

    Example:
        run = adversa.Run("runs/mine")
        run.hard_cases(1).to_pandas().head()

    Args:
        path: The folder, or s3://BUCKET/FOLDER.

    Raises:
        UserError: The folder holds no run.
    """

    def __init__(self, path: str | StoragePath) -> None:
        from adversa.run.folder import RunDir
        from adversa.storage.path import storage_path

        self.folder: RunDir = RunDir(storage_path(path).absolute())
        if not self.folder.config.is_file():
            raise UserError(
                f"{path} is not a run (it has no config.yaml); give the folder of --run-dir"
            )

    @property
    def path(self) -> StoragePath:
        """The run's folder."""
        return self.folder.root

    @property
    def state(self) -> str:
        """running, paused, finished, stopped, failed, killed or not started."""
        from adversa.run.status import state_of

        return state_of(self.folder)[0]

    @property
    def config(self) -> Config:
        """The configuration it was made with."""
        from adversa.config import load

        return load(self.folder.config)

    @property
    def classes(self) -> list[str]:
        """The names of the labels, in their order."""
        from adversa.run.folder import classes_of

        return classes_of(self._done(self.folder.data))

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: metrics, intervals, comparisons and the verdict. UserError before it is
        finished.
        """
        from adversa.storage import files

        found = files.read_json(self.folder.summary)
        if found is None:
            raise UserError(f"{self.path} is not finished (it is {self.state}); resume it first")
        return found

    def metrics(self) -> pa.Table:
        """Every classifier's figures so far: round, arm, seed, role, metric, value, and the 95%
        interval low to high (null where none was computed). Those on `mine` are optimistic.
        """
        import pyarrow as pa

        from adversa.report.gather import scorecards

        names = ("round", "arm", "seed", "role")
        kinds = (pa.int64(), pa.string(), pa.int64(), pa.string())
        rows = []
        for card in scorecards(self.folder):
            for metric, value in card["metrics"].items():
                low, high = card["intervals"].get(metric, (None, None))
                rows.append(
                    {n: card[n] for n in names}
                    | {"metric": metric, "value": value, "low": low, "high": high}
                )
        fields = [*zip(names, kinds, strict=True), ("metric", pa.string())]
        fields += [(n, pa.float64()) for n in ("value", "low", "high")]
        return pa.Table.from_pylist(rows, schema=pa.schema(fields))

    def hard_cases(self, round: int = 1) -> pa.Table:
        """The hard cases of a round in the order they were taken, each with its file (`source`).

        Example:
            run.hard_cases(1).select(["source", "label", "predicted", "loss"]).to_pandas()

        Args:
            round: From 1.

        Returns:
            example, source, label, predicted, loss (nats), margin, reason, rank.

        Raises:
            UserError: The round has mined nothing yet.
        """
        from adversa.storage import tables

        cases = tables.read(self._done(self.folder.round(round, "hard")), schema=tables.HARD_CASES)
        return self._with_sources(cases.sort_by("rank"))

    def synthetic(self, arm: str = "guided", kept: bool = True) -> pa.Table:
        """The synthetic images of an arm, all rounds: what was asked for, the hard case it was made
        from (`example`, and its file `source`), whether it was kept, and the reason.

        Args:
            arm: unguided or guided.
            kept: Only those that the filter kept; False: all that have a verdict.

        Returns:
            A row an image, without its pixels: `image(request_id)` has those.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        from adversa.storage import tables

        found = []
        for number in self._rounds("verdicts"):
            asked = tables.read(self.folder.round(number, "requests"), schema=tables.REQUESTS)
            judged = tables.read(
                self.folder.round(number, "verdicts"),
                ["request_id", "keep", "reason"],
                tables.VERDICTS,
            )
            verdicts = {v["request_id"]: v for v in judged.to_pylist()}
            asked = asked.filter(pc.field("request_id").isin(list(verdicts)))
            own = [verdicts[i] for i in asked["request_id"].to_pylist()]
            asked = asked.append_column("keep", pa.array([v["keep"] for v in own], pa.bool_()))
            reasons = pa.array([v["reason"] for v in own], pa.string())
            found.append(asked.append_column("reason", reasons))
        if not found:
            raise UserError(f"{self.path} has filtered no images yet (it is {self.state})")
        rows = pa.concat_tables(found).filter(pc.field("arm") == arm)
        return self._with_sources(rows.filter(pc.field("keep")) if kept else rows)

    def image(self, id: str) -> np.ndarray:
        """uint8 [H, W, 3] of a real image (by its id) or a synthetic one (by its request id).
        UserError where there is none; images of `test` are not shown.
        """
        import pyarrow.compute as pc

        from adversa.storage import tables

        places = [(self.folder.data / role, "id") for role in ROLES if role != "test"]
        rounds = self._rounds("synthetic")
        places += [(self.folder.round(n, "synthetic"), "request_id") for n in rounds]
        for folder, key in places:
            for part in tables.parts(folder):
                rows = tables.read_part(part, [key, "image"], pc.field(key) == id)
                if len(rows):
                    found: np.ndarray = tables.decode_images(rows["image"])[0]
                    return found
        raise UserError(f"{self.path} has no image {id} outside of test; give an id of its tables")

    def classifier(self, arm: str = "real", seed: int = 0) -> TrainedClassifier:
        """An arm's classifier after the last round. UserError where the run has none."""
        from adversa.external.evaluate import models

        config = self.config
        found = {(a, s): folder for a, s, folder in models(config, self.folder)}
        if (arm, seed) not in found:
            known = ", ".join(f"{a} {s}" for a, s in found)
            raise UserError(f"{self.path} has no classifier {arm} {seed}; it has {known}")
        return TrainedClassifier(found[arm, seed], self.classes, config.data.resolution)

    def generator(self) -> Generator:
        """The run's denoiser, to generate images with. UserError where it is not trained."""
        from adversa.run import step_folder

        if not step_folder.is_finished(self.folder.denoiser):
            raise UserError(
                f"{self.path} has no finished denoiser; train it with: "
                f"adversa train --run-dir {self.path}"
            )
        return Generator(self)

    def report(self) -> StoragePath:
        """report.html, written again with report.md and summary.json; of a sweep its figures so
        far. UserError where the run is not finished.
        """
        from adversa.pipeline import summary
        from adversa.pipeline.stages import stages, step_folders
        from adversa.report import page
        from adversa.run.create import is_sweep
        from adversa.run.file_lock import lock
        from adversa.storage.files import writing

        config, run = self.config, self.folder
        if is_sweep(run):
            from adversa.sweep import report

            with writing(run.root), lock(run):
                return report.write(config, run)
        planned = stages(config, run)
        unfinished = (s for s in planned if not s.is_finished)
        if first := next((s.title for s in unfinished if s.name != "report"), None):
            fix = shlex.join(["adversa", "loop", str(run.config), "--run-dir", str(run.root)])
            raise UserError(f"{run.root} is not finished ({first} is next); finish it with: {fix}")
        with writing(run.root), lock(run):
            summary.write(config, run, step_folders(planned))
            return page.write(run.root)

    def pause(self) -> str:
        """Let the run rest after the parts in flight; says so. UserError where nobody works."""
        from adversa.run import requests

        return requests.pause(self.folder)

    def resume(self) -> str:
        """Let a paused run go on; says so. UserError where nobody works on it: `adversa.loop` does
        that.
        """
        from adversa.run import requests

        return requests.resume(self.folder, [])

    def stop(self) -> str:
        """End the run wherever it is worked on; everything finished is kept. Says so."""
        from adversa.run import requests

        return requests.stop(self.folder)

    def watch(self) -> str:
        """The state in which the run ends; until then each stage is printed as it begins. Ctrl-C
        leaves the run alone.
        """
        from adversa.api.start import tell_stages

        def is_over(seconds: float) -> bool:
            time.sleep(seconds)
            return self.state not in ("running", "paused")

        tell_stages(self.folder, is_over)
        return self.state

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self.state}"

    def _repr_html_(self) -> str:
        """The state, the verdict and balanced accuracy of the arms on `test`, escaped."""
        from adversa.storage import files

        found = files.read_json(self.folder.summary) or {}
        text = f"<b>{html.escape(str(self.path))}</b>: {html.escape(self.state)}"
        if sentence := found.get("verdict_sentence"):
            text += f"<br>{html.escape(str(sentence))}"
        rows = [
            (arm, roles.get("test", {}).get("balanced_accuracy"))
            for arm, roles in found.get("arms", {}).items()
        ]
        cells = "".join(
            f"<tr><td>{html.escape(str(arm))}</td><td>{value:.3f}</td></tr>"
            for arm, value in rows
            if isinstance(value, float)
        )
        heads = "<tr><th>arm</th><th>balanced accuracy, test</th></tr>"
        return f"<div>{text}{f'<table>{heads}{cells}</table>' if cells else ''}</div>"

    # ---- parts -----------------------------------------------------------------------------------

    def _done(self, folder: StoragePath) -> StoragePath:
        from adversa.run import step_folder

        if not step_folder.is_finished(folder):
            name = self.folder.name_of(folder)
            raise UserError(f"{self.path} has no finished {name} (it is {self.state})")
        return folder

    def _rounds(self, step: str) -> list[int]:
        from adversa.run import step_folder

        rounds = itertools.takewhile(
            lambda n: step_folder.is_finished(self.folder.round(n, step)), itertools.count(1)
        )
        return list(rounds)

    def _with_sources(self, rows: pa.Table) -> pa.Table:
        """With a column `source` beside `example`: the file of the example, null where unknown."""
        import pyarrow as pa

        from adversa.storage import tables

        mine = tables.read(self.folder.data / "mine", ["id", "source"], tables.EXAMPLES)
        names = dict(zip(mine["id"].to_pylist(), mine["source"].to_pylist(), strict=True))
        column = pa.array([names.get(i) for i in rows["example"].to_pylist()], pa.string())
        return rows.add_column(rows.schema.get_field_index("example") + 1, "source", column)


class TrainedClassifier:
    """A trained classifier. classes: the names of its columns, in their order."""

    def __init__(self, folder: StoragePath, classes: Sequence[str], resolution: int) -> None:
        from adversa.classify.score import make_scorer

        self.classes, self.resolution = list(classes), resolution
        self._score = make_scorer(folder)

    def predict_proba(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities of images.

        Example:
            run.classifier("guided").predict_proba(images).argmax(1)

        Args:
            images: uint8 [N, H, W, 3], square, of the run's resolution.

        Returns:
            float64 [N, K], in the order of `classes`.

        Raises:
            UserError: The images have another type or size.
        """
        import numpy as np

        from adversa.common.statistics import softmax

        size, given = (self.resolution, self.resolution, 3), np.asarray(images)
        if given.dtype != np.uint8 or given.ndim != 4 or given.shape[1:] != size:
            shown = f"{given.dtype} {list(given.shape)}"
            raise UserError(f"images are {shown}; give uint8 [N, {', '.join(map(str, size))}]")
        return softmax(self._score(given)[0]).astype(np.float64)


class Generator:
    """The denoiser of a run."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def generate(
        self,
        label: str,
        n: int,
        strategy: str = "sample",
        examples: Sequence[str] = (),
        seed: int = 0,
    ) -> np.ndarray:
        """Images of a class, the same as `adversa.generate` makes.

        Example:
            images = run.generator().generate("melanoma", 4, strategy="img2img", seed=1)

        Args:
            label: The class.
            n: How many.
            strategy: How they are made.
            examples: Ids of the role `mine` to start from in turn; none: the run's hard cases of
                this class.
            seed: Of the images.

        Returns:
            uint8 [n, H, W, 3]; fewer where some are not finite.

        Raises:
            UserError: Anything that the user can fix.
        """
        import pyarrow.compute as pc

        from adversa.api.start import engine_of
        from adversa.export.images import parse_labels
        from adversa.generation import job
        from adversa.storage import tables

        run, config = self.run.folder, self.run.config
        wanted = parse_labels(f"{label}={n}", job.classes_of(run.denoiser))
        with tempfile.TemporaryDirectory(prefix="adversa-") as temporary:
            asked = job.GenerationJob(
                run.denoiser,
                wanted,
                strategy,
                seed,
                config.generate,
                Path(temporary) / "out",
                "folder",
                run,
                tuple(examples),
            )
            job.check(asked)
            _, made = job.draw(asked, engine_of("local", config, asked.work))
            rows = tables.read(made, ["request_id", "image", "finite"], tables.SYNTHETIC)
        good = rows.filter(pc.field("finite"))
        if not len(good):
            raise UserError(f"none of the {n} images is finite; give another seed")
        return tables.decode_images(good["image"])
