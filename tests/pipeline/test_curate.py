"""The filter as steps: what is measured on which images, and what a verdict then says."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pytest

from adversa.curate import filter, planted
from adversa.engine.local import LocalEngine
from adversa.engine.tasks import Part
from adversa.pipeline import curate, finalize
from adversa.run import step_folder
from adversa.storage import files, tables
from adversa.types import ROLES, UserError


def test_limits_are_those_of_the_roles_that_may_choose(finished, tmp_path, relist):
    """`test` may be thrown away, or be full of near-duplicates: no limit moves."""
    config, run = finished
    data, features = tmp_path / "data", tmp_path / "features"
    shutil.copytree(run.data, data)
    shutil.copytree(run.features, features)
    shutil.rmtree(data / "test")
    shutil.rmtree(features / "test")
    relist(data)
    curate.measure_thresholds(data, features, config.curate, tmp_path / "limits")
    without, as_it_is = (
        files.read_json(d / curate.THRESHOLDS) for d in (tmp_path / "limits", run.limits)
    )
    assert without.pop("held_out") != as_it_is.pop("held_out")  # of the memorisation curve alone
    assert without == as_it_is
    looser = config.curate.model_copy(update={"near_copy_quantile": 0.8, "realism_quantile": 0.6})
    curate.measure_thresholds(data, features, looser, tmp_path / "looser")
    one, other = (files.read_json(d / curate.THRESHOLDS) for d in (tmp_path / "looser", run.limits))
    assert (
        one["near_copy"] < other["near_copy"]
        and one["near_copy_features"] < other["near_copy_features"]
    )
    assert max(one["realism"]) < max(other["realism"]) and max(one["realism_2"]) < max(
        other["realism_2"]
    )


def test_the_curve_s_held_out_images_are_searched_as_generated_ones_are(finished):
    """Among the images of every role, those of other lesions: so that neither of the two samples
    has the nearer neighbours.
    """
    from adversa.curate.near_copy import NearCopy

    _, run = finished
    rows = {r: tables.read(run.data / r, ["id", "group", "image"]).to_pylist() for r in ROLES}
    everyone = [row for r in ROLES for row in rows[r]]
    given = files.read_json(run.limits / curate.THRESHOLDS)["held_out"]
    assert len(given) == len(rows["mine"]) + len(rows["select"])
    one = rows["mine"][0]
    others = [row for row in everyone if row["group"] != one["group"]]
    index = NearCopy(
        [o["id"] for o in others],
        tables.decode_images([o["image"] for o in others]),
        like=curate.scale_of(run.limits),
    )
    similarity, _ = index.nearest(tables.decode_images([one["image"]]))
    assert np.abs(np.array(given) - similarity[0]).min() < 2e-5


def test_of_test_the_filter_has_the_classifier_s_features_alone(finished):
    _, run = finished
    for role in ROLES:
        rows = tables.read(run.features / role).to_pylist()
        assert all(len(r["classifier"]) > 0 for r in rows)
        for name in ("label", "group", "judge", "agreement"):
            assert all((r[name] is None) == (role == "test") for r in rows), (role, name)


def test_what_is_trivial_is_measured_on_held_out_images(finished):
    config, run = finished
    given = [
        a
        for r in ("mine", "select")
        for row in tables.read(run.features / r).to_pylist()
        for a in row["agreement"]
    ]
    limits = files.read_json(run.limits / curate.THRESHOLDS)
    assert limits["most_agreement"] == pytest.approx(
        np.quantile(given, config.curate.trivial_quantile)
    )
    assert (
        curate.thresholds_of(run.limits, config.curate)["agreement_most"]
        == limits["most_agreement"]
    )
    off = config.curate.model_copy(update={"trivial_quantile": None})
    assert curate.thresholds_of(run.limits, off)["agreement_most"] == 1.0


def test_the_index_of_real_images_is_read_not_built_anew(finished, tmp_path, monkeypatch):
    from adversa.curate.near_copy import NearCopy

    config, run = finished
    ids, _, images = curate.real_images(run.data, ROLES)
    built = NearCopy(ids, images, like=curate.scale_of(run.limits))
    read = curate.near_copies(run.limits)
    assert read.ids == built.ids
    assert all(np.array_equal(vars(read)[k], x) for k, x in vars(built).items() if k != "ids")
    monkeypatch.setattr(NearCopy, "__init__", None)
    row = tables.read(run.data / "test", ["image", "label"]).to_pylist()[0]
    found = inspected(run, config, [synthetic("a", row["image"], row["label"])], tmp_path)
    assert found[0]["reason"] == "near copy" or found[0]["similarity"] >= 0.99


def test_which_judge_speaks_does_not_hang_on_test(finished, tmp_path):
    """A picture that is one of test, and unlike it nothing: it is judged by its neighbour in
    train.
    """
    config, run = finished
    row = tables.read(run.data / "test", ["id", "image", "label"]).to_pylist()[0]
    (verdict,) = inspected(
        run, lenient(config), [synthetic("a", row["image"], row["label"])], tmp_path
    )
    assert verdict["nearest"] == row["id"]
    from adversa.classify.score import make_scorer
    from adversa.common.statistics import softmax
    from adversa.pipeline.verifier import fold_of, folders

    image = tables.decode_images([row["image"]])
    each = [
        float(softmax(make_scorer(f)(image)[0])[0, row["label"]]) for f in folders(run.judge, 2)
    ]
    assert set(fold_of(run.data, 2).values()) == {0, 1}
    assert min(abs(verdict["agreement"] - e) for e in each) < 1e-6


def inspected(run, config, rows, tmp_path, requests=None):
    """The verdicts of the first pass on rows of tables.SYNTHETIC."""
    folder = tmp_path / f"in-{len(list(tmp_path.iterdir()))}"
    table = pa.Table.from_pylist(rows, schema=tables.SYNTHETIC)
    tables.write_part(folder / "synthetic" / "part-00000.parquet", table)
    asked = requests or [
        {"request_id": r["request_id"], "strategy": "img2img", "example": "e"} for r in rows
    ]
    tables.write_part(
        folder / "requests" / "part-00000.parquet",
        pa.Table.from_pylist(asked, schema=tables.REQUESTS),
    )
    classifier = run.arm(0, "real", 0) / "classifier"
    work = curate.make_inspected(
        run.data, run.features, run.limits, classifier, run.judge, config.curate
    )
    paths = {
        "path": str(folder / "synthetic" / "part-00000.parquet"),
        "requests": str(folder / "requests" / "part-00000.parquet"),
    }
    work(Part(0, len(rows), paths), folder / "out" / "part-00000.parquet")
    return tables.read(folder / "out", schema=tables.VERDICTS).to_pylist()


def synthetic(key, image, label, **changes):
    row = {
        "request_id": key,
        "arm": "guided",
        "label": label,
        "image": image,
        "finite": True,
        "denoiser": "",
        "fault": None,
    }
    return row | changes


def lenient(config, **changes):
    """The settings with every check but the near-copy one off."""
    off = {
        "min_agreement": 0.0,
        "trivial_quantile": None,
        "realism_quantile": None,
        "min_contrast": None,
        "max_clipped": None,
    }
    return config.model_copy(update={"curate": config.curate.model_copy(update=off | changes)})


@pytest.mark.parametrize("role", ROLES)
def test_a_copy_of_an_image_of_any_role_is_caught_test_too(finished, tmp_path, role):
    config, run = finished
    row = tables.read(run.data / role, ["id", "image", "label"]).to_pylist()[0]
    turned = planted.turned(tables.decode_png(row["image"]), np.random.default_rng(0))
    rows = [
        synthetic("a", row["image"], row["label"]),
        synthetic("b", tables.encode_png(turned), row["label"]),
    ]
    for verdict in inspected(run, lenient(config), rows, tmp_path):
        assert (verdict["reason"], verdict["nearest"], verdict["keep"]) == (
            "near copy",
            row["id"],
            False,
        )
        assert (
            verdict["similarity"]
            >= verdict["similarity_limit"]
            == files.read_json(run.limits / curate.THRESHOLDS)["near_copy"]
        )


def test_every_number_and_limit_is_written(finished):
    config, run = finished
    limits = files.read_json(run.limits / curate.THRESHOLDS)
    rows = tables.read(run.round(1, "verdicts"), schema=tables.VERDICTS).to_pylist()
    requests = {r["request_id"]: r for r in tables.read(run.round(1, "requests")).to_pylist()}
    ids = set(curate.real_ids(run.data, ROLES))
    assert len(rows) == len(requests) > 0
    for v in rows:
        assert (v["strategy"], v["source"]) == (
            requests[v["request_id"]]["strategy"],
            requests[v["request_id"]]["example"],
        )
        assert all(
            np.isfinite(v[k])
            for k in (
                "contrast",
                "clipped",
                "agreement",
                "realism",
                "realism_2",
                "similarity",
                "similarity_2",
            )
        )
        assert (v["realism_limit"], v["realism_2_limit"]) == (
            limits["realism"][v["label"]],
            limits["realism_2"][v["label"]],
        )
        assert (v["similarity_limit"], v["similarity_2_limit"]) == (
            limits["near_copy"],
            limits["near_copy_features"],
        )
        assert {v["nearest"], v["nearest_2"]} <= ids
        assert (
            v["reason"] in filter.EVERY_REASON
            and v["reason"] != filter.PENDING
            and v["keep"] == (v["reason"] == "kept")
        )


def test_noise_is_unlike_real_images_in_both_spaces_and_real_ones_are_not(finished, tmp_path):
    config, run = finished
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    real = tables.read(run.data / "select", ["image", "label"]).to_pylist()[:20]
    rows = [synthetic(f"r{i:02d}", r["image"], r["label"]) for i, r in enumerate(real)]
    found = inspected(
        run, config, [synthetic("noise", tables.encode_png(noise), 0), *rows], tmp_path
    )
    assert found[0]["realism_2"] > found[0]["realism_2_limit"]
    assert np.mean([v["realism"] <= v["realism_limit"] for v in found[1:]]) >= 0.8
    off = inspected(run, lenient(config), rows[:1], tmp_path)[0]
    assert off["realism"] is None or np.isnan(off["realism"])
    assert off["realism_limit"] is None


def test_what_was_not_generated_or_is_not_finite_has_that_reason(finished, tmp_path):
    config, run = finished
    black = tables.encode_png(np.zeros((32, 32, 3), np.uint8))
    rows = [
        synthetic("a", black, 0, fault="out of memory"),
        synthetic("b", black, 0, finite=False),
        synthetic("c", black, 0),
    ]
    assert [v["reason"] for v in inspected(run, config, rows, tmp_path)] == [
        "not painted",
        "not finite",
        "flat",
    ]


@pytest.fixture
def paired(finished, tmp_path):
    """A synthetic folder of one arm in which picture b is picture a again, one pixel off, and c
    another.
    """
    _, run = finished
    images = tables.decode_images(tables.read(run.data / "train", ["image"])["image"].slice(0, 2))
    again = planted.plant(images[:1], "jpeg")[0]
    rows = [
        synthetic(k, tables.encode_png(x), 0)
        for k, x in (("a", images[0]), ("b", again), ("c", images[1]))
    ]
    rows.append(synthetic("d", tables.encode_png(images[0]), 0, arm="unguided"))
    tables.write_part(
        tmp_path / "synthetic" / "part-00000.parquet",
        pa.Table.from_pylist(rows, schema=tables.SYNTHETIC),
    )
    files.write_json(
        tmp_path / "synthetic" / step_folder.MANIFEST, {"fingerprint": "x", "files": {}}
    )
    blank = [
        filter.Verdict(
            r["request_id"], r["arm"], 0, "img2img", "e", False, filter.PENDING, similarity=0.1
        )
        for r in rows
    ]
    tables.write_part(
        tmp_path / "inspected" / "part-00000.parquet", tables.to_table(blank, tables.VERDICTS)
    )
    files.write_json(
        tmp_path / "inspected" / step_folder.MANIFEST, {"fingerprint": "y", "files": {}}
    )
    return run, tmp_path


@pytest.mark.parametrize("queries", [1, 2, 512])
def test_near_duplicates_are_found_within_an_arm_in_parts_of_any_size(paired, monkeypatch, queries):
    run, root = paired
    monkeypatch.setattr(finalize, "QUERIES", queries)
    finalize.near_duplicates(
        LocalEngine(1, 1), root / "synthetic", root / "inspected", run.limits, root / "twins"
    )
    pairs = tables.read(root / "twins").to_pylist()
    assert {(p["a"], p["b"]) for p in pairs if p["b"] is not None} == {("a", "b")}
    assert sorted(p["a"] for p in pairs if p["b"] is None) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, ["kept", "near twin", "kept", "kept"]),
        ({"quota": 1}, ["kept", "near twin", "over quota", "kept"]),
        ({"twins": False}, ["kept"] * 4),
    ],
)
def test_near_duplicates_and_quotas_decide_what_is_kept(finished, paired, changes, reasons):
    run, root = paired
    config = finished[0].curate.model_copy(update=changes)
    finalize.near_duplicates(
        LocalEngine(1, 1), root / "synthetic", root / "inspected", run.limits, root / "twins"
    )
    finalize.finalize(root / "inspected", root / "twins", run.limits, config, root / "verdicts")
    rows = tables.read(root / "verdicts", schema=tables.VERDICTS).to_pylist()
    assert [r["reason"] for r in rows] == reasons
    assert step_folder.manifest(root / "verdicts")["kept"] == reasons.count("kept")
    told = files.read_json(root / "verdicts" / finalize.MEMORISATION)
    assert {arm: m["synthetic"] for arm, m in told.items()} == {"guided": 3, "unguided": 1}


def test_a_picture_whose_near_duplicates_were_not_looked_for_does_not_enter(
    finished, paired, relist
):
    run, root = paired
    finalize.near_duplicates(
        LocalEngine(1, 1), root / "synthetic", root / "inspected", run.limits, root / "twins"
    )
    for part in tables.parts(root / "twins")[1:]:
        part.unlink()
    relist(root / "twins")
    finalize.finalize(
        root / "inspected", root / "twins", run.limits, finished[0].curate, root / "verdicts"
    )
    rows = {r["request_id"]: r["reason"] for r in tables.read(root / "verdicts").to_pylist()}
    assert rows["d"] == "near twin" and rows["a"] == "kept"


def test_too_few_lesions_for_a_manifold_are_told(finished, tmp_path):
    config, run = finished
    shutil.copytree(run.features, tmp_path / "features")
    rows = tables.read(run.features / "train").slice(0, 3)
    for p in tables.parts(tmp_path / "features" / "train"):
        p.unlink()
    tables.write_part(tmp_path / "features" / "train" / "part-00000.parquet", rows)
    with pytest.raises(UserError, match="too few to say .* curate.realism_quantile=null"):
        curate.manifold(tmp_path / "features", "classifier")
