"""Planning and generation: what is asked for each hard case, and what lies on disk afterwards."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from adversa import config as cfg
from adversa.engine.local import LocalEngine
from adversa.engine.tasks import Part
from adversa.generation import regenerate
from adversa.pipeline import folders as pipeline_folders
from adversa.pipeline import generate as pipeline_generate
from adversa.pipeline import planning
from adversa.pipeline.pictures import Pictures
from adversa.pipeline.verifier import folders
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.storage import files, tables
from adversa.types import HardCase, UserError

CASES = [
    HardCase(f"e{i}", label, 1 - label, 2.0, -0.5, "misclassified", i)
    for i, label in enumerate([0, 1, 0, 0, 1, 2])
]


@pytest.fixture
def hard(tmp_path):
    folder = tmp_path / "hard"
    folder.mkdir()
    tables.write_part(folder / tables.part_name(0), tables.to_table(CASES, tables.HARD_CASES))
    step_folder.begin(folder, recipe := step_folder.Recipe("mine", 1, {}, {}))
    step_folder.finish(folder, recipe, rows=len(CASES))
    return folder


def planned(hard, config, levels=None, arms=("real", "unguided", "guided")):
    out = hard.parent / "requests"
    planning.plan(hard, levels, "run", 1, arms, config, out, (hard, 0))
    return tables.read(out).to_pylist(), step_folder.manifest(out)


def _by(run):
    return run.arm(0, "real", 0) / "classifier", 0


def test_each_request_says_which_classifier_asked_for_it(hard):
    """How stale the guidance of an image is: its round less the round of that classifier's
    training.
    """
    rows, _ = planned(hard, cfg.Generate())
    assert {(r["classifier"], r["classifier_round"]) for r in rows} == {
        (step_folder.fingerprint(hard), 0)
    }
    folded, kept = (
        cfg.check({"mix": {"fold_mined": f, "arms": ["real", "unguided"]}}, "")
        for f in ("all", "none")
    )
    assert [pipeline_folders.trained_in(folded, n) for n in (1, 2, 3)] == [0, 1, 2]
    assert [pipeline_folders.trained_in(kept, n) for n in (1, 2, 3)] == [0, 0, 0]


def test_parts_have_their_size_and_arms_their_matched_labels(hard):
    rows, facts = planned(hard, cfg.Generate(per_case=3, part_size=8))
    sizes = [len(tables.pq.read_table(p)) for p in tables.parts(hard.parent / "requests")]
    assert sizes == [8, 8, 2, 8, 8, 2] and facts["rows"] == 36
    by_arm = {a: sorted(r["label"] for r in rows if r["arm"] == a) for a in ("unguided", "guided")}
    assert by_arm["unguided"] == by_arm["guided"]
    assert all(
        r["example"] is None and r["strategy"] == "sample" and r["sigma_start"] == 40
        for r in rows
        if r["arm"] == "unguided"
    )
    assert len({r["seed"] for r in rows}) == 36


def test_only_the_guided_arm_is_steered(hard):
    rows, _ = planned(hard, cfg.Generate(classifier_guidance=0.5, reference_guidance=0.25))
    assert {(r["arm"], r["classifier_guidance"], r["reference_guidance"]) for r in rows} == {
        ("unguided", 0.0, 0.0),
        ("guided", 0.5, 0.25),
    }


@pytest.mark.parametrize(
    ("strategy", "start"), [("img2img", 2.0), ("inpaint", 4.0), ("outpaint", 4.0), ("inout", 4.0)]
)
def test_strategies_start_where_they_should(hard, strategy, start):
    rows, _ = planned(hard, cfg.Generate(strategy=strategy))
    assert {(r["strategy"], r["sigma_start"]) for r in rows if r["arm"] == "guided"} == {
        (strategy, start)
    }
    other = hard.parent / "other"
    planning.plan(
        hard,
        None,
        "run",
        1,
        ["guided"],
        cfg.Generate(strategy=strategy, fill_sigma=9.0),
        other,
        (hard, 0),
    )
    assert {r["sigma_start"] for r in tables.read(other).to_pylist()} == {
        2.0 if strategy == "img2img" else 9.0
    }


def test_blending_takes_two_hard_cases_of_one_class_and_varies_where_there_is_one(hard):
    rows, facts = planned(hard, cfg.Generate(strategy="interpolate", per_case=2))
    asked = {(r["example"], r["partner"], r["strategy"]) for r in rows if r["arm"] == "guided"}
    assert asked == {
        ("e0", "e2", "interpolate"),
        ("e2", "e3", "interpolate"),
        ("e3", "e0", "interpolate"),
        ("e1", "e4", "interpolate"),
        ("e4", "e1", "interpolate"),
        ("e5", None, "img2img"),
    }
    assert facts["without_partner"] == 2


def test_adaptive_noise_is_each_cases_own(hard, tmp_path):
    levels = tmp_path / "levels"
    levels.mkdir()
    rows = [
        {"example": c.example, "sigma_start": 0.5 + i, "agreement": 0.9}
        for i, c in enumerate(CASES)
    ]
    tables.write_part(
        levels / tables.part_name(0), pa.Table.from_pylist(rows, schema=tables.LEVELS)
    )
    step_folder.begin(levels, recipe := step_folder.Recipe("levels", 1, {}, {}))
    step_folder.finish(levels, recipe, rows=6)
    asked, _ = planned(hard, cfg.Generate(adaptive=True), levels)
    assert {r["example"]: r["sigma_start"] for r in asked if r["arm"] == "guided"} == {
        r["example"]: r["sigma_start"] for r in rows
    }


def test_the_largest_level_at_which_the_label_is_still_seen():
    assert pipeline_generate.largest(np.array([0.9, 0.8, 0.6, 0.2]), 0.5) == 2
    assert pipeline_generate.largest(np.array([0.9, 0.3, 0.6, 0.2]), 0.5) == 2
    assert pipeline_generate.largest(np.array([0.4, 0.3, 0.2, 0.2]), 0.5) == 0


# ---- on a finished run ---------------------------------------------------------------------------


def generate_part(config, run, skip=None, steering=None):
    part = tables.parts(run.round(1, "requests"))[0]
    rows = tables.pq.read_metadata(part).num_rows
    work = pipeline_generate.make_work(run.denoiser, run.data / "mine", steering, config)
    return part, Part(0, rows, {"path": str(part)}, skip or {}), work


def test_rows_that_are_given_up_are_marked_and_the_others_generated_as_ever(finished, tmp_path):
    config, run = finished
    part, order, work = generate_part(config.generate, run, {1: "it died"})
    done = work(order, tmp_path / "out.parquet")
    rows = tables.pq.read_table(tmp_path / "out.parquet").to_pylist()
    before = tables.pq.read_table(run.round(1, "synthetic") / part.name).to_pylist()
    assert (
        done.rows == len(rows) == order.rows
        and done.evaluations == sum(r["evaluations"] for r in rows) > 0
    )
    assert (
        rows[1]["fault"] == "it died"
        and not rows[1]["finite"]
        and not tables.decode_png(rows[1]["image"]).any()
    )
    for i, (now, was) in enumerate(zip(rows, before, strict=True)):
        if i != 1:
            assert now == was and now["fault"] is None
    ids = pipeline_generate.read_requests(part)
    assert pipeline_generate.request_name(order, 1) == f"request {ids[1].request_id}"


def test_a_poisonous_request_is_found_and_left_out_by_the_real_work(finished, tmp_path):
    """The pool tries rows alone to find the one that fails: what generation leaves out then must be
    what it was told to.
    """
    config, run = finished
    asked = pipeline_generate.read_requests(tables.parts(run.round(1, "requests"))[0])
    # 200 requests: one in a hundred may be given up
    many = [
        replace(
            asked[i % len(asked)],
            request_id=f"r{i:03d}",
            arm="unguided",
            strategy="sample",
            example=None,
            sigma_start=40.0,
            reference_guidance=0.0,
            classifier_guidance=0.0,
        )
        for i in range(200)
    ]
    many[77] = replace(many[77], label=99)
    for i in range(0, 200, 50):
        tables.write_part(
            tmp_path / "requests" / tables.part_name(i // 50),
            tables.to_table(many[i : i + 50], tables.REQUESTS),
        )
    generate = config.generate.model_copy(update={"steps": 2})
    parts = [
        Part(i, 50, {"path": str(p)}) for i, p in enumerate(tables.parts(tmp_path / "requests"))
    ]
    make = partial(pipeline_generate.make_work, run.denoiser, None, None, generate)
    shares = LocalEngine(1, 1).map_parts(
        make, parts, tmp_path / "out", lambda _: None, pipeline_generate.request_name
    )
    failed = [f for share in shares for f in share.failed]
    assert [f.name for f in failed] == ["request r077"], failed
    rows = tables.read(tmp_path / "out").to_pylist()
    assert [r["request_id"] for r in rows if r["fault"]] == ["r077"] and sum(
        r["finite"] for r in rows
    ) == 199


def test_a_mask_that_cannot_be_used_is_refused_before_anything_is_generated(
    finished, tmp_path, relist
):
    config, run = finished
    data = shutil.copytree(run.data, tmp_path / "data")
    case = (
        tables.read(run.round(1, "hard"), schema=tables.HARD_CASES)
        .sort_by("rank")
        .to_pylist()[-1]["example"]
    )
    for path in tables.parts(data / "mine"):
        rows = tables.pq.read_table(path).to_pylist()
        for r in rows:
            if r["id"] == case:
                r["mask"] = tables.encode_png(np.zeros((32, 32), np.uint8))
        tables.write_part(
            path, tables.pa.Table.from_pylist(rows, schema=tables.pq.read_schema(path))
        )
    relist(data)
    generate = config.generate.model_copy(update={"strategy": "inpaint", "part_size": 4})
    planning.plan(
        run.round(1, "hard"),
        None,
        "run",
        1,
        ["real", "guided"],
        generate,
        tmp_path / "requests",
        _by(run),
    )
    with pytest.raises(UserError, match=f"mask of {case}: empty"):
        pipeline_generate.generate(
            LocalEngine(1, 1),
            tmp_path / "requests",
            data,
            run.denoiser,
            None,
            generate,
            tmp_path / "out",
        )
    assert not tables.parts(tmp_path / "out")


def test_a_denoiser_that_is_not_finite_ends_the_step_at_its_first_part(finished, tmp_path, relist):
    from safetensors.torch import load_file, save_file

    config, run = finished
    broken = shutil.copytree(run.denoiser, tmp_path / "denoiser")
    state = load_file(broken / "model.safetensors")
    save_file({k: v * float("nan") for k, v in state.items()}, broken / "model.safetensors")
    relist(broken)
    generate, asked = config.generate.model_copy(update={"part_size": 4}), tmp_path / "requests"
    planning.plan(
        run.round(1, "hard"), None, "run", 1, ["real", "unguided"], generate, asked, _by(run)
    )
    assert len(tables.parts(asked)) > 1
    with pytest.raises(
        UserError,
        match=r"none of the 4 images of a part is finite: the denoiser .* generate.amp=false",
    ) as told:
        pipeline_generate.generate(
            LocalEngine(1, 1), asked, run.data, broken, None, generate, tmp_path / "out"
        )
    assert "\n" not in str(told.value) and not tables.parts(tmp_path / "out")


def test_the_manifest_counts_what_the_generation_took(finished):
    config, run = finished
    facts = step_folder.manifest(run.round(1, "synthetic"))
    rows = tables.read(run.round(1, "synthetic")).to_pylist()
    assert (
        facts["evaluations"]
        == sum(r["evaluations"] for r in rows)
        >= config.generate.steps * len(rows) // 2
    )
    assert (facts["gradients_skipped"], facts["not_finite"], facts["faults"]) == (0, 0, 0)


def test_an_image_is_generated_again_to_the_bit(finished, tmp_path):
    config, run = finished
    rows = tables.read(run.round(1, "synthetic"), ["request_id", "arm"]).to_pylist()
    for arm in ("unguided", "guided"):
        asked = [r["request_id"] for r in rows if r["arm"] == arm][-1]
        (tmp_path / arm).mkdir()
        found = regenerate.regenerate(config, run, asked, tmp_path / arm)
        assert (
            found.identical
            and found.difference == (0, 0)
            and found.request.request_id == asked
            and found.request.arm == arm
        )
        assert found.image.any() and (found.device, found.batch_size) == (
            "cpu",
            config.generate.batch_size,
        )


def test_what_cannot_be_generated_again_is_refused(finished, tmp_path):
    config, run = finished
    with pytest.raises(UserError, match="has no request 0123; the ids are in"):
        regenerate.regenerate(config, run, "0123", tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "inpaint"},
        {"strategy": "outpaint"},
        {"strategy": "inout"},
        {"strategy": "interpolate"},
        {"classifier_guidance": 0.5, "classifier_guidance_every": 1},
        {"reference_guidance": 0.5},
        {"reference_guidance": 0.5, "reference_guidance_space": "features"},
        {"solver": "heun"},
        {"weak": "denoiser"},
    ],
)
def test_each_setting_generates_and_changes_the_picture(finished, tmp_path, changes):
    config, run = finished
    if "weak" in changes:
        changes = {"weak": str(run.denoiser), "guidance": 1.5}
    generate = config.generate.model_copy(update={"per_case": 1, **changes})
    cases = (
        tables.read(run.round(1, "hard"), schema=tables.HARD_CASES).sort_by("rank").to_pylist()[:4]
    )
    pairs = planning.partners(cases) or {cases[0]["example"]: cases[-1]["example"]}
    found = []
    for settings in (generate, config.generate.model_copy(update={"per_case": 1})):
        asked = [
            planning.request("run", 1, "guided", c, 0, settings, partner=pairs.get(c["example"]))
            for c in cases
        ]
        asked = [replace(r, seed=7, request_id=str(i)) for i, r in enumerate(asked)]
        path = tmp_path / f"requests-{len(found)}.parquet"
        tables.write_part(path, tables.to_table(asked, tables.REQUESTS))
        target = (
            pipeline_folders.attacked_in(config, run, 1)
            if pipeline_generate.steering_needs_classifier(settings)
            else None
        )
        out = tmp_path / f"out-{len(found)}.parquet"
        pipeline_generate.make_work(run.denoiser, run.data / "mine", target, settings)(
            Part(0, len(asked), {"path": str(path)}), out
        )
        found.append(tables.pq.read_table(out).to_pylist())
    assert all(r["finite"] and r["fault"] is None for r in found[0])
    assert any(a["image"] != b["image"] for a, b in zip(*found, strict=True))


def test_levels_are_found_for_every_case(finished, tmp_path):
    config, run = finished
    generate = config.generate.model_copy(update={"levels": [0.5, 4.0], "adaptive": True})
    pipeline_generate.levels(
        LocalEngine(1, 1),
        run.round(1, "hard"),
        run.data,
        run.denoiser,
        folders(run.judge, 2),
        generate,
        "run",
        tmp_path / "levels",
    )
    rows = tables.read(tmp_path / "levels").to_pylist()
    assert {r["example"] for r in rows} == set(
        tables.read(run.round(1, "hard"))["example"].to_pylist()
    )
    assert all(r["sigma_start"] in (0.5, 4.0) and 0 <= r["agreement"] <= 1 for r in rows)
    assert all(r["agreement"] >= 0.5 for r in rows if r["sigma_start"] == 4.0)


def test_levels_leave_out_what_they_are_told_to_and_heed_the_weak_denoiser(finished, tmp_path):
    config, run = finished
    cases = tables.read(run.round(1, "hard")).to_pylist()[:3]
    part = Part(
        0, 3, {"cases": [(c["example"], c["label"]) for c in cases], "run": "run"}, {1: "it died"}
    )
    found = {}
    for weak in (None, str(run.denoiser)):
        generate = config.generate.model_copy(
            update={"levels": [0.5, 4.0], "adaptive": True, "weak": weak, "guidance": 3.0}
        )
        pipeline_generate.make_levels(
            run.denoiser, run.data / "mine", folders(run.judge, 2), generate
        )(part, tmp_path / "levels.parquet")
        found[weak] = tables.pq.read_table(tmp_path / "levels.parquet").to_pylist()
        assert [r["example"] for r in found[weak]] == [cases[0]["example"], cases[2]["example"]]
    one, other = ([r["agreement"] for r in rows] for rows in found.values())
    assert one != other
    everyone = Part(0, 1, {"cases": part.payload["cases"][:1], "run": "run"}, {0: "it died"})
    work = pipeline_generate.make_levels(
        run.denoiser, run.data / "mine", folders(run.judge, 2), generate
    )
    assert work(everyone, tmp_path / "none.parquet") == 0


def test_an_image_steered_by_a_model_that_changed_since_is_not_generated_again(finished, tmp_path):
    config, run = finished
    moved = run_folder.RunDir(shutil.copytree(run.root, tmp_path / "run"))
    steered = config.model_copy(
        update={"generate": config.generate.model_copy(update={"classifier_guidance": 0.5})}
    )
    recipe = moved.round(1, "synthetic") / step_folder.RECIPE
    saved = files.read_json(recipe)
    files.write_json(recipe, saved | {"inputs": saved["inputs"] | {"target": "another"}})
    asked = tables.read(moved.round(1, "requests"))["request_id"][0].as_py()
    with pytest.raises(UserError, match="was generated by another `target` model"):
        regenerate.regenerate(steered, moved, asked, tmp_path)


def test_a_weak_denoiser_that_does_not_fit_is_refused(finished, tmp_path):
    config, run = finished
    generate = config.generate.model_copy(update={"weak": str(tmp_path)})
    with pytest.raises(UserError):
        pipeline_generate.make_work(run.denoiser, run.data / "mine", None, generate)


def test_a_lesion_that_fills_the_picture_leaves_no_skin_to_generate():
    from adversa.diffuse.strategy import Sources
    from adversa.types import GenerationRequest

    given = Sources(
        outside={"full": np.zeros((8, 8), np.float32), "small": np.eye(8, dtype=np.float32)}
    )

    def asked(strategy, example):
        return pipeline_generate.cannot_generate(
            GenerationRequest("r", 1, "guided", strategy, 0, example, 4.0, 1.0, 0), given
        )

    assert "no skin to generate" in asked("outpaint", "full") and "no skin to generate" in asked(
        "inout", "full"
    )
    assert asked("outpaint", "small") is None and asked("inpaint", "full") is None


def test_masks_are_grown_and_feathered_inside_what_is_generated(finished):
    _, run = finished
    pictures = Pictures(run.data / "mine")
    ids = tables.read(run.data / "mine", ["id"])["id"].to_pylist()[:6]
    tight_in, tight_out = pictures.masks(ids, 0.0, 0.0)
    inside, outside = pictures.masks(ids, 0.1, 0.1)
    for i in ids:
        assert (
            inside[i].shape == (32, 32)
            and inside[i].dtype == np.float32
            and 0 <= inside[i].min() <= inside[i].max() <= 1
        )
        assert (inside[i] > 0).sum() > (tight_in[i] > 0).sum() and (outside[i] > 0).sum() < (
            tight_out[i] > 0
        ).sum()
        assert not (
            (inside[i] > 0) & (outside[i] > 0)
        ).any()  # a pixel is generated by one of the two
        assert ((inside[i] > 0) & (inside[i] < 1)).any() and set(np.unique(tight_in[i])) <= {
            0.0,
            1.0,
        }
