"""`adversa evaluate RUN --on` and `adversa predict`: what they print and write, what they refuse,
exit codes.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from adversa import config as cfg
from adversa.classify.score import make_scorer
from adversa.common.statistics import softmax
from adversa.data import phantom
from adversa.external import predict
from adversa.run import folder as run_folder
from adversa.run.folder import RunDir

LOCAL = ("--engine", "local")


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A folder of class folders, phantoms that the run has not seen."""
    folder, settings = tmp_path_factory.mktemp("tree") / "clinic B", cfg.Phantom(images=60, seed=11)
    for i, slot in enumerate(phantom.slots(settings)):
        (folder / slot.label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(phantom.picture(i, settings, 64)[0]).save(
            folder / slot.label / f"{i:02d}.png"
        )
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """The finished run in a folder of its own that can be written to."""
    found = RunDir(tmp_path / "run")
    found.root.mkdir()
    for path in finished[1].root.iterdir():
        if path.name not in ("external", ".lock"):
            (found.root / path.name).symlink_to(path)
    return found


def refused(result, *texts):
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, (
        result.output,
        result.exception,
    )
    assert all(t in result.stderr for t in texts), result.stderr


def test_a_run_is_scored_on_a_folder_once(adversa, run, tree):
    first = adversa("evaluate", run.root, "--on", tree, *LOCAL)
    assert first.exit_code == 0, (first.output, first.exception)
    for text in (
        "run on clinic-B: 60 images",
        "balanced accuracy",
        "external (clinic-B) balanced accuracy of guided",
        "note: ",
    ):
        assert text in first.output
    assert "one seed an arm" in first.output and (run.root / "external/clinic-B/report.md").exists()
    found = json.loads((run.root / "external/clinic-B/summary.json").read_text())
    assert found["verdict_sentence"] in first.output and found["images"]["scored"] == 60
    again = adversa(
        "evaluate", "--run-dir", run.root, "--on", tree
    )  # no engine is started: it would be Ray
    assert again.exit_code == 0 and first.output.endswith(again.output)
    row = next(line for line in again.output.splitlines() if line.startswith("balanced accuracy"))
    assert f"{found['arms']['guided']['balanced_accuracy']:.3f}" in row.split()[-2] and row.split()[
        -1
    ].startswith("(")


def test_what_evaluate_on_refuses(adversa, run, tree, tmp_path):
    on = ("--on", tree, *LOCAL)
    refused(adversa("evaluate", run.root), "is a run: go on with it by --run-dir", "--on SET")
    refused(adversa("evaluate", "--labels-map", "x.yaml"), "--labels-map goes with --on")
    refused(adversa("evaluate", *on), "scores one finished run; write adversa evaluate RUN --on")
    refused(adversa("evaluate", run.root, tmp_path, *on), "scores one finished run")
    refused(adversa("evaluate", tmp_path, *on), "is not a run (it has no config.yaml)")
    refused(
        adversa("evaluate", run.root, "--on", tmp_path / "none", *LOCAL),
        "no such file or folder; give a CSV",
    )
    refused(
        adversa("evaluate", run.root, *on, "--crop", "round"),
        "--crop round",
        "center, pad or squash",
    )
    refused(adversa("evaluate", run.root, *on, "--rounds", 2), "--rounds does not go with --on")
    refused(adversa("evaluate", run.root, *on, "--name", "../x"), "--name ../x: give letters")
    refused(
        adversa("evaluate", run.root, *on, "--set", "data.resolution=64"), "that is the run's own"
    )
    refused(
        adversa("evaluate", run.root, *on, "--labels-map", tmp_path / "no.yaml"), "no such file"
    )
    refused(adversa("evaluate", run.root, *on, "--engine", "slurm"), "use ray or local")
    other = shutil.copytree(tree, tmp_path / "other")
    (other / "nevus").rename(other / "naevi")
    refused(adversa("evaluate", run.root, "--on", other, *LOCAL), "naevi (", "`naevi: CLASS`")
    (tmp_path / "set.csv").write_text("file,diagnosis\na.png,nevus\n")
    refused(
        adversa("evaluate", run.root, "--on", tmp_path / "set.csv", *LOCAL),
        "has no column label",
        "set data.columns",
    )
    assert not (run.root / "external").exists()


def test_what_evaluate_on_refuses_of_a_set(adversa, run, tree, tmp_path):
    def on(path, *more):
        return adversa("evaluate", run.root, "--on", path, *more, *LOCAL)

    picture = next(tree.glob("*/*.png"))
    refused(
        on(picture),
        f"--on {picture} is a picture; give a CSV, a folder",
        f"`adversa predict RUN {picture}`",
    )
    (tmp_path / "set.csv").write_text("path;label\na.png;nevus\n")
    refused(
        on(tmp_path / "set.csv"), "looks separated by semicolons", "save it as comma-separated text"
    )
    (tmp_path / "map.yaml").write_text("")
    refused(on(tree, "--labels-map", tmp_path / "map.yaml"), "map.yaml is empty", "`labels:`")
    shutil.copytree(tree / "nevus", tmp_path / "one/nevus")
    refused(
        on(tmp_path / "one"), "--on ", "every picture has the label nevus", "two classes or more"
    )
    (tmp_path / "map.yaml").write_text(
        "labels: {nevus: null, melanoma: null, keratosis: null, vascular: null}"
    )
    refused(
        on(tree, "--labels-map", tmp_path / "map.yaml"),
        "only carcinoma is left to score",
        "change the --labels-map",
    )
    assert not (run.root / "external").exists()


def test_a_failed_evaluation_leaves_no_folder_unless_something_was_made(
    adversa, run, tree, tmp_path
):
    broken = shutil.copytree(tree, tmp_path / "broken")
    for path in broken.glob("*/*.png"):
        path.write_bytes(b"no picture")
    refused(
        adversa("evaluate", run.root, "--on", broken, *LOCAL),
        "not a picture",
        "leave such pictures out with --set data.on_error=skip",
    )
    assert not (run.root / "external").exists()
    kept = run.root / "external/broken/notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    assert (
        adversa("evaluate", run.root, "--on", broken, *LOCAL).exit_code == 2
        and kept.read_text() == "mine"
    )


