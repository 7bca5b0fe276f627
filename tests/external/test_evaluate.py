"""A finished run on an external cohort: the figures by hand, labels in other words, what is left
out, what is refused.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from adversa import config as cfg
from adversa.classify.score import make_scorer
from adversa.common.statistics import softmax
from adversa.data import images, phantom
from adversa.engine.local import LocalEngine
from adversa.evaluate.bootstrap import intervals
from adversa.external import cohort, predict, prepare, report
from adversa.external import evaluate as external_evaluate
from adversa.external import labels as external_labels
from adversa.external.cohort import ExternalCohort
from adversa.pipeline import evaluate
from adversa.run import folder as run_folder
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import predictions, tables
from adversa.types import UserError, seed_of

IMAGES = 70


@pytest.fixture(scope="session")
def two_seeds(finished, tmp_path_factory):
    """The finished run as one of two seeds, with a named group; the second seed's classifiers are
    other arms' first.
    """
    config, run = finished
    copy = RunDir(shutil.copytree(run.root, tmp_path_factory.mktemp("two") / "run"))
    tree = config.model_dump(mode="json")
    tree["evaluate"] |= {
        "seeds": 2,
        "groups": {"malignant": ["melanoma", "carcinoma"], "melanoma": ["melanoma"]},
    }
    copy.config.write_text(yaml.safe_dump(tree))
    arms = config.mix.arms
    for i, arm in enumerate(arms):
        shutil.copytree(copy.arm(1, arms[i - 1], 0), copy.arm(1, arm, 1))
    shutil.copytree(copy.arm(1, "guided", 0), copy.arm(0, "real", 1))
    config = cfg.load(copy.config)
    evaluate.score(
        LocalEngine(1, 1),
        external_evaluate.models(config, copy),
        copy.data / "select",
        copy.data,
        False,
        copy.select,
    )
    return config, copy


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """(folder, rows of its CSV): phantoms that the run has not seen, of patients with two lesions
    each.
    """
    folder = tmp_path_factory.mktemp("clinic")
    return folder, drawn(folder, cfg.Phantom(images=IMAGES, seed=7))


def drawn(folder: Path, settings: cfg.Phantom) -> list[dict[str, str]]:
    rows = []
    for i, slot in enumerate(phantom.slots(settings)):
        picture = phantom.picture(i, settings, 64)[0]
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
        rows.append(
            {
                "path": f"{i:03d}.png",
                "label": slot.label,
                "group": f"l{slot.lesion}",
                "patient": f"p{slot.lesion // 2}",
            }
        )
    return rows


def written(folder: Path, rows: list[dict[str, str]], name: str = "set.csv") -> Path:
    with open(folder / name, "w", newline="") as f:
        lines = csv.DictWriter(f, list(rows[0]))
        lines.writeheader()
        lines.writerows(rows)
    return folder / name


@pytest.fixture
def ask(two_seeds, tmp_path):
    """Builds what `adversa evaluate RUN --on` asks; the run's own folder is not written to."""
    config, run = two_seeds
    here = RunDir(tmp_path / "run")
    here.root.mkdir()
    for path in run.root.iterdir():
        (here.root / path.name).symlink_to(path)

    def build(on, labels=None, classes=None, overrides=(), crop=None, name="clinic"):
        path = None
        if labels or classes:
            path = tmp_path / "map.yaml"
            path.write_text(yaml.safe_dump({"labels": labels or {}, "classes": classes or {}}))
        asked = cfg.load(here.config, list(overrides))
        translation = external_labels.read(path, run_folder.classes_of(here.data))
        data = cohort.section(asked, on, overrides, crop)
        return ExternalCohort(
            here, asked, data, translation, name, cohort.listing(data, translation)
        )

    return build


def results(asked, engine=None):
    external_evaluate.score(asked, engine or LocalEngine(1, 1))
    return report.write(asked)


