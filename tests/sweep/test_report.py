"""sweep.html and its figures, from folders made by hand."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adversa.report import plots
from adversa.sweep import plots as sweep_plots
from adversa.sweep import report, results
from adversa.sweep.grid import Point


def _beside(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


sweeps = _beside("sweeps", Path(__file__).parents[1] / "sweeps.py")
Page = _beside(
    "test_page_of_the_report", Path(__file__).parents[1] / "report" / "test_page.py"
).Page

HOSTILE = '<script>alert("x")</script> & $x^2$ <b>\u202egnissim</b>\x07'
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def helps(cell: str, p: Point, x: float) -> float:
    """Guided saturates early, unguided does not help."""
    return (
        0.5
        + 0.01 * p.seed
        + (0.3 * (1 - np.exp(-x)) if p.variant.arm == "guided" else 0.0)
        + (0.1 if cell == "0020" else 0.0)
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    c, run = sweeps.build(
        tmp_path_factory.mktemp("sweep") / "run",
        helps,
        real=[5, 20],
        ratios=[0, 1, 2.5, 5],
        classes=["nevus", HOSTILE],
        denoiser_sees=["subset", "all"],
        skip=lambda p: p.variant.arm == "unguided" and p.cell.count == 5 and p.seed == 1,
    )
    return c, run, report.write(c, run)


@pytest.fixture(scope="module")
def html(written: tuple) -> str:
    return written[2].read_text()


@pytest.fixture(scope="module")
def parsed(html: str) -> Any:
    return Page(html)


def test_the_page_and_what_it_is_made_of_lie_in_the_folder(written: tuple, html: str) -> None:
    _, run, path = written
    assert path == run.root / "sweep.html" and html.lstrip().startswith("<!DOCTYPE html>")
    for name in (
        "sweep.json",
        "sweep.parquet",
        "figures/dose.png",
        "figures/dose.svg",
        "figures/learning.png",
        "figures/learning.svg",
    ):
        assert (run.root / name).stat().st_size > 0, name
    assert not list(run.root.glob("**/.*.*"))  # nothing half-written


def test_it_says_what_was_found(written: tuple, parsed: Any) -> None:
    known = results.results(*written[:2])
    for v in known["verdicts"]:
        assert f"{v['variant']}: {v['word']}" in parsed.text
        assert v["sentence"].removeprefix(v["variant"] + ": ")[1:] in parsed.text
    assert {v["variant"]: v["word"] for v in known["verdicts"]}["guided-img2img"] == "better"
    curve = next(c for c in known["curves"] if c["variant"] == "guided-img2img")
    assert curve["response"]["kind"] == "saturates" and curve["response"]["words"] in parsed.text
    for note in known["notes"]:
        assert " ".join(note.split())[1:40] in parsed.text
    assert "6 of 64 trials are missing" in parsed.text and "0005/unguided/r1/s1" in parsed.text
    words = next(
        w["words"]
        for w in known["equivalent_images"]
        if w["cell"] == "0005" and w["variant"] == "guided-img2img" and w["ratio"] == 1
    )
    assert words in parsed.text


def test_every_trial_contrast_and_equivalent_has_its_row(written: tuple, html: str) -> None:
    known = results.results(*written[:2])
    tables = {
        m[1]: m[2].count("<tr") - 1
        for m in re.finditer(r'aria-label="([^"]+)">\s*<table(.*?)</table>', html, re.S)
    }
    assert tables["Trials"] == known["what"]["trials"]["done"] == 58
    for asked, text in known["questions"].items():
        assert (
            tables[text.replace("'", "&#39;")]
            == sum(c["question"] == asked for c in known["contrasts"])
            > 0
        )
    assert sum(
        n for name, n in tables.items() if name.startswith("Equivalent real images of")
    ) == len(known["equivalent_images"])
    assert tables["Pools"] == len(known["what"]["pools"]) == 8


def test_names_from_a_users_file_are_escaped(html: str, parsed: Any) -> None:
    assert (
        not parsed.of("script")
        and not parsed.of("b")
        or all("gnissim" not in str(b) for b in parsed.of("b"))
    )
    assert (
        "alert(&#34;x&#34;)" in html
        and "<script" not in html
        and "\u202e" not in html
        and "\x07" not in html
    )


def test_it_fetches_nothing_and_runs_nothing(html: str, parsed: Any) -> None:
    policy = next(m["content"] for m in parsed.of("meta") if m.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert all(
        i["src"].startswith("data:image/svg+xml;base64,") and i["alt"] for i in parsed.of("img")
    )
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:|//|file:)", html)
    assert all(a["href"][1:] in {h.get("id") for h in parsed.of("h2")} for a in parsed.of("a"))


def test_figures_are_valid_and_the_same_for_the_same_numbers(written: tuple, parsed: Any) -> None:
    _, run, _ = written
    for i in parsed.of("img"):
        root = ET.fromstring(base64.b64decode(i["src"].partition(",")[2]))
        assert root.tag.endswith("svg")
        assert not root.findall(".//{*}script") and not root.findall(
            ".//{*}text"
        )  # text is drawn as paths
    assert len(parsed.of("img")) == 4 + 1  # two cells, seen two ways, and the real images
    known = results.results(*written[:2])
    again = sweep_plots.ratio_figure(sweep_plots.panels(known), "balanced_accuracy")
    assert plots.svg(again) == (run.root / "figures/dose.svg").read_bytes()
    assert plots.png(again) == (run.root / "figures/dose.png").read_bytes()


def test_pictures_show_the_arms(written: tuple) -> None:
    """Blue is unguided, orange guided; both have more than a speck."""
    for name, wide in (("dose", 1300), ("learning", 1300)):
        image = np.asarray(
            Image.open(io.BytesIO((written[1].root / f"figures/{name}.png").read_bytes())).convert(
                "RGB"
            )
        ).astype(int)
        assert image.shape[1] >= wide and image.std() > 10
        for color in (BLUE, ORANGE):
            assert (np.abs(image - color).max(-1) < 12).sum() > 150, (name, color)


def test_panels_hold_what_was_reached(written: tuple) -> None:
    known = results.results(*written[:2])
    chosen = sweep_plots.panels(known)
    assert [p.title for p in chosen] == [
        "5 a class",
        "5 a class, denoiser saw all of train",
        "20 a class",
        "20 a class, denoiser saw all of train",
    ]
    names = [{c["variant"] for c in p.curves} for p in chosen]
    assert names[0] == {"replay", "unguided", "guided-img2img"} and names[1] == {
        "replay",
        "unguided-all",
        "guided-img2img-all",
    }
    for p in chosen:
        assert (
            all(p.ends[0] < x["mean"] < p.ends[1] for x in p.points) and len(p.points) == 1 + 3 * 3
        )
    figure = sweep_plots.ratio_figure(chosen[:1], "balanced_accuracy")
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "2.6", "5"] and min(
        ax.get_yticks()
    ) >= 0


def test_an_empty_sweep_is_a_page_too(tmp_path: Path) -> None:
    c, run = sweeps.build(
        tmp_path / "run", helps, real=[5], ratios=[0, 1], arms=["replay"], skip=lambda p: True
    )
    text = Page(report.write(c, run).read_text()).text
    assert (
        "4 of 4 trials are missing" in text
        and "No trial is finished." in text
        and "no arm generates images" in text
    )


def test_one_seed_is_said(tmp_path: Path) -> None:
    c, run = sweeps.build(tmp_path / "run", helps, real=[5], ratios=[0, 1, 2], seeds=1)
    text = Page(report.write(c, run).read_text()).text
    assert "over lesions alone: one seed" in text and "not the luck of training" in text
