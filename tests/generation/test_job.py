"""Images to order, on a denoiser alone and on a finished run."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from adversa import config as cfg
from adversa.diffuse import edm
from adversa.engine.local import LocalEngine
from adversa.generation import job
from adversa.generation.job import GenerationJob
from adversa.pipeline import generate
from adversa.run.folder import RunDir
from adversa.storage import tables
from adversa.types import UserError


@pytest.fixture
def alone(finished, tmp_path):
    """Of the run's denoiser, copied away from its run."""
    config, run = finished
    folder = tmp_path / "denoiser"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(run.denoiser / name, folder / name)
    return GenerationJob(
        folder, {0: 5, 2: 4}, "sample", 3, config.generate, tmp_path / "out", "folder"
    )


def of_run(finished, tmp_path, **changes):
    config, run = finished
    generate = config.generate.model_copy(update=changes.pop("generate", {}))
    return replace(
        GenerationJob(
            run.denoiser, {0: 3, 1: 3}, "img2img", 0, generate, tmp_path / "out", "folder", run
        ),
        **changes,
    )


def listed(out):
    with open(out / "metadata.csv") as f:
        return list(csv.DictReader(f))


def test_a_denoiser_alone_generates_what_its_job_names(alone):
    found = job.generate(alone, LocalEngine(1, 1))
    classes = job.classes_of(alone.denoiser)
    assert found.images == 9 and found.by_class == {classes[0]: 5, classes[2]: 4}
    rows = listed(alone.out)
    assert (
        Counter(r["class"] for r in rows) == {classes[0]: 5, classes[2]: 4}
        and len({r["seed"] for r in rows}) == 9
    )
    picture = np.asarray(Image.open(alone.out / rows[0]["file_name"]))
    assert picture.shape == (32, 32, 3) and picture.std() > 0
    assert job.finished(alone) and not tables.parts(
        alone.work.root / "synthetic"
    )  # the images lie in the export alone


def test_the_same_order_has_the_same_images_and_another_seed_others(alone, tmp_path):
    job.generate(alone, LocalEngine(1, 1))
    again, other = (
        replace(alone, out=tmp_path / "again"),
        replace(alone, out=tmp_path / "other", seed=4),
    )
    for o in (again, other):
        job.generate(o, LocalEngine(1, 1))
    files = [
        {r["file_name"]: (o.out / r["file_name"]).read_bytes() for r in listed(o.out)}
        for o in (alone, again, other)
    ]
    assert files[0] == files[1] and not set(files[0].values()) & set(files[2].values())


def test_a_cut_order_goes_on_where_it_was(alone):
    whole = replace(alone, out=alone.out.parent / "whole")
    job.generate(whole, LocalEngine(1, 1))

    class Cut(LocalEngine):
        def map_parts(self, make, parts, out, report, name):
            super().map_parts(make, parts[:1], out, report, name)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.generate(alone, Cut(1, 1))
    part = tables.parts(alone.work.root / "synthetic")[0]
    before = part.stat().st_mtime_ns
    assert not job.finished(alone)
    touched = []

    class Noting(LocalEngine):
        def map_parts(self, make, parts, out, report, name):
            touched.append((part.stat().st_mtime_ns, len(tables.parts(out))))
            return super().map_parts(make, parts, out, report, name)

    job.generate(alone, Noting(1, 1))
    assert touched == [(before, 1)]
    assert {r["file_name"] for r in listed(alone.out)} == {
        r["file_name"] for r in listed(whole.out)
    }


def test_another_order_does_not_go_into_the_same_folder(alone):
    job.generate(alone, LocalEngine(1, 1))
    with pytest.raises(UserError, match="holds another generation job.*labels.0: 5 -> 6"):
        job.finished(replace(alone, labels={0: 6, 2: 4}))


@pytest.mark.parametrize("strategy", ["img2img", "inpaint", "outpaint", "inout", "interpolate"])
def test_a_run_lends_its_pictures(finished, tmp_path, strategy):
    asked = of_run(finished, tmp_path, strategy=strategy)
    found = job.generate(asked, LocalEngine(1, 1))
    rows = listed(asked.out)
    assert found.images + found.not_generated == 6 and len(rows) == found.images >= 4
    labels = dict(
        zip(
            *tables.read(asked.run.data / "mine", ["id", "label"]).to_pydict().values(), strict=True
        )
    )
    for r in rows:
        assert labels[r["example"]] == int(r["label"]) and r["strategy"] == strategy
        assert (r["partner"] != "-") == (strategy == "interpolate") and r["partner"] != r["example"]