class Idle(LocalEngine):
    def map_batches(self, make, parts, out, report, model=False):
        raise AssertionError(f"{out} is worked on again")


def by_hand(asked, arm, seed):
    """(softmax in the run's classes [N, K], labels, ids) of what was scored."""
    p = predictions.predictions(tables.read(asked.scores), arm, seed)
    return softmax(p.logits), p.labels, p.ids


def test_figures_are_those_of_the_predictions(ask, pictures):
    asked = ask(written(*pictures))
    found = results(asked)
    classes = run_folder.classes_of(asked.run.data)
    assert (
        found["classes"] == classes
        and found["images"]["scored"] == IMAGES
        and set(found["arms"]) == set(asked.config.mix.arms)
    )
    for arm, figures in found["arms"].items():
        each = [by_hand(asked, arm, s) for s in range(2)]
        balanced = [balanced_accuracy_score(y, p.argmax(1)) for p, y, _ in each]
        auroc = [np.mean([roc_auc_score(y == k, p[:, k]) for k in range(5)]) for p, y, _ in each]
        assert figures["balanced_accuracy"] == pytest.approx(np.mean(balanced))
        assert figures["auroc_macro"] == pytest.approx(np.mean(auroc))
        low, high = found["intervals"][arm]["balanced_accuracy"]
        assert low <= figures["balanced_accuracy"] <= high
    assert found["comparisons"][0]["difference"] == pytest.approx(
        found["arms"]["guided"]["balanced_accuracy"]
        - found["arms"][found["comparisons"][0]["b"]]["balanced_accuracy"]
    )
    text = (asked.folder / "report.md").read_text()
    assert (
        found["verdict_sentence"].split(":")[0] in text
        and "external (clinic)" in text
        and "own test" in text
    )


def test_logits_are_those_of_the_classifier_on_the_decoded_picture(ask, pictures):
    asked = ask(written(*pictures), crop="squash")
    external_evaluate.score(asked, LocalEngine(1, 1))
    wanted = {r.source: r for r in asked.outside.records[:5]}
    decode = images.make_decoder(asked.data, asked.translation.names)
    scorer = make_scorer(asked.run.arm(1, "guided", 1) / "classifier")
    names = dict(
        zip(*tables.read(asked.pictures, ["id", "source"]).to_pydict().values(), strict=True)
    )
    p = predictions.predictions(tables.read(asked.scores), "guided", 1)
    told = {names[i]: x for i, x in zip(p.ids, p.logits, strict=True)}
    for d in decode(list(wanted.values())):
        assert np.allclose(scorer(d.image[None])[0][0], told[d.record.source], atol=1e-6)


def test_predictions_are_the_mean_over_the_seeds_that_are_scored(ask, pictures, tmp_path):
    asked = ask(written(*pictures))
    external_evaluate.score(asked, LocalEngine(1, 1))
    models = [
        folder
        for arm, _, folder in external_evaluate.models(asked.config, asked.run)
        if arm == "replay"
    ]
    paths = [r.uri.removeprefix("file:") for r in asked.outside.records]
    found = predict.predict(
        LocalEngine(1, 1), models, asked.data, paths, tmp_path / "parts", "fail", lambda _: None
    )
    source = dict(
        zip(*tables.read(asked.pictures, ["id", "source"]).to_pydict().values(), strict=True)
    )
    (a, _, ids), (b, _, _) = (by_hand(asked, "replay", s) for s in range(2))
    place = {Path(p).name: i for i, p in enumerate(found.paths)}
    order = [place[source[i]] for i in ids]
    assert found.paths == paths and np.allclose(found.probability[order], (a + b) / 2, atol=1e-6)
    top = (a + b).argmax(1)
    assert (
        np.allclose(
            found.spread[order], np.abs(a - b)[np.arange(len(a)), top] / np.sqrt(2), atol=1e-6
        )
        and found.spread.max() > 0
    )


