"""Where RayEngine asks what model steps run on. No Ray."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from adversa.distributed import engine as engines
from adversa.engine import resources
from adversa.training.precision import Hardware

HERE = Hardware("cpu", "made up", "")


@pytest.mark.parametrize(
    ("embedded", "gpus", "asked"),
    [
        (True, 0, (0, 0)),
        (True, 1, (0, resources.GPU_SHARE)),
        (False, 0, (1, 0)),  # the head does no work where it offers no CPU
        (False, 4, (1, resources.GPU_SHARE)),
    ],
)
def test_the_hardware_is_that_of_a_machine_that_works(monkeypatch, embedded, gpus, asked):
    requested = []

    def remote(num_cpus, num_gpus):
        requested.append((num_cpus, num_gpus))
        return lambda function: SimpleNamespace(remote=lambda: HERE)

    monkeypatch.setattr(engines, "ray", SimpleNamespace(remote=remote, get=lambda found: found))
    engine = engines.RayEngine.__new__(engines.RayEngine)
    engine.embedded, engine.gpus = embedded, gpus
    assert engine.hardware() is HERE and requested == [asked]
