"""The images of a run as a data set: the same ids, labels and bytes in every form, kept ones alone,
the same files again.
"""

from __future__ import annotations

import csv
import functools
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from adversa.curate.filter import Verdict
from adversa.export import dataset_card
from adversa.export import run as export_run
from adversa.export.formats import FORMATS, SHARD
from adversa.pipeline import loop
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.storage import files as storage_files
from adversa.storage import tables
from adversa.types import GenerationRequest, SyntheticImage, UserError, digest, seed_of

CLASSES = ["nevus", "melanoma", "test"]
REASONS = ["kept", "kept", "near copy", "judge disagrees", "not finite", "not painted", "kept"]
DONE = {
    "finished": "2031-01-02T03:04:05+00:00",
    "versions": {"adversa": "0.9", "torch": "9.9"},
    "git": "c0ffee",
}


def picture(number, side=16):
    return tables.encode_png(
        np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)
    )


@functools.cache
def made(number):
    """(request, image, verdict) of one generated image; its arm, class and fate hang on its
    number.
    """
    arm, label = ("guided", "unguided")[number % 2], number % 3
    reason, key = REASONS[number % len(REASONS)], digest("r", number, size=10)
    example, strategy = (
        (digest("e", number // 4), "img2img") if arm == "guided" else (None, "sample")
    )
    request = GenerationRequest(
        key, 1 + number // 60, arm, strategy, label, example, 2.0, 1.5, seed_of(key)
    )
    fault = "its sampler died" if reason == "not painted" else None
    image = SyntheticImage(
        key, arm, label, picture(number), "not" not in reason, "f00d", fault=fault
    )
    verdict = Verdict(
        key,
        arm,
        label,
        strategy,
        example,
        reason == "kept",
        reason,
        contrast=10.0 + number,
        contrast_limit=2.0,
        agreement=0.5,
        agreement_least=0.2,
        agreement_most=0.99,
        nearest="real",
        similarity=number / 200,
        similarity_limit=0.97,
        realism=float("nan"),
        realism_limit=1.0 + label,
        quota=None,
        place=1,
    )
    return request, image, verdict


@pytest.fixture(scope="module")
def generated(tiny, tmp_path_factory):
    """(config, run) of a made-up run: two rounds of 60 images in 3 parts each, every reason among
    them. Read only.
    """
    config = tiny(
        rounds=2, generate={"weak": "/secret/place/weak"}, data={"path": "/secret/place/set.zip"}
    )
    run = loop.open_run(config, tmp_path_factory.mktemp("generated") / "demo")
    storage_files.write_json(run.data / "classes.json", {"classes": CLASSES})
    storage_files.write_json(run.data / "split.json", {"split_hash": "5b1174a5"})
    for n in (1, 2):
        rows = [made(i) for i in range(60 * n - 60, 60 * n)]
        for k in range(3):
            asked, images, _ = zip(*rows[20 * k : 20 * k + 20], strict=True)
            tables.write_part(
                run.round(n, "requests") / tables.part_name(k),
                tables.to_table(asked, tables.REQUESTS),
            )
            tables.write_part(
                run.round(n, "synthetic") / tables.part_name(k),
                tables.to_table(images[::-1], tables.SYNTHETIC),
            )
        verdicts = tables.to_table([v for _, _, v in rows], tables.VERDICTS)
        tables.write_part(
            run.round(n, "verdicts") / tables.part_name(0), verdicts
        )  # its parts are not those of the images
        quantiles = {str(q): [0.4, 0.5] for q in (0.5, 0.99)}
        found = {
            "synthetic": 30,
            "held_out": 40,
            "curve": [],
            "quantiles": quantiles,
            "nearer": 0.625,
            "beyond": 0.0375,
        }
        storage_files.write_json(
            run.round(n, "verdicts") / "memorisation.json", {"guided": found, "unguided": None}
        )
        for step in ("requests", "synthetic", "verdicts"):
            storage_files.write_json(
                run.round(n, step) / step_folder.MANIFEST,
                {"fingerprint": f"{step}-{n}", "files": {}} | DONE,
            )
    return config, run


def export(generated, out, form="folder", **asked):
    config, run = generated
    return export_run.publish(
        export_run.plan(config, run, export_run.Selection("images", form, **asked)), out
    )


def wanted(keep=lambda v: v.keep):
    """request id -> (request, image, verdict) of the images whose verdict passes `keep`."""
    rows = map(made, range(120))
    return {r.request_id: (r, i, v) for r, i, v in rows if keep(v)}


def read(out, form):
    """request id -> (label, image bytes, the row's other values as text, None as "")."""
    if form == "parquet":
        rows = tables.read(out / "data").to_pylist()
        return {r["request_id"]: (r["label"], r.pop("image")["bytes"], texts(r)) for r in rows}
    if form == "folder":
        with open(out / "metadata.csv", newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        return {
            r["request_id"]: (int(r["label"]), (out / r.pop("file_name")).read_bytes(), texts(r))
            for r in rows
        }
    found = {}
    for path in sorted(out.glob("images-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                found.setdefault(key, {})[kind] = tar.extractfile(member).read()
    return {k: (int(s["cls"]), s["png"], texts(json.loads(s["json"]))) for k, s in found.items()}


def texts(row):
    return {k: "" if v in (None, "-") else str(v) for k, v in row.items()}


def files(folder):
    """name -> (bytes, when written) of all files but the lock."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in found}


def front(out):
    return yaml.safe_load((out / "README.md").read_text().split("---\n")[1])


# ---- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_every_form_gives_back_ids_labels_bytes_and_numbers(generated, tmp_path, form):
    result, expected = export(generated, tmp_path / "out", form, shard=40_000), wanted()
    found = read(tmp_path / "out", form)
    assert found.keys() == expected.keys() and result.images == len(expected) > 40
    for key, (request, image, verdict) in expected.items():
        label, data, row = found[key]
        assert label == request.label and data == image.image, key
        assert row.keys() == {*export_run.row_schema(False).names} - {"image"}
        for name in ("strategy", "example", "sigma_start", "guidance", "seed", "arm", "round"):
            assert row[name] == texts({name: getattr(request, name)})[name], name
        assert row["class"] == CLASSES[label] and row["denoiser"] == "f00d"
        for name in (
            "contrast",
            "contrast_limit",
            "similarity",
            "similarity_limit",
            "nearest",
            "agreement_most",
            "place",
        ):
            assert row[name] == str(getattr(verdict, name)), name
        assert row["realism"] == row["quota"] == "", "not known, and off"
    assert result.by_class == {
        c: sum(r.label == k for r, _, _ in expected.values()) for k, c in enumerate(CLASSES)
    }


def test_all_forms_hold_the_same(generated, tmp_path):
    found = []
    for form in FORMATS:
        export(generated, tmp_path / form, form)
        found.append(read(tmp_path / form, form))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("form", FORMATS)
def test_refused_images_come_on_demand_and_say_why(generated, tmp_path, form):
    expected = wanted(
        lambda v: v.reason not in ("not finite", "not painted")
    )  # those have no picture
    export(generated, tmp_path / "out", form, rejected=True)
    found = read(tmp_path / "out", form)
    assert found.keys() == expected.keys()
    for key, (_, _, row) in found.items():
        verdict = expected[key][2]
        assert (row["keep"], row["reason"]) == (str(verdict.keep), verdict.reason)
    assert {row["reason"] for _, _, row in found.values()} == {
        "kept",
        "near copy",
        "judge disagrees",
    }


def test_one_arm_and_one_round(generated, tmp_path):
    export(generated, tmp_path / "arm", arm="guided")
    assert (
        read(tmp_path / "arm", "folder").keys()
        == wanted(lambda v: v.keep and v.arm == "guided").keys()
    )
    export(generated, tmp_path / "round", round=2)
    late = {k for k, (r, _, _) in wanted().items() if r.round == 2}
    assert read(tmp_path / "round", "folder").keys() == late and 0 < len(late) < len(wanted())


# ---- tar shards ----------------------------------------------------------------------------------


def test_shards_are_small_sorted_and_the_same_bytes_by_anyone(generated, tmp_path, monkeypatch):
    export(generated, tmp_path / "a", "webdataset", shard=40_000)
    monkeypatch.setattr("time.time", lambda: 5e9)
    monkeypatch.setattr("os.getuid", lambda: 1234)
    export(generated, tmp_path / "b", "webdataset", shard=40_000)
    shards = sorted((tmp_path / "a").glob("*.tar"))
    assert len(shards) > 2 and [s.name for s in shards] == [
        f"images-{i:05d}.tar" for i in range(len(shards))
    ]
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()
        assert shard.stat().st_size <= 40_000
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        keys = [m.name.partition(".")[0] for m in members]
        assert [m.name.partition(".")[2] for m in members] == ["cls", "json", "png"] * (
            len(members) // 3
        )
        assert all(
            len({*keys[i : i + 3]}) == 1 for i in range(0, len(keys), 3)
        )  # a sample lies in one shard, side by side
    assert all(s.stat().st_size > 25_000 for s in shards[:-1])  # full, but the last


def test_an_image_larger_than_a_shard_has_its_own(generated, tmp_path):
    export(generated, tmp_path / "out", "webdataset", shard=1)
    assert len(list((tmp_path / "out").glob("*.tar"))) == len(wanted())


def test_webdataset_reads_it(generated, tmp_path):
    import webdataset as wds

    export(generated, tmp_path / "out", "webdataset", shard=40_000)
    urls = [str(p) for p in sorted((tmp_path / "out").glob("*.tar"))]
    rows = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    expected = wanted()
    assert {r["__key__"] for r in rows} == expected.keys() and len(rows) == len(expected)
    for r in rows:
        request, image, _ = expected[r["__key__"]]
        assert r["cls"] == request.label and r["json"]["seed"] == request.seed
        assert np.array_equal(r["png"], tables.decode_png(image.image))


@pytest.mark.parametrize("form", FORMATS)
def test_datasets_reads_it(generated, tmp_path, form, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip(
        "datasets", reason="Hugging Face's datasets is no dependency of the project"
    )
    export(generated, tmp_path / "out", form, rejected=True, shard=40_000)
    expected = wanted(lambda v: v.reason not in ("not finite", "not painted"))
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"] and len(loaded["train"]) == len(expected)
    for row in loaded["train"]:
        image, label = (
            (row["png"], row["cls"]) if form == "webdataset" else (row["image"], row["label"])
        )
        told = row["json"] if form == "webdataset" else row
        request, synthetic, verdict = expected[told["request_id"]]
        assert (
            np.array_equal(np.asarray(image), tables.decode_png(synthetic.image))
            and label == request.label
        )
        assert told["seed"] == request.seed and told["realism"] is None and told["quota"] is None
        assert told["reason"] == verdict.reason and told["contrast"] == verdict.contrast


# ---- the card ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_says_what_a_person_must_know(generated, tmp_path, form):
    from huggingface_hub import DatasetCard

    config, run = generated
    export(generated, tmp_path / "out", form)
    text, head = (tmp_path / "out/README.md").read_text(), front(tmp_path / "out")
    kept = len(wanted())
    for word in (
        f"{kept} images in 3 classes",
        "Not for diagnosis",
        "Evaluate on real images only",
        "`f00d`",
        "trained by the run demo",
        "5b1174a5",
        "phantoms (seed",
        "| torch | 9.9 |",
        "| adversa | 0.9 (c0ffee) |",
        "2031-01-02T03:04:05",
        "| rounds | 1, 2 |",
        "Fill in",
        "grey levels, at least | 2 |",
        "| 0.97 |",
        "nevus 1, melanoma 2, test 3",
        "| off |",
        "| 1 | guided | 30 | 40 | 0.400 / 0.500 | 0.400 / 0.500 | 0.625 | 0.037 |",
        "17 of 120 generated images rejected (17 near copy)",
        export_run.run_card.run_id(run),
        "All images passed",
    ):
        assert word in text, word
    rows = [
        line.split(" | ")
        for line in text.splitlines()
        if line.startswith(("| guided | img2img |", "| unguided | sample |"))
    ]
    assert sum(int(r[3]) for r in rows) == 120 and sum(int(r[4]) for r in rows) == kept
    assert "/secret" not in text and "| weak | weak |" in text and str(run.root.parent) not in text
    data = DatasetCard.load(tmp_path / "out/README.md").data
    assert data.license == head["license"] == "other" and data.license_name == "to-be-filled-in"
    assert data.size_categories == ["n<1K"] and data.tags == ["synthetic", "diffusion", "adversa"]
    assert head["configs"][0]["data_files"] == [
        {"split": "train", "path": dataset_card.FILES[form]}
    ]


def test_the_card_says_what_amp_auto_came_to(generated, tmp_path):
    config, run = generated[0], run_folder.RunDir(tmp_path / "demo")
    shutil.copytree(generated[1].root, run.root)
    generate = config.generate.model_copy(update={"amp": "auto"})
    config = config.model_copy(update={"generate": generate})
    told = {"amp": True, "hardware": "a CPU", "here": "a CPU"}
    storage_files.write_json(run.root / "precision.json", told)
    export((config, run), tmp_path / "out")
    assert "| amp | True |" in (tmp_path / "out/README.md").read_text()


def test_the_card_of_refused_images_says_so(generated, tmp_path):
    export(generated, tmp_path / "out", rejected=True)
    text = (tmp_path / "out/README.md").read_text()
    assert "`reason` says why" in text and "All images passed" not in text
    assert f"The {120 - len(wanted())} images that the filter rejected" in text


# ---- again, cut off, elsewhere -------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_again_writes_nothing_and_what_is_lost_comes_back(generated, tmp_path, form):
    out = tmp_path / "out"
    first = export(generated, out, form, shard=40_000)
    before = files(out)
    again = export(generated, out, form, shard=40_000)
    assert (
        files(out) == before
        and again.written == 0 < first.written
        and again.by_class == first.by_class
    )
    images = sorted(n for n in before if n.endswith((".png", ".parquet", ".tar")))
    (out / images[0]).unlink()
    (out / images[1]).write_bytes(before[images[1]][0][:40])
    (out / "README.md").write_text("the licence is mine")
    assert export(generated, out, form, shard=40_000).written == 2
    after = files(out)
    assert after["README.md"][0] == b"the licence is mine"
    assert {n: b for n, (b, _) in after.items() if n != "README.md"} == {
        n: b for n, (b, _) in before.items() if n != "README.md"
    }


@pytest.mark.parametrize("form", FORMATS)
def test_a_cut_off_export_goes_on(generated, tmp_path, form):
    config, run = generated
    chosen = export_run.plan(config, run, export_run.Selection("images", form, shard=40_000))

    def stop(what, done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_run.publish(chosen, tmp_path / "out", stop)
    begun = files(tmp_path / "out")
    assert (
        len(begun) > 1
        and "README.md" not in begun
        and not [n for n in begun if Path(n).name.startswith(".")]
    )
    whole, rest = (
        export_run.publish(chosen, tmp_path / "whole"),
        export_run.publish(chosen, tmp_path / "out"),
    )
    assert 0 < rest.written == whole.written - len(begun)
    after = files(tmp_path / "out")
    assert all(after[n] == old for n, old in begun.items())
    assert {n: b for n, (b, _) in after.items()} == {
        n: b for n, (b, _) in files(tmp_path / "whole").items()
    }


def refused(generated, out, form="folder", **asked):
    with pytest.raises(UserError) as e:
        export(generated, out, form, **asked)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_another_selection_into_the_same_folder_is_refused(generated, tmp_path):
    out = tmp_path / "out"
    export(generated, out, "webdataset")
    before = files(out)
    assert "format: webdataset -> folder" in refused(generated, out)
    assert "rejected: False -> True" in refused(generated, out, "webdataset", rejected=True)
    assert "rounds: [1, 2] -> [1]" in refused(generated, out, "webdataset", round=1)
    assert "arms: " in refused(generated, out, "webdataset", arm="guided")
    assert f"shard: {SHARD} -> 5" in refused(generated, out, "webdataset", shard=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.doc").write_text("mine")
    assert "not empty and not an export" in refused(generated, tmp_path / "mine")
    assert files(out) == before and len(files(tmp_path / "mine")) == 1


def test_what_cannot_be_exported_is_refused_before_anything_is_written(generated, tmp_path, tiny):
    config, run = generated
    out = tmp_path / "out"
    assert "--format zip" in refused(generated, out, "zip")
    assert "--arm gided" in refused(generated, out, arm="gided")
    assert "--what images: the arm real generates none" in refused(generated, out, arm="real")
    assert "--round 3: the run has the rounds 1 to 2" in refused(generated, out, round=3)
    assert "--round 0" in refused(generated, out, round=0)
    for what, asked, text in (
        ("nothing", {}, "--what nothing"),
        ("models", {}, "is not finished, so its models have no figures yet"),
        ("all", {}, "is not finished"),
        ("models", {"round": 1}, "--round is of images"),
        ("models", {"rejected": True}, "--rejected is of images"),
    ):
        with pytest.raises(UserError, match=text):
            export_run.plan(config, run, export_run.Selection(what, **asked))
    assert not out.exists()


def test_finished_rounds_of_an_unfinished_run_can_be_exported(generated, tmp_path):
    config, run = generated
    moved = run_folder.RunDir(shutil.copytree(run.root, tmp_path / "demo"))
    (moved.round(2, "verdicts") / step_folder.MANIFEST).unlink()
    export((config, moved), tmp_path / "out")
    assert {r["round"] for _, _, r in read(tmp_path / "out", "folder").values()} == {"1"}
    assert "round 2 has verdicts not yet" in refused((config, moved), tmp_path / "more", round=2)
    (moved.round(1, "verdicts") / step_folder.MANIFEST).unlink()
    text = refused((config, moved), tmp_path / "more")
    assert (
        "no round has verdicts yet" in text
        and f"adversa loop {moved.config} --run-dir {moved.root}" in text
    )


def test_an_image_without_a_verdict_is_not_let_through(generated, tmp_path):
    config, run = generated
    moved = run_folder.RunDir(shutil.copytree(run.root, tmp_path / "demo"))
    path = moved.round(1, "verdicts") / tables.part_name(0)
    rows = tables.read(path.parent)
    lost = rows["request_id"][0].as_py()
    tables.write_part(path, rows.slice(1))
    assert f"{lost}, and no verdict is given on it" in refused((config, moved), tmp_path / "out")
