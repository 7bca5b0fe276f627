"""A prepared data folder with its mix, and trainings on it: what the streams and the training
workers are tested with.
"""

from __future__ import annotations

import pytest

from adversa.engine.local import LocalEngine
from adversa.pipeline import loop, train


@pytest.fixture(scope="session")
def prepared(tiny, tmp_path_factory):
    """(config, run) with `data` and the mix of the arm real, nothing trained. Read only."""
    config = tiny(data={"phantom": {"images": 120}}, mix={"arms": ["real"]})
    run = loop.open_run(config, tmp_path_factory.mktemp("prepared") / "run")
    loop.run(config, run, LocalEngine(1, 1), None, until="prepare")
    train.mix(run.data, [], [], "real", config.mix, 1, run.arm(0, "real") / "mix")
    return config, run
