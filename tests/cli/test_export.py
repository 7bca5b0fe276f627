"""The command `export`: what it prints, what it refuses, exit codes."""

from __future__ import annotations

import shutil
import signal

import pytest

from adversa.export import run as export_run
from adversa.storage import files, tables


def refused(result, text):
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and text in result.stderr, (
        result.output,
        result.exception,
    )


def test_a_run_is_exported_and_exported_again(adversa, finished, tmp_path):
    config, run = finished
    args = (
        "export",
        run.root,
        "--out",
        tmp_path / "out",
        "--format",
        "webdataset",
        "--shard-mb",
        "0.05",
    )
    first = adversa(*args)
    kept = sum(v["keep"] for v in tables.read(run.round(1, "verdicts")).to_pylist())
    assert (
        first.exit_code == 0
        and f"{kept} images in" in first.output
        and "adversa-run-guided" in first.output
    ), first.output
    shards = list((tmp_path / "out/images").glob("*.tar"))
    assert shards and all(p.stat().st_size <= 50_000 for p in shards)
    again = adversa(*args)
    assert again.exit_code == 0 and "nothing was missing: no file written" in again.output
    refused(adversa(*args[:-2]), "holds another export (shard: 50000 -> 256000000)")
    refused(adversa(*args, "--what", "images"), "holds another export")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            ("--format", "zip"),
            "--format zip: there is no such format; give one of folder, parquet, webdataset",
        ),
        (("--what", "weights"), "--what weights: there is no such what"),
        (("--arm", "gided"), "--arm gided: there is no such arm"),
        (("--what", "images", "--arm", "real"), "the arm real generates none"),
        (("--round", "7"), "--round 7: the run has the rounds 1 to 1"),
        (("--what", "models", "--rejected"), "--rejected is of images"),
        (("--shard-mb", "0"), "--shard-mb 0: give a number of megabytes above 0"),
        (("--shard-mb", "nan"), "--shard-mb nan"),
    ],
)
def test_what_cannot_be_exported_is_one_line(adversa, finished, tmp_path, args, text):
    _, run = finished
    refused(adversa("export", run.root, "--out", tmp_path / "out", *args), text)
    assert not (tmp_path / "out").exists()


def test_out_and_run_are_checked(adversa, finished, tmp_path):
    _, run = finished
    refused(
        adversa("export", tmp_path, "--out", tmp_path / "out"),
        "is not a run (it has no config.yaml)",
    )
    (tmp_path / "file").write_text("")
    refused(adversa("export", run.root, "--out", tmp_path / "file"), "is a file; give a folder")
    refused(adversa("export", run.root, "--out", tmp_path / "file" / "out"), "--out")
    refused(adversa("export", run.root, "--out", run.root), "not empty and not an export")


def test_an_unfinished_run_hands_on_its_images_alone(adversa, finished, tmp_path):
    _, run = finished
    moved = shutil.copytree(run.root, tmp_path / "run")
    (moved / "summary.json").unlink()
    refused(
        adversa("export", moved, "--out", tmp_path / "out"),
        "is not finished, so its models have no figures yet",
    )
    result = adversa(
        "export", moved, "--out", tmp_path / "out", "--what", "images", "--format", "parquet"
    )
    assert (
        result.exit_code == 0 and "images in" in result.output and (tmp_path / "out/data").is_dir()
    )
    for manifest in moved.glob("round-001/verdicts/manifest.json"):
        manifest.unlink()
    refused(
        adversa("export", moved, "--out", tmp_path / "more", "--what", "images"),
        "no round has verdicts yet",
    )


def test_ctrl_c_keeps_what_is_written_and_says_how_to_go_on(
    adversa, finished, tmp_path, monkeypatch
):
    _, run = finished
    args = ("export", run.root, "--out", tmp_path / "out", "--what", "images")
    rows, seen = export_run.rows, []

    def stop(*given):
        seen.append(given)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGTERM)
        return rows(*given)

    monkeypatch.setattr(export_run, "rows", stop)
    result = adversa(*args)
    assert (
        result.exit_code == 143
        and "stopped; what is written is kept. Go on with: adversa" in result.output
    ), result.output
    begun = list((tmp_path / "out").glob("*/*.png"))
    monkeypatch.undo()
    assert adversa(*args).exit_code == 0
    assert (
        begun
        and all(p.exists() for p in begun)
        and files.read_json(tmp_path / "out/export.json")["what"] == "images"
    )
