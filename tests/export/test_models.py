"""A run's classifiers as models: they load from their folder by the card's own code, and the card's
figures are the run's.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adversa.common import markdown
from adversa.export import model_card, models, run_card
from adversa.export import run as export_run
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.storage import files, tables
from adversa.types import GENERATED, UserError


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """(summary, run, folder) of the models of a finished run. Read only."""
    config, run = finished
    out = tmp_path_factory.mktemp("models") / "out"
    export_run.publish(export_run.plan(config, run, export_run.Selection("models")), out)
    return files.read_json(run.summary), run, out


def card_of(exported, arm):
    _, run, out = exported
    return out / models.model_name(run, arm) / "README.md"


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def text_of(finished, arm, **changes):
    """The card of an arm, of a summary.json with these keys changed."""
    config, run = finished
    metas = [
        {"sha256": "0", "best_step": 1, "select_balanced_accuracy": 0.5} | changes.pop("meta", {})
    ]
    own = files.read_json(run.arm(0, "real", 0) / "classifier/config.json")
    return model_card.text(
        "model", arm, [own | m for m in metas], files.read_json(run.summary) | changes, config, run
    )


def test_every_arm_has_a_model_and_every_seed_its_weights(finished, exported):
    config, run = finished
    _, _, out = exported
    assert {p.name for p in out.iterdir() if p.is_dir()} == {
        f"adversa-run-{arm}" for arm in config.mix.arms
    }
    for arm, folders in models.folders(config, run, None):
        assert len(folders) == config.evaluate.seeds
        for seed, folder in enumerate(folders):
            copy = out / f"adversa-run-{arm}" / f"seed-{seed}"
            assert {p.name for p in copy.iterdir()} == {"model.safetensors", "config.json"}
            assert (copy / "model.safetensors").read_bytes() == (
                folder / "model.safetensors"
            ).read_bytes()
            assert files.read_json(copy / "config.json") == files.read_json(folder / "config.json")
    # After the last round: the mined images have joined the arm `real`, so these are not its first
    # classifiers.
    first = (run.arm(0, "real", 0) / "classifier/model.safetensors").read_bytes()
    assert (out / "adversa-run-real/seed-0/model.safetensors").read_bytes() != first


def test_the_cards_code_gives_the_runs_logits(exported, tmp_path, monkeypatch):
    """Both blocks, as they stand, on a picture of test: adversa's to the bit, timm's but for
    bf16.
    """
    _, run, _ = exported
    place = shutil.copytree(card_of(exported, "guided").parent, tmp_path / "model")
    example = tables.read(run.data / "test", ["id", "image"]).to_pylist()[3]
    (place / "picture.png").write_bytes(example["image"])
    monkeypatch.chdir(place)
    rows = {
        r["id"]: r["logits"]
        for r in tables.read(run.test).to_pylist()
        if (r["arm"], r["seed"]) == ("guided", 0)
    }
    with_adversa, with_timm, *more = blocks((place / "README.md").read_text())
    assert not more
    found: dict = {}
    exec(with_adversa, found)
    assert np.array_equal(found["logits"][0], np.asarray(rows[example["id"]], np.float32))
    exec(with_timm, alone := {})
    assert np.allclose(alone["logits"][0].numpy(), rows[example["id"]], atol=0.05)
    from adversa.classify.model import load, to_pixels

    pixels = to_pixels(np.asarray(Image.open("picture.png"))[None])
    assert np.allclose(
        alone["logits"].numpy(), load(Path("seed-0"))[0](pixels)[0].detach().numpy(), atol=1e-4
    )


def test_the_card_of_a_resized_model_loads_too(finished, tmp_path, monkeypatch):
    """input_size and depthwise kernels: what the first block's model has not."""
    from adversa.classify import model
    from adversa.config import Classifier
    from adversa.storage.weights import save_model

    asked = Classifier(model="mobilenetv3_small_050", model_args={}, input_size=64, views=2)
    network = model.build(asked, 3, 32)
    meta = {"config": asked.model_dump(mode="json"), "num_classes": 3, "resolution": 32}
    save_model(tmp_path / "seed-0", network.state_dict(), meta)
    meta = json.loads((tmp_path / "seed-0/config.json").read_text())
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    first, second = blocks(text_of(finished, "real", meta=meta, classes=["a", "b", "c"]))
    exec(first, {})
    exec(second, alone := {})
    expected = network.eval()(model.to_pixels(pixels[None]))[0].detach().numpy()
    assert np.allclose(alone["logits"].numpy(), expected, atol=1e-4) and np.ptp(expected) > 1e-4


