from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from adversa.classify.fit import (
    Batch,
    balanced_accuracy,
    evaluation_steps,
    fit,
    learning_rate,
    resume_step,
    update_average,
)
from adversa.classify.score import make_scorer
from adversa.config import Classifier
from adversa.types import UserError
from adversa.weights import read_model

TINY = {"model": "test_resnet", "model_args": {"drop_rate": 0.1}, "batch_size": 8}
RECIPE = Classifier(**TINY, steps=12, evaluations=4, checkpoint_steps=5, lr=1e-3)


def batch(seed: int, n: int = 8) -> Batch:
    """Three classes told apart by their colour."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 120, (n, 32, 32, 3))
    images[np.arange(n), :, :, labels] += 90
    return {"id": [f"{seed}/{i}" for i in range(n)], "image": images.astype(np.uint8), "label": labels.astype(np.int64)}


def stream(start: int = 0, stop_at: int | None = None) -> Iterator[Batch]:
    for step in range(start + 1, 10_000):
        if step == stop_at:
            raise KeyboardInterrupt
        yield batch(step)


def run(out: Path, batches: Iterator[Batch], config: Classifier = RECIPE, seed: int = 0) -> dict[str, float]:
    return fit(batches, config=config, num_classes=3, resolution=32, out=out, seed=seed, select=lambda: [batch(10**6, 30)])


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop_at", [7, 12])
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, stop_at: int) -> None:
    whole = run(tmp_path / "whole", stream())
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(out, stream(stop_at=stop_at))
    assert resume_step(out) == (stop_at - 1) // 5 * 5
    torch.manual_seed(123)  # another process, another global state
    assert run(out, stream(resume_step(out))) == whole
    (a, config_a, print_a), (b, config_b, print_b) = read_model(tmp_path / "whole"), read_model(out)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert config_a == config_b and print_a == print_b
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [x["step"] for x in lines(out)] == [3, 6, 9, 12]
    assert resume_step(out) == 10  # whoever marks the model complete lets go of the training state: not fit


def test_the_best_so_far_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.9, 0.2, 0.1] * 2)
    monkeypatch.setattr("adversa.classify.fit.balanced_accuracy", lambda *_: next(scores))
    whole = run(tmp_path / "whole", stream())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stream(stop_at=12))  # after the best (step 6) and the checkpoint (step 10)
    assert run(tmp_path / "killed", stream(10)) == whole and whole["best_step"] == 6
    a, b = (read_model(tmp_path / x)[0] for x in ("whole", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_seed_decides_and_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = RECIPE.model_copy(update={"steps": 2, "evaluations": 1})
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, stream(), config, seed)
        torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (read_model(tmp_path / x)[0] for x in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a if a[k].ndim == 4)


def test_every_step_is_augmented_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def watch(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return pixels

    monkeypatch.setattr("adversa.classify.fit.augment", watch)
    config = RECIPE.model_copy(update={"steps": 3, "evaluations": 1})
    run(tmp_path / "a", stream(), config)
    run(tmp_path / "b", stream(), config, seed=1)
    assert len(set(seeds)) == 6


def test_it_learns_and_the_folder_scores_alike(tmp_path: Path) -> None:
    config = Classifier(**TINY, steps=60, evaluations=3, lr=3e-3, ema=0.9, augment=False)
    found = run(tmp_path, stream(), config)
    assert found["select_balanced_accuracy"] > 0.95 and found["steps"] == 60
    unseen = batch(77, 30)
    logits, _ = make_scorer(tmp_path)(unseen["image"])
    assert balanced_accuracy(logits, unseen["label"]) > 0.9


def test_the_best_checkpoint_is_kept_and_of_equals_the_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.9, 0.9, 0.2])
    monkeypatch.setattr("adversa.classify.fit.balanced_accuracy", lambda *_: next(scores))
    found = run(tmp_path / "best", stream())
    assert found["best_step"] == 9 and found["select_balanced_accuracy"] == 0.9
    scores = iter([0.5, 0.9, 0.1, 0.2])
    assert run(tmp_path / "other", stream())["best_step"] == 6
    a, b = (read_model(tmp_path / x)[0] for x in ("best", "other"))
    assert not all(torch.equal(a[k], b[k]) for k in a)


def test_a_loss_that_is_not_finite_names_step_and_images(tmp_path: Path) -> None:
    config = RECIPE.model_copy(update={"lr": 1e30, "clip": 1e30, "amp": False, "warmup": 0.0})
    with pytest.raises(UserError, match=r"step \d+: loss (nan|inf).*classifier.lr.*\d+/0") as e:
        run(tmp_path, stream(), config)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stream(stop_at=7))
    with pytest.raises(UserError, match="other settings"):
        run(tmp_path, stream(5), seed=1)


def test_too_few_batches_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="step 4 of 12"):
        run(tmp_path, iter([batch(i) for i in range(4)]))


def test_schedule() -> None:
    config = Classifier(steps=100, warmup=0.1, lr=1.0)
    rates = [learning_rate(s, config) for s in range(1, 101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert rates[54] == pytest.approx((1 + 0.01) / 2)
    assert learning_rate(1, config.model_copy(update={"warmup": 0.0})) == pytest.approx(1.0, abs=1e-3)


def test_evaluations_are_even_and_include_the_last_step() -> None:
    assert evaluation_steps(600, 5) == {120, 240, 360, 480, 600}
    assert evaluation_steps(3, 5) == {1, 2, 3} and evaluation_steps(7, 1) == {7}


def test_average_follows_weights_and_statistics_by_the_closed_form() -> None:
    model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    for value in (model.weight, model.running_mean):
        torch.nn.init.constant_(value, 1.0)
    torch.nn.init.zeros_(average.weight)
    for step in range(1000, 1010):  # so late that the decay is the one asked for
        model.num_batches_tracked += 1
        update_average(average, model, 0.9, step)
    assert average.weight.tolist() == pytest.approx([1 - 0.9**10] * 2)
    assert average.running_mean.tolist() == pytest.approx([1 - 0.9**10] * 2)
    assert average.num_batches_tracked == 10
    update_average(average, model, 0.0, 5)
    assert torch.equal(average.weight, model.weight)


def test_balanced_accuracy_ignores_absent_classes() -> None:
    logits = np.eye(4)[[0, 0, 0, 1, 0]]
    assert balanced_accuracy(logits, np.array([0, 0, 0, 1, 1])) == pytest.approx(0.75)
