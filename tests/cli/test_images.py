"""The commands about single images: what they print, what they refuse, exit codes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from adversa.diffuse.edm import SHIPPED
from adversa.storage import tables


def refused(result, text):
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and text in result.stderr, (
        result.output,
        result.exception,
    )


def test_a_job_is_generated_once(adversa, finished, tmp_path):
    _, run = finished
    args = (
        "generate",
        run.root,
        "--labels",
        "nevus=3,melanoma=2",
        "--out",
        tmp_path / "out",
        "--engine",
        "local",
    )
    first = adversa(*args)
    assert first.exit_code == 0 and "5 images in" in first.output and "3 nevus" in first.output, (
        first.output,
        first.exception,
    )
    assert (
        len(list((tmp_path / "out").glob("*/*.png"))) == 5 and (tmp_path / "out/README.md").exists()
    )
    again = adversa(*args)
    assert again.exit_code == 0 and "holds this order already" in again.output
    refused(
        adversa("generate", run.root, "--out", tmp_path / "more"),
        "is a run: go on with it by --run-dir",
    )
    refused(adversa(*args, "--run-dir", run.root), "give one run")
    refused(adversa(*args, "--seed", 1), "holds another generation job (seed: 0 -> 1")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--labels", "nevus=1"), "give a run's folder, or --denoiser FOLDER"),
        (("--labels", "nevus=1", "--denoiser", SHIPPED), "--labels needs --out FOLDER"),
        (("--labels", "nevos=1", "--denoiser", SHIPPED, "--out", "x"), "did you mean nevus?"),
        (
            ("--labels", "nevus=1", "--denoiser", SHIPPED, "--out", "x", "--strategy", "generate"),
            "there is no such strategy",
        ),
        (
            ("--labels", "nevus=1", "--denoiser", SHIPPED, "--out", "x", "--strategy", "img2img"),
            "starts from real pictures",
        ),
        (
            ("--labels", "nevus=1", "--denoiser", SHIPPED, "--out", "x", "--format", "zip"),
            "--format zip",
        ),
        (
            ("--labels", "nevus=1", "--denoiser", "nowhere", "--out", "x"),
            "nowhere holds no denoiser",
        ),
        (
            ("--labels", "nevus=1", "--denoiser", SHIPPED, "--out", "x", "--engine", "slurm"),
            "use ray or local",
        ),
        (("--out", "x"), "--out goes with --labels"),
        (
            (
                "--labels",
                "nevus=1",
                "--denoiser",
                SHIPPED,
                "--out",
                "x",
                "--set",
                "generate.stesp=3",
            ),
            "generate.steps",
        ),
    ],
)
def test_what_cannot_be_ordered_is_one_line(adversa, tmp_path, monkeypatch, args, text):
    monkeypatch.chdir(tmp_path)
    refused(adversa("generate", *args), text)
    assert not (tmp_path / "x").exists()


def test_an_image_again(adversa, finished, tmp_path):
    _, run = finished
    rows = tables.read(run.round(1, "synthetic"), ["request_id", "image"]).to_pylist()
    result = adversa("regenerate", run.root, rows[0]["request_id"], "--out", tmp_path / "again.png")
    assert result.exit_code == 0 and "cpu, 8 rows a batch: identical" in result.output, (
        result.output,
        result.exception,
    )
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "again.png")), tables.decode_png(rows[0]["image"])
    )
    refused(adversa("regenerate", run.root, "none"), "has no request none")
    refused(
        adversa("regenerate", run.root, rows[0]["request_id"], "--out", tmp_path),
        "is a folder; give the name of a PNG",
    )
    assert (
        adversa(
            "regenerate", run.root, rows[0]["request_id"], "--out", tmp_path / "plain"
        ).exit_code
        == 0
    )
    refused(adversa("regenerate", tmp_path, "none"), "is not a run")


def test_the_bench_measures_and_records(adversa, finished, tmp_path):
    _, run = finished
    result = adversa(
        "bench",
        "generate",
        run.root,
        "--images",
        8,
        "--rounds",
        1,
        "--samplers",
        "1",
        "--engine",
        "local",
        "--json",
        tmp_path / "record.json",
    )
    assert result.exit_code == 0, (result.output, result.exception)
    rows = {
        r["name"]: r["value"] for r in json.loads((tmp_path / "record.json").read_text())["results"]
    }
    assert {
        "evaluations",
        "cost of classifier guidance",
        "share of that peak",
        "memory",
        "pool of 1",
    } <= set(rows)
    assert all(v > 0 for v in rows.values()) and rows["share of that peak"] < 1
    few = (
        "bench",
        "generate",
        run.root,
        "--images",
        2,
        "--rounds",
        1,
        "--engine",
        "local",
        "--set",
        "generate.steps=2",
    )
    refused(adversa(*few, "--samplers", "3"), "--samplers 3: there is room for 1")
    refused(adversa("bench", "generate", run.root, "--samplers", "\u00b2"), "write numbers above 0")
    refused(
        adversa("bench", "generate", run.root, "--samplers", "1,x"),
        "--samplers 1,x: write numbers above 0",
    )


def test_mining_explains_itself(adversa, finished, tmp_path):
    _, run = finished
    moved = shutil.copytree(run.root, tmp_path / "run")
    result = adversa("mine", "--run-dir", moved, "--explain", "--engine", "local")
    assert result.exit_code == 0, (result.output, result.exception)
    lines = result.output.splitlines()
    assert (
        lines[:2] == [f"mine: nothing left to do in {moved}", "round 1"]
        and "balanced accuracy" not in result.output
    )
    assert (
        "failure modes:" in result.output
        and "Fisher's exact test, corrected by Holm" in result.output
    )
    saved = json.loads((moved / "round-001/hard/modes.json").read_text())
    assert all(mode["name"] in result.output for mode in saved["modes"]) and saved["modes"]