def test_classifier_guidance_takes_the_runs_classifier(finished, tmp_path):
    job.generate(of_run(finished, tmp_path, out=tmp_path / "plain"), LocalEngine(1, 1))
    pushed = of_run(
        finished,
        tmp_path,
        out=tmp_path / "pushed",
        generate={"classifier_guidance": 1.0, "classifier_guidance_every": 1},
    )
    job.generate(pushed, LocalEngine(1, 1))
    one, other = (
        {r["seed"]: (o / r["file_name"]).read_bytes() for r in listed(o)}
        for o in (tmp_path / "plain", pushed.out)
    )
    assert one.keys() == other.keys() and one != other  # the same noise, other pictures


def test_no_classifier_to_steer_by_is_refused(finished, tmp_path):
    _, run = finished
    moved = RunDir(shutil.copytree(run.root, tmp_path / "run"))
    shutil.rmtree(moved.root / "round-000")
    steered = of_run((finished[0], moved), tmp_path, generate={"classifier_guidance": 1.0})
    with pytest.raises(
        UserError, match="has no finished classifier to steer by; train it with: adversa train"
    ):
        job.check(steered)


def test_a_folder_with_other_things_is_refused_before_anything_is_generated(alone):
    alone.out.mkdir()
    (alone.out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and not an export"):
        job.check(alone)
    assert [p.name for p in alone.out.iterdir()] == ["mine.txt"]


def test_images_that_are_gone_are_not_called_done(alone):
    job.generate(alone, LocalEngine(1, 1))
    assert job.finished(alone)
    next(alone.out.glob("*/*.png")).unlink()
    with pytest.raises(UserError, match="images are gone from it"):
        job.finished(alone)


@pytest.mark.parametrize("key", ["classes", "resolution"])
def test_a_denoiser_of_other_pictures_is_refused(finished, tmp_path, key):
    _, run = finished
    moved = RunDir(shutil.copytree(run.root, tmp_path / "run"))
    meta = json.loads((moved.denoiser / "config.json").read_text())
    meta[key] = meta[key][::-1] if key == "classes" else 48
    (moved.denoiser / "config.json").write_text(json.dumps(meta))
    wanted = replace(of_run((finished[0], moved), tmp_path), denoiser=moved.denoiser)
    with pytest.raises(
        UserError,
        match="has the classes"
        if key == "classes"
        else "generates 48 x 48 pixels, the run's .* 32 x 32",
    ):
        job.check(wanted)
    with pytest.raises(UserError):
        generate.generate(
            LocalEngine(1, 1),
            run.round(1, "requests"),
            moved.data,
            moved.denoiser,
            None,
            wanted.config,
            tmp_path / "s",
        )


def test_what_a_denoiser_alone_cannot_do_is_refused(alone):
    for changed, text in (
        (replace(alone, strategy="img2img"), "--strategy img2img starts from real pictures"),
        (
            replace(alone, config=alone.config.model_copy(update={"classifier_guidance": 0.5})),
            "generate.classifier_guidance 0.5 needs a run",
        ),
        (replace(alone, form="zip"), "--format zip: there is no such format"),
    ):
        with pytest.raises(UserError, match=text):
            job.check(changed)
    with pytest.raises(UserError, match="holds no denoiser"):
        job.classes_of(alone.out)


def test_the_shipped_denoiser_generates_too(tmp_path):
    config = GenerationJob(edm.SHIPPED, {0: 2}, "sample", 0, _quick(), tmp_path / "out", "parquet")
    assert (
        job.generate(config, LocalEngine(1, 1)).images == 2
        and len(tables.parts(tmp_path / "out/data")) == 1
    )
    # Its card says how they were made: not `auto`, which comes to something else elsewhere.
    amp = LocalEngine(1, 1).hardware().amp
    assert f"| amp | {amp} |" in (tmp_path / "out/README.md").read_text()


def _quick():
    from adversa.config import Generate

    return Generate(steps=2, batch_size=4)


@pytest.mark.parametrize("cases", [2, 3, 5])
def test_every_two_cases_are_interpolated_before_any_two_are_again(tmp_path, cases):
    names = [f"c{i}" for i in range(cases)]
    wanted = GenerationJob(tmp_path, {0: 1}, "interpolate", 0, cfg.Generate(), tmp_path, "folder")
    every = cases * (cases - 1)
    asked = [job._request(wanted, "job", 0, i, names) for i in range(2 * every)]
    pairs = [(r.example, r.partner) for r in asked]
    assert len(set(pairs[:every])) == every and pairs[every:] == pairs[:every]
    assert all(example != partner for example, partner in pairs)
