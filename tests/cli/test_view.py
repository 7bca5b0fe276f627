"""What a person is shown: `status` from the folder alone, the live view, the plain log, the last
lines.
"""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from adversa.cli import closing, view
from adversa.engine.local import LocalEngine
from adversa.pipeline import precision
from adversa.pipeline.folders import models_of, trained
from adversa.pipeline.stages import stages
from adversa.run import create as run_create
from adversa.run import file_lock, status, step_folder
from adversa.storage import files
from adversa.training.precision import Hardware


@pytest.fixture
def config(tiny):
    return tiny()


@pytest.fixture
def run(tmp_path):
    return run_create.open_run(tmp_path / "run", {}, "")


def finish(config, run, *commands):
    """Mark stages as finished, as cheaply as `status` looks at them."""
    for stage in stages(config, run):
        if commands and stage.name not in commands:
            continue
        for output in stage.outputs:
            if output.kind == "file":
                output.path.write_text("{}")
            else:
                files.write_json(
                    output.path / step_folder.MANIFEST,
                    {"seconds": 61.0, "metrics": {"select_balanced_accuracy": 0.5}},
                )


def text(renderable, width=140):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue()


def lines(config, run):
    return [line.split() for line in text(view.view(config, run)).splitlines()]


def test_never_started(config, run):
    shown = lines(config, run)
    assert "not started" in " ".join(shown[0])
    assert shown[1][:2] == ["next", "prepare"] and all(
        words[:2] == ["to", "do"] for words in shown[2:9]
    )


def test_running_shows_the_step_its_rate_and_what_is_left(config, run):
    finish(config, run, "prepare")
    folder = run.denoiser
    files.write_json(
        folder / step_folder.PROGRESS,
        {"done": 5, "total": 20, "unit": "step", "rate": 0.5, "elapsed": 10.0},
    )
    with file_lock.lock(run):
        status.set_status(run, "running", "train")
        shown = text(view.view(config, run))
    assert "running" in shown.splitlines()[0]
    assert shown.splitlines()[1].split() == ["done", "prepare", "1", "min", "01", "s"]
    assert "now    train" in shown and "denoiser: 5 of 20 steps, 0.5 steps/s, 30 s left" in shown


def test_a_step_without_a_rate_yet_promises_nothing(config, run):
    files.write_json(
        run.data / step_folder.PROGRESS,
        {"done": 0, "total": 20, "unit": "image", "rate": 0.0, "elapsed": 0.1},
    )
    task = view.tasks(run, stages(config, run)[0])[0]
    assert task.eta is None and task.line() == "data: 0 of 20 images"


POOL = {
    "done": 64,
    "total": 640,
    "unit": "image",
    "rate": 1.0,
    "elapsed": 30.0,
    "images_per_second": 4.0,
    "workers": 2,
    "failed": 0,
}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"shares": {}, "images_per_second": 0.0, "workers": 0},
            "data: 64 of 640 images; workers are starting",
        ),
        ({"shares": {"0": 0}, "images_per_second": 0.0}, "data: 64 of 640 images; 2 workers up"),
        (
            {"shares": {"0": 48, "1": 16}, "evaluations_per_second": 123.4},
            "data: 64 of 640 images, 4.0 images/s, 2 min 24 s left; 123 evaluations/s; 2 "
            "workers: 75 25%",
        ),
        (
            {"shares": {"0": 64}, "workers": 1},
            "data: 64 of 640 images, 4.0 images/s, 2 min 24 s left",
        ),
        (
            {"shares": {str(i): 60 + i for i in range(64)}, "workers": 63},
            "data: 64 of 640 images, 4.0 images/s, 2 min 24 s left; 63 workers: 1.0 to 2.1% each",
        ),
        (
            {
                "shares": {"0": 64},
                "workers": 1,
                "failed": 2,
                "last_failed": "a1b2: ValueError: no mask",
            },
            "data: 64 of 640 images, 4.0 images/s, 2 min 24 s left; 2 failed, the last "
            "a1b2: ValueError: no mask",
        ),
        (
            {
                "shares": {},
                "images_per_second": 0.0,
                "workers": 0,
                "note": "no room for a worker for 31 s",
            },
            "data: 64 of 640 images; workers are starting; no room for a worker for 31 s",
        ),
    ],
)
def test_a_pool_says_how_fast_it_is_and_who_does_how_much(config, run, more, said):
    files.write_json(run.data / step_folder.PROGRESS, POOL | more)
    assert view.tasks(run, stages(config, run)[0])[0].line() == said


