from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml

from adversa.common import markdown
from adversa.report import page


@pytest.fixture(scope="module")
def told(finished: Path) -> str:
    page.write(finished)
    return (finished / "report.md").read_text()


def test_it_has_the_sections_of_the_page(told: str, finished: Path) -> None:
    html = (finished / "report.html").read_text()
    assert re.findall(r"^## (.*)$", told, re.M) == [
        "Against the baseline",
        "Arms",
        "Confusion, on test",
        "Failure modes",
        "Budget and acceptance",
        "Memorisation",
        "Calibration, on test",
        "Seconds and cost",
        "Split, configuration, versions",
        "What was not shown",
    ]
    assert all(f">{title}</h2>" in html for title in re.findall(r"^## (.*)$", told, re.M))


def test_it_says_the_same(told: str, finished: Path) -> None:
    for words in (
        "**not shown**",
        "| split | 9c1d55ab20 |",
        "| balanced accuracy | 0.600 (0.560 to 0.640) | 0.645 (0.605 to 0.685) | +0.045 |",
        "| sensitivity, mean of classes | 0.600",
        "| specificity, mean of classes | 0.880",
        "mine: optimistic.",
        "| guided minus unguided, balanced accuracy, test | +0.035 | \u22120.012 to +0.081 "
        "| 0.210 | not shown | 0.066 | 31 |",
        "| sensitivity at specificity 0.90 | 0.700 (0.660 to 0.740) |",
        "+1.250",
        "| guided | 1 min 30 s | 2 min 30 s |",
        "Every classifier took 600 steps on 38,400 images.",
        "no sign of copying",
        "An effect of 0.02 would take 31 seeds",
        "near_copy_quantile: 0.99",
        "Brier 0.400",
        "### Subgroups, on test: guided minus unguided",
        "| female | 42 | 40 | +0.100 | +0.020 to +0.180 | 0.012 | better |",
        "| 7 | \u2013 | \u2013 | \u2013 | too few to test |",
    ):
        assert words in told, words
    again = "Work was taken up again 2 times after a death; 45.0 s passed in between."
    assert again in told and again in (finished / "report.html").read_text()


def test_tables_have_as_many_cells_as_columns(told: str) -> None:
    body = told.partition("```")[0] + told.rpartition("```")[2]
    tables = [t.splitlines() for t in re.findall(r"(?:^\|.*\n)+", body, re.M)]
    assert len(tables) > 15
    for lines in tables:
        assert re.fullmatch(r"\| ---( \| ---:)* \|", lines[1]), lines[1]
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(widths) == 1, lines


def test_hostile_names_are_text(told: str, made_up: SimpleNamespace) -> None:
    assert (
        "<script" not in told.replace("\\<script", "")
        and "\u202e" not in told
        and "\x07" not in told
    )
    assert '\\<script\\>alert("x")\\</script\\> \\& \\<b\\>\ufffdgnissim\\</b\\>\ufffd' in told


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a|b\nc", "a\\|b c"),
        ("- item", "\\- item"),
        ("1. item", "1\\. item"),
        ("12 images", "12 images"),
        ("![x](http://evil.example/a.png)", "\\!\\[x\\](http\\://evil.example/a.png)"),
        ("www.evil.example", "www\\.evil.example"),
        ("`code` _a_ *b* ~~c~~ $d$ #e", "\\`code\\` \\_a\\_ \\*b\\* \\~\\~c\\~\\~ \\$d\\$ \\#e"),
        ("back\\slash", "back\\\\slash"),
        ("balanced_accuracy", "balanced_accuracy"),
        ("__a__b a_", "\\_\\_a\\_\\_b a\\_"),
        ("+0.012", "+0.012"),
        ("0.600", "0.600"),
        ("--- a", "\\--- a"),
    ],
)
def test_nothing_in_a_text_is_markup(given: str, shown: str) -> None:
    assert markdown.text(given) == shown


def test_a_reader_of_markdown_sees_the_text_itself() -> None:
    """In a paragraph, an item of a list and a cell, of names made of what is markup somewhere."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    random = np.random.default_rng(0)
    pieces = [
        "~~",
        *"\\`*_{}[]()<>#|~&!$@^+-=.:/ 1a",
        "__",
        "**",
        "[x](y)",
        "[x]: y",
        "<b>",
        "&amp;",
        "```",
        "1. ",
        "- ",
        "http://x",
    ]
    for n in range(1000):
        given = " ".join("".join(random.choice(pieces, 1 + n % 12)).split()) or "a"
        shown, wanted = markdown.text(given), escapeHtml(given)
        assert reader.render(shown) == f"<p>{wanted}</p>\n", given
        assert f"<li>{wanted}</li>" in reader.render(f"- {shown}\n"), given
        cells = reader.render(markdown.table(["a", "b"], [[given, given]]))
        assert cells.count(f">{wanted}</td>") == 2, given


def test_a_template_escapes_what_it_prints_and_nothing_twice() -> None:
    """Not what a macro or a table made, and a name that a template puts words round all the
    same.
    """
    template = markdown.environment("report/templates").from_string(
        "{% macro bold(x) %}**{{ x }}**{% endmacro %}\n"
        "{{ bold(name) }} {{ name ~ ' (' ~ 3 ~ ')' }} {{ [name, '+1'] | join(', ') }}\n"
        "{{ table(['|', bold(name)], [[1, name]]) }}\n{{ '`a|' | code }}\n"
    )
    assert template.render(name="<b>*x").splitlines() == [
        "**\\<b\\>\\*x** \\<b\\>\\*x (3) \\<b\\>\\*x, +1",
        "| \\| | **\\<b\\>\\*x** |",
        "| --- | ---: |",
        "| 1 | \\<b\\>\\*x |",
        "`` `a\\| ``",
    ]


def test_a_fence_is_longer_than_any_within() -> None:
    lines = markdown.block("a: ```\nb: `````x", "yaml").splitlines()
    assert lines[0] == "``````yaml" and lines[-1] == "``````"


def test_a_run_without_anything_generated(make_run: Callable[..., Path]) -> None:
    run = make_run(cases=1, per_case=1)
    shutil.rmtree(run / "round-001")
    page.write(run)
    text = (run / "report.md").read_text()
    assert (
        "There are no verdicts in the run folder." in text
        and "It was not measured in this run." in text
    )