def test_what_cannot_be_written_names_the_option(adversa, run, tree, tmp_path):
    (tmp_path / "file").write_text("")
    image = next(tree.glob("*/*.png"))
    refused(
        adversa("predict", run.root, image, "--out", tmp_path / "file/p.csv", *LOCAL),
        "a file is in the way; give another --out",
    )
    long = tmp_path / ("n" * 300) / "p.csv"
    refused(
        adversa("predict", run.root, image, "--out", long, *LOCAL),
        "the name is too long; give another --out, a shorter one",
    )


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_predictions_are_what_the_classifier_says(adversa, run, tree, tmp_path):
    out = tmp_path / "p.csv"
    files = sorted(str(p) for p in tree.glob("*/*.png"))
    result = adversa("predict", run.root, tree, files[0], "--out", out, *LOCAL)
    assert result.exit_code == 0 and "60 images" in result.stdout, (result.output, result.exception)
    assert (
        "arm guided, the arm the run is about: 1 classifier" in result.stderr
        and "arm" not in result.stdout
    )
    found = rows(out)
    classes = run_folder.classes_of(run.data)
    assert list(found[0]) == ["path", "predicted", *(f"p_{c}" for c in classes), "spread"]
    assert sorted(r["path"] for r in found) == files  # each once, though one was named twice
    from PIL import Image as Pillow

    pictures = np.stack(
        [
            np.asarray(Pillow.open(r["path"]).resize((32, 32), Pillow.Resampling.BICUBIC))
            for r in found
        ]
    )
    wanted = softmax(make_scorer(run.arm(1, "guided", 0) / "classifier")(pictures)[0])
    told = np.array([[float(r[f"p_{c}"]) for c in classes] for r in found])
    assert np.allclose(told, wanted, atol=1e-6) and np.allclose(told.sum(1), 1, atol=1e-6)
    assert [r["predicted"] for r in found] == [classes[k] for k in wanted.argmax(1)] and {
        r["spread"] for r in found
    } == {""}
    other = adversa(
        "predict",
        run.root,
        tree / "*" / "*.png",
        "--out",
        tmp_path / "real.csv",
        "--arm",
        "before",
        *LOCAL,
    )
    assert other.exit_code == 0 and "arm before: 1 classifier" in other.stderr
    assert [r["path"] for r in rows(tmp_path / "real.csv")] == files and not any(
        tmp_path.glob(".predict-*")
    )