def test_thresholds_come_from_the_runs_select(ask, pictures):
    asked = ask(written(*pictures))
    found = results(asked)
    inside = [k for k, c in enumerate(found["classes"]) if c in ("melanoma", "carcinoma")]
    sensitivity = []
    for seed in range(2):
        chosen = predictions.predictions(tables.read(asked.run.select), "guided", seed)
        negatives = np.sort(
            softmax(chosen.logits)[:, inside].sum(1)[~np.isin(chosen.labels, inside)]
        )
        limit = negatives[int(np.ceil(0.8 * len(negatives))) - 1]
        p, y, _ = by_hand(asked, "guided", seed)
        sensitivity.append(np.mean(p[:, inside].sum(1)[np.isin(y, inside)] > limit))
    assert found["arms"]["guided"]["sensitivity@0.80/malignant"] == pytest.approx(
        np.mean(sensitivity)
    )


def test_merged_classes_add_their_probabilities(ask, pictures, tmp_path):
    folder, rows = pictures
    coarse = {
        "melanoma": "malignant",
        "carcinoma": "malignant",
        "nevus": "benign",
        "keratosis": "benign",
        "vascular": "benign",
    }
    asked = ask(
        written(folder, [r | {"label": coarse[r["label"]]} for r in rows], "coarse.csv"),
        classes=coarse,
    )
    found = results(asked)
    assert found["classes"] == ["malignant", "benign"]
    given = run_folder.classes_of(asked.run.data)
    for arm in found["arms"]:
        balanced, brier = [], []
        for seed in range(2):
            p, y, _ = by_hand(asked, arm, seed)
            bad = p[:, [given.index("melanoma"), given.index("carcinoma")]].sum(1)
            balanced.append(balanced_accuracy_score(y, (bad <= 0.5).astype(int)))
            brier.append(np.mean(2 * (bad - (y == 0)) ** 2))
        assert found["arms"][arm]["balanced_accuracy"] == pytest.approx(np.mean(balanced))
        assert found["arms"][arm]["brier"] == pytest.approx(np.mean(brier))
    # The group `malignant` is the merged class; `melanoma` cuts through it.
    assert (
        "sensitivity@0.80/malignant" in found["arms"]["real"]
        and "auroc/melanoma" not in found["arms"]["real"]
    )
    assert (
        any("melanoma cannot be told from the rest" in n for n in found["notes"])
        and not found["test"]
    )


def test_absent_classes_are_said_and_not_averaged(ask, pictures):
    folder, rows = pictures
    asked = ask(
        written(folder, [r for r in rows if r["label"] not in ("vascular", "carcinoma")], "few.csv")
    )
    found = results(asked)
    assert found["classes_absent"] == ["carcinoma", "vascular"]
    assert any("has no carcinoma, vascular" in n for n in found["notes"])
    assert not {"sensitivity/vascular", "sensitivity/carcinoma"} & set(found["arms"]["guided"])
    for arm in found["arms"]:
        each = []
        for seed in range(2):
            p, y, _ = by_hand(asked, arm, seed)
            each.append(np.mean([np.mean(p[y == k].argmax(1) == k) for k in np.unique(y)]))
        assert found["arms"][arm]["balanced_accuracy"] == pytest.approx(np.mean(each))
    assert (
        not found["test"]
        and "sensitivity, vascular" not in (asked.folder / "report.md").read_text()
    )


