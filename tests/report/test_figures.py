"""The numbers behind the figures, held to counts made by hand."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adversa.report import curation, evidence, page, plots, predictions
from adversa.report.gather import Facts, read_facts, score
from adversa.report.unshown import unshown
from adversa.storage import tables
from adversa.types import BEFORE


@pytest.fixture(scope="module")
def facts(finished: Path) -> Facts:
    return read_facts(finished)


def test_confusions_are_means_over_seeds(facts: Facts) -> None:
    """4 images a class; `real` reads every fourth image, from 0 with seed 0 and from 1 with seed 1,
    as the next class.
    """
    found = predictions.confusions(facts, predictions.of_test(facts))
    assert found is not None and found.after is not None and found.change is not None
    wrong = (
        np.array(
            [
                [[(i % 4 == s) and (i % 3 == c) for i in range(12)] for c in range(3)]
                for s in range(2)
            ]
        ).sum((0, 2))
        / 2
    )
    for c in range(3):
        row = found.before[c]
        assert (
            row[c].count == 4 - wrong[c]
            and row[(c + 1) % 3].count == wrong[c]
            and row[(c + 2) % 3].count == 0
        )
        assert row[c].share == row[c].tint == row[c].count / 4
        for after, change, before in zip(found.after[c], found.change[c], row, strict=True):
            assert change.count == after.count - before.count and change.share == pytest.approx(
                after.share - before.share
            )
    tints = [cell.tint for row in found.change for cell in row]
    assert max(map(abs, tints)) == 1 and found.reach == max(
        abs(cell.share or 0) for row in found.change for cell in row
    )
    assert (found.images, found.seeds) == ([4, 4, 4], 2)


def test_a_class_without_an_image_has_no_share() -> None:
    said = predictions.Said(np.array([[[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]]), np.array([0, 0]))
    fake = dataclasses.make_dataclass("F", ["classes", "after"])(["a", "b", "c"], "guided")
    found = predictions.confusions(fake, {BEFORE: said, "guided": said})
    assert found is not None and [c.share for c in found.before[0]] == [0.5, 0.5, 0.0]
    assert [(c.share, c.tint) for c in found.before[1]] == [(None, 0.0)] * 3
    assert found.reach == 0 and all(c.tint == 0 for row in found.change or () for c in row)


def test_calibration_is_that_of_the_predictions(facts: Facts) -> None:
    said = predictions.of_test(facts)
    found = predictions.calibrations(facts, said)
    assert list(found) == [BEFORE, "guided"]
    c = found[BEFORE]
    assert sum(b.n for b in c.bins) == 12 and c.seeds == 2  # a mean over seeds
    assert (c.ece.value, c.ece.low) == (
        0.05,
        pytest.approx(0.01),
    )  # the run's own figure, with its interval
    probability = np.exp(said[BEFORE].logits) / np.exp(said[BEFORE].logits).sum(2, keepdims=True)
    right = (said[BEFORE].logits.argmax(2) == said[BEFORE].labels).mean()
    assert right == 0.75 and c.surplus == pytest.approx(probability.max(2).mean() - right)
    text = predictions.calibration_sentences(found, predictions.titles(facts))[0]
    assert text.startswith("Baseline: ECE 0.050 (0.010 to 0.090), Brier 0.400 (0.360 to 0.440); ")
    assert text.endswith("on average 0.8 points too sure of its answers.")


def test_points_lie_where_they_belong() -> None:
    bins = [
        predictions.ReliabilityBin(0.0, 0.5, 0, None, None),
        predictions.ReliabilityBin(0.5, 1.0, 8, 0.75, 0.25),
    ]
    upper, lower = plots.reliability(bins).axes
    (points,) = upper.collections
    assert points.get_offsets().tolist() == [[0.75, 0.25]]
    diagonal, line = upper.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]] and line.get_xydata().tolist() == [
        [0.75, 0.25]
    ]
    assert [bar.get_height() for bar in lower.patches] == [0, 8]
    assert lower.patches[1].get_x() == pytest.approx(0.502) and lower.patches[
        1
    ].get_width() == pytest.approx(0.496)
    assert upper.get_xlim() == (0, 1) and lower.get_ylim()[1] >= 8


def test_bins_without_an_image_are_drawn() -> None:
    upper, lower = plots.reliability([predictions.ReliabilityBin(0.0, 1.0, 0, None, None)]).axes
    assert not len(upper.collections[0].get_offsets()) and [
        bar.get_height() for bar in lower.patches
    ] == [0]


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (0.45, 0.9), (0.913, 0.9131), (-3.0, 250.0), (0.5, 0.5), (0.0, 0.0)],
)
def test_the_axis_encloses_what_is_shown(low: float, high: float) -> None:
    (ax,) = plots.curves([(0.0, low, low), (1.0, high, high)]).axes
    left, right = ax.get_xlim()
    assert left <= low <= high <= right and left < right
    assert 2 <= sum(left <= t <= right for t in ax.get_xticks()) <= 8
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[low, 0.0], [high, 1.0]]] * 2


def test_figures_are_small_and_fetch_nothing(facts: Facts) -> None:
    """And have the same bytes again: neither a date nor a random id is in them."""
    calibration = predictions.calibrations(facts, predictions.of_test(facts))[BEFORE]
    curve = curation.memories(facts, 1)["unguided"].curve
    for draw, given in ((plots.reliability, calibration.bins), (plots.curves, curve)):
        found = plots.svg(draw(given))
        assert plots.svg(draw(given)) == found and len(found) < 60_000
        text = found.decode()
        assert (
            not re.search(r'(?:href|src)="(?!#)', text)
            and not re.search(r"url\((?!#)", text)
            and "<dc:date>" not in text
        )


def test_memorisation_in_words(facts: Facts) -> None:
    assert list(curation.memories(facts, 1)) == ["unguided"]  # null: not measured
    m = curation.memories(facts, 1)["unguided"]
    assert (m.nearer, m.held_out, len(m.curve)) == (0.52, 40, 21)
    assert (
        "lie no nearer to real images than held-out ones do: there is no sign of copying."
        in curation.memory_sentence("unguided", m, ["sample"])
    )
    near, far = (dataclasses.replace(m, nearer=x) for x in (0.9, 0.1))
    assert "may repeat what the denoiser was trained on" in curation.memory_sentence(
        "unguided", near, ["sample"]
    )
    assert "generated from a real one must" in curation.memory_sentence(
        "guided", near, ["sample", "img2img"]
    )
    assert "lie farther from real images" in curation.memory_sentence("unguided", far, ["sample"])


def test_groups_compared_say_what_was_not_tested(facts: Facts) -> None:
    female, few, empty = evidence.within(facts.summary["subgroup_comparisons"])["sex"]
    assert (female.difference, female.low, female.p_holm, female.word) == (
        0.1,
        0.02,
        0.012,
        "better",
    )
    assert (
        few.small
        and few.difference is None
        and few.word == "too few to test"
        and empty.word == "no value"
    )
    assert evidence.within({}) == {}


def test_the_budget_is_set_against_the_errors(facts: Facts) -> None:
    """Of the 40 images of mine every fourth is wrong: 0, 4, ... 36, which are of the classes 0, 1,
    2 by turns.
    """
    rows = curation.budget(facts, 1)
    assert [(b.images, b.errors) for b in rows] == [(14, 4), (13, 3), (13, 3)]
    assert [b.taken for b in rows] == [10, 10, 10] and sum(b.near for b in rows) == 8
    assert [b.generated for b in rows] == [100, 100, 100] and all(0 < b.kept < 100 for b in rows)


def test_the_groups_of_classes(facts: Facts) -> None:
    rows = evidence.groups(facts)["malignant"]
    assert [name for name, _ in rows] == [
        "AUROC",
        "partial AUC above sensitivity 0.80, of the 0.20 possible",
        "sensitivity at specificity 0.90",
        "specificity reached there (0.90 was set on select)",
    ]
    assert rows[2][1]["guided"] == score(facts, "guided", "test", "sensitivity@0.90/malignant")
    assert rows[2][1]["guided"].low == pytest.approx(0.66)


def test_what_was_not_shown(facts: Facts, finished: Path) -> None:
    told = unshown(facts, evidence.comparisons(facts.summary["comparisons"]), facts.rounds)
    assert told.comparisons == [
        "guided minus unguided: +0.035 (\u22120.012 to +0.081), balanced accuracy, test. "
        "With 2 seeds and 158 lesions an effect of "
        "0.066 is found 4 times in 5; a smaller one may be there. An effect of 0.02 would "
        "take 31 seeds."
    ]
    assert [a.partition(":")[0] for a in told.arms] == ["resample", "replay"]
    assert (
        list(told.small) == ["sex"]
        and told.small["sex"].endswith("(7)")
        and "female" not in told.small["sex"]
    )
    assert "age" in told.unknown and "sex" not in told.unknown
    assert told.checks == [
        "images that are trivial to the verifier",
        "distance to the real images, second feature space",
        "near copies in features",
    ]
    text = page.write(finished).with_suffix(".html").read_text()
    assert (
        text.index('id="unshown"')
        > text.index('id="origin"')
        > text.index('id="calibration"')
        > text.index('id="gallery"')
    )


def test_twenty_thousand_verdicts_take_seconds(make_run: Callable[..., Path]) -> None:
    run = make_run(cases=2, per_case=1)
    folder = run / "round-001"
    for name, schema, key in (
        ("verdicts", tables.VERDICTS, "request_id"),
        ("requests", tables.REQUESTS, "request_id"),
    ):
        rows = tables.read(folder / name, schema=schema).take(pa.array(np.arange(20_000) % 4))
        ids = pa.array([f"{i:020d}" for i in range(20_000)])
        tables.write_part(
            folder / name / tables.part_name(9),
            rows.set_column(rows.schema.get_field_index(key), key, ids),
        )
    started = time.process_time()
    path = page.write(run)
    assert time.process_time() - started < 10
    assert path.stat().st_size < 3_000_000
    assert (
        sum(
            line.generated
            for a in curation.accepted(read_facts(run)).values()
            for line in a.lines
            if not line.strategy
        )
        == 20_004
    )


def test_pictures_of_test_are_not_opened(make_run: Callable[..., Path]) -> None:
    run = make_run(cases=4, per_case=6)
    for part in tables.parts(run / "data/test"):
        rows = [row | {"image": b"not a picture"} for row in pq.read_table(part).to_pylist()]
        tables.write_part(part, pa.Table.from_pylist(rows, schema=tables.EXAMPLES))
    assert "an image of test" in page.write(run).read_text()


def test_a_second_opening_is_said_at_the_very_top(make_run: Callable[..., Path]) -> None:
    run = make_run(cases=1, per_case=1)
    mark = "Test was opened 3 times."
    assert mark not in page.write(run).read_text()
    summary = json.loads((run / "summary.json").read_text()) | {"test_openings": 3}
    (run / "summary.json").write_text(json.dumps(summary))
    text = page.write(run).read_text()
    assert 0 < text.index(mark) < text.index("<h1>") and "no longer a first look" in text
    assert (
        "**Test was opened 3 times. The figures on it are no longer a first look.**"
        in (run / "report.md").read_text()
    )


def test_the_samples_of_the_denoiser_where_they_were_judged(make_run: Callable[..., Path]) -> None:
    run = make_run(cases=1, per_case=1)
    row = {
        "kid": 0.0123,
        "kid_std": 0.001,
        "precision": 0.5,
        "recall": 0.25,
        "density": 0.75,
        "coverage": 0.625,
    }
    found = {
        "images": {"sample": 2000, "real": 300, "train": 900},
        "guidance": 1.0,
        "held_out": ["mine", "select"],
        "features": "a|model",
        "not_finite": 0,
        "samples": row | {"classes": {"nevus": row | {"real": 200, "fake": 900}}},
        "train": row,
        "grid": "grid.png",
    }
    (run / "quality.json").write_text(json.dumps(found))
    (run / "grid.png").write_bytes(tables.encode_png(np.zeros((64, 64, 3), np.uint8)))
    html, text = page.write(run).read_text(), (run / "report.md").read_text()
    assert (
        "12.30<small>\u00b1 1.00</small>" in html
        and "Samples of the denoiser, a row for each class" in html
    )
    assert (
        "| samples | 2,000 | 12.30 \u00b1 1.00 | 0.500 | 0.250 |" in text
        and "| nevus (200 real images) | 900 |" in text
    )
    assert "the features of a\\|model" in text


def test_a_set_from_elsewhere_is_named(make_run: Callable[..., Path]) -> None:
    run = make_run(cases=1, per_case=1)
    assert "no external cohort was scored" in page.write(run).read_text()
    (run / "external/clinic").mkdir(parents=True)
    (run / "external/clinic/summary.json").write_text(
        json.dumps({"verdict": "worse", "verdict_sentence": "Worse: by <b>much</b>."})
    )
    html = page.write(run).read_text()
    assert (
        "<bdi>clinic</bdi>: Worse: by &lt;b&gt;much&lt;/b&gt;." in html
        and "no external cohort" not in html
    )
    assert "- clinic: Worse: by \\<b\\>much\\</b\\>." in (run / "report.md").read_text()


@pytest.mark.parametrize(
    ("seeds", "needed", "told", "sentence"),
    [
        (1, None, "not told by one seed", "One seed does not tell how many it would take."),
        (3, None, "more than 100, on these lesions", "a hundred seeds are not enough"),
        (3, 31, "31", "An effect of 0.02 would take 31 seeds."),
    ],
)
def test_how_many_seeds_it_would_take_is_said_only_where_it_is_known(
    make_run: Callable[..., Path], seeds: int, needed: int | None, told: str, sentence: str
) -> None:
    run = make_run()
    summary = json.loads((run / "summary.json").read_text())
    for c in summary["comparisons"]:
        c |= {
            "seeds": seeds,
            "seeds_needed": needed,
            "word": "not shown",
            "detectable": 0.05,
            "effect": 0.02,
        }
    (run / "summary.json").write_text(json.dumps(summary))
    page.write(run)
    for name in ("report.html", "report.md"):
        text = (run / name).read_text()
        assert told in text and sentence in text, name