def test_the_figures_are_those_of_the_run(exported):
    from huggingface_hub import ModelCard

    summary, _, _ = exported
    for arm, roles in summary["arms"].items():
        data = ModelCard.load(card_of(exported, arm)).data
        assert (
            data.model_name == f"adversa-run-{arm}"
            and data.license == "other"
            and data.library_name == "adversa"
        )
        found = {r.metric_name: r for r in data.eval_results}
        assert {k: r.metric_value for k, r in found.items()} == roles["test"], (
            "the same metrics, the same numbers"
        )
        for metric, ends in summary["intervals"][arm]["test"].items():
            assert [found[metric].metric_args[k] for k in ("low", "high")] == ends
        one = found["balanced_accuracy"]
        assert (
            one.dataset_args["split_hash"] == summary["split_hash"] and one.dataset_split == "test"
        )
        assert (
            one.task_type == "image-classification"
            and found["sensitivity/melanoma"].metric_type == "sensitivity"
        )


def test_the_card_says_what_a_person_must_know(exported, finished):
    summary, run, _ = exported
    config, _ = finished
    for arm in config.mix.arms:
        text = card_of(exported, arm).read_text()
        for word in (
            "Not a medical device",
            "Out of scope: diagnosis",
            markdown.text(summary["verdict_sentence"]),
            summary["split_hash"],
            f"first opened {summary['test_opened']}",
            summary["run_id"],
            f"| torch | {summary['versions']['torch']} |",
            "Fill in",
            model_card.ARM_WORDS[arm],
            "phantoms",
            "| mine | where hard cases are found |",
        ):
            assert word in text, (arm, word)
        for note in summary["notes"]:
            assert f"{markdown.text(note[1:])}." in text
        for c in summary["comparisons"]:
            assert (
                f"| {c['a']} | {c['b']} | {c['difference']:+.3f} | {c['low']:+.3f} to "
                f"{c['high']:+.3f} |" in text
            )
        split = files.read_json(run.data / "split.json")
        assert f"| {sum(split['images']['test'].values())} | {split['groups']['test']} |" in text
        assert (f"{summary['used'][arm]} synthetic images" in text) == (arm in GENERATED)
        assert (step_folder.fingerprint(run.denoiser) in text) == (arm in GENERATED)
        assert str(run.root) not in text and str(Path.home()) not in text


def test_subgroups_are_shown_and_small_ones_set_apart(finished):
    big = {
        "value": "f",
        "n": 40,
        "lesions": 31,
        "small": False,
        "value_of": 0.75,
        "interval": [0.5, 1.0],
    }
    little = {"value": "m", "n": 4, "lesions": 3, "small": True, "value_of": 0.25, "interval": None}
    told = {"sex": {"guided": [big, little], "before": [big | {"value_of": 0.5}]}}
    text = text_of(finished, "guided", subgroups=told)
    assert "| sex | f | 40 | 31 | 0.750, 0.500 to 1.000 | 0.500, 0.500 to 1.000 |" in text
    assert "| sex | m | 4 | 3 | (0.250) | \u2013 |" in text
    assert "Not computed for this arm" in text_of(finished, "replay", subgroups=told)


def test_what_is_no_number_stays_out_of_the_metadata(exported, finished):
    summary, _, _ = exported
    arms = {"real": {"test": {"accuracy": 0.5, "auroc_macro": float("nan")}}}
    told = summary | {
        "arms": arms,
        "intervals": {"real": {"test": {"accuracy": [0.1, float("nan")]}}},
    }
    (one,) = model_card.results("real", told, finished[0])
    assert (one.metric_name, one.metric_args) == ("accuracy", None)


def test_a_second_opening_is_said_in_the_card(finished):
    assert text_of(finished, "real", test_openings=2).count("**2 times in all**") == 2
    assert "times in all" not in text_of(finished, "real")


def test_hostile_names_are_text_in_the_card(finished):
    hostile = "x|<img src=y> [z](w) ```\n# q"
    text = text_of(
        finished,
        "real",
        run=hostile,
        verdict_sentence=hostile,
        notes=[hostile],
        classes=[hostile, "b", "c"],
    )
    body = text.partition("\n---\n")[2]
    shown = r"x\|\<img src=y\> \[z\](w) \`\`\` \# q"
    assert (
        shown in body
        and f"| run | {shown} (" in body
        and "<img" not in body.replace(r"\<img", "").replace(repr(hostile), "")
    )
    assert f"CLASSES = {[hostile, 'b', 'c']!r}\n" in body and len(blocks(text)) == 2