def test_the_words_of_a_failure_are_shown_as_they_are(config, run):
    files.write_json(
        run.data / step_folder.PROGRESS,
        POOL | {"shares": {"0": 64}, "failed": 1, "last_failed": "a1: KeyError: [/red] :bug:"},
    )
    with file_lock.lock(run):
        status.set_status(run, "running", "prepare")
        assert "a1: KeyError: [/red] :bug:" in text(view.view(config, run), width=200)


def test_a_finished_step_is_no_task_even_with_progress_left_behind(config, run):
    files.write_json(
        run.data / step_folder.PROGRESS, {"done": 0, "total": 20, "rate": 0.0, "elapsed": 0.1}
    )
    finish(config, run, "prepare")
    assert view.tasks(run, stages(config, run)[0]) == []


def test_killed_is_told_from_running_by_the_lock(config, run):
    finish(config, run, "prepare")
    with file_lock.lock(run):
        status.set_status(run, "running", "train")
        assert view.state_of(run)[0] == "running"
    shown = text(view.view(config, run))
    assert view.state_of(run)[0] == "killed"
    assert "killed" in shown.splitlines()[0] and "running" not in shown
    assert lines(config, run)[2][:3] == ["cut", "off", "train"]


def test_stopped_between_stages_and_within_one(config, run):
    finish(config, run, "prepare")
    status.set_status(run, "stopped")
    assert lines(config, run)[2][:2] == ["next", "train"]
    files.write_json(
        run.denoiser / step_folder.PROGRESS, {"done": 5, "total": 20, "rate": 0.5, "elapsed": 10.0}
    )
    assert lines(config, run)[2][:3] == ["cut", "off", "train"]


def test_failed_says_why_word_for_word(config, run):
    status.set_status(run, "failed", error="[red]x.jpg[/]: truncated :bug:; fix it")
    shown = text(view.view(config, run))
    assert (
        lines(config, run)[1][:2] == ["failed", "prepare"]
        and "[red]x.jpg[/]: truncated :bug:; fix it" in shown
    )


def test_an_error_of_an_earlier_attempt_is_not_shown_again(config, run):
    status.set_status(run, "failed", error="old trouble")
    status.set_status(run, "stopped")
    assert "old trouble" not in text(view.view(config, run))


def test_finished_shows_every_stage_done_and_every_score(config, run):
    finish(config, run)
    status.set_status(run, "finished")
    for folder in [f for n in (0, 1) for f in trained(config, run, n)]:
        files.write_json(
            folder / step_folder.MANIFEST,
            {"seconds": 1.0, "metrics": {"select_balanced_accuracy": 0.5}},
        )
    for arm, seed, _, _ in models_of(config, run, 1):
        card = {"metrics": {"balanced_accuracy": 0.875}}
        files.write_json(run.scorecard(run.test, arm, seed), card)
    shown = lines(config, run)
    assert "finished" in shown[0] and all(
        words[0] == "done" for words in shown[1 : 1 + len(stages(config, run))]
    )
    assert text(view.view(config, run)).count("0.875") == 5
    for arm in (
        "round-000/real",
        "round-001/real",
        "round-001/replay",
        "round-001/unguided",
        "round-001/guided",
    ):
        assert f"{arm}/seed-0" in text(view.view(config, run))


def test_the_score_on_select_is_shown_before_anything_else_is_known(config, run):
    folder = trained(config, run, 0)[0]
    files.write_json(
        folder / step_folder.MANIFEST,
        {"seconds": 1.0, "metrics": {"best_step": 4, "select_balanced_accuracy": 0.625}},
    )
    assert ["round-000/real/seed-0", "0.625", "-", "-"] in lines(config, run)


def test_a_view_writes_nothing(config, run):
    before = {p: p.stat().st_mtime_ns for p in run.root.rglob("*")}
    text(view.view(config, run))
    assert {p: p.stat().st_mtime_ns for p in run.root.rglob("*")} == before


@pytest.mark.parametrize("terminal", [False, True])
def test_watch_follows_a_run_on_a_terminal_and_in_a_log(config, run, terminal):
    out = io.StringIO()
    with view.LiveView(Console(file=out, width=120, force_terminal=terminal), config, run):
        status.set_status(run, "running", "prepare")
        files.write_json(
            run.data / step_folder.PROGRESS,
            {"done": 3, "total": 9, "unit": "image", "rate": 1.0, "elapsed": 3.0},
        )
        time.sleep(0.7)
    shown = out.getvalue()
    assert "prepare" in shown
    assert (
        ("3 of 9 images" in shown)
        if terminal
        else ("\x1b" not in shown and "prepare: data" in shown)
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "?"),
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3660, "1 h 01 min"),
    ],
)
def test_clock(seconds, said):
    assert view.clock(seconds) == said


