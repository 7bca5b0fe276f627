"""The precision of a run is settled by the hardware that it begins on, and kept elsewhere."""

from __future__ import annotations

import pytest

from adversa.engine.local import LocalEngine
from adversa.pipeline import loop, precision
from adversa.storage import files
from adversa.training.precision import Hardware
from adversa.types import UserError

FAST, SLOW = Hardware("cpu", "new", "AMX"), Hardware("cpu", "old", "")
KEYS = ("classifier", "codec", "denoiser", "generate")


class On(LocalEngine):
    def __init__(self, there: Hardware) -> None:
        super().__init__(1, 1)
        self.there = there

    def hardware(self) -> Hardware:
        return self.there


@pytest.fixture
def made(tiny, tmp_path):
    config = tiny()
    return config, loop.open_run(config, tmp_path / "run")


@pytest.mark.parametrize(("first", "then"), [(SLOW, FAST), (FAST, SLOW)])
def test_a_run_keeps_the_precision_that_it_began_with(made, first, then):
    config, run = made
    assert config.classifier.amp == config.curate.judge.amp == "auto"
    assert precision.settled(config, run) == config and precision.line(run) is None
    for there in (first, then, first):
        own = precision.settle(config, run, On(there))
        assert {getattr(own, k).amp for k in KEYS} == {first.amp}
        assert own.curate.judge.amp is first.amp
        assert precision.settled(config, run) == own
        told = precision.line(run)
        assert str(there) in told and ("float32", "bfloat16")[first.amp] in told
        assert (str(first) in told and "stay" in told) or there is first


def test_what_is_set_is_not_asked_for(tiny, tmp_path):
    sections = {k: {"amp": k == "denoiser"} for k in KEYS}
    config = tiny(**sections, curate={"judge": {"amp": False}})
    run = loop.open_run(config, tmp_path / "run")
    assert precision.settle(config, run, On(FAST)) == config
    assert not (run.root / precision.FILE).exists()


def test_the_steps_of_a_run_hold_what_was_settled(tiny, tmp_path):
    short = {"steps": 2, "evaluations": 1, "checkpoint_steps": 2}
    config = tiny(data={"phantom": {"images": 120}}, classifier=short, mix={"arms": ["real"]})
    run = loop.open_run(config, tmp_path / "run")
    loop.run(config, run, On(SLOW), None, until="train")
    meta = files.read_json(run.arm(0, "real") / "seed-0" / "classifier" / "config.json")
    assert meta["config"]["amp"] is False
    assert files.read_json(run.recipe)["recipe"]["classifier"]["amp"] == "auto"
    assert loop.open_run(config, run.root).root == run.root


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"amp": 1, "hardware": "x", "here": "x"}'])
def test_a_damaged_record_is_told_and_not_settled_anew(made, text):
    config, run = made
    (run.root / precision.FILE).write_text(text)
    for use in (precision.settled, lambda c, r: precision.settle(c, r, On(FAST))):
        with pytest.raises(UserError, match=precision.FILE):
            use(config, run)
    assert "is damaged" in precision.line(run)
