"""A real image is decoded once, whoever reads it."""

from __future__ import annotations

from collections import Counter

from adversa.engine.local import LocalEngine
from adversa.pipeline import loop
from adversa.report import page
from adversa.storage import arrays, tables
from adversa.types import ROLES


def test_a_whole_loop_decodes_each_real_image_once(tiny, tmp_path, monkeypatch):
    """Trainings, scores, features, index, filter, evaluation and report read the same array."""
    monkeypatch.setenv("ADVERSA_CACHE", str(tmp_path / "cache"))
    decoded, real = [], tables.decode_png
    monkeypatch.setattr(tables, "decode_png", lambda data: decoded.append(data) or real(data))
    config = tiny(
        data={"phantom": {"images": 200}},
        classifier={"steps": 8, "evaluations": 1},
        denoiser={"steps": 4},
    )
    run = loop.open_run(config, tmp_path / "run")
    loop.run(config, run, LocalEngine(1, 1), page.write)
    times = Counter(decoded)
    images = [x for r in ROLES for x in tables.read(run.data / r, ["image"])["image"].to_pylist()]
    assert len(images) > 150 and {times[x] for x in images} == {1}
    places = [arrays.RoleArray(run.data / r, build=False)._entry for r in ROLES]
    assert None not in places
