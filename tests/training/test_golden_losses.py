"""The trainings against losses recorded in tests/assets/losses.

Record them anew (python tools/golden_losses.py) only with a change that is meant to change what is
learnt, and say in the commit why the losses moved.

RTOL: the instruction sets that torch, oneDNN and MKL can be told to use (AVX-512, AVX2, SSE) part
the numbers by at most 2e-7; 2% of a rate, a decay or a loss's weight parts one by 8e-4 or more.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from types import ModuleType

import pytest
from torch import Tensor

from adversa.diffuse import codec_fit
from adversa.training import schedule

RTOL = 1e-4


@pytest.fixture(scope="module")
def tool(request: pytest.FixtureRequest) -> ModuleType:
    path = request.config.rootpath / "tools" / "golden_losses.py"
    spec = importlib.util.spec_from_file_location("golden_losses", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LOG_STEPS", 1)


def is_golden(tool: ModuleType, name: str, found: dict[str, list[float]]) -> bool:
    golden = json.loads((tool.FOLDER / f"{name}.json").read_text())
    assert found.keys() == golden.keys() and len(golden["loss"]) == tool.STEPS
    return all(found[k] == pytest.approx(golden[k], rel=RTOL, abs=0) for k in golden)


@pytest.mark.parametrize("name", ["classifier", "denoiser", "codec"])
def test_losses_are_the_golden_ones(tool: ModuleType, name: str) -> None:
    assert is_golden(tool, name, tool.record(tool.CONFIGS[name]))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("classifier", "lr"),
        ("classifier", "weight_decay"),
        ("classifier", "ema"),
        ("classifier", "label_smoothing"),
        ("classifier", "adjust"),
        ("denoiser", "lr"),
        ("denoiser", "ema"),
        ("denoiser", "min_snr"),
        ("codec", "lr"),
    ],
)
def test_two_percent_of_a_number_shows(tool: ModuleType, name: str, key: str) -> None:
    config = tool.CONFIGS[name]
    changed = config.model_copy(update={key: 1.02 * getattr(config, key)})
    assert not is_golden(tool, name, tool.record(changed))


def test_two_percent_of_the_codecs_loss_of_edges_shows(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[[Tensor, Tensor], Tensor] = codec_fit.losses

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return 1.02 * real(x, y) - 0.02 * (y - x).abs().flatten(1).mean(1)

    monkeypatch.setattr(codec_fit, "losses", losses)
    assert not is_golden(tool, "codec", tool.record(tool.CONFIGS["codec"]))