def test_no_place_of_this_machine_is_handed_on(finished, tmp_path, tiny, relist):
    config, run = finished
    moved = run_folder.RunDir(shutil.copytree(run.root, tmp_path / "my run"))
    for folder in moved.root.glob("round-*/*/seed-*/classifier"):
        meta = files.read_json(folder / "config.json")
        meta["config"]["weights"] = "/secret/place/imagenet.safetensors"
        files.write_json(folder / "config.json", meta)
        relist(folder)
    elsewhere = tiny(
        data={"source": "folder", "path": "/secret/place/moles"},
        denoiser={"weights": "/secret/place/den"},
    )
    result = export_run.publish(
        export_run.plan(elsewhere, moved, export_run.Selection()), tmp_path / "out"
    )
    assert result.models == [f"adversa-my-run-{arm}" for arm in elsewhere.mix.arms]
    texts = [
        p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix in (".md", ".json", ".csv")
    ]
    assert len(texts) > 10 and not [t for t in texts if "/secret" in t or str(tmp_path) in t]
    assert any("folder (moles)" in t for t in texts) and any(
        "imagenet.safetensors" in t for t in texts
    )
    from adversa.classify.model import load

    load(tmp_path / "out/models/adversa-my-run-guided/seed-0")
    assert [
        run_card.place(p)
        for p in ("imagenet", "owner/name", "/a/b/c", "../w/x.safetensors", str(tmp_path))
    ] == [
        "imagenet",
        "owner/name",
        "c",
        "x.safetensors",
        tmp_path.name,
    ]


def test_again_writes_nothing_and_a_torn_model_is_fixed(finished, tmp_path):
    config, run = finished
    chosen, out = (
        export_run.plan(config, run, export_run.Selection("models", arm="guided")),
        tmp_path / "out",
    )
    first = export_run.publish(chosen, out)
    place = out / "adversa-run-guided"
    assert (
        first.models == ["adversa-run-guided"]
        and first.images is None
        and first.written == 2 * config.evaluate.seeds + 2
    )
    assert export_run.publish(chosen, out).written == 0
    whole = (place / "seed-0/model.safetensors").read_bytes()
    (place / "seed-0/model.safetensors").write_bytes(whole[:100])
    (place / "seed-0/.model.safetensors.123").write_bytes(b"of a killed process")
    (place / "README.md").write_text("the licence is mine")
    assert export_run.publish(chosen, out).written == 1
    assert (place / "seed-0/model.safetensors").read_bytes() == whole
    assert (place / "README.md").read_text() == "the licence is mine" and not list(
        place.rglob(".model*")
    )
    with pytest.raises(UserError, match="holds another export .*models.replay: absent"):
        export_run.publish(
            export_run.plan(config, run, export_run.Selection("models", arm="replay")), out
        )


def test_images_and_models_of_a_real_run_lie_side_by_side(finished, tmp_path):
    config, run = finished
    result = export_run.publish(
        export_run.plan(config, run, export_run.Selection()), tmp_path / "out"
    )
    rows = {
        v["request_id"]: v for v in tables.read(run.round(1, "verdicts")).to_pylist() if v["keep"]
    }
    pictures = {p.stem: p for p in (tmp_path / "out/images").glob("*/*.png")}
    assert pictures.keys() == rows.keys() and result.images == len(rows)
    classes = run_folder.classes_of(run.data)
    assert all(p.parent.name == classes[rows[i]["label"]] for i, p in pictures.items())
    assert {p.name for p in (tmp_path / "out/models").iterdir()} == set(result.models)
    assert run_folder.split_hash(run.data) in (tmp_path / "out/images/README.md").read_text()


def test_an_arm_without_images_is_a_model_alone(finished, tmp_path):
    config, run = finished
    result = export_run.publish(
        export_run.plan(config, run, export_run.Selection(arm="replay")), tmp_path / "out"
    )
    assert (result.images, result.models) == (None, ["adversa-run-replay"])
    assert (tmp_path / "out/adversa-run-replay/README.md").exists() and not (
        tmp_path / "out/images"
    ).exists()