def test_predictions_agree_with_the_evaluation_of_the_same_pictures(adversa, run, tree, tmp_path):
    assert adversa("evaluate", run.root, "--on", tree, "--crop", "pad", *LOCAL).exit_code == 0
    assert (
        adversa(
            "predict",
            run.root,
            tree,
            "--crop",
            "pad",
            "--arm",
            "replay",
            "--out",
            tmp_path / "p.csv",
            *LOCAL,
        ).exit_code
        == 0
    )
    found = json.loads((run.root / "external/clinic-B/summary.json").read_text())
    told = rows(tmp_path / "p.csv")
    right = Counter(
        r["path"].split("/")[-2] for r in told if r["predicted"] == r["path"].split("/")[-2]
    )
    count = Counter(r["path"].split("/")[-2] for r in told)
    assert found["arms"]["replay"]["balanced_accuracy"] == pytest.approx(
        np.mean([right[c] / count[c] for c in count])
    )


def test_the_mean_over_seeds_and_their_spread():
    each = np.array([[[0.6, 0.4], [0.1, 0.9]], [[0.2, 0.8], [0.3, 0.7]], [[0.1, 0.9], [0.2, 0.8]]])
    mean, spread = predict.summed_up(each)
    assert np.allclose(mean, [[0.3, 0.7], [0.2, 0.8]])
    assert np.allclose(spread, [np.std([0.4, 0.8, 0.9], ddof=1), np.std([0.9, 0.7, 0.8], ddof=1)])
    assert np.isnan(predict.summed_up(each[:1])[1]).all()


def test_what_predict_refuses(adversa, run, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad,name.png"
    bad.write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    taken = tmp_path / "taken.csv"
    taken.write_text("mine")
    good = next(tree.glob("*/*.png"))
    refused(
        adversa("predict", run.root, good, bad, *LOCAL),
        "bad,name.png: not a picture",
        "--on-error skip",
    )
    refused(
        adversa("predict", run.root, bad, "--on-error", "skip", *LOCAL),
        "none of the 1 files is a picture",
    )
    refused(
        adversa("predict", run.root, "nowhere.png", *LOCAL), "nowhere.png: no such file or folder"
    )
    refused(adversa("predict", run.root, "*.tiff", *LOCAL), "*.tiff: no file matches")
    refused(adversa("predict", run.root, tmp_path / "empty", *LOCAL), "has no picture")
    refused(adversa("predict", run.root, good, "--arm", "gided", *LOCAL), "--arm gided", "guided")
    refused(
        adversa("predict", run.root, good, "--out", taken, *LOCAL), "is there already", "--force"
    )
    refused(adversa("predict", run.root, good, "--out", tmp_path, *LOCAL), "is a folder")
    refused(adversa("predict", run.root, good, "--on-error", "ignore", *LOCAL), "fail or skip")
    refused(adversa("predict", tmp_path, good, *LOCAL), "is not a run")
    assert taken.read_text() == "mine" and not (tmp_path / "predictions.csv").exists()
    result = adversa(
        "predict", run.root, good, bad, "--on-error", "skip", "--out", taken, "--force", *LOCAL
    )
    assert result.exit_code == 0 and "left out: 1 files" in result.stderr and len(rows(taken)) == 1