def test_labels_are_renamed_merged_and_left_out(ask, pictures):
    folder, rows = pictures
    words = {"nevus": "naevus", "melanoma": "MEL", "vascular": "scc"}
    told = [r | {"label": words.get(r["label"], r["label"])} for r in rows]
    told[0] |= {"label": "mole"}
    path = written(folder, told, "words.csv")
    labels = {"naevus": "nevus", "mole": "nevus", "MEL": "melanoma", "scc": None}
    asked = ask(path, labels=labels)
    found = results(asked)
    plain = {c: sum(r["label"] == c for r in rows[1:]) for c in found["classes"]}
    plain["nevus"] += 1
    omitted = plain["vascular"]
    assert found["images"]["by_class"] == plain | {"vascular": 0} and found["left_out"][
        "labels"
    ] == {"scc": omitted}
    assert any(f"{omitted} scc" in n for n in found["notes"])
    with pytest.raises(
        UserError,
        match=r"MEL \(\d+\), naevus \(\d+\), scc \(\d+\).*--labels-map FILE.*`MEL: CLASS`",
    ):
        ask(path, labels={"mole": "nevus"})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("labels: {naevus: nevos}", "nevos is no class; did you mean nevus?"),
        ("classes: {nevos: benign}", "nevos is no class of the run; did you mean nevus?"),
        ("classes: {nevus: null}", "cannot be kept from a class"),
        (
            "classes: {nevus: a, melanoma: a, keratosis: a, vascular: a, carcinoma: a}",
            "everything is merged into a",
        ),
        ("classes: {nevus: melanoma, melanoma: keratosis}", "give that another name"),
        ("melanoma: mel", "there is no section melanoma"),
        ("labels: [a, b]", "labels must hold lines"),
        ("labels: {a: [nevus, melanoma]}", "holds more than one name"),
        ("labels:\n  a: nevus\n  a: melanoma", "a is there twice"),
        ("labels: {a: ''}", "a is blank"),
        ("labels: {a: nevus", "is not valid YAML"),
        ("", "is empty; write lines"),
        ("# nothing yet\n", "is empty; write lines"),
        ("labels:\nclasses: {}\n", "is empty; write lines"),
    ],
)
def test_a_wrong_labels_map_is_one_line(two_seeds, tmp_path, text, match):
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=match):
        external_labels.read(path, run_folder.classes_of(two_seeds[1].data))


