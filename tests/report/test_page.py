from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from adversa.report import curation, gallery, page
from adversa.report.gather import read_facts, score
from adversa.storage import tables
from adversa.types import UserError

VOID = {"meta", "img", "br", "line", "rect", "input", "circle", "polyline"}


class Page(HTMLParser):
    """Collects what the tests ask about, and fails on a tag closed out of order or left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.getpos())

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def view(run: Path, number: int = 1) -> gallery.Gallery:
    return gallery.gallery(read_facts(run), number)


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    return page.write(finished).read_text()


@pytest.fixture(scope="module")
def parsed(html: str) -> Page:
    return Page(html)


def test_it_is_written_into_the_run_folder(finished: Path, html: str) -> None:
    assert html.lstrip().startswith("<!DOCTYPE html>")
    assert (finished / "report.html").read_text() == html


def test_it_fetches_nothing_and_runs_nothing(html: str, parsed: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in parsed.tags
    }
    for _, attrs in parsed.tags:
        assert not any(name.startswith("on") or name in ("srcset", "action") for name in attrs)
        assert all((value or "").startswith("#") for name, value in attrs.items() if name == "href")
        assert all(
            (value or "").startswith("data:image/")
            for name, value in attrs.items()
            if name == "src"
        )
    assert (
        "http://" not in html
        and "https://" not in html
        and "url(" not in html
        and "@import" not in html
    )
    policy = [
        m["content"] for m in parsed.of("meta") if m.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_picture_is_there_and_described(
    parsed: Page, finished: Path, made_up: SimpleNamespace
) -> None:
    drawn, images = [], []
    for image in parsed.of("img"):
        (drawn if (image["src"] or "").startswith("data:image/svg+xml;") else images).append(image)
    assert len(drawn) == 3 and all(
        image["alt"] for image in drawn
    )  # one curve of memorisation, two of calibration
    offspring = gallery.CASES * gallery.OFFSPRING + len(made_up.CLASSES) * gallery.SAMPLES
    shown = [p for c in view(finished).cases for p in c.offspring] + [
        p for s in view(finished).samples.values() for p in s
    ]
    roles = Counter(p.nearest.role for p in shown if p.nearest)
    assert (
        len(shown) == offspring == roles.total()
        and min(roles[r] for r in ("train", "mine", "test")) > 10
    )
    assert len(images) == gallery.CASES + 2 * offspring - roles["test"]
    assert all(image["alt"] and "class" in image for image in images)
    alts = [image["alt"] or "" for image in images]
    assert alts[0] == "Hard case 1: a real image of nevus, read as nevus"
    data = (images[0]["src"] or "").partition(",")[2]
    np.testing.assert_array_equal(
        tables.decode_png(base64.b64decode(data)), made_up.blob(100)
    )  # mine000, pixel for pixel


def test_hostile_names_are_text(html: str, parsed: Page, made_up: SimpleNamespace) -> None:
    assert html.count("<script") == 0 and "<b>gnissim" not in html
    assert "\u202e" not in html and "\x07" not in html
    assert made_up.HOSTILE.replace("\u202e", "\ufffd").replace("\x07", "\ufffd") in parsed.text
    assert all(
        "<" not in (attrs.get("alt") or "") or "alert" in (attrs["alt"] or "")
        for attrs in parsed.of("img")
    )


def test_hostile_sentences_are_text(make_run: Callable[..., Path]) -> None:
    run = make_run(cases=1, per_case=1)
    summary = json.loads((run / "summary.json").read_text())
    summary["verdict_sentence"] = "</p><img src=x onerror=alert(1)> \ud800"
    summary["run"] = '"><style>*{display:none}</style>'
    (run / "summary.json").write_text(json.dumps(summary))
    parsed = Page(page.write(run).read_text())
    assert all((image.get("src") or "").startswith("data:") for image in parsed.of("img"))
    assert len(parsed.of("style")) == 1
    assert "onerror=alert(1)" in parsed.text


def test_it_says_what_a_reader_must_know(parsed: Page) -> None:
    for words in (
        "not shown",
        "split 9c1d55ab20",
        "mine: optimistic. These very images guided the generation",
        "test: honest.",
        "opened once",
        "2026-01-02 03:04 UTC",
        "The images are procedural phantoms. One seed an arm: mind the interval.",
        "the first 24 of 30 hard cases",
        "no medical device",
        "2 min 52 s",
        "torch 2.15.0",
        "near_copy_quantile: 0.99",
        "5 min 10 s in all, of which 12.5 s (4.0%)",
    ):
        assert words in parsed.text, words


def test_figures_have_three_decimals_and_intervals(parsed: Page) -> None:
    assert (
        "balanced accuracy 0.600 0.560 to 0.640 0.645 0.605 to 0.685 +0.045" in parsed.text
    )  # test
    assert (
        "balanced accuracy 0.400 0.360 to 0.440 0.445 0.405 to 0.485 +0.045" in parsed.text
    )  # mine
    assert (
        "guided minus unguided balanced accuracy, test +0.035 \u22120.012 to +0.081 not "
        "shown p 0.210" in parsed.text
    )
    assert (
        "unguided minus real accuracy, mine (optimistic) \u22120.050 \u22120.090 to "
        "\u22120.020 worse p 0.010" in parsed.text
    )


def test_the_headline_is_compared_within_groups(parsed: Page) -> None:
    assert (
        "Subgroups, on test: guided minus unguided" in parsed.text
        and "corrected for the 1 group tested" in parsed.text
    )
    assert "female 42 40 +0.100 +0.020 to +0.180 better p 0.012" in parsed.text
    assert "9 7 \u2013 too few to test" in parsed.text and "x 33 31 \u2013 no value" in parsed.text


def test_every_filter_of_verdicts_has_a_count(finished: Path, parsed: Page) -> None:
    facts = read_facts(finished)
    found = gallery.gallery(facts, 1)
    assert found.refused == sum(found.reasons.values()) - found.reasons["kept"] > 0
    assert f"not kept {found.refused} " in parsed.text


def test_the_counts_are_those_of_the_verdicts(finished: Path, parsed: Page) -> None:
    facts = read_facts(finished)
    found = curation.accepted(facts)
    for arm in ("guided", "unguided"):
        rows = [line for line in found[arm].lines if not line.strategy]
        assert [r.generated for r in rows] == [100, 100, 100]
        assert all(r.kept + sum(r.rejected.values()) == r.generated for r in rows)
    met = [
        "not finite",
        "judge disagrees",
        "near copy",
        "over quota",
    ]  # in the order of the checks; what nobody met has no column
    assert (
        found["guided"].reasons == met
        and "unlike real images" not in parsed.text.partition("What was kept")[2]
    )
    lines = [line for line in found["guided"].lines if line.name == "melanoma"]
    assert [line.strategy for line in lines] == ["", "img2img", "inpaint"] and [
        line.generated for line in lines
    ] == [100, 50, 50]
    assert lines[0].kept == lines[1].kept + lines[2].kept
    rejected = " ".join(str(lines[0].rejected.get(r, 0)) for r in met)
    assert f"melanoma 100 {lines[0].kept} {lines[0].kept:.1f}% {rejected} img2img 50" in parsed.text
    assert facts.images["train"] == [20, 20, 20] and facts.lesions["train"] == 30


def test_offspring_are_the_first_by_id_whatever_their_verdict(finished: Path) -> None:
    shown = view(finished)
    cases = shown.cases
    assert (len(cases), shown.total) == (24, 30)
    requests = tables.read(finished / "round-001/requests").to_pylist()
    verdicts = {
        v["request_id"]: v["reason"]
        for v in tables.read(finished / "round-001/verdicts").to_pylist()
    }
    mine = sorted(r["request_id"] for r in requests if r["example"] == "mine002")
    assert [p.reason for p in cases[2].offspring] == [
        verdicts[r] for r in mine[: gallery.OFFSPRING]
    ]
    assert (cases[2].generated, cases[2].kept) == (10, sum(verdicts[r] == "kept" for r in mine))


def test_what_was_not_measured_is_a_dash(
    make_run: Callable[..., Path], made_up: SimpleNamespace
) -> None:
    run = make_run(cases=1, per_case=1)
    summary = json.loads((run / "summary.json").read_text())
    del (
        summary["arms"]["guided"]["test"]["sensitivity/melanoma"],
        summary["intervals"]["real"]["test"]["accuracy"],
        summary["intervals_before"]["test"]["accuracy"],
    )
    (run / "summary.json").write_text(json.dumps(summary))
    facts = read_facts(run)
    assert score(facts, "guided", "test", "sensitivity/melanoma").value is None
    assert (
        score(facts, "real", "test", "accuracy").value,
        score(facts, "real", "test", "accuracy").low,
    ) == (0.7, None)
    text = Page(page.write(run).read_text()).text
    assert f"melanoma 4 images 0.600 0.560 to 0.640 \u2013 \u2013 {made_up.HOSTILE[:8]}" in text
    assert "accuracy 0.700 0.745 0.705 to 0.785 +0.045" in text


def test_several_rounds_are_compared_on_mine(make_run: Callable[..., Path]) -> None:
    text = Page(page.write(make_run(cases=2, per_case=1, rounds=2)).read_text()).text
    assert "Round by round" in text and "Round 2: the first 2 of 2 hard cases" in text


def test_large_pictures_are_made_smaller(
    make_run: Callable[..., Path], made_up: SimpleNamespace
) -> None:
    run = make_run(cases=2, per_case=1, side=128)
    images = Page(page.write(run).read_text()).of("img")
    assert all(
        "class" not in image for image in images
    )  # not enlarged, so smoothed as any photograph
    assert (images[0]["src"] or "").startswith("data:image/jpeg;base64,")
    shown = Image.open(io.BytesIO(base64.b64decode((images[0]["src"] or "").partition(",")[2])))
    assert shown.size == (gallery.LARGEST, gallery.LARGEST) and len(images[0]["src"] or "") < 12_000
    near = np.asarray(
        Image.fromarray(made_up.blob(100, 128)).resize(shown.size), float
    ) - np.asarray(shown, float)
    assert np.abs(near).mean() < 6


def test_a_run_without_synthetic_arms(make_run: Callable[..., Path]) -> None:
    run = make_run(cases=1, per_case=1)
    shutil.rmtree(run / "round-001")
    summary = json.loads((run / "summary.json").read_text())
    summary["arms"] = {"real": summary["arms"]["real"]}
    summary["comparisons"] = []
    (run / "summary.json").write_text(json.dumps(summary))
    text = Page(page.write(run).read_text()).text
    assert "There are no hard cases" in text and "There are no verdicts" in text
    assert (
        "Baseline: the classifiers whose mistakes were mined" in text
        and "After is the arm" not in text
    )


def test_pictures_that_were_deleted_are_said_to_be_missing(make_run: Callable[..., Path]) -> None:
    run = make_run(cases=2, per_case=2)
    shutil.rmtree(run / "round-001/synthetic")
    assert "no picture in the run folder" in Page(page.write(run).read_text()).text


def test_an_unfinished_run_names_the_command_that_finishes_it(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(cases=1, per_case=1)
    (run / "summary.json").unlink()
    with pytest.raises(UserError) as e:
        page.write(run)
    assert f"adversa loop {run}/config.yaml --run-dir {run}" in str(e.value) and "\n" not in str(
        e.value
    )
    assert not (run / "report.html").exists()
    with pytest.raises(UserError, match="not a run folder"):
        page.write(tmp_path / "nowhere")


def test_the_same_run_gives_the_same_page(finished: Path, html: str) -> None:
    assert page.write(finished).read_text() == html


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3725, "1 h 02 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert page.duration(seconds) == text


def test_numbers() -> None:
    assert [page.signed(v) for v in (0.0123, -0.0123, -0.0001, None, float("nan"))] == [
        "+0.012",
        "\u22120.012",
        "0.000",
        "\u2013",
        "\u2013",
    ]
    assert [page.fixed(v) for v in (0.5, -0.5, None)] == ["0.500", "\u22120.500", "\u2013"]


def test_it_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, adversa.report.page; print([m for m in ('torch', 'ray', 'sklearn') if m "
        "in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