def summary(*arms):
    """Of a run with these arms, each a little better than the one before."""
    card = {"balanced_accuracy": 0.5, "accuracy": 0.6, "auroc_macro": 0.7, "specificity/a": 0.8}
    told = {
        arm: {
            "test": {m: v + i / 100 for m, v in card.items()},
            "mine": {"balanced_accuracy": 0.25 + i / 100},
        }
        for i, arm in enumerate(("before", *arms))
    }
    ends = {
        arm: {r: {m: [v - 0.04, v + 0.03] for m, v in c.items()} for r, c in roles.items()}
        for arm, roles in told.items()
    }
    return {
        "before": told.pop("before"),
        "intervals_before": ends.pop("before"),
        "arms": told,
        "intervals": ends,
        "used": dict.fromkeys(arms, 7),
        "added": dict.fromkeys(arms, 384),
        "generated": 5,
        "accepted": 3,
        "rejected": {},
        "verdict_sentence": "Not shown.",
        "notes": [],
    }


@pytest.mark.parametrize("width", [44, 60, 80, 120])
@pytest.mark.parametrize(
    "arms", [("real", "guided"), ("real", "resample", "replay", "unguided", "guided")]
)
def test_closing_is_a_row_an_arm_at_any_width(run, width, arms):
    files.write_json(run.summary, summary(*arms))
    out = io.StringIO()
    closing.closing(Console(file=out, width=width, color_system=None), run)
    shown = out.getvalue().splitlines()
    tables = shown[: next(i for i, line in enumerate(shown) if line.startswith("generated"))]
    assert all(len(line) <= width for line in tables)
    values = [
        f"{0.5 + i / 100:.3f} ({0.46 + i / 100:.2f}-{0.53 + i / 100:.2f})"
        for i in range(len(arms) + 1)
    ]
    names = ["real (before)", *(a if a != "guided" else "guided (after)" for a in arms)]
    for name, value in zip(names, values, strict=True):
        rows = [i for i, line in enumerate(tables) if re.match(rf"{re.escape(name)}  ", line)]
        assert len(rows) == (2 if width >= 80 else 4)
        number, interval = value.split()
        if width == 120:  # a value and its interval are on one line
            assert value in tables[rows[0]]
        else:  # or on two, and neither is broken
            assert number in tables[rows[0]]
            assert interval in tables[rows[0]] + tables[rows[0] + 1]
    assert sum("384" in line or "377" in line for line in tables) == len(arms)


def test_closing_tells_before_and_after_and_the_verdict(run):
    card = {"balanced_accuracy": 0.5, "accuracy": 0.6, "specificity/a": 0.7, "specificity/b": 0.8}
    files.write_json(
        run.summary,
        {
            "arms": {"real": {"test": card, "mine": {"balanced_accuracy": 0.25}}},
            "intervals": {"real": {"test": {"balanced_accuracy": [0.4, 0.6]}, "mine": {}}},
            "before": {"test": card, "mine": {"balanced_accuracy": 0.25}},
            "used": {"real": 0},
            "added": {"real": 0},
            "generated": 5,
            "accepted": 3,
            "rejected": {"near copy": 2},
            "verdict_sentence": "Not shown: +0.1 [-0.1, +0.3].",
            "notes": ["one seed [an arm]"],
        },
    )
    out = io.StringIO()
    closing.closing(Console(file=out, width=160, color_system=None), run)
    assert re.search(r"0\.500 \(0\.40+-0\.60+\)", out.getvalue())
    figures = ("0.600", "0.750", "0.250", "2 near copy", "real (before)")
    for part in (*figures, "Not shown: +0.1 [-0.1, +0.3].", "note: one seed [an arm]"):
        assert part in out.getvalue()
    assert str(run.root / "report.html") in out.getvalue()


def test_the_precision_is_shown_once_it_is_settled(config, run):
    console = Console(width=120, file=io.StringIO())
    live = view.LiveView(console, config, run)
    status.set_status(run, "running", "prepare")
    live._look("", 0.0)
    assert "float32" not in console.file.getvalue()
    slow = LocalEngine(1, 1)
    slow.hardware = lambda: Hardware("cpu", "an old CPU", "")
    precision.settle(config, run, slow)
    live._look("", 0.0)
    live._look("", 0.0)
    assert len(re.findall(r"(?m)^\d\d:\d\d:\d\d .*an old CPU", console.file.getvalue())) == 1
    console.print(view.view(config, run))
    assert console.file.getvalue().count("float32") == 2