def test_a_labels_map_takes_words_as_they_are_written(two_seeds, tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("labels: {no: nevus, 1: melanoma, 'null': keratosis, none: ~}\nclasses:\n")
    found = external_labels.read(path, run_folder.classes_of(two_seeds[1].data))
    assert (
        dict(found.labels) == {"no": "nevus", "1": "melanoma", "null": "keratosis", "none": None}
        and not found.merges
    )


def test_patients_are_what_is_resampled(ask, pictures):
    """Patients of one class each, right or wrong together: far less to go by than as many
    images.
    """
    folder, rows = pictures
    patient = {r["path"]: f"{r['label']}-{i % 2}" for i, r in enumerate(rows)}
    found, logits, labels, whose = {}, None, None, None
    for unit in ("patient", "image"):
        told = [
            {"path": r["path"], "label": r["label"]}
            | ({"patient": patient[r["path"]]} if unit == "patient" else {})
            for r in rows
        ]
        asked = ask(written(folder, told, f"{unit}.csv"), name=unit)
        found[unit] = results(asked)
        source = dict(
            zip(*tables.read(asked.pictures, ["id", "source"]).to_pydict().values(), strict=True)
        )
        each = [predictions.predictions(tables.read(asked.scores), "real", s) for s in range(2)]
        logits, labels, whose = (
            np.stack([p.logits for p in each]),
            each[0].labels,
            [patient[source[i]] for i in each[0].ids],
        )
    assert (
        found["patient"]["clusters"] == {"by": "patient", "n": 10}
        and found["image"]["clusters"]["by"] == "image"
    )
    assert found["patient"]["arms"]["real"]["accuracy"] == pytest.approx(
        found["image"]["arms"]["real"]["accuracy"]
    )
    given = found["patient"]["classes"], 200, seed_of("bootstrap", "external")
    wanted = intervals(logits, labels, [f"patient {p}" for p in whose], *given)
    assert found["patient"]["intervals"]["real"]["accuracy"] == pytest.approx(wanted["accuracy"])
    low, high = intervals(logits[0], labels, whose, *given)["accuracy"]
    alone = intervals(logits[0], labels, [str(i) for i in range(len(labels))], *given)["accuracy"]
    assert high - low > 1.3 * (alone[1] - alone[0])
    assert any("neither patients nor lesions" in n for n in found["image"]["notes"])


def test_one_patient_says_nothing_of_others(ask, pictures):
    folder, rows = pictures
    found = results(ask(written(folder, [r | {"patient": "p"} for r in rows], "one.csv")))
    assert found["clusters"] == {"by": "patient", "n": 1} and not any(found["intervals"].values())
    assert (
        found["verdict"] == "not shown"
        and "[no interval] against replay (not shown)" in found["verdict_sentence"]
    )
    assert all(
        c["low"] is c["high"] is c["p"] is c["p_holm"] is c["detectable"] is None
        for c in found["comparisons"]
    )
    assert any(
        "are of one patient alone: one patient says nothing of others" in n for n in found["notes"]
    )
    text = (ask(folder / "one.csv").folder / "report.md").read_text()
    assert "70 images of 1 patient," in text and "1 patients" not in text and "-1.000" not in text
    row = next(line for line in text.splitlines() if line.startswith("| balanced accuracy |"))
    assert row.count(" (\u2013) ") == len(found["arms"]) + 1
    assert "| \u2013 | \u2013 | \u2013 |" in next(
        line for line in text.splitlines() if line.startswith("| guided - replay |")
    )


def test_a_class_of_one_patient_has_no_interval_and_others_have(ask, pictures):
    folder, rows = pictures
    told = [r | {"patient": "only" if r["label"] == "vascular" else r["patient"]} for r in rows]
    found = results(ask(written(folder, told, "few.csv")))
    ranges = found["intervals"]["guided"]
    assert (
        not {"balanced_accuracy", "worst_class", "auroc_macro", "sensitivity/vascular"}
        & ranges.keys()
    )
    assert {
        "accuracy",
        "brier",
        "ece",
        "sensitivity/nevus",
        "specificity/vascular",
        "auroc/malignant",
    } <= ranges.keys()
    assert "sensitivity@0.80/melanoma" in ranges and found["comparisons"][0]["low"] is None
    assert any(n.startswith("vascular is of one patient alone") for n in found["notes"])


def test_lesions_where_no_patient_is_named(ask, pictures):
    folder, rows = pictures
    found = results(
        ask(
            written(
                folder, [{k: r[k] for k in ("path", "label", "group")} for r in rows], "lesions.csv"
            )
        )
    )
    assert found["clusters"]["by"] == "lesion" and found["clusters"]["n"] <= len(
        {r["group"] for r in rows}
    )


def test_the_same_set_is_done_once_and_another_is_refused(ask, pictures, tmp_path):
    folder = Path(shutil.copytree(pictures[0], tmp_path / "own"))
    path = written(folder, pictures[1])
    first = results(ask(path))
    assert external_evaluate.is_scored(ask(path)) and results(ask(path), Idle(1, 1)) == first
    moved = Path(
        shutil.copytree(folder, tmp_path / "moved")
    )  # other times and another place: the same content
    for picture in moved.iterdir():
        picture.touch()
    assert results(ask(moved / "set.csv"), Idle(1, 1)) == first
    Image.new("RGB", (64, 64), "brown").save(folder / "000.png")
    with pytest.raises(
        UserError,
        match=r"pictures have changed, 70 pictures then, 70 now\); give this one its own --name",
    ):
        external_evaluate.check(ask(path))
    with pytest.raises(UserError, match="crop: center -> squash"):
        external_evaluate.check(ask(moved / "set.csv", crop="squash"))
    with pytest.raises(UserError, match="labels: none -> nevus: null"):
        external_evaluate.check(ask(moved / "set.csv", labels={"nevus": None}))
    assert results(ask(path, name="second"))["content"] != first["content"]


def test_a_cut_evaluation_goes_on_where_it_was(ask, pictures):
    path = written(*pictures)
    whole = results(ask(path, name="whole"))
    asked = ask(path)
    shutil.rmtree(asked.run.root / "external" / prepare.LOOKS)

    class Cut(LocalEngine):
        def map_batches(self, make, parts, out, report, model=False):
            first = len(tables.parts(out))
            super().map_batches(make, parts[: first + 1], out, report, model)
            if first == 0:
                raise KeyboardInterrupt
            return super().map_batches(make, parts, out, report, model)

    for _ in range(3):  # in the pictures, in those of the run, in the scores
        with pytest.raises(KeyboardInterrupt):
            external_evaluate.score(asked, Cut(1, 1))
    part = tables.parts(asked.scores)
    before = [p.stat().st_mtime_ns for p in part]
    assert (
        len(part) == 1 and external_evaluate.check(asked) and not external_evaluate.is_scored(asked)
    )
    assert results(asked)["arms"] == whole["arms"]
    assert [p.stat().st_mtime_ns for p in part] == before and len(tables.parts(asked.scores)) == 2


def test_pictures_the_run_has_seen_are_left_out(ask, two_seeds, pictures, tmp_path):
    """An exact copy, a mirrored smaller one, another picture of such a lesion; one of the role
    `test` stays.
    """
    config, run = two_seeds
    folder = Path(shutil.copytree(pictures[0], tmp_path / "own"))
    rows = list(pictures[1])
    role = {
        s: r
        for r in ("train", "select", "test")
        for s in tables.read(run.data / r, ["source"])["source"].to_pylist()
    }
    for kind, wanted in (("copy", "train"), ("mirrored", "select"), ("fair", "test")):
        number = next(int(s[8:13]) for s, r in sorted(role.items()) if r == wanted)
        picture = Image.fromarray(phantom.picture(number, config.data.phantom, 64)[0])
        if kind == "mirrored":
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((48, 48))
        picture.save(folder / f"{kind}.png")
        label = phantom.slots(config.data.phantom)[number].label
        rows.append({"path": f"{kind}.png", "label": label, "group": f"of {kind}", "patient": ""})
    rows[0] = rows[0] | {"group": "of mirrored", "patient": ""}
    asked = ask(written(folder, rows))
    found = results(asked)
    assert found["left_out"]["known"] == {"same pixels": 1, "look-alike": 1, "same lesion": 1}
    left = {
        k["source"]: k["why"]
        for k in json.loads((asked.pictures / prepare.LEFT_OUT).read_text())["known"]
    }
    assert left == {
        "copy.png": "same pixels",
        "mirrored.png": "look-alike",
        "000.png": "same lesion",
    }
    assert (
        found["images"]["scored"] == IMAGES
        and "fair.png" in tables.read(asked.pictures, ["source"])["source"].to_pylist()
    )
    assert any("3 images (1 same pixels, 1 look-alike, 1 same lesion)" in n for n in found["notes"])


def test_damaged_pictures_fail_or_are_counted(ask, pictures, tmp_path):
    folder = Path(shutil.copytree(pictures[0], tmp_path / "own"))
    path = written(folder, pictures[1])
    (folder / "003.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="003.png: not a picture"):
        external_evaluate.score(ask(path), LocalEngine(1, 1))
    found = results(
        ask(path, overrides=["data.on_error=skip"])
    )  # under the same name: nothing was made of it
    assert found["left_out"]["problems"] == 1 and found["images"]["scored"] == IMAGES - 1
    assert any("unreadable or at odds: 1" in n for n in found["notes"])


def test_a_folder_of_classes_and_its_look_alikes(ask, pictures, tmp_path):
    folder, rows = pictures
    for r in rows:
        (tmp_path / "tree" / r["label"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / r["path"], tmp_path / "tree" / r["label"])
    Image.open(folder / "000.png").resize((56, 56)).save(
        tmp_path / "tree" / rows[0]["label"] / "smaller.png"
    )
    shutil.copy(folder / "001.png", tmp_path / "tree" / rows[1]["label"] / "again.png")
    found = results(ask(tmp_path / "tree"))
    assert (
        found["clusters"] == {"by": "image", "n": IMAGES}
        and found["images"]["scored"] == IMAGES + 1
    )
    assert found["left_out"]["copies"] == 1


def test_a_set_laid_out_as_ham10000_with_lesions_known_to_be_one(ask, pictures, tmp_path):
    folder, rows = pictures
    (tmp_path / "ham/images").mkdir(parents=True)
    for r in rows:
        shutil.copy(folder / r["path"], tmp_path / "ham/images")
    table = [
        {"image_id": r["path"][:-4], "lesion_id": f"L{i}", "dx": r["label"]}
        for i, r in enumerate(rows)
    ]
    written(tmp_path / "ham", table, "HAM10000_metadata.csv")
    pairs = [{"lesion_a": "L0", "lesion_b": "L1"}, {"lesion_a": "L1", "lesion_b": "L2"}]
    written(tmp_path / "ham", pairs, "duplicate_lesion_pairs.csv")
    assert results(ask(tmp_path / "ham"))["clusters"] == {"by": "lesion", "n": IMAGES - 2}


def test_columns_go_by_what_is_set_then_the_runs_then_the_usual_names(two_seeds, tmp_path):
    config = two_seeds[0]
    path = tmp_path / "set.csv"
    path.write_text("file,dx,group,person\n")
    for overrides, wanted in (
        ((), ("path", "label", "group", None)),
        (("data.columns.path=file", "data.columns.label=dx"), ("file", "dx", "group", None)),
        (
            ("data.columns.patient=person", "data.columns.group=null"),
            ("path", "label", None, "person"),
        ),
    ):
        asked = cfg.load(two_seeds[1].config, list(overrides))
        found = cohort.section(asked, path, overrides, None).columns
        assert (found.path, found.label, found.group, found.patient) == wanted
    path.write_text("path,label,patient\n")
    assert cohort.section(config, path, (), None).columns.patient == "patient"


def test_a_run_that_is_not_finished_is_refused(two_seeds, tmp_path):
    config, run = two_seeds
    copy = RunDir(shutil.copytree(run.root, tmp_path / "run"))
    (copy.arm(1, "guided", 1) / "classifier" / step_folder.MANIFEST).unlink()
    with pytest.raises(
        UserError,
        match="not finished .round-001/guided/seed-1/classifier is missing.; finish it with: "
        "adversa loop",
    ):
        external_evaluate.models(config, copy)


def test_the_reports_words_are_harmless_in_markdown(ask, pictures):
    """Whatever a set's author wrote is text: names of classes, values of attributes, paths,
    notes.
    """
    hostile = "a|b<img src=x>\n[x](y) `z`"
    asked = ask(written(*pictures))
    found = results(asked)
    group = {
        "value": hostile,
        "n": 1,
        "lesions": 1,
        "small": True,
        "value_of": None,
        "interval": None,
    }
    text = report.markdown_of(
        found
        | {
            "run": hostile,
            "set": hostile,
            "path": hostile,
            "notes": [hostile],
            "subgroups": {hostile: {hostile: [group]}},
        }
    )
    shown = r"a\|b\<img src=x\> \[x\](y) \`z\`"
    assert (
        text.startswith(f"# {shown} on {shown}\n")
        and f"\n- {shown}\n" in text
        and f"- set: {shown}, content" in text
    )
    assert f"## By {shown}\n" in text and f"| {shown} (few: not tested) | 1 | 1 | \u2013 |" in text
    assert "<img" not in text.replace(r"\<img", "") and "`z`" not in text
