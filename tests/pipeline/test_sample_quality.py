"""`evaluate denoiser`: what is drawn, what it is compared with, that it resumes, and where its
result is shown.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from adversa.config import Config
from adversa.engine.local import LocalEngine
from adversa.evaluate.quality import kid, prdc, prdc_by_class
from adversa.pipeline import loop, sample_quality
from adversa.pipeline.folders import quality_folders
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.storage import predictions, tables
from adversa.types import UserError, seed_of

SETTINGS = {"images": 60, "neighbours": 3, "subsets": 5, "subset_size": 20}


def settings(tiny, **changes) -> Config:
    return tiny(
        classifier={"steps": 6, "evaluations": 1},
        denoiser={"steps": 4},
        quality={**SETTINGS, **changes},
    )


def judge(config, root, engine=None):
    run = loop.open_run(config, root)
    loop.run(config, run, engine or LocalEngine(1, 1), lambda root: root, "quality")
    return run


@pytest.fixture(scope="module")
def judged(tiny, tmp_path_factory):
    """(config, run) from nothing. Read only."""
    config = settings(tiny)
    return config, judge(config, tmp_path_factory.mktemp("quality") / "run")


@pytest.fixture
def copied(judged, tmp_path):
    config, run = judged
    shutil.copytree(run.root, tmp_path / "run")
    return config, run_folder.RunDir(tmp_path / "run")


def result_of(run):
    return json.loads((run.root / "quality.json").read_text())


def rows_of(config, run):
    return tables.read(quality_folders(config, run).features, schema=sample_quality.FEATURES)


def ids(run, *roles):
    return {
        i
        for r in roles
        for i in tables.read(run.data / r, ["id"], tables.EXAMPLES)["id"].to_pylist()
    }


def test_only_what_it_needs_is_done(judged):
    config, run = judged
    assert not run.judge.exists() and not run.test.exists() and not run.round(1).exists()
    assert step_folder.is_finished(run.denoiser) and step_folder.is_finished(
        run.arm(0, "real", 0) / "classifier"
    )


def test_samples_have_the_classes_of_the_held_out_images(judged):
    config, run = judged
    rows = tables.read(quality_folders(config, run).requests, schema=tables.REQUESTS)
    counts = np.bincount(rows["label"].to_numpy(), minlength=5)
    real = sample_quality.held_out(run.data)
    assert counts.sum() == 60 and (np.abs(counts - 60 * real / real.sum()) < 1).all()
    assert set(rows["guidance"].to_pylist()) == {1.0} and set(rows["strategy"].to_pylist()) == {
        "sample"
    }


def test_noise_is_that_of_class_and_number_alone(judged, tiny, tmp_path):
    """So two denoisers are compared on the same draws, and more images continue fewer."""
    config, run = judged
    sample_quality.plan(
        run.data,
        config.quality.model_copy(update={"images": 90}),
        config.generate,
        tmp_path / "more",
    )
    few = tables.read(quality_folders(config, run).requests, schema=tables.REQUESTS)
    more = tables.read(tmp_path / "more", schema=tables.REQUESTS)
    seeds = dict(zip(more["request_id"].to_pylist(), more["seed"].to_pylist(), strict=True))
    assert all(
        seeds[i] == s
        for i, s in zip(few["request_id"].to_pylist(), few["seed"].to_pylist(), strict=True)
    )
    assert len(set(seeds.values())) == 90


def test_test_is_not_looked_at_and_every_held_out_image_is(judged):
    config, run = judged
    found = rows_of(config, run).to_pylist()
    assert {r["id"] for r in found if r["kind"] == "real"} == ids(run, "mine", "select")
    floor = [r["id"] for r in found if r["kind"] == "train"]
    assert set(floor) <= ids(run, "train") and len(floor) == len(set(floor)) == 60
    count = {
        k: np.bincount([r["label"] for r in found if r["kind"] == k], minlength=5).tolist()
        for k in ("train", "sample")
    }
    assert count["train"] == count["sample"]


def test_the_figures_are_those_of_the_features(judged):
    config, run = judged
    rows, result = rows_of(config, run), result_of(run)
    kinds, values, labels = (
        np.array(rows["kind"].to_pylist()),
        predictions.matrix(rows["feature"]),
        rows["label"].to_numpy(),
    )
    real = values[kinds == "real"]
    for name, kind in (("samples", "sample"), ("train", "train")):
        fake, found = values[kinds == kind], result[name]
        assert (found["kid"], found["kid_std"]) == pytest.approx(
            kid(fake, real, 5, 20, seed_of("kid"))
        )
        assert {
            m: found[m] for m in ("precision", "recall", "density", "coverage")
        } == pytest.approx(prdc(real, fake, 3))
        by_class = prdc_by_class(
            real,
            labels[kinds == "real"],
            fake,
            labels[kinds == kind],
            3,
            run_folder.classes_of(run.data),
        )
        assert found["classes"] == by_class
    assert any(
        row["precision"] is None for row in result["samples"]["classes"].values()
    )  # vascular: too few for 3 neighbours


def test_what_a_reader_must_know_is_in_the_result(judged):
    config, run = judged
    result = result_of(run)
    assert result["denoiser"] == step_folder.fingerprint(run.denoiser) and result[
        "split_hash"
    ] == run_folder.split_hash(run.data)
    assert result["images"] == {"real": len(ids(run, "mine", "select")), "train": 60, "sample": 60}
    assert (
        result["not_finite"] == 0
        and result["features"] == "the run's own classifier"
        and result["width"] == 64
    )
    assert result["denoiser_metrics"] == step_folder.manifest(run.denoiser)["metrics"]
    grid = tables.decode_png((run.root / result["grid"]).read_bytes())
    assert grid.shape == (5 * 32, 8 * 32, 3)


def test_the_validation_loss_is_the_last_of_the_training(tmp_path):
    assert sample_quality.validation_loss(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "validation_loss": 3}\n{"step": 2, "validation_loss": 2}\n{"step": 3}\n'
    )
    assert sample_quality.validation_loss(tmp_path) == 2


def test_train_is_nearer_to_the_held_out_images_than_samples_of_an_untrained_denoiser(judged):
    result = result_of(judged[1])
    assert result["train"]["kid"] < result["samples"]["kid"]


def test_a_cut_off_evaluation_does_what_is_missing_and_ends_the_same(copied):
    config, run = copied
    at, before = quality_folders(config, run), result_of(run)
    for folder in (at.samples, at.features, at.result):
        (folder / step_folder.MANIFEST).unlink()
    gone = tables.parts(at.samples)[1]
    kept = {
        p: p.stat().st_mtime_ns
        for p in [*tables.parts(at.samples), *tables.parts(at.features)]
        if p != gone
    }
    gone.unlink()
    (run.root / "quality.json").unlink()
    judge(config, run.root)
    assert result_of(run) == before and gone.exists()
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_other_settings_need_no_other_run_and_share_what_they_can(copied, tiny):
    config, run = copied
    other = settings(tiny, neighbours=4)
    first, second = quality_folders(config, run), quality_folders(other, run)
    assert (first.samples, first.features) == (
        second.samples,
        second.features,
    ) and first.result != second.result
    assert quality_folders(settings(tiny, images=61), run).samples != first.samples
    assert (
        quality_folders(settings(tiny, features="resnet18", weights="imagenet"), run).samples
        == first.samples
    )
    judge(other, run.root)
    assert result_of(run)["neighbours"] == 4
    assert (
        sample_quality.publish(config, run)["neighbours"] == 3 and result_of(run)["neighbours"] == 3
    )


def test_the_classifiers_pretrained_weights_are_the_default_features(copied, tiny, tmp_path):
    """And then no classifier is trained for it; a folder of a classifier may be named as well."""
    import timm
    from safetensors.torch import save_file

    from adversa.pipeline.folders import needs_classifier

    config, run = copied
    args = config.classifier.model_args
    save_file(
        timm.create_model("resnet10t", num_classes=0, **args).state_dict(),
        tmp_path / "w.safetensors",
    )
    given = config.model_copy(
        update={
            "classifier": config.classifier.model_copy(
                update={"weights": str(tmp_path / "w.safetensors")}
            )
        }
    )
    assert needs_classifier(config) and not needs_classifier(given)
    space = sample_quality.space(given, run)
    assert space.folder is None and space.config == given.classifier
    assert sample_quality.source(space) != sample_quality.source(sample_quality.space(config, run))
    folder = run.arm(0, "real", 0) / "classifier"
    named = settings(tiny, features=str(folder))
    judge(named, run.root)
    assert result_of(run)["features"] == str(folder)
    assert result_of(run)["samples"]["kid"] == pytest.approx(
        sample_quality.publish(config, run)["samples"]["kid"]
    )


def test_samples_that_are_not_finite_count(copied, relist):
    config, run = copied
    at = quality_folders(config, run)
    path = tables.parts(at.samples)[0]
    table = tables.read(at.samples, schema=tables.SYNTHETIC).slice(0, 8)
    tables.write_part(
        path,
        table.set_column(
            table.schema.get_field_index("finite"), "finite", [[False] * 3 + [True] * 5]
        ),
    )
    relist(at.samples)
    shutil.rmtree(at.features)
    shutil.rmtree(at.result)
    judge(config, run.root)
    assert result_of(run)["not_finite"] == 3 and result_of(run)["images"]["sample"] == 60


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        ({"features": "resnet18"}, "needs quality.weights"),
        ({"features": "resnet18", "weights": "/no/such.safetensors"}, "no such file"),
        ({"features": "/no/such/folder"}, "no such folder"),
        ({"features": "EMPTY"}, "holds no model"),
        (
            {"features": "DENOISER"},
            "holds a model of kind 'edm-unet2d'; give the folder of a classifier",
        ),
        ({"features": "resnet99", "weights": "OTHER"}, "'resnet99' is no timm model"),
        (
            {"features": "resnet10t.foo", "weights": "OTHER"},
            r"quality.features resnet10t.foo: Invalid pretrained tag.*c3_in1k",
        ),
        (
            {"features": "resnet18", "weights": "OTHER"},
            "quality.features cannot be had.*does not fit resnet18",
        ),
    ],
)
def test_a_feature_space_that_is_not_there_stops_the_run_first(tiny, tmp_path, quality, message):
    from safetensors.torch import save_file

    from adversa.diffuse import edm

    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    places = {
        "EMPTY": str(tmp_path),
        "DENOISER": str(edm.SHIPPED),
        "OTHER": str(tmp_path / "other.safetensors"),
    }
    config = settings(tiny, **{k: places.get(v, v) for k, v in quality.items()})
    run = loop.open_run(config, tmp_path / "run")
    with pytest.raises(UserError, match=message):
        loop.run(config, run, None, None, "quality")
    assert not run.data.exists()


def test_a_feature_space_that_is_there_passes(judged, tiny, timm_weights):
    folder = judged[1].arm(0, "real", 0) / "classifier"
    for quality in (
        {"features": str(folder)},
        {"features": "tf_efficientnet_lite0", "weights": str(timm_weights)},
        {},
    ):
        sample_quality.check(settings(tiny, **quality))


def test_weights_without_a_model_are_refused(tiny):
    with pytest.raises(UserError, match="quality.*name a timm model"):
        settings(tiny, weights="imagenet")


def test_the_command_prints_the_table_and_again_without_work(copied):
    from typer.testing import CliRunner

    from adversa.cli.app import app

    config, run = copied
    words = ["evaluate", "denoiser", "--run-dir", str(run.root), "--engine", "local"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert (
        "KID x 1000" in done.output and "real (train)" in done.output and "melanoma" in done.output
    )
    assert "guidance 1" in done.output
    refused = CliRunner().invoke(
        app, [*words[:2], "--run-dir", str(run.root / "new"), "--set", "mix.arms=[real]"]
    )
    assert refused.exit_code == 2 and "generates nothing" in refused.output
    assert CliRunner().invoke(app, ["evaluate", "denoiser", "a.yaml", "b.yaml"]).exit_code == 2


def test_the_report_shows_it_where_it_is(finished, judged, tmp_path):
    from adversa.report import page

    _, done = finished
    shutil.copytree(done.root, tmp_path / "run")
    title = "How good the denoiser"
    assert title not in page.write(tmp_path / "run").read_text()
    _, run = judged
    shutil.copy(run.root / "quality.json", tmp_path / "run")
    shutil.copytree(run.root / "quality", tmp_path / "run" / "quality")
    html = page.write(tmp_path / "run").read_text()
    assert (
        title in html
        and f"{1000 * result_of(run)['samples']['kid']:.2f}".replace("-", "\u2212") in html
    )
    assert (
        "Samples of the denoiser, a row for each class" in html and html.count("data:image/png") > 1
    )


@pytest.mark.ray
def test_ray_finds_what_this_process_finds(copied, ray_engine):
    config, run = copied
    before = result_of(run)
    shutil.rmtree(run.root / "quality")
    judge(config, run.root, ray_engine)
    after = result_of(run)
    assert after["images"] == before["images"] and after["denoiser"] == before["denoiser"]
    assert after["samples"]["kid"] == pytest.approx(before["samples"]["kid"], rel=0.02)
    assert after["train"] == before["train"]
