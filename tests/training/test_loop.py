"""The loop over the smallest training there is: one weight, w <- w - lr * gradient of |w - x|."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adversa import config as cfg
from adversa.training import loop
from adversa.types import UserError

CONFIG = cfg.Codec(kind="tiny", steps=8, lr=0.5, checkpoint_steps=3)


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))


def make(**changes: Any) -> loop.Training:
    model = Weight()

    def forward(batch: loop.Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor(batch["x"])
        return (model.w - x).abs(), (model.w - x).square()

    training = loop.Training(
        section="codec",
        config=CONFIG,
        recipe="r",
        modules={"model": model},
        optimizer=torch.optim.SGD(model.parameters(), lr=CONFIG.lr),
        clipped=list(model.parameters()),
        forward=forward,
        set_rates=lambda step: CONFIG.lr,
        log_steps={2, 4, 6, 8},
    )
    return dataclasses.replace(training, **changes)


def batches(start: int = 0, nan_at: int | None = None) -> Iterator[loop.Batch]:
    for step in range(start + 1, 100):
        x = [1.0, float("nan") if step == nan_at else 100.0]
        yield {"id": [f"{step}/a", f"{step}/b"], "x": x}


def train(out: Path, training: loop.Training, nan_at: int | None = None) -> Any:
    said: list[dict[str, Any]] = []
    told: list[int] = []
    saved = loop.load(out, training.recipe)
    source = batches(loop.resume_step(out), nan_at)
    record = loop.run(training, source, saved, out, said.append, told.append)
    return record, said, told


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / loop.METRICS).read_text().splitlines()]


def test_the_closed_form_of_every_number(tmp_path: Path) -> None:
    training = make(evaluation_steps={3, 4}, evaluate=lambda step: {"score": 10.0 * step})
    record, said, told = train(tmp_path, training)
    assert record.step == 8 and told == [3, 6, 8]
    # Both rows pull w up by lr, until it has passed the first: then they cancel.
    w = [0.0, 0.5, 1.0, 1.25, 1.25, 1.25, 1.25, 1.25]
    assert training.modules["model"].state_dict()["w"] == 1.25
    loss = [((x - 1) ** 2 + (x - 100) ** 2) / 2 for x in w]
    means = {
        step: {"loss": pytest.approx(sum(loss[step - 2 : step]) / 2), "lr": 0.5}
        for step in (2, 4, 6, 8)
    }
    scores = {3: {"score": 30.0}, 4: {"score": 40.0}}
    assert rows(tmp_path) == [
        {"step": step} | means.get(step, {}) | scores.get(step, {}) for step in (2, 3, 4, 6, 8)
    ]
    assert said[-1] == {"done": 8, "total": 8, "unit": "step"} | means[8]
    assert record.mean_loss == means[8]["loss"]


@pytest.mark.parametrize("dies_after", [1, 4, 7])
def test_resumed_it_writes_the_same_lines(tmp_path: Path, dies_after: int) -> None:
    whole = train(tmp_path / "whole", make())[0]

    def update(step: int) -> None:
        if step == dies_after:
            raise KeyboardInterrupt

    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        train(out, make(update=update))
    with open(out / loop.METRICS, "a") as f:
        f.write('{"step": 7, "lo')  # torn
    assert loop.resume_step(out) == dies_after // 3 * 3 - (3 if dies_after % 3 == 0 else 0)
    training = make()
    assert train(out, training)[0] == whole
    assert (out / loop.METRICS).read_bytes() == (tmp_path / "whole" / loop.METRICS).read_bytes()


def test_the_last_state_is_kept_where_it_is_asked_for_and_nothing_after_a_stop(
    tmp_path: Path,
) -> None:
    assert train(tmp_path / "a", make(commit_last=False))[2] == [3, 6]
    seen: list[int] = []
    stopping = make(update=seen.append, stop=lambda: len(seen) == 6)
    record, _, told = train(tmp_path / "b", stopping)
    assert record.step == 6 and told == [3] and rows(tmp_path / "b")[-1]["step"] == 6


def test_a_divergence_is_one_line_that_names_step_rows_and_rate(tmp_path: Path) -> None:
    said = (
        "training diverged at step 5: loss nan, gradient norm 0.5; lower codec.lr (0.5), or look at"
    )
    with pytest.raises(UserError) as caught:
        train(tmp_path, make(), nan_at=5)
    assert str(caught.value) == f"{said} the batch's images: 5/b"
    assert loop.resume_step(tmp_path) == 3 and rows(tmp_path)[-1]["step"] == 4


@pytest.mark.parametrize("nan_at", [2, 7])
def test_several_processes_learn_of_a_divergence_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nan_at: int
) -> None:
    """However fast each GPU is: the numbers of a step come at another time in each process, and the
    order of their collectives must be one.
    """

    def collectives(ready: bool) -> list[str]:
        said: list[str] = []

        def note(name: str, result: Any) -> Any:
            return lambda value=None: said.append(name) or result(value)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Numbers, "ready", lambda self: ready)
            patch.setattr(loop.Numbers, "read", lambda self: self._values.tolist())
            patch.setattr(loop.process_group, "world_size", lambda: 2)
            patch.setattr(loop.process_group, "rank", lambda: 0)
            patch.setattr(loop.process_group, "all_reduce_mean", note("mean", lambda v: v.detach()))
            patch.setattr(loop.process_group, "all_gather_object", note("gather", lambda v: [v]))
            patch.setattr(loop.process_group, "barrier", note("barrier", lambda v: None))
            with pytest.raises(UserError, match="training diverged at step"):
                config = CONFIG.model_copy(update={"checkpoint_steps": 100})
                train(tmp_path / str(ready), make(config=config, log_steps={8}), nan_at)
        return said

    assert collectives(ready=True) == collectives(ready=False)


def test_threads_and_generator_are_given_back() -> None:
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), loop.session(threads + 1) as device:
        assert torch.get_num_threads() == threads + 1 and device.type in ("cpu", "cuda")
        torch.rand(3)
        raise KeyboardInterrupt
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    with loop.session(None):
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("size", [1e-3, 1e3, float("inf")])
def test_clipping_gives_the_numbers_of_torch(size: float) -> None:
    def parameters() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        found = [torch.nn.Parameter(torch.zeros(5, k + 1)) for k in range(4)]
        for p in found[1:]:  # the first has no gradient, as in a frozen trunk
            p.grad = size * torch.randn(p.shape, generator=generator)
        return found

    ours, theirs = parameters(), parameters()
    norm = loop.clip_gradients(iter(ours), 1.0)
    assert norm == torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert (
            a.grad is not None
            and b.grad is not None
            and torch.equal(a.grad.nan_to_num(), b.grad.nan_to_num())
        )
